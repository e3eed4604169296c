"""Tokenising happens once: reused, waited for, continued after a kill, and never left half-done as if whole."""

import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from llmlab.core import paths
from llmlab.core.errors import DiskFull, UserError
from llmlab.data import prepare as prepare_module
from llmlab.data import store, text, tokenise
from llmlab.data.config import MixturePart
from llmlab.data.prepare import data_fingerprint, prepare, prepare_parts, tokenizer_for
from llmlab.data.sources import Report, documents
from llmlab.data.store import TokenStore
from llmlab.data.tokenise import WorkerDiedError, encode_all
from llmlab.data.tokenizer import TokenizerConfig

CHARACTER = TokenizerConfig(kind="character")


@pytest.fixture
def files(tmp_path):
    """Thirty texts of 3 kB, each its own document."""
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"file {i}: " + "some words, " * 250)
    return tmp_path / "text" / "*.txt"


@pytest.fixture
def config(files, tmp_path):
    return text("text", files=str(files), cache_dir=str(tmp_path / "cache"), tokenizer=CHARACTER, workers=1)


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(tokenise, "TASK_CHARACTERS", 3000)
    monkeypatch.setattr(prepare_module, "COMMIT_SECONDS", 0.0)


def ready(config, split="train"):
    tokenizer = tokenizer_for(config, progress=False)
    return tokenizer, prepare(config, tokenizer, split, progress=False)


def encoded(config, tokenizer, split="train"):
    """The truth: every document, tokenised here and now."""
    return [
        [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
        for document in documents(config, split, Report())
    ]


def tokens_of(found):
    return [found.document(i).tolist() for i in range(len(found))]


def no_store(config):
    return not [*(prepare_module._cache(config, "tokens")).glob("*/*")]


@pytest.mark.parametrize("split", ["train", "held_out", "all"])
def test_a_store_holds_every_document_between_bos_and_eos(config, split):
    tokenizer, found = ready(config, split)
    assert tokens_of(found) == encoded(config, tokenizer, split)
    texts = [document.text for document in documents(config, split, Report())]
    assert found.text_bytes.tolist() == [len(t.encode()) for t in texts]
    assert tokenizer.token_bytes()[found.tokens].sum() == found.manifest["text_bytes"]


def test_the_built_in_corpus_is_lossless(tmp_path, monkeypatch):
    from llmlab.data import sources_python

    names = sources_python.names()[:40]
    monkeypatch.setattr(sources_python, "names", lambda: names)
    prepare_module._python_digest.cache_clear()
    config = text(cache_dir=str(tmp_path), tokenizer=TokenizerConfig(vocab_size=400), workers=1)
    tokenizer, found = ready(config, "held_out")
    prepare_module._python_digest.cache_clear()
    assert found.manifest["dtype"] == "<u2"
    texts = [tokenizer.decode(found.document(i)[1:-1].tolist()) for i in range(len(found))]
    assert texts == [document.text for document in documents(config, "held_out", Report())]


def test_the_second_time_nothing_is_tokenised(config, monkeypatch):
    first = ready(config)[1]

    def fail(*_, **__):
        raise AssertionError("it was there already")

    monkeypatch.setattr(prepare_module, "encode_all", fail)
    monkeypatch.setattr(prepare_module, "train_tokenizer", fail)
    assert ready(config)[1].path == first.path


def test_whatever_changes_the_tokens_makes_another_store(config, files, tmp_path):
    tokenizer, first = ready(config)
    seen = {first.path, ready(config, "held_out")[1].path}
    assert len(seen) == 2
    moved = tmp_path / "moved"
    os.rename(files.parent, moved)
    config = dataclasses.replace(config, files=(str(moved / "*.txt"),))
    assert prepare(config, tokenizer, "train", progress=False).path in seen  # only the place is new
    (moved / "29.txt").write_text("other words")
    before = data_fingerprint(config)
    (moved / "30.txt").write_text("more words")
    assert data_fingerprint(config) != before
    for changed in (config, dataclasses.replace(config, held_out=0.3)):
        path = prepare(changed, tokenizer, "train", progress=False).path
        assert path not in seen
        seen.add(path)
    other = tokenizer_for(dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=300, chat_markers=False)))
    assert prepare(config, other, "train", progress=False).path not in seen


