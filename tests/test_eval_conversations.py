"""What counts as an answer to a held-out conversation, in figures by kind, and as files to read."""

import json
import math

import pytest

from llmlab.data.chat import Example, Message, Response
from llmlab.eval.conversations import measure, readable, summary, table, write_conversations
from tests.scripted import MODEL, TEMPLATE, assistant, says, tool, user

TOOLS = {
    "calculator": lambda text: f"{math.prod(map(float, text.split('*'))):g}",
    "lookup": lambda text: {"a.b": "a.b: It begins.", "b": "a.b: It begins."}.get(text, "nothing found"),
}


def example(kind, *turns):
    return Example((Response(turns),), kind)


SUM = example(
    "sum",
    user("12 * 30?"),
    assistant("", ("calculator", "12 * 30")),
    tool("calculator", "360"),
    assistant("It is 360."),
)
LOOKUP = example(
    "lookup",
    user("Look up a.b."),
    assistant("", ("lookup", "a.b")),
    tool("lookup", "a.b: It begins."),
    assistant("a.b: It begins."),
)
PLAIN = example("plain", Message("system", "s"), user("hi"), assistant("ho"), user("and?"), assistant("so  on"))


def judged(monkeypatch, said, case, **settings):
    """The outcome where the model says `said`: a turn, or turns, each after the result of the one before."""
    turns = [said] if isinstance(said, str) else said
    says(monkeypatch, lambda prompt, seed: turns[prompt.rpartition("<|user|>")[2].count("<|result|>")])
    settings = {"tools": TOOLS, "max_tokens": 60} | settings
    (outcome,) = measure(MODEL, {}, TEMPLATE, [case], **settings)
    return outcome


@pytest.mark.parametrize(
    "said, called, answered",
    [
        (["<|call|>calculator 12 * 30<|/call|>", "It is 360."], True, True),
        (["<|call|>calculator 12*30<|/call|>", "12 * 30 = 360"], True, True),
        (["<|call|>calculator 30 * 12.0<|/call|>", "360"], True, True),
        (["<|call|>calculator 12 * 30<|/call|>", "It is 3,600."], True, False),
        (["<|call|>calculator 12 * 30<|/call|>", "360 - 0 = 1"], True, False),
        (["<|call|>calculator 12 * 31<|/call|>", "It is 360."], False, False),
        (["<|call|>lookup 12 * 30<|/call|>", "It is 360."], False, False),
        (["<|call|>abacus 12 * 30<|/call|>", "It is 360."], False, False),
        (["<|call|>calculator 12 *<|/call|>", "It is 360."], False, False),
        (["<|call|>calculator 12 * 30", "It is 360."], False, False),
        ("It is 360.", False, False),
        (["<|call|>calculator 12 * 30<|/call|>"] * 9, True, False),
        (["<|call|>calculator 1<|/call|>", "<|call|>calculator 12 * 30<|/call|>", "It is 360."], True, True),
        (["<|call|>calculator 12 * 30<|/call|>", "It is 360" + "." * 60], True, False),
    ],
)
def test_a_sum_is_answered_through_a_call(monkeypatch, said, called, answered):
    outcome = judged(monkeypatch, said, SUM)
    assert (outcome["called"], outcome["answered"]) == (called, answered)


@pytest.mark.parametrize(
    "said, called, answered",
    [
        (["<|call|>lookup a.b<|/call|>", "a.b: It  begins."], True, True),
        (["<|call|>lookup b<|/call|>", "The docs say: a.b: It begins."], True, True),
        (["<|call|>lookup a.b<|/call|>", "a.b: It ends."], True, False),
        (["<|call|>lookup a.c<|/call|>", "a.b: It begins."], False, False),
        ("a.b: It begins.", False, False),
    ],
)
def test_a_passage_is_answered_through_a_call(monkeypatch, said, called, answered):
    outcome = judged(monkeypatch, said, LOOKUP)
    assert (outcome["called"], outcome["answered"]) == (called, answered)


@pytest.mark.parametrize(
    "said, ended, exact",
    [("so on", True, True), (" so\non ", True, True), ("So on", True, False), ("so on" + "." * 60, False, False)],
)
def test_an_answer_ends_and_is_exact(monkeypatch, said, ended, exact):
    outcome = judged(monkeypatch, said, PLAIN)
    assert (outcome["ended"], outcome["exact"]) == (ended, exact)
    assert "called" not in outcome
    assert outcome["tokens"] == min(60, len(said) + 1)


def test_what_says_the_right_thing_but_was_cut_is_not_exact(monkeypatch):
    assert not judged(monkeypatch, "so on", PLAIN, max_tokens=5)["exact"]


