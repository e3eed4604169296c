"""`/tokenize`, `/detokenize` and `/tokenizer_info`: what a model reads."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmlab.serve.beside import Beside
from llmlab.serve.chat import template_of, turns_of
from llmlab.serve.errors import Json
from llmlab.serve.fields import fields_of
from llmlab.serve.logprobs import spelt
from llmlab.serve.models import Served, chosen, limits_of
from llmlab.serve.tools import offered

_MOST = 2**16  # or as many as the model reads, if these are more
_spelling = Beside("spelling")


async def tokenize(request: HttpRequest) -> Response:
    """The ids of a text or a conversation, each with its bytes; those of the empty text are BOS, as in a prompt."""
    known = ("model", "prompt", "messages", "tools", "add_special_tokens", "add_generation_prompt")
    fields = await fields_of(request, known)
    model = chosen(request, fields)
    opens, bos = fields.flag("add_generation_prompt", True), fields.flag("add_special_tokens", True)
    if "messages" in fields:
        template, offer, limits = template_of(model), offered(fields), limits_of(request)
        template = template.with_tools(offer.entries()) if offer.tools else template
        return await _spelling(lambda: _shown(template.render(turns_of(fields, limits), generate=opens).ids, model))
    text = fields.text("prompt")
    most = max(_MOST, model.reach * model.longest_token)
    if len(text) > most:
        raise fields.wrong("prompt", f"it should be at most {most:,} characters")
    first = [model.opened.tokenizer.bos_id] if bos or not text else []
    return await _spelling(lambda: _shown([*first, *model.opened.tokenizer.encode(text)], model))


async def detokenize(request: HttpRequest) -> Response:
    """The text of ids."""
    fields = await fields_of(request, ("model", "tokens"))
    model = chosen(request, fields)
    ids, vocab = fields.get("tokens"), model.opened.model.config.vocab_size
    most = max(_MOST, model.reach)
    if not isinstance(ids, list) or len(ids) > most:
        raise fields.wrong("tokens", f"it should be a list of at most {most:,} ids")

    def spelt_out() -> Response:
        if not all(type(id) is int and 0 <= id < vocab for id in ids):
            raise fields.wrong("tokens", f"it should be a list of ids, from 0 to {vocab - 1}")
        return Json({"prompt": model.opened.tokenizer.decode(ids)})

    return await _spelling(spelt_out)


async def tokenizer_info(request: HttpRequest) -> Response:
    """What clients without a tokenizer of their own ask before they use the first model's through the other two.

    They look up the id of BOS by its text, and no text spells a marker here: BOS is what the empty one is read as, and
    there is none for EOS.
    """
    model = next(iter(request.app.state.models.values()))
    return Json({"bos_token": "", "eos_token": None, "model_max_length": model.reach})


def _shown(ids: list[int], model: Served) -> Response:
    """Written out here too, beside the event loop, which a long text would hold up."""
    tokenizer, different = model.opened.tokenizer, set(ids)
    texts = {id: spelt(tokenizer, id) for id in different}
    bytes_of = {id: list(tokenizer.decode_bytes([id])) for id in different}
    return Json(
        {
            "count": len(ids),
            "max_model_len": model.reach,
            "tokens": ids,
            "token_strs": [texts[id] for id in ids],
            "bytes": [bytes_of[id] for id in ids],
        }
    )