def test_the_field_that_is_read_belongs_to_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "abc", "answer": "xyz"}')
    config = text("jsonl", files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path), tokenizer=CHARACTER, held_out=1e-9)
    question, answer = (dataclasses.replace(config, field=name) for name in ("question", "answer"))
    assert data_fingerprint(question) != data_fingerprint(answer)
    found = [ready(each) for each in (question, answer)]
    assert [tokenizer.decode(store.tokens.tolist()) for tokenizer, store in found] == ["abc", "xyz"]


def test_large_files_are_known_by_size_and_date(config, files, monkeypatch):
    monkeypatch.setattr(prepare_module, "HASH_CONTENT_BYTES", 0)
    before = data_fingerprint(config)
    assert data_fingerprint(config) == before
    os.utime(files.parent / "00.txt", ns=(1, 1))
    assert data_fingerprint(config) != before


def test_a_mixture_gives_a_store_and_weight_per_part(config, files):
    parts = (
        MixturePart(weight=3.0, source="text", files=(str(files),)),
        MixturePart(weight=1.0, source="text", files=(str(files.parent / "0*.txt"),)),
    )
    mixed = text("mixture", mixture=parts, cache_dir=config.cache_dir, tokenizer=CHARACTER, workers=1)
    tokenizer = tokenizer_for(mixed, progress=False)
    found = prepare_parts(mixed, tokenizer, "all", progress=False)
    assert [(len(each), weight) for each, weight in found] == [(30, 3.0), (10, 1.0)]


def test_several_processes_give_the_same_tokens_without_jax(config, small_tasks):
    tokenizer = tokenizer_for(config, progress=False)
    found = prepare(dataclasses.replace(config, workers=3), tokenizer, "train", progress=False)
    assert tokens_of(found) == encoded(config, tokenizer)


def test_workers_import_no_jax_even_if_the_main_script_did(config, tmp_path):
    """The script has no `__main__` guard either: run again by a spawned process, it would print twice."""
    tokenizer_for(config, progress=False).save(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "sys.modules['jax'] = sys  # stands for an import at the top of the user's script\n"
        "print('main')\n"
        "from llmlab.data import tokenise\n"
        "pipe = tokenise._start(sys.argv[1], 'text')\n"
        "pipe.pipe.send_bytes(b'[\"some words\"]')\n"
        "print(pipe.pipe.recv_bytes().decode())\n"
        "modules = open(f'/proc/{pipe.process.pid}/maps').read()\n"
        "print('jaxlib' in modules, 'sentencepiece' in modules)\n"
        "pipe.process.kill()\n"
    )
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "tokenizer")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert (done.stdout.splitlines(), done.stderr) == (["main", "encoded", "False True"], "")


def test_a_killed_worker_is_an_error_not_a_hang(config, tmp_path, small_tasks, monkeypatch):
    tokenizer = tokenizer_for(config, progress=False)
    tokenizer.save(tmp_path / "t")
    started = []
    real = tokenise._start
    monkeypatch.setattr(tokenise, "_start", lambda *given: started.append(real(*given)) or started[-1])
    results = encode_all(("some words " * 400 for _ in range(50)), tokenizer, str(tmp_path / "t"), 2)
    next(results)
    os.kill(started[1].process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError, match=r"worker died \(SIGKILL.*lower"):
        list(results)
    assert not any(worker.process.is_alive() for worker in started)


def test_a_worker_that_cannot_work_says_why(config, tmp_path, small_tasks):
    tokenizer = tokenizer_for(config, progress=False)
    (tmp_path / "t").write_text("no tokenizer")
    with pytest.raises(RuntimeError, match=r"(?s)worker failed.*is not a tokenizer"):
        list(encode_all(["some words " * 400] * 3, tokenizer, str(tmp_path / "t"), 2))
    tokenizer.save(tmp_path / "t")
    with pytest.raises(UserError, match="lone surrogate"):
        list(encode_all(["some words " * 400, "\ud800" * 4000], tokenizer, str(tmp_path / "t"), 2))


