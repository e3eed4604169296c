import jax
import numpy as np
import pytest

from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.eval.likelihood import bucket, fit, make_log_likelihoods
from llmlab.model.config import ModelConfig
from llmlab.model.transformer import make_model

V, LONGEST = 13, 50
CONFIG = ModelConfig(width=16, layers=1, heads=2, vocab_size=V, max_positions=LONGEST, logit_softcap=3.0)
RNG = np.random.default_rng(0)
# The fourth fills all positions: 51 tokens, of which the last is only predicted.
PAIRS = [
    (RNG.integers(0, V, p).tolist(), RNG.integers(0, V, c).tolist()) for p, c in [(1, 1), (5, 3), (2, 30), (40, 11)]
]


@pytest.fixture(scope="module")
def trained():
    model = make_model(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def brute_force(trained):
    """Σ log softmax(logits)[continuation], pair by pair, in float64."""
    model, params = trained
    logits_of, nats = jax.jit(model.logits), []
    for prompt, continuation in PAIRS:
        ids = np.array([*prompt, *continuation])
        after = np.zeros(LONGEST + 1 - len(ids), int)  # what comes after changes nothing, and one shape compiles once
        logits_1TV = logits_of(params, np.append(ids[:-1], after)[None])
        logits_TV = np.asarray(logits_1TV, np.float64)[0, : len(ids) - 1]
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        logp_T = logp_TV[np.arange(len(ids) - 1), ids[1:]]
        nats.append(logp_T[len(prompt) - 1 :].sum())
    return nats


@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_sum_over_the_continuation_whatever_the_batch(trained, brute_force, batch_size):
    model, params = trained
    nats = make_log_likelihoods(model, batch_size)(params, PAIRS, lambda done: None)
    np.testing.assert_allclose(nats, brute_force, rtol=1e-5)


def test_a_mesh_gives_the_same(trained, brute_force):
    partition = make_partition(MeshConfig(data=2, fsdp=2, sequence=2))
    meshed = make_model(CONFIG, partition)
    params = jax.device_put(trained[1], partition.shardings(meshed.axes))
    np.testing.assert_allclose(
        make_log_likelihoods(meshed, 3)(params, PAIRS, lambda done: None), brute_force, rtol=1e-5
    )


def test_progress_counts_pairs(trained):
    seen = []
    make_log_likelihoods(trained[0], 3)(trained[1], PAIRS, seen.append)
    assert seen == [3, 4]


def test_buckets_are_few_never_too_short_and_end_at_the_positions():
    assert [bucket(length, 1000) for length in (1, 32, 33, 49, 65, 97, 800)] == [32, 32, 48, 64, 96, 128, 1000]
    assert bucket(20, 20) == 20
    assert all(bucket(length, 5000) >= length for length in range(1, 5000))
    assert len({bucket(length, 4096) for length in range(1, 4096)}) == 15


def test_a_prompt_is_cut_from_the_left_behind_its_bos():
    assert fit([1, 2, 3], 3) == ([1, 2, 3], False)
    assert fit([1, 2, 3, 4], 3) == ([1, 3, 4], True)
    assert fit([1, 2, 3, 4], 1) == ([1], True)
