"""Mixtures of experts: each flavour against a loop over tokens in float64, and nothing dropped, lost or miscounted."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.arrays import Mean
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, Rules, make_partition, single_device
from llmlab.model.config import LatentConfig, ModelConfig, deepseek, mixtral
from llmlab.model.cost import abstract_params, parameter_count, product_parameters
from llmlab.model.experts import Experts
from llmlab.model.routing import BALANCE_LOSS, LOAD, MAX_LOAD, Z_LOSS, ExpertsConfig
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from llmlab.model.types import Inputs, inputs
from llmlab.objective import NextTokenConfig
from llmlab.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from llmlab.train.state import start
from llmlab.train.step import accumulated_gradients, make_step
from tests.helpers import (
    VOCAB,
    assert_close,
    assert_packed_is_as_if_alone,
    host,
    logits_in_pieces,
    packed_batch,
    random_params,
    relative,
    tiny_llama,
)
from tests.test_model_transformer import Doubled

SIGMOID = dict(count=8, chosen=3, score="sigmoid", correction=True)
FLAVOURS = {
    "mixtral": (dict(count=6, chosen=2), {}),
    "qwen3": (dict(count=6, chosen=3, normalise=False), {}),
    "gpt-oss": (dict(count=6, chosen=2, bias=True), dict(activation="swiglu_clamped")),
    "deepseek": (dict(**SIGMOID, scale=2.5, groups=4, chosen_groups=2, shared=2, width=12), {}),
    "sigmoid, as they are": (dict(**SIGMOID, normalise=False), {}),
    "corrected softmax": (dict(count=6, chosen=2, correction=True), dict(bias=True)),
    "not gated": (dict(count=5, chosen=2, shared=1), dict(gated=False, activation="gelu")),
    "one expert": (dict(count=1, chosen=1), {}),
    "all experts": (dict(count=4, chosen=4), {}),
}


def flavour(name: str, **more) -> ModelConfig:
    experts, model = FLAVOURS[name]
    return tiny_llama(
        **{**dict(dtype="float64", param_dtype="float64", experts=ExpertsConfig(**experts)), **model, **more}
    )


def layer_and_weights(config: ModelConfig, seed: int = 3):
    """The layer, and weights large enough that its experts differ and its choices matter."""
    layer, rng = Experts(config), np.random.default_rng(seed)
    x_BTD, ones_BT = jnp.zeros((1, 1, config.width), config.dtype), jnp.ones((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x_BTD, ones_BT)["params"])
    shapes = jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda node: hasattr(node, "names"))
    return layer, jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape), shapes)


def activated(config: ModelConfig, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if config.activation == "swiglu_clamped":
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return gate / (1 + np.exp(-gate)) * up


def numpy_mlp(config: ModelConfig, x_D: np.ndarray, w: dict, names: tuple[str, str, str], expert=...) -> np.ndarray:
    """One token through one MLP; `expert` is its index, where the weights have one."""

    def product(x, name):
        return x @ w[name][expert] + (w[f"{name}_bias"][expert] if f"{name}_bias" in w else 0.0)

    gate, up, down = names
    if config.gated:
        hidden = activated(config, product(x_D, gate), product(x_D, up))
    else:
        x = product(x_D, up)
        hidden = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return product(hidden, down)


def numpy_choice(config: ExpertsConfig, logits_E: np.ndarray, correction_E: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(the experts of a token, best first; the scores of all), one rule after the other."""
    score_E = 1 / (1 + np.exp(-logits_E))
    if config.score == "softmax":
        score_E = np.exp(logits_E) / np.exp(logits_E).sum()
    rank_E = score_E + correction_E
    size = config.count // config.groups
    if config.groups > 1:
        of_group = [np.sort(rank_E[g * size : (g + 1) * size])[-2:].sum() for g in range(config.groups)]
        best = np.argsort(of_group)[-config.chosen_groups :]
        rank_E = np.array([rank if i // size in best else -np.inf for i, rank in enumerate(rank_E)])
    return np.argsort(-rank_E)[: config.chosen].tolist(), score_E


def numpy_experts(config: ModelConfig, x_MD: np.ndarray, w: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outputs, each token's experts, logits): a loop over tokens and their experts."""
    e, out_MD, chosen, logits = config.experts, np.zeros_like(x_MD), [], []
    for m, x_D in enumerate(x_MD):
        logits_E = x_D @ w["router_DE"] + w.get("router_DE_bias", 0.0)
        experts, score_E = numpy_choice(e, logits_E, w.get("correction_E", np.zeros(e.count)))
        total = sum(score_E[expert] for expert in experts) if e.normalise else 1.0
        for expert in experts:
            out_D = numpy_mlp(config, x_D, w, ("gate_EDF", "up_EDF", "down_EFD"), expert)
            out_MD[m] += e.scale * score_E[expert] / total * out_D
        if e.shared:
            out_MD[m] += numpy_mlp(config, x_D, w["shared"], ("gate_DF", "up_DF", "down_FD"))
        chosen.append(experts)
        logits.append(logits_E)
    return out_MD, np.array(chosen), np.array(logits)


@pytest.mark.parametrize("name", FLAVOURS)
def test_outputs_are_those_of_a_loop_over_tokens(name):
    with jax.enable_x64(True):
        config = flavour(name)
        layer, w = layer_and_weights(config)
        x_BTD = 3 * np.random.default_rng(1).standard_normal((2, 9, config.width))
        out_BTD, _ = jax.jit(layer.apply)({"params": w}, x_BTD, jnp.ones((2, 9), jnp.int32))
        expected_MD, chosen_MC, _ = numpy_experts(config, x_BTD.reshape(18, -1), w)
        if config.experts.chosen < config.experts.count:
            assert len(np.unique(chosen_MC)) > config.experts.chosen  # the tokens do not all go the same way
        assert relative(out_BTD.reshape(18, -1), expected_MD) < 1e-10


@pytest.mark.parametrize("change", [dict(normalise=False), dict(scale=1.0), dict(chosen_groups=3), dict(chosen=2)])
def test_each_setting_of_the_router_moves_the_reference(change):
    config = flavour("deepseek", dtype="float32", param_dtype="float32")
    _, w = layer_and_weights(config)
    x_MD = 3 * np.random.default_rng(1).standard_normal((18, config.width))
    other = dataclasses.replace(config, experts=dataclasses.replace(config.experts, **change))
    right, wrong = (numpy_experts(c, x_MD, w)[0] for c in (config, other))
    assert relative(wrong, right) > 1e-3


def test_no_token_is_dropped_when_all_go_to_one_expert():
    with jax.enable_x64(True):
        config = flavour("mixtral", experts=ExpertsConfig(count=6, chosen=1))
        layer, w = layer_and_weights(config)
        x_BTD = np.abs(np.random.default_rng(1).standard_normal((2, 40, config.width)))
        w["router_DE"][:, 4] = 10.0
        out_BTD, aux = jax.jit(layer.apply)({"params": w}, x_BTD, jnp.ones((2, 40), jnp.int32))
        assert aux[LOAD].sum.tolist() == [0, 0, 0, 0, 80, 0]
        expected = [numpy_mlp(config, x_D, w, ("gate_EDF", "up_EDF", "down_EFD"), 4) for x_D in x_BTD.reshape(80, -1)]
        assert relative(out_BTD.reshape(80, -1), np.array(expected)) < 1e-10


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "gpt-oss", "deepseek"])
def test_losses_and_loads_are_those_of_numpy_and_padding_counts_in_none(name):
    with jax.enable_x64(True):
        config = flavour(name)
        e = config.experts
        layer, w = layer_and_weights(config)
        x_BTD = 3 * np.random.default_rng(1).standard_normal((2, 9, config.width))
        segment_ids_BT = np.array([[1] * 5 + [2] * 4, [1] * 4 + [0] * 5], np.int32)
        _, aux = jax.jit(layer.apply)({"params": w}, x_BTD, segment_ids_BT)
        _, chosen_MC, logits_ME = numpy_experts(config, x_BTD.reshape(18, -1)[segment_ids_BT.reshape(-1) > 0], w)
    tokens = 13
    counts = np.bincount(chosen_MC.reshape(-1), minlength=e.count)
    score_ME = np.exp(logits_ME) if e.score == "softmax" else 1 / (1 + np.exp(-logits_ME))
    probability_E = (score_ME / score_ME.sum(1, keepdims=True)).mean(0)
    assert aux[LOAD].sum.tolist() == counts.tolist()
    assert aux[BALANCE_LOSS].value() == pytest.approx(e.count * (counts / tokens * probability_E).sum(), rel=1e-12)
    assert aux[Z_LOSS].value() == pytest.approx((np.log(np.exp(logits_ME).sum(1)) ** 2).mean(), rel=1e-12)
    assert aux[MAX_LOAD].value() == pytest.approx(counts.max() / (tokens * e.chosen) * e.count, rel=1e-12)
    assert {float(mean.weight) for mean in aux.values()} == {tokens}


def test_an_even_router_loses_as_many_as_are_chosen():
    """Equal probabilities give f·P = chosen/E² for each of E experts: 1 for one choice, as in Switch."""
    config = tiny_llama(experts=ExpertsConfig(count=6, chosen=2))
    layer, w = layer_and_weights(config)
    w["router_DE"][:] = 0
    w = jax.tree.map(np.float32, w)
    _, aux = jax.jit(layer.apply)({"params": w}, np.ones((1, 5, 16), np.float32), np.ones((1, 5), np.int32))
    assert aux[BALANCE_LOSS].value() == pytest.approx(2.0)
    assert aux[Z_LOSS].value() == pytest.approx(math.log(6) ** 2)


# --- in a model ------------------------------------------------------------------------------------------------------

DEEPSEEK_LIKE = tiny_llama(
    layers=3,
    kv_heads=0,
    latent=LatentConfig(kv_rank=8, q_rank=8, nope_dim=4, rope_dim=4, value_dim=6),
    experts=ExpertsConfig(
        **SIGMOID, scale=2.5, groups=4, chosen_groups=2, shared=1, width=8, first_dense=1, z_loss=1e-2, balance_loss=0.1
    ),
)
GPT_OSS_LIKE = tiny_llama(
    layers=3,
    window=5,
    pattern=("local", "global"),
    attention_sinks=True,
    attention_bias="qkvo",
    activation="swiglu_clamped",
    experts=ExpertsConfig(count=4, chosen=2, bias=True, balance_loss=0.1),
)
MODELS = {"deepseek": DEEPSEEK_LIKE, "gpt-oss": GPT_OSS_LIKE}


def in_float64(config: ModelConfig, **changes) -> ModelConfig:
    return dataclasses.replace(config, dtype="float64", param_dtype="float64", **changes)


def without_balance(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, experts=dataclasses.replace(config.experts, balance_loss=0.0))


def test_leading_dense_layers_have_stacks_of_their_own():
    assert DEEPSEEK_LIKE.stacks() == ((0,), (1, 2))
    assert GPT_OSS_LIKE.stacks() == ((0, 2), (1,))
    assert tiny_llama(layers=1, window=2, pattern=("local", "global")).stacks() == ((0,),)
    five = dataclasses.replace(
        GPT_OSS_LIKE, layers=8, pattern=("local", "local", "global"), experts=ExpertsConfig(count=4, first_dense=2)
    )
    assert five.stacks() == ((0,), (1,), (2, 5), (3, 6), (4, 7))
    assert [[five.kind(layer) for layer in stack] for stack in five.stacks()[2:]] == [
        ["global", "global"],
        ["local", "local"],
        ["local", "local"],
    ]
    layers = abstract_params(make_model(DEEPSEEK_LIKE))["layers"]
    assert layers["0"]["mlp"]["gate_DF"].shape == (1, 16, 32)
    assert layers["1"]["mlp"]["gate_EDF"].shape == (2, 8, 16, 8)
    assert layers["1"]["mlp"]["shared"]["down_FD"].shape == (2, 8, 16)


def loss_and_gradients(config: ModelConfig, params, batch, accumulate=1, mesh=None, rules=None):
    partition = single_device()
    if mesh is not None:
        partition = make_partition(dataclasses.replace(mesh, rules=rules or Rules()))
    model = make_model(config, partition)
    params = jax.device_put(params, partition.shardings(model.axes))
    batch = jax.device_put(batch, partition.sharding("batch", "time"))
    loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))
    run = jax.jit(lambda p, b: accumulated_gradients(loss, p, {}, b, jax.random.key(0), accumulate, partition))
    return host(run(params, batch))


