"""Whether a JSON schema can be enforced: what llguidance would pass over in silence is refused here, by keyword."""

import difflib
from typing import Any

from llmlab.core.errors import UserError

_ONE = ("items", "additionalItems", "additionalProperties")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_KEYWORDS = {
    *(*_ONE, *_LISTED, *_NAMED, *_BOUNDS),
    *("type", "enum", "const", "$ref", "multipleOf", "minLength", "maxLength", "pattern", "format"),
    *("minItems", "maxItems", "required", "minProperties", "maxProperties"),
}
# They ask for nothing.
_NOTES = {
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "example", "examples"),
    *("deprecated", "readOnly", "writeOnly", "discriminator"),
}
_COSTLY = {"pattern", "patternProperties", "format", "multipleOf"}
_MANY = 200
_EXACT = 2**53  # from where on not every integer is a double, as llguidance keeps bounds


def check_schema(schema: Any, *, depth: int, parts: int) -> bool:
    """Whether compiling it may take long.

    Raises:
      UserError: it holds what would not be enforced, or is deeper than `depth`, or has more schemas and values than
        `parts`.
    """
    left, count, costly = [("#", schema, 0)], 0, False
    while left:
        path, here, level = left.pop()
        count += 1 if not isinstance(here, dict) else 1 + sum(map(_size, here.values()))
        if level > depth:
            raise UserError(f"the schema nests deeper than {depth} levels: write it flatter")
        if count > parts:
            raise UserError(f"the schema has more than {parts:,} parts: write a smaller one")
        if isinstance(here, bool):
            continue
        if not isinstance(here, dict):
            raise UserError(f"{path} in the schema should be an object, or true or false, and is {_shown(here)}")
        _check_keywords(path, here)
        costly |= not _COSTLY.isdisjoint(here)
        for keyword, value in here.items():
            where = f"{path}/{keyword}"
            if keyword in _NAMED and isinstance(value, dict):
                left += [(f"{where}/{name}", inner, level + 1) for name, inner in value.items()]
            elif (keyword in _LISTED or keyword == "items") and isinstance(value, list):
                left += [(f"{where}/{place}", inner, level + 1) for place, inner in enumerate(value)]
            elif keyword in (*_ONE, *_NAMED, *_LISTED):
                left.append((where, value, level + 1))
    return costly or count > _MANY


def _check_keywords(path: str, schema: dict[str, Any]) -> None:
    for keyword, value in schema.items():
        if keyword not in _KEYWORDS | _NOTES:
            near = difflib.get_close_matches(str(keyword), _KEYWORDS, 1, 0.8)
            mend = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise UserError(f"{path} in the schema: the keyword {keyword!r} cannot be enforced: {mend}")
        if keyword in _BOUNDS and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{path}/{keyword} in the schema should be a number, and is {_shown(value)}")
        if keyword in _BOUNDS and not abs(value) <= _EXACT:
            raise UserError(f"{path}/{keyword} in the schema is {_shown(value)}: bounds reach 2**53, no further")
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    if isinstance(required, list) and isinstance(least, int) and least > len(set(map(str, required))) + 1:
        # Names beside those in `properties` may come twice, and count once.
        raise UserError(
            f"{path} in the schema: minProperties={least} cannot be enforced: name properties in 'required', all of "
            f"them but one at most"
        )


def _size(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
