"""Every version of attention against float64 numpy, forward and gradient, for every option and their mixtures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmlab.core.errors import UserError
from llmlab.kernels import attention as attention_contract
from llmlab.kernels import attention_blockwise, attention_cudnn
from llmlab.kernels.attention import attention
from llmlab.kernels.attention_mask import Mask
from llmlab.kernels.attention_ragged import gathered, ragged

FAST = ("short", "blockwise")


def numpy_attention(q, k, v, q_pos, k_pos, q_seg, k_seg, causal, window, softcap, sinks, scale):
    """One query at a time, in float64."""
    B, T, N, _ = q.shape
    group = N // k.shape[2]
    out = np.zeros((B, T, N, v.shape[3]))
    for b, t, n in np.ndindex(B, T, N):
        scores, seen = [], []
        for s in range(k.shape[1]):
            distance = q_pos[b, t] - k_pos[b, s]
            if (causal and distance < 0) or (window is not None and distance >= window):
                continue
            if q_seg[b, t] != k_seg[b, s] or k_seg[b, s] == 0:
                continue
            score = float(q[b, t, n] @ k[b, s, n // group]) * scale
            scores.append(score if softcap is None else softcap * np.tanh(score / softcap))
            seen.append(s)
        if not seen:
            continue
        highest = max(scores)
        weights = np.exp(np.array(scores) - highest)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[n] - highest))
        out[b, t, n] = (weights / total) @ v[b, seen, n // group]
    return out


def make(T=24, S=None, N=4, K=2, H=8, V=None, packed=False, sinks=False, seed=0, B=2):
    """Random arrays; `packed` gives two documents and padding, with positions that restart."""
    rng = np.random.default_rng(seed)
    S = T if S is None else S
    q, k, v = (rng.standard_normal(shape) for shape in [(B, T, N, H), (B, S, K, H), (B, S, K, V or H)])
    q_pos, k_pos = (np.broadcast_to(np.arange(length), (B, length)).copy() for length in (T, S))
    q_seg, k_seg = np.ones((B, T), int), np.ones((B, S), int)
    if packed:
        for row, cut in enumerate((7, 13)[:B]):
            q_seg[row, cut:], q_seg[row, -3:] = 2, 0
            q_pos[row, cut:] -= cut
        k_pos, k_seg = q_pos, q_seg
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_pos": q_pos,
        "k_pos": k_pos,
        "q_seg": q_seg,
        "k_seg": k_seg,
        "sinks": rng.standard_normal(N) if sinks else None,
    }


def call(case, implementation, *, dtype=jnp.float64, segments=True, arrays=None, **options):
    q, k, v, sinks = arrays if arrays is not None else (case["q"], case["k"], case["v"], case["sinks"])
    q, k, v, sinks = (None if x is None else jnp.asarray(x, dtype) for x in (q, k, v, sinks))
    ids = {"q_segment_ids_BT": jnp.asarray(case["q_seg"]), "k_segment_ids_BS": jnp.asarray(case["k_seg"])}
    given = dict(
        q_positions_BT=jnp.asarray(case["q_pos"]),
        k_positions_BS=jnp.asarray(case["k_pos"]),
        sinks_N=sinks,
        **(ids if segments else {}),
    )
    chosen = functools.partial(attention, implementation=implementation, **options)
    return jax.jit(lambda q, k, v, given: chosen(q, k, v, **given))(q, k, v, given)


def expected(case, *, causal=True, window=None, softcap=None, scale=None):
    scale = case["q"].shape[3] ** -0.5 if scale is None else scale
    keys = ("q", "k", "v", "q_pos", "k_pos", "q_seg", "k_seg")
    return numpy_attention(*(case[key] for key in keys), causal, window, softcap, case["sinks"], scale)


def error(actual, truth):
    return np.linalg.norm(np.asarray(actual, np.float64) - truth) / max(np.linalg.norm(truth), 1e-30)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 10, so that 24 tokens are several blocks and no multiple of one."""
    monkeypatch.setitem(attention_blockwise.blockwise.__kwdefaults__, "block", 10)
    monkeypatch.setattr("llmlab.kernels.attention_short.SMALLEST_BLOCK", 10)


OPTIONS = {
    "causal": ({}, {}),
    "bidirectional": ({}, {"causal": False}),
    "window": ({}, {"window": 7}),
    "window without causality": ({}, {"causal": False, "window": 7}),
    "window wider than a block": ({}, {"window": 13}),
    "softcap": ({}, {"softcap": 1.5}),
    "sinks": ({"sinks": True}, {}),
    "scale": ({}, {"scale": 0.7}),
    "multi-head": ({"K": 4}, {}),
    "packed": ({"packed": True}, {}),
    "packed, window, sinks": ({"packed": True, "sinks": True}, {"window": 7}),
    "everything": ({"packed": True, "sinks": True, "V": 6}, {"window": 9, "softcap": 1.5, "scale": 0.7}),
    "narrow values": ({"V": 5}, {}),
    "one query block": ({"T": 9}, {}),
}


