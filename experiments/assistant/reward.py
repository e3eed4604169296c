"""The third stage of an assistant: a reward model, which tells right answers from spoilt ones.

    llmlab train --config=experiments/assistant/reward.py:runs/assistant/sft --workdir=runs/assistant/reward

In two minutes on 2 cores it told 92 to 94 % of held-out pairs apart. It begins from that workdir's weights, with a new
head that gives one number a token; the score of an answer is that of its last token. Your own pairs, as `chosen` and
`rejected` in any of the field's shapes, HH-RLHF's transcripts included: --config.data.source=jsonl
--config.data.files='pairs/*.jsonl'.
"""

import dataclasses

from llmlab.data import text
from llmlab.objective import RewardConfig
from llmlab.train.config import begun_from, experiment, run
from llmlab.train.optimizer import adamw


def get_config(arg=""):
    tiny, (model, tokenizer) = arg == "tiny", begun_from(arg)
    return experiment(
        model=dataclasses.replace(model, head="score"),
        data=text(
            source="assistant",
            rows="preference",
            sequence_length=min(512, model.max_positions),
            batch_size=2 if tiny else 8,
            tokenizer=tokenizer,
        ),
        objective=RewardConfig(),
        optimizer=adamw(learning_rate=1e-3, warmup=20, final=0.02),
        run=run(
            init_from="" if tiny else arg,
            steps=4 if tiny else 150,
            eval_every=2 if tiny else 50,
            eval_batches=0,
            sample_every=0,
            checkpoint_every=2 if tiny else 50,
            log_every=1 if tiny else 10,
        ),
    )
