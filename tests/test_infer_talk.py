"""`llmlab chat`: lines in, answers out, and what is kept in between."""

import io
import itertools
import json
import os
import re
import signal

import pytest

from llmlab.core.errors import UserError
from llmlab.infer import talk
from llmlab.infer.chat import Reply
from llmlab.infer.passages import Passage
from llmlab.infer.retrieval import Found
from llmlab.infer.talk import chat_command, speed_text
from llmlab.infer.terminal import Terminal
from llmlab.infer.tools import named, tool
from tests.scripted import REACH, assistant, opened, says
from tests.test_infer_terminal import on_a_terminal


def piped(text, run=None, **settings):
    """What is written to stdout where these lines come through a pipe."""
    out = io.StringIO()
    settings = {"max_tokens": 64, "temperature": 0.0} | settings
    chat_command(run or opened(), Terminal(io.StringIO(text), out), **settings)
    return out.getvalue()


def echo(prompt, seed):
    """Says how many questions there were, and the last of them."""
    return f"{prompt.count('<|user|>')} {prompt.rpartition('<|user|>')[2].partition('<|end|>')[0]}"


def test_every_line_is_a_question_and_history_is_kept(monkeypatch, capsys):
    asked = says(monkeypatch, echo)
    assert piped("hé\n\n  two  \n") == "1 hé\n2 two\n"
    assert asked == [
        "<|user|>hé<|end|><|assistant|>",
        "<|user|>hé<|end|><|assistant|>1 hé<|end|><|user|>two<|end|><|assistant|>",
    ]
    assert capsys.readouterr().err.count("tokens/s") == 2


def test_a_conversation_begins_with_the_system(monkeypatch):
    asked = says(monkeypatch, echo)
    piped("one\n/reset\ntwo", system="Be kind.")
    assert [prompt.partition("<|user|>")[0] for prompt in asked] == ["<|system|>Be kind.<|end|>"] * 2
    assert "one" not in asked[1]


def test_a_question_can_be_taken_back(monkeypatch):
    asked = says(monkeypatch, echo)
    said = piped("one\ntwo\n/undo\nthree\n/undo\n/undo\n/undo\n")
    assert asked[2] == "<|user|>one<|end|><|assistant|>1 one<|end|><|user|>three<|end|><|assistant|>"
    assert said.splitlines()[2:] == [
        "taken back: two",
        "2 three",
        "taken back: three",
        "taken back: one",
        "there is no question to take back",
    ]


def test_the_same_question_again_is_drawn_anew(monkeypatch):
    says(monkeypatch, lambda prompt, seed: f"seed {seed}")
    assert piped("one\n/undo\none\n", seed=5).splitlines() == ["seed 5", "taken back: one", "seed 6"]


def test_tools_run_and_are_shown(monkeypatch):
    says(monkeypatch, lambda prompt, seed: "It is 3." if "<|result|>3" in prompt else "<|call|>add 1+2<|/call|>")
    tools = {"add": lambda text: str(sum(map(int, text.split("+"))))}
    assert piped("1+2?", tools=tools, allowed=["add"]) == "calls add 1+2\ngets 3\nIt is 3.\n"
    assert piped("1+2?") == "calls add 1+2\n"


def test_the_model_is_told_of_tools_that_describe_themselves(monkeypatch):
    def forecast(city: str) -> str:
        """The weather."""

    asked = says(monkeypatch, lambda prompt, seed: "Well.")
    piped("Rain?", tools={"forecast": tool(forecast), **ADD})
    assert asked[0].startswith(
        '<|system|>You may call these tools:\n{"name": "forecast", "description": "The weather."'
    )
    piped("Rain?", tools=named(["calculator", "lookup"]))
    assert asked[1].startswith("<|user|>")


ADD = {"add": lambda text: str(sum(map(int, text.split("+"))))}


def adding(prompt, seed):
    """Calls `add` for whatever it is asked, and then says what it was answered."""
    last = prompt.rpartition("<|user|>")[2]
    return f"So {last.rpartition('<|result|>')[2][:-20]}" if "<|result|>" in last else "<|call|>add 1+2<|/call|>"