@functools.cache
def truth_of(name):
    """The case, its output and its gradients for the cotangent cos(0, 1, ...), from the reference in float64."""
    with jax.enable_x64(True):
        shape, options = OPTIONS[name]
        case = make(**shape)
        truth = expected(case, **options)
        out, grads = output_and_gradients(case, "reference", **options)
        assert error(out, truth) < 1e-12
        return case, truth, grads


def gradients(case, implementation, *, dtype=jnp.float64, **options):
    return output_and_gradients(case, implementation, dtype=dtype, **options)[1]


def output_and_gradients(case, implementation, *, dtype=jnp.float64, **options):
    arrays = tuple(case[key] for key in ("q", "k", "v", "sinks"))
    present = [i for i, x in enumerate(arrays) if x is not None]

    def weighted(*given):
        filled = [None] * 4
        for i, x in zip(present, given, strict=True):
            filled[i] = x
        out = call(case, implementation, dtype=dtype, arrays=filled, **options)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=dtype)).reshape(out.shape)), out

    given = [jnp.asarray(arrays[i], dtype) for i in present]
    grads, out = jax.jit(jax.grad(weighted, argnums=tuple(range(len(given))), has_aux=True))(*given)
    return out, grads


ANY_ORDER = ("causal", "window without causality", "packed, window, sinks", "everything")


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("name, in_order", [(name, True) for name in OPTIONS] + [(name, False) for name in ANY_ORDER])
def test_output_and_gradients_are_the_references(name, implementation, in_order):
    case, truth, truth_grads = truth_of(name)
    options = OPTIONS[name][1] | {"rows_in_order": in_order, "segments": OPTIONS[name][0].get("packed", False)}
    with jax.enable_x64(True):
        out, grads = output_and_gradients(case, implementation, **options)
        assert error(out, truth) < 1e-12
        for actual, truth_grad in zip(grads, truth_grads, strict=True):
            assert error(actual, np.asarray(truth_grad)) < 1e-11


@pytest.mark.parametrize("implementation", FAST)
def test_the_references_gradient_is_the_finite_difference(implementation):
    case = make(T=6, N=2, K=1, H=4, packed=False, sinks=True, B=1)
    options = {"window": 4, "softcap": 1.5}
    with jax.enable_x64(True):
        grads = gradients(case, implementation, **options)
    for grad, key in zip(grads, ("q", "k", "v", "sinks"), strict=True):
        direction = np.random.default_rng(1).standard_normal(case[key].shape)
        values = [expected(case | {key: case[key] + step * direction}, **options) for step in (1e-5, -1e-5)]
        slope = ((values[0] - values[1]) * np.cos(np.arange(values[0].size)).reshape(values[0].shape)).sum() / 2e-5
        np.testing.assert_allclose((np.asarray(grad) * direction).sum(), slope, rtol=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "short", "blockwise", "auto"])
