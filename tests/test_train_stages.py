"""Fine-tuning, rewards, preferences through the command line: what each begins from, compares with and keeps."""

import json
import math
import shutil
import signal

import jax
import numpy as np
import pytest

import llmlab
from llmlab.cli import run
from llmlab.core.config import from_config_dict
from llmlab.core.errors import EXIT_USER_ERROR
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.data.config import DataConfig
from llmlab.data.pipeline import evaluation_batches
from llmlab.data.prepare import prepare_parts
from llmlab.eval.held_out import make_evaluator
from llmlab.objective import NextTokenConfig
from llmlab.train.check import gradient_rows, twin
from llmlab.train.config import resolve
from llmlab.train.describe import estimate
from llmlab.workdir.metrics import MetricsLog
from tests.runs import ROOT, assert_same_run
from tests.stages_for_tests import OBJECTIVES, get_config, write_rows

EXPERIMENT = ROOT / "tests" / "stages_for_tests.py"
LORA = ("--config.adapter.kind=lora", "--config.adapter.rank=4")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a stage in this process, on eight devices; gives the exit code."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows")
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CACHE", str(folder / "cache"))
        patch.setattr("atexit.register", lambda *_: None)

        def start(stage, workdir, *flags, init_from=""):
            given = [f"--config={EXPERIMENT}:{stage},{folder / 'rows'}", f"--workdir={workdir}", *flags]
            given += ["--config.data.batch_size=16"]
            return run(["llmlab", "train", *given, *([f"--init_from={init_from}"] if init_from else [])])

        yield start
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def sft(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert train("pretrain", folder / "pretrain") == 0
    assert train("sft", folder / "sft", init_from=folder / "pretrain") == 0
    return folder / "sft"


@pytest.fixture(scope="module")
def dpo(train, sft):
    assert train("dpo", sft.parent / "dpo", init_from=sft) == 0
    return sft.parent / "dpo"


def evaluations(workdir):
    return [row for row in MetricsLog(workdir / "metrics.jsonl").rows() if "eval/loss" in row]


def test_each_stage_begins_with_what_the_one_before_learned(sft):
    before, after = evaluations(sft)[0], evaluations(sft)[-1]
    pretrained, config = llmlab.open(sft.parent / "pretrain"), llmlab.open(sft).config
    data = from_config_dict(DataConfig, config["data"], "data")
    loss = NextTokenConfig().make(pretrained.model, pretrained.tokenizer.token_bytes())
    batches = evaluation_batches(data, prepare_parts(data, pretrained.tokenizer, "held_out"))
    found = make_evaluator(loss)(pretrained.params, batches)
    assert before["eval/loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert after["eval/loss"] < before["eval/loss"]


def test_preferences_begin_at_log_2_and_rise(dpo):
    before, after = evaluations(dpo)[0], evaluations(dpo)[-1]
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["eval/reference_kl"] == pytest.approx(0, abs=1e-4)
    losses = [row["loss"] for row in MetricsLog(dpo / "metrics.jsonl").rows() if "loss" in row]
    assert losses[-1] < losses[0]
    assert after["eval/margin"] != 0


def test_eval_tells_as_many_pairs_apart_as_training_did(dpo, capsys):
    assert run(["llmlab", "eval", f"--workdir={dpo}", "--noconversations"]) == 0
    found = json.loads((dpo / "eval.json").read_text())["pairs"]
    assert found["accuracy"] == pytest.approx(evaluations(dpo)[-1]["eval/accuracy"])
    assert f"pairs told apart, of {found['pairs']}" in capsys.readouterr().out
    assert len(list((dpo / "reference").iterdir())) == 2, "what training computed serves here too"


def test_under_an_adapter_preferences_begin_at_log_2(train, sft, tmp_path):
    assert train("dpo", tmp_path / "run", *LORA, init_from=sft) == 0
    first = evaluations(tmp_path / "run")[0]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)  # a mean; of each pair it is so to the bit
    assert first["eval/reference_kl"] == 0
    assert not (tmp_path / "run" / "reference").exists(), "the reference is the adapter switched off"


def test_the_reference_is_kept_and_not_computed_again(train, dpo, sft, tmp_path, monkeypatch, capsys):
    """Longer than it was, and without the workdir that it began from."""
    shutil.copytree(dpo, tmp_path / "run")
    moved = sft.with_name("moved")
    shutil.copytree(sft, moved)
    shutil.rmtree(moved / "checkpoints")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["reference"]["workdir"] == str(sft)
    assert train("dpo", tmp_path / "run", init_from=moved) == 0
    assert "log-probabilities of the answers by the reference" not in capsys.readouterr().err
    for kept in (tmp_path / "run" / "reference").glob("*/logp.bin"):
        kept.write_bytes(b"torn")
    assert train("dpo", tmp_path / "run", init_from=moved) == EXIT_USER_ERROR
    assert "the weights that this run stands on are gone" in capsys.readouterr().err
    assert train("dpo", tmp_path / "run", init_from=sft) == 0
    assert "log-probabilities of the answers by the reference" in capsys.readouterr().err


@pytest.mark.slow
def test_stopped_and_continued_is_the_same_run(train, dpo, sft, tmp_path, monkeypatch):
    from llmlab.train import loop

    real, seen = loop._log, []

    def stops_at_3(step, *rest):
        real(step, *rest)
        seen.append(step)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop, "_log", stops_at_3)
    assert train("dpo", tmp_path / "run", init_from=sft) == 75
    monkeypatch.setattr(loop, "_log", real)
    assert seen[-1] < 8
    assert train("dpo", tmp_path / "run", init_from=sft) == 0
    assert_same_run(tmp_path / "run", dpo)


