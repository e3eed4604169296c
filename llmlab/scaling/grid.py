"""`model.width=128,256;optimizer.learning_rate=1e-3,3e-3`: which settings a sweep runs, and what each run is called."""

import dataclasses
import itertools
import re
import zlib
from collections.abc import Mapping
from typing import Any

from llmlab.core.errors import UserError, nearest

Settings = dict[str, str]

CLOSING = {"(": ")", "[": "]", "{": "}"}
LONGEST_NAME = 160


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values of each swept key, as text: the config's own types give them meaning when they override it."""

    values: dict[str, tuple[str, ...]]

    def settings(self) -> list[Settings]:
        """One value of each key for every run, the last key changing fastest."""
        return [dict(zip(self.values, point, strict=True)) for point in itertools.product(*self.values.values())]

    def name(self, settings: Settings) -> str:
        """A folder name, `width=128,learning_rate=0.001`: the same however a number is written, and no other run's."""
        last = [key.rpartition(".")[2] for key in self.values]
        short = {key: end if last.count(end) == 1 else key for key, end in zip(self.values, last, strict=True)}
        name = ",".join(f"{short[key]}={_safe(str(typed(value)))}" for key, value in settings.items())
        return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}~{_hash(name)}"


def parse_sweep(text: str) -> Grid:
    """The grid that `KEY=VALUE,VALUE;KEY=VALUE` describes. Brackets and quotes keep a comma inside one value.

    Raises:
      UserError: nothing to sweep, a key without values or given twice, a value empty or given twice, an open bracket.
    """
    values: dict[str, tuple[str, ...]] = {}
    for clause in _split(text, ";"):
        if not clause:
            continue
        key, equals, listed = (part.strip() for part in clause.partition("="))
        if not equals or not key:
            raise UserError(f"--sweep: {clause!r} should be KEY=VALUE,VALUE such as model.width=128,256")
        if key in values:
            raise UserError(f"--sweep: {key} is given twice: put all its values in one list, {key}={values[key][0]},…")
        values[key] = _values(key, listed)
    if not values:
        raise UserError(
            "--sweep names no key: write it as --sweep='model.width=128,256;optimizer.learning_rate=1e-3,3e-3'"
        )
    return Grid(values)


def check_keys(grid: Grid, config: Mapping[str, Any]) -> None:
    """Raises UserError where a swept key is no leaf of `config` (a ConfigDict or nested dicts)."""
    leaves = list(_leaves(config))
    for key in grid.values:
        inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
        if inside:
            raise UserError(f"--sweep: {key} is a section: name one of its keys, such as {inside[0]}")
        if key not in leaves:
            raise UserError(f"--sweep: unknown config key {key}: {_nearest_leaf(key, leaves)}")


def typed(text: str) -> int | float | str:
    """The number that `text` spells, or the text itself."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _values(key: str, listed: str) -> tuple[str, ...]:
    values = _split(listed, ",")
    if not all(values):
        example = next(filter(None, values), "VALUE")
        raise UserError(f"--sweep: {key}={listed} has an empty value: write {key}={example},… or '' for an empty text")
    values = [_unquoted(value) for value in values]
    seen = [typed(value) for value in values]
    for value in values:
        if seen.count(typed(value)) > 1:
            raise UserError(f"--sweep: {key} has the value {value} twice: that would be one run, not two")
    return tuple(values)


def _split(text: str, separator: str) -> list[str]:
    """The stripped parts between separators that stand outside quotes and brackets."""
    parts, start, awaited, quote = [], 0, [""], ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in CLOSING:
            awaited.append(CLOSING[character])
        elif character == awaited[-1]:
            awaited.pop()
        elif character in CLOSING.values():
            raise UserError(f"--sweep: {character!r} closes nothing in {text!r}")
        elif character == separator and len(awaited) == 1:
            parts.append(text[start:i])
            start = i + 1
    if quote or len(awaited) > 1:
        raise UserError(f"--sweep: {quote or awaited[-1]!r} is missing in {text!r}")
    return [part.strip() for part in [*parts, text[start:]]]


def _unquoted(value: str) -> str:
    whole = re.fullmatch(r"'([^']*)'|\"([^\"]*)\"", value)
    return value[1:-1] if whole else value


def _safe(value: str) -> str:
    """`value` where any file system takes it; else its readable letters and a hash. `~` is only in the latter."""
    if re.fullmatch(r"[A-Za-z0-9._+-]{1,48}", value):
        return value
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', value).strip('-')[:24]}~{_hash(value)}"


def _hash(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    leaves = []
    for key in config:
        inner = config[key]
        nested = hasattr(inner, "keys") and len(inner) > 0
        leaves += _leaves(inner, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return leaves


def _nearest_leaf(key: str, leaves: list[str]) -> str:
    """The nearest leaf; a bare `width` finds `model.width`. Never the whole list, which would be long."""
    same_end = [leaf for leaf in leaves if leaf.rpartition(".")[2] == key.rpartition(".")[2]]
    sentence = nearest(key, same_end or leaves)
    return sentence if sentence.startswith("did you mean") else "llmlab train --print_config lists them all"
