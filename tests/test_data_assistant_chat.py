"""Conversations about a library: their shares, their form, and that every tool turn is what the tool says."""

import collections
import re

import pytest

from llmlab.data import assistant_chat
from llmlab.data.assistant_chat import HELD_OUT_SUMS, QUESTIONS, SUMS, answer, question
from llmlab.data.chat import Message
from llmlab.data.sources_assistant import known
from llmlab.data.split import place
from llmlab.data.tools import TOOLS
from tests.small_library import small_library

__all__ = ["small_library"]


@pytest.fixture
def made(small_library):
    return {side: [e for _, e in assistant_chat.examples(known(side), side)] for side in ("train", "held_out")}


def messages(examples):
    return [message for example in examples for message in example.responses[0].conversation]


def test_kinds_and_their_shares(made):
    train = collections.Counter(example.kind for example in made["train"])
    held_out = collections.Counter(example.kind for example in made["held_out"])
    assert train.keys() - held_out.keys() == {"small_talk"}
    assert sum(held_out.values()) == 500
    for shares in (train, held_out):
        whole = sum(shares.values()) - shares["small_talk"]
        assert {kind: round(shares[kind] / whole, 2) for kind in ("function", "sum", "lookup")} == {
            "function": 0.33,
            "sum": 0.34,
            "lookup": 0.24,
        }
    assert train["function"] == 2 * sum(entry.kind != "module" for entry in known("train"))


def test_questions_are_of_many_wordings_and_each_is_used(small_library):
    assert len(QUESTIONS["function"]) >= 12
    assert len(QUESTIONS["module"]) >= 6
    entries = [entry for entry in known("train") if entry.kind == "function"]
    used = {
        wording
        for entry in entries
        for wording in QUESTIONS["function"]
        if wording.format(name=entry.name, short=entry.short, parent=entry.parent) == question(entry, 0)
    }
    assert used == set(QUESTIONS["function"])
    assert all(question(entry, 0) != question(entry, 1) for entry in entries)


def test_conversations_alternate_and_end_with_the_assistant(made):
    for example in made["train"] + made["held_out"]:
        roles = "".join(message.role[0] for message in example.responses[0].conversation)
        assert re.fullmatch(r"s?(u(at)?a)+", roles), roles
    assert 0.02 < sum(e.responses[0].conversation[0].role == "system" for e in made["train"]) / len(made["train"]) < 0.2


def test_questions_are_answered_by_the_documentation(made):
    by_side = {side: {answer(entry) for entry in known(side)} for side in made}
    for side, examples in made.items():
        single = [example for example in examples if example.kind in ("function", "module")]
        assert {example.responses[0].conversation[-1].content for example in single} <= by_side[side]
        assert all(
            example.responses[0].conversation[-1].content.partition(":")[0].rpartition(".")[2]
            in example.responses[0].conversation[-2].content
            for example in single
        )


def test_every_tool_turn_is_what_the_tool_says_and_is_used(made):
    calls = 0
    for example in made["train"] + made["held_out"]:
        turns = example.responses[0].conversation
        for at, message in enumerate(turns):
            for call in message.calls:
                calls += 1
                result = TOOLS[call.name].run(call.arguments)
                assert turns[at + 1] == Message("tool", result, name=call.name)
                assert result in turns[at + 2].content or "I found nothing about" in turns[at + 2].content
                if call.name == "calculator":
                    numbers = re.findall(r"\d+", call.arguments)
                    assert re.findall(r"\d+", turns[at - 1].content) == numbers
                    assert str(eval(call.arguments)) == result
    assert calls > 500


def test_sums_are_held_out_by_their_expression(made):
    def expressions(side):
        return {c.arguments for m in messages(made[side]) for c in m.calls if c.name == "calculator"}

    train, held_out = expressions("train"), expressions("held_out")
    assert len(held_out) > 100
    assert all(place(each) < HELD_OUT_SUMS for each in held_out)
    assert all(place(each) >= HELD_OUT_SUMS for each in train)
    assert len({re.sub(r"\d+", "1", each) for each in train}) == 3


def test_what_is_looked_up_is_of_the_side_or_nowhere(made):
    for side, examples in made.items():
        names = {entry.name for entry in known(side)}
        results = collections.Counter()
        for example in examples:
            for message in example.responses[0].conversation:
                for call in message.calls:
                    if call.name == "lookup":
                        results[call.arguments in names] += 1
                        assert call.arguments in names or TOOLS["lookup"].run(call.arguments) == "nothing found"
        assert 0 < results[False] < 0.15 * results[True]


def test_follow_ups_are_answered_about_what_went_before(made):
    asked = collections.Counter()
    by_name = {entry.name: entry for side in ("train", "held_out") for entry in known(side)}
    for example in made["train"]:
        turns = example.responses[0].conversation
        for at in range(2, len(turns)):
            if turns[at].content in assistant_chat.ASK_ARGUMENTS:
                name = turns[at - 1].content.partition(":")[0]
                takes = by_name[name].arguments or "no arguments"
                assert turns[at + 1].content == f"{name} takes {takes}."
                asked["arguments"] += 1
            elif re.match("(?i)and |what about", turns[at].content) and turns[at].role == "user":
                name = turns[at + 1].content.partition(":")[0]
                assert turns[at].content.removesuffix("?").endswith((f" {name}", f" {name.rpartition('.')[2]}"))
                assert turns[at + 1].content == answer(by_name[name])
                asked["and"] += 1
    assert min(asked.values()) > 10


def test_sums_come_in_several_wordings(made):
    first = [e.responses[0].conversation for e in made["train"] if e.kind == "sum"]
    wordings = {re.sub(r"[-+*]|plus|minus|times", "o", re.sub(r"\d+", "1", turns[0].content)) for turns in first}
    assert len(wordings) == len({re.sub("{op}|{word}", "o", text) for text in SUMS})
