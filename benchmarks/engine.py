"""The engine of a 30M-parameter Llama: against transformers' `generate`, and many clients against one after the other.

    python benchmarks/engine.py          # some minutes on 2 cores; --quick for fewer rounds

Greedy, with the same weights: the engine with one token of each row in a call, as clients want it, the engine with
eight, and transformers take turns, each in a process of its own, with memory in pages of 2 MiB as `llmlab` has it. Then
32 clients that ask again as soon as they are answered, prompts and answers of mixed lengths: tokens per second for as
long as all 32 ask, and for the first 48 of these requests one by one. And how long the first token of a short prompt
takes on an idle engine and beside a long prompt and seven that write. Printed, and written to
benchmarks/results/engine-PLATFORM.json.
"""

import argparse
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from common import Side, in_turns, machine, serve, times_faster, write_results
from decode import NEW, PROMPT, VOCAB, state_dict, theirs, timed

from llmlab.core.host_memory import huge_page_environment, keep_freed_memory

CLIENTS, TURNS, ALONE, ARRIVALS, SLOTS, LONGEST, STEPS = 32, 6, 48, 40, 32, 512, 8
SEVERAL = f"engine, {STEPS} steps a call"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of --rounds")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.npz")
        huge = huge_page_environment()
        sides = {"engine": Side(ours, weights, 1, environment=huge)}
        facts = sides["engine"].answer()
        sides[SEVERAL] = Side(ours, weights, STEPS, environment=huge)
        sides["transformers"] = Side(theirs, weights, os.cpu_count(), environment=huge)
        for name in (SEVERAL, "transformers"):
            sides[name].answer()
        results: dict[str, Any] = {}
        for batch in (1, 8):
            prompt_BT = np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT))
            first = {name: side.ask(prompt_BT)[0] for name, side in sides.items()}
            answers = in_turns(sides, prompt_BT, rounds)
            seconds = {name: [time_ for _, time_ in each] for name, each in answers.items()}
            speeds = {name: batch * NEW / statistics.median(each) for name, each in seconds.items()}
            results[f"batch {batch}"] = {"tokens_per_second": speeds, "seconds": seconds}
            for name in ("engine", SEVERAL):
                ratio = times_faster(seconds[name], seconds["transformers"])
                ratio["tokens_equal"] = float(np.mean(first[name] == first["transformers"]))
                results[f"batch {batch}"][name] = ratio
                print(
                    f"batch {batch}: {name} {speeds[name]:.0f} tokens/s, transformers {speeds['transformers']:.0f}: "
                    f"{ratio['ours_times_faster']:.2f} times as fast; {ratio['tokens_equal']:.0%} of the tokens equal"
                )
        for name in (SEVERAL, "transformers"):
            sides.pop(name).close()
        results["clients"] = clients = [sides["engine"].ask("clients") for _ in range(3)]
    gain = statistics.median(each["at once"] / each["one by one"] for each in clients)
    late = statistics.median(each["first token beside others"] / each["first token alone"] for each in clients)
    print(f"{CLIENTS} clients at once: {gain:.2f} times the throughput of one by one")
    print(f"the first token of a short prompt: {late:.2f} times as late beside others as alone")
    setting = {
        "prompt": PROMPT,
        "new_tokens": NEW,
        "vocab_size": VOCAB,
        "rounds": rounds,
        "clients": CLIENTS,
        "turns": TURNS,
        "requests_one_by_one": ALONE,
        "arrivals": ARRIVALS,
        "steps": STEPS,
    }
    report = {"machine": machine(), "model": facts, "setting": setting, "results": results}
    print(f"written to {write_results('engine-' + facts['platform'], report)}")


def ours(end: Connection, weights: str, steps: int) -> None:
    keep_freed_memory()
    import jax

    from llmlab.infer.engine import Engine, EngineConfig
    from llmlab.infer.request import Request, Sampling
    from llmlab.model.config import llama
    from llmlab.model.transformer import make_model

    model = make_model(llama("30m", vocab_size=VOCAB, max_positions=LONGEST))
    params = jax.jit(model.init)(jax.random.key(0))
    if steps == 1:
        np.savez(weights, **state_dict(jax.tree.map(np.asarray, params)))
    engine = Engine(model, params, EngineConfig(slots=SLOTS, prefill=64, steps=steps))
    shapes = engine.compile()
    end.send(
        {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "platform": jax.default_backend(),
            "shapes": shapes,
        }
    )
    greedy = Sampling(temperature=0)

    def run(*requests: Request) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {engine.submit(request)[0]: [] for request in requests}
        while not engine.idle:
            for event in engine.step():
                tokens[event.number].append(event.token)
        return tokens

    def batch(prompt_BT: np.ndarray) -> np.ndarray:
        engine.pages.forget()  # or the second turn would find its prompt read
        written = run(*(Request(tuple(row), NEW, greedy) for row in prompt_BT.tolist()))
        return np.concatenate([prompt_BT, list(written.values())], axis=1)

    def first_token(*others: Request) -> float:
        for request in others:
            engine.submit(request)
        for _ in range(8):
            engine.step()
        time.sleep(rng.uniform(0, 0.03))  # nobody comes just when a step has begun
        begun, (number,) = (
            time.perf_counter(),
            engine.submit(Request(tuple(rng.integers(VOCAB, size=24).tolist()), 1, greedy)),
        )
        while not any(event.number == number for event in engine.step()):
            pass
        took = time.perf_counter() - begun
        while not engine.idle:
            engine.step()
        return took

    rng = np.random.default_rng(1)

    def request(prompt: int, new: int) -> Request:
        return Request(tuple(rng.integers(VOCAB, size=prompt).tolist()), new, greedy)

    def clients() -> dict[str, float]:
        """Tokens per second, and seconds to a first token."""
        mixed = [request(int(rng.integers(8, 128)), int(rng.integers(16, 128))) for _ in range(CLIENTS * TURNS)]
        begun, later, written = time.perf_counter(), mixed[CLIENTS:], 0
        for each in mixed[:CLIENTS]:
            engine.submit(each)
        while later:
            events = engine.step()
            written += len(events)
            for _ in range(sum(event.finish is not None for event in events)):
                if later:
                    engine.submit(later.pop(0))
        at_once = written / (time.perf_counter() - begun)
        while not engine.idle:
            engine.step()
        engine.pages.forget()
        begun = time.perf_counter()
        for each in mixed[:ALONE]:
            run(each)
        one_by_one = sum(each.max_tokens for each in mixed[:ALONE]) / (time.perf_counter() - begun)
        engine.pages.forget()
        alone = statistics.fmean(first_token() for _ in range(ARRIVALS))
        beside = statistics.fmean(
            first_token(*(request(32, 100) for _ in range(7)), request(400, 16)) for _ in range(ARRIVALS)
        )
        return {
            "at once": at_once,
            "one by one": one_by_one,
            "first token alone": alone,
            "first token beside others": beside,
        }

    answer = timed(batch)
    serve(end, lambda question: clients() if isinstance(question, str) else answer(question))


if __name__ == "__main__":
    main()
