"""The chat template of an imported model: the ids that transformers makes, with the loss mask that it does not."""

import copy
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llmlab.core.errors import UserError
from llmlab.data.chat import CallForm, Message, Rendered, Schema, ToolCall, TurnReader, read
from llmlab.data.chat_calls import written_call
from llmlab.data.chat_encoding import Encoded, Encoder, unused
from llmlab.data.chat_jinja import JinjaTemplate
from llmlab.data.chat_reading import ImportedReader, TurnText, marks_of
from llmlab.data.chat_tracing import Said, Written, find_said, form_of
from llmlab.data.tokenizer_imported import ImportedTokenizer

_OPENING = 16  # ids, at the end of a prompt, in which a mark that opens thinking stands


class ImportedTemplate:
    """The template that came with a tokenizer.

    A template that writes the date writes the day on which it is used; the fingerprint leaves that out.

    Raises:
      UserError: the tokenizer brings none, or it is broken.
    """

    _tools: Sequence[Schema] = ()  # which it tells a model of

    def __init__(self, tokenizer: ImportedTokenizer):
        if tokenizer.chat is None:
            raise UserError("this tokenizer brings no chat template: its tokenizer_config.json had no chat_template")
        self._tokenizer = tokenizer
        self._jinja = JinjaTemplate(tokenizer.chat.template, tokenizer.chat.tokens)
        self._encoder = Encoder(tokenizer, self._jinja)
        form = form_of(self._jinja.write)
        ends = [id for _, id in self._markers(form.ending)[:1]]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((tokenizer.eos_id, *ends, *tokenizer.chat.stop_ids)))
        typable = not self._markers(form.header) or (form.opening and not self._markers(form.opening))
        self._form = form._replace(header="") if typable else form
        self._leaves_out = functools.cache(functools.partial(_leaves_out, self._jinja))
        self._as_dicts = functools.partial(as_dicts, decode=_takes_objects(self._jinja))
        self._call = written_call(lambda turns: self._jinja.write(self._as_dicts(turns)), self._ended)
        self._marks = marks_of(self._encoder, self._jinja.literals, self._call)
        self.fingerprint = f"imported 1 {tokenizer.fingerprint}"

    def __reduce__(self) -> Any:
        return _restored, (self._tokenizer, self._tools)

    def with_tools(self, tools: Sequence[Schema]) -> "ImportedTemplate":
        if self._leaves_out("tools"):
            raise UserError("the chat template of this model does not tell it of tools: offer it none")
        if not self._call:
            raise UserError(
                "the chat template of this model writes calls of tools in a way that is not known here: offer it none"
            )
        telling = copy.copy(self)
        telling._tools = tuple(tools)
        telling.fingerprint = f"imported 1 {self._tokenizer.fingerprint}{json.dumps(tools)}"
        return telling

    def call_form(self, prompt: Sequence[int]) -> CallForm | None:
        if not self._call:
            return None
        around = (tuple(self._encoder.pieces(text)) for text in self._call[:3])
        thinking = (*self._encoder.pieces("</think>"), "\n\n") if self._has_opened_thinking(prompt) else ()
        return CallForm(thinking, *around)

    def render(self, conversation: Sequence[Message], *, generate: bool = False) -> Rendered:
        turns = tuple(conversation)
        for part in {part for turn in turns for part in _parts(turn)}:
            if self._leaves_out(part):
                raise UserError(f"the chat template of this model leaves out {part}: take it out of the conversation")
        spare = unused(json.dumps([self._as_dicts(turns), self._tools], ensure_ascii=False))
        breaker = next(spare)

        def broken(text: str) -> str:
            return self._encoder.broken(text, breaker)

        dicts = self._as_dicts(turns, broken)
        write = functools.partial(self._jinja.write, tools=_spelt([*self._tools], broken) or None)
        text = write(dicts, generate)
        if json.dumps(breaker).strip('"') in text:
            raise UserError("the chat template of this model escapes a marker that stands in a text: take that out")
        encoded = self._encoder.encode(text, breaker)
        mask, steps = [0] * len(encoded.ids), list[tuple[int, float]]()
        if not any(turn.role == "assistant" and (turn.train or turn.steps) for turn in turns):
            return Rendered(encoded.ids, mask, steps)
        written = Written(turns, dicts, text, generate, breaker)
        for turn, said in zip(turns, find_said(write, self._form, written, spare), strict=True):
            if said and turn.train:
                first, last = self._tokens(encoded, said)
                mask[first:last] = [1] * (last - first)
            if said:
                labels = (step.label for step in turn.steps)
                steps += zip((encoded.first_from(end) - 1 for end in said.steps), labels, strict=True)
        return Rendered(encoded.ids, mask, steps)

    def reader(self, prompt: Sequence[int] | None = None) -> TurnReader:
        names = {tool["function"]["name"] for tool in self._tools}
        text = TurnText(self._tokenizer, self._marks.ids)
        return ImportedReader(text, self._marks, names, thinks=self._has_opened_thinking(prompt))

    def parse(self, ids: Iterable[int], prompt: Sequence[int] | None = None) -> Message:
        return read(self.reader(prompt), ids, self.stop_ids)

    def _has_opened_thinking(self, prompt: Sequence[int] | None) -> bool:
        if prompt is None:
            return self._form.opening.rstrip().endswith("<think>")
        end = TurnText(self._tokenizer, self._marks.ids).whole(prompt[-_OPENING:])
        return end.rstrip().endswith(self._marks.think)

    def _ended(self, text: str) -> str | None:
        """The part of a text before a marker that ends a turn."""
        encoded = self._encoder.encode(text, next(unused(text)))
        ends = [encoded.starts[place] for place, id in encoded.markers if id in self.stop_ids]
        return text[: ends[0]] if ends else None

    def _markers(self, text: str) -> list[tuple[int, int]]:
        return self._encoder.encode(text, next(unused(text))).markers

    def _tokens(self, encoded: Encoded, said: Said) -> tuple[int, int]:
        """The first token of a turn, and the one past its end."""
        for place, id in encoded.markers:
            if said.after <= encoded.starts[place] < said.limit and id in self.stop_ids:
                return encoded.first_from(said.start), place + 1
        raise UserError(
            "the chat template of this model writes no token that ends a turn after what the assistant says here, so "
            "a model could not learn to stop: use another template"
        )


