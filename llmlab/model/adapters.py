"""Low-rank adapters, LoRA and DoRA: a small tree of its own beside frozen weights, of arrays or quantised.

`{path: LowRank}` is what is trained and saved; over a reward model also the weight of its score, whole, by its path.
`adapted` lays it over the weights, which are shared and not copied, so several adapters may stand over one base; the
model reads the result as it reads any weights.
"""

import dataclasses
import functools
import math
import zlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.model import weights
from llmlab.model.matrices import OF_LAYERS, check_regex, leaf_at, matrices, with_leaves
from llmlab.model.quantise import QuantiseConfig, quantise
from llmlab.model.score import SCORE, fresh_score
from llmlab.model.types import Model, Params


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """An adapter over the weights of run.init_from, which stay frozen.

    kind: none; lora, W + scale·A·B (arXiv 2106.09685); dora, the same with the norm of each column of W learned apart
    from its direction (arXiv 2402.09353).
    rank: columns of A. alpha: scale is alpha / rank, or with `rslora` alpha / sqrt(rank), which serves every rank with
    one learning rate (arXiv 2312.03732).
    include: the matrices that get one, by a regular expression found in their path (`layers.0.attention.query_DNH`).
    The default is all of layers but routers of experts: queries and values alone, the first paper's choice, do not
    reach what training all weights does, and all linear layers do (arXiv 2305.14314, section 4).
    base_bits: 8 or 4 quantise the frozen matrices of layers (as QLoRA, there), here and wherever the adapter is opened;
    0 leaves them. base_group: inputs that share a scale; 0 is all of them with 8 bits, 32 with 4.
    """

    kind: Literal["none", "lora", "dora"] = "none"
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    include: str = OF_LAYERS
    base_bits: Literal[0, 4, 8] = 0
    base_group: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"adapter.rank={self.rank} should be at least 1")
        if not self.alpha > 0:
            raise UserError(f"adapter.alpha={self.alpha} should be more than 0")
        if self.base_group < 0:
            raise UserError(f"adapter.base_group={self.base_group} should be 0 (chosen for you) or more")
        check_regex(self.include)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b", "magnitude"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    """What is learned of one weight [*stack, *in, *out]: a [*stack, *in, rank], b [*stack, rank, *out].

    magnitude, DoRA's norms of columns, is [*stack, *out]; None for LoRA.
    """

    a: Any
    b: Any
    magnitude: Any
    scale: float


# By path: a `LowRank`, or what stands in place of the weight itself.
Adapter = dict[str, Any]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "update"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AdaptedLeaf:
    """An `UpdatedLeaf`: `base`, an array or a quantised leaf, with a low-rank update."""

    base: Any
    update: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The weight that the update makes of the base: merged."""
        w_IO, a_Ir, b_rO = self._matrices()
        merged_IO = w_IO + self.update.scale * (a_Ir @ b_rO)
        if self.update.magnitude is not None:
            merged_IO = merged_IO * self._factor_O()[..., None, :]
        return merged_IO.astype(dtype).reshape(self.shape)

    def product(self, x: jax.Array, dims_in: int) -> jax.Array:
        """x, whose last axis is all inputs, against the weight; all outputs come out flat. A·B is never made."""
        return self.updated(x, weights.contracted(x, self.base, dims_in))

    def updated(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """`product`, from x and what the base makes of it."""
        a, b, scale = self.update.a, self.update.b, self.update.scale
        through = scale * (x @ a.reshape(-1, a.shape[-1]).astype(x.dtype))
        out = out + through @ b.reshape(b.shape[0], -1).astype(x.dtype)
        if self.update.magnitude is None:
            return out
        return out * self._factor_O().astype(x.dtype).reshape((1,) * (out.ndim - 1) + (-1,))

    def grouped(self, x_MI: jax.Array, rows_E: jax.Array) -> jax.Array:
        """`product` for rows of x_MI sorted by group, each group with its own matrix."""
        through_Mr = self.update.scale * weights.grouped_product(x_MI, self.update.a, rows_E)
        out_MO = weights.grouped_product(x_MI, self.base, rows_E)
        out_MO = out_MO + weights.grouped_product(through_Mr, self.update.b, rows_E)
        if self.update.magnitude is None:
            return out_MO
        factor_EO = self._factor_O().astype(x_MI.dtype)
        return out_MO * jnp.repeat(factor_EO, rows_E, axis=0, total_repeat_length=len(x_MI))

    def norms_O(self) -> jax.Array:
        """‖W + s·A·B‖ of every column, [*stack, all outputs], by ‖w‖² + 2s·(wᵀA)·b + s²·bᵀ(AᵀA)b: A·B is not made."""
        w_IO, a_Ir, b_rO = self._matrices()
        scale, a_rI = self.update.scale, a_Ir.mT
        across_O = jnp.sum((a_rI @ w_IO) * b_rO, axis=-2)
        within_O = jnp.sum((a_rI @ a_Ir @ b_rO) * b_rO, axis=-2)
        return jnp.sqrt(jnp.sum(jnp.square(w_IO), axis=-2) + 2 * scale * across_O + scale**2 * within_O)

    def _factor_O(self) -> jax.Array:
        """What DoRA multiplies each column by, [*stack, all outputs].

        The norm counts as a constant (section 4.3): its gradient costs memory and changes little.
        """
        norms_O = jax.lax.stop_gradient(self).norms_O()
        # A column of zeros stays one.
        return jnp.where(
            norms_O == 0, 0, self.update.magnitude.reshape(norms_O.shape) / jnp.where(norms_O == 0, 1, norms_O)
        )

    def _matrices(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """W, A and B as [*stack, I, O], [*stack, I, rank] and [*stack, rank, O], in at least float32."""
        a, b = self.update.a, self.update.b
        stack = a.shape[: a.ndim + b.ndim - self.base.ndim - 2]
        rank, dtype = a.shape[-1], accumulation_dtype(a.dtype)
        w_IO = weights.dense(self.base, dtype).reshape(*stack, math.prod(a.shape[len(stack) : -1]), -1)
        return w_IO, a.astype(dtype).reshape(*stack, -1, rank), b.astype(dtype).reshape(*stack, rank, -1)


def frozen_base(model: Model, params: Params, config: AdapterConfig, *, release: bool = False) -> Params:
    """`params` as they stand under the adapter: quantised where `config.base_bits` says so; `release` as in `quantise`.

    Raises:
      UserError: they cannot be.
    """
    if not config.base_bits:
        return params
    try:
        return quantise(model, params, QuantiseConfig(config.base_bits, config.base_group), release=release)
    except UserError as error:
        raise UserError(
            f"adapter.base_bits={config.base_bits}, adapter.base_group={config.base_group}: {error}"
        ) from None


def add_adapter(model: Model, params: Params, config: AdapterConfig, key: jax.Array) -> Adapter:
    """The adapter before its first step, which changes nothing: B is zero, DoRA's magnitudes are the norms of `params`.

    A is uniform within 1/sqrt(inputs), as PEFT draws it. All are at least float32, whatever the base is: their updates
    are too small for less. A score begins as it is in `params`, or fresh where they were trained without one.

    Raises:
      UserError: `config.include` is found in no matrix.
    """
    adapter: Adapter = {}
    for path, matrix in matrices(model, config.include).items():
        leaf = leaf_at(params, path)
        begin, dtype = matrix.stack + matrix.dims_in, accumulation_dtype(leaf.dtype)
        bound = math.prod(leaf.shape[matrix.stack : begin]) ** -0.5
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(own_key, (*leaf.shape[:begin], config.rank), dtype, -bound, bound)
        b = jnp.zeros((*leaf.shape[: matrix.stack], config.rank, *leaf.shape[begin:]), dtype)
        update = LowRank(a, b, None, config.scale)
        if config.kind == "dora":
            norms_O = AdaptedLeaf(leaf, update).norms_O()
            magnitude = norms_O.reshape(*leaf.shape[: matrix.stack], *leaf.shape[begin:])
            update = dataclasses.replace(update, magnitude=magnitude)
        adapter[path] = update
    if model.config.head == "score":
        begun = leaf_at(params, SCORE)
        # A copy, not an alias: the step donates what is trained and what is frozen, and no buffer may go twice.
        adapter[SCORE] = fresh_score(model, key) if begun is None else jnp.copy(begun)
    return adapter


def adapter_axes(model: Model, config: AdapterConfig) -> Adapter:
    """The logical axes of every array of the adapter, in a tree like its own."""
    axes: Adapter = {}
    for path, matrix in matrices(model, config.include).items():
        stack, begin = matrix.axes[: matrix.stack], matrix.stack + matrix.dims_in
        magnitude = (*stack, *matrix.axes[begin:]) if config.kind == "dora" else None
        a, b = (*matrix.axes[:begin], "rank"), (*stack, "rank", *matrix.axes[begin:])
        axes[path] = LowRank(a, b, magnitude, config.scale)
    return axes | ({SCORE: leaf_at(model.axes, SCORE)} if model.config.head == "score" else {})


def adapted(params: Params, adapter: Adapter) -> Params:
    """`params` as the model reads them under this adapter; their arrays are shared, not copied."""

    def over(path: str, update: Any) -> Any:
        return AdaptedLeaf(leaf_at(params, path), update) if isinstance(update, LowRank) else update

    return with_leaves(params, {path: over(path, update) for path, update in adapter.items()})


def adapter_of(params: Params) -> Adapter:
    """The adapter that lies over these weights, with the score's weight of a reward model; {} where none does."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, AdaptedLeaf))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    updates = {path: leaf.update for path, leaf in found.items() if isinstance(leaf, AdaptedLeaf)}
    return updates | {path: leaf for path, leaf in found.items() if updates and path == SCORE}


def merge_adapter(params: Params, adapter: Adapter) -> Params:
    """Full weights again: one array for every leaf, the adapter merged into it."""
    return weights.whole(adapted(params, adapter))


def without_adapter(params: Params) -> Params:
    """The weights under the adapter, as a reference that no gradient reaches; their arrays are shared, not copied."""

    def base(node: Any) -> Any:
        return node.base if isinstance(node, AdaptedLeaf) else node

    return jax.lax.stop_gradient(jax.tree.map(base, params, is_leaf=lambda node: isinstance(node, AdaptedLeaf)))
