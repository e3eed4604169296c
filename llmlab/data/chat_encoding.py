"""The ids of a conversation that a template wrote out as one string: its own markers are ids, typed ones stay text.

A marker that somebody typed is broken before the template sees it: a private-use character stands between its letters.
What is not broken was written by the template, and becomes what transformers makes of it.
"""

import bisect
import functools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from llmlab.core.errors import UserError
from llmlab.data.chat_jinja import MARKER, JinjaTemplate
from llmlab.data.tokenizer import refuse_surrogates
from llmlab.data.tokenizer_imported import ImportedTokenizer


class Encoded(NamedTuple):
    """Ids, the character each begins at, and which of them are markers of the template: place in `ids` and id."""

    ids: list[int]
    starts: list[int]
    markers: list[tuple[int, int]]

    def first_from(self, character: int) -> int:
        """The place of the first id that begins at this character or after it."""
        return bisect.bisect_left(self.starts, character)


class Encoder:
    """Breaks what people type, and encodes what the template wrote.

    Attributes:
      control: the id of every added token that steers a conversation. Others, such as runs of spaces or names of tags,
        are ways to write text.
    """

    def __init__(self, tokenizer: ImportedTokenizer, template: JinjaTemplate):
        import tokenizers

        self._content = _plain(tokenizer)
        self._whole = tokenizers.Tokenizer.from_str(self._content)
        written = "\0".join(template.literals)
        self.control = {
            entry["content"]: entry["id"]
            for entry in json.loads(self._content)["added_tokens"]
            if entry["special"] or _steers(entry["content"], written)
        }
        self._name_of = {id: name for name, id in self.control.items() if id != tokenizer.unk_id}
        looked_for = {name for constant in template.constants for name in MARKER.findall(constant)}
        names = sorted({*self.control, *looked_for}, key=len, reverse=True)
        self._markers = re.compile("|".join(re.escape(name) for name in names if len(name) > 1) or "(?!)")

    def broken(self, text: str, breaker: str) -> str:
        """`text` with a breaker between the letters of every marker in it."""
        refuse_surrogates(text)
        while self._markers.search(text):
            text = self._markers.sub(lambda marker: breaker.join(marker[0]), text)
        return text

    def encode(self, text: str, breaker: str) -> Encoded:
        """What the template wrote, in ids; characters are counted with the breakers.

        Raises:
          UserError: this tokenizer makes a marker of text, however it is encoded.
        """
        ids, offsets = _encoded(self._whole, text)
        known = [place for place, id in enumerate(ids) if id in self._name_of]
        own = {  # where the template wrote a marker; what only normalisation makes one was typed
            text.index(name, *offsets[place]): ids[place]
            for place in known
            if (name := self._name_of[ids[place]]) in text[slice(*offsets[place])]
        }
        if breaker not in text and len(own) == len(known):
            return Encoded(ids, [start for start, _ in offsets], [(place, ids[place]) for place in known])
        letters, origin = [], []
        for place, letter in enumerate(text):
            if place in own:
                letters.append(breaker)
                origin.append(place)
            if letter != breaker:
                letters.append(letter)
                origin.append(place)
        origin.append(len(text))
        library, id_of = _escaping(self._content, tuple(self.control), breaker)
        ids, offsets = _encoded(library, "".join(letters))
        ids = [id_of.get(id, id) for id in ids]
        markers = [(place, id) for place, id in enumerate(ids) if id in self._name_of]
        if [id for _, id in markers] != list(own.values()):
            raise UserError(
                "a text of this conversation spells a marker, which this tokenizer cannot tell from its own"
            )
        return Encoded(ids, [origin[start] for start, _ in offsets], markers)

    def pieces(self, text: str) -> list[str | int]:
        """What the template wrote: its markers as ids, the text between them as it is."""
        encoded, pieces, last = self.encode(text, next(unused(text))), list[str | int](), 0
        for place, id in encoded.markers:
            start = text.index(self._name_of[id], encoded.starts[place])
            pieces += [text[last:start], id]
            last = start + len(self._name_of[id])
        return [piece for piece in [*pieces, text[last:]] if piece != ""]


def unused(text: str) -> Iterator[str]:
    """Private-use characters that do not stand in the text."""
    used = set(text)
    return (letter for letter in map(chr, range(0xF0000, 0xFFFFE)) if letter not in used)


def _encoded(library: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    found = library.encode(text, add_special_tokens=False)
    return found.ids, found.offsets  # each of which the library makes anew when asked


@functools.lru_cache(maxsize=2)
def _escaping(content: str, control: tuple[str, ...], breaker: str) -> tuple[Any, dict[int, int]]:
    """The tokenizer whose markers are spelt with a breaker before them, and its ids of them in ours."""
    import tokenizers

    description = json.loads(content)
    ours = {}
    for entry in description["added_tokens"]:
        entry["content"] = breaker * (entry["content"] in control) + entry["content"]
        ours[entry["content"]] = entry["id"]
    library: Any = tokenizers.Tokenizer.from_str(json.dumps(description))
    return library, {library.token_to_id(name): id for name, id in ours.items()}


def _plain(tokenizer: ImportedTokenizer) -> str:
    """Its tokenizer.json without what changes offsets or lengths, and with the named tokens all added."""
    description = json.loads(tokenizer.content) | {"post_processor": None, "padding": None, "truncation": None}
    assert tokenizer.chat is not None
    added = {entry["content"] for entry in description["added_tokens"]}
    vocabulary = description["model"]["vocab"]
    for name in dict.fromkeys(tokenizer.chat.tokens.values()):
        if name not in added and name in vocabulary:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            description["added_tokens"].append({"id": vocabulary[name], "content": name, "special": True} | flags)
    return json.dumps(description)


def _steers(name: str, written: str) -> bool:
    """Whether an added token that is not called special is a marker of conversations all the same."""
    return bool(MARKER.fullmatch(name)) and (name in written or name[1] in "|｜")
