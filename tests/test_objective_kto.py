"""KTO over batches: the loss and the baseline by their formulas, the same baseline for all microbatches."""

import jax
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.model.adapters import AdapterConfig, adapted, add_adapter
from llmlab.model.transformer import make_model
from llmlab.objective.kto import KtoConfig, shared_baseline
from tests.groups import (
    check_layouts,
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

BETA, WEIGHTS = 0.3, (1.5, 0.5)
GROUPS = random_groups(6, 1)
ROWS = [GROUPS[:4], [], GROUPS[4:]]
GOOD = np.array([group[0].value for group in GROUPS]) == 1
REFERENCES = np.array([group[0].reference for group in GROUPS])
TOKENS = np.array([group[0].said.sum() for group in GROUPS])
BATCH = packed(ROWS, 32, 1, groups_a_row=5)


def config_of(baseline="batch"):
    return KtoConfig(beta=BETA, good_weight=WEIGHTS[0], bad_weight=WEIGHTS[1], baseline=baseline, reference="stored")


def sigma(x):
    return 1 / (1 + np.exp(-x))


def losses_of(ratios, baseline):
    good, bad = 1 - sigma(BETA * (ratios - baseline)), 1 - sigma(BETA * (baseline - ratios))
    return np.where(GOOD, WEIGHTS[0] * good, WEIGHTS[1] * bad)


def baseline_of(ratios):
    return max(0, (ratios[GOOD].mean() + ratios[~GOOD].mean()) / 2)


PARAMS = hidden_params(BATCH)
LOGPS = numpy_logps(PARAMS, GROUPS, ROWS)[:, 0]
BASELINE = baseline_of(LOGPS - REFERENCES)


@pytest.mark.parametrize("baseline", ["batch", "zero"])
def test_a_batch_is_the_sum_of_its_responses_whatever_lies_in_the_padding(baseline):
    z = BASELINE if baseline == "batch" else 0
    assert BASELINE > 0.1
    expected = losses_of(LOGPS - REFERENCES, z).sum()
    slope = slopes(lambda p: losses_of(p["logps"] - REFERENCES, z).sum(), {"logps": LOGPS})["logps"]
    expected_gradient = numpy_through_logps(PARAMS, GROUPS, ROWS, slope[:, None])
    loss = config_of(baseline).make(hidden_model(), None)
    for dtype, tolerance in (("float64", 1e-8), ("float32", 2e-6)):
        with jax.enable_x64(dtype == "float64"):
            value, gradient = value_and_gradient(loss, PARAMS, BATCH, dtype)
        assert value == pytest.approx(expected, rel=tolerance)
        for name, of_leaf in expected_gradient.items():
            assert relative(gradient[name], of_leaf) < tolerance, name


def test_the_metrics_are_of_good_and_bad():
    ratios, z = LOGPS - REFERENCES, BASELINE
    with jax.enable_x64(True):
        total, metrics = jax.jit(config_of().make(hidden_model(), None))(PARAMS, BATCH, None)
    expected = {
        "loss": losses_of(ratios, z).mean(),
        "accuracy": np.where(GOOD, ratios > z, ratios < z).mean(),
        "baseline": z,
        "reference_kl": ratios.mean(),
    }
    for name, of in (("chosen", GOOD), ("rejected", ~GOOD)):
        expected |= {
            f"{name}_reward": BETA * ratios[of].mean(),
            f"{name}_logp": LOGPS[of].mean(),
            f"{name}_logp_per_token": LOGPS[of].sum() / TOKENS[of].sum(),
            f"{name}_tokens": TOKENS[of].mean(),
        }
    assert {name: mean.value() for name, mean in metrics.items()} == pytest.approx(expected, rel=1e-6)
    assert float(total.weight) == len(GROUPS)


@pytest.mark.parametrize(
    "values, ratios, expected",
    [
        ([1, 1, 1, 0], [3.0, 5.0, 4.0, -2.0], 1.0),  # as much weight for the one bad as for the three good
        ([1, 0, 0, 0], [1.0, -5.0, -4.0, -6.0], 0.0),
        ([1, 1, 1, 1], [3.0, 5.0, 4.0, 4.0], 2.0),
    ],
)
def test_the_baseline_is_halfway_between_good_and_bad_and_never_below_zero(values, ratios, expected):
    present_BPR = np.ones((2, 3, 1), np.float32)
    present_BPR[:, 2] = 0
    filled = np.full((2, 3, 1), np.nan, np.float32)
    value_BPR, ratio_BPR = filled.copy(), filled.copy()
    value_BPR[:, :2, 0], ratio_BPR[:, :2, 0] = np.reshape(values, (2, 2)), np.reshape(ratios, (2, 2))
    batch = BATCH._replace(present_BPR=present_BPR, value_BPR=value_BPR)
    np.testing.assert_array_equal(jax.jit(shared_baseline)(ratio_BPR, batch), [expected, expected])


@pytest.mark.slow
@pytest.mark.parametrize("baseline, dtype", [("batch", "float32"), ("batch", "float64"), ("zero", "float64")])
def test_packing_and_microbatches_change_nothing(baseline, dtype):
    check_layouts(config_of(baseline), GROUPS, 1, dtype, every=dtype == "float64")


def test_microbatches_need_the_baseline_of_the_whole():
    """Else the test above would show nothing: by its own baseline a part gives another loss."""
    config, model = config_of(), hidden_model()
    loss = jax.jit(config.make(model, None))

    def summed(batch):
        total = 0.0
        for row in (0, 2):
            part = jax.tree.map(lambda x, row=row: x[row : row + 1], (PARAMS["hidden_BTD"], batch))
            total += float(loss(PARAMS | {"hidden_BTD": part[0]}, part[1], None)[0].sum)
        return total

    whole = float(loss(PARAMS, BATCH, None)[0].sum)
    filled = jax.jit(config.before(model))(PARAMS, BATCH, None)
    assert summed(filled) == pytest.approx(whole, rel=1e-5)
    assert abs(summed(BATCH) - whole) > 1e-3 * whole
    assert config_of("zero").before(model) is None


def test_at_loras_start_every_response_is_on_the_baseline_to_the_bit():
    model, config = make_model(tiny_llama(layers=1)), AdapterConfig(kind="lora", rank=3)
    params = random_params(model)

    def run(key):
        over = adapted(params, add_adapter(model, params, config, key))
        return KtoConfig().make(model, None)(over, BATCH, None)[1]

    metrics = jax.jit(run)(jax.random.key(1))
    assert metrics["loss"] == (len(GROUPS) / 2, len(GROUPS))
    assert metrics["reference_kl"] == metrics["baseline"] == (0, len(GROUPS))


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"good_weight": -1.0}, {"bad_weight": -1.0}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match=rf"objective\.{next(iter(settings))}="):
        KtoConfig(**settings)
