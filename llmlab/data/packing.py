"""Rows of a fixed number of predictions: which pieces of which documents make up each, and their arrays.

A document of n tokens holds n - 1 predictions of a token from those before it. `best_fit` cuts a document only every T
predictions, and never predicts anything twice; `chunk` runs through all documents as one stream; `none` gives each a
row of its own, padded. The pack index is a function of the documents, T and the way of packing alone, and is kept
beside the tokens.

Where documents are responses they are never cut in two. A conversation that is too long loses its end, and is left out
if nothing that the model is to say is left; a group of responses that does not fit into a row is left out.
"""

import errno
import hashlib
from typing import Literal, NamedTuple

import numpy as np

from llmlab.data.config import Rows as Kind
from llmlab.data.store import DOCUMENTS, GROUPS, MARKS, TokenStore, TornError, mapped, open_sealed, seal

Packing = Literal["best_fit", "chunk", "none"]


class PackIndex(NamedTuple):
    """Row r holds `pieces[row_offsets[r] : row_offsets[r + 1]]`, each (document, start in it, predictions).

    A piece of n predictions reads n + 1 tokens. Pieces of `chunk` run over the ends of documents. `shortened` counts
    the conversations that lost their end, `left_out` the examples of which nothing is learned.
    """

    row_offsets: np.ndarray
    pieces: np.ndarray
    shortened: int = 0
    left_out: int = 0

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


