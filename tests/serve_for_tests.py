"""A server in a thread of its own, over tiny models with random weights, for real clients on a loopback port."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from llmlab.data.tokenizer import TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.service import Service
from llmlab.model.transformer import make_model
from llmlab.serve.app import make_app
from llmlab.serve.limits import Limits
from llmlab.serve.models import Served, served
from llmlab.workdir.open import Opened
from tests.helpers import random_params, tiny_llama

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


@contextlib.contextmanager
def running(
    folder: Path, opened: dict[str, Opened], *, queue: int = 8, limits: Limits = Limits(), **given: Any
) -> Iterator[Running]:
    """The server, until the block is left."""
    models = {
        name: served(
            name, model, Service(Engine(model.model, model.params, CONFIG), queue), str(folder / "votes.jsonl")
        )
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
