"""What users do wrong: one line on stderr, what, where and how to mend it; exit code 2; nothing left behind."""

import gzip
import json
import os
import re
from pathlib import Path

import jax
import pytest

from llmlab.cli import run

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "experiments" / "quickstart.py"
TINY = f"--config={QUICKSTART}:tiny"

_EIGHT = ("--config.data.batch_size=8",)  # as many rows as conftest makes devices


@pytest.fixture(autouse=True)
def empty_place(tmp_path, monkeypatch):
    """An empty folder to stand in, an empty cache, and jax as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def refuses(capsys, words: list[str], *arguments: str) -> None:
    """Runs the command, which should end with 2 and one line that holds all `words`."""
    code = run(["llmlab", *arguments])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"llmlab {arguments[0]}: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"
    assert captured.out == ""


def left_behind() -> list[str]:
    """Every file below the current folder that the test did not put into `in/`; locks and whole stores apart."""
    found = [path for path in Path().rglob("*") if path.is_file() and path.parts[0] != "in"]
    stores = {path.parent for path in found if path.name == "manifest.json"}
    whole = [path for path in found if path.parent in stores or path.suffix == ".model" or ".lock" in path.name]
    return sorted(str(path) for path in found if path not in whole)


CONFIGS = {
    "unknown verb": (["trian"], ["'trian'", "did you mean 'train'?"]),
    "unknown flag": (["train", TINY, "--wrokdir=w"], ["--wrokdir", "did you mean 'workdir'?"]),
    "no config": (["train", "--workdir=w"], ["--config", "experiments/quickstart.py"]),
    "a folder for a config": (["train", "--config=.", "--workdir=w"], ["--config", "no file"]),
    "a text for a config": (
        ["train", f"--config={ROOT / 'README.md'}", "--workdir=w"],
        ["README.md, line"],
    ),
    "an unknown variant": (
        ["train", f"--config={QUICKSTART}:tinny", "--workdir=w"],
        ["'tinny'", "did you mean 'tiny'?"],
    ),
    "no workdir": (["train", TINY], ["--workdir is missing"]),
    "no flag": (["train", TINY, "--workdir=w", "stray"], ["'stray' is no flag"]),
    "unknown key": (["train", TINY, "--workdir=w", "--config.model.widht=9"], ["model.widht", "did you mean", "width"]),
    "unknown section": (
        ["train", TINY, "--workdir=w", "--config.modle.width=9"],
        ["modle.width", "did you mean", "model"],
    ),
    "wrong type": (["train", TINY, "--workdir=w", "--config.model.width=wide"], ["model.width", "wide", "int"]),
    "wrong float": (["train", TINY, "--workdir=w", "--config.optimizer.clip=lots"], ["optimizer.clip", "lots"]),
    "wrong choice": (
        ["train", TINY, "--workdir=w", "--config.data.packing=best_fti"],
        ["data.packing", "'best_fti'", "did you mean 'best_fit'?"],
    ),
    "wrong mesh axis": (["train", TINY, "--workdir=w", "--config.mesh.tensr=2"], ["mesh.tensr", "tensor"]),
    "heads do not divide": (
        ["train", TINY, "--workdir=w", "--config.model.heads=5"],
        ["model.heads=5", "model.width=32"],
    ),
    "mesh does not divide heads": (
        ["train", TINY, "--workdir=w", "--config.mesh.tensor=8", "--config.data.batch_size=8"],
        ["model.heads=4", "8"],
    ),
    "mesh does not divide the batch": (
        ["train", TINY, "--workdir=w", "--config.data.batch_size=12"],
        ["data.batch_size=12", "8 devices", "try data.batch_size=16"],
    ),
    "mesh does not fit the devices": (["train", TINY, "--workdir=w", "--config.mesh.data=3"], ["mesh", "data=3", "8"]),
    "microbatches do not divide the batch": (
        ["train", TINY, "--workdir=w", "--config.optimizer.accumulate=3"],
        ["optimizer.accumulate=3", "try data.batch_size=6"],
    ),
    "sequence too long": (
        ["train", TINY, "--workdir=w", "--config.data.sequence_length=513"],
        ["data.sequence_length=513", "model.max_positions=512"],
    ),
    "negative rate": (["train", TINY, "--workdir=w", "--config.optimizer.learning_rate=-1"], ["learning_rate=-1"]),
    "no steps": (["train", TINY, "--workdir=w", "--config.run.steps=0"], ["run.steps=0", "at least 1"]),
    "tiny vocabulary": (
        ["train", TINY, "--workdir=w", "--config.data.tokenizer.vocab_size=99"],
        ["data.tokenizer.vocab_size=99", "at least"],
    ),
    "mixture of nothing": (
        ["train", TINY, "--workdir=w", *_EIGHT, "--config.data.source=mixture"],
        ["data.mixture is empty"],
    ),
    "text of no files": (["train", TINY, "--workdir=w", *_EIGHT, "--config.data.source=text"], ["data.files is empty"]),
    "size that is not there": (
        ["train", f"--config={ROOT}/experiments/gpt2.py:123m", "--workdir=w"],
        ["'123m'", "did you mean '124m'?"],
    ),
    "no such experiment": (["train", "--config=nowhere.py", "--workdir=w"], ["nowhere.py", "experiments/"]),
    "wrong init_from": (
        ["train", TINY, "--workdir=w", *_EIGHT, "--init_from=nowhere"],
        ["there is no workdir", "nowhere"],
    ),
    "half of the host flags": (["check", TINY, "--processes=2"], ["--coordinator", "--process_id"]),
    "sweep of an unknown key": (
        ["sweep", TINY, "--sweep=model.widht=1,2", "--workdir=w"],
        ["model.widht", "did you mean", "width"],
    ),
    "sample from nowhere": (["sample", "--workdir=nowhere"], ["there is no workdir", "nowhere"]),
    "chat with nowhere": (["chat", "--workdir=nowhere"], ["there is no workdir", "nowhere"]),
    "rank without prompts": (["rank", "--workdir=nowhere", "--out=x"], ["--prompts is missing"]),
    "rank one answer": (
        ["rank", "--workdir=nowhere", "--prompts=p", "--out=x", "--answers=1"],
        ["--answers=1", "from 2 to 9"],
    ),
    "rank by unknown pairs": (["rank", "--workdir=nowhere", "--pairs=worst"], ["pairs", "worst"]),
    "report on nowhere": (["report", "--workdir=nowhere"], ["nowhere"]),
    "evaluate nowhere": (["eval", "--workdir=nowhere"], ["nowhere"]),
    "wrong number": (["sample", "--workdir=nowhere", "--top_k=many"], ["top_k", "many"]),
    "tokenize without a tokenizer": (["tokenize", "text"], ["--workdir=DIR", "--model=FILE"]),
    "tokenize with no file": (["tokenize", "--model=nowhere.model", "text"], ["nowhere.model"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_command_or_config_is_refused_before_anything_is_made(case, capsys):
    arguments, words = CONFIGS[case]
    refuses(capsys, words, *arguments)
    assert left_behind() == []
    assert not Path("w").exists()


EXPERIMENTS = {
    "syntax error": ("def get_config(\n", ["x.py, line 1", "was never closed"]),
    "no get_config": ("x = 1\n", ["x.py", "get_config"]),
    "another object": ("def get_config(arg=''):\n    return {}\n", ["x.py", "ConfigDict"]),
    "unknown field": (
        "from llmlab.data import text\ndef get_config(arg=''):\n    return text(sequence_lenght=3)\n",
        ["sequence_lenght", "did you mean 'sequence_length'?"],
    ),
    "error in it": ("def get_config(arg=''):\n    return 1 / 0\n", ["x.py, line 2", "division by zero"]),
}


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_a_wrong_experiment_file_is_refused(case, capsys):
    content, words = EXPERIMENTS[case]
    Path("x.py").write_text(content)
    refuses(capsys, words, "train", "--config=x.py", "--workdir=w")
    assert not Path("w").exists()


LINE = json.dumps({"text": "some words of text " * 8})
GOOD = "some good text, long enough to be read. " * 400

FILES = {
    "glob that matches nothing": ({}, "text", "in/*.txt", ["data.files='in/*.txt'", "matches nothing"]),
    "a folder": ({"in/sub/a.txt": GOOD}, "text", "in/sub", ["in/sub", "is a folder", "in/sub/**/*.txt"]),
    "empty file": ({"in/a.txt": ""}, "text", "in/a.txt", ["in/a.txt", "empty"]),
    "invalid UTF-8": (
        {"in/a.txt": GOOD.encode() + b"\nline two\n\xff\xfe" + GOOD.encode()},
        "text",
        "in/a.txt",
        ["invalid UTF-8", "in/a.txt line 3", "0xff", "data.on_bad_input=skip"],
    ),
    "truncated gzip": (
        {"in/a.txt.gz": gzip.compress(os.urandom(4000).hex().encode())[:-2000]},
        "text",
        "in/a.txt.gz",
        ["in/a.txt.gz", "cut short"],
    ),
    "no gzip at all": ({"in/a.txt.gz": GOOD}, "text", "in/a.txt.gz", ["in/a.txt.gz", "damaged gzip"]),
    "JSON line without the field": (
        {"in/a.jsonl": f'{LINE}\n{{"body": "x"}}\n'},
        "jsonl",
        "in/a.jsonl",
        ["no field 'text'", "in/a.jsonl line 2", "'body'", "data.field"],
    ),
    "no JSON": ({"in/a.jsonl": f"{LINE}\n{{nonsense\n"}, "jsonl", "in/a.jsonl", ["not JSON", "in/a.jsonl line 2"]),
    "smaller than a batch": (
        {"in/a.txt": GOOD[:160]},
        "text",
        "in/a.txt",
        ["fewer than data.batch_size=8", "give more text"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused_and_leave_no_half_written_tokens(case, capsys):
    files, source, pattern, words = FILES[case]
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    refuses(capsys, words, *_on_files(source, pattern))
    assert left_behind() == []
    assert not Path("w").exists() or os.listdir("w") == [".lock"]


def test_a_vocabulary_that_the_text_cannot_fill_is_refused(capsys):
    Path("a.txt").write_text(GOOD)
    arguments = [*_on_files("text", "a.txt"), "--config.data.tokenizer.kind=sentencepiece"]
    refuses(capsys, ["data.tokenizer.vocab_size=512", "at most"], *arguments)
    assert left_behind() == ["a.txt"]


def test_a_workdir_that_is_a_file_is_refused(capsys):
    Path("w").write_text("mine")
    refuses(capsys, ["--workdir=", "is, or lies in, a file"], "train", TINY, "--workdir=w", *_EIGHT)
    assert Path("w").read_text() == "mine"


def test_a_workdir_of_another_config_is_refused_and_shows_the_difference(capsys):
    from llmlab.core.config import to_json
    from llmlab.train.config import resolve
    from llmlab.workdir.files import Workdir

    workdir = Workdir("w")
    workdir.path.mkdir()
    workdir.write_config(to_json(resolve(_tiny_config())), {})
    before = workdir.config.read_bytes()
    code = run(["llmlab", "train", TINY, "--workdir=w", *_EIGHT, "--config.optimizer.learning_rate=0.5"])
    error = capsys.readouterr().err
    assert code == 2
    assert "belongs to a run of another config" in error
    assert "optimizer.learning_rate: 0.004 -> 0.5" in error
    assert "data.batch_size: 4 -> 8" in error
    assert workdir.config.read_bytes() == before


def test_sampling_from_a_run_without_a_checkpoint_is_refused(capsys):
    from llmlab.core.config import to_json
    from llmlab.data.tokenizer_character import CharacterTokenizer
    from llmlab.train.config import resolve
    from llmlab.workdir.files import Workdir

    workdir = Workdir("w")
    workdir.path.mkdir()
    config = to_json(resolve(_tiny_config()))
    config["model"]["vocab_size"] = 64
    workdir.write_config(config, {})
    refuses(capsys, ["tokenizer.model is missing"], "sample", "--workdir=w", "--prompt=a")
    CharacterTokenizer("abc").save(workdir.tokenizer)
    refuses(capsys, ["w holds no whole checkpoint"], "sample", "--workdir=w", "--prompt=a")
    workdir.tokenizer.write_bytes(workdir.tokenizer.read_bytes()[:20])
    refuses(capsys, ["tokenizer.model", "is not a tokenizer"], "sample", "--workdir=w", "--prompt=a")
    workdir.config.write_bytes(workdir.config.read_bytes()[:50])
    refuses(capsys, ["config.json is torn"], "sample", "--workdir=w", "--prompt=a")


def test_a_torn_tokenizer_file_is_refused(capsys):
    Path("torn.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0")
    refuses(capsys, ["torn.model", "is not a tokenizer"], "tokenize", "--model=torn.model", "text")


def test_an_error_says_more_with_debug(capsys):
    code = run(["llmlab", "sample", "--workdir=nowhere", "--debug"])
    error = capsys.readouterr().err
    assert code == 2
    assert re.match(r"Traceback \(most recent call last\):", error)
    assert error.splitlines()[-1].startswith("llmlab sample: there is no workdir")


def _on_files(source: str, pattern: str) -> list[str]:
    data = dict(source=source, files=f"('{pattern}',)", **{"tokenizer.kind": "character", "workers": 1})
    return ["train", TINY, "--workdir=w", *_EIGHT, *(f"--config.data.{key}={value}" for key, value in data.items())]


def _tiny_config():
    from llmlab.core.flags import define_config, parse

    return parse(define_config, [TINY])[0].config
