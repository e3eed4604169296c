"""The command line, from text to samples: one tiny run, and every verb that reads its workdir."""

import argparse
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import llmlab
from llmlab import cli
from llmlab.core.errors import EXIT_USER_ERROR
from llmlab.eval.command import EvalConfig, eval_command
from llmlab.eval.quantisation import quantise_command
from llmlab.model.quantise import QuantiseConfig
from llmlab.report.page import verbatim

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
QUICKSTART = EXPERIMENTS / "quickstart.py"
STEPS = 4
TRAIN_FIELDS = {
    "step",
    "tokens",
    "targets",
    "loss",
    "bits_per_byte",
    "learning_rate",
    "grad_norm",
    "skipped",
}
EVAL_FIELDS = {"step", "eval/loss", "eval/perplexity", "eval/bits_per_byte"}


def train(workdir: Path, corpus: Path, *more: str, config: str = f"{QUICKSTART}:tiny") -> int:
    """`llmlab train` of a tiny config, on a small file of text. The test machine has eight fake devices."""
    return cli.run(
        [
            "llmlab",
            "train",
            f"--config={config}",
            f"--workdir={workdir}",
            "--config.data.source=text",
            f"--config.data.files={corpus}",
            "--config.data.batch_size=8",
            "--config.data.workers=1",
            "--config.run.eval_batches=0",
            *more,
        ]
    )


def rows(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of a module of the standard library: 100 kB of real text."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(Path(argparse.__file__).read_text()[:60_000])
    return file


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """A finished run. What the command sets in jax is set back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    path = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(path, corpus) == 0
    yield path
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_run_leaves_the_files_of_a_workdir(workdir: Path):
    config = json.loads((workdir / "config.json").read_text())
    assert {"config", "versions", "platform", "devices", "git", "data", "parameters", "arguments"} <= set(config)
    assert config["config"]["model"]["vocab_size"] == 512
    assert (workdir / "tokenizer.model").stat().st_size > 0
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["2.txt", "4.txt"]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"2", "4"}
    assert (workdir / "report.html").stat().st_size > 10_000
    assert "xz_bits_per_byte" in json.loads((workdir / "eval.json").read_text())


def test_metrics_have_every_step_once_and_every_evaluation(workdir: Path):
    trained = [row for row in rows(workdir) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert all(set(row) >= TRAIN_FIELDS for row in trained)
    assert [row["tokens"] for row in trained] == [step * 8 * 32 for step in (1, 2, 3, 4)]
    evaluated = [row for row in rows(workdir) if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4]
    assert all(set(row) == EVAL_FIELDS for row in evaluated)
    losses = [row["eval/loss"] for row in evaluated]
    assert losses[0] > losses[1] > losses[2]


def test_samples_hold_each_prompt(workdir: Path):
    text = (workdir / "samples" / "4.txt").read_text()
    assert text.count("--- the model goes on ---") == 2
    assert "\ndef\n" in text
    assert "\nThe\n" in text


def test_the_same_command_again_returns_at_once(workdir: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
    before = (workdir / "metrics.jsonl").read_bytes()
    assert train(workdir, corpus) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert f"going on from step {STEPS}" in capsys.readouterr().err


def test_another_config_in_its_workdir_is_refused(workdir: Path, corpus: Path, capsys: pytest.CaptureFixture[str]):
    assert train(workdir, corpus, "--config.optimizer.learning_rate=0.5") == EXIT_USER_ERROR
    assert "optimizer.learning_rate: 0.004 -> 0.5" in capsys.readouterr().err


def test_init_from_starts_with_the_weights_of_another_run(workdir: Path, corpus: Path, tmp_path: Path):
    assert train(tmp_path / "more", corpus, f"--init_from={workdir}", "--config.run.steps=1") == 0
    first, last = rows(tmp_path / "more")[0], rows(workdir)[-1]
    assert (first["step"], last["step"]) == (0, STEPS)
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


@pytest.mark.slow
def test_a_model_reaches_further_and_trains_on(workdir: Path, corpus: Path, tmp_path: Path):
    """YaRN stretches its positions four times over; what it had learnt is still there at the new length."""
    longer, config = tmp_path / "longer", f"{EXPERIMENTS}/longer.py:{workdir}"
    more = (
        "run.steps=2",
        "run.eval_every=2",
        "run.sample_tokens=8",
        "optimizer.accumulate=1",
        "data.sequence_length=64",
    )
    assert train(longer, corpus, *(f"--config.{setting}" for setting in more), config=config) == 0
    model = llmlab.open(str(longer)).model.config
    assert (model.rope.scaling, model.rope.factor, model.rope.original_positions) == ("yarn", 4, 512)
    assert model.max_positions == 2048
    assert rows(longer)[0]["eval/loss"] == pytest.approx(rows(workdir)[-1]["eval/loss"], abs=0.1)


def test_sample_with_the_same_seed_gives_the_same_text(workdir: Path, capsys: pytest.CaptureFixture[str]):
    def sample(seed: int) -> str:
        arguments = ["llmlab", "sample", f"--workdir={workdir}", "--prompt=def ", "--max_tokens=12", f"--seed={seed}"]
        assert cli.run(arguments) == 0
        return capsys.readouterr().out

    first = sample(seed=1)
    assert first.startswith("def")
    assert sample(seed=1) == first
    assert sample(seed=2) != first


def test_chat_answers_every_line_of_its_input(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("def f\n/undo\n"))
    assert cli.run(["llmlab", "chat", f"--workdir={workdir}", "--tools=", "--max_tokens=12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\ntaken back: def f\n")
    assert "plain text" in captured.err
    assert "tokens/s" in captured.err


def test_eval_finds_the_loss_that_training_ended_with(workdir: Path, capsys: pytest.CaptureFixture[str]):
    baseline = json.loads((workdir / "eval.json").read_text())["xz_bits_per_byte"]
    assert cli.run(["llmlab", "eval", f"--workdir={workdir}"]) == 0
    result = json.loads((workdir / "eval.json").read_text())
    assert result["xz_bits_per_byte"] == baseline  # where the report looks for it
    found = result["held_out"]
    last = rows(workdir)[-1]
    assert found["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(last["eval/bits_per_byte"], rel=1e-5)
    assert f"{found['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_quantise_says_what_it_saves_and_costs(workdir: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(workdir.rglob("*"))
    assert cli.run(["llmlab", "quantise", f"--workdir={workdir}", "--bits=4", "--group=16", "--rows=4"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"weights +0\.\d\d MiB instead of 0\.\d\d", out)
    assert re.search(r"logits +differ by \d+\.\d\d%", out)
    assert re.search(r"bits per byte +\d\.\d{4}, [+-]0\.\d{4} quantised", out)
    assert sorted(workdir.rglob("*")) == before


def test_quantise_measures_what_eval_does(workdir: Path, tmp_path: Path):
    """On documents that share rows with each other and with padding."""
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n"}) + "\n" for i in range(3)))
    opened, on = llmlab.open(workdir), EvalConfig(source="jsonl", files=(str(text),), batch_size=8)
    found = quantise_command(opened, QuantiseConfig(8), on, quiet=True)
    expected = eval_command(opened, tmp_path, on, quiet=True)["held_out"]
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert 0 < found["logits"] < 0.05


def test_report_is_one_page_that_needs_nothing_else(workdir: Path, capsys: pytest.CaptureFixture[str]):
    (workdir / "report.html").unlink()
    assert cli.run(["llmlab", "report", f"--workdir={workdir}"]) == 0
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    html = (workdir / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)|<link|@import|url\((?!data:|#)""", html)
    assert str(workdir.parent) not in html
    assert "xz -9:" in html
    for sample in (workdir / "samples").iterdir():
        assert verbatim(sample.read_text(errors="replace")) in html


