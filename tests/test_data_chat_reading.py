"""What is read as it comes is what reading it at once gives, whatever a model writes."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="the extra hf installs it")
pytest.importorskip("jinja2", reason="the extra hf installs it")

from llmlab.data.chat import CHAT_MARKERS, Message, ToolCall, joined
from tests.chat_families import FAMILIES, byte_level, made, of
from tests.scripted import TEMPLATE, TOKENIZER, assistant

WRITTEN = [
    *("the fox", " ", "\n", "\n\n", "é🙂", "<", "<th", "</think", "<tool_", '{"a": 1}', "</tool_call>", "<think>"),
    *('{"name": "f", "arguments": {"a": [1]}}', '\n{"name": "f", "arguments": 1 + 1}\n', "f 1", "\u2581"),
    *('{"name": "f", "parameters": {}}', '[{"name": "f"}, {"name": "f", "arguments": {"a": "b"}}]', "[TOOL_CALLS]"),
    *("f<｜sep｜>{}", "<｜calls｜><｜call｜>f<｜sep｜>1 + 1<｜/call｜><｜/calls｜>", '[TOOL_CALLS][{"name": "f"}]'),
    *("<tool_call>", "</think>", '<tool_call>{"name": "f"}</tool_call>', "<|call|>"),
]
CALL = "@<tool_call>(.*?)@</tool_call>"
CALLS = {
    "thinking": CALL,
    "opened": CALL,
    "bars": "@<｜call｜>(.*?)@<｜/call｜>",
    "listed": r"@\[TOOL_CALLS\](.*?)(?=@\[TOOL_CALLS\]|\Z)",
}
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]")
MARKS += tuple(f"<｜{name}｜>" for name in ("calls", "/calls", "call", "/call", "sep"))
TELLING = [{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}]
SIGN, NEVER = "\U000fffff", "\U000ffffe"


def own_at_once(ids) -> Message:
    """Of our own template: every text between two markers, by what stands around it."""
    names = {TOKENIZER.control[name]: name for name in CHAT_MARKERS}
    said = list(itertools.takewhile(lambda id: id not in TEMPLATE.stop_ids, ids))
    places = [place for place, id in enumerate(said) if id in names]
    texts = [TOKENIZER.decode(said[i + 1 : j]) for i, j in itertools.pairwise([-1, *places, len(said)])]
    before, after = ["", *(names[said[place]] for place in places)], [*(names[said[place]] for place in places), ""]
    message = Message("assistant")
    for opened, text, closed in zip(before, texts, after, strict=True):
        call = re.fullmatch(r"(\S+?)(?: (.*))?", text, re.DOTALL)
        if opened == "<|call|>" and closed == "<|/call|>" and call and call[1].split() == [call[1]]:
            message = message._replace(calls=(*message.calls, ToolCall(call[1], call[2] or "")))
        elif opened == "<|think|>":
            message = message._replace(thinking=message.thinking + text)
        else:
            message = message._replace(content=message.content + text)
    return message


def imported_at_once(name: str, template, ids) -> Message:
    """Of a family: the whole text, by regular expressions."""
    tokenizer, family = of(name)[0], FAMILIES[name]
    added = {entry["content"]: entry["id"] for entry in json.loads(tokenizer.content)["added_tokens"]}
    mark_of = {added[mark]: mark for mark in MARKS if mark in added}
    said = itertools.takewhile(lambda id: id not in template.stop_ids, ids)
    text = ""
    for is_mark, run in itertools.groupby(said, key=mark_of.__contains__):
        run = list(run)
        plain = "" if is_mark else tokenizer.decode_bytes(run).decode(errors="replace")
        text += plain or "".join(SIGN + mark_of[id] for id in run if is_mark)
    think, answer = (f"{SIGN}{mark}" if mark in added else NEVER for mark in ("<think>", "</think>"))
    text = think + text if name in ("opened", "bars") else text
    thought = re.match(rf"\s*{think}(.*?)({answer}|\Z)", text, re.DOTALL)
    text = text[thought.end() :] if thought else text
    calls = []

    def take(found: re.Match[str]) -> str:
        new = calls_at_once(name, found[1])
        calls.extend(new)
        return "" if new else found[0]

    pattern = CALLS.get(name, NEVER + "()").replace("@", SIGN)
    if "call" in family.allows and "single" not in family.allows:
        # What stands around all calls goes first, but for what stands inside of one.
        around = rf"({SIGN}<｜call｜>.*?(?:{SIGN}<｜/call｜>|\Z))|{SIGN}<｜/?calls｜>"
        text = re.sub(around, lambda found: found[1] or "", text, flags=re.DOTALL) if name == "bars" else text
        text = re.sub(rf"\n?{pattern}", take, text, flags=re.DOTALL)
    elif (
        "single" in family.allows
        and text.lstrip().startswith("{")
        and all(call.name == "f" for call in calls_at_once(name, text))
    ):
        calls = calls_at_once(name, text)
        text = "" if calls else text
    thinking = thought[1].strip("\n") if thought else ""
    return Message("assistant", text.replace(SIGN, "").strip(), thinking.replace(SIGN, ""), tuple(calls))


def calls_at_once(name: str, text: str) -> list[ToolCall]:
    if name == "bars":
        call = re.fullmatch(rf"\s*(\S+)\s*{SIGN}<｜sep｜>(.*)", text, re.DOTALL)
        return [ToolCall(call[1], call[2].strip().replace(SIGN, ""))] if call and SIGN not in call[1] else []
    key = "parameters" if name == "objects" else "arguments"
    if plain := re.fullmatch(rf'\s*\{{"name": "f", "{key}": (1 \+ 1.*)\}}\s*', text, re.DOTALL):
        return [ToolCall("f", plain[1].replace(SIGN, ""))]
    try:
        entries, text = [], text.strip()
        while text:
            value, end = json.JSONDecoder().raw_decode(text)
            entries += value if isinstance(value, list) else [value]
            text = text[end:].lstrip("; \n")
        return [ToolCall(entry["name"], json.dumps(entry.get(key, {}))) for entry in entries]
    except (ValueError, KeyError, TypeError):
        return []


def as_it_comes(template, ids) -> list:
    """The pieces, id by id."""
    reader, pieces = template.reader(), []
    for id in itertools.takewhile(lambda id: id not in template.stop_ids, ids):
        pieces += reader.add(id)
    return [*pieces, *reader.end()]


def written(tokenizer, template) -> st.SearchStrategy[list[int]]:
    """Ids of anything: any of the vocabulary, markers more often, and what looks like a turn or nearly so."""
    import tokenizers

    spelt = tokenizer.encode
    if hasattr(tokenizer, "content"):
        library = tokenizers.Tokenizer.from_str(tokenizer.content)
        spelt = lambda text: library.encode(text, add_special_tokens=False).ids  # noqa: E731
        markers = [entry["id"] for entry in json.loads(tokenizer.content)["added_tokens"]]
    else:
        markers = [*tokenizer.control.values()]
    some = st.one_of(
        st.integers(0, tokenizer.vocab_size - 1).map(lambda id: [id]),
        st.sampled_from(markers).map(lambda id: [id]),
        st.sampled_from(WRITTEN).map(spelt),
        st.sampled_from(WRITTEN).map(tokenizer.encode),
    )
    return st.lists(some.filter(lambda ids: not set(ids) & {0, *template.stop_ids}), max_size=12).map(
        lambda parts: [id for part in parts for id in part]
    )


def check(template, tokenizer, at_once, examples: int) -> None:
    @settings(max_examples=examples, deadline=None)
    @given(written(tokenizer, template), st.sampled_from([(), template.stop_ids[:1]]))
    def same(ids, end):
        pieces = as_it_comes(template, [*ids, *end])
        assert joined(pieces) == at_once([*ids, *end]) == template.parse([*ids, *end])
        assert all(piece.text for piece in pieces)

    same()


@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_our_own(examples: int):
    check(TEMPLATE, TOKENIZER, own_at_once, examples)


@pytest.mark.parametrize("examples", [50, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, examples: int):
    tokenizer, template = of(name)
    template = template.with_tools(TELLING) if "told" in FAMILIES[name].allows else template
    check(template, tokenizer, lambda ids: imported_at_once(name, template, ids), examples)


SPELT = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


@pytest.mark.parametrize(
    "script, pieces",
    [
        ("<think>a\n < b</think>\n\nso ", ["a", "\n ", "< ", "b", "s", "o"]),
        (f"a \n{SPELT}\n{SPELT} b", ["a", "f", "f", "  b"]),
        (f"a\n{SPELT[:-1]}", ["a", f"\n{SPELT[:-1]}"]),
        ("x\n<tool_call>{}</tool_call>", ["x", "\n<tool_call>{}</tool_call>"]),
        ("if a <t or <tool b ", ["i", "f", " a", " <t", " o", "r", " <tool", " b"]),
        ("2 <", ["2", " <"]),
        (" \n ", []),
    ],
)
def test_everything_is_said_as_soon_as_it_is_certain(script: str, pieces: list[str]):
    """Of a model whose marks are no tokens."""
    tokenizer, template = made(
        FAMILIES["thinking"], tokenizer=lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    )
    told = as_it_comes(template, [id for letter in script for id in tokenizer.encode(letter)])
    assert [piece.call.name if piece.call else piece.text for piece in told] == pieces


def test_what_looks_like_a_mark_need_not_wait_where_marks_are_tokens():
    tokenizer, template = of("thinking")
    told = as_it_comes(template, [id for letter in "a <tool_call>" for id in tokenizer.encode(letter)])
    assert [piece.text for piece in told] == ["a", " <", *"tool_call>"]


def test_whether_a_prompt_has_opened_thinking_is_seen_in_it():
    _, template = of("bars")
    asked = (Message("user", "x"),)
    called = (*asked, Message("assistant", calls=(ToolCall("f", ""),)), Message("tool", "y"))
    opened, plain = (template.render(turns, generate=True).ids for turns in (asked, called))
    ids = template.render((*called, Message("assistant", "well"))).ids[len(plain) :]
    assert template.parse(ids, opened) == template.parse(ids) == assistant(thinking="well")
    assert template.parse(ids, plain) == assistant("well")


def test_every_id_is_looked_at_once(monkeypatch):
    """So that a turn takes time by its length."""
    decoded = []
    for tokenizer, template in ((TOKENIZER, TEMPLATE), of("thinking"), of("inst_first")):
        ids = [*range(70, 90)] * 5
        decoded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode_bytes", lambda ids: decoded.extend(ids) or b"x")
            assert joined(as_it_comes(template, ids)).content == "x" * 100
        assert decoded == ids
