"""Batches of packed text: a pure function of the seed and the step, the same on any number of hosts.

Row r of the endless stream belongs to batch r // B. Its place in the corpus comes from grain's random-access shuffle,
which is anew in every epoch and keeps no state, so any step can be asked for at any time.
"""

import collections
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.config import DataConfig
from llmlab.data.config import Rows as Kind
from llmlab.data.packing import (
    GroupRows,
    Packing,
    Rows,
    assemble,
    assemble_groups,
    group_places,
    groups_shape,
    pack_index,
)
from llmlab.data.progress import shown
from llmlab.data.store import TokenStore

PADDING = -1
BATCHES_AHEAD = 4
EVALUATION_SEED = 0


class TokenBatch(NamedTuple):
    """What a step trains on; `mask` is float32 and 1 where a target counts, all else is int32. See `packing.Rows`."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    mask_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array


class GroupBatch(NamedTuple):
    """Responses that are judged in groups, packed: P groups in a row, of R responses each.

    The response r of a row's group p is segment p·R + r + 1, all of it, its last token included; segment 0 is padding.
    `targets_BT` are the tokens that come next, `mask_BT` is 1 where the target is the model's to say. `marks_BT` is of
    the tokens themselves: see `llmlab.data.store`. `present_BPR` is 1 for the responses that are there; `value_BPR` is
    what the row says of each; `reference_BPR` their log-probability by a reference model, 0 where none is asked for.
    `baseline_B` is what an objective's `before` fills in of the whole batch, the same for all rows.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array
    mask_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    marks_BT: jax.Array
    present_BPR: jax.Array
    value_BPR: jax.Array
    reference_BPR: jax.Array
    baseline_B: jax.Array | None = None


Batch = TokenBatch | GroupBatch
References = Sequence[np.ndarray] | None


