"""Conversations that a person keeps, as rows of a JSON lines file: in the shapes that `data.rows` reads."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmlab.core.errors import UserError
from llmlab.core.paths import clear_when_full
from llmlab.data.chat import Message

Row = dict[str, Any]


def as_turns(conversation: Iterable[Message]) -> list[Row]:
    """What stands under `messages` or `prompt`."""
    return [_as_turn(message) for message in conversation]


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All rows; none when there is no file. Half a line at the end, which a kill can leave, is none.

    Raises:
      UserError: another line is not a JSON object.
    """
    file = Path(path).expanduser()
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is None and line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number} is not a JSON object: mend or delete that line")
        rows += [] if row is None else [row]
    return rows


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to the end, all or none; once this returns, a kill cannot lose them. Half a line before them goes.

    Raises:
      UserError: the file cannot be written, or holds something else.
      DiskFull: there is no room; the file is as it was.
    """
    data = b"".join(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n" for row in rows)
    file = Path(path).expanduser()
    with clear_when_full(path):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            reason = os.strerror(error.errno or 0).lower()
            raise UserError(f"{path} cannot be written ({reason}): choose another file") from None
        try:
            content = file.read_bytes()
            end = len(content) - _torn(content, path)
            os.ftruncate(descriptor, end)
            if content[:end] and not content[:end].endswith(b"\n"):
                data = b"\n" + data
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)


def _torn(content: bytes, path: str | os.PathLike[str]) -> int:
    """The bytes of half a row at the end."""
    *_, last = content.rstrip(b"\n").split(b"\n")
    if not last or _parsed(last) is not None:
        return 0
    if content.endswith(b"\n") or not last.startswith(b"{"):
        raise UserError(f"{path} ends in what is no row of JSON: choose another file")
    return len(last)


def _as_turn(message: Message) -> Row:
    turn: Row = {"role": message.role}
    if message.name:
        turn["name"] = message.name
    if message.thinking:
        turn["thinking"] = message.thinking
    turn["content"] = message.content
    if message.calls:
        turn["tool_calls"] = [call._asdict() for call in message.calls]
    if not message.train:
        turn["weight"] = 0
    return turn


def _parsed(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
