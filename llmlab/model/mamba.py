"""The Mamba-2 mixer (arXiv 2405.21060): what stands in attention's place in layers of kind "mamba".

The five projections that released weights keep side by side are weights of their own here, so that heads can be split
over devices; b and c, which all heads of a group share, are whole on every one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.mesh import Axes
from llmlab.kernels.ssm import causal_conv, ssm
from llmlab.model import cache as caches
from llmlab.model import weights
from llmlab.model.base import Layer
from llmlab.model.ssm import init_conv, init_dt_bias, init_log_rate
from llmlab.model.types import Inputs


class Mamba(Layer):
    """A short convolution of x, b and c, the state-space recurrence, a skip past it, and a gate."""

    def cache_specs(self, capacity: int) -> dict[str, caches.CacheSpec]:
        """The state and the convolution's last inputs: as much for any number of tokens."""
        c, s, N = self.config, self.config.ssm, self.config.ssm_heads
        state = (N, s.head_dim, s.state), ("batch", "heads", "head_dim", None), accumulation_dtype(c.dtype)
        inputs = {"x_BWC": (N * s.head_dim, "heads"), "b_BWC": (s.groups * s.state, None)}
        tails = {
            name: caches.CacheSpec((s.conv - 1, size), ("batch", None, axis), jnp.dtype(c.dtype))
            for name, (size, axis) in (inputs | {"c_BWC": inputs["b_BWC"]}).items()
        }
        return {"state_BNHZ": caches.CacheSpec(*state), **tails}

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: Inputs, filled: caches.Filled | None, cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        c, s, N, dtype = self.config, self.config.ssm, self.config.ssm_heads, accumulation_dtype(x_BTD.dtype)
        heads: Axes = ("heads", "head_dim")
        of_heads, of_groups = (c.width, N, s.head_dim), (c.width, s.groups, s.state)
        z_BTNH, x_BTNH, b_BTKZ, c_BTKZ, dt_BTN = self.linears(
            x_BTD,
            {
                "z_DNH": (of_heads, ("embed", *heads)),
                "x_DNH": (of_heads, ("embed", *heads)),
                "b_DKZ": (of_groups, ("embed", None, None)),
                "c_DKZ": (of_groups, ("embed", None, None)),
                "dt_DN": ((c.width, N), ("embed", "heads")),
            },
            bias=s.bias,
        )
        # The recurrence runs along time: with time sharded, its inputs are gathered here.
        segment_ids_BT = self.constrain(inputs.segment_ids_BT, "batch", None)
        kept = {} if cache is None else _of_rows(cache, filled)
        x_BTNH, x_BWC = self._convolved(x_BTNH, "conv_x_WNH", heads, segment_ids_BT, kept.get("x_BWC"))
        b_BTKZ, b_BWC = self._convolved(b_BTKZ, "conv_b_WKZ", (None, None), segment_ids_BT, kept.get("b_BWC"))
        c_BTKZ, c_BWC = self._convolved(c_BTKZ, "conv_c_WKZ", (None, None), segment_ids_BT, kept.get("c_BWC"))
        dt_bias_N = weights.dense(self.weight("dt_bias_N", functools.partial(init_dt_bias, s), (N,), ("heads",)), dtype)
        dt_BTN = jax.nn.softplus(dt_BTN.astype(dtype) + dt_bias_N[None, None])
        y_BTNH, state_BNHZ = ssm(
            x_BTNH,
            self.constrain(jnp.clip(dt_BTN, s.dt_min, s.dt_max), "batch", None, "act_heads"),
            -jnp.exp(weights.dense(self.weight("log_rate_N", init_log_rate, (N,), ("heads",)), dtype)),
            b_BTKZ,
            c_BTKZ,
            segment_ids_BT=segment_ids_BT,
            state_BNHZ=kept.get("state_BNHZ"),
            chunk=s.chunk,
            implementation=s.implementation,
        )
        skip_N = weights.dense(self.weight("skip_N", nn.initializers.ones, (N,), ("heads",)), x_BTNH.dtype)
        y_BTNH = self.constrain(y_BTNH + x_BTNH * skip_N[None, None, :, None], "batch", "time", "act_heads", None)
        y_BTNH = Gate(c, self.partition, self.stack, name="gate")(y_BTNH, z_BTNH)
        out_BTD = self.linear(y_BTNH, "out_NHD", (N, s.head_dim, c.width), (*heads, "embed"), dims_in=2, bias=s.bias)
        written = {"state_BNHZ": state_BNHZ, "x_BWC": x_BWC, "b_BWC": b_BWC, "c_BWC": c_BWC}
        return out_BTD, None if cache is None else written

    def _convolved(
        self, x_BTNH: jax.Array, name: str, axes: Axes, segment_ids_BT: jax.Array, state_BWC: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """silu(the causal convolution of x_BTNH), and its last inputs."""
        s, shape, channels = self.config.ssm, x_BTNH.shape[2:], math.prod(x_BTNH.shape[2:])
        init, bias_C = functools.partial(init_conv, s), None
        w_WNH = weights.dense(self.weight(name, init, (s.conv, *shape), (None, *axes)), x_BTNH.dtype)
        if s.conv_bias:
            bias_C = weights.dense(self.weight(f"{name}_bias", init, shape, axes), x_BTNH.dtype).reshape(channels)
        x_BTNH = self.constrain(x_BTNH, "batch", None, "act_heads" if "heads" in axes else None, None)
        x_BTC = x_BTNH.reshape(*x_BTNH.shape[:2], channels)
        y_BTC, state_BWC = causal_conv(x_BTC, w_WNH.reshape(s.conv, channels), bias_C, segment_ids_BT, state_BWC)
        return jax.nn.silu(y_BTC).reshape(x_BTNH.shape), state_BWC


class Gate(Layer):
    """y·silu(z), then RMSNorm over the heads of a group together, where the config has it."""

    @nn.compact
    def __call__(self, y_BTNH: jax.Array, z_BTNH: jax.Array) -> jax.Array:
        dtype = accumulation_dtype(y_BTNH.dtype)
        out_BTNH = y_BTNH.astype(dtype) * jax.nn.silu(z_BTNH.astype(dtype))
        if self.config.ssm.norm:
            B, T, N, H = y_BTNH.shape
            out_BTKC = out_BTNH.reshape(B, T, self.config.ssm.groups, -1)
            mean_BTK1 = jnp.mean(jnp.square(out_BTKC), axis=-1, keepdims=True)
            out_BTNH = (out_BTKC * jax.lax.rsqrt(mean_BTK1 + self.config.norm_epsilon)).reshape(B, T, N, H)
            scale = weights.dense(self.weight("scale", nn.initializers.ones, (N * H,), ("norm",)), dtype)
            out_BTNH = out_BTNH * scale.reshape(1, 1, N, H)
        return out_BTNH.astype(y_BTNH.dtype)


def _of_rows(cache: dict, filled: caches.Filled | None) -> dict:
    """The cache, zero in rows of no tokens: what it holds there is of a row before, as with keys and values."""
    assert filled is not None
    fresh_B = filled.lengths_B == 0
    return {
        name: jnp.where(jnp.expand_dims(fresh_B, tuple(range(1, kept.ndim))), 0, kept) for name, kept in cache.items()
    }
