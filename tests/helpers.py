"""What several tests share: tiny models, packed batches, differences leaf by leaf, what each kind of layer keeps."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.data.pipeline import TokenBatch
from llmlab.model.config import ModelConfig, gpt2, llama
from llmlab.model.cost import abstract_params
from llmlab.model.transformer import unembed
from llmlab.model.types import Inputs, Model, Params

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


def logits_in_pieces(model: Model, params: Params, tokens_BT: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """The logits of rows that are read into a cache piece by piece; pieces of one length compile once."""

    @jax.jit
    def step(params: Params, piece: Inputs, cache: Any) -> Any:
        unstacked = model.unstack(params)
        out = model.apply(unstacked, piece, cache=cache)
        return unembed(out.hidden_BTD, model.head(unstacked), model.config.logit_softcap), out.cache

    rows, time = tokens_BT.shape
    cache, parts = model.init_cache(rows, time), []
    for begin, end in itertools.pairwise((0, *cuts, time)):
        positions_BT = np.tile(np.arange(begin, end, dtype=np.int32), (rows, 1))
        logits_BTV, cache = step(params, Inputs(tokens_BT[:, begin:end], positions_BT, 0 * positions_BT + 1), cache)  # type: ignore[arg-type]
        parts.append(np.asarray(logits_BTV))
    assert cache["lengths_B"].tolist() == [time] * rows
    return np.concatenate(parts, axis=1)


def assert_packed_is_as_if_alone(model: Model, params: Params, tolerance: float) -> None:
    """Two documents in a row give what each gives in a row of its own, padded to the same length."""
    batch = packed_batch(rows=3, length=14)
    apply = jax.jit(lambda *row: model.apply(params, Inputs(*row)).hidden_BTD)
    together = np.asarray(apply(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))
    index_BT = np.tile(np.arange(14, dtype=np.int32), (3, 1))
    for segment in (1, 2):
        where_B = [np.flatnonzero(ids_T == segment) for ids_T in np.asarray(batch.segment_ids_BT)]
        alone_BT, real_BT = np.zeros((3, 14), np.int32), np.zeros((3, 14), np.int32)
        for row, where in enumerate(where_B):
            alone_BT[row, : len(where)], real_BT[row, : len(where)] = batch.tokens_BT[row, where], 1
        hidden_BTD = np.asarray(apply(alone_BT, index_BT, real_BT))
        for row, where in enumerate(where_B):
            assert relative(together[row, where], hidden_BTD[row, : len(where)]) < tolerance


def host(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), tree)
