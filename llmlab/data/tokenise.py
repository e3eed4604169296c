"""Encodes documents in parallel, in their order. The workers are spawned, load no jax, and none can hang the others."""

import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from llmlab.core.errors import UserError

if TYPE_CHECKING:
    from llmlab.data.tokenizer import Tokenizer

TASK_CHARACTERS = 1 << 19
MAX_WORKERS = 16


class WorkerDiedError(UserError):
    """A worker ended before its work did. What was committed stays, and the next start goes on from there."""


class Encoded(NamedTuple):
    """Documents as tokens: all joined, the number of tokens of each, and the bytes of text of each."""

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray


def encode_all(
    texts: Iterable[str], tokenizer: "Tokenizer", tokenizer_path: str, workers: int
) -> Generator[Encoded, None, None]:
    """Every text as [BOS] + tokens + [EOS], some texts at a time, in order.

    Args:
      tokenizer_path: the same tokenizer, saved; the workers load it from there.
      workers: processes; 0 for one per core, up to 16; 1 for none beside this one.

    Raises:
      UserError: the tokenizer refused a text, or a worker died.
    """
    tasks = _tasks(texts)
    first = list(itertools.islice(tasks, workers or min(_cores(), MAX_WORKERS)))
    tasks = itertools.chain(first, tasks)
    if len(first) < 2:  # one worker, or one task, done here before a process would have started
        for task in tasks:
            yield encode(tokenizer, task)
    else:
        yield from _parallel(tasks, tokenizer_path, len(first))


def encode(tokenizer: "Tokenizer", texts: list[str]) -> Encoded:
    """The same in this process, all at once."""
    ids = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.uint32) for text in texts]
    lengths = np.array([len(each) for each in ids], np.int64)
    return Encoded(np.concatenate(ids), lengths, np.array([len(text.encode()) for text in texts], np.int64))


def _tasks(texts: Iterable[str]) -> Iterator[list[str]]:
    task, size = [], 0
    for text in texts:
        task.append(text)
        size += len(text) + 100  # a document has a cost of its own
        if size >= TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def _parallel(tasks: Iterable[list[str]], tokenizer_path: str, workers: int) -> Generator[Encoded, None, None]:
    """Gives each worker one task at a time, in turn, so that results come in order and no pipe fills both ways."""
    idle = collections.deque(_start(tokenizer_path) for _ in range(workers))
    busy: collections.deque[_Worker] = collections.deque()
    try:
        for task in tasks:
            if not idle:
                yield _result(busy[0])
                idle.append(busy.popleft())
            busy.append(idle.popleft())
            _give(busy[-1], task)
        while busy:
            yield _result(busy[0])
            idle.append(busy.popleft())
    finally:
        for worker in (*idle, *busy):
            worker.pipe.close()
            worker.process.terminate()
            worker.process.join()


def _start(tokenizer_path: str) -> _Worker:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, tokenizer_path), name="llmlab-tokenise", daemon=True)
    with _hidden_main():
        process.start()
    theirs.close()  # so that a worker's death is the end of the pipe
    return _Worker(process, ours)


@contextlib.contextmanager
def _hidden_main() -> Iterator[None]:
    """A spawned process imports its parent's main module again, which may run a whole script, or import jax."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _give(worker: _Worker, task: list[str]) -> None:
    try:
        worker.pipe.send_bytes(json.dumps(task).encode())
    except OSError:
        _result(worker)  # raises what it said last, if it still could
        _died(worker)


def _result(worker: _Worker) -> Encoded:
    try:
        kind = worker.pipe.recv_bytes()
        if kind == b"encoded":
            tokens, lengths, text_bytes = (worker.pipe.recv_bytes() for _ in range(3))
            return Encoded(*(np.frombuffer(b, t) for b, t in ((tokens, "u4"), (lengths, "i8"), (text_bytes, "i8"))))
        message = worker.pipe.recv_bytes().decode()
    except (EOFError, OSError):
        _died(worker)
    if kind == b"user error":
        raise UserError(message)
    raise RuntimeError(f"a tokenising worker failed:\n{message}")


def _died(worker: _Worker) -> NoReturn:
    worker.process.join(timeout=10)
    code = worker.process.exitcode
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    raise WorkerDiedError(
        f"a tokenising worker died ({how}; SIGKILL often means that memory ran out): run the same command again, it "
        "goes on from where it was, or set data.workers lower"
    )


def _work(pipe: Connection, tokenizer_path: str) -> None:
    """A worker's life: until the parent closes the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        for part in _answers(pipe, tokenizer_path):
            pipe.send_bytes(part)


def _answers(pipe: Connection, tokenizer_path: str) -> Iterator[bytes]:
    from llmlab.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(tokenizer_path)
    except Exception:
        yield from (b"error", traceback.format_exc().encode())
        return
    while True:
        task = json.loads(pipe.recv_bytes())
        try:
            encoded = encode(tokenizer, task)
        except UserError as error:
            yield from (b"user error", str(error).encode())
        except Exception:
            yield from (b"error", traceback.format_exc().encode())
        else:
            yield from (b"encoded", *(array.tobytes() for array in encoded))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
