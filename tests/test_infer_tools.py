"""Tools from functions: the schema a model is shown, what it is told when a call is wrong, and nothing that raises."""

import dataclasses
import functools
import json
import signal
import sys
import threading
import time
from typing import Any, Literal, Optional

import pytest

from llmlab.core.errors import UserError
from llmlab.core.sandbox import CannotIsolate, Outcome
from llmlab.infer import tools
from llmlab.infer.tools import MAX_RESULT, built_in, entries, named, schema_of, tool
from llmlab.verbs.talking import _may_be_told
from tests.chat_families import of
from tests.scripted import TOKENIZER


def forecast(
    city: str,
    days: int = 3,
    *,
    unit: Literal["C", "F"] = "C",
    hours: list[int] | None = None,
    weights: dict[str, float],
):
    """Says what the weather
    will be.

    It may be wrong.

    Args:
      city: where, such as Berlin; with
        its country if need be
      unit (str): of temperatures

    Returns:
      unit: what is said here is of no argument.
    """
    return f"{city} {days} {unit} {hours} {weights}"


def test_the_schema_is_that_of_the_signature():
    # What pydantic's TypeAdapter(forecast).json_schema() says, without its titles, and with the docstring's lines.
    assert entries({"forecast": tool(forecast)}) == [
        {
            "type": "function",
            "function": {
                "name": "forecast",
                "description": "Says what the weather will be. It may be wrong.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {
                            "type": "string",
                            "description": "where, such as Berlin; with its country if need be",
                        },
                        "days": {"type": "integer", "default": 3},
                        "unit": {
                            "enum": ["C", "F"],
                            "type": "string",
                            "default": "C",
                            "description": "of temperatures",
                        },
                        "hours": {
                            "anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}],
                            "default": None,
                        },
                        "weights": {"type": "object", "additionalProperties": {"type": "number"}},
                    },
                    "required": ["city", "weights"],
                    "additionalProperties": False,
                },
            },
        }
    ]


