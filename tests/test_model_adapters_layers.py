"""Quantised and adapted weights in experts, latent attention and Mamba: which they are, and all read alike."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model import weights
from llmlab.model.adapters import adapted, adapter_axes, merge_adapter
from llmlab.model.config import LatentConfig
from llmlab.model.matrices import leaf_at, matrices
from llmlab.model.quantise import QuantiseConfig, quantise
from llmlab.model.routing import ExpertsConfig
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Inputs, inputs
from llmlab.objective import NextTokenConfig
from tests.helpers import VOCAB, assert_close, packed_batch, random_params, relative, tiny_llama
from tests.test_model_adapters import abstract, built, model_of, products_of

MIXED = ExpertsConfig(count=4, chosen=2, shared=1, first_dense=1, score="sigmoid", correction=True, bias=True)
LATENT = LatentConfig(kv_rank=8, q_rank=8, nope_dim=6, rope_dim=4, value_dim=6)
CONFIGS = {
    "experts": tiny_llama(layers=2, experts=MIXED, attention_sinks=True),
    "latent": tiny_llama(scan=True, kv_heads=0, latent=LATENT),
    "mamba": tiny_llama(layers=2, pattern=("mamba", "global"), ssm=SsmConfig(state=8, head_dim=4, chunk=4)),
}
EXPECTED = {
    "experts": {"mlp.gate_EDF", "mlp.up_EDF", "mlp.down_EFD"}
    | {f"mlp.shared.{name}" for name in ("gate_DF", "up_DF", "down_FD")},
    "latent": {
        f"attention.{name}"
        for name in ("latent_DR", "turned_key_DH", "query_DR", "query_RNH", "key_RNH", "value_RNH", "out_NHD")
    },
    "mamba": {f"mamba.{name}" for name in ("z_DNH", "x_DNH", "b_DKZ", "c_DKZ", "dt_DN", "out_NHD")},
}
ORDINARY = {f"attention.{name}" for name in ("query_DNH", "key_DKH", "value_DKH", "out_NHD")}
ORDINARY |= {f"mlp.{name}" for name in ("gate_DF", "up_DF", "down_FD")}
TOKENS_BT = np.arange(16, dtype=np.int32).reshape(2, 8) * 5 % VOCAB


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_are_these_and_no_norm_router_convolution_or_vector(name):
    found = {path.split(".", 2)[2] for path in matrices(model_of(CONFIGS[name]), r"^layers\.")}
    assert EXPECTED[name] <= found <= EXPECTED[name] | ORDINARY


def cases(of_bits, fast):
    """Every kind of layer is in the fast cases of one of the tests."""
    return [
        pytest.param(name, bits, marks=[] if (name, bits) in fast else [pytest.mark.slow])
        for name, bits in itertools.product(CONFIGS, of_bits)
    ]


@pytest.mark.parametrize("name, bits", cases((4, 8), fast=[("experts", 4), ("latent", 4)]))
def test_quantised_weights_are_read_as_the_dense_ones(name, bits):
    model, quantised, _, _ = built(config=CONFIGS[name], bits=bits)
    logits = jax.jit(model.logits)
    expected = logits(jax.jit(weights.whole)(quantised), TOKENS_BT)
    assert relative(logits(quantised, TOKENS_BT), expected) < 1e-5
    assert relative(logits(random_params(model), TOKENS_BT), expected) > 1e-3


@pytest.mark.parametrize("name, bits", cases((0, 4), fast=[("mamba", 0)]))
def test_before_its_first_step_lora_gives_exactly_the_logits_of_its_base(name, bits):
    model, params, _, adapter = built(config=CONFIGS[name], bits=bits, trained=False)
    logits = jax.jit(model.logits)
    np.testing.assert_array_equal(logits(adapted(params, adapter), TOKENS_BT), logits(params, TOKENS_BT))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_it_is_the_same(name, kind):
    model, params, _, adapter = built(kind, config=CONFIGS[name], bits=4)
    logits = jax.jit(model.logits)
    expected = logits(adapted(params, adapter), TOKENS_BT)
    assert relative(logits(params, TOKENS_BT), expected) > 0.1
    assert relative(logits(jax.jit(merge_adapter)(params, adapter), TOKENS_BT), expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_it_is_the_same(name):
    model, params, _, adapter = built("dora", config=CONFIGS[name], bits=4)
    over = adapted(params, adapter)
    unstacked, cache, parts = model.unstack(over), model.init_cache(2, 8), []
    step = jax.jit(lambda piece, cache: model.apply(unstacked, piece, cache=cache))
    for begin in (0, 4):
        out = step(Inputs(*(x[:, begin : begin + 4] for x in inputs(TOKENS_BT)[:3])), cache)
        cache = out.cache
        parts.append(unembed(out.hidden_BTD, model.head(unstacked), None))
    assert relative(jnp.concatenate(parts, axis=1), jax.jit(model.logits)(over, TOKENS_BT)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_through_the_merged_weights(name, kind):
    with jax.enable_x64(True):
        model, params, _, adapter = built(kind, config=CONFIGS[name], dtype="float64", param_dtype="float64")

        def gradient(read):
            def loss(adapter):
                hidden_BTD = model.apply(read(adapted(params, adapter)), inputs(TOKENS_BT)).hidden_BTD
                return jnp.sum(jnp.square(hidden_BTD) * jnp.arange(16)[None, None])

            return jax.jit(jax.grad(loss))(adapter)

        assert_close(gradient(lambda params: params), gradient(weights.whole), 1e-9)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_experts_take_no_product_as_large_as_their_weights(kind):
    """Neither the gradient of a full weight nor A·B, over a base of 4 bits too."""
    model, params, adapter = abstract(kind, 4, CONFIGS["experts"], include="E[DF]{2}$")
    large = math.prod(leaf_at(params, "layers.1.mlp.gate_EDF").shape[1:])

    def loss(params):
        return jnp.sum(jnp.square(model.apply(params, inputs(TOKENS_BT[:, :7])).hidden_BTD))

    def sizes(read):
        function = jax.grad(lambda adapter, params: loss(read(params, adapter)))
        return {math.prod(shape) for shape in products_of(function, adapter, params)}

    assert large not in sizes(adapted)
    assert large in sizes(merge_adapter), "the test can fail"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_experts_on_a_mesh_have_one_devices_gradients(kind):
    batch = packed_batch()

    def gradients(partition):
        alone, params, config, adapter = built(kind, config=CONFIGS["experts"])
        model = make_model(alone.config, partition)
        if partition is not None:
            params = jax.device_put(params, partition.shardings(model.axes))
            adapter = jax.device_put(adapter, partition.shardings(adapter_axes(model, config)))
        base = quantise(model, params, QuantiseConfig(4, group=8))
        loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))
        run = jax.jit(jax.grad(lambda adapter: loss(adapted(base, adapter), batch, None)[0].sum))
        return jax.tree.map(np.asarray, run(adapter))

    assert_close(gradients(make_partition(MeshConfig(data=2, fsdp=2, tensor=2))), gradients(None), 1e-4)
