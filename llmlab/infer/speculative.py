"""Guessing tokens ahead, by a smaller model or by what stands in the text, for the model to check in one pass.

A guess is kept as long as it is the token that the model itself draws there, with the key of its seed and position: so
what is written is, token by token, what would be written without guessing, whatever guesses (at temperature 0 the
greedy case of arXiv 2211.17192). A draft model that draws with the same keys guesses the noise along with the odds.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llmlab.infer import sampling
from llmlab.infer.decoder import Decoder
from llmlab.infer.engine_step import Rows, State, Wanted, applied
from llmlab.model.transformer import unembed
from llmlab.model.types import Params

SIZES = (4, 3, 2)  # of the end of a text that is looked for, the longest first


class Ends:
    """Where each run of a few tokens in a growing text last ended: prompt look-up, the copying of arXiv 2304.04487."""

    def __init__(self) -> None:
        self._place_of: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def after(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the last time that the text ended as it does now; the text only grows from call to call."""
        for end in range(self._seen + 1, len(tokens)):  # not the end of all: nothing has followed it yet
            for size in SIZES:
                if size <= end:
                    self._place_of[tuple(tokens[end - size : end])] = end
        self._seen = max(self._seen, len(tokens) - 1)
        for size in SIZES:
            place = self._place_of.get(tuple(tokens[-size:])) if size < len(tokens) else None
            if place is not None:
                return list(tokens[place : place + most])
        return []


@functools.partial(jax.jit, static_argnums=0, static_argnames="most", donate_argnums=2)
def propose(
    decoder: Decoder, params: Params, state: State, rows: Rows, wanted: Wanted, *, most: int
) -> tuple[State, jax.Array]:
    """guess_RT: `most` tokens that the draft model draws one after the other; it has then read all that it drew."""
    is_there_R = (rows.slot_R < len(state.last_B)).astype(jnp.int32)

    def one(carry: tuple[State, jax.Array, jax.Array], _: None) -> tuple[tuple[State, jax.Array, jax.Array], jax.Array]:
        state, token_R, length_R = carry
        here = rows._replace(length_R=length_R)
        state, hidden_R1D = applied(decoder, params, state, here, token_R[:, None], is_there_R)
        logits_RV = unembed(hidden_R1D, decoder.head(params), decoder.softcap)[:, 0]
        drawn_R = sampling.sample(
            logits_RV,
            wanted.seed_R,
            length_R + 1,
            temperature=wanted.temperature_R,
            top_k=wanted.top_k_R,
            top_p=wanted.top_p_R,
            min_p=wanted.min_p_R,
        )
        return (state, drawn_R, length_R + 1), drawn_R

    # One pass more than there are guesses: the last guess is read too, in case that it is kept.
    (state, _, _), guess_TR = jax.lax.scan(one, (state, wanted.token_RT[:, 0], rows.length_R), length=most + 1)
    return state, guess_TR[:-1].T
