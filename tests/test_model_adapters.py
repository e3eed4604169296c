"""Adapters against the formulas of their papers in numpy; at first they change nothing, and never take much memory."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model import weights
from llmlab.model.adapters import (
    AdaptedLeaf,
    AdapterConfig,
    adapted,
    adapter_axes,
    add_adapter,
    merge_adapter,
)
from llmlab.model.cost import abstract_params, tree_bytes
from llmlab.model.matrices import OF_LAYERS, leaf_at, with_leaves
from llmlab.model.quantise import QuantiseConfig, quantise
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Inputs, inputs
from llmlab.objective import NextTokenConfig
from tests.helpers import VOCAB, assert_close, packed_batch, random_params, relative, tiny_llama

KINDS = ("lora", "dora")
SLOW = pytest.mark.slow
# Of both kinds over arrays and over 4 bits, what every run of the tests takes.
CASES = [("lora", 0), ("dora", 4), pytest.param("lora", 4, marks=SLOW), pytest.param("dora", 0, marks=SLOW)]
TOKENS_BT = np.arange(16, dtype=np.int32).reshape(2, 8) * 5 % VOCAB


model_of = functools.cache(make_model)  # what is compiled for one test serves the others


def abstract(kind, bits, config, *, include=OF_LAYERS, rank=3, group=8):
    """(model, weights, adapter), both trees of shapes alone."""
    model = model_of(config)
    settings = AdapterConfig(kind=kind, rank=rank, include=include)

    def begin(params):
        base = quantise(model, params, QuantiseConfig(bits, group=group)) if bits else params
        return base, add_adapter(model, base, settings, jax.random.key(1))

    return model, *jax.eval_shape(begin, abstract_params(model))


@functools.cache
def built(kind="lora", *, bits=0, trained=True, config=None, include=OF_LAYERS, **overrides):
    """(model, weights, config, adapter): as after training, with a B and magnitudes that matter."""
    model = model_of(dataclasses.replace(config or tiny_llama(scan=True), **overrides))
    settings = AdapterConfig(kind=kind, rank=3, alpha=5.0, include=include)

    params = random_params(model)
    if bits:
        params = jax.jit(lambda params: quantise(model, params, QuantiseConfig(bits, group=8)))(params)
    begin = jax.jit(lambda params: add_adapter(model, params, settings, jax.random.key(1)))
    if not trained:
        return model, params, settings, begin(params)
    # Drawn by numpy, which compiles nothing: magnitudes about 1, as the norms of these columns are.
    adapter = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(begin, params))
    if kind == "dora":
        adapter = {path: dataclasses.replace(u, magnitude=u.magnitude + 1) for path, u in adapter.items()}
    return model, params, settings, disturbed(adapter)


def disturbed(adapter, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * rng.standard_normal(x.shape), x.dtype), adapter)


def in_numpy(params, path, update, kind):
    """(W', V, norms) of every layer in float64: V = W + scale·A·B; W' = V, or with its columns scaled for DoRA."""
    weight = np.asarray(weights.whole(params)["layers"][path.split(".")[1]][path.split(".")[2]][path.split(".")[3]])
    merged, sums, norms = [], [], []
    for layer in range(len(weight)):
        a = np.asarray(update.a[layer], np.float64).reshape(-1, 3)
        b = np.asarray(update.b[layer], np.float64).reshape(3, -1)
        v = weight[layer].astype(np.float64).reshape(len(a), -1) + 5.0 / 3 * (a @ b)
        column = np.array([math.sqrt(sum(x * x for x in v[:, o])) for o in range(v.shape[1])])
        sums.append(v), norms.append(column)
        if kind == "dora":
            v = v / column[None] * np.asarray(update.magnitude[layer], np.float64).reshape(1, -1)
        merged.append(v.reshape(weight.shape[1:]))
    return np.stack(merged), sums, norms


@pytest.mark.parametrize("kind, bits", CASES)
def test_the_model_reads_the_formula_of_the_paper(kind, bits):
    model, params, _, adapter = built(kind, bits=bits)
    assert len(adapter) == 7
    dense = {
        path: jnp.asarray(in_numpy(params, path, update, kind)[0], jnp.float32) for path, update in adapter.items()
    }
    logits = jax.jit(model.logits)
    expected = logits(with_leaves(params, dense), TOKENS_BT)
    assert relative(logits(adapted(params, adapter), TOKENS_BT), expected) < 1e-5
    assert relative(logits(random_params(model), TOKENS_BT), expected) > 0.1
    merged = jax.jit(merge_adapter)(params, adapter)
    assert_close(jax.tree.map(np.asarray, {path: leaf_at(merged, path) for path in dense}), dense, 1e-6)
    assert relative(logits(merged, TOKENS_BT), expected) < 1e-5


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=SLOW)])
def test_gradients_are_those_of_the_formula(kind):
    """From the gradient of a full weight by the chain rule; DoRA's norms are constants there."""
    with jax.enable_x64(True):
        model, params, _, adapter = built(kind, dtype="float64", param_dtype="float64")

        def loss(params):
            return jnp.sum(jnp.square(model.apply(params, inputs(TOKENS_BT)).hidden_BTD) * jnp.arange(16)[None, None])

        mine = jax.jit(jax.grad(lambda adapter: loss(adapted(params, adapter))))(adapter)
        full = jax.jit(lambda *parts: jax.grad(loss)(merge_adapter(*parts)))(params, adapter)
        for path, update in adapter.items():
            _, sums, norms = in_numpy(params, path, update, kind)
            for layer in range(len(sums)):
                a = np.asarray(update.a[layer]).reshape(-1, 3)
                b = np.asarray(update.b[layer]).reshape(3, -1)
                d_IO = np.asarray(leaf_at(full, path)[layer]).reshape(len(a), -1)
                if kind == "dora":
                    d_magnitude = (d_IO * sums[layer]).sum(0) / norms[layer]
                    assert relative(mine[path].magnitude[layer].reshape(-1), d_magnitude) < 1e-9
                    d_IO = d_IO * np.asarray(update.magnitude[layer]).reshape(1, -1) / norms[layer][None]
                assert relative(mine[path].a[layer].reshape(a.shape), 5.0 / 3 * d_IO @ b.T) < 1e-9
                assert relative(mine[path].b[layer].reshape(b.shape), 5.0 / 3 * a.T @ d_IO) < 1e-9


@pytest.mark.parametrize("kind, bits", CASES)
def test_before_its_first_step_an_adapter_changes_nothing(kind, bits):
    model, params, _, adapter = built(kind, bits=bits, trained=False)
    batch = packed_batch()
    loss = jax.jit(lambda params: NextTokenConfig().make(model, np.ones(VOCAB, np.int32))(params, batch, None)[0].sum)
    base, with_adapter = float(loss(params)), float(loss(adapted(params, adapter)))
    if kind == "lora":
        assert with_adapter == base
    else:
        assert with_adapter == pytest.approx(base, rel=1e-6)


@SLOW
def test_scanned_unstacked_and_cached_it_is_the_same():
    model, params, _, adapter = built("dora", bits=8, pattern=("local", "global"), window=6)
    over = adapted(params, adapter)
    expected = jax.jit(model.logits)(over, TOKENS_BT)
    other = make_model(dataclasses.replace(model.config, scan=False))
    assert relative(jax.jit(other.logits)(over, TOKENS_BT), expected) < 1e-5
    unstacked, cache, parts = other.unstack(over), other.init_cache(2, 8), []
    step = jax.jit(lambda piece, cache: other.apply(unstacked, piece, cache=cache))
    for begin in (0, 4):
        out = step(Inputs(*(x[:, begin : begin + 4] for x in inputs(TOKENS_BT)[:3])), cache)
        cache = out.cache
        parts.append(unembed(out.hidden_BTD, other.head(unstacked), None))
    assert relative(jnp.concatenate(parts, axis=1), expected) < 1e-5


def test_several_adapters_share_one_base():
    model, params, _, one = built(bits=4)
    two = disturbed(one, seed=8)
    first, second = adapted(params, one), adapted(params, two)
    for path in one:
        mine, theirs = leaf_at(first, path), leaf_at(second, path)
        assert isinstance(mine, AdaptedLeaf)
        assert mine.base is theirs.base is leaf_at(params, path)
        assert mine.base.values.unsafe_buffer_pointer() == theirs.base.values.unsafe_buffer_pointer()
    logits = jax.jit(model.logits)
    assert relative(logits(first, TOKENS_BT), logits(second, TOKENS_BT)) > 0.1


def test_only_what_is_included_gets_an_adapter():
    model, params, _, _ = built()
    config = AdapterConfig(kind="lora", include=r"attention\.(query|value)")
    adapter = add_adapter(model, params, config, jax.random.key(0))
    names = ("query_DNH", "value_DKH")
    assert sorted(adapter) == sorted(f"layers.0.attention.{name}" for name in names)
    with_head = add_adapter(model, params, dataclasses.replace(config, include="unembedding"), jax.random.key(0))
    over = adapted(params, disturbed(with_head))
    assert relative(model.head(over), model.head(params)) > 0.1


def products_of(function, *arguments):
    """The shapes of all results of products in a function, those of its inner functions too."""
    shapes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "ragged_dot_general"):
                shapes.append(equation.outvars[0].aval.shape)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    walk(inner.jaxpr if hasattr(inner, "jaxpr") else inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return shapes


@pytest.mark.parametrize("kind, bits", CASES)
def test_no_product_is_as_large_as_a_weight(kind, bits):
    """Neither the gradient of a full weight nor A·B. Of the sizes of a weight, nothing else here is."""
    model, params, adapter = abstract(kind, bits, tiny_llama(scan=True, mlp_width=88))

    def loss(params):
        return jnp.sum(jnp.square(model.apply(params, inputs(TOKENS_BT[:, :7])).hidden_BTD))

    def sizes(function, *arguments):
        return {math.prod(shape) for shape in products_of(jax.grad(function), *arguments)}

    assert 16 * 88 not in sizes(lambda adapter, params: loss(adapted(params, adapter)), adapter, params)
    assert 16 * 88 in sizes(loss, abstract_params(model)), "training all weights does: the test can fail"


def test_a_column_of_zeros_stays_one():
    """A pruned output has no direction, and DoRA nothing to divide by."""
    model = model_of(tiny_llama(scan=True))
    params = random_params(model)
    path = "layers.0.mlp.up_DF"
    params = with_leaves(params, {path: leaf_at(params, path).at[..., 3].set(0.0)})
    config = AdapterConfig(kind="dora", rank=3)

    @jax.jit
    def with_adapter(params):
        adapter = add_adapter(model, params, config, jax.random.key(1))
        return model.logits(adapted(params, adapter), TOKENS_BT)

    expected = jax.jit(model.logits)(params, TOKENS_BT)
    np.testing.assert_allclose(with_adapter(params), expected, rtol=1e-5, atol=1e-5)


def test_training_takes_no_memory_for_gradients_of_the_base():
    config = tiny_llama(width=64, layers=6, heads=2, kv_heads=2, mlp_width=512, scan=True)
    (model, params, adapter), batch = abstract("lora", 0, config, rank=2), packed_batch(rows=1, length=8)
    loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))

    def taken(function, *arguments):
        memory = jax.jit(jax.grad(function)).lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    full = taken(lambda params: loss(params, batch, None)[0].sum, params)
    frozen = taken(lambda adapter, base: loss(adapted(base, adapter), batch, None)[0].sum, adapter, params)
    assert frozen < full - 0.9 * tree_bytes(params["layers"])


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=SLOW)])
def test_dense_weights_of_a_quantised_base_are_not_kept_for_the_backward_pass(kind):
    config = tiny_llama(width=64, layers=6, heads=2, kv_heads=2, mlp_width=512)

    def kept(bits):
        model, base, adapter = abstract(kind, bits, config, rank=2, group=0)

        def loss(adapter, base):
            return jnp.sum(model.apply(adapted(base, adapter), inputs(TOKENS_BT[:, :4])).hidden_BTD)

        return tree_bytes(jax.eval_shape(lambda a, b: jax.vjp(lambda a: loss(a, b), a)[1], adapter, base))

    stored = tree_bytes(abstract_params(model_of(config))["layers"])
    assert kept(0) > stored
    assert kept(4) < 0.7 * stored


