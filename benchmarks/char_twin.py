"""Does nanoGPT's CPU setting learn as well here as in PyTorch? The same shape, initialisation, optimizer and steps.

    python benchmarks/char_twin.py --file=input.txt   # about 1.1 MB of text; four minutes a seed on 2 cores

For each seed, `llmlab train --config=experiments/shakespeare_char.py`, and a PyTorch twin of it; for both the mean loss
over the whole validation split, the last tenth, in rows of the context length that do not overlap. Printed, and written
to benchmarks/results/char_twin.json: both means and their difference, which should be no more than 0.02.

One thing differs, as it does from nanoGPT: the twin draws every row at a random offset of the text, ours cuts the text
into rows and visits each once an epoch, in a new random order. 2,000 steps are one and a half epochs of 1.1 MB.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, write_results
from torch import Tensor
from torch.nn import functional
from torch_twin import Twin, adamw, make_step

from llmlab.model.config import gpt2

ROOT = Path(__file__).parent.parent
GATE = 0.02
STEPS, WARMUP, PEAK, FLOOR = 2000, 100, 1e-3, 1e-4
CONTEXT, BATCH = 64, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="the text, about 1.1 MB of it")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run (default: %(default)s)")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "torch": []}
    for seed in range(arguments.seeds):
        for side, train in (("ours", ours), ("torch", theirs)):
            start = time.perf_counter()
            runs[side].append({"loss": train(arguments.file, seed, arguments.steps)})
            runs[side][-1]["seconds"] = time.perf_counter() - start
            last = runs[side][-1]
            print(f"seed {seed}  {side:5}  held-out loss {last['loss']:.4f}  in {last['seconds']:.0f} s", flush=True)
    means = {side: statistics.mean(run["loss"] for run in of_side) for side, of_side in runs.items()}
    difference = means["ours"] - means["torch"]
    verdict = "met" if difference <= GATE else "MISSED"
    print(f"mean held-out loss: ours {means['ours']:.4f}, torch {means['torch']:.4f}; difference {difference:+.4f}")
    print(f"gate, no more than {GATE} above: {verdict}")
    facts = {"machine": machine(), "characters": len(arguments.file.read_text()), "steps": arguments.steps}
    print(f"written to {write_results('char_twin', {**facts, 'means': means, 'difference': difference, 'runs': runs})}")


def ours(file: Path, seed: int, steps: int) -> float:
    """The last evaluation of our run, over the whole held-out split."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "llmlab", "train", "--config=experiments/shakespeare_char.py"]
        command += [f"--config.data.files={file.resolve()}", f"--config.run.seed={seed}", f"--workdir={workdir}"]
        command += [f"--config.run.steps={steps}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/loss" in row][-1]["eval/loss"]


def theirs(file: Path, seed: int, steps: int) -> float:
    """The same in PyTorch: rows at random offsets of the first nine tenths, evaluated on the last."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(seed)
    text = file.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([ids[character] for character in text])
    training, held_out = tokens.split([int(len(text) * 0.9), len(text) - int(len(text) * 0.9)])
    model = Twin(gpt2(width=128, layers=4, heads=4, max_positions=CONTEXT, vocab_size=len(ids), bias=False))
    optimizer = adamw(model, learning_rate=PEAK, betas=(0.9, 0.99), weight_decay=0.1)
    step = make_step(model, optimizer, clip=1.0)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, steps)
        rows_BT = torch.stack([training[i : i + CONTEXT + 1] for i in torch.randint(len(training) - CONTEXT, (BATCH,))])
        step(rows_BT[:, :-1], rows_BT[:, 1:])
    return held_out_loss(model, held_out)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    share = (step - WARMUP) / (steps - WARMUP)
    return FLOOR + 0.5 * (1 + math.cos(math.pi * share)) * (PEAK - FLOOR)


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, tokens: Tensor) -> float:
    """Mean nats a character, each predicted once from what precedes it in its row."""
    total = 0.0
    whole = (len(tokens) - 1) // CONTEXT * CONTEXT
    parts = list(zip(rows(tokens[:whole]), rows(tokens[1 : whole + 1]), strict=True))
    if whole < len(tokens) - 1:
        parts.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    for tokens_BT, targets_BT in parts:
        logits = model(tokens_BT).flatten(0, 1)
        total += functional.cross_entropy(logits, targets_BT.flatten(), reduction="sum").item()
    return total / (len(tokens) - 1)


def rows(tokens: Tensor) -> tuple[Tensor, ...]:
    """Batches of rows of the context length."""
    return tokens.view(-1, CONTEXT).split(BATCH)


if __name__ == "__main__":
    main()
