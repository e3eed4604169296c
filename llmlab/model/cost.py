"""What a model costs, by arithmetic: parameters, FLOPs, bytes. Nothing is computed or allocated."""

import math
from typing import Any

import jax

from llmlab.model.config import ModelConfig
from llmlab.model.types import Model


def abstract_params(model: Model) -> Any:
    """The parameters' shapes and dtypes."""
    return jax.eval_shape(model.init, jax.random.key(0))


def parameter_count(tree: Any) -> int:
    """Numbers in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def product_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: the head and convolutions, not the look-up; its own experts only."""
    layers = sum(_mixer_parameters(config, layer) + _mlp_parameters(config, layer) for layer in range(config.layers))
    return layers + config.width * (1 if config.head == "score" else config.vocab_size)


def flops_per_token(config: ModelConfig, sequence_length: int, frozen: bool = False) -> float:
    """Model FLOPs of a training step for each token: 6 a weight, 12·H·N·S a layer (PaLM, arXiv 2204.02311, appendix B).

    S is what a token can attend to: the sequence length, or the window of a local layer; 2·H is the width of a key and
    of a value. As there, causality is not discounted and recomputation does not count. A mamba layer writes to its
    state and reads it, 12·H·N·Z, whatever the length; the products that chunks take instead do not count. Of `frozen`
    weights there is no gradient: 4 a weight.
    """
    mixed = 0
    for kind in map(config.kind, range(config.layers)):
        if kind == "mamba":
            mixed += 2 * config.ssm_heads * config.ssm.head_dim * config.ssm.state
        else:
            window = config.window if kind == "local" and config.window else sequence_length
            mixed += config.heads * (config.H + config.value_dim) * min(sequence_length, window)
    return (4.0 if frozen else 6.0) * product_parameters(config) + 6.0 * mixed


def _mixer_parameters(config: ModelConfig, layer: int) -> int:
    N, K, H, latent, s = config.heads, config.K, config.H, config.latent, config.ssm
    if config.kind(layer) == "mamba":
        inner, shared = config.ssm_heads * s.head_dim, 2 * s.groups * s.state
        return config.width * (3 * inner + shared + config.ssm_heads) + s.conv * (inner + shared)
    if not latent.kv_rank:
        return config.width * H * (2 * N + 2 * K)
    down = config.width * (latent.kv_rank + latent.rope_dim)
    up = latent.kv_rank * N * (latent.nope_dim + latent.value_dim)
    queries = latent.q_rank * (config.width + N * H) if latent.q_rank else config.width * N * H
    return down + up + queries + N * latent.value_dim * config.width


def _mlp_parameters(config: ModelConfig, layer: int) -> int:
    experts, matrices = config.experts, 3 if config.gated else 2
    if not config.has_mlp(config.kind(layer)):
        return 0
    if not config.has_experts(layer):
        return matrices * config.width * config.F
    mlps = experts.chosen + experts.shared
    return config.width * (matrices * config.expert_width * mlps + experts.count)
