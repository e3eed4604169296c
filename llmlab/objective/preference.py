"""Direct preference objectives: losses over log-probabilities of responses, and the objective that takes them to pairs.

The losses take arrays of one shape, of which `_B` stands for any, and give one of the same; they are computed in at
least float32. A log-probability is a sum over the tokens of a response, a mean log-probability their mean.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from llmlab.core.arrays import Mean, Metrics, accumulation_dtype
from llmlab.core.errors import UserError, nearest
from llmlab.data.pipeline import GroupBatch
from llmlab.model.types import Model, Params
from llmlab.objective import base
from llmlab.objective.base import Logprobs, Loss, Objective
from llmlab.objective.groups import mean_where, response_counts
from llmlab.objective.responses import Reference, reference_logps, response_logps

KINDS = ("sigmoid", "hinge", "ipo", "robust")
SMOOTHED = ("sigmoid", "robust")
# Of these, what is compared are mean log-probabilities.
PER_TOKEN = ("ipo", "orpo", "simpo")


def preference_loss(
    chosen_logp_B: jax.Array,
    rejected_logp_B: jax.Array,
    ref_chosen_logp_B: jax.Array,
    ref_rejected_logp_B: jax.Array,
    *,
    beta: float,
    kind: str,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """loss_B of pairs, by h = log(π/π_ref)(chosen) - log(π/π_ref)(rejected) and ε = label_smoothing.

    sigmoid: -log σ(βh), DPO (arXiv 2305.18290, eq. 7); with ε, that times 1-ε and -log σ(-βh) times ε: conservative DPO
      (Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023, eq. 3).
    hinge: max(0, 1 - βh), the loss of SLiC (arXiv 2305.10425) on h, "hinge-norm" of RSO (arXiv 2309.06657).
    ipo: (h - 1/(2β))², β being its τ (arXiv 2310.12036, eq. 17).
    robust: ((1-ε)·ℓ(h) - ε·ℓ(-h)) / (1-2ε) with ℓ(h) = -log σ(βh), unbiased where a share ε of the pairs is the wrong
      way round (arXiv 2403.00409, section 3.1).

    Raises:
      UserError: an unknown kind, or a label smoothing that it does not have.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is not a preference loss: {nearest(kind, KINDS)}")
    check_smoothing(kind, label_smoothing, "label_smoothing")
    logps = (chosen_logp_B, rejected_logp_B, ref_chosen_logp_B, ref_rejected_logp_B)
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = _precise(*logps)
    h_B = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)
    if kind == "hinge":
        return jax.nn.relu(1 - beta * h_B)
    if kind == "ipo":
        return jnp.square(h_B - 1 / (2 * beta))
    right_B, wrong_B, epsilon = -log_sigmoid(beta * h_B), -log_sigmoid(-beta * h_B), label_smoothing
    if not epsilon:
        return right_B
    if kind == "sigmoid":
        return (1 - epsilon) * right_B + epsilon * wrong_B
    return ((1 - epsilon) * right_B - epsilon * wrong_B) / (1 - 2 * epsilon)


def orpo_loss(chosen_mean_logp_B: jax.Array, rejected_mean_logp_B: jax.Array, *, weight: float) -> jax.Array:
    """loss_B of ORPO (arXiv 2403.07691, eq. 6 and 7): -log P(chosen) - λ·log σ(log odds(chosen) - log odds(rejected)).

    log P is a mean log-probability, log odds = log P - log(1 - P), λ = weight. No reference.
    """
    chosen_B, rejected_B = _precise(chosen_mean_logp_B, rejected_mean_logp_B)
    return -chosen_B - weight * log_sigmoid(_log_odds(chosen_B) - _log_odds(rejected_B))


