"""Losses over scores against their formulas in numpy, value and gradient; over batches, whatever the packing is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.objective.reward import RewardConfig, bradley_terry, centring, plackett_luce, step_loss
from tests.groups import (
    check_layouts,
    check_meshes,
    hidden_model,
    hidden_params,
    numpy_scores,
    numpy_through_scores,
    packed,
    places,
    random_groups,
    slopes,
    value_and_gradient,
)
from tests.helpers import relative

DTYPES = [("float32", 1e-6), ("float64", 1e-9)]


def sigma(x):
    return 1 / (1 + np.exp(-x))


def ranking_loss(scores, margins):
    """Of one ranking, best first, by drawing one after the other."""
    odds = np.exp(scores)
    chosen = np.exp(scores - margins)
    return -sum(np.log(chosen[i] / (chosen[i] + odds[i + 1 :].sum())) for i in range(len(scores)))


def compare(loss, truth, arrays, dtype, tolerance):
    """Value and gradient of a loss of arrays, against the formula's."""
    arrays = {name: np.float64(np.float32(x)) for name, x in arrays.items()}
    with jax.enable_x64(dtype == "float64"):
        given = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        loss_ = jax.jit(lambda given: loss(**given))(given)
        found = jax.jit(jax.grad(lambda given: jnp.sum(loss(**given))))(given)
    assert loss_.dtype == dtype
    assert relative(loss_, truth(**arrays)) < tolerance
    for name, expected in slopes(lambda given: truth(**given).sum(), arrays).items():
        assert relative(found[name], expected) < tolerance, name


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_bradley_terry_is_its_formula(dtype, tolerance):
    rng = np.random.default_rng(0)
    chosen, rejected, margin = rng.standard_normal((3, 9))
    compare(
        lambda chosen, rejected: bradley_terry(chosen, rejected),
        lambda chosen, rejected: -np.log(sigma(chosen - rejected)),
        {"chosen": chosen, "rejected": rejected},
        dtype,
        tolerance,
    )
    compare(
        lambda chosen, rejected, margin: bradley_terry(chosen, rejected, margin),
        lambda chosen, rejected, margin: -np.log(sigma(chosen - rejected - margin)),
        {"chosen": chosen, "rejected": rejected, "margin": margin},
        dtype,
        tolerance,
    )


COUNTS = (4, 2, 1, 3, 0)
PRESENT_PR = np.array([[r < count for r in range(4)] for count in COUNTS], np.float32)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_plackett_luce_is_its_formula_whatever_the_absent_score(dtype, tolerance):
    rng = np.random.default_rng(0)
    score_PR, margin_PR = rng.standard_normal((2, len(COUNTS), 4))

    def truth(score_PR, margin_PR):
        rankings = zip(COUNTS, score_PR, margin_PR, strict=True)
        return np.array([ranking_loss(scores[:count], margins[:count]) for count, scores, margins in rankings])

    def loss(score_PR, margin_PR):
        absent = jnp.where(PRESENT_PR > 0, 0, jnp.nan).astype(score_PR.dtype)
        return plackett_luce(score_PR + absent, PRESENT_PR, margin_PR + absent)

    given = {"score_PR": score_PR, "margin_PR": margin_PR}
    compare(loss, truth, given, dtype, tolerance)
    assert np.allclose(jax.jit(plackett_luce)(score_PR, PRESENT_PR), truth(score_PR, 0 * margin_PR), rtol=1e-5)


def test_a_ranking_of_two_is_a_pair():
    score_P2 = np.random.default_rng(0).standard_normal((7, 2)).astype(np.float32)
    margin_P2 = np.stack([np.linspace(0, 1, 7), np.zeros(7)], axis=-1).astype(np.float32)
    both = jax.jit(plackett_luce)(score_P2, np.ones((7, 2)), margin_P2)
    np.testing.assert_allclose(both, bradley_terry(score_P2[:, 0], score_P2[:, 1], margin_P2[:, 0]), rtol=1e-6)


def test_scores_far_apart_stay_finite():
    score_PR = jnp.asarray([[1e4, -1e4, 3.0], [-1e4, 1e4, 0.0]])
    run = jax.jit(jax.value_and_grad(lambda s: jnp.sum(plackett_luce(s, jnp.ones((2, 3))))))
    value, gradient = run(score_PR)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_centring_of_two_is_the_square_of_their_sum(dtype, tolerance):
    score_PR = np.random.default_rng(0).standard_normal((5, 2))
    compare(
        lambda score_PR: centring(score_PR, np.ones((5, 2))),
        lambda score_PR: score_PR.sum(-1) ** 2,
        {"score_PR": score_PR},
        dtype,
        tolerance,
    )
    found = centring(jnp.asarray([[1.0, 2.0, 6.0, jnp.nan]]), jnp.asarray([[1, 1, 1, 0]]))
    assert float(found[0]) == 36


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_a_step_is_cross_entropy_with_soft_labels(dtype, tolerance):
    label_B = np.array([0, 0.25, 0.5, 1, 1])
    compare(
        lambda score_B: step_loss(score_B, label_B.astype(dtype)),
        lambda score_B: -(label_B * np.log(sigma(score_B)) + (1 - label_B) * np.log(1 - sigma(score_B))),
        {"score_B": np.random.default_rng(0).standard_normal(5)},
        dtype,
        tolerance,
    )


