"""The open families: how each spells its settings and its weights. To add one is to add an entry here.

Sources: the `config.json` and weight names of each release, as `transformers` reads them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llmlab.model.hf_config import Biases, Choice, Keys, Only, Ours, Part, Pattern, QueryScale, Rope, Same
from llmlab.model.hf_weights import Rule, linear


class Family(NamedTuple):
    """A family: its names, the parts of its config.json, its weight table.

    unused: patterns of tensors that its folders may carry and inference does not use, with what they are.
    """

    model_type: str
    architecture: str
    config: tuple[Part, ...]
    weights: tuple[Rule, ...]
    unused: Mapping[str, str] = MappingProxyType({})


ROTARY_BUFFERS = {r".*\.rotary_emb\.inv_freq": "rotary frequencies, which follow from the config"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}

SHAPE: tuple[Part, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "width"),
    Same("intermediate_size", "mlp_width", resolved="F"),
    Same("num_hidden_layers", "layers"),
    Same("num_attention_heads", "heads"),
    Same("num_key_value_heads", "kv_heads", None, resolved="K"),
    Same("initializer_range", "init_std", 0.02),
    Ours({"initializer": "normal"}),
)


def _shape(head_dim: int | None = None, activation: str = "hidden_act", tied: bool = False) -> tuple[Part, ...]:
    """The shape of a Llama-like model, with the family's usual values for what a config.json may leave out."""
    return (
        *SHAPE,
        Same("head_dim", "head_dim", head_dim, resolved="H"),
        Same("rms_norm_eps", "norm_epsilon", 1e-6),
        Choice(activation, "activation", ACTIVATIONS, "silu" if activation == "hidden_act" else "gelu_pytorch_tanh"),
        Same("tie_word_embeddings", "tied_embedding", tied),
    )


ATTENTION = (
    *linear("model.layers.{layer}.self_attn.q_proj", "attention.query_DNH"),
    *linear("model.layers.{layer}.self_attn.k_proj", "attention.key_DKH"),
    *linear("model.layers.{layer}.self_attn.v_proj", "attention.value_DKH"),
    Rule("model.layers.{layer}.self_attn.q_norm.weight", ("attention.query_norm.scale",)),
    Rule("model.layers.{layer}.self_attn.k_norm.weight", ("attention.key_norm.scale",)),
    *linear("model.layers.{layer}.self_attn.o_proj", "attention.out_NHD", dims_in=2),
)
MLP = (
    *linear("model.layers.{layer}.mlp.gate_proj", "mlp.gate_DF"),
    *linear("model.layers.{layer}.mlp.up_proj", "mlp.up_DF"),
    *linear("model.layers.{layer}.mlp.down_proj", "mlp.down_FD"),
)
ENDS = (
    Rule("model.embed_tokens.weight", ("embedding.tokens_VD",)),
    Rule("model.norm.weight", ("head.norm.scale",)),
    Rule("lm_head.weight", ("head.unembedding_DV",), turned=True),
)


def _norms(**names: str) -> tuple[Rule, ...]:
    """The norms of a layer: theirs by ours."""
    return tuple(Rule(f"model.layers.{{layer}}.{theirs}.weight", (f"{ours}.scale",)) for ours, theirs in names.items())


LLAMA_WEIGHTS = (
    *ENDS,
    *_norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    *ATTENTION,
    *MLP,
)
OLMO2_WEIGHTS = (
    *ENDS,
    *_norms(attention_norm_after="post_attention_layernorm", mlp_norm_after="post_feedforward_layernorm"),
    *ATTENTION,
    *MLP,
)
GEMMA_WEIGHTS = (
    *ENDS,
    *_norms(attention_norm="input_layernorm", attention_norm_after="post_attention_layernorm"),
    *_norms(mlp_norm="pre_feedforward_layernorm", mlp_norm_after="post_feedforward_layernorm"),
    *ATTENTION,
    *MLP,
)
GPT2_WEIGHTS = (
    Rule("transformer.wte.weight", ("embedding.tokens_VD",)),
    Rule("transformer.wpe.weight", ("embedding.positions_PD",)),
    Rule("transformer.h.{layer}.ln_1.weight", ("attention_norm.scale",)),
    Rule("transformer.h.{layer}.ln_1.bias", ("attention_norm.bias",)),
    *linear(
        "transformer.h.{layer}.attn.c_attn",
        *("attention.query_DNH", "attention.key_DKH", "attention.value_DKH"),
        turned=False,
    ),
    *linear("transformer.h.{layer}.attn.c_proj", "attention.out_NHD", dims_in=2, turned=False),
    Rule("transformer.h.{layer}.ln_2.weight", ("mlp_norm.scale",)),
    Rule("transformer.h.{layer}.ln_2.bias", ("mlp_norm.bias",)),
    *linear("transformer.h.{layer}.mlp.c_fc", "mlp.up_DF", turned=False),
    *linear("transformer.h.{layer}.mlp.c_proj", "mlp.down_FD", turned=False),
    Rule("transformer.ln_f.weight", ("head.norm.scale",)),
    Rule("transformer.ln_f.bias", ("head.norm.bias",)),
    Rule("lm_head.weight", ("head.unembedding_DV",), turned=True),
)


def _qwen_layers(layer: int, keys: Keys) -> str:
    return (
        "local" if keys.take("use_sliding_window", False) and layer >= keys.take("max_window_layers", 28) else "global"
    )


def _gemma3_layers(layer: int, keys: Keys) -> str:
    period = keys.take("sliding_window_pattern", None) or keys.take("_sliding_window_pattern", 6)
    return "local" if (layer + 1) % period else "global"


class QwenWindow(NamedTuple):
    """use_sliding_window switches the window off and on; max_window_layers counts the first layers without one."""

    def read(self, keys: Keys) -> dict[str, Any]:
        switched = keys.take("use_sliding_window", False)
        found = Pattern(_qwen_layers, also=("max_window_layers",)).read(keys)
        return found if switched else {"pattern": ("global",), "window": None}

    def write(self, config: Any) -> dict[str, Any]:
        keys = Pattern(_qwen_layers).write(config)
        return keys | {"use_sliding_window": keys["sliding_window"] is not None}


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
        (*_shape(), Rope(), QwenWindow(), Ours(dict(attention_bias="qkv"))),
        LLAMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*_shape(head_dim=128), Rope(), QwenWindow(), Biases(), Ours(dict(qk_norm="head"))),
        LLAMA_WEIGHTS,
        ROTARY_BUFFERS,
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        (*_shape(), Rope(), Biases(), Ours(dict(qk_norm="all", norm_before=False, norm_after=True))),
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
            Same("attn_logit_softcapping", "attention_softcap", None),
            Same("final_logit_softcapping", "logit_softcap", None),
            Ours(dict(qk_norm="head")),
        ),
        GEMMA_WEIGHTS,
        ROTARY_BUFFERS,
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
