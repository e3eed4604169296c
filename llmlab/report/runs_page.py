"""Many runs on one page: their curves over each other, what their settings did, and a table with the best first."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmlab.core.errors import UserError
from llmlab.core.paths import write_atomic
from llmlab.report.curves import Curve, chart
from llmlab.report.page import page, pairs, section, swatch, table
from llmlab.report.read import Run, flat, number, read_run, series, training_seconds, without_paths
from llmlab.report.run_page import progress_text
from llmlab.train.progress import clock, thousands

MOST_OWN_TICKS = 6

PathLike = str | os.PathLike[str]


def write_runs_report(
    folders: Sequence[PathLike], path: PathLike, title: str, notes: Mapping[str, str] | None = None
) -> Path:
    """Writes one page over these workdirs to `path`, and returns it.

    notes: what else to say of a run, by its folder's name: why it failed. A folder without a readable run is listed.
    """
    runs, missing = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError:
            missing.append(Path(folder).name)
    path = Path(path)
    write_atomic(path, runs_page(runs, missing, title, without_paths(notes or {})))
    return path


def runs_page(runs: Sequence[Run], missing: Sequence[str], title: str, notes: Mapping[str, str]) -> bytes:
    """The page of these runs, and of the names of those that left nothing."""
    runs = sorted(runs, key=_rank)
    differing = _differing(runs)
    labels = [_label(run, differing) for run in runs]
    finished = sum(run.step >= run.steps for run in runs)
    others = {name: notes.get(name) or "no result yet" for name in missing}
    return page(
        title,
        f"{finished} of {len(runs) + len(missing)} runs finished",
        [
            section("results", "Results", _results(runs, differing, notes)),
            section("curves", "Curves", _curves(runs, labels)),
            section("settings", "What the settings did", _effects(runs, differing)),
            section("missing", "Runs without a result", pairs(others)),
        ],
    )


def _rank(run: Run) -> tuple[bool, float, str]:
    loss = run.held_out("loss")
    return loss is None, loss or 0.0, run.name


def _differing(runs: Sequence[Run]) -> list[str]:
    """The config keys in which the runs differ, in the order of the config."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]


def _label(run: Run, differing: Sequence[str]) -> str:
    config = flat(without_paths(run.config))
    return ", ".join(f"{_short(key, differing)} {_text(config.get(key))}" for key in differing) or run.name


def _short(key: str, among: Sequence[str]) -> str:
    """`width` for `model.width`, where no other key among them ends so."""
    end = key.rpartition(".")[2]
    return end if sum(other.rpartition(".")[2] == end for other in among) == 1 else key


def _results(runs: Sequence[Run], differing: Sequence[str], notes: Mapping[str, str]) -> str:
    if not runs:
        return ""
    headers = ["", *(_short(key, differing) for key in differing)] if differing else ["", "run"]
    headers += ["held-out loss", "bits per byte", "tokens", "parameters", "time in steps", "state"]
    rows = []
    for i, run in enumerate(runs):
        config = flat(without_paths(run.config))
        seconds = training_seconds(run)
        parameters = number(run.described.get("parameters"))
        rows.append(
            [
                swatch(i),
                *([_text(config.get(key)) for key in differing] if differing else [run.name]),
                _decimals(run.held_out("loss")),
                _decimals(run.held_out("bits_per_byte")),
                thousands(run.step * run.tokens_per_step),
                "" if parameters is None else thousands(parameters),
                "" if seconds is None else clock(seconds),
                notes.get(run.name) or progress_text(run),
            ]
        )
    return table(headers, rows)


def _curves(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Held-out loss by step, and by tokens where that differs; training loss from where the first fall is over."""
    every = list(enumerate(zip(runs, labels, strict=True)))
    by_step = [Curve(label, series(run.evaluations, "eval/loss"), i, dots=True) for i, (run, label) in every]
    charts = [chart("Held-out loss", by_step)]
    if len({run.tokens_per_step for run in runs}) > 1:
        by_tokens = [
            Curve(label, series(run.evaluations, "eval/loss", run.tokens_per_step), i, dots=True)
            for i, (run, label) in every
        ]
        charts.append(chart("Held-out loss by tokens", by_tokens, "tokens", legend=False))
    late = [[row for row in run.training if row["step"] > run.steps / 10] for run in runs]
    training = [Curve(label, series(late[i], "loss"), i) for i, (_, label) in every]
    charts.append(chart("Training loss after the first tenth", training, legend=False))
    inside = "\n".join(filter(None, charts))
    return f'<div class="charts">{inside}</div>' if inside else ""


def _effects(runs: Sequence[Run], differing: Sequence[str]) -> str:
    """A chart for each numeric setting: the last held-out loss against it, one line for all that is else the same."""
    charts = []
    for key in differing:
        grouped: dict[str, list[tuple[float, float | None]]] = {}
        others = [other for other in differing if other != key]
        for run in sorted(runs, key=lambda run: _order(run, others)):
            value, loss = number(flat(run.config).get(key)), run.held_out("loss")
            if value is not None and loss is not None and run.step >= run.steps:
                grouped.setdefault(_label(run, others) if others else "all", []).append((value, loss))
        xs = {x for points in grouped.values() for x, _ in points}
        if len(xs) > 1:
            log_x = min(xs) > 0 and max(xs) / min(xs) >= 4
            ticks = sorted(xs) if len(xs) <= MOST_OWN_TICKS else ()
            curves = [Curve(label, sorted(points), i, dots=True) for i, (label, points) in enumerate(grouped.items())]
            title = f"Held-out loss against {key}"
            charts.append(chart(title, curves, key, log_x=log_x, x_ticks=ticks, legend=bool(others)))
    return f'<div class="charts">{chr(10).join(charts)}</div>' if charts else ""


def _order(run: Run, keys: Sequence[str]) -> list[tuple[float, str]]:
    config = flat(run.config)
    return [(number(config.get(key)) or 0.0, _text(config.get(key))) for key in keys]


def _text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else json.dumps(value, ensure_ascii=False)
    )


def _decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
