"""The folder of a run: where its files are, whose it is, and which config it belongs to."""

import errno
import fcntl
import fnmatch
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmlab import __version__
from llmlab.core.config import differences
from llmlab.core.errors import UserError
from llmlab.core.paths import clear_when_full, write_atomic

log = logging.getLogger(__name__)

# What may change between two starts of one run: it moves no weight, but for rounding.
MAY_CHANGE = (
    "run.log_every",
    "run.eval_every",
    "run.eval_batches",
    "run.sample_every",
    "run.sample_prompts",
    "run.sample_tokens",
    "run.checkpoint_every",
    "run.keep",
    "run.keep_every",
    "run.best",
    "run.tensorboard",
    "mesh.*",
    "data.workers",
    "data.cache_dir",
    "model.scan",
    "model.remat",
    "model.attention",
    "objective.logprobs",
)

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class Workdir:
    """The paths of a run's files, and its claim to the folder."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.model"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.report = self.path / "report.html"
        self._lock: int | None = None

    def claim(self, config: Mapping[str, Any], *allowed: str) -> None:
        """Makes the folder, if need be, and holds it for a run of this resolved config until `release`.

        One process calls this (process 0). The claim goes with the process, however that ends.
        `allowed`: patterns of keys that may have changed since the run began, beside those of `MAY_CHANGE`.

        Raises:
          UserError: it belongs to another config or to a running process, or cannot be written to.
        """
        try:
            self._check_config(config, *allowed)
            with clear_when_full(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--workdir={self.path} is, or lies in, a file: choose a folder") from None
        except OSError as error:
            if error.errno in _NOT_WRITABLE:
                reason = os.strerror(error.errno or 0).lower()
                raise UserError(f"--workdir={self.path} cannot be written to ({reason}): choose another") from None
            raise
        self._lock = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_config(config, *allowed)  # Another run may have come between.
        except BlockingIOError:
            self.release()
            raise UserError(f"another process is training in --workdir={self.path}: wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            log.warning("%s has no file locks: see that no two processes train in it", self.path)
        except UserError:
            self.release()
            raise

    def release(self) -> None:
        """Lets another run have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_config(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Writes config.json: the resolved config, what it runs on, and `facts` (the data's hash, the arguments)."""
        content = {"config": config, **environment(), **facts}
        write_atomic(self.config, json.dumps(content, indent=2).encode() + b"\n")

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote.

        Raises:
          UserError: there is no such folder, it is no workdir, or its config.json is torn.
        """
        if not self.path.is_dir():
            raise UserError(f"there is no workdir {self.path}: check the path, or make it with `llmlab train`")
        try:
            content = json.loads(self.config.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{self.path} is no workdir, it has no config.json: point to a folder that `llmlab train` made"
            ) from None
        except ValueError:
            content = None
        except OSError as error:
            raise UserError(f"{self.config} cannot be read: {error.strerror}") from None
        if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
            raise UserError(f"{self.config} is torn or no config: restore that file, or train into a new workdir")
        return content

    def _check_config(self, config: Mapping[str, Any], *allowed: str) -> None:
        if not self.config.exists():
            if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
                raise UserError(
                    f"--workdir={self.path} has checkpoints but no config.json: restore it, or choose another folder"
                )
            return
        if changed := forbidden_changes(self.read_config()["config"], config, *allowed):
            raise UserError(
                f"--workdir={self.path} belongs to a run of another config. Choose another folder (with "
                f"--init_from={self.path} to start from its weights), or undo, from what it has to what you ask:\n  "
                + "\n  ".join(changed)
            )


def forbidden_changes(there: Mapping[str, Any], here: Mapping[str, Any], *allowed: str) -> list[str]:
    """What differs between two resolved configs that may not differ between two starts of one run, a line each.

    `allowed`: patterns of keys that may differ here, beside those of `MAY_CHANGE`.
    """
    patterns = (*MAY_CHANGE, *allowed)
    return [
        line
        for line in differences(there, json.loads(json.dumps(here)))
        if not any(fnmatch.fnmatch(line.partition(":")[0], pattern) for pattern in patterns)
    ]


def environment() -> dict[str, Any]:
    """What the run runs on: versions, platform, devices, and the code's git revision (None outside a repository)."""
    import jax  # Here, because reports and sweeps read workdirs and need no jax.

    versions = {"python": platform.python_version(), "llmlab": __version__}
    versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    devices = jax.devices()
    kind = f"{devices[0].device_kind} ({devices[0].platform})"
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {kind}, {jax.process_count()} processes",
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit of this code, `-dirty` where files differ from it.

    Installed below a repository of something else (a `.venv` in a project), it is no part of what that one records.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    return tracked and _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
