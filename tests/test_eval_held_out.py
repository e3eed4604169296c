import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.arrays import Mean
from llmlab.core.errors import UserError
from llmlab.core.mesh import MeshConfig, make_partition
from llmlab.data.pipeline import TokenBatch
from llmlab.eval.held_out import make_evaluator
from llmlab.model.config import ModelConfig
from llmlab.model.transformer import make_model
from llmlab.objective import NextTokenConfig

V, ROWS, T = 11, 8, 12
CONFIG = ModelConfig(width=16, layers=1, heads=2, vocab_size=V, max_positions=T)
TOKEN_BYTES_V = np.arange(V, dtype=np.int32) % 4


def make_rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (ROWS, T + 1)).astype(np.int32)
    mask_BT = (rng.random((ROWS, T)) < 0.7).astype(np.float32)
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
    return TokenBatch(ids[:, :-1], ids[:, 1:], mask_BT, positions_BT, np.ones((ROWS, T), np.int32))


def in_batches(rows, size):
    """Batches of `size`, the last one filled up with rows of padding."""
    for begin in range(0, ROWS, size):
        parts = [array[begin : begin + size] for array in rows]
        yield TokenBatch(*[np.pad(part, ((0, size - len(part)), (0, 0))) for part in parts])


@pytest.fixture(scope="module")
def trained():
    model = make_model(CONFIG)
    return model, jax.jit(model.init)(jax.random.key(0)), make_rows()


def truth(model, params, rows):
    logits_BTV = np.asarray(jax.jit(model.logits)(params, rows.tokens_BT), np.float64)
    logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    logp_BT = np.take_along_axis(logp_BTV, rows.targets_BT[..., None], -1)[..., 0]
    nats = -(logp_BT * rows.mask_BT).sum()
    bytes_BT = TOKEN_BYTES_V[rows.targets_BT] * rows.mask_BT
    return nats / rows.mask_BT.sum(), -logp_BT[bytes_BT > 0].sum() / np.log(2) / bytes_BT.sum()


def test_loss_and_bits_per_byte_are_those_of_the_logits_in_float64(trained):
    model, params, rows = trained
    scores = make_evaluator(NextTokenConfig().make(model, TOKEN_BYTES_V))(params, in_batches(rows, 4))
    loss, bits_per_byte = truth(model, params, rows)
    np.testing.assert_allclose(scores["loss"], loss, rtol=2e-6)
    np.testing.assert_allclose(scores["bits_per_byte"], bits_per_byte, rtol=2e-6)
    np.testing.assert_allclose(scores["perplexity"], np.exp(loss), rtol=2e-5)


def test_z_loss_is_no_part_of_the_held_out_loss(trained):
    model, params, rows = trained
    scores = make_evaluator(NextTokenConfig(z_loss=0.1).make(model, TOKEN_BYTES_V))(params, in_batches(rows, 8))
    np.testing.assert_allclose(scores["loss"], truth(model, params, rows)[0], rtol=2e-6)


@pytest.mark.parametrize("size", [1, 3, 5])  # 3 and 5 leave padding in the last batch
def test_batch_size_and_padding_change_nothing(trained, size):
    model, params, rows = trained
    evaluate = make_evaluator(NextTokenConfig().make(model, TOKEN_BYTES_V))
    whole, parts = evaluate(params, in_batches(rows, ROWS)), evaluate(params, in_batches(rows, size))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, err_msg=name)


def test_a_mesh_gives_the_loss_of_one_device(trained):
    model, params, rows = trained
    partition = make_partition(MeshConfig(data=4, fsdp=2))
    meshed = make_model(CONFIG, partition)
    evaluate = make_evaluator(NextTokenConfig().make(meshed, TOKEN_BYTES_V), partition)
    sharding = partition.sharding("batch", "time")
    batches = [TokenBatch(*jax.device_put(tuple(batch), sharding)) for batch in in_batches(rows, 8)]
    scores = evaluate(jax.device_put(params, partition.shardings(meshed.axes)), batches)
    np.testing.assert_allclose(scores["loss"], truth(model, params, rows)[0], rtol=2e-6)


def test_sums_of_batches_are_added_in_float64():
    large = 2.0**24  # where float32 no longer counts by ones

    def loss(params, batch, key):
        total = Mean(jnp.sum(batch.mask_BT), jnp.float32(1))
        return total, {"loss": total}

    batches = [TokenBatch(*[np.full((1, 1), value, np.float32)] * 5) for value in [large, *[1.0] * 6]]
    assert make_evaluator(loss)({}, batches)["loss"] == (large + 6) / 7


def test_it_compiles_once_for_all_batches_and_evaluations(trained):
    model, params, rows = trained
    inner, traces = NextTokenConfig().make(model, TOKEN_BYTES_V), []

    def loss(params, batch, key):
        traces.append(1)
        return inner(params, batch, key)

    evaluate = make_evaluator(loss)
    evaluate(params, in_batches(rows, 3))
    evaluate(params, in_batches(rows, 3))
    assert len(traces) == 1


def test_no_text_is_an_error_and_a_hopeless_loss_is_not(trained):
    model, params, rows = trained
    evaluate = make_evaluator(NextTokenConfig().make(model, TOKEN_BYTES_V))
    with pytest.raises(UserError, match="no held-out text"):
        evaluate(params, [])
    with pytest.raises(UserError, match="no held-out text"):
        evaluate(params, [rows._replace(mask_BT=np.zeros_like(rows.mask_BT))])

    one = jnp.float32(1)
    metrics = {"loss": Mean(jnp.float32(1e4), one), "bits_per_byte": Mean(one, one)}
    hopeless = make_evaluator(lambda params, batch, key: (None, metrics))
    assert hopeless(params, [rows]) == {"loss": 1e4, "perplexity": float("inf"), "bits_per_byte": 1.0}
