"""The built-in data of an assistant: what is held out is nowhere in training, and rows are always the same."""

import hashlib
import itertools
import os
import subprocess
import sys
import time

import pytest

from llmlab.core.errors import UserError
from llmlab.data import library, sources_assistant, sources_python, split
from llmlab.data.chat import Example
from llmlab.data.sources_assistant import HELD_OUT_FILES, assistant_rows, known
from tests.small_library import AREAS, CACHES, small_library, word

__all__ = ["small_library"]

STAGES = ("text", "chat", "preference", "ranking", "binary")


def texts(rows: str, side: str) -> list[str]:
    """Everything that a stage shows a model, as plain text."""
    found = [text for _, text in assistant_rows(rows, side)]
    if rows == "text":
        return found
    conversations = [r.conversation for text in found for r in Example.loads(text).responses]
    messages = dict.fromkeys(itertools.chain.from_iterable(conversations))
    return ["\n".join([m.content, m.thinking, *(call.arguments for call in m.calls)]) for m in messages]


def plain(text: str) -> str:
    return f" {' '.join(library.words(text))} "


def assert_nothing_leaks() -> None:
    held_out = known("held_out")
    for rows in STAGES:
        shown = texts(rows, "train")
        together, lines = "\n".join(shown), plain("\n".join(shown))
        for entry in held_out:
            assert entry.summary not in together, (rows, entry.name)
            assert plain(entry.summary) not in lines, (rows, entry.name)
            for header in entry.headers:
                assert header not in together, (rows, header)


def test_nothing_that_is_held_out_is_trained_on(small_library):
    held_out, train = known("held_out"), known("train")
    assert 20 < len(held_out) < 200
    assert not {e.name for e in held_out} & {e.name for e in train}
    assert_nothing_leaks()


def test_held_out_are_the_files_and_a_share_of_the_other_functions(small_library):
    names = list(sources_python.names())
    files = set(split.by_name(names, {name: name for name in names}, HELD_OUT_FILES, "held_out"))
    held_out, train = known("held_out"), known("train")
    assert not {entry.document for entry in train} & files
    elsewhere = [entry for entry in held_out if entry.document not in files]
    assert {entry.kind for entry in elsewhere} == {"function"}
    assert 0.02 < len(elsewhere) / sum(entry.kind == "function" for entry in train) < 0.1
    assert known("all") == (*train, *held_out)


def test_what_much_other_text_says_too_is_not_held_out(small_library):
    assert not [entry.name for entry in known("held_out") if entry.short == "close"]
    assert len([entry.name for entry in known("train") if entry.short == "close"]) > 50


def test_an_entry_that_tells_what_is_held_out_is_not_trained_on(small_library):
    spread = [e.short.removeprefix("spread_") for e in known("held_out") if e.short.startswith("spread_")]
    echoed = {e.short.removeprefix("echo_") for e in known("train") if e.short.startswith("echo_")}
    assert spread
    assert not set(spread) & echoed
    assert len(echoed) > 50


def test_definitions_and_quotes_are_cut_out_and_nothing_else(small_library):
    train, whole = dict(assistant_rows("text", "train")), dict(assistant_rows("text", "all"))
    held_out = {entry.name for entry in known("held_out")}
    alone = (i for i in range(AREAS) if {name for name in held_out if f"area{i}." in name} == {f"area{i}.gather_{i}"})
    i = next(alone)  # the only one of its file
    before, _, after = whole[f"area{i}.py"].partition("@functools.cache\n")
    assert train[f"area{i}.py"] == before + "\n" + after[after.index("\ndef spread_") :][1:]
    assert f"Secret of gather {i}" not in "".join(train.values())
    notes = dict(assistant_rows("text", "all"))[f"notes{i}.py"]
    if f"notes{i}.py" in train:
        assert train[f"notes{i}.py"] == notes.replace(f"gather\n#  EVERY {word(i)}, that lies\n# below the first", "")


def test_held_out_text_is_the_held_out_files_as_they_are(small_library):
    train, held_out, whole = (dict(assistant_rows("text", side)) for side in ("train", "held_out", "all"))
    assert held_out
    assert held_out.items() <= whole.items()
    assert train.keys() | held_out.keys() == whole.keys() == set(sources_python.names())
    assert not train.keys() & held_out.keys()
    assert whole["area5.py"] == (small_library / "area5.py").read_text()


@pytest.mark.parametrize("rows", STAGES)
def test_rows_have_names_of_their_own_and_all_is_both_sides(small_library, rows):
    train, held_out, whole = (list(assistant_rows(rows, side)) for side in ("train", "held_out", "all"))
    names = [name for name, _ in train + held_out]
    assert len(set(names)) == len(names)
    if rows != "text":
        assert whole == train + held_out
        assert all(Example.loads(text).dumps() == text for _, text in whole)


def test_other_rows_are_refused(small_library):
    with pytest.raises(UserError, match=r"data\.rows='steps'.*set data\.rows to text, chat, preference, ranking or bi"):
        list(assistant_rows("steps", "train"))


SCRIPT = """
import hashlib, sys
from pathlib import Path
from tests.small_library import install
install(Path(sys.argv[1]), setattr)
from llmlab.data.sources_assistant import assistant_rows
rows = [row for rows in ("text", "chat", "preference") for row in assistant_rows(rows, "all")]
print(hashlib.sha256(repr(rows).encode()).hexdigest(), "jax" in sys.modules, "tkinter" in sys.modules)
"""


def test_rows_are_the_same_in_every_process(small_library):
    rows = [row for rows in ("text", "chat", "preference") for row in assistant_rows(rows, "all")]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    command = [sys.executable, "-c", SCRIPT, str(small_library)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert result.stdout.split() == [digest, "False", "False"], result.stderr


def test_the_fingerprint_changes_with_the_code(tmp_path, monkeypatch):
    before = sources_assistant.fingerprint()
    changed = tmp_path / "tools.py"
    changed.write_text("NEAR = 4\n")
    monkeypatch.setattr("llmlab.data.tools.__file__", str(changed))
    assert sources_assistant.fingerprint() != before


@pytest.mark.slow
def test_the_real_library():
    for cache in CACHES:
        cache.cache_clear()
    start = time.process_time()
    sizes = {rows: len(list(assistant_rows(rows, "train"))) for rows in STAGES}
    assert time.process_time() - start < 30
    assert sizes["chat"] > 8000
    assert len(known("held_out")) > 200
    text, whole = (sum(len(t) for _, t in assistant_rows("text", side)) for side in ("train", "all"))
    assert 0.7 < text / whole < 0.97
    assert_nothing_leaks()
