"""Dtypes that reductions accumulate in, named random keys, and metrics as (sum, weight) pairs."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for anything narrower; float64 stays, so tests can tell rounding from a bug; counts stay integers."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(dtype)


def named_key(seed: int, name: str, step: ArrayLike | None = None) -> jax.Array:
    """The random key for purpose `name` (and step): a pure function of its arguments, so no key lives in any state."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)


class Mean(NamedTuple):
    """A mean kept as its sum and weight until it is printed, so that parts of any size add up exactly."""

    sum: Any
    weight: Any

    def __add__(self, other: object) -> "Mean":
        assert isinstance(other, Mean)
        return Mean(self.sum + other.sum, self.weight + other.weight)

    def value(self) -> float:
        """sum / weight; NaN where nothing was counted."""
        weight = float(self.weight)
        return float(self.sum) / weight if weight else float("nan")


Metrics = dict[str, Mean]


def scalars(metrics: Metrics) -> Metrics:
    """Those that are one number each, and can be printed."""
    return {name: mean for name, mean in metrics.items() if jnp.ndim(mean.sum) == 0}


def global_norm(tree: object) -> jax.Array:
    """The Euclidean norm of all leaves together, accumulated in at least float32."""
    squares = [jnp.sum(jnp.square(x.astype(accumulation_dtype(x.dtype)))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares[1:], start=squares[0]))
