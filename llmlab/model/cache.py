"""The key/value cache of one attention layer: slots that fill up, or a ring where the layer sees only a window.

Rows have lengths of their own. What a slot holds follows from the row's length alone, so no position is stored: of a
row with n tokens in R slots, slot s holds the latest position p < n with p ≡ s (mod R). A layer declares what it keeps
by a `CacheSpec`, and only the layer looks inside.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.mesh import Axes
from llmlab.kernels.attention import attention
from llmlab.kernels.attention_ragged import Blocks, gathered, ragged
from llmlab.model.pages import Pool, empty_pool, read_pages, score_pages, sum_pages, write_pages
from llmlab.model.types import Inputs

Kept = dict[str, jax.Array]
Expand = Callable[[Kept], tuple[jax.Array, jax.Array]]
PAGES_AT_ONCE = 2  # of a row, gathered into a block of the loop over them
IN_PLACE_AT_ONCE = 16  # pages that a turn of the loop reads where they lie
LARGEST_IN_PLACE = 32  # tokens in a page: as many gathers are written out
SHORT_ROW = 256  # tokens that are gathered in less time than a loop over them takes, where there is but one row


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

    kept: Kept
    positions_BS: jax.Array
    segment_ids_BS: jax.Array
    q_segment_ids_BT: jax.Array


def attend(
    q_BTNH: jax.Array,
    new: Kept,
    inputs: Inputs,
    filled: Filled | None,
    cache: dict[str, Any] | None,
    *,
    expand: Expand | None = None,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks_N: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, dict[str, Any] | None]:
    """out_BTNH of queries once these new tokens, [B, T, K, H] by name, are there; and the cache with them, if any.

    expand: keys and values, [B, S, K, H] and [B, S, K, V], of what is kept of tokens; None: these are what is kept.
    """
    positions_BT, segment_ids_BT = inputs.positions_BT, inputs.segment_ids_BT
    table_BP = filled.table_BP if filled is not None and _in_pages(cache) else None
    if table_BP is not None and loops_over_pages(len(table_BP), table_BP.shape[1] * _page_size(cache)):
        assert filled is not None
        assert window is None  # layers with a window keep rings
        pools = _written(new, segment_ids_BT, filled, cache)
        lengths_B = filled.lengths_B + _added(segment_ids_BT)

        blocks = _blocks(pools, table_BP, expand, q_BTNH)
        out_BTNH = ragged(
            q_BTNH,
            blocks,
            most=-(-table_BP.shape[1] * _page_size(pools) // blocks.size),
            lengths_B=lengths_B,
            q_positions_BT=positions_BT,
            scale=q_BTNH.shape[3] ** -0.5 if scale is None else scale,
            softcap=softcap,
            sinks_N=sinks_N,
        )
        return out_BTNH, pools
    seen, after = _seen_with(new, positions_BT, segment_ids_BT, filled, cache, window)
    out_BTNH = attention(
        q_BTNH,
        *(expand or _as_kept)(seen.kept),
        q_positions_BT=positions_BT,
        k_positions_BS=seen.positions_BS,
        q_segment_ids_BT=seen.q_segment_ids_BT,
        k_segment_ids_BS=seen.segment_ids_BS,
        window=window,
        softcap=softcap,
        sinks_N=sinks_N,
        scale=scale,
        implementation=implementation,
        rows_in_order=cache is None,
    )
    return out_BTNH, after


def loops_over_pages(rows: int, tokens: int) -> bool:
    """Whether steps loop over the pages that so many rows have, whose tables reach so many tokens, or gather them all.

    On CPU a loop takes half the time where rows differ, and serves all lengths; one short row is gathered sooner.
    """
    return jax.default_backend() == "cpu" and (rows > 1 or tokens > SHORT_ROW)


def _blocks(pools: dict[str, Pool], table_BP: jax.Array, expand: Expand | None, q_BTNH: jax.Array) -> Blocks:
    """The pages of each row: where they lie, one by one, where a head of keys has one query; or gathered."""
    dtype, size = accumulation_dtype(q_BTNH.dtype), _page_size(pools)
    heads = next(iter(pools.values())).values.shape[1]
    if expand is None and q_BTNH.shape[1:3] == (1, heads) and size <= LARGEST_IN_PLACE:
        keys, values = _as_kept(pools)

        def pages(row_C: jax.Array, number_C: jax.Array) -> jax.Array:
            return jnp.minimum(table_BP.at[row_C, number_C].get(mode="clip"), len(keys.values) - 1)

        def scores(q_CK11H: jax.Array, row_C: jax.Array, number_C: jax.Array) -> jax.Array:
            scores_CKS = score_pages(keys, q_CK11H[:, :, 0, 0].astype(dtype), pages(row_C, number_C))
            return scores_CKS[:, :, None, None]

        def sums(weights_CK11S: jax.Array, is_held_CS: jax.Array, row_C: jax.Array, number_C: jax.Array) -> jax.Array:
            sum_CKH = sum_pages(values, weights_CK11S[:, :, 0, 0], is_held_CS, pages(row_C, number_C))
            return sum_CKH[:, :, None, None]

        return Blocks(size, heads, values.values.shape[3], IN_PLACE_AT_ONCE, scores, sums)

    def block_of(row_C: jax.Array, number_C: jax.Array) -> tuple[jax.Array, jax.Array]:
        places_CP = number_C[:, None] * PAGES_AT_ONCE + jnp.arange(PAGES_AT_ONCE, dtype=jnp.int32)[None]
        table_CP = table_BP.at[row_C[:, None], places_CP].get(mode="clip")
        return (expand or _as_kept)({name: read_pages(pool, table_CP, q_BTNH.dtype) for name, pool in pools.items()})

    return gathered(block_of, len(table_BP), dtype)


def _as_kept(kept: Mapping[str, Any]) -> tuple[Any, Any]:
    return kept["k_BKSH"], kept["v_BKSH"]


def _seen_with(
    new: Kept,
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
    lengths_B, added_B = filled.lengths_B, _added(segment_ids_BT)
    # A row of a cache is one document.
    q_segment_ids_BT = (segment_ids_BT > 0).astype(jnp.int32)
    if _in_pages(cache):
        assert filled.table_BP is not None
        pools = _written(new, segment_ids_BT, filled, cache)
        kept = {name: read_pages(pool, filled.table_BP, new[name].dtype) for name, pool in pools.items()}
        held = held_by(lengths_B + added_B, next(iter(kept.values())).shape[1])
        # What others left in a page is multiplied by a weight of 0, which is no help where it is not a number.
        is_held_BS11 = (held[1] > 0)[..., None, None]
        kept = {name: jnp.where(is_held_BS11, kept_BSKH, 0) for name, kept_BSKH in kept.items()}
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


def _in_pages(cache: dict[str, Any] | None) -> bool:
    return cache is not None and isinstance(next(iter(cache.values())), Pool)


def _page_size(pools: Any) -> int:
    return next(iter(pools.values())).values.shape[2]


def _written(new: Kept, segment_ids_BT: jax.Array, filled: Filled, cache: dict[str, Any] | None) -> dict[str, Pool]:
    assert cache is not None
    assert filled.table_BP is not None
    return {
        name: write_pages(pool, new[name], filled.table_BP, filled.lengths_B, segment_ids_BT > 0)
        for name, pool in cache.items()
    }


def _added(segment_ids_BT: jax.Array) -> jax.Array:
    """How many of the new tokens of each row are real."""
    return jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
