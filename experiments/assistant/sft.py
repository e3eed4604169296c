"""The second stage of an assistant: conversations about the standard library, with sums and look-ups through tools.

    llmlab train --config=experiments/assistant/sft.py:runs/assistant/pretrain --workdir=runs/assistant/sft

The model and the tokenizer are that workdir's. Only the assistant's turns are learned, their ends included. Your own
conversations, in any of the field's shapes: --config.data.source=jsonl --config.data.files='chats/*.jsonl'. In six
minutes on 2 cores: a loss of 1.56 to 1.59 on the answers of held-out conversations, of which 99.8 % or more end by
themselves, and of the sums 99.4 % or more are answered through a call. With an adapter: --config.adapter.kind=lora, and
over 4-bit weights --config.adapter.base_bits=4.
"""

from llmlab.data import text
from llmlab.objective import next_token
from llmlab.train.config import begun_from, experiment, run
from llmlab.train.optimizer import muon


def get_config(arg=""):
    tiny, (model, tokenizer) = arg == "tiny", begun_from(arg)
    return experiment(
        model=model,
        data=text(
            source="assistant",
            rows="chat",
            sequence_length=min(256, model.max_positions),
            batch_size=4 if tiny else 8,
            tokenizer=tokenizer,
        ),
        objective=next_token(),
        optimizer=muon(learning_rate=3e-3, warmup=20, final=0.02),
        run=run(
            init_from="" if tiny else arg,
            steps=4 if tiny else 800,
            eval_every=2 if tiny else 400,
            eval_batches=0,
            sample_every=2 if tiny else 400,
            checkpoint_every=2 if tiny else 400,
            log_every=1 if tiny else 20,
            sample_tokens=8 if tiny else min(64, model.max_positions - 1),
        ),
    )