@functools.cache
def one_device(name: str):
    with jax.enable_x64(True):
        config = in_float64(MODELS[name])
        params = random_params(make_model(config))
        return params, loss_and_gradients(config, params, packed_batch())


@pytest.mark.parametrize(
    "name, change",
    [
        ("deepseek", dict(scan=True, remat="dots")),
        ("gpt-oss", dict(scan=True)),
        ("deepseek", dict(remat="full")),
    ],
    ids=str,
)
@pytest.mark.slow
def test_how_it_runs_changes_no_gradient(name, change):
    params, expected = one_device(name)
    with jax.enable_x64(True):
        found = loss_and_gradients(in_float64(MODELS[name], **change), params, packed_batch())
    assert_close(found, expected, 1e-10)


MESHES = {
    "fsdp": (MeshConfig(), None),
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), None),
    "sequence": (MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), None),
    "experts over tensor": (MeshConfig(fsdp=4, tensor=2), Rules(experts=("tensor",), mlp=())),
    "width over fsdp": (MeshConfig(fsdp=4, tensor=2), Rules(embed=(), mlp=("fsdp",), latent=())),
}


@pytest.mark.parametrize("name, mesh", [(name, mesh) for name in MODELS for mesh in MESHES])
@pytest.mark.slow
def test_eight_devices_give_the_gradients_of_one(name, mesh):
    params, expected = one_device(name)
    with jax.enable_x64(True):
        found = loss_and_gradients(in_float64(MODELS[name], scan=True), params, packed_batch(), 1, *MESHES[mesh])
    assert found[1][LOAD].sum.tolist() == expected[1][LOAD].sum.tolist()
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("mesh", [None, "2x2x2"])
@pytest.mark.slow
def test_four_microbatches_are_one_batch(mesh):
    """Counts exactly, and gradients: but for the loss of balance, which is no sum over tokens."""
    with jax.enable_x64(True):
        config = without_balance(in_float64(DEEPSEEK_LIKE, scan=True))
        params = random_params(make_model(config))
        batch = packed_batch(rows=16, length=8)
        whole = loss_and_gradients(config, params, batch, 1)
        parts = loss_and_gradients(config, params, batch, 4, *MESHES.get(mesh, (None, None)))
    assert parts[1][LOAD].sum.dtype == np.int32
    assert parts[1][LOAD].sum.tolist() == whole[1][LOAD].sum.tolist()
    assert parts[1][LOAD].sum.sum() == 2 * 3 * (batch.segment_ids_BT > 0).sum()
    assert_close(parts[2], whole[2], 1e-10)
    assert parts[1][Z_LOSS].value() == pytest.approx(whole[1][Z_LOSS].value(), rel=1e-12)


