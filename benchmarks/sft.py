"""Supervised fine-tuning of one Llama on the same conversations, against TRL's `SFTTrainer`.

    python benchmarks/sft.py                          # some minutes on 2 cores; --quick for fewer turns
    python benchmarks/sft.py --small                  # a tiny model, to see that it works; not written
    python benchmarks/sft.py --file=messages.jsonl    # your own conversations, in any shape that llmlab reads

The model is transformers' `LlamaForCausalLM` with random weights, 6 layers of width 384, a vocabulary of 4,096, which
both sides load from one folder; float32. The conversations are made from a seed, as long as the built-in assistant's
(55 tokens in the median, 300 at most), and tokenised beforehand: both sides read the same ids and learn the same ones.
Ours are packed rows (`TextSource`, `make_step`, with freed memory kept and huge pages, as `llmlab train` has them).
TRL's are what its trainer makes of `input_ids` and `assistant_masks`, in four ways:

    trl              its defaults: conversations padded to the longest of a batch, activations computed again
    trl kept         the same with gradient_checkpointing=False, as ours is
    trl packed       packing=True: best-fit rows, all of a batch in one long one that keeps them apart by positions
    trl packed kept  both

All else is TRL's default (AdamW at 2e-5 and falling linearly, no decay, clip 1, log every 10 steps) and ours is set to
it, but bf16=False, use_cpu=True, no checkpoints, no progress bar. Batches hold about as many real tokens on each side.

Each side has a process of its own, and they take turns (A B A B …) of some steps. A step is all that a run does from
one batch to the next: fetching it, the update, TRL's own bookkeeping. Printed, and written to
benchmarks/results/sft-PLATFORM.json: real tokens a second (no padding), by medians and bests of turns, the ratios of
neighbouring turns, peak memory, the share of padding, the share of tokens that is learned and the loss, in which both
have to agree. With other work on the machine only the bests mean something, and not much.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Side, conversation_lengths, in_turns, machine, questions, serve, times_faster, write_results

from llmlab.core.host_memory import give_back, huge_page_environment, keep_freed_memory

GATE, REACH = 1.0, 1.15
STEPS, LEARNING_RATE = 10_000, 2e-5
VOCAB = 4096
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
THEIRS = {
    "trl": {},
    "trl kept": {"gradient_checkpointing": False},
    "trl packed": {"packing": True},
    "trl packed kept": {"packing": True, "gradient_checkpointing": False},
}


class Setting(NamedTuple):
    """The model, the batches, and where everything lies; `file` is empty where conversations are made up."""

    model: dict[str, Any]
    sequence_length: int
    batch_size: int
    conversations: int
    folder: str
    file: str


class Turn(NamedTuple):
    """Some steps: how long they took, tokens that are no padding, places for them, tokens learned, mean loss."""

    seconds: float
    tokens: int
    places: int
    learned: int
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="", help="conversations as JSON lines, instead of made-up ones")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens in a row (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="rows in a step of ours (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 turns of each side instead of --rounds")
    parser.add_argument("--small", action="store_true", help="2 layers of width 64, 2 turns of 2 steps; not written")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads (default: all cores)")
    arguments = parser.parse_args()
    layers, width = (2, 64) if arguments.small else (6, 384)
    if arguments.small:
        arguments.sequence_length, arguments.batch_size, arguments.rounds, arguments.steps = 256, 2, 2, 2
    rounds = min(3, arguments.rounds) if arguments.quick else arguments.rounds
    model = dict(width=width, layers=layers, heads=width // 64, vocab_size=VOCAB)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            model | {"max_positions": arguments.sequence_length},
            arguments.sequence_length,
            arguments.batch_size,
            500 if arguments.small else 5000,
            folder,
            os.path.abspath(arguments.file) if arguments.file else "",
        )
        results = compare(setting, rounds, arguments.steps, arguments.threads)
    if not arguments.small:
        print(f"\nwritten to {write_results('sft-' + results['platform'], {'machine': machine(), **results})}")


def compare(setting: Setting, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """All that is measured."""
    # In a process of its own: one that is started later counts its parent's memory as its own.
    side = Side(prepare, setting, environment=QUIET)
    facts = side.answer()
    store = facts.pop("store")
    side.close()
    per_step = setting.batch_size * setting.sequence_length
    together = max(1, round(per_step * facts["conversations"] / facts["tokens"]))
    print(f"{facts['parameters'] / 1e6:.1f}M parameters; {facts['conversations']:,} conversations of ", end="")
    print(f"{facts['median']:.0f} tokens in the median, {facts['longest']} at most, {facts['learned']:.0%} learned")
    print(
        f"ours: {setting.batch_size} rows of {setting.sequence_length}; trl: {together} conversations, or as many rows"
    )
    sides = {"ours": Side(ours, setting, environment=huge_page_environment())}
    first = {"ours": sides["ours"].answer()}
    for name, options in THEIRS.items():
        batch_size = setting.batch_size if "packing" in options else together
        sides[name] = Side(theirs, setting, store, batch_size, threads, options, environment=QUIET)
        first[name] = sides[name].answer()
    print("first steps: " + ", ".join(f"{name} {each['seconds']:.1f} s" for name, each in first.items()), flush=True)
    in_turns(sides, steps, 1)
    turns = in_turns(sides, steps, rounds)
    memory = {name: competitor.ask("memory") for name, competitor in sides.items()}
    for competitor in sides.values():
        competitor.close()
    shape = {name: value for name, value in setting._asdict().items() if name not in ("folder", "file")}
    results: dict[str, Any] = {"platform": first["ours"]["platform"], "setting": shape, "data": facts}
    results |= {"rounds": rounds, "steps": steps, "gate": GATE, "reach": REACH, "versions": first["trl"]["versions"]}
    results |= {"conversations_a_step": together, "sides": {}}
    for name, each in turns.items():
        found = summary(each, turns["ours"]) | {"peak_memory": memory[name]}
        print(
            f"  {name:15} {found['tokens_per_second']:6.0f} tokens/s (best {found['best_tokens_per_second']:.0f}), "
            f"{memory[name] / 2**20:5.0f} MiB; ours is {found['ours_times_faster']:.2f} times as fast, by bests "
            f"{found['ours_times_faster_by_bests']:.2f}; {found['tokens_a_turn'] / steps:.0f} tokens a step, "
            f"{found['filled']:.1%} of the places; {found['learned']:.1%} learned, loss {found['loss']:.3f}",
            flush=True,
        )
        found |= {"first_step_seconds": first[name]["seconds"], "turns": [turn._asdict() for turn in each]}
        results["sides"][name] = found
    return results


def summary(turns: list[Turn], ours: list[Turn]) -> dict[str, float]:
    """What the turns of a side come to, beside ours; the loss is of the last one."""
    per_token, per_token_ours = ([turn.seconds / turn.tokens for turn in each] for each in (turns, ours))
    tokens, places, learned = (sum(getattr(turn, name) for turn in turns) for name in ("tokens", "places", "learned"))
    return {
        "tokens_per_second": 1 / statistics.median(per_token),
        "best_tokens_per_second": 1 / min(per_token),
        **times_faster(per_token_ours, per_token),
        "tokens_a_turn": tokens / len(turns),
        "filled": tokens / places,
        "learned": learned / tokens,
        "loss": turns[-1].loss,
    }


def prepare(end: Connection, setting: Setting) -> None:
    """The conversations, tokenised, and the model, both in the folder of `setting`."""
    import torch
    from torch_twin import transformers_llama

    from llmlab.data.prepare import prepare_parts, tokenizer_for
    from llmlab.model.config import llama

    if not setting.file:
        write_conversations(conversations_file(setting), setting.conversations)
    data = data_config(setting)
    ((store, _),) = prepare_parts(data, tokenizer_for(data, progress=False), "train", progress=False)
    torch.manual_seed(0)
    model = transformers_llama(llama(**setting.model))
    model.save_pretrained(os.path.join(setting.folder, "model"))
    tokens = store.lengths - 1  # the last one closes a document, and is read by nobody
    facts = {"parameters": model.num_parameters(), "store": str(store.path), "conversations": len(store)}
    facts |= {"tokens": int(tokens.sum()), "median": float(np.median(tokens)), "longest": int(tokens.max())}
    end.send(facts | {"learned": float(np.sum(store.judged.marks == 1) / tokens.sum())})


def ours(end: Connection, setting: Setting) -> None:
    keep_freed_memory()
    import jax

    from llmlab.core.mesh import single_device
    from llmlab.data.pipeline import TextSource
    from llmlab.data.prepare import prepare_parts, tokenizer_for
    from llmlab.model import hf
    from llmlab.objective import next_token
    from llmlab.train.launch import token_bytes
    from llmlab.train.optimizer import adamw, make_optimizer, make_schedule
    from llmlab.train.state import start, state_shardings
    from llmlab.train.step import make_step

    data, partition = data_config(setting), single_device()
    tokenizer = tokenizer_for(data, progress=False)
    stores = prepare_parts(data, tokenizer, "train", progress=False)
    source = TextSource(data, stores, seed=0, sharding=partition.sharding("batch", "time"))
    model, params = hf.load(os.path.join(setting.folder, "model"), partition=partition)
    settings = adamw(
        learning_rate=LEARNING_RATE, schedule="linear", warmup=0, final=0.0, beta2=0.999, weight_decay=0.0, clip=1.0
    )
    optimizer = make_optimizer(settings, STEPS, model.axes)
    loss = next_token().make(model, token_bytes(tokenizer, model.config.vocab_size))
    schedule = make_schedule(settings, STEPS)
    step = make_step(loss, optimizer, schedule, settings, seed=0, partition=partition, post_step=model.post_step)
    begin = functools.partial(start, optimizer=optimizer, window=settings.skip_window, ema=False)
    shardings = state_shardings(model, jax.eval_shape(begin, params))
    state = jax.jit(begin, out_shardings=shardings)(params)
    del params
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, partition.sharding()))
    taken, batch = 0, source.next(0)

    def steps(count: int) -> Turn:
        """As in the loop: the next batch is fetched while the step computes, and metrics are read a step later."""
        nonlocal state, taken, batch
        metrics, segments, pending = [], [], None
        start = time.perf_counter()
        for _ in range(count):
            segments.append(batch.segment_ids_BT)
            state, found = step(state, batch)
            taken += 1
            batch = source.next(taken)
            if pending is not None:
                metrics.append(jax.device_get(pending))
            pending = found
        metrics.append(jax.device_get(pending))
        jax.block_until_ready(state)
        give_back()  # as the loop does when it logs
        seconds = time.perf_counter() - start
        places = np.concatenate([np.asarray(each) for each in segments])
        learned = sum(int(each["tokens"].sum) for each in metrics)
        loss = sum(float(each["loss"].value()) for each in metrics) / count
        return Turn(seconds, int((places > 0).sum()), places.size, learned, loss)

    turn = steps(1)
    end.send({"seconds": turn.seconds, "platform": jax.default_backend()})
    serve(end, steps)
    source.close()


def theirs(
    end: Connection, setting: Setting, store: str, batch_size: int, threads: int, options: dict[str, Any]
) -> None:
    import tokenizers
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

    torch.set_num_threads(threads)
    asked = questions(end)

    class Trainer(trl.SFTTrainer):
        """Counts what it is given."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            real = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(inputs["input_ids"])
            counts = (int(real.sum()), real.numel(), int((inputs["labels"] != -100).sum()))
            loss = super().training_step(model, inputs, *rest, **more)
            turns.counts.append((*counts, float(loss)))
            return loss

    class Turns(TrainerCallback):
        """Trains on when it is asked to, for as many steps."""

        def __init__(self) -> None:
            self.counts: list[tuple[int, int, int, float]] = []
            self.left: int | None = None  # of the first turn, which is one step

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if self.left is None:
                versions = {each.__name__: each.__version__ for each in (trl, transformers, torch)}
                end.send({"seconds": time.perf_counter() - self.begin, "versions": versions})
            elif self.left > 1:
                self.left -= 1
                return
            else:
                tokens, places, learned, losses = zip(*self.counts, strict=True)
                seconds = time.perf_counter() - self.begin
                end.send(Turn(seconds, sum(tokens), sum(places), sum(learned), statistics.mean(losses)))
            self.left, self.counts = next(asked, None), []
            control.should_training_stop = self.left is None
            self.begin = time.perf_counter()

    turns = Turns()
    vocabulary = {"<pad>": 0, "<eos>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    trainer = Trainer(
        LlamaForCausalLM.from_pretrained(os.path.join(setting.folder, "model"), dtype=torch.float32),
        trl.SFTConfig(
            output_dir=os.path.join(setting.folder, "trl"),
            per_device_train_batch_size=batch_size,
            max_length=setting.sequence_length,
            max_steps=STEPS,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(list(rows_of(store))),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def rows_of(store: str) -> Iterator[dict[str, list[int]]]:
    """The conversations of a store, as TRL reads them."""
    from llmlab.data.store import TokenStore

    opened = TokenStore.open(store)
    for begin, end in zip(opened.offsets[:-1].tolist(), opened.offsets[1:].tolist(), strict=True):
        kept = slice(begin, end - 1)
        yield {"input_ids": opened.tokens[kept].tolist(), "assistant_masks": opened.judged.marks[kept].tolist()}


def data_config(setting: Setting) -> Any:
    from llmlab.data import text
    from llmlab.data.tokenizer import TokenizerConfig

    return text(
        source="jsonl",
        files=(setting.file or conversations_file(setting),),
        rows="chat",
        sequence_length=setting.sequence_length,
        batch_size=setting.batch_size,
        held_out=0.01,
        workers=1,
        tokenizer=TokenizerConfig(vocab_size=VOCAB),
        cache_dir=os.path.join(setting.folder, "data"),
    )


def conversations_file(setting: Setting) -> str:
    return os.path.join(setting.folder, "messages.jsonl")


def write_conversations(path: str, count: int) -> None:
    """Made-up conversations of one to three questions and answers, in words that a few thousand tokens can spell."""
    rng = np.random.default_rng(0)
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = np.array(["".join(rng.choice(syllables, 1 + i % 3)) for i in range(4000)])
    frequency = 1 / (10 + np.arange(len(words)))
    frequency /= frequency.sum()
    lines = []
    for tokens in conversation_lengths(count).tolist():
        exchanges = 1 + min(2, tokens // 80)
        each = max(2, round((tokens - 4 * exchanges) / 1.08 / (2 * exchanges)))
        said = rng.choice(words, (2 * exchanges, each), p=frequency)
        turns = [{"role": ("user", "assistant")[i % 2], "content": " ".join(one)} for i, one in enumerate(said)]
        lines.append(json.dumps({"messages": turns}))
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
