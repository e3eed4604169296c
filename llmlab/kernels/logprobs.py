"""Token log-probabilities: what the loss, preference objectives, reinforcement learning and distillation all read.

Versions: `reference` (obviously right), `plain` (fast, holds [B, T, V] once) and `chunked` (never holds it: the logits
of a chunk of every row are computed, used and, in the backward pass, computed again). The target's logit is picked by
a one-hot select, never by a gather, which goes wrong when the vocabulary is sharded.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from llmlab.core.errors import UserError, nearest

IMPLEMENTATIONS = ("auto", "reference", "plain", "chunked")
# Logits up to this size are kept. Beyond it, computing them again (a third more arithmetic) costs less than writing
# and reading them: measured on 2 CPU cores with widths 128 and 384; elsewhere it is about memory, and unmeasured.
PLAIN_BYTES = {"cpu": 2**25}
PLAIN_BYTES_ELSEWHERE = 2**28
CHUNK_TOKENS = {"cpu": 1024}
CHUNK_TOKENS_ELSEWHERE = 16384


class TokenLogprobs(NamedTuple):
    """Per token, in nats: log p(target), the log of the softmax's denominator, the entropy of the prediction."""

    logp_BT: jax.Array
    logz_BT: jax.Array
    entropy_BT: jax.Array


class _Options(NamedTuple):
    temperature: float
    softcap: float | None
    flatten: bool
    chunk: int


def token_logprobs(
    hidden_BTD: jax.Array,
    w_DV: jax.Array,
    target_BT: jax.Array,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    chunk: int | None = None,
    flatten: bool = True,
) -> TokenLogprobs:
    """Log-probabilities under `softmax(softcap * tanh(hidden @ w / softcap) / temperature)`, all three differentiable.

    They are computed and returned in `promote_types(dtype, float32)`.

    Args:
      chunk: tokens of each row that `chunked` takes at once; when None, up to `CHUNK_TOKENS` in all rows together.
      flatten: merge B and T around the products, faster on CPU. Pass False when T is sharded.

    Raises:
      UserError: an unknown implementation, a temperature that is not above zero, or shapes that do not fit.
    """
    B, T, D = hidden_BTD.shape
    if w_DV.shape[0] != D or target_BT.shape != (B, T):
        shapes = f"hidden {hidden_BTD.shape}, w {w_DV.shape}, target {target_BT.shape}"
        raise UserError(f"token log-probabilities need [B, T, D], [D, V] and [B, T], not {shapes}")
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk={chunk} takes no tokens at once: give 1 or more, or None to have it chosen")
    if temperature <= 0:
        raise UserError(f"temperature={temperature} has no log-probabilities: give a number above 0")
    platform = jax.default_backend()
    if implementation == "auto":
        implementation = choose(B, T, w_DV.shape[1], hidden_BTD.dtype, platform)
    if implementation == "reference":
        return reference(hidden_BTD, w_DV, target_BT, temperature=temperature, softcap=softcap)
    if implementation == "plain":
        return _plain(_Options(temperature, softcap, flatten, T), hidden_BTD, w_DV, target_BT)
    if implementation == "chunked":
        if chunk is None:
            chunk = _chunk_of(B, T, platform)
        return _chunked(_Options(temperature, softcap, flatten, min(chunk, T)), hidden_BTD, w_DV, target_BT)
    choices = nearest(implementation, IMPLEMENTATIONS)
    raise UserError(f"unknown log-probability implementation {implementation!r}: {choices}")


def choose(B: int, T: int, V: int, dtype: Any, platform: str) -> str:
    """The version that "auto" is, for so many rows, tokens a row and logits a token, and hidden states of `dtype`."""
    size = B * T * V * jnp.promote_types(dtype, jnp.float32).itemsize
    return "plain" if size <= PLAIN_BYTES.get(platform, PLAIN_BYTES_ELSEWHERE) else "chunked"


