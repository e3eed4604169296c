"""Every version of the state-space recurrence, and the causal convolution, against loops in float64 numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.kernels.ssm import causal_conv, choose, ssm, ssm_step
from tests.helpers import relative

jitted = jax.jit(ssm, static_argnames=("chunk", "implementation"))
convolve = jax.jit(causal_conv)
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
NAMES = ("x", "dt", "a", "b", "c", "state")


def numpy_ssm(x, dt, a, b, c, state, ids, dy, dstate):
    """One row and head at a time: y, the last state, and the gradients of sum(y·dy) + sum(state·dstate)."""
    (B, T, N, _), G = x.shape, x.shape[2] // b.shape[2]
    y, last, grads = np.zeros(x.shape), np.zeros(state.shape), [np.zeros(v.shape) for v in (x, dt, a, b, c, state)]
    gx, gdt, ga, gb, gc, gstate = grads
    for row, n in np.ndindex(B, N):
        h, before, steps, k = state[row, n], 0, [], n // G
        for t in range(T):
            begins = bool(ids[row, t] and before and ids[row, t] != before)
            step = dt[row, t, n] if ids[row, t] else 0.0
            decay = 0.0 if begins else np.exp(step * a[n])
            steps.append((h, step, decay))
            h = decay * h + step * np.outer(x[row, t, n], b[row, t, k])
            y[row, t, n] = h @ c[row, t, k]
            before = ids[row, t] or before
        last[row, n] = h
        dh = dstate[row, n].copy()
        for t in reversed(range(T)):
            h_before, step, decay = steps[t]
            h = decay * h_before + step * np.outer(x[row, t, n], b[row, t, k])
            dh += np.outer(dy[row, t, n], c[row, t, k])
            gc[row, t, k] += dy[row, t, n] @ h
            gx[row, t, n] = step * (dh @ b[row, t, k])
            gb[row, t, k] += step * (x[row, t, n] @ dh)
            ddecay = np.sum(dh * h_before) * decay
            ga[n] += ddecay * step
            gdt[row, t, n] = (x[row, t, n] @ dh @ b[row, t, k] + ddecay * a[n]) if ids[row, t] else 0.0
            dh = dh * decay
        gstate[row, n] = dh
    return y, last, grads


def segments(kind, B, T):
    """Whole rows; two or three documents and padding; documents with padding between them, even within one."""
    ids = np.ones((B, T), np.int32)
    if kind != "whole":
        for row in range(B):
            ids[row, T // 3 + row :] = 2
            ids[row, T // 2 + 2 * row :] = 3
            ids[row, T - row :] = 0
    if kind == "gaps":
        ids[:, T // 4 : T // 4 + 2], ids[:, T // 3 + 1], ids[:, 0] = 0, 0, 0
    return ids


def make(T=29, N=4, K=2, H=5, Z=3, B=2, kind="packed", seed=0, steps=None, dtype="float32"):
    """Random arguments rounded to `dtype` (so that the reference sees the same), and cotangents that skip padding."""
    rng = np.random.default_rng(seed)
    draw = {"x": (B, T, N, H), "b": (B, T, K, Z), "c": (B, T, K, Z), "state": (B, N, H, Z)}
    arrays = {name: rng.standard_normal(shape) for name, shape in draw.items()}
    arrays["dt"] = np.exp(rng.standard_normal((B, T, N)) - 1) if steps is None else steps(rng, (B, T, N))
    arrays["a"] = -np.exp(rng.standard_normal(N))
    ids = segments(kind, B, T)
    dy = rng.standard_normal((B, T, N, H)) * (ids > 0)[..., None, None]
    arguments = [arrays[name].astype(dtype) for name in NAMES]
    return arguments, ids, dy.astype(dtype), rng.standard_normal((B, N, H, Z)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("chunk", "implementation"))
def outputs_and_gradients(arguments, ids, dy, dstate, **options):
    def weighted(arguments):
        *five, state = arguments
        y, last = ssm(*five, segment_ids_BT=ids, state_BNHZ=state, **options)
        return jnp.sum(y * dy) + jnp.sum(last * dstate), (y, last)

    grads, (y, last) = jax.grad(weighted, has_aux=True)(arguments)
    return y, last, grads


def assert_right(case, tolerance, **options):
    arguments, ids, dy, dstate = case
    y, last, grads = outputs_and_gradients(arguments, ids, dy, dstate, **options)
    wide = [np.asarray(v, np.float64) for v in (*arguments, dy, dstate)]
    y_, last_, grads_ = numpy_ssm(*wide[:6], ids, *wide[6:])
    real = (ids > 0)[..., None, None]
    assert relative(y * real, y_ * real) <= tolerance
    assert relative(last, last_) <= tolerance
    for name, mine, theirs in zip(NAMES, grads, grads_, strict=True):
        assert np.isfinite(mine).all(), name
        assert relative(mine, theirs) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("implementation, chunk", [("reference", 8), ("chunked", 8)])
@pytest.mark.parametrize("kind", ["whole", "packed", "gaps"])
def test_values_and_gradients_are_numpys(implementation, chunk, kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        case = make(kind=kind, dtype=dtype)
        assert_right(case, TOLERANCE[dtype], implementation=implementation, chunk=chunk)


@pytest.mark.parametrize("T", [1, 7, 8, 9])
def test_any_length(T):
    assert_right(make(T=T, kind="whole"), 1e-4, implementation="chunked", chunk=8)


@pytest.mark.parametrize("N, K", [(3, 3), (4, 1)])
def test_groups_of_heads(N, K):
    assert_right(make(N=N, K=K), 1e-4, chunk=8)


def extreme(rng, shape):
    """Steps whose decays are one, nothing, and far below what a float can hold, in turns."""
    return 10.0 ** rng.uniform(-8, 5, shape) * (rng.random(shape) > 0.1)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_decays(implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        case = make(steps=extreme, dtype=dtype, T=40)
        assert_right(case, TOLERANCE[dtype], implementation=implementation, chunk=16)


def test_small_decays_after_large_ones_stay_exact():
    """Differences of plain cumulative sums in float32 would be wrong by 1e-4 here."""
    (x, dt, a, b, c, state), ids, dy, dstate = make(T=64, kind="whole")
    dt[:, :48], dt[:, 48:], x[:, :48], a[:] = 300.0, 1e-3, 0.0, -np.linspace(0.1, 0.4, len(a))
    y, last = jitted(x, dt, a, b, c, segment_ids_BT=ids, implementation="chunked", chunk=64)
    wide = [np.asarray(v, np.float64) for v in (x, dt, a, b, c, 0 * state, dy, dstate)]
    y_, last_, _ = numpy_ssm(*wide[:6], ids, *wide[6:])
    assert relative(y, y_) < 1e-6
    assert relative(last, last_) < 1e-6


def test_bfloat16_accumulates_in_float32():
    arguments, ids, dy, dstate = make(T=64, kind="packed")
    arguments = [jnp.asarray(v, jnp.bfloat16) for v in arguments]
    case = ([arguments[0], *(jnp.asarray(v, jnp.float32) for v in arguments[1:3]), *arguments[3:]], ids, dy, dstate)
    y, last, _ = outputs_and_gradients(*case, chunk=16, implementation="chunked")
    assert (y.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    wide = [np.asarray(v, np.float64) for v in (*case[0], dy, dstate)]
    y_, last_, _ = numpy_ssm(*wide[:6], ids, *wide[6:])
    real = (ids > 0)[..., None, None]
    assert relative(y * real, y_ * real) < 1e-2
    assert relative(last, last_) < 1e-2


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_packed_document_is_computed_as_if_alone(implementation):
    (x, dt, a, b, c, _), ids, _, _ = make(kind="packed")
    run = functools.partial(jitted, chunk=8, implementation=implementation)
    y, last = run(x, dt, a, b, c, segment_ids_BT=ids)
    for row in range(2):
        for segment in (1, 2, 3):
            where = np.flatnonzero(ids[row] == segment)
            alone, index = np.resize(where, ids.shape[1]), np.arange(ids.shape[1])
            parts = [v[row : row + 1, alone] for v in (x, dt, b, c)]
            only = (index < len(where)).astype(np.int32)[None]
            y_alone, last_alone = run(parts[0], parts[1], a, *parts[2:], segment_ids_BT=only)
            assert relative(y[row, where], y_alone[0, : len(where)]) < 1e-5
        assert relative(last[row], last_alone[0]) < 1e-5


@pytest.mark.parametrize("cut", [3, 12])
def test_a_row_read_in_two_parts(cut):
    """Cuts within the first and the second document."""
    (x, dt, a, b, c, state), ids, _, _ = make(kind="gaps")
    y, last = jitted(x, dt, a, b, c, segment_ids_BT=ids, state_BNHZ=state, chunk=8)
    parts, kept = [], state
    for begin, end in ((0, cut), (cut, x.shape[1])):
        x_, dt_, b_, c_, ids_ = (v[:, begin:end] for v in (x, dt, b, c, ids))
        y_part, kept = jitted(x_, dt_, a, b_, c_, segment_ids_BT=ids_, state_BNHZ=kept, chunk=8)
        parts.append(y_part)
    assert relative(jnp.concatenate(parts, axis=1), y) < 1e-5
    assert relative(kept, last) < 1e-5


def test_one_token_at_a_time():
    (x, dt, a, b, c, state), ids, _, _ = make(kind="whole", T=9)
    y, last = jitted(x, dt, a, b, c, segment_ids_BT=ids, state_BNHZ=state, chunk=4)
    assert choose(1) == "reference"
    assert choose(2) == "chunked"
    step, stepped, called = jax.jit(ssm_step), state, state
    for t in range(9):
        y_step, stepped = step(x[:, t], dt[:, t], a, b[:, t], c[:, t], stepped)
        x_, dt_, b_, c_, ids_ = (v[:, t : t + 1] for v in (x, dt, b, c, ids))
        y_call, called = jitted(x_, dt_, a, b_, c_, segment_ids_BT=ids_, state_BNHZ=called)
        assert relative(y_step, y[:, t]) < 1e-5
        assert relative(y_call[:, 0], y[:, t]) < 1e-5
    assert relative(stepped, last) < 1e-5
    assert relative(called, last) < 1e-5


def numpy_conv(x, w, bias, ids, state, dy):
    """y, and the gradients of sum(y·dy) for x, w, bias and the state, one tap at a time."""
    (B, T, _), W = x.shape, len(w)
    y, gx, gw, gbias, gstate = np.zeros(x.shape), np.zeros(x.shape), np.zeros(w.shape), dy.sum((0, 1)), 0 * state
    y += bias
    for row, t, i in np.ndindex(B, T, W):
        source = t - (W - 1) + i
        if source >= 0 and ids[row, source] == ids[row, t]:
            y[row, t] += w[i] * x[row, source]
            gw[i] += x[row, source] * dy[row, t]
            gx[row, source] += w[i] * dy[row, t]
        if source < 0 and ids[row, 0] == ids[row, t]:
            y[row, t] += w[i] * state[row, source]
            gw[i] += state[row, source] * dy[row, t]
            gstate[row, source] += w[i] * dy[row, t]
    return y, (gx, gw, gbias, gstate)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, W", [(17, 4), (2, 4), (9, 1), (11, 2)])
def test_the_convolution_is_numpys(T, W, dtype):
    rng, C, B = np.random.default_rng(0), 6, 3
    ids = np.ones((B, T), np.int32)
    ids[1, T // 2 :] = 2
    ids[2, T - 1 :] = 0
    shapes = ((B, T, C), (W, C), (C,), (B, W - 1, C), (B, T, C))
    x, w, bias, state, dy = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    with jax.enable_x64(dtype == "float64"):

        def weighted(x, w, bias, state):
            y, last = causal_conv(x, w, bias, ids, state)
            return jnp.sum(y * dy), (y, last)

        grads, (y, last) = jax.jit(jax.grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))(x, w, bias, state)
    y_, grads_ = numpy_conv(*(np.asarray(v, np.float64) for v in (x, w, bias)), ids, *map(np.float64, (state, dy)))
    assert relative(y, y_) <= TOLERANCE[dtype]
    for mine, theirs in zip(grads, grads_, strict=True):
        assert relative(mine, theirs) <= TOLERANCE[dtype]
    for row in range(B):
        # What the next token would see: the last inputs of the last segment, after the state where that is the first.
        segment = ids[row][ids[row] > 0][-1]
        own = list(x[row][ids[row] == segment])
        history = [*(state[row] if segment == ids[row, 0] else np.zeros((W - 1, C))), *own]
        np.testing.assert_array_equal(last[row], np.reshape(history[len(history) - (W - 1) :], (W - 1, C)))


def test_a_convolution_in_two_calls_and_token_by_token():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 11, 3)).astype(np.float32), rng.standard_normal((4, 3)).astype(np.float32)
    whole, last = convolve(x, w, None, np.ones((2, 11), np.int32))
    for cuts in ([0, 2, 11], list(range(12))):
        parts, kept = [], None
        for begin, end in itertools.pairwise(cuts):
            y, kept = convolve(x[:, begin:end], w, None, np.ones((2, end - begin), np.int32), kept)
            parts.append(y)
        assert relative(np.concatenate(parts, axis=1), whole) < 1e-6
        np.testing.assert_array_equal(kept, last)
    # Padding of a row, all of it even, leaves what is kept as it is.
    _, kept = convolve(x[:, :3], w, None, np.array([[1, 1, 0], [0, 0, 0]], np.int32), last)
    np.testing.assert_array_equal(kept[0], [*last[0, 2:], *x[0, :2]])
    np.testing.assert_array_equal(kept[1], last[1])


def test_mistakes_are_user_errors():
    (x, dt, a, b, c, state), ids, _, _ = make()
    with pytest.raises(UserError, match="did you mean 'chunked'"):
        ssm(x, dt, a, b, c, segment_ids_BT=ids, implementation="chunkd")
    with pytest.raises(UserError, match="do not fit"):
        ssm(x, dt[:, :-1], a, b, c, segment_ids_BT=ids)
    with pytest.raises(UserError, match="4 heads are no multiple of 3 groups"):
        ssm(x, dt, a, np.zeros((2, 29, 3, 3)), np.zeros((2, 29, 3, 3)), segment_ids_BT=ids)
    with pytest.raises(UserError, match=r"should be \(2, 4, 5, 3\)"):
        ssm(x, dt, a, b, c, segment_ids_BT=ids, state_BNHZ=state[:1])
    with pytest.raises(UserError, match="chunk=0"):
        ssm(x, dt, a, b, c, segment_ids_BT=ids, chunk=0)
    with pytest.raises(UserError, match="convolution shapes"):
        causal_conv(x[..., 0], np.zeros((4, 3)), None, ids)
