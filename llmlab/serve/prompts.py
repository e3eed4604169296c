"""Prompts as a request gives them, and as the ids that a model reads."""

from typing import Any

from llmlab.serve.beside import Beside
from llmlab.serve.errors import ApiError
from llmlab.serve.fields import Fields
from llmlab.serve.limits import Limits
from llmlab.serve.models import Served

reading = Beside("reading", threads=2, most=256)  # texts and conversations that fit into a model's positions


def prompts_of(fields: Fields, name: str, model: Served, limits: Limits) -> list[str | list[int]]:
    """Each as text or ids: a string, a list of them, a list of ids, or a list of these.

    Raises:
      ApiError: there are none or too many, or one is neither; or it is far too long, as is seen without reading it.
    """
    given: Any = fields.get(name)
    given = "" if given is None else given
    most = max(model.reach, limits.prompts)
    if isinstance(given, list) and len(given) > most:
        why = (
            f"{len(given):,} are more than the model's {model.reach:,} positions, or {limits.prompts} texts: send fewer"
        )
        raise fields.wrong(name, why, code="context_length_exceeded")
    several = isinstance(given, list) and not all(_is_id(item) for item in given)
    values: list[Any] = given if several else [given]
    if not 1 <= len(values) <= limits.prompts:
        raise fields.wrong(name, f"{len(values)} of them should be from 1 to {limits.prompts}")
    vocab = model.opened.model.config.vocab_size
    for value in values:
        if isinstance(value, str):
            if len(value) > model.reach * model.longest_token:
                why = f"a text of {len(value):,} characters is longer than the model's {model.reach:,} positions"
                raise ApiError(400, f"{why}: shorten it", code="context_length_exceeded")
        elif not (isinstance(value, list) and value and all(_is_id(id) and 0 <= id < vocab for id in value)):
            raise fields.wrong(name, f"give text, ids from 0 to {vocab - 1}, or a list of either; none empty")
    return values


async def ids_of(prompts: list[str | list[int]], model: Served, *, bos: bool) -> list[tuple[int, ...]]:
    """Each as ids, beside the event loop; `bos` begins those that are text, and an empty one in any case."""
    tokenizer = model.opened.tokenizer

    def ids(prompt: str | list[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        begin = (tokenizer.bos_id,) if bos or not prompt else ()
        return (*begin, *tokenizer.encode(prompt))

    return await reading(lambda: [ids(prompt) for prompt in prompts])


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
