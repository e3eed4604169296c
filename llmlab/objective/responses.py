"""What a model makes of the responses of a batch: their log-probability, by it or by its reference, and their score."""

from typing import Literal

import jax

from llmlab.core.arrays import Metrics
from llmlab.core.errors import UserError
from llmlab.data.pipeline import GroupBatch
from llmlab.model.adapters import adapter_of, without_adapter
from llmlab.model.types import Model, Params
from llmlab.objective.base import Logprobs, run, target_logps
from llmlab.objective.groups import at_last_token, response_sums, where_present

# stored: what the batch brings; adapter: the weights under the adapter; auto: the latter where there is one.
Reference = Literal["auto", "stored", "adapter"]


def response_logps(
    model: Model, params: Params, batch: GroupBatch, *, logprobs: Logprobs = "auto", key: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """(logp_BPR, aux): the log-probability of each response, summed over what the model is to say of it.

    What a reference model gives here is what `reference_BPR` of a batch should hold.
    """
    out = run(model, params, batch, key)
    logp_BT = target_logps(model, params, out.hidden_BTD, batch.targets_BT, logprobs).logp_BT
    return response_sums(logp_BT, batch), out.aux


def reference_logps(
    model: Model, params: Params, batch: GroupBatch, *, reference: Reference, logprobs: Logprobs = "auto"
) -> jax.Array:
    """logp_BPR by the reference model, which no gradient reaches.

    Raises:
      UserError: the reference should be the weights under an adapter, and there is none.
    """
    adapts = bool(adapter_of(params))
    if reference == "adapter" and not adapts:
        raise UserError(
            "objective.reference=adapter is the weights under an adapter, and there is none: "
            "set adapter.kind, or objective.reference=stored"
        )
    if reference == "stored" or not adapts:
        return where_present(batch.reference_BPR, batch)
    return jax.lax.stop_gradient(response_logps(model, without_adapter(params), batch, logprobs=logprobs)[0])


def response_scores(
    model: Model, params: Params, batch: GroupBatch, key: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """(score_BPR, aux): what a reward model gives each response, read at its last token."""
    out = run(model, params, batch, key)
    return at_last_token(model.score(params, out.hidden_BTD), batch), out.aux
