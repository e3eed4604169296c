"""A conversation that is longer than the context loses as little as it must."""

import random

from llmlab.data.chat import Message, prompt_of
from llmlab.serve.chat import trimmed
from tests.scripted import TEMPLATE


def conversation(rng):
    """Turns of all lengths; a system's turn may stand anywhere, and the user need not begin."""
    roles = rng.choices(("user", "assistant", "system"), (4, 4, 1), k=rng.choice((1, 2, 5, 20, 60)))
    return tuple(Message(role, rng.choice("abcd") * rng.choice((1, 3, 20))) for role in roles)


def longest(turns, room):
    """The same, by trying one after the other what may be left of it."""
    system = [turn for turn in turns if turn.role == "system"]
    spoken = [turn for turn in turns if turn.role != "system"]
    questions = [place for place, turn in enumerate(spoken) if turn.role == "user"] or [0]
    first = spoken[: questions[1]] if len(questions) > 1 else []
    kept = [
        turns,
        *([*system, *first, *spoken[begin:]] for begin in questions[2:]),
        [*system, *spoken[questions[-1] :]],
    ]
    return next((ids for left in kept if len(ids := prompt_of(TEMPLATE, left)) <= room), [])


def test_as_much_is_kept_as_there_is_room_for():
    rng, kept = random.Random(0), set()
    for _ in range(300):
        turns = conversation(rng)
        for room in (rng.randrange(1, 800), len(prompt_of(TEMPLATE, turns)) - 1):
            found = trimmed(TEMPLATE, turns, room)
            assert found == longest(turns, room)
            kept.add(bool(found))
    assert kept == {True, False}


def test_what_is_far_too_long_is_never_put_together():
    class Counting:
        turns = 0

        def render(self, turns, *, generate):
            self.turns += len(turns)
            return TEMPLATE.render(turns, generate=generate)

    counting = Counting()
    found = trimmed(counting, [Message("user", "a")] * 100_000, 300)
    assert 290 < len(found) <= 300
    assert counting.turns < 2_000
