"""Texts as vectors: what a model's last hidden states say of each, of length 1, so that a product compares two."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.data.tokenizer import Tokenizer
from llmlab.infer.decoder import Decoder, ready_for_steps
from llmlab.infer.generate import bucket
from llmlab.model.types import Inputs, Model, Params

Pooling = Literal["mean", "last"]


class Embedder:
    """pooling: the mean of the hidden states of a text, or the last one. rows: so many texts are read at once.

    size: D, the numbers of a vector.
    """

    def __init__(
        self, model: Model, params: Params, tokenizer: Tokenizer, *, pooling: Pooling = "mean", rows: int = 16
    ):
        self._decoder, self._params, self._tokenizer = Decoder.of(model), params, tokenizer
        self._pooling: Pooling = pooling
        self._rows, self.size = rows, model.config.width
        self._reach, self._vocab = model.config.max_positions, model.config.vocab_size

    def __call__(self, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """float32 [len(texts), D]; a text is cut where the model's positions end. `progress` gets how many are done."""
        ids = [[self._tokenizer.bos_id, *self._tokenizer.encode(text)][: self._reach] for text in texts]
        return self.of_ids(ids, progress)

    def of_ids(self, texts: Sequence[Sequence[int]], progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        """The same of texts that are ids already.

        Raises:
          UserError: a text is empty, too long, or holds what is no id.
        """
        for ids in texts:
            self.check(ids)
        vectors_ND = np.zeros((len(texts), self.size), np.float32)
        order, rows = sorted(range(len(texts)), key=lambda i: len(texts[i])), min(self._rows, max(1, len(texts)))
        for begin in range(0, len(order), rows):
            chosen = order[begin : begin + rows]
            width = min(bucket(len(texts[chosen[-1]])), self._reach)
            tokens_BT, lengths_B = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
            for row, i in enumerate(chosen):
                tokens_BT[row, : len(texts[i])], lengths_B[row] = texts[i], len(texts[i])
            found_BD = _embedded(self._decoder, self._params, tokens_BT, lengths_B, pooling=self._pooling)
            vectors_ND[chosen] = np.asarray(found_BD)[: len(chosen)]
            progress(begin + len(chosen))
        return vectors_ND

    def check(self, ids: Sequence[int]) -> None:
        """Raises UserError where these ids have no vector."""
        if not ids or len(ids) > self._reach:
            raise UserError(f"{len(ids):,} tokens should be from 1 to the model's {self._reach:,} positions")
        if min(ids) < 0 or max(ids) >= self._vocab:
            raise UserError(f"the text holds what is no id of this model: ids are integers from 0 to {self._vocab - 1}")


@functools.partial(jax.jit, static_argnums=0, static_argnames="pooling")
def _embedded(
    decoder: Decoder, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, *, pooling: Pooling
) -> jax.Array:
    params = ready_for_steps(decoder, params)
    index_1T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    real_BT = index_1T < lengths_B[:, None]
    positions_BT = jnp.where(real_BT, index_1T, 0)
    hidden_BTD = decoder.apply(params, Inputs(tokens_BT, positions_BT, real_BT.astype(jnp.int32))).hidden_BTD
    hidden_BTD = hidden_BTD.astype(accumulation_dtype(hidden_BTD.dtype))
    counts_BT = real_BT if pooling == "mean" else index_1T == lengths_B[:, None] - 1
    # The mean of length 1 is the sum of length 1.
    sum_BD = jnp.sum(jnp.where(counts_BT[..., None], hidden_BTD, 0), axis=1)
    return sum_BD / jnp.maximum(jnp.linalg.norm(sum_BD, axis=-1, keepdims=True), 1e-30)
