"""The config.json of releases, with the keys that they have: read here, and as many weights as transformers makes."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from llmlab.model import hf
from llmlab.model.cost import abstract_params, parameter_count
from llmlab.model.transformer import make_model

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="`make test-parity` installs it")
transformers = pytest.importorskip("transformers", reason="`make test-parity` installs it")

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
COMMON = dict(attention_dropout=0.0, initializer_range=0.02, use_cache=True, torch_dtype="bfloat16", hidden_act="silu")


def config(architecture: str, kind: str, sizes: tuple[int, ...], **more) -> dict:
    """sizes: vocabulary, width, MLP, layers, heads, heads of keys, positions."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings")
    sized = dict(zip(names, sizes, strict=True))
    return COMMON | {"architectures": [architecture], "model_type": kind} | sized | more


GEMMA = dict(hidden_activation="gelu_pytorch_tanh", head_dim=256, attention_bias=False, rms_norm_eps=1e-6)
RELEASES = {
    "gpt2": {
        **dict(activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, embd_pdrop=0.1),
        **dict(bos_token_id=50256, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-5),
        **dict(model_type="gpt2", n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1),
        **dict(summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, vocab_size=50257),
        **dict(summary_type="cls_index", summary_use_proj=True, task_specific_params={"text-generation": {}}),
    },
    "Llama-3.1-8B": config(
        *("LlamaForCausalLM", "llama", (128256, 4096, 14336, 32, 32, 8, 131072)),
        **dict(attention_bias=False, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0),
        **dict(rope_scaling=LLAMA3, tie_word_embeddings=False, bos_token_id=128000, eos_token_id=128001),
    ),
    "Mistral-7B-v0.1": config(
        *("MistralForCausalLM", "mistral", (32000, 4096, 14336, 32, 32, 8, 32768)),
        **dict(rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False),
    ),
    "Qwen2.5-0.5B": config(
        *("Qwen2ForCausalLM", "qwen2", (151936, 896, 4864, 24, 14, 2, 32768)),
        **dict(max_window_layers=24, rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768, use_mrope=False),
        **dict(tie_word_embeddings=True, use_sliding_window=False),
    ),
    "Qwen3-0.6B": config(
        *("Qwen3ForCausalLM", "qwen3", (151936, 1024, 3072, 28, 16, 8, 40960)),
        **dict(attention_bias=False, head_dim=128, max_window_layers=28, rms_norm_eps=1e-6, rope_scaling=None),
        **dict(rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False),
    ),
    "Qwen3-30B-A3B": config(
        *("Qwen3MoeForCausalLM", "qwen3_moe", (151936, 2048, 6144, 48, 32, 4, 40960)),
        **dict(attention_bias=False, decoder_sparse_step=1, head_dim=128, max_window_layers=48, mlp_only_layers=[]),
        **dict(moe_intermediate_size=768, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8),
        **dict(output_router_logits=False, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000.0),
        **dict(router_aux_loss_coef=0.001, sliding_window=None, tie_word_embeddings=False, use_sliding_window=False),
    ),
    "gemma-2-9b": config(
        *("Gemma2ForCausalLM", "gemma2", (256000, 3584, 14336, 42, 16, 8, 8192)),
        **GEMMA,
        **dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256),
        **dict(rope_theta=10000.0, sliding_window=4096, sliding_window_size=4096, cache_implementation="hybrid"),
    )
    | dict(hidden_act="gelu_pytorch_tanh"),
    "gemma-3-1b": {
        name: value
        for name, value in config(
            *("Gemma3ForCausalLM", "gemma3_text", (262144, 1152, 6912, 26, 4, 1, 32768)),
            **GEMMA,
            **dict(attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=256),
            **dict(rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512),
            **dict(sliding_window_pattern=6, cache_implementation="hybrid"),
        ).items()
        if name != "hidden_act"
    },
    "OLMo-2-1124-7B": config(
        *("Olmo2ForCausalLM", "olmo2", (100352, 4096, 11008, 32, 32, 32, 4096)),
        **dict(attention_bias=False, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000),
        **dict(tie_word_embeddings=False),
    ),
    "Olmo-3-1025-7B": config(
        *("Olmo3ForCausalLM", "olmo3", (100278, 4096, 11008, 32, 32, 32, 65536)),
        **dict(attention_bias=False, rms_norm_eps=1e-6, rope_theta=500000, sliding_window=4096),
        rope_scaling=dict(
            **dict(attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0),
            **dict(original_max_position_embeddings=8192, rope_type="yarn"),
        ),
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8,
        tie_word_embeddings=False,
    ),
    "Phi-3-mini-4k-instruct": config(
        *("Phi3ForCausalLM", "phi3", (32064, 3072, 8192, 32, 32, 32, 4096)),
        **dict(attention_bias=False, embd_pdrop=0.0, original_max_position_embeddings=4096, resid_pdrop=0.0),
        **dict(rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=2047),
        **dict(tie_word_embeddings=False, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"}),
    ),
    "Mixtral-8x7B-v0.1": config(
        *("MixtralForCausalLM", "mixtral", (32000, 4096, 14336, 32, 32, 8, 32768)),
        **dict(num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, rms_norm_eps=1e-5),
        **dict(rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False),
    ),
    "gpt-oss-20b, dequantised": config(
        *("GptOssForCausalLM", "gpt_oss", (201088, 2880, 2880, 24, 64, 8, 131072)),
        **dict(attention_bias=True, experts_per_token=4, head_dim=64, initial_context_length=4096),
        **dict(num_experts_per_tok=4, num_local_experts=32, output_router_logits=False, rms_norm_eps=1e-5),
        **dict(rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0),
        layer_types=["sliding_attention", "full_attention"] * 12,
        rope_scaling=dict(
            **dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096),
            **dict(rope_type="yarn", truncate=False),
        ),
        tie_word_embeddings=False,
    ),
    "DeepSeek-V3, dequantised": config(
        *("DeepseekV3ForCausalLM", "deepseek_v3", (129280, 7168, 18432, 61, 128, 128, 163840)),
        **dict(attention_bias=False, aux_loss_alpha=0.001, ep_size=1, first_k_dense_replace=3, kv_lora_rank=512),
        **dict(moe_intermediate_size=2048, moe_layer_freq=1, n_group=8, n_routed_experts=256, n_shared_experts=1),
        **dict(norm_topk_prob=True, num_experts_per_tok=8, num_nextn_predict_layers=1, pretraining_tp=1),
        **dict(q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, rms_norm_eps=1e-6, rope_theta=10000),
        **dict(routed_scaling_factor=2.5, scoring_func="sigmoid", seq_aux=True, tie_word_embeddings=False),
        **dict(topk_group=4, topk_method="noaux_tc", v_head_dim=128),
        rope_scaling=dict(
            **dict(beta_fast=32, beta_slow=1, factor=40, mscale=1.0, mscale_all_dim=1.0),
            **dict(original_max_position_embeddings=4096, type="yarn"),
        ),
    ),
    "Mamba-Codestral-7B-v0.1": {
        **dict(architectures=["Mamba2ForCausalLM"], chunk_size=256, conv_kernel=4, expand=2, head_dim=64),
        **dict(hidden_act="silu", hidden_size=4096, initializer_range=0.1, intermediate_size=8192),
        **dict(layer_norm_epsilon=1e-5, model_type="mamba2", n_groups=8, norm_before_gate=True, num_heads=128),
        **dict(num_hidden_layers=64, rescale_prenorm_residual=False, residual_in_fp32=True, rms_norm=True),
        **dict(state_size=128, tie_word_embeddings=False, time_step_floor=1e-4, time_step_init_scheme="random"),
        **dict(time_step_limit=[0.0, float("inf")], time_step_max=0.1, time_step_min=0.001, time_step_rank=256),
        **dict(time_step_scale=1.0, torch_dtype="bfloat16", use_bias=False, use_cache=True, use_conv_bias=True),
        **dict(vocab_size=32768),
    },
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_read_and_has_as_many_weights(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASES[name]))
    read, family = hf.read_config(tmp_path)
    assert family.architecture in RELEASES[name]["architectures"]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    # DeepSeek's correction is a buffer there.
    corrections = sum(b.numel() for n, b in theirs.named_buffers() if n.endswith("e_score_correction_bias"))
    assert parameter_count(abstract_params(make_model(read))) == theirs.num_parameters() + corrections
    # Every setting that both have, as transformers understands it: what it would write is read as the same model.
    theirs.config.save_pretrained(tmp_path / "again")
    assert hf.identity(hf.read_config(tmp_path / "again")[0]) == hf.identity(read)
