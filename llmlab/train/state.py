"""What a run carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llmlab.model.adapters import adapted
from llmlab.model.types import Model, Params


class Guard(NamedTuple):
    """The recent window of accepted losses and gradient norms, and how many steps were skipped."""

    window_W2: jax.Array
    accepted: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class TrainState(NamedTuple):
    """`trainable` has gradients, an optimizer and perhaps an EMA; `frozen` has none, and is in no checkpoint."""

    step: jax.Array
    trainable: Params
    frozen: Params
    optimizer: Any
    ema: Params | None
    guard: Guard

    @property
    def params(self) -> Params:
        """All weights, as the model reads them."""
        return merge(self.trainable, self.frozen)

    @property
    def evaluated(self) -> Params:
        """The weights that evaluation and samples use: the EMA where there is one."""
        return self.params if self.ema is None else merge(self.ema, self.frozen)

    @property
    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds: all but the frozen weights, which config.json names and hashes instead."""
        return {name: value for name, value in self._asdict().items() if name != "frozen"}


def init_state(
    model: Model, optimizer: optax.GradientTransformation, key: jax.Array, *, window: int, ema: bool
) -> TrainState:
    """The state before the first step. Jit it with `out_shardings` and every array is born sharded."""
    return start(model.init(key), optimizer, window=window, ema=ema)


def start(
    trainable: Params, optimizer: optax.GradientTransformation, *, window: int, ema: bool, frozen: Params | None = None
) -> TrainState:
    """The state before the first step, from these weights."""

    def zero() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(
        step=zero(),
        trainable=trainable,
        frozen=frozen or {},
        optimizer=optimizer.init(trainable),
        # A copy, not an alias: the step donates its buffers, and one may not be donated twice.
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        guard=Guard(jnp.zeros((window, 2), jnp.float32), zero(), zero(), zero()),
    )


def merge(trainable: Params, frozen: Params) -> Params:
    """The weights as the model reads them: two trees whose leaves are apart as one, adapters over what they adapt.

    What an adapter trains is named by its whole path, `layers.0.mlp.up_DF`, where trees have `layers`, then `0`.
    """
    adapter = {path: value for path, value in trainable.items() if "." in path}
    merged = {name: value for name, value in trainable.items() if name not in adapter}
    for name, value in frozen.items():
        merged[name] = merge(merged[name], value) if name in merged else value
    return adapted(merged, adapter)


def state_shardings(model: Model, state: TrainState, axes: Any = None) -> TrainState:
    """Shardings for a (possibly abstract) state: weights, moments and EMA by logical axes, the rest replicated.

    `axes` are those of what is trained, where that is not the model's own weights.
    """
    partition = model.partition
    assert partition is not None
    replicated = partition.sharding()
    by_path = {
        jax.tree_util.keystr(path): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(
            partition.shardings(model.axes if axes is None else axes)
        )
    }

    def choose(path: Any, leaf: Any) -> jax.sharding.Sharding:
        # An optimizer keeps trees like the parameters' inside states of its own: go by the end of the path.
        for begin in range(len(path)):
            sharding = by_path.get(jax.tree_util.keystr(path[begin:]))
            if sharding is not None and len(sharding.spec) == leaf.ndim:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(choose, state)
