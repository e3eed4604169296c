"""One file, whatever its format, as texts or rows. What cannot be read comes as a `BadInput` in its place."""

import codecs
import collections
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    """What a row holds by field. Its number is one of its file's; `where` says to a person which file and row it is."""

    number: int
    where: str
    fields: dict[str, Any]


class UnreadableError(Exception):
    """A file goes no further."""

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
    except UnreadableError as error:
        yield number, error.bad
        return
    if held:
        yield number, held
    elif number == 0 and start == 0:
        yield number, BadInput("empty file", str(path), "give it text, or leave it out of data.files")


def jsonl_rows(path: Path) -> Iterator[Row | BadInput]:
    """The object in every line, numbered from 1, blank lines passed over; or those of a `.json` file's one array."""
    named = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    number = 0
    try:
        if named.suffix == ".json" and _Cursor(characters(path)).peek() == "[":
            yield from _array_rows(path)
            return
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield _json_row(line.removeprefix(codecs.BOM_UTF8), number, f"{path} line {number}")
    except UnreadableError as error:
        yield error.bad
        return
    if number == 0:
        yield BadInput("empty file", str(path), "give it rows, or leave it out of data.files")


def parquet_rows(path: Path, field: str | None) -> Iterator[Row | BadInput]:
    """Every row, numbered from 0: the named column of it, or None for all of them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("data.source='parquet' needs pyarrow: pip install 'llmlab[hf]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                yield _no_field(field, names, str(path))
                return
            for batch in file.iter_batches(batch_size=1024, columns=None if field is None else [field]):
                for fields in batch.to_pylist():
                    yield Row(number, f"{path} row {number}", fields)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        yield BadInput("not a readable Parquet file", f"{path} ({_first_line(error)})", "write the file again")


def huggingface_rows(path: Path, field: str | None) -> Iterator[Row | BadInput]:
    """The same of a folder written by `save_to_disk`."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.source='huggingface' needs datasets: pip install 'llmlab[hf]'") from error
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # what it raises for a folder of something else differs between versions
        yield BadInput("not a readable Hugging Face dataset", f"{path} ({_first_line(error)})", "use save_to_disk")
        return
    if isinstance(dataset, datasets.DatasetDict):
        raise UserError(f"{path} holds the splits {', '.join(dataset)}: set data.files={path / next(iter(dataset))}")
    if field is not None:
        if field not in dataset.column_names:
            yield _no_field(field, dataset.column_names, str(path))
            return
        dataset = dataset.select_columns([field])
    for number, fields in enumerate(dataset):
        yield Row(number, f"{path} row {number}", fields)


def text_of(row: Row, field: str) -> str | BadInput:
    """The text in the named field."""
    if field not in row.fields:
        return _no_field(field, list(row.fields), row.where)
    value = row.fields[field]
    if not isinstance(value, str):
        return BadInput("field is not text", f"{row.where} ({field!r} is {type(value).__name__})", "make it a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        return BadInput("lone surrogate", row.where, "it is no valid Unicode: write the character itself")
    return value


def count_characters(path: Path) -> int | None:
    """The length of a text file, read as a stream; None for one that is bad anywhere."""
    try:
        return sum(len(piece) for piece in characters(path))
    except UnreadableError:
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
        raise UnreadableError(_not_utf8(f"{path} line {line}", error)) from error


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
      UnreadableError: it cannot be opened, or its compressed data is cut short or damaged.
    """
    try:
        if path.suffix == ".zst":
            yield from _zstd_chunks(path)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except EOFError as error:
        raise UnreadableError(_cut_short(path)) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableError(BadInput("damaged gzip", f"{path} ({error})", "fetch the file again")) from error
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
        raise UnreadableError(BadInput("damaged zstd", f"{path} ({error})", "fetch the file again")) from error
    if begun and not frame.eof:
        raise UnreadableError(_cut_short(path))


def _array_rows(path: Path) -> Iterator[Row | BadInput]:
    """The objects of one JSON array, numbered from 1. Of the file, a row and what was read with it are held."""
    cursor, number = _Cursor(characters(path)), 0
    try:
        cursor.expect("[")
        while cursor.peek() != "]":
            if number:
                cursor.expect(",")
            cursor.peek()
            number += 1
            where = f"{path} line {cursor.line}, row {number}"
            fields = cursor.value()
            if isinstance(fields, dict):
                yield Row(number, where, fields)
            else:
                yield BadInput("not a JSON object", where, "write one array of objects")
        cursor.expect("]")
        cursor.expect("")
    except (ValueError, RecursionError) as error:
        yield BadInput("not JSON", f"{path} line {cursor.line} ({error})", "write one array of objects")
        return
    if number == 0:
        yield BadInput("empty file", str(path), "give it rows, or leave it out of data.files")


class _Cursor:
    """A place in a JSON text that comes in pieces, and its line; what lies behind it is let go."""

    _blank = re.compile(r"[ \t\r\n\ufeff]*")  # the last is the byte-order mark
    _decoder = json.JSONDecoder()

    def __init__(self, pieces: Iterator[str]):
        self.line = 1
        self._pieces, self._text, self._place = pieces, "", 0

    def peek(self) -> str:
        """The next character that is not blank, where the cursor then stands; empty at the end."""
        while True:
            match = self._blank.match(self._text, self._place)
            assert match
            self._go_to(match.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def expect(self, character: str) -> None:
        """Passes over `character`; a ValueError where something else comes."""
        if (found := self.peek()) != character:
            raise ValueError(f"{found or 'the end'!r} where {character or 'the end'!r} should come")
        self._place += len(character)

    def value(self) -> Any:
        """Passes over a whole value; a ValueError where it is not JSON."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                # A piece may end within a string, or within a word or an escape of up to nine characters.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 10
                if not (cut and self._more()):
                    self._go_to(error.pos)
                    raise ValueError(error.msg) from None
            else:
                if end < len(self._text) or not self._more():
                    self._go_to(end)
                    return value

    def _more(self) -> bool:
        """Reads on, by as much again as is held, so that a long value is not begun again for every piece of it."""
        held, size = [self._text[self._place :]], 0
        for piece in self._pieces:
            held.append(piece)
            size += len(piece)
            if size > len(held[0]):
                break
        if size:
            self._text, self._place = "".join(held), 0
        return size > 0

    def _go_to(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place


def _json_row(line: bytes, number: int, where: str) -> Row | BadInput:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(where, error)
    except (ValueError, RecursionError) as error:  # the latter for a thousand brackets in a row
        return BadInput("not JSON", f"{where} ({error})", "write one JSON object per line")
    if not isinstance(fields, dict):
        return BadInput("not a JSON object", where, "write one JSON object per line")
    return Row(number, where, fields)


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
