"""Sums as built-in conversations: right answers are right, slips are wrong, and no sum is on both sides."""

import itertools
import random

import pytest

from llmlab.core.errors import UserError
from llmlab.data import sums
from llmlab.data.chat import Example

PAIRS = [(a, b) for a in range(10, 4000, 97) for b in range(10, 90_000, 3011)]


def test_right_answers():
    for a, b in PAIRS:
        assert sums.answer(a, b).content == f"It is {a + b}."
    assert sums.answer(347, 86).thinking == "7 + 6 = 13, 4 + 8 + 1 = 13, 3 + 1 = 4"


@pytest.mark.parametrize("slip", sums.SLIPS)
def test_slips_are_wrong(slip):
    rng = random.Random(0)
    for a, b in PAIRS:
        wrong, right = sums.answer(a, b, slip, rng), sums.answer(a, b)
        assert wrong.thinking != right.thinking
        assert wrong.content != right.content


def test_sides_share_no_sum():
    def asked(rows, split):
        names = [name.partition("/")[0].split(" + ") for name, _ in sums.sums(rows, split)]
        return {frozenset(name) for name in names}, len(names)

    held_out = [asked(rows, "held_out") for rows in sums.ROWS]
    training = [asked(rows, "train") for rows in sums.ROWS]
    for (kept, count), (learned, _) in itertools.product(held_out, training):
        assert count == sums.HELD_OUT_EXAMPLES
        assert not kept & learned


def test_rows():
    (name, row), *_ = sums.sums("preference", "all")
    better, worse = Example.loads(row).responses
    assert better.conversation[0] == worse.conversation[0]
    assert name == next(sums.sums("preference", "train"))[0]
    with pytest.raises(UserError, match="set data.rows to chat or preference"):
        next(sums.sums("text", "train"))
