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
    """Weights that every token is multiplied with: all matrices, the head included, the embedding look-up not."""
    attention = config.width * config.H * (2 * config.heads + 2 * config.K)
    mlp = config.width * config.F * (3 if config.gated else 2)
    return config.layers * (attention + mlp) + config.width * config.vocab_size


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of a training step for each token: 6 a weight, 12·H·N·S a layer (PaLM, arXiv 2204.02311, appendix B).

    S is what a token can attend to: the sequence length, or the window of a local layer. As there, causality is not
    discounted and recomputation does not count.
    """
    attended = 0
    for layer in range(config.layers):
        local = config.kind(layer) == "local" and config.window is not None
        attended += min(sequence_length, config.window or sequence_length) if local else sequence_length
    return 6.0 * product_parameters(config) + 12.0 * config.H * config.heads * attended
