"""What is computed from pages where they lie, against numpy on what is in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.model.pages import Pool, score_pages, sum_pages


def pool_of(rng, size, width, *, int8):
    """Seven pages of three heads, and the same as numpy has it, [pages, K, size, H]."""
    values = rng.standard_normal((7, 3, size, width))
    if not int8:
        return Pool(jnp.asarray(values)), values
    values, scales = rng.integers(-127, 128, values.shape), rng.uniform(0.01, 0.1, values.shape[:3])
    return Pool(jnp.asarray(values, jnp.int8), jnp.asarray(scales)), values * scales[..., None]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("size", "width"), [(16, 64), (4, 48), (1, 6)])
def test_scores_and_sums_of_pages_where_they_lie(size, width, int8):
    rng = np.random.default_rng(0)
    page_C, held_C = np.array([4, 0, 4, 6, 1]), rng.integers(0, size + 1, 5)
    is_held_CS = np.arange(size)[None] < held_C[:, None]
    q_CKH, weights_CKS = rng.standard_normal((5, 3, width)), rng.random((5, 3, size)) * is_held_CS[:, None]
    with jax.enable_x64(True):
        pool, kept = pool_of(rng, size, width, int8=int8)
        scores_CKS = score_pages(pool, jnp.asarray(q_CKH), jnp.asarray(page_C))
        sum_CKH = sum_pages(pool, jnp.asarray(weights_CKS), jnp.asarray(is_held_CS), jnp.asarray(page_C))
    np.testing.assert_allclose(scores_CKS, np.einsum("CKH,CKSH->CKS", q_CKH, kept[page_C]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sum_CKH, np.einsum("CKS,CKSH->CKH", weights_CKS, kept[page_C]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("int8", [False, True])
def test_what_is_not_held_may_be_no_number(int8):
    rng = np.random.default_rng(0)
    pool, kept = pool_of(rng, 4, 8, int8=int8)
    nan = {"scales": pool.scales.at[2, :, 3].set(np.nan)} if int8 else {"values": pool.values.at[2, :, 3].set(np.nan)}
    is_held_CS, weights_CKS = np.array([[True, True, True, False]]), np.array([[[1.0, 2, 3, 0]] * 3])
    sum_CKH = sum_pages(pool._replace(**nan), jnp.asarray(weights_CKS), jnp.asarray(is_held_CS), jnp.array([2]))
    np.testing.assert_allclose(sum_CKH, np.einsum("CKS,CKSH->CKH", weights_CKS, kept[[2]]), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_multiplied_and_added_up_in_float32():
    pool = Pool(jnp.full((1, 1, 16, 64), 1 + 1 / 128, jnp.bfloat16))
    ones_C1H, ones_C1S, page_C = jnp.ones((1, 1, 64)), jnp.ones((1, 1, 16)), jnp.zeros(1, jnp.int32)
    np.testing.assert_array_equal(score_pages(pool, ones_C1H, page_C), 64.5)
    np.testing.assert_array_equal(sum_pages(pool, ones_C1S, jnp.ones((1, 16), bool), page_C), 16.125)
