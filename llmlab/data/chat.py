"""Conversations, and the template that makes token ids of them: ids, loss mask and stop ids from one object.

Markers are control tokens placed by id, and the text between them is encoded apart, so that text which spells a marker
stays text. Training, sampling, evaluation and the command line all read and write conversations by a `ChatTemplate`.
"""

import codecs
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import CHAT_MARKERS, Tokenizer
from llmlab.data.tokenizer_imported import ImportedTokenizer
from llmlab.data.tools import TOOLS

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


class ToolCall(NamedTuple):
    """A tool, whose name holds no blank, and what it is given, as one string."""

    name: str
    arguments: str


class Step(NamedTuple):
    """A part of an answer, and how right it is, from 0 to 1: what process rewards are learned from."""

    text: str
    label: float


class Message(NamedTuple):
    """One turn. `content` is its text; of an assistant, `thinking` comes before it and `calls` after it.

    name: of the tool, where the role is `tool`. train: whether this turn of an assistant is learned. steps: `content`
    in its parts, where they are judged.
    """

    role: Role
    content: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    name: str = ""
    train: bool = True
    steps: tuple[Step, ...] = ()

    def text(self) -> str:
        """`content`, or that of its steps.

        Raises:
          UserError: a step is empty, so that no token of it could be judged.
        """
        if any(not step.text for step in self.steps):
            raise UserError("a step of an answer is empty: leave it out")
        return "".join(step.text for step in self.steps) if self.steps else self.content


Conversation = tuple[Message, ...]


class Response(NamedTuple):
    """A conversation whose last turn is judged, and `value`: the margin, or the label, that its row gives it."""

    conversation: Conversation
    value: float = 0.0


class Example(NamedTuple):
    """What a row of chat data holds: a conversation, or several that are judged together, the best first.

    kind: a name that evaluations group by.
    """

    responses: tuple[Response, ...]
    kind: str = ""

    def dumps(self) -> str:
        """As JSON, for `loads`."""
        return json.dumps([[[_sparse(m) for m in r.conversation], r.value] for r in self.responses] + [self.kind])

    @staticmethod
    def loads(text: str) -> "Example":
        """The example that `dumps` wrote."""
        *responses, kind = json.loads(text)
        return Example(tuple(Response(tuple(map(_message, turns)), value) for turns, value in responses), kind)


class Rendered(NamedTuple):
    """A conversation as tokens. `mask` is 1 where the model is to say the token: an assistant's turn with its end.

    steps: (place of its last token, label) of every step that is judged.
    """

    ids: list[int]
    mask: list[int]
    steps: list[tuple[int, float]]


Schema = Mapping[str, Any]
Spelling = tuple[str | int, ...]  # text, and markers by their ids


class CallForm(NamedTuple):
    """How an answer that is one call is spelt: what comes before the name, between it and the arguments, and after.

    thinking: what ends the thinking that the prompt has begun; () where it has begun none.
    """

    thinking: Spelling
    before: Spelling
    between: Spelling
    after: Spelling


class Piece(NamedTuple):
    """More of what an assistant says; `text` is a whole call's too, spelt out for people."""

    kind: Literal["text", "thinking", "call"]
    text: str
    call: ToolCall | None = None


class TurnReader(Protocol):
    """One turn of an assistant, read as its ids come. What it has given out is never taken back."""

    def add(self, id: int) -> list[Piece]:
        """What is certain with one more id, which is none that ends a turn."""

    def end(self) -> list[Piece]:
        """The rest, as no more ids come."""


