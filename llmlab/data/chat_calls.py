"""How a chat template writes calls of tools, seen by having it write one and two, and how a model's calls are read.

Two ways are known: a JSON object with a name and arguments, alone or in a list, and a name and JSON with a mark between
them. What stands around them is whatever the template writes there. Signs, where they stand, mark what is a token.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmlab.core.errors import UserError
from llmlab.data.chat import Message, ToolCall
from llmlab.data.chat_jinja import MARKER

_ASKED = Message("user", "x")
_PLAIN = "plain answer"
_FIRST, _SECOND = "first_tool", "second_tool"
_GIVEN = {"some_argument": "some value"}
_PARTS = re.compile(rf"{MARKER.pattern}|.", re.DOTALL)
_TELLING = 200  # characters, in which the first key of an object stands, with blanks


class WrittenCall(NamedTuple):
    """A turn that is one call: `before` the name, `between` it and the arguments, and `after` them.

    begin, end: what stands once around all calls. opened, closed: what stands around one, or a list of them; "" where
    nothing does. name, arguments: the keys of a JSON object; "" where there is none.
    """

    before: str
    between: str
    after: str
    begin: str
    opened: str
    closed: str
    end: str
    name: str = ""
    arguments: str = ""

    def map(self, spell: Callable[[str], str]) -> "WrittenCall":
        """With another spelling of what stands around."""
        around = {name: spell(getattr(self, name)) for name in ("between", "begin", "opened", "closed", "end")}
        return self._replace(**around)


def written_call(write: Callable[[Sequence[Message]], str], ended: Callable[[str], str | None]) -> WrittenCall | None:
    """How a template writes calls; None where it writes none, or in a way that is not known.

    write: what it makes of messages. ended: the part of a text before a marker that ends a turn; None without one.
    """
    calls = [ToolCall(name, json.dumps(_GIVEN)) for name in (_FIRST, _SECOND)]
    try:
        plain = write((_ASKED, Message("assistant", _PLAIN)))
        one = write((_ASKED, Message("assistant", calls=(calls[0],))))
    except UserError:
        return None
    start, places = len(_shared(one, plain.partition(_PLAIN)[0], from_end=False)), _places(one, _FIRST)
    after = ended(one[places[1].stop :]) if places else None
    if not places or after is None or start > places[0].start:
        return None
    before, between = one[start : places[0].start], one[places[0].stop : places[1].start]
    if found := _object(before, between, after):
        return found
    try:
        two = write((_ASKED, Message("assistant", calls=tuple(calls))))
    except UserError:  # some take one call at a time
        two = ""
    first, second = _places(two, _FIRST), _places(two, _SECOND)
    middle = two[first[1].stop : second[0].start] if first and second else after + before
    opened = _shared(before, middle, from_end=True)
    closed = _shared(after, middle.removesuffix(opened), from_end=False)
    if not opened.strip() or not between.strip():
        return None
    around = before.removesuffix(opened), opened, closed, after.removeprefix(closed)
    return WrittenCall(before, between, after, *(text.strip() for text in around))


def read_calls(text: str, form: WrittenCall) -> tuple[ToolCall, ...]:
    """The calls in what stands between `opened` and `closed`; none where one is not well formed."""
    if form.name:
        return _from_objects(text, form)
    name, found, arguments = text.partition(form.between.strip())
    name, arguments = name.strip(), arguments.strip()
    return (ToolCall(name, arguments),) if found and name.split() == [name] else ()


def may_be_object(text: str, form: WrittenCall) -> bool:
    """Whether text that so begins, and holds nothing yet that tells, may be a call that is a JSON object."""
    begun, call = "".join(text[:_TELLING].split()), f'{{"{form.name}":"'
    return begun.startswith(call) or call.startswith(begun)


def _places(text: str, name: str) -> tuple[slice, slice] | None:
    """Where the name of a call stands, and what it is given."""
    spelt = [json.dumps(_GIVEN), json.dumps(_GIVEN, separators=(",", ":"))]
    at, given = text.find(name), next((given for given in spelt if given in text), "")
    begin = text.find(given, at)
    if at < 0 or begin < 0 or not given or text.count(name) > 1:
        return None
    return slice(at, at + len(name)), slice(begin, begin + len(given))


def _object(before: str, between: str, after: str) -> WrittenCall | None:
    brace = before.rfind("{")
    text = before + _FIRST + between + json.dumps(_GIVEN) + after
    try:
        call, end = json.JSONDecoder().raw_decode(text, max(0, brace))
    except ValueError:
        return None
    keys = {value: key for key, value in call.items() if isinstance(value, str)} if isinstance(call, dict) else {}
    arguments = next((key for key, value in call.items() if value == _GIVEN), "") if keys else ""
    if _FIRST not in keys or not arguments:
        return None
    opened, closed = before[:brace].rstrip(), text[end:].lstrip()
    if opened.endswith("[") and closed.startswith("]"):
        opened, closed = opened[:-1], closed[1:]
    return WrittenCall(before, between, after, "", opened.strip(), closed.strip(), "", keys[_FIRST], arguments)


def _shared(text: str, other: str, *, from_end: bool) -> str:
    """What both begin with, or end with: whole markers, and the letters of what is none."""
    parts = [_PARTS.findall(each)[:: -1 if from_end else 1] for each in (text, other)]
    same = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*parts, strict=False))]
    return "".join(same[:: -1 if from_end else 1])


def _from_objects(text: str, form: WrittenCall) -> tuple[ToolCall, ...]:
    """Of objects, or lists of them, one after the other."""
    text, values = text.strip(), list[Any]()
    try:
        while text:
            value, end = json.JSONDecoder().raw_decode(text)
            values += value if isinstance(value, list) else [value]
            text = text[end:].lstrip("; \n")
    except (ValueError, RecursionError):
        # Templates write arguments that are no JSON as they are.
        keys = rf'"{re.escape(form.name)}": "([^"\\]+)", "{re.escape(form.arguments)}"'
        plain = re.fullmatch(rf'\{{{keys}: ([^{{\["\s].*)\}}', text, re.DOTALL)
        return (ToolCall(plain[1], plain[2]),) if plain and not values else ()
    calls = [_from_object(value, form) for value in values]
    return tuple(call for call in calls if call) if all(calls) else ()


def _from_object(value: Any, form: WrittenCall) -> ToolCall | None:
    name = value.get(form.name) if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return None
    arguments = value.get(form.arguments, {})
    return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
