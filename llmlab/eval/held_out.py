"""The exact loss over held-out text: every target counts once, whatever the size of the batches."""

import math
from collections.abc import Callable, Iterable

import jax

from llmlab.core.arrays import Mean, Metrics, scalars
from llmlab.core.errors import UserError
from llmlab.core.mesh import Partition
from llmlab.data.pipeline import TokenBatch
from llmlab.model.types import Params
from llmlab.objective import Loss

Evaluate = Callable[[Params, Iterable[TokenBatch]], dict[str, float]]


def make_evaluator(loss: Loss, partition: Partition | None = None) -> Evaluate:
    """evaluate(params, batches) -> {"loss": …, …every other metric of `loss` that something was seen of}.

    Where targets are tokens the loss is in nats each, and "perplexity" is its exponential.

    Sums and weights leave the device batch by batch and are added in float64, so masked rows change nothing. Keep what
    this returns: it compiles once for each shape of batch.

    Raises (evaluate):
      UserError: no target in any batch.
    """
    replicated = None if partition is None else partition.sharding()
    sums_of = jax.jit(lambda params, batch: scalars(loss(params, batch, None)[1]), out_shardings=replicated)

    def evaluate(params: Params, batches: Iterable[TokenBatch]) -> dict[str, float]:
        totals: dict[str, Mean] = {}
        pending: Metrics = {}
        for batch in batches:
            # The device works on one batch while the host adds up the one before, and never runs further ahead.
            running = sums_of(params, batch)
            _add(totals, pending)
            pending = running
        _add(totals, pending)
        if not totals or not totals["loss"].weight:
            raise UserError("there is no held-out text: raise data.held_out, or name files in data.held_out_files")
        means = {name: mean.value() for name, mean in totals.items() if mean.weight}
        tokens = {"perplexity": exponential(means["loss"])} if "bits_per_byte" in totals else {}
        return {"loss": means["loss"], **tokens, **means}

    return evaluate


def _add(totals: dict[str, Mean], metrics: Metrics) -> None:
    for name, part in jax.device_get(metrics).items():
        totals[name] = totals.get(name, Mean(0.0, 0.0)) + Mean(float(part.sum), float(part.weight))


def exponential(nats: float) -> float:
    """Of a hopeless model's loss it is infinite."""
    return math.inf if nats > 700 else math.exp(nats)