@pytest.mark.parametrize(
    "stage", ["reward", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("ranking", "kto", "steps"))]
)
def test_every_objective_learns(train, sft, tmp_path, stage):
    assert (
        train(stage, tmp_path / stage, "--config.run.steps=24", "--config.optimizer.learning_rate=1e-2", init_from=sft)
        == 0
    )
    losses = [row["loss"] for row in MetricsLog(tmp_path / stage / "metrics.jsonl").rows() if "loss" in row]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert "eval/accuracy" in evaluations(tmp_path / stage)[-1]


@pytest.mark.parametrize(
    "stage", ["dpo", *(pytest.param(stage, marks=pytest.mark.slow) for stage in OBJECTIVES if stage != "dpo")]
)
def test_first_gradients_on_a_mesh_are_one_devices(stage, tmp_path):
    write_rows(tmp_path)
    config = get_config(f"{stage},{tmp_path}")
    config.run.init_from = "somewhere"
    config.optimizer.accumulate = 1
    partition = make_partition(MeshConfig(data=2, fsdp=2, tensor=2))
    for row in gradient_rows(twin(resolve(config), partition), partition):
        assert row.ok, row


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("dpo", (), "objective.name=preference compares with the model it begins from: name its workdir, --init_from"),
        (
            "sft",
            ("--config.data.rows=preference",),
            "is learned from data.rows=text or chat, and not from data.rows=preference",
        ),
        ("sft", ("--config.data.packing=chunk",), "data.packing=chunk cuts texts anywhere"),
        ("sft", ("--config.data.sequence_length=5",), "conversations would be left out, since no answer to learn"),
        ("dpo", ("--config.objective.kind=dpo",), "did you mean"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(train, tmp_path, capsys, stage, flags, message):
    assert train(stage, tmp_path / "run", *flags) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_every_stage_says_beforehand_what_it_costs(tmp_path):
    write_rows(tmp_path)
    for stage in OBJECTIVES:
        config = get_config(f"{stage},{tmp_path}")
        config.run.init_from = "somewhere"
        config.model.vocab_size = 110
        facts = estimate(resolve(config), 8)
        assert facts["activation_bytes"] > 0
        assert facts["tokens"] == 8 * 8 * 64


@pytest.mark.slow
def test_the_policy_begins_at_its_reference_even_where_its_workdir_went_on(train, sft, tmp_path):
    """The reference is known by its hash from the first start on; the run is stopped before it saves anything."""
    shutil.copytree(sft, tmp_path / "sft")
    assert train("dpo", tmp_path / "run", init_from=tmp_path / "sft") == 0
    first = evaluations(tmp_path / "run")[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.copytree(tmp_path / "sft" / "checkpoints" / "4", tmp_path / "sft" / "checkpoints" / "9")
    assert train("dpo", tmp_path / "run", init_from=tmp_path / "sft") == 0
    assert evaluations(tmp_path / "run")[0]["eval/loss"] == first["eval/loss"]