def test_eight_devices_compute_what_one_does():
    """One layer of experts, its width split over two of them."""
    with jax.enable_x64(True):
        config = flavour("mixtral", layers=1, experts=ExpertsConfig(count=4))
        params = random_params(make_model(config))
        partition = make_partition(MeshConfig(data=2, fsdp=2, tensor=2))
        model, batch = make_model(config, partition), packed_batch()
        row = Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        placed = jax.device_put((params, row), (partition.shardings(model.axes), partition.sharding("batch", "time")))
        found = jax.jit(model.apply)(*placed)
        expected = jax.jit(make_model(config).apply)(params, row)
    assert relative(found.hidden_BTD, expected.hidden_BTD) < 1e-12
    assert found.aux[LOAD].sum.tolist() == expected.aux[LOAD].sum.tolist()


def test_products_of_experts_are_not_computed_again_with_dots():
    def products(remat: str) -> int:
        model = make_model(flavour("mixtral", layers=1, remat=remat))

        def loss(params):
            return jnp.sum(model.apply(params, inputs(jnp.zeros((1, 8), jnp.int32))).hidden_BTD)

        return str(jax.make_jaxpr(jax.grad(loss))(abstract_params(model))).count("ragged_dot_general[")

    with jax.enable_x64(True):
        assert products("dots") == products("none") < products("full")


