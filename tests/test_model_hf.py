"""Folders in the Hugging Face layout: ours round, sharded, onto meshes; and everything that can be wrong with one."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model import hf
from llmlab.model.config import ModelConfig, deepseek, mamba2, mixtral
from llmlab.model.families import FAMILIES
from llmlab.model.hf_files import INDEX, SINGLE
from llmlab.model.hf_weights import Rule, places
from llmlab.model.rope import RopeConfig
from llmlab.model.routing import ExpertsConfig
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from tests.helpers import VOCAB, random_params, tiny_gpt2, tiny_llama

GEMMA = dict(
    norm_from_zero=True, norm_after=True, scaled_embedding=True, tied_embedding=True, activation="gelu", window=5
)
SMALL = dict(vocab_size=VOCAB, max_positions=64)
CONFIGS: dict[str, ModelConfig] = {
    "gpt2": tiny_gpt2(),
    "llama": tiny_llama(rope=RopeConfig(base=500.0, scaling="llama3", factor=4.0, original_positions=32)),
    "mistral": tiny_llama(window=5, pattern=("local",)),
    "qwen2": tiny_llama(attention_bias="qkv", layers=3),
    "qwen3": tiny_llama(qk_norm="head"),
    "olmo2": tiny_llama(qk_norm="all", norm_before=False, norm_after=True),
    "gemma2": tiny_llama(**GEMMA, pattern=("local", "global"), attention_softcap=3.0, logit_softcap=4.0),
    "gemma3_text": tiny_llama(
        **GEMMA, layers=3, pattern=("local", "local", "global"), qk_norm="head", rope=RopeConfig(local_base=100.0)
    ),
    "olmo3": tiny_llama(
        **dict(layers=3, qk_norm="all", norm_before=False, norm_after=True),
        **dict(window=5, pattern=("local", "local", "global")),
        rope=RopeConfig(scaling="yarn", factor=4.0, original_positions=16, local_base=10_000.0),
    ),
    "mixtral": mixtral("tiny", **SMALL),
    "qwen3_moe": tiny_llama(
        layers=3, qk_norm="head", experts=ExpertsConfig(count=4, width=12, first_dense=1, normalise=False)
    ),
    "gpt_oss": tiny_llama(
        **dict(layers=3, window=5, pattern=("local", "global"), activation="swiglu_clamped", attention_bias="qkvo"),
        **dict(attention_sinks=True, experts=ExpertsConfig(count=4, width=12, bias=True)),
    ),
    "deepseek_v3": deepseek("tiny", **SMALL),
    "mamba2": mamba2(**SMALL, width=16, layers=2, ssm=SsmConfig(state=6, head_dim=4, groups=2, dt_max=0.9)),
}


def saved(config: ModelConfig, folder, **options):
    model = make_model(config)
    params = random_params(model)
    return model, params, hf.save(model, params, folder, **options)


def assert_same(params, wanted):
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other))


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_is_loaded_bit_for_bit(family, tmp_path):
    model, params, saved_as = saved(CONFIGS[family], tmp_path / "out", shard_bytes=20_000)
    assert saved_as.model_type == family
    assert (tmp_path / "out" / INDEX).exists()
    assert not list(tmp_path.glob(".*"))
    again, loaded = hf.load(tmp_path / "out")
    assert_same(loaded, params)
    # What it is made of says the same again, whichever way it is spelt.
    assert hf.config_for(again.config)[1] == hf.config_for(model.config)[1]


def test_weights_lie_over_the_mesh_as_the_model_has_them(tmp_path):
    _, params, _ = saved(tiny_llama(), tmp_path / "out")
    partition = make_partition(MeshConfig(data=2, fsdp=2, tensor=2))
    model, loaded = hf.load(tmp_path / "out", partition=partition)
    assert_same(loaded, params)
    shardings = partition.shardings(model.axes)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


def test_the_dtype_is_the_folders_or_chosen(tmp_path):
    config = dataclasses.replace(tiny_llama(), param_dtype="bfloat16")
    _, params, _ = saved(config, tmp_path / "out")
    model, loaded = hf.load(tmp_path / "out")
    assert model.config.dtype == model.config.param_dtype == "bfloat16"
    assert_same(loaded, params)
    model, loaded = hf.load(tmp_path / "out", dtype="float32")
    assert model.config.dtype == "float32"
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.float32), params))


def test_a_folder_saved_without_its_head_has_shorter_names(tmp_path):
    _, params, _ = saved(tiny_gpt2(), tmp_path / "out")
    path = tmp_path / "out" / SINGLE
    weights = {name.removeprefix("transformer."): x for name, x in load_file(path).items()}
    save_file(weights | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, path)
    assert_same(hf.load(tmp_path / "out")[1], params)


def edit(folder, **keys):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in (content | keys).items() if value != "absent"}))


def retie(folder, change):
    path = folder / SINGLE
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def rename(weights, old, new):
    weights[new] = weights.pop(old)


NORM = "model.norm.weight"
SETTINGS = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), "there is no"),
    "torn config.json": (lambda folder: (folder / "config.json").write_text('{"model_type'), "torn"),
    "another model": (lambda folder: edit(folder, model_type="t5"), "model_type='t5' is not supported"),
    "near another": (lambda folder: edit(folder, model_type="lama"), "did you mean 'llama'"),
    "another head": (lambda folder: edit(folder, architectures=["LlamaForQuestionAnswering"]), "not supported"),
    "two labels": (lambda folder: edit(folder, architectures=["LlamaForSequenceClassification"]), "2 labels are not"),
    "three labels": (
        lambda folder: edit(
            folder, architectures=["LlamaForSequenceClassification"], id2label={str(i): f"LABEL_{i}" for i in range(3)}
        ),
        "3 labels are not",
    ),
    "a foreign key": (lambda folder: edit(folder, logit_scale=2.0), "logit_scale=2.0 is not known"),
    "quantised weights": (lambda folder: edit(folder, quantization_config={"quant_method": "mxfp4"}), "(mxfp4)"),
    "no width": (lambda folder: edit(folder, hidden_size="absent"), "has no hidden_size"),
    "a width that is text": (lambda folder: edit(folder, hidden_size="32"), 'hidden_size="32"'),
    "an unknown activation": (lambda folder: edit(folder, hidden_act="relu2"), "hidden_act"),
    "a width with a fraction": (lambda folder: edit(folder, hidden_size=32.0), "hidden_size=32.0"),
    "a width that is a list": (lambda folder: edit(folder, hidden_size=[32]), "hidden_size=[32]"),
    "a width that is nothing": (lambda folder: edit(folder, hidden_size=None), "hidden_size=null"),
    "no positions": (lambda folder: edit(folder, max_position_embeddings=None), "max_position_embeddings=null"),
    "an activation that is a list": (lambda folder: edit(folder, hidden_act=["silu"]), 'hidden_act=["silu"]'),
    "a bias that is text": (lambda folder: edit(folder, attention_bias="no"), 'attention_bias="no"'),
    "a base that is text": (lambda folder: edit(folder, rope_parameters=None, rope_theta="abc"), 'rope_theta="abc"'),
    "scaling that is text": (
        lambda folder: edit(folder, rope_parameters=None, rope_scaling="linear"),
        'rope_scaling="linear"',
    ),
    "a kind that is a list": (lambda folder: edit(folder, model_type=["llama"]), "model_type=['llama']"),
    "exact gelu": (lambda folder: edit(folder, hidden_act="gelu"), 'hidden_act="gelu" is not supported'),
    "dynamic rope": (
        lambda folder: edit(folder, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type='dynamic' is not supported",
    ),
    "part of the head turned": (
        lambda folder: edit(folder, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "an unknown rope key": (
        lambda folder: edit(
            folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "extra": 1}
        ),
        "'extra'",
    ),
    "a bias in the mlp only": (lambda folder: edit(folder, mlp_bias=True), "mlp_bias"),
}
FILES = {
    "cut short": (lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-100]), "cut short"),
    "cut in the header": (lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:50]), "cut"),
    "empty": (lambda folder: (folder / SINGLE).write_bytes(b""), "cut short or corrupt"),
    "garbage": (lambda folder: (folder / SINGLE).write_bytes(b"\xff" * 1000), "cut short or corrupt"),
    "missing": (lambda folder: (folder / SINGLE).unlink(), "has neither"),
    "pickled": (lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"), "can execute code"),
    "a weight missing": (lambda folder: retie(folder, lambda w: w.pop(NORM)), f"no weight {NORM}"),
    "a weight too many": (lambda folder: retie(folder, lambda w: w.update(more=w[NORM])), "weight 'more'"),
    "a weight with a path": (
        lambda folder: retie(folder, lambda w: w.update({"../../etc/evil": w[NORM]})),
        "weight '../../etc/evil'",
    ),
    "a layer too many": (lambda folder: edit(folder, num_hidden_layers=1), "model.layers.1"),
    "a weight of another shape": (
        lambda folder: retie(folder, lambda w: w.update({NORM: w[NORM][:-1]})),
        f"{NORM} has shape (31,), not (32,)",
    ),
    "a weight turned": (
        lambda folder: retie(
            folder,
            lambda w: w.update(
                {"model.layers.0.mlp.up_proj.weight": np.ascontiguousarray(w["model.layers.0.mlp.up_proj.weight"].T)}
            ),
        ),
        "up_proj.weight has shape",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "out"
    saved(tiny_llama(width=32, mlp_width=48), folder)
    return folder


@pytest.mark.parametrize("case", SETTINGS | FILES)
def test_what_is_wrong_is_said_in_a_line(case, good, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(good, folder)
    spoil, said = (SETTINGS | FILES)[case]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        hf.load(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def shards(folder) -> tuple[dict, list]:
    index = json.loads((folder / INDEX).read_text())
    return index, sorted(set(index["weight_map"].values()))


def swap(folder):
    index, (first, second, *_) = shards(folder)
    moved = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][moved] = second
    (folder / INDEX).write_text(json.dumps(index))


def relist(folder, change):
    index, _ = shards(folder)
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


SHARDS = {
    "a shard missing": (lambda folder: (folder / shards(folder)[1][1]).unlink(), "is missing"),
    "a shard cut short": (
        lambda folder: (folder / shards(folder)[1][1]).write_bytes((folder / shards(folder)[1][1]).read_bytes()[:-9]),
        "cut short",
    ),
    "a weight said to be in another": (swap, "does not fit"),
    "a weight listed that is nowhere": (
        lambda folder: relist(folder, lambda w: w.update({"model.more": shards(folder)[1][0]})),
        "model.more is not there",
    ),
    "a weight not listed": (lambda folder: relist(folder, lambda w: w.pop(NORM)), "is there and not listed"),
    "a file elsewhere": (
        lambda folder: relist(folder, lambda w: w.update({NORM: "../outside.safetensors"})),
        "names the file '../outside.safetensors'",
    ),
    "an absolute file": (lambda folder: relist(folder, lambda w: w.update({NORM: "/etc/passwd"})), "'/etc/passwd'"),
    "an index that is torn": (lambda folder: (folder / INDEX).write_text("{"), "torn"),
    "an index of nothing": (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_what_is_wrong_with_shards_is_said_in_a_line(case, tmp_path):
    saved(tiny_llama(width=32), tmp_path / "out", shard_bytes=20_000)
    spoil, said = SHARDS[case]
    spoil(tmp_path / "out")
    with pytest.raises(UserError) as caught:
        hf.load(tmp_path / "out")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_predict_further_tokens_are_not_read_and_said(tmp_path, caplog):
    """DeepSeek-V3's lie behind the last layer; more of them than config.json counts are an error."""
    _, params, _ = saved(CONFIGS["deepseek_v3"], tmp_path / "out")
    further = {f"model.layers.3.{name}": np.ones(4, np.float32) for name in ("eh_proj.weight", "enorm.weight")}
    retie(tmp_path / "out", lambda w: w.update(further))
    with pytest.raises(UserError, match=r"model\.layers\.3\.eh_proj"):
        hf.load(tmp_path / "out")
    edit(tmp_path / "out", num_nextn_predict_layers=1)
    assert_same(hf.load(tmp_path / "out")[1], params)
    assert "not read: 2 tensors: layers behind the last, which num_nextn_predict_layers=1 counts" in caplog.text