@pytest.mark.parametrize("K, options", [(4, {}), (2, {"window": 5}), (1, {"softcap": 1.5, "scale": 0.4})], ids=str)
def test_one_query_against_a_cache_of_rows_of_different_lengths(implementation, options, K):
    case = make(T=1, S=37, K=K, V=6, sinks=True)
    lengths = np.array([30, 11])
    case["q_pos"] = lengths[:, None] - 1
    case["k_seg"] = (np.arange(37)[None] < lengths[:, None]).astype(int)
    case["k_pos"][1] = np.roll(case["k_pos"][1], 3)  # a ring buffer's order
    case["k_seg"][1] = np.roll(case["k_seg"][1], 3)
    with jax.enable_x64(True):
        assert error(call(case, implementation, **options), expected(case, **options)) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_several_queries_continue_a_cache(implementation):
    case = make(T=5, S=37)
    case["q_pos"] = np.array([[20], [8]]) + np.arange(5)
    case["k_seg"] = (case["k_pos"] < np.array([[25], [13]])).astype(int)
    with jax.enable_x64(True):
        assert error(call(case, implementation), expected(case)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scale": 0.4}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("lengths", [(1, 40, 0, 17), (9,), (3, 0, 0), (8, 8, 8, 8, 64)], ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_rows_of_very_different_lengths_in_blocks_anywhere(T, lengths, options):
    rng, (N, K, H, V, block, most) = np.random.default_rng(0), (4, 2, 8, 6, 4, 16)
    B, given = len(lengths), {"scale": H**-0.5, "softcap": None} | options
    sinks_N = rng.standard_normal(N) if given.pop("sinks", False) else None
    places_BP = rng.permutation(B * most).reshape(B, most)
    k_XSKH, v_XSKV = (rng.standard_normal((B * most, block, K, width)) for width in (H, V))
    q_BTNH, lengths_B = rng.standard_normal((B, T, N, H)), np.array(lengths)
    q_pos_BT = lengths_B[:, None] - T + np.arange(T)[None]
    with jax.enable_x64(True):
        keys, values, places = jnp.asarray(k_XSKH), jnp.asarray(v_XSKV), jnp.asarray(places_BP)

        def block_of(row_C, number_C):
            place_C = places[row_C, jnp.minimum(number_C, most - 1)]
            return keys[place_C], values[place_C]

        out = ragged(
            jnp.asarray(q_BTNH),
            gathered(block_of, B, jnp.float64),
            most=most,
            lengths_B=jnp.asarray(lengths_B, jnp.int32),
            q_positions_BT=jnp.asarray(q_pos_BT, jnp.int32),
            sinks_N=sinks_N,
            **given,
        )
    k, v = k_XSKH[places_BP].reshape(B, -1, K, H), v_XSKV[places_BP].reshape(B, -1, K, V)
    k_pos = np.broadcast_to(np.arange(most * block), (B, most * block))
    k_seg = (k_pos < lengths_B[:, None]).astype(int)
    truth = numpy_attention(
        q_BTNH,
        k,
        v,
        q_pos_BT,
        k_pos,
        np.ones((B, T), int),
        k_seg,
        True,
        None,
        given["softcap"],
        sinks_N,
        given["scale"],
    )
    assert error(out, truth) < 1e-12


def test_segment_ids_of_the_keys_alone_mark_unwritten_slots():
    case = make(T=1, S=12)
    case["q_pos"][:] = 11
    case["k_seg"][:, 7:] = 0
    positions = {"q_positions_BT": jnp.asarray(case["q_pos"]), "k_positions_BS": jnp.asarray(case["k_pos"])}
    with jax.enable_x64(True):
        out = attention(case["q"], case["k"], case["v"], k_segment_ids_BS=jnp.asarray(case["k_seg"]), **positions)
        assert error(out, expected(case)) < 1e-12


@pytest.mark.parametrize("implementation", ["reference", "short", "blockwise"])
@pytest.mark.parametrize("sinks", [False, True])
def test_queries_that_see_nothing_give_zeros_and_finite_gradients(implementation, sinks):
    case = make(T=20, S=20, sinks=sinks)
    case["q_seg"][0] = case["k_seg"][0] = 0
    out, grads = output_and_gradients(case, implementation, dtype=jnp.float32)
    assert not np.any(out[0])
    assert np.all(np.any(out[1], axis=(1, 2)))
    assert all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize("implementation", ["reference", *FAST])
def test_a_sink_takes_its_share_and_gives_nothing(implementation):
    case = make(T=24, K=4, B=1)
    case["q"][:] = 0  # equal weights: of the i-th query, 1 over i and the sink's
    case["v"][:] = 1
    case["sinks"] = np.array([-50.0, 0.0, 2.0, 90.0])
    with jax.enable_x64(True):
        out = call(case, implementation)
    seen_T1 = np.arange(1, 25)[:, None]
    np.testing.assert_allclose(out[0, :, :, 0], seen_T1 / (seen_T1 + np.exp(case["sinks"])[None]), rtol=1e-12)


@pytest.mark.parametrize("implementation", FAST)
def test_large_scores_do_not_overflow(implementation):
    case = make(T=24)
    case["q"] *= 1e3
    out, grads = output_and_gradients(case, implementation, dtype=jnp.float32)
    assert error(out, expected(case)) < 1e-3
    assert all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.parametrize("implementation", [*FAST, "reference"])
def test_bfloat16_accumulates_in_float32(implementation):
    case = make(T=200, H=16, B=1)
    case["q"][:] = 0  # equal weights: the mean of 200 values of 1 + 1/128, which bfloat16 sums would lose
    case["v"][:] = 1 + 1 / 128
    out = call(case, implementation, dtype=jnp.bfloat16, causal=False)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float64), 1 + 1 / 128)


@pytest.mark.parametrize("implementation", FAST)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_positions_and_segments(implementation, data):
    case = make(T=12, S=20, N=2, K=1, H=4, seed=data.draw(st.integers(0, 99)))
    for key, length, highest in (("q_pos", 12, 25), ("k_pos", 20, 25), ("q_seg", 12, 2), ("k_seg", 20, 2)):
        values = st.lists(st.integers(0, highest), min_size=2 * length, max_size=2 * length)
        case[key] = np.array(data.draw(values)).reshape(2, length)
    options = {"window": data.draw(st.sampled_from([None, 6])), "causal": data.draw(st.booleans())}
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, case)
        out = _jitted(implementation, *options.values())(arguments)
        assert error(out, expected(case, **options)) < 1e-12


