"""The same logits as transformers: Mixtral, Qwen3-MoE, gpt-oss and DeepSeek-V3, tiny, of the same random weights."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.model.config import LatentConfig, ModelConfig
from llmlab.model.rope import RopeConfig
from llmlab.model.routing import BALANCE_LOSS, LOAD, ExpertsConfig
from llmlab.model.transformer import make_model, unembed
from llmlab.model.types import Inputs, inputs
from tests.helpers import VOCAB, random_params, relative, tiny_llama

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")

TOLERANCE = 1e-4
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_implementation="eager",
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
OURS: dict[str, Any] = dict(width=32, heads=4, kv_heads=2, norm_epsilon=1e-6)


def layer_of(params: dict, config: ModelConfig, layer: int) -> dict:
    """The weights of one layer, from the stack that holds it."""
    for slot, stack in enumerate(config.stacks()):
        if layer in stack:
            tree, place = params["layers"][str(slot)], stack.index(layer)
            return jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), tree)
    raise KeyError(layer)


def frame(params: dict) -> dict[str, np.ndarray]:
    """What all four families share around their layers."""
    return {
        "model.embed_tokens.weight": params["embedding"]["tokens_VD"],
        "model.norm.weight": params["head"]["norm"]["scale"],
        "lm_head.weight": params["head"]["unembedding_DV"].T,
    }


def norms(w: dict, name: str) -> dict[str, np.ndarray]:
    return {
        f"{name}.input_layernorm.weight": w["attention_norm"]["scale"],
        f"{name}.post_attention_layernorm.weight": w["mlp_norm"]["scale"],
    }


def attention(w: dict, name: str) -> dict[str, np.ndarray]:
    """Ordinary attention, weights [out, in], with the biases, sinks and norms that are there."""
    a, out = w["attention"], {}
    for ours, theirs in (("query_DNH", "q_proj"), ("key_DKH", "k_proj"), ("value_DKH", "v_proj")):
        out[f"{name}.{theirs}.weight"] = a[ours].reshape(len(a[ours]), -1).T
        if f"{ours}_bias" in a:
            out[f"{name}.{theirs}.bias"] = a[f"{ours}_bias"].reshape(-1)
    out[f"{name}.o_proj.weight"] = a["out_NHD"].reshape(-1, a["out_NHD"].shape[-1]).T
    if "out_NHD_bias" in a:
        out[f"{name}.o_proj.bias"] = a["out_NHD_bias"]
    if "sinks_N" in a:
        out[f"{name}.sinks"] = a["sinks_N"]
    if "query_norm" in a:
        out |= {f"{name}.{x}_norm.weight": a[f"{y}_norm"]["scale"] for x, y in (("q", "query"), ("k", "key"))}
    return out


def latent_attention(w: dict, name: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """DeepSeek-V3's attention, weights [out, in].

    The permutation: it turns the pairs (0, 1), (2, 3), … of the R rotary numbers of a head, we the pairs (i, i + R/2).
    So our rotary number i is theirs 2i, and our i + R/2 theirs 2i + 1, in each head's query and in the shared key.
    """
    a, nope, R = w["attention"], config.latent.nope_dim, config.latent.rope_dim
    theirs = np.empty(R, int)
    theirs[0::2], theirs[1::2] = np.arange(R // 2), np.arange(R // 2) + R // 2  # theirs[j] is our number at their j
    query = a["query_RNH"] if config.latent.q_rank else a["query_DNH"]
    query = np.concatenate([query[..., :nope], query[..., nope:][..., theirs]], axis=-1)
    key_and_value = np.concatenate([a["key_RNH"], a["value_RNH"]], axis=-1)
    out = {
        f"{name}.kv_a_proj_with_mqa.weight": np.concatenate([a["latent_DR"], a["turned_key_DH"][:, theirs]], axis=1).T,
        f"{name}.kv_a_layernorm.weight": a["latent_norm"]["scale"],
        f"{name}.kv_b_proj.weight": key_and_value.reshape(len(key_and_value), -1).T,
        f"{name}.o_proj.weight": a["out_NHD"].reshape(-1, a["out_NHD"].shape[-1]).T,
        f"{name}.{'q_b_proj' if config.latent.q_rank else 'q_proj'}.weight": query.reshape(len(query), -1).T,
    }
    if config.latent.q_rank:
        out[f"{name}.q_a_proj.weight"] = a["query_DR"].T
        out[f"{name}.q_a_layernorm.weight"] = a["query_norm"]["scale"]
    return out


def mlp(w: dict, name: str) -> dict[str, np.ndarray]:
    names = (("gate_DF", "gate_proj"), ("up_DF", "up_proj"), ("down_FD", "down_proj"))
    return {f"{name}.{theirs}.weight": w[ours].T for ours, theirs in names}


def experts(w: dict, name: str) -> dict[str, np.ndarray]:
    """Router [E, D], gates over ups in one [E, 2F, D], downs [E, D, F]."""
    joined = np.concatenate([w["gate_EDF"], w["up_EDF"]], axis=2).transpose(0, 2, 1)
    return {
        f"{name}.gate.weight": w["router_DE"].T,
        f"{name}.experts.gate_up_proj": joined,
        f"{name}.experts.down_proj": w["down_EFD"].transpose(0, 2, 1),
    }


def gpt_oss_experts(w: dict, name: str) -> dict[str, np.ndarray]:
    """Gates and ups interleaved in one [E, D, 2F], downs [E, F, D], and a bias each."""
    return {
        f"{name}.router.weight": w["router_DE"].T,
        f"{name}.router.bias": w["router_DE_bias"],
        f"{name}.experts.gate_up_proj": np.stack([w["gate_EDF"], w["up_EDF"]], axis=-1).reshape(
            len(w["up_EDF"]), 32, -1
        ),
        f"{name}.experts.gate_up_proj_bias": np.stack([w["gate_EDF_bias"], w["up_EDF_bias"]], axis=-1).reshape(
            len(w["up_EDF"]), -1
        ),
        f"{name}.experts.down_proj": w["down_EFD"],
        f"{name}.experts.down_proj_bias": w["down_EFD_bias"],
    }


def mixtral() -> tuple[ModelConfig, Any]:
    config = tiny_llama(**OURS, mlp_width=24, rope=RopeConfig(base=500.0), experts=ExpertsConfig(count=6, chosen=2))
    their = transformers.MixtralConfig(
        **SHAPE,
        num_hidden_layers=2,
        intermediate_size=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    return config, transformers.MixtralForCausalLM(their)


def qwen3_moe(normalise: bool) -> tuple[ModelConfig, Any]:
    mixture = ExpertsConfig(count=6, chosen=3, width=20, normalise=normalise, first_dense=1)
    config = tiny_llama(**OURS, layers=3, mlp_width=24, head_dim=8, qk_norm="head", experts=mixture)
    their = transformers.Qwen3MoeConfig(
        **SHAPE,
        num_hidden_layers=3,
        head_dim=8,
        intermediate_size=24,
        moe_intermediate_size=20,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=normalise,
        mlp_only_layers=[0],
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    return config, transformers.Qwen3MoeForCausalLM(their)


def gpt_oss() -> tuple[ModelConfig, Any]:
    yarn = dict(factor=8.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
    config = tiny_llama(
        **OURS,
        layers=3,
        head_dim=16,
        mlp_width=24,
        rope=RopeConfig(base=150_000.0, scaling="yarn", original_positions=8, **yarn),
        window=5,
        pattern=("local", "global"),
        activation="swiglu_clamped",
        attention_bias="qkvo",
        attention_sinks=True,
        experts=ExpertsConfig(count=6, chosen=2, bias=True),
    )
    rope = {"rope_type": "yarn", "rope_theta": 150_000.0, "original_max_position_embeddings": 8, **yarn}
    their = transformers.GptOssConfig(
        **SHAPE,
        num_hidden_layers=3,
        head_dim=16,
        intermediate_size=24,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rms_norm_eps=1e-6,
        rope_parameters=rope,
    )
    return config, transformers.GptOssForCausalLM(their)


def deepseek_v3(q_rank: int, yarn: bool) -> tuple[ModelConfig, Any]:
    """With yarn, mscale and mscale_all_dim of 1 leave the rotation as long as it was, and scale all scores instead."""
    rope, their_rope, scale = RopeConfig(), {"rope_type": "default", "rope_theta": 10_000.0}, 0.0
    if yarn:
        rope = RopeConfig(scaling="yarn", factor=40.0, original_positions=16, magnitude=1.0)
        their_rope = dict(rope_type="yarn", rope_theta=10_000.0, factor=40.0, original_max_position_embeddings=16)
        their_rope |= dict(beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)
        scale = 24**-0.5 * (0.1 * math.log(40.0) + 1) ** 2
    latent = LatentConfig(kv_rank=12, q_rank=q_rank, nope_dim=16, rope_dim=8, value_dim=10)
    mixture = ExpertsConfig(
        count=8,
        chosen=3,
        width=20,
        shared=2,
        first_dense=1,
        score="sigmoid",
        scale=2.5,
        groups=4,
        chosen_groups=2,
        correction=True,
    )
    ours = OURS | dict(kv_heads=0, layers=3, mlp_width=24)
    config = tiny_llama(**ours, latent=latent, experts=mixture, rope=rope, attention_scale=scale)
    their = transformers.DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        num_hidden_layers=3,
        intermediate_size=24,
        moe_intermediate_size=20,
        n_shared_experts=2,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        kv_lora_rank=12,
        q_lora_rank=q_rank or None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=10,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        rms_norm_eps=1e-6,
        num_mtp_layers=0,
        rope_parameters=their_rope,
    )
    return config, transformers.DeepseekV3ForCausalLM(their)


def their_layer(config: ModelConfig, w: dict, layer: int) -> dict[str, np.ndarray]:
    name = f"model.layers.{layer}"
    out = norms(w, name)
    if config.latent.kv_rank:
        out |= latent_attention(w, f"{name}.self_attn", config)
    else:
        out |= attention(w, f"{name}.self_attn")
    if not config.has_experts(layer):
        return out | mlp(w["mlp"], f"{name}.mlp")
    out |= (gpt_oss_experts if config.experts.bias else experts)(w["mlp"], f"{name}.mlp")
    if config.experts.correction:
        out[f"{name}.mlp.gate.e_score_correction_bias"] = w["mlp"]["correction_E"]
    if config.experts.shared:
        out |= mlp(w["mlp"]["shared"], f"{name}.mlp.shared_experts")
    return out


FAMILIES = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: qwen3_moe(normalise=True),
    "qwen3_moe, weights as they are": lambda: qwen3_moe(normalise=False),
    "gpt_oss": gpt_oss,
    "deepseek_v3": lambda: deepseek_v3(q_rank=14, yarn=False),
    "deepseek_v3, yarn": lambda: deepseek_v3(q_rank=0, yarn=True),
}


def both(family: str) -> tuple[Any, Any, Any]:
    """(our model, our parameters, their model with the same): every name of theirs filled, none left over."""
    config, torch_model = FAMILIES[family]()
    model = make_model(config)
    params = jax.tree.map(np.asarray, random_params(model, scale=0.4))
    state = frame(params)
    for layer in range(config.layers):
        state |= their_layer(config, layer_of(params, config, layer), layer)
    torch_model.load_state_dict({name: torch.tensor(np.ascontiguousarray(x)) for name, x in state.items()})
    return model, params, torch_model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_theirs_whole_and_decoded(family):
    model, params, torch_model = both(family)
    tokens_BT = np.random.default_rng(2).integers(VOCAB, size=(2, 24)).astype(np.int32)
    with torch.no_grad():
        their = torch_model(torch.tensor(tokens_BT).long()).logits.numpy()
    row = inputs(jnp.asarray(tokens_BT))
    out = jax.jit(model.apply)(params, row)
    logits_BTV = unembed(out.hidden_BTD, model.head(params), None)
    assert relative(logits_BTV, their) < TOLERANCE
    # Every expert has a part in it, so that none could be wrong unseen.
    assert (np.asarray(out.aux[LOAD].sum) > 0).all()

    cache, parts = model.init_cache(2, 24), []
    step = jax.jit(lambda params, piece, cache: model.apply(params, piece, cache=cache))
    for begin, end in [(0, 20), *((t, t + 1) for t in range(20, 24))]:
        out = step(params, Inputs(*(x[:, begin:end] for x in row[:3])), cache)
        cache = out.cache
        parts.append(unembed(out.hidden_BTD, model.head(params), None))
    assert relative(jnp.concatenate(parts, axis=1), their) < TOLERANCE


@pytest.mark.parametrize(
    "family, change",
    [
        ("mixtral", lambda w: w["router_DE"].__imul__(0)),
        ("qwen3_moe", lambda w: w["router_DE"].__imul__(0)),
        ("gpt_oss", lambda w: w["router_DE_bias"].__imul__(0)),
        ("gpt_oss", lambda w: w["down_EFD_bias"].__imul__(0)),
        ("deepseek_v3", lambda w: w["correction_E"].__imul__(0)),
    ],
)
def test_routing_matters(family, change):
    """The comparison can fail: without its router, or a bias of it, a model says something else by far."""
    model, params, torch_model = both(family)
    params = jax.tree.map(np.array, params)
    change(params["layers"][str(len(model.config.stacks()) - 1)]["mlp"])
    tokens_BT = np.random.default_rng(2).integers(VOCAB, size=(2, 24)).astype(np.int32)
    with torch.no_grad():
        their = torch_model(torch.tensor(tokens_BT).long()).logits.numpy()
    assert relative(jax.jit(model.logits)(params, tokens_BT), their) > 100 * TOLERANCE


def test_the_loss_of_balance_is_mixtrals_in_each_layer():
    """transformers adds up the counts of all layers first: compared on a layer, the formula is the same."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model, params, torch_model = both("mixtral")
    tokens_BT = np.random.default_rng(2).integers(VOCAB, size=(2, 24)).astype(np.int32)
    with torch.no_grad():
        logits = torch_model(torch.tensor(tokens_BT).long(), output_router_logits=True).router_logits
    their = [float(load_balancing_loss_func((layer,), 6, 2)) for layer in logits]
    mine = jax.jit(model.apply)(params, inputs(jnp.asarray(tokens_BT))).aux[BALANCE_LOSS]
    assert mine.value() == pytest.approx(np.mean(their), rel=1e-4)
