"""Weight-only quantisation: a weight is a small integer times the scale of its group, symmetric about zero.

What is multiplied stays in the compute dtype; only what is stored shrinks, to `bits` and a scale's share of a group.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.model import weights
from llmlab.model.matrices import OF_LAYERS, check_regex, leaf_at, matrices, with_leaves
from llmlab.model.types import Model, Params

GROUP_OF_4_BITS = 32


@dataclasses.dataclass(frozen=True)
class QuantiseConfig:
    """bits: 8 or 4. group: so many consecutive inputs share a scale, for each output by itself; 0 is all of them with
    8 bits, 32 with 4. include: the matrices, by a regular expression found in their path (`layers.0.mlp.up_DF`); by
    default all of layers, and with "" the head too. Embeddings, norms, biases and routers of experts stay as they are.
    """

    bits: Literal[8, 4] = 8
    group: int = 0
    include: str = OF_LAYERS

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise UserError(f"bits={self.bits} is not a choice: 8 or 4")
        if self.group < 0:
            raise UserError(f"group={self.group} should be 0 (chosen for you) or more")
        check_regex(self.include)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["bits", "dims_in", "dims_out"],
)
@dataclasses.dataclass(frozen=True)
class QuantisedLeaf:
    """A `WeightLeaf`. values: int8 [*stack, *in, *out]; scales: [*stack, groups of the flattened inputs, *out].

    With 4 bits two neighbours along the last dimension of `in` share a byte, the first of them in its lower half.
    """

    values: Any
    scales: Any
    bits: int
    dims_in: int
    dims_out: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight it stands for."""
        last = self.ndim - self.dims_out - 1
        shape = self.values.shape
        return (*shape[:last], shape[last] * 8 // self.bits, *shape[last + 1 :])

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    def dense(self, dtype: DTypeLike) -> jax.Array:
        """The whole weight as an array."""
        stack = self.shape[: self.ndim - self.dims_in - self.dims_out]
        groups, size_out = self.scales.shape[len(stack)], math.prod(self.scales.shape[len(stack) + 1 :])
        integers = self.values.reshape(*stack, -1, size_out)
        if self.bits == 4:
            # Shifts of signed integers keep the sign.
            integers = jnp.stack([(integers << 4) >> 4, integers >> 4], axis=-2)
        precise = accumulation_dtype(self.dtype)
        grouped = integers.reshape(*stack, groups, -1, size_out).astype(precise)
        weight = grouped * self.scales.reshape(*stack, groups, 1, size_out).astype(precise)
        return weight.astype(dtype).reshape(self.shape)

    def product(self, x: jax.Array, dims_in: int) -> jax.Array:
        """x, whose last axis is all inputs, against the weight; all outputs come out flat."""

        def times(x: jax.Array, leaf: QuantisedLeaf) -> jax.Array:
            weight = leaf.dense(x.dtype)
            return x @ weight.reshape(x.shape[-1], -1)

        # Made dense again in the backward pass: kept until then, all layers would be dense at once.
        return jax.checkpoint(times)(x, self)

    def grouped(self, x_MI: jax.Array, rows_E: jax.Array) -> jax.Array:
        """Rows of x_MI, sorted by group, each against its group's matrix."""

        def times(x_MI: jax.Array, leaf: QuantisedLeaf) -> jax.Array:
            return weights.grouped_product(x_MI, leaf.dense(x_MI.dtype), rows_E)

        return jax.checkpoint(times)(x_MI, self)


def quantise(model: Model, params: Params, config: QuantiseConfig, *, release: bool = False) -> Params:
    """`params` with a `QuantisedLeaf` for every matrix that `config` includes; all else is shared, not copied.

    Scales have the dtype of the weight. `release` deletes each matrix once it is quantised: `params` are used up.

    Raises:
      UserError: the group does not divide the inputs of a matrix, or 4 bits would leave half a byte.
    """
    leaves = {}
    for path, matrix in matrices(model, config.include).items():
        leaf = leaf_at(params, path)
        inside = leaf.shape[matrix.stack : matrix.stack + matrix.dims_in]
        size_in = math.prod(inside)
        group = config.group or (GROUP_OF_4_BITS if config.bits == 4 else size_in)
        if size_in % group:
            fits = max(g for g in range(1, min(group, size_in) + 1) if size_in % g == 0)
            raise UserError(f"group={group} does not divide the {size_in} inputs of {path}: try group={fits}")
        if config.bits == 4 and inside[-1] % 2:
            raise UserError(f"4 bits put two values in a byte, and {path} has {inside[-1]} of them: use 8 bits")
        found = _quantised(leaf, config.bits, group, matrix.stack, matrix.dims_in)
        if model.partition is not None:
            of_scales = (*matrix.axes[: matrix.stack], None, *matrix.axes[matrix.stack + matrix.dims_in :])
            shardings = model.partition.sharding(*matrix.axes), model.partition.sharding(*of_scales)
            placed = jax.device_put((found.values, found.scales), shardings)
            found = dataclasses.replace(found, values=placed[0], scales=placed[1])
        leaves[path] = jax.block_until_ready(found) if release else found
        if release:
            leaf.delete()
    return with_leaves(params, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantised(leaf: jax.Array, bits: int, group: int, stack: int, dims_in: int) -> QuantisedLeaf:
    lead, inside, outside = leaf.shape[:stack], leaf.shape[stack : stack + dims_in], leaf.shape[stack + dims_in :]
    weight = leaf.astype(accumulation_dtype(leaf.dtype)).reshape(*lead, -1, group, math.prod(outside))
    most = 2 ** (bits - 1) - 1
    scales = (jnp.max(jnp.abs(weight), axis=-2) / most).astype(leaf.dtype)
    steps = scales.astype(weight.dtype)[..., None, :]
    values = jnp.clip(jnp.round(weight / jnp.where(steps == 0, 1, steps)), -most, most).astype(jnp.int8)
    values = values.reshape(*lead, *inside, *outside)
    if bits == 4:
        pairs = values.reshape(*lead, *inside[:-1], inside[-1] // 2, 2, *outside)
        first, second = (jax.lax.index_in_dim(pairs, i, axis=stack + dims_in, keepdims=False) for i in (0, 1))
        values = (first & 15) | (second << 4)
    scales = scales.reshape(*lead, -1, *outside)
    return QuantisedLeaf(values, scales, bits, dims_in, len(outside))
