"""The same numbers as Hugging Face's PEFT over transformers' models: their adapters here, and ours there."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.model import hf
from llmlab.model.adapters import AdapterConfig, adapted, add_adapter
from llmlab.model.peft import load_peft, save_peft
from llmlab.model.transformer import make_model
from tests.helpers import VOCAB, random_params, relative, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")
peft = pytest.importorskip("peft", reason="`make test-parity` installs it")

KINDS = ("lora", "dora")
CONFIGS = {"llama": tiny_llama(), "gpt2": tiny_gpt2()}
# GPT-2 keeps queries, keys and values in one layer, which an adapter of ours is not for.
INCLUDED = {"llama": r"^layers\.", "gpt2": "out_NHD|mlp"}
TOKENS_BT = np.random.default_rng(0).integers(VOCAB, size=(2, 11))


def both(family, folder):
    """(our model, its weights, transformers' model with the same)."""
    model = make_model(CONFIGS[family])
    params = random_params(model)
    hf.save(model, params, folder)
    return model, params, transformers.AutoModelForCausalLM.from_pretrained(str(folder)).eval()


def their_logits(theirs):
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS_BT)).logits.numpy()


def our_logits(model, params):
    return jax.jit(model.logits)(params, TOKENS_BT)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_loads_ours(family, kind, rslora, tmp_path):
    model, params, theirs = both(family, tmp_path / "model")
    config = AdapterConfig(kind=kind, rank=4, alpha=6.0, rslora=rslora, include=INCLUDED[family])
    adapter = add_adapter(model, params, config, jax.random.key(0))
    rng = np.random.default_rng(1)
    adapter = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), adapter)
    save_peft(model, adapter, config, tmp_path / "adapter")
    before = their_logits(theirs)
    loaded = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    ours = our_logits(model, adapted(params, adapter))
    assert relative(ours, their_logits(loaded)) < 1e-5
    assert relative(ours, before) > 0.1
    assert relative(ours, their_logits(loaded.merge_and_unload())) < 1e-5


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    "family, names, count",
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 7),
        ("llama", ["q_proj", "down_proj", "lm_head"], 3),
        ("gpt2", ["c_fc", "c_proj"], 3),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_pefts(family, kind, names, count, tmp_path):
    model, params, theirs = both(family, tmp_path / "model")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, use_dora=kind == "dora", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs, settings).eval()
    at_first = their_logits(wrapped)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight += 0.3 * torch.randn_like(weight)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    adapter, config = load_peft(model, tmp_path / "adapter")
    assert (config.kind, config.rank, config.alpha) == (kind, 4, 6.0)
    assert len(adapter) == count
    expected = their_logits(wrapped)
    assert relative(our_logits(model, adapted(params, adapter)), expected) < 1e-5
    assert relative(expected, at_first) > 0.1