def _chunk_of(B: int, T: int, platform: str) -> int:
    # So many chunks divide most lengths, and what is left most meshes: nothing is padded or moved between devices.
    most = -(-CHUNK_TOKENS.get(platform, CHUNK_TOKENS_ELSEWHERE) // B)
    chunks = 1
    while chunks * most < T:
        chunks *= 2
    return -(-T // chunks)


def reference(
    hidden_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, *, temperature: float, softcap: float | None
) -> TokenLogprobs:
    """The formulas, one after the other."""
    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD.astype(dtype), w_DV.astype(dtype))
    if softcap is not None:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    logp_BTV = jax.nn.log_softmax(logits_BTV / temperature)
    logz_BT = jax.nn.logsumexp(logits_BTV / temperature, axis=-1)
    logp_BT = jnp.sum(jnp.where(_is_target(logp_BTV, target_BT), logp_BTV, 0), axis=-1)
    return TokenLogprobs(logp_BT, logz_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _plain(options: _Options, hidden_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array) -> TokenLogprobs:
    return _from_logits(_logits(options, hidden_BTD, w_DV), target_BT)


def _plain_forward(options: _Options, hidden: Any, w: Any, target: Any) -> tuple[TokenLogprobs, Any]:
    logits_BTV = _logits(options, hidden.value, w.value)
    out = _from_logits(logits_BTV, target.value)
    return out, (hidden.value, w.value, target.value, logits_BTV, out.logz_BT)


def _plain_backward(options: _Options, residuals: Any, grads: TokenLogprobs) -> tuple[jax.Array, jax.Array, None]:
    hidden_BTD, w_DV, target_BT, logits_BTV, logz_BT = residuals
    dlogits_BTV = _logits_gradient(options, logits_BTV, logz_BT, target_BT, grads)
    dhidden_BTD, dw_DV = _product_gradients(options, dlogits_BTV.astype(w_DV.dtype), hidden_BTD, w_DV)
    return dhidden_BTD, dw_DV.astype(w_DV.dtype), None


_plain.defvjp(_plain_forward, _plain_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(options: _Options, hidden_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array) -> TokenLogprobs:
    def through_chunk(chunk: tuple[jax.Array, jax.Array]) -> TokenLogprobs:
        hidden_BTD, target_BT = chunk
        return _from_logits(_logits(options, hidden_BTD, w_DV), target_BT)

    out = lax.map(through_chunk, _split((hidden_BTD, target_BT), options.chunk))
    return _join(out, target_BT.shape[1])


def _chunked_forward(options: _Options, hidden: Any, w: Any, target: Any) -> tuple[TokenLogprobs, Any]:
    out = _chunked(options, hidden.value, w.value, target.value)
    return out, (hidden.value, w.value, target.value, out.logz_BT)


def _chunked_backward(options: _Options, residuals: Any, grads: TokenLogprobs) -> tuple[jax.Array, jax.Array, None]:
    hidden_BTD, w_DV, target_BT, logz_BT = residuals
    known = {i: grad_BT for i, grad_BT in enumerate(grads) if not isinstance(grad_BT, SymbolicZero)}

    def through_chunk(dw_DV: jax.Array, chunk: Any) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, target_BT, logz_BT, known = chunk
        logits_BTV = _logits(options, hidden_BTD, w_DV)
        chunk_grads = TokenLogprobs(*(known.get(i, grad) for i, grad in enumerate(grads)))
        dlogits_BTV = _logits_gradient(options, logits_BTV, logz_BT, target_BT, chunk_grads)
        dhidden_BTD, dw_DV_part = _product_gradients(options, dlogits_BTV.astype(w_DV.dtype), hidden_BTD, w_DV)
        return dw_DV + dw_DV_part, dhidden_BTD

    chunks = _split((hidden_BTD, target_BT, logz_BT, known), options.chunk)
    dw_DV, dhidden = lax.scan(through_chunk, jnp.zeros(w_DV.shape, logz_BT.dtype), chunks)
    return _join(dhidden, target_BT.shape[1]), dw_DV.astype(w_DV.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)


def _from_logits(logits_BTV: jax.Array, target_BT: jax.Array) -> TokenLogprobs:
    highest_BT = jnp.max(logits_BTV, axis=-1)
    weights_BTV = jnp.exp(logits_BTV - highest_BT[..., None])
    total_BT = jnp.sum(weights_BTV, axis=-1)
    logz_BT = highest_BT + jnp.log(total_BT)
    picked_BT = jnp.sum(jnp.where(_is_target(logits_BTV, target_BT), logits_BTV, 0), axis=-1)
    mean_BT = jnp.sum(weights_BTV * logits_BTV, axis=-1) / total_BT
    return TokenLogprobs(picked_BT - logz_BT, logz_BT, logz_BT - mean_BT)


def _logits_gradient(
    options: _Options, logits_BTV: jax.Array, logz_BT: jax.Array, target_BT: jax.Array, grads: TokenLogprobs
) -> jax.Array:
    """With respect to hidden @ w. d logp = 1[target] - p; d logz = p; d entropy = -p * (log p + entropy)."""
    dlogp_BT, dlogz_BT, dentropy_BT = (None if isinstance(grad, SymbolicZero) else grad for grad in grads)
    logp_BTV = logits_BTV - logz_BT[..., None]
    factor_BTV = jnp.zeros_like(logz_BT)[..., None]
    if dlogz_BT is not None:
        factor_BTV = factor_BTV + dlogz_BT[..., None]
    if dlogp_BT is not None:
        factor_BTV = factor_BTV - dlogp_BT[..., None]
    if dentropy_BT is not None:
        entropy_BT1 = -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1, keepdims=True)
        factor_BTV = factor_BTV - dentropy_BT[..., None] * (logp_BTV + entropy_BT1)
    dlogits_BTV = jnp.exp(logp_BTV) * factor_BTV
    if dlogp_BT is not None:
        dlogits_BTV = dlogits_BTV + jnp.where(_is_target(logits_BTV, target_BT), dlogp_BT[..., None], 0)
    if options.softcap is not None:
        dlogits_BTV = dlogits_BTV * (1 - (logits_BTV * (options.temperature / options.softcap)) ** 2)
    return dlogits_BTV / options.temperature


def _logits(options: _Options, hidden_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
    B, T, D = hidden_BTD.shape
    rows = hidden_BTD.reshape(B * T, D) if options.flatten else hidden_BTD
    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    logits_BTV = jnp.einsum("...d,dv->...v", rows, w_DV, preferred_element_type=dtype).reshape(B, T, -1)
    if options.softcap is not None:
        logits_BTV = options.softcap * jnp.tanh(logits_BTV / options.softcap)
    return logits_BTV / options.temperature


def _product_gradients(
    options: _Options, dlogits_BTV: jax.Array, hidden_BTD: jax.Array, w_DV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    B, T, D = hidden_BTD.shape
    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    if options.flatten:
        dlogits_BTV, hidden_BTD = dlogits_BTV.reshape(1, B * T, -1), hidden_BTD.reshape(1, B * T, D)
    dhidden_BTD = jnp.einsum("btv,dv->btd", dlogits_BTV, w_DV, preferred_element_type=dtype)
    dw_DV = jnp.einsum("btd,btv->dv", hidden_BTD, dlogits_BTV, preferred_element_type=dtype)
    return dhidden_BTD.reshape(B, T, D).astype(hidden_BTD.dtype), dw_DV


def _is_target(logits_BTV: jax.Array, target_BT: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(target_BT.dtype, logits_BTV.shape, 2) == target_BT[..., None]


def _split(arrays: Any, chunk: int) -> Any:
    """[B, T, ...] to [C, B, chunk, ...], T padded with zeros. Chunk i holds the tokens i, i + C, i + 2C, …

    Every device then finds a part of each chunk at home, whether rows or time are sharded; consecutive tokens would lie
    on one device, and all would compute them.
    """

    def split(x_BT: jax.Array) -> jax.Array:
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -x_BT.shape[1] % chunk)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], chunk, -1, *x_BT.shape[2:]), 2, 0)

    return jax.tree.map(split, arrays)


def _join(chunks: Any, length: int) -> Any:
    def join(x_CBT: jax.Array) -> jax.Array:
        x_BTC = jnp.moveaxis(x_CBT, 0, 2)
        return x_BTC.reshape(x_BTC.shape[0], -1, *x_BTC.shape[3:])[:, :length]

    return jax.tree.map(join, chunks)
