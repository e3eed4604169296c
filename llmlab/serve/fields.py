"""What a client sent, field by field: each of the right type and within its limits, or an error that names it."""

import gc
import json
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.requests import Request

from llmlab.core.errors import nearest
from llmlab.serve.errors import ApiError

# What clients send that changes nothing here.
IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
)


class Fields:
    """A JSON object whose fields are all known. One that is null counts as absent."""

    def __init__(self, values: Any, known: Iterable[str], where: str = ""):
        self._where = f"{where}." if where else ""
        if not isinstance(values, dict):
            raise ApiError(400, f"{where or 'the request'} should be a JSON object, not {_kind(values)}", param=where)
        self._values = {name: value for name, value in values.items() if value is not None}
        known = set(known)
        for name in self._values:
            if name not in known and name not in IGNORED:
                raise self.wrong(name, f"there is no such field: {nearest(name[:50], sorted(known))}")

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def wrong(self, name: str, why: str, code: str | None = None) -> ApiError:
        """The error that this field is wrong."""
        shown = self._where + name[:50]
        return ApiError(400, f"{shown}: {why}", param=shown, code=code)

    def get(self, name: str) -> Any:
        """As it is; None where it is absent."""
        return self._values.get(name)

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number."""
        value = self._values.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, f"it should be a whole number, not {_kind(value)}")
        if not least <= value <= most:
            raise self.wrong(name, f"{_shown(value)} should be from {least:,} to {most:,}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number."""
        value = self._values.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.wrong(name, f"it should be a number, not {_kind(value)}")
        if not least <= value <= most:
            raise self.wrong(name, f"{_shown(value)} should be from {least:g} to {most:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, f"it should be true or false, not {_kind(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self._values.get(name, default)
        if value is None:
            raise self.wrong(name, "it is missing")
        if not isinstance(value, str):
            raise self.wrong(name, f"it should be a string, not {_kind(value)}")
        return value

    def choice(self, name: str, default: str, choices: Sequence[str]) -> str:
        """One of these strings."""
        value = self.text(name, default)
        if value not in choices:
            raise self.wrong(name, f"{value[:50]!r} is not a choice: {nearest(value[:50], choices)}")
        return value

    def texts(self, name: str, most: int, length: int) -> tuple[str, ...]:
        """A string, or a list of at most so many, each of so many characters; none of them empty."""
        value = self._values.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise self.wrong(name, "it should be a string, or a list of strings")
        if len(values) > most or any(not 0 < len(text) <= length for text in values):
            raise self.wrong(name, f"give at most {most}, each of 1 to {length} characters")
        return tuple(values)


async def fields_of(request: Request, known: Iterable[str]) -> Fields:
    """The body of a request."""
    body = await request.body()
    # Else it is looked for cycles over and over while it grows, which takes three times as long.
    gc.disable()
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except ValueError as error:
        raise ApiError(400, f"the request is not JSON ({str(error)[:100]})") from None
    finally:
        gc.enable()
    return Fields(values, known)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if abs(value) < 10**15 else "this number"