def simpo_loss(
    chosen_mean_logp_B: jax.Array, rejected_mean_logp_B: jax.Array, *, beta: float, gamma: float
) -> jax.Array:
    """loss_B of SimPO (arXiv 2405.14734, eq. 6), of mean log-probabilities: -log σ(β·chosen - β·rejected - γ)."""
    chosen_B, rejected_B = _precise(chosen_mean_logp_B, rejected_mean_logp_B)
    return -log_sigmoid(beta * (chosen_B - rejected_B) - gamma)


def kto_loss(
    policy_logp_B: jax.Array,
    ref_logp_B: jax.Array,
    good_B: jax.Array,
    kl: jax.Array | float,
    *,
    beta: float,
    weights: tuple[float, float],
) -> jax.Array:
    """loss_B of KTO (arXiv 2402.01306, eq. 7), with r = log(π/π_ref) and z = kl, its point of reference.

    λ_D·(1 - σ(β(r - z))) where good_B holds, λ_U·(1 - σ(β(z - r))) elsewhere; `weights` are (λ_D, λ_U). No gradient
    goes through `kl`. Where it is 0 this is APO-zero, unpaired (arXiv 2408.06266, eq. 7).
    """
    policy_B, ref_B = _precise(policy_logp_B, ref_logp_B)
    beyond_B = policy_B - ref_B - jax.lax.stop_gradient(kl)
    good_B = good_B > 0
    # 1 - σ(x) is σ(-x), without what the difference would lose.
    return jnp.where(good_B, *weights) * jax.nn.sigmoid(beta * jnp.where(good_B, -beyond_B, beyond_B))


