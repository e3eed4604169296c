"""The tools: arithmetic as Python does it, names found, and nothing that is given to them hurts."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.data.library import library
from llmlab.data.tools import MAX_ARGUMENTS, TOOLS, calculator, lookup
from tests.small_library import small_library, word

__all__ = ["small_library"]

NUMBERS = st.one_of(st.integers(0, 999).map(str), st.floats(0, 99, width=16).map(lambda x: f"{x:.3f}"))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", " + ", " * "]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
        st.tuples(inner, st.integers(0, 3)).map(lambda pair: f"({pair[0]})**{pair[1]}"),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
@settings(max_examples=100, deadline=None)
def test_sums_are_python_s(text):
    result = calculator(text)
    try:
        value = eval(text)
    except ZeroDivisionError:
        assert result == "error: division by zero"
        return
    if len(text) > MAX_ARGUMENTS or abs(value) >= 2**340:
        assert result.startswith("error: ")
    elif isinstance(value, int):
        assert result == str(value)
    else:
        assert math.isclose(float(result), value, rel_tol=1e-11, abs_tol=1e-300)


@pytest.mark.parametrize(
    "given, result",
    [
        ("12 + 35", "47"),
        (" (2 - 5) * 4 ", "-12"),
        ("-7 // 2", "-4"),
        ("7 % -3", "-2"),
        ("10 / 4", "2.5"),
        ("10 / 5", "2"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** 10", "1024"),
        ("2 ** -1", "0.5"),
        ("--3", "3"),
        ("1e3 + 1", "1001"),
        ("1 / 0", "error: division by zero"),
        ("0 ** -1", "error: division by zero"),
        ("9 ** 9 ** 9", "error: the result is too large"),
        ("9" * 150, "error: the result is too large"),
        ("1e308 * 10", "error: the result is too large"),
        ("2.5 ** 99999", "error: the result is too large"),
        ("(-8) ** 0.5", "error: not an expression"),
        ("1 +", "error: not an expression"),
        ("", "error: only numbers, + - * / // % ** and parentheses"),
        ("e", "error: not an expression"),
        ("3(4)", "error: not an expression"),
        ("007", "error: not an expression"),
        ("1, 2", "error: only numbers, + - * / // % ** and parentheses"),
        ("__import__('os')", "error: only numbers, + - * / // % ** and parentheses"),
        ("1 << 9", "error: only numbers, + - * / // % ** and parentheses"),
        ("٣ + 1", "error: only numbers, + - * / // % ** and parentheses"),
        ("-" * 199 + "1", "-1"),
        ("(" * 99 + "1" + ")" * 99, "1"),
        ("1+" * 100 + "1", "error: more than 200 characters"),
    ],
)
def test_the_calculator_answers(given, result):
    assert calculator(given) == result


@given(st.one_of(st.text(), st.text("0123456789.eE+-*/%() \n\t\r\0", max_size=MAX_ARGUMENTS + 5)))
@settings(max_examples=100, deadline=500)
def test_the_calculator_never_raises(garbage):
    result = calculator(garbage)
    assert 0 < len(result) <= 110


def test_powers_are_refused_before_they_are_computed():
    start = time.perf_counter()
    for text in ("9**9**9**9", "(-9)**(9**8)", "(9**99)**(9**99)", "1**(9**99)", "(-1)**(9**99)", "0**(9**99)"):
        assert len(calculator(text)) < 110
    assert time.perf_counter() - start < 0.5


def test_names_are_found_as_they_are_written(small_library):
    for entry in library():
        assert lookup(entry.name) == f"{entry.name}: {entry.summary}"
    said = f"area8.Area8.measure_8: Measure how wide {word(8)} is in a unit."
    for asked in ("measure_8", " `area8.Area8.measure_8()` ", "AREA8.area8.MEASURE_8", "area8.Area8.measure_8?"):
        assert lookup(asked) == said


def test_names_that_are_near_or_not_there(small_library):
    assert lookup("area8.gathr_8").startswith("nothing found; near: area8.gather_8")
    assert lookup("close").startswith("nothing found; near: area0.Area0.close, area1.Area1.close")
    assert lookup("xylophone.play") == lookup("") == "nothing found"


@given(garbage=st.text())
@settings(max_examples=50, deadline=500)
def test_lookup_never_raises(garbage):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmlab.data.tools._index", lambda: {})
        patch.setattr("llmlab.data.tools._by_initial", lambda: {letter: ["alpha.beta"] * 500 for letter in garbage})
        assert len(lookup(garbage * 50)) < 500


def test_tools_go_by_their_names():
    assert {name: (tool.name, tool.run) for name, tool in TOOLS.items()} == {
        "calculator": ("calculator", calculator),
        "lookup": ("lookup", lookup),
    }