def test_without_the_tool_arguments_are_compared_as_they_are(monkeypatch):
    assert judged(monkeypatch, "<|call|>calculator 12  *  30<|/call|>", SUM, tools={})["called"]
    assert not judged(monkeypatch, "<|call|>calculator 30 * 12<|/call|>", SUM, tools={})["called"]


def test_a_conversation_that_does_not_fit_fails(monkeypatch):
    outcome = judged(monkeypatch, "x", example("long", user("?" * 600), assistant("x")))
    assert (outcome["too_long"], outcome["ended"], outcome["exact"], outcome["answer"]) == (True, False, False, [])


def test_the_last_question_is_asked_after_all_that_went_before(monkeypatch):
    asked = says(monkeypatch, lambda prompt, seed: "x")
    (outcome,) = measure(MODEL, {}, TEMPLATE, [PLAIN], max_tokens=9)
    assert asked == ["<|system|>s<|end|><|user|>hi<|end|><|assistant|>ho<|end|><|user|>and?<|end|><|assistant|>"]
    assert [turn["content"] for turn in outcome["prompt"]] == ["s", "hi", "ho", "and?"]
    assert (outcome["answer"][0]["content"], outcome["reference"][0]["content"]) == ("x", "so  on")


def test_shares_are_of_all_and_of_each_kind(monkeypatch):
    def script(prompt, seed):
        if "<|result|>" in prompt:
            return "It is 360."
        return "<|call|>calculator 12 * 30<|/call|>" if seed < 3 else "so on"

    says(monkeypatch, script)
    settings = {"tools": TOOLS, "max_tokens": 40, "batch_size": 2}
    scores = summary(measure(MODEL, {}, TEMPLATE, [SUM, SUM, LOOKUP, PLAIN, SUM], **settings))
    assert (scores["answers"], scores["ended"], scores["exact"]) == (5, 1.0, 3 / 5)
    assert (scores["called"], scores["answered"]) == (2 / 4, 2 / 4)
    assert list(scores["kinds"]) == ["lookup", "plain", "sum"]
    assert scores["kinds"]["sum"] | {"tokens": 0} == {
        "answers": 3, "ended": 1.0, "exact": 2 / 3, "called": 2 / 3, "answered": 2 / 3, "tokens": 0, "too_long": 0,
    }  # fmt: skip
    assert "called" not in scores["kinds"]["plain"]
    json.dumps(scores, allow_nan=False)
    lines = table(scores).splitlines()
    assert lines[0].split() == ["answers", "to", "rows", "ended", "exact", "called", "answered", "tokens"]
    assert lines[-1].split()[:6] == ["sum", "3", "1.0000", "0.6667", "0.6667", "0.6667"]
    assert len(lines) == 5


def test_no_conversations_have_no_shares():
    assert summary(measure(MODEL, {}, TEMPLATE, [], max_tokens=9)) == {
        "answers": 0, "tokens": 0.0, "too_long": 0, "kinds": {},
    }  # fmt: skip


def test_samples_are_written_for_people_and_for_programs(monkeypatch, tmp_path):
    says(monkeypatch, lambda prompt, seed: "<|think|>hm<|/think|>It is 360." if "<|result|>" in prompt else
         "<|call|>calculator 12 * 30<|/call|>" if "12" in prompt else "." * 60)  # fmt: skip
    path = tmp_path / "samples" / "100.txt"
    said = write_conversations(MODEL, {}, TEMPLATE, [SUM, PLAIN], tools=TOOLS, max_tokens=40, path=path)
    assert path.read_text() == (
        "=== conversation 1, sum ===\n"
        "user: 12 * 30?\n"
        "--- the model answers ---\n"
        "assistant calls calculator: 12 * 30\n"
        "tool calculator: 360\n"
        "assistant thinks: hm\n"
        "assistant: It is 360.\n"
        "--- the data has ---\n"
        "assistant calls calculator: 12 * 30\n"
        "tool calculator: 360\n"
        "assistant: It is 360.\n"
        "\n"
        "=== conversation 2, plain ===\n"
        "system: s\nuser: hi\nassistant: ho\nuser: and?\n"
        "--- the model answers ---\n"
        f"assistant: {'.' * 40} …\n"
        "--- the data has ---\n"
        "assistant: so  on\n"
    )
    rows = [json.loads(line) for line in (tmp_path / "samples" / "100.jsonl").read_text().splitlines()]
    assert [row["ended"] for row in rows] == [True, False] == [reply.ended for reply in said]
    assert rows[0]["answer"][-1] == {"role": "assistant", "thinking": "hm", "content": "It is 360."}
    assert rows[1]["prompt"][-1] == {"role": "user", "content": "and?"}


def test_an_empty_turn_is_seen():
    assert readable([assistant("")]) == "assistant: "
