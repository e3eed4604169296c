"""What the model thought of the tokens that it wrote, given out along with their text."""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmlab.data.tokenizer import Tokenizer
from llmlab.infer.request import Event

_LEAST = -9999.0  # JSON has no infinity


class Entry(NamedTuple):
    """A token, and the place in the text where it begins."""

    id: int
    logp: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


class Scores:
    """The tokens of one text, each held until something of it is given out."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._held = tokenizer, list[Entry]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def add(self, event: Event) -> None:
        """One more token."""
        assert event.token is not None
        self._held.append(Entry(event.token, event.logp, event.top, self._length))
        self._length += len(self._decoder.decode(self._tokenizer.decode_bytes([event.token])))

    def upto(self, length: int) -> list[Entry]:
        """Those that begin before this place, once."""
        count = sum(entry.offset < length for entry in self._held)
        entries, self._held = self._held[:count], self._held[count:]
        return entries

    def rest(self) -> list[Entry]:
        """All that are left."""
        entries, self._held = self._held, []
        return entries

    def restart(self, length: int) -> None:
        """What was held was no part of the text, which is so long."""
        self._held, self._length = [], length


def for_completions(entries: Sequence[Entry], tokenizer: Tokenizer) -> dict[str, Any]:
    """As `/v1/completions` has them."""
    return {
        "tokens": [spelt(tokenizer, entry.id) for entry in entries],
        "token_logprobs": [None if entry.logp is None else max(entry.logp, _LEAST) for entry in entries],
        "top_logprobs": [
            None if entry.logp is None else {spelt(tokenizer, id): max(logp, _LEAST) for id, logp in _all(entry)[::-1]}
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }


def for_chat(entries: Sequence[Entry], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """As `/v1/chat/completions` has them."""

    def shown(id: int, logp: float | None) -> dict[str, Any]:
        data = tokenizer.decode_bytes([id])
        return {"token": spelt(tokenizer, id), "logprob": max(logp or 0.0, _LEAST), "bytes": list(data)}

    return [
        shown(entry.id, entry.logp) | {"top_logprobs": [shown(id, logp) for id, logp in entry.top]} for entry in entries
    ]


def spelt(tokenizer: Tokenizer, id: int) -> str:
    """A token as text: its own, its bytes where these are no whole characters, the name of a marker."""
    data = tokenizer.decode_bytes([id])
    try:
        return data.decode() or tokenizer.piece(id)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _all(entry: Entry) -> list[tuple[int, float]]:
    """The likeliest, and the token itself; the likelier of two that are spelt alike comes last in a dict of these."""
    own = [] if entry.logp is None or entry.id in dict(entry.top) else [(entry.id, entry.logp)]
    return [*entry.top, *own]
