"""Multi-head latent attention against plain numpy in float64, its cache, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model.config import LatentConfig, ModelConfig
from llmlab.model.cost import abstract_params, parameter_count, product_parameters
from llmlab.model.latent import LatentAttention
from llmlab.model.matrices import is_matrix
from llmlab.model.rope import RopeConfig, rotary_angles
from llmlab.model.transformer import make_model
from llmlab.model.types import Inputs, inputs
from llmlab.train.optimizer import OptimizerConfig, make_optimizer
from tests.helpers import VOCAB, assert_close, logits_in_pieces, packed_batch, random_params, relative, tiny_llama

SIZES = dict(kv_rank=8, nope_dim=6, rope_dim=4, value_dim=5)
YARN = RopeConfig(scaling="yarn", factor=8.0, original_positions=16, magnitude=1.3)


def config_of(q_rank: int = 10, **changes) -> ModelConfig:
    made = dict(kv_heads=0, latent=LatentConfig(**SIZES, q_rank=q_rank), dtype="float64", param_dtype="float64")
    return tiny_llama(**{**made, **changes})


KINDS = {
    "queries through a latent": config_of(),
    "queries at once": config_of(q_rank=0),
    "scale": config_of(attention_scale=0.7),
    "window, softcap": config_of(window=4, pattern=("local",), attention_softcap=1.5),
    "bias": config_of(bias=True),
    "turned by yarn": config_of(rope=YARN),
}


def normed(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def turned(x_TH: np.ndarray, angle_TI: np.ndarray, magnitude: float) -> np.ndarray:
    half = x_TH.shape[1] // 2
    first, second = x_TH[:, :half], x_TH[:, half:]
    sin, cos = np.sin(angle_TI), np.cos(angle_TI)
    return magnitude * np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def numpy_latent_attention(config: ModelConfig, x_TD: np.ndarray, w: dict, angle_TI: np.ndarray) -> np.ndarray:
    """One row, head by head, as section 2.1 of the paper has it."""
    T, latent, magnitude = len(x_TD), config.latent, config.rope.magnitude or 1.0

    def product(x, name, head=...):
        weight, bias = w[name], w.get(f"{name}_bias")
        if head is ...:
            return x @ weight + (0.0 if bias is None else bias)
        return x @ weight[:, head] + (0.0 if bias is None else bias[head])

    latent_TR = normed(product(x_TD, "latent_DR"), w["latent_norm"]["scale"], 1e-6)
    shared_TH = turned(product(x_TD, "turned_key_DH"), angle_TI, magnitude)
    query_TR, name = x_TD, "query_DNH"
    if latent.q_rank:
        query_TR = normed(product(x_TD, "query_DR"), w["query_norm"]["scale"], 1e-6)
        name = "query_RNH"
    out_TD = np.zeros_like(x_TD) + w.get("out_NHD_bias", 0.0)
    for head in range(config.heads):
        query = product(query_TR, name, head)
        key, value = product(latent_TR, "key_RNH", head), product(latent_TR, "value_RNH", head)
        position = turned(query[:, latent.nope_dim :], angle_TI, magnitude)
        scores = query[:, : latent.nope_dim] @ key.T + position @ shared_TH.T
        scores *= config.attention_scale or (latent.nope_dim + latent.rope_dim) ** -0.5
        if config.attention_softcap:
            scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        for i in range(T):
            for j in range(T):
                if j > i or (config.kind(0) == "local" and i - j >= config.window):
                    scores[i, j] = -np.inf
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out_TD += weights / weights.sum(1, keepdims=True) @ value @ w["out_NHD"][head]
    return out_TD


def layer_and_weights(config: ModelConfig):
    rng = np.random.default_rng(5)
    layer = LatentAttention(config, kind=config.kind(0))
    tree = random_params(make_model(config))["layers"]["0"]["attention"]
    return layer, jax.tree.map(lambda leaf: np.asarray(leaf[0]) + 0.3 * rng.standard_normal(leaf.shape[1:]), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_a_float64_reference(kind):
    config = KINDS[kind]
    with jax.enable_x64(True):
        layer, w = layer_and_weights(config)
        x_BTD = np.random.default_rng(1).standard_normal((2, 11, config.width))
        row = inputs(jnp.zeros((2, 11), jnp.int32))
        rotary = rotary_angles(row.positions_BT, config.rope, config.rotary_dim, config.dtype)
        out_BTD, _ = jax.jit(lambda w, x: layer.apply({"params": w}, x, row, rotary, None, None))(w, x_BTD)
    frequency_I = config.rope.base ** (-np.arange(0, SIZES["rope_dim"], 2) / SIZES["rope_dim"])
    if config.rope.scaling == "yarn":
        low, high = (4 * np.log(16 / (turns * 2 * np.pi)) / (2 * np.log(config.rope.base)) for turns in (32.0, 1.0))
        low, high = max(np.floor(low), 0), min(np.ceil(high), 3)
        kept_I = 1 - np.clip((np.arange(2) - low) / (high - low), 0, 1)
        frequency_I = kept_I * frequency_I + (1 - kept_I) * frequency_I / config.rope.factor
    angle_TI = np.arange(11)[:, None] * frequency_I[None]
    for row_BTD, mine in zip(x_BTD, out_BTD, strict=True):
        assert relative(mine, numpy_latent_attention(config, row_BTD, w, angle_TI)) < 1e-10


@pytest.mark.parametrize("kind", [pytest.param("queries through a latent", marks=pytest.mark.slow), "window, softcap"])
def test_prefill_and_decode_equal_the_full_forward(kind):
    config = KINDS[kind]
    if config.window:
        config = dataclasses.replace(config, pattern=("local", "global"))
    with jax.enable_x64(True):
        model = make_model(config)
        params, tokens_BT = random_params(model), np.random.default_rng(3).integers(VOCAB, size=(2, 14))
        expected = jax.jit(model.logits)(params, tokens_BT)
        assert relative(logits_in_pieces(model, params, tokens_BT, (6, 12, 13)), expected) < 1e-10


def test_the_cache_keeps_the_latent_and_the_shared_key_only():
    with jax.enable_x64(True):
        cache = make_model(config_of(window=4, pattern=("local", "global"))).init_cache(3, 20)
    shapes = [{name: kept.shape for name, kept in layer.items()} for layer in cache["layers"]]
    assert shapes == [
        {"latent_B1SR": (3, 1, slots, SIZES["kv_rank"]), "turned_key_B1SH": (3, 1, slots, SIZES["rope_dim"])}
        for slots in (4, 20)
    ]


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, tensor=2, sequence=2)], ids=str
)
@pytest.mark.slow
def test_a_mesh_gives_the_same_gradients(mesh):
    config = config_of()
    with jax.enable_x64(True):
        params, batch = random_params(make_model(config)), packed_batch()

        def gradients(partition):
            model = make_model(config, partition)

            def loss(params, batch):
                out = model.apply(params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))
                return jnp.sum(jnp.square(out.hidden_BTD) * batch.mask_BT[..., None])

            if partition is None:
                return jax.jit(jax.grad(loss))(params, batch)
            placed = jax.device_put(params, partition.shardings(model.axes))
            return jax.jit(jax.grad(loss))(placed, jax.device_put(batch, partition.sharding("batch", "time")))

        assert_close(gradients(make_partition(mesh)), gradients(None), 1e-10)


def test_every_matrix_of_it_decays_and_is_muons():
    model = make_model(tiny_llama(layers=1, kv_heads=0, latent=LatentConfig(**SIZES, q_rank=10)))
    for name, axes in model.axes["layers"]["0"]["attention"].items():
        assert name.endswith("norm") or is_matrix(axes), name
    params = random_params(model)
    optimizer = make_optimizer(
        OptimizerConfig(name="muon", learning_rate=1.0, warmup=0, schedule="constant", weight_decay=0.0), 10, model.axes
    )
    gradients = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), x.dtype), params)
    updates = jax.jit(lambda *trees: optimizer.update(trees[0], optimizer.init(trees[1]), trees[1])[0])(
        gradients, params
    )
    up_RX = np.asarray(updates["layers"]["0"]["attention"]["key_RNH"][0]).reshape(8, 24)
    singular = np.linalg.svd(up_RX, compute_uv=False)
    assert singular.min() / singular.max() > 0.5  # orthogonal, but for Newton and Schulz


def test_its_cost_counts_every_matrix_once():
    with jax.enable_x64(True):
        model = make_model(config_of())
        vectors = 2 * (16 + 16 + 8 + 10) + 16
        assert product_parameters(model.config) == parameter_count(abstract_params(model)) - vectors - VOCAB * 16


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(kv_heads=2), "leave model.head_dim and model.kv_heads at 0"),
        (dict(head_dim=8), "leave model.head_dim and model.kv_heads at 0"),
        (dict(positions="learned"), "needs model.positions=rotary"),
        (dict(qk_norm="head"), "model.qk_norm is for ordinary attention"),
        (dict(attention_sinks=True), "model.attention_sinks is for ordinary attention"),
        (dict(latent=LatentConfig(kv_rank=8, rope_dim=3)), "model.latent.rope_dim=3 should be even"),
    ],
)
def test_what_has_no_place_in_it_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        config_of(**changes)


def test_impossible_sizes_are_refused():
    with pytest.raises(UserError, match="model.latent.value_dim=0 should be at least 1"):
        LatentConfig(kv_rank=8, value_dim=0)
    partition = make_partition(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(UserError, match="model.latent.q_rank=10 is not divided by the 4 devices of mesh.rules.latent"):
        make_model(config_of(), partition)
