"""What the benchmarks share: competitors that take turns, each in its own process, and where the results go."""

import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


class Side:
    """One competitor in its own process: `work(end, *arguments, **options)`, which ends in `serve(end, …)`.

    `environment` is added to the process's, which starts with it.
    """

    def __init__(self, work: Callable, *arguments: Any, environment: Mapping[str, str] | None = None, **options: Any):
        context = multiprocessing.get_context("spawn")
        self.end, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, *arguments), kwargs=options, daemon=True)
        before = {name: os.environ.get(name) for name in environment or {}}
        os.environ.update(environment or {})
        self.process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        # With our copy of its end closed, a side that dies is an EOFError here and not an endless wait.
        other.close()

    def ask(self, question: Any) -> Any:
        self.end.send(question)
        return self.answer()

    def answer(self) -> Any:
        return self.end.recv()

    def close(self) -> None:
        self.end.close()
        self.process.join()


def serve(end: Connection, answer: Callable[[Any], Any]) -> None:
    """Answers until the other end closes."""
    for question in questions(end):
        end.send(answer(question))


def questions(end: Connection) -> Iterator[Any]:
    """What is asked until the other end closes, but "memory", answered here with this process's peak in bytes."""
    while True:
        try:
            question = end.recv()
        except EOFError:
            return
        if isinstance(question, str) and question == "memory":
            end.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        else:
            yield question


def in_turns(sides: dict[str, Side], question: Any, rounds: int) -> dict[str, list[Any]]:
    """The answers of every side to `rounds` askings, A B A B …"""
    answers: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            answers[name].append(side.ask(question))
    return answers


def times_faster(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as fast as theirs ours is: the median of the ratios of neighbouring turns, and by the bests."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {"ours_times_faster": statistics.median(ratios), "ours_times_faster_by_bests": min(theirs) / min(ours)}


def conversation_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of conversations as long as the built-in assistant's: 55 in the median, 111 at 95 %, from 20 to 300."""
    drawn = np.random.default_rng(seed).lognormal(np.log(55), 0.43, count)
    return np.clip(drawn.round().astype(int), 20, 300)


def best_seconds(work: Callable[[], Any]) -> float:
    """The shortest of ten runs."""
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def read_bandwidth(torch: Any) -> float:
    """Bytes a second that a sum over 256 MiB reads, the best of ten."""
    row = torch.ones(2**26)
    return row.numel() * 4 / best_seconds(row.sum)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}


def write_results(name: str, results: dict[str, Any]) -> Path:
    """benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path
