"""How long the mask of one token takes: p50 and p99 over the schemas of tests/schemas.json, with 32k tokens.

    python benchmarks/structured.py                  # a minute; --small for fewer walks; nothing is written then

The tokenizer is trained on the standard library. Each schema is walked at random, the next token drawn from those the
mask allows, as a model with random weights would at a high temperature. Timed is what stands between two tokens: the
one that was drawn taken in, and the mask made; by the clock, and by the thread's own processor time, which other work
on the machine disturbs less. Printed, and written to benchmarks/results/structured.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from common import machine, write_results

VOCAB, TEXT = 32_000, 24_000_000
GATE = 1.0  # milliseconds at p99
SCHEMAS = Path(__file__).parent.parent / "tests" / "schemas.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20, help="of each schema (default: %(default)s)")
    parser.add_argument("--tokenizer", default="", help="a file to use instead of training one")
    parser.add_argument("--small", action="store_true", help="2 walks of each; nothing is written")
    arguments = parser.parse_args()
    from llmlab.infer.structured import Structures

    tokenizer = tokenizer_of(arguments.tokenizer)
    structures = Structures(tokenizer, tokenizer.vocab_size, (tokenizer.eos_id,))
    schemas = json.loads(SCHEMAS.read_text())
    per_schema, compiled = {}, {}
    for name, schema in schemas.items():
        begin = time.perf_counter()
        structures.schema(schema)
        compiled[name] = time.perf_counter() - begin
        walks = 2 if arguments.small else arguments.walks
        per_schema[name] = [each for seed in range(walks) for each in walk(structures, schema, seed)]
    every = np.array([each for times in per_schema.values() for each in times]) * 1e3
    results = {"machine": machine(), "vocab_size": tokenizer.vocab_size, "gate_ms_p99": GATE, "masks": len(every)}
    for column, kind in enumerate(("clock", "processor")):
        figures = {f"p{q}": float(np.quantile(every[:, column], q / 100)) for q in (50, 99, 100)}
        print(f"{kind:9}: " + ", ".join(f"{name} {value:.3f} ms" for name, value in figures.items()))
        results[f"ms_by_{kind}"] = figures
    worst = sorted(per_schema, key=lambda name: -np.quantile(np.array(per_schema[name])[:, 1], 0.99))[:5]
    for name in worst:
        print(f"  slowest: {name}, p99 {np.quantile(np.array(per_schema[name])[:, 1], 0.99) * 1e3:.3f} ms")
    print(f"compiled in {np.median(list(compiled.values())) * 1e3:.0f} ms each (median), a process to try it included")
    results["compile_seconds"] = compiled
    if not arguments.small:
        print(f"written to {write_results('structured', results)}")


def tokenizer_of(file: str):
    from llmlab.data import sources_python
    from llmlab.data.tokenizer import TokenizerConfig, load_tokenizer
    from llmlab.data.tokenizer_train import train_tokenizer

    if file:
        return load_tokenizer(file)
    texts, size = [], 0
    for name in sources_python.names():
        texts.append(sources_python.read_bytes(name).decode(errors="ignore"))
        size += len(texts[-1])
        if size > TEXT:
            break
    return train_tokenizer(TokenizerConfig(vocab_size=VOCAB), texts)


def timed(limit, token: int) -> tuple[float, float]:
    """Seconds until the next mask is there, by the clock as the engine waits, and of the thread that makes it."""
    spent = []
    make = limit._after

    def measured(token: int):
        begin = time.thread_time()
        mask = make(token)
        spent.append(time.thread_time() - begin)
        return mask

    limit._after = measured
    begin = time.perf_counter()
    limit.accept(token)
    limit.allowed()
    seconds = time.perf_counter() - begin
    limit._after = make
    return seconds, spent[0]


def walk(structures, schema, seed: int, longest: int = 200) -> list[tuple[float, float]]:
    """(seconds by the clock, by the processor) of every mask."""
    rng = np.random.default_rng(seed)
    limit, times = structures.schema(schema), []
    limit.allowed()
    for _ in range(longest):
        allowed = np.flatnonzero(np.unpackbits(limit.allowed().view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        times.append(timed(limit, token))
        if token == structures.stop_ids[0]:
            break
    return times


if __name__ == "__main__":
    main()
