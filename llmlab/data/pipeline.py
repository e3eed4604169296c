"""Batches of packed text: a pure function of the seed and the step, the same on any number of hosts.

Row r of the endless stream belongs to batch r // B. Its place in the corpus comes from grain's random-access shuffle,
which is anew in every epoch and keeps no state, so any step can be asked for at any time.
"""

import collections
import functools
import itertools
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.config import DataConfig
from llmlab.data.packing import Packing, Rows, assemble, pack_index
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


class TextSource:
    """An endless source of training batches over stores, each with its weight, that are shuffled as `config` says.

    `rows` counts the rows of one epoch, all parts together. `sharding` places the [B, T] arrays; each host then reads
    only the rows that its own devices hold. Without one they go to the default device.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: Sequence[tuple[TokenStore, float]],
        *,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
    ):
        self._packed = _Packed(config.packing, config.sequence_length, [store for store, _ in parts])
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
        self._ahead: collections.deque[tuple[int, Future[TokenBatch]]] = collections.deque()

    def next(self, step: int, state: Any = None) -> TokenBatch:
        """The batch of `step`; the ones after it are got ready meanwhile. `state` is not looked at."""
        if not self._ahead or self._ahead[0][0] != step:
            while self._ahead:
                self._ahead.pop()[1].cancel()
            self._submit(step)
        batch = self._ahead.popleft()[1].result()
        for later in range(len(self._ahead), BATCHES_AHEAD):
            self._submit(step + 1 + later)
        return batch

    def host_batch(self, step: int) -> Rows:
        """The rows of the batch of `step` that this host's devices hold, in their order."""
        numbers = step * self._batch_size + self._placement.host_rows
        return self._packed.assemble(np.array([self._order[number] for number in numbers.tolist()]))

    def close(self) -> None:
        """Stops reading ahead, for good."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, step: int) -> None:
        self._ahead.append((step, self._thread.submit(self._batch, step)))

    def _batch(self, step: int) -> TokenBatch:
        return self._placement.place(self.host_batch(step))


def evaluation_batches(
    config: DataConfig, parts: Sequence[tuple[TokenStore, float]], *, sharding: jax.sharding.Sharding | None = None
) -> Iterator[TokenBatch]:
    """Every row of every store once, whatever the weights; the last batch is filled up with masked rows.

    The rows come mixed, always in the same way: the first batches are a fair sample of all, and the same sample each
    time. What the stores are packed into is read the first time only.
    """
    packed, placement = _packed(config, parts), _Placement(config, sharding)
    order = np.random.default_rng(EVALUATION_SEED).permutation(packed.begins[-1])
    filled = np.concatenate([order, np.full(-len(order) % config.batch_size, PADDING)])
    for rows in filled.reshape(-1, config.batch_size):
        yield placement.place(packed.assemble(rows[placement.host_rows]))


def evaluation_rows(config: DataConfig, parts: Sequence[tuple[TokenStore, float]]) -> int:
    """How many rows `evaluation_batches` gives, those that fill up the last batch aside."""
    return int(_packed(config, parts).begins[-1])


class _Packed:
    """Stores with their pack indices, read once; the rows of all are numbered on, part p's from `begins[p]`."""

    def __init__(self, packing: Packing, sequence_length: int, stores: Sequence[TokenStore]):
        self._stores = stores
        self._indices = [pack_index(store, packing, sequence_length) for store in stores]
        self.begins = np.cumsum([0, *map(len, self._indices)])
        self._sequence_length = sequence_length

    def assemble(self, rows: np.ndarray) -> Rows:
        """These rows as arrays [len(rows), T]; `PADDING` gives a row of zeros."""
        part_of_row = np.where(rows == PADDING, PADDING, np.searchsorted(self.begins, rows, side="right") - 1)
        if (part_of_row == part_of_row[0]).all() and part_of_row[0] != PADDING:
            return self._of_part(int(part_of_row[0]), rows)
        shape = (len(rows), self._sequence_length)
        out = Rows(*(np.zeros(shape, np.float32 if name == "mask_BT" else np.int32) for name in Rows._fields))
        for part in set(part_of_row.tolist()) - {PADDING}:
            places = np.flatnonzero(part_of_row == part)
            for whole, some in zip(out, self._of_part(part, rows[places]), strict=True):
                whole[places] = some
        return out

    def _of_part(self, part: int, rows: np.ndarray) -> Rows:
        return assemble(self._stores[part], self._indices[part], rows - self.begins[part], self._sequence_length)


def _packed(config: DataConfig, parts: Sequence[tuple[TokenStore, float]]) -> _Packed:
    return _packed_once(config.packing, config.sequence_length, tuple(store for store, _ in parts))


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

    def place(self, rows: Rows) -> TokenBatch:
        """Global arrays of which this host's part is `rows`."""
        if self._sharding is None:
            return TokenBatch(*jax.device_put(tuple(rows)))
        return TokenBatch(*(self._global(array_BT, self._sharding) for array_BT in rows))

    def _global(self, array_BT: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
        def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
            rows, times = index or (slice(None), slice(None))
            wanted = range(self._shape[0])[rows]
            begin = int(np.searchsorted(self.host_rows, wanted.start))
            return array_BT[begin : begin + len(wanted), times]

        return jax.make_array_from_callback(self._shape, sharding, of_device)


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