def test_in_a_hybrid_only_what_has_an_mlp_has_experts():
    """Layers of mixers alone count nothing, and the correction of each other layer moves by its own counts."""
    experts = ExpertsConfig(count=4, correction=True, correction_speed=0.5)
    ssm = SsmConfig(state=4, head_dim=4, chunk=8)
    config = tiny_llama(layers=5, pattern=("mamba", "global"), ssm=ssm, experts=experts, scan=True)
    assert [config.has_experts(layer) for layer in range(5)] == [False, True, False, True, False]
    model = make_model(config)
    params = random_params(model)
    tokens_BT = np.arange(32, dtype=np.int32).reshape(2, 16) % VOCAB

    @jax.jit
    def counted_and_moved(params):
        aux = model.apply(params, inputs(tokens_BT)).aux
        return aux[LOAD].sum, model.post_step(params, aux)

    count_LE, moved = jax.tree.map(np.asarray, counted_and_moved(params))
    assert count_LE.shape == (2, 4)
    for i in range(2):
        before, after = (tree["layers"]["1"]["mlp"]["correction_E"][i] for tree in (params, moved))
        np.testing.assert_allclose(after - before, 0.5 * np.sign(count_LE[i].mean() - count_LE[i]), atol=1e-6)
    with pytest.raises(UserError, match=r"has no MLP to stand for"):
        tiny_llama(pattern=("mamba",), ssm=ssm, experts=experts)


