"""Preference losses against their formulas in numpy, value and gradient; over batches, whatever the packing is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.model.adapters import AdapterConfig, adapted, add_adapter, frozen_base
from llmlab.model.transformer import make_model
from llmlab.objective.preference import PreferenceConfig, kto_loss, orpo_loss, preference_loss, simpo_loss
from tests.groups import (
    check_layouts,
    check_meshes,
    hidden_model,
    hidden_params,
    numpy_logps,
    numpy_through_logps,
    packed,
    random_groups,
    slopes,
    value_and_gradient,
)
from tests.helpers import random_params, relative, tiny_llama

BETA, EPSILON, GAMMA, LAMBDA = 0.3, 0.15, 0.7, 0.4


def sigma(x):
    return 1 / (1 + np.exp(-x))


def log_odds(logp):
    return np.log(np.exp(logp) / (1 - np.exp(logp)))


# In numpy, of one pair or many: chosen, rejected, and the same by the reference.
TRUTHS = {
    ("sigmoid", 0.0): lambda c, r, rc, rr: -np.log(sigma(BETA * (c - rc - (r - rr)))),
    ("sigmoid", EPSILON): lambda c, r, rc, rr: (
        -(1 - EPSILON) * np.log(sigma(BETA * (c - rc - r + rr))) - EPSILON * np.log(sigma(-BETA * (c - rc - r + rr)))
    ),
    ("hinge", 0.0): lambda c, r, rc, rr: np.maximum(0, 1 - BETA * (c - r - rc + rr)),
    ("ipo", 0.0): lambda c, r, rc, rr: (c - r - rc + rr - 1 / (2 * BETA)) ** 2,
    ("robust", EPSILON): lambda c, r, rc, rr: (
        (-(1 - EPSILON) * np.log(sigma(BETA * (c - rc - r + rr))) + EPSILON * np.log(sigma(-BETA * (c - rc - r + rr))))
        / (1 - 2 * EPSILON)
    ),
    ("orpo", 0.0): lambda c, r, rc, rr: -c - LAMBDA * np.log(sigma(log_odds(c) - log_odds(r))),
    ("simpo", 0.0): lambda c, r, rc, rr: -np.log(sigma(BETA * c - BETA * r - GAMMA)),
}
CONFIGS = {
    (kind, smoothing): PreferenceConfig(
        kind=kind, beta=BETA, label_smoothing=smoothing, gamma=GAMMA, odds_weight=LAMBDA, reference="stored"
    )
    for kind, smoothing in TRUTHS
}


def ours(kind, smoothing):
    def loss(chosen, rejected, ref_chosen, ref_rejected):
        if kind == "orpo":
            return orpo_loss(chosen, rejected, weight=LAMBDA)
        if kind == "simpo":
            return simpo_loss(chosen, rejected, beta=BETA, gamma=GAMMA)
        logps = (chosen, rejected, ref_chosen, ref_rejected)
        return preference_loss(*logps, beta=BETA, kind=kind, label_smoothing=smoothing)

    return loss


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-9)])
@pytest.mark.parametrize("kind, smoothing", TRUTHS)
def test_losses_and_gradients_are_their_formulas(kind, smoothing, dtype, tolerance):
    rng = np.random.default_rng(0)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    logps = {name: np.float64(np.float32(-6 * rng.random(12) - 0.1)) for name in names}
    truth = TRUTHS[kind, smoothing]
    weight_B = rng.standard_normal(12)
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(logps[name], dtype) for name in names]
        loss_B = jax.jit(ours(kind, smoothing))(*arrays)
        found = jax.grad(lambda *a: jnp.sum(ours(kind, smoothing)(*a) * weight_B.astype(dtype)), range(4))(*arrays)
    assert loss_B.dtype == dtype
    assert relative(loss_B, truth(*logps.values())) < tolerance
    expected = slopes(lambda p: (truth(*p.values()) * weight_B).sum(), logps)
    for mine, name in zip(found, names, strict=True):
        np.testing.assert_allclose(mine, expected[name], atol=tolerance * np.abs(weight_B).max(), rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-9)])
def test_kto_is_its_formula_and_no_gradient_reaches_its_baseline(dtype, tolerance):
    rng = np.random.default_rng(0)
    logps = {name: np.float64(np.float32(-6 * rng.random(12))) for name in ("policy", "reference")}
    good_B, kl, weights = rng.integers(2, size=12).astype(np.float64), 0.8, (1.5, 0.5)

    def truth(policy, reference):
        ratio = policy - reference
        good, bad = 1 - sigma(BETA * (ratio - kl)), 1 - sigma(BETA * (kl - ratio))
        return np.where(good_B == 1, weights[0] * good, weights[1] * bad)

    def total(policy, reference, kl):
        loss_B = kto_loss(policy, reference, jnp.asarray(good_B), kl, beta=BETA, weights=weights)
        return jnp.sum(loss_B), loss_B

    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(x, dtype) for x in logps.values()]
        found, loss_B = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arrays, jnp.asarray(kl, dtype))
    assert relative(loss_B, truth(**logps)) < tolerance
    expected = slopes(lambda p: truth(**p).sum(), logps)
    assert relative(found[0], expected["policy"]) < tolerance
    assert relative(found[1], expected["reference"]) < tolerance
    assert float(found[2]) == 0


def test_bfloat16_is_computed_in_float32():
    logps = [jnp.asarray(x, jnp.bfloat16) for x in ([-2.0], [-3.0], [-2.5], [-2.0])]
    assert ours("sigmoid", 0.0)(*logps).dtype == jnp.float32


@pytest.mark.parametrize("kind, smoothing", TRUTHS)
def test_what_is_far_out_stays_finite(kind, smoothing):
    chosen, rejected = jnp.asarray([-1e-9, 0.0, -3e4, -1e-9]), jnp.asarray([-3e4, -3e4, 0.0, -1e-9])
    reference = jnp.zeros(4)
    run = jax.value_and_grad(lambda c, r: jnp.sum(ours(kind, smoothing)(c, r, reference, reference)), (0, 1))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(run(chosen, rejected)))


GROUPS = random_groups(4, 2)
ROWS = [GROUPS[:3], [], GROUPS[3:]]


TOKENS = np.array([[answer.said.sum() for answer in group] for group in GROUPS])
REFERENCES = np.array([[answer.reference for answer in group] for group in GROUPS])


def losses_of(kind, smoothing, logps):
    """The loss of each pair, from log-probabilities [pair, response]."""
    unit = TOKENS if kind in ("ipo", "orpo", "simpo") else 1
    return TRUTHS[kind, smoothing](*(logps / unit).T, *(REFERENCES / unit).T)


@pytest.mark.parametrize("kind, smoothing, sft_weight", [*((*case, 0.0) for case in TRUTHS), ("sigmoid", 0.0, 0.6)])
def test_a_batch_of_pairs_is_their_sum_whatever_lies_in_the_padding(kind, smoothing, sft_weight):
    batch = packed(ROWS, 48, 2, groups_a_row=4)
    params = hidden_params(batch)

    def truth(logps):
        return losses_of(kind, smoothing, logps).sum() - sft_weight * (logps / TOKENS)[:, 0].sum()

    logps = numpy_logps(params, GROUPS, ROWS)
    expected = truth(logps)
    slope = slopes(lambda p: truth(p["logps"]), {"logps": logps})["logps"]
    expected_gradient = numpy_through_logps(params, GROUPS, ROWS, slope)
    loss = dataclasses.replace(CONFIGS[kind, smoothing], sft_weight=sft_weight).make(hidden_model(), None)
    for dtype, tolerance in (("float64", 1e-8), ("float32", 2e-6)):
        with jax.enable_x64(dtype == "float64"):
            value, gradient = value_and_gradient(loss, params, batch, dtype)
        assert value == pytest.approx(expected, rel=tolerance)
        for name, of_leaf in expected_gradient.items():
            assert relative(gradient[name], of_leaf) < tolerance, name


def test_the_metrics_are_of_the_pairs():
    batch = packed(ROWS, 48, 2, groups_a_row=4)
    params = hidden_params(batch)
    logps, tokens = numpy_logps(params, GROUPS, ROWS), TOKENS
    losses, rewards = losses_of("sigmoid", 0.0, logps), BETA * (logps - REFERENCES)
    with jax.enable_x64(True):
        total, metrics = jax.jit(CONFIGS["sigmoid", 0.0].make(hidden_model(), None))(params, batch, None)
    expected = {
        "loss": losses.mean(),
        "accuracy": (rewards[:, 0] > rewards[:, 1]).mean(),
        "margin": (rewards[:, 0] - rewards[:, 1]).mean(),
        "chosen_reward": rewards[:, 0].mean(),
        "chosen_logp": logps[:, 0].mean(),
        "chosen_logp_per_token": logps[:, 0].sum() / tokens[:, 0].sum(),
        "chosen_tokens": tokens[:, 0].mean(),
        "rejected_reward": rewards[:, 1].mean(),
        "rejected_logp": logps[:, 1].mean(),
        "rejected_logp_per_token": logps[:, 1].sum() / tokens[:, 1].sum(),
        "rejected_tokens": tokens[:, 1].mean(),
        "reference_kl": (logps - REFERENCES).mean(),
    }
    assert 0 < expected["accuracy"] < 1
    assert {name: mean.value() for name, mean in metrics.items()} == pytest.approx(expected, rel=1e-6)
    assert float(total.weight) == len(GROUPS)


def test_a_group_without_its_second_response_is_no_pair():
    whole, broken = GROUPS[:2], [GROUPS[2][:1]]
    loss = jax.jit(CONFIGS["sigmoid", 0.0].make(hidden_model(), None))
    batch = packed([whole, broken], 48, 2)
    params = hidden_params(batch)
    total, _ = loss(params, batch, None)
    alone = packed([whole], 48, 2)
    expected, _ = loss(params | {"hidden_BTD": params["hidden_BTD"][:1]}, alone, None)
    assert float(total.weight) == float(expected.weight) == 2
    assert float(total.sum) == pytest.approx(float(expected.sum), rel=1e-6)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("sigmoid", "float32"),
        pytest.param("orpo", "float32", marks=pytest.mark.slow),
        pytest.param("sigmoid", "float64", marks=pytest.mark.slow),
        pytest.param("ipo", "float64", marks=pytest.mark.slow),
    ],
)
def test_packing_and_microbatches_change_nothing(kind, dtype):
    config = dataclasses.replace(CONFIGS[kind, 0.0], sft_weight=0.3)
    check_layouts(config, GROUPS, 2, dtype, every=dtype == "float64")


@pytest.mark.slow
def test_meshes_change_nothing():
    check_meshes(PreferenceConfig(reference="stored", beta=BETA), random_groups(8, 2), 2)


@pytest.mark.parametrize("layers, scan, bits", [(1, False, 0), pytest.param(3, True, 8, marks=pytest.mark.slow)])
def test_at_loras_start_dpo_is_log_2_and_the_kl_0_to_the_bit(layers, scan, bits):
    model, config = make_model(tiny_llama(layers=layers, scan=scan)), AdapterConfig(kind="lora", rank=3, base_bits=bits)
    params = frozen_base(model, random_params(model), config)
    adapter = jax.jit(lambda key: add_adapter(model, params, config, key))(jax.random.key(1))
    batch = packed([GROUPS[:2], GROUPS[2:]], 64, 2)
    loss = PreferenceConfig(beta=BETA).make(model, None)

    def run(adapter):
        total, metrics = loss(adapted(params, adapter), batch, None)
        return total.sum, metrics

    (_, metrics), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(adapter)
    log_2 = np.float32(np.log(2))
    assert metrics["loss"] == (4 * log_2, 4)
    assert metrics["reference_kl"] == (0, 4)
    assert metrics["margin"] == (0, 4)
    norms = [float(jnp.linalg.norm(x)) for x in jax.tree.leaves(gradient)]
    assert max(norms) > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, r"objective\.beta=0\.0 should be more than 0"),
        ({"label_smoothing": 0.5}, r"objective\.label_smoothing=0\.5 should be from 0 to below 0\.5"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "is of sigmoid and robust"),
        ({"sft_weight": -1.0}, r"objective\.sft_weight=-1\.0 should be 0 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PreferenceConfig(**settings)


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'sigmoid'"):
        preference_loss(*jnp.zeros((4, 1)), beta=0.1, kind="sigmoidal")


def test_rankings_are_no_pairs():
    batch = packed([random_groups(1, 3)], 48, 3)
    with pytest.raises(UserError, match=r"compares two responses, and the groups of this data have 3"):
        PreferenceConfig().make(hidden_model(), None)(hidden_params(batch), batch, None)