class GroupRows(NamedTuple):
    """Rows of groups of responses, P groups in a row and R responses in a group: see `pipeline.GroupBatch`."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    mask_BT: np.ndarray
    positions_BT: np.ndarray
    segment_ids_BT: np.ndarray
    marks_BT: np.ndarray
    present_BPR: np.ndarray
    value_BPR: np.ndarray
    reference_BPR: np.ndarray


def pack_index(store: TokenStore, packing: Packing, sequence_length: int, kind: Kind = "text") -> PackIndex:
    """The pack index of a store, computed at most once, or once a process where the store cannot be written to."""
    name = f"pack_{packing}_{sequence_length}"
    manifest, rows, pieces = f"{name}.json", f"{name}.rows", f"{name}.pieces"
    key = _key(store)
    try:
        facts = open_sealed(store.path, manifest)
        if facts["key"] != key:
            raise TornError("it belongs to other documents")
    except TornError:
        if kind == "text":
            index = pack(store.lengths, packing, sequence_length)
        else:
            index = pack_responses(store, packing, sequence_length, whole=kind != "chat")
        facts = {"shortened": index.shortened, "left_out": index.left_out}
        try:
            seal(store.path, manifest, {rows: index.row_offsets, pieces: index.pieces}, key=key, **facts)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            return index
    return PackIndex(
        mapped(store.path / rows, np.dtype("<i8")),
        mapped(store.path / pieces, np.dtype("<i8")).reshape(-1, 3),
        facts["shortened"],
        facts["left_out"],
    )


def pack(lengths: np.ndarray, packing: Packing, sequence_length: int) -> PackIndex:
    """The pack index of documents of these lengths, in tokens."""
    lengths = np.asarray(lengths, np.int64)
    if packing == "chunk":
        return _chunk(lengths, sequence_length)
    document, cut = _ranges(-(-(lengths - 1) // sequence_length))
    start = cut * sequence_length
    length = np.minimum((lengths - 1)[document] - start, sequence_length)
    row = _rows_of(length, packing, sequence_length)
    order = np.argsort(row, kind="stable")  # within a row, pieces keep the order of their documents
    pieces = np.stack([document, start, length], axis=1)[order]
    return PackIndex(_offsets(np.bincount(row)), pieces)


def pack_responses(store: TokenStore, packing: Packing, sequence_length: int, *, whole: bool) -> PackIndex:
    """The pack index of a store of responses: of groups that have to be `whole`, or of conversations that need not."""
    assert store.judged is not None
    marks, _, groups = store.judged
    predictions = store.lengths - 1
    length = np.minimum(predictions, sequence_length)
    first = np.flatnonzero(np.diff(groups, prepend=-1))  # of each group, its first document
    count = np.diff(np.append(first, len(groups)))
    if whole:
        size = np.add.reduceat(predictions, first) if len(first) else predictions
        kept = size <= sequence_length
    else:
        said = _offsets(marks == 1)
        begin = store.offsets[:-1] + 1
        kept, size = said[begin + length] > said[begin], length
    shortened = 0 if whole else int(np.sum(kept & (predictions > sequence_length)))
    first, count, size = first[kept], count[kept], size[kept]
    row = _rows_of(size, packing, sequence_length)
    order = np.argsort(row, kind="stable")
    unit, number = _ranges(count[order])
    document = first[order][unit] + number
    pieces = np.stack([document, np.zeros_like(document), length[document]], axis=1)
    row_offsets = _offsets(np.bincount(row, weights=count).astype(np.int64) if len(row) else row)
    return PackIndex(row_offsets, pieces, shortened, int(np.sum(~kept)))


def assemble(store: TokenStore, index: PackIndex, rows: np.ndarray, sequence_length: int) -> Rows:
    """The arrays of these rows, [len(rows), T].

    Padding is one more piece at the end of each row, so that every array is laid out in order, with no scatter.
    """
    return _laid_out(store, _pieces_of(index, rows, sequence_length), len(rows), sequence_length)[0]


def assemble_groups(
    store: TokenStore,
    index: PackIndex,
    rows: np.ndarray,
    sequence_length: int,
    shape: tuple[int, int],
    reference: np.ndarray | None,
) -> GroupRows:
    """The arrays of rows of groups; `shape` is (P, R), `reference` a log-probability for each document."""
    assert store.judged is not None
    pieces = _pieces_of(index, rows, sequence_length)
    at = group_places(store, index, rows)
    number = np.full(len(pieces.row), -1)
    number[pieces.number >= 0] = at.p * shape[1] + at.r
    laid_out, source = _laid_out(store, pieces._replace(number=number), len(rows), sequence_length)
    of_groups = np.zeros((3, len(rows), *shape), np.float32)
    of_groups[0, at.row, at.p, at.r] = 1
    of_groups[1, at.row, at.p, at.r] = store.judged.values[at.document]
    if reference is not None:
        of_groups[2, at.row, at.p, at.r] = reference[at.document]
    marks_BT = (store.judged.marks[source] * (laid_out.segment_ids_BT > 0)).astype(np.int32)
    return GroupRows(*laid_out, marks_BT, *of_groups)


class Places(NamedTuple):
    """Where documents are among rows of groups: in row `row`, response r of group p."""

    document: np.ndarray
    row: np.ndarray
    p: np.ndarray
    r: np.ndarray


def group_places(store: TokenStore, index: PackIndex, rows: np.ndarray) -> Places:
    """The documents of these rows, in order, and where they are."""
    assert store.judged is not None
    first, last = index.row_offsets[rows], index.row_offsets[rows + 1]
    row, number = _ranges(last - first)
    document = index.pieces[first[row] + number, 0]
    group = store.judged.groups[document]
    new = (np.diff(group, prepend=-1) != 0) | (number == 0)
    before = np.concatenate([[0], np.cumsum(np.bincount(row[new], minlength=len(rows)))])
    return Places(
        document, row, np.cumsum(new) - 1 - before[row], document - np.searchsorted(store.judged.groups, group)
    )


def groups_shape(store: TokenStore, index: PackIndex) -> tuple[int, int]:
    """(P, R): the most groups in a row, and the most responses in a group."""
    at = group_places(store, index, np.arange(len(index)))
    return int(at.p.max(initial=0)) + 1, int(at.r.max(initial=0)) + 1


class _Pieces(NamedTuple):
    """The pieces of some rows, in order: `number` is that of its segment, from 0 in each row, and -1 of padding."""

    row: np.ndarray
    number: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray


def _pieces_of(index: PackIndex, rows: np.ndarray, sequence_length: int) -> _Pieces:
    first, last = index.row_offsets[rows], index.row_offsets[rows + 1]
    row, number = _ranges(last - first + 1)
    real = number < (last - first)[row]
    document, start, length = np.zeros((3, len(row)), np.int64)
    document[real], start[real], length[real] = index.pieces[(first[row] + number)[real]].T
    length[~real] = sequence_length - np.add.reduceat(length, np.flatnonzero(number == 0))
    return _Pieces(row, np.where(real, number, -1), document, start, length)


def _laid_out(store: TokenStore, pieces: _Pieces, rows: int, sequence_length: int) -> tuple[Rows, np.ndarray]:
    """The arrays of these pieces, and where in the store each of their tokens is."""
    begin = np.cumsum(pieces.length) - pieces.length
    place = np.arange(rows * sequence_length)
    source = place + np.repeat(store.offsets[pieces.document] + pieces.start - begin, pieces.length)
    positions = place - np.repeat(begin, pieces.length)
    segments = np.repeat(pieces.number + 1, pieces.length)
    source = np.minimum(source, len(store.tokens) - 2)  # padding reads anything, but not past the end
    real = segments > 0
    tokens, targets, mask = store.tokens[source], store.tokens[source + 1], real
    if not real.all():
        tokens, targets, positions = tokens * real, targets * real, positions * real
    if store.judged is not None:
        mask = real & (store.judged.marks[source + 1] == 1)
    flat = ((tokens, np.int32), (targets, np.int32), (mask, np.float32), (positions, np.int32), (segments, np.int32))
    shape = (rows, sequence_length)
    return Rows(*(array.astype(dtype).reshape(shape) for array, dtype in flat)), source.reshape(shape)


def _key(store: TokenStore) -> str:
    """Of what a pack index depends on in a store."""
    if store.judged is None:
        return hashlib.sha256(store.lengths.tobytes()).hexdigest()
    files = store.manifest["files"]
    return hashlib.sha256("".join(files[name]["sha256"] for name in (DOCUMENTS, MARKS, GROUPS)).encode()).hexdigest()


def _rows_of(size: np.ndarray, packing: Packing, sequence_length: int) -> np.ndarray:
    """The row of each unit, rows numbered as their first unit comes."""
    if packing == "none" or not len(size):
        return np.arange(len(size))
    return _in_order_of_first_piece(_best_fit_rows(size, sequence_length))


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
