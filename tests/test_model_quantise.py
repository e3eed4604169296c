"""Quantised weights against the scheme written out in numpy, the memory they take, and the model that reads them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.eval.quantisation import logit_error
from llmlab.model import weights
from llmlab.model.cost import tree_bytes
from llmlab.model.matrices import leaf_at, matrices, with_leaves
from llmlab.model.quantise import QuantiseConfig, QuantisedLeaf, quantise
from llmlab.model.transformer import make_model
from llmlab.model.types import Inputs, inputs
from tests.helpers import VOCAB, assert_close, logits_in_pieces, packed_batch, random_params, relative, tiny_llama

SCHEMES = {
    "8 bits": QuantiseConfig(8),
    "8 bits, groups of 4": QuantiseConfig(8, group=4),
    "4 bits, groups of 8": QuantiseConfig(4, group=8, include=""),
}
GROUPS, SLOW = "4 bits, groups of 8", pytest.mark.slow
INPUTS = {"query_DNH": 1, "key_DKH": 1, "value_DKH": 1, "out_NHD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}


def reference(weight_IO, bits, group):
    """(integers, scales), one group after the other."""
    size_in, size_out = weight_IO.shape
    integers_IO = np.zeros((size_in, size_out), int)
    scales_GO = np.zeros((size_in // group, size_out), np.float32)
    most = {8: 127, 4: 7}[bits]
    for g in range(size_in // group):
        for o in range(size_out):
            part = weight_IO[g * group : (g + 1) * group, o]
            scales_GO[g, o] = max(abs(part)) / np.float32(most)
            integers_IO[g * group : (g + 1) * group, o] = np.rint(part / scales_GO[g, o])
    return integers_IO, scales_GO


def stored_integers(leaf, layer):
    """The integers of one layer as [inputs, …, outputs], read from the bytes."""
    values = np.asarray(leaf.values)[layer]
    if leaf.bits == 8:
        return values
    last = leaf.dims_in - 1
    out = np.zeros(leaf.shape[1:], int)
    for index in np.ndindex(values.shape):
        byte = int(values[index]) & 255
        for place, nibble in enumerate((byte & 15, byte >> 4)):
            there = list(index)
            there[last] = 2 * index[last] + place
            out[tuple(there)] = nibble - 16 if nibble > 7 else nibble
    return out


def dequantised(params, model, config):
    """The parameters, every matrix that `config` includes as the reference has it after quantisation."""
    leaves = {}
    for path, matrix in matrices(model, config.include).items():
        weight = np.asarray(leaf_at(params, path))
        size_in = math.prod(weight.shape[matrix.stack :][: matrix.dims_in])
        layers = []
        for one_IO in weight.reshape(math.prod(weight.shape[: matrix.stack]), size_in, -1):
            integers_IO, scales_GO = reference(one_IO, config.bits, config.group or size_in)
            layers.append(integers_IO * np.repeat(scales_GO, size_in // len(scales_GO), axis=0))
        leaves[path] = jnp.asarray(np.stack(layers).reshape(weight.shape), weight.dtype)
    return with_leaves(params, leaves)


@pytest.fixture(scope="module")
def built():
    model = make_model(tiny_llama(scan=True))
    return model, random_params(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_the_scheme_written_out_in_numpy(built, scheme):
    (model, params), config = built, SCHEMES[scheme]
    quantised = quantise(model, params, config)
    for path in matrices(model, config.include):
        name = path.rsplit(".", 1)[1]
        leaf, dims_in = leaf_at(quantised, path), INPUTS.get(name, 1)
        assert isinstance(leaf, QuantisedLeaf)
        weight = np.asarray(leaf_at(params, path))
        assert leaf.shape == weight.shape
        layers = range(len(weight)) if path.startswith("layers") else (None,)
        for layer in layers:
            one = weight if layer is None else weight[layer]
            size_in = math.prod(one.shape[:dims_in])
            integers_IO, scales_GO = reference(one.reshape(size_in, -1), config.bits, config.group or size_in)
            if layer is not None:
                np.testing.assert_array_equal(stored_integers(leaf, layer).reshape(size_in, -1), integers_IO)
            scales = np.asarray(leaf.scales) if layer is None else np.asarray(leaf.scales)[layer]
            np.testing.assert_allclose(scales.reshape(scales_GO.shape), scales_GO, rtol=1e-6)
            expected_IO = integers_IO * np.repeat(scales_GO.astype(np.float64), size_in // len(scales_GO), axis=0)
            dense = np.asarray(leaf.dense(jnp.float32))
            dense = dense if layer is None else dense[layer]
            assert relative(dense.reshape(size_in, -1), expected_IO) < 1e-6


def test_what_is_not_included_is_shared(built):
    model, params = built
    quantised = quantise(model, params, QuantiseConfig(8, include="mlp"))
    assert quantised["embedding"]["tokens_VD"] is params["embedding"]["tokens_VD"]
    assert quantised["head"]["unembedding_DV"] is params["head"]["unembedding_DV"]
    attention = quantised["layers"]["0"]["attention"]
    assert attention["query_DNH"] is params["layers"]["0"]["attention"]["query_DNH"]
    assert isinstance(quantised["layers"]["0"]["mlp"]["up_DF"], QuantisedLeaf)
    assert isinstance(params["layers"]["0"]["mlp"]["up_DF"], jax.Array)


@pytest.mark.parametrize(
    "scheme, bits_each", [("8 bits, groups of 4", 8 + 32 / 4), ("4 bits, groups of 8", 4 + 32 / 8)]
)
def test_memory_is_as_the_arithmetic_says(built, scheme, bits_each):
    model, params = built
    quantised = quantise(model, params, dataclasses.replace(SCHEMES[scheme], include="mlp"))
    found = tree_bytes(quantised["layers"]["0"]["mlp"])
    assert found == 2 * 3 * 16 * 32 * bits_each / 8


@pytest.mark.parametrize("scheme", [pytest.param(name, marks=[] if name == GROUPS else SLOW) for name in SCHEMES])
def test_logits_are_as_far_off_as_the_scheme_in_numpy_puts_them(built, scheme):
    (model, params), config = built, SCHEMES[scheme]
    tokens_BT = jax.random.randint(jax.random.key(5), (4, 16), 0, VOCAB)
    exact, ours, theirs = (
        jax.jit(model.logits)(read, tokens_BT)
        for read in (params, quantise(model, params, config), dequantised(params, model, config))
    )
    assert relative(ours, theirs) < 1e-5
    assert relative(ours, exact) == pytest.approx(relative(theirs, exact), rel=1e-3)
    assert 1e-3 < relative(ours, exact) < {8: 0.03, 4: 0.5}[config.bits]


@pytest.mark.parametrize("scheme", [pytest.param("8 bits", marks=SLOW), GROUPS])
def test_the_model_reads_it_as_the_dense_weights(built, scheme):
    model, params = built
    quantised = quantise(model, params, SCHEMES[scheme])
    tokens_BT = np.random.default_rng(1).integers(VOCAB, size=(2, 8))
    expected = jax.jit(model.logits)(weights.whole(quantised), tokens_BT)
    assert relative(jax.jit(model.logits)(quantised, tokens_BT), expected) < 1e-6
    assert relative(logits_in_pieces(model, quantised, tokens_BT, (4,)), expected) < 1e-5


def test_gradients_pass_through_it_as_through_the_dense_weights(built):
    model, params = built
    quantised = quantise(model, params, SCHEMES["4 bits, groups of 8"])
    tokens_BT = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    x_BTD = jax.random.normal(jax.random.key(2), (2, 6, 16))

    def gradient(params):
        def loss(x_BTD):
            return jnp.sum(jnp.square(model.apply(params, inputs(tokens_BT)._replace(embeddings_BTD=x_BTD)).hidden_BTD))

        return jax.jit(jax.grad(loss))(x_BTD)

    assert_close(gradient(quantised), gradient(weights.whole(quantised)), 1e-5)


def test_it_keeps_to_bfloat16():
    model = make_model(tiny_llama(dtype="bfloat16", param_dtype="bfloat16"))
    params = random_params(model)
    leaf = leaf_at(quantise(model, params, QuantiseConfig(8)), "layers.0.mlp.up_DF")
    assert leaf.scales.dtype == leaf.dtype == jnp.bfloat16
    assert relative(leaf.dense(jnp.float32), leaf_at(params, "layers.0.mlp.up_DF")) < 1e-2


def test_it_lies_on_a_mesh_where_the_weight_would(built):
    partition = make_partition(MeshConfig(fsdp=4, tensor=2))
    alone, meshed = make_model(tiny_llama(scan=True)), make_model(tiny_llama(scan=True), partition)
    params = random_params(alone)
    placed = jax.device_put(params, partition.shardings(meshed.axes))
    config = QuantiseConfig(4, group=8)
    quantised = quantise(meshed, placed, config)
    leaf = leaf_at(quantised, "layers.0.mlp.up_DF")
    assert leaf.values.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert leaf.scales.sharding.spec == jax.P(None, None, "tensor")
    tokens_BT = np.arange(16, dtype=np.int32).reshape(8, 2)
    expected = jax.jit(alone.logits)(quantise(alone, params, config), tokens_BT)
    assert relative(jax.jit(meshed.logits)(quantised, tokens_BT), expected) < 1e-5


def test_the_error_is_that_of_the_logits_of_targets(built):
    model, params = built
    quantised = quantise(model, params, SCHEMES["4 bits, groups of 8"])
    batch = packed_batch(rows=3, length=8)
    found = logit_error(model, params, quantised, batch)

    def logits(params):
        inputs = Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        hidden_BTD = jax.jit(model.apply)(params, inputs).hidden_BTD
        return np.asarray(hidden_BTD, np.float64) @ np.asarray(model.head(params), np.float64)

    counted = batch.mask_BT > 0
    assert not counted.all()
    assert found == pytest.approx(relative(logits(quantised)[counted], logits(params)[counted]), rel=1e-4)
    assert found > 0.01
    assert logit_error(model, params, params, batch) == 0


def test_the_matrices_it_is_made_from_can_be_released(built):
    model, params = built
    mine = jax.tree.map(jnp.array, params)
    quantised = quantise(model, mine, SCHEMES["4 bits, groups of 8"], release=True)
    assert leaf_at(mine, "layers.0.mlp.up_DF").is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(quantised))
    expected = quantise(model, params, SCHEMES["4 bits, groups of 8"])
    assert all(map(np.array_equal, jax.tree.leaves(quantised), jax.tree.leaves(expected)))


@pytest.mark.parametrize(
    "config, words",
    [
        (dict(bits=3), "bits=3 is not a choice"),
        (dict(group=-1), "group=-1"),
        (dict(bits=4), r"group=32 does not divide the 16 inputs of layers\.0\.attention.*: try group=16"),
        (dict(include="("), "is no regular expression"),
        (dict(include="atention"), "'atention' is found in the path of no matrix"),
        (dict(include="tokens_VD"), "'tokens_VD' is found in the path of no matrix"),
    ],
)
def test_what_cannot_be_is_refused(built, config, words):
    with pytest.raises(UserError, match=words):
        quantise(*built, QuantiseConfig(**config))
