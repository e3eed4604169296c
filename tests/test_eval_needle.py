"""The needle test, with a model that copies what followed the last time: it finds what it can look back to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.eval.needle import NeedleConfig, needle, text_table
from llmlab.model.transformer import make_model
from llmlab.model.types import Out
from tests.helpers import tiny_llama

TOKENIZER = CharacterTokenizer("".join(map(chr, range(32, 127))) + "\n")
HAY = TOKENIZER.encode("of all the ways to say it, this one is the plainest; " * 40)


def copier(reach: int, memory: int = 14):
    """Predicts what followed the latest earlier place with the same last `memory` tokens, up to `reach` tokens back."""
    config = tiny_llama(vocab_size=TOKENIZER.vocab_size, max_positions=512)

    def apply(params, inputs, **_):
        tokens_BT = inputs.tokens_BT
        T = tokens_BT.shape[1]
        same_BTT = tokens_BT[:, :, None] == tokens_BT[:, None, :]
        run_BTT = same_BTT
        for _ in range(memory - 1):
            run_BTT = same_BTT & jnp.pad(run_BTT, ((0, 0), (1, 0), (1, 0)))[:, :-1, :-1]
        ago_TT = jnp.arange(T)[:, None] - jnp.arange(T)[None]
        seen_BTT = run_BTT & ((ago_TT > 0) & (ago_TT <= reach))[None]
        last_BT = jnp.max(jnp.where(seen_BTT, jnp.arange(T)[None, None], -1), axis=-1)
        next_BT = jnp.take_along_axis(tokens_BT, jnp.clip(last_BT + 1, 0, T - 1), axis=1)
        known_BT1 = (last_BT >= 0)[..., None]
        hidden_BTV = jnp.where(known_BT1, 20.0 * jax.nn.one_hot(next_BT, TOKENIZER.vocab_size), 0.0)
        return Out(hidden_BTV, None, {})

    return make_model(config)._replace(apply=apply, head=lambda params: jnp.eye(TOKENIZER.vocab_size))


def test_a_needle_is_found_as_far_back_as_the_model_looks():
    config = NeedleConfig(lengths=(128, 384), depths=3, samples=4)
    everything = needle(copier(reach=512), {}, TOKENIZER, HAY, config)
    assert everything["found"] == [[1.0, 1.0]] * 3
    assert np.max(everything["nats"]) < 1e-3
    near = needle(copier(reach=150), {}, TOKENIZER, HAY, config)
    assert near["found"] == [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert near["nats"][0][1] > 2
    assert "at depth 100%      100%    100%" in text_table(near)


class SpaceFirst:
    """As SentencePiece with add_dummy_prefix (Llama 2, Mistral): a text begins with a space that is not there."""

    bos_id, vocab_size = TOKENIZER.bos_id, TOKENIZER.vocab_size

    def encode(self, text: str) -> list[int]:
        return TOKENIZER.encode(" " + text)


def test_the_answer_is_spelt_as_it_goes_on_in_the_text():
    config = NeedleConfig(lengths=(200,), depths=2, samples=2)
    assert needle(copier(reach=512), {}, SpaceFirst(), HAY, config)["found"] == [[1.0], [1.0]]


def test_each_sample_hides_another_needle_and_a_seed_repeats_them():
    config = NeedleConfig(lengths=(200,), depths=1, samples=8)
    half = dataclasses.replace(config, seed=3)
    blind = copier(reach=0)
    assert needle(blind, {}, TOKENIZER, HAY, config)["found"] == [[0.0]]
    first, again = (needle(copier(reach=110), {}, TOKENIZER, HAY, half) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("length, said", [(16, "should be from"), (513, "max_positions=512")])
def test_a_length_that_cannot_be_is_refused(length, said):
    with pytest.raises(UserError, match=said):
        needle(copier(reach=512), {}, TOKENIZER, HAY, NeedleConfig(lengths=(length,)))


def test_a_text_too_short_is_refused():
    with pytest.raises(UserError, match="has 300 tokens only"):
        needle(copier(reach=512), {}, TOKENIZER, HAY[:300], NeedleConfig(lengths=(400,)))