MIXED = {
    "experts only below": ("qwen3_moe", dict(mlp_only_layers=[2]), "mlp_only_layers=[2]"),
    "experts in every second layer": ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    "another gate": ("gpt_oss", dict(swiglu_limit=5.0), "swiglu_limit=5.0"),
    "another router": ("deepseek_v3", dict(scoring_func="softmax"), 'scoring_func="softmax"'),
    "biases in latent attention": ("deepseek_v3", dict(attention_bias=True), "attention_bias=true"),
    "rotary positions of one kind for two": (
        "gemma3_text",
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "should have full_attention",
    ),
    "experts of another width": ("mixtral", dict(intermediate_size=16), "experts.0.w1.weight has shape"),
}


@pytest.mark.parametrize("case", MIXED)
def test_what_a_family_does_not_have_is_said_in_a_line(case, tmp_path):
    family, keys, said = MIXED[case]
    saved(CONFIGS[family], tmp_path / "out")
    edit(tmp_path / "out", **keys)
    with pytest.raises(UserError) as caught:
        hf.load(tmp_path / "out")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_no_family_is_not_saved(tmp_path):
    model = make_model(tiny_llama(qk_norm="head", attention_softcap=2.0))
    with pytest.raises(UserError, match=r"no open family .* comes nearest, but for model\.attention_softcap=2\.0"):
        hf.save(model, random_params(model), tmp_path / "out")
    ssm = SsmConfig(state=6, head_dim=4)
    hybrid = make_model(mamba2(**SMALL, width=16, layers=2, pattern=("mamba", "global"), ssm=ssm))
    with pytest.raises(UserError, match="no open family"):
        hf.save(hybrid, random_params(hybrid), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    saved(tiny_llama(), tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        saved(tiny_llama(), tmp_path / "out")


def test_a_table_names_every_weight_once():
    model = make_model(tiny_llama())
    table = FAMILIES[0].weights
    with pytest.raises(UserError, match=r"two rules of the weight table give model\.norm\.weight"):
        places(model, (*table, Rule("model.norm.weight", ("head.norm.scale",))))
    with pytest.raises(UserError, match=r"both fill head\.norm\.scale"):
        places(model, (*table, Rule("model.other.weight", ("head.norm.scale",))))
    with pytest.raises(UserError, match=r"no rule for head\.norm\.scale"):
        places(model, tuple(rule for rule in table if rule.theirs != "model.norm.weight"))
