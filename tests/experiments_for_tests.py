"""A run of seconds with everything that resuming must keep: accumulation, EMA, a shuffled mixture, packing.

The argument is a folder of text files, which the test writes with `write_texts`.
"""

import random
from pathlib import Path

from llmlab.data import MixturePart, text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import llama
from llmlab.objective import next_token
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw

WORDS = [
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
    "have",
    "or",
    "by",
    "one",
    "had",
    "not",
]


def get_config(arg=""):
    folder = Path(arg)
    return experiment(
        model=llama(width=16, layers=2, heads=2, max_positions=64, scan=True),
        data=text(
            source="mixture",
            mixture=(
                MixturePart(weight=3, source="text", files=(str(folder / "prose_*.txt"),)),
                MixturePart(weight=1, source="text", files=(str(folder / "code_*.txt"),)),
            ),
            sequence_length=32,
            batch_size=8,
            workers=1,
            tokenizer=TokenizerConfig(kind="character", chat_markers=False),
        ),
        objective=next_token(),
        optimizer=adamw(learning_rate=1e-3, schedule="constant", warmup=5, accumulate=2, ema=0.9),
        run=run(
            steps=40, log_every=1, eval_every=20, eval_batches=2, checkpoint_every=5, sample_every=0, sample_tokens=8
        ),
    )


def write_texts(folder: Path) -> Path:
    """Two kinds of text, many short documents of each: rows hold several."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        prose = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 40)))
        code = "".join(f"{rng.choice('abc')} = {rng.randint(0, 99)}\n" for _ in range(rng.randint(1, 12)))
        (folder / f"prose_{number}.txt").write_text(prose)
        (folder / f"code_{number}.txt").write_text(code)
    return folder
