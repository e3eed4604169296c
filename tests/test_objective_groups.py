"""Sums over responses against loops over literal segments, with NaN and infinity wherever no response is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.data.pipeline import GroupBatch
from llmlab.objective.groups import at_last_token, mean_where, response_counts, response_sums, where_present

# Two groups of two, the second response of the second group absent; and a row of padding with a response at its end.
SEGMENTS_BT = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 4, 4, 4]], np.int32)
MASK_BT = np.array([[0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 1]], np.float32)
PRESENT_BPR = np.array([[[1, 1], [1, 0]], [[0, 0], [0, 1]]], np.float32)
X_BT = np.array([[1, 2, 4, 8, 16, 32, np.nan, np.inf], [np.nan, -np.inf, 3, 5, 7, 64, 128, 256]])
SUMS_BPR = np.array([[[6, 8], [32, 0]], [[0, 0], [0, 256]]])
COUNTS_BPR = np.array([[[2, 1], [1, 0]], [[0, 0], [0, 1]]])
LAST_BPR = np.array([[[4, 8], [32, 0]], [[0, 0], [0, 256]]])
# Which tokens a sum of the above, times 1, 2, 3, 4 in each row, goes over, and how often.
SUMS_SLOPE_BT = np.array([[0, 1, 1, 2, 0, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0, 4]])
LAST_SLOPE_BT = np.array([[0, 0, 1, 2, 0, 3, 0, 0], [0, 0, 0, 0, 0, 0, 0, 4]])


def batch_of(segments_BT, mask_BT, present_BPR):
    zeros_BT, zeros_BPR = jnp.zeros(segments_BT.shape, jnp.int32), jnp.zeros(present_BPR.shape)
    return GroupBatch(zeros_BT, zeros_BT, mask_BT, zeros_BT, segments_BT, zeros_BT, present_BPR, zeros_BPR, zeros_BPR)


BATCH = batch_of(SEGMENTS_BT, MASK_BT, PRESENT_BPR)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "reduce, expected, slope",
    [(response_sums, SUMS_BPR, SUMS_SLOPE_BT), (at_last_token, LAST_BPR, LAST_SLOPE_BT)],
    ids=["sums", "last"],
)
def test_what_lies_in_padding_is_not_looked_at(reduce, expected, slope, dtype):
    with jax.enable_x64(dtype == "float64"):
        x_BT = jnp.asarray(X_BT, dtype)
        weight_BPR = np.broadcast_to(np.arange(1, 5).reshape(1, 2, 2), expected.shape)
        found, gradient = jax.jit(
            lambda x_BT: (reduce(x_BT, BATCH), jax.grad(lambda x: jnp.sum(reduce(x, BATCH) * weight_BPR))(x_BT))
        )(x_BT)
    assert found.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gradient, slope)


def test_counts_are_of_what_is_said():
    np.testing.assert_array_equal(jax.jit(response_counts)(BATCH), COUNTS_BPR)


def test_bfloat16_is_summed_in_float32():
    x_BT = jnp.full((1, 1024), 1.0, jnp.bfloat16)
    batch = batch_of(np.ones((1, 1024), np.int32), np.ones((1, 1024), np.float32), np.ones((1, 1, 1), np.float32))
    assert float(response_sums(x_BT + jnp.bfloat16(1 / 64), batch)[0, 0, 0]) == 1024 * (1 + 1 / 64)


def test_means_are_of_the_places_named():
    x_BPR = jnp.where(PRESENT_BPR > 0, SUMS_BPR, jnp.nan)
    mean = mean_where(x_BPR, PRESENT_BPR > 0)
    assert (float(mean.sum), float(mean.weight)) == (6 + 8 + 32 + 256, 4)
    np.testing.assert_array_equal(where_present(x_BPR, BATCH), SUMS_BPR)
