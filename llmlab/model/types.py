"""The types a model meets the rest of the code at. Pure functions over a nested dict of arrays; no module in sight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Metrics
from llmlab.core.mesh import Partition
from llmlab.model.config import ModelConfig

Params = dict[str, Any]
Cache = dict[str, Any]


class Inputs(NamedTuple):
    """What a model reads. Segment 0 is padding; tokens attend within their segment only, and to what came before.

    Without a cache, segments are contiguous and positions rise by one within each. With one, a row is one document.
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    embeddings_BTD: jax.Array | None = None


class Out(NamedTuple):
    """The hidden state after the final norm, the cache with these tokens in it, and (sum, weight) statistics."""

    hidden_BTD: jax.Array
    cache: Cache | None
    aux: Metrics


class Model(NamedTuple):
    """A language model.

    init(key) -> params; under jit with `out_shardings` they are born sharded.
    apply(params, inputs, *, cache=None, key=None) -> Out.
    head(params) -> w_DV, the unembedding in the compute dtype; soft-cap and temperature are the reader's to apply.
    logits(params, tokens_BT) -> logits_BTV in at least float32: for looking; objectives never hold [B, T, V].
    score(params, hidden_BTD) -> score_BT in at least float32, of a reward model (`config.head`), which has neither of
      those two; the one that a model lacks raises UserError.
    init_cache(batch, capacity) -> an empty cache for this many rows of so many tokens; more must not be fed to it.
    init_pages(rows, pages, size, *, int8=False) -> one whose layers that look back to the beginning keep their tokens
      in pages of so many, by `cache["table_BP"]`, which the caller adds; what other layers keep has this many rows.
    unstack(params) -> the same weights with one entry a layer, for steps so short that splitting stacks would cost.
    post_step(params, aux) -> params, with what moves after a step by no gradient: `aux` is that of the whole batch.
    axes: the logical axes of every parameter, a tree like the parameters'.
    """

    config: ModelConfig
    partition: Partition | None
    init: Callable[[jax.Array], Params]
    apply: Callable[..., Out]
    head: Callable[[Params], jax.Array]
    logits: Callable[[Params, jax.Array], jax.Array]
    score: Callable[[Params, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Cache]
    init_pages: Callable[..., Cache]
    unstack: Callable[[Params], Params]
    post_step: Callable[[Params, Metrics], Params]
    axes: Any


def inputs(tokens_BT: jax.Array) -> Inputs:
    """Inputs for whole, unpadded rows: positions 0, 1, …, one segment."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return Inputs(tokens_BT, positions_BT, jnp.ones_like(positions_BT))
