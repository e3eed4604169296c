"""The first stage of an assistant: a small Llama on the standard library, without the functions that are held out.

    llmlab train --config=experiments/assistant/pretrain.py --workdir=runs/assistant/pretrain

In three and a half minutes on 2 cores it reached 1.71 to 1.72 bits per byte on Python 3.11's library. `make assistant`
runs all stages. Your own text: --config.data.source=text --config.data.files='books/*.txt'.
"""

from llmlab.data import text
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.model.config import llama
from llmlab.objective import next_token
from llmlab.train.config import experiment, one_of, run
from llmlab.train.optimizer import muon


def get_config(arg=""):
    tiny = one_of(arg, "", "tiny") == "tiny"
    return experiment(
        model=llama(width=32 if tiny else 160, layers=2 if tiny else 4, heads=4, max_positions=512),
        data=text(
            source="assistant",
            sequence_length=32 if tiny else 256,
            batch_size=4 if tiny else 8,
            tokenizer=TokenizerConfig(vocab_size=512 if tiny else 4096),
        ),
        objective=next_token(),
        optimizer=muon(learning_rate=4e-3, warmup=40, final=0.02),
        run=run(
            steps=4 if tiny else 500,
            eval_every=2 if tiny else 250,
            sample_every=2 if tiny else 500,
            checkpoint_every=2 if tiny else 250,
            log_every=1 if tiny else 20,
            sample_tokens=8 if tiny else 64,
        ),
    )