@pytest.mark.slow
def test_the_loss_of_balance_is_each_microbatchs_own():
    """Parts that hold the same rows give what the whole gives."""
    with jax.enable_x64(True):
        config = flavour("mixtral", layers=1, experts=ExpertsConfig(count=4, balance_loss=0.1))
        params = random_params(make_model(config))
        batch = jax.tree.map(lambda x: np.repeat(x, 4, axis=0), packed_batch(rows=2, length=8))
        whole, parts = (loss_and_gradients(config, params, batch, accumulate) for accumulate in (1, 4))
    assert_close(parts, whole, 1e-10)


@pytest.mark.slow
def test_the_coefficients_weigh_the_losses():
    _, (total, metrics, _) = one_device("deepseek")
    losses = 0.1 * metrics[BALANCE_LOSS].value() + 1e-2 * metrics[Z_LOSS].value()
    assert losses > 0.1
    assert total.value() == pytest.approx(metrics["loss"].value() + losses, rel=1e-12)


def apply(config: ModelConfig, params, row: Inputs):
    return jax.jit(lambda row: make_model(config).apply(params, row).hidden_BTD)(row)


@functools.cache
def shallow(name: str):
    """(model, weights) of one layer of each kind."""
    model = make_model(in_float64(MODELS[name], layers=2))
    return model, random_params(model)


