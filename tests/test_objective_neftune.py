"""NEFTune: how large the noise is, where it goes, and that only training has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model.transformer import embed, make_model
from llmlab.model.types import Inputs
from llmlab.objective import NextTokenConfig
from llmlab.objective.neftune import noisy_embeddings, segment_lengths
from tests.helpers import VOCAB, assert_close, packed_batch, random_params, tiny_gpt2, tiny_llama

BYTES_V = np.ones(VOCAB, np.int32)


def test_lengths_are_of_segments():
    segments_BT = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4], [0, 0, 0, 1, 1, 2, 3, 3]])
    lengths_BT = [[3, 3, 3, 1, 2, 2, 2, 2], [8] * 8, [3, 3, 3, 2, 2, 1, 2, 2]]
    np.testing.assert_array_equal(jax.jit(segment_lengths)(segments_BT), lengths_BT)


def test_the_noise_is_uniform_and_shrinks_with_the_root_of_a_segments_numbers():
    model, alpha = make_model(tiny_llama(width=256, heads=4)), 5.0
    params = random_params(model)
    batch = packed_batch(rows=4, length=64)
    noisy_BTD = jax.jit(lambda key: noisy_embeddings(model, params, batch, alpha, key))(jax.random.key(0))
    noise_BTD = np.asarray(noisy_BTD) - np.asarray(params["embedding"]["tokens_VD"])[batch.tokens_BT]
    for row, segment_ids_T in enumerate(batch.segment_ids_BT):
        for segment in (1, 2):
            noise = noise_BTD[row][segment_ids_T == segment]
            bound = alpha / np.sqrt(noise.size)
            assert np.abs(noise).max() <= bound * (1 + 1e-5)
            assert np.abs(noise).max() > 0.9 * bound
            assert abs(noise.mean()) < 4 * bound / np.sqrt(3 * noise.size)
            assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=4 * 0.45 / np.sqrt(noise.size))


@pytest.mark.parametrize(
    "config", [tiny_llama(scaled_embedding=True, layers=1), tiny_gpt2(layers=1)], ids=["scaled", "learned"]
)
def test_what_is_embedded_beforehand_is_what_the_model_looks_up(config):
    model = make_model(config)
    params, batch = random_params(model), packed_batch(rows=2)
    inputs = Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)

    def hidden(params, given):
        embeddings_BTD = embed(model, params, batch.tokens_BT) if given else None
        return jnp.sum(jnp.sin(model.apply(params, inputs._replace(embeddings_BTD=embeddings_BTD)).hidden_BTD))

    run = jax.jit(jax.value_and_grad(hidden), static_argnums=1)
    assert_close(run(params, True), run(params, False), 1e-6)


def test_only_training_is_noisy():
    model = make_model(tiny_llama(layers=1))
    params, batch = random_params(model), packed_batch(rows=2)
    quiet, noisy = (NextTokenConfig(neftune_alpha=alpha).make(model, BYTES_V) for alpha in (0.0, 20.0))

    def run(key):
        return jnp.stack([loss(params, batch, key)[0].sum for loss in (quiet, noisy)])

    evaluated = np.asarray(jax.jit(lambda: run(None))())
    assert evaluated[0] == evaluated[1]
    train = jax.jit(run)
    first, again, other = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first[0] == pytest.approx(evaluated[0], rel=1e-6)
    assert first[1] == again[1]
    assert len({float(x) for x in (first[0], first[1], other[1])}) == 3


def test_a_mesh_draws_the_same_noise():
    batch = packed_batch(rows=8)
    found = []
    for partition in (None, make_partition(MeshConfig(data=2, fsdp=2, tensor=2))):
        model = make_model(tiny_llama(layers=1), partition)
        params = random_params(model)
        if partition is not None:
            params = jax.device_put(params, partition.shardings(model.axes))
        run = jax.jit(lambda p, key, m=model: noisy_embeddings(m, p, batch, 5.0, key))
        found.append(run(params, jax.random.key(0)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-7)


def test_a_negative_alpha_is_refused():
    with pytest.raises(UserError, match=r"objective\.neftune_alpha=-1\.0 should be 0 \(off\) or more"):
        NextTokenConfig(neftune_alpha=-1.0)
