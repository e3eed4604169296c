"""Which key each query may see: the one description that every attention version reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Positions and segments of queries and keys; positions may be [1, T] when every row has the same.

    A key is visible iff its segment is the query's and not 0 (padding), it is not later (`causal`), and
    `q_position - k_position < window`. Absent segment ids mean one document without padding. `in_order` promises
    that causality and window hold between indices too (`attention`'s `rows_in_order`), so blocks may be skipped.
    """

    q_positions_BT: jax.Array
    k_positions_BS: jax.Array
    q_segments_BT: jax.Array | None
    k_segments_BS: jax.Array | None
    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    in_order: bool = dataclasses.field(metadata={"static": True})


def visible(mask: Mask) -> jax.Array:
    """Boolean [B, T, S]; B is 1 when no row differs from another."""
    q_BT1, k_B1S = mask.q_positions_BT[:, :, None], mask.k_positions_BS[:, None, :]
    seen_BTS = jnp.ones((1, q_BT1.shape[1], k_B1S.shape[2]), bool)
    if mask.causal:
        seen_BTS = seen_BTS & (k_B1S <= q_BT1)
    if mask.window is not None:
        seen_BTS = seen_BTS & (q_BT1 - k_B1S < mask.window)
    if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
        segment_B1S = mask.k_segments_BS[:, None, :]
        seen_BTS = seen_BTS & (mask.q_segments_BT[:, :, None] == segment_B1S) & (segment_B1S != 0)
    return seen_BTS


def block_of(mask: Mask, q_start: int | jax.Array, q_size: int, k_start: int | jax.Array, k_size: int) -> Mask:
    """The mask of `q_size` queries from `q_start` on, against `k_size` keys from `k_start` on."""

    def cut(array_BX: Any, start: int | jax.Array, size: int) -> Any:
        return None if array_BX is None else lax.dynamic_slice_in_dim(array_BX, start, size, axis=1)

    return dataclasses.replace(
        mask,
        q_positions_BT=cut(mask.q_positions_BT, q_start, q_size),
        k_positions_BS=cut(mask.k_positions_BS, k_start, k_size),
        q_segments_BT=cut(mask.q_segments_BT, q_start, q_size),
        k_segments_BS=cut(mask.k_segments_BS, k_start, k_size),
    )


def padded(mask: Mask, q_length: int, k_length: int) -> Mask:
    """The mask lengthened by keys that nobody sees and queries that see nothing, or only what follows the real keys."""
    q_more, k_more = q_length - mask.q_positions_BT.shape[1], k_length - mask.k_positions_BS.shape[1]
    if not q_more and not k_more:
        return mask
    q_segments_BT, k_segments_BS = mask.q_segments_BT, mask.k_segments_BS
    if q_segments_BT is None or k_segments_BS is None:
        q_segments_BT = jnp.ones_like(mask.q_positions_BT)
        k_segments_BS = jnp.ones_like(mask.k_positions_BS)
    return dataclasses.replace(
        mask,
        q_positions_BT=jnp.pad(mask.q_positions_BT, ((0, 0), (0, q_more))),
        k_positions_BS=jnp.pad(mask.k_positions_BS, ((0, 0), (0, k_more))),
        q_segments_BT=jnp.pad(q_segments_BT, ((0, 0), (0, q_more))),
        k_segments_BS=jnp.pad(k_segments_BS, ((0, 0), (0, k_more))),
    )


def key_range(mask: Mask, q_start: int, q_stop: int, k_length: int) -> tuple[int, int]:
    """The keys [first, last) outside of which queries [q_start, q_stop) see nothing, as far as is known statically."""
    if not mask.in_order:
        return 0, k_length
    first = 0 if mask.window is None else max(0, q_start - mask.window + 1)
    return first, min(q_stop, k_length) if mask.causal else k_length
