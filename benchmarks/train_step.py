"""One training step (forward, backward, clip, AdamW) against PyTorch doing the same work.

    python benchmarks/train_step.py              # some minutes on 2 cores; --quick for fewer turns
    python benchmarks/train_step.py --compiled   # torch.compile's side too, which takes minutes to compile
    python benchmarks/train_step.py char deep    # some of the settings only

Each side has a process of its own, and they take turns (A B A B …). Printed, and written to
benchmarks/results/train_step-PLATFORM.json: medians and bests, their ratios, tokens a second, peak memory, the step's
compilation without and with the persistent cache, the share of a step that waits for data, and the machine's own roof:
matrix products and memory bandwidth measured in the same run, and the step that they would allow. With other work on
the machine only the bests mean something, and not much: threads that wait for each other suffer most. The side
"kept" is PyTorch eager with freed memory kept and huge pages, which `llmlab train` has and a user of PyTorch has not.

Settings: char, nanoGPT's CPU setting, against a twin of it; gpt2 and llama, 6 layers of width 384, context 256, batch
4, vocabulary 8,192, against transformers; deep, 24 scanned layers of width 512, which is only compiled.
"""

import argparse
import os
import statistics
import string
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Side, best_seconds, in_turns, machine, read_bandwidth, serve, times_faster, write_results

from llmlab.core.host_memory import give_back, huge_page_environment, keep_freed_memory

STEPS_A_TURN = 10
OPTIMIZER_BYTES = 28  # a parameter: its gradient, itself and two moments are read, the last three written


class Setting(NamedTuple):
    """A model, and the batch it is trained on; `gate` is how many times PyTorch eager's speed is asked of it."""

    family: str
    model: dict[str, Any]
    sequence_length: int
    batch_size: int
    theirs: str = ""
    gate: float = 1.0


SMALL = dict(width=384, layers=6, heads=6, max_positions=256, vocab_size=8192)
CHAR = dict(width=128, layers=4, heads=4, max_positions=64, vocab_size=65, bias=False)
SETTINGS = {
    "char": Setting("gpt2", CHAR, 64, 12, "twin"),
    "gpt2": Setting("gpt2", SMALL, 256, 4, "transformers"),
    "llama": Setting("llama", SMALL, 256, 4, "transformers"),
    "deep": Setting("llama", dict(width=512, layers=24, heads=8, vocab_size=8192, scan=True), 256, 4),
}
COMPILE_GATES = {"cold": 10.0, "warm": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="3 turns of each side instead of --rounds")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads (default: all cores)")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, with the fused AdamW")
    arguments = parser.parse_args()
    unknown = set(arguments.settings) - set(SETTINGS)
    if unknown:
        parser.error(f"no setting {', '.join(sorted(unknown))}: choose from {', '.join(SETTINGS)}")
    rounds = 3 if arguments.quick else arguments.rounds
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text.txt")
        for name in arguments.settings or SETTINGS:
            results[name] = compare(name, folder, rounds, arguments.threads, arguments.compiled)
    path = write_results(f"train_step-{results[name]['platform']}", {"machine": machine(), "settings": results})
    print(f"\nwritten to {path}")


def write_text(path: Path) -> None:
    """Two megabytes of letters, for our data pipeline to read."""
    letters = np.array(list(string.ascii_letters + " .,\n"))
    path.write_text("".join(np.random.default_rng(0).choice(letters, 2_000_000)))


