"""The weights of the open families: an ordered table of names each, as their folders have them."""

from llmlab.model.hf_weights import Rule, linear

HEADS = (
    Rule("lm_head.weight", ("head.unembedding_DV",), turned=True),
    Rule("score.weight", ("head.score_D",), turned=True),
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
    *HEADS,
)


def _norms(**names: str) -> tuple[Rule, ...]:
    """The norms of a layer: theirs by ours."""
    return tuple(Rule(f"model.layers.{{layer}}.{theirs}.weight", (f"{ours}.scale",)) for ours, theirs in names.items())


def _experts(mixture: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Rule, ...]:
    """A router and experts of three weights each."""
    layer = f"model.layers.{{layer}}.{mixture}"
    return (
        Rule(f"{layer}.gate.weight", ("mlp.router_DE",), turned=True),
        Rule(f"{layer}.experts.{{expert}}.{gate}.weight", ("mlp.gate_EDF",), turned=True),
        Rule(f"{layer}.experts.{{expert}}.{up}.weight", ("mlp.up_EDF",), turned=True),
        Rule(f"{layer}.experts.{{expert}}.{down}.weight", ("mlp.down_EFD",), turned=True),
    )


PRE_NORMS = _norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
LLAMA_WEIGHTS = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP)
MIXTRAL_WEIGHTS = (*ENDS, *PRE_NORMS, *ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2"))
QWEN3_MOE_WEIGHTS = (*ENDS, *PRE_NORMS, *ATTENTION, *MLP, *_experts("mlp"))
PHI3_WEIGHTS = (
    *ENDS,
    *PRE_NORMS,
    *linear(
        "model.layers.{layer}.self_attn.qkv_proj",
        *("attention.query_DNH", "attention.key_DKH", "attention.value_DKH"),
    ),
    *linear("model.layers.{layer}.self_attn.o_proj", "attention.out_NHD", dims_in=2),
    *linear("model.layers.{layer}.mlp.gate_up_proj", "mlp.gate_DF", "mlp.up_DF"),
    *linear("model.layers.{layer}.mlp.down_proj", "mlp.down_FD"),
)
GPT_OSS_WEIGHTS = (
    *ENDS,
    *PRE_NORMS,
    *ATTENTION,
    Rule("model.layers.{layer}.self_attn.sinks", ("attention.sinks_N",)),
    *linear("model.layers.{layer}.mlp.router", "mlp.router_DE"),
    Rule(
        "model.layers.{layer}.mlp.experts.gate_up_proj",
        ("mlp.gate_EDF", "mlp.up_EDF"),
        join="alternating",
        stacked=1,
    ),
    Rule(
        "model.layers.{layer}.mlp.experts.gate_up_proj_bias",
        ("mlp.gate_EDF_bias", "mlp.up_EDF_bias"),
        join="alternating",
        stacked=1,
    ),
    Rule("model.layers.{layer}.mlp.experts.down_proj", ("mlp.down_EFD",), stacked=1),
    Rule("model.layers.{layer}.mlp.experts.down_proj_bias", ("mlp.down_EFD_bias",), stacked=1),
)
DEEPSEEK_WEIGHTS = (
    *ENDS,
    *PRE_NORMS,
    *linear("model.layers.{layer}.self_attn.q_proj", "attention.query_DNH"),
    *linear("model.layers.{layer}.self_attn.q_a_proj", "attention.query_DR"),
    *linear("model.layers.{layer}.self_attn.q_b_proj", "attention.query_RNH"),
    *linear("model.layers.{layer}.self_attn.kv_a_proj_with_mqa", "attention.latent_DR", "attention.turned_key_DH"),
    *linear("model.layers.{layer}.self_attn.kv_b_proj", "attention.key_RNH", "attention.value_RNH", join="in_head"),
    *linear("model.layers.{layer}.self_attn.o_proj", "attention.out_NHD", dims_in=2),
    Rule("model.layers.{layer}.self_attn.q_a_layernorm.weight", ("attention.query_norm.scale",)),
    Rule("model.layers.{layer}.self_attn.kv_a_layernorm.weight", ("attention.latent_norm.scale",)),
    *MLP,
    *_experts("mlp"),
    Rule("model.layers.{layer}.mlp.gate.e_score_correction_bias", ("mlp.correction_E",)),
    *linear("model.layers.{layer}.mlp.shared_experts.gate_proj", "mlp.shared.gate_DF"),
    *linear("model.layers.{layer}.mlp.shared_experts.up_proj", "mlp.shared.up_DF"),
    *linear("model.layers.{layer}.mlp.shared_experts.down_proj", "mlp.shared.down_FD"),
)
MAMBA2_WEIGHTS = (
    Rule("backbone.embeddings.weight", ("embedding.tokens_VD",)),
    Rule("backbone.norm_f.weight", ("head.norm.scale",)),
    Rule("lm_head.weight", ("head.unembedding_DV",), turned=True),
    Rule("backbone.layers.{layer}.norm.weight", ("mamba_norm.scale",)),
    *linear(
        "backbone.layers.{layer}.mixer.in_proj", *(f"mamba.{x}" for x in ("z_DNH", "x_DNH", "b_DKZ", "c_DKZ", "dt_DN"))
    ),
    Rule(
        "backbone.layers.{layer}.mixer.conv1d.weight",
        ("mamba.conv_x_WNH", "mamba.conv_b_WKZ", "mamba.conv_c_WKZ"),
        turned=True,
        depthwise=True,
    ),
    Rule(
        "backbone.layers.{layer}.mixer.conv1d.bias",
        ("mamba.conv_x_WNH_bias", "mamba.conv_b_WKZ_bias", "mamba.conv_c_WKZ_bias"),
        dims_in=0,
    ),
    Rule("backbone.layers.{layer}.mixer.A_log", ("mamba.log_rate_N",)),
    Rule("backbone.layers.{layer}.mixer.D", ("mamba.skip_N",)),
    Rule("backbone.layers.{layer}.mixer.dt_bias", ("mamba.dt_bias_N",)),
    Rule("backbone.layers.{layer}.mixer.norm.weight", ("mamba.gate.scale",)),
    *linear("backbone.layers.{layer}.mixer.out_proj", "mamba.out_NHD", dims_in=2),
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
    *HEADS,
)
