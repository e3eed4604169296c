"""The best of several answers: by a reward, by what most of them come to, or by both."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from llmlab.data.chat import Conversation, Message
from llmlab.infer.choose import Judge, final_answer, shares, votes
from llmlab.serve.beside import Beside
from llmlab.serve.fields import Fields
from llmlab.serve.sampling import Asked

_judging = Beside("rewards")  # one at a time: beside it the engine goes on


Way = Literal["reward", "majority", "weighted"]


class Choosing(NamedTuple):
    """samples: how many are drawn. by: what puts them in order; None: all are given, as they come."""

    samples: int
    by: Way | None


class Answer(NamedTuple):
    """An answer with its thinking, the form that a reward model learns from. cut: it has no end of its own."""

    message: Message
    cut: bool


def choosing(fields: Fields, settings: Asked, most: int, judge: Judge | None) -> Choosing:
    """What `best_of` and `choose` ask for.

    Raises:
      ApiError: it cannot be had.
    """
    samples = fields.integer("best_of", settings.n, settings.n, most)
    by = cast(Way, fields.choice("choose", "majority" if judge is None else "reward", get_args(Way)))
    if by != "majority" and judge is None:
        raise fields.wrong(
            "choose", "nothing here gives rewards: start the server with --reward=WORKDIR, or use majority"
        )
    if samples == settings.n and "choose" not in fields:
        return Choosing(samples, None)
    if settings.stream:
        name = "best_of" if samples > settings.n else "choose"
        raise fields.wrong(name, "the best can be known at the end only: leave stream out")
    return Choosing(samples, by)


async def ranked(
    answers: Sequence[Answer], turns: Conversation, by: Way, judge: Judge | None
) -> list[tuple[int, dict[str, Any]]]:
    """The place of each answer to `turns`, the best first, and what speaks for it; those that were cut come last.

    By reward that is {"reward": the judge's, null where the conversation does not fit its model}; weighted also
    {"share": how much of all reward the answers have that come to the same}; by majority {"votes": how many these are}.
    Those that were cut only vote where no other does.

    Raises:
      UserError: the judge's template cannot spell the conversation.
    """
    all_cut = all(answer.cut for answer in answers)
    ends = [_end(answer.message) for answer in answers]
    voters = [end if answer.cut == all_cut else None for end, answer in zip(ends, answers, strict=True)]
    if by != "majority":
        assert judge is not None
        conversations = [(*turns, answer.message) for answer in answers]
        scores = (await _judging(judge.scores, conversations)).tolist()
        said: list[dict[str, Any]] = [{"reward": score if np.isfinite(score) else None} for score in scores]
        share_of = [0.0] * len(answers)
        if by == "weighted":
            share_of = shares(voters, scores)
            said = [{**each, "share": share} for each, share in zip(said, share_of, strict=True)]
        order = sorted(range(len(answers)), key=lambda place: (answers[place].cut, -share_of[place], -scores[place]))
        return [(place, said[place]) for place in order]
    count = dict(zip(voters, votes(voters), strict=True))
    order = sorted(
        range(len(answers)), key=lambda place: (answers[place].cut, -count.get(ends[place], 0), ends.index(ends[place]))
    )
    return [(place, {"votes": count.get(ends[place], 0)}) for place in order]


def _end(message: Message) -> str | None:
    """What an answer comes to: the calls in it, or its final answer."""
    calls = "\n".join(f"{call.name} {call.arguments}" for call in message.calls)
    return calls or final_answer(message.content)
