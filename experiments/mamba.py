"""Mamba-2 in its released sizes, with the improved recipe of Mamba's paper (arXiv 2312.00752, appendix E.2).

    llmlab train --config=experiments/mamba.py:130m --workdir=runs/mamba \
        --config.data.source=text --config.data.files='corpus/*.txt.zst'

Sizes: 130m, 370m, 780m, 1300m, 2700m. Needs accelerators: `--print_config` says how much memory. Not yet trained to its
end. `tiny_hybrid` is a pattern of Mamba layers with an attention layer after every two, each with an MLP.
"""

from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import llama, mamba2
from llmlab.model.ssm import SsmConfig
from llmlab.objective import next_token
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw

# Rows of 2,048 tokens a step, microbatches, peak learning rate (five times GPT-3's), steps.
SETTINGS = {
    "130m": (256, 4, 3e-3, 4_800),
    "370m": (256, 8, 1.5e-3, 13_500),
    "780m": (256, 8, 1.25e-3, 29_000),
    "1300m": (256, 16, 1e-3, 50_000),
    "2700m": (512, 32, 8e-4, 52_000),
}


def get_config(arg="130m"):
    if arg in ("tiny", "tiny_hybrid"):
        shape = dict(width=32, max_positions=64, ssm=SsmConfig(state=16, head_dim=16, chunk=16, mlp=arg != "tiny"))
        hybrid = dict(layers=3, heads=4, pattern=("mamba", "mamba", "global"))
        model = mamba2(layers=2, **shape) if arg == "tiny" else llama(**hybrid, **shape)
        data = text(sequence_length=32, batch_size=4, tokenizer=TokenizerConfig(vocab_size=512))
        steps = run(steps=4, eval_every=2, sample_every=2, sample_tokens=8)
        return experiment(
            model=model, data=data, objective=next_token(), optimizer=adamw(learning_rate=4e-3, warmup=2), run=steps
        )
    # The name is checked before the table is read, so that a wrong one is answered with the nearest.
    model = mamba2(arg or "130m", dtype="bfloat16", scan=True, remat="dots")
    batch_size, accumulate, learning_rate, steps = SETTINGS[arg or "130m"]
    return experiment(
        model=model,
        data=text(sequence_length=2048, batch_size=batch_size, tokenizer=TokenizerConfig(vocab_size=32768)),
        objective=next_token(),
        optimizer=adamw(learning_rate=learning_rate, warmup=500, final=0.01, accumulate=accumulate),
        run=run(steps=steps, eval_every=500, sample_every=2000, checkpoint_every=1000),
    )
