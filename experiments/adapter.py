"""An adapter over the weights of another workdir: those of a run, or open weights that `llmlab convert` brought in.

    llmlab train --config=experiments/adapter.py:runs/qwen --workdir=runs/adapter \
        --config.data.source=text --config.data.files='notes/*.txt'

The model and the tokenizer are that workdir's, and its weights stay as they are. `--config.adapter.kind=dora` learns
the norms of columns too, `--config.adapter.base_bits=4` keeps the frozen matrices in 4 bits. Not yet measured.
"""

import dataclasses
from pathlib import Path

from llmlab.core.errors import UserError
from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.adapters import AdapterConfig
from llmlab.model.config import llama
from llmlab.objective import next_token
from llmlab.train.config import experiment, run
from llmlab.train.optimizer import adamw
from llmlab.workdir.open import model_config


def get_config(arg=""):
    if not arg:
        raise UserError("name the workdir whose weights to adapt: --config=experiments/adapter.py:runs/quickstart")
    if arg == "tiny":
        model, tokenizer = llama(width=32, layers=2, heads=4, max_positions=64), TokenizerConfig(vocab_size=512)
    else:
        model, tokenizer = model_config(arg), TokenizerConfig(file=str(Path(arg) / "tokenizer.model"))
    return experiment(
        model=dataclasses.replace(model, scan=True, remat="dots"),
        data=text(sequence_length=min(1024, model.max_positions), batch_size=8, tokenizer=tokenizer),
        objective=next_token(),
        optimizer=adamw(learning_rate=2e-4, warmup=20, weight_decay=0.0),
        adapter=AdapterConfig(kind="lora", rank=16, alpha=32.0),
        run=run(init_from=arg, steps=400, eval_every=100, sample_tokens=min(64, model.max_positions - 1)),
    )
