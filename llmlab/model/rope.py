"""Rotary positions (RoPE, arXiv 2104.09864) and the ways to reach further than a model was trained to."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError

Rotary = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How fast each pair of a head's numbers turns: frequency_i = base^(-2i/H), then scaled.

    scaling: none; linear divides every frequency by `factor` (arXiv 2306.15595); ntk raises the base instead, so that
      the slowest pair is slowed by `factor` and the fastest by nothing; yarn divides those pairs that turn fewer than
      `beta_slow` times within `original_positions`, leaves those that turn more than `beta_fast` times, and ramps
      between (arXiv 2309.00071, eq. 13); llama3 does likewise by wavelength, from `low_frequency` to `high_frequency`
      (Llama 3.1's release).
    factor: how much further than `original_positions`, the longest sequence of the training before.
    truncate: yarn's ramp begins and ends at whole pairs.
    magnitude: multiplies queries and keys together with the rotation; 0 means 0.1·ln(factor) + 1 in yarn, 1 elsewhere.
    local_base: the base in local layers, unscaled (Gemma 3); 0 means that they turn as the global ones do.
    interleaved: pair i of a head is (2i, 2i + 1), as in the paper and DeepSeek's releases, and not (i, i + H/2).
    """

    base: float = 10_000.0
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 0.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    local_base: float = 0.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.base <= 1 or self.local_base < 0:
            raise UserError(f"model.rope.base={self.base} should be above 1, and local_base not negative")
        if self.scaling != "none" and self.factor < 1:
            raise UserError(f"model.rope.factor={self.factor} should be at least 1: it says how much further to reach")
        if self.scaling in ("yarn", "llama3") and self.original_positions < 1:
            raise UserError(
                f"model.rope.scaling={self.scaling} needs model.rope.original_positions: "
                "the longest sequence that the model was trained on before"
            )
        if self.scaling == "llama3" and self.high_frequency <= self.low_frequency:
            raise UserError("model.rope.high_frequency should be above model.rope.low_frequency")

    @property
    def local(self) -> "RopeConfig":
        """What local layers turn by."""
        return RopeConfig(base=self.local_base, interleaved=self.interleaved) if self.local_base else self


def frequencies(config: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """(radians a position of each pair, float64 [H/2]; the magnitude)."""
    pairs = np.arange(0, head_dim, 2) / head_dim
    if config.scaling == "ntk":
        stretched = config.base * config.factor ** (head_dim / (head_dim - 2))
        return stretched**-pairs, config.magnitude or 1.0
    frequency = config.base**-pairs
    slowed = frequency / config.factor
    if config.scaling == "linear":
        return slowed, config.magnitude or 1.0
    if config.scaling == "llama3":
        turns = config.original_positions * frequency / (2 * math.pi)
        kept = (turns - config.low_frequency) / (config.high_frequency - config.low_frequency)
        return _between(slowed, frequency, kept), config.magnitude or 1.0
    if config.scaling == "yarn":
        first, last = (_pair_that_turns(turns, config, head_dim) for turns in (config.beta_fast, config.beta_slow))
        if config.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (np.arange(head_dim // 2) - first) / max(last - first, 0.001)
        return _between(frequency, slowed, ramp), config.magnitude or 0.1 * math.log(config.factor) + 1
    return frequency, config.magnitude or 1.0


def rotary_angles(positions_BT: jax.Array, config: RopeConfig, head_dim: int, dtype: Any) -> Rotary:
    """(sin_BT1I, cos_BT1I) of position · frequency, I = H/2 (eq. 15), times the magnitude."""
    exact_I, magnitude = frequencies(config, head_dim)
    frequency_I = jnp.asarray(exact_I, accumulation_dtype(dtype))
    angle_BT1I = (positions_BT[..., None].astype(frequency_I.dtype) * frequency_I[None, None])[:, :, None]

    def turned() -> Rotary:
        return jnp.sin(angle_BT1I) * magnitude, jnp.cos(angle_BT1I) * magnitude

    def upright() -> Rotary:
        return jnp.zeros_like(angle_BT1I), jnp.full_like(angle_BT1I, magnitude)

    def branch() -> Rotary:
        return jax.lax.cond(jnp.any(positions_BT != 0), turned, upright)

    # XLA on CPU would compute them again for every use in every layer, 5% of a step. It removes optimization barriers
    # before it fuses, but takes nothing out of a branch.
    return jax.lax.platform_dependent(cpu=branch, default=turned)


def rotate(x_BTNH: jax.Array, rotary: Rotary, interleaved: bool) -> jax.Array:
    """Each head's pairs turned by the angles; what comes out has them as (i, i + H/2), whichever way they came in."""
    (sin_BT1I, cos_BT1I), dtype = rotary, x_BTNH.dtype
    x_BTNH = x_BTNH.astype(sin_BT1I.dtype)
    if interleaved:
        first, second = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
    else:
        first, second = jnp.split(x_BTNH, 2, axis=-1)
    turned = [first * cos_BT1I - second * sin_BT1I, second * cos_BT1I + first * sin_BT1I]
    return jnp.concatenate(turned, axis=-1).astype(dtype)


def _between(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    """From `low` at a share of 0 or less to `high` at 1 or more."""
    return low + (high - low) * np.clip(share, 0, 1)


def _pair_that_turns(turns: float, config: RopeConfig, head_dim: int) -> float:
    """The pair that turns so many times within the original positions."""
    wavelength = config.original_positions / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(config.base))
