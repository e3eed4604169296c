"""What each run of a sweep came to: read from its workdir, kept as one table, `results.jsonl` and `results.csv`."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from llmlab.core.errors import UserError
from llmlab.core.paths import write_atomic
from llmlab.scaling.grid import Settings, typed
from llmlab.workdir.files import Workdir
from llmlab.workdir.metrics import MetricsLog

Status = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclasses.dataclass(frozen=True)
class Result:
    """One run. loss (nats a token) and bits_per_byte: held out, at the last step; None until that is evaluated.

    seconds: of wall time, all its starts together. exit_code: of its last start. error: why it failed, in a line.
    """

    name: str
    folder: Path
    settings: Settings
    status: Status = "waiting"
    step: int = 0
    steps: int | None = None
    tokens: int = 0
    parameters: int | None = None
    loss: float | None = None
    bits_per_byte: float | None = None
    seconds: float = 0.0
    exit_code: int | None = None
    error: str = ""

    def row(self) -> dict[str, Any]:
        """The row of the results table: its settings are columns of their own, `model.width`."""
        settings = {key: typed(value) for key, value in self.settings.items()}
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("name", "folder", "settings"):
            columns.pop(name)
        return {"run": self.name, **settings, **columns, "seconds": round(self.seconds, 1)}


def measured(result: Result) -> Result:
    """`result` with what its workdir says now; done once the last step is both trained and evaluated."""
    workdir = Workdir(result.folder)
    try:
        described = workdir.read_config()
        rows = MetricsLog(workdir.metrics).rows()
    except UserError:
        return result
    steps = described["config"]["run"]["steps"]
    trained = [row for row in rows if "loss" in row]
    step, tokens = (trained[-1]["step"], trained[-1].get("tokens", 0)) if trained else (0, 0)
    final = next((row for row in reversed(rows) if row.get("step") == steps and "eval/loss" in row), None)
    return dataclasses.replace(
        result,
        status="done" if step == steps and final is not None else result.status,
        step=step,
        steps=steps,
        tokens=tokens,
        parameters=described.get("parameters"),
        loss=_finite(final, "eval/loss"),
        bits_per_byte=_finite(final, "eval/bits_per_byte"),
    )


def best(results: Iterable[Result]) -> Result | None:
    """The finished run with the lowest held-out loss."""
    finished = [result for result in results if result.status == "done" and result.loss is not None]
    return min(finished, key=lambda result: (result.loss, result.name), default=None)


def write_results(results: Sequence[Result], folder: Path) -> None:
    """Writes both files of the table, in the order of the grid; each is whole at any moment."""
    rows = [result.row() for result in results]
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_atomic(folder / "results.csv", text.getvalue().encode())


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier start of the sweep, by run."""
    path = folder / "results.jsonl"
    if not path.exists():
        return {}
    try:
        return {row["run"]: row for row in map(json.loads, path.read_text().splitlines())}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no table of results: delete it; the runs beside it are kept") from None


def _finite(row: dict[str, Any] | None, key: str) -> float | None:
    value = row.get(key) if row else None
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