@pytest.mark.parametrize("name", ["deepseek", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_a_packed_document_is_read_as_if_alone(name):
    with jax.enable_x64(True):
        assert_packed_is_as_if_alone(*shallow(name), 1e-10)


@pytest.mark.parametrize("name", ["deepseek", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_prefill_and_decode_equal_the_full_forward(name):
    with jax.enable_x64(True):
        model, params = shallow(name)
        tokens_BT = np.random.default_rng(3).integers(VOCAB, size=(2, 14))
        expected = jax.jit(model.logits)(params, tokens_BT)
        assert relative(logits_in_pieces(model, params, tokens_BT, (6, 12, 13)), expected) < 1e-10


@pytest.mark.parametrize("name", ["deepseek", pytest.param("gpt-oss", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_leaf_may_stand_for_a_weight(name):
    with jax.enable_x64(True):
        params = random_params(make_model(in_float64(MODELS[name])))
        row = inputs(jnp.arange(12, dtype=jnp.int32).reshape(2, 6))
        packed = jax.tree.map(lambda leaf: Doubled(leaf / 2), params)
        config = in_float64(MODELS[name])
        assert relative(apply(config, packed, row), apply(config, params, row)) < 1e-10


@pytest.mark.slow
def test_bfloat16_routes_in_float32():
    config = dataclasses.replace(DEEPSEEK_LIKE, dtype="bfloat16")
    model = make_model(config)
    out = jax.jit(model.apply)(random_params(model), inputs(jnp.arange(12, dtype=jnp.int32).reshape(2, 6)))
    assert out.hidden_BTD.dtype == jnp.bfloat16
    assert out.aux[Z_LOSS].sum.dtype == jnp.float32
    assert out.aux[LOAD].sum.sum() == 2 * 3 * 12
    stored = abstract_params(make_model(dataclasses.replace(config, param_dtype="bfloat16")))
    assert stored["layers"]["1"]["mlp"]["correction_E"].dtype == jnp.float32


# --- balance without a loss ------------------------------------------------------------------------------------------

CORRECTED = tiny_llama(layers=2, experts=ExpertsConfig(**SIGMOID, first_dense=1, correction_speed=0.01))


def corrections(params) -> np.ndarray:
    return np.asarray(params["layers"]["1"]["mlp"]["correction_E"])


@functools.cache
def corrected():
    """(model, one step: what moved, and the load of the busiest expert and of all)"""
    model = make_model(CORRECTED)

    def step(params, batch):
        aux = model.apply(params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)).aux
        return model.post_step(params, aux), aux[MAX_LOAD].sum / aux[MAX_LOAD].weight, aux[LOAD].sum

    return model, jax.jit(step)


def test_the_correction_moves_towards_those_that_saw_too_few():
    model, step = corrected()
    params = random_params(model)
    moved, _, counts_LE = jax.tree.map(np.asarray, step(params, packed_batch(rows=16, length=32)))
    moved_LE = corrections(moved) - corrections(params)
    expected_LE = 0.01 * np.sign(counts_LE.mean(1, keepdims=True) - counts_LE)
    assert len(np.unique(np.sign(expected_LE))) > 1
    np.testing.assert_allclose(moved_LE, expected_LE, atol=1e-7)


@pytest.mark.slow
def test_each_slots_correction_moves_by_its_own_layers():
    config = dataclasses.replace(
        GPT_OSS_LIKE, layers=6, experts=ExpertsConfig(count=4, first_dense=1, correction=True, correction_speed=1.0)
    )
    assert config.stacks() == ((0,), (1, 3, 5), (2, 4))
    model = make_model(config)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    for layer in range(1, 6):
        counts_LE = jnp.zeros((5, 4), jnp.int32).at[layer - 1, 2].set(8)
        moved = model.post_step(params, {LOAD: Mean(counts_LE, 8.0)})["layers"]
        for slot, stack in ((1, (1, 3, 5)), (2, (2, 4))):
            expected = [[1.0, 1.0, -1.0, 1.0] if other == layer else [0.0] * 4 for other in stack]
            assert moved[str(slot)]["mlp"]["correction_E"].tolist() == expected


def test_the_correction_balances_a_skewed_router():
    model, step = corrected()
    params = random_params(model, scale=0.1)
    skewed = params["layers"]["1"]["mlp"]
    skewed["correction_E"] = np.array([[0.5, 0.4, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]], np.float32)

    loads = []
    for seed in range(80):
        params, load, _ = step(params, packed_batch(rows=16, length=32, seed=seed))
        loads.append(float(load))
    assert loads[0] > 2.5
    assert np.mean(loads[-10:]) < 1.4


def trained(config: ModelConfig, batches, **options):
    """(the parameters before and after each step)"""
    model = make_model(config)
    settings = OptimizerConfig(
        **{**dict(learning_rate=1e-2, warmup=0, schedule="constant", weight_decay=0.5), **options}
    )
    optimizer = make_optimizer(settings, 10, model.axes)
    state = start(random_params(model), optimizer, window=4, ema=bool(settings.ema))
    loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))
    step = jax.jit(make_step(loss, optimizer, make_schedule(settings, 10), settings, seed=0, post_step=model.post_step))
    states, metrics = [state], {}
    for batch in batches:
        state, metrics = step(state, batch)
        states.append(state)
    return states, metrics


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_no_optimizer_touches_the_correction(name):
    still = dataclasses.replace(CORRECTED, experts=dataclasses.replace(CORRECTED.experts, correction_speed=0.0))
    states, metrics = trained(still, [packed_batch()] * 2, name=name)
    np.testing.assert_array_equal(corrections(states[2].trainable), corrections(states[0].trainable))
    assert relative(*(s.trainable["layers"]["1"]["mlp"]["router_DE"] for s in (states[2], states[0]))) > 1e-3
    assert LOAD not in metrics
    assert metrics[MAX_LOAD].value() >= 1


@pytest.mark.slow
def test_a_step_moves_the_correction_once_for_all_microbatches_unless_it_is_skipped():
    bad = packed_batch()._replace(mask_BT=np.full((8, 16), np.nan, np.float32))
    states, _ = trained(CORRECTED, [packed_batch(), bad], ema=0.75)
    parts, _ = trained(CORRECTED, [packed_batch()], accumulate=4)
    first, second, third = (corrections(state.trainable) for state in states)
    np.testing.assert_allclose(np.unique(np.abs(second - first)).max(), 0.01, rtol=1e-4)
    np.testing.assert_array_equal(third, second)
    np.testing.assert_array_equal(corrections(parts[1].trainable), second)
    np.testing.assert_allclose(corrections(states[1].ema), 0.75 * first + 0.25 * second, rtol=1e-6)


# --- costs and mistakes ----------------------------------------------------------------------------------------------


def test_flops_count_only_the_experts_that_a_token_sees():
    """A dense model of the same active widths, plus the router."""
    mixture = tiny_llama(experts=ExpertsConfig(count=16, chosen=3, width=8, shared=1))
    dense = tiny_llama(mlp_width=32)
    assert product_parameters(mixture) == product_parameters(dense) + 2 * 16 * 16
    model = make_model(deepseek("tiny", vocab_size=VOCAB))
    e, matrices = model.config.experts, 3 * 32 * 16
    unseen = 2 * (e.count - e.chosen) * matrices
    vectors = sum(leaf.size for path, leaf in leaves_of(model) if "scale" in path or "correction" in path)
    table = VOCAB * 32
    assert product_parameters(model.config) == parameter_count(abstract_params(model)) - unseen - vectors - table


def leaves_of(model):
    paths = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(count=4, chosen=5), "model.experts.chosen=5 should be from 1 to model.experts.count=4"),
        (dict(count=6, groups=4), "model.experts.groups=4 should divide model.experts.count=6"),
        (dict(count=8, groups=8), "groups of 2 or more"),
        (dict(count=8, chosen=3, groups=4), "model.experts.chosen=3 is more than the 2 experts"),
        (dict(count=8, groups=2, chosen_groups=3), "model.experts.chosen_groups=3"),
        (dict(count=8, first_dense=2), "leaves no layer"),
        (dict(count=8, z_loss=-1.0), "model.experts.z_loss"),
        (dict(count=8, scale=0.0), "model.experts.scale"),
    ],
)
def test_impossible_experts_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        tiny_llama(experts=ExpertsConfig(**settings))


def test_a_mesh_must_divide_the_experts():
    partition = make_partition(MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(UserError, match="model.experts.width=12 is not divided by the 8 devices of mesh.rules.mlp"):
        make_model(tiny_llama(heads=8, kv_heads=8, experts=ExpertsConfig(count=4, width=12)), partition)
    with pytest.raises(UserError, match="did you mean 'small'"):
        mixtral("smal")
