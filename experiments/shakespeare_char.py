"""nanoGPT's CPU setting, character by character, on any text file of about a megabyte that you point to.

    llmlab train --config=experiments/shakespeare_char.py --config.data.files=input.txt --workdir=runs/char

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, no dropout. The last tenth of the file is held out.
"""

from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import gpt2
from llmlab.objective import next_token
from llmlab.train.config import experiment, one_of, run
from llmlab.train.optimizer import adamw


def get_config(arg=""):
    tiny = one_of(arg, "", "tiny") == "tiny"
    return experiment(
        model=gpt2(width=32 if tiny else 128, layers=1 if tiny else 4, heads=4, max_positions=64, bias=False),
        data=text(
            source="text",
            sequence_length=16 if tiny else 64,
            batch_size=12,
            packing="chunk",
            tokenizer=TokenizerConfig(kind="character", chat_markers=False),
        ),
        objective=next_token(),
        optimizer=adamw(learning_rate=1e-3, warmup=100, final=0.1, beta2=0.99, weight_decay=0.1, clip=1.0),
        run=run(
            steps=4 if tiny else 2000,
            eval_every=2 if tiny else 250,
            sample_every=2 if tiny else 1000,
            checkpoint_every=2 if tiny else 500,
            sample_prompts=("\n",),
            sample_tokens=8 if tiny else 60,
        ),
    )
