"""The stages after pretraining in seconds: `--config=stages_for_tests.py:STAGE,FOLDER` on the rows of `write_rows`."""

import dataclasses
import json
import random
from pathlib import Path

from llmlab.data import text
from llmlab.data.tokenizer import CHAT_MARKERS, TokenizerConfig
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.model.config import llama
from llmlab.objective import KtoConfig, NextTokenConfig, PreferenceConfig, RewardConfig, StepsConfig
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw

OBJECTIVES = {
    "pretrain": ("text", NextTokenConfig()),
    "sft": ("chat", NextTokenConfig()),
    "reward": ("preference", RewardConfig()),
    "ranking": ("ranking", RewardConfig()),
    "dpo": ("preference", PreferenceConfig()),
    "kto": ("binary", KtoConfig()),
    "steps": ("steps", StepsConfig()),
}


def get_config(arg=""):
    stage, _, folder = arg.partition(",")
    rows, objective = OBJECTIVES[stage]
    model = llama(width=16, layers=2, heads=2, max_positions=64)
    return experiment(
        model=dataclasses.replace(model, head=objective.head),
        data=text(
            source="jsonl",
            files=f"{folder}/{rows}.jsonl",
            rows=rows,
            sequence_length=64,
            batch_size=8,
            workers=1,
            held_out=0.25,
            tokenizer=TokenizerConfig(file=f"{folder}/tokenizer"),
        ),
        objective=objective,
        optimizer=adamw(learning_rate=1e-3, schedule="constant", warmup=2, accumulate=2, ema=0.9),
        run=run(
            steps=8, log_every=1, eval_every=4, eval_batches=0, checkpoint_every=4, sample_every=0, sample_tokens=8
        ),
    )


def write_rows(folder: Path) -> Path:
    """Sums of two digits, right and wrong, as rows of every kind, and the tokenizer that reads them."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    CharacterTokenizer("".join(map(chr, range(32, 127))), CHAT_MARKERS).save(folder / "tokenizer")
    rows = {rows: [] for rows, _ in OBJECTIVES.values()}
    for _ in range(160):
        a, b = rng.randint(0, 9), rng.randint(0, 9)
        prompt, right, wrong = f"{a}+{b}", str(a + b), str(a + b + rng.choice((-1, 1, 2)))
        rows["text"].append({"text": f"{prompt}={right}. "})
        rows["chat"].append({"prompt": prompt, "completion": right})
        rows["preference"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
        rows["ranking"].append({"prompt": prompt, "responses": [right, wrong, "?"][: rng.randint(2, 3)]})
        for _ in range(2):
            said = right if rng.random() < 0.5 else wrong
            rows["binary"].append({"prompt": prompt, "completion": said, "label": said == right})
        rows["steps"].append({"prompt": prompt, "completions": [f"{prompt}=", wrong], "labels": [True, False]})
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    return folder