def _restored(tokenizer: ImportedTokenizer, tools: Sequence[Schema]) -> ImportedTemplate:
    template = ImportedTemplate(tokenizer)
    return template.with_tools(tools) if tools else template


def as_dicts(
    conversation: Sequence[Message], spell: Callable[[str], str] = lambda text: text, *, decode: bool = True
) -> list[dict[str, Any]]:
    """Messages as transformers and its templates take them; `spell` is applied to every text that a person can write.

    Arguments of a call that are a JSON object or list are given as that if `decode`, others as the text that they are.
    The ids of calls, which some templates ask for, are counted.
    """
    calls, answers = itertools.count(), itertools.count()
    dicts = []
    for message in conversation:
        fields: dict[str, Any] = {"role": message.role, "content": spell(message.text())}
        if message.thinking:
            fields |= dict.fromkeys(("reasoning_content", "thinking"), spell(message.thinking))
        if message.calls:
            fields["tool_calls"] = [
                {"id": f"call{next(calls):05}", "type": "function", "function": _function(call, spell, decode)}
                for call in message.calls
            ]
        if message.role == "tool":
            fields["tool_call_id"] = f"call{next(answers):05}"
            if message.name:
                fields["name"] = spell(message.name)
        dicts.append(fields)
    return dicts


def _function(call: ToolCall, spell: Callable[[str], str], decode: bool) -> dict[str, Any]:
    arguments = call.arguments or "{}"
    return {"name": spell(call.name), "arguments": _spelt(_arguments(arguments) if decode else arguments, spell)}


def _arguments(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict | list) else text


def _spelt(value: Any, spell: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return spell(value)
    if isinstance(value, dict):
        return {spell(key): _spelt(item, spell) for key, item in value.items()}
    return [_spelt(item, spell) for item in value] if isinstance(value, list) else value


def _parts(message: Message) -> list[str]:
    """What of this message a template may pass over without a word."""
    parts = {
        "a system message": message.role == "system",
        "the result of a tool": message.role == "tool",
        "thinking": bool(message.thinking),
        "a tool call": bool(message.calls),
        "text beside a tool call": bool(message.calls and message.text().strip()),
    }
    return [part for part, there in parts.items() if there]


def _leaves_out(template: JinjaTemplate, part: str) -> bool:
    sign = next(unused("".join(template.literals)))
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": sign, "description": "x", "parameters": parameters}}
    user, call = Message("user", "x"), Message("assistant", calls=(ToolCall("f", "{}"),))
    conversation = {
        "a system message": (Message("system", sign), user),
        "the result of a tool": (user, call, Message("tool", sign, name="f")),
        "thinking": (user, Message("assistant", "y", thinking=sign)),
        "a tool call": (user, Message("assistant", calls=(ToolCall(sign, "{}"),))),
        "text beside a tool call": (user, call._replace(content=sign)),
        "tools": (user,),
    }[part]
    asked = part == "tools"
    try:
        dicts = as_dicts(conversation, decode=_takes_objects(template))
        return sign not in template.write(dicts, asked, tools=[tool] if asked else None)
    except UserError:
        return False  # what it refuses, it says itself


def _takes_objects(template: JinjaTemplate) -> bool:
    """Whether the arguments of a call are to be given as an object. Some templates take nothing but text."""
    call = (Message("user", "x"), Message("assistant", calls=(ToolCall("f", '{"a": "b"}'),)))
    try:
        return "'a'" not in template.write(as_dicts(call))  # as Python would print it
    except UserError:
        return False
