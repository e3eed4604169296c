"""Texts as vectors: the mean of what a model's last layer holds at their tokens."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.errors import UserError
from llmlab.infer.decoder import Decoder, ready_for_steps
from llmlab.infer.generate import bucket
from llmlab.model.types import Inputs, Model, Params


class Embedder:
    """Gives vectors of length 1; `size` numbers each."""

    def __init__(self, model: Model, params: Params):
        self._decoder = Decoder.of(model)
        self._params = params
        self._reach, self._vocab, self.size = model.config.max_positions, model.config.vocab_size, model.config.width

    def check(self, ids: Sequence[int]) -> None:
        """Raises UserError where these ids have no vector."""
        if not ids or len(ids) > self._reach:
            raise UserError(f"{len(ids):,} tokens should be from 1 to the model's {self._reach:,} positions")
        if min(ids) < 0 or max(ids) >= self._vocab:
            raise UserError(f"the text holds what is no id of this model: ids are integers from 0 to {self._vocab - 1}")

    def __call__(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [D]."""
        self.check(ids)
        tokens_BT = np.zeros((1, min(bucket(len(ids)), self._reach)), np.int32)
        tokens_BT[0, : len(ids)] = ids
        return np.asarray(_mean(self._decoder, self._params, tokens_BT, np.array([len(ids)], np.int32)))[0]


@functools.partial(jax.jit, static_argnums=0)
def _mean(decoder: Decoder, params: Params, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    params = ready_for_steps(decoder, params)
    rows, time = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32)[None], (rows, time))
    real_BT = positions_BT < length_B[:, None]
    hidden_BTD = decoder.apply(params, Inputs(tokens_BT, positions_BT, real_BT.astype(jnp.int32))).hidden_BTD
    mean_BD = jnp.sum(hidden_BTD.astype(jnp.float32) * real_BT[..., None], axis=1) / length_B[:, None]
    return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)
