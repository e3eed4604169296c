"""The built-in data of an assistant: the standard library's sources, and conversations and preferences about them.

What is held out is held out from every stage. It is what the held-out files of the text define, and a share of the
other functions: these are cut out of the text, and whatever else quotes the summary of either. What cannot be cut out
because much other text says the same, such as `def close(self):`, is not held out, or where it is in a held-out file,
on neither side. Offline, and the same for the same build of Python.
"""

import collections
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llmlab.core.errors import UserError
from llmlab.data import assistant_chat, assistant_preferences, library, sources_python, split, tools
from llmlab.data.library import Entry
from llmlab.data.split import Split

HELD_OUT_FILES = 0.1
HELD_OUT_FUNCTIONS = 0.06  # about two thirds of them can be cut out
MAX_QUOTES = 3


def assistant_rows(rows: str, split: Split) -> Iterator[tuple[str, str]]:
    """(name, row) of a stage: text as it is, every other kind of row as the JSON of an `Example`.

    Raises:
      UserError: there are no such rows, or this Python comes without its sources.
    """
    if rows == "text":
        yield from _text(split)
        return
    if rows != "chat" and rows not in assistant_preferences.ROWS:
        raise UserError(
            f"data.rows={rows!r} is nothing that data.source='assistant' has: set data.rows to text, chat, "
            f"{', '.join(assistant_preferences.ROWS[:-1])} or {assistant_preferences.ROWS[-1]}"
        )
    sides: tuple[Split, ...] = ("train", "held_out") if split == "all" else (split,)
    for side in sides:
        entries = known(side)
        if rows == "chat":
            examples = assistant_chat.examples(entries, side)
        else:
            examples = assistant_preferences.examples(rows, entries, side)
        yield from ((name, example.dumps()) for name, example in examples)


def known(split: Split) -> tuple[Entry, ...]:
    """The modules, classes and functions that the conversations of `split` are about, by name."""
    corpus = _corpus()
    return {"train": corpus.train, "held_out": corpus.held_out, "all": (*corpus.train, *corpus.held_out)}[split]


def fingerprint() -> str:
    """Changes with the code that makes the rows; what they are made of is `sources_python`'s."""
    modules = (assistant_chat, assistant_preferences, library, split, tools)
    files = [__file__, *(str(module.__file__) for module in modules)]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


class _Corpus(NamedTuple):
    """Who is on which side, and what of each training document is cut, as (first, behind the last) characters."""

    train: tuple[Entry, ...]
    held_out: tuple[Entry, ...]
    cuts: Mapping[str, list[tuple[int, int]]]


class _Found(NamedTuple):
    document: str
    start: int
    end: int


def _text(side: Split) -> Iterator[tuple[str, str]]:
    cuts = _corpus().cuts if side == "train" else {}
    for name in _documents(side):
        text = _read(name)
        if text := _without(text, cuts.get(name, [])):
            yield name, text


def _documents(side: Split) -> list[str]:
    names = list(sources_python.names())
    return split.by_name(names, {name: name for name in names}, HELD_OUT_FILES, side)


def _read(name: str) -> str:
    """A document, empty where a build's oddity makes it no UTF-8."""
    try:
        return sources_python.read_bytes(name).decode()
    except UnicodeDecodeError:
        return ""


@functools.cache
def _corpus() -> _Corpus:
    kept_back = set(_documents("held_out"))
    candidates = [
        entry
        for entry in library.library()
        if entry.document in kept_back or (entry.kind == "function" and split.place(entry.name) < HELD_OUT_FUNCTIONS)
    ]
    texts = {name: _read(name) for name in _documents("train")}
    said = _find([text for entry in candidates for text in (entry.summary, *entry.headers)], texts)
    cuts: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    held_out = []
    for entry in candidates:
        own = _definitions(entry, texts.get(entry.document, ""))
        quotes = [found for found in said[entry.summary] if not _inside(found, entry.document, own)]
        alone = all(_inside(found, entry.document, own) for header in entry.headers for found in said[header])
        if alone and len(quotes) <= MAX_QUOTES:
            held_out.append(entry)
            cuts[entry.document] += own
            for found in quotes:
                cuts[found.document].append((found.start, found.end))
    secret = {entry.name for entry in held_out}
    rest = [entry for entry in library.library() if entry.name not in secret and entry.document not in kept_back]
    told = _find([entry.summary for entry in held_out], {entry.name: entry.summary for entry in rest})
    telling = {found.document for places in told.values() for found in places}
    return _Corpus(tuple(entry for entry in rest if entry.name not in telling), tuple(held_out), cuts)


def _definitions(entry: Entry, text: str) -> list[tuple[int, int]]:
    """Where the text defines it; nowhere where the text is empty, as that of a held-out document is here."""
    if not text:
        return []
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return [(starts[first], min(starts[last + 1], len(text))) for first, last in entry.spans]


def _inside(found: _Found, document: str, spans: Sequence[tuple[int, int]]) -> bool:
    return found.document == document and any(start <= found.start and found.end <= end for start, end in spans)


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """`text` less `spans`, which may overlap."""
    kept, at = [], 0
    for start, end in sorted(spans):
        kept.append(text[at : max(at, start)])
        at = max(at, end)
    return "".join([*kept, text[at:]])


def _find(sentences: Sequence[str], texts: Mapping[str, str]) -> dict[str, list[_Found]]:
    """Where the texts say any of the sentences, whatever the case and whatever is between the words.

    Each is looked for by the rarest of its words.
    """
    said = {name: library.words(text) for name, text in texts.items()}
    frequency = collections.Counter(itertools.chain.from_iterable(said.values()))
    by_anchor: dict[str, list[tuple[str, list[str], int]]] = collections.defaultdict(list)
    for sentence in dict.fromkeys(sentences):
        sought = library.words(sentence)
        anchor = min(sought, key=lambda word: frequency[word])
        by_anchor[anchor].append((sentence, sought, sought.index(anchor)))
    places: dict[str, list[_Found]] = {sentence: [] for sentence in sentences}
    for name, there in said.items():
        spans: list[tuple[int, int]] = []
        for at, word in enumerate(there):
            for sentence, sought, before in by_anchor.get(word, ()):
                first, last = at - before, at - before + len(sought) - 1
                if first >= 0 and there[first : last + 1] == sought:
                    spans = spans or [match.span() for match in re.finditer(r"\w+", texts[name])]
                    places[sentence].append(_Found(name, spans[first][0], spans[last][1]))
    return places
