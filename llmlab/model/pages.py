"""Keys and values in pages: what is kept of a row's tokens lies in blocks of a pool that all rows share.

Token p of a row is entry p mod (page size) of the page `table_BP[row, p // (page size)]`. Rows whose tokens begin alike
may share the pages of their beginning, and a row takes no more memory than its tokens do (arXiv 2309.06180).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.arrays import accumulation_dtype

LARGEST_INT8 = 127
LANES = 32  # numbers of a key that are multiplied and added up side by side


class Pool(NamedTuple):
    """values: [pages, K, page size, H]; where they are int8, scales: [pages, K, page size], by token and head."""

    values: jax.Array
    scales: jax.Array | None = None


def empty_pool(pages: int, heads: int, size: int, width: int, dtype: DTypeLike, *, int8: bool) -> Pool:
    """A pool of nothing."""
    values = jnp.zeros((pages, heads, size, width), jnp.int8 if int8 else dtype)
    return Pool(values, jnp.zeros((pages, heads, size), accumulation_dtype(dtype)) if int8 else None)


def write_pages(
    pool: Pool, new_BTKH: jax.Array, table_BP: jax.Array, lengths_B: jax.Array, is_real_BT: jax.Array
) -> Pool:
    """The pool with the real ones of these tokens after the `lengths_B` of their rows; others are not written."""
    pages, K, size, _ = pool.values.shape
    B, T = is_real_BT.shape
    positions_BT = lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    places_BT = jnp.minimum(positions_BT // size, table_BP.shape[1] - 1)
    is_inside_BT = is_real_BT & (positions_BT < table_BP.shape[1] * size)
    page_BT = jnp.where(is_inside_BT, jnp.take_along_axis(table_BP, places_BT, axis=1), pages)
    # Pages and heads merged, each token of a head is one contiguous piece.
    heads_11K = jnp.arange(K, dtype=jnp.int32)[None, None]
    index_BTK = jnp.where(page_BT[..., None] < pages, page_BT[..., None] * K + heads_11K, pages * K)
    offset_BTK = jnp.broadcast_to((positions_BT % size)[..., None], (B, T, K))

    def written(kept: jax.Array, new: jax.Array) -> jax.Array:
        merged = kept.reshape(pages * K, *kept.shape[2:])
        return merged.at[index_BTK, offset_BTK].set(new.astype(kept.dtype), mode="drop").reshape(kept.shape)

    if pool.scales is None:
        return Pool(written(pool.values, new_BTKH))
    new_BTKH = new_BTKH.astype(pool.scales.dtype)
    scale_BTK = jnp.max(jnp.abs(new_BTKH), axis=-1) / LARGEST_INT8
    rounded_BTKH = jnp.round(new_BTKH / jnp.where(scale_BTK > 0, scale_BTK, 1)[..., None])
    return Pool(written(pool.values, rounded_BTKH), written(pool.scales, scale_BTK))


def read_pages(pool: Pool, table_BP: jax.Array, dtype: DTypeLike) -> jax.Array:
    """kept_BSKH: the tokens of all pages of each row, whatever a page that is not the row's holds."""
    pages, K, size, H = pool.values.shape
    B, P = table_BP.shape
    index_BKP = jnp.minimum(table_BP, pages - 1)[:, None] * K + jnp.arange(K, dtype=jnp.int32)[None, :, None]
    values = jnp.take(pool.values.reshape(pages * K, size, H), index_BKP, axis=0, mode="clip")
    if pool.scales is not None:
        values = values * jnp.take(pool.scales.reshape(pages * K, size), index_BKP, axis=0, mode="clip")[..., None]
    return values.astype(dtype).reshape(B, K, P * size, H).swapaxes(1, 2)


def score_pages(pool: Pool, q_CKH: jax.Array, page_C: jax.Array) -> jax.Array:
    """q·k_CKS of queries with all that is kept in a page each.

    On CPU a sum of gathers, each of a part of the numbers, becomes one loop that reads the pages where they lie: a
    gather of whole pages is written out before it is multiplied, and takes a third to a half longer.
    """
    K, size, H = pool.values.shape[1:]
    lanes = math.gcd(H, LANES)
    numbers = jax.lax.GatherDimensionNumbers((1, 2, 3), collapsed_slice_dims=(0,), start_index_map=(0, 3))
    part_CKSL: Any = 0
    for first in range(0, H, lanes):
        k_CKSL = _gathered(pool.values, page_C, first, numbers, (1, K, size, lanes)).astype(q_CKH.dtype)
        part_CKSL += q_CKH[:, :, None, first : first + lanes] * k_CKSL
    scores_CKS = (part_CKSL.reshape(-1, lanes) @ jnp.ones(lanes, q_CKH.dtype)).reshape(part_CKSL.shape[:-1])
    return scores_CKS if pool.scales is None else scores_CKS * pool.scales[page_C]


def sum_pages(pool: Pool, weights_CKS: jax.Array, is_held_CS: jax.Array, page_C: jax.Array) -> jax.Array:
    """sum_CKH of what is kept in a page each, by weight; what is not held may be anything. Read as by `score_pages`."""
    K, size, H = pool.values.shape[1:]
    if pool.scales is not None:
        weights_CKS = weights_CKS * jnp.where(is_held_CS[:, None], pool.scales[page_C], 0)
    numbers = jax.lax.GatherDimensionNumbers((1, 2), collapsed_slice_dims=(0, 2), start_index_map=(0, 2))
    sum_CKH: Any = 0
    for place in range(size):
        v_CKH = _gathered(pool.values, page_C, place, numbers, (1, K, 1, H)).astype(weights_CKS.dtype)
        # A weight of 0 is no help where a value is not a number.
        v_CKH = jnp.where(is_held_CS[:, place, None, None], v_CKH, 0)
        sum_CKH += weights_CKS[..., place, None] * v_CKH
    return sum_CKH


def _gathered(
    values: jax.Array,
    page_C: jax.Array,
    place: int,
    numbers: jax.lax.GatherDimensionNumbers,
    sizes: tuple[int, ...],
) -> jax.Array:
    """Slices of pages, which must be inside of the pool, all of which begin at this place."""
    index_C2 = jnp.stack([page_C, jnp.full_like(page_C, place)], axis=-1)
    return jax.lax.gather(values, index_C2, numbers, sizes, mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def copy_page(pool: Pool, source: jax.Array, target: jax.Array) -> Pool:
    """The pool with page `target` as `source` is."""
    return jax.tree.map(lambda kept: kept.at[target].set(kept[source]), pool)
