"""A model of each kind learns the built-in text, and what a workdir is good for works on each of them."""

import argparse
import signal
from pathlib import Path

import jax
import pytest

from llmlab import cli
from llmlab.workdir.metrics import MetricsLog
from tests.runs import assert_same_run, rows

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
KINDS = {
    "dense": "quickstart.py:tiny",
    "experts": "experts.py:tiny",
    "latent attention": "experts.py:tiny_deepseek",
    "state space": "mamba.py:tiny",
    "hybrid": "mamba.py:tiny_hybrid",
}
SETTINGS = ("data.source=python", "data.batch_size=8", "run.steps=60", "run.eval_every=20", "run.eval_batches=4")
RUN = (*SETTINGS, "run.checkpoint_every=20", "run.sample_every=60", "run.log_every=1", "optimizer.ema=0.9")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_resumes_and_can_be_evaluated_and_sampled(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("atexit.register", lambda *_: None)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def llmlab(verb: str, workdir: Path, *flags: str) -> int:
        return cli.run(["llmlab", verb, f"--workdir={workdir}", *flags])

    config = (f"--config={EXPERIMENTS / KINDS[kind]}", *(f"--config.{setting}" for setting in RUN))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert llmlab("train", whole, *config) == 0
    losses = [row["eval/loss"] for row in rows(whole) if "eval/loss" in row]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1
    if "experts" in KINDS[kind]:
        trained = [row for row in rows(whole) if "loss" in row]
        assert all(row["router/max_load"] >= 1 for row in trained)
        assert all(row["router/balance_loss"] > 0 and row["router/z_loss"] > 0 for row in trained)

    append = MetricsLog.append

    def signal_at_thirty(self, row):
        append(self, row)
        if row["step"] == 30 and "loss" in row:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", signal_at_thirty)
        assert llmlab("train", halves, *config) == 75
    assert llmlab("train", halves, *config) == 0
    assert_same_run(halves, whole)

    capsys.readouterr()
    assert llmlab("eval", whole, "--source=text", f"--files={argparse.__file__}", "--split=all") == 0
    assert "bits per byte" in capsys.readouterr().out
    assert llmlab("sample", whole, "--prompt=def ", "--max_tokens=16") == 0
    assert len(capsys.readouterr().out) > len("def ") + 4
    for name, value in before.items():
        jax.config.update(name, value)
