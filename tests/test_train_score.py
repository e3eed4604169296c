"""Reward models through the command line: what starts one, what an adapter over it saves, and what every verb says."""

import dataclasses
import json
import signal
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmlab
from llmlab.cli import run
from llmlab.core.arrays import Mean, named_key
from llmlab.core.config import to_json
from llmlab.core.errors import EXIT_USER_ERROR
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.model.adapters import adapter_of
from llmlab.model.quantise import QuantisedLeaf
from llmlab.model.score import SCORE, fresh_score
from llmlab.model.transformer import make_model
from llmlab.model.types import Inputs
from llmlab.objective import OBJECTIVES
from llmlab.objective.next_token import NextTokenConfig
from llmlab.workdir.checkpoints import Checkpoints, saved_arrays
from llmlab.workdir.files import Workdir
from llmlab.workdir.metrics import MetricsLog
from tests.experiments_for_tests import write_texts
from tests.helpers import random_params, tiny_llama
from tests.runs import EXPERIMENT, arrays, assert_same_run, rows

STEPS = 4
SCORES = ("model.head=score", "objective.name=squares")
QLORA = ("adapter.kind=lora", "adapter.rank=4", "adapter.base_bits=4", "adapter.base_group=16")


@dataclasses.dataclass(frozen=True)
class SquaresConfig(NextTokenConfig):
    """A score that tells odd tokens from even ones."""

    name: Literal["squares"] = "squares"

    def make(self, model, token_bytes_V):
        def loss(params, batch, key):
            out = model.apply(params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))
            apart_BT = model.score(params, out.hidden_BTD) - batch.tokens_BT % 2
            total = Mean(jnp.sum(jnp.square(apart_BT) * batch.mask_BT), jnp.sum(batch.mask_BT))
            return total, {"loss": total}

        return loss


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains in this process, on eight devices; gives the exit code."""
    folder = tmp_path_factory.mktemp("texts")
    settings = ("data.batch_size=16", f"run.steps={STEPS}", "run.eval_every=2", "run.eval_batches=0")
    settings += ("run.checkpoint_every=2", "optimizer.learning_rate=1e-2", "model.layers=1", "model.scan=False")
    given = [f"--config={EXPERIMENT}:{write_texts(folder / 'texts')}", *(f"--config.{s}" for s in settings)]
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CACHE", str(folder / "cache"))
        patch.setattr("atexit.register", lambda *_: None)
        patch.setitem(OBJECTIVES, "squares", SquaresConfig)

        def start(workdir, *more, init_from=""):
            flags = [f"--workdir={workdir}", *(f"--config.{setting}" for setting in more)]
            return run(["llmlab", "train", *given, *flags, *([f"--init_from={init_from}"] if init_from else [])])

        yield start
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def base(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "base"
    assert train(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def reward(train, base):
    workdir = base.parent / "reward"
    assert train(workdir, *SCORES, init_from=base) == 0
    return workdir


@pytest.fixture(scope="module")
def qlora(train, base):
    workdir = base.parent / "qlora"
    assert train(workdir, *SCORES, *QLORA, init_from=base) == 0
    return workdir


def evaluations(workdir):
    return {row["step"]: row["eval/loss"] for row in rows(workdir) if "eval/loss" in row}


@pytest.mark.slow
def test_it_starts_from_the_trunk_and_learns(base, reward):
    assert evaluations(reward)[STEPS] < evaluations(reward)[0]
    saved = saved_arrays(reward / "checkpoints", STEPS)
    assert saved["trainable.head.score_D"] == ((16,), "float32")
    assert not any("unembedding" in name for name in saved)
    opened = llmlab.open(reward)
    assert opened.model.config.head == "score"
    trunk = llmlab.open(base).params["layers"]["0"]["mlp"]["up_DF"]
    moved = np.abs(opened.params["layers"]["0"]["mlp"]["up_DF"] - trunk)
    assert 0 < moved.max() < 0.1


@pytest.mark.slow
def test_the_first_score_is_the_run_s_whatever_the_mesh(train, base, tmp_path):
    """And that of an adapter: a step of no size leaves it as it began."""
    still = ("optimizer.learning_rate=1e-30", "run.steps=1", "run.checkpoint_every=1", "run.seed=3")
    model = make_model(dataclasses.replace(llmlab.open(base).model.config, head="score"))
    expected = fresh_score(model, named_key(3, "init"))
    for name, more in {
        "whole": (),
        "mesh": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
        "lora": ("adapter.kind=lora",),
    }.items():
        assert train(tmp_path / name, *SCORES, *still, *more, init_from=base) == 0
        np.testing.assert_allclose(arrays(tmp_path / name, 1)["trainable.head.score_D"], expected, rtol=1e-6)


@pytest.mark.slow
def test_an_adapter_over_4_bits_saves_the_score_beside_it_and_opens(qlora):
    assert evaluations(qlora)[STEPS] < evaluations(qlora)[0]
    for tree in ("trainable", "ema"):
        held = {name for name in saved_arrays(qlora / "checkpoints", STEPS) if name.startswith(f"{tree}.")}
        assert f"{tree}.{SCORE}" in held
        assert all(name.endswith((".a", ".b")) for name in held - {f"{tree}.{SCORE}"})
    opened = llmlab.open(qlora)
    assert isinstance(opened.params["layers"]["0"]["mlp"]["up_DF"].base, QuantisedLeaf)
    np.testing.assert_array_equal(opened.params["head"]["score_D"], arrays(qlora, STEPS)[f"ema.{SCORE}"])


@pytest.mark.slow
@pytest.mark.parametrize("more, name", [((), "reward"), (QLORA, "qlora")])
def test_stopped_and_continued_is_the_same_run(train, base, more, name, request, tmp_path, monkeypatch):
    append = MetricsLog.append

    def signal_at_two(self, row):
        append(self, row)
        if row["step"] == 2 and "loss" in row:
            signal.raise_signal(signal.SIGTERM)

    halves = tmp_path / "halves"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", signal_at_two)
        assert train(halves, *SCORES, *more, init_from=base) == 75
    assert train(halves, *SCORES, *more, init_from=base) == 0
    assert_same_run(halves, request.getfixturevalue(name))


@pytest.mark.slow
def test_another_reward_model_starts_from_it_with_its_score(train, reward, qlora, tmp_path):
    for workdir in (reward, qlora):
        mine = tmp_path / workdir.name
        assert train(mine, *SCORES, init_from=workdir) == 0
        # A quantised base is merged: the same numbers, rounded elsewhere.
        assert evaluations(mine)[0] == pytest.approx(evaluations(workdir)[STEPS], rel=1e-4)
    mine = tmp_path / "lora"
    assert train(mine, *SCORES, "adapter.kind=lora", init_from=reward) == 0
    assert evaluations(mine)[0] == pytest.approx(evaluations(reward)[STEPS], rel=1e-6)


def test_every_verb_says_what_it_is_in_a_line(train, tmp_path, capsys):
    reward, tokens = saved(tmp_path / "reward", "score"), saved(tmp_path / "tokens", "tokens")
    for verb in (["sample", "--prompt=the"], ["quantise"]):
        assert run(["llmlab", *verb, f"--workdir={reward}"]) == EXIT_USER_ERROR
        error = capsys.readouterr().err.strip()
        assert "this is a reward model (model.head=score): it scores text and predicts no tokens" in error
        assert "\n" not in error
    says = "is a reward model (model.head=score), which has learned to predict no tokens"
    for more, init_from, words in (
        ((), reward, says),
        (("adapter.kind=lora",), reward, says),
        (("model.head=score",), tokens, "objective.name=next_token needs model.head=tokens, and it is score"),
        ((*SCORES, "run.sample_every=2"), tokens, "run.sample_every=2 asks a reward model"),
    ):
        assert train(tmp_path / "new", *more, init_from=init_from) == EXIT_USER_ERROR
        assert words in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def saved(path, head):
    """A workdir of such a model."""
    workdir, config = Workdir(path), tiny_llama(head=head)
    path.mkdir()
    workdir.write_config({"model": to_json(config)}, {})
    CharacterTokenizer("the ").save(workdir.tokenizer)
    checkpoints = Checkpoints(workdir.checkpoints)
    checkpoints.save(0, {"trainable": random_params(make_model(config))}, wait=True)
    checkpoints.close()
    return path


@pytest.mark.slow
def test_it_goes_into_peft_s_format_and_comes_back_over_weights_that_predict_tokens(base, qlora, tmp_path):
    assert run(["llmlab", "convert", str(qlora), str(tmp_path / "peft"), "--adapter_only"]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    assert run(["llmlab", "convert", str(tmp_path / "peft"), str(tmp_path / "back"), f"--base={base}"]) == 0
    back = llmlab.open(tmp_path / "back")
    assert (back.config["objective"]["name"], back.config["data"]["rows"]) == ("reward", "preference")
    mine, theirs = adapter_of(back.params), adapter_of(llmlab.open(qlora).params)
    assert mine.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
