"""The key/value cache of one attention layer: slots that fill up, or a ring where the layer sees only a window.

Rows have lengths of their own. What a slot holds follows from the row's length alone, so no position is stored: of a
row with n tokens in R slots, slot s holds the latest position p < n with p ≡ s (mod R). A layer declares what it keeps
by a `CacheSpec`, and only the layer looks inside.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.mesh import Axes


class CacheSpec(NamedTuple):
    """One array that a layer keeps: the shape of one row of it, and the logical axes of all of it, rows first."""

    shape: tuple[int, ...]
    axes: Axes
    dtype: DTypeLike

    def empty(self, batch: int) -> jax.Array:
        """[B, *shape]."""
        return jnp.zeros((batch, *self.shape), self.dtype)


class Slots(NamedTuple):
    """Where tokens go, and what the slots hold."""

    index_BT: jax.Array
    positions_BS: jax.Array
    segment_ids_BS: jax.Array


def slots_after(lengths_B: jax.Array, added_B: jax.Array, time: int, slots: int) -> Slots:
    """Slots for `time` tokens appended to rows of `lengths_B`, the first `added_B` of them real, and what is then held.

    Padding, and tokens that later ones of the same call push out of the ring, get the index `slots`: out of range.
    """
    offsets_1T = jnp.arange(time, dtype=jnp.int32)[None]
    ends_B = lengths_B + added_B
    positions_BT = lengths_B[:, None] + offsets_1T
    kept_BT = (offsets_1T < added_B[:, None]) & (positions_BT >= ends_B[:, None] - slots)
    index_BT = jnp.where(kept_BT, positions_BT % slots, slots)
    held = held_by(ends_B, slots)
    return Slots(index_BT, *held)


def held_by(lengths_B: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """(positions_BS, segment_ids_BS): the position each slot holds, and 1 where it holds one, 0 where it is empty."""
    last_B1 = lengths_B[:, None] - 1
    positions_BS = last_B1 - (last_B1 - jnp.arange(slots, dtype=jnp.int32)[None]) % slots
    return positions_BS, (positions_BS >= 0).astype(jnp.int32)


def write(kept_BKSH: jax.Array, new_BTKH: jax.Array, index_BT: jax.Array) -> jax.Array:
    """kept_BKSH with the new tokens at these slots; an index out of range writes nothing."""
    B, K, S, H = kept_BKSH.shape
    # Over B and K merged, XLA on CPU writes in place: over [B, K, S, H] a batch of one is copied, twice a layer.
    new_XTH = new_BTKH.astype(kept_BKSH.dtype).transpose(0, 2, 1, 3).reshape(B * K, -1, H)
    rows_X1 = jnp.arange(B * K, dtype=jnp.int32)[:, None]
    kept_XSH = kept_BKSH.reshape(B * K, S, H).at[rows_X1, jnp.repeat(index_BT, K, axis=0)].set(new_XTH, mode="drop")
    return kept_XSH.reshape(B, K, S, H)


def empty(specs: Mapping[str, CacheSpec], batch: int) -> dict[str, jax.Array]:
    """The empty cache of one layer."""
    return {name: spec.empty(batch) for name, spec in specs.items()}
