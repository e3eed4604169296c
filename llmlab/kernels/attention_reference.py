"""Attention as the formula says, with every score in memory at once: what the fast versions are compared with."""

import jax
import jax.numpy as jnp

from llmlab.kernels.attention_mask import Mask, visible


def reference(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    sinks_N: jax.Array | None,
) -> jax.Array:
    """Softmax attention of N = K * G query heads over K key heads; a query that sees nothing gives zeros."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    dtype = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(dtype)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(dtype)) * scale
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    seen_B11TS = visible(mask)[:, None, None]
    scores_BKGTS = jnp.where(seen_B11TS, scores_BKGTS, jnp.finfo(dtype).min)
    highest_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks_1KG11 = sinks_N.astype(dtype).reshape(1, K, N // K, 1, 1)
        highest_BKGT1 = jnp.maximum(highest_BKGT1, sinks_1KG11)
    highest_BKGT1 = jax.lax.stop_gradient(highest_BKGT1)
    weights_BKGTS = jnp.where(seen_B11TS, jnp.exp(scores_BKGTS - highest_BKGT1), 0)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKGT1 = total_BKGT1 + jnp.exp(sinks_1KG11 - highest_BKGT1)
    weights_BKGTS = weights_BKGTS / jnp.where(total_BKGT1 == 0, 1, total_BKGT1)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH.astype(dtype))
    return out_BTKGH.reshape(B, T, N, v_BSKH.shape[3]).astype(q_BTNH.dtype)
