"""One run as one page: the numbers that matter, curves, samples, where the time went, and the config behind them."""

import dataclasses
import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

from llmlab.core.paths import write_atomic
from llmlab.eval.attempts import LABELS
from llmlab.report.conversations import answers, side_by_side
from llmlab.report.curves import Curve, chart
from llmlab.report.heat import heat_map
from llmlab.report.page import fold, page, pairs, section, tiles, verbatim
from llmlab.report.read import Points, Run, flat, number, read_run, series, training_seconds, without_paths
from llmlab.train.progress import clock, thousands
from llmlab.workdir.files import Workdir

TITLES = {
    "logp": "Log-probability of an answer",
    "logp_per_token": "Log-probability per token",
    "tokens": "Tokens in an answer",
    "reference_kl": "Mean log-ratio to the reference",
    "brier": "Brier score",
}


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into the workdir of a run, finished or not, and returns its path.

    Raises:
      UserError: it is no workdir.
      DiskFull: there is no room; an earlier report stays.
    """
    run, path = read_run(workdir), Workdir(workdir).report
    write_atomic(path, run_page(run))
    return path


def run_page(run: Run) -> bytes:
    """The page of a run."""
    described = without_paths(run.described)
    config = json.dumps(described["config"], indent=2, ensure_ascii=False)
    return page(
        run.name,
        progress_text(run),
        [
            section("numbers", "In numbers", tiles(_headline(run))),
            section("curves", "Curves", _curves(run)),
            section("conversations", "What it answers", side_by_side(run)),
            section("answers", "Answers to conversations held out", answers(run.evaluation.get("conversations"))),
            section("attempts", "Thinking longer", _attempts(run.evaluation.get("attempts"))),
            section("samples", "What it writes", _samples(run)),
            section("needle", "A needle in a haystack", _needle(run.evaluation.get("needle"))),
            section("evaluation", "Evaluation", pairs(_shown(_scores(run)))),
            section("time", "How the time was spent", pairs(_time(run))),
            section("config", "Config", fold("resolved config", verbatim(config))),
            section("machine", "Code and machine", pairs(_shown(flat(_without(described, "config", "parameters"))))),
        ],
    )


def progress_text(run: Run) -> str:
    """`400 steps`, or how far a run has come."""
    return f"{run.steps:,} steps" if run.step >= run.steps else f"unfinished: step {run.step:,} of {run.steps:,}"


def _headline(run: Run) -> list[tuple[str, str, str]]:
    facts = []
    bits, xz = run.held_out("bits_per_byte"), number(run.evaluation.get("xz_bits_per_byte"))
    if bits is not None:
        facts.append(("held-out bits per byte", f"{bits:.3f}", f"xz -9: {xz:.3f}" if xz is not None else ""))
    if (loss := run.held_out("loss")) is not None:
        perplexity = run.held_out("perplexity")
        facts.append(("held-out loss", f"{loss:.3f}", f"perplexity {perplexity:.1f}" if perplexity is not None else ""))
    if run.training:
        last = number(run.training[-1]["loss"])
        facts.append(("training loss", "not finite" if last is None else f"{last:.3f}", f"at step {run.step:,}"))
    if (parameters := number(run.described.get("parameters"))) is not None:
        facts.append(("parameters", thousands(parameters), f"{parameters:,}"))
    if run.training and "tokens" in run.training[-1]:
        tokens = run.training[-1]["tokens"]
        facts.append(("tokens", thousands(tokens), f"{tokens:,}"))
    if rates := _finite(run, "tokens_per_second"):
        used = _finite(run, "mfu")
        note = f"{100 * statistics.median(used):.0f} % of the peak FLOP/s" if used else "median"
        facts.append(("tokens per second", thousands(statistics.median(rates)), note))
    if run.seconds:
        facts.append(("wall time", clock(sum(run.seconds.values())), ""))
    elif (seconds := training_seconds(run)) is not None:
        facts.append(("time in steps", clock(seconds), "from the logged rates"))
    if run.training and (skipped := number(run.training[-1].get("skipped"))):
        facts.append(("skipped steps", f"{skipped:.0f}", "not finite, or an outlier"))
    return facts


def _curves(run: Run) -> str:
    charts = []
    for title, key in (("Loss", "loss"), ("Bits per byte", "bits_per_byte")):
        training, held_out = series(run.training, key), series(run.evaluations, f"eval/{key}")
        curves = [Curve("training", training, 0)]
        curves.append(Curve("held out", held_out, 1, dots=True))
        charts.append(chart(title, curves, last_values=True))
    for title, key in (
        ("Learning rate", "learning_rate"),
        ("Gradient norm", "grad_norm"),
        ("Tokens per second", "tokens_per_second"),
    ):
        charts.append(
            chart(
                title,
                [Curve(title, series(run.training, key))],
                may_be_log=key == "grad_norm",
                from_zero=key != "grad_norm",
                legend=False,
            )
        )
    charts += _further(run)
    inside = "\n".join(filter(None, charts))
    return f'<div class="charts">{inside}</div>' if inside else ""


def _further(run: Run) -> list[str]:
    """Charts of what else is evaluated: one for each name, or for those that differ in the answer or the kind only."""
    names = dict.fromkeys(
        key.removeprefix("eval/") for row in run.evaluations for key in row if key.startswith("eval/")
    )
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in ("loss", "bits_per_byte", "perplexity") and not name.startswith("calibration/"):
            groups.setdefault(re.sub("(chosen|rejected)_", "", name.partition("/")[0]), []).append(name)
    charts = []
    for group, members in groups.items():
        curves = [
            Curve(_label(name), series(run.evaluations, f"eval/{name}"), i, dots=True) for i, name in enumerate(members)
        ]
        if len(members) == 1:
            held_out = dataclasses.replace(curves[0], label="held out", index=1)
            curves = [Curve("training", series(run.training, members[0])), held_out]
        charts.append(chart(TITLES.get(group, group.replace("_", " ").capitalize()), curves, last_values=True))
    return [*charts, _calibration(run)]


def _attempts(scores: dict[str, Any] | None) -> str:
    """How often the chosen one of n answers is right, of `llmlab eval --attempts`; nothing where there are none."""
    if not scores:
        return ""
    curves = [
        Curve(label, list(zip(scores["n"], scores[way], strict=True)), index, dots=True)
        for index, (way, label) in enumerate(LABELS.items())
        if way in scores
    ]
    split = str(scores["split"]).replace("_", " ")
    title = f"Right answers to {scores['questions']:,} questions ({split}), one chosen of n"
    return chart(title, curves, "answers drawn", log_x=True, x_ticks=scores["n"], last_values=True)


def _label(name: str) -> str:
    """What tells a metric from others in its chart."""
    first, _, kind = name.partition("/")
    answer = next((word for word in ("chosen", "rejected") if first.startswith(f"{word}_")), "")
    return " ".join(filter(None, (answer, kind.replace("_", " ")))) or "all"


def _calibration(run: Run) -> str:
    """How often the last evaluation is right, by how sure it is."""
    row = run.evaluations[-1] if run.evaluations else {}
    points: Points = []
    for key in row:
        if key.startswith("eval/calibration/confidence_"):
            sure, right = number(row[key]), number(row.get(key.replace("/confidence_", "/accuracy_")))
            points += [] if sure is None or right is None else [(sure, right)]
    if len(points) < 2:
        return ""
    points.sort()
    ideal: Points = [(points[0][0], points[0][0]), (points[-1][0], points[-1][0])]
    curves = [Curve("held out", points, 1, dots=True), Curve("as sure as right", ideal, 7)]
    return chart("Calibration: share right, by confidence", curves, "confidence")


def _scores(run: Run) -> dict[str, Any]:
    """What `llmlab eval` found, but for what has a section of its own."""
    return flat(without_paths(_without(run.evaluation, "needle", "conversations", "attempts")))


def _needle(found: Any) -> str:
    if not found:
        return ""
    columns = [f"{length:,}" for length in found["lengths"]]
    rows = [f"{depth:.0%}" for depth in found["depths"]]
    return heat_map("Found, by depth in the text and its length in tokens", rows, columns, found["found"])


def _samples(run: Run) -> str:
    return "\n".join(
        fold(f"step {step:,}", verbatim(text), unfolded=i == 0) for i, (step, text) in enumerate(run.samples)
    )


def _time(run: Run) -> dict[str, str]:
    total = sum(run.seconds.values())
    return {name: f"{clock(spent)} ({100 * spent / total:.0f} %)" for name, spent in run.seconds.items() if total}


def _finite(run: Run, key: str) -> list[float]:
    return [y for _, y in series(run.training, key) if y is not None]


def _shown(facts: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{value:.6g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
        for name, value in facts.items()
        if value is not None
    }


def _without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in names}
