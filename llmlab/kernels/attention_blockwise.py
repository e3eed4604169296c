"""Attention in blocks of queries and keys, the weights computed again in the backward pass: memory linear in length.

FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2) in plain XLA, for any mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from llmlab.kernels.attention_mask import Mask, block_of, padded, visible

BLOCK = 128


def blockwise(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    sinks_N: jax.Array | None,
    block: int = BLOCK,
) -> jax.Array:
    """As `reference`; its gradient too, but only first derivatives in reverse mode."""
    B, T, N, _ = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_block, k_block = min(block, T), min(block, S)
    mask = padded(mask, -(-T // q_block) * q_block, -(-S // k_block) * k_block)
    q_CBKRH = _to_blocks(q_BTNH, q_block, K)
    k_BKSH, v_BKSH = (_heads_first(x, k_block) for x in (k_BSKH, v_BSKH))
    sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
    out_CBKRH = _attend(scale, softcap, k_block, q_CBKRH, k_BKSH, v_BKSH, mask, sinks_KG)
    out_CBKGTH = out_CBKRH.reshape(*out_CBKRH.shape[:3], N // K, q_block, -1)
    return out_CBKGTH.transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, N, v_BSKH.shape[3])[:, :T]


def _to_blocks(q_BTNH: jax.Array, block: int, K: int) -> jax.Array:
    """[blocks, B, K, R, H]: the queries of a block and of a group of heads are the rows R of one product."""
    B, T, N, H = q_BTNH.shape
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
    q_BCTKGH = q_BTNH.reshape(B, -1, block, K, N // K, H)
    return q_BCTKGH.transpose(1, 0, 3, 4, 2, 5).reshape(-1, B, K, N // K * block, H)


def _heads_first(x_BSKH: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x_BSKH, ((0, 0), (0, -x_BSKH.shape[1] % block), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, softcap, k_block, q_CBKRH, k_BKSH, v_BKSH, mask, sinks_KG):
    return _forward(scale, softcap, k_block, q_CBKRH, k_BKSH, v_BKSH, mask, sinks_KG)[0]


def _forward(scale, softcap, k_block, q_CBKRH, k_BKSH, v_BKSH, mask, sinks_KG):
    C, B, K, R, _ = q_CBKRH.shape
    q_block = mask.q_positions_BT.shape[1] // C
    dtype = jnp.promote_types(q_CBKRH.dtype, jnp.float32)

    def attend_block(index_and_q: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, q_BKRH = index_and_q

        def add_keys(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            highest_BKR1, total_BKR1, out_BKRH = carry
            scores_BKRS = _scores(q_BKRH, _cut(k_BKSH, j, k_block), scale, softcap)
            scores_BKRS = _masked(scores_BKRS, mask, i * q_block, q_block, j * k_block, k_block)
            new_highest_BKR1 = jnp.maximum(highest_BKR1, jnp.max(scores_BKRS, axis=-1, keepdims=True))
            weights_BKRS = jnp.exp(scores_BKRS - new_highest_BKR1)
            shrink_BKR1 = jnp.exp(highest_BKR1 - new_highest_BKR1)
            total_BKR1 = total_BKR1 * shrink_BKR1 + jnp.sum(weights_BKRS, axis=-1, keepdims=True)
            v_BKSH_block = _cut(v_BKSH, j, k_block)
            part_BKRH = _product("bkrs,bksh->bkrh", weights_BKRS.astype(v_BKSH.dtype), v_BKSH_block)
            return new_highest_BKR1, total_BKR1, out_BKRH * shrink_BKR1 + part_BKRH

        # A sink is a first key whose value is zero.
        highest_BKR1 = jnp.full((B, K, R, 1), jnp.finfo(dtype).min, dtype)
        total_BKR1 = jnp.zeros((B, K, R, 1), dtype)
        if sinks_KG is not None:
            highest_BKR1 = jnp.broadcast_to(_sink_rows(sinks_KG, q_block).astype(dtype), (B, K, R, 1))
            total_BKR1 = jnp.ones_like(total_BKR1)
        start = (highest_BKR1, total_BKR1, jnp.zeros((B, K, R, v_BKSH.shape[-1]), dtype))
        highest_BKR1, total_BKR1, out_BKRH = lax.fori_loop(*_blocks_seen(mask, i, q_block, k_block), add_keys, start)
        total_BKR1 = jnp.where(total_BKR1 == 0, 1, total_BKR1)
        return (out_BKRH / total_BKR1).astype(q_BKRH.dtype), highest_BKR1 + jnp.log(total_BKR1)

    out_CBKRH, logz_CBKR1 = lax.map(attend_block, (jnp.arange(C), q_CBKRH))
    return out_CBKRH, (q_CBKRH, k_BKSH, v_BKSH, mask, sinks_KG, out_CBKRH, logz_CBKR1)


def _backward(scale, softcap, k_block, residuals, dout_CBKRH):
    q_CBKRH, k_BKSH, v_BKSH, mask, sinks_KG, out_CBKRH, logz_CBKR1 = residuals
    C = q_CBKRH.shape[0]
    q_block = mask.q_positions_BT.shape[1] // C
    dtype = logz_CBKR1.dtype
    delta_CBKR1 = jnp.sum(dout_CBKRH.astype(dtype) * out_CBKRH, axis=-1, keepdims=True)

    def through_block(grads, block):
        i, q_BKRH, logz_BKR1, delta_BKR1, dout_BKRH = block

        def through_keys(j, carry):
            dq_BKRH, dk_BKSH, dv_BKSH = carry
            k, v = _cut(k_BKSH, j, k_block), _cut(v_BKSH, j, k_block)
            scores_BKRS = _scores(q_BKRH, k, scale, softcap)
            masked_BKRS = _masked(scores_BKRS, mask, i * q_block, q_block, j * k_block, k_block)
            weights_BKRS = jnp.exp(masked_BKRS - logz_BKR1)
            dscores_BKRS = weights_BKRS * (_product("bkrh,bksh->bkrs", dout_BKRH, v) - delta_BKR1) * scale
            if softcap is not None:
                dscores_BKRS = dscores_BKRS * (1 - (scores_BKRS / softcap) ** 2)
            dscores_BKRS = dscores_BKRS.astype(k.dtype)
            dq_BKRH = dq_BKRH + _product("bkrs,bksh->bkrh", dscores_BKRS, k)
            dk_BKSH = _add_at(dk_BKSH, j, _product("bkrs,bkrh->bksh", dscores_BKRS, q_BKRH))
            dv_BKSH = _add_at(dv_BKSH, j, _product("bkrs,bkrh->bksh", weights_BKRS.astype(v.dtype), dout_BKRH))
            return dq_BKRH, dk_BKSH, dv_BKSH

        carry = (jnp.zeros(q_BKRH.shape, dtype), *grads)
        dq_BKRH, *grads = lax.fori_loop(*_blocks_seen(mask, i, q_block, k_block), through_keys, carry)
        return tuple(grads), dq_BKRH.astype(q_BKRH.dtype)

    zeros = (jnp.zeros(k_BKSH.shape, dtype), jnp.zeros(v_BKSH.shape, dtype))
    blocks = (jnp.arange(C), q_CBKRH, logz_CBKR1, delta_CBKR1, dout_CBKRH)
    (dk_BKSH, dv_BKSH), dq_CBKRH = lax.scan(through_block, zeros, blocks)
    dsinks_KG = None
    if sinks_KG is not None:
        share_CBKR1 = jnp.exp(_sink_rows(sinks_KG, q_block)[None] - logz_CBKR1)
        dsinks_KR = -jnp.sum(share_CBKR1 * delta_CBKR1, axis=(0, 1, 4))
        dsinks_KG = jnp.sum(dsinks_KR.reshape(*sinks_KG.shape, q_block), axis=-1).astype(sinks_KG.dtype)
    return dq_CBKRH, dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype), None, dsinks_KG


_attend.defvjp(_forward, _backward)


def _blocks_seen(mask: Mask, i: jax.Array, q_block: int, k_block: int) -> tuple[jax.Array | int, jax.Array | int]:
    """The first key block that query block `i` may see, and the one after the last."""
    first: jax.Array | int = 0
    last: jax.Array | int = mask.k_positions_BS.shape[1] // k_block
    if mask.in_order and mask.window is not None:
        first = jnp.maximum(0, (i * q_block - mask.window + 1) // k_block)
    if mask.in_order and mask.causal:
        last = jnp.minimum(last, -(-(i + 1) * q_block // k_block))
    return first, last


def _scores(q_BKRH: jax.Array, k_BKSH: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    scores_BKRS = _product("bkrh,bksh->bkrs", q_BKRH, k_BKSH) * scale
    return scores_BKRS if softcap is None else softcap * jnp.tanh(scores_BKRS / softcap)


def _masked(scores_BKRS, mask, q_start, q_size, k_start, k_size):
    B, K, R, S = scores_BKRS.shape
    seen_BTS = visible(block_of(mask, q_start, q_size, k_start, k_size))
    scores_BKGTS = scores_BKRS.reshape(B, K, R // q_size, q_size, S)
    return jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf).reshape(B, K, R, S)


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _cut(x_BKSH: jax.Array, j: jax.Array, block: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_BKSH, j * block, block, axis=2)


def _add_at(total_BKSH: jax.Array, j: jax.Array, part_BKSH: jax.Array) -> jax.Array:
    start, block = j * part_BKSH.shape[2], part_BKSH.shape[2]
    here = lax.dynamic_slice_in_dim(total_BKSH, start, block, axis=2)
    return lax.dynamic_update_slice_in_dim(total_BKSH, here + part_BKSH, start, axis=2)


def _sink_rows(sinks_KG: jax.Array, q_block: int) -> jax.Array:
    return jnp.repeat(sinks_KG, q_block, axis=1)[None, :, :, None]
