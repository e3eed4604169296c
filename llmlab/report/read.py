"""What a workdir says about its run, finished or not: the report's only reader of files."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmlab.workdir.files import Workdir
from llmlab.workdir.metrics import MetricsLog

Row = dict[str, Any]
Points = list[tuple[float, float | None]]

# From the start of a text or after a mark that can stand before a path, as in --workdir=/a/b or ['/a/b', '/c/d'].
# One part is not enough, and the first begins with a letter, digit or dot: `// a note`, `/* x` and `/s` are text.
ABSOLUTE = re.compile(
    r"""
    (?: ^ | (?<=[\s=:,;'"(\[]) )
    (?: ~([A-Za-z]\w*)?[\\/]  |  (?: \w+:/{2,3} | [A-Za-z]:[\\/] | / ) [\w.][^\s\\/,;'"()\[\]]* [\\/] )
    [^\s\\/,;'"()\[\]] [^\t\r\n,;'"()\[\]]*
    """,
    re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its files tell it.

    described: config.json. training, evaluations: rows of metrics.jsonl. evaluation: eval.json.
    seconds: time.json, wall time by what it was spent on. samples: (step, text), the latest first. conversations:
    (step, rows) of the earliest and the latest that were sampled, in this order; one where there is one.
    """

    name: str
    described: dict[str, Any]
    training: list[Row]
    evaluations: list[Row]
    evaluation: dict[str, Any]
    seconds: dict[str, float]
    samples: list[tuple[int, str]]
    conversations: list[tuple[int, list[Row]]]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return self.described["config"]

    @property
    def steps(self) -> int:
        """To train in all."""
        return self.config["run"]["steps"]

    @property
    def step(self) -> int:
        """The last that is logged; 0 before the first."""
        return self.training[-1]["step"] if self.training else 0

    @property
    def tokens_per_step(self) -> int:
        """Padding included."""
        return self.config["data"]["batch_size"] * self.config["data"]["sequence_length"]

    def held_out(self, name: str) -> float | None:
        """The last evaluation's `loss`, `bits_per_byte` or `perplexity`; None before the first, or where not finite."""
        return number(self.evaluations[-1].get(f"eval/{name}")) if self.evaluations else None


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads a workdir.

    Raises:
      UserError: no such workdir, or a file in it is torn where a kill cannot tear it.
    """
    workdir = Workdir(path)
    rows = [row for row in MetricsLog(workdir.metrics).rows() if number(row.get("step")) is not None]
    return Run(
        name=workdir.path.resolve().name,
        described=workdir.read_config(),
        training=[row for row in rows if "loss" in row],
        evaluations=[row for row in rows if any(key.startswith("eval/") for key in row)],
        evaluation=_optional(workdir, "eval.json"),
        seconds={name: s for name, s in _optional(workdir, "time.json").items() if number(s) is not None},
        samples=_samples(workdir),
        conversations=_conversations(workdir),
    )


def series(rows: Sequence[Row], key: str, scale: float = 1.0) -> Points:
    """(step · scale, value) of every row that has `key`; None where its value is not finite."""
    return [(row["step"] * scale, number(row[key])) for row in rows if key in row]


def number(value: Any) -> float | None:
    """`value` if it is a finite number."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def training_seconds(run: Run) -> float | None:
    """Seconds spent in steps, from their logged rates; None before two rows are logged."""
    rows = run.training
    parts = [
        (row["tokens"] - before["tokens"]) / rate
        for before, row in itertools.pairwise(rows)
        if (rate := number(row.get("tokens_per_second"))) and "tokens" in row and "tokens" in before
    ]
    return sum(parts) if parts else None


def flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 8}} as {"model.width": 8}."""
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {key: value for name in nested for key, value in flat(nested[name], f"{prefix}.{name}".lstrip(".")).items()}


def without_paths(value: Any) -> Any:
    """`value` with every absolute path in it cut to its last part: a page is passed on, a machine's folders are not."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return ABSOLUTE.sub(_last_part, value) if isinstance(value, str) else value


def _last_part(path: re.Match[str]) -> str:
    return "…/" + re.split(r"[\\/]", path[0].rstrip("\\/"))[-1]


def _optional(workdir: Workdir, name: str) -> dict[str, Any]:
    """The JSON object in a file that a run may not have."""
    try:
        content = json.loads((workdir.path / name).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _samples(workdir: Workdir) -> list[tuple[int, str]]:
    files = reversed(_by_step(workdir, ".txt"))
    return [(step, path.read_text(encoding="utf-8", errors="replace")) for step, path in files]


def _conversations(workdir: Workdir) -> list[tuple[int, list[Row]]]:
    """A file with a row that is none is passed over."""
    files = _by_step(workdir, ".jsonl")
    read = [(step, _turns(path)) for step, path in (files if len(files) < 2 else (files[0], files[-1]))]
    return [(step, rows) for step, rows in read if rows]


def _turns(path: Path) -> list[Row]:
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        return [
            {name: [dict(turn) for turn in row[name]] for name in ("prompt", "answer", "reference")} for row in rows
        ]
    except (ValueError, TypeError, KeyError):
        return []


def _by_step(workdir: Workdir, suffix: str) -> list[tuple[int, Path]]:
    paths = workdir.samples.glob(f"*{suffix}") if workdir.samples.is_dir() else []
    return sorted((int(path.stem), path) for path in paths if path.stem.isdecimal())
