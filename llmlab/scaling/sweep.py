"""Runs a grid of settings of one experiment, a process each, and keeps one table of what came out.

The same command again skips what is done, tries again what failed, and goes on with what was interrupted.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from llmlab.core.errors import EXIT_STOPPED_AND_SAVED, StoppedAndSaved, UserError
from llmlab.core.paths import locked
from llmlab.scaling.grid import Grid, Settings
from llmlab.scaling.results import Result, best, measured, recorded, write_results
from llmlab.train.progress import clock
from llmlab.workdir.files import Workdir, forbidden_changes

POLL_SECONDS = 0.05
LOG_TAIL_BYTES = 16384

Check = Callable[[Settings], Mapping[str, Any] | None]
Runner = Callable[[Settings, Path], list[str]]


def run_sweep(
    config_argument: str,
    overrides: Sequence[str],
    grid: Grid,
    workdir: str | os.PathLike[str],
    *,
    check: Check | None = None,
    runner: Runner | None = None,
    parallel: int = 1,
    on_update: Callable[[list[Result]], None] | None = None,
    out: TextIO | None = None,
) -> list[Result]:
    """Runs every point of `grid` in `workdir/NAME`, and returns all results in the order of the grid.

    Args:
      overrides: flags that every run gets, `--config.run.steps=100`.
      check: refuses settings with a UserError, before anything runs; may return their resolved config as JSON values,
        which must then be the one that a folder already there was trained with. It must not start an accelerator,
        which the runs need for themselves.
      runner: the command for a run's settings and folder; by default `llmlab train`.
      parallel: runs at a time.
      on_update: called with all results after each change, once the table is written.

    Raises:
      UserError: settings that cannot work, or a folder that holds a run of another config.
      StoppedAndSaved: SIGTERM or Ctrl-C; the runs under way were told once, and have ended.
      KeyboardInterrupt: a second Ctrl-C; they were killed.
    """
    if parallel < 1:
        raise UserError(f"--parallel={parallel} should be at least 1 run at a time")
    folder, out = Path(workdir).expanduser().absolute(), out or sys.stderr
    settings = grid.settings()
    results = [Result(grid.name(each), folder / grid.name(each), each) for each in settings]
    _check_overrides(grid, overrides)
    for result in results:
        resolved = check(result.settings) if check else None
        if resolved is not None:
            _check_same_config(result.folder, resolved)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"--workdir={folder} cannot be made ({error.strerror}): choose another folder") from None
    runner = runner or (lambda each, run_folder: train_command(config_argument, overrides, each, run_folder))
    with locked(folder / ".sweep.lock", f"another sweep is running in {folder}: waiting for it to end"):
        earlier = recorded(folder)
        results = [_resumed(result, earlier.get(result.name, {})) for result in results]
        return _run_all(results, folder, runner, parallel, on_update, out)


def train_command(config_argument: str, overrides: Sequence[str], settings: Settings, folder: Path) -> list[str]:
    """The command of one run. Its own settings come last, so they win."""
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    train = [sys.executable, "-m", "llmlab", "train", f"--config={config_argument}"]
    return [*train, *overrides, *flags, f"--workdir={folder}"]


def _run_all(
    results: list[Result],
    folder: Path,
    runner: Runner,
    parallel: int,
    on_update: Callable[[list[Result]], None] | None,
    out: TextIO,
) -> list[Result]:
    def update() -> None:
        write_results(results, folder)
        if on_update:
            on_update(list(results))

    def say(i: int, text: str) -> None:
        print(f"run {i + 1}/{len(results)}  {results[i].name}  {text}", file=out, flush=True)

    for i, result in enumerate(results):
        if result.status == "done":
            say(i, f"was done before  {_scores(result)}")
    update()
    waiting = deque(i for i, result in enumerate(results) if result.status != "done")
    children: dict[int, Child] = {}
    with StopSignals() as stop:
        try:
            while children or (waiting and not stop.asked):
                while waiting and not stop.asked and len(children) < parallel:
                    i = waiting.popleft()
                    say(i, f"goes on after step {results[i].step}" if results[i].step else "starts")
                    children[i] = Child(runner(results[i].settings, results[i].folder), log_path(results[i]))
                    results[i] = dataclasses.replace(results[i], status="running", exit_code=None, error="")
                time.sleep(POLL_SECONDS)
                if stop.asked:
                    for child in children.values():
                        child.kill() if stop.at_once else child.tell()
                for i in [i for i, child in children.items() if child.ended()]:
                    results[i] = _ended(results[i], children.pop(i), stop.asked)
                    say(i, _summary(results[i], best(results)))
                    update()
        finally:
            for child in children.values():
                child.tell()
                child.wait()
    if stop.at_once:
        raise KeyboardInterrupt
    left = sum(result.status in ("waiting", "stopped") for result in results)
    if stop.asked and left:
        raise StoppedAndSaved(f"stopped with {left} of {len(results)} runs to do; the same command goes on from there")
    return results


class Child:
    """A run's process: in a session of its own, so that a Ctrl-C at the terminal reaches it only through `tell`."""

    def __init__(self, command: list[str], log: Path):
        self._log, self._told = log, False
        with open(log, "ab") as file:
            self._log_start = file.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},  # else stdout comes late, and hides the error line
            )
        self._started = time.monotonic()

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait()

    def seconds(self) -> float:
        """Since it started."""
        return time.monotonic() - self._started

    def tell(self) -> None:
        """Asks it, once, to save and leave: a second signal would mean at once."""
        if not self._told:
            self._told = True
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it and all its own processes at once."""
        if not self.ended():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def last_line(self) -> str:
        """The last line that it wrote."""
        with open(self._log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


class StopSignals:
    """A context in which SIGTERM and Ctrl-C only set `asked`, and a second Ctrl-C `at_once`."""

    def __init__(self) -> None:
        self.asked = self.at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.at_once or (self.asked and number == signal.SIGINT)
        self.asked = True


def log_path(result: Result) -> Path:
    """Where a run's output goes: beside its folder, which holds only what `llmlab train` puts there."""
    return result.folder.with_name(f"{result.name}.log")