def compare(name: str, folder: str, rounds: int, threads: int, compiled: bool) -> dict[str, Any]:
    """All that is measured of one setting."""
    setting = SETTINGS[name]
    seconds = {}
    for state in COMPILE_GATES:
        side = Side(compile_step, setting, folder)
        facts = side.answer()
        seconds[state] = facts.pop("compile_seconds")
        side.close()
    result = {**facts, "compile_seconds": seconds}
    print(f"\n{name}: {facts['parameters'] / 1e6:.1f}M parameters on {facts['platform']}", flush=True)
    print(f"  compiled in {seconds['cold']:.1f} s, in {seconds['warm']:.1f} s from the cache")
    if not setting.theirs:
        return result | {"compile_gates": COMPILE_GATES}
    huge = huge_page_environment()
    sides = {"ours": Side(ours, setting, folder, environment=huge), "eager": Side(theirs, setting, threads)}
    sides["kept"] = Side(theirs, setting, threads, kept=True, environment=huge)
    if compiled:
        sides["compiled"] = Side(theirs, setting, threads, compiled=True)
    first = {side: competitor.answer() for side, competitor in sides.items()}
    in_turns(sides, STEPS_A_TURN, 2)
    turns = in_turns(sides, STEPS_A_TURN, rounds)
    roof = sides["eager"].ask("roof")
    memory = {side: competitor.ask("memory") for side, competitor in sides.items()}
    for competitor in sides.values():
        competitor.close()
    waiting = sum(waited for _, waited in turns["ours"]) / sum(sum(steps) for steps, _ in turns["ours"])
    at_roof = facts["flops"] / roof["flops"] + OPTIMIZER_BYTES * facts["parameters"] / roof["bandwidth"]
    result |= {"rounds": rounds, "roof": roof, "seconds_at_roof": at_roof, "waiting_for_data": waiting}
    result |= {"gate": setting.gate, "sides": {}}
    tokens = setting.batch_size * setting.sequence_length
    print(f"  the roof: {roof['flops'] / 1e9:.0f} GFLOP/s and {roof['bandwidth'] / 1e9:.0f} GB/s, ", end="")
    print(f"a step of {at_roof * 1e3:.0f} ms; waiting for data takes {waiting:.2%} of ours")
    # The best step of each turn: what slows a single step down comes from elsewhere on the machine.
    best = {side: [min(steps) for steps, _ in turns[side]] for side in sides}
    for side in sides:
        steps = [second for steps, _ in turns[side] for second in steps]
        median, least = statistics.median(steps), min(steps)
        ratio = times_faster(best["ours"], best[side])
        result["sides"][side] = {"median_seconds": median, "best_seconds": least, **ratio}
        result["sides"][side] |= {"tokens_per_second": tokens / median, "share_of_roof": at_roof / least}
        result["sides"][side] |= {"first_step_seconds": first[side], "peak_memory": memory[side]}
        result["sides"][side]["turns"] = [steps for steps, _ in turns[side]]
        print(
            f"  {side:9} {median * 1e3:7.1f} ms a step (best {least * 1e3:.1f}, {at_roof / least:.0%} of the roof), "
            f"{tokens / median:6.0f} tokens/s, {memory[side] / 2**20:5.0f} MiB; ours is "
            f"{ratio['ours_times_faster']:.2f} times as fast, by bests {ratio['ours_times_faster_by_bests']:.2f}",
            flush=True,
        )
    return result


def ours(end: Connection, setting: Setting, folder: str) -> None:
    import jax

    from llmlab.train.state import state_shardings

    start = time.perf_counter()
    fresh, step, source, model = training(setting, folder)
    key = jax.random.key(0)
    state = jax.jit(fresh, out_shardings=state_shardings(model, jax.eval_shape(fresh, key)))(key)
    state, _ = jax.block_until_ready(step(state, source.next(0)))
    end.send(time.perf_counter() - start)
    taken, batch = 1, source.next(1)

    def steps(count: int) -> tuple[list[float], float]:
        """Seconds of each step, and how many of them all waited for the batch.

        As in the loop: the next batch is fetched while the step computes, and has been waited for only if the step was
        done before it came.
        """
        nonlocal state, taken, batch
        seconds, waited = [], 0.0
        for _ in range(count):
            begin = time.perf_counter()
            state, _ = step(state, batch)
            fetching = time.perf_counter()
            batch = source.next(taken + 1)
            if state.step.is_ready():
                waited += time.perf_counter() - fetching
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - begin)
            taken += 1
        begin = time.perf_counter()
        give_back()  # as the loop does when it logs
        seconds[-1] += time.perf_counter() - begin
        return seconds, waited

    serve(end, steps)
    source.close()