def test_what_a_worker_said_before_it_ended_is_heard(tmp_path):
    """It may end, and its pipe break, while the next task is being sent."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    for part in (b"user error", b"the text holds a lone surrogate"):
        theirs.send_bytes(part)
    theirs.close()
    process = subprocess.Popen([sys.executable, "-c", ""])
    with process, pytest.raises(UserError, match="lone surrogate"):
        tokenise._give(tokenise._Worker(process, ours), ["some words"])


SLOW = """
import sys, time
from llmlab.data import prepare as p, text, tokenise
from llmlab.data.tokenizer import TokenizerConfig
tokenise.TASK_CHARACTERS, p.COMMIT_SECONDS = 3000, 0.0
files, cache, seconds = sys.argv[1:]
config = text("text", files=files, cache_dir=cache, tokenizer=TokenizerConfig(kind="character"), workers=1)
tokenizer = p.tokenizer_for(config, progress=False)
encode = tokenise.encode_texts
def slow(tokenizer, texts):
    time.sleep(float(seconds))
    print("task", flush=True)
    return encode(tokenizer, texts)
tokenise.encode_texts = slow
print("done", len(p.prepare(config, tokenizer, "train", progress=False)), flush=True)
"""


def slow_process(config, seconds):
    command = [sys.executable, "-c", SLOW, *config.files, config.cache_dir, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_half_way_it_goes_on(config, small_tasks, monkeypatch):
    other = slow_process(config, 0.02)
    for _ in range(8):
        assert other.stdout.readline() == "task\n"
    other.send_signal(signal.SIGKILL)
    other.communicate()
    (folder,) = (path for path in prepare_module._cache(config, "tokens").iterdir() if path.is_dir())
    with pytest.raises(store.TornError):
        TokenStore.open(folder)
    tokenised = []
    real = tokenise.encode_texts
    monkeypatch.setattr(tokenise, "encode_texts", lambda t, texts: tokenised.extend(texts) or real(t, texts))
    tokenizer, found = ready(config)
    assert found.path == folder
    assert tokens_of(found) == encoded(config, tokenizer)
    assert 0 < len(tokenised) <= len(found) - 6


def test_a_second_process_waits_and_uses_the_work_of_the_first(config, monkeypatch):
    tokenizer = tokenizer_for(config, progress=False)
    other = slow_process(config, 0.02)
    assert other.stdout.readline() == "task\n"

    def fail(*_, **__):
        raise AssertionError("the other process does it")

    monkeypatch.setattr(prepare_module, "encode_all", fail)
    found = prepare(config, tokenizer, "train", progress=False)
    assert f"done {len(found)}" in other.communicate()[0]
    assert tokens_of(found) == encoded(config, tokenizer)


@pytest.mark.parametrize("damage", ["torn_manifest", "short_tokens"])
def test_a_damaged_store_is_made_again_with_a_warning(config, damage, caplog):
    tokenizer, found = ready(config)
    if damage == "torn_manifest":
        (found.path / store.MANIFEST).write_bytes(b'{"format": 1, "fi')
    else:
        data = (found.path / store.TOKENS).read_bytes()[:-2]
        (found.path / store.TOKENS).unlink()
        (found.path / store.TOKENS).write_bytes(data)
    found = prepare(config, tokenizer, "train", progress=False)
    assert "Tokenising again" in caplog.text
    assert tokens_of(found) == encoded(config, tokenizer)


def test_a_full_disk_stops_clearly_and_goes_on_once_there_is_room(config, small_tasks, monkeypatch):
    tokenizer = tokenizer_for(config, progress=False)
    writes = []
    real = os.fsync

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="no room left to write") as caught:
        prepare(config, tokenizer, "train", progress=False)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "fsync", real)
    assert tokens_of(prepare(config, tokenizer, "train", progress=False)) == encoded(config, tokenizer)


@pytest.mark.slow
def test_a_disk_that_is_really_full(small_disk, files, config):
    small = small_disk("100k")
    tokenizer = tokenizer_for(config, progress=False)
    tight = dataclasses.replace(config, cache_dir=str(small))
    with pytest.raises(DiskFull):
        prepare(tight, tokenizer, "train", progress=False)
    assert not list(small.glob("**/manifest.json"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
    found = prepare(tight, tokenizer, "train", progress=False)
    assert tokens_of(found) == encoded(config, tokenizer)


def test_a_bad_row_leaves_nothing_behind(config, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "words " * 9}) + "\n{\n")
    bad = text("jsonl", files=str(tmp_path / "a.jsonl"), cache_dir=config.cache_dir, workers=1, held_out=1e-9)
    tokenizer = tokenizer_for(config, progress=False)
    with pytest.raises(UserError, match=r"a\.jsonl line 2 .*not JSON"):
        prepare(bad, tokenizer, "train", progress=False)
    assert no_store(bad)


def test_after_a_bad_row_skipping_goes_on_from_there(config, tmp_path, small_tasks, monkeypatch, caplog):
    lines = [json.dumps({"text": f"{i} " * 2000}) for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:4], "{", *lines[4:]]))
    bad = text("jsonl", files=str(tmp_path / "a.jsonl"), cache_dir=config.cache_dir, workers=1, held_out=1e-9)
    tokenizer = tokenizer_for(config, progress=False)
    with pytest.raises(UserError, match="line 5"):
        prepare(bad, tokenizer, "train", progress=False)
    tokenised = []
    real = tokenise.encode_texts
    monkeypatch.setattr(tokenise, "encode_texts", lambda t, texts: tokenised.extend(texts) or real(t, texts))
    skipping = dataclasses.replace(bad, on_bad_input="skip")
    found = prepare(skipping, tokenizer, "train", progress=False)
    assert (len(found), len(tokenised)) == (6, 2)
    assert found.manifest["skipped"] == {"not JSON": 1}
    assert "skipped 1 x not JSON" in caplog.text
    with pytest.raises(UserError, match=r"1 x not JSON.*on_bad_input=skip"):  # what was skipped then is an error now
        prepare(bad, tokenizer, "train", progress=False)


def test_a_split_without_text_says_what_to_do(config, tmp_path):
    tokenizer = tokenizer_for(config, progress=False)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "words"}))
    nothing = dataclasses.replace(config, source="jsonl", files=(str(tmp_path / "a.jsonl"),), held_out=1e-9)
    with pytest.raises(UserError, match=r"no text to evaluate on with data\.held_out=1e-09.*held_out_files"):
        prepare(nothing, tokenizer, "held_out", progress=False)
    assert no_store(nothing)


def test_a_cache_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache folder .*/file.* set data\.cache_dir or LLMLAB_CACHE"):
        tokenizer_for(dataclasses.replace(config, cache_dir=str(tmp_path / "file")), progress=False)


def test_the_default_cache_is_the_cache_root(files, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "root"))
    ready(text("text", files=str(files), tokenizer=CHARACTER, workers=1))
    assert sorted(path.name for path in paths.cache_root().iterdir()) == ["tokenizers", "tokens"]


@pytest.mark.parametrize("torn", [b"", b'{"format": "llmlab char', b"\x00" * 40])
def test_a_torn_tokenizer_in_the_cache_is_trained_again(config, torn, caplog):
    whole = tokenizer_for(config, progress=False)
    (path,) = prepare_module._cache(config, "tokenizers").glob("*.model")
    path.write_bytes(torn)
    assert tokenizer_for(config, progress=False).fingerprint == whole.fingerprint
    assert "Training it again" in caplog.text
    caplog.clear()
    assert tokenizer_for(config, progress=False).fingerprint == whole.fingerprint
    assert caplog.text == ""


def test_a_named_tokenizer_is_loaded(config, tmp_path):
    tokenizer = tokenizer_for(config, progress=False)
    tokenizer.save(tmp_path / "mine.model")
    named = text("python", tokenizer=TokenizerConfig(file=str(tmp_path / "mine.model")))
    assert tokenizer_for(named, progress=False).fingerprint == tokenizer.fingerprint
