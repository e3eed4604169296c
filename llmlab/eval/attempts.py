"""How much is gained by answering several times: how often the answer chosen among n attempts is right, as n grows.

Chosen by self-consistency, the answer of most (arXiv 2203.11171), by a reward, the best of n (2009.01325), or by both,
the answer of most reward (2206.02336). Beside them the share of questions of which any attempt is right, which no
choice can surpass.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from llmlab.data.chat import ChatTemplate, Conversation, Example, Message
from llmlab.infer.chat import NO_TOOLS, Tools, replies, split
from llmlab.infer.choose import Judge, final_answer, majority, shares
from llmlab.infer.kept import Row, as_turns
from llmlab.model.types import Model, Params

Attempts = list[dict[str, Any]]
LABELS = {
    "majority": "the answer of most",
    "best": "the best by the reward",
    "weighted": "the answer of most reward",
    "any": "any of them right",
}


def attempts(
    model: Model,
    params: Params,
    template: ChatTemplate,
    examples: Iterable[Example],
    *,
    count: int,
    judge: Judge | None = None,
    tools: Tools = NO_TOOLS,
    max_tokens: int,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
    **sampling: Any,
) -> list[Attempts]:
    """`count` attempts at the last question of each example, each with its `messages`, whether they `ended`, the
    `answer` that they come to, whether it is `right`, and, where there is a judge, its `reward`.

    An attempt is right where it comes to what the first response of the example does, and ended.

    Raises:
      UserError: a setting out of its range.
    """
    asked = [split(example.responses[0].conversation) for example in examples]
    prompts = [prompt for prompt, _ in asked for _ in range(count)]
    seeds = [seed + number for number in range(len(prompts))]
    settings: dict[str, Any] = {
        **{"tools": tools, "max_tokens": max_tokens, "batch_size": batch_size, "progress": progress},
        **sampling,
    }
    said = replies(model, params, template, prompts, seeds=seeds, **settings)
    rewards = None
    if judge is not None:
        rewards = judge.scores([(*prompt, *reply.messages) for prompt, reply in zip(prompts, said, strict=True)])
    found: list[Attempts] = []
    for number, reply in enumerate(said):
        _, reference = asked[number // count]
        answer = _answer(reply.messages) if reply.ended else None
        attempt: dict[str, Any] = {"messages": as_turns(reply.messages), "ended": reply.ended, "answer": answer}
        attempt["right"] = answer is not None and answer == _answer(reference)
        if rewards is not None:
            attempt["reward"] = float(rewards[number]) if reply.ended else float("-inf")
        found += [[]] if number % count == 0 else []
        found[-1].append(attempt)
    return found


def curve(found: Sequence[Attempts]) -> dict[str, Any]:
    """{"questions", "n": 1, 2, 4, … and all, and for each way to choose its share of right answers at each n}.

    At each n the attempts at a question are cut into as many groups of n as there are; the share is the mean over all.
    """
    count = len(found[0])
    sizes = sorted({*(2**power for power in range(count.bit_length()) if 2**power <= count), count})
    ways: dict[str, Callable[[Attempts], bool]] = {"majority": _by_majority, "any": _by_any}
    if "reward" in found[0][0]:
        ways |= {"best": _by_reward, "weighted": _by_both}
    right = {
        way: [float(np.mean([choose(group) for each in found for group in _groups(each, n)])) for n in sizes]
        for way, choose in ways.items()
    }
    return {"questions": len(found), "n": sizes, **right}


def pairs(prompt: Conversation, each: Attempts) -> list[Row]:
    """Rows of right attempts beside wrong ones, each used once: what a reward model of these answers learns from (Cobbe
    et al., arXiv 2110.14168). What has not ended, or says nothing in the end, is in none.
    """
    whole = [attempt for attempt in each if attempt["ended"] and attempt["answer"] is not None]
    right = [attempt["messages"] for attempt in whole if attempt["right"]]
    wrong = [attempt["messages"] for attempt in whole if not attempt["right"]]
    return [{"prompt": as_turns(prompt), "chosen": a, "rejected": b} for a, b in zip(right, wrong, strict=False)]


def table(scores: dict[str, Any]) -> str:
    """A line for each n, for people."""
    ways = [way for way in LABELS if way in scores]
    lines = [("attempts", *(LABELS[way] for way in ways))]
    lines += [(str(n), *(f"{scores[way][place]:.4f}" for way in ways)) for place, n in enumerate(scores["n"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def _groups(each: Attempts, n: int) -> list[Attempts]:
    return [each[begin : begin + n] for begin in range(0, len(each) - n + 1, n)]


def _by_majority(group: Attempts) -> bool:
    return group[majority([attempt["answer"] for attempt in group])]["right"]


def _by_reward(group: Attempts) -> bool:
    return max(group, key=lambda attempt: attempt["reward"])["right"]


def _by_both(group: Attempts) -> bool:
    rewards = [attempt["reward"] for attempt in group]
    return group[int(np.argmax(shares([attempt["answer"] for attempt in group], rewards)))]["right"]


def _by_any(group: Attempts) -> bool:
    return any(attempt["right"] for attempt in group)


def _answer(messages: Sequence[Message]) -> str | None:
    last = messages[-1] if messages else Message("assistant")
    return final_answer(last.content) if last.role == "assistant" else None
