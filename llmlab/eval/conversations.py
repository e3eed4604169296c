"""How a model answers in conversations that it has not seen: does it end, say what the data says, call tools rightly?

The last question of each conversation is asked again, after all that went before it; what the data has behind it is
the reference.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jax

from llmlab.core.paths import write_atomic
from llmlab.data.chat import ChatTemplate, Conversation, Example, Message, ToolCall
from llmlab.infer.chat import NO_TOOLS, Reply, Tools, replies, results, split
from llmlab.infer.choose import numbers
from llmlab.infer.kept import as_turns
from llmlab.model.types import Model, Params

Outcome = dict[str, Any]
SHARES = ("ended", "exact", "called", "answered")


def measure(
    model: Model,
    params: Params,
    template: ChatTemplate,
    examples: Iterable[Example],
    *,
    tools: Tools = NO_TOOLS,
    max_tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **sampling: Any,
) -> list[Outcome]:
    """An outcome for each example, of whose responses the first is the reference.

    ended: it came to an end within `max_tokens`. exact: it then says what the reference says, but for white space.
    Where the reference calls tools: called: for each of these calls there is one, well formed, of the same tool with
    the same result; answered: it is called, and the last number of the last turn is that result, or, where that is no
    number, the last turn holds what the reference's says. A conversation that does not fit is one that fails.

    Raises:
      UserError: a setting out of its range.
    """
    kinds, asked = [], []
    for example in examples:
        kinds.append(example.kind)
        asked.append(split(example.responses[0].conversation))
    said = replies(
        model,
        params,
        template,
        [prompt for prompt, _ in asked],
        tools=tools,
        max_tokens=max_tokens,
        seeds=range(seed, seed + len(asked)),
        batch_size=batch_size,
        progress=progress,
        **sampling,
    )
    return [
        {"kind": kind, **_turns(prompt, reply, reference), **_judged(reply, reference, tools)}
        for kind, (prompt, reference), reply in zip(kinds, asked, said, strict=True)
    ]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many, the share of each good thing, and the mean length in tokens; the same for every kind."""
    kinds = sorted({outcome["kind"] for outcome in outcomes} - {""})
    return {
        **_shares(outcomes),
        "kinds": {kind: _shares([outcome for outcome in outcomes if outcome["kind"] == kind]) for kind in kinds},
    }


def table(scores: dict[str, Any]) -> str:
    """One line for each kind, for people."""
    lines = [("answers to", "rows", *SHARES, "tokens")]
    for name, part in {"conversations": scores, **scores["kinds"]}.items():
        shares = ("" if part.get(share) is None else f"{part[share]:.4f}" for share in SHARES)
        lines.append((name, str(part["answers"]), *shares, f"{part['tokens']:.1f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return f"{text}\n{scores['too_long']} do not fit into the positions" if scores["too_long"] else text


def write_conversations(
    model: Model,
    params: Params,
    template: ChatTemplate,
    examples: Iterable[Example],
    *,
    tools: Tools = NO_TOOLS,
    max_tokens: int,
    seed: int = 0,
    path: str | os.PathLike[str],
    **sampling: Any,
) -> list[Reply]:
    """What the model answers to the last question of each example, also written to `path` beside what the data says.

    The same goes to `path` with the suffix .jsonl, for programs. On several hosts, all call this.

    Raises:
      DiskFull: no room for a file.
    """
    examples, path = list(examples), Path(path)
    asked = [split(example.responses[0].conversation) for example in examples]
    seeds = range(seed, seed + len(asked))
    prompts = [prompt for prompt, _ in asked]
    said = replies(model, params, template, prompts, tools=tools, max_tokens=max_tokens, seeds=seeds, **sampling)
    rows = [_turns(prompt, reply, reference) for (prompt, reference), reply in zip(asked, said, strict=True)]
    parts = [
        f"=== conversation {number}{f', {example.kind}' if example.kind else ''} ===\n{readable(prompt)}\n"
        f"--- the model answers ---\n{readable(reply.messages)}{'' if reply.ended else ' …'}\n"
        f"--- the data has ---\n{readable(reference)}\n"
        for number, (example, (prompt, reference), reply) in enumerate(zip(examples, asked, said, strict=True), 1)
    ]
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "\n".join(parts).encode())
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomic(path.with_suffix(".jsonl"), "".join(lines).encode())
    return said


def readable(conversation: Iterable[Message]) -> str:
    """A conversation as text for people."""
    lines = []
    for message in conversation:
        role = f"{message.role} {message.name}".rstrip()
        if message.thinking:
            lines.append(f"{role} thinks: {message.thinking}")
        if message.content or not (message.thinking or message.calls):
            lines.append(f"{role}: {message.content}")
        lines += [f"{role} calls {call.name}: {call.arguments}" for call in message.calls]
    return "\n".join(lines)


def _turns(prompt: Conversation, reply: Reply, reference: Conversation) -> Outcome:
    turns = {"prompt": prompt, "answer": reply.messages, "reference": reference}
    return {name: as_turns(messages) for name, messages in turns.items()} | {"ended": reply.ended}


def _judged(reply: Reply, reference: Conversation, tools: Tools) -> Outcome:
    said, meant = _last(reply.messages), _last(reference)
    judged: Outcome = {
        "exact": reply.ended and _plain(said) == _plain(meant),
        "tokens": reply.tokens,
        "too_long": not reply.messages,
    }
    expected = _calls(reference)
    if not expected:
        return judged
    made = {_meaning(call, tools) for call in _calls(reply.messages)}
    judged["called"] = all(_meaning(call, tools) in made for call in expected)
    judged["answered"] = judged["called"] and reply.ended and _holds(said, meant, reference)
    return judged


def _calls(conversation: Iterable[Message]) -> list[ToolCall]:
    return [call for message in conversation for call in message.calls]


def _meaning(call: ToolCall, tools: Tools) -> tuple[str, str | Decimal]:
    """The tool, and what it makes of the arguments; these themselves where it is not at hand."""
    if call.name not in tools:
        return call.name, _plain(call.arguments)
    (turn,) = results([call], tools)
    result, number = turn.content, _number(turn.content)
    return call.name, _plain(result) if number is None else number


def _holds(said: str, meant: str, reference: Conversation) -> bool:
    given = [message.content for message in reference if message.role == "tool"]
    number = _number(given[-1]) if given else None
    return _plain(meant) in _plain(said) if number is None else numbers(said)[-1:] == [number]


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _last(conversation: Sequence[Message]) -> str:
    """What the assistant says in the end."""
    return conversation[-1].content if conversation and conversation[-1].role == "assistant" else ""


def _plain(text: str) -> str:
    return " ".join(text.split())


def _shares(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    scores: dict[str, Any] = {"answers": len(outcomes)}
    for name in SHARES:
        judged = [outcome[name] for outcome in outcomes if name in outcome]
        scores |= {name: sum(judged) / len(judged)} if judged else {}
    scores["tokens"] = sum(outcome["tokens"] for outcome in outcomes) / max(1, len(outcomes))
    return scores | {"too_long": sum(outcome["too_long"] for outcome in outcomes)}
