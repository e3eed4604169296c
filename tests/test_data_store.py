"""Token files give back what was appended, go on after a stop, and never pass for good when they are not."""

import errno
import json
import os

import numpy as np
import pytest

from llmlab.core.errors import DiskFull
from llmlab.data import store
from llmlab.data.store import Encoded, StoreWriter, TokenStore, TornError

DOCUMENTS = [[1, 5, 6, 2], [1, 2], [1, 70_000, 2]]


def append(writer, documents):
    tokens = np.concatenate([np.array(d, np.uint32) for d in documents])
    sizes = np.array([len(d) for d in documents])
    writer.append(Encoded(tokens, sizes, 10 * sizes))


def written(path, documents=DOCUMENTS, dtype="<u4"):
    writer = StoreWriter(path, np.dtype(dtype))
    (path / store.TOKENIZER).write_bytes(b"a tokenizer")
    append(writer, documents)
    writer.finish(fingerprint="f")
    writer.close()
    return TokenStore.open(path)


def test_documents_come_back(tmp_path):
    found = written(tmp_path)
    assert [found.document(i).tolist() for i in range(len(found))] == DOCUMENTS
    assert found.lengths.tolist() == [4, 2, 3]
    assert found.text_bytes.tolist() == [40, 20, 30]
    counts = {key: found.manifest[key] for key in ("documents", "tokens", "text_bytes", "fingerprint")}
    assert counts == {"documents": 3, "tokens": 9, "text_bytes": 90, "fingerprint": "f"}
    assert not (tmp_path / store.PROGRESS).exists()


def test_small_vocabularies_take_two_bytes_a_token(tmp_path):
    found = written(tmp_path, [[1, 65_535, 2]], "<u2")
    assert (tmp_path / store.TOKENS).read_bytes() == b"\x01\x00\xff\xff\x02\x00"
    assert found.document(0).tolist() == [1, 65_535, 2]


@pytest.mark.parametrize("stopped_by", ["before_commit", "torn_tail"])
def test_a_writer_goes_on_from_the_last_commit(tmp_path, stopped_by):
    writer = StoreWriter(tmp_path, np.dtype("<u4"))
    append(writer, DOCUMENTS[:1])
    writer.commit()
    append(writer, [[9, 9, 9]])
    writer.close()
    if stopped_by == "torn_tail":
        with open(tmp_path / store.TOKENS, "ab") as file:
            file.write(b"\x07")
    (tmp_path / store.TOKENIZER).touch()
    with pytest.raises(TornError):
        TokenStore.open(tmp_path)
    writer = StoreWriter(tmp_path, np.dtype("<u4"))
    assert writer.documents == 1
    append(writer, DOCUMENTS[1:])
    writer.finish(fingerprint="f")
    writer.close()
    found = TokenStore.open(tmp_path)
    assert [found.document(i).tolist() for i in range(len(found))] == DOCUMENTS
    assert found.manifest["files"] == written(tmp_path / "at_once").manifest["files"] | {
        store.TOKENIZER: found.manifest["files"][store.TOKENIZER]
    }


@pytest.mark.parametrize("damage", ["committed_bytes", "progress", "short"])
def test_a_writer_starts_over_where_nothing_can_be_trusted(tmp_path, damage):
    writer = StoreWriter(tmp_path, np.dtype("<u4"))
    append(writer, DOCUMENTS)
    writer.commit()
    writer.close()
    if damage == "committed_bytes":
        data = bytearray((tmp_path / store.TOKENS).read_bytes())
        data[3] ^= 1
        (tmp_path / store.TOKENS).write_bytes(data)
    elif damage == "progress":
        (tmp_path / store.PROGRESS).write_bytes((tmp_path / store.PROGRESS).read_bytes()[:40])
    else:
        os.truncate(tmp_path / store.TOKENS, 8)
    assert written(tmp_path, DOCUMENTS[1:]).lengths.tolist() == [2, 3]


