"""Stages that begin from each other, as one table: what each is measured by, before it and after it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmlab.core.errors import UserError
from llmlab.core.paths import write_atomic
from llmlab.report.page import link, page, section, table
from llmlab.report.read import Run, number, read_run
from llmlab.report.run_page import progress_text

# What an evaluation during training may measure, as a person would say it.
MEASURES = {
    "bits_per_byte": "held-out bits per byte",
    "loss": "held-out loss",
    "accuracy": "held-out pairs told apart",
    "margin": "mean margin",
    "chosen_logp": "mean log-probability of right answers",
}
SHARES = ("accuracy", "ended", "answered")
HEADERS = ("stage", "measure", "before", "after")


class Row(NamedTuple):
    """A figure of a stage at its first evaluation and at its last; of `llmlab eval` there is only the last."""

    stage: str
    measure: str
    before: str
    after: str


def write_stages_report(folder: str | os.PathLike[str]) -> tuple[Path, str]:
    """Writes `report.html` into a folder of workdirs; its path, and the table as text.

    Raises:
      UserError: no workdir lies in it.
    """
    runs = _in_order([read_run(path.parent) for path in sorted(Path(folder).expanduser().glob("*/config.json"))])
    if not runs:
        raise UserError(f"{folder} is no workdir and holds none: name a run's folder, or one of several stages")
    rows = [row for run in runs for row in _rows(run)]
    path = Path(folder).expanduser() / "report.html"
    done = sum(run.step >= run.steps for run in runs)
    links = [(run.name, progress_text(run), link(f"{run.name}/report.html")) for run in runs]
    sections = [
        section("stages", "Stage by stage", table(HEADERS, rows)),
        section("runs", "Their runs", table(("stage", "state", "its own page"), links)),
    ]
    write_atomic(path, page(path.parent.resolve().name, f"{done} of {len(runs)} stages finished", sections))
    return path, text_table(rows)


def text_table(rows: Sequence[Row]) -> str:
    """The rows under their headers, in columns."""
    lines = [HEADERS, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADERS))]
    aligned = []
    for line in lines:
        names = [f"{cell:<{width}}" for cell, width in zip(line[:2], widths[:2], strict=True)]
        figures = [f"{cell:>{width}}" for cell, width in zip(line[2:], widths[2:], strict=True)]
        aligned.append("  ".join([*names, *figures]).rstrip())
    return "\n".join(aligned)


def _rows(run: Run) -> Iterator[Row]:
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        of = run.config["data"]["rows"]
        for name, measure in MEASURES.items():
            # Of answers that are judged bits per byte are not measured, and of conversations they say little.
            if f"eval/{name}" in last and not (name == "bits_per_byte" and of != "text"):
                before = "" if first is last else _shown(name, first.get(f"eval/{name}"))
                said = "held-out loss of answers" if name == "loss" and of == "chat" else measure
                yield Row(run.name, said, before, _shown(name, last[f"eval/{name}"]))
    talked, told = run.evaluation.get("conversations", {}), run.evaluation.get("pairs", {})
    if "ended" in talked:
        yield Row(run.name, "answers that end by themselves", "", _shown("ended", talked["ended"]))
    for kind, found in talked.get("kinds", {}).items():
        if "answered" in found:
            yield Row(run.name, f"answered through a call: {kind}", "", _shown("answered", found["answered"]))
    for kind, share in told.get("by_kind", {}).items():
        yield Row(run.name, f"pairs told apart: {kind}", "", _shown("accuracy", share))


def _shown(name: str, value: Any) -> str:
    found = number(value)
    if found is None:
        return "not finite"
    if name in SHARES:
        return f"{found:.1%}"
    return f"{found:.4f}" if abs(found) < 10 else f"{found:,.2f}"


def _in_order(runs: list[Run]) -> list[Run]:
    """Each after the one that it began from."""
    by_name = {run.name: run for run in runs}

    def depth(run: Run) -> int:
        before: list[Run | None] = [run]
        while (last := before[-1]) is not None and last not in before[:-1]:
            before.append(by_name.get(Path(last.config["run"]["init_from"]).name))
        return len(before)

    return sorted(runs, key=lambda run: (depth(run), run.name))
