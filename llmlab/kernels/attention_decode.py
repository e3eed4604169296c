"""Attention of one new token a row to a cache, on CPU: no gradient, no copy of the cache.

XLA on CPU transposes the operands of a batched product whose batch axes do not come first, which for a cache [B, S, K,
H] means writing it again at every token. Reading it as [B, S, K * H] against queries that are zero outside their own
head costs K times the arithmetic and none of the copying: three times faster where memory is what is short.
"""

import jax
import jax.numpy as jnp

from llmlab.kernels.attention_mask import Mask, visible


def decode(
    q_B1NH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """As `reference`, for T = 1."""
    B, _, N, H = q_B1NH.shape
    _, S, K, V = v_BSKH.shape
    dtype = jnp.promote_types(q_B1NH.dtype, jnp.float32)
    own_head_NK = jnp.repeat(jnp.eye(K, dtype=bool), N // K, axis=0)
    q_BNKH = jnp.where(own_head_NK[None, :, :, None], q_B1NH[:, 0, :, None], 0)
    scores_BNS = jnp.einsum(
        "bnd,bsd->bns", q_BNKH.reshape(B, N, K * H), k_BSKH.reshape(B, S, K * H), preferred_element_type=dtype
    )
    scores_BNS = scores_BNS * scale
    if softcap is not None:
        scores_BNS = softcap * jnp.tanh(scores_BNS / softcap)
    scores_BNS = jnp.where(visible(mask), scores_BNS, -jnp.inf)
    highest_BN1 = jnp.maximum(jnp.max(scores_BNS, axis=-1, keepdims=True), jnp.finfo(dtype).min)
    if sinks_N is not None:
        highest_BN1 = jnp.maximum(highest_BN1, sinks_N[None, :, None])
    weights_BNS = jnp.exp(scores_BNS - highest_BN1)
    total_BN1 = jnp.sum(weights_BNS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BN1 = total_BN1 + jnp.exp(sinks_N[None, :, None] - highest_BN1)
    out_BND = jnp.einsum(
        "bns,bsd->bnd", weights_BNS.astype(v_BSKH.dtype), v_BSKH.reshape(B, S, K * V), preferred_element_type=dtype
    )
    out_BNH = jnp.sum(jnp.where(own_head_NK[None, :, :, None], out_BND.reshape(B, N, K, V), 0), axis=2)
    return (out_BNH / jnp.where(total_BN1 == 0, 1, total_BN1)).astype(q_B1NH.dtype)[:, None]
