"""NEFTune: noise on the embeddings while a model is tuned (arXiv 2310.05914)."""

import jax
import jax.numpy as jnp

from llmlab.data.pipeline import TokenBatch
from llmlab.model.transformer import embed
from llmlab.model.types import Model, Params


def noisy_embeddings(model: Model, params: Params, batch: TokenBatch, alpha: float, key: jax.Array) -> jax.Array:
    """embeddings_BTD of a batch plus U(-1, 1) · alpha / sqrt(L·D), with L the length of each token's segment.

    Algorithm 1 there; a segment is what they call a sequence, so packing changes nothing.
    """
    x_BTD = embed(model, params, batch.tokens_BT)
    length_BT1 = segment_lengths(batch.segment_ids_BT)[..., None].astype(jnp.float32)
    noise_BTD = jax.random.uniform(key, x_BTD.shape, jnp.float32, -1, 1) * alpha
    return x_BTD + (noise_BTD * jax.lax.rsqrt(length_BT1 * x_BTD.shape[-1])).astype(x_BTD.dtype)


def segment_lengths(segment_ids_BT: jax.Array) -> jax.Array:
    """length_BT: of each token, how many there are in its segment; a segment's tokens lie side by side."""
    T = segment_ids_BT.shape[1]
    place_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], segment_ids_BT.shape)
    changes_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    is_first_BT = jnp.pad(changes_BT, ((0, 0), (1, 0)), constant_values=True)
    is_last_BT = jnp.pad(changes_BT, ((0, 0), (0, 1)), constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, place_BT, 0), axis=1)
    last_BT = jax.lax.cummin(jnp.where(is_last_BT, place_BT, T), axis=1, reverse=True)
    return last_BT - first_BT + 1
