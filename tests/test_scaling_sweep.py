import csv
import io
import json
import os
import signal
import sys
import threading
import time

import pytest

from llmlab.core.errors import StoppedAndSaved, UserError
from llmlab.scaling.grid import parse_sweep
from llmlab.scaling.sweep import run_sweep, train_command

# Trains nothing: writes the files that a run would, and does as its settings say.
TRAINER = """
import json, os, pathlib, signal, sys, time
folder, behaviour, width = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts", "a") as file:
    print(os.getpid(), file=file)
if behaviour == "fail":
    print("working", flush=True)
    print("ValueError: no such thing\\n", file=sys.stderr)
    sys.exit(2)
config = {"model": {"width": width, "vocab_size": 64}, "data": {"files": []}, "run": {"steps": 4, "log_every": 1}}
(folder / "config.json").write_text(json.dumps({"config": config, "parameters": 1000}))
metrics = folder / "metrics.jsonl"
seen = len(metrics.read_text().splitlines()) if metrics.exists() else 0
def told(number, frame):
    with open(folder / "signals", "a") as file:
        print(number, file=file)
    if behaviour == "deaf":
        return
    time.sleep(0.3)  # long enough for a second signal to be seen
    sys.exit(75)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
def log(row):
    with open(metrics, "a") as file:
        file.write(json.dumps(row) + "\\n")
for step in range(seen + 1, 5):
    log({"step": step, "tokens": 32 * step, "loss": 9 - step})
    if behaviour == "preempted" and step == 2 and not seen:
        sys.exit(75)
    if behaviour == "killed" and step == 2 and not seen:
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour in ("slow", "deaf") and step == 2 and not seen:
        (folder / "waiting").touch()
        time.sleep(60)
log({"step": 4, "eval/loss": 1000 / width, "eval/bits_per_byte": 500 / width})
"""


