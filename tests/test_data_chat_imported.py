"""Templates of imported models: every token where it belongs, and nothing that anybody types is a marker."""

import json
import pickle
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="the extra hf installs it")
pytest.importorskip("jinja2", reason="the extra hf installs it")

from llmlab.core.errors import UserError
from llmlab.data.chat import Message, Step, ToolCall
from llmlab.data.chat_imported import as_dicts
from llmlab.data.tokenizer_imported import ImportedTokenizer
from tests.chat_families import FAMILIES, HELLO, Family, byte_level, conversations, made, of, said, spelt


def markers(family: Family, tokenizer: ImportedTokenizer) -> list[str]:
    added = [entry["content"] for entry in json.loads(tokenizer.content)["added_tokens"]]
    return [*family.plain, *added, *(f"{name}\n" for name in added), *(name[:-1] for name in added)]


def check(family: Family, tokenizer: ImportedTokenizer, template, conversation, generate: bool) -> None:
    """What the template writes, and what of it is said, are what the family says."""
    rendered = template.render(conversation, generate=generate)
    assert len(rendered.ids) == len(rendered.mask)
    parts = family.expected(conversation, generate)
    assert family.same(spelt(tokenizer, rendered.ids)) == family.same("".join(text for text, _ in parts))
    wanted = ["".join(text for text, _ in run) for said, run in groupby(parts, key=lambda part: part[1]) if said]
    trained = [turn.train for turn in conversation if turn.role == "assistant"]
    marked = zip(rendered.ids, rendered.mask, strict=True)
    found = [[id for id, _ in run] for said, run in groupby(marked, key=lambda pair: pair[1]) if said]
    assert [family.same(spelt(tokenizer, ids)) for ids in found] == [
        family.same(text) for text, train in zip(wanted, trained, strict=True) if train
    ]


