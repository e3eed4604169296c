"""How far our logits are from transformers' for every family, on the tiny random models of the parity tests.

    python benchmarks/parity.py   # needs torch and transformers; writes benchmarks/results/parity.json

Float32 on CPU, padded rows of 40 tokens: beyond the window of 7 and the original rotary length. `there` is the largest
difference between a logit of transformers' model and of ours with its weights; `back` between it and what transformers
makes of the folder that we saved; `cache` is how much a greedy token of ours, of 16 through the cache, lies below the
best logit of transformers; `spread` is the standard deviation of the logits.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import machine, write_results

from llmlab.infer.generate import generate
from llmlab.model import hf

sys.path.insert(0, str(Path(__file__).parents[1]))
parity = importlib.import_module("tests.test_parity_hf")


def measure(name: str, root: str) -> dict[str, float]:
    """The deviations of one model of theirs."""
    folder, tokens_BT, mask_BT, their_BTV = parity.saved(name, root)
    model, params = hf.load(folder)
    ours = Path(folder + "-ours")
    hf.save(model, params, ours)
    again = parity.transformers.AutoModelForCausalLM.from_pretrained(ours, attn_implementation="eager").eval()
    out_BT = generate(model, params, tokens_BT[:, :20], max_tokens=16)
    logits_BTV = parity.their_logits(again, out_BT, np.ones_like(out_BT))[:, 19:-1]
    chosen_BT = np.take_along_axis(logits_BTV, out_BT[:, 20:, None], axis=-1)[..., 0]
    return {
        "there": parity.apart(parity.our_logits(model, params, tokens_BT, mask_BT), their_BTV, mask_BT),
        "back": parity.apart(parity.their_logits(again, tokens_BT, mask_BT), their_BTV, mask_BT),
        "cache": float((logits_BTV.max(-1) - chosen_BT).max()),
        "spread": float(np.std(their_BTV[mask_BT])),
    }


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for name in parity.MODELS:
            found[name] = measure(name, root)
            row = "  ".join(f"{key} {value:.1e}" for key, value in found[name].items())
            print(f"{name:40}  {row}", flush=True)
    facts = {"machine": machine(), "transformers": parity.transformers.__version__, "models": found}
    print(f"written to {write_results('parity', facts)}")


if __name__ == "__main__":
    main()
