import hashlib
import json

import pytest

from llmlab.workdir import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "a.bin").write_bytes(b"weights")
    (tmp_path / "d" / "b.bin").write_bytes(b"moments" * 1000)
    manifest.write(tmp_path, step=7, metrics={"eval/loss": 1.5}, arrays={"w": [[2, 3], "float32"]})
    return tmp_path


def test_it_holds_what_was_saved(folder):
    found = manifest.verify(folder)
    assert (found.step, found.metrics, found.arrays) == (7, {"eval/loss": 1.5}, {"w": [[2, 3], "float32"]})
    assert found.files == {
        "a.bin": [7, hashlib.sha256(b"weights").hexdigest()],
        "d/b.bin": [7000, hashlib.sha256(b"moments" * 1000).hexdigest()],
    }


def test_a_flipped_byte_is_found_by_its_hash_alone(folder):
    content = bytearray((folder / "d" / "b.bin").read_bytes())
    content[3500] ^= 1
    (folder / "d" / "b.bin").write_bytes(content)
    manifest.read(folder)
    with pytest.raises(manifest.Torn, match=r"b\.bin has changed"):
        manifest.verify(folder)


@pytest.mark.parametrize(
    "tear, says",
    [
        (lambda folder: (folder / "a.bin").unlink(), "has lost its file a.bin"),
        (lambda folder: (folder / "a.bin").write_bytes(b"weight"), "6 bytes instead of 7"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b""), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"[1]"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b'{"digest": ""}'), "cannot be read"),
    ],
)
def test_every_other_tear_is_found_without_reading_the_files(folder, tear, says):
    tear(folder)
    with pytest.raises(manifest.Torn, match=says):
        manifest.read(folder)


def test_a_manifest_that_still_parses_but_was_changed_is_torn(folder):
    content = json.loads((folder / "manifest.json").read_bytes())
    content["metrics"]["eval/loss"] = 0.5
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(manifest.Torn, match=r"manifest .* has changed"):
        manifest.read(folder)


def test_a_write_that_fails_leaves_no_manifest(folder, monkeypatch):
    (folder / "manifest.json").unlink()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Exception, match="no room left"):
        manifest.write(folder, step=7, metrics={}, arrays={})
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "d"]