def compile_step(end: Connection, setting: Setting, folder: str) -> None:
    import jax

    from llmlab.model.cost import flops_per_token
    from llmlab.train.state import state_shardings

    fresh, step, source, model = training(setting, folder)
    state, batch = jax.eval_shape(fresh, jax.random.key(0)), source.next(0)
    source.close()
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_shardings(model, state),
    )
    start = time.perf_counter()
    step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    flops = flops_per_token(model.config, setting.sequence_length) * setting.batch_size * setting.sequence_length
    count = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    end.send({"compile_seconds": seconds, "parameters": count, "flops": flops, "platform": jax.default_backend()})


def training(setting: Setting, folder: str) -> tuple[Any, Any, Any, Any]:
    """(key -> state, the jitted step, the source of batches, the model), as a run has them."""
    import jax

    from llmlab.core.mesh import single_device
    from llmlab.data import text
    from llmlab.data.pipeline import TextSource
    from llmlab.data.prepare import prepare_parts, tokenizer_for
    from llmlab.data.tokenizer import TokenizerConfig
    from llmlab.model import config as families
    from llmlab.model.transformer import make_model
    from llmlab.objective import next_token
    from llmlab.train.optimizer import adamw, make_optimizer, make_schedule
    from llmlab.train.state import init_state
    from llmlab.train.step import make_step

    keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    data = text(
        source="text",
        files=(os.path.join(folder, "text.txt"),),
        sequence_length=setting.sequence_length,
        batch_size=setting.batch_size,
        packing="chunk",
        workers=1,
        tokenizer=TokenizerConfig(kind="character", chat_markers=False),
        cache_dir=os.path.join(folder, "data"),
    )
    tokenizer = tokenizer_for(data, progress=False)
    partition = single_device()
    source = TextSource(
        data, prepare_parts(data, tokenizer, "train"), seed=0, sharding=partition.sharding("batch", "time")
    )
    model = make_model(getattr(families, setting.family)(**setting.model), partition)
    settings, steps = adamw(), 1000
    optimizer = make_optimizer(settings, steps, model.axes)
    loss = next_token().make(model, np.ones(model.config.vocab_size, np.int32))
    step = make_step(loss, optimizer, make_schedule(settings, steps), settings, seed=0, partition=partition)

    def fresh(key: jax.Array) -> Any:
        return init_state(model, optimizer, key, window=settings.skip_window, ema=False)

    return fresh, jax.jit(step, donate_argnums=0), source, model


def theirs(end: Connection, setting: Setting, threads: int, *, compiled: bool = False, kept: bool = False) -> None:
    if kept:
        keep_freed_memory()
    import torch
    from torch_twin import Transformers, Twin, adamw, make_step

    from llmlab.model import config as families

    torch.set_num_threads(threads)
    c = getattr(families, setting.family)(**setting.model)
    model = (Twin if setting.theirs == "twin" else Transformers)(c).train()
    optimizer = adamw(model, learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=compiled)
    step = make_step(torch.compile(model) if compiled else model, optimizer, clip=1.0)
    tokens_BT = torch.randint(c.vocab_size, (setting.batch_size, setting.sequence_length + 1))
    start = time.perf_counter()
    step(tokens_BT[:, :-1], tokens_BT[:, 1:])
    end.send(time.perf_counter() - start)

    def steps(count: int) -> tuple[list[float], float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            step(tokens_BT[:, :-1], tokens_BT[:, 1:])
            seconds.append(time.perf_counter() - begin)
        return seconds, 0.0

    serve(end, lambda question: roof(torch) if question == "roof" else steps(question))


def roof(torch: Any) -> dict[str, float]:
    """FLOP/s of a float32 product of 1024² matrices, and bytes a second that are read: bests of ten."""
    x = torch.ones(1024, 1024)
    return {"flops": 2 * 1024**3 / best_seconds(lambda: x @ x), "bandwidth": read_bandwidth(torch)}


if __name__ == "__main__":
    main()
