"""Which experts a token goes to, with what weights, and how evenly: the router of a mixture of experts, as functions.

M are tokens, rows and time merged; C are the experts that each of them goes to.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Mean, Metrics
from llmlab.core.errors import UserError

BALANCE_LOSS, Z_LOSS, MAX_LOAD, LOAD = "router/balance_loss", "router/z_loss", "router/max_load", "router/load"
# DeepSeek-V3 scores a group of experts by its best two.
BEST_OF_GROUP = 2


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of the MLP: each token goes to `chosen` of `count` experts. No token is dropped.

    count: E; 0 means an ordinary MLP in every layer. chosen: experts a token goes to.
    width: F of one expert; 0 means that of the MLP. shared: every token also goes through one MLP of shared · width.
    first_dense: so many leading layers keep the ordinary MLP (DeepSeek).
    bias: on the router's logits and on the experts' products (gpt-oss), where `model.bias` is off.
    Weights of the chosen:
      score: of an expert, the softmax over all logits, or each one's sigmoid (DeepSeek-V3).
      normalise: the weights of a token's experts add up to 1; with softmax that is the softmax over the chosen.
      scale: multiplies the weights (DeepSeek-V3).
    Choice:
      groups, chosen_groups: experts are chosen within the `chosen_groups` best of so many equal groups; a group is as
        good as the sum of its two best scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
      correction: a bias for each expert is added to the scores, for the choice only. No gradient moves it: at each step
        it rises by `correction_speed` where an expert saw fewer tokens than the mean, falls where more
        (arXiv 2408.15664).
    Losses, added to the objective's; a batch is what one pass sees, with microbatches each of them:
      balance_loss: weight of E · Σ f·P, with f an expert's tokens over all tokens and P its mean probability
        (arXiv 2101.03961, eq. 4, each token counting once for each of its experts), the mean over layers.
      z_loss: weight of the mean of logsumexp(logits)², over tokens and layers (arXiv 2202.08906, eq. 5).
    """

    count: int = 0
    chosen: int = 2
    width: int = 0
    shared: int = 0
    first_dense: int = 0
    bias: bool = False
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    correction: bool = False
    correction_speed: float = 1e-3
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("count", "width", "shared", "first_dense", "correction_speed", "balance_loss", "z_loss"):
            if not getattr(self, name) >= 0:
                raise UserError(f"model.experts.{name}={getattr(self, name)} should be 0 or more")
        if not self.count:
            return
        if not 1 <= self.chosen <= self.count:
            raise UserError(f"model.experts.chosen={self.chosen} should be from 1 to model.experts.count={self.count}")
        if not self.scale > 0:
            raise UserError(f"model.experts.scale={self.scale} should be more than 0")
        if not 1 <= self.chosen_groups <= self.groups:
            raise UserError(
                f"model.experts.chosen_groups={self.chosen_groups} should be from 1 to "
                f"model.experts.groups={self.groups}"
            )
        size = self.count // self.groups
        if self.groups > 1 and (self.count % self.groups or size < BEST_OF_GROUP):
            raise UserError(
                f"model.experts.groups={self.groups} should divide model.experts.count={self.count} into groups of "
                f"{BEST_OF_GROUP} or more"
            )
        if self.chosen > size * self.chosen_groups:
            raise UserError(
                f"model.experts.chosen={self.chosen} is more than the {size * self.chosen_groups} experts of "
                f"model.experts.chosen_groups={self.chosen_groups}: raise the latter"
            )


class Routing(NamedTuple):
    """The experts of each token and their weights; what `tallied` counts, by expert and by token."""

    expert_MC: jax.Array
    weight_MC: jax.Array
    is_chosen_MCE: jax.Array
    probability_ME: jax.Array
    logz_M: jax.Array


class Tally(NamedTuple):
    """Sums over tokens, padding apart: of parts of a batch they add up to the batch's."""

    count_E: jax.Array
    probability_E: jax.Array
    z: jax.Array
    tokens: jax.Array


