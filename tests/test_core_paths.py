"""Whole files or none, a clear word when the disk is full, and a lock that a second process waits for."""

import errno
import os
import subprocess
import sys
import time

import pytest

from llmlab.core import paths
from llmlab.core.errors import DiskFull, UserError


def test_cache_root_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    assert paths.cache_root() == tmp_path
    monkeypatch.delenv("LLMLAB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_root() == tmp_path / ".cache/llmlab"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    paths.write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"no room left to write .*a\.json") as caught:
        paths.write_atomic(path, b"new")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    paths.write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_other_errors_stay_themselves(tmp_path):
    with pytest.raises(FileNotFoundError):
        paths.write_atomic(tmp_path / "no/such", b"")


def test_a_second_process_waits_for_the_lock(tmp_path, caplog):
    code = (
        "import sys, time; from llmlab.core.paths import locked\n"
        "with locked(sys.argv[1], ''):\n print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        import threading

        killer = threading.Timer(0.4, other.kill)
        killer.start()
        begin = time.monotonic()
        with paths.locked(tmp_path / "lock", "waiting for the other"):
            assert time.monotonic() - begin >= 0.3  # and the lock of a killed process is free at once
    finally:
        other.kill()
        other.communicate()
    assert "waiting for the other" in caplog.text


def test_a_file_system_without_locks_is_named(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(paths.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="has no locks"), paths.locked(tmp_path / "lock", ""):
        pass
