"""Reward models against transformers' ForSequenceClassification, and adapters over them against PEFT's."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import math
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.model import hf
from llmlab.model.adapters import AdapterConfig, adapted, add_adapter
from llmlab.model.families import FAMILIES
from llmlab.model.peft import is_scorer, load_peft, save_peft
from llmlab.model.types import Inputs
from tests.helpers import relative
from tests.test_parity_hf import LENGTHS, MODELS, TIME, VOCAB

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")
peft = pytest.importorskip("peft", reason="`make test-parity` installs it")

NAMES = [name for name in MODELS if "mamba" not in name]
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3TextForSequenceClassification")}
LAST_B = np.array(LENGTHS) - 1
MASK_BT = np.arange(TIME)[None] <= LAST_B[:, None]
TOKENS_BT = np.random.default_rng(0).integers(1, VOCAB, MASK_BT.shape) * MASK_BT


def theirs(name):
    """Their model with weights large enough that every setting moves the score."""
    family, settings = MODELS[name]
    config_name, model_name = CLASSES.get(family, (f"{family}Config", f"{family}ForSequenceClassification"))
    settings = settings | dict(pad_token_id=0, num_labels=1, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**settings)).eval()
    for weight in model.parameters():
        spread = 0.3 if weight.ndim == 1 else 1.0 / math.sqrt(weight.shape[-1])
        weight.data = (weight.data if weight.ndim == 1 else 0.0) + spread * torch.randn_like(weight)
    return model


def their_scores(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT), attention_mask=torch.tensor(MASK_BT).long()).logits[:, 0].numpy()


def our_scores(model, params):
    positions_BT = np.broadcast_to(np.arange(TIME, dtype=np.int32), TOKENS_BT.shape)
    inputs = Inputs(*(jnp.asarray(x, jnp.int32) for x in (TOKENS_BT, positions_BT, MASK_BT)))
    score_BT = jax.jit(lambda params: model.score(params, model.apply(params, inputs).hidden_BTD))(params)
    return np.asarray(score_BT)[np.arange(len(LAST_B)), LAST_B]


def reread(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_score_of_the_last_token_is_theirs_and_back(name, tmp_path):
    model = theirs(name)
    expected_B = their_scores(model)
    assert np.abs(expected_B).max() > 0.3
    model.save_pretrained(tmp_path / "theirs")
    ours, params = hf.load(tmp_path / "theirs")
    assert ours.config.head == "score"
    np.testing.assert_array_equal(params["head"]["score_D"], model.score.weight[0].detach())
    assert relative(our_scores(ours, params), expected_B) < 1e-5
    tokenizer = CharacterTokenizer(string.printable[: VOCAB - 4])
    hf.save(ours, params, tmp_path / "ours", tokenizer)
    again = reread(tmp_path / "ours")
    assert type(again).__name__ == type(model).__name__.replace("Phi3", "Mistral")
    assert (again.config.num_labels, again.config.problem_type) == (1, None)
    assert again.config.pad_token_id == tokenizer.pad_id
    # Theirs is padded with 0, and finds its last token by that.
    again.config.pad_token_id = 0
    assert relative(their_scores(again), expected_B) < 1e-5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_the_class_is_the_one_that_transformers_takes(family):
    known = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert family.scorer == known.get(family.model_type, "")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_goes_to_peft_and_back(kind, tmp_path):
    model = theirs("qwen3")
    model.save_pretrained(tmp_path / "model")
    ours, params = hf.load(tmp_path / "model")
    config = AdapterConfig(kind=kind, rank=4, alpha=6.0)
    rng = np.random.default_rng(1)
    adapter = jax.jit(lambda key: add_adapter(ours, params, config, key))(jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), adapter)
    save_peft(ours, adapter, config, tmp_path / "ours")
    expected_B = our_scores(ours, adapted(params, adapter))
    loaded = peft.PeftModel.from_pretrained(reread(tmp_path / "model"), str(tmp_path / "ours")).eval()
    assert type(loaded).__name__ == "PeftModelForSequenceClassification"
    assert relative(their_scores(loaded), expected_B) < 1e-5
    assert relative(their_scores(model), expected_B) > 0.1
    loaded.save_pretrained(str(tmp_path / "theirs"))
    assert is_scorer(tmp_path / "theirs")
    again, _ = load_peft(ours, tmp_path / "theirs")
    assert relative(our_scores(ours, adapted(params, again)), expected_B) < 1e-6