def check_random(name: str, examples: int) -> None:
    tokenizer, template = of(name)
    family = FAMILIES[name]

    @settings(max_examples=examples, deadline=None)
    @given(conversations(family.allows, markers(family, tokenizer)), st.booleans())
    def holds(conversation, generate):
        check(family, tokenizer, template, conversation, generate)

    holds()


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations(name: str):
    check_random(name, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_many_random_conversations(name: str):
    check_random(name, 500)


@pytest.mark.parametrize("name", FAMILIES)
def test_who_types_every_marker_changes_nothing_but_text(name: str):
    tokenizer, template = of(name)
    family = FAMILIES[name]
    typed = " ".join(markers(family, tokenizer)).strip()

    def steering(text: str) -> tuple[list[int], list[int]]:
        rendered = template.render((Message("user", text), Message("assistant", text), Message("user", text)))
        control = {*tokenizer.control.values(), tokenizer.bos_id, tokenizer.eos_id}
        return [
            [id for id, mask in zip(rendered.ids, rendered.mask, strict=True) if id in control and mask == said]
            for said in (0, 1)
        ]

    assert steering(typed) == steering("x")
    check(family, tokenizer, template, (Message("user", typed), Message("assistant", typed)), False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_with_what_the_model_stops_at(name: str):
    tokenizer, template = of(name)
    end = {entry["content"]: entry["id"] for entry in json.loads(tokenizer.content)["added_tokens"]}[FAMILIES[name].end]
    rendered = template.render(HELLO)
    assert end in template.stop_ids
    assert tokenizer.eos_id in template.stop_ids
    assert [id for id, mask in zip(rendered.ids, rendered.mask, strict=True) if mask][-1] == end
    assert tokenizer.pad_id != end  # though two of the families pad with it


@pytest.mark.parametrize("name", FAMILIES)
def test_without_an_assistant_nothing_is_said(name: str):
    _, template = of(name)
    for generate in (False, True):
        assert not any(template.render(HELLO[:1], generate=generate).mask)
    assert not any(template.render((HELLO[0], HELLO[1]._replace(train=False))).mask)
    ids = template.render((*HELLO, *HELLO[:1])).ids
    assert ids == template.render((HELLO[0], HELLO[1]._replace(train=False), HELLO[0])).ids


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_said_is_read_again(name: str):
    _, template = of(name)
    prompt = template.render(HELLO[:1], generate=True).ids
    message = HELLO[1]._replace(content='a <b> "c"\n\nd')
    if name in ("thinking", "opened"):
        call = ToolCall("search", '{"q": "é </tool_call>"}')
        message = message._replace(thinking="so <think>\n so", calls=(call, call._replace(arguments="{}")))
    rendered = template.render((HELLO[0], message))
    start = rendered.mask.index(1)
    assert rendered.ids[:start] == prompt[:start]
    assert template.parse(rendered.ids[start:], rendered.ids[:start]) == message
    if name != "bars":  # whose prompt opens thinking that what is answered before has not
        assert start == len(prompt)
        end = max(place for place, mask in enumerate(rendered.mask) if mask)
        assert template.parse(rendered.ids[start:end]) == message


def parsed(template, tokenizer, text: str) -> Message:
    """Of text in which the marks of the family are tokens."""
    import tokenizers

    return template.parse(tokenizers.Tokenizer.from_str(tokenizer.content).encode(text).ids)


def test_a_call_that_is_not_well_formed_is_text():
    tokenizer, template = of("thinking")
    for wrong in ("", "{", "[1]", '{"name": 3, "arguments": {}}', '{"name": ""}', '{"name": "f", "arguments": {"a"}'):
        text = f"so <tool_call>{wrong}</tool_call> be it"
        assert parsed(template, tokenizer, text) == Message("assistant", text)
    call = parsed(template, tokenizer, 'x\n<tool_call>{"name": "f", "arguments": {"b": [1]}}</tool_call>')
    assert call == Message("assistant", "x", calls=(ToolCall("f", '{"b": [1]}'),))
    assert parsed(template, tokenizer, '<tool_call>{"name": "f"').content == '<tool_call>{"name": "f"'


def test_thinking_may_lack_its_beginning_or_its_end():
    tokenizer, template = of("thinking")
    assert parsed(template, tokenizer, "<think>\nwell").thinking == "well"
    assert parsed(template, tokenizer, "a</think>b").content == "a</think>b"
    tokenizer, template = of("opened")
    assert parsed(template, tokenizer, "well") == Message("assistant", thinking="well")
    assert parsed(template, tokenizer, "well</think>\n\nyes") == Message("assistant", "yes", "well")


def test_typed_marks_of_thinking_are_no_thinking():
    tokenizer, template = of("thinking")
    ids = tokenizer.encode("<thin") + tokenizer.encode("k>a</thin") + tokenizer.encode("k>b")
    assert template.parse(ids) == Message("assistant", "<think>a</think>b")


def test_marks_that_are_no_tokens_are_read_as_text():
    plain = lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # noqa: E731
    tokenizer, template = made(FAMILIES["thinking"], tokenizer=plain)
    message = Message("assistant", "yes", "well", (ToolCall("f", '{"a": 1}'),))
    conversation = (Message("user", "x</think>"), message)
    prompt = template.render(conversation[:1], generate=True).ids
    assert template.parse(template.render(conversation).ids[len(prompt) :]) == message
    kept = Message("assistant", "no</think>yes")  # as the template would cut it
    rendered = template.render((*conversation[:1], kept, Message("user", "y")))
    assert said(tokenizer, rendered) == "no</think>yes⟦<|im_end|>⟧"


def test_arguments_that_are_no_json_stay_as_they_are():
    _, template = of("thinking")
    message = Message("assistant", calls=(ToolCall("calculator", "2 * (3 + 4)"), ToolCall("f", "12")))
    prompt = template.render(HELLO[:1], generate=True).ids
    assert template.parse(template.render((HELLO[0], message)).ids[len(prompt) :]) == message


def test_steps_end_at_their_last_tokens():
    for name in FAMILIES:
        tokenizer, template = of(name)
        steps = (Step("one <|im_end|></s>\n", 1.0), Step("two", 0.5), Step(" three\n", 0.0))
        rendered = template.render((HELLO[0], Message("assistant", "", steps=steps)))
        start = rendered.mask.index(1)
        assert [label for _, label in rendered.steps] == [1.0, 0.5, 0.0]
        told = [tokenizer.decode_bytes(rendered.ids[start : place + 1]).decode() for place, _ in rendered.steps]
        told = [text.removeprefix("<think>\n").removeprefix("\n</think>\n\n").lstrip() for text in told]
        wanted = ["one <|im_end|></s>\n", "one <|im_end|></s>\ntwo", "one <|im_end|></s>\ntwo three"]
        assert [FAMILIES[name].same(text) for text in told] == [FAMILIES[name].same(text) for text in wanted]
    with pytest.raises(UserError, match="a step of an answer is empty"):
        template.render((HELLO[0], Message("assistant", "", steps=(Step("", 1.0),))))


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("gemma", (Message("system", "x"), *HELLO), "refuses this conversation: System role not supported"),
        ("inst_first", (HELLO[0], *HELLO), "roles must alternate"),
        ("chatml", (HELLO[0], HELLO[1]._replace(thinking="x")), "leaves out thinking"),
        ("chatml", (HELLO[0], Message("assistant", calls=(ToolCall("f", ""),))), "leaves out a tool call"),
        ("llama3", (Message("user", "a\ud800"),), "lone surrogate"),
        ("thinking", (HELLO[0], HELLO[1]._replace(calls=(ToolCall("f", '["\\ud800"]'),))), "lone surrogate"),
    ],
)
def test_what_a_template_cannot_spell_is_refused(name: str, turns, message: str):
    with pytest.raises(UserError, match=message):
        of(name)[1].render(turns)


