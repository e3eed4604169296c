"""Conversations and our own template: one BOS, only the assistant learned, and no text that becomes a marker."""

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.core.errors import UserError
from llmlab.data.chat import Example, Message, Response, Step, ToolCall, template_for
from llmlab.data.tokenizer import CHAT_MARKERS, DOCUMENT_MARKERS, Tokenizer, TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from tests.chat_families import texts

TEXT = ["def area(width, height):\n    return width * height  # café 2024 user assistant tool call\n"] * 40
MARKERS = (*CHAT_MARKERS, *DOCUMENT_MARKERS, "<0x41>", "<|reserved_0|>")
HELLO = (Message("user", "hello"), Message("assistant", "hi"))
NAMES = st.text("abc_<|>/", min_size=1, max_size=4)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=370), TEXT)


@pytest.fixture(scope="module")
def template(bpe):
    return template_for(bpe)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    role = draw(st.sampled_from(("system", "user", "assistant", "assistant", "tool")))
    text = texts(MARKERS)
    if role == "tool":
        return Message(role, draw(text), name=draw(st.one_of(st.just(""), NAMES)))
    if role != "assistant":
        return Message(role, draw(text))
    calls = draw(st.lists(st.builds(ToolCall, NAMES, text), max_size=2)) if draw(st.booleans()) else []
    thinking = draw(text) if draw(st.booleans()) else ""
    return Message(role, draw(text), thinking, tuple(calls), train=draw(st.booleans()))


def spelt(tokenizer: Tokenizer, ids) -> str:
    """The text of ids, with ⟦⟧ around markers: what was typed has none."""
    control = {id: name for name, id in tokenizer.control.items()} | {tokenizer.bos_id: "<s>"}
    pieces = (f"⟦{control[id]}⟧".encode() if id in control else tokenizer.decode_bytes([id]) for id in ids)
    return b"".join(pieces).decode()


def expected(message: Message) -> tuple[str, str]:
    """What opens a turn, and the turn."""
    opening = f"⟦<|{message.role}|>⟧" + (f"{message.name}⟦<|result|>⟧" if message.name else "")
    thinking = f"⟦<|think|>⟧{message.thinking}⟦<|/think|>⟧" if message.thinking else ""
    calls = (
        f"⟦<|call|>⟧{call.name}{' ' if call.arguments else ''}{call.arguments}⟦<|/call|>⟧" for call in message.calls
    )
    return opening, f"{thinking}{message.content}{''.join(calls)}⟦<|end|>⟧"


def check(bpe: Tokenizer, template, conversation, generate: bool) -> None:
    rendered = template.render(conversation, generate=generate)
    assert len(rendered.ids) == len(rendered.mask)
    assert rendered.ids.count(bpe.bos_id) == 1
    turns = [expected(message) for message in conversation]
    assert spelt(bpe, rendered.ids) == "⟦<s>⟧" + "".join(map("".join, turns)) + "⟦<|assistant|>⟧" * generate
    marked = zip(rendered.ids, rendered.mask, strict=True)
    said = [spelt(bpe, [id for id, _ in run]) for mask, run in groupby(marked, key=lambda pair: pair[1]) if mask]
    learned = [message.role == "assistant" and message.train for message in conversation]
    assert said == [turn for (_, turn), train in zip(turns, learned, strict=True) if train]
    for message in conversation:
        if message.role == "assistant":
            prompt = template.render((), generate=True).ids
            ids = template.render((message,)).ids
            assert ids[: len(prompt)] == prompt
            assert template.parse(ids[len(prompt) :]) == message._replace(train=True)
            assert template.parse(ids[len(prompt) : -1]) == message._replace(train=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(messages(), max_size=3), st.booleans())
def test_random_conversations(bpe, template, conversation, generate):
    check(bpe, template, conversation, generate)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.lists(messages(), max_size=3), st.booleans())
def test_many_random_conversations(bpe, template, conversation, generate):
    check(bpe, template, conversation, generate)


def test_who_types_every_marker_changes_nothing_but_text(bpe, template):
    typed = " ".join(MARKERS)
    conversation = (Message("user", typed), Message("assistant", "x"), Message("tool", typed, name="<|result|>"))
    rendered = template.render(conversation)
    plain = template.render((Message("user", "x"), HELLO[1], Message("tool", "x", name="x")))
    control = {*bpe.control.values(), bpe.bos_id, bpe.eos_id, bpe.pad_id}
    assert [id for id in rendered.ids if id in control] == [id for id in plain.ids if id in control]
    assert bpe.decode(rendered.ids) == f"{typed}x<|result|>{typed}"


def test_a_turn_ends_with_what_a_model_stops_at(bpe, template):
    rendered = template.render(HELLO)
    assert template.stop_ids == (bpe.control["<|end|>"], bpe.eos_id)
    assert (rendered.ids[-1], rendered.mask[-1]) == (bpe.control["<|end|>"], 1)
    assert bpe.pad_id not in template.stop_ids


