"""Tools as the API has them: declared by the client, called by the model, run by whoever the client chooses.

A model may give a tool plain text, and the API wants JSON: such text is wrapped, under the one parameter that the tool
declares, and the id of the call says so, so that the model finds its own words again when the conversation comes back.
"""

import json
import secrets
from typing import Any, NamedTuple

from llmlab.data.chat import ChatTemplate, Conversation, MarkerTemplate, Message, ToolCall
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


def declared(fields: Fields) -> list[Declared]:
    """What a request offers to the model; nothing where `tool_choice` is none."""
    choice = fields.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise fields.wrong("tool_choice", "the model chooses by itself here: use auto or none")
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
        parameters = inner.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise inner.wrong("parameters", "it should be a JSON schema")
        tools.append(Declared(name, inner.text("description", ""), parameters))
    return [] if choice == "none" else tools


def described(conversation: Conversation, tools: list[Declared], template: ChatTemplate) -> Conversation:
    """With what the tools are in the system's turn; those that our own assistants are trained with they know."""
    if isinstance(template, MarkerTemplate) and all(tool.name in TOOLS for tool in tools):
        return conversation
    lines = [json.dumps(tool._asdict(), ensure_ascii=False) for tool in tools]
    text = "\n".join(["You may call these tools:", *lines])
    if conversation and conversation[0].role == "system":
        first = conversation[0]._replace(content=f"{conversation[0].content}\n\n{text}")
        return (first, *conversation[1:])
    return (Message("system", text), *conversation)


def as_json(call: ToolCall, tools: list[Declared]) -> dict[str, Any]:
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
