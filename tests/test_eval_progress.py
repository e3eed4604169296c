import sys

import pytest

from llmlab.eval import progress
from llmlab.eval.progress import counted


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_where_there_is_no_terminal_a_plain_line_comes_now_and_then(clock, capsys):
    with counted("rows", 3000) as advance:
        for done, seconds in [(500, 3), (1000, 11), (1500, 15), (3000, 22)]:
            clock[0] = seconds
            advance(done)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "rows: 1,000 of 3,000\nrows: 3,000 of 3,000\n")


def test_on_a_terminal_one_line_is_rewritten_and_then_removed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with counted("rows", 20) as advance:
        advance(10)
        advance(20)
    err = capsys.readouterr().err
    assert err == f"\rrows: 10 of 20\rrows: 20 of 20\r{' ' * 14}\r"


def test_quiet_says_nothing(clock, capsys):
    with counted("rows", 2, quiet=True) as advance:
        clock[0] = 60
        advance(2)
    assert capsys.readouterr() == ("", "")
