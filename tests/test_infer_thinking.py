"""Budgets of thinking: spans as long as they are to be, of text alone, and answers that begin after them."""

import functools
import json
import re
from collections.abc import Sequence

import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.data.chat import ChatTemplate, Message, template_for
from llmlab.data.tokenizer import Tokenizer, TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.request import Limit, Request, Sampling
from llmlab.infer.spoken import markers_of
from llmlab.infer.structured import Structures
from llmlab.infer.thinking import Thinking, thinking_markers
from llmlab.model.transformer import make_model
from tests import chat_families
from tests.helpers import random_params, tiny_llama

EXTRA_LOGITS = 13
HELLO = (Message("user", "hello"),)
SCHEMA = {"type": "object", "properties": {"size": {"enum": [1, 22]}}, "required": ["size"]}


@functools.cache
def parts(family: str) -> tuple[Engine, Tokenizer, ChatTemplate, Thinking]:
    """An engine with random weights, more logits than tokens, for our own template or one that is published."""
    if family == "ours":
        texts = ["the quick brown fox\n", '{"size": 22}\n'] * 40
        tokenizer: Tokenizer = train_tokenizer(TokenizerConfig(vocab_size=320), texts)
        template = template_for(tokenizer)
    else:
        tokenizer, template = chat_families.of(family)
    vocab = tokenizer.vocab_size + EXTRA_LOGITS
    model = make_model(tiny_llama(vocab_size=vocab, max_positions=224, layers=1))
    engine = Engine(model, random_params(model), EngineConfig(slots=4, page_size=32, prefill=32))
    return engine, tokenizer, template, Thinking(tokenizer, vocab, template.stop_ids)


def prompt_of(family: str) -> tuple[int, ...]:
    return tuple(parts(family)[2].render(HELLO, generate=True).ids)


def written(
    family: str, limits: Sequence[Limit | None], temperature: float, n: int = 4, max_tokens: int = 50
) -> list[list[list[int]]]:
    """For each limit, `n` turns of a model that likes to begin and to end its thinking, where these are drawn."""
    engine, _, template, thinking = parts(family)
    likes = {thinking.begin: 5.0, thinking.end: 5.0} if temperature else {}
    sampling, tokens = Sampling(temperature=temperature, seed=3, bias=likes), dict[int, list[int]]()
    for limit in limits:
        request = Request(prompt_of(family), max_tokens, sampling, template.stop_ids, limit=limit)
        tokens |= {number: [] for number in engine.submit(request, n)}
    while not engine.idle:
        for event in engine.step():
            tokens[event.number] += [event.token] if event.token is not None else []
    turns = list(tokens.values())
    return [turns[begin : begin + n] for begin in range(0, len(turns), n)]


def span(family: str, ids: list[int]) -> tuple[list[int], list[int]]:
    """What was thought, and what follows; where a span begins, there is no text before it and none after it."""
    _, _, _, thinking = parts(family)
    opened = family == "opened"
    if not opened and ids[0] != thinking.begin:
        assert not {thinking.begin, thinking.end} & set(ids)
        return [], ids
    rest = ids if opened else ids[1:]
    end = rest.index(thinking.end)
    assert not {thinking.begin, thinking.end} & set(rest[end + 1 :])
    return rest[:end], rest[end + 1 :]


BUDGETS = ((0, 0), (0, 5), (3, 9), (12, 12), (4, None), (1, 30))