@pytest.fixture
def sweep(tmp_path):
    """Runs a sweep with the trainer above; the key `run.behaviour` says what a run does, and is done otherwise."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def run(text, **arguments):
        def runner(settings, folder):
            behaviour = settings.get("run.behaviour", "train")
            return [sys.executable, "-S", str(script), str(folder), behaviour, settings.get("model.width", "100")]

        out = io.StringIO()
        try:
            results = run_sweep(
                "x.py", [], parse_sweep(text), tmp_path / "sweep", **{"runner": runner, "out": out, **arguments}
            )
        finally:
            run.out = out.getvalue()
        return results

    run.folder = tmp_path / "sweep"
    return run


def starts(folder):
    return len((folder / "starts").read_text().splitlines()) if (folder / "starts").exists() else 0


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_point_runs_in_order_and_the_table_tells_what_came_out(sweep):
    results = sweep("model.width=100,200;run.seed=1")
    assert [result.name for result in results] == ["width=100,seed=1", "width=200,seed=1"]
    first, second = rows(sweep.folder)
    assert first["seconds"] >= 0
    del first["seconds"]
    assert first == {
        "run": "width=100,seed=1",
        "model.width": 100,
        "run.seed": 1,
        "status": "done",
        "step": 4,
        "steps": 4,
        "tokens": 128,
        "parameters": 1000,
        "loss": 10.0,
        "bits_per_byte": 5.0,
        "exit_code": 0,
        "error": "",
    }
    assert (second["loss"], second["model.width"]) == (5.0, 200)
    with open(sweep.folder / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["loss"] for row in table] == ["10.0", "5.0"]
    assert list(table[0]) == list(rows(sweep.folder)[0])
    assert "run 1/2  width=100,seed=1  starts" in sweep.out
    assert "best so far: width=200,seed=1, 5.0000" in sweep.out


def test_what_is_done_is_skipped_and_keeps_its_time(sweep):
    sweep("model.width=100,200")
    table = rows(sweep.folder)
    table[0]["seconds"] = 77.0
    (sweep.folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    results = sweep("model.width=100,200,300")
    assert [starts(result.folder) for result in results] == [1, 1, 1]
    assert [result.status for result in results] == ["done"] * 3
    assert results[0].seconds == 77.0
    assert "width=100  was done before  held-out loss 10.0000" in sweep.out


def test_a_run_that_fails_is_recorded_with_its_last_line_and_passed_over(sweep):
    results = sweep("run.behaviour=fail,train")
    assert [result.status for result in results] == ["failed", "done"]
    assert (results[0].exit_code, results[0].error) == (2, "ValueError: no such thing")
    assert rows(sweep.folder)[0]["error"] == "ValueError: no such thing"
    assert (sweep.folder / "behaviour=fail.log").read_text().startswith("working\n")
    again = sweep("run.behaviour=fail,train")
    assert [starts(result.folder) for result in again] == [2, 1]


@pytest.mark.parametrize("behaviour, status, code", [("preempted", "stopped", 75), ("killed", "failed", -9)])
def test_an_interrupted_run_goes_on_by_the_same_command(sweep, behaviour, status, code):
    (first,) = sweep(f"run.behaviour={behaviour}")
    assert (first.status, first.exit_code, first.step, first.loss) == (status, code, 2, None)
    (second,) = sweep(f"run.behaviour={behaviour}")
    assert (second.status, second.exit_code, second.step, second.loss) == ("done", 0, 4, 10.0)
    assert "goes on after step 2" in sweep.out
    assert second.seconds > first.seconds > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_sweep_and_tells_the_run_once(sweep, number):
    folder = sweep.folder / "behaviour=slow"
    before = signal.getsignal(number)
    _when(folder / "waiting", lambda: os.kill(os.getpid(), number))
    with pytest.raises(StoppedAndSaved, match="2 of 2 runs to do"):
        sweep("run.behaviour=slow,train")
    assert (folder / "signals").read_text() == f"{int(signal.SIGTERM)}\n"
    assert [(row["status"], row["exit_code"]) for row in rows(sweep.folder)] == [("stopped", 75), ("waiting", None)]
    assert signal.getsignal(number) is before
    assert [result.status for result in sweep("run.behaviour=slow,train")] == ["done", "done"]


def test_a_second_ctrl_c_kills(sweep):
    folder = sweep.folder / "behaviour=deaf"

    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        _wait_for(folder / "signals")
        os.kill(os.getpid(), signal.SIGINT)

    _when(folder / "waiting", twice)
    with pytest.raises(KeyboardInterrupt):
        sweep("run.behaviour=deaf")
    pid = int((folder / "starts").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_runs_share_the_machine_where_asked(sweep):
    seen = []
    sweep("model.width=100,200,300", parallel=2, on_update=lambda results: seen.append([r.status for r in results]))
    assert max(statuses.count("running") + statuses.count("done") for statuses in seen) == 3
    assert any(statuses.count("running") == 1 and "waiting" in statuses for statuses in seen)
    assert seen[-1] == ["done"] * 3


def test_the_page_is_drawn_after_the_table(sweep):
    seen = []
    sweep("model.width=100,200", on_update=lambda results: seen.append((rows(sweep.folder), results)))
    assert [[row["status"] for row in table] for table, _ in seen] == [
        ["waiting", "waiting"],
        ["done", "waiting"],
        ["done", "done"],
    ]
    assert all([result.row() for result in results] == table for table, results in seen)


def test_an_error_of_ours_leaves_no_run_behind(sweep):
    slow = sweep.folder / "behaviour=slow"

    def broken(results):
        if results[0].status == "failed":
            _wait_for(slow / "waiting")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep("run.behaviour=fail,slow", parallel=2, on_update=broken)
    assert (slow / "signals").read_text() == f"{int(signal.SIGTERM)}\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((slow / "starts").read_text()), 0)


def test_nothing_runs_before_every_setting_is_checked(sweep):
    def check(settings):
        if settings["model.width"] == "200":
            raise UserError("model.width=200 is not divided")

    with pytest.raises(UserError, match="not divided"):
        sweep("model.width=100,200", check=check)
    assert not sweep.folder.exists()


def test_a_folder_of_another_config_is_no_result_of_this_sweep(sweep):
    def resolved(**changes):
        model = {"width": 100.0, "vocab_size": changes.pop("vocab_size", 0)}
        return {"model": model, "data": {"files": ()}, "run": {"steps": 4, "log_every": 1} | changes}

    sweep("model.width=100")
    sweep("model.width=100", check=lambda _: resolved())
    sweep("model.width=100", check=lambda _: resolved(log_every=50))  # may change between two starts
    with pytest.raises(UserError, match=r"run\.steps: 4 -> 8"):
        sweep("model.width=100", check=lambda _: resolved(steps=8))
    with pytest.raises(UserError, match=r"model\.vocab_size: 64 -> 32"):
        sweep("model.width=100", check=lambda _: resolved(vocab_size=32))
    assert starts(sweep.folder / "width=100") == 1


@pytest.mark.parametrize(
    "overrides, arguments, message",
    [
        (["--config.model.width=64"], {}, "leave one of them out"),
        ([], {"parallel": 0}, "--parallel=0"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, overrides, arguments, message):
    with pytest.raises(UserError, match=message):
        run_sweep("x.py", overrides, parse_sweep("model.width=100,200"), tmp_path / "sweep", **arguments)
    assert not (tmp_path / "sweep").exists()


def test_a_file_in_the_way_and_a_broken_table_are_errors_of_one_line(sweep, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        run_sweep("x.py", [], parse_sweep("a.b=1"), tmp_path / "file")
    sweep.folder.mkdir()
    (sweep.folder / "results.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="is no table of results"):
        sweep("model.width=100")


def test_the_command_of_a_run_is_the_one_a_person_would_type(tmp_path):
    command = train_command("x.py:tiny", ["--config.run.steps=9"], {"model.width": "64", "run.best": ""}, tmp_path)
    assert command[1:] == [
        "-m",
        "llmlab",
        "train",
        "--config=x.py:tiny",
        "--config.run.steps=9",
        "--config.model.width=64",
        "--config.run.best=",
        f"--workdir={tmp_path}",
    ]


def _when(path, action):
    threading.Thread(target=lambda: (_wait_for(path), action()), daemon=True).start()


def _wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)
