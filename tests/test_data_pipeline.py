"""Batches depend on the seed and the step alone: not on what was asked before, nor on devices, hosts or threads."""

import collections
import dataclasses
import errno
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llmlab.core.errors import UserError
from llmlab.data import pipeline, text
from llmlab.data.pipeline import TextSource, evaluation_batches, evaluation_rows
from llmlab.data.store import Encoded, StoreWriter, TokenStore

T, B = 8, 4
CONFIG = text(sequence_length=T, batch_size=B)


def make_store(path, documents):
    writer = StoreWriter(path, np.dtype("<u2"))
    (path / "tokenizer.model").touch()
    lengths = np.array([len(d) for d in documents])
    writer.append(Encoded(np.concatenate(documents).astype(np.uint32), lengths, lengths))
    writer.finish(fingerprint="f")
    writer.close()
    return TokenStore.open(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of unlike lengths in which every token is unlike: id 0 is left for padding."""
    lengths = np.random.default_rng(0).integers(2, 30, 60)
    tokens = np.split(np.arange(1, 1 + lengths.sum()), np.cumsum(lengths)[:-1])
    return make_store(tmp_path_factory.mktemp("store"), tokens)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("other"), [np.full(T + 1, 50_000 + i) for i in range(20)])


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def source(store, config=CONFIG, seed=0, **kwargs):
    return TextSource(config, [(store, 1.0)], seed=seed, **kwargs)


def row(text_source, number):
    """Row `number` of the endless stream, as arrays [1, T]."""
    batch = text_source.host_batch(number // B)
    return type(batch)(*(array[number % B : number % B + 1] for array in batch))


def all_targets(store):
    return sorted(t for i in range(len(store)) for t in store.document(i)[1:].tolist())


def targets(rows):
    return np.asarray(rows.targets_BT)[np.asarray(rows.mask_BT) == 1].tolist()


def test_any_step_can_be_asked_for_at_any_time(store):
    one, two = source(store), source(store)
    in_order = [one.next(step) for step in range(12)]
    for step in (7, 8, 2, 11, 0, 1):
        assert equal(two.next(step), in_order[step])
        assert equal(two.host_batch(step), in_order[step])
    one.close()
    two.close()


def test_every_epoch_predicts_everything_once_in_another_order(store):
    text_source = source(store)
    epochs = [[row(text_source, e * text_source.rows + r) for r in range(text_source.rows)] for e in range(2)]
    for epoch in epochs:
        assert sorted(t for row in epoch for t in targets(row)) == all_targets(store)
    assert not all(equal(a, b) for a, b in zip(*epochs, strict=True))


def test_seeds_give_orders_of_their_own(store):
    """grain reshuffles epoch e of seed s like epoch 0 of seed s + e; ours must not."""
    zero, one = source(store, seed=0), source(store, seed=1)
    n = zero.rows
    assert not all(equal(row(zero, r), row(one, r)) for r in range(n))
    assert not all(equal(row(zero, n + r), row(one, r)) for r in range(n))


def test_unshuffled_text_comes_in_its_order(store):
    for packing in ("best_fit", "chunk"):
        text_source = source(store, dataclasses.replace(CONFIG, shuffle=False, packing=packing))
        rows = [row(text_source, r) for r in range(text_source.rows)]
        firsts = [row.tokens_BT[0, 0] for row in rows]
        assert firsts == sorted(firsts)
        assert equal(row(text_source, text_source.rows), rows[0])


def test_a_mixture_keeps_its_weights_and_repeats_each_part_whole(store, other):
    text_source = TextSource(CONFIG, [(store, 3.0), (other, 1.0)], seed=0)
    rows = [row(text_source, r) for r in range(240)]
    from_other = [int(row.tokens_BT[0, 0]) for row in rows if row.tokens_BT[0, 0] >= 50_000]
    assert 58 <= len(from_other) <= 62
    assert set(collections.Counter(from_other[:20]).values()) == {1}  # an epoch of its own
    windows = [sum(row.tokens_BT[0, 0] >= 50_000 for row in rows[i : i + 8]) for i in range(0, 240, 8)]
    assert set(windows) <= {1, 2, 3}
    batch = text_source.host_batch(1)
    assert equal(batch, [np.concatenate(a) for a in zip(*(rows[B : 2 * B]), strict=True)])


def mesh_sharding(shape, spec):
    devices = int(np.prod(list(shape.values())))
    mesh = jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize(
    "shape,spec",
    [
        ({"data": 1}, ("data",)),
        ({"data": 4}, ("data",)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (("data", "fsdp"), None)),
        ({"data": 2, "sequence": 4}, ("data", "sequence")),
        ({"data": 8}, (None, "data")),
    ],
)
def test_every_mesh_gets_the_same_batch(store, shape, spec):
    sharding = mesh_sharding(shape, spec)
    placed = source(store, sharding=sharding)
    for step in (0, 5):
        batch = placed.next(step)
        assert equal(batch, source(store).host_batch(step))
        assert all(array.sharding == sharding for array in batch)
    placed.close()


class OneHost:
    """A sharding over data 2 × sequence 2 as one of two hosts sees it: it holds some of the batch's rows."""

    def __init__(self, rows):
        self._rows = rows

    def addressable_devices_indices_map(self, shape):
        return {time: (self._rows, slice(time * T // 2, (time + 1) * T // 2)) for time in range(2)}


def test_hosts_read_only_their_rows_and_together_the_whole_batch(store):
    hosts = [source(store, sharding=OneHost(slice(0, 3))), source(store, sharding=OneHost(slice(3, None)))]
    parts = [host.host_batch(4) for host in hosts]
    assert [len(part.tokens_BT) for part in parts] == [3, 1]
    whole = source(store).host_batch(4)
    assert equal(whole, [np.concatenate(each) for each in zip(*parts, strict=True)])


@pytest.mark.parametrize("packing", ["best_fit", "chunk"])
def test_evaluation_sees_every_target_once_and_pads_the_end(store, other, packing):
    config = dataclasses.replace(CONFIG, packing=packing, batch_size=11)
    batches = list(evaluation_batches(config, [(store, 1.0), (other, 9.0)]))
    assert {batch.tokens_BT.shape for batch in batches} == {(11, T)}
    seen = [t for batch in batches for t in targets(batch)]
    if packing == "chunk":
        assert sorted(seen) == sorted([*store.tokens[1:].tolist(), *other.tokens[1:].tolist()])
    else:
        assert sorted(seen) == sorted(all_targets(store) + all_targets(other))
    assert evaluation_rows(config, [(store, 1.0), (other, 9.0)]) == sum(
        int((np.asarray(batch.mask_BT).sum(axis=1) > 0).sum()) for batch in batches
    )
    padding = np.asarray(batches[-1].mask_BT).sum(axis=1) == 0
    assert 0 < padding.sum() < 11
    assert all(not np.asarray(array)[padding].any() for array in batches[-1])


def test_the_first_evaluation_batches_are_a_fair_sample_and_always_the_same(tmp_path):
    """What comes last in the text is in the first quarter as often as what comes first."""
    tokens = make_store(tmp_path, [np.full(T + 1, 1 + i) for i in range(400)])
    config = dataclasses.replace(CONFIG, batch_size=10)
    batches = functools.partial(evaluation_batches, config, [(tokens, 1.0)])
    quarter = [[batch for _, batch in zip(range(10), batches(), strict=False)] for _ in range(2)]
    assert all(equal(*pair) for pair in zip(*quarter, strict=True))
    firsts = np.concatenate([np.asarray(batch.tokens_BT)[:, 0] for batch in quarter[0]])
    quarters = np.histogram(firsts, bins=4, range=(1, 401))[0]
    assert quarters.sum() == 100
    assert quarters.min() >= 12  # of 25; four standard deviations of a fair draw


def test_evaluating_again_reads_the_pack_index_no_more(other, monkeypatch):
    opened = []
    real = pipeline.pack_index
    monkeypatch.setattr(pipeline, "pack_index", lambda *args: opened.append(args) or real(*args))
    config = dataclasses.replace(CONFIG, sequence_length=5)
    batches = functools.partial(evaluation_batches, config, [(other, 1.0)])
    first, second = list(batches()), list(batches())
    assert len(opened) == 1
    assert all(equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_cache_that_may_only_be_read_serves_too(tmp_path, monkeypatch, number):
    tokens = make_store(tmp_path, [np.arange(1, 30)])

    def refuse(*_):
        raise OSError(number, "may not write")

    monkeypatch.setattr("llmlab.data.store.write_atomic", refuse)
    (batch,) = evaluation_batches(CONFIG, [(tokens, 1.0)])
    assert sorted(targets(batch)) == list(range(2, 30))
    assert not list(tmp_path.glob("pack_*"))


def test_evaluation_on_a_mesh_is_the_same(store):
    config = dataclasses.replace(CONFIG, batch_size=8)
    sharding = mesh_sharding({"data": 8}, ("data",))
    pairs = zip(
        evaluation_batches(config, [(store, 1.0)]),
        evaluation_batches(config, [(store, 1.0)], sharding=sharding),
        strict=True,
    )
    assert all(equal(*pair) for pair in pairs)


def test_too_little_text_names_both_numbers(other):
    config = dataclasses.replace(CONFIG, batch_size=32)
    with pytest.raises(
        UserError, match=r"20 rows of data\.sequence_length=8, fewer than data\.batch_size=32: give more"
    ):
        source(other, config)
    assert len(list(evaluation_batches(config, [(other, 1.0)]))) == 1


def test_dtypes_and_shapes(store):
    batch = source(store).next(0)
    assert [(a.shape, a.dtype.name) for a in batch] == [
        ((B, T), name) for name in ("int32", "int32", "float32", "int32", "int32")
    ]


def test_a_failure_while_reading_ahead_reaches_the_caller(store, monkeypatch):
    text_source = source(store)
    real = text_source.host_batch
    failing = [3]
    monkeypatch.setattr(text_source, "host_batch", lambda step: 1 / (step not in failing) and real(step))
    for step in range(3):
        text_source.next(step)
    with pytest.raises(ZeroDivisionError):
        text_source.next(3)
    failing.clear()
    assert equal(text_source.next(3), real(3))  # and not what had been got ready for step 4
    text_source.close()


class Counted:
    """Stands for something that is indexed, and notes with what."""

    def __init__(self, real):
        self._real, self.asked = real, []

    def __getitem__(self, index):
        self.asked.append(index)
        return self._real[index]

    def __len__(self):
        return len(self._real)


def test_a_host_draws_only_the_numbers_of_its_own_rows(store):
    text_source = source(store, sharding=OneHost(slice(1, 3)))
    text_source._order = Counted(text_source._order)
    text_source.host_batch(5)
    assert text_source._order.asked == [5 * B + 1, 5 * B + 2]


def test_a_batch_is_read_in_two_gathers_however_many_documents_it_holds(tmp_path):
    """A read for each document would take longer than a small model's step."""
    lengths = np.random.default_rng(0).integers(20, 300, 300)
    many = make_store(tmp_path, [np.ones(n, int) for n in lengths])
    text_source = source(many, dataclasses.replace(CONFIG, sequence_length=256, batch_size=16))
    many.tokens = Counted(many.tokens)
    text_source.host_batch(3)
    assert [len(index) for index in many.tokens.asked] == [16 * 256] * 2
