"""`/v1/embeddings`: texts as vectors."""

import base64
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmlab.serve.beside import Beside
from llmlab.serve.errors import Json
from llmlab.serve.fields import fields_of
from llmlab.serve.models import Served, chosen, limits_of
from llmlab.serve.prompts import ids_of, prompts_of

vectors = Beside("vectors")  # one text at a time: beside it the engine goes on
LONGEST_REST = 0.1  # seconds: a first text of its length is compiled for, which is no reason to rest as long


async def embeddings(request: HttpRequest) -> Response:
    """The endpoint."""
    fields = await fields_of(request, ("model", "input", "encoding_format", "dimensions"))
    model = chosen(request, fields)
    if "dimensions" in fields:
        raise fields.wrong("dimensions", f"vectors here have {model.embedder.size} numbers: leave it out")
    form = fields.choice("encoding_format", "float", ("float", "base64"))
    texts = await ids_of(prompts_of(fields, "input", model, limits_of(request)), model, bos=True)
    for ids in texts:
        model.embedder.check(ids)
    data: list[dict[str, Any]] = []
    for index, ids in enumerate(texts):
        vector_D = await vectors(_vector, model, ids)
        shown = vector_D.tolist() if form == "float" else base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": shown})
    count = sum(map(len, texts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return Json({"object": "list", "model": model.name, "data": data, "usage": usage})


def _vector(model: Served, ids: Sequence[int]) -> np.ndarray:
    """float32 [D]. About half of the time is left to those who wait for every token, where there are any."""
    begun = time.monotonic()
    vector_D = model.embedder.of_ids([ids])[0]
    if model.service.load["running"]:
        time.sleep(min(time.monotonic() - begun, LONGEST_REST))
    return vector_D
