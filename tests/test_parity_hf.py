"""Every family against transformers: tiny random models that it saved, loaded here, and ours loaded there.

Inputs are longer than the windows and than the original rotary length, and padded.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.data.tokenizer import PROBE, TokenizerConfig
from llmlab.data.tokenizer_imported import export_tokenizer
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.infer.generate import generate
from llmlab.model import hf
from llmlab.model.families import FAMILIES
from llmlab.model.hf_weights import places
from llmlab.model.matrices import leaf_at
from llmlab.model.rope import RopeConfig
from llmlab.model.routing import BALANCE_LOSS, LOAD
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Inputs, inputs
from tests.helpers import assert_close, host, random_params

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")

VOCAB, TIME, WINDOW = 97, 40, 7
LENGTHS = (TIME, 29)
SHAPE = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4)
GROUPED = dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, bos_token_id=None)
HEAD = dict(head_dim=16)
LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def rope(theta: float = 500.0, kind: str = "default", **more) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


OLMO3_ROPE = dict(
    full_attention=dict(
        rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16, attention_factor=1.1
    ),
    sliding_attention=dict(rope_type="default", rope_theta=500.0),
)
MIXTURE = dict(moe_intermediate_size=20, num_experts_per_tok=3)
DEEPSEEK: dict = dict(
    **MIXTURE,
    **GROUPED | dict(num_key_value_heads=4),
    **dict(n_routed_experts=8, n_shared_experts=2, n_group=4, topk_group=2, first_k_dense_replace=1),
    **dict(kv_lora_rank=12, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=10),
)
MAMBA = dict(
    **dict(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_heads=12, head_dim=8, state_size=6, chunk_size=8),
    **dict(pad_token_id=0, eos_token_id=None, bos_token_id=None, layer_norm_epsilon=1e-3),
)

# Model of transformers -> its settings.
MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=64)),
    "gpt2 untied, wide": (
        "GPT2",
        dict(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=64, n_inner=80, tie_word_embeddings=False),
    ),
    "llama": ("Llama", SHAPE | GROUPED | rope()),
    "llama 3": ("Llama", SHAPE | GROUPED | HEAD | rope(500.0, "llama3", factor=8.0, **LLAMA3)),
    "llama yarn": (
        "Llama",
        SHAPE
        | GROUPED
        | HEAD
        | rope(500.0, "yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5),
    ),
    "llama linear, biased, tied": (
        "Llama",
        SHAPE
        | GROUPED
        | rope(500.0, "linear", factor=2.0)
        | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    ),
    "llama with attention bias": ("Llama", SHAPE | GROUPED | rope() | dict(attention_bias=True)),
    "mistral": ("Mistral", SHAPE | GROUPED | rope() | dict(sliding_window=WINDOW)),
    "qwen2": (
        "Qwen2",
        SHAPE | GROUPED | rope() | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    ),
    "qwen3": ("Qwen3", SHAPE | GROUPED | HEAD | rope() | dict(tie_word_embeddings=True)),
    "olmo2": ("Olmo2", SHAPE | GROUPED | rope()),
    "gemma2": (
        "Gemma2",
        SHAPE
        | GROUPED
        | HEAD
        | rope()
        | dict(
            sliding_window=WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=3.0, final_logit_softcapping=4.0
        ),
    ),
    "gemma3": (
        "Gemma3",
        SHAPE
        | GROUPED
        | HEAD
        | dict(
            num_hidden_layers=7,
            sliding_window=WINDOW,
            query_pre_attn_scalar=24,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0),
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
            ),
        ),
    ),
    "olmo3": ("Olmo3", SHAPE | GROUPED | dict(sliding_window=WINDOW, rope_parameters=OLMO3_ROPE)),
    "phi3": ("Phi3", SHAPE | GROUPED | rope() | dict(sliding_window=WINDOW)),
    "mixtral": ("Mixtral", SHAPE | GROUPED | rope() | dict(num_local_experts=6)),
    "qwen3 moe": (
        "Qwen3Moe",
        SHAPE | GROUPED | HEAD | MIXTURE | rope() | dict(num_experts=6, norm_topk_prob=True, mlp_only_layers=[0]),
    ),
    "qwen3 moe, weights as they are, window": (
        "Qwen3Moe",
        SHAPE | GROUPED | HEAD | MIXTURE | rope() | dict(num_experts=6, use_sliding_window=True, sliding_window=WINDOW),
    ),
    "gpt-oss": (
        "GptOss",
        SHAPE
        | GROUPED
        | HEAD
        | dict(num_local_experts=6, num_experts_per_tok=2, sliding_window=WINDOW)
        | rope(
            *(500.0, "yarn"),
            **dict(factor=8.0, beta_fast=4.0, beta_slow=0.5, truncate=False, original_max_position_embeddings=32),
        ),
    ),
    "deepseek": ("DeepseekV3", SHAPE | DEEPSEEK | rope() | dict(q_lora_rank=14, rms_norm_eps=1e-3)),
    "deepseek yarn, pairs by halves": (
        "DeepseekV3",
        SHAPE
        | DEEPSEEK
        | dict(q_lora_rank=None, rope_interleave=False)
        | rope(
            *(500.0, "yarn"),
            **dict(factor=40.0, original_max_position_embeddings=16, beta_fast=8, beta_slow=1),
            **dict(mscale=1.0, mscale_all_dim=0.7),
        ),
    ),
    "mamba2": ("Mamba2", MAMBA | dict(n_groups=2, time_step_limit=(0.4, 0.9), use_bias=True, tie_word_embeddings=True)),
    "mamba2 without biases": ("Mamba2", MAMBA | dict(n_groups=4, conv_kernel=3, use_conv_bias=False)),
}
CLASSES = {"GPT2": ("GPT2Config", "GPT2LMHeadModel"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}


def theirs(name: str):
    """Their model with weights large enough that every setting moves the logits."""
    family, settings = MODELS[name]
    config_name, model_name = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config = getattr(transformers, config_name)(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    for weight_name, weight in model.named_parameters():
        spread = 0.3 if weight.ndim == 1 else 1.5 / math.sqrt(weight.shape[-1])
        base = weight.data if weight.ndim == 1 else 0.0
        weight.data = base + spread * torch.randn_like(weight)
        if "embed" in weight_name or "wte" in weight_name:
            weight.data /= 2.0 if "Gemma" in family else 1.5
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn_like(buffer))
    return model


@functools.cache
def saved(name: str, root: str):
    """(folder, tokens_BT, mask_BT, their logits_BTV)."""
    model = theirs(name)
    folder = os.path.join(root, name.replace(" ", "_"))
    model.save_pretrained(folder)
    tokens_BT = np.random.default_rng(0).integers(1, VOCAB, (len(LENGTHS), TIME))
    mask_BT = np.arange(TIME)[None] < np.array(LENGTHS)[:, None]
    return folder, tokens_BT, mask_BT, their_logits(model, tokens_BT, mask_BT)


def their_logits(model, tokens_BT, mask_BT):
    with torch.no_grad():
        out = model(torch.tensor(tokens_BT).long(), attention_mask=torch.tensor(mask_BT).long())
    return out.logits.float().numpy()


def our_logits(model, params, tokens_BT, mask_BT):
    positions_BT = np.broadcast_to(np.arange(TIME, dtype=np.int32), tokens_BT.shape)
    inputs = Inputs(*(jnp.asarray(x, jnp.int32) for x in (tokens_BT, positions_BT, mask_BT)))

    def logits(params):
        return unembed(model.apply(params, inputs).hidden_BTD, model.head(params), model.config.logit_softcap)

    return np.asarray(jax.jit(logits)(params))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("theirs"))


def apart(ours_BTV, theirs_BTV, mask_BT) -> float:
    return float(np.abs(ours_BTV - theirs_BTV)[mask_BT].max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_theirs_and_back(name, root, tmp_path):
    folder, tokens_BT, mask_BT, their_BTV = saved(name, root)
    model, params = hf.load(folder)
    assert np.std(their_BTV[mask_BT]) > 0.5
    our_BTV = our_logits(model, params, tokens_BT, mask_BT)
    assert apart(our_BTV, their_BTV, mask_BT) < 1e-4
    hf.save(model, params, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    # Phi-3 is Mistral with joined weights: what was one comes out as the other.
    assert type(again).__name__ == type(theirs(name)).__name__.replace("Phi3", "Mistral")
    assert apart(their_logits(again, tokens_BT, mask_BT), their_BTV, mask_BT) < 1e-5
    config, _ = hf.read_config(tmp_path / "ours")
    assert hf.identity(config) == hf.identity(model.config)


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_tokens_through_the_cache(name, root):
    folder, tokens_BT, _, _ = saved(name, root)
    model, params = hf.load(folder)
    prompt_BT = tokens_BT[:, :20]
    out_BT = generate(model, params, prompt_BT, max_tokens=16)
    reread = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    logits_BTV = their_logits(reread, out_BT, np.ones_like(out_BT))[:, 19:-1]
    chosen_BT = np.take_along_axis(logits_BTV, out_BT[:, 20:, None], axis=-1)[..., 0]
    assert (logits_BTV.max(-1) - chosen_BT).max() < 1e-4


def in_memory(mine, name: str):
    """What transformers holds by this name: of experts that a folder has one by one, all in one."""
    if name in mine:
        return mine[name]
    mixture, _, kind = name.replace(".mlp.", ".block_sparse_moe.").partition(".experts.")
    if f"{mixture}.gate.weight" in mine and kind:
        parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
    elif kind:
        mixture, parts = name.partition(".experts.")[0], {"gate_up_proj": ("gate_proj", "up_proj")}.get(kind, (kind,))
    else:
        return mine[mixture]
    count = sum(other.startswith(f"{mixture}.experts.") for other in mine) // 3
    names = [[f"{mixture}.experts.{expert}.{part}.weight" for part in parts] for expert in range(count)]
    return np.stack([np.concatenate([mine[part] for part in expert]) for expert in names])


@pytest.mark.parametrize("name", ["llama 3", "gemma2", "mixtral", "qwen3 moe", "gpt-oss", "deepseek", "mamba2"])
def test_every_gradient_is_theirs(name, root):
    folder, tokens_BT, _, _ = saved(name, root)
    model, params = hf.load(folder)
    weights_BTV = np.random.default_rng(1).standard_normal((*tokens_BT.shape, VOCAB)).astype(np.float32)

    def loss(params):
        return jnp.sum(model.logits(params, jnp.asarray(tokens_BT, jnp.int32)) * weights_BTV)

    gradients = host(jax.jit(jax.grad(loss))(params))
    _, family = hf.read_config(folder)
    mine = {
        name: place.rule.joined([leaf_at(gradients, path)[index] for path, index, _ in place.leaves])
        for name, place in places(model, family.weights).items()
    }
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    (torch_model(torch.tensor(tokens_BT)).logits * torch.tensor(weights_BTV)).sum().backward()
    their = {name: weight.grad.numpy() for name, weight in torch_model.named_parameters()}
    assert_close({name: in_memory(mine, name) for name in their}, their, 2e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "gpt-oss", "deepseek"])
def test_every_expert_has_a_part(name, root):
    """None could be wrong unseen."""
    folder, tokens_BT, *_ = saved(name, root)
    model, params = hf.load(folder)
    out = jax.jit(model.apply)(params, inputs(jnp.asarray(tokens_BT, jnp.int32)))
    assert (np.asarray(out.aux[LOAD].sum) > 0).all()


def test_the_loss_of_balance_is_mixtrals_in_each_layer(root):
    """transformers adds up the counts of all layers first: compared on a layer, the formula is the same."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    folder, tokens_BT, *_ = saved("mixtral", root)
    model, params = hf.load(folder)
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = torch_model(torch.tensor(tokens_BT), output_router_logits=True).router_logits
    their = [float(load_balancing_loss_func((layer,), 6, 2)) for layer in logits]
    mine = jax.jit(model.apply)(params, inputs(jnp.asarray(tokens_BT, jnp.int32))).aux[BALANCE_LOSS]
    assert mine.value() == pytest.approx(np.mean(their), rel=1e-4)


