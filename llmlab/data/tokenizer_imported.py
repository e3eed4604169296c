"""Tokenizers of published models: `tokenizer.json` through the `tokenizers` library, or a SentencePiece file.

Text that spells one of the model's markers stays text, as with our own.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmlab.core.errors import UserError
from llmlab.core.paths import write_atomic
from llmlab.data.tokenizer import PROBE, SentencePieceTokenizer, Tokenizer, refuse_surrogates, visible

FORMAT = "llmlab imported tokenizer"
_SPACE_MARK = "\u2581"
_TEMPLATE_FILE = "chat_template.jinja"


class ImportedChat(NamedTuple):
    """How a published model talks: its chat template, the tokens that this names, and the ids its answers end with."""

    template: str
    tokens: dict[str, str]
    stop_ids: tuple[int, ...]


class ImportedTokenizer:
    """A `tokenizer.json` behind the `Tokenizer` interface; `content` is the file's, the ids are the model's.

    `chat` is what came with it, if anything did, for `llmlab.data.chat_imported`.

    Raises:
      UserError: the library is missing, the file is torn, or it is of a kind whose tokens stand for no bytes.
    """

    kind = "imported"

    def __init__(self, content: str, bos_id: int, eos_id: int, pad_id: int, chat: ImportedChat | None = None):
        try:
            import tokenizers
        except ImportError:
            raise UserError("a tokenizer.json needs the library tokenizers: pip install 'llmlab[hf]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
            description = json.loads(content)
        except Exception as error:  # what the library raises is a bare Exception
            raise UserError(f"tokenizer.json is torn or not known to this version of tokenizers ({error})") from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.content, self.chat = content, chat
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        special = {entry["id"]: entry["content"] for entry in description["added_tokens"] if entry["special"]}
        plain = {entry["id"]: entry["content"] for entry in description["added_tokens"] if not entry["special"]}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._names = [""] * self.vocab_size
        for name, id in vocabulary.items():
            self._names[id] = name
        unknown = description["model"].get("unk_token")
        self.unk_id: int | None = vocabulary.get(unknown) if unknown else None
        ends = {bos_id, eos_id, pad_id, self.unk_id}
        self.control: Mapping[str, int] = {name: id for id, name in special.items() if id not in ends}
        to_bytes = _byte_level if _mentions(description, "ByteLevel") else _byte_fallback
        if to_bytes is _byte_fallback and not description["model"].get("byte_fallback"):
            raise UserError(
                f"tokenizer.json of kind {description['model'].get('type')} is not supported: only byte BPE"
            )
        self._bytes = [
            b"" if id in special else plain[id].encode() if id in plain and to_bytes is _byte_level else to_bytes(name)
            for id, name in enumerate(self._names)
        ]
        self.fingerprint = hashlib.sha256(self._saved()).hexdigest()
        probe = PROBE + _SPACE_MARK
        self.lossless = self.decode_bytes(self.encode(probe)) == probe.encode()

    def __reduce__(self) -> Any:
        return ImportedTokenizer, (self.content, self.bos_id, self.eos_id, self.pad_id, self.chat)

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        if self.lossless:
            return self.decode_bytes(ids).decode(errors="replace")
        return self._tokenizer.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in ids if i < self.vocab_size)

    def token_bytes(self) -> np.ndarray:
        return np.array([len(text) for text in self._bytes], np.int32)

    def piece(self, id: int) -> str:
        return visible(self._bytes[id].decode(errors="replace") or self._names[id])

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomic(path, self._saved())

    def write_into(self, folder: Path) -> None:
        """Writes tokenizer.json as it came, and how the model talks into those files that are not there yet."""
        write_atomic(folder / "tokenizer.json", self.content.encode())
        if self.chat is None:
            return
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.chat.template, **self.chat.tokens}
        ends = {"eos_token_id": list(dict.fromkeys((self.eos_id, *self.chat.stop_ids)))}
        _write_missing(folder / "tokenizer_config.json", names)
        _write_missing(folder / "generation_config.json", ends)

    def _saved(self) -> bytes:
        fields: dict[str, Any] = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        if self.chat:
            fields["chat"] = self.chat._asdict()
        return json.dumps({"format": FORMAT, **fields, "tokenizer": self.content}).encode()


def imported_from_json(fields: dict[str, Any]) -> ImportedTokenizer:
    """The tokenizer that `save` wrote."""
    chat = fields.get("chat")
    if chat:
        chat = ImportedChat(chat["template"], chat["tokens"], tuple(chat["stop_ids"]))
    return ImportedTokenizer(fields["tokenizer"], fields["bos_id"], fields["eos_id"], fields["pad_id"], chat)


def import_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder in the Hugging Face layout.

    Raises:
      UserError: it has neither tokenizer.json nor tokenizer.model, or does not say what ends a document.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        content = (folder / "tokenizer.json").read_text()
        ids = _document_ids(folder, content)
        return ImportedTokenizer(content, *ids, _chat(folder))
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer((folder / "tokenizer.model").read_bytes())
    raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model: put one of them there")


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Writes the tokenizer's files into a folder in the Hugging Face layout; the ids that config.json then has.

    Files of the model that it came with, where they are there already, stay.
    """
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if isinstance(tokenizer, ImportedTokenizer):
        tokenizer.write_into(folder)
        return ids
    tokenizer.save(folder / "tokenizer.model")
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.lossless:
        # Without a class transformers goes by the model's family, whose tokenizer cuts text up in a way of its own.
        names = {name.removesuffix("_id"): tokenizer.piece(id) for name, id in ids.items()}
        _write_missing(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names},
        )
    return ids


