"""Token log-probabilities against float64 numpy and the reference's gradients: chunked, sharded, flattened or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax, logsumexp

from llmlab.core.errors import UserError
from llmlab.kernels import logprobs
from llmlab.kernels.logprobs import TokenLogprobs, token_logprobs

B, T, D, V = 3, 11, 6, 17
OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.6, "softcap": 2.0}]
VERSIONS = [
    {"implementation": "plain"},
    {"implementation": "plain", "flatten": False},
    {"implementation": "chunked", "chunk": 4},
    {"implementation": "chunked", "chunk": 4, "flatten": False},
    {"implementation": "chunked"},
    {"implementation": "auto"},
]


def make(seed=0, shape=(B, T, D, V)):
    rng = np.random.default_rng(seed)
    B, T, D, V = shape
    return rng.standard_normal((B, T, D)), rng.standard_normal((D, V)), rng.integers(0, V, (B, T))


def numpy_logprobs(hidden, w, target, temperature=1.0, softcap=None):
    logits = hidden @ w
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits / temperature
    logp = log_softmax(logits, axis=-1)
    picked = np.take_along_axis(logp, target[..., None], axis=-1)[..., 0]
    return TokenLogprobs(picked, logsumexp(logits, axis=-1), -(np.exp(logp) * logp).sum(-1))


def error(actual, truth):
    return np.linalg.norm(np.asarray(actual, np.float64) - truth) / np.linalg.norm(truth)


def gradients(weights, arguments, **options):
    """Of a sum of the three results with a different weight on every token; `weights` scales each result's part."""
    hidden, w, target = arguments

    def loss(hidden, w):
        out = token_logprobs(hidden, w, target, **options)
        wave = jnp.cos(jnp.arange(target.size, dtype=out.logp_BT.dtype)).reshape(target.shape)
        return sum(weight * jnp.sum(wave * part) for weight, part in zip(weights, out, strict=True) if weight)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, w)


@pytest.mark.parametrize("version", [{"implementation": "reference"}, *VERSIONS], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_are_numpys(options, version):
    hidden, w, target = make()
    with jax.enable_x64(True):
        out = jax.jit(lambda *given: token_logprobs(*given, **options, **version))(hidden, w, target)
    for actual, truth in zip(out, numpy_logprobs(hidden, w, target, **options), strict=True):
        assert error(actual, truth) < 1e-13


@pytest.mark.parametrize("version", VERSIONS[:4], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.6, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0.5, -0.3)], ids=str)
def test_gradients_are_the_references(weights, options, version):
    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, make()))
        truths = gradients(weights, arguments, implementation="reference", **options)
        for actual, truth in zip(gradients(weights, arguments, **version, **options), truths, strict=True):
            assert error(actual, np.asarray(truth)) < 1e-12


@pytest.mark.parametrize("version", [{"implementation": "plain"}, {"implementation": "chunked", "chunk": 4}], ids=str)
def test_gradients_are_finite_differences_of_numpys_values(version):
    hidden, w, target = make(seed=3)
    options = {"temperature": 0.8, "softcap": 3.0}
    weights = (1.0, 0.5, -0.3)
    wave = np.cos(np.arange(target.size)).reshape(target.shape)

    def value(hidden, w):
        parts = numpy_logprobs(hidden, w, target, **options)
        return sum(weight * (wave * part).sum() for weight, part in zip(weights, parts, strict=True))

    with jax.enable_x64(True):
        dhidden, dw = gradients(weights, (jnp.asarray(hidden), jnp.asarray(w), target), **version, **options)
    to_hidden, to_w = np.random.default_rng(4).standard_normal(hidden.shape), np.ones_like(w)
    step = 1e-5
    slope = (value(hidden + step * to_hidden, w) - value(hidden - step * to_hidden, w)) / (2 * step)
    np.testing.assert_allclose((np.asarray(dhidden) * to_hidden).sum(), slope, rtol=1e-7)
    slope = (value(hidden, w + step * to_w) - value(hidden, w - step * to_w)) / (2 * step)
    np.testing.assert_allclose((np.asarray(dw) * to_w).sum(), slope, rtol=1e-7)


@pytest.mark.parametrize("version", VERSIONS[:4], ids=str)
@pytest.mark.parametrize("w_spec", [P("fsdp", "tensor"), P(None, ("fsdp", "tensor"))], ids=str)
def test_a_sharded_vocabulary_gives_the_same_gradients(version, w_spec):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    weights = (1, 0.5, -0.3)
    with jax.enable_x64(True):
        hidden, w, target = map(jnp.asarray, make(shape=(4, T, 6, 16)))
        truths = gradients(weights, (hidden, w, target), implementation="reference")
        rows = P("data") if "fsdp" in w_spec else P(("data", "fsdp"))
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((hidden, rows), (w, w_spec), (target, rows))]
        for actual, truth in zip(gradients(weights, sharded, **version), truths, strict=True):
            assert error(actual, np.asarray(truth)) < 1e-12


