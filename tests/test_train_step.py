"""One step: accumulation, skipping, clipping, averaging; each against the plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmlab.core.arrays import Mean, global_norm
from llmlab.model.transformer import make_model
from llmlab.objective import NextTokenConfig
from llmlab.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from llmlab.train.state import start
from llmlab.train.step import accumulated_gradients, make_step
from tests.helpers import VOCAB, assert_close, packed_batch, random_params, tiny_llama

W = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)


def quadratic(params, batch, key):
    """Σ mask·|w x - y|² over Σ mask: a loss whose gradient is written down below."""
    error_BD = batch["x_BD"] @ params["w_DD"].T - batch["y_BD"]
    per_row_B = jnp.sum(jnp.square(error_BD), axis=1) * batch["mask_B"]
    total = Mean(jnp.sum(per_row_B), jnp.sum(batch["mask_B"]))
    return total, {"loss": total}


def rows(seed=0, size=8, bad=False):
    rng = np.random.default_rng(seed)
    x_BD, y_BD = rng.standard_normal((2, size, 2)).astype(np.float32)
    mask_B = np.array([1, 0, 1, 1, 0, 1, 1, 0][:size], np.float32)
    return {"x_BD": np.where(bad, np.nan, x_BD).astype(np.float32), "y_BD": y_BD, "mask_B": mask_B}


def stepper(**overrides):
    config = OptimizerConfig(**{**dict(warmup=0, schedule="constant", clip=0.0, learning_rate=0.1), **overrides})
    optimizer = optax.sgd(0.1)
    state = start({"w_DD": jnp.asarray(W)}, optimizer, window=config.skip_window, ema=bool(config.ema))
    return state, jax.jit(make_step(quadratic, optimizer, lambda _: 0.1, config, seed=0))


def test_a_step_is_sgd_on_the_masked_mean():
    state, step = stepper()
    batch = rows()
    x, y, mask = (np.asarray(batch[k], np.float64) for k in ("x_BD", "y_BD", "mask_B"))
    gradient = 2 * ((x @ W.T - y) * mask[:, None]).T @ x / mask.sum()
    after, metrics = step(state, batch)
    np.testing.assert_allclose(after.trainable["w_DD"], W - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"].value(), np.linalg.norm(gradient), rtol=1e-5)
    assert metrics["tokens"].value() == mask.sum()
    assert int(after.step) == 1


def test_clipping_scales_to_the_norm():
    state, step = stepper(clip=0.5)
    after, _ = step(state, rows())
    moved = (np.asarray(state.trainable["w_DD"]) - np.asarray(after.trainable["w_DD"])) / 0.1
    np.testing.assert_allclose(np.linalg.norm(moved), 0.5, rtol=1e-5)


def test_ema_follows_by_its_decay():
    state, step = stepper(ema=0.75)
    after, _ = step(state, rows())
    np.testing.assert_allclose(after.ema["w_DD"], 0.75 * W + 0.25 * np.asarray(after.trainable["w_DD"]), rtol=1e-6)


def test_a_step_that_is_not_finite_changes_only_its_count():
    state, step = stepper(ema=0.5)
    once, _ = step(state, rows())
    after, metrics = step(once, rows(bad=True))
    np.testing.assert_array_equal(after.trainable["w_DD"], once.trainable["w_DD"])
    np.testing.assert_array_equal(after.ema["w_DD"], once.ema["w_DD"])
    assert (int(after.step), int(after.guard.skipped), int(after.guard.skipped_in_a_row)) == (2, 1, 1)
    assert np.isnan(metrics["loss"].value())
    again, _ = step(after, rows(seed=1))
    assert (int(again.guard.skipped), int(again.guard.skipped_in_a_row)) == (1, 0)


@pytest.mark.parametrize("sigma, skipped", [(0.0, 0), (6.0, 1)])
def test_an_outlier_is_skipped_once_the_window_is_full(sigma, skipped):
    state, step = stepper(skip_sigma=sigma, skip_window=4)
    far = rows() | {"y_BD": np.full((8, 2), 1e3, np.float32)}
    for seed in range(4):
        state, _ = step(state, rows(seed))
    assert int(state.guard.skipped) == 0
    after, _ = step(state, far)
    assert int(after.guard.skipped) == skipped


@pytest.mark.parametrize(
    "dtype, tolerance", [pytest.param("float32", 1e-5, marks=pytest.mark.slow), ("float64", 1e-10)]
)
def test_microbatches_give_the_gradient_of_the_whole_batch(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model = make_model(tiny_llama(dtype=dtype, param_dtype=dtype))
        params = random_params(model)
        loss = NextTokenConfig(z_loss=1e-3).make(model, np.ones(VOCAB, np.int32))
        batch = packed_batch(rows=8, length=12)
        found = {}
        for parts in (1, 8):
            run = jax.jit(lambda p, b, parts=parts: accumulated_gradients(loss, p, {}, b, jax.random.key(0), parts))
            found[parts] = run(params, batch)
        assert_close(found[8], found[1], tolerance)


def test_an_unmasked_target_counts_the_same_in_any_microbatch():
    """transformers#35438: dividing part by part would weigh rows with few targets more."""
    batch = rows() | {"mask_B": np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32)}
    whole = accumulated_gradients(quadratic, {"w_DD": jnp.asarray(W)}, {}, batch, jax.random.key(0), 1)[2]
    parts = accumulated_gradients(quadratic, {"w_DD": jnp.asarray(W)}, {}, batch, jax.random.key(0), 4)[2]
    np.testing.assert_allclose(parts["w_DD"], whole["w_DD"], rtol=1e-5)


def test_golden_steps():
    """Three AdamW steps of a tiny model. If a change of the arithmetic was meant, put the printed losses here."""
    model = make_model(tiny_llama())
    config = OptimizerConfig(learning_rate=1e-2, warmup=1, schedule="constant")
    optimizer = make_optimizer(config, 3, model.axes)
    state = start(random_params(model, scale=0.2), optimizer, window=4, ema=False)
    loss = NextTokenConfig().make(model, np.ones(VOCAB, np.int32))
    step = jax.jit(make_step(loss, optimizer, make_schedule(config, 3), config, seed=0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, packed_batch())
        losses.append(metrics["loss"].value())
    np.testing.assert_allclose(losses, GOLDEN, rtol=1e-5, err_msg=f"the losses are now {losses}")


GOLDEN = [4.321272687214177, 4.043299729261941, 3.6848546470083843]


def test_global_norm_is_that_of_all_leaves():
    tree = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[4.0]], jnp.bfloat16)}
    assert float(global_norm(tree)) == 5.0