def damaged(path, damage):
    manifest = path / store.MANIFEST
    if damage == "truncated":
        os.truncate(path / store.TOKENS, 8)
    elif damage == "one_bit":
        data = bytearray((path / store.TOKENS).read_bytes())
        data[5] ^= 1
        (path / store.TOKENS).write_bytes(data)
    elif damage == "offsets_missing":
        (path / store.DOCUMENTS).unlink()
    elif damage == "torn_manifest":
        manifest.write_bytes(manifest.read_bytes()[:50])
    elif damage == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))


MESSAGES = {
    "truncated": r"tokens\.bin has 8 bytes instead of 36",
    "one_bit": r"tokens\.bin does not have the contents",
    "offsets_missing": r"documents\.bin is missing",
    "torn_manifest": r"manifest\.json is torn",
    "no_manifest": r"holds no manifest\.json",
    "other_format": r"has format 0, not 2",
}


@pytest.mark.parametrize("damage", MESSAGES)
def test_damage_is_found_when_a_store_is_opened(tmp_path, damage):
    written(tmp_path)
    damaged(tmp_path, damage)
    with pytest.raises(TornError, match=MESSAGES[damage]):
        TokenStore.open(tmp_path)


def test_a_large_file_is_hashed_again_only_once_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "HASH_ALWAYS_BYTES", 8)
    written(tmp_path)
    hashed = []
    real = store._hash
    monkeypatch.setattr(store, "_hash", lambda path, size=None: hashed.append(path.name) or real(path, size))
    TokenStore.open(tmp_path)
    assert hashed == []
    os.utime(tmp_path / store.TOKENS, ns=(1, 1))
    TokenStore.open(tmp_path)
    TokenStore.open(tmp_path)
    assert hashed == [store.TOKENS]
    damaged(tmp_path, "one_bit")
    with pytest.raises(TornError):
        TokenStore.open(tmp_path)


def test_a_full_disk_keeps_what_was_committed(tmp_path):
    writer = StoreWriter(tmp_path, np.dtype("<u4"))
    append(writer, DOCUMENTS[:2])
    writer.commit()
    real = writer._files[store.TOKENS]

    class Full:
        def write(self, data):
            real.write(data[:5])  # a disk fills in the middle of a token
            raise OSError(errno.ENOSPC, "No space left on device")

    writer._files[store.TOKENS] = Full()
    with pytest.raises(DiskFull, match="no room left"):
        append(writer, DOCUMENTS[2:])
    writer._files[store.TOKENS] = real
    writer.close()
    with pytest.raises(TornError):
        TokenStore.open(tmp_path)
    writer = StoreWriter(tmp_path, np.dtype("<u4"))
    (tmp_path / store.TOKENIZER).touch()
    assert writer.documents == 2
    append(writer, DOCUMENTS[2:])
    writer.finish(fingerprint="f")
    writer.close()
    assert TokenStore.open(tmp_path).document(2).tolist() == DOCUMENTS[2]


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"files": {}}', '{"files": {"tokens.bin": 1}}', None])
def test_a_torn_record_of_progress_starts_anew(tmp_path, content):
    writer = StoreWriter(tmp_path, np.dtype("<u4"))
    append(writer, DOCUMENTS[:2])
    writer.commit()
    writer.close()
    record = tmp_path / store.PROGRESS
    if content is None:  # whole but for a count
        content = json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "documents"})
    record.write_text(content)
    assert [written(tmp_path).document(i).tolist() for i in range(3)] == DOCUMENTS


@pytest.mark.parametrize("content", ["{}", "[]", '{"format": 2}'])
def test_a_manifest_without_its_facts_is_torn(tmp_path, content):
    written(tmp_path)
    (tmp_path / store.MANIFEST).write_text(content)
    with pytest.raises(TornError, match="is torn"):
        TokenStore.open(tmp_path)


def test_a_store_deleted_half_way_is_no_store(tmp_path, monkeypatch):
    written(tmp_path / "s")
    monkeypatch.setattr(store.shutil, "rmtree", lambda path: None)
    store.remove(tmp_path / "s")
    with pytest.raises(TornError):
        TokenStore.open(tmp_path / "s")