def _precise(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    dtype = accumulation_dtype(jnp.result_type(*arrays))
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def _log_odds(logp_B: jax.Array) -> jax.Array:
    # A probability that rounds to 1 would have infinite odds, and no gradient.
    logp_B = jnp.minimum(logp_B, -jnp.finfo(logp_B.dtype).eps)
    return logp_B - jnp.log(-jnp.expm1(logp_B))


def check_smoothing(kind: str, label_smoothing: float, name: str) -> None:
    """Raises UserError where this kind of loss has no such label smoothing."""
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"{name}={label_smoothing} should be from 0 to below 0.5: it is the share of wrong pairs")
    if label_smoothing and kind not in SMOOTHED:
        raise UserError(f"{name}={label_smoothing} is of {' and '.join(SMOOTHED)}: set it to 0 with kind={kind}")


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(Objective):
    """Preferences between two responses, straight into the policy.

    kind: sigmoid (DPO), hinge, ipo, robust, against a reference: see `preference_loss`. ipo compares means over tokens,
    as in its paper's results (TRL asked its authors). orpo, simpo: without one, see `orpo_loss` and `simpo_loss`.
    beta: how far to go from the reference; about 2 for simpo; orpo has none. label_smoothing: the share of pairs that
    are the wrong way round, of sigmoid and robust. gamma: simpo's margin. odds_weight: orpo's λ.
    sft_weight: also adds so much of the chosen response's mean negative log-probability (RPO, arXiv 2404.19733, eq. 1).
    reference: auto is the weights under the adapter where there is one, else what the data stores; or say which.
    logprobs: as in next_token.
    """

    name: Literal["preference"] = "preference"
    kind: Literal["sigmoid", "hinge", "ipo", "robust", "orpo", "simpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 1.0
    odds_weight: float = 0.1
    sft_weight: float = 0.0
    reference: Reference = "auto"
    logprobs: Logprobs = "auto"

    rows: ClassVar[tuple[str, ...]] = ("preference",)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta={self.beta} should be more than 0, such as 0.1")
        check_smoothing(self.kind, self.label_smoothing, "objective.label_smoothing")
        for name in ("gamma", "odds_weight", "sft_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"objective.{name}={getattr(self, name)} should be 0 or more")

    @property
    def needs_reference(self) -> bool:
        """All kinds but orpo and simpo do."""
        return self.kind in KINDS

    def make(self, model: Model, token_bytes_V: Any) -> Loss:
        """The loss for `model`."""
        return lambda params, batch, key: preference(model, params, batch, self, key)


def preference(
    model: Model, params: Params, batch: GroupBatch, config: PreferenceConfig, key: jax.Array | None = None
) -> tuple[Mean, Metrics]:
    """(loss, metrics) of a batch of pairs: the sum over the pairs that are there, and how many they are.

    The metrics are `loss`, without what sft_weight and the router add; `accuracy`, the share of pairs whose chosen
    response has the higher reward, and `margin`, by how much; `chosen_reward` and `rejected_reward`, β·log(π/π_ref),
    without π_ref where there is none and a mean over tokens with ipo, orpo and simpo; `chosen_logp`, `rejected_logp`,
    also `_per_token`; `chosen_tokens`, `rejected_tokens`; `reference_kl`, the mean of log(π/π_ref) over the responses,
    which is the KL divergence only where the policy wrote them; and what the model counts.

    Raises:
      UserError: the groups are not pairs, or there is no such reference.
    """
    responses = batch.present_BPR.shape[-1]
    if responses != 2:
        raise UserError(
            f"objective.name=preference compares two responses, and the groups of this data have {responses}: "
            f"give pairs, or learn from rankings with objective.name=reward"
        )
    logp_BPR, aux = response_logps(model, params, batch, logprobs=config.logprobs, key=key)
    reference_BPR = jnp.zeros_like(logp_BPR)
    if config.needs_reference:
        reference_BPR = reference_logps(model, params, batch, reference=config.reference, logprobs=config.logprobs)
    count_BPR = response_counts(batch)
    tokens_BPR = jnp.maximum(count_BPR, 1)
    unit_BPR = tokens_BPR if config.kind in PER_TOKEN else 1
    loss_BP = _loss(config, logp_BPR / unit_BPR, reference_BPR / unit_BPR)
    reward_BPR = config.beta * (logp_BPR - reference_BPR) / unit_BPR

    is_pair_BP = jnp.all(batch.present_BPR > 0, axis=-1)

    def mean(x_BP: jax.Array) -> Mean:
        return mean_where(x_BP, is_pair_BP)

    loss = mean(loss_BP)
    metrics: Metrics = {
        "loss": loss,
        "accuracy": mean((reward_BPR[..., 0] > reward_BPR[..., 1]).astype(loss_BP.dtype)),
        "margin": mean(reward_BPR[..., 0] - reward_BPR[..., 1]),
    }
    for r, response in enumerate(("chosen", "rejected")):
        logp, tokens = mean(logp_BPR[..., r]), mean(count_BPR[..., r])
        metrics |= {
            f"{response}_reward": mean(reward_BPR[..., r]),
            f"{response}_logp": logp,
            f"{response}_logp_per_token": Mean(logp.sum, tokens.sum),
            f"{response}_tokens": tokens,
        }
    if config.needs_reference:
        metrics["reference_kl"] = mean(jnp.mean(logp_BPR - reference_BPR, axis=-1))
    if config.sft_weight:
        nll = mean(-logp_BPR[..., 0] / tokens_BPR[..., 0])
        loss = Mean(loss.sum + config.sft_weight * nll.sum, loss.weight)
    return base.total(model, loss, aux), metrics | aux


def _loss(config: PreferenceConfig, policy_BPR: jax.Array, reference_BPR: jax.Array) -> jax.Array:
    """loss_BP of pairs, the chosen first."""
    policy, reference = ((x_BPR[..., 0], x_BPR[..., 1]) for x_BPR in (policy_BPR, reference_BPR))
    if config.kind == "orpo":
        return orpo_loss(*policy, weight=config.odds_weight)
    if config.kind == "simpo":
        return simpo_loss(*policy, beta=config.beta, gamma=config.gamma)
    return preference_loss(
        *policy, *reference, beta=config.beta, kind=config.kind, label_smoothing=config.label_smoothing
    )
