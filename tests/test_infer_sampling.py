"""Filters, penalty and draw against float64 numpy, and against the probabilities that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from llmlab.infer.sampling import filter_logits, repetition_penalty, sample

LOGITS_BV = np.random.default_rng(0).normal(size=(5, 37)) * 3


def expected(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One row, token by token from the likeliest down."""
    logits_V = np.asarray(logits_V, np.float64) / temperature
    order = np.argsort(-logits_V, kind="stable")
    if top_k:
        order = order[:top_k]
    p = np.exp(logits_V[order] - logits_V.max())
    p /= p.sum()
    kept, total = [], 0.0
    for place, token in enumerate(order):
        if (top_p == 1 or total < top_p or place == 0) and p[place] >= min_p * p[0]:
            kept.append(token)
        total += p[place]
    out = np.full_like(logits_V, -np.inf)
    out[kept] = logits_V[kept]
    return out


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"top_k": 4},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_match_numpy(settings):
    want_BV = [expected(row, **settings) for row in LOGITS_BV]
    np.testing.assert_allclose(filter_logits(jnp.asarray(LOGITS_BV), **settings), want_BV, rtol=1e-5)


def test_settings_of_each_row():
    rows = [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.1}, {}]
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = {name: jnp.asarray([row.get(name, value) for row in rows]) for name, value in off.items()}
    want_BV = [expected(logits, **row) for logits, row in zip(LOGITS_BV, rows, strict=True)]
    np.testing.assert_allclose(jax.jit(filter_logits)(jnp.asarray(LOGITS_BV), **columns), want_BV, rtol=1e-5)


def test_ties_at_the_edge_stay_together():
    logits_BV = jnp.asarray([[2.0, 1.0, 2.0, 1.0, 0.0]])
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(logits_BV, top_k=3))[0], [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(logits_BV, top_p=0.1))[0], [1, 0, 1, 0, 0])


def test_a_filter_that_is_off_keeps_the_far_tail():
    # After the first token the probabilities add up to exactly 1 in float32: top_p=1 must still keep the rest.
    logits_BV = jnp.asarray([[50.0, 0.0, -50.0]], jnp.float32)
    assert jnp.isfinite(filter_logits(logits_BV, top_p=jnp.asarray([1.0]))).all()


def test_no_sort_unless_asked():
    text = str(jax.make_jaxpr(lambda x: filter_logits(x, temperature=0.5, min_p=0.1))(LOGITS_BV))
    assert "sort" not in text
    assert "sort" in str(jax.make_jaxpr(lambda x: filter_logits(x, top_p=0.5))(LOGITS_BV))


def test_repetition_penalty():
    logits_BV = jnp.asarray([[2.0, -2.0, 3.0, -3.0]])
    seen_BV = jnp.asarray([[True, True, False, False]])
    np.testing.assert_allclose(repetition_penalty(logits_BV, seen_BV, 2.0), [[1.0, -4.0, 3.0, -3.0]])
    np.testing.assert_allclose(repetition_penalty(logits_BV, seen_BV, jnp.asarray([4.0])), [[0.5, -8.0, 3.0, -3.0]])


def draws(count, seed=0, **settings):
    logits_BV = jnp.broadcast_to(jnp.asarray(LOGITS_BV[0, :8] / 2), (count, 8))
    drawn = jax.jit(lambda *arguments: sample(*arguments, **settings))
    return np.asarray(drawn(logits_BV, jnp.full(count, seed), jnp.arange(count)))


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_frequencies_are_the_probabilities(settings):
    counts_V = np.bincount(draws(20_000, **settings), minlength=8)
    kept_V = expected(LOGITS_BV[0, :8] / 2, **settings)
    p_V = np.exp(kept_V - kept_V.max()) / np.exp(kept_V - kept_V.max()).sum()
    assert counts_V[p_V == 0].sum() == 0
    assert stats.chisquare(counts_V[p_V > 0], 20_000 * p_V[p_V > 0]).pvalue > 0.001


def test_a_draw_depends_on_its_seed_and_position_only():
    np.testing.assert_array_equal(draws(50), draws(60)[:50])
    assert (draws(50) != draws(50, seed=1)).any()


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits_BV = jnp.asarray([[0.0, 3.0, 3.0], [1.0, 0.0, 1.0]])
    seeds_B = positions_B = jnp.arange(2)
    for temperature in (0.0, 0, jnp.asarray([0.0, 0.0]), jnp.asarray(0.0)):
        drawn = jax.jit(lambda *arguments, temperature=temperature: sample(*arguments, temperature=temperature))
        token_B = drawn(logits_BV, seeds_B, positions_B)
        np.testing.assert_array_equal(token_B, [1, 0])


def test_rows_mix_greedy_and_sampled():
    logits_BV = jnp.zeros((200, 4)).at[:, 2].set(0.1)
    temperature_B = jnp.arange(200) % 2
    token_B = jax.jit(sample)(logits_BV, jnp.zeros(200, int), jnp.arange(200), temperature=temperature_B)
    assert (token_B[::2] == 2).all()
    assert len(set(token_B[1::2].tolist())) == 4