@pytest.mark.parametrize(
    "kind, schema",
    [
        (str, {"type": "string"}),
        (bool, {"type": "boolean"}),
        (float, {"type": "number"}),
        (list, {"type": "array"}),
        (dict, {"type": "object"}),
        (list[list[str]], {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        (dict[str, bool], {"type": "object", "additionalProperties": {"type": "boolean"}}),
        (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (Literal[1, "a", True], {"enum": [1, "a", True]}),
        (Literal[1, 2], {"enum": [1, 2], "type": "integer"}),
    ],
)
def test_a_type_has_its_schema(kind, schema):
    assert schema_of(kind) == schema


def test_the_calculator_and_the_look_up_are_described():
    calculator = built_in()["calculator"].entry()["function"]
    assert calculator["description"].startswith("The value of an expression")
    assert calculator["parameters"] == {
        "type": "object",
        "properties": {
            "expression": {"type": "string", "description": "an expression, such as (12 + 35) * 2"},
        },
        "required": ["expression"],
        "additionalProperties": False,
    }
    assert list(built_in()) == ["calculator", "lookup", "python"]


NAMES = "'city', 'days', 'unit', 'hours', 'weights'"
SHAPE = '{"city": "…", "days": "…", "unit": "…", "hours": "…", "weights": "…"}'


def given(**kinds):
    """A tool of arguments of these types, which answers with what it got."""

    def echo(**values):
        return repr(values)

    properties = {name: schema_of(kind) for name, kind in kinds.items()}
    return tools.FunctionTool("echo", "", {"type": "object", "properties": properties, "required": list(kinds)}, echo)


@pytest.mark.parametrize(
    "arguments, answer",
    [
        ('{"city": "Oslo", "weights": {"a": 1}}', "Oslo 3 C None {'a': 1.0}"),
        ('{"city": "Oslo", "weights": {}, "days": 2.0, "unit": "F", "hours": [1]}', "Oslo 2 F [1] {}"),
        ('{"city": "Oslo", "weights": {}, "hours": null}', "Oslo 3 C None {}"),
        ('{"city": "Oslo"}', "error: the argument 'weights' of forecast is missing"),
        ("", "error: the argument 'city' of forecast is missing"),
        ('{"town": "Oslo"}', f"error: forecast has no argument 'town': choose one of {NAMES}"),
        ('{"city": 3, "weights": {}}', "error: city should be a string, and is 3"),
        ('{"city": "x", "weights": {"a": "b"}}', "error: weights['a'] should be a number, and is \"b\""),
        ('{"city": "x", "weights": {}, "days": true}', "error: days should be an integer, and is true"),
        ('{"city": "x", "weights": {}, "days": 1.5}', "error: days should be an integer, and is 1.5"),
        ('{"city": "x", "weights": {}, "days": "3"}', 'error: days should be an integer, and is "3"'),
        ('{"city": "x", "weights": {}, "unit": "K"}', 'error: unit should be "C" or "F", and is "K"'),
        ('{"city": "x", "weights": {}, "hours": [1, "b"]}', 'error: hours should be a list or null, and is [1, "b"]'),
        ("Oslo", f"error: the arguments of forecast should be a JSON object: {SHAPE}"),
    ],
)
def test_arguments_are_checked_and_what_is_wrong_is_said(arguments, answer):
    assert tool(forecast)(arguments) == answer


@pytest.mark.parametrize(
    "arguments", ["[" * 10**5, "NaN", '{"x": NaN}', '{"x": 1e999}', '{"x": ' + "9" * 5000 + "}", "{", "\0", '"\\ud800"']
)
def test_nothing_that_is_given_raises(arguments):
    assert given(x=int, y=int)(arguments).startswith("error: ")


@pytest.mark.parametrize("arguments", ["12", "{}", "[1]", "null", '"q"', "print({'a': 1})", "{", ""])
def test_a_tool_of_one_string_takes_it_bare(arguments):
    assert given(code=str)(arguments) == repr({"code": arguments})
    assert given(code=str)(json.dumps({"code": arguments})) == repr({"code": arguments})


def test_a_wrong_name_is_not_taken_for_the_bare_string():
    assert given(code=str)('{"cod": "1"}') == "error: echo has no argument 'cod': did you mean 'code'?"


def test_what_a_function_gives_or_raises_is_an_answer():
    def answer(what: str):
        """Answers."""
        return {"none": None, "list": [1, "é"], "long": "a" * 9000 + "end", "half": "\ud800"}[what]

    say = tool(answer)
    assert (say("none"), say("list"), say("half")) == ("done", '[1, "é"]', "?")
    assert say("other") == "error: KeyError: 'other'"
    assert say("long").startswith("aaa")
    assert say("long").endswith("… (5,003 characters are left out) …" + "a" * (MAX_RESULT // 4 - 3) + "end")


def test_a_function_that_hangs_is_stopped():
    def hang(seconds: float):
        """Sleeps."""
        time.sleep(seconds)

    alarms = []
    before = signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
    left = signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        say = dataclasses.replace(tool(hang), seconds=0.05)
        assert say('{"seconds": 30}') == "error: TimeoutError: stopped after 0.05 seconds"
        assert say('{"seconds": 0}') == "done"
        time.sleep(0.1)
        assert not alarms
        assert 25 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_a_function_may_be_called_from_any_thread():
    answers = []
    thread = threading.Thread(target=lambda: answers.append(given(x=int)('{"x": 3}')))
    thread.start()
    thread.join()
    assert answers == ["{'x': 3}"]


def no_type(x):
    """Says."""


def untold(x: str): ...


def of_bytes(x: bytes):
    """Says."""


def of_anything(x: list[Any]):
    """Says."""


def of_int_keys(x: dict[int, str]):
    """Says."""


def of_many(*x: str):
    """Says."""


def of_names(**x: str):
    """Says."""


def by_place(x: str, /):
    """Says."""


def with_object(x: str = object()):
    """Says."""


def with_tuple(x: list = (1,)):
    """Says."""


def unknown(x: "Nowhere"):  # noqa: F821
    """Says."""


async def later(x: str):
    """Says."""


@pytest.mark.parametrize(
    "function, says",
    [
        (no_type, "x of the tool no_type has no type: annotate it, as in x: str"),
        (untold, "untold has no docstring: write a line"),
        (of_bytes, "x of the tool of_bytes: bytes cannot be described to a model: use str, int"),
        (of_anything, "x of the tool of_anything: Any cannot be described"),
        (of_int_keys, r"x of the tool of_int_keys: dict\[int, str\] cannot be described"),
        (of_many, r"\*x: str of the tool of_many: .* list each in the signature"),
        (of_names, r"\*\*x: str of the tool of_names: .* list each in the signature"),
        (by_place, "x: str of the tool by_place: .* by name"),
        (with_object, "the default of x of the tool with_object is <object.*make it None"),
        (with_tuple, r"the default of x of the tool with_tuple is \(1,\), which JSON cannot hold"),
        (unknown, "signature of the tool unknown cannot be read .*annotate"),
        (later, "the tool later is async: make it a plain function"),
        (lambda x: x, "a tool named '<lambda>': name="),
        (functools.partial(forecast), "a tool named ''"),
    ],
)
def test_what_cannot_be_described_is_refused_with_a_way_out(function, says):
    with pytest.raises(UserError, match=says):
        tool(function)


def test_tools_are_named_on_the_command_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import json\nfrom os.path import join\ndef _hidden(): ...\n"
        'def twice(text: str):\n  "Says it twice."\n  return text * 2\n'
        'def once(text: str):\n  "Says it once."\n  return text\n'
    )
    assert list(named([])) == []
    assert list(named(["lookup", str(file), "calculator"])) == ["lookup", "twice", "once", "calculator"]
    (twice,) = named([f"{file}:twice"]).values()
    assert twice("ab") == "abab"
    with pytest.raises(UserError, match="there is no tool 'calculater': did you mean 'calculator'"):
        named(["calculater"])
    with pytest.raises(UserError, match=r"mine\.py has no function 'twce': did you mean 'twice'"):
        named([f"{file}:twce"])
    with pytest.raises(UserError, match="there is no file .*none.py"):
        named([f"{tmp_path}/none.py"])
    file.write_text("1 / 0")
    with pytest.raises(UserError, match="does not load .ZeroDivisionError"):
        named([str(file)])


def test_python_is_not_given_where_it_cannot_be_shut_in(monkeypatch):
    monkeypatch.setattr(tools, "available", lambda: "no namespaces here: get some")
    with pytest.raises(CannotIsolate, match="no namespaces here"):
        named(["python"])
    monkeypatch.setattr(tools, "available", lambda: "")
    assert list(named(["python"])) == ["python"]


@pytest.mark.parametrize(
    "outcome, answer",
    [
        (Outcome("2\n", "", "ok"), "2\n"),
        (Outcome("", "a warning", "ok"), "nothing was printed: print what you want to see"),
        (Outcome("1\n", "Traceback\nValueError: x\n", "error"), "1\nerror: Traceback\nValueError: x"),
        (Outcome("", "", "error"), "error: it ended with an exit code that is not 0"),
        (Outcome("1\n", "", "timeout"), "1\nerror: stopped after 5 seconds"),
    ],
)
def test_what_python_answers(monkeypatch, outcome, answer):
    monkeypatch.setattr(tools, "run_python", lambda code, seconds: outcome)
    assert named_python()("print(2)") == answer


def test_the_end_of_too_much_is_kept(monkeypatch):
    monkeypatch.setattr(tools, "run_python", lambda code, seconds: Outcome("x" * 65536, "", "output"))
    assert named_python()("while True: print('x')").endswith("x\nerror: stopped, as it printed too much")


def named_python():
    return built_in()["python"]


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
def test_python_runs_what_it_is_given():
    if why := tools.available():
        pytest.skip(why)
    assert named_python()('{"code": "print(6 * 7)"}') == "42\n"


def test_a_default_that_a_model_cannot_be_told_of_is_no_tool():
    pytest.importorskip("tokenizers", reason="the extra hf installs it")
    assert _may_be_told(TOKENIZER, named(["calculator"]))
    for name, may in (("thinking", True), ("chatml", False)):
        assert _may_be_told(of(name)[0], named(["calculator"])) is may
