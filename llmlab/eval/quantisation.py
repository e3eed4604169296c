"""What `llmlab quantise` prints: how much smaller a run's weights would be with fewer bits, and how much worse."""

import math
import sys
from typing import TextIO

import jax
import jax.numpy as jnp

from llmlab.data.pipeline import TokenBatch, evaluation_batches
from llmlab.data.prepare import prepare_parts
from llmlab.eval.command import EvalConfig, evaluator_of, text_of
from llmlab.model import weights
from llmlab.model.cost import tree_bytes
from llmlab.model.quantise import QuantiseConfig, quantise
from llmlab.model.score import check_predicts_tokens
from llmlab.model.transformer import unembed
from llmlab.model.types import Inputs, Model, Params
from llmlab.workdir.open import Opened


def quantise_command(
    opened: Opened, config: QuantiseConfig, on: EvalConfig, *, out: TextIO | None = None, quiet: bool = False
) -> dict[str, float]:
    """Compares the weights with their quantised selves on the first batch of the text that `on` names.

    Returns `logits` (see `logit_error`), `loss` and `bits_per_byte` as `llmlab eval` has them, what quantised weights
    have more of both, and the bytes of both.

    Raises:
      UserError: a reward model, text that cannot be read, or weights that cannot be quantised so.
    """
    check_predicts_tokens(opened.model.config)
    model, params = opened.model, weights.whole(opened.params)
    quantised = quantise(model, params, config)
    data, split = text_of(opened.config, on)
    parts = prepare_parts(data, opened.tokenizer, split, progress=not quiet)
    batch = next(evaluation_batches(data, parts, sharding=None))
    evaluate = evaluator_of(opened)
    before, after = evaluate(params, [batch]), evaluate(quantised, [batch])
    found = {name: before[name] for name in ("loss", "bits_per_byte")}
    found |= {f"{name}_difference": after[name] - before[name] for name in found}
    found |= {"logits": logit_error(model, params, quantised, batch)}
    found |= {"bytes": tree_bytes(params), "quantised_bytes": tree_bytes(quantised)}
    print(
        f"{config.bits} bits, on {int(batch.mask_BT.sum()):,} tokens\n"
        f"  weights        {found['quantised_bytes'] / 2**20:.2f} MiB instead of {found['bytes'] / 2**20:.2f}\n"
        f"  logits         differ by {found['logits']:.2%}\n"
        f"  loss           {found['loss']:.4f} nats per token, {found['loss_difference']:+.4f} quantised\n"
        f"  bits per byte  {found['bits_per_byte']:.4f}, {found['bits_per_byte_difference']:+.4f} quantised",
        file=out or sys.stdout,
        flush=True,
    )
    return found


def logit_error(model: Model, params: Params, other: Params, batch: TokenBatch) -> float:
    """|difference| / |logits|, over all logits of all targets of the batch."""

    @jax.jit
    def sums(params: Params, other: Params, batch: TokenBatch) -> tuple[jax.Array, jax.Array]:
        def of_row(row: TokenBatch) -> tuple[jax.Array, jax.Array]:
            inputs = Inputs(row.tokens_BT[None], row.positions_BT[None], row.segment_ids_BT[None])
            right_TV, wrong_TV = (
                unembed(model.apply(tree, inputs).hidden_BTD, model.head(tree), model.config.logit_softcap)[0]
                for tree in (params, other)
            )
            counts_T1 = row.mask_BT[:, None]
            return jnp.sum(counts_T1 * jnp.square(wrong_TV - right_TV)), jnp.sum(counts_T1 * jnp.square(right_TV))

        return jax.lax.map(of_row, batch)

    difference, size = (float(part.sum()) for part in sums(params, other, batch))
    return math.sqrt(difference / size)
