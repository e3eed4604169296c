"""The settings of Mamba-2 layers (arXiv 2405.21060), and how those of their weights begin that have a meaning."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmlab.core.errors import UserError

LARGEST_RATE = 16.0


@dataclasses.dataclass(frozen=True)
class SsmConfig:
    """A Mamba-2 mixer.

    state: Z, numbers of the state for each of a head's. head_dim: H. heads: N; 0 means expand·width / head_dim.
    groups: of heads that share b and c, and are normalised together. conv: inputs that the causal convolution sees.
    chunk: tokens of a row that are taken at once, 256 at most. norm: RMSNorm after the gate (else the gate alone).
    bias: on the projections in and out. conv_bias: on the convolution. mlp: whether an MLP follows, as in hybrids.
    dt_init_min, dt_init_max, dt_init_floor: the steps at initialisation, log-uniform and then not below the last.
    dt_min, dt_max: what steps are clipped to; dt_max=None is no limit.
    implementation: auto, reference, chunked.
    """

    state: int = 128
    head_dim: int = 64
    heads: int = 0
    expand: int = 2
    groups: int = 1
    conv: int = 4
    chunk: int = 64
    norm: bool = True
    bias: bool = False
    conv_bias: bool = True
    mlp: bool = False
    dt_init_min: float = 0.001
    dt_init_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_min: float = 0.0
    dt_max: float | None = None
    implementation: Literal["auto", "reference", "chunked"] = "auto"

    def __post_init__(self) -> None:
        for name in ("state", "head_dim", "expand", "groups", "conv", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"model.ssm.{name}={getattr(self, name)} should be at least 1")
        if self.heads < 0:
            raise UserError(f"model.ssm.heads={self.heads} should be 0 (chosen for you) or more")
        if not 0 < self.dt_init_min <= self.dt_init_max or not self.dt_init_floor > 0:
            raise UserError(
                f"model.ssm.dt_init_min={self.dt_init_min}, dt_init_max={self.dt_init_max} and "
                f"dt_init_floor={self.dt_init_floor} should be above 0, and the first not above the second"
            )
        if self.dt_min < 0 or (self.dt_max is not None and self.dt_max < self.dt_min):
            raise UserError(
                f"model.ssm.dt_min={self.dt_min} should be 0 or more, and model.ssm.dt_max={self.dt_max} not below it"
            )

    def heads_at(self, width: int) -> int:
        """N in a model of this width."""
        return self.heads or self.expand * width // self.head_dim

    def check(self, width: int) -> None:
        """Raises UserError where these do not fit a model of this width."""
        inner = self.expand * width
        if not self.heads and inner % self.head_dim:
            raise UserError(
                f"model.ssm.head_dim={self.head_dim} does not divide model.ssm.expand·model.width={inner}: "
                f"try head_dim={math.gcd(self.head_dim, inner)}, or set model.ssm.heads"
            )
        heads = self.heads_at(width)
        if heads % self.groups:
            raise UserError(
                f"model.ssm.groups={self.groups} does not divide the {heads} heads of the state space: "
                f"try groups={math.gcd(self.groups, heads)}"
            )


def init_log_rate(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Logarithms of rates uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, LARGEST_RATE)).astype(dtype)


def init_dt_bias(config: SsmConfig, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What softplus turns into the steps that the config asks for."""
    low, high = math.log(config.dt_init_min), math.log(config.dt_init_max)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high)), config.dt_init_floor)
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def init_conv(config: SsmConfig, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform, of variance 1 / (3·inputs of a channel): PyTorch's for convolutions, weight and bias."""
    bound = config.conv**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