class ChatTemplate(Protocol):
    """How one family of models spells conversations.

    Attributes:
      stop_ids: what ends an assistant's turn.
      fingerprint: changes with whatever changes the ids, but for today's date where a template writes it.
    """

    stop_ids: tuple[int, ...]
    fingerprint: str

    def render(self, conversation: Sequence[Message], *, generate: bool = False) -> Rendered:
        """The ids of a conversation, its BOS as the family writes it; with `generate` an assistant's turn is opened at
        the end.

        Raises:
          UserError: the template cannot spell this conversation, or a text holds a lone surrogate.
        """

    def reader(self, prompt: Sequence[int] | None = None) -> TurnReader:
        """Reads what a model writes after `generate`; a call that is not well formed is text.

        prompt: the ids that it follows, which may have begun its thinking; None: those of a question.
        """

    def parse(self, ids: Iterable[int], prompt: Sequence[int] | None = None) -> Message:
        """The whole turn that `reader` reads, with or without its end."""

    def with_tools(self, tools: Sequence[Schema]) -> "ChatTemplate":
        """This template, telling the model in every conversation what it may call; OpenAI's API lists tools so.

        Raises:
          UserError: it has no way to tell, or writes calls in one that cannot be read.
        """

    def call_form(self, prompt: Sequence[int]) -> CallForm | None:
        """How the model calls a tool after this prompt; None where that is not known."""


def template_for(tokenizer: Tokenizer) -> ChatTemplate:
    """The template that this tokenizer's models are trained with.

    Raises:
      UserError: it has none: neither our chat markers nor a template of its own.
    """
    if isinstance(tokenizer, ImportedTokenizer) and tokenizer.chat:
        from llmlab.data.chat_imported import ImportedTemplate

        return ImportedTemplate(tokenizer)
    if all(marker in tokenizer.control for marker in CHAT_MARKERS):
        return MarkerTemplate(tokenizer)
    raise UserError(
        "this tokenizer has no chat markers and brings no chat template: train one with "
        "data.tokenizer.chat_markers=True, or convert a model that has both tokenizer.json and a chat_template in "
        "tokenizer_config.json or chat_template.jinja"
    )


