"""The open families: how each spells its settings, and which table has the names of its weights.

To add one is to add an entry here and, where its names are new, a table to `family_weights`. Sources: the `config.json`
and weight names of each release, as `transformers` reads them.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llmlab.core.errors import UserError
from llmlab.model.config import ModelConfig
from llmlab.model.family_weights import (
    DEEPSEEK_WEIGHTS,
    GEMMA_WEIGHTS,
    GPT2_WEIGHTS,
    GPT_OSS_WEIGHTS,
    LLAMA_WEIGHTS,
    MAMBA2_WEIGHTS,
    MIXTRAL_WEIGHTS,
    OLMO2_WEIGHTS,
    PHI3_WEIGHTS,
    QWEN3_MOE_WEIGHTS,
)
from llmlab.model.hf_config import (
    Biases,
    Choice,
    Keys,
    Only,
    Ours,
    Part,
    Pattern,
    Rope,
    Same,
    Unused,
    yarn_magnitude,
)
from llmlab.model.hf_weights import Rule


class Family(NamedTuple):
    """A family: its names, the parts of its config.json, its weight table.

    unused: patterns of tensors that its folders may carry and inference does not use, with what they are.
    extra_layers: the key that counts the layers behind the last, which its folders may carry and inference leaves out.
    """

    model_type: str
    architecture: str
    config: tuple[Part, ...]
    weights: tuple[Rule, ...]
    unused: Mapping[str, str] = MappingProxyType({})
    extra_layers: str = ""

    @property
    def scorer(self) -> str:
        """The architecture of its reward models, which have one label; "" where transformers has none."""
        usual = self.architecture.replace("ForCausalLM", "ForSequenceClassification")
        return _SCORERS.get(self.model_type, usual)


_SCORERS = {
    "gemma3_text": "Gemma3TextForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "mamba2": "",
}
ROTARY_BUFFERS = {r".*\.rotary_emb\.inv_freq": "rotary frequencies, which follow from the config"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}

MLP_WIDTH = Same("intermediate_size", "mlp_width", resolved="F")
EXPERT_WIDTH = Same("intermediate_size", "experts.width", resolved="expert_width")

SHAPE: tuple[Part, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "width"),
    Same("num_hidden_layers", "layers"),
    Same("num_attention_heads", "heads"),
    Same("num_key_value_heads", "kv_heads", None, resolved="K"),
    Same("initializer_range", "init_std", 0.02),
    Ours({"initializer": "normal"}),
)


def _shape(
    head_dim: int | None = None,
    activation: str = "hidden_act",
    tied: bool = False,
    width: Same = MLP_WIDTH,
    epsilon: float = 1e-6,
) -> tuple[Part, ...]:
    """The shape of a Llama-like model, with the family's usual values for what a config.json may leave out."""
    return (
        *SHAPE,
        width,
        Same("head_dim", "head_dim", head_dim, resolved="H"),
        Same("rms_norm_eps", "norm_epsilon", epsilon),
        Choice(activation, "activation", ACTIVATIONS, "silu" if activation == "hidden_act" else "gelu_pytorch_tanh"),
        Same("tie_word_embeddings", "tied_embedding", tied),
    )


def _qwen_layers(layer: int, keys: Keys) -> str:
    return (
        "local" if keys.take("use_sliding_window", False) and layer >= keys.take("max_window_layers", 28) else "global"
    )


def _gemma3_layers(layer: int, keys: Keys) -> str:
    period = keys.take("sliding_window_pattern", None) or keys.take("_sliding_window_pattern", 6)
    return "local" if (layer + 1) % period else "global"


