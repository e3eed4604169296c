"""What form an answer must have."""

from typing import Any

from llmlab.data.tokenizer import Tokenizer
from llmlab.infer.request import Limit
from llmlab.serve.errors import ApiError


def limit_for(response_format: Any, tokenizer: Tokenizer) -> Limit | None:
    """What keeps one sample to a `response_format`; None where every text will do.

    Raises:
      ApiError: there is no such form, or it cannot be enforced.
    """
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if response_format is None or kind == "text":
        return None
    known = ("json_object", "json_schema")
    why = "is not enforced by this server yet: use text" if kind in known else "is not a choice: use text"
    raise ApiError(400, f"response_format: {str(kind)[:50]!r} {why}", param="response_format")
