"""Rows of a fixed number of predictions: which pieces of which documents make up each, and their arrays.

A document of n tokens holds n - 1 predictions of a token from those before it. `best_fit` cuts a document only every T
predictions, and never predicts anything twice; `chunk` runs through all documents as one stream. The pack index is a
function of the document lengths, T and the way of packing alone, and is kept beside the tokens.
"""

import errno
import hashlib
from typing import Literal, NamedTuple

import numpy as np

from llmlab.data.store import TokenStore, TornError, mapped, open_sealed, seal

Packing = Literal["best_fit", "chunk"]


class PackIndex(NamedTuple):
    """Row r holds `pieces[row_offsets[r] : row_offsets[r + 1]]`, each (document, start in it, predictions).

    A piece of n predictions reads n + 1 tokens. Pieces of `chunk` run over the ends of documents.
    """

    row_offsets: np.ndarray
    pieces: np.ndarray

    def __len__(self) -> int:
        return len(self.row_offsets) - 1


class Rows(NamedTuple):
    """Rows as arrays. `mask` is 1 where a target counts, and positions and segments are 0 on padding.

    Segments of a row are numbered from 1; positions restart with each, since nothing before it is in sight.
    """

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray
    positions_BT: np.ndarray
    segment_ids_BT: np.ndarray


def pack_index(store: TokenStore, packing: Packing, sequence_length: int) -> PackIndex:
    """The pack index of a store, computed at most once, or once a process where the store cannot be written to."""
    name = f"pack_{packing}_{sequence_length}"
    manifest, rows, pieces = f"{name}.json", f"{name}.rows", f"{name}.pieces"
    key = hashlib.sha256(store.lengths.tobytes()).hexdigest()
    try:
        if open_sealed(store.path, manifest)["key"] != key:
            raise TornError("it belongs to other documents")
    except TornError:
        index = pack(store.lengths, packing, sequence_length)
        try:
            seal(store.path, manifest, {rows: index.row_offsets, pieces: index.pieces}, key=key)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return index
    shape = (-1, 3)
    return PackIndex(
        mapped(store.path / rows, np.dtype("<i8")), mapped(store.path / pieces, np.dtype("<i8")).reshape(shape)
    )


def pack(lengths: np.ndarray, packing: Packing, sequence_length: int) -> PackIndex:
    """The pack index of documents of these lengths, in tokens."""
    return (_best_fit if packing == "best_fit" else _chunk)(np.asarray(lengths, np.int64), sequence_length)


def assemble(store: TokenStore, index: PackIndex, rows: np.ndarray, sequence_length: int) -> Rows:
    """The arrays of these rows, [len(rows), T].

    Padding is one more piece at the end of each row, so that every array is laid out in order, with no scatter.
    """
    first, last = index.row_offsets[rows], index.row_offsets[rows + 1]
    row, number = _ranges(last - first + 1)
    real = number < (last - first)[row]
    document, start, length = np.zeros((3, len(row)), np.int64)
    document[real], start[real], length[real] = index.pieces[(first[row] + number)[real]].T
    length[~real] = sequence_length - np.add.reduceat(length, np.flatnonzero(number == 0))
    begin = np.cumsum(length) - length
    segment = np.where(real, number + 1, 0)

    place = np.arange(len(rows) * sequence_length)
    source = place + np.repeat(store.offsets[document] + start - begin, length)
    positions = place - np.repeat(begin, length)
    segments = np.repeat(segment, length)
    source = np.minimum(source, len(store.tokens) - 2)  # padding reads anything, but not past the end
    tokens, targets, mask = store.tokens[source], store.tokens[source + 1], segments > 0
    if not mask.all():
        tokens, targets, positions = tokens * mask, targets * mask, positions * mask
    flat = ((tokens, np.int32), (targets, np.int32), (mask, np.float32), (positions, np.int32), (segments, np.int32))
    return Rows(*(array.astype(dtype).reshape(len(rows), sequence_length) for array, dtype in flat))


def _best_fit(lengths: np.ndarray, sequence_length: int) -> PackIndex:
    predictions = lengths - 1
    document, cut = _ranges(-(-predictions // sequence_length))
    start = cut * sequence_length
    length = np.minimum(predictions[document] - start, sequence_length)
    row = _in_order_of_first_piece(_best_fit_rows(length, sequence_length))
    order = np.argsort(row, kind="stable")  # within a row, pieces keep the order of their documents
    pieces = np.stack([document, start, length], axis=1)[order]
    return PackIndex(_offsets(np.bincount(row)), pieces)


def _best_fit_rows(length: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, by best-fit decreasing: the longest first, each into the fullest row that still takes it.

    All pieces of one length are placed together. A row that takes one is the best fit for the next of its length, so
    each row takes as many as it can; the work grows with the number of distinct lengths, not of pieces.
    """
    row_of_piece = np.empty(len(length), np.int64)
    order = np.argsort(-length, kind="stable")
    sizes, begins = np.unique(-length[order], return_index=True)
    ends = np.append(begins[1:], len(order))
    rows_with_room: dict[int, list[np.ndarray]] = {}
    rooms = 0  # bit c is set when some row has room for exactly c
    opened = 0

    for size, begin, end in zip((-sizes).tolist(), begins.tolist(), ends.tolist(), strict=True):
        while begin < end:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                rows = np.concatenate(rows_with_room.pop(room))
                rooms ^= 1 << room
            else:
                room = capacity
                rows = np.arange(opened, opened - (-(end - begin) // (capacity // size)))
                opened += len(rows)
            each = room // size
            used = min(len(rows), -(-(end - begin) // each))
            taken = min(end - begin, used * each)
            row_of_piece[order[begin : begin + taken]] = np.repeat(rows[:used], each)[:taken]
            begin += taken
            in_last = taken - (used - 1) * each
            for left, group in (
                (room, rows[used:]),
                (room - each * size, rows[: used - 1]),
                (room - in_last * size, rows[used - 1 : used]),
            ):
                if left and len(group):
                    rows_with_room.setdefault(left, []).append(group)
                    rooms |= 1 << left
    return row_of_piece


def _in_order_of_first_piece(row: np.ndarray) -> np.ndarray:
    """The same rows, numbered as they come in the text, so that an unshuffled run reads it from the front."""
    _, first = np.unique(row, return_index=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[row]


def _chunk(lengths: np.ndarray, sequence_length: int) -> PackIndex:
    offsets = _offsets(lengths)
    predictions = offsets[-1] - 1
    begin = np.arange(0, predictions, sequence_length)
    document = np.searchsorted(offsets, begin, side="right") - 1
    length = np.minimum(predictions - begin, sequence_length)
    pieces = np.stack([document, begin - offsets[document], length], axis=1)
    return PackIndex(np.arange(len(begin) + 1), pieces)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts (2, 3): (0, 0, 1, 1, 1) and (0, 1, 0, 1, 2)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
