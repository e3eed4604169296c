"""Which model the reference is: the weights under the adapter, or the one whose log-probabilities are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.model.adapters import AdapterConfig, adapted, add_adapter, without_adapter
from llmlab.model.transformer import make_model
from llmlab.objective.preference import PreferenceConfig
from llmlab.objective.responses import response_logps, response_scores
from tests.groups import hidden_model, hidden_params, numpy_logps, numpy_scores, packed, places, random_groups
from tests.helpers import assert_close, random_params, tiny_llama

GROUPS = random_groups(4, 2)
ROWS = [GROUPS[:3], GROUPS[3:]]


def test_a_response_has_the_log_probability_of_what_is_said_and_the_score_of_its_last_token():
    batch = packed(ROWS, 48, 2)
    params = hidden_params(batch)
    spots = [(place.row, place.end - 1) for group in places(ROWS) for place in group]
    with jax.enable_x64(True):
        logp_BPR, _ = jax.jit(lambda p: response_logps(hidden_model(), p, batch))(params)
        score_BPR, _ = jax.jit(lambda p: response_scores(hidden_model(), p, batch))(params)
    is_there_BPR = batch.present_BPR > 0
    np.testing.assert_allclose(
        np.asarray(logp_BPR)[is_there_BPR], numpy_logps(params, GROUPS, ROWS).ravel(), rtol=1e-10
    )
    np.testing.assert_allclose(np.asarray(score_BPR)[is_there_BPR], numpy_scores(params, spots), rtol=1e-10)
    assert not np.any(np.asarray(logp_BPR)[~is_there_BPR])
    assert not np.any(np.asarray(score_BPR)[~is_there_BPR])


def test_the_reference_under_an_adapter_is_the_base_and_no_gradient_reaches_it():
    model, config = make_model(tiny_llama(layers=1)), AdapterConfig(kind="dora", rank=3, include="mlp")
    base = random_params(model)
    adapter = jax.jit(lambda key: add_adapter(model, base, config, key))(jax.random.key(1))
    over = adapted(base, adapter)
    assert_close(without_adapter(over), base, 0)
    total = jax.jit(jax.grad(lambda p: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(without_adapter(p)))))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(total(over)))


def test_a_stored_reference_serves_as_the_one_under_the_adapter():
    model, config = make_model(tiny_llama(layers=1)), AdapterConfig(kind="lora", rank=3)
    base = random_params(model)
    batch = packed([GROUPS[:2], GROUPS[2:]], 64, 2)

    def losses(key):
        adapter = jax.tree.map(lambda x: x + 0.1, add_adapter(model, base, config, key))
        stored = batch._replace(reference_BPR=response_logps(model, base, batch)[0])
        return {
            reference: PreferenceConfig(reference=reference).make(model, None)(adapted(base, adapter), stored, None)[0]
            for reference in ("auto", "adapter", "stored")
        }

    found = {reference: float(total.sum) for reference, total in jax.jit(losses)(jax.random.key(1)).items()}
    assert found["auto"] == found["adapter"]
    assert found["stored"] == pytest.approx(found["adapter"], rel=1e-5)
    assert abs(found["stored"] - 4 * np.log(2)) > 1e-3


def test_a_reference_under_no_adapter_is_refused():
    batch = packed([GROUPS], 64, 2)
    with pytest.raises(UserError, match="the weights under an adapter, and there is none"):
        PreferenceConfig(reference="adapter").make(hidden_model(), None)(hidden_params(batch), batch, None)
