"""GPT-2 in its four sizes, with the settings of its reproductions: 0.5M tokens a step, cosine to a tenth.

    llmlab train --config=experiments/gpt2.py:124m --workdir=runs/gpt2 \
        --config.data.source=text --config.data.files='corpus/*.txt.zst'

Sizes: 124m, 350m, 774m, 1558m. Needs accelerators: `--print_config` says how much memory. Not yet trained to its end.
"""

from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import gpt2
from llmlab.objective import next_token
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw

# Microbatches a step, and the peak learning rate (GPT-3, arXiv 2005.14165, table 2.1).
SETTINGS = {"124m": (8, 6e-4), "350m": (8, 3e-4), "774m": (16, 2.5e-4), "1558m": (32, 2e-4)}


def get_config(arg="124m"):
    if arg == "tiny":
        model = gpt2(width=32, layers=2, heads=4, max_positions=64)
        data = text(sequence_length=32, batch_size=4, tokenizer=TokenizerConfig(vocab_size=512))
        return experiment(
            model=model, data=data, objective=next_token(), optimizer=adamw(), run=run(steps=4, sample_tokens=8)
        )
    # The name is checked before the table is read, so that a wrong one is answered with the nearest.
    model = gpt2(arg or "124m", dtype="bfloat16", scan=True, remat="dots")
    accumulate, learning_rate = SETTINGS[arg or "124m"]
    return experiment(
        model=model,
        data=text(sequence_length=1024, batch_size=512, tokenizer=TokenizerConfig(vocab_size=50304)),
        objective=next_token(),
        optimizer=adamw(learning_rate=learning_rate, warmup=2000, accumulate=accumulate),
        run=run(steps=20_000, eval_every=500, sample_every=2000, checkpoint_every=1000),
    )