def test_without_an_assistant_nothing_is_said(template):
    assert not any(template.render(HELLO[:1]).mask)
    assert not any(template.render((HELLO[0], HELLO[1]._replace(train=False)), generate=True).mask)
    assert template.render((*HELLO, HELLO[0])).mask[-1] == 0


def test_steps_end_at_their_last_tokens(bpe, template):
    steps = (Step("one <|end|>\n", 1.0), Step("two", 0.0))
    rendered = template.render((HELLO[0], Message("assistant", "", thinking="so", steps=steps), HELLO[0]))
    assert [label for _, label in rendered.steps] == [1.0, 0.0]
    told = [spelt(bpe, rendered.ids[: place + 1]).partition("⟦<|/think|>⟧")[2] for place, _ in rendered.steps]
    assert told == ["one <|end|>\n", "one <|end|>\ntwo"]
    with pytest.raises(UserError, match="a step of an answer is empty"):
        template.render((Message("assistant", "", steps=(Step("", 1.0),)),))


def ids_of(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Markers by id, the rest as text."""
    return [
        id
        for part in parts
        for id in ([tokenizer.control[part]] if part in tokenizer.control else tokenizer.encode(part))
    ]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("<|think|>", "so"), Message("assistant", thinking="so")),
        (("a", "<|/think|>", "b"), Message("assistant", "ab")),
        (("<|call|>", "f x", "<|end|>", "y"), Message("assistant", "f x")),
        (("<|call|>", " f x", "<|/call|>"), Message("assistant", " f x")),
        (("<|call|>", "<|/call|>", "a"), Message("assistant", "a")),
        (("<|call|>", "f\nx", "<|/call|>"), Message("assistant", "f\nx")),
        (("<|call|>", "f", "<|/call|>", "a"), Message("assistant", "a", calls=(ToolCall("f", ""),))),
        (("a", "<|user|>", "b", "<|end|>"), Message("assistant", "ab")),
        ((), Message("assistant")),
    ],
)
def test_what_is_not_well_formed_is_text(bpe, template, parts, message):
    assert template.parse(ids_of(bpe, *parts)) == message


@pytest.mark.parametrize("name", ["", "a b", "a\n", "\u2003"])
def test_a_tool_whose_name_could_not_be_read_again_is_refused(template, name):
    with pytest.raises(UserError, match=r"the name of a tool, .* is empty or holds a blank: rename it"):
        template.render((Message("assistant", calls=(ToolCall(name, "x"),)),))


def test_a_lone_surrogate_is_refused(template):
    with pytest.raises(UserError, match="lone surrogate"):
        template.render((Message("user", "a\ud800"),))


def test_a_tokenizer_without_markers_has_no_template():
    bare = train_tokenizer(TokenizerConfig(kind="character", chat_markers=False), ["abc"])
    with pytest.raises(UserError, match=r"no chat markers and brings no chat template: train one with "):
        template_for(bare)


def test_another_tokenizer_is_another_fingerprint(template):
    other = train_tokenizer(TokenizerConfig(kind="character"), ["abc"])
    assert template_for(other).fingerprint != template.fingerprint
    assert template_for(other).render((Message("user", "abc"),)).ids[-1] == other.control["<|end|>"]


@given(
    st.lists(st.tuples(st.lists(messages(), max_size=2), st.floats(-1, 1)), max_size=2),
    st.text(max_size=3),
)
@settings(max_examples=50, deadline=None)
def test_an_example_comes_back_as_it_was_written(responses, kind):
    steps = (Message("assistant", "", steps=(Step("one", 0.5),)),)
    judged = [Response(tuple(turns), value) for turns, value in responses]
    example = Example((*judged, Response(steps)), kind)
    assert Example.loads(example.dumps()) == example
    assert json.loads(example.dumps())[-1] == kind


def test_tools_stand_in_the_turn_of_the_system_but_for_those_that_our_assistants_know(bpe, template):
    def entry(name: str) -> dict:
        return {"type": "function", "function": {"name": name, "description": "é<|end|>", "parameters": {}}}

    assert template.with_tools([entry("calculator")]).render(HELLO) == template.render(HELLO)
    told = template.with_tools([entry("calculator"), entry("f")])
    lines = [f'{{"name": "{name}", "description": "é<|end|>", "parameters": {{}}}}' for name in ("calculator", "f")]
    text = "\n".join(["You may call these tools:", *lines])
    assert told.render(HELLO) == template.render((Message("system", text), *HELLO))
    system = Message("system", "be kind")
    assert told.render((system, *HELLO)) == template.render((Message("system", f"be kind\n\n{text}"), *HELLO))
    assert told.fingerprint != template.fingerprint
