"""What `llmlab serve` does: opens models, compiles what they need, and answers until it is told to stop."""

import dataclasses
import gc
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from llmlab.core.errors import UserError
from llmlab.infer.choose import Judge
from llmlab.infer.decoder import Decoder, ready
from llmlab.infer.engine import Engine, EngineConfig
from llmlab.infer.service import Service
from llmlab.serve.app import make_app
from llmlab.serve.limits import Limits
from llmlab.serve.models import Find, Served, served
from llmlab.workdir.open import Opened


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """workdirs: NAME=DIR, or DIR, whose name is then its own. key_file: a key a line. open: without keys even beyond
    this machine. queue: requests that may wait. preferences: where votes go; "" is the workdir. reward: the folder of
    a model that rewards answers, see `llmlab.infer.choose.Judge`; "" is none.
    """

    workdirs: Sequence[str]
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: str = ""
    open: bool = False
    queue: int = 64
    preferences: str = ""
    reward: str = ""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.workdirs:
            raise UserError("--workdir is missing: name a run, or several as --workdir=NAME=DIR,NAME2=DIR2")
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port={self.port} should be from 0 (any that is free) to 65535")
        if self.queue < 0:
            raise UserError(f"--queue={self.queue} should be at least 0")
        if self.limits.seconds <= 0:
            raise UserError(f"--seconds={self.limits.seconds:g} should be above 0")
        if not (self.key_file or self.open or is_loopback(self.host)):
            raise UserError(
                f"--host={self.host} lets others in, and there is no key: give --api_key_file=FILE with a key a line, "
                "or --open where everybody may use it"
            )


def serve_command(
    config: ServeConfig, open_model: Callable[[str], Opened], finder: Callable[[Opened], Find] | None = None
) -> None:
    """Serves until SIGTERM or Ctrl-C; what was admitted by then is finished first.

    finder: makes what finds passages for a model's questions, where there is an index.

    Raises:
      UserError: a workdir, a key file or an address that cannot be used.
    """
    keys = read_keys(config.key_file) if config.key_file else []
    names = named(config.workdirs)
    with listen(config.host, config.port) as listening:
        address = _address(config.host, listening.getsockname()[1])
        judge = Judge(open_model(config.reward)) if config.reward else None
        models: dict[str, Served] = {}
        for name, folder in names.items():
            opened = open_model(folder)
            # As the engine would have them, which otherwise keeps weights of its own beside these.
            opened = opened._replace(params=ready(Decoder.of(opened.model), opened.params, release=True))
            find = finder(opened) if finder else None
            engine = Engine(opened.model, opened.params, config.engine)
            _compile(engine, name)
            votes = config.preferences or str(Path(folder) / "preferences.jsonl")
            models[name] = served(name, opened, Service(engine, config.queue, name), votes, find)
        _stay_responsive()
        hosts = () if keys or config.open else (config.host,)
        app = make_app(models, keys=keys, hosts=hosts, limits=config.limits, judge=judge)
        # uvicorn raises the signal that has stopped it once more when all is done; by then it has no more to say.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        print(_greeting(address, models, config.reward, keyed=bool(keys)), file=sys.stderr, flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        server.run(sockets=[listening])
    print("stopped: what was begun is finished", file=sys.stderr)


def named(workdirs: Sequence[str]) -> dict[str, str]:
    """The folder of each name.

    Raises:
      UserError: a name is empty or given twice.
    """
    names: dict[str, str] = {}
    for given in workdirs:
        name, equals, folder = given.partition("=")
        if not equals:
            name, folder = os.path.basename(os.path.abspath(given)), given
        if not name or not folder:
            raise UserError(f"--workdir={given} should be NAME=DIR, or DIR")
        if name in names:
            raise UserError(f"--workdir names {name!r} twice: give one of them another name, as NAME=DIR")
        names[name] = folder
    return names


def read_keys(path: str) -> list[str]:
    """The keys in a file, one a line; empty lines and those that begin with # are none.

    Raises:
      UserError: it cannot be read, or holds no key of at least 16 characters.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api_key_file={path} cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys or min(map(len, keys)) < 16 or any(not key.isascii() for key in keys):
        raise UserError(
            f"--api_key_file={path} should hold keys of at least 16 plain characters, one a line: "
            "make one with python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Taken before the models are read: whoever waits for minutes should not hear then that the
    port is in use.
    """
    listening = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # By its protocol asyncio knows that it should not wait for more to send (Nagle), 40 ms at a time.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        if listening is not None:
            listening.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"{host} port {port} cannot be listened to ({reason}): choose another --port or --host"
        ) from None
    return listening


def _stay_responsive() -> None:
    """Long work on one thread holds up the event loop and the engine as little as Python allows."""
    sys.setswitchinterval(5e-5)
    # What is there stays: going through all of it again takes tenths of a second.
    gc.collect()
    gc.freeze()


def _compile(engine: Engine, name: str) -> None:
    begun, shown = time.perf_counter(), sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if shown:
            print(f"\r{name}: compiled {done} of {total} shapes", end="", file=sys.stderr, flush=True)

    shapes = engine.compile(progress)
    end = "\r" if shown else ""
    print(f"{end}{name}: compiled {shapes} shapes in {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)


def _address(host: str, port: int) -> str:
    shown = "127.0.0.1" if host in ("0.0.0.0", "localhost") else "[::1]" if host == "::" else host
    return f"http://[{shown}]:{port}" if ":" in shown and "[" not in shown else f"http://{shown}:{port}"


def _greeting(address: str, models: dict[str, Served], reward: str, *, keyed: bool) -> str:
    lines = [f"serving at {address}  (the page to talk to; Ctrl-C stops)"]
    for model in models.values():
        what = "chat and completions" if model.template else "completions"
        lines.append(f"  {model.name}: {what}, {model.reach:,} positions, step {model.opened.step:,}")
    if reward:
        lines.append(f"  {reward}: chooses among answers (best_of)")
    first = next(iter(models.values()))
    path, body = "completions", '{"prompt": "Once"}'
    if first.template:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    return "\n".join([*lines, f"try:  curl {address}/v1/{path}{key} -d '{body}'"])