@pytest.mark.parametrize("family", ["ours", "thinking", "opened"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_spans_have_the_lengths_that_were_asked_for(family, temperature):
    _, tokenizer, template, thinking = parts(family)
    limits = [thinking.budget(prompt_of(family), least, most) for least, most in BUDGETS]
    turns, lengths = written(family, limits, temperature, n=4 if temperature else 1), set()
    for (least, most), each in zip(BUDGETS, turns, strict=True):
        for ids in each:
            if most is None and thinking.end not in ids:
                assert len(ids) == 50  # it was still at it
                continue
            thought, answer = span(family, ids)
            assert least <= len(thought) <= (50 if most is None else most)
            assert all(tokenizer.decode_bytes([id]) for id in thought)
            assert not set(thought) & (markers_of(tokenizer) | set(template.stop_ids))
            said = template.parse(ids, prompt_of(family))
            assert said.thinking.strip("\n") == tokenizer.decode(thought).strip("\n")
            assert said.content == template.parse([*answer, template.stop_ids[0]], []).content
            lengths.add(len(thought))
    assert len(lengths) > 4 or not temperature


def test_without_a_budget_the_same_model_writes_markers_anywhere():
    """What the test above forbids does come."""
    ((*turns,),) = written("ours", [None], 2.0)
    thinking = parts("ours")[3]
    assert any(ids.index(thinking.begin) > 0 for ids in turns if thinking.begin in ids)


def test_every_sample_has_a_budget_of_its_own():
    limit = parts("ours")[3].budget(prompt_of("ours"), 2, 20)
    (turns,) = written("ours", [limit], 2.0, n=8)
    lengths = {len(span("ours", ids)[0]) for ids in turns}
    assert len(lengths) > 2
    assert max(lengths) <= 20


@pytest.mark.parametrize("family", ["ours", "thinking", "opened"])
def test_what_follows_the_thinking_has_its_form(family):
    _, tokenizer, template, thinking = parts(family)
    structures = Structures(tokenizer, tokenizer.vocab_size + EXTRA_LOGITS, template.stop_ids)
    budgets = (5, 10), (0, 6), (0, 0)
    limits = [thinking.budget(prompt_of(family), *budget, structures.schema(SCHEMA)) for budget in budgets]
    for (least, most), turns in zip(budgets, written(family, limits, 2.0, max_tokens=100), strict=True):
        ended = 0
        for ids in turns:
            thought, answer = span(family, ids)
            assert least <= len(thought) <= most
            if answer[-1] in template.stop_ids:
                ended += 1
                assert json.loads(tokenizer.decode(answer[:-1]))["size"] in (1, 22)
                assert json.loads(template.parse(ids).content)["size"] in (1, 22)
        assert ended


def allowed_ids(limit: Limit) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(limit.allowed().view(np.uint8), bitorder="little")).tolist())


def test_what_may_come_step_by_step():
    _, tokenizer, _, thinking = parts("ours")
    (a,) = tokenizer.encode("a")
    everything = set(range(tokenizer.vocab_size + EXTRA_LOGITS))
    markers = {thinking.begin, thinking.end}
    limit = thinking.budget(prompt_of("ours"), 1, 2)
    text = {id for id in everything if id < tokenizer.vocab_size and tokenizer.decode_bytes([id])} - {tokenizer.unk_id}
    for token, may in ((thinking.begin, {thinking.begin}), (a, text), (a, text | {thinking.end})):
        assert allowed_ids(limit) == may
        limit.accept(token)
    assert allowed_ids(limit) == {thinking.end}
    limit.accept(thinking.end)
    assert allowed_ids(limit) == everything - markers
    limit.accept(a)
    assert allowed_ids(limit) == everything - markers
    assert allowed_ids(limit.fresh()) == {thinking.begin}
    free = thinking.budget(prompt_of("ours"), 0, 3)
    assert allowed_ids(free) == everything - {thinking.end}
    free.accept(a)
    assert allowed_ids(free) == everything - markers
    assert allowed_ids(thinking.budget(prompt_of("ours"), 0, 0)) == everything - markers


def test_thinking_that_the_prompt_has_begun_goes_on():
    _, tokenizer, _, thinking = parts("opened")
    assert tokenizer.decode(prompt_of("opened")).endswith("<think>\n")
    assert allowed_ids(thinking.budget(prompt_of("opened"), 0, 0)) == {thinking.end}
    assert thinking.end not in allowed_ids(thinking.budget(prompt_of("opened"), 1))
    earlier = (*HELLO, Message("assistant", "hi", thinking="so"), *HELLO)
    closed = parts("thinking")[2].render(earlier, generate=True).ids
    assert allowed_ids(parts("thinking")[3].budget(closed, 1)) == {parts("thinking")[3].begin}


def test_markers_are_those_of_the_tokenizer():
    ours, published = parts("ours")[1], parts("thinking")[1]
    assert thinking_markers(ours) == (ours.control["<|think|>"], ours.control["<|/think|>"])
    assert [published.decode_bytes([id]) for id in thinking_markers(published)] == [b"<think>", b"</think>"]
    plain = train_tokenizer(TokenizerConfig(vocab_size=300, chat_markers=False), ["the quick brown fox\n"] * 40)
    with pytest.raises(UserError, match="leave the budget out"):
        Thinking(plain, 300, (plain.eos_id,))
    with pytest.raises(UserError, match="leave the budget out"):
        thinking_markers(chat_families.of("chatml")[0])


@pytest.mark.parametrize("least, most", [(-1, 3), (4, 3)])
def test_bounds_that_are_none(least, most):
    with pytest.raises(UserError, match=re.escape(f"from {least} to {most}")):
        parts("ours")[3].budget((1,), least, most)
