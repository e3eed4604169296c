"""The model against plain numpy in float64, and the invariances that packing, caching, scanning and remat promise."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.model.config import ModelConfig
from llmlab.model.rope import RopeConfig
from llmlab.model.transformer import make_model
from llmlab.model.types import Inputs, inputs
from tests.helpers import (
    VOCAB,
    assert_close,
    assert_packed_is_as_if_alone,
    logits_in_pieces,
    packed_batch,
    random_params,
    relative,
    tiny_gpt2,
    tiny_llama,
)

FAMILIES = {
    "gpt2": tiny_gpt2(),
    "llama": tiny_llama(),
    "everything": tiny_llama(
        layers=3,
        qk_norm="head",
        window=5,
        pattern=("local", "global"),
        attention_softcap=3.0,
        logit_softcap=4.0,
        bias=True,
    ),
}


def reference_logits(config: ModelConfig, params: dict, tokens_T: np.ndarray) -> np.ndarray:
    """One row, float64, loops over heads: nothing shared with the model's code."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    T, H, G = len(tokens_T), config.H, config.heads // config.K

    def norm(x, weights, kind):
        if kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon) * weights["scale"]
        return x + weights.get("bias", 0.0)

    def turn(x):
        half = H // 2
        angle = np.arange(T)[:, None] * config.rope.base ** (-np.arange(half) * 2.0 / H)[None]
        first, second = x[:, :half], x[:, half:]
        sin, cos = np.sin(angle), np.cos(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)

    def act(x):
        if config.activation == "silu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = tree["embedding"]["tokens_VD"][tokens_T]
    if config.positions == "learned":
        x = x + tree["embedding"]["positions_PD"][:T]
    for layer in range(config.layers):
        slots = len(config.pattern)
        w = jax.tree.map(lambda s, i=layer // slots: s[i], tree["layers"][str(layer % slots)])
        a, m = w["attention"], w["mlp"]
        h = norm(x, w["attention_norm"], config.norm)
        out = np.zeros((T, config.heads, H))
        for n in range(config.heads):
            q = h @ a["query_DNH"][:, n] + a.get("query_DNH_bias", np.zeros((config.heads, H)))[n]
            k = h @ a["key_DKH"][:, n // G] + a.get("key_DKH_bias", np.zeros((config.K, H)))[n // G]
            v = h @ a["value_DKH"][:, n // G] + a.get("value_DKH_bias", np.zeros((config.K, H)))[n // G]
            if config.qk_norm == "head":
                q, k = norm(q, a["query_norm"], "rmsnorm"), norm(k, a["key_norm"], "rmsnorm")
            if config.positions == "rotary":
                q, k = turn(q), turn(k)
            scores = q @ k.T / math.sqrt(H)
            if config.attention_softcap:
                scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
            for i in range(T):
                for j in range(T):
                    far = config.kind(layer) == "local" and i - j >= config.window
                    if j > i or far:
                        scores[i, j] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, n] = p / p.sum(-1, keepdims=True) @ v
        x = x + np.einsum("tnh,nhd->td", out, a["out_NHD"]) + a.get("out_NHD_bias", 0.0)
        h = norm(x, w["mlp_norm"], config.norm)
        up = h @ m["up_DF"] + m.get("up_DF_bias", 0.0)
        hidden = act(h @ m["gate_DF"] + m.get("gate_DF_bias", 0.0)) * up if config.gated else act(up)
        x = x + hidden @ m["down_FD"] + m.get("down_FD_bias", 0.0)
    x = norm(x, tree["head"]["norm"], config.norm)
    head = tree["embedding"]["tokens_VD"].T if config.tied_embedding else tree["head"]["unembedding_DV"]
    logits = x @ head
    return logits if not config.logit_softcap else config.logit_softcap * np.tanh(logits / config.logit_softcap)


@functools.cache
def built(family: str):
    model = make_model(FAMILIES[family])
    return model, random_params(model)


TOKENS_BT = np.random.default_rng(1).integers(VOCAB, size=(2, 14)).astype(np.int32)


@functools.cache
def logits_of(family: str) -> np.ndarray:
    model, params = built(family)
    return np.asarray(jax.jit(model.logits)(params, TOKENS_BT))


# What the reference pins for each family, the one with everything keeps for the others too.
MOSTLY = [pytest.param(name, marks=[] if name == "everything" else [pytest.mark.slow]) for name in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_a_float64_reference(family):
    model, params = built(family)
    for tokens_T, logits_TV in zip(TOKENS_BT, logits_of(family), strict=True):
        assert relative(logits_TV, reference_logits(model.config, params, tokens_T)) < 2e-6


@pytest.mark.parametrize(
    "change",
    [
        dict(rope=RopeConfig(base=1000.0)),
        dict(norm_epsilon=1e-2),
        dict(activation="gelu"),
        dict(qk_norm="none"),
        dict(window=6),
        dict(attention_softcap=2.0),
        dict(pattern=("global", "local")),
    ],
)
def test_each_setting_moves_the_reference(change):
    """The reference test can fail: a wrong setting moves the logits by far more than its tolerance."""
    model, params = built("everything")
    tokens_T = np.arange(12) % VOCAB
    right = reference_logits(model.config, params, tokens_T)
    wrong = reference_logits(dataclasses.replace(model.config, **change), params, tokens_T)
    assert relative(wrong, right) > 1e-4


@pytest.mark.parametrize("family", MOSTLY)
def test_no_logit_depends_on_a_later_token(family):
    model, params = built(family)
    x_BTD = np.random.default_rng(2).standard_normal((1, 9, model.config.width)).astype(np.float32)

    def hidden(x_BTD):
        row = inputs(jnp.zeros((1, 9), jnp.int32))
        return model.apply(params, row._replace(embeddings_BTD=x_BTD)).hidden_BTD[0]

    reach_TS = np.abs(np.asarray(jax.jit(jax.jacobian(hidden))(x_BTD))).sum(axis=(1, 2, 4))
    assert (np.triu(reach_TS, k=1) == 0).all()
    assert (np.diag(reach_TS) > 0).all()
    assert reach_TS[8, 7] > 0


@pytest.mark.parametrize("family", MOSTLY)
def test_a_packed_document_is_read_as_if_alone(family):
    assert_packed_is_as_if_alone(*built(family), 1e-5)


@pytest.mark.parametrize("family", MOSTLY)
def test_prefill_and_decode_equal_the_full_forward(family):
    assert relative(logits_in_pieces(*built(family), TOKENS_BT, (6, 12, 13)), logits_of(family)) < 1e-5


@functools.cache
def gradients(**changes):
    model, (_, params) = make_model(dataclasses.replace(FAMILIES["everything"], **changes)), built("everything")
    batch = packed_batch(rows=2, length=10)

    def loss(params):
        out = model.apply(params, Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))
        return jnp.sum(jnp.square(out.hidden_BTD) * batch.mask_BT[..., None])

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
    "change",
    [
        dict(remat="dots", scan=True),
        pytest.param(dict(scan=True), marks=pytest.mark.slow),
        pytest.param(dict(remat="full"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_it_runs_changes_no_gradient(change):
    assert_close(gradients(**change), gradients(), 1e-5)


class Doubled:
    """A stand-in for a quantised weight: half of it is stored."""

    def __init__(self, half):
        self.half = half

    def dense(self, dtype):
        return (2 * self.half).astype(dtype)

    def product(self, x_MI, dims_in):
        size_in = math.prod(self.half.shape[:dims_in])
        return 2 * (x_MI @ self.half.reshape(size_in, -1).astype(x_MI.dtype))

    def grouped(self, x_MI, rows_E):
        return 2 * jax.lax.ragged_dot(x_MI, self.half.astype(x_MI.dtype), rows_E)


jax.tree_util.register_pytree_node(Doubled, lambda leaf: ((leaf.half,), None), lambda _, parts: Doubled(*parts))


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_leaf_may_stand_for_a_weight(scan):
    model = make_model(dataclasses.replace(FAMILIES["llama"], scan=scan))
    params = random_params(model)
    packed = jax.tree.map(lambda leaf: Doubled(leaf / 2), params)
    tokens_BT = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    logits = jax.jit(model.logits)
    assert relative(logits(packed, tokens_BT), logits(params, tokens_BT)) < 1e-6


def test_parameters_are_born_sharded():
    partition = make_partition(MeshConfig(fsdp=4, tensor=2))
    model = make_model(tiny_llama(layers=1), partition)
    params = jax.jit(model.init, out_shardings=partition.shardings(model.axes))(jax.random.key(0))
    query_LDNH = params["layers"]["0"]["attention"]["query_DNH"]
    assert query_LDNH.sharding.spec == jax.P(None, "fsdp", "tensor", None)
    assert query_LDNH.addressable_shards[0].data.shape == (1, 4, 2, 4)
    alone = jax.jit(make_model(tiny_llama(layers=1)).init)(jax.random.key(0))
    assert_close(params, alone, 1e-6)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(heads=3), "model.heads=3 does not divide model.width=16"),
        (dict(kv_heads=3), "model.kv_heads=3 does not divide model.heads=4"),
        (dict(head_dim=3), "should be even"),
        (dict(pattern=("local",)), "model.window"),
    ],
)
def test_impossible_shapes_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        tiny_llama(**overrides)


def test_a_mesh_must_divide_the_model():
    partition = make_partition(MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(UserError, match="model.heads=4 is not divided by the 8 devices"):
        make_model(tiny_llama(), partition)
