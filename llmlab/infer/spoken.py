"""What an assistant says, as its ids come: text, thinking and whole calls, free of markers."""

from collections.abc import Iterable, Sequence
from typing import Literal

from llmlab.data.chat import ChatTemplate, Message, Piece, joined
from llmlab.data.tokenizer import Tokenizer

Kind = Literal["text", "thinking", "call", "result", "note"]

# Markers of published models that are no control tokens to their tokenizers, and to some no tokens at all.
_PLAIN_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


class Spoken:
    """One turn, whose `ids` grow as they are added; `prompt` is what they follow."""

    def __init__(self, template: ChatTemplate, prompt: Sequence[int]):
        self._reader, self._stop_ids = template.reader(prompt), template.stop_ids
        self._pieces: list[Piece] = []
        self._over = False
        self.ids: list[int] = []

    def add(self, id: int) -> list[Piece]:
        """What can be said now; nothing once the turn has ended."""
        self.ids.append(id)
        self._over = self._over or self.ended
        return [] if self._over else self._said(self._reader.add(id))

    def end(self) -> list[Piece]:
        """The rest, as no more ids come."""
        return self._said(self._reader.end())

    @property
    def ended(self) -> bool:
        """Whether the turn has ended by itself."""
        return bool(self.ids) and self.ids[-1] in self._stop_ids

    @property
    def message(self) -> Message:
        """All that was said."""
        return joined(self._pieces)

    def _said(self, pieces: list[Piece]) -> list[Piece]:
        self._pieces += pieces
        return pieces


def markers_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that are no text."""
    plain = (tokenizer.encode(marker) for marker in _PLAIN_MARKERS)
    return frozenset([*tokenizer.control.values(), *(ids[0] for ids in plain if len(ids) == 1)])


def texts_of(tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> list[bytes]:
    """The text of every id of a model with `vocab_size` logits; none of a marker, an end, or what is no token."""
    ends = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, *stop_ids}
    no_text = {*markers_of(tokenizer), *ends}
    known = range(min(tokenizer.vocab_size, vocab_size))
    texts = [b"" if id in no_text else tokenizer.decode_bytes([id]) for id in known]
    return texts + [b""] * (vocab_size - len(texts))