GROUPS = random_groups(5, 4, fewest=1, seed=3)
ROWS = [GROUPS[:2], [], GROUPS[2:]]
BATCH = packed(ROWS, 48, 4, groups_a_row=4)
PARAMS = hidden_params(BATCH)
SPOTS = [(place.row, place.end - 1) for spots in places(ROWS) for place in spots]
SCORES = numpy_scores(PARAMS, SPOTS)
VALUES = np.array([answer.value for group in GROUPS for answer in group])
ENDS = np.cumsum([len(group) for group in GROUPS])[:-1]


def by_group(numbers):
    """Of every group of two or more, its part of what there is for every response."""
    return [part for part in np.split(numbers, ENDS) if len(part) > 1]


@pytest.mark.parametrize("margin, weight", [(True, 0.0), (False, 0.3)])
def test_a_batch_of_rankings_is_their_sum_whatever_lies_in_the_padding(margin, weight):
    assert {len(group) for group in GROUPS} >= {1, 2, 3}

    def truth(scores, weight=weight):
        rankings = zip(by_group(scores), by_group(VALUES * margin), strict=True)
        return sum(ranking_loss(s, m) + weight * (2 * s.mean()) ** 2 for s, m in rankings)

    slope = slopes(lambda p: truth(p["scores"]), {"scores": SCORES})["scores"]
    expected_gradient = numpy_through_scores(PARAMS, SPOTS, slope)
    loss = RewardConfig(margin=margin, centring=weight).make(hidden_model(), None)
    for dtype, tolerance in (("float64", 1e-8), ("float32", 2e-6)):
        with jax.enable_x64(dtype == "float64"):
            value, gradient = value_and_gradient(loss, PARAMS, BATCH, dtype)
        assert value == pytest.approx(truth(SCORES), rel=tolerance)
        for name, of_leaf in expected_gradient.items():
            assert relative(gradient[name], of_leaf) < tolerance, name
    total, metrics = jax.jit(loss)(PARAMS, BATCH, jax.random.key(0))
    assert float(total.weight) == len(by_group(SCORES))
    assert float(metrics["loss"].sum) == pytest.approx(truth(SCORES, weight=0), rel=1e-5)


def test_the_metrics_are_of_all_pairs_in_a_group():
    scores = by_group(SCORES)
    differences = np.array([a - b for of_group in scores for a, b in itertools.combinations(of_group, 2)])
    p = sigma(differences)
    confidence = np.maximum(p, 1 - p)
    expected = {
        "accuracy": (differences > 0).mean(),
        "margin": differences.mean(),
        "brier": ((1 - p) ** 2).mean(),
        "confidence": confidence.mean(),
        "chosen_reward": np.mean([of_group[0] for of_group in scores]),
        "rejected_reward": np.concatenate([of_group[1:] for of_group in scores]).mean(),
    }
    for low in range(50, 100, 10):
        within = (confidence >= low / 100) & (confidence < (low + 10) / 100)
        if within.any():
            expected[f"calibration/accuracy_{low}"] = (differences > 0)[within].mean()
            expected[f"calibration/confidence_{low}"] = confidence[within].mean()
    with jax.enable_x64(True):
        metrics = jax.jit(RewardConfig().make(hidden_model(), None))(PARAMS, BATCH, None)[1]
    counted = {name: mean.value() for name, mean in metrics.items() if mean.weight}
    assert counted.pop("loss") > 0
    assert counted == pytest.approx(expected)
    bins = [float(mean.weight) for name, mean in metrics.items() if name.startswith("calibration/accuracy")]
    assert sum(bins) == len(differences)
    assert sum(weight > 0 for weight in bins) > 2


def test_calibration_is_for_evaluation():
    metrics = jax.eval_shape(RewardConfig().make(hidden_model(), None), PARAMS, BATCH, jax.random.key(0))[1]
    assert not any(name.startswith("calibration/") for name in metrics)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packing_and_microbatches_change_nothing(dtype):
    check_layouts(RewardConfig(centring=0.1), GROUPS, 4, dtype, every=dtype == "float64", head="score")


@pytest.mark.slow
def test_meshes_change_nothing():
    check_meshes(RewardConfig(centring=0.1), random_groups(8, 3), 3, head="score")


def test_a_negative_centring_is_refused():
    with pytest.raises(UserError, match=r"objective\.centring=-1\.0 should be 0 \(off\) or more"):
        RewardConfig(centring=-1.0)
