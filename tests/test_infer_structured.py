"""Structured output: what the engine writes under a limit fits it, and what would not be enforced is refused."""

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.data.chat import Message, ToolCall, template_for
from llmlab.data.tokenizer import Tokenizer, TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.request import Limit, Request, Sampling
from llmlab.infer.structured import StructureLimits, Structures
from llmlab.model.transformer import make_model
from tests.chat_families import FAMILIES, byte_level, made, of
from tests.helpers import random_params, tiny_llama

SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text())
EXTRA_LOGITS = 13


@functools.cache
def parts(slots: int = 4) -> tuple[Engine, Tokenizer, Structures]:
    """An engine with random weights, more logits than tokens, and a tokenizer that was trained on the schemas."""
    texts = [json.dumps(schema) + "\n" for schema in SCHEMAS.values()] * 4
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=400), texts)
    vocab = tokenizer.vocab_size + EXTRA_LOGITS
    model = make_model(tiny_llama(vocab_size=vocab, max_positions=224))
    engine = Engine(model, random_params(model), EngineConfig(slots=slots, page_size=32, prefill=8))
    return engine, tokenizer, Structures(tokenizer, vocab, stop_ids(tokenizer))


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tokenizer.control["<|end|>"], tokenizer.eos_id


def written(
    limits: Sequence[Limit], temperature: float = 2.0, max_tokens: int = 200, slots: int = 4
) -> list[tuple[list[int], str]]:
    """The tokens that each limit let pass, and how they ended."""
    engine, tokenizer, _ = parts(slots)
    numbers = []
    for seed, limit in enumerate(limits):
        sampling = Sampling(temperature=temperature, seed=seed)
        numbers += engine.submit(Request((tokenizer.bos_id,), max_tokens, sampling, stop_ids(tokenizer), limit=limit))
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    ends: dict[int, str] = {}
    while not engine.idle:
        for event in engine.step():
            tokens[event.number] += [event.token] if event.token is not None else []
            ends[event.number] = event.finish or ""
    return [(tokens[number], ends[number]) for number in numbers]


def text_of(tokens: Sequence[int]) -> str:
    _, tokenizer, _ = parts()
    return tokenizer.decode_bytes(tokens).decode()


def assert_fits(schema, tokens, end) -> bool:
    """Whether it came to its end, and then fits."""
    if end == "length":
        return False
    assert end == "stop", end
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(
        json.loads(text_of(tokens))
    )
    return True


def test_what_is_written_fits_its_schema():
    _, _, structures = parts()
    names = [*("any of", "one of", "patterns", "tuple", "tree"), *("map and names", "date", "person", "list", "enum")]
    schemas = [SCHEMAS[name] for name in names for _ in range(2)]
    done = written([structures.schema(schema) for schema in schemas])
    finished = [assert_fits(schema, *each) for schema, each in zip(schemas, done, strict=True)]
    assert sum(finished) >= 15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_samples_fit_forty_schemas():
    _, _, structures = parts()
    assert len(SCHEMAS) == 40
    finished = wrong = cut = seed = 0
    begin, reasons = time.monotonic(), []
    while finished < 2000:
        names = list(SCHEMAS) * 10
        limits = [structures.schema(SCHEMAS[name]) for name in names]
        for name, (tokens, end) in zip(names, written(limits, 2.0 + seed, slots=32), strict=True):
            try:
                fits = assert_fits(SCHEMAS[name], tokens, end)
            except Exception as error:
                wrong, fits = wrong + 1, True
                reasons.append(f"{name}: {text_of(tokens)!r}: {error}"[:300])
            finished, cut = finished + fits, cut + (not fits)
            assert fits or len(tokens) == 200
        seed += 1
    print(f"{finished} finished, {wrong} wrong, {cut} cut, {time.monotonic() - begin:.0f} s", *reasons, sep="\n")
    assert wrong <= finished / 1000, reasons[:5]


