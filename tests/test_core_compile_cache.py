import json
import zlib

import pytest
import zstandard

from llmlab.core.compile_cache import LEDGER, look_over

PAYLOAD = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "jit_zstd-cache").write_bytes(zstandard.ZstdCompressor().compress(PAYLOAD))
    (tmp_path / "jit_zlib-cache").write_bytes(zlib.compress(PAYLOAD))
    return tmp_path


def entries(folder):
    return sorted(path.name for path in folder.glob("*-cache"))


def test_whole_entries_stay_and_are_noted(folder):
    look_over(folder)
    assert entries(folder) == ["jit_zlib-cache", "jit_zstd-cache"]
    assert sorted(json.loads((folder / LEDGER).read_bytes())) == entries(folder)


@pytest.mark.parametrize("name", ["jit_zstd-cache", "jit_zlib-cache"])
@pytest.mark.parametrize("size", [0, 3, 30])
def test_an_entry_cut_short_is_removed_before_it_was_ever_noted(folder, name, size):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])
    look_over(folder)
    assert entries(folder) == sorted({"jit_zlib-cache", "jit_zstd-cache"} - {name})


def test_an_entry_that_still_unpacks_but_has_changed_is_removed(folder):
    look_over(folder)
    (folder / "jit_zstd-cache").write_bytes(zstandard.ZstdCompressor().compress(PAYLOAD[::-1]))
    look_over(folder)
    assert entries(folder) == ["jit_zlib-cache"]
    assert list(json.loads((folder / LEDGER).read_bytes())) == ["jit_zlib-cache"]


def test_an_entry_touched_but_not_changed_stays(folder):
    look_over(folder)
    (folder / "jit_zstd-cache").write_bytes((folder / "jit_zstd-cache").read_bytes())
    look_over(folder)
    assert len(entries(folder)) == 2


@pytest.mark.parametrize("torn", [b"", b'{"jit_zst', b"[]"])
def test_a_torn_ledger_is_written_anew(folder, torn):
    look_over(folder)
    whole = (folder / LEDGER).read_bytes()
    (folder / LEDGER).write_bytes(torn)
    look_over(folder)
    assert json.loads((folder / LEDGER).read_bytes()) == json.loads(whole)


def test_no_folder_is_no_error(tmp_path):
    look_over(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
