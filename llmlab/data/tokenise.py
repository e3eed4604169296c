"""Encodes documents in parallel, in their order. The workers are spawned, load no jax, and none can hang the others.

A document is a text or, of rows that are conversations, one response with all that comes before it.
"""

import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.chat import Example
from llmlab.data.config import Rows
from llmlab.data.store import LAST_MARK, STEP, Encoded

if TYPE_CHECKING:
    from llmlab.data.chat import ChatTemplate
    from llmlab.data.tokenizer import Tokenizer

TASK_CHARACTERS = 1 << 19
MAX_WORKERS = 16


class WorkerDiedError(UserError):
    """A worker ended before its work did. What was committed stays, and the next start goes on from there."""


DTYPES = ("<u4", "<i8", "<i8", "u1", "<f4", "<i8")  # of the fields of Encoded


def encode_all(
    items: Iterable[str], tokenizer: "Tokenizer", tokenizer_path: str, workers: int, rows: Rows = "text"
) -> Generator[Encoded, None, None]:
    """Every item, some at a time, in order: a text as [BOS] + tokens + [EOS], an example as `encode_examples` has it.

    Args:
      tokenizer_path: the same tokenizer, saved; the workers load it from there.
      workers: processes; 0 for one per core, up to 16; 1 for none beside this one.
      rows: what the items are: texts, or what `Example.dumps` gives.

    Raises:
      UserError: the tokenizer refused a text, or a worker died.
    """
    tasks = _tasks(items)
    first = list(itertools.islice(tasks, workers or min(_cores(), MAX_WORKERS)))
    tasks = itertools.chain(first, tasks)
    if len(first) < 2:  # one worker, or one task, done here before a process would have started
        encode = _encoder(tokenizer, rows)
        for task in tasks:
            yield encode(task)
    else:
        yield from _parallel(tasks, tokenizer_path, rows, len(first))


def _encoder(tokenizer: "Tokenizer", rows: Rows) -> Callable[[list[str]], Encoded]:
    """Encodes a task in this process."""
    if rows == "text":
        return functools.partial(encode_texts, tokenizer)
    from llmlab.data.chat import template_for

    return functools.partial(encode_examples, template_for(tokenizer), tokenizer.eos_id)


def encode_texts(tokenizer: "Tokenizer", texts: list[str]) -> Encoded:
    """Texts, each as [BOS] + tokens + [EOS]."""
    ids = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    return _joined(ids, [len(text.encode()) for text in texts])


def encode_examples(template: "ChatTemplate", closing_id: int, items: list[str]) -> Encoded:
    """Examples as their responses, each the ids of its conversation and `closing_id`, whatever their last turn is.

    That one more token is read by nobody: rows hold the tokens that predict another, and the score of an answer is
    read at its last token, which so is one of them.
    """
    ids, marks, sizes, values, documents = [], [], [], [], []
    for example in map(Example.loads, items):
        documents.append(len(example.responses))
        for conversation, value in example.responses:
            rendered = template.render(conversation)
            mark = [*rendered.mask, 0]
            for place, label in rendered.steps:
                mark[place] = STEP + round(label * (LAST_MARK - STEP))
            ids.append([*rendered.ids, closing_id])
            marks += mark
            sizes.append(sum(len(message.content.encode()) for message in conversation))
            values.append(value)
    return _joined(ids, sizes, marks, values, documents)


def _joined(ids: list[list[int]], sizes: list[int], *judged: list[Any]) -> Encoded:
    columns = [list(itertools.chain.from_iterable(ids)), list(map(len, ids)), sizes, *(judged or ([], [], []))]
    return Encoded(*(np.array(column, dtype) for column, dtype in zip(columns, DTYPES, strict=True)))


def _tasks(items: Iterable[str]) -> Iterator[list[str]]:
    task, size = [], 0
    for item in items:
        task.append(item)
        size += len(item) + 100  # a document has a cost of its own
        if size >= TASK_CHARACTERS:
            yield task
            task, size = [], 0
    if task:
        yield task


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


def _parallel(
    tasks: Iterable[list[str]], tokenizer_path: str, rows: Rows, workers: int
) -> Generator[Encoded, None, None]:
    """Gives each worker one task at a time, in turn, so that results come in order and no pipe fills both ways."""
    idle = collections.deque(_start(tokenizer_path, rows) for _ in range(workers))
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


def _start(tokenizer_path: str, rows: Rows) -> _Worker:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, tokenizer_path, rows), name="llmlab-tokenise", daemon=True)
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
            return Encoded(*(np.frombuffer(worker.pipe.recv_bytes(), dtype) for dtype in DTYPES))
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


def _work(pipe: Connection, tokenizer_path: str, rows: Rows) -> None:
    """A worker's life: until the parent closes the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        for part in _answers(pipe, tokenizer_path, rows):
            pipe.send_bytes(part)


def _answers(pipe: Connection, tokenizer_path: str, rows: Rows) -> Iterator[bytes]:
    from llmlab.data.tokenizer import load_tokenizer

    try:
        encode = _encoder(load_tokenizer(tokenizer_path), rows)
    except Exception:
        yield from (b"error", traceback.format_exc().encode())
        return
    while True:
        task = json.loads(pipe.recv_bytes())
        try:
            encoded = encode(task)
        except UserError as error:
            yield from (b"user error", str(error).encode())
        except Exception:
            yield from (b"error", traceback.format_exc().encode())
        else:
            yield from (b"encoded", *(array.tobytes() for array in encoded))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
