"""Scores a task: which choice the model finds likeliest, or whether it writes the answer. One outcome a row.

A prompt's ids are BOS and then the prompt's own; the answer's are encoded apart and appended. So no id of the prompt
depends on the answer. A prompt that the positions do not reach loses its beginning, and is counted.
"""

import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import Tokenizer
from llmlab.eval.likelihood import LogLikelihoods, fit
from llmlab.eval.tasks import Row, Task, continuation
from llmlab.infer.choose import numbers
from llmlab.infer.generate import complete
from llmlab.model.types import Model, Params

Outcome = dict[str, Any]
Advance = Callable[[int], None]


class Generation(NamedTuple):
    """How answers are written and read.

    extract: "line" compares the first line, but for case and white space; "number" the last number before the first
    empty line with the last one of the accepted answer.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    extract: Literal["line", "number"] = "line"


def score_choices(
    task: Task,
    shown: Sequence[str],
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    log_likelihoods: LogLikelihoods,
    progress: Advance,
) -> list[Outcome]:
    """An outcome a row: the log-probability of each choice after its context, and which of them wins.

    `correct` goes by the sum over the choice's tokens, `correct_norm` by that sum per byte of the choice.

    Raises:
      UserError: a choice longer than the positions reach, or a model whose numbers are not finite.
    """
    pairs, cuts = [], []
    for row, context in zip(task.rows, shown, strict=True):
        prompt, cut = [tokenizer.bos_id, *tokenizer.encode(context)], False
        for choice in row.choices:
            ids = tokenizer.encode(continuation(context, choice))
            if len(ids) > model.config.max_positions:
                raise UserError(
                    f"{task.path}:{row.line}: the choice {choice[:20]!r}… has {len(ids)} tokens, more than "
                    f"model.max_positions={model.config.max_positions}"
                )
            kept, shorter = fit(prompt, model.config.max_positions + 1 - len(ids))
            pairs.append((kept, ids))
            cut |= shorter
        cuts.append(cut)
    nats = log_likelihoods(params, pairs, progress)
    if not np.isfinite(nats).all():
        raise UserError("the model gives log-probabilities that are not finite: its weights diverged or are damaged")
    ends = np.cumsum([len(row.choices) for row in task.rows])[:-1]
    rows = zip(task.rows, shown, np.split(nats, ends), cuts, strict=True)
    return [_choice_outcome(row, context, nats_, cut) for row, context, nats_, cut in rows]


def score_generation(
    task: Task,
    shown: Sequence[str],
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    settings: Generation,
    progress: Advance,
) -> list[Outcome]:
    """An outcome a row: what the model wrote after its context, what was read from it, and whether it is accepted.

    Raises:
      UserError: no room for an answer, or an accepted answer without a number where numbers are compared.
    """
    reach = model.config.max_positions
    if settings.max_tokens >= reach:
        raise UserError(f"max_tokens={settings.max_tokens} should be less than model.max_positions={reach}")
    read = _READERS[settings.extract]
    accepted = [[_accepted(task, row, answer, settings) for answer in row.answers] for row in task.rows]
    fitted = [fit([tokenizer.bos_id, *tokenizer.encode(text)], reach - settings.max_tokens) for text in shown]
    outcomes: dict[int, Outcome] = {}
    stops = _stop_ids(tokenizer, settings)
    order = sorted(range(len(fitted)), key=lambda i: -len(fitted[i][0]))
    for begin in range(0, len(order), settings.batch_size):
        chosen = order[begin : begin + settings.batch_size]
        written = complete(
            model,
            params,
            [fitted[i][0] for i in chosen],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seeds=[settings.seed + i for i in chosen],
            stop_ids=stops,
            rows=settings.batch_size,
        )
        for i, ids in zip(chosen, written, strict=True):
            text = tokenizer.decode(ids)
            answer, row = read(text), task.rows[i]
            outcomes[i] = {
                "line": row.line,
                "prompt": shown[i],
                "written": text,
                "read": None if answer is None else str(answer),
                "answers": list(row.answers),
                "correct": answer is not None and answer in accepted[i],
                "truncated": fitted[i][1],
            }
        progress(begin + len(chosen))
    return [outcomes[i] for i in range(len(order))]


def summary(task: Task, outcomes: Sequence[Outcome], few_shot: int) -> dict[str, Any]:
    """The scores of a task, each with its standard error, and how many contexts were cut to fit."""
    count = len(outcomes)
    scores: dict[str, float | None] = {}
    for name, key in _SCORES[task.kind].items():
        share = sum(outcome[key] for outcome in outcomes) / count
        scores |= {name: share, f"{name}_stderr": standard_error(share, count)}
    if task.kind == "choices":
        scores["chance"] = sum(1 / len(row.choices) for row in task.rows) / count
    truncated = sum(outcome["truncated"] for outcome in outcomes)
    return {"task": task.name, "kind": task.kind, "rows": count, "few_shot": few_shot, "truncated": truncated, **scores}


def standard_error(share: float, count: int) -> float | None:
    """Of a share of `count` independent rows: sqrt(p(1-p)/(n-1)); a single row says nothing about it."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """One line for each score, for people."""
    lines = [("task", "rows", "shots", "score", "value", "± stderr", "chance")]
    for s in summaries:
        for name in _SCORES[s["kind"]]:
            error = s[f"{name}_stderr"]
            values = ["" if value is None else f"{value:.4f}" for value in (s[name], error, s.get("chance"))]
            lines.append((s["task"], str(s["rows"]), str(s["few_shot"]), name, *values))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    notes = [f"{s['task']}: {s['truncated']} contexts were cut to fit" for s in summaries if s["truncated"]]
    return "\n".join([text, *notes])


def normalised(text: str) -> str:
    """The first line of `text`, in one case, its runs of white space each as one space."""
    return " ".join(text.split("\n")[0].casefold().split())


def last_number(text: str) -> Decimal | None:
    """The last number before the first empty line; 1,234.50 is 1234.5."""
    found = numbers(text.split("\n\n")[0])
    return found[-1] if found else None


def _accepted(task: Task, row: Row, answer: str, settings: Generation) -> str | Decimal:
    """An accepted answer as it is read from what the model writes."""
    where = f"{task.path}:{row.line}: the answer {answer[:40]!r}"
    if settings.extract == "line" and "\n" in answer.strip():
        raise UserError(f"{where} has several lines, and only the first that the model writes is read: shorten it")
    read = _READERS[settings.extract](answer.strip())
    if read is None:
        raise UserError(f"{where} holds no number: compare lines instead, with extract=line")
    return read


def _stop_ids(tokenizer: Tokenizer, settings: Generation) -> list[int]:
    """EOS, and where only the first line is read, every id whose text ends it."""
    if settings.extract != "line":
        return [tokenizer.eos_id]
    ends_line = [id for id in range(tokenizer.vocab_size) if b"\n" in tokenizer.decode_bytes([id])]
    return [tokenizer.eos_id, *ends_line]


def _choice_outcome(row: Row, context: str, nats: np.ndarray, truncated: bool) -> Outcome:
    per_byte = nats / [len(choice.encode()) for choice in row.choices]
    best, best_norm = (row.choices[int(np.argmax(scores))] for scores in (nats, per_byte))
    return {
        "line": row.line,
        "prompt": context,
        "choices": list(row.choices),
        "log_likelihoods": nats.tolist(),
        "chosen": best,
        "chosen_norm": best_norm,
        "answer": row.answers[0],
        "correct": best in row.answers,
        "correct_norm": best_norm in row.answers,
        "truncated": truncated,
    }


_READERS: dict[str, Callable[[str], str | Decimal | None]] = {"line": normalised, "number": last_number}
_SCORES = {"choices": {"acc": "correct", "acc_norm": "correct_norm"}, "generation": {"exact_match": "correct"}}
