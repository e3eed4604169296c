"""What a person types and reads, on a terminal and through a pipe."""

import io
import os
import signal
import stat
import threading

import pytest

from llmlab.infer.terminal import Terminal, interruptible


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("NO_COLOR", "VISUAL", "EDITOR"):
        monkeypatch.delenv(name, raising=False)


def on_a_terminal(monkeypatch, *typed):
    """A terminal on which these lines are typed, and what is shown on it."""
    lines, shown = iter(typed), Tty()

    def type_(prompt):
        shown.write(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_)
    return Terminal(Tty(), shown), shown


def test_a_pipe_gives_its_lines_and_gets_plain_text():
    out = io.StringIO()
    terminal = Terminal(io.StringIO("one\n\ntwo"), out)
    assert [terminal.ask("> ") for _ in range(3)] == ["one", "", "two"]
    with pytest.raises(EOFError):
        terminal.ask("> ")
    for piece in [("thinking", "a\nb\n"), ("thinking", "c"), ("text", "d"), ("text", "e\x1b"), ("call", "f 1")]:
        terminal.say(*piece)
    terminal.say("call", "g")
    terminal.say("result", "2")
    terminal.line("end", dim=True)
    assert out.getvalue() == "thinking: a\nb\nc\nde\x1b\ncalls f 1\ncalls g\ngets 2\nend\n"


def test_a_line_in_another_encoding_is_a_line():
    terminal = Terminal(io.TextIOWrapper(io.BytesIO(b"caf\xe9\nok\n"), encoding="utf-8"), io.StringIO())
    assert [terminal.ask(""), terminal.ask("")] == ["caf\ufffd", "ok"]


def test_a_terminal_gets_dim_thinking_and_no_commands_of_the_models(monkeypatch):
    terminal, shown = on_a_terminal(monkeypatch)
    terminal.say("thinking", "hm")
    terminal.say("text", "a\x1b[31mb\x9b\tc\n")
    assert shown.getvalue() == "\x1b[2mthinking: hm\x1b[0m\na\u241b[31mb\ufffd\tc\n"


def test_colours_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    terminal, shown = on_a_terminal(monkeypatch)
    terminal.say("thinking", "hm")
    terminal.line("x", bold=True)
    assert shown.getvalue() == "thinking: hm\nx\n"


def test_asides_go_beside_the_text(monkeypatch, capsys):
    out = io.StringIO()
    terminal = Terminal(io.StringIO(""), out)
    terminal.aside("slow")
    assert (out.getvalue(), capsys.readouterr().err) == ("", "slow\n")
    terminal, shown = on_a_terminal(monkeypatch)
    terminal.aside("slow")
    assert (shown.getvalue(), capsys.readouterr().err) == ("\x1b[2mslow\x1b[0m\n", "")


def test_a_question_begins_a_line(monkeypatch):
    terminal, shown = on_a_terminal(monkeypatch, "yes")
    terminal.say("text", "no end")
    assert terminal.ask("> ") == "yes"
    assert shown.getvalue() == "no end\n> "


def test_an_edited_text_is_typed_where_there_is_no_editor(monkeypatch):
    terminal = Terminal(io.StringIO("first\n\nlast\n.\nnext"), io.StringIO())
    assert terminal.edited("old") == "first\n\nlast"
    assert terminal.ask("") == "next"
    terminal, _ = on_a_terminal(monkeypatch, "typed")
    assert terminal.edited("old") == "typed"


@pytest.mark.parametrize(
    "script, want", [("sed -i s/old/new/ $1", "new\nlines"), ("exit 1", "old\nlines"), ("printf '' > $1", "")]
)
def test_an_editor_edits(monkeypatch, tmp_path, script, want):
    editor = tmp_path / "my editor"
    editor.write_text(f"#!/bin/sh\ntest $2 && exit 1\n{script}\n".replace("$1", '"$1"'))
    editor.chmod(editor.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("EDITOR", f"'{editor}'")
    terminal, _ = on_a_terminal(monkeypatch)
    assert terminal.edited("old\nlines") == want


def test_an_editor_that_is_not_there_changes_nothing(monkeypatch):
    monkeypatch.setenv("VISUAL", "/no/such/editor")
    terminal, _ = on_a_terminal(monkeypatch)
    assert terminal.edited("old") == "old"


def test_the_first_interrupt_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as pressed:
        assert not pressed()
        os.kill(os.getpid(), signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_has_no_interrupts():
    seen = []

    def run():
        with interruptible() as pressed:
            seen.append(pressed())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
