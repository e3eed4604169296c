"""Conversations in a report: what a model answered before and after, side by side; and how often it was right."""

from collections.abc import Sequence
from typing import Any

from llmlab.report.page import Html, escape, table
from llmlab.report.read import Row, Run

SCORES = ("answers", "ended", "exact", "called", "answered", "tokens")
MOST_SHOWN = 24


def side_by_side(run: Run) -> str:
    """The earliest and the latest answers to the same prompts, and what the data has; nothing where none are known."""
    if not run.conversations:
        return ""
    last = run.conversations[-1][1]
    lines = []
    for row in last[:MOST_SHOWN]:
        answers = [_answer_to(row["prompt"], rows) for _, rows in run.conversations]
        lines.append([_turns(row["prompt"]), *map(_turns, answers), _turns(row["reference"])])
    steps = [f"step {step:,}" for step, _ in run.conversations]
    return table(["asked", *steps, "in the data"], lines)


def answers(scores: dict[str, Any] | None) -> str:
    """The shares of `llmlab eval`, a line for each kind; nothing where there are none."""
    if not scores:
        return ""
    shown = [name for name in SCORES if name in scores]
    lines = []
    for kind, part in {"all": scores, **scores.get("kinds", {})}.items():
        lines.append([kind, *(_score(name, part.get(name)) for name in shown)])
    return table(["answers to", *shown], lines)


def _score(name: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if name == "answers" else f"{value:.1f}" if name == "tokens" else f"{100 * value:.1f} %"


def _answer_to(prompt: list[Row], rows: Sequence[Row]) -> list[Row]:
    return next((row["answer"] for row in rows if row["prompt"] == prompt), [])


def _turns(turns: Sequence[Row]) -> Html:
    return Html("".join(f'<p class="turn"><b>{escape(_who(turn))}</b> {_said(turn)}</p>' for turn in turns))


def _who(turn: Row) -> str:
    return " ".join(str(turn[name]) for name in ("role", "name") if turn.get(name))


def _said(turn: Row) -> str:
    parts = [f"<i>{escape(turn['thinking'])}</i>"] if turn.get("thinking") else []
    if turn.get("content"):
        parts.append(escape(turn["content"]))
    for call in turn.get("tool_calls", ()):
        parts.append(f"<code>{escape(call['name'])} {escape(call['arguments'])}</code>")
    return " ".join(parts)
