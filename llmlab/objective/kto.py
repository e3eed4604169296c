"""Answers judged one by one, good or bad: KTO over a batch."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Mean, Metrics
from llmlab.core.errors import UserError
from llmlab.data.pipeline import GroupBatch
from llmlab.model.types import Model, Params
from llmlab.objective import base
from llmlab.objective.base import Before, Logprobs, Loss, Objective
from llmlab.objective.groups import mean_where, response_counts
from llmlab.objective.preference import kto_loss
from llmlab.objective.responses import Reference, reference_logps, response_logps


@dataclasses.dataclass(frozen=True)
class KtoConfig(Objective):
    """Good and bad answers, not in pairs, straight into the policy: `kto_loss`, at a response's value.

    beta: how far to go from the reference. good_weight, bad_weight: λ_D and λ_U; their ratio should about make up for
    there being more of one kind (arXiv 2402.01306, eq. 8).
    baseline: what a response's log(π/π_ref) is held against. batch: one for the whole batch, see `shared_baseline`.
    zero: nothing, as APO-zero does (arXiv 2408.06266).
    reference, logprobs: as in preference.
    """

    name: Literal["kto"] = "kto"
    beta: float = 0.1
    good_weight: float = 1.0
    bad_weight: float = 1.0
    baseline: Literal["batch", "zero"] = "batch"
    reference: Reference = "auto"
    logprobs: Logprobs = "auto"

    rows: ClassVar[tuple[str, ...]] = ("binary",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta={self.beta} should be more than 0, such as 0.1")
        for name in ("good_weight", "bad_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"objective.{name}={getattr(self, name)} should be 0 or more")

    @property
    def needs_reference(self) -> bool:
        """It does."""
        return True

    def make(self, model: Model, token_bytes_V: Any) -> Loss:
        """The loss for `model`; the baseline of a batch that `before` has not seen is that batch's own."""
        return lambda params, batch, key: kto(model, params, batch, self, key)

    def before(self, model: Model) -> Before | None:
        """What fills in the baseline, and the reference's log-probabilities with it, so that no part computes them."""
        if self.baseline == "zero":
            return None

        def fill(params: Params, batch: GroupBatch, key: jax.Array | None) -> GroupBatch:
            logp_BPR, _ = response_logps(model, params, batch, logprobs=self.logprobs)
            reference_BPR = self.reference_logps(model, params, batch)
            baseline_B = shared_baseline(logp_BPR - reference_BPR, batch)
            return batch._replace(reference_BPR=reference_BPR, baseline_B=baseline_B)

        return fill

    def reference_logps(self, model: Model, params: Params, batch: GroupBatch) -> jax.Array:
        """logp_BPR by the reference that this config names."""
        return reference_logps(model, params, batch, reference=self.reference, logprobs=self.logprobs)


def shared_baseline(ratio_BPR: jax.Array, batch: GroupBatch) -> jax.Array:
    """baseline_B, the same for all: halfway between the mean log(π/π_ref) of good and of bad responses, at least 0.

    KTO's own is an estimate of the KL divergence, by responses paired with prompts that are not theirs (section 4.1):
    one more pass of both models, and where the reference's log-probabilities are stored there is no model to pass them
    through. This one takes no further pass, and is no KL divergence: like the reward shift of BCO (arXiv 2404.04656) it
    moves with the responses that are learned, so that what counts is how far good and bad come apart. It is at least 0,
    as KTO's: a good response less likely than by the reference is always on the wrong side. Where a batch has none of
    a kind, the mean of that kind counts as 0.
    """
    good, bad = (mean_where(ratio_BPR, of_BPR) for of_BPR in _good_and_bad(batch))
    halfway = (good.sum / jnp.maximum(good.weight, 1) + bad.sum / jnp.maximum(bad.weight, 1)) / 2
    shared = jax.lax.stop_gradient(jnp.maximum(halfway, 0))
    return jnp.broadcast_to(shared, ratio_BPR.shape[:1])


def kto(
    model: Model, params: Params, batch: GroupBatch, config: KtoConfig, key: jax.Array | None = None
) -> tuple[Mean, Metrics]:
    """(loss, metrics) of a batch of responses, good where their value is more than 0: a sum, and how many they are.

    The metrics are `loss`; `accuracy`, the share on the right side of the baseline; `baseline`; `chosen_reward`, the
    mean β·log(π/π_ref) of the good, and `rejected_reward`, of the bad; `chosen_logp`, `rejected_logp`, also
    `_per_token`; `chosen_tokens`, `rejected_tokens`; `reference_kl`, the mean of log(π/π_ref) over the responses, which
    is the KL divergence only where the policy wrote them; and what the model counts.
    """
    logp_BPR, aux = response_logps(model, params, batch, logprobs=config.logprobs, key=key)
    filled_B = batch.baseline_B
    reference_BPR = config.reference_logps(model, params, batch) if filled_B is None else batch.reference_BPR
    ratio_BPR = logp_BPR - reference_BPR
    if config.baseline == "zero":
        baseline_B = jnp.zeros(len(ratio_BPR), ratio_BPR.dtype)
    else:
        baseline_B = shared_baseline(ratio_BPR, batch) if filled_B is None else filled_B
    baseline_BPR = jnp.broadcast_to(baseline_B[:, None, None], ratio_BPR.shape)
    weights = (config.good_weight, config.bad_weight)
    loss_BPR = kto_loss(logp_BPR, reference_BPR, batch.value_BPR, baseline_BPR, beta=config.beta, weights=weights)

    good_BPR, bad_BPR = _good_and_bad(batch)
    is_right_BPR = jnp.where(good_BPR, ratio_BPR > baseline_BPR, ratio_BPR < baseline_BPR)
    count_BPR = response_counts(batch)
    is_there_BPR = batch.present_BPR > 0
    loss = mean_where(loss_BPR, is_there_BPR)
    metrics: Metrics = {
        "loss": loss,
        "accuracy": mean_where(is_right_BPR.astype(loss_BPR.dtype), is_there_BPR),
        "baseline": mean_where(baseline_BPR, is_there_BPR),
        "reference_kl": mean_where(ratio_BPR, is_there_BPR),
    }
    for response, of_BPR in (("chosen", good_BPR), ("rejected", bad_BPR)):
        logp, tokens = mean_where(logp_BPR, of_BPR), mean_where(count_BPR, of_BPR)
        metrics |= {
            f"{response}_reward": mean_where(config.beta * ratio_BPR, of_BPR),
            f"{response}_logp": logp,
            f"{response}_logp_per_token": Mean(logp.sum, tokens.sum),
            f"{response}_tokens": tokens,
        }
    return base.total(model, loss, aux), metrics | aux


def _good_and_bad(batch: GroupBatch) -> tuple[jax.Array, jax.Array]:
    """Which responses, [B, P, R], are the one and which the other."""
    is_present_BPR, is_good_BPR = batch.present_BPR > 0, batch.value_BPR > 0
    return is_present_BPR & is_good_BPR, is_present_BPR & ~is_good_BPR