def test_what_is_not_allowed_does_not_run_through_a_pipe(monkeypatch):
    asked = says(monkeypatch, adding)
    assert "gets error: the user does not allow this call\n" in piped("1+2?", tools=ADD)
    assert asked[1].endswith("<|result|>error: the user does not allow this call<|end|><|assistant|>")


@pytest.mark.parametrize(
    "answers, runs",
    [(["y", "no"], [True, False]), (["", "x", "n", "a"], [False, True]), (["A"], [True, True])],
)
def test_on_a_terminal_each_call_is_asked_for(monkeypatch, answers, runs):
    says(monkeypatch, adding)
    typed = ["first", *answers, "second"] if answers == ["A"] else ["first", *answers[:-1], "second", answers[-1]]
    terminal, shown = on_a_terminal(monkeypatch, *typed)
    chat_command(opened(), terminal, tools=ADD, max_tokens=64)
    assert [result == "3" for result in re.findall(r"gets ([\w: ]+)", shown.getvalue())] == runs
    assert shown.getvalue().count("run add? [y]es") == len(answers)


def test_no_answer_allows_nothing(monkeypatch):
    says(monkeypatch, adding)
    terminal, shown = on_a_terminal(monkeypatch, "first")
    chat_command(opened(), terminal, tools=ADD, max_tokens=64)
    assert "does not allow" in shown.getvalue()


def test_an_interrupt_at_the_question_runs_nothing(monkeypatch):
    ran = []
    says(monkeypatch, adding)
    terminal, shown = on_a_terminal(monkeypatch, "first", "y", "second", "n")
    type_ = __builtins__["input"]

    def interrupted(prompt):
        if prompt.startswith("run") and not ran:
            ran.append("asked")
            os.kill(os.getpid(), signal.SIGINT)
        return type_(prompt)

    monkeypatch.setattr("builtins.input", interrupted)
    chat_command(opened(), terminal, tools={"add": ran.append}, max_tokens=64)
    assert ran == ["asked"]
    assert "note: stopped" in shown.getvalue()


def test_tools_are_listed_with_what_they_do(monkeypatch):
    tools = named(["calculator", "lookup"])
    said = piped("/tools", tools=tools, allowed=["lookup"]).splitlines()
    assert [line.partition(":")[0] for line in said] == ["calculator (does not run", "lookup"]
    assert "The value of an expression of numbers" in said[0]
    assert piped("/tools") == "the model has no tools: --tools gives it some\n"


def test_conversations_are_saved_as_rows(monkeypatch, tmp_path):
    says(monkeypatch, echo)
    path = tmp_path / "kept.jsonl"
    said = piped(
        f"/save\n/save {path}\none\n/save {path}\n/reset\ntwo\n/save {path}\n/save {tmp_path}/no/x\n", system="s"
    )
    assert [line for line in said.splitlines() if not line[:1].isdecimal()] == [
        "say where: /save FILE",
        "there is nothing to save yet",
        f"appended to {path}",
        "a new conversation",
        f"appended to {path}",
        f"{tmp_path}/no/x cannot be written (no such file or directory): choose another file",
    ]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    roles = [("system", "s"), ("user", "one"), ("assistant", "1 one")]
    assert rows[0] == {"messages": [{"role": role, "content": text} for role, text in roles]}
    assert [turn["content"] for turn in rows[1]["messages"]] == ["s", "two", "1 two"]


def test_an_unknown_command_is_no_question(monkeypatch):
    asked = says(monkeypatch, echo)
    said = piped("/udno\n/help\n /undo it is\n")
    assert said.startswith("there is no /udno: did you mean '/undo'?\n/reset")
    assert [line for line in talk.HELP.splitlines() if line in said] == talk.HELP.splitlines()
    assert asked == ["<|user|>/undo it is<|end|><|assistant|>"]


def test_an_answer_that_does_not_end_is_said_to_be_cut(monkeypatch):
    says(monkeypatch, lambda prompt, seed: "abcdefgh")
    assert piped("hi", max_tokens=5) == "abcde\nnote: cut at max_tokens=5\n"
    # An answer gets at most half of the positions, whatever is asked for.
    says(monkeypatch, lambda prompt, seed: "." * 600)
    assert piped("hi", max_tokens=9999) == f"{'.' * (REACH // 2)}\nnote: cut at max_tokens={REACH // 2}\n"


