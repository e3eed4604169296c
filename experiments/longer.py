"""A trained model reaches further: rotary positions scaled by YaRN, then training on, at the new length.

    llmlab train --config=experiments/longer.py:runs/q --workdir=runs/longer \
        --config.data.source=text --config.data.files='books/*.txt'
    llmlab eval  --workdir=runs/longer --needle --needle_lengths=512,1024,2048

The model, the tokenizer and the first weights are that workdir's: a run's, or open weights that `llmlab convert` took
in. It gets four times as many positions, scaled as they were before or else by YaRN (other ways are a key away, such as
`--config.model.rope.scaling=ntk`). Learning rate, batch and 400 steps are YaRN's (arXiv 2309.00071, section 4.1). Not
yet trained to its end.
"""

import dataclasses
from pathlib import Path

from llmlab.core.errors import UserError
from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import llama
from llmlab.objective import next_token
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw
from llmlab.workdir.open import model_config

FACTOR = 4.0


def get_config(arg=""):
    if not arg:
        raise UserError("name the workdir whose model shall reach further: --config=experiments/longer.py:runs/q")
    if arg == "tiny":
        model, tokenizer = llama(width=32, layers=2, heads=4, max_positions=64), TokenizerConfig(vocab_size=512)
    else:
        model, tokenizer = model_config(arg), TokenizerConfig(file=str(Path(arg) / "tokenizer.model"))
    if model.positions != "rotary" or not model.attends:
        raise UserError(f"the model of {arg} has no rotary positions to scale: it reaches as far as it did")
    length, rope = int(model.max_positions * FACTOR), dataclasses.replace(model.rope, factor=model.rope.factor * FACTOR)
    if rope.scaling == "none":
        rope = dataclasses.replace(rope, scaling="yarn", factor=FACTOR, original_positions=model.max_positions)
    return experiment(
        model=dataclasses.replace(model, rope=rope, max_positions=length, scan=True, remat="dots"),
        data=text(sequence_length=length, batch_size=4 if arg == "tiny" else 64, tokenizer=tokenizer),
        objective=next_token(),
        optimizer=adamw(
            accumulate=1 if arg == "tiny" else 16,
            learning_rate=2e-5,
            warmup=20,
            schedule="constant",
            weight_decay=0.0,
        ),
        run=run(init_from=arg, steps=400, eval_every=100, checkpoint_every=100, sample_tokens=64),
    )
