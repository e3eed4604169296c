"""Rows of chat data, in the shapes that published sets have, as examples. A field that is None counts as absent."""

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llmlab.data.chat import Conversation, Example, Message, Response, Role, Step, ToolCall
from llmlab.data.config import Rows
from llmlab.data.readers import BadInput

_ROLES: dict[Any, Role] = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "function_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool"},
}
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_SHAPES: dict[Rows, str] = {
    "chat": "messages, conversations, prompt and completion, instruction and output, or question and answer",
    "preference": "chosen and rejected, and prompt, instruction or question where the two are answers alone",
    "ranking": "prompt and responses, the best first or with ranks or scores",
    "binary": "prompt, completion and label, or chosen and rejected",
    "steps": "prompt, completions and labels",
}
_Groups = list[tuple[Response, ...]]  # of examples


class BadRowError(Exception):
    """A row that is no example. `reason` is the same for all rows with one fault, so that they can be counted."""

    def __init__(self, reason: str, detail: str, mend: str):
        super().__init__(f"{reason} ({detail}); {mend}")
        self.reason, self.detail, self.mend = reason, detail, mend

    def at(self, where: str) -> BadInput:
        """As what is bad in a file."""
        return BadInput(self.reason, f"{where} ({self.detail})", self.mend)


def examples(row: Mapping[str, Any], rows: Rows, *, system: str = "", train_on: str = "assistant") -> list[Example]:
    """What a row holds: one example, or the two answers of a preference where each is to be judged alone.

    Args:
      rows, system, train_on: as in `DataConfig`. A `system` of the row comes before the config's.

    Raises:
      BadRowError: it lacks what `rows` needs, or what it has is not sound.
    """
    fields = _present(row)
    if fields.get("tools") not in (None, [], "", "[]"):
        raise BadRowError("tools are not read", "in 'tools'", "describe them in a system turn, and remove the field")
    kind = _text(fields.get("kind", ""), "kind")
    system = _text(fields.get("system", ""), "system") or system
    groups: _Groups
    if rows == "chat":
        groups = [(Response(_learned(_conversation(fields), train_on)),)]
    else:
        groups = {"preference": _preference, "ranking": _ranking, "binary": _binary, "steps": _steps}[rows](fields)
    return [
        Example(tuple(r._replace(conversation=_with_system(r.conversation, system)) for r in group), kind)
        for group in groups
    ]


def conversation(messages: Any) -> Conversation:
    """The turns of a list of messages, in the shapes that published sets and OpenAI's API have.

    Raises:
      BadRowError: it is no such list, or a turn in it is not sound.
    """
    return _turns(messages, "messages")


def guess_rows(row: Mapping[str, Any]) -> Rows | None:
    """The kind of row whose fields these are."""
    names = _present(row).keys()
    if {"chosen", "rejected"} <= names:
        return "preference"
    if "responses" in names:
        return "ranking"
    if {"completions", "labels"} <= names:
        return "steps"
    if {"messages", "conversations"} & names or any(set(pair) <= names for pair in _PAIRS):
        return "binary" if "label" in names else "chat"
    return None


# --- the kinds of rows -----------------------------------------------------------------------------------------------


def _preference(fields: dict[str, Any]) -> _Groups:
    if not {"chosen", "rejected"} <= fields.keys():
        raise _other_shape(fields, "preference")
    prompt = _prompt(fields)
    chosen, rejected = (_judged(_complete(prompt, fields[name], name)) for name in ("chosen", "rejected"))
    _check_different([chosen, rejected])
    margin = 0.0
    if "margin" in fields:
        margin = _number(fields["margin"], "margin")
    elif {"score_chosen", "score_rejected"} <= fields.keys():
        margin = _number(fields["score_chosen"], "score_chosen") - _number(fields["score_rejected"], "score_rejected")
    if margin < 0:
        raise BadRowError("margin below 0", f"it is {margin:g}", "exchange chosen and rejected")
    return [(Response(chosen, margin), Response(rejected))]


def _ranking(fields: dict[str, Any]) -> _Groups:
    if "responses" not in fields:
        raise _other_shape(fields, "ranking")
    values = _list(fields["responses"], "responses")
    if len(values) < 2:
        raise BadRowError("fewer than two responses", f"there are {len(values)}", "give two or more")
    prompt = _prompt(fields)
    conversations = [_judged(_complete(prompt, value, "responses")) for value in values]
    _check_different(conversations)
    for name, sign in (("ranks", 1), ("scores", -1)):
        if name in fields:
            order = [sign * _number(value, name) for value in _list(fields[name], name)]
            if len(order) != len(values):
                raise BadRowError("lists of different lengths", f"'responses' and {name!r}", "give one for each")
            if len(set(order)) < len(order):
                raise BadRowError("responses that are equally good", f"by {name!r}", "leave all but one of them out")
            conversations = [conversations[i] for i in sorted(range(len(order)), key=order.__getitem__)]
            break
    return [tuple(map(Response, conversations))]


