"""Rewards from preferences: losses over scores, and the objective that takes them to pairs and rankings.

The losses are computed in at least float32.
"""

import dataclasses
import itertools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from llmlab.core.arrays import Mean, Metrics, accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.data.pipeline import GroupBatch
from llmlab.model.types import Model, Params
from llmlab.objective import base
from llmlab.objective.base import Loss, Objective
from llmlab.objective.groups import mean_where
from llmlab.objective.responses import response_scores

# Where pairs are told apart by how sure the scores are of their order, in percent.
CONFIDENCES = (50, 60, 70, 80, 90, 100)


def bradley_terry(chosen_B: jax.Array, rejected_B: jax.Array, margin_B: jax.Array | None = None) -> jax.Array:
    """loss_B of pairs of scores: -log σ(chosen - rejected) (arXiv 2203.02155, eq. 1).

    With a margin, -log σ(chosen - rejected - margin): by how much the one should be above the other (arXiv 2307.09288,
    eq. 2).
    """
    chosen_B, rejected_B = _precise(chosen_B), _precise(rejected_B)
    difference_B = chosen_B - rejected_B
    return -log_sigmoid(difference_B if margin_B is None else difference_B - margin_B)


def plackett_luce(score_PR: jax.Array, present_PR: jax.Array, margin_PR: jax.Array | None = None) -> jax.Array:
    """loss_P of rankings, best first: -Σ_i (s_i - log Σ_{j≥i} exp s_j), over the responses that are there.

    The negative log-likelihood of the Plackett-Luce model (arXiv 2305.18290, eq. 18): the best is drawn from all, the
    next from the rest, and so on; of two it is `bradley_terry`. A margin is subtracted from a score where it is drawn,
    and not where others are. Any number of axes may come before R.
    """
    is_there_PR = present_PR > 0
    score_PR = jnp.where(is_there_PR, _precise(score_PR), 0)
    beyond_PRR = -_differences(score_PR)
    if margin_PR is not None:
        beyond_PRR = beyond_PRR + jnp.where(is_there_PR, margin_PR, 0)[..., None]
    # Of what is drawn itself, at the same place, the difference is 0; what came before is out.
    own_PRR = jnp.broadcast_to(jnp.eye(score_PR.shape[-1], dtype=bool), beyond_PRR.shape)
    log_odds_PRR = jnp.where(own_PRR, 0, jnp.where(_is_pair(present_PR), beyond_PRR, -jnp.inf))
    return jnp.sum(jnp.where(is_there_PR, jax.nn.logsumexp(log_odds_PRR, axis=-1), 0), axis=-1)


def centring(score_PR: jax.Array, present_PR: jax.Array) -> jax.Array:
    """(2 · the mean score)² of each group, which holds scores near zero: no preference says where zero is.

    Of two responses it is (chosen + rejected)² (arXiv 2312.09244, eq. 2).
    """
    is_there_PR = present_PR > 0
    score_PR = jnp.where(is_there_PR, _precise(score_PR), 0)
    count_P = jnp.maximum(jnp.sum(is_there_PR, axis=-1, dtype=score_PR.dtype), 1)
    return jnp.square(2 * jnp.sum(score_PR, axis=-1) / count_P)


def step_loss(score_B: jax.Array, label_B: jax.Array) -> jax.Array:
    """loss_B of steps, -label·log σ(score) - (1 - label)·log σ(-score), with labels from 0, wrong, to 1, right.

    The process reward of arXiv 2305.20050, as cross-entropy with soft labels (arXiv 2312.08935, eq. 2).
    """
    score_B = _precise(score_B)
    return -label_B * log_sigmoid(score_B) - (1 - label_B) * log_sigmoid(-score_B)


def _precise(x_: jax.Array) -> jax.Array:
    return x_.astype(accumulation_dtype(x_.dtype))


def _differences(score_PR: jax.Array) -> jax.Array:
    """[P, R, R]: the score of each response minus that of each other."""
    return score_PR[..., :, None] - score_PR[..., None, :]


