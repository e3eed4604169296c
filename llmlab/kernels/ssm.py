"""The state-space recurrence of Mamba-2 (arXiv 2405.21060), and the short causal convolution before it.

Versions: `reference` (one token after the other) and `chunked` (products within chunks, a scan over their states). Its
letters: b, c and x play the parts of keys, queries and values, so N are heads, H their width, K the groups of heads
that share b and c, G = N / K. Beside the legend's:

    Z  width of the state, of b and c      Q  tokens of a chunk               W  inputs that the convolution sees
    M  chunks of a row                     U  tokens of a chunk, as sources   C  channels of the convolution

Segment ids are those of the model's inputs, 0 for padding. Both functions take what they keep of a row and return it
anew; what a row holds first goes on from there, and nothing passes from one segment to the next.
"""

import jax
import jax.numpy as jnp
from jax import lax

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError, nearest

IMPLEMENTATIONS = ("auto", "reference", "chunked")
CHUNK, LONGEST_CHUNK = 64, 256
# Logarithms of decays are summed as multiples of GRID, exact in float32 for LONGEST_CHUNK tokens, and small remainders:
# the difference of two sums is then right to 1e-7, however large they are. exp(LOWEST) is nothing beside 1.
GRID, LOWEST = 2.0**-9, -128.0