def _binary(fields: dict[str, Any]) -> _Groups:
    if "label" in fields:
        label = float(_flag(fields["label"], "label"))
        return [(Response(_judged(_conversation(fields, "binary")), label),)]
    if not {"chosen", "rejected"} <= fields.keys():
        raise _other_shape(fields, "binary")
    ((chosen, rejected),) = _preference(fields)
    return [(chosen._replace(value=1.0),), (rejected,)]


def _steps(fields: dict[str, Any]) -> _Groups:
    """A step that neither ends in white space, nor is followed by some, is followed by a line end."""
    if not {"completions", "labels"} <= fields.keys():
        raise _other_shape(fields, "steps")
    texts = [_text(value, "completions") for value in _list(fields["completions"], "completions")]
    labels = [_number(value, "labels") for value in _list(fields["labels"], "labels")]
    if len(texts) != len(labels):
        raise BadRowError("lists of different lengths", "'completions' and 'labels'", "give one for each")
    if wrong := [label for label in labels if not 0 <= label <= 1]:
        raise BadRowError("label out of range", f"{wrong[0]:g} in 'labels'", "give numbers from 0 to 1, true or false")
    if not all(text.strip() for text in texts):
        raise BadRowError("empty step", "in 'completions'", "leave it and its label out")
    for i, after in enumerate(texts[1:]):
        if not (texts[i][-1].isspace() or after[0].isspace()):
            texts[i] += "\n"
    answer = Message("assistant", "".join(texts), steps=tuple(map(Step, texts, labels)))
    return [(Response(_judged((*_needed(_prompt(fields), "completions"), answer))),)]


# --- conversations ---------------------------------------------------------------------------------------------------


def _conversation(fields: dict[str, Any], rows: Rows = "chat") -> Conversation:
    for name in ("messages", "conversations"):
        if name in fields:
            return _turns(fields[name], name)
    for question, answer in _PAIRS:
        if question in fields and answer in fields:
            return _complete(_asked(fields, question), fields[answer], answer)
    raise _other_shape(fields, rows)


def _prompt(fields: dict[str, Any]) -> Conversation:
    """What is answered, where it has a field of its own."""
    return next((_asked(fields, question) for question, _ in _PAIRS if question in fields), ())


def _asked(fields: dict[str, Any], name: str) -> Conversation:
    if isinstance(fields[name], list):
        return _turns(fields[name], name)
    text = _text(fields[name], name)
    if name == "instruction" and (more := _text(fields.get("input", ""), "input")):
        text = f"{text}\n\n{more}"
    turns = _transcript(text)
    if turns and turns[-1] == Message("assistant"):  # opened for the answer
        return turns[:-1]
    return turns or (Message("user", text),)


def _complete(prompt: Conversation, value: Any, name: str) -> Conversation:
    """The prompt and its answer; or the answer, where that is a conversation with the prompt in it."""
    if isinstance(value, list):
        turns = _turns(value, name)
    else:
        text = _text(value, name)
        turns = _transcript(text) or (_answer(text),)
    if turns[0].role in ("assistant", "tool"):
        return _needed(prompt, name) + turns
    if any(turn not in turns[:-1] for turn in prompt):
        raise BadRowError("another prompt than its own", f"in {name!r}", "remove the prompt, or begin with it")
    return turns


def _needed(prompt: Conversation, name: str) -> Conversation:
    if not prompt:
        raise BadRowError("no prompt", f"{name!r} is an answer alone", "add the field prompt, a text or turns")
    return prompt


def _transcript(text: str) -> Conversation:
    """The turns of HH-RLHF's spelling, "\\n\\nHuman: …\\n\\nAssistant: …"; none of a text that does not begin so."""
    if not text.startswith("\n\nHuman:"):
        return ()
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _learned(conversation: Conversation, train_on: str) -> Conversation:
    _check_end(conversation)
    if train_on == "last":
        conversation = (*_context(conversation[:-1]), conversation[-1])
    learned = [turn for turn in conversation if turn.role == "assistant" and turn.train]
    if not learned:
        raise BadRowError("nothing to learn", "every answer is excluded", "set a weight to 1, or remove the row")
    for turn in learned:
        _check_answer(turn)
    return conversation


def _judged(conversation: Conversation) -> Conversation:
    """Only the last turn is learned from."""
    _check_end(conversation)
    _check_answer(conversation[-1])
    return (*_context(conversation[:-1]), conversation[-1]._replace(train=True))


def _context(turns: Conversation) -> Conversation:
    return tuple(turn._replace(train=False) if turn.role == "assistant" else turn for turn in turns)


def _with_system(conversation: Conversation, system: str) -> Conversation:
    if not system or any(turn.role == "system" for turn in conversation):
        return conversation
    return (Message("system", system), *conversation)


def _check_end(conversation: Conversation) -> None:
    if (role := conversation[-1].role) != "assistant":
        raise BadRowError("no answer at the end", f"the last turn is of role {role!r}", "end with the assistant's turn")


def _check_answer(turn: Message) -> None:
    if not (turn.content.strip() or turn.calls):
        raise BadRowError("empty answer", "a turn of the assistant", "give it text, or leave it out")


