"""`/v1/preferences`: which of two answers a person liked better, kept as a row that reward models are trained on."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmlab.data.rows import examples
from llmlab.infer.chat import split
from llmlab.infer.kept import append_rows
from llmlab.infer.rank import ranking_rows
from llmlab.serve.beside import Beside
from llmlab.serve.errors import Json
from llmlab.serve.fields import fields_of
from llmlab.serve.models import chosen
from llmlab.serve.tools import as_said

_votes = Beside("votes")  # one at a time


async def preferences(request: HttpRequest) -> Response:
    """The endpoint: prompt, chosen and rejected, as messages, or the answers as text."""
    fields = await fields_of(request, ("model", "prompt", "chosen", "rejected"))
    model = chosen(request, fields)
    row = {name: as_said(fields.get(name)) for name in ("prompt", "chosen", "rejected") if name in fields}
    (example,) = examples(row, "preference")
    (prompt, better), (_, worse) = (split(response.conversation) for response in example.responses)
    await _votes(append_rows, model.preferences, ranking_rows(prompt, [better, worse], "best"))
    return Json({"object": "preference", "model": model.name, "file": model.preferences})
