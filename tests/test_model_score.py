"""The score of reward models: against numpy in float64, on meshes, in packed rows, under adapters, in folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition, single_device
from llmlab.infer.generate import generate, stream
from llmlab.model import hf, peft
from llmlab.model.adapters import AdapterConfig, adapted, adapter_axes, adapter_of, add_adapter, frozen_base
from llmlab.model.config import deepseek, gpt2, mamba2
from llmlab.model.cost import abstract_params, flops_per_token, parameter_count, product_parameters
from llmlab.model.matrices import leaf_at, matrices, with_leaves
from llmlab.model.quantise import QuantisedLeaf
from llmlab.model.score import SCORE, fresh_score
from llmlab.model.transformer import make_model
from llmlab.model.types import Inputs, inputs
from llmlab.train.optimizer import OptimizerConfig, make_optimizer
from llmlab.train.state import merge, start, state_shardings
from tests.helpers import VOCAB, assert_close, host, packed_batch, random_params, relative, tiny_gpt2, tiny_llama
from tests.test_model_transformer import reference_logits

FAMILIES = {
    "gpt2": tiny_gpt2(head="score"),
    "llama": tiny_llama(head="score"),
    "windows, soft-caps": tiny_llama(
        head="score", layers=3, window=5, pattern=("local", "global"), attention_softcap=3.0, logit_softcap=4.0
    ),
}
LLAMA = make_model(FAMILIES["llama"])
ONE_LAYER = make_model(tiny_llama(head="score", layers=1))


def score_of(model, params, batch):
    out = model.apply(params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))
    return model.score(params, out.hidden_BTD)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_float64_reference(family):
    model = make_model(FAMILIES[family])
    params = random_params(model)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    score_BT = jax.jit(lambda p: model.score(p, model.apply(p, inputs(tokens_BT)).hidden_BTD))(params)
    assert score_BT.shape == (2, 12)
    # A score is a logit of a vocabulary of one, which no soft-cap bends.
    config = dataclasses.replace(model.config, tied_embedding=False, logit_softcap=None)
    head = params["head"] | {"unembedding_DV": params["head"]["score_D"][:, None]}
    for row in range(2):
        expected_T1 = reference_logits(config, params | {"head": head}, np.asarray(tokens_BT[row]))
        assert relative(score_BT[row], expected_T1[:, 0]) < 2e-6


def test_what_has_a_score_has_no_unembedding():
    for config in FAMILIES.values():
        assert sorted(abstract_params(make_model(config))["head"]) == ["norm", "score_D"]
    tokens = dataclasses.replace(FAMILIES["llama"], head="tokens")
    spared = parameter_count(abstract_params(make_model(tokens))) - parameter_count(abstract_params(LLAMA))
    assert spared == 16 * (VOCAB - 1)
    assert product_parameters(tokens) - product_parameters(LLAMA.config) == 16 * (VOCAB - 1)
    assert flops_per_token(tokens, 8) - flops_per_token(LLAMA.config, 8) == 6 * 16 * (VOCAB - 1)


def test_it_begins_normal_in_float32_whatever_the_weights_are_stored_as():
    model = make_model(tiny_llama(head="score", width=1024, layers=1, mlp_width=32, param_dtype="bfloat16"))
    score_D = fresh_score(model, jax.random.key(3))
    assert score_D.dtype == jnp.float32
    assert np.std(score_D) * 1025**0.5 == pytest.approx(1, abs=0.1)
    assert abs(np.mean(score_D)) * 1025**0.5 < 0.1


def test_it_is_scored_in_float32_where_the_model_computes_in_less():
    model = make_model(tiny_llama(head="score", dtype="bfloat16", param_dtype="bfloat16"))
    hidden_BTD = jax.random.normal(jax.random.key(0), (2, 3, 16), jnp.bfloat16)
    params = random_params(model)
    score_BT = model.score(params, hidden_BTD)
    assert score_BT.dtype == jnp.float32
    expected = np.asarray(hidden_BTD, np.float64) @ np.asarray(params["head"]["score_D"], np.float64)
    assert relative(score_BT, expected) < 1e-6


def test_a_fresh_score_is_that_of_init_on_any_mesh():
    expected = jax.jit(ONE_LAYER.init)(jax.random.key(5))["head"]["score_D"]
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        model = make_model(ONE_LAYER.config, make_partition(mesh))
        score_D = jax.jit(lambda key, model=model: fresh_score(model, key))(jax.random.key(5))
        np.testing.assert_array_equal(score_D, expected)
        assert score_D.sharding.is_equivalent_to(model.partition.sharding("embed"), 1)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, fsdp=2, tensor=2), pytest.param(MeshConfig(fsdp=4, sequence=2), marks=pytest.mark.slow)],
)
def test_scores_and_gradients_on_a_mesh_are_one_devices(mesh):
    weights_BT = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)

    def found(partition):
        model = make_model(ONE_LAYER.config, partition)
        params = jax.device_put(random_params(model), partition.shardings(model.axes))
        batch = jax.device_put(packed_batch(), partition.sharding("batch", "time"))

        def loss(params):
            score_BT = score_of(model, params, batch)
            return jnp.sum(score_BT * weights_BT * batch.mask_BT), score_BT

        return host(jax.jit(jax.grad(loss, has_aux=True))(params))

    assert_close(found(make_partition(mesh)), found(single_device()), 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-10)])
def test_the_score_of_an_answer_does_not_depend_on_what_lies_beside_it(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model = make_model(tiny_llama(head="score", layers=1, dtype=dtype, param_dtype=dtype))
        params = random_params(model)
        score = jax.jit(lambda p, batch: score_of(model, p, batch))
        batch = packed_batch(rows=3, length=14)
        packed_BT = np.asarray(score(params, batch))
        assert packed_BT.dtype == dtype
        for row, segment in [(0, 1), (0, 2), (2, 2)]:
            here_T = batch.segment_ids_BT[row] == segment
            alone = [np.pad(x[row, here_T], (0, 14 - here_T.sum()))[None] for x in batch]
            alone_BT = score(params, type(batch)(*alone))
            assert relative(packed_BT[row, here_T], alone_BT[0, : here_T.sum()]) < tolerance


def test_what_a_model_lacks_is_refused_in_a_line():
    params, tokens_BT = random_params(LLAMA), jnp.zeros((1, 3), jnp.int32)
    for ask in (
        lambda: LLAMA.head(params),
        lambda: LLAMA.logits(params, tokens_BT),
        lambda: generate(LLAMA, params, tokens_BT, max_tokens=2),
        lambda: stream(LLAMA, params, [1, 2], max_tokens=2),
    ):
        with pytest.raises(UserError, match=r"^this is a reward model \(model\.head=score\).*model\.head=tokens$"):
            ask()
    model = make_model(tiny_llama())
    with pytest.raises(UserError, match=r"^this model predicts tokens \(model\.head=tokens\) and gives no score: .*"):
        model.score(random_params(model), jnp.zeros((1, 3, 16)))


ADAPTER = AdapterConfig(kind="lora", rank=4, include="attention")


@pytest.mark.parametrize("bits", [0, 4])
def test_an_adapter_trains_the_score_whole(bits):
    config = dataclasses.replace(ADAPTER, base_bits=bits, base_group=16 if bits else 0)
    params = random_params(ONE_LAYER)
    frozen = frozen_base(ONE_LAYER, params, config)
    adapter = add_adapter(ONE_LAYER, frozen, config, jax.random.key(0))
    assert adapter.keys() == matrices(ONE_LAYER, "attention").keys() | {SCORE}
    np.testing.assert_array_equal(adapter[SCORE], params["head"]["score_D"])
    assert isinstance(leaf_at(frozen, "layers.0.mlp.up_DF"), QuantisedLeaf if bits else jax.Array)
    batch = packed_batch(rows=2)

    def total(adapter, frozen):
        params = merge(adapter, frozen)
        hidden_BTD = ONE_LAYER.apply(
            params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        ).hidden_BTD
        return jnp.sum(ONE_LAYER.score(params, hidden_BTD) * batch.mask_BT), hidden_BTD

    gradients, hidden_BTD = jax.jit(jax.grad(total, has_aux=True))(adapter, frozen)
    expected_D = np.einsum("BTD,BT->D", np.asarray(hidden_BTD, np.float64), batch.mask_BT)
    assert relative(gradients[SCORE], expected_D) < 1e-5
    assert np.abs(gradients["layers.0.attention.out_NHD"].b).max() > 0
    moved = adapter | {SCORE: adapter[SCORE] + 1}
    np.testing.assert_array_equal(merge(moved, frozen)["head"]["score_D"], moved[SCORE])
    assert adapter_of(adapted(frozen, moved)).keys() == adapter.keys()
    np.testing.assert_array_equal(adapter_of(adapted(frozen, moved))[SCORE], moved[SCORE])


def test_under_an_adapter_a_score_that_is_not_there_is_that_of_init():
    frozen = with_leaves(random_params(ONE_LAYER), {SCORE: None})
    adapter = jax.jit(lambda key: add_adapter(ONE_LAYER, frozen, ADAPTER, key))(jax.random.key(5))
    np.testing.assert_array_equal(adapter[SCORE], jax.jit(ONE_LAYER.init)(jax.random.key(5))["head"]["score_D"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_takes_the_score_for_a_vector_and_the_mesh_splits_it(name):
    model = make_model(LLAMA.config, make_partition(MeshConfig(data=2, fsdp=4)))
    axes = adapter_axes(model, ADAPTER)
    config = OptimizerConfig(name=name, learning_rate=0.5, warmup=0, schedule="constant", weight_decay=0.2)
    optimizer = make_optimizer(config, 10, axes)
    adapter = add_adapter(model, random_params(model), ADAPTER, jax.random.key(0))
    state = jax.eval_shape(lambda: start(adapter, optimizer, window=4, ema=True))
    shardings = state_shardings(model, state, axes)
    assert shardings.trainable[SCORE] == shardings.ema[SCORE] == model.partition.sharding("embed")
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(adapter), adapter)
    np.testing.assert_allclose(updates[SCORE], 0, atol=1e-7)


# Of every family of transformers with a class that scores.
FOLDERS = {
    "gpt2": tiny_gpt2(head="score"),
    "llama": tiny_llama(head="score", tied_embedding=True),
    "qwen3": tiny_llama(head="score", qk_norm="head"),
    "gemma2": tiny_llama(
        **dict(norm_from_zero=True, norm_after=True, scaled_embedding=True, tied_embedding=True, activation="gelu"),
        **dict(head="score", window=5, pattern=("local", "global"), attention_softcap=3.0, logit_softcap=4.0),
    ),
    "deepseek_v3": deepseek("tiny", vocab_size=VOCAB, max_positions=64, head="score"),
}


@pytest.mark.parametrize(
    "family", [f if f != "deepseek_v3" else pytest.param(f, marks=pytest.mark.slow) for f in FOLDERS]
)
def test_what_is_saved_is_loaded_bit_for_bit(family, tmp_path):
    model = make_model(FOLDERS[family])
    params = random_params(model)
    assert hf.save(model, params, tmp_path / "out").model_type == family
    again, loaded = hf.load(tmp_path / "out")
    assert hf.identity(again.config) == hf.identity(model.config)
    assert again.config.head == "score"
    assert_close(loaded, params, 0)
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys["architectures"][0].endswith("ForSequenceClassification")
    assert (keys["id2label"], "problem_type" in keys) == ({"0": "LABEL_0"}, False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], params["head"]["score_D"][None])
    assert "lm_head.weight" not in tensors


def test_bfloat16_weights_keep_a_score_in_float32(tmp_path):
    model = make_model(tiny_llama(head="score", param_dtype="bfloat16"))
    params = random_params(model)
    hf.save(model, params, tmp_path / "out")
    again, loaded = hf.load(tmp_path / "out")
    assert again.config.param_dtype == "bfloat16"
    assert loaded["head"]["score_D"].dtype == jnp.float32
    assert_close(loaded, params, 0)


def test_a_family_without_a_class_that_scores_is_refused(tmp_path):
    model = make_model(mamba2(vocab_size=VOCAB, width=64, layers=1, head="score"))
    with pytest.raises(UserError, match=r"no reward models \(model\.head=score\) of the family mamba2"):
        hf.save(model, random_params(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_keeps_the_score_whole(tmp_path):
    adapter = add_adapter(LLAMA, random_params(LLAMA), ADAPTER, jax.random.key(0))
    peft.save_peft(LLAMA, adapter, ADAPTER, tmp_path)
    about = json.loads((tmp_path / peft.CONFIG).read_text())
    assert (about["task_type"], about["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert peft.is_scorer(tmp_path)
    tensor = load_file(tmp_path / peft.TENSORS)["base_model.model.score.weight"]
    np.testing.assert_array_equal(tensor, adapter[SCORE][None])
    again, _ = peft.load_peft(LLAMA, tmp_path)
    assert_close(again, adapter, 0)
    with pytest.raises(UserError, match=r"modules_to_save=\['score'\], which adapters here do not do"):
        peft.load_peft(make_model(tiny_llama()), tmp_path)


def test_a_peft_adapter_without_a_score_is_none_of_a_reward_model(tmp_path):
    model = make_model(tiny_llama())
    adapter = add_adapter(model, random_params(model), ADAPTER, jax.random.key(0))
    peft.save_peft(model, adapter, ADAPTER, tmp_path)
    assert not peft.is_scorer(tmp_path)
    with pytest.raises(UserError, match=r"holds no base_model\.model\.score\.weight"):
        peft.load_peft(LLAMA, tmp_path)


def test_a_preset_takes_the_head():
    assert gpt2("124m", vocab_size=VOCAB, head="score").head == "score"
