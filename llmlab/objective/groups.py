"""Reductions of packed groups: from what is known of tokens, [B, T], to what is known of responses, [B, P, R].

Each compares segments and sums: one loop where XLA fuses the two; on CPU it holds tokens by responses in between. What
lies in padding is selected away and never multiplied, so it may be anything, NaN included.
"""

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Mean, accumulation_dtype
from llmlab.data.pipeline import GroupBatch


def response_sums(x_BT: jax.Array, batch: GroupBatch) -> jax.Array:
    """x_BPR: the sum over the targets of each response that the model is to say."""
    return _sums(x_BT, batch.mask_BT > 0, batch)


def response_counts(batch: GroupBatch) -> jax.Array:
    """count_BPR: the targets of each response that the model is to say, in float32."""
    return _sums(jnp.ones(batch.tokens_BT.shape, jnp.float32), batch.mask_BT > 0, batch)


def at_last_token(x_BT: jax.Array, batch: GroupBatch) -> jax.Array:
    """x_BPR: x at the last token of each response, 0 where there is none."""
    next_BT = jnp.pad(batch.segment_ids_BT[:, 1:], ((0, 0), (0, 1)))
    return _sums(x_BT, batch.segment_ids_BT != next_BT, batch)


def where_present(x_BPR: jax.Array, batch: GroupBatch) -> jax.Array:
    """x_BPR of the responses that are there, 0 elsewhere."""
    return jnp.where(batch.present_BPR > 0, x_BPR, 0)


def mean_where(x_: jax.Array, where_: jax.Array) -> Mean:
    """The mean of x over the places where `where_` holds, in at least float32."""
    dtype = accumulation_dtype(x_.dtype)
    return Mean(jnp.sum(jnp.where(where_, x_.astype(dtype), 0)), jnp.sum(where_, dtype=dtype))


def _sums(x_BT: jax.Array, counts_BT: jax.Array, batch: GroupBatch) -> jax.Array:
    P, R = batch.present_BPR.shape[1:]
    segment_11PR = 1 + jnp.arange(P * R, dtype=jnp.int32).reshape(1, 1, P, R)
    is_of_BTPR = (batch.segment_ids_BT[..., None, None] == segment_11PR) & counts_BT[..., None, None]
    x_BT = x_BT.astype(accumulation_dtype(x_BT.dtype))
    return jnp.sum(jnp.where(is_of_BTPR, x_BT[..., None, None], 0), axis=1)