class MarkerTemplate:
    """Ours: `<s>`, then for every turn a marker of its role, its text, and `<|end|>`.

    <s><|system|>…<|end|><|user|>…<|end|><|assistant|><|think|>…<|/think|>…<|call|>name arguments<|/call|><|end|>
    <|tool|>name<|result|>…<|end|>
    """

    def __init__(self, tokenizer: Tokenizer, told: str = ""):
        self._tokenizer, self._told = tokenizer, told
        self._id = tokenizer.control
        self.stop_ids: tuple[int, ...] = (self._id["<|end|>"], tokenizer.eos_id)
        self.fingerprint = f"markers 1 {tokenizer.fingerprint}{told}"

    def with_tools(self, tools: Sequence[Schema]) -> "MarkerTemplate":
        """In the system's turn; those that our own assistants are trained with they know."""
        functions = [tool["function"] for tool in tools]
        if all(function["name"] in TOOLS for function in functions):
            return MarkerTemplate(self._tokenizer)
        lines = (json.dumps(function, ensure_ascii=False) for function in functions)
        return MarkerTemplate(self._tokenizer, "\n".join(["You may call these tools:", *lines]))

    def call_form(self, prompt: Sequence[int]) -> CallForm:
        return CallForm((), (self._id["<|call|>"],), (" ",), (self._id["<|/call|>"],))

    def render(self, conversation: Sequence[Message], *, generate: bool = False) -> Rendered:
        ids, mask, steps = [self._tokenizer.bos_id], [0], []
        for message in self._telling(conversation):
            opening, body, ends = self._turn(message)
            steps += [(len(ids) + len(opening) + end, label) for end, label in ends]
            learned = int(message.role == "assistant" and message.train)
            ids += opening + body
            mask += [0] * len(opening) + [learned] * len(body)
        if generate:
            ids.append(self._id["<|assistant|>"])
            mask.append(0)
        return Rendered(ids, mask, steps)

    def reader(self, prompt: Sequence[int] | None = None) -> TurnReader:
        return _MarkerReader(self._tokenizer)

    def parse(self, ids: Iterable[int], prompt: Sequence[int] | None = None) -> Message:
        return read(self.reader(prompt), ids, self.stop_ids)

    def _telling(self, conversation: Sequence[Message]) -> Sequence[Message]:
        if not self._told:
            return conversation
        if not conversation or conversation[0].role != "system":
            return Message("system", self._told), *conversation
        return conversation[0]._replace(content=f"{conversation[0].content}\n\n{self._told}"), *conversation[1:]

    def _turn(self, message: Message) -> tuple[list[int], list[int], list[tuple[int, float]]]:
        """What opens the turn, the turn with its end, and where in the latter its steps end."""
        opening, body = [self._id[f"<|{message.role}|>"]], list[int]()
        if message.role == "tool" and message.name:
            opening += [*self._encode(message.name), self._id["<|result|>"]]
        if message.thinking:
            body += [self._id["<|think|>"], *self._encode(message.thinking), self._id["<|/think|>"]]
        content, ends = message.text(), []
        for step in message.steps:
            body += self._encode(step.text)
            ends.append((len(body) - 1, step.label))
        if not message.steps:
            body += self._encode(content)
        for call in message.calls:
            text = f"{call.name} {call.arguments}" if call.arguments else call.name
            if _call(text) != call:
                raise UserError(f"the name of a tool, {call.name!r}, is empty or holds a blank: rename it")
            body += [self._id["<|call|>"], *self._encode(text), self._id["<|/call|>"]]
        return opening, [*body, self._id["<|end|>"]], ends

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class _MarkerReader:
    """What a call's marker opens waits for what closes it; all else is certain at once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._markers = {tokenizer.control[name]: name for name in CHAT_MARKERS}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside = ""  # the last marker
        self._held: list[str] = []

    def add(self, id: int) -> list[Piece]:
        marker = self._markers.get(id)
        if marker is None:
            return self._more(self._decoder.decode(self._tokenizer.decode_bytes([id])))
        return [*self._last(), *self._turned(marker)]

    def end(self) -> list[Piece]:
        return [*self._last(), *self._turned("")]

    def _last(self) -> list[Piece]:
        return self._more(self._decoder.decode(b"", final=True))

    def _more(self, text: str) -> list[Piece]:
        if self._inside == "<|call|>":
            self._held.append(text)
            return []
        return [Piece("thinking" if self._inside == "<|think|>" else "text", text)] if text else []

    def _turned(self, marker: str) -> list[Piece]:
        """What was held, now that the next marker has come."""
        text, closed = "".join(self._held), self._inside == "<|call|>" and marker == "<|/call|>"
        self._held, self._inside = [], marker
        if closed and (call := _call(text)):
            return [call_piece(call)]
        return [Piece("text", text)] if text else []


def prompt_of(template: ChatTemplate, conversation: Sequence[Message]) -> list[int]:
    """The ids that a model goes on from. Nothing of them is learned, so it need not be clear who says what in them."""
    turns = (turn._replace(content=turn.text(), steps=(), train=False) for turn in conversation)
    return template.render(tuple(turns), generate=True).ids


def call_piece(call: ToolCall) -> Piece:
    """A call, as readers give it out."""
    return Piece("call", f"{call.name} {call.arguments}", call)


def read(reader: TurnReader, ids: Iterable[int], stop_ids: Sequence[int]) -> Message:
    """The whole turn: all before the first id that ends one."""
    said = itertools.takewhile(lambda id: id not in stop_ids, ids)
    return joined([*itertools.chain.from_iterable(map(reader.add, said)), *reader.end()])


def joined(pieces: Sequence[Piece]) -> Message:
    """The turn of which these are the pieces."""
    content, thinking = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("text", "thinking"))
    return Message("assistant", content, thinking, tuple(p.call for p in pieces if p.call))


def _call(text: str) -> ToolCall | None:
    """What `name arguments` calls; None if it is not well formed."""
    name, _, arguments = text.partition(" ")
    return ToolCall(name, arguments) if name.split() == [name] else None


def _sparse(message: Message) -> dict[str, Any]:
    """The fields that are set."""
    defaults = Message._field_defaults
    return {name: value for name, value in message._asdict().items() if value != defaults.get(name)}


def _message(fields: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(*call) for call in fields.get("calls", ()))
    steps = tuple(Step(*step) for step in fields.get("steps", ()))
    return Message(**(fields | {"calls": calls, "steps": steps}))
