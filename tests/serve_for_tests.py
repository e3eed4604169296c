"""Servers for real clients on a loopback port: in a thread, over tiny models with random weights, or as a user starts
one, over a run.
"""

import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvicorn

from llmlab.data.chat import Message
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.request import Request
from llmlab.infer.retrieval import IndexConfig, build
from llmlab.infer.service import Service, Ticket
from llmlab.model.transformer import make_model
from llmlab.serve.app import make_app
from llmlab.serve.limits import Limits
from llmlab.serve.models import Find, Served, served
from llmlab.workdir.open import Opened
from tests.helpers import random_params, tiny_llama
from tests.runs import FAST_COMPILE, ROOT, Place

TEXTS = [
    "the quick brown fox jumps over the lazy dog\n",
    "naïve 日本語 🙂 e\u0301 ok\n",
    "def f(x):\n    return x + 1\n",
]
REACH = 256
CONFIG = EngineConfig(slots=4, page_size=64, prefill=128)


@dataclasses.dataclass
class Running:
    """A server that answers at `url`, and what it serves."""

    url: str
    models: dict[str, Served]
    folder: Path

    @property
    def service(self) -> Service:
        """The first model's."""
        return next(iter(self.models.values())).service


def opened_model(*, chat: bool = True, seed: int = 7, reach: int = REACH) -> Opened:
    """A model that writes anything at all."""
    config = TokenizerConfig(vocab_size=340, chat_markers=chat)
    tokenizer = train_tokenizer(config, TEXTS * 30)
    model = make_model(tiny_llama(vocab_size=tokenizer.vocab_size, max_positions=reach))
    return Opened(model, random_params(model, seed=seed), tokenizer, 5, {})


def indexed(folder: Path) -> Find:
    """What finds passages in an index of two files."""
    for name, text in (("fox.md", "The fox jumps over the lazy dog."), ("cat.md", "The cat jumps over nobody.")):
        (folder / name).write_text(text)
    index = build(IndexConfig((str(folder / "*.md"),)))
    return lambda question: index.search(question, 2)


@contextlib.contextmanager
def running(
    folder: Path,
    opened: dict[str, Opened],
    *,
    queue: int = 8,
    limits: Limits = Limits(),
    find: Find | None = None,
    **given: Any,
) -> Iterator[Running]:
    """The server, until the block is left."""
    votes = str(folder / "votes.jsonl")
    models = {
        name: served(name, model, Service(Engine(model.model, model.params, CONFIG), queue), votes, find)
        for name, model in opened.items()
    }
    app = make_app(models, limits=limits, **given)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Running(f"http://127.0.0.1:{port}", models, folder)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Waits for it, 20 seconds at most."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Scripted:
    """Lets a model say what a test wants, one answer after the other; a model that is told nothing says anything.

    asked: the requests so far.
    """

    def __init__(self, model: Served):
        self.asked: list[Request] = []
        self.vocab = model.opened.model.config.vocab_size
        self._model, self._order = model, model.service._order
        self._turns, self._held = list[_Script](), list[threading.Event]()
        model.service._order = self._begin  # type: ignore[method-assign]

    def says(self, *answers: Message | str, hold: int | None = None) -> threading.Event:
        """The next answers: turns, or texts that go on from a prompt. After `hold` tokens all waits for the event."""
        going = threading.Event()
        self._held.append(going)
        self._turns += [_Script(self._ids(answer), hold, going, self) for answer in answers]
        return going

    def forget(self) -> None:
        """What was asked so far, and what was still to be said."""
        for going in self._held:
            going.set()
        for each in (self.asked, self._turns, self._held):
            each.clear()

    def take(self) -> "_Script | None":
        """What comes next."""
        return self._turns.pop(0) if self._turns else None

    def _ids(self, answer: Message | str) -> list[int]:
        tokenizer, template = self._model.opened.tokenizer, self._model.template
        if isinstance(answer, str):
            return [*tokenizer.encode(answer), tokenizer.eos_id]
        assert template is not None
        asked = (Message("user", "x"),)
        before = len(template.render(asked, generate=True).ids)
        return template.render((*asked, answer)).ids[before:]

    def _begin(self, ticket: Ticket, requests: Sequence[Request], n: int) -> None:
        self.asked += requests
        self._order(ticket, [dataclasses.replace(request, limit=self.take()) for request in requests], n)


class _Script:
    """Leaves one token at a time to choose from."""

    def __init__(self, ids: list[int], hold: int | None, going: threading.Event, scripted: Scripted):
        self._ids, self._hold, self._going, self._scripted, self._place = ids, hold, going, scripted, 0

    def fresh(self) -> "_Script":
        following = self._scripted.take()
        assert following is not None, "a request for several answers needs as many"
        return following

    def ready(self, within: float) -> bool:
        return True

    def allowed(self) -> np.ndarray:
        if self._place == self._hold:
            self._going.wait(60)
        words = np.zeros(-(-self._scripted.vocab // 32), np.uint32)
        id = self._ids[min(self._place, len(self._ids) - 1)]
        words[id // 32] = np.uint32(1 << id % 32)
        return words

    def accept(self, token: int) -> None:
        self._place += 1


class Process(NamedTuple):
    """`llmlab serve`, with what it has said so far."""

    url: str
    process: subprocess.Popen[str]
    said: str

    def megabytes(self) -> float:
        """Of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1e3  # type: ignore[index]


@contextlib.contextmanager
def serving(place: Place, workdir: Path, *flags: str, xla_flags: str = FAST_COMPILE) -> Iterator[Process]:
    """The process, over this run by the name of tiny, until the block is left."""
    command = [sys.executable, "-m", "llmlab", "serve", f"--workdir=tiny={workdir}", "--port=0", *flags]
    environment = os.environ | {"LLMLAB_CACHE": str(place.cache), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("try:"):
                break
        url = re.search(r"serving at (http://127\.0\.0\.1:\d+)", said)
        assert url, said
        yield Process(url[1], process, said)
    finally:
        process.kill()
        process.communicate()