def test_a_question_too_long_ends_a_pipe_and_not_a_terminal(monkeypatch):
    says(monkeypatch, echo)
    with pytest.raises(UserError, match="512 positions"):
        piped("x" * 600)
    terminal, shown = on_a_terminal(monkeypatch, "x" * 600, "short")
    chat_command(opened(), terminal, max_tokens=64)
    assert "512 positions" in shown.getvalue()
    assert "1 short" in shown.getvalue()


def test_a_model_of_plain_text_talks_but_says_so(monkeypatch, capsys):
    says(monkeypatch, echo)
    assert piped("hi", opened("text")) == "1 hi\n"
    assert "plain text" in capsys.readouterr().err
    for rows in ("chat", "preference"):
        piped("hi", opened(rows))
        assert "plain text" not in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_refused(monkeypatch):
    run = opened()
    monkeypatch.setattr(run.tokenizer, "control", {})
    with pytest.raises(UserError, match="no chat"):
        piped("hi", run)


def test_an_interrupt_stops_the_answer_and_not_the_talk(monkeypatch):
    def interrupted(model, params, prompt, *, max_tokens, seed, stop_ids, **settings):
        for id in b"abcdef":
            if id == ord("c") and seed == 0:
                os.kill(os.getpid(), signal.SIGINT)
            yield id

    monkeypatch.setattr("llmlab.infer.chat.stream", interrupted)
    terminal, shown = on_a_terminal(monkeypatch, "one", "two")
    chat_command(opened(), terminal, max_tokens=9)
    assert "abc\n" in shown.getvalue()
    assert "note: stopped" in shown.getvalue()
    assert "abcdef" in shown.getvalue()


def test_a_second_interrupt_gives_the_question_up(monkeypatch):
    asked = []

    def stuck(model, params, prompt, *, seed, **settings):
        asked.append(prompt)
        if seed == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return iter(b"x")

    monkeypatch.setattr("llmlab.infer.chat.stream", stuck)
    terminal, shown = on_a_terminal(monkeypatch, "one", "one")
    chat_command(opened(), terminal, max_tokens=9)
    assert "given up" in shown.getvalue()
    assert asked[0] == asked[1]


def test_an_interrupt_at_the_question_asks_again(monkeypatch):
    says(monkeypatch, echo)
    terminal, shown = on_a_terminal(monkeypatch)
    lines = iter([KeyboardInterrupt, "hi", EOFError])

    def type_(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_)
    chat_command(opened(), terminal, max_tokens=64)
    assert "1 hi" in shown.getvalue()


def test_speed_is_of_the_tokens_after_the_first_of_each_turn():
    said = Reply((assistant("a"), assistant("b")), True, tokens=22, seconds=4.0)
    assert speed_text(said) == "22 tokens, 5.0 tokens/s"
    assert speed_text(Reply((assistant("a"),), True, tokens=1)) == ""


def test_time_is_from_the_first_token_to_the_last(monkeypatch, capsys):
    clock = itertools.count(step=0.5)
    monkeypatch.setattr("llmlab.infer.chat.time.perf_counter", lambda: 100 + next(clock))
    says(monkeypatch, lambda prompt, seed: "abc")
    piped("hi")
    assert capsys.readouterr().err == "4 tokens, 2.0 tokens/s\n"


def test_passages_come_before_a_question_and_their_sources_after_the_answer(monkeypatch, capsys):
    passages = [Passage(f"{name}.md", 3, 4, "", name * 150) for name in "abcd"]
    asked = says(monkeypatch, lambda prompt, seed: "It is there [2].")
    said = piped("where?", find=lambda question: [Found(1.0, each) for each in passages], max_tokens=32)
    # So many as the model has room for.
    assert "[2] b.md:3-4" in asked[0]
    assert "c.md" not in asked[0]
    assert asked[0].endswith("where?<|end|><|assistant|>")
    assert said == "It is there [2].\nsources: b.md:3-4\n"
