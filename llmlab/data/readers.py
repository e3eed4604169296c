"""One file, whatever its format, as numbered texts. What cannot be read comes as a `BadInput` in its place."""

import codecs
import collections
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlab.core.errors import UserError

READ_BYTES = 1 << 20
MAX_DOCUMENT_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class BadInput:
    """What is wrong (a category that can be counted), where, and how to mend it."""

    reason: str
    where: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.mend}"


class _UnreadableError(Exception):
    def __init__(self, bad: BadInput):
        super().__init__(str(bad))
        self.bad = bad


Numbered = tuple[int, str | BadInput]


def text_rows(path: Path, start: int = 0, stop: int | None = None) -> Iterator[Numbered]:
    """The characters [start, stop) of a text file as one document.

    Only a file that is too large to hold comes as several, cut at line ends. A bad file gives none of its text; whoever
    asks for a part of one knows by `count_characters` that it is good.
    """
    number, held, known_good = 0, "", start > 0 or stop is not None
    try:
        for piece in _clipped(characters(path), start, stop):
            held += piece
            while len(held) > MAX_DOCUMENT_CHARACTERS:
                if not known_good:
                    collections.deque(characters(path), maxlen=0)  # raises before a piece is given
                    known_good = True
                cut = held.rfind("\n", 0, MAX_DOCUMENT_CHARACTERS) + 1 or MAX_DOCUMENT_CHARACTERS
                yield number, held[:cut]
                number, held = number + 1, held[cut:]
    except _UnreadableError as error:
        yield number, error.bad
        return
    if held:
        yield number, held
    elif number == 0 and start == 0:
        yield number, BadInput("empty file", str(path), "give it text, or leave it out of data.files")


def jsonl_rows(path: Path, field: str) -> Iterator[Numbered]:
    """The named field of every line, numbered from 1. Blank lines are passed over."""
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield number, _json_text(line.removeprefix(codecs.BOM_UTF8), field, f"{path} line {number}")
    except _UnreadableError as error:
        yield number + 1, error.bad
        return
    if number == 0:
        yield number, BadInput("empty file", str(path), "give it rows, or leave it out of data.files")


def parquet_rows(path: Path, field: str) -> Iterator[Numbered]:
    """The named column of every row, numbered from 0."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("data.source='parquet' needs pyarrow: pip install 'llmlab[hf]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                yield 0, _no_field(field, names, str(path))
                return
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield number, _checked_text(value, field, f"{path} row {number}")
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = "not a readable Parquet file"
        yield number, BadInput(reason, f"{path} ({_first_line(error)})", "write the file again")


def huggingface_rows(path: Path, field: str) -> Iterator[Numbered]:
    """The named column of every row of a folder written by `save_to_disk`, numbered from 0."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.source='huggingface' needs datasets: pip install 'llmlab[hf]'") from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # what it raises for a folder of something else differs between versions
        yield 0, BadInput("not a readable Hugging Face dataset", f"{path} ({_first_line(error)})", "use save_to_disk")
        return
    if isinstance(dataset, datasets.DatasetDict):
        raise UserError(f"{path} holds the splits {', '.join(dataset)}: set data.files={path / next(iter(dataset))}")
    if field not in dataset.column_names:
        yield 0, _no_field(field, dataset.column_names, str(path))
        return
    for number, row in enumerate(dataset.select_columns([field])):
        yield number, _checked_text(row[field], field, f"{path} row {number}")


def count_characters(path: Path) -> int | None:
    """The length of a text file, read as a stream; None for one that is bad anywhere."""
    try:
        return sum(len(piece) for piece in characters(path))
    except _UnreadableError:
        return None


def characters(path: Path) -> Iterator[str]:
    """A text file's characters, exactly: no newline is translated and no byte-order mark removed."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    for chunk in _chunks(path):
        piece = _decoded(decoder, chunk, False, path, lines)
        lines += piece.count("\n")
        yield piece
    yield _decoded(decoder, b"", True, path, lines)


def _decoded(decoder: codecs.IncrementalDecoder, chunk: bytes, final: bool, path: Path, lines: int) -> str:
    try:
        return decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        line = lines + error.object[: error.start].count(b"\n")
        raise _UnreadableError(_not_utf8(f"{path} line {line}", error)) from error


def _clipped(pieces: Iterator[str], start: int, stop: int | None) -> Iterator[str]:
    place = 0
    for piece in pieces:
        yield piece[max(0, start - place) : None if stop is None else max(0, stop - place)]
        place += len(piece)
        if stop is not None and place >= stop:
            return


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for chunk in _chunks(path):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked by its suffix.

    Raises:
      _UnreadableError: it cannot be opened, or its compressed data is cut short or damaged.
    """
    try:
        if path.suffix == ".zst":
            yield from _zstd_chunks(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except EOFError as error:
        raise _UnreadableError(_cut_short(path)) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _UnreadableError(BadInput("damaged gzip", f"{path} ({error})", "fetch the file again")) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Feeds frame after frame by hand: the library's file object takes a file that is cut short for a whole one."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path} needs zstandard: pip install zstandard") from error
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    try:
        with open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                while chunk:
                    if frame.eof:
                        frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
                    begun = True
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise _UnreadableError(BadInput("damaged zstd", f"{path} ({error})", "fetch the file again")) from error
    if begun and not frame.eof:
        raise _UnreadableError(_cut_short(path))


def _json_text(line: bytes, field: str, where: str) -> str | BadInput:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(where, error)
    except (ValueError, RecursionError) as error:  # the latter for a thousand brackets in a row
        return BadInput("not JSON", f"{where} ({error})", "write one JSON object per line")
    if not isinstance(row, dict):
        return BadInput("not a JSON object", where, "write one JSON object per line")
    if field not in row:
        return _no_field(field, list(row), where)
    return _checked_text(row[field], field, where)


def _checked_text(value: Any, field: str, where: str) -> str | BadInput:
    if not isinstance(value, str):
        return BadInput("field is not text", f"{where} ({field!r} is {type(value).__name__})", "make it a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        return BadInput("lone surrogate", where, "it is no valid Unicode: write the character itself")
    return value


def _no_field(field: str, names: list[str], where: str) -> BadInput:
    has = ", ".join(map(repr, names[:8])) or "no field at all"
    return BadInput(f"no field {field!r}", f"{where} (it has {has})", "set data.field to the one that holds the text")


def _not_utf8(where: str, error: UnicodeDecodeError) -> BadInput:
    byte = error.object[error.start]
    return BadInput("invalid UTF-8", f"{where} (byte 0x{byte:02x})", "convert it, for example with iconv -t utf-8")


def _cut_short(path: Path) -> BadInput:
    return BadInput("compressed file is cut short", str(path), "fetch the file again")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