@functools.cache
def _jitted(implementation, window, causal):
    return jax.jit(lambda case: call(case, implementation, window=window, causal=causal))


def _temporary_bytes(implementation, T):
    x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, positions, segments):
        shared = {"q_positions_BT": positions, "k_positions_BS": positions}
        segments = {"q_segment_ids_BT": segments, "k_segment_ids_BS": segments}
        return jnp.sum(attention(q, k, v, **shared, **segments, rows_in_order=True, implementation=implementation) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_blockwise_is_linear_in_length():
    assert _temporary_bytes("blockwise", 512) < 4.4 * _temporary_bytes("blockwise", 128)
    assert _temporary_bytes("reference", 512) > 4 * _temporary_bytes("blockwise", 512)


def test_decode_copies_no_cache():
    B, S, K, H = 2, 512, 4, 32
    q = jax.ShapeDtypeStruct((B, 1, 2 * K, H), jnp.float32)
    cache = jax.ShapeDtypeStruct((B, K, S, H), jnp.float32)

    def step(q, k, v, q_pos, k_pos):
        return attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), q_positions_BT=q_pos, k_positions_BS=k_pos)

    ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, 1), (B, S))]
    compiled = jax.jit(step).lower(q, cache, cache, *ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * S * K * H


@pytest.mark.parametrize("implementation", FAST)
def test_a_mesh_gives_the_same_gradients(implementation):
    case = make(T=24, B=4, sinks=True)
    with jax.enable_x64(True):
        alone = gradients(case, implementation, rows_in_order=True)
        mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
        heads = NamedSharding(mesh, P("data", None, "tensor", None))

        def loss(q, k, v, sinks):
            out = call(case, implementation, arrays=(q, k, v, sinks), rows_in_order=True)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

        arrays = [jax.device_put(case[key], heads) for key in ("q", "k", "v")]
        arrays.append(jax.device_put(case["sinks"], NamedSharding(mesh, P("tensor"))))
        sharded = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)
        for actual, truth in zip(sharded, alone, strict=True):
            assert error(actual, np.asarray(truth)) < 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"implementation": "blokwise"}, "did you mean 'blockwise'"),
        ({"implementation": "cudnn"}, "needs an NVIDIA GPU"),
        ({"window": 0}, "sees nothing"),
    ],
)
def test_what_cannot_be_honoured_is_a_user_error(change, message):
    options = {"implementation": "auto"} | change
    with pytest.raises(UserError, match=message):
        call(make(), options.pop("implementation"), dtype=jnp.float32, **options)


def test_shapes_that_do_not_fit_are_user_errors():
    case = make(N=4, K=2)
    for arrays, message in [
        ((case["q"][:, :, :3], case["k"], case["v"], None), "3 query heads are no multiple of 2"),
        ((case["q"], case["k"][:, :9], case["v"], None), "do not fit"),
        ((case["q"], case["k"], case["v"], np.zeros(3)), "one logit a query head"),
    ]:
        with pytest.raises(UserError, match=message):
            call(case, "auto", dtype=jnp.float32, arrays=arrays)
    with pytest.raises(UserError, match="as many keys as queries"):
        call(make(T=4, S=8), "auto", dtype=jnp.float32, rows_in_order=True)


def test_cudnn_refuses_what_it_would_silently_ignore():
    rows = jnp.arange(8)[None]
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)

    def refusal(x=x, segments=None, softcap=None, sinks=None, platform="gpu", causal=True, window=None, in_order=True):
        mask = Mask(rows, rows, segments, segments, causal, window, in_order)
        return attention_cudnn.refusal(x, x, mask, softcap, sinks, platform)

    assert refusal() is None
    assert refusal(window=4) is None
    assert refusal(causal=False, in_order=False) is None
    for asked in (
        {"segments": rows},
        {"softcap": 3.0},
        {"sinks": jnp.zeros(2)},
        {"in_order": False},
        {"causal": False, "window": 4},
        {"platform": "tpu"},
        {"x": x.astype(jnp.float32)},
        {"x": x[..., :63]},
    ):
        assert refusal(**asked) is not None, asked


@pytest.mark.parametrize(
    "B, T, S, platform, cudnn_can, version",
    [
        (4, 256, 256, "cpu", False, "short"),
        (1, 2048, 2048, "cpu", False, "blockwise"),
        (64, 1024, 1024, "cpu", False, "blockwise"),
        (8, 1, 4096, "cpu", False, "short"),
        (8, 1, 4096, "gpu", True, "reference"),
        (8, 256, 256, "gpu", True, "cudnn"),
        (8, 4096, 4096, "gpu", False, "blockwise"),
    ],
)
def test_the_version_is_chosen_by_shape_and_platform(B, T, S, platform, cudnn_can, version):
    assert attention_contract.choose(B, T, S, 6, platform, cudnn_can) == version
