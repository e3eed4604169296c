"""Two real processes of two fake devices each, over gloo: one run, one end, whoever is told to stop or fails."""

import copy
import json
import math
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from llmlab.workdir.checkpoints import good_steps
from tests import stages_for_tests
from tests.runs import Place, arrays, rows, steps_logged, wait_until
from tests.stages_for_tests import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("pair"), devices=2)


@pytest.fixture(scope="module")
def alone(pair):
    """The same texts and cache, one process of one device."""
    return Place(pair.folder)


@pytest.fixture(scope="module")
def reference(alone):
    """30 AdamW steps at learning rate 1e-3 on one device."""
    workdir = alone.folder / "reference"
    alone.train(workdir, *THIRTY)
    return workdir


THIRTY = ("--config.run.steps=30", "--config.run.eval_every=10", "--config.run.checkpoint_every=15")
ENDLESS = ("--config.run.steps=100000", "--config.run.eval_every=0", "--config.run.checkpoint_every=0")


def start_two(place, verb, *arguments, second=None):
    """Both processes; `second` replaces the arguments of the second."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = (f"--coordinator=localhost:{port}", "--processes=2")
    given = (arguments, arguments if second is None else second)
    return [place.start(verb, *given[i], *flags, f"--process_id={i}") for i in range(2)]


def end_of(processes, seconds=240):
    """(exit code, stdout, stderr) of each."""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def train_two(place, workdir, *arguments):
    for code, _, error in end_of(start_two(place, "train", f"--workdir={workdir}", *arguments)):
        assert code == 0, error


def losses(workdir):
    return [row["loss"] for row in rows(workdir) if "loss" in row]


def test_two_processes_train_the_same_run_as_one(pair, reference):
    workdir = pair.folder / "two"
    train_two(pair, workdir, *THIRTY)
    assert len(losses(workdir)) == 30
    assert losses(workdir) == pytest.approx(losses(reference), rel=1e-5)
    evaluated = [[row["eval/loss"] for row in rows(w) if "eval/loss" in row] for w in (workdir, reference)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
    assert "2 processes" in json.loads((workdir / "config.json").read_text())["devices"]
    # Each step once: the second process writes nothing.
    assert [row["step"] for row in rows(workdir) if "loss" in row] == list(range(1, 31))


def test_two_processes_prefer_as_one_does(pair, alone):
    """What the reference thinks of the answers is computed by both, and kept once."""
    folder = write_rows(pair.folder / "answers")

    def at(place, stage):
        place = copy.copy(place)
        place.config = f"--config={Path(stages_for_tests.__file__)}:{stage},{folder}"
        return place

    at(alone, "sft").train(folder / "sft")
    from_sft = f"--init_from={folder / 'sft'}"
    train_two(at(pair, "dpo"), folder / "two", from_sft)
    at(alone, "dpo").train(folder / "one", from_sft)
    assert losses(folder / "two") == pytest.approx(losses(folder / "one"), rel=1e-5)
    assert losses(folder / "one")[0] == pytest.approx(math.log(2), rel=1e-5)
    kept = [sorted((folder / name / "reference").glob("*/logp.bin")) for name in ("two", "one")]
    assert [path.parent.name for path in kept[0]] == [path.parent.name for path in kept[1]]
    assert len(kept[0]) == 2  # what is trained on, and what is held out
    for two, one in zip(*kept, strict=True):
        np.testing.assert_allclose(np.fromfile(two, "<f4"), np.fromfile(one, "<f4"), rtol=1e-5)


@pytest.mark.parametrize("first_two", [True, False], ids=["two then one", "one then two"])
def test_what_two_processes_saved_one_goes_on_from_and_the_other_way_round(pair, alone, reference, first_two):
    workdir = pair.folder / f"moved-{first_two}"
    stopped = _stop(pair if first_two else alone, workdir, first_two)
    if first_two:
        error = alone.train(workdir, *LONGER)
    else:
        processes = start_two(pair, "train", f"--workdir={workdir}", *LONGER)
        (code, _, error), (other, _, _) = end_of(processes)
        assert (code, other) == (0, 0), error
    assert f"going on from step {stopped} " in error
    assert len(losses(workdir)) == 200
    assert losses(workdir)[:30] == pytest.approx(losses(reference), rel=1e-5)


LONGER = ("--config.run.steps=200", "--config.run.eval_every=0", "--config.run.checkpoint_every=0")


def _stop(place, workdir, two):
    """Starts the long run, stops it on its way, and gives the step that it saved."""
    flags = (f"--workdir={workdir}", *LONGER)
    processes = start_two(place, "train", *flags) if two else [place.start("train", *flags)]
    wait_until(lambda: steps_logged(workdir) >= 3, processes[0])
    processes[-1].send_signal(signal.SIGTERM)
    for code, _, error in end_of(processes):
        assert code == 75, error
    (saved,) = good_steps(workdir / "checkpoints")
    assert saved < 200
    return saved


@pytest.mark.parametrize("told", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_stops_both_at_one_step(pair, told, number):
    workdir = pair.folder / f"told-{told}-{number.name}"
    processes = start_two(pair, "train", f"--workdir={workdir}", *ENDLESS)
    wait_until(lambda: steps_logged(workdir) >= 3, processes[0])
    processes[told].send_signal(number)
    ended = end_of(processes, seconds=60)
    (saved,) = good_steps(workdir / "checkpoints")
    for code, _, error in ended:
        assert code == 75, error
        assert f"stopped at step {saved} of 100000" in error
    assert int(arrays(workdir, saved)["step"]) == saved
    assert steps_logged(workdir) == saved > 0


def test_check_passes_on_two_processes(pair):
    shared = pair.folder / "check"
    for code, _, error in end_of(start_two(pair, "check", f"--workdir={shared}")):
        assert code == 0, error
    assert list(shared.iterdir()) == []


def test_a_mistake_that_only_one_sees_ends_both(pair, tmp_path):
    workdir = tmp_path / "run"
    flags = (f"--workdir={workdir}", *THIRTY)
    missing = (*flags, "--config.data.source=text", f"--config.data.files=('{tmp_path}/missing.txt',)")
    missing = (*missing, "--config.data.mixture=()")
    processes = start_two(pair, "train", *flags, second=missing)
    began = time.monotonic()
    (first, _, of_first), (second, _, of_second) = end_of(processes)
    assert (first, second) == (2, 2), of_first + of_second
    assert "missing.txt" in of_second
    assert "process 1 stopped: its own message says why" in of_first
    assert time.monotonic() - began < 90
    assert not (workdir / "config.json").exists()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_that_dies_takes_the_other_with_it(pair, tmp_path, dies):
    workdir = tmp_path / "run"
    processes = start_two(pair, "train", f"--workdir={workdir}", *ENDLESS)
    wait_until(lambda: steps_logged(workdir) >= 3, processes[0])
    processes[dies].kill()
    other = processes[1 - dies]
    _, error = other.communicate(timeout=60)
    assert other.returncode != 0
    assert "another process of this run has ended" in error or "another task died" in error
    processes[dies].communicate()