def test_a_sharded_batch_is_not_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shapes = [((8, 32, 16), jnp.float32, P("data")), ((16, 64), jnp.float32, P()), ((8, 32), jnp.int32, P("data"))]
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for s, t, p in shapes]

    def loss(hidden, w, target):
        return jnp.mean(token_logprobs(hidden, w, target, implementation="chunked", chunk=8).logp_BT)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    assert "all-gather" not in compiled.as_text()


def test_a_sharded_sequence_is_not_gathered(monkeypatch):
    monkeypatch.setitem(logprobs.CHUNK_TOKENS, "cpu", 40)  # 20 a row; 16 of them four times make 64
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    time = P(None, "sequence")
    shapes = [((2, 64, 16), jnp.float32, time), ((16, 96), jnp.float32, P()), ((2, 64), jnp.int32, time)]
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for s, t, p in shapes]

    def loss(hidden, w, target):
        out = token_logprobs(hidden, w, target, implementation="chunked", flatten=False)
        return jnp.mean(out.logp_BT + out.logz_BT)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text()
    assert "while" in compiled
    assert "f32[2,2,96]" in compiled, "a device's part of a chunk of logits"
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in compiled


def test_chunks_of_a_sharded_sequence_give_the_same_gradients():
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    weights = (1, 0.5, -0.3)
    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, make(shape=(2, 64, 6, 17))))
        truths = gradients(weights, arguments, implementation="reference")
        time = NamedSharding(mesh, P(None, "sequence"))
        sharded = jax.device_put(arguments, (time, NamedSharding(mesh, P()), time))
        chunked = gradients(weights, sharded, implementation="chunked", chunk=16, flatten=False)
        for actual, truth in zip(chunked, truths, strict=True):
            assert error(actual, np.asarray(truth)) < 1e-12


@pytest.mark.parametrize("B, T, chunk", [(1, 256, 256), (16, 256, 64), (12, 256, 64), (4, 300, 150), (2048, 8, 1)])
def test_a_power_of_two_of_chunks_stays_below_the_tokens_allowed(B, T, chunk):
    assert logprobs._chunk_of(B, T, "cpu") == chunk


@pytest.mark.parametrize("version", ["plain", "chunked"])
def test_bfloat16_is_accumulated_and_returned_in_float32(version):
    hidden, w, target = make(shape=(2, 8, 64, 32))
    hidden, w = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
    out = token_logprobs(hidden, w, target, implementation=version)
    truth = numpy_logprobs(np.asarray(hidden, np.float64), np.asarray(w, np.float64), target)
    for actual, wanted in zip(out, truth, strict=True):
        assert actual.dtype == jnp.float32
        assert error(actual, wanted) < 1e-5
    dhidden, dw = gradients((1, 0, 0), (hidden, w, target), implementation=version)
    assert dhidden.dtype == dw.dtype == jnp.bfloat16


@pytest.mark.parametrize("version", ["plain", "chunked"])
def test_large_logits_stay_finite(version):
    hidden, w, target = make()
    arguments = (jnp.asarray(hidden * 1e4, jnp.float32), jnp.asarray(w, jnp.float32), target)
    out = token_logprobs(*arguments, implementation=version)
    assert all(np.all(np.isfinite(part)) for part in out)
    for grad in gradients((1, 0.5, -0.3), arguments, implementation=version):
        assert np.all(np.isfinite(grad))


def _compiled(weights, T, **options):
    shapes = [((2, T, 16), jnp.float32), ((16, 512), jnp.float32), ((2, T), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.jit(lambda *given: gradients(weights, given, **options)).lower(*arguments).compile()


def test_chunked_never_holds_all_logits():
    temporary = _compiled((1, 1, 1), 256, implementation="chunked", chunk=8).memory_analysis().temp_size_in_bytes
    assert temporary < 2 * 256 * 512 * 4 / 3


@pytest.mark.parametrize("options", [{"implementation": "plain"}, {"implementation": "chunked", "chunk": 8}], ids=str)
def test_an_unused_entropy_costs_nothing(options):
    with_entropy, without = (_compiled(weights, 32, **options).as_text() for weights in ((1, 1, 1), (1, 1, 0)))
    assert without.count(" reduce(") < with_entropy.count(" reduce(")
    assert without.count(" reduce(") <= 4  # highest, total, picked, and the caller's own sums are dead under grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"implementation": "chunkd"}, "did you mean 'chunked'"),
        ({"temperature": 0.0}, "above 0"),
        ({"implementation": "chunked", "chunk": 0}, "1 or more"),
    ],
)
def test_wrong_options_are_user_errors(options, message):
    hidden, w, target = make()
    with pytest.raises(UserError, match=message):
        token_logprobs(jnp.asarray(hidden, jnp.float32), jnp.asarray(w, jnp.float32), target, **options)


def test_wrong_shapes_are_user_errors():
    hidden, w, target = make()
    with pytest.raises(UserError, match=r"\[D, V\]"):
        token_logprobs(hidden, w.T, target)
