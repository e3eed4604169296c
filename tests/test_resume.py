"""A run that is stopped, however rudely, and goes on is the run that was never stopped, bit for bit."""

import random
import re
import signal
import time
from functools import partial

import jax
import pytest

from llmlab.cli import run
from llmlab.workdir.checkpoints import good_steps
from llmlab.workdir.metrics import MetricsLog
from tests.experiments_for_tests import write_texts
from tests.runs import EXPERIMENT, Place, arrays, assert_same_run, end, rows, steps_logged, wait_until

KILLS = 20
STEPS = 600


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains in this process, on eight devices; gives the exit code."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    config = f"--config={EXPERIMENT}:{write_texts(tmp_path / 'texts')}"
    settings = ("data.batch_size=16", "run.steps=12", "run.eval_every=4", "run.checkpoint_every=5")
    flags = [config, *(f"--config.{setting}" for setting in settings)]
    before = jax.config.jax_compilation_cache_dir
    yield lambda workdir: run(["llmlab", "train", *flags, f"--workdir={workdir}"])
    jax.config.update("jax_compilation_cache_dir", before)


def test_stopped_half_way_and_continued_is_the_same_run(train, tmp_path, monkeypatch, capsys):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole) == 0
    append = MetricsLog.append

    def signal_at_seven(self, row):
        append(self, row)
        if row["step"] == 7 and "loss" in row:
            signal.raise_signal(signal.SIGTERM)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", signal_at_seven)
        assert train(halves) == 75
    # The row of step 7 is written once step 8 was started: 8 is the state at hand.
    assert "stopped at step 8 of 12" in capsys.readouterr().err
    assert good_steps(halves / "checkpoints") == [5, 8]
    assert train(halves) == 0
    assert "going on from step 8" in capsys.readouterr().err
    steps = [row["step"] for row in rows(halves) if "loss" in row]
    assert steps == list(range(1, 13))
    assert_same_run(halves, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_nothing(tmp_path):
    place, rng = Place(tmp_path), random.Random(0)
    flags = [f"--config.run.steps={STEPS}", "--config.run.eval_every=100"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    place.train(whole, *flags)
    assert [row["step"] for row in rows(whole) if "loss" in row] == list(range(1, STEPS + 1))

    committed, torn_saves = 0, 0
    for kill in range(KILLS):
        log = _file_number(killed / "metrics.jsonl")
        process = place.start("train", f"--workdir={killed}", *flags)
        # A run that goes on writes its log anew, without the rows past the checkpoint: from then on it is in its loop.
        wait_until(partial(_is_past, killed, committed, log), process)
        time.sleep(rng.random() * 0.15)
        if kill % 2:
            wait_until(partial(_uncommitted, killed), process)
        hard = rng.random() < 0.7
        code, error = end(process, signal.SIGKILL if hard else signal.SIGTERM)
        assert code == (-signal.SIGKILL if hard else 75), f"kill {kill} did not land in the run: {code}\n{error}"
        if committed:
            assert re.search(rf"going on from step {committed} ", error), error
        torn_saves += hard and _uncommitted(killed)
        found = good_steps(killed / "checkpoints")
        assert not committed or found[-1] >= committed, "a committed checkpoint was lost"
        committed = found[-1] if found else 0
        # Rows past the checkpoint will be logged again; those before it are all there, each once.
        steps = [row["step"] for row in rows(killed) if "loss" in row]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= committed
    assert committed < STEPS - 5, "the run was over before the kills were"
    assert torn_saves >= 3, "too few of the kills landed in a save"
    place.train(killed, *flags)
    assert_same_run(killed, whole)


def _file_number(path) -> int:
    return path.stat().st_ino if path.exists() else 0


def _is_past(workdir, step, log) -> bool:
    """Whether a run with another log than that has logged more than `step`."""
    return _file_number(workdir / "metrics.jsonl") != log and steps_logged(workdir) > step


def _uncommitted(workdir) -> bool:
    """Whether a save is under way or was cut short."""
    folders = (workdir / "checkpoints").glob("*")
    return any(not (folder / "manifest.json").exists() for folder in folders)


@pytest.mark.slow
def test_ctrl_c_saves_and_a_second_one_leaves_at_once(tmp_path):
    place, workdir = Place(tmp_path), tmp_path / "run"
    # Large enough that its save is still under way when the second Ctrl-C comes.
    flags = [f"--workdir={workdir}", "--config.run.steps=100000", "--config.run.checkpoint_every=0"]
    flags += ["--config.run.eval_every=0", "--config.model.width=512"]
    process = place.start("train", *flags)
    wait_until(lambda: steps_logged(workdir) >= 3, process)
    code, error = end(process, signal.SIGINT)
    assert code == 75, error
    (saved,) = good_steps(workdir / "checkpoints")
    assert f"stopped at step {saved} of 100000" in error
    assert "Ctrl-C again leaves at once" in error
    assert "Traceback" not in error

    process = place.start("train", *flags)
    wait_until(lambda: steps_logged(workdir) >= saved + 3, process)
    process.send_signal(signal.SIGINT)
    said = ""
    while "Ctrl-C again" not in said:
        said += process.stderr.readline()
    began = time.monotonic()
    code, error = end(process, signal.SIGINT)
    assert code == 130, said + error
    assert time.monotonic() - began < 2
    assert "left at once" in error
    assert good_steps(workdir / "checkpoints") == [saved]
    assert int(arrays(workdir, saved)["step"]) == saved
