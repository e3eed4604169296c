"""The loss by its formula, in float64, with garbage wherever the mask is 0."""

import jax
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.model.transformer import make_model
from llmlab.objective import NextTokenConfig
from tests.helpers import VOCAB, packed_batch, random_params, tiny_llama

BYTES_V = np.arange(VOCAB, dtype=np.int32) % 5


@pytest.mark.parametrize("logprobs", ["plain", "chunked"])
def test_loss_and_bits_per_byte_by_their_formulas(logprobs):
    model = make_model(tiny_llama(logit_softcap=4.0))
    params = random_params(model)
    batch = packed_batch(rows=3, length=8)
    config = NextTokenConfig(z_loss=0.01, logprobs=logprobs)
    total, metrics = jax.jit(lambda p, b: config.make(model, BYTES_V)(p, b, None))(params, batch)

    hidden_BTD = np.asarray(jax.jit(model.apply)(params, _inputs(batch)).hidden_BTD, np.float64)
    logits_BTV = 4.0 * np.tanh(hidden_BTD @ np.asarray(model.head(params), np.float64) / 4.0)
    logz_BT = np.log(np.exp(logits_BTV).sum(-1))
    logp_BT = np.take_along_axis(logits_BTV, np.asarray(batch.targets_BT)[..., None], -1)[..., 0] - logz_BT
    nats = -(logp_BT * batch.mask_BT).sum()
    z = (logz_BT**2 * batch.mask_BT).sum()
    assert float(total.sum) == pytest.approx(nats + 0.01 * z, rel=1e-5)
    assert float(total.weight) == batch.mask_BT.sum()
    assert metrics["loss"].value() == pytest.approx(nats / batch.mask_BT.sum(), rel=1e-5)
    bytes_BT = BYTES_V[batch.targets_BT] * batch.mask_BT
    assert (bytes_BT[np.asarray(batch.mask_BT) > 0] == 0).any()  # such as the ends of documents
    bits_per_byte = -logp_BT[bytes_BT > 0].sum() / np.log(2) / bytes_BT.sum()
    assert metrics["bits_per_byte"].value() == pytest.approx(bits_per_byte, rel=1e-5)


def test_what_is_masked_moves_nothing():
    model = make_model(tiny_llama())
    params = random_params(model)
    run = jax.jit(jax.value_and_grad(lambda p, b: NextTokenConfig().make(model, BYTES_V)(p, b, None)[0].sum))
    batch = packed_batch(rows=4, length=8)
    hidden = np.asarray(batch.mask_BT) == 0
    assert hidden.any()
    garbage = batch._replace(
        targets_BT=np.where(hidden, VOCAB - 1, batch.targets_BT), tokens_BT=np.where(hidden, 3, batch.tokens_BT)
    )
    (clean, clean_gradient), (dirty, dirty_gradient) = run(params, batch), run(params, garbage)
    assert float(clean) == float(dirty)
    jax.tree.map(np.testing.assert_array_equal, clean_gradient, dirty_gradient)


def test_a_negative_z_loss_is_refused():
    with pytest.raises(UserError, match="objective.z_loss"):
        NextTokenConfig(z_loss=-1.0)


def _inputs(batch):
    from llmlab.model.types import Inputs

    return Inputs(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
