"""Right answers beside spoilt ones: each kind of spoiling does what its name says, and never leaves the right one."""

import collections
import random

import pytest

from llmlab.data import assistant_preferences
from llmlab.data.assistant_chat import answer
from llmlab.data.assistant_preferences import BAD, MILD, RUDE
from llmlab.data.library import Entry, words
from llmlab.data.sources_assistant import known
from tests.small_library import small_library

__all__ = ["small_library"]

KINDS = ("other", "cut", "repeated", "rude", "made_up")
MOVE = Entry("function", "box.Dict.move_to_end", "key", "Move an element to the end of it.", "box.py", (), ())
BEGIN = Entry("function", "box.Dict.begin", "", "Take the first key that is in it.", "box.py", (), ())
FAR = Entry("function", "sky.fly", "", "Leave the ground for some hours.", "sky.py", (), ())
FAR_MOVE = Entry("function", "sky.go", "", "Move the wings up and down.", "sky.py", (), ())


@pytest.fixture
def made(small_library):
    return {
        (rows, side): [example for _, example in assistant_preferences.examples(rows, known(side), side)]
        for rows in assistant_preferences.ROWS
        for side in ("train", "held_out")
    }


def said(example):
    return [response.conversation[-1].content for response in example.responses]


def test_every_row_is_one_prompt_and_its_answers_the_right_one_first(made):
    for (rows, side), examples in made.items():
        assert len(examples) == (300 if side == "train" else 100)
        right = {answer(entry) for entry in known(side)}
        for example in examples:
            assert len({response.conversation[:-1] for response in example.responses}) == 1
            assert len(set(said(example))) == len(said(example)) == {"preference": 2, "ranking": 3, "binary": 1}[rows]
            values = [response.value for response in example.responses]
            if rows == "binary":
                assert values == [float(example.kind == "right")]
                assert (said(example)[0] in right) == (example.kind == "right") or example.kind == "other"
            else:
                assert said(example)[0] in right
                assert set(values) == {0.0}


def test_kinds_are_a_fifth_each(made):
    for side, number in (("train", 60), ("held_out", 20)):
        counts = collections.Counter(example.kind for example in made["preference", side])
        assert counts.keys() == set(KINDS)
        assert all(abs(count - number) <= 3 for count in counts.values())
        goods = [example.kind == "right" for example in made["binary", side]]
        assert abs(sum(goods) / len(goods) - 0.5) < 0.05
    assert {example.kind for example in made["ranking", "train"]} == {f"{mild} {bad}" for mild in MILD for bad in BAD}


def test_held_out_answers_are_of_held_out_entries_alone(made):
    own, train = ({answer(entry) for entry in known(side)} for side in ("held_out", "train"))
    others = [said(example)[1] for example in made["preference", "held_out"] if example.kind == "other"]
    assert not set(others) & train
    assert len(set(others) & own) > len(others) / 2


def test_an_entry_is_not_always_spoilt_alike(made):
    kinds = collections.defaultdict(list)
    for example in made["preference", "held_out"]:
        kinds[said(example)[0]].append(example.kind)
    twice = [each for each in kinds.values() if len(each) > 1]
    assert twice
    assert all(len(set(each)) > 1 for each in twice)


@pytest.mark.parametrize("seed", range(30))
def test_each_kind_spoils_in_its_way(seed):
    rng = random.Random(seed)
    right = answer(MOVE)
    spoilers = assistant_preferences._spoilers([MOVE, BEGIN, FAR, FAR_MOVE])
    cut = spoilers["cut"](MOVE, rng)
    assert right.startswith(cut + " ")
    assert cut.startswith(f"{MOVE.name}: Move")
    assert cut[-1].isalnum()
    repeated = spoilers["repeated"](MOVE, rng)
    assert repeated.startswith(right[:-1])
    assert words(repeated).count("it") >= 2
    rude = spoilers["rude"](MOVE, rng)
    assert any(insult in rude for insult in RUDE)
    made_up = spoilers["made_up"](MOVE, rng)
    assert made_up.startswith(f"{MOVE.name}: ")
    assert made_up.endswith(".")
    assert "{" not in made_up
    other = spoilers["other"](MOVE, rng)
    assert other in (answer(BEGIN), answer(FAR), answer(FAR_MOVE), f"{MOVE.name}: {FAR.summary}")


def test_the_right_name_is_put_only_on_what_gives_itself_away():
    """`sky.go` moves too, `box.Dict.begin` is of the same package: only `sky.fly` is left to be renamed."""
    spoil = assistant_preferences._spoilers([MOVE, BEGIN, FAR, FAR_MOVE])["other"]
    found = collections.Counter(spoil(MOVE, random.Random(seed)) for seed in range(400))
    assert 0.15 < found[f"{MOVE.name}: {FAR.summary}"] / 400 < 0.35
    assert not any(spoil(BEGIN, random.Random(seed)).startswith(BEGIN.name) for seed in range(100))
