"""Adapters through the command line: what a run trains, saves and refers to, and every verb that opens it again."""

import json
import random
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmlab
from llmlab.cli import run
from llmlab.core.errors import EXIT_USER_ERROR, UserError
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.model import hf
from llmlab.model.adapters import AdaptedLeaf, AdapterConfig, adapter_axes, add_adapter
from llmlab.model.quantise import QuantisedLeaf
from llmlab.model.transformer import make_model
from llmlab.train.optimizer import OptimizerConfig, make_optimizer
from llmlab.workdir.checkpoints import saved_arrays
from llmlab.workdir.metrics import MetricsLog
from llmlab.workdir.open import weights_for
from tests.experiments_for_tests import WORDS, write_texts
from tests.helpers import random_params, relative, tiny_llama
from tests.runs import EXPERIMENT, ROOT, arrays, assert_same_run, rows

STEPS = 6
LORA = ("adapter.kind=lora", "adapter.rank=4", "adapter.include=attention")
DORA_OVER_4_BITS = ("adapter.kind=dora", "adapter.rank=4", "adapter.base_bits=4", "adapter.base_group=16")
TOKENS_BT = np.arange(24, dtype=np.int32).reshape(2, 12) % 20


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains in this process, on eight devices; gives the exit code."""
    folder = tmp_path_factory.mktemp("texts")
    settings = ("data.batch_size=16", f"run.steps={STEPS}", "run.eval_every=3", "run.eval_batches=0")
    settings += ("run.checkpoint_every=3", "optimizer.learning_rate=1e-2")
    built_in = f"{EXPERIMENT}:{write_texts(folder / 'texts')}"
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMLAB_CACHE", str(folder / "cache"))
        patch.setattr("atexit.register", lambda *_: None)

        def start(workdir, *more, init_from="", flags=(), config=built_in):
            given = [*flags, *(f"--config.{setting}" for setting in (*settings, *more)), f"--workdir={workdir}"]
            return run(
                ["llmlab", "train", f"--config={config}", *given, *([f"--init_from={init_from}"] if init_from else [])]
            )

        yield start
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def base(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "base"
    assert train(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def lora(train, base):
    workdir = base.parent / "lora"
    assert train(workdir, *LORA, init_from=base) == 0
    return workdir


@pytest.fixture(scope="module")
def dora(train, base):
    workdir = base.parent / "dora"
    assert train(workdir, *DORA_OVER_4_BITS, init_from=base) == 0
    return workdir


def evaluations(workdir):
    return {row["step"]: row["eval/loss"] for row in rows(workdir) if "eval/loss" in row}


def logits(opened):
    return jax.jit(opened.model.logits)(opened.params, TOKENS_BT)


def test_it_begins_with_exactly_the_loss_of_its_base_and_lowers_it(base, lora):
    assert evaluations(lora)[0] == evaluations(base)[STEPS]
    assert evaluations(lora)[STEPS] < evaluations(lora)[0]


@pytest.mark.slow
def test_over_a_quantised_base_it_begins_near_it_and_lowers_the_loss(base, dora):
    assert evaluations(dora)[0] != evaluations(base)[STEPS]
    assert evaluations(dora)[0] == pytest.approx(evaluations(base)[STEPS], rel=0.02)
    assert evaluations(dora)[STEPS] < evaluations(dora)[0]


def test_a_checkpoint_holds_the_adapter_and_names_the_base(base, lora):
    names = ("query_DNH", "key_DKH", "value_DKH", "out_NHD")
    matrices = {f"layers.0.attention.{name}" for name in names}
    for tree in ("trainable", "ema"):
        held = {name for name in saved_arrays(lora / "checkpoints", STEPS) if name.startswith(f"{tree}.")}
        assert held == {f"{tree}.{path}.{part}" for path in matrices for part in "ab"}
    assert not any(name.startswith("frozen") for name in saved_arrays(lora / "checkpoints", STEPS))
    recorded = json.loads((lora / "config.json").read_text())["base"]
    manifest = json.loads((base / "checkpoints" / str(STEPS) / "manifest.json").read_text())
    assert recorded == {"workdir": str(base), "step": STEPS, "digest": manifest["digest"]}


@pytest.mark.slow
@pytest.mark.parametrize("settings, name", [(LORA, "lora"), (DORA_OVER_4_BITS, "dora")])
def test_stopped_and_continued_is_the_same_run(train, base, settings, name, request, tmp_path, monkeypatch):
    append = MetricsLog.append

    def signal_at_three(self, row):
        append(self, row)
        if row["step"] == 3 and "loss" in row:
            signal.raise_signal(signal.SIGTERM)

    halves = tmp_path / "halves"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", signal_at_three)
        assert train(halves, *settings, init_from=base) == 75
    assert train(halves, *settings, init_from=base) == 0
    assert_same_run(halves, request.getfixturevalue(name))


def test_it_opens_as_the_adapted_model(base, lora):
    opened = llmlab.open(lora)
    leaf = opened.params["layers"]["0"]["attention"]["query_DNH"]
    assert isinstance(leaf, AdaptedLeaf)
    saved = arrays(lora, STEPS)
    np.testing.assert_array_equal(leaf.update.b, saved["ema.layers.0.attention.query_DNH.b"])
    beneath = llmlab.open(base)
    np.testing.assert_array_equal(leaf.base, beneath.params["layers"]["0"]["attention"]["query_DNH"])
    assert relative(logits(opened), logits(beneath)) > 1e-3


@pytest.mark.slow
def test_over_4_bits_it_opens_as_the_adapted_model(dora):
    shapes = saved_arrays(dora / "checkpoints", STEPS)
    assert shapes["trainable.layers.0.mlp.up_DF.magnitude"] == ((2, 64), "float32")
    assert not any(name.startswith("frozen") or "unembedding" in name for name in shapes)
    up = llmlab.open(dora).params["layers"]["0"]["mlp"]["up_DF"]
    assert isinstance(up.base, QuantisedLeaf)
    assert up.base.bits == 4
    assert up.base.scales.shape == (2, 1, 64)


@pytest.mark.slow
def test_eval_finds_the_loss_that_training_ended_with_and_sample_writes(lora, capsys):
    assert run(["llmlab", "eval", f"--workdir={lora}"]) == 0
    found = json.loads((lora / "eval.json").read_text())["held_out"]
    assert found["loss"] == pytest.approx(evaluations(lora)[STEPS], rel=1e-5)
    capsys.readouterr()
    assert run(["llmlab", "sample", f"--workdir={lora}", "--prompt=the", "--max_tokens=8"]) == 0
    assert capsys.readouterr().out.startswith("the")


@pytest.mark.slow
def test_another_run_starts_from_the_merged_weights(lora, dora):
    for workdir in (lora, dora):
        opened = llmlab.open(workdir)
        merged = weights_for(workdir, opened.model)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
        assert jax.tree.structure(merged) == jax.tree.structure(
            opened.model.axes, is_leaf=lambda n: isinstance(n, tuple)
        )
        assert relative(logits(opened._replace(params=merged)), logits(opened)) < 1e-5


def test_a_moved_base_is_one_error_that_says_how_to_mend_it(train, base, lora, tmp_path, capsys):
    mine = shutil.copytree(lora, tmp_path / "lora")
    moved = base.rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError) as caught:
            llmlab.open(mine)
        assert "\n" not in str(caught.value)
        assert re.search(rf"there is no {base}/checkpoints/{STEPS} .*--init_from=NEW_WORKDIR", str(caught.value))
        assert train(mine, *LORA, init_from=base) == EXIT_USER_ERROR
        capsys.readouterr()
        assert train(mine, *LORA, init_from=moved) == 0
        assert f"going on from step {STEPS}" in capsys.readouterr().err
        assert llmlab.open(mine).step == STEPS
    finally:
        moved.rename(base)


def test_another_base_in_its_place_is_refused(train, base, lora, tmp_path, capsys):
    mine = shutil.copytree(lora, tmp_path / "lora")
    content = json.loads((mine / "config.json").read_text())
    content["base"]["digest"] = "0123456789abcdef"
    (mine / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is not what this run was trained over \(its hash was 0123456789ab, now"):
        llmlab.open(mine)
    assert train(mine, *LORA, init_from=base) == EXIT_USER_ERROR
    assert "is not what this run was trained over" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_trains_over_converted_weights(train, tmp_path, capsys):
    """`llmlab convert`, then every verb on the weights that came in, on the adapter over them, and back again."""
    prose = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(prose))
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=320), prose)
    model = make_model(tiny_llama(vocab_size=tokenizer.vocab_size))
    hf.save(model, random_params(model), tmp_path / "model", tokenizer)
    imported, mine = tmp_path / "imported", tmp_path / "mine"
    assert run(["llmlab", "convert", str(tmp_path / "model"), str(imported)]) == 0
    config, text = f"{ROOT}/experiments/adapter.py:{imported}", ("source=text", f"files={tmp_path / 'text.txt'}")
    settings = (*(f"data.{setting}" for setting in text), "data.sequence_length=32", "run.sample_every=0")
    assert train(mine, *settings, "adapter.base_bits=8", config=config) == 0
    assert evaluations(mine)[STEPS] < evaluations(mine)[0] - 0.05
    beneath, opened = llmlab.open(imported), llmlab.open(mine)
    leaf = opened.params["layers"]["0"]["mlp"]["up_DF"]
    dense = np.asarray(leaf.base.dense(jnp.float32))
    assert 0 < relative(dense, beneath.params["layers"]["0"]["mlp"]["up_DF"]) < 0.01
    capsys.readouterr()
    for workdir in (imported, mine):
        named = [f"--workdir={workdir}", *(f"--{setting}" for setting in text)]
        assert run(["llmlab", "sample", named[0], "--prompt=the", "--max_tokens=4"]) == 0
        assert run(["llmlab", "eval", *named, "--batch_size=8"]) == 0
        assert run(["llmlab", "quantise", *named, "--bits=4", "--group=16", "--rows=8"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("the")
        assert re.search(r"bits per byte +\d+\.\d{4}, [+-]\d\.\d{4} quantised", out)
    assert run(["llmlab", "convert", str(mine), str(tmp_path / "back")]) == 0
    again, merged = hf.load(tmp_path / "back")
    assert hf.identity(again.config) == hf.identity(model.config)
    assert relative(jax.jit(again.logits)(merged, TOKENS_BT), logits(opened)) < 1e-5


@pytest.mark.slow
def test_over_experts_in_4_bits_it_trains_and_their_correction_stays(train, tmp_path):
    experts = ("count=4", "chosen=2", "correction=True", "correction_speed=0.01", "score=sigmoid", "first_dense=1")
    settings = ("optimizer.ema=0", *(f"model.experts.{setting}" for setting in experts))
    base, mine = tmp_path / "base", tmp_path / "mine"
    assert train(base, *settings) == 0
    adapter = ("adapter.kind=lora", "adapter.rank=4", "adapter.base_bits=4", "adapter.base_group=16")
    assert train(mine, *settings, *adapter, init_from=base) == 0
    assert evaluations(mine)[STEPS] < evaluations(mine)[0]
    correction_LE = arrays(base, STEPS)["trainable.layers.1.mlp.correction_E"]
    assert np.abs(correction_LE).max() > 0.005
    opened = llmlab.open(mine).params["layers"]["1"]["mlp"]
    np.testing.assert_array_equal(opened["correction_E"], correction_LE)
    assert isinstance(opened["gate_EDF"].base, QuantisedLeaf)
    saved = saved_arrays(mine / "checkpoints", STEPS)
    assert "trainable.layers.1.mlp.gate_EDF.a" in saved
    assert not any("correction_E" in name or "router" in name for name in saved)


def test_it_goes_into_peft_s_format_and_comes_back(base, lora, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "back"
    assert run(["llmlab", "convert", str(lora), str(out), "--adapter_only"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert run(["llmlab", "convert", str(out), str(back), f"--base={base}"]) == 0
    np.testing.assert_array_equal(logits(llmlab.open(back)), logits(llmlab.open(lora)))
    capsys.readouterr()
    for source, flags, words in (
        (out, (), "--base=runs/model"),
        (out, (f"--base={lora}",), "is an adapter itself"),
        (base, ("--adapter_only",), "leave out --adapter_only"),
        (base, (f"--base={base}",), "has no adapter_config.json"),
        (base, ("--dtype=bfloat16",), "--dtype=bfloat16 is for open weights"),
        (out, (f"--base={base}", "--adapter_only"), "--adapter_only is for the workdir"),
    ):
        assert run(["llmlab", "convert", str(source), str(tmp_path / "new"), *flags]) == EXIT_USER_ERROR
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            ("adapter.kind=lora",),
            "adapter.kind=lora needs weights to adapt: name their workdir, --init_from=WORKDIR",
        ),
        (("adapter.base_bits=4",), "set adapter.kind too"),
        (("adapter.kind=lorra",), "did you mean 'lora'?"),
    ],
)
def test_settings_that_do_not_fit_are_refused(train, settings, words, tmp_path, capsys):
    assert train(tmp_path / "w", *settings) == EXIT_USER_ERROR
    assert words in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_group_that_does_not_divide_names_the_keys(train, base, tmp_path, capsys):
    assert train(tmp_path / "w", "adapter.kind=lora", "adapter.base_bits=4", init_from=base) == EXIT_USER_ERROR
    assert "adapter.base_group=0: group=32 does not divide the 16 inputs" in capsys.readouterr().err


def test_print_config_counts_what_is_trained(train, base, capsys):
    assert train("", *DORA_OVER_4_BITS, init_from=base, flags=("--print_config",)) == 0
    # A layer: rank 4 on both sides of four 16 x 16 and three 16 x 64, and a magnitude for every output.
    trained = 2 * (4 * (4 * 32 + 3 * 80) + 4 * 16 + 2 * 64 + 16)
    assert f"trained           {trained:,} of an adapter" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_decay_and_muon_go_by_the_axes_of_an_adapter(name, kind):
    model = make_model(tiny_llama())
    adapter_config = AdapterConfig(kind=kind, rank=4)
    rng = np.random.default_rng(3)
    adapter = jax.eval_shape(lambda: add_adapter(model, random_params(model), adapter_config, jax.random.key(0)))
    adapter = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), adapter)
    axes = adapter_axes(model, adapter_config)
    config = OptimizerConfig(name=name, learning_rate=0.5, warmup=0, schedule="constant", weight_decay=0.2)
    optimizer = make_optimizer(config, 10, axes)
    update_of = jax.jit(lambda gradients, adapter: optimizer.update(gradients, optimizer.init(adapter), adapter)[0])
    updates = update_of(jax.tree.map(np.zeros_like, adapter), adapter)
    for path, update in adapter.items():
        for part in ("a", "b"):
            np.testing.assert_allclose(getattr(updates[path], part), -0.1 * getattr(update, part), rtol=1e-5)
        if kind == "dora":
            np.testing.assert_allclose(updates[path].magnitude, 0 * update.magnitude, atol=1e-7)
    if name == "muon":
        gradients = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), adapter)
        path = "layers.0.attention.out_NHD"
        moved, decayed = update_of(gradients, adapter)[path], updates[path]
        for matrix in ((moved.a - decayed.a)[1].reshape(16, 4), (moved.b - decayed.b)[0].reshape(4, 16)):
            singular = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
            assert singular.max() / singular.min() < 1.8
