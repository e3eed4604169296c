"""From logits to a token: filters, the repetition penalty, and the draw.

Every setting is a number or an array [B], one for each row, so that one compiled function serves different requests at
once. A filter that is off by a Python number costs nothing, and what no row of an array asks for is not computed; only
`top_k` and `top_p` need a sort, and share one.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from llmlab.core.arrays import accumulation_dtype, named_key


def filter_logits(
    logits_BV: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
) -> jax.Array:
    """logits / temperature, with -inf for the tokens that a filter removes; the likeliest token always stays.

    Filters apply in this order; tokens as likely as the last one kept stay too.

    Args:
      temperature: 0 leaves the logits as they are: the row is for an argmax.
      top_k: only the k likeliest (0: all).
      top_p: only the likeliest that together reach this probability (arXiv 1904.09751).
      min_p: only those at least this likely relative to the likeliest (arXiv 2407.01082).
    """
    logits_BV = logits_BV.astype(accumulation_dtype(logits_BV.dtype))
    if not _is(temperature, 1.0):
        temperature_B1 = _column(temperature)
        logits_BV = logits_BV / jnp.where(temperature_B1 > 0, temperature_B1, 1).astype(logits_BV.dtype)
    floor_B1 = jnp.full((logits_BV.shape[0], 1), -jnp.inf, logits_BV.dtype)
    if not (_is(top_k, 0) and _is(top_p, 1.0)):
        top_k_B1, top_p_B1 = _column(top_k), _column(top_p)
        floor_B1 = jax.lax.cond(
            jnp.any(top_k_B1 > 0) | jnp.any(top_p_B1 < 1),
            lambda: _floor(jnp.sort(logits_BV, axis=-1, descending=True), top_k_B1, top_p_B1),
            lambda: floor_B1,
        )
    if not _is(min_p, 0.0):
        highest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
        relative_B1 = jnp.minimum(_column(min_p), 1).astype(logits_BV.dtype)
        floor_B1 = jnp.maximum(floor_B1, highest_B1 + jnp.log(relative_B1))
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def repetition_penalty(logits_BV: jax.Array, seen_BV: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Logits of tokens that the row has seen made smaller: divided if positive, else multiplied (arXiv 1909.05858)."""
    penalty_B1 = _column(penalty).astype(logits_BV.dtype)
    penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def penalties(
    logits_BV: jax.Array,
    in_prompt_BV: jax.Array,
    count_BV: jax.Array,
    *,
    repetition: ArrayLike = 1.0,
    presence: ArrayLike = 0.0,
    frequency: ArrayLike = 0.0,
) -> jax.Array:
    """Logits of tokens that were there before made smaller: the repetition penalty where they stand in the prompt or
    what was written, and presence + frequency · count by how often they were written (as OpenAI's API defines the two).
    """
    logits_BV = repetition_penalty(logits_BV, in_prompt_BV | (count_BV > 0), repetition)
    presence_B1, frequency_B1 = (_column(value).astype(logits_BV.dtype) for value in (presence, frequency))
    return logits_BV - presence_B1 * (count_BV > 0) - frequency_B1 * count_BV


def allowed_only(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """-inf where the bit of a token is 0: token v's is bit v mod 32 of word v // 32, uint32."""
    ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.uint32)
    bits_BV = jnp.take(allowed_BW, ids_V // 32, axis=-1) >> (ids_V % 32)[None]
    return jnp.where((bits_BV & 1) > 0, logits_BV, -jnp.inf)


def sample(
    logits_BV: jax.Array,
    seeds_B: jax.Array,
    positions_B: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
) -> jax.Array:
    """token_B int32, drawn from the filtered logits; at temperature 0 the likeliest, the lowest id among equals.

    The draw depends on the row's seed and the position that its token will have, and on no other row.
    """
    likeliest_B = likeliest(logits_BV)
    if _is(temperature, 0.0):
        return likeliest_B
    kept_BV = filter_logits(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(named_key(seed, "sample", position), kept_BV.shape[1:], kept_BV.dtype)  # type: ignore[arg-type]

    drawn_B = likeliest(kept_BV + jax.vmap(noise)(seeds_B, positions_B))
    return jnp.where(jnp.broadcast_to(temperature, drawn_B.shape) > 0, drawn_B, likeliest_B)


def likeliest(logits_XV: jax.Array) -> jax.Array:
    """token_X int32: the highest logit of each row, the lowest id among equals.

    As `jnp.argmax`, but 0 where a logit is not a number. XLA on CPU computes that one number at a time, which takes
    five times as long at 12,288 tokens.
    """
    vocab = logits_XV.shape[-1]
    is_below_XV = logits_XV < jnp.max(logits_XV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_below_XV, vocab, jnp.arange(vocab, dtype=jnp.int32)), axis=-1)


def _floor(sorted_BV: jax.Array, top_k_B1: jax.Array, top_p_B1: jax.Array) -> jax.Array:
    """The lowest logit that both filters keep, from logits in falling order."""
    vocab = sorted_BV.shape[-1]
    last_B1 = jnp.where(top_k_B1 > 0, jnp.minimum(top_k_B1, vocab), vocab).astype(jnp.int32) - 1
    last_B1 = jnp.broadcast_to(last_B1, (sorted_BV.shape[0], 1))
    kth_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
    sorted_BV = jnp.where(sorted_BV >= kth_B1, sorted_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # With top_p off, rounding must not remove the tail, where the sum before a token may reach 1 exactly.
    kept_BV = (before_BV < top_p_B1) | (jnp.arange(vocab)[None] == 0) | (top_p_B1 >= 1)
    return jnp.min(jnp.where(kept_BV, jnp.maximum(sorted_BV, kth_B1), jnp.inf), axis=-1, keepdims=True)


def _is(value: ArrayLike, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


def _column(value: ArrayLike) -> jax.Array:
    """[B, 1] of one value a row, [1, 1] of one for all."""
    return jnp.asarray(value).reshape(-1, 1)
