"""Keys and values in pages: what is kept of a row's tokens lies in blocks of a pool that all rows share.

Token p of a row is entry p mod (page size) of the page `table_BP[row, p // (page size)]`. Rows whose tokens begin alike
may share the pages of their beginning, and a row takes no more memory than its tokens do (arXiv 2309.06180).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.arrays import accumulation_dtype

LARGEST_INT8 = 127


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


def copy_page(pool: Pool, source: jax.Array, target: jax.Array) -> Pool:
    """The pool with page `target` as `source` is."""
    return jax.tree.map(lambda kept: kept.at[target].set(kept[source]), pool)
