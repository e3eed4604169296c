"""One token a character: the smallest tokenizer, for small alphabets and for comparison with character-level work.

Ids 0 … C-1 are the characters of the training text in code-point order; pad, BOS, EOS, unknown and then the chat
markers, if any, come after them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llmlab.core.errors import UserError
from llmlab.core.paths import write_atomic
from llmlab.data.tokenizer import DOCUMENT_MARKERS, refuse_surrogates, visible

_FORMAT = "llmlab character tokenizer"


class CharacterTokenizer:
    """Knows `characters`; any other becomes the unknown id, which decodes to U+FFFD and counts as its three bytes."""

    kind = "character"

    def __init__(self, characters: str, markers: Sequence[str] = ()):
        self._characters, self._markers = characters, tuple(markers)
        self._names = [*characters, *DOCUMENT_MARKERS, *self._markers]
        self.vocab_size = len(self._names)
        first = len(characters)
        self.pad_id, self.bos_id, self.eos_id, self._unknown = range(first, first + len(DOCUMENT_MARKERS))
        self.unk_id: int | None = self._unknown
        self.control: Mapping[str, int] = {
            marker: id for id, marker in enumerate(self._markers, first + len(DOCUMENT_MARKERS))
        }
        self._ids = {character: id for id, character in enumerate(characters)}
        self._texts = [*characters, "", "", "", "\ufffd", *("" for _ in self._markers)]
        self.lossless = False
        self.fingerprint = hashlib.sha256(self._json()).hexdigest()

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        return [self._ids.get(character, self._unknown) for character in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._texts[i] for i in ids if i < self.vocab_size)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def token_bytes(self) -> np.ndarray:
        return np.array([len(text.encode()) for text in self._texts], np.int32)

    def piece(self, id: int) -> str:
        return visible(self._names[id])

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomic(path, self._json())

    def _json(self) -> bytes:
        return json.dumps({"format": _FORMAT, "characters": self._characters, "markers": self._markers}).encode()


def character_tokenizer_from_json(content: bytes, name: str) -> CharacterTokenizer:
    """The tokenizer that `save` wrote; a UserError names `name` if `content` is something else."""
    try:
        fields = json.loads(content)
    except ValueError:
        fields = {}
    if fields.get("format") != _FORMAT:
        raise UserError(
            f"{name} is not a tokenizer: it starts as JSON, but is no character tokenizer that llmlab saved whole; "
            "give that or a SentencePiece .model file"
        )
    return CharacterTokenizer(fields["characters"], fields["markers"])
