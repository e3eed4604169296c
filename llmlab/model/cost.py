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
    """Weights that a token is multiplied with: the head included, the embedding look-up not; its own experts only."""
    layers = sum(_attention_parameters(config) + _mlp_parameters(config, layer) for layer in range(config.layers))
    return layers + config.width * config.vocab_size


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of a training step for each token: 6 a weight, 12·H·N·S a layer (PaLM, arXiv 2204.02311, appendix B).

    S is what a token can attend to: the sequence length, or the window of a local layer; 2·H is the width of a key and
    of a value. As there, causality is not discounted and recomputation does not count.
    """
    attended = 0
    for layer in range(config.layers):
        local = config.kind(layer) == "local" and config.window is not None
        attended += min(sequence_length, config.window or sequence_length) if local else sequence_length
    return 6.0 * product_parameters(config) + 6.0 * (config.H + config.value_dim) * config.heads * attended


def _attention_parameters(config: ModelConfig) -> int:
    N, K, H, latent = config.heads, config.K, config.H, config.latent
    if not latent.kv_rank:
        return config.width * H * (2 * N + 2 * K)
    down = config.width * (latent.kv_rank + latent.rope_dim)
    up = latent.kv_rank * N * (latent.nope_dim + latent.value_dim)
    queries = latent.q_rank * (config.width + N * H) if latent.q_rank else config.width * N * H
    return down + up + queries + N * latent.value_dim * config.width


def _mlp_parameters(config: ModelConfig, layer: int) -> int:
    experts, matrices = config.experts, 3 if config.gated else 2
    if not config.has_experts(layer):
        return matrices * config.width * config.F
    mlps = experts.chosen + experts.shared
    return config.width * (matrices * config.expert_width * mlps + experts.count)