def test_text_that_a_template_passes_over_beside_a_call_is_refused():
    told = FAMILIES["thinking"].template.replace(
        "content = message.content", "content = message.content if not message.tool_calls else ''"
    )
    _, template = made(FAMILIES["thinking"], template=told)
    call = Message("assistant", calls=(ToolCall("f", "{}"),))
    assert template.render((HELLO[0], call)).ids
    with pytest.raises(UserError, match="leaves out text beside a tool call"):
        template.render((HELLO[0], call._replace(content="x")))


def test_a_marker_that_a_template_would_escape_is_refused():
    escaping = FAMILIES["chatml"].template.replace("message['content'] +", "message['content'] | tojson(true) +")
    _, template = made(FAMILIES["chatml"], template=escaping)
    assert template.render((Message("user", "é"),)).ids
    with pytest.raises(UserError, match="escapes a marker that stands in a text"):
        template.render((Message("user", "<|im_end|>"),))


def test_results_that_a_template_passes_over_are_refused():
    deaf = FAMILIES["chatml"].template.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
    )
    _, template = made(FAMILIES["chatml"], template=deaf)
    with pytest.raises(UserError, match="leaves out the result of a tool"):
        template.render((HELLO[0], Message("tool", "x")))


def test_arguments_are_text_where_a_template_takes_no_objects():
    tokenizer, template = of("bars")
    rendered = template.render((HELLO[0], Message("assistant", calls=(ToolCall("f", '{"a":  1}'),))))
    assert said(tokenizer, rendered) == '⟦<｜call｜>⟧f⟦<｜sep｜>⟧{"a":  1}⟦<｜/call｜>⟧⟦</s>⟧'


def test_calls_have_ids_that_results_name():
    calls = (ToolCall("f", '{"a": [1]}'), ToolCall("g", "1 + 1"))
    turns = (Message("assistant", calls=calls), Message("tool", "1", name="f"), Message("tool", "2"))
    assistant, first, second = as_dicts(turns)
    assert [call["id"] for call in assistant["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": [1]}, "1 + 1"]
    assert (first["name"], "name" in second) == ("f", False)


def test_the_fingerprint_is_that_of_the_tokenizer_with_its_template():
    _, template = made(FAMILIES["chatml"])
    assert template.fingerprint == of("chatml")[1].fingerprint
    _, changed = made(FAMILIES["chatml"], template="{{ bos_token }}")
    assert changed.fingerprint != template.fingerprint


def test_sent_to_a_process_it_is_the_same():
    _, template = of("thinking")
    same = pickle.loads(pickle.dumps(template))
    assert same.render(HELLO) == template.render(HELLO)
    assert (same.stop_ids, same.fingerprint) == (template.stop_ids, template.fingerprint)


def test_a_tokenizer_that_brings_none_says_so():
    with pytest.raises(UserError, match="brings no chat template"):
        made(FAMILIES["chatml"], template=None)
