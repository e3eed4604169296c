"""Progress goes to stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

import sys

import pytest

from llmlab.data import progress
from llmlab.data.progress import shown


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", type("clock", (), {"monotonic": lambda: now[0]}))
    return now


@pytest.mark.parametrize(
    "total, in_bytes, lines",
    [
        (50_000_000, True, ["work: 1.0 of about 50.0 MB", "work: 3.0 of about 50.0 MB"]),
        (None, True, ["work: 1.0 MB", "work: 3.0 MB"]),
        (3_000_000, False, ["work: 1,000,000 of 3,000,000", "work: 3,000,000 of 3,000,000"]),
    ],
)
def test_where_there_is_no_terminal_a_line_comes_now_and_then(clock, capsys, total, in_bytes, lines):
    with shown("work", total, True, in_bytes=in_bytes) as advance:
        for done, seconds in [(500_000, 3), (1_000_000, 11), (1_500_000, 15), (3_000_000, 22)]:
            clock[0] = seconds
            advance(done)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", lines)


@pytest.mark.parametrize("in_bytes, counted", [(True, "20/20 bytes"), (False, "20/20")])
def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys, in_bytes, counted):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with shown("rows", 20, True, in_bytes=in_bytes) as advance:
        advance(10)
        advance(20)
    out, err = capsys.readouterr()
    assert out == ""
    assert "rows" in err
    assert counted in err


def test_quiet_says_nothing(clock, capsys):
    with shown("rows", 2, False) as advance:
        clock[0] = 60
        advance(2)
    assert capsys.readouterr() == ("", "")
