"""What of the engine runs on the device: reading a piece of a prompt, and more tokens for some of its rows.

Both take the rows that they are for by number; a number out of range is padding, which reads anything and writes
nothing. So few shapes compile, whichever rows there are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmlab.infer import sampling
from llmlab.infer.decoder import Decoder
from llmlab.model.pages import Pool, copy_page
from llmlab.model.transformer import unembed
from llmlab.model.types import Inputs, Params

TOP = 20  # likeliest tokens that are reported, at most


class State(NamedTuple):
    """What the engine keeps on the device, of every slot: the layers' caches, the token drawn last, where it is to go
    in next, and what penalties look at."""

    layers: tuple[dict[str, Any], ...]
    last_B: jax.Array
    in_prompt_BV: jax.Array
    count_BV: jax.Array
    bias_BV: jax.Array


class Rows(NamedTuple):
    """Which slots, how many tokens they have in the cache, and the pages that these and the new ones lie in."""

    slot_R: jax.Array
    length_R: jax.Array
    table_RP: jax.Array


class Wanted(NamedTuple):
    """What goes into each row, and how the tokens after it are drawn.

    token_RT: the first `count_R` of them; the very first below 0 for the one drawn last; of several steps, the first
    one's. adjusted_R: whether penalties and biases count, limited_R: whether `allowed_RW` has the bits of the tokens
    that may be drawn; both for one token.
    """

    token_RT: jax.Array
    count_R: jax.Array
    seed_R: jax.Array
    temperature_R: jax.Array
    top_k_R: jax.Array
    top_p_R: jax.Array
    min_p_R: jax.Array
    repetition_R: jax.Array
    presence_R: jax.Array
    frequency_R: jax.Array
    adjusted_R: jax.Array
    limited_R: jax.Array
    allowed_RW: jax.Array
    top_R: jax.Array


class Drawn(NamedTuple):
    """After each token that went in: the one drawn, its log-probability, and the likeliest tokens with theirs, zeros
    where no row asks for them. Log-probabilities are the model's alone, at temperature 1 and before any filter.
    """

    token_RT: jax.Array
    logp_RT: jax.Array
    top_RTK: jax.Array
    top_logp_RTK: jax.Array


class Scored(NamedTuple):
    """Of the tokens of a prompt: how likely each was after those before it, and what was likeliest in its place."""

    logp_RT: jax.Array
    top_RTK: jax.Array
    top_logp_RTK: jax.Array


@functools.partial(jax.jit, static_argnums=0, static_argnames=("slots", "pages", "size", "int8", "vocab"))
def start(decoder: Decoder, *, slots: int, pages: int, size: int, int8: bool, vocab: int) -> State:
    """Nothing in any slot."""
    cache = decoder.init_pages(slots, pages, size, int8=int8)
    seen_BV = jnp.zeros((slots, vocab), bool)
    zeros_B = jnp.zeros(slots, jnp.int32)
    return State(cache["layers"], zeros_B, seen_BV, seen_BV.astype(jnp.int32), seen_BV.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def feed(decoder: Decoder, params: Params, state: State, rows: Rows, tokens_RT: jax.Array, count_R: jax.Array) -> State:
    """The first `count_R` of these tokens into the cache."""
    return applied(decoder, params, state, rows, tokens_RT, count_R)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    decoder: Decoder,
    params: Params,
    state: State,
    rows: Rows,
    tokens_RT: jax.Array,
    count_R: jax.Array,
    wanted: Wanted,
) -> tuple[State, Drawn]:
    """As `feed`, and the token after these drawn, [R, 1], for rows that want one.

    `wanted.token_RT` is of no account, and what is drawn too where `wanted.count_R` is 0.
    """
    state, hidden_RTD = applied(decoder, params, state, rows, tokens_RT, count_R)
    last_R1D = jnp.take_along_axis(hidden_RTD, jnp.maximum(count_R - 1, 0)[:, None, None], axis=1)
    ended = rows._replace(length_R=rows.length_R + count_R - 1)

    def drawn() -> Drawn:
        return _drawn(decoder, params, state, ended, wanted, last_R1D)

    nothing = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(drawn))
    out = jax.lax.cond(jnp.any(wanted.count_R > 0), drawn, lambda: nothing)
    return _after(state, rows, wanted, out), out


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def score(
    decoder: Decoder,
    params: Params,
    state: State,
    rows: Rows,
    tokens_RT: jax.Array,
    count_R: jax.Array,
    next_RT: jax.Array,
) -> tuple[State, Scored]:
    """As `feed`, and what the model expected instead of the tokens that come after each of these."""
    state, hidden_RTD = applied(decoder, params, state, rows, tokens_RT, count_R)
    logp_RTV = jax.nn.log_softmax(unembed(hidden_RTD, decoder.head(params), decoder.softcap))
    is_next_RTV = next_RT[..., None] == jnp.arange(logp_RTV.shape[-1])[None, None]
    logp_RT = jnp.sum(jnp.where(is_next_RTV, logp_RTV, 0), axis=-1)
    top_logp_RTK, top_RTK = jax.lax.top_k(logp_RTV, min(TOP, logp_RTV.shape[-1]))
    return state, Scored(logp_RT, top_RTK, top_logp_RTK)


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps", donate_argnums=2)
def step(
    decoder: Decoder, params: Params, state: State, rows: Rows, wanted: Wanted, *, steps: int = 1
) -> tuple[State, Drawn]:
    """The wanted tokens of each row into the cache, and after each the next one drawn.

    steps: 1; or how often this is done at most, with what was drawn last, for rows of one wanted token each. Then
    `wanted.count_R` says of how many of these steps a row is part, and Drawn is [R, steps], zeros after the last.
    """

    def one(state: State, number: Any) -> tuple[State, Drawn]:
        count_R = wanted.count_R if steps == 1 else (number < wanted.count_R).astype(jnp.int32)
        here = rows._replace(length_R=rows.length_R + jnp.minimum(number, wanted.count_R))
        last_R = jnp.take(state.last_B, rows.slot_R, mode="clip")
        is_given_R = (wanted.token_RT[:, 0] >= 0) & (number == 0)
        token_RT = wanted.token_RT.at[:, 0].set(jnp.where(is_given_R, wanted.token_RT[:, 0], last_R))
        now = wanted._replace(count_R=count_R)
        state, hidden_RTD = applied(decoder, params, state, here, token_RT, count_R)
        out = _drawn(decoder, params, state, here, now, hidden_RTD)
        return _after(state, here, now, out), out

    if steps == 1:
        return one(state, 0)

    def more(carry: tuple[jax.Array, State, Drawn]) -> tuple[jax.Array, State, Drawn]:
        number, state, drawn = carry
        state, out = one(state, number)
        return number + 1, state, jax.tree.map(lambda kept, new: kept.at[:, number].set(new[:, 0]), drawn, out)

    like: Any = jax.eval_shape(one, state, jnp.int32(0))[1]
    drawn = jax.tree.map(lambda each: jnp.zeros((each.shape[0], steps, *each.shape[2:]), each.dtype), like)
    most = jnp.max(wanted.count_R)
    _, state, drawn = jax.lax.while_loop(lambda carry: carry[0] < most, more, (jnp.int32(0), state, drawn))
    return state, drawn


@functools.partial(jax.jit, donate_argnums=0)
def load(state: State, slot: jax.Array, in_prompt_V: jax.Array, count_V: jax.Array, bias_V: jax.Array) -> State:
    """What penalties and biases are to know of a slot."""
    return state._replace(
        in_prompt_BV=state.in_prompt_BV.at[slot].set(in_prompt_V),
        count_BV=state.count_BV.at[slot].set(count_V),
        bias_BV=state.bias_BV.at[slot].set(bias_V),
    )


@functools.partial(jax.jit, donate_argnums=0)
def fork(state: State, slot: jax.Array, new_slot: jax.Array, page: jax.Array, new_page: jax.Array) -> State:
    """A slot that goes on from where another is: what it keeps is copied, and the page that is not full yet."""

    def copied(kept: Any) -> Any:
        return copy_page(kept, page, new_page) if isinstance(kept, Pool) else kept.at[new_slot].set(kept[slot])

    return state._replace(layers=_each(copied, state.layers))


def applied(
    decoder: Decoder, params: Params, state: State, rows: Rows, tokens_RT: jax.Array, count_R: jax.Array
) -> tuple[State, jax.Array]:
    """hidden_RTD of these tokens, the first `count_R` of which are in the cache then."""
    offsets_1T = jnp.arange(tokens_RT.shape[1], dtype=jnp.int32)[None]
    positions_RT = jnp.minimum(rows.length_R[:, None] + offsets_1T, decoder.max_positions - 1)
    inputs = Inputs(tokens_RT, positions_RT, (offsets_1T < count_R[:, None]).astype(jnp.int32))

    def of_rows(kept: Any) -> Any:
        if isinstance(kept, Pool):
            return kept
        # Zeros for rows of no tokens: a weight of 0 is no help where what the slot's last row left is not a number.
        # Here, where it is copied anyway, and not in the layer, which would copy its ring at each token of `generate`.
        is_new_R = jnp.expand_dims(rows.length_R == 0, tuple(range(1, kept.ndim)))
        return jnp.where(is_new_R, 0, jnp.take(kept, rows.slot_R, axis=0, mode="clip"))

    layers = _each(of_rows, state.layers)
    cache = {"lengths_B": rows.length_R, "table_BP": rows.table_RP, "layers": layers}
    out = decoder.apply(params, inputs, cache=cache)
    assert out.cache is not None
    layers = _each(
        lambda kept, new: new if isinstance(new, Pool) else kept.at[rows.slot_R].set(new, mode="drop"),
        state.layers,
        out.cache["layers"],
    )
    return state._replace(layers=layers), out.hidden_BTD


def _drawn(decoder: Decoder, params: Params, state: State, rows: Rows, wanted: Wanted, hidden_RTD: jax.Array) -> Drawn:
    """What follows tokens of which the first goes in after the `length_R` that its row has."""
    R, T = hidden_RTD.shape[:2]
    logits_RTV = unembed(hidden_RTD, decoder.head(params), decoder.softcap)
    V = logits_RTV.shape[-1]

    def adjusted_and_drawn() -> jax.Array:
        adjusted_XV = _adjusted(state, rows, wanted, logits_RTV).reshape(R * T, V)
        offsets_T = jnp.arange(1, T + 1, dtype=jnp.int32)
        names = ("temperature", "top_k", "top_p", "min_p")
        return jax.lax.cond(
            jnp.any(wanted.temperature_R > 0),
            lambda: sampling.sample(
                adjusted_XV,
                jnp.repeat(wanted.seed_R, T),
                (rows.length_R[:, None] + offsets_T[None]).reshape(R * T),
                **{name: jnp.repeat(getattr(wanted, f"{name}_R"), T) for name in names},
            ),
            lambda: sampling.likeliest(adjusted_XV),
        ).reshape(R, T)

    is_plain = ~jnp.any((wanted.temperature_R > 0) | wanted.adjusted_R | wanted.limited_R)
    drawn_RT = jax.lax.cond(is_plain, lambda: sampling.likeliest(logits_RTV), adjusted_and_drawn)
    logz_RT = jax.nn.logsumexp(logits_RTV, axis=-1)
    # A gather over a sharded vocabulary goes wrong.
    is_drawn_RTV = drawn_RT[..., None] == jnp.arange(V)[None, None]
    logp_RT = jnp.sum(jnp.where(is_drawn_RTV, logits_RTV, 0), axis=-1) - logz_RT
    most = min(TOP, V)
    top_logit_RTK, top_RTK = jax.lax.cond(
        jnp.any(wanted.top_R),
        lambda: tuple(jax.lax.top_k(logits_RTV, most)),
        lambda: (jnp.zeros((R, T, most), logits_RTV.dtype), jnp.zeros((R, T, most), jnp.int32)),
    )
    return Drawn(drawn_RT, logp_RT, top_RTK, top_logit_RTK - logz_RT[..., None])


def _after(state: State, rows: Rows, wanted: Wanted, drawn: Drawn) -> State:
    """What slots are to know of what was drawn last for them."""
    last_R = jnp.take_along_axis(drawn.token_RT, jnp.maximum(wanted.count_R - 1, 0)[:, None], axis=1)[:, 0]
    slot_R = jnp.where(wanted.count_R > 0, rows.slot_R, len(state.last_B))
    return state._replace(
        last_B=state.last_B.at[slot_R].set(last_R, mode="drop"),
        count_BV=state.count_BV.at[slot_R, last_R].add(1, mode="drop"),
    )


def _adjusted(state: State, rows: Rows, wanted: Wanted, logits_RTV: jax.Array) -> jax.Array:
    def at_each(change: Any, logits_RTV: jax.Array) -> jax.Array:
        return jax.vmap(change, in_axes=1, out_axes=1)(logits_RTV)

    def with_penalties() -> jax.Array:
        in_prompt_RV, count_RV, bias_RV = (
            jnp.take(kept, rows.slot_R, axis=0, mode="clip")
            for kept in (state.in_prompt_BV, state.count_BV, state.bias_BV)
        )
        strengths: Any = {name: getattr(wanted, f"{name}_R") for name in ("repetition", "presence", "frequency")}
        changed_RTV = at_each(lambda x_RV: sampling.penalties(x_RV, in_prompt_RV, count_RV, **strengths), logits_RTV)
        return jnp.where(wanted.adjusted_R[:, None, None], changed_RTV + bias_RV[:, None], logits_RTV)

    adjusted_RTV = jax.lax.cond(jnp.any(wanted.adjusted_R), with_penalties, lambda: logits_RTV)

    def within_limits() -> jax.Array:
        allowed_RTV = at_each(lambda x_RV: sampling.allowed_only(x_RV, wanted.allowed_RW), adjusted_RTV)
        return jnp.where(wanted.limited_R[:, None, None], allowed_RTV, adjusted_RTV)

    return jax.lax.cond(jnp.any(wanted.limited_R), within_limits, lambda: adjusted_RTV)


def _each(change: Any, layers: Any, *more: Any) -> Any:
    return jax.tree.map(change, layers, *more, is_leaf=lambda kept: isinstance(kept, Pool))
