"""What `llmlab quantise` prints: how much smaller a run's weights would be with fewer bits, and how much worse."""

import sys
from typing import TextIO

import numpy as np

from llmlab.data.pipeline import evaluation_batches
from llmlab.data.prepare import prepare_parts
from llmlab.eval.command import EvalConfig, text_of
from llmlab.model import weights
from llmlab.model.cost import tree_bytes
from llmlab.model.quantise import QuantiseConfig, quantisation_error, quantise
from llmlab.workdir.open import Opened


def quantise_command(
    opened: Opened, config: QuantiseConfig, on: EvalConfig, *, out: TextIO | None = None, quiet: bool = False
) -> dict[str, float]:
    """Compares the weights with their quantised selves on the first batch of the text that `on` names.

    Raises:
      UserError: the text cannot be read, or the weights not be quantised so.
    """
    out = out or sys.stdout
    params = weights.whole(opened.params)
    quantised = quantise(opened.model, params, config)
    data, split = text_of(opened.config, on)
    batch = next(
        evaluation_batches(data, prepare_parts(data, opened.tokenizer, split, progress=not quiet), sharding=None)
    )
    tokens_BT = np.asarray(batch.tokens_BT)[np.asarray(batch.mask_BT).any(axis=1)]
    error = quantisation_error(opened.model, params, quantised, tokens_BT, opened.tokenizer.token_bytes())
    found = error | {"bytes": tree_bytes(params), "quantised_bytes": tree_bytes(quantised)}
    print(
        f"{config.bits} bits, {tokens_BT.size:,} tokens\n"
        f"  weights        {found['quantised_bytes'] / 2**20:.2f} MiB instead of {found['bytes'] / 2**20:.2f}\n"
        f"  logits         differ by {found['logits']:.2%}\n"
        f"  loss           {found['nats']:.4f} nats per token, {found['nats_difference']:+.4f} quantised\n"
        f"  bits per byte  {found['bits_per_byte']:.4f}, {found['bits_per_byte_difference']:+.4f} quantised",
        file=out,
        flush=True,
    )
    return found