@SLOW
@SLOW
def test_on_a_mesh_gradients_are_one_devices():
    config, batch = AdapterConfig(kind="dora", rank=4), packed_batch()

    def gradients(partition):
        model = make_model(tiny_llama(scan=True), partition)
        params = random_params(model)
        adapter = disturbed(add_adapter(make_model(tiny_llama()), params, config, jax.random.key(0)))
        if partition is not None:
            params = jax.device_put(params, partition.shardings(model.axes))
            adapter = jax.device_put(adapter, partition.shardings(adapter_axes(model, config)))
        base = quantise(model, params, QuantiseConfig(8))
        loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))
        run = jax.jit(jax.grad(lambda adapter: loss(adapted(base, adapter), batch, None)[0].sum))
        return jax.tree.map(np.asarray, run(adapter))

    assert_close(gradients(make_partition(MeshConfig(data=2, fsdp=2, tensor=2))), gradients(None), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_axes_are_those_of_its_arrays(kind):
    model, _, config, adapter = built(kind)
    axes = adapter_axes(model, config)
    assert axes["layers.0.attention.out_NHD"].a == ("layers", "heads", "head_dim", "rank")
    assert axes["layers.0.attention.query_DNH"].b == ("layers", "rank", "heads", "head_dim")
    lengths = jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple))
    assert lengths == jax.tree.map(lambda array: array.ndim, adapter)


def test_rank_stabilised_scale_falls_with_the_root_of_the_rank():
    assert AdapterConfig(rank=16, alpha=8.0).scale == 0.5
    assert AdapterConfig(rank=16, alpha=8.0, rslora=True).scale == 2.0


@pytest.mark.parametrize("overrides", [dict(rank=0), dict(alpha=0.0), dict(base_group=-1), dict(include="[")])
def test_impossible_settings_are_refused(overrides):
    (name,) = overrides
    with pytest.raises(UserError, match=re.escape(name)):
        AdapterConfig(kind="lora", **overrides)
