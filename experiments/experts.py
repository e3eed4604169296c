"""Mixtures of experts for a laptop, on the standard library of the running interpreter.

    llmlab train --config=experiments/experts.py:deepseek --workdir=runs/experts

Variants: mixtral (8 experts, 2 a token, kept even by a loss), deepseek (latent attention, 16 small experts and a shared
one, kept even by a bias that no gradient moves), and tiny or tiny_deepseek, for seconds. `router/max_load` in the
metrics is the busiest expert's load: 1 is even. Not yet trained to its end.
"""

from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import deepseek, mixtral
from llmlab.objective import next_token
from llmlab.train.config import experiment, one_of, run
from llmlab.train.optimizer import adamw


def get_config(arg="mixtral"):
    variant = one_of(arg or "mixtral", "mixtral", "deepseek", "tiny", "tiny_deepseek")
    tiny = variant.startswith("tiny")
    family = deepseek if variant.endswith("deepseek") else mixtral
    return experiment(
        model=family("tiny" if tiny else "small", max_positions=512),
        data=text(
            source="python",
            sequence_length=32 if tiny else 256,
            batch_size=4 if tiny else 16,
            tokenizer=TokenizerConfig(vocab_size=512 if tiny else 4096),
        ),
        objective=next_token(),
        optimizer=adamw(learning_rate=3e-3, warmup=40, final=0.02),
        run=run(
            steps=4 if tiny else 300,
            eval_every=2 if tiny else 100,
            sample_every=2 if tiny else 300,
            checkpoint_every=2 if tiny else 100,
            log_every=1 if tiny else 10,
            sample_tokens=8 if tiny else 64,
        ),
    )
