"""Real runs for the tests: `llmlab` as a process of its own, and what two runs have in common bit for bit."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from llmlab.workdir.checkpoints import good_steps, restore_subtree, saved_arrays
from llmlab.workdir.metrics import MetricsLog
from tests.experiments_for_tests import write_texts

ROOT = Path(__file__).parent.parent
EXPERIMENT = Path(__file__).parent / "experiments_for_tests.py"
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
VARYING = ("tokens_per_second", "mfu")


class Place:
    """A folder with the texts of the test experiment, and the cache that its runs share."""

    def __init__(self, folder: Path, devices: int = 1):
        self.folder, self.cache = folder, folder / "cache"
        self.config = f"--config={EXPERIMENT}:{write_texts(folder / 'texts')}"
        self._environment = os.environ | {
            "LLMLAB_CACHE": str(self.cache),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILE}",
        }

    def start(self, verb: str, *arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "llmlab", verb, self.config, *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def train(self, workdir: Path, *arguments: str, expect: int = 0, **environment: str) -> str:
        """Trains to the end of the process; what it said on stderr."""
        process = self.start("train", f"--workdir={workdir}", *arguments, **environment)
        _, error = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit code {process.returncode}\n{error}"
        return error


def rows(workdir: Path) -> list[dict]:
    """The metrics, without what a clock says."""
    found = MetricsLog(workdir / "metrics.jsonl").rows()
    return [{key: value for key, value in row.items() if key not in VARYING} for row in found]


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: weights, moments, EMA, counts."""
    saved = saved_arrays(workdir / "checkpoints", step)
    wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in saved.items()}
    return {name: np.asarray(x) for name, x in restore_subtree(workdir / "checkpoints", step, wanted).items()}


def assert_same_run(mine: Path, reference: Path) -> None:
    """The same metrics, each step once, and the same last state, bit for bit."""
    assert rows(mine) == rows(reference)
    assert good_steps(mine / "checkpoints")[-1] == good_steps(reference / "checkpoints")[-1]
    last = good_steps(reference / "checkpoints")[-1]
    ours, theirs = arrays(mine, last), arrays(reference, last)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("ema.") for name in ours)
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), f"{name} is another than in the run never stopped"


def wait_until(what: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Polls until `what()` holds, or `process` has ended, or time is out."""
    end = time.monotonic() + seconds
    while not what() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def steps_logged(workdir: Path) -> int:
    """The newest step in the metrics, 0 without any."""
    path = workdir / "metrics.jsonl"
    return max((row["step"] for row in MetricsLog(path).rows()), default=0) if path.exists() else 0


def end(process: subprocess.Popen, number: signal.Signals) -> tuple[int, str]:
    """Sends a signal; exit code and stderr."""
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    return process.returncode, error
