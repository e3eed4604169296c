"""The key/value cache of one attention layer: slots that fill up, or a ring where the layer sees only a window.

Rows have lengths of their own. What a slot holds follows from the row's length alone, so no position is stored: of a
row with n tokens in R slots, slot s holds the latest position p < n with p ≡ s (mod R). A layer declares what it keeps
by a `CacheSpec`, and only the layer looks inside.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.mesh import Axes
from llmlab.model.pages import Pool, empty_pool, read_pages, write_pages


class CacheSpec(NamedTuple):
    """One array that a layer keeps: the shape of one row of it, and the logical axes of all of it, rows first.

    grows: with every token, one slot each, so that it may lie in pages.
    """

    shape: tuple[int, ...]
    axes: Axes
    dtype: DTypeLike
    grows: bool = False

    def empty(self, batch: int) -> jax.Array:
        """[B, *shape]."""
        return jnp.zeros((batch, *self.shape), self.dtype)

    def pool(self, pages: int, size: int, *, int8: bool) -> Pool:
        """Pages of what grows."""
        heads, _, width = self.shape
        return empty_pool(pages, heads, size, width, self.dtype, int8=int8)


class Filled(NamedTuple):
    """How many tokens each row has in the cache, and the pages that they lie in, where it has pages."""

    lengths_B: jax.Array
    table_BP: jax.Array | None = None


class Slots(NamedTuple):
    """Where tokens go, and what the slots hold."""

    index_BT: jax.Array
    positions_BS: jax.Array
    segment_ids_BS: jax.Array


def slots_after(lengths_B: jax.Array, added_B: jax.Array, time: int, slots: int) -> Slots:
    """Slots for `time` tokens appended to rows of `lengths_B`, the first `added_B` of them real, and what is then held.

    Padding, and tokens that later ones of the same call push out of the ring, get the index `slots`: out of range.
    """
    offsets_1T = jnp.arange(time, dtype=jnp.int32)[None]
    ends_B = lengths_B + added_B
    positions_BT = lengths_B[:, None] + offsets_1T
    kept_BT = (offsets_1T < added_B[:, None]) & (positions_BT >= ends_B[:, None] - slots)
    index_BT = jnp.where(kept_BT, positions_BT % slots, slots)
    held = held_by(ends_B, slots)
    return Slots(index_BT, *held)


def held_by(lengths_B: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """(positions_BS, segment_ids_BS): the position each slot holds, and 1 where it holds one, 0 where it is empty."""
    last_B1 = lengths_B[:, None] - 1
    positions_BS = last_B1 - (last_B1 - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    return positions_BS, (positions_BS >= 0).astype(jnp.int32)


def write(kept_BKSH: jax.Array, new_BTKH: jax.Array, index_BT: jax.Array) -> jax.Array:
    """kept_BKSH with the new tokens at these slots; an index out of range writes nothing."""
    B, K, S, H = kept_BKSH.shape
    # Over B and K merged, XLA on CPU writes in place: over [B, K, S, H] a batch of one is copied, twice a layer.
    new_XTH = new_BTKH.astype(kept_BKSH.dtype).transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    rows_X1 = jnp.arange(B * K, dtype=jnp.int32)[:, None]
    kept_XSH = kept_BKSH.reshape(B * K, S, H).at[rows_X1, jnp.repeat(index_BT, K, axis=0)].set(new_XTH, mode="drop")
    return kept_XSH.reshape(B, K, S, H)


def empty(specs: Mapping[str, CacheSpec], batch: int) -> dict[str, jax.Array]:
    """The empty cache of one layer."""
    return {name: spec.empty(batch) for name, spec in specs.items()}


class Seen(NamedTuple):
    """What the queries of one layer look at: what is kept of each token, [B, S, K, H] by name, and which tokens."""

    kept: dict[str, jax.Array]
    positions_BS: jax.Array
    segment_ids_BS: jax.Array
    q_segment_ids_BT: jax.Array


def seen_with(
    new: dict[str, jax.Array],
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    filled: Filled | None,
    cache: dict[str, Any] | None,
    window: int | None,
) -> tuple[Seen, dict[str, Any] | None]:
    """What is seen once these new tokens, [B, T, K, H] by name, are there; and the cache with them written, if any."""
    if cache is None:
        return Seen(new, positions_BT, segment_ids_BT, segment_ids_BT), None
    assert filled is not None
    lengths_B = filled.lengths_B
    # A row of a cache is one document.
    q_segment_ids_BT = (segment_ids_BT > 0).astype(jnp.int32)
    added_B = jnp.sum(q_segment_ids_BT, axis=1, dtype=jnp.int32)
    if isinstance(next(iter(cache.values())), Pool):
        assert filled.table_BP is not None
        pools = {
            name: write_pages(pool, new[name], filled.table_BP, lengths_B, segment_ids_BT > 0)
            for name, pool in cache.items()
        }
        kept = {name: read_pages(pool, filled.table_BP, new[name].dtype) for name, pool in pools.items()}
        held = held_by(lengths_B + added_B, next(iter(kept.values())).shape[1])
        return Seen(kept, *held, q_segment_ids_BT), pools
    time, slots = positions_BT.shape[1], next(iter(cache.values())).shape[2]
    after = slots_after(lengths_B, added_B, time, slots)
    written = {name: write(kept_BKSH, new[name], after.index_BT) for name, kept_BKSH in cache.items()}
    if time == 1 or window is None:
        kept = {name: kept_BKSH.swapaxes(1, 2) for name, kept_BKSH in written.items()}
        return Seen(kept, after.positions_BS, after.segment_ids_BS, q_segment_ids_BT), written
    # Several tokens at once overwrite slots of a ring that the first of them still see: look at both.
    before_positions_BS, before_segment_ids_BS = held_by(lengths_B, slots)
    kept = {
        name: jnp.concatenate([kept_BKSH.swapaxes(1, 2), new[name].astype(kept_BKSH.dtype)], axis=1)
        for name, kept_BKSH in cache.items()
    }
    positions_BS = jnp.concatenate([before_positions_BS, positions_BT], axis=1)
    segment_ids_BS = jnp.concatenate([before_segment_ids_BS, q_segment_ids_BT], axis=1)
    return Seen(kept, positions_BS, segment_ids_BS, q_segment_ids_BT), written
