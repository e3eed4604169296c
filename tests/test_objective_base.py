"""Every objective as a config section, and the router's part of the total."""

import jax.numpy as jnp
import pytest

from llmlab.core.arrays import Mean
from llmlab.core.config import from_config_dict, to_config_dict
from llmlab.model.routing import BALANCE_LOSS, LOAD, Z_LOSS, ExpertsConfig
from llmlab.model.transformer import make_model
from llmlab.objective import OBJECTIVES
from llmlab.objective.base import total
from tests.helpers import tiny_llama


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_section_goes_through_a_config_dict_and_says_its_rows(name):
    cls = OBJECTIVES[name]
    section = to_config_dict(cls())
    assert section["name"] == name
    assert from_config_dict(cls, section, "objective") == cls()
    assert set(cls.rows) <= {"text", "chat", "preference", "ranking", "binary", "steps"}
    assert cls.rows
    assert cls().needs_reference == (name in ("preference", "kto"))
    assert (cls().before(make_model(tiny_llama(layers=1))) is not None) == (name == "kto")


def test_kinds_without_a_reference_need_none():
    assert not OBJECTIVES["preference"](kind="orpo").needs_reference


def test_the_routers_loss_counts_for_every_unit_of_weight():
    experts = ExpertsConfig(count=4, balance_loss=0.5, z_loss=0.25)
    model = make_model(tiny_llama(layers=1, experts=experts))
    aux = {BALANCE_LOSS: Mean(jnp.asarray(6.0), 2.0), Z_LOSS: Mean(jnp.asarray(8.0), 2.0), LOAD: Mean(jnp.ones(4), 1.0)}
    loss = Mean(jnp.asarray(10.0), jnp.asarray(3.0))
    assert total(model, loss, {}) == loss
    found = total(model, loss, aux)
    assert (float(found.sum), float(found.weight)) == (10 + 3 * (0.5 * 3 + 0.25 * 4), 3)
