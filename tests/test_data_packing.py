"""Every token is predicted once, no row overflows, and rows are assembled as written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.data import packing
from llmlab.data.packing import assemble, pack, pack_index
from llmlab.data.store import Encoded, StoreWriter, TokenStore

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def fake_store(documents):
    """Only what `assemble` reads."""
    offsets = np.cumsum([0, *map(len, documents)])
    return SimpleNamespace(tokens=np.concatenate(documents).astype(np.uint16), offsets=offsets, judged=None)


def pieces_of(index):
    return [
        [tuple(piece) for piece in index.pieces[a:b].tolist()]
        for a, b in zip(index.row_offsets[:-1], index.row_offsets[1:], strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_best_fit_predicts_each_token_once_and_keeps_within_rows(lengths, T):
    rows = pieces_of(pack(np.array(lengths), "best_fit", T))
    assert all(row and sum(length for *_, length in row) <= T for row in rows)
    predicted = [(document, start + i + 1) for row in rows for document, start, n in row for i in range(n)]
    wanted = [(document, i) for document, n in enumerate(lengths) for i in range(1, n)]
    assert sorted(predicted) == wanted
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)  # rows come as their first piece does


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_best_fit_is_best_fit_decreasing(lengths, T):
    """The bulk algorithm opens as many rows as the textbook one, which places piece by piece."""
    sizes = sorted((min(T, n - 1 - k) for n in lengths for k in range(0, n - 1, T)), reverse=True)
    rooms: list[int] = []
    for size in sizes:
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else T) - size)
    rows = pieces_of(pack(np.array(lengths), "best_fit", T))
    assert sorted(T - sum(n for *_, n in row) for row in rows) == sorted(rooms)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_chunk_runs_through_everything(lengths, T):
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    stream = np.concatenate(documents)
    index = pack(np.array(lengths), "chunk", T)
    rows = assemble(fake_store(documents), index, np.arange(len(index)), T)
    real = rows.mask_BT.ravel() == 1
    np.testing.assert_array_equal(rows.tokens_BT.ravel()[real], stream[:-1])
    np.testing.assert_array_equal(rows.targets_BT.ravel()[real], stream[1:])
    assert (rows.segment_ids_BT.ravel()[real] == 1).all()
    np.testing.assert_array_equal(rows.positions_BT.ravel()[real], np.arange(len(stream) - 1) % T)
    assert real[: len(stream) - 1].all()  # only the end of the last row is empty


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.randoms(use_true_random=False))
def test_rows_are_assembled_as_by_hand(lengths, T, random):
    documents = [np.array([random.randrange(1, 60_000) for _ in range(n)]) for n in lengths]
    index = pack(np.array(lengths), "best_fit", T)
    wanted = [random.randrange(len(index)) for _ in range(5)]
    rows = assemble(fake_store(documents), index, np.array(wanted), T)
    for i, row in enumerate(wanted):
        expected = np.zeros((5, T))
        place = 0
        for segment, (document, start, n) in enumerate(pieces_of(index)[row], start=1):
            for k in range(n):
                tokens = documents[document]
                expected[:, place] = tokens[start + k], tokens[start + k + 1], 1, k, segment
                place += 1
        np.testing.assert_array_equal(np.stack([array[i] for array in rows]), expected)


def test_a_small_example_in_full():
    store = fake_store([np.array([1, 10, 11, 12, 13, 14, 2]), np.array([1, 20, 2])])
    index = pack(np.array([7, 3]), "best_fit", 4)
    rows = assemble(store, index, np.arange(len(index)), 4)
    assert rows.tokens_BT.tolist() == [[1, 10, 11, 12], [13, 14, 1, 20]]
    assert rows.targets_BT.tolist() == [[10, 11, 12, 13], [14, 2, 20, 2]]
    assert rows.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert rows.segment_ids_BT.tolist() == [[1, 1, 1, 1], [1, 1, 2, 2]]
    assert rows.mask_BT.tolist() == [[1] * 4, [1] * 4]
    assert [array.dtype for array in rows] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_text_shorter_than_a_row_is_padded():
    rows = assemble(fake_store([np.array([1, 7, 2])]), pack(np.array([3]), "best_fit", 6), np.array([0]), 6)
    assert rows.targets_BT.tolist() == [[7, 2, 0, 0, 0, 0]]
    assert rows.tokens_BT.tolist() == [[1, 7, 0, 0, 0, 0]]
    assert rows.mask_BT.tolist() == [[1, 1, 0, 0, 0, 0]]
    assert rows.segment_ids_BT.tolist() == [[1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("T", [256, 2048])
def test_packing_many_documents_is_tight_and_its_work_goes_with_the_row_not_their_number(T, monkeypatch):
    lengths = (np.exp(np.random.default_rng(0).normal(5.5, 1.2, 300_000)) + 2).astype(int)
    placed = []
    real = np.repeat
    monkeypatch.setattr(np, "repeat", lambda *args: placed.append(1) or real(*args))
    index = pack(lengths, "best_fit", T)
    assert (lengths - 1).sum() / (len(index) * T) > 0.97
    assert len(placed) < 10 * T


def real_store(path, lengths):
    writer = StoreWriter(path, np.dtype("<u2"))
    (path / "tokenizer.model").touch()
    writer.append(Encoded(np.ones(sum(lengths), np.uint32), np.array(lengths), np.array(lengths)))
    writer.finish(fingerprint="f")
    writer.close()
    return TokenStore.open(path)


def test_the_index_is_computed_once_and_again_when_damaged(tmp_path, monkeypatch):
    store = real_store(tmp_path, [5, 9, 3])
    expected = pack(store.lengths, "best_fit", 4).pieces
    np.testing.assert_array_equal(pack_index(store, "best_fit", 4).pieces, expected)
    computed = []
    real = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: computed.append(args[1:]) or real(*args))
    np.testing.assert_array_equal(pack_index(store, "best_fit", 4).pieces, expected)
    assert computed == []
    pack_index(store, "chunk", 4)
    assert computed == [("chunk", 4)]
    file = tmp_path / "pack_best_fit_4.pieces"
    short = file.read_bytes()[:-8]
    file.unlink()  # whoever still has it mapped keeps the old one
    file.write_bytes(short)
    np.testing.assert_array_equal(pack_index(store, "best_fit", 4).pieces, expected)
    assert computed == [("chunk", 4), ("best_fit", 4)]