class QwenWindow(NamedTuple):
    """use_sliding_window switches the window off and on; max_window_layers may count the first layers without one."""

    pattern: Pattern

    def read(self, keys: Keys) -> dict[str, Any]:
        switched, found = keys.take("use_sliding_window", False), self.pattern.read(keys)
        return found if switched else {"pattern": ("global",), "window": None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        keys = self.pattern.write(config)
        return keys | {"use_sliding_window": keys["sliding_window"] is not None}


class DenseLayers(NamedTuple):
    """mlp_only_layers: the layers without experts, which here are the first ones."""

    def read(self, keys: Keys) -> dict[str, Any]:
        dense = sorted(keys.take("mlp_only_layers", None) or [])
        if dense != list(range(len(dense))):
            raise UserError(f"config.json: mlp_only_layers={dense} is not supported, only the first layers")
        return {"experts.first_dense": len(dense)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"mlp_only_layers": list(range(config.experts.first_dense))}


class StepLimit(NamedTuple):
    """time_step_limit: the least and the largest step of the state space, the latter perhaps without a bound."""

    def read(self, keys: Keys) -> dict[str, Any]:
        low, high = keys.take("time_step_limit", None) or (0.0, math.inf)
        high = float(high["__float__"]) if isinstance(high, dict) else high
        return {"ssm.dt_min": float(low), "ssm.dt_max": None if math.isinf(high) else float(high)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        high = {"__float__": "Infinity"} if config.ssm.dt_max is None else config.ssm.dt_max
        return {"time_step_limit": [config.ssm.dt_min, high]}


class QueryScale(NamedTuple):
    """query_pre_attn_scalar: the scores are divided by its square root (Gemma)."""

    default: float = 256

    def read(self, keys: Keys) -> dict[str, Any]:
        return {"attention_scale": keys.take("query_pre_attn_scalar", self.default) ** -0.5}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scalar = (config.attention_scale or config.H**-0.5) ** -2
        return {"query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar}


class LatentRope(NamedTuple):
    """Rotary positions of DeepSeek-V3: with YaRN's mscale_all_dim, all scores grow by the square of its magnitude."""

    def read(self, keys: Keys) -> dict[str, Any]:
        fields = Rope().read(keys)
        given = keys.take("rope_parameters", None) or keys.take("rope_scaling", None) or {}
        weight = given.get("mscale_all_dim") or 0.0
        if not weight or fields["rope"].scaling == "none":
            return fields
        H = keys.take("qk_nope_head_dim") + keys.take("qk_rope_head_dim")
        return fields | {"attention_scale": H**-0.5 * yarn_magnitude(fields["rope"].factor, weight) ** 2}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        keys = Rope().write(config)
        growth = math.sqrt((config.attention_scale or config.H**-0.5) * config.H**0.5)
        if not math.isclose(growth, 1):
            if config.rope.factor <= 1:
                raise UserError("attention_scale has no spelling in config.json without model.rope.scaling")
            keys["rope_parameters"]["mscale_all_dim"] = round((growth - 1) / (0.1 * math.log(config.rope.factor)), 9)
        return keys


QWEN_WINDOW = QwenWindow(Pattern(_qwen_layers, also=("max_window_layers",)))

# What gpt-oss has where config.json does not speak of rotary scaling.
GPT_OSS_SCALING = MappingProxyType(
    dict(
        rope_type="yarn",
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=4096,
    )
)
GEMMA = (
    Ours(dict(norm_from_zero=True, norm_after=True, scaled_embedding=True, bias=False)),
    Only("attention_bias", False),
    Only("use_bidirectional_attention", False),
    QueryScale(),
)

FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        (*_shape(), Rope(), Biases(mlp=True)),
        LLAMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        (*_shape(), Rope(), Pattern(lambda layer, keys: "local", listed=False)),
        LLAMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*_shape(), Rope(), QWEN_WINDOW, Only("use_mrope", False), Ours(dict(attention_bias="qkv"))),
        LLAMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*_shape(head_dim=128), Rope(), QWEN_WINDOW, Biases(), Ours(dict(qk_norm="head"))),
        LLAMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        (*_shape(epsilon=1e-5), Rope(), Biases(), Ours(dict(qk_norm="all", norm_before=False, norm_after=True))),
        OLMO2_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        (
            *_shape(head_dim=256, activation="hidden_activation", tied=True),
            *GEMMA,
            Rope(),
            Pattern(lambda layer, keys: "global" if layer % 2 else "local"),
            Unused(("hidden_act", "sliding_window_size")),
            Same("attn_logit_softcapping", "attention_softcap", 50.0),
            Same("final_logit_softcapping", "logit_softcap", 30.0),
        ),
        GEMMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        (
            *_shape(head_dim=256, activation="hidden_activation", tied=True),
            *GEMMA,
            Rope(1_000_000.0, by_kind=True),
            Pattern(_gemma3_layers, also=("sliding_window_pattern", "_sliding_window_pattern")),
            Only("attn_logit_softcapping", None),  # transformers reads and does not apply it
            Same("final_logit_softcapping", "logit_softcap", None),
            Ours(dict(qk_norm="head")),
        ),
        GEMMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "olmo3",
        "Olmo3ForCausalLM",
        (
            *_shape(epsilon=1e-5),
            Rope(500_000.0, by_kind=True, local_base=0.0),
            Biases(),
            Pattern(lambda layer, keys: "local" if (layer + 1) % 4 else "global"),
            Ours(dict(qk_norm="all", norm_before=False, norm_after=True)),
        ),
        OLMO2_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        (
            *_shape(epsilon=1e-5),
            Rope(),
            Pattern(lambda layer, keys: "local", listed=False, window=None),
            Only("attention_bias", False),
            Unused(("original_max_position_embeddings",)),
        ),
        PHI3_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (
            *_shape(width=EXPERT_WIDTH, epsilon=1e-5),
            Rope(1_000_000.0),
            Pattern(lambda layer, keys: "local", listed=False, window=None),
            Same("num_local_experts", "experts.count", 8),
            Same("num_experts_per_tok", "experts.chosen", 2),
        ),
        MIXTRAL_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (
            *_shape(),
            Rope(),
            QwenWindow(Pattern(lambda layer, keys: "local", listed=False)),
            Unused(("max_window_layers",)),
            Biases(),
            Same("num_experts", "experts.count", 128, also="num_local_experts"),
            Same("num_experts_per_tok", "experts.chosen", 8),
            Same("moe_intermediate_size", "experts.width", 768, resolved="expert_width"),
            Same("norm_topk_prob", "experts.normalise", False),
            Only("decoder_sparse_step", 1),
            DenseLayers(),
            Ours(dict(qk_norm="head")),
        ),
        QWEN3_MOE_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        (
            *SHAPE,
            EXPERT_WIDTH,
            Same("head_dim", "head_dim", 64, resolved="H"),
            Same("rms_norm_eps", "norm_epsilon", 1e-5),
            Choice("hidden_act", "activation", {"silu": "swiglu_clamped"}, "silu"),
            Same("tie_word_embeddings", "tied_embedding", False),
            Rope(150_000.0, GPT_OSS_SCALING),
            Pattern(lambda layer, keys: "global" if layer % 2 else "local", window=128),
            Only("attention_bias", True),
            Only("swiglu_alpha", 1.702),
            Only("swiglu_limit", 7.0),
            Same("num_local_experts", "experts.count", 128),
            Same("num_experts_per_tok", "experts.chosen", 4),
            Unused(("experts_per_token", "initial_context_length")),
            Ours({"attention_bias": "qkvo", "attention_sinks": True, "experts.bias": True}),
        ),
        GPT_OSS_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        (
            *SHAPE,
            MLP_WIDTH,
            Same("rms_norm_eps", "norm_epsilon", 1e-6),
            Choice("hidden_act", "activation", ACTIVATIONS, "silu"),
            Same("tie_word_embeddings", "tied_embedding", False),
            LatentRope(),
            Same("rope_interleave", "rope.interleaved", True),
            Only("attention_bias", False),
            Same("kv_lora_rank", "latent.kv_rank", 512),
            Same("q_lora_rank", "latent.q_rank", 1536, null_for_0=True),
            Same("qk_nope_head_dim", "latent.nope_dim", 128),
            Same("qk_rope_head_dim", "latent.rope_dim", 64),
            Same("v_head_dim", "latent.value_dim", 128),
            Same("n_routed_experts", "experts.count", 256),
            Same("num_experts_per_tok", "experts.chosen", 8),
            Same("moe_intermediate_size", "experts.width", 2048, resolved="expert_width"),
            Same("n_shared_experts", "experts.shared", 1),
            Same("first_k_dense_replace", "experts.first_dense", 3),
            Same("routed_scaling_factor", "experts.scale", 2.5),
            Same("norm_topk_prob", "experts.normalise", True),
            Same("n_group", "experts.groups", 8),
            Same("topk_group", "experts.chosen_groups", 4),
            Only("moe_layer_freq", 1),
            Only("topk_method", "noaux_tc"),
            Only("scoring_func", "sigmoid"),
            Unused(("head_dim", "qk_head_dim", "num_nextn_predict_layers")),
            Ours({"experts.score": "sigmoid", "experts.correction": True}),
        ),
        DEEPSEEK_WEIGHTS,
        ROTARY_BUFFERS,
        extra_layers="num_nextn_predict_layers",
    ),
    Family(
        "mamba2",
        "Mamba2ForCausalLM",
        (
            Same("vocab_size", "vocab_size"),
            Same("hidden_size", "width"),
            Same("num_hidden_layers", "layers"),
            Same("layer_norm_epsilon", "norm_epsilon", 1e-5),
            Same("initializer_range", "init_std", 0.1),
            Same("tie_word_embeddings", "tied_embedding", False),
            Same("num_heads", "ssm.heads", 128, resolved="ssm_heads"),
            Same("head_dim", "ssm.head_dim", 64),
            Same("state_size", "ssm.state", 128),
            Same("expand", "ssm.expand", 2),
            Same("conv_kernel", "ssm.conv", 4),
            Same("n_groups", "ssm.groups", 8),
            Same("use_bias", "ssm.bias", False),
            Same("use_conv_bias", "ssm.conv_bias", True),
            Same("chunk_size", "ssm.chunk", 256),
            Same("time_step_min", "ssm.dt_init_min", 0.001),
            Same("time_step_max", "ssm.dt_init_max", 0.1),
            Same("time_step_floor", "ssm.dt_init_floor", 1e-4),
            StepLimit(),
            Only("hidden_act", "silu"),
            Unused(("time_step_rank", "rescale_prenorm_residual", "residual_in_fp32", "rms_norm", "norm_before_gate")),
            Unused(("intermediate_size", "time_step_init_scheme", "time_step_scale")),
            Ours({"pattern": ("mamba",), "max_positions": 2**20, "initializer": "normal"}),
        ),
        MAMBA2_WEIGHTS,
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        (
            Same("vocab_size", "vocab_size"),
            Same("n_embd", "width"),
            Same("n_inner", "mlp_width", None, resolved="F"),
            Same("n_layer", "layers"),
            Same("n_head", "heads"),
            Same("n_positions", "max_positions"),
            Same("layer_norm_epsilon", "norm_epsilon", 1e-5),
            Same("initializer_range", "init_std", 0.02),
            Choice("activation_function", "activation", {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}, "gelu_new"),
            Same("tie_word_embeddings", "tied_embedding", True),
            Only("scale_attn_weights", True),
            Only("scale_attn_by_inverse_layer_idx", False),
            Only("add_cross_attention", False),
            Ours(dict(positions="learned", norm="layernorm", gated=False, bias=True, initializer="normal")),
        ),
        GPT2_WEIGHTS,
        {r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias": "causal masks"},
    ),
)
