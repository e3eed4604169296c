"""Next-token prediction: cross-entropy over the masked targets, in nats, with bits per byte beside it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llmlab.core.arrays import Mean, Metrics, accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.data.pipeline import TokenBatch
from llmlab.kernels.logprobs import token_logprobs
from llmlab.model.routing import router_loss
from llmlab.model.types import Inputs, Model, Params

Loss = Callable[[Params, TokenBatch, jax.Array | None], tuple[Mean, Metrics]]


@dataclasses.dataclass(frozen=True)
class NextTokenConfig:
    """Next-token cross-entropy.

    z_loss: weight of log(Z)², which keeps the logits' scale in place (PaLM, arXiv 2204.02311, section 5). logprobs: how
    the token log-probabilities are computed: auto, plain (holds all logits), chunked (never does).
    """

    name: Literal["next_token"] = "next_token"
    z_loss: float = 0.0
    logprobs: Literal["auto", "plain", "chunked"] = "auto"

    def __post_init__(self) -> None:
        if not self.z_loss >= 0:
            raise UserError(f"objective.z_loss={self.z_loss} should be 0 (off) or more, such as 1e-4")

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

    The metrics are `loss`, in nats a token and without the other terms, and `bits_per_byte`, of the text behind the
    targets: comparable between tokenizers; and what the model counts.
    """
    inputs = Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
    out = model.apply(params, inputs, key=key)
    dtype = accumulation_dtype(out.hidden_BTD.dtype)
    flatten = model.partition is None or model.partition.size("time") == 1
    logp_BT, logz_BT, _ = token_logprobs(
        out.hidden_BTD,
        model.head(params),
        batch.targets_BT,
        softcap=model.config.logit_softcap,
        implementation=config.logprobs,
        flatten=flatten,
    )
    mask_BT = batch.mask_BT.astype(dtype)
    weight = jnp.sum(mask_BT)
    nats = -jnp.sum(logp_BT * mask_BT)
    total = nats
    if config.z_loss:
        total = total + config.z_loss * jnp.sum(jnp.square(logz_BT) * mask_BT)
    if out.aux:
        total = total + router_loss(out.aux, model.config.experts) * weight
    bytes_BT = jnp.asarray(token_bytes_V)[batch.targets_BT].astype(dtype) * mask_BT
    metrics: Metrics = {
        "loss": Mean(nats, weight),
        "bits_per_byte": Mean(nats / math.log(2), jnp.sum(bytes_BT)),
        **out.aux,
    }
    return Mean(total, weight), metrics
