"""PEFT's files: what is written is read again, by their names and in their layout, and what is no use is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmlab.core.errors import UserError
from llmlab.model.adapters import AdapterConfig, add_adapter
from llmlab.model.config import ModelConfig
from llmlab.model.peft import CONFIG, TENSORS, load_peft, save_peft
from llmlab.model.routing import ExpertsConfig
from llmlab.model.transformer import make_model
from tests.helpers import assert_close, random_params, tiny_gpt2, tiny_llama

QWEN = tiny_llama(layers=3, window=6, pattern=("local", "global"), qk_norm="head")
GPT2 = tiny_gpt2(tied_embedding=False)


def built(kind="dora", include="", config: ModelConfig = QWEN, **overrides):
    model = make_model(config)
    settings = AdapterConfig(kind=kind, rank=3, alpha=5.0, include=include, **overrides)
    adapter = add_adapter(model, random_params(model), settings, jax.random.key(0))
    rng = np.random.default_rng(0)
    return model, settings, jax.tree.map(lambda x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype), adapter)


@pytest.mark.parametrize("config, include", [(QWEN, "query|up_DF|head"), (GPT2, "out_NHD|mlp|head")])
@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_what_is_saved_is_loaded_again(kind, config, include, tmp_path):
    model, settings, adapter = built(kind, include, config, rslora=True)
    save_peft(model, adapter, settings, tmp_path / "a")
    again, found = load_peft(model, tmp_path / "a")
    assert_close(again, adapter, 0)
    expected = "|".join(path.replace(".", r"\.") for path in sorted(adapter, key=list(again).index))
    assert found == dataclasses.replace(settings, include=f"^({expected})$")
    assert add_adapter(model, random_params(model), found, jax.random.key(0)).keys() == adapter.keys()


def test_names_and_layout_are_pefts(tmp_path):
    model, settings, adapter = built(include=r"(query|out|down).*")
    save_peft(model, adapter, settings, tmp_path, base_model="some/qwen")
    tensors = load_file(tmp_path / TENSORS)
    about = json.loads((tmp_path / CONFIG).read_text())
    assert len(tensors) == 3 * 3 * 3
    # The third layer is the second of the first slot of the pattern.
    place = "base_model.model.model.layers.2"
    out, query = (adapter[f"layers.0.attention.{name}"] for name in ("out_NHD", "query_DNH"))
    np.testing.assert_array_equal(tensors[f"{place}.self_attn.o_proj.lora_A.weight"], out.a[1].reshape(16, 3).T)
    np.testing.assert_array_equal(tensors[f"{place}.self_attn.o_proj.lora_B.weight"], out.b[1].T)
    np.testing.assert_array_equal(tensors[f"{place}.self_attn.o_proj.lora_magnitude_vector"], out.magnitude[1])
    np.testing.assert_array_equal(tensors[f"{place}.self_attn.q_proj.lora_A.weight"], query.a[1].T)
    np.testing.assert_array_equal(tensors[f"{place}.self_attn.q_proj.lora_B.weight"], query.b[1].reshape(3, 16).T)
    assert about["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    assert (about["r"], about["lora_alpha"], about["use_dora"], about["peft_type"]) == (3, 5.0, True, "LORA")
    assert about["base_model_name_or_path"] == "some/qwen"
    assert not about["fan_in_fan_out"]


def test_where_their_weights_are_turned_the_adapter_is_not(tmp_path):
    model, settings, adapter = built("lora", "up_DF", GPT2)
    save_peft(model, adapter, settings, tmp_path)
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    np.testing.assert_array_equal(load_file(tmp_path / TENSORS)[name], adapter["layers.0.mlp.up_DF"].b[1].T)
    assert json.loads((tmp_path / CONFIG).read_text())["fan_in_fan_out"]


def test_layers_of_one_kind_alone_are_named_in_full(tmp_path):
    model, settings, adapter = built("lora", include=r"layers\.1\..*query")
    save_peft(model, adapter, settings, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    again, _ = load_peft(model, tmp_path)
    assert_close(again, adapter, 0)


def test_bfloat16_is_read(tmp_path):
    model, settings, adapter = built("lora", include="query")
    save_peft(model, adapter, settings, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    save_file({name: array.astype(jnp.bfloat16) for name, array in tensors.items()}, tmp_path / TENSORS)
    again, _ = load_peft(model, tmp_path)
    assert_close(again, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), adapter), 0)


def test_what_is_no_linear_layer_of_its_own_there_is_refused(tmp_path):
    model, settings, adapter = built("lora", "query|mlp", GPT2)
    words = r"layers\.0\.attention\.query_DNH is no linear layer .* but part of transformer\.h\.0\.attn\.c_attn"
    with pytest.raises(UserError, match=words):
        save_peft(model, adapter, settings, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    model, settings, adapter = built("lora", "mlp", GPT2)
    save_peft(model, adapter, settings, tmp_path / "b")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    change_tensors(tmp_path / "b", lambda tensors: tensors.update({name: np.zeros((3, 16), np.float32)}))
    with pytest.raises(UserError, match=words):
        load_peft(model, tmp_path / "b")
    model, settings, adapter = built("lora", "mlp", tiny_llama(experts=ExpertsConfig(count=4)))
    with pytest.raises(UserError):
        save_peft(model, adapter, settings, tmp_path / "c")


def change(folder, **values):
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(about | values))


def change_tensors(folder, edit):
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


A_OF_LAYER_1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / CONFIG).unlink(), "is no PEFT adapter"),
        (lambda f: (f / TENSORS).unlink(), "is no PEFT adapter"),
        (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
        (lambda f: (f / TENSORS).write_bytes(b"12345678"), "cannot be read"),
        (lambda f: change(f, peft_type="LOHA"), "peft_type='LOHA'"),
        (lambda f: change(f, rank_pattern={"q_proj": 3}), "rank_pattern="),
        (lambda f: change(f, bias="all"), "bias='all'"),
        (lambda f: change(f, init_lora_weights="pissa_niter_16"), "init_lora_weights='pissa_niter_16'"),
        (lambda f: change(f, use_dora=True), "holds no .*lora_magnitude_vector"),
        (lambda f: change(f, r=4), r"lora_A\.weight is \(3, 16\) in .* and \(4, 16\) for this model"),
        (lambda f: change_tensors(f, lambda t: t.pop(A_OF_LAYER_1.replace("_A", "_B"))), r"holds no .*lora_B\.weight"),
        (lambda f: change_tensors(f, lambda t: t.update(x=t[A_OF_LAYER_1])), "holds x, which is no part"),
        (
            lambda f: change_tensors(
                f, lambda t: [t.pop(A_OF_LAYER_1.replace("1", "0").replace("_A", x)) for x in ("_A", "_B")]
            ),
            r"adapts layers\.0\.attention\.query_DNH in 1 of 2 layers",
        ),
    ],
)
def test_what_is_no_use_is_refused_in_one_line(spoil, words, tmp_path):
    model, settings, adapter = built("lora", include="query")
    save_peft(model, adapter, settings, tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_peft(model, tmp_path)
    assert "\n" not in str(caught.value)