def _check_different(conversations: Sequence[Conversation]) -> None:
    if len({conversation[:-1] for conversation in conversations}) > 1:
        raise BadRowError(
            "answers to different conversations", "they differ before the last turn", "compare answers to the same one"
        )
    if len(set(conversations)) < len(conversations):
        raise BadRowError("answers that are the same", "two of them", "leave one out")


# --- turns -----------------------------------------------------------------------------------------------------------


def _turns(value: Any, name: str) -> Conversation:
    open_calls: dict[str, str] = {}  # the tools whose results are to come, in order, by the ids of their calls
    turns = tuple(_turn(entry, name, open_calls) for entry in _list(value, name))
    turns = tuple(turn for turn in turns if turn != Message("system"))  # some sets write one where there is none
    if not turns:
        raise BadRowError("no turns", f"{name!r} is empty", "give it turns, or remove the row")
    return turns


def _turn(entry: Any, where: str, open_calls: dict[str, str]) -> Message:
    if not isinstance(entry, Mapping):
        raise BadRowError("a turn is no object", f"in {where!r}", "write each as {role, content} or {from, value}")
    fields = _present(entry)
    given = fields.get("role", fields.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadRowError("unknown role", f"{given!r:.40} in {where!r}", "use system, user, assistant or tool")
    content = _content(fields.get("content", fields.get("value", "")), where)
    if role == "tool":
        name = open_calls.pop(str(fields.get("tool_call_id", next(iter(open_calls), ""))), "")
        return Message(role, content, name=_text(fields.get("name", name), "name"))
    if role != "assistant":
        return Message(role, content)
    calls = [*_list(fields.get("tool_calls", []), "tool_calls")]
    if "function_call" in fields:
        calls.append(fields["function_call"])
    if given == "function_call":
        calls, content = _written_calls(content), ""
    thinking = next((fields[name] for name in ("reasoning_content", "thinking", "reasoning") if name in fields), "")
    thinking = _text(thinking, "thinking")
    return (Message(role, content, thinking) if thinking else _answer(content))._replace(
        calls=tuple(_call(call, open_calls) for call in calls),
        train=all(_flag(fields[name], name) for name in ("weight", "train") if name in fields),
    )


def _answer(text: str) -> Message:
    """A turn of the assistant, of which some sets write the thinking into the text."""
    thought = _THOUGHT.match(text)
    return Message("assistant", text[thought.end() :], thought[1].strip()) if thought else Message("assistant", text)


def _content(value: Any, where: str) -> str:
    """A text, or a list of its parts."""
    if not isinstance(value, list):
        return _text(value, where)
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in value]
    if wrong := [part for part in parts if not isinstance(part, str)]:
        raise BadRowError("content is not text", f"{len(wrong)} of the parts of a turn in {where!r}", "leave them out")
    return _text("".join(map(str, parts)), where)


def _call(entry: Any, open_calls: dict[str, str]) -> ToolCall:
    function = entry.get("function") or entry if isinstance(entry, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if function is None or not isinstance(name, str) or not re.fullmatch(r"\S+", name):
        raise _bad_call()
    arguments = function.get("arguments")
    if arguments is None:
        arguments = ""
    elif not isinstance(arguments, str):
        # Parquet gives the arguments of every call the fields of all of them.
        arguments = json.dumps(_present(arguments) if isinstance(arguments, Mapping) else arguments, ensure_ascii=False)
    unnamed = (id for number in itertools.count() if (id := f"call {number}") not in open_calls)
    open_calls[str(entry.get("id") or next(unnamed))] = name
    return ToolCall(_text(name, "name"), _text(arguments, "arguments"))


def _written_calls(text: str) -> list[Any]:
    """The calls of a ShareGPT turn, whose text is JSON: one call, or a list of them."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad_call() from None
    return calls if isinstance(calls, list) else [calls]


def _bad_call() -> BadRowError:
    return BadRowError("unreadable tool call", "in a turn of the assistant", "write each as {name, arguments}")


# --- values ----------------------------------------------------------------------------------------------------------


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError("field is not text", f"{name!r} is {type(value).__name__}", "make it a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError("lone surrogate", f"in {name!r}", "write the character itself") from None
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRowError("field is not a list", f"{name!r} is {type(value).__name__}", "make it a list")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise BadRowError("field is not a number", f"{name!r} is {value!r:.40}", "make it a finite number")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, (int, float)) or value not in (0, 1):
        raise BadRowError("field is not a truth value", f"{name!r} is {value!r:.40}", "make it true or false, 1 or 0")
    return bool(value)


def _other_shape(fields: dict[str, Any], rows: Rows) -> BadRowError:
    has = ", ".join(map(repr, list(fields)[:8])) or "no field at all"
    guess = guess_rows(fields)
    other = f", or set data.rows={guess}" if guess not in (None, rows) else ""
    return BadRowError(f"no row of data.rows={rows}", f"it has {has}", f"give {_SHAPES[rows]}{other}")
