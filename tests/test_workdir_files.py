import errno
import json
import os
import subprocess
import sys

import jax
import pytest

from llmlab.core.config import to_json
from llmlab.core.errors import DiskFull, UserError
from llmlab.core.mesh import MeshConfig
from llmlab.train.config import Experiment, RunConfig
from llmlab.workdir import files
from llmlab.workdir.files import MAY_CHANGE, Workdir

CONFIG = {
    "model": {"width": 64, "pattern": ("global",), "vocab_size": 300},
    "optimizer": {"learning_rate": 1e-3},
    "mesh": to_json(MeshConfig()),
    "run": {"steps": 100, "log_every": 10},
}


def changed(section, **values):
    return CONFIG | {section: CONFIG[section] | values}


@pytest.fixture
def workdir(tmp_path):
    workdir = Workdir(tmp_path / "runs" / "one")
    workdir.claim(CONFIG)
    workdir.write_config(CONFIG, {"data": "abc", "arguments": ["--seed", "3"]})
    yield workdir
    workdir.release()


def test_config_json_says_what_ran_and_on_what(workdir):
    content = json.loads(workdir.config.read_bytes())
    assert content["config"] == json.loads(json.dumps(CONFIG))
    assert (content["data"], content["arguments"]) == ("abc", ["--seed", "3"])
    assert content["versions"]["jax"] == jax.__version__
    assert content["devices"].startswith("8 x cpu")
    assert set(content) == {"config", "versions", "platform", "devices", "git", "data", "arguments"}


def test_the_git_revision_marks_changed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert files.environment()["git"] is None
    for name in ("a", "files.py"):
        (tmp_path / name).write_text("1")
    who = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "a"], [*who, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert files.environment()["git"] is None  # the revision of something else, into which this code was installed
    for command in (["add", "files.py"], [*who, "commit", "-qm", "b"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    revision = files.environment()["git"]
    assert len(revision) == 40
    (tmp_path / "a").write_text("2")
    assert files.environment()["git"] == revision + "-dirty"


def test_the_same_config_goes_on(workdir):
    workdir.release()
    again = Workdir(workdir.path)
    again.claim(CONFIG)
    again.release()


def test_what_moves_no_weight_may_change(workdir):
    workdir.release()
    workdir.claim(changed("run", log_every=1) | {"mesh": to_json(MeshConfig(data=2, tensor=2))})


@pytest.mark.parametrize(
    "section, values, line",
    [
        ("optimizer", {"learning_rate": 3e-3}, "optimizer.learning_rate: 0.001 -> 0.003"),
        ("run", {"steps": 200, "log_every": 1}, "run.steps: 100 -> 200"),
        ("model", {"window": 8}, "model.window: '(absent)' -> 8"),
    ],
)
def test_another_config_is_refused_with_what_differs(workdir, section, values, line):
    workdir.release()
    with pytest.raises(UserError) as caught:
        Workdir(workdir.path).claim(changed(section, **values))
    first, *rest = str(caught.value).splitlines()
    assert "belongs to a run of another config" in first
    assert rest == [f"  {line}"]


def test_every_key_that_may_change_exists():
    leaves = json.dumps([f"{s}.{k}" for s, c in to_json(_defaults()).items() for k in c])
    for pattern in MAY_CHANGE:
        assert pattern.rstrip("*") in leaves, pattern


def _defaults():
    from llmlab.data.config import DataConfig
    from llmlab.model.config import ModelConfig
    from llmlab.objective import NextTokenConfig
    from llmlab.train.optimizer import OptimizerConfig

    return Experiment(ModelConfig(), DataConfig(), NextTokenConfig(), OptimizerConfig(), MeshConfig(), RunConfig())


def test_one_run_at_a_time(workdir):
    with pytest.raises(UserError, match="another process is training"):
        Workdir(workdir.path).claim(CONFIG)
    workdir.release()
    other = Workdir(workdir.path)
    other.claim(CONFIG)
    other.release()


def test_a_killed_process_leaves_no_lock(workdir):
    workdir.release()
    code = f"import fcntl, os; fcntl.flock(os.open({str(workdir.path / '.lock')!r}, os.O_RDWR), fcntl.LOCK_EX)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "; print('held', flush=True); import time; time.sleep(60)"],
        stdout=subprocess.PIPE,
    )
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is training"):
            workdir.claim(CONFIG)
        holder.kill()
        holder.wait()
    workdir.claim(CONFIG)


@pytest.mark.parametrize("inside", ["", "inside"])
def test_a_file_is_no_workdir(tmp_path, inside):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"is, or lies in, a file"):
        Workdir(tmp_path / "file" / inside).claim(CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"cannot be written to \({os.strerror(number).lower()}\)"):
        Workdir(tmp_path).claim(CONFIG)


def test_a_full_disk_is_told_from_that(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DiskFull):
        Workdir(tmp_path).claim(CONFIG)


def test_checkpoints_of_an_unknown_config_are_not_gone_on_from(workdir):
    workdir.release()
    workdir.config.unlink()
    workdir.claim(CONFIG)
    workdir.release()
    (workdir.checkpoints / "10").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has checkpoints but no config\.json"):
        workdir.claim(CONFIG)


@pytest.mark.parametrize("content", ["", '{"config": {"mod', "[]", '{"config": 3}', "\x00" * 40])
def test_a_torn_config_is_named(workdir, content):
    workdir.config.write_text(content)
    with pytest.raises(UserError, match=r"config\.json is torn"):
        workdir.read_config()
    workdir.release()
    with pytest.raises(UserError, match=r"config\.json is torn"):
        workdir.claim(CONFIG)


def test_no_workdir_is_told_from_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match="there is no workdir"):
        Workdir(tmp_path / "none").read_config()
    with pytest.raises(UserError, match=r"has no config\.json"):
        Workdir(tmp_path).read_config()
