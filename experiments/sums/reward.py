"""A reward model that finds the slip in a sum: it chooses the best of several answers.

llmlab train --config=experiments/sums/reward.py:runs/sums/sft --workdir=runs/sums/reward
"""

import dataclasses

from llmlab.data import text
from llmlab.objective import RewardConfig
from llmlab.train.config import begun_from, experiment, run
from llmlab.train.optimizer import muon


def get_config(arg=""):
    tiny, (model, tokenizer) = arg == "tiny", begun_from(arg)
    return experiment(
        model=dataclasses.replace(model, head="score"),
        data=text(
            source="sums",
            rows="preference",
            sequence_length=min(256, model.max_positions),
            batch_size=2 if tiny else 16,
            tokenizer=tokenizer,
        ),
        objective=RewardConfig(),
        optimizer=muon(learning_rate=1e-3, warmup=20, final=0.02),
        run=run(
            init_from="" if tiny else arg,
            steps=4 if tiny else 300,
            eval_every=2 if tiny else 100,
            eval_batches=0,
            sample_every=0,
            checkpoint_every=2 if tiny else 100,
            log_every=1 if tiny else 20,
        ),
    )