def test_regexes_and_grammars_hold_and_end_where_they_must():
    _, _, structures = parts()
    pattern = "(ab|c[0-9]{2}){1,3}!"
    lark = 'start: "(" sum ")"\nsum: NUMBER | NUMBER "+" sum\nNUMBER: /[0-9]{1,2}/'
    limits = [structures.regex(pattern).fresh() for _ in range(6)] + [structures.grammar(lark) for _ in range(6)]
    done = written(limits, max_tokens=80)
    for tokens, end in done[:6]:
        assert end == "stop"
        assert re.fullmatch(pattern, text_of(tokens))
    for tokens, end in done[6:]:
        assert end == "length" or re.fullmatch(r"\(\d\d?(\+\d\d?)*\)", text_of(tokens))
    assert any(end == "stop" for _, end in done[6:])


def allowed_ids(limit: Limit) -> set[int]:
    bits = np.unpackbits(limit.allowed().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_stop_ids_come_where_the_structure_may_end_and_markers_nowhere():
    _, tokenizer, structures = parts()
    stops = set(stop_ids(tokenizer))
    limit = structures.regex("aa?")
    a, aa = (
        [id for id in range(tokenizer.vocab_size) if tokenizer.decode_bytes([id]) == text] for text in (b"a", b"aa")
    )
    assert allowed_ids(limit) <= {*a, *aa}
    limit.accept(a[-1])
    assert allowed_ids(limit) - set(a) == stops
    limit.accept(a[-1])
    assert allowed_ids(limit) == stops
    anything = allowed_ids(structures.regex("(?s:.+)"))
    special = {*tokenizer.control.values(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id}
    assert not anything & special
    assert max(anything) < tokenizer.vocab_size
    assert len(anything) > 200


def test_a_grammar_cannot_name_a_marker():
    _, tokenizer, structures = parts()
    with pytest.raises(UserError, match="no token that it could begin with"):
        structures.grammar(f"start: <[{tokenizer.control['<|call|>']}]>")
    with pytest.raises(UserError, match="%json"):
        structures.grammar('start: %json {"type": "array", "uniqueItems": true, "x-guidance": {"lenient": true}}')


def test_a_limit_of_its_own_for_every_sample():
    engine, tokenizer, structures = parts()
    request = Request((tokenizer.bos_id,), 60, Sampling(temperature=3), stop_ids(tokenizer))
    limited = Request(**{**vars(request), "limit": structures.regex("[a-z]{3}[0-9]{3}")})
    events = {number: [] for number in engine.submit(limited, 5)}
    while not engine.idle:
        for event in engine.step():
            events[event.number].append(event)
    texts = [text_of([event.token for event in of]) for of in events.values()]
    assert all(re.fullmatch("[a-z]{3}[0-9]{3}", text) for text in texts)
    assert len(set(texts)) > 1


class Slow:
    """One token, known only after it was asked for a while; `asked` counts how often."""

    def __init__(self, patience: int):
        self.patience, self.asked = patience, 0

    def fresh(self):
        return Slow(self.patience)

    def ready(self, within):
        self.asked += 1
        return self.asked > self.patience

    def allowed(self):
        mask = np.zeros(-(-(parts()[1].vocab_size + EXTRA_LOGITS) // 32), np.uint32)
        mask[1] = 2
        return mask

    def accept(self, token):
        self.asked = 0


def test_a_slow_mask_holds_up_its_own_row_only():
    engine, tokenizer, _ = parts()
    (free,) = engine.submit(Request((tokenizer.bos_id,), 30, Sampling(seed=1)))
    (slow,) = engine.submit(Request((tokenizer.bos_id,), 4, Sampling(seed=1), limit=Slow(8)))
    events = []
    for _ in range(31):
        events += engine.step()
    assert [event.number for event in events].count(free) == 30
    assert 1 <= [event.number for event in events].count(slow) <= 3
    while not engine.idle:  # alone, it is waited for
        events += engine.step()
    assert [event.token for event in events if event.number == slow] == [33] * 4


REFUSED = {
    "'uniqueItems' cannot be enforced": {"type": "array", "uniqueItems": True},
    "#/properties/a in the schema: the keyword 'minlength' cannot be enforced: did you mean 'minLength'": {
        "properties": {"a": {"type": "string", "minlength": 3}}
    },
    "#/anyOf/1 in the schema: the keyword 'nullable'": {"anyOf": [True, {"type": "string", "nullable": True}]},
    "'x-guidance' cannot be enforced": {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True},
    "are not disjoint": {"patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}},
    "minProperties=2 cannot be enforced": {"type": "object", "minProperties": 2},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "#/minimum in the schema is 1e\\+19": {"type": "integer", "minimum": 1e19, "maximum": 2e19},
    "#/exclusiveMinimum in the schema should be a number": {"minimum": 1, "exclusiveMinimum": True},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "Unknown format": {"type": "string", "format": "json-pointer"},
    "retrieving it failed": {"$ref": "file:///etc/passwd"},
    "minimum .3. is greater": {"type": "integer", "minimum": 3, "maximum": 1},
    "should be an object": {"items": 3},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_not_be_enforced_is_refused(message):
    _, _, structures = parts()
    with pytest.raises(UserError, match=message) as caught:
        structures.schema(REFUSED[message])
    assert "\n" not in str(caught.value)


def test_a_name_has_one_spelling():
    """Another one, of which the schema says something else, would win where the JSON is read."""
    _, tokenizer, structures = parts()
    schema = {"properties": {"a\n": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    for text, fits in {
        '{"a\\n":1,"b":"c"}': True,
        '{"a\\n":"c"}': False,
        '{"a\\u000a":"c"}': False,
        '{"\\u0061\\n":"c"}': False,
    }.items():
        limit = structures.schema({**schema, "type": "object"})
        for id in tokenizer.encode(text):
            limit.accept(id)
        assert (tokenizer.eos_id in allowed_ids(limit)) == fits, text


REPEATED = "((a{1000}){1000}){1000}"  # whether it takes longer than it may is the machine's
HOSTILE = {
    "regex": ("(" * 9000, "a" * 40_000, "(?=a)"),
    "grammar": ("start: " + "(" * 9000, "start: start", "", "start: x"),
    "schema": (
        "{",
        '{"items":' * 3000 + "{}" + "}" * 3000,
        "[" * 100_000,
        {"type": "integer", "multipleOf": 999_983},
        {"patternProperties": {f"^p{i}_": {} for i in range(300)}},
        {"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}c"} for i in range(5, 25)]},
        {"enum": list(range(5000))},
        {"properties": {f"p{i}": {} for i in range(3000)}},
        {"$ref": "#"},
        {"const": float("nan")},
        {"const": "\ud800"},
        "\0",
        3,
    ),
}


@pytest.mark.slow
def test_bombs_are_refused_with_a_line_in_bounded_time_and_memory():
    _, tokenizer, _ = parts()
    limits = StructureLimits(seconds=1, megabytes=512)
    structures = Structures(tokenizer, tokenizer.vocab_size, stop_ids(tokenizer), limits)
    for kind, cases in HOSTILE.items():
        for case in cases:
            used, resident = os.times(), memory()
            with pytest.raises(UserError) as caught:
                getattr(structures, kind)(case)
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 300
            assert_bounded(used, resident)
    used, resident = os.times(), memory()
    with contextlib.suppress(UserError):
        structures.regex(REPEATED)
    assert_bounded(used, resident)


def assert_bounded(used: os.times_result, resident: float) -> None:
    """Processor time and memory since then."""
    assert sum(os.times()[:4]) - sum(used[:4]) < 4
    assert memory() - resident < 300


def memory() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def test_what_is_past_a_limit_later_on_is_no_end():
    _, tokenizer, _ = parts()
    limits = StructureLimits(states=120)
    structures = Structures(tokenizer, tokenizer.vocab_size, stop_ids(tokenizer), limits)
    limit = structures.regex("(a|b)*a(a|b){12}")
    (a,), (b,) = (tokenizer.encode(letter) for letter in "ab")
    beside = structures.regex("(a|b)*a(a|b){12}")
    for id in np.random.default_rng(0).choice([a, b], 400).tolist():
        if not allowed_ids(limit):
            break
        limit.accept(id)
    assert not allowed_ids(limit)
    for other in (beside, structures.regex("(a|b)*a(a|b){12}")):  # which are none the worse
        other.accept(a)
        assert allowed_ids(other)


def test_structured_output_asks_for_its_extra(monkeypatch):
    _, tokenizer, _ = parts()
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"llmlab\[serve\]"):
        Structures(tokenizer, 400, (2,))
    monkeypatch.undo()
    with pytest.raises(UserError, match="needs a stop id"):
        Structures(tokenizer, 400, ())


OFFERED = {
    "search": {"type": "object", "properties": {"q": {"enum": ["a", "é\n"]}}, "required": ["q"]}
    | {"additionalProperties": False},
    "f-2": {"type": "object", "properties": {}, "additionalProperties": False},
}


@pytest.mark.parametrize("name", ["own", "thinking", "opened", "bars", "objects", "listed"])
def test_a_forced_call_is_one_that_the_template_reads(name: str):
    """Whatever is drawn."""
    template, tokenizer = template_for(parts()[1]), parts()[1]
    if name != "own":
        pytest.importorskip("tokenizers", reason="the extra hf installs it")
        tokenizer, template = of(name)
    functions = [{"name": name, "description": "", "parameters": schema} for name, schema in OFFERED.items()]
    template = template.with_tools([{"type": "function", "function": function} for function in functions])
    prompt = template.render((Message("user", "x"),), generate=True).ids
    structures = Structures(tokenizer, tokenizer.vocab_size, template.stop_ids)
    random, named = np.random.default_rng(0), set()
    ends = template.call_form(prompt).thinking[:1]
    wanted = {id for end in ends for id in ([end] if isinstance(end, int) else [])}
    for _ in range(8):
        limit = structures.call(template.call_form(prompt), OFFERED)
        ids = []
        while not ids or ids[-1] not in template.stop_ids:
            allowed = np.flatnonzero(np.unpackbits(limit.allowed().view(np.uint8), bitorder="little"))
            likely = [id for id in allowed if id in wanted]  # else thinking would go on for ever
            ids.append(int(random.choice(likely if len(ids) > 5 and likely else allowed)))
            limit.accept(ids[-1])
        said = template.parse(ids, prompt)
        (call,) = said.calls
        jsonschema.validate(json.loads(call.arguments), OFFERED[call.name])
        assert said.content == ""
        named.add(call.name)
    assert named == {*OFFERED}


def test_a_forced_call_comes_after_thinking_that_is_plain_text():
    """Followed along what a model says, as drawing would hardly end it."""
    pytest.importorskip("tokenizers", reason="the extra hf installs it")
    plain = lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # noqa: E731
    tokenizer, template = made(FAMILIES["opened"], tokenizer=plain)
    prompt = template.render((Message("user", "x"),), generate=True).ids
    form = template.call_form(prompt)
    limit = Structures(tokenizer, tokenizer.vocab_size, template.stop_ids).call(form, OFFERED)
    text = 'I </thin\n</think>\n\n<tool_call>\n{"name": "f-2", "arguments": {}}\n</tool_call>'
    for id in (ids := [*tokenizer.encode(text), template.stop_ids[0]]):
        assert limit.allowed()[id // 32] >> id % 32 & 1, tokenizer.decode([id])
        limit.accept(id)
    assert template.parse(ids, prompt) == Message("assistant", "", "I </thin", (ToolCall("f-2", "{}"),))


def test_a_forced_call_may_be_given_a_line_of_text():
    _, tokenizer, structures = parts()
    template, control = template_for(tokenizer), tokenizer.control
    limit = structures.call(template.call_form(()), {"calculator": None})
    ids = [control["<|call|>"], *tokenizer.encode("calculator 1 + 1"), control["<|/call|>"], control["<|end|>"]]
    for id in ids:
        assert limit.allowed()[id // 32] >> id % 32 & 1
        if id != ids[-1]:
            assert not limit.allowed()[ids[-1] // 32] >> ids[-1] % 32 & 1
        limit.accept(id)
    assert template.parse(ids).calls == (ToolCall("calculator", "1 + 1"),)


def test_a_call_that_could_not_be_forced_is_refused():
    _, tokenizer, structures = parts()
    form = template_for(tokenizer).call_form(())
    with pytest.raises(UserError, match="a call of 'a\"b' cannot be enforced: name it with letters"):
        structures.call(form, {'a"b': {}})
    with pytest.raises(UserError, match="cannot be enforced"):
        structures.call(form, {"f": {"not": {}}})
