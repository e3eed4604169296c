"""Tools as the API has them: declared by the client, called by the model, run by whoever the client chooses.

A model may give a tool plain text, and the API wants JSON: such text is wrapped, under the one parameter that the tool
declares, and the id of the call says so, so that the model finds its own words again when the conversation comes back.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from llmlab.data.chat import ChatTemplate, MarkerTemplate, ToolCall
from llmlab.data.tools import TOOLS
from llmlab.serve.errors import ApiError
from llmlab.serve.fields import Fields

_WRAPPED = "calltext_"
_MOST = 128
_INPUT = "input"


class Declared(NamedTuple):
    """A tool of the client's. parameters: a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class Offer(NamedTuple):
    """tools: what the model may call. forced: the names of those of which it has to call one; none where it may not."""

    tools: tuple[Declared, ...] = ()
    forced: tuple[str, ...] = ()

    def entries(self) -> list[dict[str, Any]]:
        """As OpenAI's API lists them."""
        return [{"type": "function", "function": tool._asdict()} for tool in self.tools]

    def forms(self, template: ChatTemplate) -> dict[str, dict[str, Any] | None]:
        """What each of the forced is given, as `Structures.call` has it; our own assistants give our own tools text."""
        own = isinstance(template, MarkerTemplate) and all(tool.name in TOOLS for tool in self.tools)
        return {tool.name: None if own else tool.parameters for tool in self.tools if tool.name in self.forced}


def offered(fields: Fields) -> Offer:
    """What a request offers to the model; nothing where `tool_choice` is none."""
    given = fields.get("tools") or []
    if not isinstance(given, list) or len(given) > _MOST:
        raise fields.wrong("tools", f"it should be a list of at most {_MOST} tools")
    tools = []
    for place, entry in enumerate(given):
        where = f"tools[{place}]"
        outer = Fields(entry, ("type", "function"), where)
        outer.choice("type", "function", ("function",))
        inner = Fields(outer.get("function"), ("name", "description", "parameters", "strict"), f"{where}.function")
        name = inner.text("name")
        if name.split() != [name] or len(name) > 64:
            raise inner.wrong("name", "it should be 1 to 64 characters, none of them a blank")
        parameters = inner.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict):
            raise inner.wrong("parameters", "it should be a JSON schema")
        tools.append(Declared(name, inner.text("description", ""), parameters))
    if isinstance(fields.get("tool_choice"), dict):
        outer = Fields(fields.get("tool_choice"), ("type", "function"), "tool_choice")
        outer.choice("type", "function", ("function",))
        name = Fields(outer.get("function"), ("name",), "tool_choice.function").text("name")
        if name not in [tool.name for tool in tools]:
            raise fields.wrong("tool_choice", f"there is no {name[:64]!r} in tools: name one that is, or add it")
        return Offer(tuple(tools), (name,))
    choice = fields.choice("tool_choice", "auto", ("auto", "none", "required"))
    if choice == "required" and not tools:
        raise fields.wrong("tool_choice", "there are no tools to call: give some, or use auto")
    forced = tuple(tool.name for tool in tools) if choice == "required" else ()
    return Offer() if choice == "none" else Offer(tuple(tools), forced)


def as_json(call: ToolCall, tools: Sequence[Declared]) -> dict[str, Any]:
    """A call of the model's, for the client."""
    id, arguments = f"call_{secrets.token_hex(12)}", call.arguments
    if not isinstance(_parsed(arguments), dict):
        id = f"{_WRAPPED}{secrets.token_hex(12)}"
        schema = next((tool.parameters for tool in tools if tool.name == call.name), {})
        properties = schema.get("properties")
        name = next(iter(properties)) if isinstance(properties, dict) and len(properties) == 1 else _INPUT
        arguments = json.dumps({name: arguments}, ensure_ascii=False)
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def as_said(messages: Any) -> Any:
    """A client's messages, with the arguments of calls as the model has written them."""
    if not isinstance(messages, list):
        return messages
    return [_turn_as_said(turn) if isinstance(turn, dict) else turn for turn in messages]


def unwrapped(arguments: str) -> str:
    """The one text in a JSON object, or `arguments` where it is anything else."""
    values = list(parsed.values()) if isinstance(parsed := _parsed(arguments), dict) else []
    return values[0] if len(values) == 1 and isinstance(values[0], str) else arguments


def run_tool(name: str, arguments: str) -> str:
    """What one of our own tools answers; they touch nothing, and are bounded."""
    if name not in TOOLS:
        raise ApiError(404, f"there is no tool {name[:50]!r} here: {', '.join(TOOLS)} are")
    return TOOLS[name].run(unwrapped(arguments))


def own_tools() -> list[dict[str, Any]]:
    """Our own tools, as a client declares them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": {
                    "type": "object",
                    "properties": {_INPUT: {"type": "string", "description": tool.description}},
                    "required": [_INPUT],
                },
            },
        }
        for tool in TOOLS.values()
    ]


def _turn_as_said(turn: dict[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    return turn | {"tool_calls": [_call_as_said(call) for call in calls]}


def _call_as_said(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not str(call.get("id")).startswith(_WRAPPED):
        return call
    arguments = function.get("arguments")
    return call | {"function": function | {"arguments": unwrapped(arguments)}} if isinstance(arguments, str) else call


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
