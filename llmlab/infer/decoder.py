"""What of a model decoding needs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from llmlab.core.mesh import Partition
from llmlab.model import weights
from llmlab.model.types import Cache, Model, Out, Params


class Decoder(NamedTuple):
    """The parts of a model, hashable: the static argument that compiled functions are cached by."""

    apply: Callable[..., Out]
    head: Callable[[Params], jax.Array]
    init_cache: Callable[[int, int], Cache]
    init_pages: Callable[..., Cache]
    unstack: Callable[[Params], Params]
    partition: Partition | None
    softcap: float | None
    dtype: str
    max_positions: int

    @classmethod
    def of(cls, model: Model) -> "Decoder":
        """Of this model."""
        c = model.config
        parts = (model.apply, model.head, model.init_cache, model.init_pages, model.unstack, model.partition)
        return cls(*parts, c.logit_softcap, c.dtype, c.max_positions)


def ready_for_steps(decoder: Decoder, params: Params) -> Params:
    """One entry a layer, matrices in the compute dtype: what would otherwise be done again at every token."""

    def cast(leaf: Any) -> Any:
        matrix = not isinstance(leaf, weights.WeightLeaf) and leaf.ndim > 1
        return leaf.astype(decoder.dtype) if matrix else leaf

    return jax.tree.map(cast, decoder.unstack(params), is_leaf=lambda leaf: isinstance(leaf, weights.WeightLeaf))


def ready(decoder: Decoder, params: Params, *, release: bool = False) -> Params:
    """As `ready_for_steps`, and what multiplies the same vectors side by side where one device has all of it.

    Nothing else is copied where nothing is left to do. `release` deletes what is copied side by side: give it where
    nobody else needs `params`.
    """
    wanted: Any = jax.eval_shape(functools.partial(ready_for_steps, decoder), params)
    structures: list[Any] = [jax.tree.structure(tree) for tree in (wanted, params)]
    is_ready = structures[0] == structures[1] and jax.tree.all(
        jax.tree.map(lambda a, b: isinstance(b, jax.Array) and a.dtype == b.dtype, wanted, params)
    )
    params = params if is_ready else _made_ready(decoder, params)
    return weights.joined(params, release=release) if decoder.partition is None else params


_made_ready = jax.jit(ready_for_steps, static_argnums=0)