def _ended(result: Result, child: Child, asked: bool) -> Result:
    code = child.wait()
    result = measured(
        dataclasses.replace(result, status="waiting", seconds=result.seconds + child.seconds(), exit_code=code)
    )
    if code == 0 and result.status == "done":
        return result
    if code == EXIT_STOPPED_AND_SAVED or (asked and code != 0):
        return dataclasses.replace(result, status="stopped")
    error = child.last_line() or (f"killed by signal {-code}" if code < 0 else f"exit code {code} without a word")
    return dataclasses.replace(result, status="failed", error=error)


def _resumed(result: Result, earlier: Mapping[str, Any]) -> Result:
    seconds, code = earlier.get("seconds", 0.0), earlier.get("exit_code")
    return measured(dataclasses.replace(result, seconds=seconds, exit_code=code))


def _check_overrides(grid: Grid, overrides: Iterable[str]) -> None:
    for override in overrides:
        key = override.lstrip("-").partition("=")[0].removeprefix("config.")
        if key in grid.values:
            raise UserError(f"{override} sets what --sweep={key}=… sweeps: leave one of them out")


def _check_same_config(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Results of another config are not this sweep's, even where a folder has the right name."""
    workdir = Workdir(folder)
    if not workdir.config.exists():
        return
    filled_in = () if resolved.get("model", {}).get("vocab_size", 0) else ("model.vocab_size",)  # by its tokenizer
    if changed := forbidden_changes(workdir.read_config()["config"], resolved, *filled_in):
        raise UserError(f"{folder} holds a run of another config ({'; '.join(changed)}): choose another --workdir")


def _scores(result: Result) -> str:
    scores = [("held-out loss", result.loss), ("bits/byte", result.bits_per_byte)]
    return "  ".join(f"{name} {value:.4f}" for name, value in scores if value is not None) or "no held-out loss"


def _summary(result: Result, best_so_far: Result | None) -> str:
    parts = [f"{result.status} after {clock(result.seconds)}"]
    parts.append(result.error if result.status == "failed" else _scores(result))
    if result.status == "stopped":
        parts[-1] = f"at step {result.step}"
    if best_so_far is not None and best_so_far.loss is not None:
        parts.append(f"(best so far: {best_so_far.name}, {best_so_far.loss:.4f})")
    return "  ".join(parts)