def ssm(
    x_BTNH: jax.Array,
    dt_BTN: jax.Array,
    a_N: jax.Array,
    b_BTKZ: jax.Array,
    c_BTKZ: jax.Array,
    *,
    segment_ids_BT: jax.Array,
    state_BNHZ: jax.Array | None = None,
    chunk: int = CHUNK,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h_t = exp(dt_t·a)·h_{t-1} + dt_t·x_t b_tᵀ and y_t = h_t c_t, for each head: (y_BTNH, the last h as state_BNHZ).

    h is zero where a segment begins, and padding leaves it as it is. The first segment goes on from the state given,
    zeros when None. States and sums are in `promote_types(dtype, float32)`.

    Args:
      dt_BTN: the steps, not negative. a_N: the rates, negative.
      chunk: tokens that `chunked` takes at once, at most 256: so many decays are exact.
      implementation: "auto", or one of `IMPLEMENTATIONS`.

    Raises:
      UserError: an unknown implementation, or shapes that do not fit.
    """
    _check_shapes(x_BTNH, dt_BTN, a_N, b_BTKZ, c_BTKZ, state_BNHZ, chunk)
    (B, T, N, H), dtype = x_BTNH.shape, accumulation_dtype(x_BTNH.dtype)
    state_BNHZ = jnp.zeros((B, N, H, b_BTKZ.shape[3]), dtype) if state_BNHZ is None else state_BNHZ.astype(dtype)
    dt_BTN = jnp.where((segment_ids_BT > 0)[..., None], dt_BTN, 0).astype(dtype)
    a_N, begins_BT = a_N.astype(dtype), _begins(segment_ids_BT)
    if implementation == "auto":
        implementation = choose(T)
    if implementation == "reference":
        return reference(x_BTNH, dt_BTN, a_N, b_BTKZ, c_BTKZ, begins_BT, state_BNHZ)
    if implementation == "chunked":
        return chunked(x_BTNH, dt_BTN, a_N, b_BTKZ, c_BTKZ, begins_BT, state_BNHZ, chunk=min(chunk, T, LONGEST_CHUNK))
    raise UserError(
        f"unknown state-space implementation {implementation!r}: {nearest(implementation, IMPLEMENTATIONS)}"
    )


def choose(T: int) -> str:
    """The version that "auto" is, for so many tokens a row."""
    return "reference" if T == 1 else "chunked"


def ssm_step(
    x_BNH: jax.Array, dt_BN: jax.Array, a_N: jax.Array, b_BKZ: jax.Array, c_BKZ: jax.Array, state_BNHZ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One token: (y_BNH, state_BNHZ), in the state's dtype."""
    dtype, G = state_BNHZ.dtype, x_BNH.shape[1] // b_BKZ.shape[1]
    b_BNZ, c_BNZ = (jnp.repeat(part_BKZ.astype(dtype), G, axis=1) for part_BKZ in (b_BKZ, c_BKZ))
    added_BNHZ = (x_BNH.astype(dtype) * dt_BN[..., None])[..., None] * b_BNZ[:, :, None]
    state_BNHZ = state_BNHZ * jnp.exp(dt_BN * a_N[None])[..., None, None] + added_BNHZ
    return jnp.einsum("BNHZ,BNZ->BNH", state_BNHZ, c_BNZ), state_BNHZ


def reference(
    x_BTNH: jax.Array,
    dt_BTN: jax.Array,
    a_N: jax.Array,
    b_BTKZ: jax.Array,
    c_BTKZ: jax.Array,
    begins_BT: jax.Array,
    state_BNHZ: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token after the other."""

    def step(state_BNHZ: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_BNH, dt_BN, b_BKZ, c_BKZ, begins_B = token
        state_BNHZ = jnp.where(begins_B[:, None, None, None], 0, state_BNHZ)
        y_BNH, state_BNHZ = ssm_step(x_BNH, dt_BN, a_N, b_BKZ, c_BKZ, state_BNHZ)
        return state_BNHZ, y_BNH.astype(x_BNH.dtype)

    tokens = jax.tree.map(lambda x_BT: x_BT.swapaxes(0, 1), (x_BTNH, dt_BTN, b_BTKZ, c_BTKZ, begins_BT))
    state_BNHZ, y_TBNH = lax.scan(step, state_BNHZ, tokens)
    return y_TBNH.swapaxes(0, 1), state_BNHZ


def chunked(
    x_BTNH: jax.Array,
    dt_BTN: jax.Array,
    a_N: jax.Array,
    b_BTKZ: jax.Array,
    c_BTKZ: jax.Array,
    begins_BT: jax.Array,
    state_BNHZ: jax.Array,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """State-space duality (section 6): within a chunk as masked attention, between chunks through their states."""
    (B, T, N, H), (K, Z), dtype = x_BTNH.shape, b_BTKZ.shape[2:], state_BNHZ.dtype
    M, Q, G = -(-T // chunk), chunk, N // K

    def split(x_BT: jax.Array, *heads: int) -> jax.Array:
        """[B, M, *heads, Q, last of heads]; what is padded has a step of 0 and changes no state."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, M * Q - T)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, M, Q, *heads), 2, -2)

    def product(letters: str, one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.einsum(letters, one.astype(x_BTNH.dtype), other.astype(x_BTNH.dtype), preferred_element_type=dtype)

    # The weights are computed again in the backward pass: of all that it needs, only they grow with the chunk.
    @jax.checkpoint
    def within_chunks(
        x_BMKGUH: jax.Array, logs_BMKGQ: jax.Array, b_BMKUZ: jax.Array, c_BMKQZ: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        decays_BMKGQU, carried_BMKGQ = _decays(logs_BMKGQ, begins_BMQ)
        weights_BMKGQU = product("BMKQZ,BMKUZ->BMKQU", c_BMKQZ, b_BMKUZ)[:, :, :, None] * decays_BMKGQU
        y_BMKGQH = product("BMKGQU,BMKGUH->BMKGQH", weights_BMKGQU, x_BMKGUH)
        left_BMKGUH = x_BMKGUH * decays_BMKGQU[..., -1, :, None]
        return y_BMKGQH, product("BMKGUH,BMKUZ->BMKGHZ", left_BMKGUH, b_BMKUZ), carried_BMKGQ

    def through_chunk(state_BKGHZ: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept_BKG, added_BKGHZ = chunk
        return state_BKGHZ * kept_BKG[..., None, None] + added_BKGHZ, state_BKGHZ

    begins_BMQ, c_BMKQZ = split(begins_BT[..., None], 1)[..., 0], split(c_BTKZ, K, Z)
    logs_BMKGQ = split(jnp.maximum(dt_BTN * a_N[None, None], LOWEST)[..., None], K, G, 1)[..., 0]
    x_BMKGUH = split(x_BTNH.astype(dtype) * dt_BTN[..., None], K, G, H)
    y_BMKGQH, added_BMKGHZ, carried_BMKGQ = within_chunks(x_BMKGUH, logs_BMKGQ, split(b_BTKZ, K, Z), c_BMKQZ)
    chunks = (carried_BMKGQ[..., -1].swapaxes(0, 1), added_BMKGHZ.swapaxes(0, 1))
    last_BKGHZ, before_MBKGHZ = lax.scan(through_chunk, state_BNHZ.reshape(B, K, G, H, Z), chunks)
    read_BMKGQH = product("BMKQZ,BMKGHZ->BMKGQH", c_BMKQZ, before_MBKGHZ.swapaxes(0, 1))
    y_BMQKGH = jnp.moveaxis(y_BMKGQH + read_BMKGQH * carried_BMKGQ[..., None], -2, 2)
    return y_BMQKGH.reshape(B, M * Q, N, H)[:, :T].astype(x_BTNH.dtype), last_BKGHZ.reshape(B, N, H, Z)


def _decays(logs_BMKGQ: jax.Array, begins_BMQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is left at token q of token u, 0 where u is later, and at q of the state before the chunk.

    Nothing is left where a segment begins between. Each is the exponential of a sum of logarithms, none positive.
    """
    lower_QU = jnp.tri(logs_BMKGQ.shape[-1], dtype=logs_BMKGQ.dtype)

    def sums(x: jax.Array) -> jax.Array:
        # As a product: XLA on CPU fuses a cumulative sum into what follows, and computes it for each pair of tokens.
        return jnp.einsum("...u,qu->...q", x, lower_QU, precision=lax.Precision.HIGHEST)

    coarse_BMKGQ = lax.stop_gradient(jnp.round(logs_BMKGQ / GRID) * GRID)
    parts = sums(coarse_BMKGQ), sums(logs_BMKGQ - coarse_BMKGQ)
    begun_BM11Q = sums(begins_BMQ.astype(logs_BMKGQ.dtype))[:, :, None, None]
    seen_BM11QU = (begun_BM11Q[..., :, None] == begun_BM11Q[..., None, :]) & (lower_QU > 0)[None, None, None, None]
    coarse_BMKGQU, fine_BMKGQU = (part[..., :, None] - part[..., None, :] for part in parts)
    # Masked before the exponential: above the diagonal it would overflow, and its gradient with it.
    left_BMKGQU = jnp.exp(jnp.where(seen_BM11QU, coarse_BMKGQU + fine_BMKGQU, -jnp.inf))
    return left_BMKGQU, jnp.exp(jnp.where(begun_BM11Q == 0, parts[0] + parts[1], -jnp.inf))


def causal_conv(
    x_BTC: jax.Array,
    w_WC: jax.Array,
    bias_C: jax.Array | None,
    segment_ids_BT: jax.Array,
    state_BWC: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = bias + Σ_i w_i·x_{t-(W-1)+i} over the inputs of the token's own segment, for each channel.

    Padding is at a row's end. Returns (y_BTC, the last W - 1 inputs of the last segment as state_BWC); before the first
    input come those of the state given, zeros when None. Sums are in `promote_types(dtype, float32)`.

    Raises:
      UserError: shapes that do not fit.
    """
    (B, T, C), W, dtype = x_BTC.shape, len(w_WC), accumulation_dtype(x_BTC.dtype)
    state_BWC = jnp.zeros((B, W - 1, C), x_BTC.dtype) if state_BWC is None else state_BWC
    if w_WC.shape != (W, C) or state_BWC.shape != (B, W - 1, C):
        raise UserError(
            f"causal convolution shapes do not fit: x {x_BTC.shape}, w {w_WC.shape}, state {state_BWC.shape}"
        )
    # Sources S: the state, which is of the row's first segment, and then the row.
    x_BSC = jnp.concatenate([state_BWC.astype(x_BTC.dtype), x_BTC], axis=1)
    ids_BS = jnp.concatenate([jnp.repeat(segment_ids_BT[:, :1], W - 1, axis=1), segment_ids_BT], axis=1)
    y_BTC = jnp.zeros((B, T, C), dtype)
    for i in range(W):
        own_BT1 = (ids_BS[:, i : i + T] == segment_ids_BT)[..., None]
        y_BTC = y_BTC + jnp.where(own_BT1, x_BSC[:, i : i + T], 0).astype(dtype) * w_WC[i].astype(dtype)[None, None]
    if bias_C is not None:
        y_BTC = y_BTC + bias_C.astype(dtype)[None, None]

    added_B = jnp.sum(segment_ids_BT > 0, axis=1, dtype=jnp.int32)
    last_BW = added_B[:, None] + jnp.arange(W - 1, dtype=jnp.int32)[None]
    last_ids_BW = jnp.take_along_axis(ids_BS, last_BW, axis=1)
    own_BW1 = (last_ids_BW == last_ids_BW[:, -1:])[..., None]
    return y_BTC.astype(x_BTC.dtype), jnp.where(own_BW1, jnp.take_along_axis(x_BSC, last_BW[..., None], axis=1), 0)


def _begins(segment_ids_BT: jax.Array) -> jax.Array:
    """Where a segment begins after another: real tokens whose latest real one before, in the row, is another's."""
    real_BT = segment_ids_BT > 0
    index_1T = jnp.arange(real_BT.shape[1], dtype=jnp.int32)[None]
    latest_BT = lax.cummax(jnp.where(real_BT, index_1T, -1), axis=1)
    before_BT = jnp.pad(latest_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    before_ids_BT = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before_BT, 0), axis=1)
    return real_BT & (before_BT >= 0) & (before_ids_BT != segment_ids_BT)


def _check_shapes(
    x_BTNH: jax.Array,
    dt_BTN: jax.Array,
    a_N: jax.Array,
    b_BTKZ: jax.Array,
    c_BTKZ: jax.Array,
    state_BNHZ: jax.Array | None,
    chunk: int,
) -> None:
    B, T, N, H = x_BTNH.shape
    if dt_BTN.shape != (B, T, N) or a_N.shape != (N,) or b_BTKZ.shape != c_BTKZ.shape or b_BTKZ.shape[:2] != (B, T):
        shapes = f"x {x_BTNH.shape}, dt {dt_BTN.shape}, a {a_N.shape}, b {b_BTKZ.shape}, c {c_BTKZ.shape}"
        raise UserError(f"state-space shapes do not fit: {shapes}")
    if N % b_BTKZ.shape[2]:
        raise UserError(f"{N} heads are no multiple of {b_BTKZ.shape[2]} groups")
    if state_BNHZ is not None and state_BNHZ.shape != (B, N, H, b_BTKZ.shape[3]):
        raise UserError(f"a state-space state of {state_BNHZ.shape} should be {(B, N, H, b_BTKZ.shape[3])}")
    if chunk < 1:
        raise UserError(f"chunk={chunk} takes no tokens at once: give 1 or more")
