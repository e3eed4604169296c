"""Next-token prediction: cross-entropy over the masked targets, in nats, with bits per byte beside it."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Mean, Metrics
from llmlab.core.errors import UserError
from llmlab.data.pipeline import TokenBatch
from llmlab.model.types import Model, Params
from llmlab.objective import base
from llmlab.objective.base import Logprobs, Loss, Objective, run, target_logps
from llmlab.objective.neftune import noisy_embeddings


@dataclasses.dataclass(frozen=True)
class NextTokenConfig(Objective):
    """Next-token cross-entropy.

    z_loss: weight of log(Z)², which keeps the logits' scale in place (PaLM, arXiv 2204.02311, section 5). logprobs: how
    the token log-probabilities are computed: auto, plain (holds all logits), chunked (never does). neftune_alpha: how
    much noise the embeddings get in training, 5 to 15 where any: see `neftune`.
    """

    name: Literal["next_token"] = "next_token"
    z_loss: float = 0.0
    logprobs: Logprobs = "auto"
    neftune_alpha: float = 0.0

    rows: ClassVar[tuple[str, ...]] = ("text", "chat")

    def __post_init__(self) -> None:
        if not self.z_loss >= 0:
            raise UserError(f"objective.z_loss={self.z_loss} should be 0 (off) or more, such as 1e-4")
        if not self.neftune_alpha >= 0:
            raise UserError(f"objective.neftune_alpha={self.neftune_alpha} should be 0 (off) or more, such as 5")

    def make(self, model: Model, token_bytes_V: Any) -> Loss:
        """The loss of this config for `model`; `token_bytes_V` are the bytes of text behind each token."""
        return lambda params, batch, key: next_token_loss(model, params, batch, token_bytes_V, self, key)


def next_token(**overrides: Any) -> NextTokenConfig:
    """The config section, for experiment files."""
    return NextTokenConfig(**overrides)


def next_token_loss(
    model: Model,
    params: Params,
    batch: TokenBatch,
    token_bytes_V: Any,
    config: NextTokenConfig,
    key: jax.Array | None = None,
) -> tuple[Mean, Metrics]:
    """(loss, metrics) of a batch: loss = -Σ mask·log p(target) (+ z_loss·Σ mask·log²Z) over Σ mask, plus the router's.

    The metrics are `loss`, in nats a token and without the other terms; `bits_per_byte`, of the targets that are text,
    so not of the end of a document: comparable between tokenizers, and counted as lm_eval does; and what the model
    counts.
    """
    embeddings_BTD = None
    if config.neftune_alpha and key is not None:
        key, noise_key = jax.random.split(key)
        embeddings_BTD = noisy_embeddings(model, params, batch, config.neftune_alpha, noise_key)
    out = run(model, params, batch, key, embeddings_BTD)
    logp_BT, logz_BT, _ = target_logps(model, params, out.hidden_BTD, batch.targets_BT, config.logprobs)
    mask_BT = batch.mask_BT.astype(logp_BT.dtype)
    weight = jnp.sum(mask_BT)
    nats = -jnp.sum(logp_BT * mask_BT)
    total = nats
    if config.z_loss:
        total = total + config.z_loss * jnp.sum(jnp.square(logz_BT) * mask_BT)
    bytes_BT = jnp.asarray(token_bytes_V)[batch.targets_BT].astype(logp_BT.dtype) * mask_BT
    text_nats = -jnp.sum(jnp.where(bytes_BT > 0, logp_BT, 0) * mask_BT)
    metrics: Metrics = {
        "loss": Mean(nats, weight),
        "bits_per_byte": Mean(text_nats / math.log(2), jnp.sum(bytes_BT)),
        **out.aux,
    }
    return base.total(model, Mean(total, weight), out.aux), metrics