# What the old spelling does not say is what the family usually has.
@pytest.mark.parametrize("name", [name for name in MODELS if "gpt2" not in name and "mamba" not in name])
def test_the_older_spelling_means_the_same(name, root, tmp_path):
    folder, *_ = saved(name, root)
    keys = json.loads(pathlib.Path(folder, "config.json").read_text())
    new = keys.pop("rope_parameters")
    if "full_attention" in new:
        keys["rope_local_base_freq"] = new["sliding_attention"]["rope_theta"]
        new = new["full_attention"]
    keys["rope_theta"] = new.pop("rope_theta")
    if (kind := new.pop("rope_type")) != "default":
        keys["rope_scaling"] = {"type" if kind == "linear" else "rope_type": kind, **new}
    else:
        keys["rope_scaling"] = None
    keys["torch_dtype"] = keys.pop("dtype")
    keys.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert hf.read_config(tmp_path) == hf.read_config(folder)


def changed(config, **fields):
    """The config with these fields, those of a section by its name: `rope_…`, `experts_…`, `latent_…`, `ssm_…`."""
    for name, value in fields.items():
        section, _, field = name.partition("_")
        if section in ("rope", "experts", "latent", "ssm"):
            name, value = section, dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{name: value})
    return config


WRONG = {
    "gpt2": [
        dict(norm_epsilon=1e-3),
        dict(activation="silu"),
        dict(bias=False),
        dict(attention_scale=0.3),
        dict(norm="rmsnorm"),
        dict(heads=8, kv_heads=8),
        dict(positions="rotary"),
    ],
    "llama": [
        dict(rope_base=510.0),
        dict(norm_epsilon=1e-3),
        dict(activation="gelu"),
        dict(rope_scaling="linear", rope_factor=2.0),
        dict(rope_scaling="ntk", rope_factor=2.0),
        dict(attention_scale=0.3),
        dict(window=30, pattern=("local",)),
        dict(positions="learned"),
        dict(scaled_embedding=True),
    ],
    "llama 3": [
        dict(rope_scaling="none"),
        dict(rope_factor=7.0),
        dict(rope_original_positions=24),
        dict(rope_low_frequency=1.5),
        dict(rope_high_frequency=3.0),
    ],
    "llama yarn": [
        dict(rope_scaling="none"),
        dict(rope_factor=3.5),
        dict(rope_magnitude=1.0),
        dict(rope_original_positions=12),
        dict(rope_beta_fast=2.0),
        dict(rope_beta_slow=1.5),
        dict(rope_truncate=False),
    ],
    "llama linear, biased, tied": [dict(bias=False), dict(rope_factor=2.1), dict(rope_scaling="ntk")],
    "llama with attention bias": [dict(attention_bias="none"), dict(attention_bias="qkv")],
    "mistral": [dict(window=WINDOW - 1), dict(window=WINDOW + 1), dict(pattern=("global",)), dict(rope_base=490.0)],
    "qwen2": [
        dict(attention_bias="none"),
        dict(window=WINDOW + 1),
        dict(pattern=("global", "local", "global", "local")),
    ],
    "qwen3": [dict(qk_norm="none"), dict(norm_epsilon=1e-4), dict(rope_base=490.0)],
    "olmo2": [
        dict(qk_norm="none"),
        dict(qk_norm="head"),
        dict(norm_before=True, norm_after=False),
        dict(activation="gelu"),
    ],
    "gemma2": [
        dict(attention_softcap=None),
        dict(attention_softcap=3.1),
        dict(logit_softcap=None),
        dict(window=WINDOW - 1),
        dict(pattern=("global", "local")),
        dict(norm_from_zero=False),
        dict(norm_after=False),
        dict(scaled_embedding=False),
        dict(attention_scale=0.0),
        dict(activation="silu"),
    ],
    "gemma3": [
        dict(rope_local_base=0.0),
        dict(rope_local_base=90.0),
        dict(rope_factor=7.0),
        dict(rope_base=4000.0),
        dict(window=WINDOW + 1),
        dict(pattern=("local", "local", "local", "local", "global")),
        dict(qk_norm="none"),
        dict(logit_softcap=5.0),
    ],
    "olmo3": [dict(rope_local_base=0.0), dict(rope_magnitude=1.0), dict(window=WINDOW + 1), dict(pattern=("local",))],
    "phi3": [dict(window=WINDOW - 1), dict(rope_base=490.0), dict(activation="gelu")],
    "mixtral": [
        dict(experts_chosen=3),
        dict(experts_normalise=False),
        dict(experts_score="sigmoid"),
        dict(experts_scale=1.1),
        dict(norm_epsilon=1e-3),
    ],
    "qwen3 moe": [dict(experts_normalise=False), dict(experts_chosen=2), dict(qk_norm="none")],
    "qwen3 moe, weights as they are, window": [dict(experts_normalise=True), dict(window=WINDOW + 1)],
    "gpt-oss": [
        dict(attention_sinks=False),
        dict(activation="silu"),
        dict(experts_bias=False),
        dict(experts_normalise=False),
        dict(window=WINDOW + 1),
        dict(pattern=("global", "local")),
        dict(rope_truncate=True),
        dict(rope_magnitude=1.0),
        dict(attention_bias="qkv"),
    ],
    "deepseek": [
        dict(rope_interleaved=False),
        dict(experts_score="softmax"),
        dict(experts_chosen_groups=4),
        dict(experts_chosen_groups=3),
        dict(experts_correction=False),
        dict(experts_scale=1.0),
        dict(experts_normalise=False),
        dict(experts_chosen=2),
        dict(rope_base=400.0),
    ],
    "deepseek yarn, pairs by halves": [
        dict(rope_interleaved=True),
        dict(attention_scale=0.0),
        dict(rope_magnitude=0.0),
        dict(rope_factor=30.0),
    ],
    "mamba2": [
        dict(ssm_dt_min=0.0),
        dict(ssm_dt_max=None),
        dict(ssm_groups=1),
        dict(ssm_norm=False),
        dict(ssm_bias=False),
        dict(norm_epsilon=1e-5),
        dict(ssm_conv_bias=False),
    ],
}
CASES = [(name, wrong) for name, settings in WRONG.items() for wrong in settings]


