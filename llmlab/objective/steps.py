"""Process rewards: a score at the end of each step of an answer, for whether that step is right."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Mean, Metrics
from llmlab.data.pipeline import GroupBatch
from llmlab.data.store import LAST_MARK, STEP
from llmlab.model.types import Model, Params
from llmlab.objective import base
from llmlab.objective.base import Loss, Objective, run
from llmlab.objective.groups import mean_where
from llmlab.objective.reward import step_loss


@dataclasses.dataclass(frozen=True)
class StepsConfig(Objective):
    """A model of which steps of an answer are right: see `step_loss`. It needs model.head=score."""

    name: Literal["steps"] = "steps"

    rows: ClassVar[tuple[str, ...]] = ("steps",)
    head: ClassVar[Literal["tokens", "score"]] = "score"

    def make(self, model: Model, token_bytes_V: Any) -> Loss:
        """The loss for `model`."""
        return lambda params, batch, key: steps(model, params, batch, key)


def steps(model: Model, params: Params, batch: GroupBatch, key: jax.Array | None = None) -> tuple[Mean, Metrics]:
    """(loss, metrics) of a batch: the sum over the steps that are judged, and how many they are.

    The metrics are `loss`, without what the router adds; `accuracy`, the share of steps whose score is above 0 where
    their label is above a half, and not elsewhere; `brier`, the mean squared difference of σ(score) and label; the
    mean score of those steps, `chosen_reward`, and of the others, `rejected_reward`; and what the model counts.
    """
    out = run(model, params, batch, key)
    score_BT = model.score(params, out.hidden_BTD)
    is_end_BT = (batch.marks_BT >= STEP) & (batch.segment_ids_BT > 0)
    score_BT = jnp.where(is_end_BT, score_BT, 0)
    label_BT = (jnp.clip(batch.marks_BT, STEP, LAST_MARK) - STEP).astype(score_BT.dtype) / (LAST_MARK - STEP)
    is_right_BT = label_BT > 0.5
    loss = mean_where(step_loss(score_BT, label_BT), is_end_BT)
    metrics: Metrics = {
        "loss": loss,
        "accuracy": mean_where(((score_BT > 0) == is_right_BT).astype(score_BT.dtype), is_end_BT),
        "brier": mean_where(jnp.square(jax.nn.sigmoid(score_BT) - label_BT), is_end_BT),
        "chosen_reward": mean_where(score_BT, is_end_BT & is_right_BT),
        "rejected_reward": mean_where(score_BT, is_end_BT & ~is_right_BT),
    }
    return base.total(model, loss, aux=out.aux), metrics | out.aux
