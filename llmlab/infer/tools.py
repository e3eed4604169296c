"""Tools that a model may call, from Python functions: what each is given is described, checked, and never trusted.

A signature and a docstring become a JSON schema; a call's arguments, a JSON object or the bare string that a tool of
one string takes, become keyword arguments. What is wrong with a call is an answer for the model, after `error: `. A
registered function runs in this process, with the user's rights, for a minute at most where that is the main thread:
only `python`, whose code is the model's, is shut in.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import json
import re
import signal
import threading
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from llmlab.core.errors import UserError, nearest
from llmlab.core.sandbox import CannotIsolate, available, run_python
from llmlab.data.chat import ChatTemplate
from llmlab.data.tools import TOOLS

MAX_RESULT = 4000  # characters: a model's positions are few
HARMLESS = ("calculator", "lookup")
SECONDS = 5.0
PATIENCE = 60.0

Schema = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FunctionTool:
    """A function that a model may call. As `Callable[[str], str]` it takes a call's arguments, and never raises.

    parameters: the JSON schema of an object, in the part of it that `schema_of` writes. seconds: after which the
    function is stopped, by a TimeoutError where it is; only where the main thread calls it.
    """

    name: str
    description: str
    parameters: Schema
    run: Callable[..., Any]
    seconds: float = PATIENCE

    def __call__(self, arguments: str) -> str:
        try:
            given = self._given(arguments)
        except _Wrong as wrong:
            return f"error: {wrong}"
        try:
            with _within(self.seconds):
                return _cut(_text(self.run(**given)))
        except (Exception, SystemExit) as error:  # Whatever a tool cannot do is an answer, for the model to deal with.
            return _cut(f"error: {type(error).__name__}: {error}")

    def entry(self) -> dict[str, Any]:
        """As the list `tools` of OpenAI's API describes it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def _given(self, arguments: str) -> dict[str, Any]:
        properties: dict[str, Schema] = self.parameters["properties"]
        required: list[str] = self.parameters.get("required", [])
        try:
            value = json.loads(arguments or "{}", parse_constant=_no_number)
        except (ValueError, RecursionError):
            value = None
        one = next(iter(properties), "")
        by_name = isinstance(value, dict) and value
        if len(properties) == 1 and properties[one].get("type") == "string" and not by_name:
            return {one: arguments} if arguments or required else {}
        if not isinstance(value, dict):
            shape = json.dumps(dict.fromkeys(properties, "…"), ensure_ascii=False)
            raise _Wrong(f"the arguments of {self.name} should be a JSON object: {shape}")
        for name in value:
            if name not in properties:
                raise _Wrong(
                    f"{self.name} has no argument {name!r}" + (f": {nearest(name, properties)}" * bool(properties))
                )
        if missing := [name for name in required if name not in value]:
            raise _Wrong(f"the argument {missing[0]!r} of {self.name} is missing")
        return {name: _fitting(given, properties[name], name) for name, given in value.items()}


def tool(function: Callable[..., Any], *, name: str = "", description: str = "") -> FunctionTool:
    """The tool that a function is, by its signature and its docstring: a line on what it does, then `Args:` if need be.

    Types: str, int, float, bool, list, dict with str keys, `| None`, Literal, and these in one another.

    Raises:
      UserError: part of it cannot be described; the line says how to mend it.
    """
    name = name or getattr(function, "__name__", "")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", name):
        raise UserError(f"a tool named {name!r}: name= should be letters, digits and _, 64 at most, no digit first")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"the tool {name} is async: make it a plain function, with asyncio.run inside")
    summary, said = _documented(inspect.getdoc(function) or "")
    if not (description or summary):
        raise UserError(f"the tool {name} has no docstring: write a line that tells a model what it does")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"the signature of the tool {name} cannot be read ({error}): annotate it with types") from error
    properties: dict[str, Schema] = {}
    for key, parameter in parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"{parameter} of the tool {name}: a model gives arguments by name; list each in the signature"
            )
        if key not in hints:
            raise UserError(f"{key} of the tool {name} has no type: annotate it, as in {key}: str")
        try:
            properties[key] = schema_of(hints[key])
        except TypeError as error:
            raise UserError(
                f"{key} of the tool {name}: {error} cannot be described to a model: use str, int, float, bool, "
                f"list[…], dict[str, …], Literal[…], or these with | None"
            ) from error
        if parameter.default is not parameter.empty:
            properties[key]["default"] = _default(parameter.default, f"{key} of the tool {name}")
        if key in said:
            properties[key]["description"] = said[key]
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    if required := [key for key in properties if "default" not in properties[key]]:
        schema["required"] = required
    return FunctionTool(name, description or summary, schema, function)


def schema_of(kind: Any) -> Schema:
    """The JSON schema of a Python type.

    Raises:
      TypeError: it has none here; the text is the type.
    """
    if kind in _TYPES:
        return {"type": _TYPES[kind]}
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return {"type": "array", "items": schema_of(inside[0])}
    if origin is dict and inside[0] is str:
        return {"type": "object", "additionalProperties": schema_of(inside[1])}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(one) for one in inside]}
    if origin is Literal and all(type(value) in _TYPES for value in inside):
        names = {_TYPES[type(value)] for value in inside}
        return {"enum": list(inside)} | ({"type": names.pop()} if len(names) == 1 else {})
    raise TypeError(getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind))


