"""Text to token ids and back: the interface, loading one from a file, and the SentencePiece tokenizer.

The models trained here are lossless: every valid Unicode string decodes to itself, byte for byte. A SentencePiece file
from elsewhere is used as it is, with whatever normalisation it brings; `lossless` says which of the two is at hand.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import sentencepiece
from etils import epath

from llmlab.core.errors import UserError
from llmlab.core.paths import write_atomic

# Reserved in every vocabulary from the start, so that a pretrained model can become a chat model as it is.
CHAT_MARKERS = (
    *("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    *("<|think|>", "<|/think|>", "<|call|>", "<|/call|>", "<|result|>"),
)
_RESERVED_MARKERS = tuple(f"<|reserved_{i}|>" for i in range(18))
DOCUMENT_MARKERS = ("<pad>", "<s>", "</s>", "<unk>")


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to train, or which file to load instead.

    Attributes:
      kind: "sentencepiece" (byte-pair encoding) or "character" (one token a character).
      vocab_size: ids of a sentencepiece tokenizer, markers and byte pieces included; "character" takes what it finds.
      file: a SentencePiece model, or a tokenizer saved by llmlab, to use instead of training one.
      sample_bytes: a larger training text is sampled down to this, which bounds memory.
      character_coverage: the part of the text whose characters get a piece each; rarer ones are spelt by their bytes.
      chat_markers: whether to reserve ids for the chat markers.
    """

    kind: Literal["sentencepiece", "character"] = "sentencepiece"
    vocab_size: int = 4096
    file: str = ""
    sample_bytes: int = 32 * 2**20
    character_coverage: float = 0.9995
    chat_markers: bool = True

    def __post_init__(self) -> None:
        smallest = len(DOCUMENT_MARKERS + self.markers()) + 256 + 1
        if self.kind == "sentencepiece" and self.vocab_size < smallest:
            raise UserError(
                f"data.tokenizer.vocab_size={self.vocab_size} is too small: markers and bytes take {smallest - 1}, "
                f"so choose at least {smallest}, and better 512"
            )
        if self.sample_bytes <= 0:
            raise UserError(f"data.tokenizer.sample_bytes={self.sample_bytes} should be positive, such as {32 * 2**20}")
        if not 0.98 <= self.character_coverage <= 1:
            raise UserError(
                f"data.tokenizer.character_coverage={self.character_coverage} should be from 0.98 to 1: 0.9995 is usual"
            )

    def markers(self) -> tuple[str, ...]:
        """The control symbols to reserve ids for."""
        return CHAT_MARKERS + _RESERVED_MARKERS if self.chat_markers else ()


