"""The tools that an assistant here may call: text in, text out, nothing else touched, never an exception.

Each is bounded in time and in what it answers, whatever it is given.
"""

import ast
import difflib
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llmlab.data.library import Entry, library

MAX_ARGUMENTS = 200  # characters
MAX_BITS = 340  # of a result: about a hundred digits
NEAR = 3

Number = int | float


class Tool(NamedTuple):
    """A tool by its name, a line on what it is given, and what it does."""

    name: str
    description: str
    run: Callable[[str], str]


def calculator(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and parentheses, or what is wrong, after `error: `."""
    if len(expression) > MAX_ARGUMENTS:
        return f"error: more than {MAX_ARGUMENTS} characters"
    if not re.fullmatch(r"[\d\s.eE()*/%+-]+", expression, re.ASCII):
        return "error: only numbers, + - * / // % ** and parentheses"
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: the result is too large"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not an expression"
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def lookup(name: str) -> str:
    """What the documentation of Python's standard library says of a name, after the name; or the names that are near.

    A name without its module will do where only one module has it.
    """
    asked = name[:MAX_ARGUMENTS].strip().strip("`'\".?").removesuffix("()")
    found = _index().get(asked) or _index().get(asked.lower(), [])
    if len(found) == 1:
        return f"{found[0].name}: {found[0].summary}"
    near = [entry.name for entry in found[:NEAR]] or difflib.get_close_matches(asked, _alike(asked), NEAR, 0.8)
    return f"nothing found; near: {', '.join(near)}" if near else "nothing found"


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("calculator", "an expression, such as (12 + 35) * 2", calculator),
        Tool("lookup", "a name in Python's standard library, such as json.dumps", lookup),
    )
}

BINARY: Mapping[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _evaluate(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value):
            return _bounded(value)
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign, operand=operand):
            value = _evaluate(operand)
            return -value if isinstance(sign, ast.USub) else value
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_evaluate(left), _evaluate(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _bounded(BINARY[type(op)](_evaluate(left), _evaluate(right)))
    raise ValueError("no arithmetic")


def _power(base: Number, exponent: Number) -> Number:
    """Judged before it is computed: an integer's power may be larger than memory."""
    if isinstance(base, int) and isinstance(exponent, int) and (base.bit_length() - 1) * exponent > MAX_BITS:
        raise OverflowError
    value = base**exponent
    if isinstance(value, complex):
        raise ValueError("no real number")
    return _bounded(value)


def _bounded(value: Number) -> Number:
    if (value.bit_length() > MAX_BITS) if isinstance(value, int) else not math.isfinite(value):
        raise OverflowError
    return value


@functools.cache
def _index() -> dict[str, list[Entry]]:
    """Entries by whole name and by the name in their module, each as it is and in lower case."""
    index: dict[str, list[Entry]] = {}
    for spelt in (lambda e: e.name, lambda e: e.name.lower(), lambda e: e.short, lambda e: e.short.lower()):
        level: dict[str, list[Entry]] = {}
        for entry in library():
            level.setdefault(spelt(entry), []).append(entry)
        index = level | index  # what is nearer to the entry's name wins
    return index


@functools.cache
def _by_initial() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for entry in library():
        names.setdefault(entry.name[0].lower(), []).append(entry.name)
    return names


def _alike(asked: str) -> list[str]:
    """The names that begin with the same letter: enough to mend a slip, and soon gone through."""
    return _by_initial().get(asked[:1], [])
