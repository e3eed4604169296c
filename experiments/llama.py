"""Llama-style models from 10M to 8B parameters, trained for about twenty tokens a parameter.

    llmlab train --config=experiments/llama.py:30m --workdir=runs/llama \
        --config.data.source=jsonl --config.data.files='corpus/*.jsonl.zst'

Sizes: 10m, 30m, 70m, 150m, 400m, 1b, 3b, 8b. Needs accelerators beyond the smallest: `--print_config` says how much
memory. Twenty tokens a parameter is Chinchilla's rule (arXiv 2203.15556). Not yet trained to its end.
"""

from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import llama
from llmlab.model.rope import RopeConfig
from llmlab.objective import next_token
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw

# Rows of 2,048 tokens a step, microbatches, peak learning rate, steps.
SETTINGS = {
    "10m": (64, 1, 3e-3, 2_000),
    "30m": (128, 1, 2e-3, 3_000),
    "70m": (128, 1, 1.5e-3, 6_000),
    "150m": (256, 2, 1e-3, 6_000),
    "400m": (256, 4, 6e-4, 16_000),
    "1b": (512, 8, 4e-4, 24_000),
    "3b": (1024, 16, 3e-4, 31_000),
    "8b": (2048, 64, 3e-4, 38_000),
}


def get_config(arg="10m"):
    if arg == "tiny":
        model = llama(width=32, layers=2, heads=4, kv_heads=2, max_positions=64)
        data = text(sequence_length=32, batch_size=4, tokenizer=TokenizerConfig(vocab_size=512))
        return experiment(
            model=model, data=data, objective=next_token(), optimizer=adamw(), run=run(steps=4, sample_tokens=8)
        )
    # The name is checked before the table is read, so that a wrong one is answered with the nearest.
    rope = RopeConfig(base=500_000.0)
    model = llama(arg or "10m", max_positions=4096, rope=rope, dtype="bfloat16", scan=True, remat="dots")
    batch_size, accumulate, learning_rate, steps = SETTINGS[arg or "10m"]
    return experiment(
        model=model,
        data=text(sequence_length=2048, batch_size=batch_size, tokenizer=TokenizerConfig(vocab_size=32768)),
        objective=next_token(z_loss=1e-4),
        optimizer=adamw(learning_rate=learning_rate, warmup=500, accumulate=accumulate, skip_sigma=6.0),
        run=run(steps=steps, eval_every=500, sample_every=2000, checkpoint_every=1000),
    )
