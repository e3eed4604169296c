"""The best of several answers: by a reward model, or by what most of them come to."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from llmlab.data.chat import Conversation, Message
from llmlab.infer.choose import Judge, final_answer, votes
from llmlab.serve.beside import Beside
from llmlab.serve.fields import Fields
from llmlab.serve.sampling import Asked

_judging = Beside("rewards")  # one at a time: beside it the engine goes on


class Choosing(NamedTuple):
    """samples: how many are drawn. by: what puts them in order; None: all are given, as they come."""

    samples: int
    by: Literal["reward", "majority"] | None


class Answer(NamedTuple):
    """An answer with its thinking, as a reward model learns from them. cut: it has no end of its own."""

    message: Message
    cut: bool


def choosing(fields: Fields, settings: Asked, most: int, judge: Judge | None) -> Choosing:
    """What `best_of` and `choose` ask for.

    Raises:
      ApiError: it cannot be had.
    """
    samples = fields.integer("best_of", settings.n, settings.n, most)
    by = fields.choice("choose", "majority" if judge is None else "reward", ("reward", "majority"))
    if by == "reward" and judge is None:
        raise fields.wrong("choose", "no reward model is here: start the server with --reward=WORKDIR, or use majority")
    if samples == settings.n and "choose" not in fields:
        return Choosing(samples, None)
    if settings.stream:
        name = "best_of" if samples > settings.n else "choose"
        raise fields.wrong(name, "the best can be known at the end only: leave stream out")
    return Choosing(samples, "reward" if by == "reward" else "majority")


async def ranked(
    answers: Sequence[Answer], turns: Conversation, judge: Judge | None
) -> list[tuple[int, dict[str, Any]]]:
    """The place of each answer to `turns`, the best first, and what speaks for it; those that were cut come last.

    With a judge that is {"reward": its score, null where the conversation does not fit its model}. Without one it is
    {"votes": how many answers come to the same}; those that were cut only vote where no other does.

    Raises:
      UserError: the judge's template cannot spell the conversation.
    """
    if judge is not None:
        conversations = [(*turns, answer.message) for answer in answers]
        scores = (await _judging(judge.scores, conversations)).tolist()
        order = sorted(range(len(answers)), key=lambda place: (answers[place].cut, -scores[place]))
        return [(place, {"reward": scores[place] if np.isfinite(scores[place]) else None}) for place in order]
    all_cut = all(answer.cut for answer in answers)
    ends = [_end(answer.message) for answer in answers]
    voters = [end if answer.cut == all_cut else None for end, answer in zip(ends, answers, strict=True)]
    count = dict(zip(voters, votes(voters), strict=True))
    order = sorted(
        range(len(answers)), key=lambda place: (answers[place].cut, -count.get(ends[place], 0), ends.index(ends[place]))
    )
    return [(place, {"votes": count.get(ends[place], 0)}) for place in order]


def _end(message: Message) -> str | None:
    """What an answer comes to: the calls in it, or its final answer."""
    calls = "\n".join(f"{call.name} {call.arguments}" for call in message.calls)
    return calls or final_answer(message.content)