def python(code: str) -> str:
    """Runs Python code and gives what it prints. It sees no files and no network; no call knows of another.

    Args:
      code: a program; print what you want to see.
    """
    done = run_python(code, seconds=SECONDS)
    match done.status:
        case "ok":
            return done.output or "nothing was printed: print what you want to see"
        case "timeout":
            return f"{done.output}error: stopped after {SECONDS:g} seconds"
        case "output":
            return f"{done.output}\nerror: stopped, as it printed too much"
    return f"{done.output}error: {done.error.strip() or 'it ended with an exit code that is not 0'}"


def built_in() -> dict[str, FunctionTool]:
    """What every model here may be given."""
    given = {}
    for known in TOOLS.values():
        made = tool(known.run, name=known.name)
        for schema in made.parameters["properties"].values():
            schema["description"] = known.description
        given[known.name] = made
    return given | {"python": tool(python)}


def named(names: Iterable[str]) -> dict[str, FunctionTool]:
    """The tools of these names: built-in ones, `FILE.py:FUNCTION`, or `FILE.py` for all that it defines in public.

    Raises:
      UserError: there is no such tool, or `python` cannot be shut in here.
    """
    known, chosen = built_in(), dict[str, FunctionTool]()
    for name in names:
        if ".py" in name:
            for made in _from_file(name):
                chosen[made.name] = made
        elif name not in known:
            raise UserError(f"there is no tool {name!r}: {nearest(name, known)}, or name a function: FILE.py:FUNCTION")
        else:
            chosen[name] = known[name]
    if "python" in chosen and chosen["python"].run is python and (why := available()):
        raise CannotIsolate(why)
    return chosen


def entries(tools: Mapping[str, FunctionTool]) -> list[dict[str, Any]]:
    """The list `tools` of OpenAI's API."""
    return [each.entry() for each in tools.values()]


def told(template: ChatTemplate, tools: Mapping[str, Callable[[str], str]]) -> ChatTemplate:
    """The template, telling the model of those of these tools that describe themselves.

    Raises:
      UserError: it has no way to.
    """
    described = {name: each for name, each in tools.items() if isinstance(each, FunctionTool)}
    return template.with_tools(entries(described)) if described else template


class _Wrong(Exception):
    """What is wrong with a call, in a line for the model."""


_TYPES: Mapping[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
    type(None): "null",
}
_WORDS = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_PYTHON = {name: kind for kind, name in _TYPES.items()}


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer. An alarm set before is put off for as long."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:g} seconds")

    handler = signal.signal(signal.SIGALRM, stop)
    alarm = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *alarm)


def _fitting(value: Any, schema: Schema, where: str) -> Any:
    """`value` as the schema wants it: an integer where a number is asked for is one, and 3.0 is the integer 3."""
    for choice in schema.get("anyOf", ()):
        try:
            return _fitting(value, choice, where)
        except _Wrong:
            continue
    kind = schema.get("type", "")
    if kind == "number" and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if kind == "integer" and type(value) is float and value.is_integer():
        value = int(value)
    right = type(value) is _PYTHON.get(kind, type(value)) and "anyOf" not in schema
    if "enum" in schema:
        right = any(value == choice and type(value) is type(choice) for choice in schema["enum"])
    if not right:
        shown = json.dumps(value, ensure_ascii=False)
        raise _Wrong(f"{where} should be {_wanted(schema)}, and is {shown if len(shown) < 80 else shown[:80] + '…'}")
    if kind == "array" and "items" in schema:
        return [_fitting(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value)]
    if kind == "object" and "additionalProperties" in schema:
        return {key: _fitting(item, schema["additionalProperties"], f"{where}[{key!r}]") for key, item in value.items()}
    return value


def _wanted(schema: Schema) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_wanted, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(json.dumps(choice, ensure_ascii=False) for choice in schema["enum"])
    return _WORDS[schema["type"]]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _default(value: Any, whose: str) -> Any:
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return value
    except (TypeError, ValueError):
        pass
    raise UserError(f"the default of {whose} is {value!r}, which JSON cannot hold: make it None, and set it inside")


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """(what comes before the sections, what `Args:` says of each), each on one line."""
    before, _, after = text.partition("\nArgs:\n")
    before = re.split(r"\n(?:Returns|Raises|Yields|Examples?):", before)[0]
    said: dict[str, str] = {}
    depth, name = 0, ""
    for line in after.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:
            break  # the next section
        depth = depth or indent
        if (started := re.match(r"(\w+)(?: *\([^)]*\))?: *(.*)", line.strip())) and indent == depth:
            name = started[1]
            said[name] = started[2]
        elif name and line.strip():
            said[name] = f"{said[name]} {line.strip()}".strip()
    return " ".join(before.split()), said


def _text(value: Any) -> str:
    if value is None:
        return "done"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode(errors="replace").decode()  # half a surrogate pair cannot be a token


def _cut(text: str) -> str:
    """The beginning and the end, where the error stands, of a text that is too long."""
    if len(text) <= MAX_RESULT:
        return text
    end = MAX_RESULT // 4
    left_out = f"… ({len(text) - MAX_RESULT:,} characters are left out) …"
    return f"{text[: MAX_RESULT - end]}{left_out}{text[-end:]}"


def _from_file(given: str) -> list[FunctionTool]:
    path, _, name = given.partition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} to take tools from: --tools=FILE.py:FUNCTION names one")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} does not load ({type(error).__name__}: {error}): mend it") from error
    own = {
        key: value
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    if name and name not in own:
        raise UserError(f"{path} has no function {name!r}" + (f": {nearest(name, own)}" * bool(own)))
    return [tool(value) for key, value in own.items() if name in ("", key)]
