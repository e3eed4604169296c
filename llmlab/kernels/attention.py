"""Attention: the contract, and which version answers it.

Versions: `reference` (obviously right, every score in memory), `short` (fast on CPU, weights kept, memory T * S),
`blockwise` (memory linear in length) and `cudnn` (NVIDIA GPU, few options, no segment ids: the model never uses it).
"""

import jax
import jax.numpy as jnp

from llmlab.core.errors import UserError, nearest
from llmlab.kernels.attention_blockwise import blockwise
from llmlab.kernels.attention_cudnn import cudnn, refusal
from llmlab.kernels.attention_mask import Mask
from llmlab.kernels.attention_reference import reference
from llmlab.kernels.attention_short import short

IMPLEMENTATIONS = ("auto", "reference", "short", "blockwise", "cudnn")
# Scores of one head up to which `short` wins forward and backward, measured on 2 CPU cores: at 2048 * 2048 it loses.
SHORT_SCORES = 1024 * 1024
# Scores of all heads and rows that it may keep for the backward pass, in each layer: 256 MB of float32.
SHORT_SCORES_IN_ALL = 2**26


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segment_ids_BT: jax.Array | None = None,
    k_segment_ids_BS: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks_N: jax.Array | None = None,
    scale: float | None = None,
    rows_in_order: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """Grouped-query attention of N = K * G query heads; out [B, T, N, width of v].

    A key is visible iff its segment is the query's and not 0 (padding), `k_position <= q_position` (`causal`) and
    `q_position - k_position < window`. Segment ids given for one side only are 1 on the other. A query that sees
    nothing gives zeros. The softmax accumulates in `promote_types(dtype, float32)`.

    Args:
      softcap: scores become `softcap * tanh(scores / softcap)` after scaling (Gemma 2).
      sinks_N: a learned extra logit per head that joins only the softmax's denominator (gpt-oss).
      scale: multiplies the scores; H ** -0.5 when None.
      rows_in_order: a promise that queries and keys are the same tokens, segments are contiguous, and positions rise
        by one within each. Indices then stand for positions, and blocks that cannot be seen are skipped.
      implementation: "auto", or one of `IMPLEMENTATIONS`.

    Raises:
      UserError: an unknown implementation, one that cannot honour what is asked, or shapes that do not fit.
    """
    _check_shapes(q_BTNH, k_BSKH, v_BSKH, sinks_N, window, rows_in_order)
    if (q_segment_ids_BT is None) != (k_segment_ids_BS is None):
        q_segment_ids_BT = jnp.ones_like(q_positions_BT) if q_segment_ids_BT is None else q_segment_ids_BT
        k_segment_ids_BS = jnp.ones_like(k_positions_BS) if k_segment_ids_BS is None else k_segment_ids_BS
    if rows_in_order:
        q_positions_BT = k_positions_BS = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)[None]
    mask = Mask(q_positions_BT, k_positions_BS, q_segment_ids_BT, k_segment_ids_BS, causal, window, rows_in_order)
    scale = q_BTNH.shape[3] ** -0.5 if scale is None else scale
    platform = jax.default_backend()
    why_not_cudnn = refusal(q_BTNH, v_BSKH, mask, softcap, sinks_N, platform)
    if implementation == "auto":
        (B, T, N, _), S = q_BTNH.shape, k_BSKH.shape[1]
        implementation = choose(B, T, S, N, platform, why_not_cudnn is None)
    if implementation == "cudnn":
        if why_not_cudnn is not None:
            raise UserError(f"attention implementation 'cudnn' cannot do this: {why_not_cudnn}; use 'auto'")
        return cudnn(q_BTNH, k_BSKH, v_BSKH, mask, scale=scale)
    versions = {"reference": reference, "short": short, "blockwise": blockwise}
    if implementation not in versions:
        raise UserError(
            f"unknown attention implementation {implementation!r}: {nearest(implementation, IMPLEMENTATIONS)}"
        )
    return versions[implementation](q_BTNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, sinks_N=sinks_N)


def choose(B: int, T: int, S: int, N: int, platform: str, cudnn_can: bool) -> str:
    """The version that "auto" is, for so many rows, queries, keys and query heads."""
    if T == 1:
        # On CPU `short` reads a cache that lies as [B, K, S, H] in place. Elsewhere a product reads any layout, so the
        # reference's grouped einsum is already lean.
        return "short" if platform == "cpu" else "reference"
    if cudnn_can:
        return "cudnn"
    return "short" if T * S <= SHORT_SCORES and B * N * T * S <= SHORT_SCORES_IN_ALL else "blockwise"


def _check_shapes(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_N: jax.Array | None,
    window: int | None,
    rows_in_order: bool,
) -> None:
    B, T, N, H = q_BTNH.shape
    if k_BSKH.shape[0] != B or k_BSKH.shape[3] != H or k_BSKH.shape[:3] != v_BSKH.shape[:3]:
        raise UserError(f"attention shapes do not fit: q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}")
    if N % k_BSKH.shape[2]:
        raise UserError(f"{N} query heads are no multiple of {k_BSKH.shape[2]} key heads")
    if sinks_N is not None and sinks_N.shape != (N,):
        raise UserError(f"attention sinks need one logit a query head, [{N}], not {sinks_N.shape}")
    if window is not None and window < 1:
        raise UserError(f"an attention window of {window} sees nothing: give 1 or more, or None for no window")
    if rows_in_order and k_BSKH.shape[1] != T:
        raise UserError(f"rows_in_order needs as many keys as queries, not {T} queries and {k_BSKH.shape[1]} keys")
