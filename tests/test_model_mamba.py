"""Mamba-2 layers, alone and beside attention: plain float64 numpy, and what packing, caching and meshes promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.mamba import get_config
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition, single_device
from llmlab.model.config import ModelConfig, mamba2
from llmlab.model.cost import abstract_params, flops_per_token, product_parameters
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Inputs
from llmlab.objective import NextTokenConfig
from llmlab.train.check import twin
from llmlab.train.config import resolve
from llmlab.train.step import accumulated_gradients
from tests.helpers import (
    VOCAB,
    assert_close,
    assert_packed_is_as_if_alone,
    host,
    packed_batch,
    random_params,
    relative,
    tiny_llama,
)

SSM = SsmConfig(state=6, head_dim=4, groups=2, conv=3, chunk=4)
EVERYTHING = dataclasses.replace(SSM, bias=True, conv_bias=False, mlp=True, norm=False, dt_min=0.4, dt_max=0.8)
CONFIGS = {
    "pure": mamba2(width=16, layers=2, vocab_size=VOCAB, max_positions=64, ssm=SSM),
    "hybrid": tiny_llama(layers=3, pattern=("mamba", "global"), ssm=SSM),
    "everything": tiny_llama(layers=2, kv_heads=4, pattern=("mamba", "global"), norm_after=True, ssm=EVERYTHING),
}


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def reference_mamba(config: ModelConfig, w: dict, h: np.ndarray) -> np.ndarray:
    """One row, a head and a token at a time."""
    s, T = config.ssm, len(h)
    N, G = config.ssm_heads, config.ssm_heads // s.groups
    z, x, b, c, dt = (
        np.einsum("td,d...->t...", h, w[name]) + w.get(f"{name}_bias", 0.0)
        for name in ("z_DNH", "x_DNH", "b_DKZ", "c_DKZ", "dt_DN")
    )

    def convolved(x, name):
        y = np.zeros(x.shape) + w.get(f"{name}_bias", 0.0)
        for t in range(T):
            for back in range(min(s.conv, t + 1)):
                y[t] += w[name][s.conv - 1 - back] * x[t - back]
        return silu(y)

    x, b, c = convolved(x, "conv_x_WNH"), convolved(b, "conv_b_WKZ"), convolved(c, "conv_c_WKZ")
    dt = np.clip(np.log1p(np.exp(dt + w["dt_bias_N"])), s.dt_min, np.inf if s.dt_max is None else s.dt_max)
    y = np.zeros(x.shape)
    for n in range(N):
        state = np.zeros((s.head_dim, s.state))
        for t in range(T):
            decay = np.exp(-np.exp(w["log_rate_N"][n]) * dt[t, n])
            state = decay * state + dt[t, n] * np.outer(x[t, n], b[t, n // G])
            y[t, n] = state @ c[t, n // G] + w["skip_N"][n] * x[t, n]
    y = y * silu(z)
    if s.norm:
        y = rms(y.reshape(T, s.groups, -1), config.norm_epsilon).reshape(y.shape)
        y = y * w["gate"]["scale"].reshape(N, s.head_dim)
    return np.einsum("tnh,nhd->td", y, w["out_NHD"]) + w.get("out_NHD_bias", 0.0)


def reference_attention(config: ModelConfig, w: dict, h: np.ndarray) -> np.ndarray:
    """One row: rotary, causal, grouped queries."""
    T, H, half = len(h), config.H, config.H // 2
    angle = np.arange(T)[:, None] * config.rope.base ** (-np.arange(half) / half)[None]

    def turn(x):
        first, second = x[:, :half], x[:, half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=1
        )

    out = np.zeros(h.shape)
    for n in range(config.heads):
        k = n * config.K // config.heads
        scores = turn(h @ w["query_DNH"][:, n]) @ turn(h @ w["key_DKH"][:, k]).T / np.sqrt(H)
        scores[np.triu_indices(T, 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out += p / p.sum(-1, keepdims=True) @ (h @ w["value_DKH"][:, k]) @ w["out_NHD"][n]
    return out


def reference_logits(config: ModelConfig, params: dict, tokens_T: np.ndarray) -> np.ndarray:
    """One row in float64: nothing shared with the model's code."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    slots = len(config.pattern)

    def added(x, w, part, call):
        y = call(rms(x, config.norm_epsilon) * w[f"{part}_norm"]["scale"])
        return x + (rms(y, config.norm_epsilon) * w[f"{part}_norm_after"]["scale"] if config.norm_after else y)

    def mlp(w, h):
        return silu(h @ w["gate_DF"]) * (h @ w["up_DF"]) @ w["down_FD"]

    x = tree["embedding"]["tokens_VD"][tokens_T]
    for layer in range(config.layers):
        w = jax.tree.map(lambda stack, i=layer // slots: stack[i], tree["layers"][str(layer % slots)])
        mamba = config.pattern[layer % slots] == "mamba"
        if mamba:
            x = added(x, w, "mamba", lambda h, w=w: reference_mamba(config, w["mamba"], h))
        else:
            x = added(x, w, "attention", lambda h, w=w: reference_attention(config, w["attention"], h))
        if not mamba or config.ssm.mlp:
            x = added(x, w, "mlp", lambda h, w=w: mlp(w["mlp"], h))
    x = rms(x, config.norm_epsilon) * tree["head"]["norm"]["scale"]
    head = tree["embedding"]["tokens_VD"].T if config.tied_embedding else tree["head"]["unembedding_DV"]
    return x @ head


@functools.cache
def built(name, dtype="float32"):
    model = make_model(dataclasses.replace(CONFIGS[name], dtype=dtype, param_dtype=dtype))
    return model, random_params(model)


@pytest.mark.parametrize(
    "name, dtype, tolerance",
    [
        pytest.param("hybrid", "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("hybrid", "float64", 1e-10, marks=pytest.mark.slow),
        ("pure", "float64", 1e-10),
        ("everything", "float64", 1e-10),
    ],
)
def test_logits_equal_a_float64_reference(name, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model, params = built(name, dtype)
        tokens_BT = np.random.default_rng(0).integers(VOCAB, size=(2, 11))
        logits_BTV = jax.jit(model.logits)(params, jnp.asarray(tokens_BT, jnp.int32))
        for row in range(2):
            assert relative(logits_BTV[row], reference_logits(model.config, params, tokens_BT[row])) < tolerance


@pytest.mark.parametrize(
    "change", [dict(norm=True), dict(dt_min=0.0), dict(dt_max=None), dict(mlp=False), dict(groups=1)], ids=str
)
def test_each_setting_moves_the_reference(change):
    """The reference test can fail: a wrong setting moves the logits by far more than its tolerance."""
    model, params = built("everything")
    params = jax.tree.map(lambda x: x, params)
    params["layers"]["0"]["mamba"]["gate"] = {"scale": np.ones((1, 32))}
    right = reference_logits(model.config, params, np.arange(9))
    wrong = dataclasses.replace(model.config, ssm=dataclasses.replace(EVERYTHING, **change))
    assert relative(reference_logits(wrong, params, np.arange(9)), right) > 1e-3


def test_a_packed_document_is_read_as_if_alone():
    assert_packed_is_as_if_alone(*built("hybrid"), 1e-5)


@functools.cache
def cached():
    """A compiled call of the cached hybrid: of T tokens in each row the first `added_B` are real."""
    model, params = built("hybrid")

    def call(tokens_BT, starts_B, added_B, cache):
        unstacked = model.unstack(params)
        offsets_1T = jnp.arange(tokens_BT.shape[1])[None]
        row = Inputs(tokens_BT, starts_B[:, None] + offsets_1T, (offsets_1T < added_B[:, None]).astype(jnp.int32))
        out = model.apply(unstacked, row, cache=cache)
        return unembed(out.hidden_BTD, model.head(unstacked), None), out.cache

    return jax.jit(call)


def test_prefill_and_decode_of_ragged_prompts_equal_the_full_forward():
    model, params = built("hybrid")
    tokens_BT, lengths_B = np.random.default_rng(1).integers(VOCAB, size=(4, 16)), np.array([1, 2, 6, 9])
    want_BTV = np.asarray(jax.jit(model.logits)(params, jnp.asarray(tokens_BT, jnp.int32)))
    call, cache, rows = cached(), model.init_cache(4, 16), np.arange(4)
    prompt_BT = np.where(np.arange(9)[None] < lengths_B[:, None], tokens_BT[:, :9], 7)
    got_BTV, cache = call(prompt_BT, np.zeros(4, int), lengths_B, cache)
    got_BTV = np.asarray(got_BTV)
    for row, length in enumerate(lengths_B):
        assert relative(got_BTV[row, :length], want_BTV[row, :length]) < 1e-5
    # A second piece of several tokens, ragged too: the first row is given none of them.
    added_B = np.array([0, 3, 1, 2])
    piece_BT = np.zeros((4, 9), int)
    piece_BT[:, :3] = np.take_along_axis(tokens_BT, lengths_B[:, None] + np.arange(3)[None], axis=1)
    got_BTV, cache = call(piece_BT, lengths_B, added_B, cache)
    got_BTV = np.asarray(got_BTV)
    for row, (start, added) in enumerate(zip(lengths_B, added_B, strict=True)):
        assert relative(got_BTV[row, :added], want_BTV[row, start : start + added]) < 1e-5
    lengths_B = lengths_B + added_B
    for _ in range(4):
        got_BTV, cache = call(tokens_BT[rows, lengths_B][:, None], lengths_B, np.ones(4, int), cache)
        assert relative(np.asarray(got_BTV)[:, 0], want_BTV[rows, lengths_B]) < 1e-5
        lengths_B = lengths_B + 1
    np.testing.assert_array_equal(cache["lengths_B"], lengths_B)


def test_what_a_row_kept_is_forgotten_once_its_length_is_zero():
    model, _ = built("hybrid")
    tokens_BT = np.random.default_rng(2).integers(VOCAB, size=(4, 9))
    call, zeros_B, all_B = cached(), np.zeros(4, int), np.full(4, 9)
    want_BTV, cache = call(tokens_BT, zeros_B, all_B, model.init_cache(4, 16))
    again_BTV, _ = call(tokens_BT, zeros_B, all_B, cache | {"lengths_B": jnp.zeros(4, jnp.int32)})
    np.testing.assert_array_equal(again_BTV, want_BTV)


def test_the_cache_is_as_large_for_any_length():
    model, _ = built("pure")
    short, long = (jax.eval_shape(lambda size=size: model.init_cache(3, size)) for size in (8, 4096))
    assert short == long
    assert {name: kept.shape for name, kept in short["layers"][0].items()} == {
        "state_BNHZ": (3, 8, 4, 6),
        "x_BWC": (3, 2, 32),
        "b_BWC": (3, 2, 12),
        "c_BWC": (3, 2, 12),
    }


def gradients(config, mesh=None):
    """In float64, so that only bugs differ."""
    with jax.enable_x64(True):
        config = dataclasses.replace(config, dtype="float64", param_dtype="float64")
        partition = single_device() if mesh is None else make_partition(mesh)
        model = make_model(config, partition)
        params = jax.device_put(random_params(model), partition.shardings(model.axes))
        loss = NextTokenConfig(logprobs="plain").make(model, np.ones(VOCAB, np.int32))
        batch = jax.device_put(packed_batch(), partition.sharding("batch", "time"))
        run = jax.jit(lambda p, b: accumulated_gradients(loss, p, {}, b, jax.random.key(0), 1, partition)[::2])
        return host(run(params, batch))


@functools.cache
def plain_gradients(name):
    return gradients(CONFIGS[name])


@pytest.mark.parametrize("name, remat", [("everything", "dots"), ("hybrid", "full")])
@pytest.mark.slow
def test_scan_and_remat_change_no_gradient(name, remat):
    changed = dataclasses.replace(CONFIGS[name], scan=True, remat=remat)
    assert_close(gradients(changed), plain_gradients(name), 1e-10)


@pytest.mark.slow
def test_the_recurrence_gives_the_gradients_of_the_chunks():
    plain = plain_gradients("everything")
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(plain))
    reference = dataclasses.replace(EVERYTHING, implementation="reference")
    assert_close(gradients(dataclasses.replace(CONFIGS["everything"], ssm=reference)), plain, 1e-10)


@pytest.mark.parametrize(
    "name, scan, mesh",
    [
        ("everything", False, MeshConfig(data=2, fsdp=2, tensor=2)),
        pytest.param("everything", False, MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), marks=pytest.mark.slow),
        pytest.param("everything", False, MeshConfig(data=1, fsdp=2, tensor=4), marks=pytest.mark.slow),
        pytest.param("hybrid", True, MeshConfig(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param("pure", False, MeshConfig(data=1, fsdp=4, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["2x2x2", "sequence", "2x4", "2x2x2 scanned", "4x2 pure"],
)
@pytest.mark.slow
def test_eight_devices_give_one_device_s_gradients(name, scan, mesh):
    assert_close(gradients(dataclasses.replace(CONFIGS[name], scan=scan), mesh), plain_gradients(name), 1e-10)


def test_heads_are_split_over_devices_and_shared_groups_are_not():
    partition = make_partition(MeshConfig(fsdp=4, tensor=2))
    model = make_model(CONFIGS["pure"], partition)
    specs = {name: partition.spec(axes) for name, axes in model.axes["layers"]["0"]["mamba"].items() if name != "gate"}
    assert specs["x_DNH"] == jax.P(None, "fsdp", "tensor", None)
    assert specs["conv_x_WNH"] == jax.P(None, None, "tensor", None)
    assert specs["log_rate_N"] == jax.P(None, "tensor")
    assert specs["b_DKZ"] == jax.P(None, "fsdp", None, None)
    with pytest.raises(UserError, match="model.ssm.heads=1 is not divided by the 2 devices"):
        make_model(dataclasses.replace(CONFIGS["pure"], ssm=SsmConfig(head_dim=32)), partition)


def test_initial_weights_are_the_papers():
    config = mamba2(width=256, layers=1, vocab_size=VOCAB, ssm=SsmConfig(head_dim=2, dt_init_floor=2e-3))
    mamba = host(jax.jit(make_model(config).init)(jax.random.key(0))["layers"]["0"]["mamba"])
    rates, steps = np.exp(mamba["log_rate_N"]), np.log1p(np.exp(mamba["dt_bias_N"]))
    assert rates.shape == (1, 256)
    assert 1 <= rates.min() < 1.5
    assert 15.5 < rates.max() <= 16
    assert rates.mean() == pytest.approx(8.5, rel=0.1)
    assert steps.min() == pytest.approx(2e-3, rel=1e-4)
    assert 0.08 < steps.max() <= 0.1
    assert np.median(steps) == pytest.approx(0.01, rel=0.3)
    assert (mamba["skip_N"] == 1).all()
    assert np.abs(mamba["conv_x_WNH"]).max() == pytest.approx(0.5, rel=0.01)
    assert mamba["out_NHD"].std() == pytest.approx((512 * 2) ** -0.5, rel=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_products_are_counted(name):
    """Every matrix and convolution; the embedding is looked up, but where it is the head too it is multiplied once."""
    model, _ = built(name)
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model)):
        leaf_name = path[-1].key
        if "_" in leaf_name and not leaf_name.endswith(("bias", "_N")) and leaf_name != "tokens_VD":
            count += leaf.size
    count += VOCAB * model.config.width if model.config.tied_embedding else 0
    assert product_parameters(model.config) == count


def test_flops_of_a_state_do_not_grow_with_length():
    pure, hybrid = CONFIGS["pure"], CONFIGS["hybrid"]
    assert flops_per_token(pure, 4096) == flops_per_token(pure, 16)
    assert flops_per_token(pure, 16) == 6 * product_parameters(pure) + 2 * 12 * 8 * 4 * 6
    assert flops_per_token(hybrid, 80) - flops_per_token(hybrid, 16) == 12 * 4 * 4 * 64  # its one attention layer


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(state=0), "model.ssm.state=0 should be at least 1"),
        (dict(head_dim=5), "model.ssm.head_dim=5 does not divide model.ssm.expand·model.width=32: try head_dim=1"),
        (dict(groups=3), "model.ssm.groups=3 does not divide the 8 heads"),
        (dict(heads=-1), "model.ssm.heads=-1 should be 0"),
        (dict(dt_init_min=0.2), "dt_init_min=0.2"),
        (dict(dt_min=1.0, dt_max=0.5), "model.ssm.dt_max=0.5"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        mamba2(width=16, ssm=SsmConfig(**{"head_dim": 4} | overrides))


def test_the_twin_of_a_large_model_fits_its_mesh():
    partition = make_partition(MeshConfig(data=1, fsdp=2, tensor=4))
    small = twin(resolve(get_config("130m")), partition)
    assert (small.model.ssm_heads, small.model.ssm.state, small.model.ssm.head_dim) == (8, 128, 64)
    make_model(small.model, partition)
