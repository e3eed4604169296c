"""What objectives share: how the rest of the code sees one, a pass through the model, log-probabilities, the total."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax

from llmlab.core.arrays import Mean, Metrics
from llmlab.kernels.logprobs import TokenLogprobs, token_logprobs
from llmlab.model.routing import router_loss
from llmlab.model.types import Inputs, Model, Out, Params

# The last argument is the step's random key, None in evaluation.
Loss = Callable[[Params, Any, jax.Array | None], tuple[Mean, Metrics]]
# (params, batch, key) -> batch: see `Objective.before`.
Before = Callable[[Params, Any, jax.Array | None], Any]
# How token log-probabilities are computed: plain holds all logits, chunked never does.
Logprobs = Literal["auto", "plain", "chunked"]


class Objective(abc.ABC):
    """What a config section `objective` is, whichever dataclass its `name` picks.

    Attributes:
      name: by which `OBJECTIVES` has it.
      rows: the kinds of rows, `data.rows`, that it is for.
      head: the model's: `tokens` where it reads log-probabilities, `score` where it reads scores.
      reference: which one it compares with, where it does.
      logprobs: how token log-probabilities are computed, where it reads them.
    """

    name: str = ""
    rows: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[Literal["tokens", "score"]] = "tokens"
    reference: Literal["auto", "stored", "adapter"] = "auto"
    logprobs: Logprobs = "auto"

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with a reference model: the weights under an adapter, or what batches bring of one."""
        return False

    def stores_reference(self, *, adapter: bool) -> bool:
        """Whether batches have to bring the reference's log-probabilities, in a run with an adapter or without."""
        return self.needs_reference and (self.reference == "stored" or (self.reference == "auto" and not adapter))

    @abc.abstractmethod
    def make(self, model: Model, token_bytes_V: Any) -> Loss:
        """The loss for `model`; `token_bytes_V` are the bytes of text behind each token."""

    def before(self, model: Model) -> Before | None:
        """What fills in what the parts of a batch share, before it is split into microbatches; None: nothing does."""
        return None


def run(
    model: Model,
    params: Params,
    batch: Any,
    key: jax.Array | None = None,
    embeddings_BTD: jax.Array | None = None,
) -> Out:
    """The model over a batch."""
    inputs = Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, embeddings_BTD)
    return model.apply(params, inputs, key=key)


def target_logps(
    model: Model, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, logprobs: Logprobs
) -> TokenLogprobs:
    """The log-probabilities of the targets under this model's head."""
    flatten = model.partition is None or model.partition.size("time") == 1
    w_DV = model.head(params)
    if model.config.tied_embedding:
        # On CPU as an array of its own: the gradient of a tall [V, D] product takes 1.7 times that of [D, V].
        w_DV = jax.lax.platform_dependent(w_DV, cpu=jax.lax.optimization_barrier, default=lambda w_DV: w_DV)
    return token_logprobs(
        hidden_BTD,
        w_DV,
        targets_BT,
        softcap=model.config.logit_softcap,
        implementation=logprobs,
        flatten=flatten,
    )


def total(model: Model, loss: Mean, aux: Metrics) -> Mean:
    """What is minimised: `loss` and, where the model has experts, their router's."""
    if not aux:
        return loss
    return Mean(loss.sum + router_loss(aux, model.config.experts) * loss.weight, loss.weight)
