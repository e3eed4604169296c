import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llmlab import __version__, cli, verbs
from llmlab.core import errors

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'experiments' / 'quickstart.py'}:tiny"

FLAGS = {
    "train": ["config", "workdir", "init_from", "print_config", "coordinator", "processes", "process_id"],
    "check": ["config", "workdir", "coordinator", "processes", "process_id"],
    "sweep": ["config", "sweep", "workdir", "parallel"],
    "sample": [
        "workdir",
        "prompt",
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
    ],
    "chat": ["workdir", "system", "max_tokens", "temperature", "top_p", "seed", "tools", "allow", "max_calls"],
    "serve": [
        "workdir",
        "host",
        "port",
        "api_key_file",
        "open",
        "slots",
        "queue",
        "int8",
        "seconds",
        "index",
        "preferences",
    ],
    "rank": ["workdir", "prompts", "out", "answers", "pairs", "drafts", "max_tokens", "temperature", "top_p", "seed"],
    "eval": [
        "workdir",
        "conversations",
        "turn_tokens",
        "turn_temperature",
        "tasks",
        "few_shot",
        "source",
        "files",
        "split",
        "limit",
        "needle",
        "needle_lengths",
    ],
    "quantise": ["workdir", "bits", "group", "include", "rows", "source", "files"],
    "report": ["workdir"],
    "tokenize": ["workdir", "model"],
    "convert": ["dtype"],
    "index": ["files", "out", "limit", "field", "workdir"],
}


@pytest.fixture(autouse=True)
def jax_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def failing(monkeypatch):
    """A verb that fails as it is told; gives the exit code."""

    def run(error, *arguments):
        def fail(flags, rest):
            raise error

        monkeypatch.setitem(verbs.VERBS, "fail", verbs.Verb("fails", "", "", lambda flags, argv: None, fail))
        return cli.run(["llmlab", "fail", *arguments])

    return run


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_verb(arguments, capsys):
    assert cli.run(["llmlab", *arguments]) == 0
    said = capsys.readouterr().out
    for verb in FLAGS:
        assert f"\n  {verb} " in said
    assert "VERB --help" in said


def test_every_verb_has_its_flags_tested_here():
    assert set(FLAGS) == set(verbs.VERBS)


@pytest.mark.parametrize("verb", FLAGS)
def test_the_page_of_a_verb_shows_usage_and_every_flag(verb, capsys):
    assert cli.run(["llmlab", verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"llmlab {verb}: {verbs.VERBS[verb].summary}"
    assert f"usage: llmlab {verb} {verbs.VERBS[verb].usage}" in said
    for flag in FLAGS[verb]:
        assert f"\n  --{flag} " in said
    assert "None" not in said


@pytest.mark.parametrize("flag", ["--version", "version"])
def test_version(flag, capsys):
    code = cli.run(["llmlab", flag])
    captured = capsys.readouterr()
    assert (code, captured.out) == ((0, f"llmlab {__version__}\n") if flag == "--version" else (2, ""))


@pytest.mark.parametrize("vocab_size, layers", [(512, 2), (300, 3)])
def test_print_config_says_what_would_run_and_what_it_costs(capsys, vocab_size, layers):
    given = {"model.layers": layers, "data.tokenizer.vocab_size": vocab_size, "model.vocab_size": vocab_size}
    overrides = [f"--config.{key}={value}" for key, value in given.items()]
    overrides += ["--config.data.batch_size=8", "--config.run.steps=10"]
    assert cli.run(["llmlab", "train", TINY, "--print_config", *overrides]) == 0
    config, _, facts = capsys.readouterr().out.partition("\n\n")
    config = json.loads(config)
    assert config["model"]["layers"] == layers
    assert config["data"]["batch_size"] == 8
    assert set(config) == {"model", "data", "objective", "optimizer", "mesh", "run", "adapter"}
    found = {line[:16].strip(): line[16:].strip() for line in facts.splitlines()}
    # A layer: q, k, v and o of 32 x 32, SwiGLU's three of 32 x 96, two norms; then the last norm and both tables.
    weights = layers * (4 * 32 * 32 + 3 * 32 * 96 + 2 * 32) + 32 + 2 * vocab_size * 32
    assert found["parameters"] == f"{weights:,}"
    assert found["tokens in all"].startswith(f"{10 * 8 * 32:,} ")
    assert "k" in found["FLOPs per token"] or "M" in found["FLOPs per token"]
    assert "GiB on each of 8 devices" in found["memory"]


def test_print_config_needs_no_workdir_and_makes_no_cache(capsys, tmp_path):
    assert cli.run(["llmlab", "train", TINY, "--print_config", "--config.data.batch_size=8"]) == 0
    assert "512 (asked of the tokenizer" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, code",
    [
        (errors.UserError("w=1 is wrong: try 2"), 2),
        (errors.DiskFull("no room left to write w"), 74),
        (errors.StoppedAndSaved("stopped at step 3"), 75),
        (errors.Tripwire("diverged"), 76),
    ],
)
def test_a_known_ending_is_one_line_and_its_own_code(failing, capsys, error, code):
    assert failing(error) == code
    assert capsys.readouterr().err == f"llmlab fail: {error}\n"


def test_a_full_disk_inside_a_library_is_known_for_one(failing, capsys):
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert failing(wrapped) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert "no space left on the disk" in line


def test_a_bug_is_a_traceback_and_1(failing, capsys):
    assert failing(ZeroDivisionError("x")) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert "ZeroDivisionError: x" in said


def test_debug_shows_where_a_known_error_comes_from(failing, capsys):
    assert failing(errors.UserError("wrong"), "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("llmlab fail: wrong\n")


def test_an_interrupt_is_130(failing, capsys):
    assert failing(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_the_loss_of_another_process_is_one_line(failing, capsys):
    lost = jax.errors.JaxRuntimeError("INTERNAL: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [::1]")
    assert failing(lost) == 1
    assert capsys.readouterr().err == "llmlab fail: another process of this run has ended: its own message says why\n"


def test_a_library_logs_only_warnings(failing, capsys):
    failing(errors.UserError("wrong"))
    assert not logging.getLogger("another.package").isEnabledFor(logging.INFO)
    assert logging.getLogger("llmlab.train").isEnabledFor(logging.INFO)


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m llmlab train --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 128 + signal.SIGPIPE), done.stderr
    assert done.stdout.startswith("llmlab train: ")
    assert done.stderr == ""


def test_help_loads_neither_jax_nor_numpy():
    code = (
        "import sys, llmlab.cli; llmlab.cli.run(['llmlab']); print(*(m for m in ('jax', 'numpy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_the_module_runs_as_the_script_does():
    done = subprocess.run(
        [sys.executable, "-m", "llmlab", "trian"], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 2
    assert done.stderr == "llmlab trian: unknown verb 'trian': did you mean 'train'?\n"


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--tools=calculater", "there is no tool 'calculater': did you mean 'calculator'?"),
        ("--allow=pyton", "--allow: there is no 'pyton' among --tools: choose one of 'calculator', 'lookup'"),
        ("--tools=mine.py:f", "there is no file mine.py to take tools from"),
    ],
)
def test_tools_that_are_not_there_are_said_before_the_run_is_opened(capsys, flag, says):
    assert cli.run(["llmlab", "chat", "--workdir=nowhere", flag]) == errors.EXIT_USER_ERROR
    assert says in capsys.readouterr().err
