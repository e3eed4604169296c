"""A disk that is really full: one line, exit code 74, and with room again the same command ends as it would have."""

import os
import subprocess
from pathlib import Path

import pytest

from llmlab.workdir.checkpoints import good_steps
from tests.runs import Place, assert_same_run, rows, steps_logged

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# No checkpoint but the last: what fills the disk is chosen by each test.
FLAGS = ("--config.run.steps=30", "--config.run.eval_every=10")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place):
    """The run that never met a full disk; it also fills the cache."""
    place.train(place.folder / "whole", *FLAGS)
    return place.folder / "whole"


@pytest.fixture
def disk(small_disk):
    return small_disk("64m")


def leave_room(disk: Path, size: int) -> None:
    """Fills the disk, but for so many bytes."""
    hog = disk / "hog"
    hog.unlink(missing_ok=True)
    free = os.statvfs(disk)
    with open(hog, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - size)


def make_room(disk: Path) -> None:
    """A larger disk, as an administrator would give."""
    (disk / "hog").unlink()
    subprocess.run(["mount", "-o", "remount,size=128m", disk], check=True)


def one_line(error: str) -> str:
    """The one line that says why it stopped; no traceback."""
    assert "Traceback" not in error, error
    (line,) = [line for line in error.splitlines() if line.startswith("llmlab train: ")]
    assert "no room left" in line or "no space left" in line
    assert "run the same command again" in line
    return line


def test_while_tokenising(place, whole, disk):
    workdir, cache = disk.parent / "run", disk / "cache"
    environment = {"LLMLAB_CACHE": str(cache)}
    leave_room(disk, 16 << 10)
    error = place.train(workdir, *FLAGS, expect=74, **environment)
    assert str(cache) in one_line(error)
    assert not list(cache.rglob("manifest.json"))
    make_room(disk)
    place.train(workdir, *FLAGS, **environment)
    assert_same_run(workdir, whole)


def test_while_saving(place, whole, disk):
    workdir = disk / "run"
    # Room for one checkpoint, its folders and the log, not for a second.
    leave_room(disk, _size(whole / "checkpoints") // 2 * 3 // 2)
    error = place.train(workdir, *FLAGS, expect=74)
    assert "checkpoints" in one_line(error)
    saved = good_steps(workdir / "checkpoints")
    assert [folder.name for folder in (workdir / "checkpoints").iterdir()] == [str(step) for step in saved]
    make_room(disk)
    error = place.train(workdir, *FLAGS)
    assert not saved or f"going on from step {saved[-1]} " in error
    assert_same_run(workdir, whole)


def test_while_logging(place, whole, disk):
    workdir, logs = disk.parent / "run", disk / "logs"
    workdir.mkdir()
    logs.mkdir()
    (workdir / "metrics.jsonl").symlink_to(logs / "metrics.jsonl")
    leave_room(disk, 4 << 10)
    error = place.train(workdir, *FLAGS, expect=74)
    assert "metrics.jsonl" in one_line(error)
    logged = steps_logged(workdir)
    assert 0 < logged < 30
    assert [row["step"] for row in rows(workdir) if "loss" in row] == list(range(1, logged + 1))
    make_room(disk)
    place.train(workdir, *FLAGS)
    assert_same_run(workdir, whole)


@pytest.mark.parametrize("damage", ["cut short", "garbled", "empty"])
def test_a_torn_compilation_cache_is_survived_and_mended(place, whole, tmp_path, damage):
    compiled = place.cache / "compiled"
    entries = sorted(compiled.glob("*-cache"))
    assert entries
    before = {path: path.read_bytes() for path in entries}
    for path, content in before.items():
        middle = len(content) // 2
        garbled = (
            content[:middle] + bytes(byte ^ 0x5A for byte in content[middle : middle + 64]) + content[middle + 64 :]
        )
        path.write_bytes({"cut short": content[:middle], "garbled": garbled, "empty": b""}[damage])
    error = place.train(tmp_path / "run", *FLAGS)
    assert "removed a torn entry of the compilation cache" in error
    assert "Error reading persistent compilation cache" not in error
    assert_same_run(tmp_path / "run", whole)
    mended = sorted(compiled.glob("jit_step-*-cache"))
    assert mended == [path for path in entries if path.name.startswith("jit_step-")] != []
    assert all(path.stat().st_size > 0.9 * len(before[path]) for path in mended)
    assert "torn" not in place.train(tmp_path / "again", *FLAGS)


def test_a_full_disk_under_the_compilation_cache_is_no_reason_to_stop(place, whole, disk):
    cache = disk / "cache"
    place.train(disk.parent / "first", *FLAGS, LLMLAB_CACHE=str(cache))
    for path in (cache / "compiled").iterdir():
        path.unlink()
    leave_room(disk, 24 << 10)
    place.train(disk.parent / "second", *FLAGS, LLMLAB_CACHE=str(cache))
    assert_same_run(disk.parent / "second", whole)
    make_room(disk)
    place.train(disk.parent / "third", *FLAGS, LLMLAB_CACHE=str(cache))
    assert_same_run(disk.parent / "third", whole)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