class Tokenizer(Protocol):
    """What every tokenizer can do. Ids are below `vocab_size`; none of these methods adds BOS or EOS.

    Attributes:
      control: the id of every chat marker; `encode` never gives one of them, whatever the text spells.
      lossless: whether every valid Unicode string decodes to itself.
      fingerprint: sha256, in hex, of what `save` writes.
    """

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    control: Mapping[str, int]
    lossless: bool
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a UserError if it holds a lone surrogate."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: control ids give nothing, an incomplete character gives U+FFFD.

        Nor do ids past the vocabulary: a model may have more of them than its tokenizer.
        """

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of each id, one after the other, so that a stream can hold back an incomplete character."""

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: how many bytes of text each id stands for, 0 for control ids."""

    def piece(self, id: int) -> str:
        """One token in printable form."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the one file that `load_tokenizer` reads."""


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in `path`: any SentencePiece model, or what `save` wrote; the content tells which.

    Raises:
      UserError: the file is missing, empty or something else.
    """
    from llmlab.data.tokenizer_character import character_tokenizer_from_json
    from llmlab.data.tokenizer_imported import FORMAT, imported_from_json

    file = epath.Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a folder, not a tokenizer: name the file in it, such as {file / 'tokenizer.model'}")
    if not file.exists():
        raise UserError(f"there is no tokenizer {path}")
    content = file.read_bytes()
    if content.startswith(b"{") and json.dumps(FORMAT).encode() in content[:100]:
        try:
            return imported_from_json(json.loads(content))
        except (ValueError, KeyError):
            raise UserError(f"{path} is cut short: convert the model again") from None
    if content.startswith(b"{"):
        return character_tokenizer_from_json(content, str(path))
    try:
        return SentencePieceTokenizer(content)
    except (RuntimeError, ValueError, OSError):
        raise UserError(
            f"{path} ({len(content)} bytes) is not a tokenizer: give a SentencePiece .model file or one llmlab saved"
        ) from None


class SentencePieceTokenizer:
    """A SentencePiece model behind the `Tokenizer` interface; `model` is the content of its file."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        self._model, self._processor = model, processor
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = processor.vocab_size()
        self.unk_id: int | None = processor.unk_id()
        self.bos_id, self.eos_id = _document_ends(processor)
        # A model without padding (most published ones) pads with its unknown id, never with EOS: what is masked out
        # as padding would otherwise take the end of every document with it.
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else processor.unk_id()
        ends = {self.bos_id, self.eos_id, self.pad_id}
        self.control: Mapping[str, int] = {
            processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_control(i) and i not in ends
        }
        self._bytes = [_bytes_of(processor, i) for i in range(self.vocab_size)]
        self.lossless = self.decode_bytes(processor.encode(PROBE)) == PROBE.encode()
        # Pieces that hold a space anywhere but in front tie words together: such a model must see the whole text.
        self._words_are_independent = not any(re.search("[^ ] ", self._text(i)) for i in range(self.vocab_size))

    def __reduce__(self):
        return SentencePieceTokenizer, (self._model,)

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        if not self.lossless or (len(text) <= _SLICE and _SPACE_MARK not in text):
            return self._processor.encode(text)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE_MARK)):
            if i:
                ids += [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
            for piece in _slices(part) if self._words_are_independent else [part]:
                ids += self._processor.encode(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        if self.lossless:
            return self.decode_bytes(ids).decode(errors="replace")
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids if i < self.vocab_size)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(text) for text in self._bytes], np.int32)

    def piece(self, id: int) -> str:
        return visible(self._text(id))

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomic(path, self._model)

    def _text(self, id: int) -> str:
        return self._processor.id_to_piece(id).replace(_SPACE_MARK, " ")


def refuse_surrogates(text: str) -> None:
    """A UserError that names the first lone surrogate in `text`, half a character that no UTF-8 can hold."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start}, which is not "
            "valid Unicode: read it with errors='replace', or remove it"
        ) from None


def visible(text: str) -> str:
    """`text` on one line, with spaces, newlines and every other unprintable character made visible."""
    return "".join(_visible_character(character) for character in text)


_SPACE_MARK = "\u2581"  # SentencePiece's own spelling of a space, which it cannot tell from the character itself.
PROBE = "  a  1\t\r\n\n\0\ufeff A ﬁ①Å é ｶﾞ\u200b\u00a0\u3000漢 \U0001f468\u200d\U0001f469 "  # what normalisation changes
_SLICE = 2**15  # characters; SentencePiece takes memory and, through its cache misses, time by the length of its input


def _slices(text: str) -> Iterator[str]:
    """Cuts a long text where a word ends: no piece reaches across, so the ids are those of the whole."""
    start = 0
    while len(text) - start > _SLICE and (end := re.compile("(?<=[^ ]) ").search(text, start + _SLICE)):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def _bytes_of(processor: sentencepiece.SentencePieceProcessor, id: int) -> bytes:
    if processor.is_control(id):
        return b""
    if processor.is_unknown(id):
        return processor.decode([id]).encode()
    piece = processor.id_to_piece(id)
    return bytes([int(piece[3:5], 16)]) if processor.is_byte(id) else piece.replace(_SPACE_MARK, " ").encode()


def _document_ends(processor: sentencepiece.SentencePieceProcessor) -> tuple[int, int]:
    """BOS and EOS; a model that has one of them only uses it for both."""
    bos, eos = processor.bos_id(), processor.eos_id()
    if bos < 0 and eos < 0:
        raise UserError("this SentencePiece model has neither BOS nor EOS, so no document could end: use another")
    return (bos if bos >= 0 else eos), (eos if eos >= 0 else bos)


def _visible_character(character: str) -> str:
    if character in "\n ":
        return "↵" if character == "\n" else "·"
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # the control pictures: ␀ ␉ ␍
    return character if character.isprintable() else f"\\u{{{code:X}}}"
