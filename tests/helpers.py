"""What several tests share: tiny models, packed batches, differences leaf by leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.data.pipeline import TokenBatch
from llmlab.model.config import ModelConfig, gpt2, llama
from llmlab.model.cost import abstract_params
from llmlab.model.types import Model

VOCAB = 48


def tiny_llama(**overrides: Any) -> ModelConfig:
    return llama(
        **{
            **dict(width=16, layers=2, heads=4, kv_heads=2, vocab_size=VOCAB, max_positions=64, mlp_width=32),
            **overrides,
        }
    )


def tiny_gpt2(**overrides: Any) -> ModelConfig:
    return gpt2(**{**dict(width=16, layers=2, heads=4, vocab_size=VOCAB, max_positions=64), **overrides})


def packed_batch(rows: int = 8, length: int = 16, seed: int = 0, vocab: int = VOCAB) -> TokenBatch:
    """Rows of two documents and some padding at the end, cut at another place in every row."""
    rng = np.random.default_rng(seed)
    tokens_BT = rng.integers(vocab, size=(rows, length)).astype(np.int32)
    targets_BT = rng.integers(vocab, size=(rows, length)).astype(np.int32)
    index_1T = np.arange(length, dtype=np.int32)[None]
    cut_B1 = rng.integers(1, length - 2, size=(rows, 1)).astype(np.int32)
    end_B1 = rng.integers(length - 1, length + 1, size=(rows, 1)).astype(np.int32)
    real_BT = index_1T < end_B1
    segment_ids_BT = np.where(real_BT, 1 + (index_1T >= cut_B1), 0).astype(np.int32)
    positions_BT = np.where(index_1T >= cut_B1, index_1T - cut_B1, index_1T).astype(np.int32)
    return TokenBatch(tokens_BT, targets_BT, real_BT.astype(np.float32), positions_BT, segment_ids_BT)  # type: ignore[arg-type]


def relative(mine: Any, reference: Any) -> float:
    """|mine - reference| / |reference| in Euclidean norm, in float64."""
    a, b = np.asarray(mine, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def assert_close(mine: Any, reference: Any, tolerance: float) -> None:
    """Every leaf, in relative norm."""
    assert jax.tree.structure(mine) == jax.tree.structure(reference)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(mine), jax.tree.leaves(reference), strict=True):
        error = relative(a, b)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)} differs by {error:.2e}, allowed {tolerance:.0e}"


def random_params(model: Model, scale: float = 0.3, seed: int = 7) -> Any:
    """Weights drawn by numpy, which compiles nothing; norms and biases too, lest ones and zeros hide what they do."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(jnp.asarray, jax.tree_util.tree_map_with_path(draw, abstract_params(model)))


def host(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), tree)