def test_tokenize_shows_pieces_ids_and_bytes_per_token(workdir: Path, capsys: pytest.CaptureFixture[str]):
    text = "def add_argument(self):"
    assert cli.run(["llmlab", "tokenize", f"--workdir={workdir}", text]) == 0
    out = capsys.readouterr().out
    ids = llmlab.open(str(workdir)).tokenizer.encode(text)
    assert all(re.search(rf"\b{id}\b", out) for id in ids)
    assert f"{len(text) / len(ids):.2f}" in out


def test_eval_scores_a_local_task(workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task = tmp_path / "colours.jsonl"
    task.write_text('{"prompt": "The sky is", "choices": ["blue", "loud"], "answer": 0}\n')
    assert cli.run(["llmlab", "eval", f"--workdir={workdir}", "--noheld_out", f"--tasks={task}"]) == 0
    assert re.search(r"colours +1 +0 +acc +[01]\.0000", capsys.readouterr().out)
    (outcome,) = (workdir / "eval" / "colours.jsonl").read_text().splitlines()
    assert json.loads(outcome)["chosen"] in ("blue", "loud")


@pytest.mark.slow
def test_the_built_in_corpus_trains_as_the_readme_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "quickstart"
    arguments = [f"--config={QUICKSTART}:tiny", f"--workdir={path}", "--config.data.batch_size=8"]
    assert cli.run(["llmlab", "train", *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"held-out bits per byte  \d\.\d{4}  \(xz -9, file by file: [12]\.\d{4}\)", out)
    assert (path / "report.html").exists()
    assert rows(path)[-1]["step"] == STEPS
