"""One training step: a pure function of state and batch, jitted once, that donates its state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmlab.core.arrays import Mean, Metrics, accumulation_dtype, global_norm, named_key, scalars
from llmlab.core.mesh import Partition
from llmlab.objective.base import Before, Loss
from llmlab.train.optimizer import OptimizerConfig
from llmlab.train.state import Guard, TrainState, merge

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
PostStep = Callable[[Any, Metrics], Any]


def by_gradients_alone(trainable: Any, metrics: Metrics) -> Any:
    """The `post_step` of weights that only gradients move, as those of an adapter."""
    return trainable


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: OptimizerConfig,
    *,
    seed: int,
    partition: Partition | None = None,
    post_step: PostStep = by_gradients_alone,
    before: Before | None = None,
) -> Step:
    """(state, batch) -> (state, metrics). The caller jits it, with the state donated.

    `before(params, batch, key)` gives a batch with what all its microbatches share filled in, where there are several.
    `post_step(trainable, metrics)` moves what no gradient does, after the optimizer: the model's, where all its weights
    are trained.
    A step whose loss or gradient norm is not finite, or far outside the recent window, or that has nothing to learn
    from, changes nothing but its count:
    decided here, on global scalars, so every host decides alike. Metrics are (sum, weight) pairs.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = named_key(seed, "train", state.step)
        if before is not None and config.accumulate > 1:
            batch = before(state.params, batch, key)
        total, metrics, gradients = accumulated_gradients(
            loss, state.trainable, state.frozen, batch, key, config.accumulate, partition
        )
        norm = global_norm(gradients)
        value = total.sum / jnp.maximum(total.weight, 1)
        good = _is_good(state.guard, value, norm, config) & (total.weight > 0)
        if config.clip:
            scale = jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.trainable)
        trainable = post_step(optax.apply_updates(state.trainable, updates), metrics)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda old, new: config.ema * old + (1 - config.ema) * new, ema, trainable)
        # Selecting fuses into the update that was just written; a branch would copy the state.
        trainable, moments, ema = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (trainable, moments, ema),
            (state.trainable, state.optimizer, state.ema),
        )
        guard = _watch(state.guard, good, value, norm)
        one = jnp.ones((), jnp.float32)
        metrics = scalars(metrics) | {
            "learning_rate": Mean(schedule(state.step - state.guard.skipped), one),
            "grad_norm": Mean(norm, one),
            "skipped": Mean(guard.skipped, one),
            "skipped_in_a_row": Mean(guard.skipped_in_a_row, one),
            "tokens": Mean(total.weight, one),
        }
        return TrainState(state.step + 1, trainable, state.frozen, moments, ema, guard), metrics

    return step


def accumulated_gradients(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: Any,
    key: jax.Array,
    microbatches: int,
    partition: Partition | None = None,
) -> tuple[Mean, Metrics, Any]:
    """(loss, metrics, gradients) of the whole batch, computed in `microbatches` parts.

    The sums of all parts are divided by the weight of all parts, never part by part (transformers#35438).
    """

    def summed(trainable: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[Mean, Metrics]]:
        total, metrics = loss(merge(trainable, frozen), batch, key)
        return jnp.asarray(total.sum), (total, metrics)

    gradient = jax.grad(summed, has_aux=True)
    if microbatches == 1:
        sums, (total, metrics) = gradient(trainable, batch, key)
    else:

        def split(x: jax.Array) -> jax.Array:
            # Rows i, i+A, i+2A, … form part i: each device then finds all of its rows at home.
            parts = jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)
            time = ("time",) * (x.ndim == 2)  # what is of no token is small
            return parts if partition is None else partition.constrain(parts, None, "batch", *time)

        def part(x: tuple[Any, jax.Array]) -> tuple[Mean, Metrics, Any]:
            micro, index = x
            sums, (total, metrics) = gradient(trainable, micro, jax.random.fold_in(key, index))
            return total, metrics, sums

        parts = (jax.tree.map(split, batch), jnp.arange(microbatches))
        first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts))
        # Sums of many small parts would lose what bfloat16 cannot hold.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), first)
        (total, metrics, sums), _ = jax.lax.scan(
            lambda sums, x: (jax.tree.map(jnp.add, sums, part(x)), None), zeros, parts
        )
    weight = jnp.maximum(total.weight, 1)
    return total, metrics, jax.tree.map(lambda g, w: (g / weight).astype(w.dtype), sums, trainable)


def _is_good(guard: Guard, loss: jax.Array, norm: jax.Array, config: OptimizerConfig) -> jax.Array:
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not config.skip_sigma:
        return finite
    seen_2 = jnp.stack([loss, norm]).astype(jnp.float32)
    mean_2, std_2 = jnp.mean(guard.window_W2, axis=0), jnp.std(guard.window_W2, axis=0)
    # A window of nearly equal values would make any step an outlier: a hundredth of the mean is always allowed.
    limit_2 = mean_2 + config.skip_sigma * jnp.maximum(std_2, 0.01 * jnp.abs(mean_2))
    full = guard.accepted >= guard.window_W2.shape[0]
    return finite & (~full | jnp.all(seen_2 <= limit_2))


def _watch(guard: Guard, good: jax.Array, loss: jax.Array, norm: jax.Array) -> Guard:
    seen_2 = jnp.stack([loss, norm]).astype(jnp.float32)
    slot = guard.accepted % guard.window_W2.shape[0]
    window_W2 = guard.window_W2.at[slot].set(jnp.where(good, seen_2, guard.window_W2[slot]))
    skipped = 1 - good.astype(jnp.int32)
    return Guard(
        window_W2,
        guard.accepted + 1 - skipped,
        guard.skipped + skipped,
        (guard.skipped_in_a_row + skipped) * skipped,
    )
