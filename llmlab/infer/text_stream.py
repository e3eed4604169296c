"""Tokens to text as they come: whole characters, up to the first stop string, held back only as long as they must be.

The pieces joined equal the whole: what decoding all the bytes at once gives, up to where the first stop string begins.
"""

import codecs
from collections.abc import Sequence

from llmlab.core.text import may_become
from llmlab.data.tokenizer import Tokenizer


class Stops:
    """Text up to the first of the stop strings: the one that is complete first, and of those the longest.

    stopped: whether there was one; nothing comes after that.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self._stop, self._held, self.stopped = stop, "", False

    def add(self, text: str) -> str:
        """What can be given out now that `text` has come."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self._held, self.stopped = "", True
            return held[: min(found)[1]]
        ready = len(held) - may_become(held, self._stop)
        self._held = held[ready:]
        return held[:ready]

    def end(self) -> str:
        """What was held back, as nothing more comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of the ids that are added. Bytes that are no UTF-8, or end inside a character, give U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, Stops(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    def add(self, id: int) -> str:
        """The text that is there for good now, which may be none."""
        return self._stops.add(self._decoder.decode(self._tokenizer.decode_bytes([id])))

    def end(self) -> str:
        """The rest, as no more ids come."""
        return self._stops.add(self._decoder.decode(b"", final=True)) + self._stops.end()
