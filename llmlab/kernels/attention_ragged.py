"""Attention of rows that have keys of very different number, which lie in blocks anywhere: for steps of decoding.

The blocks of all rows make one list, and a loop goes through it some at a time, with a running softmax for each row
(arXiv 2205.14135, 2309.06180). So the work is that of the blocks that there are, not of the longest row times the rows,
and one compiled loop serves all lengths. For CPU: on a GPU every turn of the loop is a stop.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.arrays import accumulation_dtype

LOWEST = -1e30  # in place of -inf, from which nothing can be taken
MOST_AT_ONCE = 64  # blocks in a turn: what they hold stays near the core


class Blocks(NamedTuple):
    """Keys and values in blocks, of rows [C] and the number of a block in each.

    size: keys in a block. heads: K. width: V, of a value. at_once: blocks in a turn of the loop.
    scores: of q_CKGTH, rows and numbers: q·k as [C, K, G, T, size].
    sums: of weights_CKGTS, is_held_CS, rows and numbers: values by weight, [C, K, G, T, V], without those not held.
    """

    size: int
    heads: int
    width: int
    at_once: int
    scores: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    sums: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def gathered(
    block_of: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]], rows: int, dtype: DTypeLike
) -> Blocks:
    """Blocks that are put together before they are multiplied, in the loop over so many rows.

    block_of: of rows [C] and numbers [C] of a block in each: keys and values, [C, size, K, H] and [C, size, K, V].
    """
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    keys, values = jax.eval_shape(block_of, one, one)

    def scores(q_CKGTH: jax.Array, row_C: jax.Array, number_C: jax.Array) -> jax.Array:
        k_CSKH, _ = block_of(row_C, number_C)
        return jnp.einsum("CKGTH,CSKH->CKGTS", q_CKGTH, k_CSKH, preferred_element_type=dtype)

    def sums(weights_CKGTS: jax.Array, is_held_CS: jax.Array, row_C: jax.Array, number_C: jax.Array) -> jax.Array:
        _, v_CSKV = block_of(row_C, number_C)
        # A weight of 0 is no help where a value is not a number.
        v_CSKV = jnp.where(is_held_CS[..., None, None], v_CSKV, 0)
        weights_CKGTS = weights_CKGTS.astype(v_CSKV.dtype)
        return jnp.einsum("CKGTS,CSKV->CKGTV", weights_CKGTS, v_CSKV, preferred_element_type=dtype)

    at_once = max(4, min(2 * rows, MOST_AT_ONCE))
    return Blocks(keys.shape[1], keys.shape[2], values.shape[3], at_once, scores, sums)


class _Softmax(NamedTuple):
    """Of each query so far: its highest score, and sums of e^(score - highest), plain and of values."""

    highest_BKGT: jax.Array
    total_BKGT: jax.Array
    sum_BKGTV: jax.Array


def ragged(
    q_BTNH: jax.Array,
    blocks: Blocks,
    *,
    most: int,
    lengths_B: jax.Array,
    q_positions_BT: jax.Array,
    scale: float,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention, causal; out [B, T, N, width of v], zeros for rows of no keys.

    Args:
      blocks: what they hold beyond their row's keys may be anything.
      most: blocks that any row may have; keys beyond them are not looked at.
      lengths_B: keys of each row, whose positions are 0, 1, …
      scale, softcap, sinks_N: as `attention` has them.
    """
    (B, T, N, _), dtype = q_BTNH.shape, accumulation_dtype(q_BTNH.dtype)
    block, K, V, at_once = blocks.size, blocks.heads, blocks.width, blocks.at_once
    lengths_B = jnp.minimum(lengths_B, most * block)
    # Outside of the loop, and the same for every layer of a step: computed once.
    ends_B = jnp.cumsum(-(-lengths_B // block))
    item_I = jnp.arange(-(-B * most // at_once) * at_once, dtype=jnp.int32)
    row_I = jnp.sum(item_I[:, None] >= ends_B[None], axis=1, dtype=jnp.int32)
    begins_B = jnp.concatenate([jnp.zeros(1, ends_B.dtype), ends_B])
    number_I = item_I - begins_B[row_I].astype(jnp.int32)
    last_IT = jnp.minimum(q_positions_BT, lengths_B[:, None] - 1).at[row_I].get(mode="fill", fill_value=-1)
    keys_I = lengths_B.at[row_I].get(mode="fill", fill_value=0) - number_I * block
    is_of_IB = row_I[:, None] == jnp.arange(B, dtype=jnp.int32)[None]
    items = (jnp.minimum(row_I, B - 1), number_I, last_IT - number_I[:, None] * block, keys_I, is_of_IB)

    q_BKGTH = (q_BTNH * scale).reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)

    def body(carry: tuple[jax.Array, _Softmax]) -> tuple[jax.Array, _Softmax]:
        first, before = carry
        row_C, number_C, last_CT, keys_C, is_of_CB = (
            jax.lax.dynamic_slice_in_dim(each, first, at_once) for each in items
        )
        scores_CKGTS = blocks.scores(q_BKGTH[row_C], row_C, number_C)
        if softcap is not None:
            scores_CKGTS = softcap * jnp.tanh(scores_CKGTS / softcap)
        seen_CTS = jnp.arange(block, dtype=jnp.int32)[None, None] <= last_CT[:, :, None]
        scores_CKGTS = jnp.where(seen_CTS[:, None, None], scores_CKGTS, LOWEST)
        # Blocks of one row come together, at the highest score of any.
        of_row_CBKGT = jnp.where(is_of_CB[:, :, None, None, None], jnp.max(scores_CKGTS, axis=-1)[:, None], LOWEST)
        highest_BKGT = jnp.maximum(before.highest_BKGT, jnp.max(of_row_CBKGT, axis=0))
        weights_CKGTS = jnp.exp(scores_CKGTS - highest_BKGT[row_C][..., None]) * seen_CTS[:, None, None]
        is_held_CS = jnp.arange(block, dtype=jnp.int32)[None] < keys_C[:, None]
        sum_CKGTV = blocks.sums(weights_CKGTS, is_held_CS, row_C, number_C)
        kept_BKGT = jnp.exp(before.highest_BKGT - highest_BKGT)
        # Not by a product with zeros and ones: what is not a number in one row is to stay there.
        total_BKGT = jax.ops.segment_sum(jnp.sum(weights_CKGTS, axis=-1), row_C, B, indices_are_sorted=True)
        sum_BKGTV = jax.ops.segment_sum(sum_CKGTV, row_C, B, indices_are_sorted=True)
        return first + at_once, _Softmax(
            highest_BKGT,
            before.total_BKGT * kept_BKGT + total_BKGT,
            before.sum_BKGTV * kept_BKGT[..., None] + sum_BKGTV,
        )

    queries = (B, K, N // K, T)
    start = _Softmax(jnp.full(queries, LOWEST, dtype), jnp.zeros(queries, dtype), jnp.zeros((*queries, V), dtype))
    _, done = jax.lax.while_loop(lambda carry: carry[0] < ends_B[-1], body, (jnp.int32(0), start))
    total_BKGT = done.total_BKGT
    if sinks_N is not None:
        # A row of no keys has no highest score: its sum is 0 whatever this is.
        total_BKGT += jnp.exp(jnp.minimum(sinks_N.astype(dtype).reshape(1, K, N // K, 1) - done.highest_BKGT, 80))
    out_BKGTV = done.sum_BKGTV / jnp.where(total_BKGT > 0, total_BKGT, 1)[..., None]
    return out_BKGTV.transpose(0, 3, 1, 2, 4).reshape(B, T, N, V).astype(q_BTNH.dtype)
