"""Files cut into passages: whole paragraphs up to a length, each with its lines and the heading that it stands under.

The heading of a passage of Python is the name of what is defined there; of Markdown and reStructuredText its section.
"""

import ast
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llmlab.core.errors import UserError
from llmlab.data.readers import BadInput, UnreadableError, characters, jsonl_rows, text_of

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_UNDERLINE = re.compile(r"([=\-~^\"'#*+.:_`])\1{2,}\s*")


class Passage(NamedTuple):
    """`text` is lines `first` to `last` of a file, counted from 1; of JSON lines what their field holds."""

    file: str
    first: int
    last: int
    heading: str
    text: str

    @property
    def source(self) -> str:
        """What an answer names it by."""
        return f"{self.file}:{self.first}-{self.last}"


def passages_of(path: Path, name: str, *, limit: int, field: str = "text") -> Iterator[Passage]:
    """The passages of one file, which `name` stands for, of at most `limit` characters each.

    Raises:
      UserError: it cannot be read.
    """
    if path.suffix == ".jsonl":
        for row in jsonl_rows(path):
            text = row if isinstance(row, BadInput) else text_of(row, field)
            if isinstance(text, BadInput) or isinstance(row, BadInput):
                raise UserError(str(text))
            for _, _, piece in _pieces(text.split("\n"), 0, limit):
                yield Passage(name, row.number, row.number, "", piece)
        return
    try:
        lines = "".join(characters(path)).split("\n")
    except UnreadableError as error:
        raise UserError(str(error.bad)) from None
    headings = {".py": _python, ".md": _markdown, ".rst": _restructured}.get(path.suffix, _plain)(lines, name)
    for heading, numbered in itertools.groupby(enumerate(headings), key=lambda each: each[1]):
        places = [place for place, _ in numbered]
        for first, last, piece in _pieces(lines[places[0] : places[-1] + 1], places[0], limit):
            yield Passage(name, first + 1, last + 1, heading, piece)


def _pieces(lines: Sequence[str], begin: int, limit: int) -> Iterator[tuple[int, int, str]]:
    """(first, last, text): as many whole paragraphs as fit, or else lines, or else parts of one."""
    held: list[tuple[int, str]] = []

    def flush() -> Iterator[tuple[int, int, str]]:
        if held:
            yield held[0][0], held[-1][0], "\n".join(line for _, line in held)
            held.clear()

    def length(lines: Sequence[tuple[int, str]]) -> int:
        return sum(len(line) + 1 for _, line in lines) - 1

    numbered = list(enumerate(lines, begin))
    blank = 0
    for empty, group in itertools.groupby(numbered, key=lambda each: not each[1].strip()):
        paragraph = list(group)
        if empty:
            blank = len(paragraph)
            continue
        if held and length(held) + blank + 1 + length(paragraph) > limit:
            yield from flush()
        elif held:
            held += [(place, "") for place in range(held[-1][0] + 1, paragraph[0][0])]
        for place, line in paragraph:
            for part in (line[cut : cut + limit] for cut in range(0, max(len(line), 1), limit)):
                if held and length(held) + 1 + len(part) > limit:
                    yield from flush()
                held.append((place, part))
    yield from flush()


def _plain(lines: Sequence[str], name: str) -> list[str]:
    return [""] * len(lines)


def _markdown(lines: Sequence[str], name: str) -> list[str]:
    """The titles that each line stands under, from the topmost down."""
    titles: dict[int, str] = {}
    headings, fenced = [], False
    for line in lines:
        fenced ^= line.lstrip().startswith("```")
        found = None if fenced else re.match(r"(#{1,6})\s+(.*?)[\s#]*$", line)
        if found:
            level = len(found[1])
            titles = {at: title for at, title in titles.items() if at < level} | {level: found[2]}
        headings.append(" / ".join(titles.values()))
    return headings


def _restructured(lines: Sequence[str], name: str) -> list[str]:
    headings, title = [], ""
    for line, below in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        if line.strip() and not _UNDERLINE.fullmatch(line) and _UNDERLINE.fullmatch(below):
            title = line.strip()
        headings.append(title)
    return headings


def _python(lines: Sequence[str], name: str) -> list[str]:
    """What each line belongs to: `module json.decoder`, `class json.decoder.JSONDecoder`, …; nothing if no Python."""
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about code that is not ours
            body = ast.parse("\n".join(lines)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return _plain(lines, name)
    headings = [f"module {module}"] * len(lines)
    left = [(node, module) for node in body]
    while left:
        node, parent = left.pop(0)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            begin = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
            end = node.end_lineno or node.lineno
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            headings[begin:end] = [f"{kind} {parent}.{node.name}"] * (end - begin)
            if isinstance(node, ast.ClassDef):
                left += [(each, f"{parent}.{node.name}") for each in node.body]
        elif isinstance(node, ast.If | ast.Try):
            handlers = [each for handler in getattr(node, "handlers", ()) for each in handler.body]
            left += [(each, parent) for each in (*node.body, *handlers, *node.orelse)]
    return headings
