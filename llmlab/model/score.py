"""The head of reward models: one number a token, in place of a logit for each of the vocabulary (`model.head="score"`).

Its weight is a vector beside the final norm, stored in at least float32; adapters leave it as it is and train it whole.
"""

import jax
import jax.numpy as jnp

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.model import weights
from llmlab.model.base import Initializer
from llmlab.model.config import ModelConfig
from llmlab.model.matrices import leaf_at
from llmlab.model.types import Model, Params

SCORE = "head.score_D"


def score_init(width: int) -> Initializer:
    """normal(1 / sqrt(width + 1)) (Stiennon et al., arXiv 2009.01325).

    From zeros, the first step would reach this weight alone: no gradient goes through it to what lies below.
    """
    return jax.nn.initializers.normal((width + 1) ** -0.5)


def scored(params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """score_BT = hidden · w, in at least float32."""
    dtype = accumulation_dtype(hidden_BTD.dtype)
    w_D = weights.dense(leaf_at(params, SCORE), dtype)
    # Accelerators otherwise round the factors to bfloat16.
    return jnp.einsum("BTD,D->BT", hidden_BTD.astype(dtype), w_D, precision=jax.lax.Precision.HIGHEST)


def fresh_score(model: Model, key: jax.Array) -> jax.Array:
    """The weight that `model.init(key)` has, the same on any mesh; the others are not made."""
    sharding = None if model.partition is None else model.partition.sharding(*leaf_at(model.axes, SCORE))
    return jax.jit(lambda key: leaf_at(model.init(key), SCORE), out_shardings=sharding)(key)


def check_predicts_tokens(config: ModelConfig) -> None:
    """Raises UserError where the model scores, and so can neither write nor be measured in bits per byte."""
    if config.head == "score":
        raise UserError(
            "this is a reward model (model.head=score): it scores text and predicts no tokens, so that it can neither "
            "write nor have a loss on text; name a model with model.head=tokens"
        )


def check_scores(config: ModelConfig) -> None:
    """Raises UserError where the model predicts tokens, and so has no score."""
    if config.head != "score":
        raise UserError(
            "this model predicts tokens (model.head=tokens) and gives no score: train a reward model from it, with "
            "model.head=score and --init_from"
        )
