"""Attention through cuDNN's fused kernel on an NVIDIA GPU. Not yet measured or checked on one here.

It takes no segment ids (a mask would become a dense bias), no soft-cap and no sinks, and goes by index, not position.
The model's batches always carry segment ids, so no run uses it: it serves direct calls of `attention` without them.
"""

import jax
import jax.numpy as jnp

from llmlab.kernels.attention_mask import Mask

WIDEST_HEAD = 128


def cudnn(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, *, scale: float) -> jax.Array:
    """As `reference`, where `refusal` returns None."""
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )


def refusal(
    q_BTNH: jax.Array, v_BSKH: jax.Array, mask: Mask, softcap: float | None, sinks_N: jax.Array | None, platform: str
) -> str | None:
    """Why cuDNN cannot do what is asked, or None when it can."""
    H, V = q_BTNH.shape[3], v_BSKH.shape[3]
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and this is {platform}"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, not {q_BTNH.dtype}"
    if mask.q_segments_BT is not None:
        return "it takes no segment ids, and the batches of a model always carry them"
    if softcap is not None or sinks_N is not None:
        return "it takes neither soft-cap nor sinks"
    if (mask.causal or mask.window is not None) and not mask.in_order:
        return "it masks by index: causality and windows need rows_in_order=True"
    if mask.window is not None and not mask.causal:
        return "it takes a window only with causality"
    if H % 8 or H > WIDEST_HEAD or V != H:
        return (
            f"it needs a head width that is a multiple of 8 up to {WIDEST_HEAD}, the same for values; got {H} and {V}"
        )
    return None
