"""The optimizer and its schedule, through optax. Which weights decay, and which Muon turns, goes by logical axes."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from llmlab.core.errors import UserError
from llmlab.core.mesh import Axes, is_axes
from llmlab.model.matrices import STACKED, is_matrix


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon for matrices with AdamW for the rest (arXiv 2502.16982).

    Schedule: `warmup` linear steps to `learning_rate`, then cosine, linear, constant, or wsd (warm-up, stable, decay:
    linear over the last `decay` share of the run), down to final · learning_rate.
    Adam: beta1, beta2, epsilon. weight_decay is decoupled and times the learning rate, on matrices only.
    Muon: momentum, Nesterov's here as in Adam's part; its updates are scaled to AdamW's root mean square, so that one
    learning rate serves both.
    clip: the largest global gradient norm; 0 is off. accumulate: microbatches a step. ema: decay of an exponential
    average of the weights, which evaluation and samples then use; 0 is off.
    A step is skipped when its loss or gradient norm is not finite, or lies more than `skip_sigma` standard deviations
    above the mean of the last `skip_window` steps (0: only the former); after `max_skips` in a row the run stops.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup: int = 100
    decay: float = 0.2
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    skip_sigma: float = 0.0
    skip_window: int = 128
    max_skips: int = 16

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} should be more than 0")
        for name in ("beta1", "beta2", "momentum", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} should be at least 0 and less than 1")
        for name in ("decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} is a share: from 0 to 1")
        for name in ("warmup", "weight_decay", "clip", "skip_sigma"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} should be 0 or more")
        for name in ("accumulate", "skip_window", "max_skips"):
            if getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} should be at least 1")


def adamw(**overrides: Any) -> OptimizerConfig:
    """The config section of AdamW, for experiment files."""
    return OptimizerConfig(name="adamw", **overrides)


def muon(**overrides: Any) -> OptimizerConfig:
    """The config section of Muon, for experiment files."""
    return OptimizerConfig(name="muon", **overrides)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """step -> learning rate, over a run of `steps`; step 0 already learns."""
    peak, low = config.learning_rate, config.learning_rate * config.final
    warmup = min(config.warmup, steps)
    rest = max(1, steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, low, rest)
    elif config.schedule == "wsd":
        decay = min(rest, max(1, round(config.decay * steps)))
        after = optax.linear_schedule(peak, low, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """The transformation for weights with these logical axes; clipping is the step's, which knows the norm already."""
    decays = jax.tree.map(is_matrix, axes, is_leaf=is_axes)
    if config.name == "adamw":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    else:
        muon = optax.contrib.muon(
            1.0,
            beta=config.momentum,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.epsilon,
            muon_weight_dimension_numbers=jax.tree.map(_muon_dimensions, axes, is_leaf=is_axes),
            consistent_rms=0.2,
        )
        # Its own decay would reach norms and biases, which Adam updates there: decay is ours, below.
        direction = optax.chain(muon, optax.scale(-1.0))
    return optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(make_schedule(config, steps)),
    )


def _muon_dimensions(axes: Axes) -> Any:
    """Rows and columns of what Muon orthogonalises, stacked layers and experts apart; None: Adam's.

    Embedding and unembedding are Adam's, as in Jordan's Muon: their inputs or outputs are one-hot.
    """
    if not is_matrix(axes) or "vocab" in axes or "positions" in axes:
        return None
    side = next(axes.index(name) for name in ("rank", "embed", "latent") if name in axes)
    others = tuple(i for i, axis in enumerate(axes) if axis not in STACKED and i != side)
    out_of_side = side < others[0]
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=(side,) if out_of_side else others,
        output_axis=others if out_of_side else (side,),
    )