def _write_missing(path: Path, content: dict[str, Any]) -> None:
    if not path.exists():
        write_atomic(path, json.dumps(content, indent=2).encode() + b"\n")


def _document_ids(folder: Path, content: str) -> tuple[int, int, int]:
    """BOS, EOS and padding, from tokenizer_config.json's names, or else config.json's ids."""
    try:
        added = {entry["content"]: entry["id"] for entry in json.loads(content)["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'tokenizer.json'} is torn: fetch it again") from None
    names, config = (_json(folder / file) for file in ("tokenizer_config.json", "config.json"))

    def id_of(role: str) -> int | None:
        name = names.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        given = added.get(name, config.get(f"{role}_token_id"))
        return given[0] if isinstance(given, list) else given

    bos, eos, pad = id_of("bos"), id_of("eos"), id_of("pad")
    if eos is None and bos is None:
        raise UserError(
            f"{folder}: neither tokenizer_config.json nor config.json names eos_token: what ends a document?"
        )
    # Padding is masked by segments, so any id serves; never EOS, which would then look like the end of a document.
    first = bos if bos is not None else eos
    last = eos if eos is not None else bos
    return int(first), int(last), int(pad if pad is not None and pad != last else 0)  # type: ignore[arg-type]


def _chat(folder: Path) -> ImportedChat | None:
    """The template of a file of its own goes before that of tokenizer_config.json; of several, the default one."""
    names = _json(folder / "tokenizer_config.json")
    template = names.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if (folder / _TEMPLATE_FILE).exists():
        template = (folder / _TEMPLATE_FILE).read_text()
    if not isinstance(template, str):
        return None
    if "added_tokens_decoder" not in names:
        names |= _json(folder / "special_tokens_map.json")
    tokens = {
        f"{role}_token": name["content"] if isinstance(name, dict) else name
        for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        if isinstance(name := names.get(f"{role}_token"), str | dict)
    }
    ends = [_json(folder / file).get("eos_token_id") for file in ("generation_config.json", "config.json")]
    stop_ids = [id for given in ends for id in (given if isinstance(given, list) else [given]) if isinstance(id, int)]
    return ImportedChat(template, tokens, tuple(dict.fromkeys(stop_ids)))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path} is torn: fetch it again") from None
    return content if isinstance(content, dict) else {}


def _mentions(description: Any, kind: str) -> bool:
    """Whether any part of the pipeline is of this type."""
    if isinstance(description, dict):
        return description.get("type") == kind or any(_mentions(part, kind) for part in description.values())
    return isinstance(description, list) and any(_mentions(part, kind) for part in description)


def _byte_fallback(name: str) -> bytes:
    """A SentencePiece-like token: spaces have a mark, bytes are spelt <0x0A>."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.replace(_SPACE_MARK, " ").encode()


# GPT-2's alphabet: a printable character for every byte. What prints stands for itself, the rest comes from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_REST)}


def _byte_level(name: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in name if character in _BYTE_OF)
