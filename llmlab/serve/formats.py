"""What form an answer must have."""

from collections.abc import Callable, Mapping
from typing import Any

from llmlab.core.errors import UserError
from llmlab.data.chat import CallForm
from llmlab.infer.request import Limit
from llmlab.infer.structured import Structures
from llmlab.serve.beside import Beside
from llmlab.serve.errors import ApiError

_compiling = Beside("forms")  # one at a time, each of which may take seconds
FORMS = ("text", "json_object", "json_schema", "regex", "grammar")


async def limit_for(response_format: Any, structures: Callable[[], Structures]) -> Limit | None:
    """What keeps a sample to a `response_format`, and every other by its `fresh`; None where every text will do.

    Besides OpenAI's there are {"type": "regex", "regex": …} and {"type": "grammar", "grammar": …}, in Lark's spelling.

    Raises:
      ApiError: there is no such form, or it cannot be enforced.
    """
    if response_format is None:
        return None
    form = response_format if isinstance(response_format, dict) else {}
    kind = form.get("type")
    if kind == "text":
        return None
    given: Any = {"type": "object"}
    if kind == "json_schema":
        schema = form.get("json_schema")
        given = schema.get("schema") if isinstance(schema, dict) else None
    elif kind in ("regex", "grammar"):
        given = form.get(kind)
    elif kind != "json_object":
        raise _wrong(f"{str(kind)[:50]!r} is not a choice: {', '.join(FORMS)}")
    if not isinstance(given, str if kind in ("regex", "grammar") else dict | bool):
        where = "json_schema.schema" if kind == "json_schema" else kind
        raise _wrong(f"{where} is missing, or of another type")
    try:
        return await _compiling(_limit, structures, kind, given)
    except UserError as error:
        raise _wrong(str(error)) from None


async def call_limit(
    form: CallForm | None, tools: Mapping[str, Any], structures: Callable[[], Structures]
) -> Limit | None:
    """What keeps a sample to a call of one of these tools, as `Structures.call` has them; None where there are none.

    Raises:
      ApiError: it cannot be enforced.
    """
    if not tools:
        return None
    if form is None:
        raise ApiError(400, "tool_choice: it is not known how this model writes calls: use auto", param="tool_choice")
    try:
        return await _compiling(lambda: structures().call(form, tools))
    except UserError as error:
        raise ApiError(400, f"tool_choice: {error}", param="tool_choice") from None


def _limit(structures: Callable[[], Structures], kind: Any, given: Any) -> Limit:
    """Takes up to seconds where the form is large."""
    make = structures()
    return {"regex": make.regex, "grammar": make.grammar}.get(kind, make.schema)(given)


def _wrong(why: str) -> ApiError:
    return ApiError(400, f"response_format: {why}", param="response_format")