def test_there_are_forty_wrong_settings():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name, wrong", CASES, ids=lambda value: str(value))
def test_a_wrong_setting_is_seen(name, wrong, root):
    folder, tokens_BT, mask_BT, their_BTV = saved(name, root)
    right, params = hf.load(folder)
    model = make_model(changed(right.config, **wrong))
    fitting = _with_shapes_of(params, model)
    assert apart(our_logits(model, fitting, tokens_BT, mask_BT), their_BTV, mask_BT) > 1e-3


def _with_shapes_of(params, model):
    """The weights as the wrong model would have them: reshaped; what it has besides is drawn."""
    there = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def fitting(path, leaf):
        mine = there.get(jax.tree_util.keystr(path))
        return leaf if mine is None or mine.size != leaf.size else mine.reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(fitting, random_params(model))


def test_rope_frequencies_are_theirs():
    """YaRN, llama3 and linear against transformers' own functions, at the sizes of real models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from llmlab.model.rope import frequencies

    for kind, more in {
        "yarn": dict(factor=32.0, original_max_position_embeddings=4096, truncate=False),
        "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        "linear": dict(factor=8.0),
    }.items():
        settings = dict(rope_type=kind, rope_theta=150000.0, **more)
        config = transformers.LlamaConfig(
            hidden_size=512,
            num_attention_heads=4,
            head_dim=128,
            rope_parameters=settings,
            max_position_embeddings=131072,
        )
        wanted, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        names = {"original_max_position_embeddings": "original_positions"} | {
            "low_freq_factor": "low_frequency",
            "high_freq_factor": "high_frequency",
        }
        ours = RopeConfig(base=150000.0, scaling=kind, **{names.get(key, key): value for key, value in more.items()})
        mine, my_magnitude = frequencies(ours, 128)
        np.testing.assert_allclose(mine, wanted.double().numpy(), rtol=1e-5)
        assert my_magnitude == pytest.approx(magnitude)


# Settings that a config.json may leave out are those that transformers assumes then.
WHOLE = {"gpt2": "GPT2Config", "gemma3_text": "Gemma3TextConfig"}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
GIVEN = (*NEEDED, "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions", "num_key_value_heads")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family, tmp_path):
    usual = family.architecture.replace("ForCausalLM", "Config")
    getattr(transformers, WHOLE.get(family.model_type, usual))().save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    whole, _ = hf.read_config(tmp_path)
    few = {name: value for name, value in keys.items() if name in GIVEN} | {"model_type": family.model_type}
    (tmp_path / "config.json").write_text(json.dumps(few))
    assert hf.identity(hf.read_config(tmp_path)[0]) == hf.identity(whole)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_tokenizer_trained_here_gives_the_same_ids_there(family, tmp_path):
    """In each family, whose own tokenizer would cut text up in another way, and with BOS in front."""
    tokenizer = train_tokenizer(
        TokenizerConfig(vocab_size=350), ["the quick brown fox\n", "def f(x):\n    return\n"] * 30
    )
    ids = export_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **ids}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the quick brown", "  def  f(x):\n\treturn 1234\n", PROBE.replace("\u2581", "")):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
