"""A reward model for sums, which alone is fooled by some of many answers, and which votes make up for.

    llmlab train --config=experiments/sums/reward.py:runs/sums/sft --workdir=runs/sums/reward

It learns from right answers beside ones with a slip that is made up. 500 steps of that alone raised 70 % of right
answers to 78 % with two to choose from, and lowered them to 39 % with sixteen, among which it meets slips that it has
never seen, and likes some. So pairs of the model's own attempts should come beside those (Cobbe et al., arXiv
2110.14168):

    llmlab eval --workdir=runs/sums/sft --noheld_out --noconversations --split=train --limit=4000 \\
        --attempts=8 --turn_temperature=1.5 --pairs=p.jsonl
    llmlab train --config=experiments/sums/reward.py:runs/sums/sft,p.jsonl --workdir=runs/sums/reward
    llmlab eval --workdir=runs/sums/sft --attempts=16 --turn_temperature=1.5 --reward=runs/sums/reward

With these the best by the reward of 2, 4, 8 and 16 answers was right in 85, 84, 75 and 64 % of 200 held-out sums: what
is copied wrongly from the question it does not see (43 % of such pairs), and the more answers there are, the likelier
one of these is the best. They differ among each other, though: the answer of most reward was right in 85, 90, 95 and
96 %. The model of sft.py itself finds what it copies wrongly unlikely, and chooses better still: see there.
"""

import dataclasses

from llmlab.data import MixturePart, text
from llmlab.objective import RewardConfig
from llmlab.train.config import begun_from, experiment, run
from llmlab.train.optimizer import muon


def get_config(arg=""):
    workdir, _, pairs = arg.partition(",")
    tiny, (model, tokenizer) = workdir == "tiny", begun_from(workdir)
    parts = (MixturePart(source="sums"), MixturePart(source="jsonl", files=(pairs,))) if pairs else ()
    return experiment(
        model=dataclasses.replace(model, head="score"),
        data=text(
            source="mixture" if pairs else "sums",
            mixture=parts,
            rows="preference",
            sequence_length=min(256, model.max_positions),
            batch_size=2 if tiny else 16,
            tokenizer=tokenizer,
        ),
        objective=RewardConfig(),
        optimizer=muon(learning_rate=1e-3, warmup=20, final=0.02),
        run=run(
            init_from="" if tiny else workdir,
            steps=4 if tiny else 600,
            eval_every=2 if tiny else 200,
            eval_batches=0,
            sample_every=0,
            checkpoint_every=2 if tiny else 200,
            log_every=1 if tiny else 20,
        ),
    )
