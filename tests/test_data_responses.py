"""Conversations and groups of answers, from examples to batches: nothing is cut, lost or judged with another's."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llmlab.core.errors import UserError
from llmlab.data import text
from llmlab.data.chat import Example, Message, Response, Step, template_for
from llmlab.data.packing import group_places, pack_responses
from llmlab.data.pipeline import GroupBatch, TextSource, by_document, evaluation_batches, statistics
from llmlab.data.store import STEP, StoreWriter, TokenStore
from llmlab.data.tokenise import encode_examples
from llmlab.data.tokenizer import CHAT_MARKERS
from llmlab.data.tokenizer_character import CharacterTokenizer

TOKENIZER = CharacterTokenizer("".join(map(chr, range(32, 127))), CHAT_MARKERS)
TEMPLATE = template_for(TOKENIZER)
CHAT = text(source="jsonl", files="x", rows="chat", sequence_length=24, batch_size=2)
PAIRS = dataclasses.replace(CHAT, rows="preference", sequence_length=40)


def said(question, answer, **fields):
    return (Message("user", question), Message("assistant", answer, **fields))


def pair(question, chosen, rejected, margin=0.0):
    return Example((Response(said(question, chosen), margin), Response(said(question, rejected))))


def make_store(path, examples):
    writer = StoreWriter(path, np.dtype("<u2"), judged=True)
    (path / "tokenizer.model").touch()
    writer.append(encode_examples(TEMPLATE, TOKENIZER.eos_id, [example.dumps() for example in examples]))
    writer.finish()
    writer.close()
    return TokenStore.open(path)


def ids_of(conversation):
    return TEMPLATE.render(conversation).ids


def segments(batch):
    """Every segment of a batch: (row, number, tokens, targets, mask)."""
    for row, ids in enumerate(np.asarray(batch.segment_ids_BT)):
        for number in sorted(set(ids.tolist()) - {0}):
            at = ids == number
            assert np.all(np.diff(np.flatnonzero(at)) == 1), "a segment is in one piece"
            np.testing.assert_array_equal(np.asarray(batch.positions_BT)[row][at], np.arange(at.sum()))
            yield (
                row,
                number,
                *(np.asarray(x)[row][at].tolist() for x in (batch.tokens_BT, batch.targets_BT, batch.mask_BT)),
            )


def test_every_token_of_a_conversation_is_read_and_the_answer_is_learned_with_its_end(tmp_path):
    conversation = said("2+2?", "4")
    store = make_store(tmp_path, [Example((Response(conversation),))])
    (batch,) = evaluation_batches(CHAT, [(store, 1.0)])
    ((_, number, tokens, targets, mask),) = segments(batch)
    assert (number, tokens) == (1, ids_of(conversation))
    assert targets == [*tokens[1:], TOKENIZER.eos_id]
    learned = [target for target, counts in zip(targets, mask, strict=True) if counts]
    assert learned == [*TOKENIZER.encode("4"), TOKENIZER.control["<|end|>"]]


def test_a_conversation_that_is_too_long_loses_its_end_or_is_left_out(tmp_path):
    fits, cut, lost = said("a", "b"), said("a", "b" * 40), said("a" * 40, "b")
    store = make_store(tmp_path, [Example((Response(each),)) for each in (fits, cut, fits, lost)])
    (batch,) = evaluation_batches(CHAT, [(store, 1.0)])
    found = sorted((tokens for _, _, tokens, _, _ in segments(batch)), key=len)
    assert found == [ids_of(fits), ids_of(fits), ids_of(cut)[: CHAT.sequence_length]]
    line = statistics(CHAT, [(store, 1.0)])
    assert "4 conversations" in line
    assert "1 lose their end" in line
    assert "1 are left out: no answer to learn is within data.sequence_length=24 tokens" in line


def test_most_answers_out_of_reach_is_an_error(tmp_path):
    store = make_store(tmp_path, [Example((Response(said("a" * 40, "b")),)) for _ in range(3)])
    with pytest.raises(UserError, match=r"3 of 3 conversations would be left out.*the longest has 46.*raise"):
        statistics(CHAT, [(store, 1.0)])


def test_the_ends_of_steps_are_marked_with_how_right_they_are(tmp_path):
    steps = (Step("1+1=2 ", 1.0), Step("2+2=5", 0.0), Step("!", 0.5))
    conversation = (Message("user", "?"), Message("assistant", "".join(s.text for s in steps), steps=steps))
    store = make_store(tmp_path, [Example((Response(conversation),))])
    (batch,) = evaluation_batches(dataclasses.replace(PAIRS, rows="steps"), [(store, 1.0)])
    marks_T = np.asarray(batch.marks_BT)[0]
    (places,) = np.nonzero(marks_T >= STEP)
    read = [TOKENIZER.decode([id]) for id in np.asarray(batch.tokens_BT)[0][places].tolist()]
    assert read == [" ", "5", "!"]
    np.testing.assert_allclose((marks_T[places] - STEP) / (255 - STEP), [1, 0, 0.5], atol=0.002)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=20), st.booleans())
def test_groups_are_packed_whole(tmp_path_factory, groups, packed):
    examples = [
        Example(tuple(Response(said("q", "a" * size), 0.25 * r + g) for r, size in enumerate(sizes)))
        for g, sizes in enumerate(groups)
    ]
    store = make_store(tmp_path_factory.mktemp("store"), examples)
    T, packing = 40, "best_fit" if packed else "none"
    config = dataclasses.replace(PAIRS, rows="ranking", packing=packing, sequence_length=T)
    fit = [sum(6 + size for size in sizes) <= T for sizes in groups]
    index = pack_responses(store, packing, T, whole=True)
    assert index.left_out == fit.count(False)
    if not any(fit):
        return
    reference = np.arange(len(store), dtype=np.float32) - 0.5
    batches = list(evaluation_batches(config, [(store, 1.0)], references=[reference]))
    seen = []
    for batch in batches:
        _, _, R = batch.present_BPR.shape
        expected = np.zeros(batch.present_BPR.shape)
        for row, number, tokens, _, _ in segments(batch):
            p, r = divmod(number - 1, R)
            g = int(batch.value_BPR[row, p, 0])
            assert tokens == ids_of(examples[g].responses[r].conversation)
            assert batch.value_BPR[row, p, r] == 0.25 * r + g
            document = sum(map(len, groups[:g])) + r
            assert batch.reference_BPR[row, p, r] == reference[document]
            expected[row, p, r] = 1
            seen.append(document)
        np.testing.assert_array_equal(batch.present_BPR, expected)
        assert not np.any(np.where(expected, 0, batch.value_BPR))
    documents = np.split(np.arange(len(store)), np.cumsum([len(sizes) for sizes in groups])[:-1])
    assert sorted(seen) == [d for group, fits in zip(documents, fit, strict=True) if fits for d in group.tolist()]
    if not packed:
        assert len(index) == sum(fit)


def test_a_number_for_each_document_comes_back_to_it(tmp_path):
    examples = [pair("q", "a" * (i % 9), "b" * (i % 5)) for i in range(23)] + [pair("q" * 30, "a", "b")]
    store = make_store(tmp_path, examples)

    def answers_length(batch: GroupBatch) -> np.ndarray:
        out = np.full(batch.present_BPR.shape, -1.0)
        for row, number, _, _, mask in segments(batch):
            out[(row, *divmod(number - 1, 2))] = sum(mask)
        return out

    found = by_document(PAIRS, store, answers_length)
    expected = [1 + size for i in range(23) for size in (i % 9, i % 5)] + [np.nan] * 2
    np.testing.assert_array_equal(found, expected)


def test_a_mesh_holds_the_same_groups(tmp_path):
    store = make_store(tmp_path, [pair("q", "a" * (i % 9), "b" * (i % 5), margin=i) for i in range(30)])
    config = dataclasses.replace(PAIRS, batch_size=8)
    mesh = jax.make_mesh((4, 2), ("data", "time"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "time"))
    plain = TextSource(config, [(store, 1.0)], seed=3)
    spread = TextSource(config, [(store, 1.0)], seed=3, sharding=sharding)
    for step in range(2):
        mine, theirs = (each.next(step)._asdict() for each in (plain, spread))
        assert mine.pop("baseline_B") is theirs.pop("baseline_B") is None, "an objective fills it in"
        for (name, a), b in zip(mine.items(), theirs.values(), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert len(b.sharding.device_set) == 8
    plain.close()
    spread.close()


def test_a_mixture_of_groups_has_one_shape(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    small = make_store(tmp_path / "a", [pair("q", "a", "b", margin=1.0)] * 8)
    large = make_store(tmp_path / "b", [pair("q", "a" * 9, "b" * 9, margin=2.0)] * 8)
    parts = [(small, 1.0), (large, 1.0)]
    batches = list(evaluation_batches(PAIRS, parts))
    assert len({batch.present_BPR.shape for batch in batches}) == 1
    assert sum(float(np.sum(batch.value_BPR)) for batch in batches) == 8 * 1.0 + 8 * 2.0
    assert sum(float(np.sum(batch.present_BPR)) for batch in batches) == 2 * 16


def test_short_conversations_fill_long_rows(tmp_path):
    sizes = np.random.default_rng(0).integers(10, 600, 3000)
    store = make_store(tmp_path, [Example((Response(said("q", "a" * int(size))),)) for size in sizes])
    index = pack_responses(store, "best_fit", 4096, whole=False)
    assert index.pieces[:, 2].sum() >= 0.995 * 4096 * len(index)
    places = group_places(store, index, np.arange(len(index)))
    assert sorted(places.document.tolist()) == list(range(3000))
