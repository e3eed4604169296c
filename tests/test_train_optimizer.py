"""Schedules by their definition, decay by logical axes, Muon's updates orthogonal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model.matrices import is_matrix
from llmlab.model.transformer import make_model
from llmlab.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from llmlab.train.state import start, state_shardings
from tests.helpers import random_params, tiny_gpt2, tiny_llama


def rates(steps=20, **overrides):
    config = OptimizerConfig(**{**dict(learning_rate=1.0, warmup=4, final=0.1), **overrides})
    schedule = make_schedule(config, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_every_schedule_warms_up_linearly_and_never_from_zero(schedule):
    np.testing.assert_allclose(rates(schedule=schedule)[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert rates(schedule=schedule).max() <= 1.0 + 1e-6


def test_how_each_schedule_ends():
    after = np.arange(17) / 16
    np.testing.assert_allclose(
        rates(schedule="cosine")[4:], 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * after)), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(rates(schedule="linear")[4:], 1 - 0.9 * after, rtol=1e-5)
    stable = rates(schedule="wsd", decay=0.25)
    np.testing.assert_allclose(stable[4:16], 1.0)
    np.testing.assert_allclose(stable[15:], 1 - 0.9 * np.arange(6) / 5, rtol=1e-5)
    np.testing.assert_allclose(rates(schedule="constant")[4:], 1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    model = make_model(tiny_gpt2(qk_norm="head"))
    params = random_params(model)
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(name=name, learning_rate=0.5, warmup=0, schedule="constant", weight_decay=0.2)
    optimizer = make_optimizer(config, 10, model.axes)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for (path, update), weight in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
    ):
        leaf = jax.tree_util.keystr(path)
        vector = "bias" in leaf or "scale" in leaf
        np.testing.assert_allclose(update, 0 * weight if vector else -0.5 * 0.2 * weight, rtol=1e-6, err_msg=leaf)


@pytest.mark.parametrize(
    "axes, matrix",
    [
        (("layers", "norm"), False),
        (("layers", "heads", "head_dim"), False),
        (("layers", "embed"), False),
        (("layers", "heads", "head_dim", "embed"), True),
        (("vocab", "embed"), True),
        (("layers", "experts", "embed"), False),
        (("layers", "experts"), False),
        (("layers", "experts", "mlp", "embed"), True),
        (("layers", "embed", None), True),
        (("layers", "latent", "heads", "head_dim"), True),
        (("layers", "heads", "head_dim", "rank"), True),
        (("layers", "rank", "mlp"), True),
        (("layers", "experts", "rank", "mlp"), True),
    ],
)
def test_a_matrix_is_known_by_its_axes_not_its_rank(axes, matrix):
    assert is_matrix(axes) is matrix


def test_muon_turns_each_layers_matrix_by_itself():
    model = make_model(tiny_llama())
    params = random_params(model)
    gradients = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), x.dtype), params)
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup=0, schedule="constant", weight_decay=0.0)
    optimizer = make_optimizer(config, 10, model.axes)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    attention = updates["layers"]["0"]["attention"]
    for layer in range(2):
        for matrix in (attention["query_DNH"][layer].reshape(16, 16), attention["out_NHD"][layer].reshape(16, 16)):
            singular = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
            # consistent_rms scales an orthogonal matrix by 0.2·sqrt(16); Newton-Schulz leaves it within 0.7…1.2.
            assert singular.min() / 0.8 > 0.6
            assert singular.max() / 0.8 < 1.3
    embedding = np.asarray(updates["embedding"]["tokens_VD"])
    assert np.ptp(np.abs(embedding)) < 1e-3  # Adam's first step is the sign, whatever the gradient's size


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_where_their_weights_do(name):
    partition = make_partition(MeshConfig(fsdp=4, tensor=2))
    model = make_model(tiny_llama(), partition)
    optimizer = make_optimizer(OptimizerConfig(name=name), 10, model.axes)
    state = jax.eval_shape(lambda key: start(model.init(key), optimizer, window=4, ema=True), jax.random.key(0))
    shardings = state_shardings(model, state)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1 and "scale" not in name and "window" not in name:
            assert "fsdp" in sharding.spec, name


@pytest.mark.parametrize(
    "overrides",
    [
        dict(learning_rate=-1.0),
        dict(beta1=1.0),
        dict(final=2.0),
        dict(accumulate=0),
        dict(clip=-1.0),
        dict(weight_decay=float("nan")),
    ],
)
def test_impossible_settings_are_refused(overrides):
    with pytest.raises(UserError, match=next(iter(overrides))):
        OptimizerConfig(**overrides)
