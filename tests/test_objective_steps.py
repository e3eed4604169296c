"""Process rewards: the loss of the steps that marks end, by its formula, whatever lies elsewhere."""

import jax
import numpy as np
import pytest

from llmlab.objective.steps import StepsConfig
from tests.groups import (
    check_layouts,
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

GROUPS = random_groups(5, 1)
ROWS = [GROUPS[:2], [], GROUPS[2:]]
BATCH = packed(ROWS, 32, 1, groups_a_row=4)


PARAMS = hidden_params(BATCH)
STEPS = [
    (place.row, place.begin + t, mark)
    for (answer,), (place,) in zip(GROUPS, places(ROWS), strict=True)
    for t, mark in enumerate(answer.marks)
    if mark >= 2
]
SPOTS, LABELS = [(row, t) for row, t, _ in STEPS], np.array([(mark - 2) / 253 for _, _, mark in STEPS])
SCORES = numpy_scores(PARAMS, SPOTS)


def truth(scores):
    p = 1 / (1 + np.exp(-scores))
    return -(LABELS * np.log(p) + (1 - LABELS) * np.log(1 - p)).sum()


def test_a_batch_is_the_sum_of_its_steps_whatever_lies_elsewhere():
    slope = slopes(lambda p: truth(p["scores"]), {"scores": SCORES})["scores"]
    expected_gradient = numpy_through_scores(PARAMS, SPOTS, slope)
    loss = StepsConfig().make(hidden_model(), None)
    for dtype, tolerance in (("float64", 1e-8), ("float32", 2e-6)):
        with jax.enable_x64(dtype == "float64"):
            value, gradient = value_and_gradient(loss, PARAMS, BATCH, dtype)
        assert value == pytest.approx(truth(SCORES), rel=tolerance)
        for name, of_leaf in expected_gradient.items():
            assert relative(gradient[name], of_leaf) < tolerance, name


def test_the_metrics_are_of_the_steps():
    with jax.enable_x64(True):
        total, metrics = jax.jit(StepsConfig().make(hidden_model(), None))(PARAMS, BATCH, None)
    expected = {
        "loss": truth(SCORES) / len(STEPS),
        "accuracy": ((SCORES > 0) == (LABELS > 0.5)).mean(),
        "brier": ((1 / (1 + np.exp(-SCORES)) - LABELS) ** 2).mean(),
        "chosen_reward": SCORES[LABELS > 0.5].mean(),
        "rejected_reward": SCORES[LABELS <= 0.5].mean(),
    }
    assert {name: mean.value() for name, mean in metrics.items()} == pytest.approx(expected, rel=1e-6)
    assert float(total.weight) == len(STEPS) > 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packing_and_microbatches_change_nothing(dtype):
    check_layouts(StepsConfig(), GROUPS, 1, dtype, every=dtype == "float64", head="score")
