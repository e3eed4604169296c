import errno
import json
import os

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from llmlab.core.errors import DiskFull, UserError
from llmlab.workdir.metrics import MetricsLog, TensorBoardLog


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append({"step": step, "loss": 1 / step})
    return log


def test_a_row_is_on_disk_when_append_returns_and_keeps_every_bit(log):
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, "loss": 1 / s} for s in (10, 20, 30)]


def test_what_is_not_finite_is_null_in_strict_json(log):
    log.append({"step": 40, "loss": float("nan"), "grad_norm": np.float32("inf"), "count": np.int64(3)})
    last = log.path.read_text().splitlines()[-1]
    strict = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 40, "loss": None, "grad_norm": None, "count": 3}


def test_rows_past_a_restored_step_go(log):
    log.append({"step": 20, "eval/loss": 2.0})
    log.truncate_after(20)
    assert log.rows() == [{"step": 10, "loss": 0.1}, {"step": 20, "loss": 0.05}, {"step": 20, "eval/loss": 2.0}]
    log.append({"step": 21, "loss": 9.0})
    assert [row["step"] for row in MetricsLog(log.path).rows()] == [10, 20, 20, 21]


@pytest.mark.parametrize("half", [b'{"step": 40, "lo', b'{"step": 40, "loss": 1.0}', b"\x00\x00", b"{"])
def test_half_a_row_is_no_row_and_never_grows_together_with_the_next(log, half):
    with open(log.path, "ab") as file:
        file.write(half)
    log.close()
    again = MetricsLog(log.path)
    assert [row["step"] for row in again.rows()] == [10, 20, 30]
    again.append({"step": 50, "loss": 0.5})
    assert [row["step"] for row in again.rows()] == [10, 20, 30, 50]
    again.truncate_after(20)
    assert [row["step"] for row in again.rows()] == [10, 20]


def test_has_finds_a_step_and_a_prefix(log):
    log.append({"step": 30, "eval/loss": 1.0})
    assert log.has(30, "eval/")
    assert not log.has(20, "eval/")
    assert not log.has(31, "eval/")


def test_a_run_that_logged_nothing_has_no_rows(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(0)
    assert log.rows() == []
    assert not log.path.exists()


def test_a_broken_line_in_the_middle_is_named(log):
    log.path.write_bytes(log.path.read_bytes().replace(b'{"step": 20', b'"step": 20'))
    with pytest.raises(UserError, match="line 2"):
        log.rows()


def test_a_full_disk_takes_half_a_line_back(log, monkeypatch):
    before, write = log.path.read_bytes(), os.write
    calls = []

    def half_then_full(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(DiskFull, match=r"metrics\.jsonl"):
        log.append({"step": 40, "loss": 0.1})
    monkeypatch.undo()
    assert len(calls) == 2
    assert log.path.read_bytes() == before
    log.append({"step": 40, "loss": 0.1})
    assert [row["step"] for row in log.rows()] == [10, 20, 30, 40]


def test_tensorboard_gets_the_numbers_of_every_row(tmp_path):
    log = TensorBoardLog(tmp_path / "tensorboard", purge_step=5)
    log.append({"step": 7, "loss": 1.25, "name": "text", "missing": None})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = []
    with open(path, "rb") as file:
        while header := file.read(12):
            event = event_pb2.Event()
            event.ParseFromString(file.read(int.from_bytes(header[:8], "little")))
            file.read(4)
            events.append(event)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(7, "loss", 1.25)]
    assert [e.step for e in events if e.HasField("session_log")] == [5]
