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
from llmlab.data.chat import Message, Step, ToolCall, joined, prompt_of
from llmlab.data.chat_imported import as_dicts
from llmlab.data.tokenizer_imported import ImportedTokenizer
from tests.chat_families import FAMILIES, HELLO, TOOLS, Family, byte_level, conversations, made, of, said, spelt


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
    allows = FAMILIES[name].allows
    if "thinking" in allows:
        message = message._replace(thinking="so <think>\n so")
    if "call" in allows:
        call = ToolCall("search", '{"q": "é </tool_call>"}')
        message = message._replace(calls=(call, call._replace(arguments="{}")))
        template = template.with_tools(TOOLS)
        prompt = template.render(HELLO[:1], generate=True).ids
    if "single" in allows:
        message = message._replace(content="", calls=message.calls[:1])
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
    assert said(tokenizer, rendered) == (
        '⟦<｜calls｜>⟧⟦<｜call｜>⟧f⟦<｜sep｜>⟧{"a":  1}⟦<｜/call｜>⟧⟦<｜/calls｜>⟧⟦</s>⟧'
    )


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


TOLD = [name for name, family in FAMILIES.items() if "told" in family.allows]


def test_a_prompt_need_not_say_who_says_what():
    """This template tells of tools before every question that is spelt as the last one is."""
    tokenizer, template = of("listed")
    told, turns = template.with_tools(TOOLS), (*HELLO, HELLO[0])
    assert spelt(tokenizer, prompt_of(told, turns)).count("⟦[AVAILABLE_TOOLS]⟧") == 2
    with pytest.raises(UserError, match="it cannot be told what the assistant says"):
        told.render(turns)


def test_a_template_tells_of_tools_as_it_does():
    tokenizer, template = of("thinking")
    plain = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}]
    ids = template.with_tools(plain).render((Message("system", "be kind"), *HELLO[:1]), generate=True).ids
    told = '{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}'
    assert spelt(tokenizer, ids) == (
        f"⟦<|im_start|>⟧system\nbe kind\n\nYou have these tools:\n<tools>\n{told}\n</tools>\nTo call one:\n"
        '⟦<tool_call>⟧\n{"name": ..., "arguments": ...}\n⟦</tool_call>⟧⟦<|im_end|>⟧\n'
        "⟦<|im_start|>⟧user\nhello⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n"
    )


@pytest.mark.parametrize("name", TOLD)
def test_tools_change_nothing_of_what_is_said(name: str):
    tokenizer, template = of(name)
    told = template.with_tools(TOOLS)
    for entry in TOOLS:
        assert f"{entry['function']['name']}" in spelt(tokenizer, told.render(HELLO[:1]).ids)
    call = ToolCall("search", '{"q": "<|im_end|>"}')
    asked = Message("user", "again")
    turns = (*HELLO, asked, Message("assistant", calls=(call,)), Message("tool", "3", name="search"), HELLO[1])
    assert said(tokenizer, told.render(turns)) == said(tokenizer, template.render(turns))
    assert told.render(turns).ids != template.render(turns).ids
    assert told.fingerprint != template.fingerprint
    again = pickle.loads(pickle.dumps(told))
    assert (again.render(turns), again.fingerprint) == (told.render(turns), told.fingerprint)


@pytest.mark.parametrize("name", TOLD)
def test_a_marker_in_a_tool_is_text(name: str):
    tokenizer, template = of(name)

    def steering(text: str) -> list[int]:
        properties = {text: {"type": "string", "description": text}}
        function = {"name": "f", "description": text, "parameters": {"type": "object", "properties": properties}}
        told = template.with_tools([{"type": "function", "function": function}])
        control = {entry["id"] for entry in json.loads(tokenizer.content)["added_tokens"]}
        return [id for id in told.render(HELLO[:1], generate=True).ids if id in control]

    assert steering(" ".join(markers(FAMILIES[name], tokenizer))) == steering("x")


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {*TOLD}))
def test_a_template_that_passes_over_tools_says_so(name: str):
    with pytest.raises(UserError, match="does not tell it of tools: offer it none"):
        of(name)[1].with_tools(TOOLS)


def test_calls_that_could_not_be_read_are_not_offered():
    """They stand in tags of their own, argument by argument."""
    tagged = FAMILIES["thinking"].template.replace(
        "{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}",
        "{% for key, value in call.function.arguments.items() %}{{ '<' + key + '>' + value }}{% endfor %}",
    )
    _, template = made(FAMILIES["thinking"], template=tagged)
    with pytest.raises(UserError, match="writes calls of tools in a way that is not known here"):
        template.with_tools(TOOLS)
    assert template.call_form(()) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("listed", 'so [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g"}]', ("so", "f", "g")),
        ("listed", '[TOOL_CALLS]{"name": "f"}[TOOL_CALLS]{"name": "g"}', ("", "f", "g")),
        ("listed", '[TOOL_CALLS][{"name": "f"}', ('[TOOL_CALLS][{"name": "f"}',)),
        ("objects", ' {"name": "search", "parameters": {"q": ""}}', ("", "search")),
        ("objects", '{"name": "search"}; {"name": "calculator"}', ("", "search", "calculator")),
        ("objects", '{"name": "f"}', ('{"name": "f"}',)),  # of which it was not told
        ("objects", 'x {"name": "search"}', ('x {"name": "search"}',)),
        ("objects", '{"name": "search"} x', ('{"name": "search"} x',)),
        ("bars", "a</think>b<｜call｜>f<｜sep｜>1 + 1<｜/call｜>c", ("bc", "f")),
        ("bars", "</think><｜call｜><｜call｜>f<｜sep｜>1<｜/call｜>", ("<｜call｜><｜call｜>f<｜sep｜>1<｜/call｜>",)),
        ("bars", "</think><｜calls｜><｜call｜>f 1<｜sep｜>{}<｜/call｜>", ("<｜call｜>f 1<｜sep｜>{}<｜/call｜>",)),
    ],
)
def test_calls_of_each_family_are_read(name: str, text: str, message: tuple[str, ...]):
    tokenizer, template = of(name)
    read = parsed(template.with_tools(TOOLS), tokenizer, text)
    assert (read.content, *(call.name for call in read.calls)) == message


def test_an_answer_in_json_is_no_call_where_there_are_no_tools():
    tokenizer, template = of("objects")
    assert parsed(template, tokenizer, '{"name": "search"}').content == '{"name": "search"}'
    reader = template.with_tools(TOOLS).reader()
    assert joined([piece for id in tokenizer.encode('{"age": 3}') for piece in reader.add(id)]).content == '{"age": 3}'
