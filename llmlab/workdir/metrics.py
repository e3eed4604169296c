"""metrics.jsonl: one JSON object a line, one line a logged step. TensorBoard's event files, for who wants them too."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from llmlab.core.errors import UserError
from llmlab.core.paths import clear_when_full, write_atomic


class MetricsLog:
    """The metrics of one run; one process writes. Strict JSON: what is not finite becomes null.

    A line counts once its newline is there, so half a line, which a kill can leave, is no line.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: int | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; once this returns, a kill cannot lose it.

        Raises:
          DiskFull: there is no room; the file ends with the row before.
        """
        line = json.dumps(strict(dict(row)), allow_nan=False).encode() + b"\n"
        with clear_when_full(self.path):
            if self._file is None:
                self._file = self._open()
            end = os.fstat(self._file).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._file, line[written:])
            except OSError:
                os.ftruncate(self._file, end)
                raise

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in order; none when there is no file.

        Raises:
          UserError: a line in the middle is not a JSON object.
        """
        return [row for _, row in self._lines()]

    def has(self, step: int, prefix: str) -> bool:
        """Whether a row of this step has a key that starts so (`eval/`)."""
        return any(row.get("step") == step and any(key.startswith(prefix) for key in row) for row in self.rows())

    def truncate_after(self, step: int) -> None:
        """Drops the rows past `step`: what a resumed run will log again. Atomic."""
        self.close()
        if self.path.exists():
            kept = [line for line, row in self._lines() if row.get("step", 0) <= step]
            write_atomic(self.path, b"".join(kept))

    def close(self) -> None:
        """Closes the file; a later append opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.ftruncate(descriptor, whole)
        return descriptor

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = []
        for number, line in enumerate(lines, start=1):
            if line.endswith(b"\n"):
                whole.append((line, self._parsed(line, number)))
        return whole

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{self.path}, line {number} is not a JSON object: mend or delete that line")
        return row


def check_tensorboard() -> None:
    """Raises UserError where tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "run.tensorboard=True needs tensorboardX: pip install 'llmlab[tensorboard]', or set it to False"
        )


class TensorBoardLog:
    """The same rows as scalars in TensorBoard's event files, `step` their position. What is no number is left out.

    `purge_step`: TensorBoard forgets what earlier files of the folder hold from this step on.
    """

    def __init__(self, folder: str | os.PathLike[str], purge_step: int = 0):
        check_tensorboard()
        from tensorboardX import SummaryWriter

        with clear_when_full(folder):
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; a thread writes it later, so a full disk goes unnoticed here."""
        for key, value in row.items():
            if key != "step" and isinstance(value, Real):
                self._writer.add_scalar(key, float(value), int(row["step"]))

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def strict(value: Any) -> Any:
    """`value` for strict JSON: numpy's numbers become Python's, and what is not finite null."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