class TextSource:
    """An endless source of training batches over stores, each with its weight, that are shuffled as `config` says.

    `rows` counts the rows of one epoch, all parts together. `sharding` places the [B, T] arrays; each host then reads
    only the rows that its own devices hold. Without one they go to the default device. `references`, which may be
    set before the first batch, are the log-probabilities of every store's documents by a reference model.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: Sequence[tuple[TokenStore, float]],
        *,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
    ):
        self._packed = _packed(config, parts)
        self.references: References = None
        self._placement = _Placement(config, sharding)
        self.rows = int(self._packed.begins[-1])
        if self.rows < config.batch_size:
            raise UserError(
                f"the text fills {self.rows} rows of data.sequence_length={config.sequence_length}, fewer than "
                f"data.batch_size={config.batch_size}: give more text, or lower one of the two"
            )
        self._order = _order(self._packed.begins, [weight for _, weight in parts], config.shuffle, seed)
        self._batch_size = config.batch_size
        # One thread: two would wait for each other, and the training loop for both, at the interpreter's lock. grain's
        # own prefetching costs the loop five times as much as this, up to 1 ms a step on a busy machine.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmlab-data")
        self._ahead: collections.deque[tuple[int, Future[Batch]]] = collections.deque()

    def next(self, step: int, state: Any = None) -> Batch:
        """The batch of `step`; the ones after it are got ready meanwhile. `state` is not looked at."""
        if not self._ahead or self._ahead[0][0] != step:
            while self._ahead:
                self._ahead.pop()[1].cancel()
            self._submit(step)
        batch = self._ahead.popleft()[1].result()
        for later in range(len(self._ahead), BATCHES_AHEAD):
            self._submit(step + 1 + later)
        return batch

    def host_batch(self, step: int) -> Rows | GroupRows:
        """The rows of the batch of `step` that this host's devices hold, in their order."""
        numbers = step * self._batch_size + self._placement.host_rows
        rows = np.array([self._order[number] for number in numbers.tolist()])
        return self._packed.assemble(rows, self.references)

    def close(self) -> None:
        """Stops reading ahead, for good."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> None:
        self._ahead.append((step, self._thread.submit(self._batch, step)))

    def _batch(self, step: int) -> Batch:
        return self._placement.place(self.host_batch(step))


def evaluation_batches(
    config: DataConfig,
    parts: Sequence[tuple[TokenStore, float]],
    *,
    sharding: jax.sharding.Sharding | None = None,
    references: References = None,
) -> Iterator[Any]:
    """Every row of every store once, whatever the weights; the last batch is filled up with masked rows.

    The rows come mixed, always in the same way: the first batches are a fair sample of all, and the same sample each
    time. What the stores are packed into is read the first time only.
    """
    packed, placement = _packed(config, parts), _Placement(config, sharding)
    order = np.random.default_rng(EVALUATION_SEED).permutation(packed.begins[-1])
    for rows in _in_batches(order, config.batch_size):
        yield placement.place(packed.assemble(rows[placement.host_rows], references))


def evaluation_rows(config: DataConfig, parts: Sequence[tuple[TokenStore, float]]) -> int:
    """How many rows `evaluation_batches` gives, those that fill up the last batch aside."""
    return int(_packed(config, parts).begins[-1])


def by_document(
    config: DataConfig,
    store: TokenStore,
    of_batch: Callable[[GroupBatch], np.ndarray],
    *,
    sharding: jax.sharding.Sharding | None = None,
    progress: str = "",
) -> np.ndarray:
    """float32 [documents]: a number for each document of a store of groups, which `of_batch` gives as [B, P, R].

    NaN for the documents that are in no row. `progress`, if any, is what a person sees that it is about.
    """
    packed, placement = _packed(config, [(store, 1.0)]), _Placement(config, sharding)
    found = np.full(len(store), np.nan, np.float32)
    with shown(progress, int(packed.begins[-1]), bool(progress), in_bytes=False) as advance:
        for number, rows in enumerate(_in_batches(np.arange(packed.begins[-1]), config.batch_size)):
            batch = placement.place(packed.assemble(rows[placement.host_rows]))
            assert isinstance(batch, GroupBatch)
            at = group_places(store, packed.indices[0], rows[rows != PADDING])
            found[at.document] = of_batch(batch)[at.row, at.p, at.r]
            advance(min((number + 1) * config.batch_size, int(packed.begins[-1])))
    return found


def statistics(config: DataConfig, parts: Sequence[tuple[TokenStore, float]]) -> str:
    """One line on stores of conversations: how many, how long, and what of them fits into no row.

    Raises:
      UserError: most would lose their answer.
    """
    packed = _packed(config, parts)
    lengths = np.concatenate([store.lengths for store, _ in parts]) - 1
    examples = sum(store.manifest["items"] for store, _ in parts)
    shortened = sum(index.shortened for index in packed.indices)
    left_out = sum(index.left_out for index in packed.indices)
    if config.rows == "chat":
        many, why = (
            "conversations",
            f"no answer to learn is within data.sequence_length={config.sequence_length} tokens",
        )
    else:
        many, why = "examples", f"they are longer than data.sequence_length={config.sequence_length} tokens"
    if 2 * left_out > examples:
        raise UserError(
            f"{left_out:,} of {examples:,} {many} would be left out, since {why}: the longest has {lengths.max():,}; "
            f"raise data.sequence_length, or look at them with `llmlab tokenize --chat`"
        )
    median, most, longest = np.percentile(lengths, (50, 95, 100)).astype(int)
    filled = sum(int(index.pieces[:, 2].sum()) for index in packed.indices) / (
        packed.begins[-1] * config.sequence_length
    )
    line = f"{examples:,} {many} of {median:,} tokens in the median, {most:,} at 95 %, {longest:,} at most"
    line += f"; rows are filled to {filled:.1%}"
    line += f"; {shortened:,} lose their end" if shortened else ""
    return line + (f"; {left_out:,} are left out: {why}" if left_out else "")


def _in_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    """[batches, B] row numbers, the last filled up with `PADDING`."""
    return np.concatenate([order, np.full(-len(order) % batch_size, PADDING)]).reshape(-1, batch_size)


class _Packed:
    """Stores with their pack indices, read once; the rows of all are numbered on, part p's from `begins[p]`."""

    def __init__(self, packing: Packing, sequence_length: int, kind: Kind, stores: Sequence[TokenStore]):
        self._stores, self._sequence_length = stores, sequence_length
        self.indices = [pack_index(store, packing, sequence_length, kind) for store in stores]
        self.begins = np.cumsum([0, *map(len, self.indices)])
        self._groups: tuple[int, int] | None = None
        if kind not in ("text", "chat"):
            shapes_2 = np.array([groups_shape(*each) for each in zip(stores, self.indices, strict=True)])
            self._groups = tuple(shapes_2.max(axis=0).tolist())

    def assemble(self, rows: np.ndarray, references: References = None) -> Rows | GroupRows:
        """These rows as arrays [len(rows), …]; `PADDING` gives a row of zeros."""
        part_of_row = np.where(rows == PADDING, PADDING, np.searchsorted(self.begins, rows, side="right") - 1)
        if (part_of_row == part_of_row[0]).all() and part_of_row[0] != PADDING:
            return self._of_part(int(part_of_row[0]), rows, references)
        like = self._of_part(int(np.argmax(np.diff(self.begins) > 0)), np.zeros(1, np.int64), None)
        whole = [np.zeros((len(rows), *array.shape[1:]), array.dtype) for array in like]
        for part in set(part_of_row.tolist()) - {PADDING}:
            places = np.flatnonzero(part_of_row == part)
            for array, some in zip(whole, self._of_part(part, rows[places], references), strict=True):
                array[places] = some
        return type(like)(*whole)

    def _of_part(self, part: int, rows: np.ndarray, references: References) -> Rows | GroupRows:
        store, index, rows = self._stores[part], self.indices[part], rows - self.begins[part]
        if self._groups is None:
            return assemble(store, index, rows, self._sequence_length)
        reference = None if references is None else references[part]
        return assemble_groups(store, index, rows, self._sequence_length, self._groups, reference)


