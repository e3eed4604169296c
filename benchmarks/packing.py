"""How many conversations a minute one core packs into rows, and how full the rows are.

    python benchmarks/packing.py                     # a minute; --small for fewer conversations

Conversations of random tokens, about as long as the built-in assistant's, lie tokenised in a store. Timed is what comes
after: which of them make up each row, and the arrays of all rows, in batches of 16, on one core. Printed, and written
to benchmarks/results/packing.json: medians and bests, beside what is asked for.
"""

import argparse
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import Side, conversation_lengths, in_turns, machine, serve, write_results

SEQUENCE_LENGTH, BATCH_SIZE, VOCAB = 4096, 16, 4096
GATES = {"conversations_per_minute": 1e6, "filled": 0.995}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=250_000, help="how many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="how often (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="20,000 conversations, 3 times; nothing is written")
    arguments = parser.parse_args()
    count, rounds = (20_000, 3) if arguments.small else (arguments.conversations, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        side = Side(packing, folder, count)
        facts = side.answer()
        side.ask("pack")  # reads the store, which is then in memory
        answers = in_turns({"packing": side}, "pack", rounds)["packing"]
        side.close()
    seconds = [packed + assembled for packed, assembled in answers]
    speed, best = (count / each * 60 for each in (statistics.median(seconds), min(seconds)))
    print(f"{count:,} conversations of {facts['tokens']:,} tokens in {facts['rows']:,} rows of {SEQUENCE_LENGTH:,}")
    print(f"  filled to {facts['filled']:.3%} (asked for: {GATES['filled']:.1%})")
    print(f"  {speed / 1e6:.1f} million a minute, at best {best / 1e6:.1f} (asked for: 1.0)")
    packed = statistics.median(packed for packed, _ in answers)
    print(
        f"  {statistics.median(seconds):.2f} s, of which {packed:.2f} s find the rows and the rest makes their arrays"
    )
    results = {"machine": machine(), "gates": GATES, "conversations": count, "sequence_length": SEQUENCE_LENGTH}
    results |= {**facts, "rounds": rounds, "conversations_per_minute": speed, "best_conversations_per_minute": best}
    results |= {"seconds": [{"packing": packed, "arrays": arrays} for packed, arrays in answers]}
    if not arguments.small:
        print(f"written to {write_results('packing', results)}")


def packing(end: Connection, folder: str, count: int) -> None:
    """On one core: the store first, then (seconds of packing, seconds of the arrays) as often as asked."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from llmlab.data.packing import assemble, pack_responses

    store = write_store(Path(folder), count)

    def pack(_: Any) -> tuple[float, float]:
        begin = time.perf_counter()
        index = pack_responses(store, "best_fit", SEQUENCE_LENGTH, whole=False)
        packed = time.perf_counter()
        for first in range(0, len(index), BATCH_SIZE):
            rows = np.arange(first, min(first + BATCH_SIZE, len(index)))
            assemble(store, index, rows, SEQUENCE_LENGTH)
        return packed - begin, time.perf_counter() - packed

    index = pack_responses(store, "best_fit", SEQUENCE_LENGTH, whole=False)
    filled = int(index.pieces[:, 2].sum()) / (len(index) * SEQUENCE_LENGTH)
    end.send({"tokens": len(store.tokens), "rows": len(index), "filled": filled})
    serve(end, pack)


def write_store(folder: Path, count: int) -> Any:
    """A store of conversations of one question and one answer, of random tokens."""
    from llmlab.data.store import TOKENIZER, Encoded, StoreWriter, TokenStore

    # One more token closes each: see `llmlab.data.tokenise.encode_examples`.
    lengths = conversation_lengths(count) + 1
    tokens = np.random.default_rng(0).integers(0, VOCAB, lengths.sum(), np.int64)
    place = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    length = np.repeat(lengths, lengths)
    marks = (place >= length // 2) & (place < length - 1)
    (folder / TOKENIZER).write_bytes(b"")
    writer = StoreWriter(folder, np.dtype("<u2"), judged=True)
    writer.append(Encoded(tokens, lengths, 4 * lengths, marks, np.zeros(count), np.ones(count, int)))
    writer.finish()
    writer.close()
    return TokenStore.open(folder)


if __name__ == "__main__":
    main()