def _is_pair(present_PR: jax.Array) -> jax.Array:
    """[P, R, R]: whether both are there and the first is the better one."""
    is_there_PR = present_PR > 0
    both_PRR = is_there_PR[..., :, None] & is_there_PR[..., None, :]
    return jnp.triu(both_PRR, k=1)


@dataclasses.dataclass(frozen=True)
class RewardConfig(Objective):
    """A model of what people prefer, from pairs and rankings alike: see `plackett_luce`. It needs model.head=score.

    margin: the values of rows are by how much a response should be above those behind it; else they are not looked at.
    centring: weight of `centring`, such as 0.01.
    """

    name: Literal["reward"] = "reward"
    margin: bool = False
    centring: float = 0.0

    rows: ClassVar[tuple[str, ...]] = ("preference", "ranking")
    head: ClassVar[Literal["tokens", "score"]] = "score"

    def __post_init__(self) -> None:
        if not self.centring >= 0:
            raise UserError(f"objective.centring={self.centring} should be 0 (off) or more, such as 0.01")

    def make(self, model: Model, token_bytes_V: Any) -> Loss:
        """The loss for `model`."""
        return lambda params, batch, key: reward(model, params, batch, self, key)


def reward(
    model: Model, params: Params, batch: GroupBatch, config: RewardConfig, key: jax.Array | None = None
) -> tuple[Mean, Metrics]:
    """(loss, metrics) of a batch of groups, best first: the sum over those of two responses or more, and their number.

    The metrics are `loss`, without what centring and the router add. Of all pairs in a group: `accuracy`, the share in
    the right order; `margin`, the mean difference of their scores; `brier`, the mean (1 - p)², p being the probability
    by the scores of the right order; `confidence`, the mean max(p, 1 - p), the accuracy that the scores expect.
    `chosen_reward`, the mean score of the best, and `rejected_reward`, of all others. What the model counts.
    In evaluation also, of the pairs with a confidence from 60 to 70 % and so on, `calibration/accuracy_60` and the mean
    `calibration/confidence_60`: the same where the scores can be trusted.
    """
    score_BPR, aux = response_scores(model, params, batch, key)
    is_group_BP = jnp.sum(batch.present_BPR > 0, axis=-1) > 1
    is_there_BPR = (batch.present_BPR > 0) & is_group_BP[..., None]
    margin_BPR = batch.value_BPR if config.margin else None
    loss = mean_where(plackett_luce(score_BPR, batch.present_BPR, margin_BPR), is_group_BP)

    is_pair_BPRR = _is_pair(batch.present_BPR)
    difference_BPRR = _differences(score_BPR)
    is_right_BPRR = (difference_BPRR > 0).astype(score_BPR.dtype)
    confidence_BPRR = jax.nn.sigmoid(jnp.abs(difference_BPRR))
    metrics: Metrics = {
        "loss": loss,
        "accuracy": mean_where(is_right_BPRR, is_pair_BPRR),
        "margin": mean_where(difference_BPRR, is_pair_BPRR),
        "brier": mean_where(jnp.square(jax.nn.sigmoid(-difference_BPRR)), is_pair_BPRR),
        "confidence": mean_where(confidence_BPRR, is_pair_BPRR),
        "chosen_reward": mean_where(score_BPR[..., 0], is_there_BPR[..., 0]),
        "rejected_reward": mean_where(score_BPR[..., 1:], is_there_BPR[..., 1:]),
    }
    if key is None:
        for low, high in itertools.pairwise(CONFIDENCES):
            is_within_BPRR = (confidence_BPRR >= low / 100) & ((confidence_BPRR < high / 100) | (high == 100))
            metrics |= {
                f"calibration/accuracy_{low}": mean_where(is_right_BPRR, is_pair_BPRR & is_within_BPRR),
                f"calibration/confidence_{low}": mean_where(confidence_BPRR, is_pair_BPRR & is_within_BPRR),
            }
    if config.centring:
        off_centre = mean_where(centring(score_BPR, batch.present_BPR), is_group_BP)
        loss = Mean(loss.sum + config.centring * off_centre.sum, loss.weight)
    return base.total(model, loss, aux), metrics | aux