def _packed(config: DataConfig, parts: Sequence[tuple[TokenStore, float]]) -> _Packed:
    return _packed_once(config.packing, config.sequence_length, config.rows, tuple(store for store, _ in parts))


_packed_once = functools.lru_cache(maxsize=2)(_Packed)


class _Placement:
    """Which rows of a batch this host needs, and how they become global arrays."""

    def __init__(self, config: DataConfig, sharding: jax.sharding.Sharding | None):
        self._shape = (config.batch_size, config.sequence_length)
        self._sharding = sharding
        self.host_rows = np.arange(config.batch_size)
        if sharding is not None:
            slices = [index[0] for index in sharding.addressable_devices_indices_map(self._shape).values() if index]
            self.host_rows = np.unique(np.concatenate([self.host_rows[rows] for rows in slices]))

    def place(self, rows: Rows | GroupRows) -> Batch:
        """Global arrays of which this host's part is `rows`."""
        kind = TokenBatch if isinstance(rows, Rows) else GroupBatch
        if self._sharding is None:
            return kind(*jax.device_put(tuple(rows)))
        return kind(*(self._global(array, self._sharding) for array in rows))

    def _global(self, array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            rows, *others = index or (slice(None),) * array.ndim
            wanted = range(self._shape[0])[rows]
            begin = int(np.searchsorted(self.host_rows, wanted.start))
            return array[begin : begin + len(wanted), *others]

        if array.ndim > 2:
            assert isinstance(sharding, jax.sharding.NamedSharding)
            sharding = sharding.update(spec=jax.sharding.PartitionSpec(sharding.spec[0]))
        return jax.make_array_from_callback((self._shape[0], *array.shape[1:]), sharding, of_device)


def _order(begins: np.ndarray, weights: Sequence[float], shuffle: bool, seed: int) -> grain.MapDataset:
    """The endless stream of row numbers."""
    streams = []
    for part, (begin, end) in enumerate(itertools.pairwise(begins.tolist())):
        stream = grain.MapDataset.range(begin, end)
        if shuffle:
            # grain adds the epoch to the seed, so that near seeds must not stay near: run 1 would repeat run 0.
            stream = stream.shuffle(seed=zlib.crc32(f"rows of part {part}, seed {seed}".encode()))
        streams.append(stream.repeat())
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