def route(logits_ME: jax.Array, correction_E: jax.Array | None, config: ExpertsConfig) -> Routing:
    """Chooses experts. A softmax without correction ranks by its logits, as probabilities far apart round to ties."""
    softmax = config.score == "softmax"
    score_ME = jax.nn.softmax(logits_ME, axis=-1) if softmax else jax.nn.sigmoid(logits_ME)
    rank_ME = logits_ME if softmax and correction_E is None and config.groups == 1 else score_ME
    if correction_E is not None:
        rank_ME = rank_ME + correction_E[None]
    if config.groups > 1:
        rank_ME = _in_best_groups(rank_ME, config)
    _, expert_MC = jax.lax.top_k(jax.lax.stop_gradient(rank_ME), config.chosen)
    is_chosen_MCE = expert_MC[..., None] == jnp.arange(config.count)[None, None]
    if softmax and config.normalise:
        weight_MC = jax.nn.softmax(_pick(logits_ME, is_chosen_MCE), axis=-1)
    else:
        weight_MC = _pick(score_ME, is_chosen_MCE)
        if config.normalise:
            weight_MC = weight_MC / (jnp.sum(weight_MC, axis=-1, keepdims=True) + 1e-20)
    probability_ME = score_ME if softmax else score_ME / (jnp.sum(score_ME, axis=-1, keepdims=True) + 1e-20)
    logz_M = jax.nn.logsumexp(logits_ME, axis=-1)
    return Routing(expert_MC, config.scale * weight_MC, is_chosen_MCE, probability_ME, logz_M)


def tallied(routing: Routing, is_token_M: jax.Array) -> Tally:
    """The sums over these tokens; counts are integers, and exact."""
    real_M = is_token_M.astype(routing.logz_M.dtype)
    return Tally(
        count_E=jnp.sum(routing.is_chosen_MCE & is_token_M[:, None, None], axis=(0, 1), dtype=jnp.int32),
        probability_E=jnp.sum(routing.probability_ME * real_M[:, None], axis=0),
        z=jnp.sum(jnp.square(routing.logz_M) * real_M),
        tokens=jnp.sum(real_M),
    )


def statistics(tally: Tally, config: ExpertsConfig) -> Metrics:
    """One layer's losses and loads, each weighted by its tokens: by layers and batches they add up to means.

    `router/max_load` is the busiest expert's load in units of an even one; `router/load` holds tokens by expert.
    """
    tokens = jnp.maximum(tally.tokens, 1)
    share_E = tally.count_E.astype(tokens.dtype) / tokens
    balance = config.count * jnp.sum(share_E * tally.probability_E / tokens)
    busiest = config.count * jnp.max(share_E) / config.chosen
    return {
        BALANCE_LOSS: Mean(balance * tally.tokens, tally.tokens),
        Z_LOSS: Mean(tally.z, tally.tokens),
        MAX_LOAD: Mean(busiest * tally.tokens, tally.tokens),
        LOAD: Mean(tally.count_E, tally.tokens),
    }


def over_layers(layers: list[Metrics]) -> Metrics:
    """The statistics of a stack from those of its layers ({} without experts); of `router/load`, [layer, expert]."""
    routed = [metrics for metrics in layers if metrics]
    if not routed:
        return {}
    total: Metrics = jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *routed)
    return total | {LOAD: Mean(jnp.stack([metrics[LOAD].sum for metrics in routed]), total[LOAD].weight)}


def router_loss(aux: Metrics, config: ExpertsConfig) -> Any:
    """What the coefficients of `config` make of the statistics of a batch."""
    weighted = ((config.balance_loss, BALANCE_LOSS), (config.z_loss, Z_LOSS))
    losses = [c * aux[name].sum / jnp.maximum(aux[name].weight, 1) for c, name in weighted if c and aux]
    return sum(losses[1:], losses[0]) if losses else 0.0


def corrected(correction_LE: jax.Array, count_LE: jax.Array, speed: float) -> jax.Array:
    """The correction after a step: up where an expert saw fewer tokens than its layer's mean (algorithm 1)."""
    count_LE = count_LE.astype(correction_LE.dtype)
    missing_LE = jnp.mean(count_LE, axis=-1, keepdims=True) - count_LE
    return correction_LE + speed * jnp.sign(missing_LE)


def _in_best_groups(rank_ME: jax.Array, config: ExpertsConfig) -> jax.Array:
    """The ranks, -inf outside of each token's best groups."""
    groups = rank_ME.reshape(len(rank_ME), config.groups, -1)
    of_group = jnp.sum(jax.lax.top_k(groups, BEST_OF_GROUP)[0], axis=-1)
    _, best_MC = jax.lax.top_k(of_group, config.chosen_groups)
    is_best = jnp.any(best_MC[..., None] == jnp.arange(config.groups)[None, None], axis=1)
    return jnp.where(is_best[..., None], groups, -jnp.inf).reshape(rank_ME.shape)


def _pick(x_ME: jax.Array, is_chosen_MCE: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(is_chosen_MCE, x_ME[:, None], 0), axis=-1)
