"""Between the tensors of a Hugging Face folder and our stacked parameters: a family's ordered table of names.

A rule names one tensor of theirs and the leaf (or leaves) of ours that it is. `{layer}` in its name makes one tensor
for each layer, `{expert}` for each expert too. A rule whose leaves the model does not have says nothing: one table
serves a family's variants.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np

from llmlab.core.errors import UserError
from llmlab.model.config import ModelConfig
from llmlab.model.cost import abstract_params
from llmlab.model.types import Model

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One tensor of theirs.

    theirs: its name. ours: paths of leaves, below their layer where `theirs` has one.
    turned: theirs is [out, in], as torch.nn.Linear has it, where ours is [in…, out…]; else both read the same way. A
      vector that is turned is the weight of one output.
    dims_in: how many of our leaf's dimensions are `in`; 0 for a bias.
    join: how several leaves make one: side by side along `out`; side by side in each head; or alternating, number by
      number.
    stacked: how many leading dimensions, such as that of the experts, both have and keep.
    depthwise: theirs is a depthwise torch.nn.Conv1d's [out, 1, in].
    """

    theirs: str
    ours: tuple[str, ...]
    turned: bool = False
    dims_in: int = 1
    join: Literal["beside", "in_head", "alternating"] = "beside"
    stacked: int = 0
    depthwise: bool = False

    def shape(self, shapes: list[Shape]) -> Shape:
        """The tensor's shape, given those of one layer of our leaves."""
        flat = [self._flat(shape) for shape in shapes]
        *rest, last = (*flat[0][:-1], sum(shape[-1] for shape in flat))
        if not self.turned:
            return (*rest, last)
        return (*rest[:-1], last, *(1,) * self.depthwise, rest[-1])

    def split(self, x: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
        """Our leaves, as views of their tensor where that can be."""
        x = x[:, 0] if self.depthwise else x
        x = np.swapaxes(x, -1, -2) if self.turned else x
        if self.join == "alternating":
            parts = [x[..., i :: len(shapes)] for i in range(len(shapes))]
        else:
            in_head = self.join == "in_head"
            sizes = [(shape if in_head else self._flat(shape))[-1] for shape in shapes]
            x = x.reshape(*shapes[0][:-1], sum(sizes)) if in_head else x
            parts = np.split(x, np.cumsum(sizes)[:-1], axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def joined(self, leaves: list[np.ndarray]) -> np.ndarray:
        """Their tensor from our leaves."""
        if self.join == "alternating":
            x = np.stack([leaf.reshape(self._flat(leaf.shape)) for leaf in leaves], axis=-1)
            x = x.reshape(*x.shape[:-2], -1)
        elif self.join == "in_head":
            x = np.concatenate(leaves, axis=-1)
            x = x.reshape(self._flat(x.shape))
        else:
            x = np.concatenate([leaf.reshape(self._flat(leaf.shape)) for leaf in leaves], axis=-1)
        x = np.swapaxes(x, -1, -2) if self.turned else x
        return np.ascontiguousarray(x[:, None] if self.depthwise else x)

    def _flat(self, shape: Shape) -> Shape:
        """[…, in, out] after what is stacked; a vector is all `out`, or [in, 1] where it is turned."""
        stacked, shape = shape[: self.stacked], shape[self.stacked :]
        if (len(shape) == 1 and not self.turned) or not self.dims_in:
            return (*stacked, math.prod(shape))
        return (*stacked, math.prod(shape[: self.dims_in]), math.prod(shape[self.dims_in :]))


class Place(NamedTuple):
    """Where one tensor goes: its rule, and for each of our leaves the path, the index in the stack, and the shape."""

    rule: Rule
    leaves: tuple[tuple[str, tuple[int, ...], Shape], ...]

    @property
    def shapes(self) -> list[Shape]:
        """Of one layer of each leaf."""
        return [shape for _, _, shape in self.leaves]


def places(model: Model, rules: tuple[Rule, ...]) -> dict[str, Place]:
    """Every tensor that this model is made of, by their name, in the table's order.

    Raises:
      UserError: two rules name one tensor or one of our weights, or a weight of ours has no rule.
    """
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(model))
    }
    found: dict[str, Place] = {}
    filled: dict[tuple[str, tuple[int, ...]], str] = {}
    for rule in rules:
        for name, leaves in _instances(rule, model.config, shapes):
            if name in found:
                raise UserError(f"two rules of the weight table give {name}: it can be matched once only")
            found[name] = Place(rule, leaves)
            for path, index, _ in leaves:
                if (path, index) in filled:
                    raise UserError(f"{name} and {filled[path, index]} both fill {path}{list(index)}: mend the table")
                filled[path, index] = name
    covered: dict[str, int] = {}
    for path, index in filled:
        covered[path] = covered.get(path, 0) + 1
        whole = math.prod(shapes[path][: len(index)])
        if covered[path] == whole:
            shapes.pop(path)
    if shapes:
        raise UserError(f"the weight table has no rule for {sorted(shapes)[0]}: this family cannot hold such a model")
    return found


def _instances(
    rule: Rule, config: ModelConfig, shapes: dict[str, Shape]
) -> Iterator[tuple[str, tuple[tuple[str, tuple[int, ...], Shape], ...]]]:
    """(name, leaves) of every tensor of this rule that the model has."""
    if "{layer}" not in rule.theirs:
        if all(path in shapes for path in rule.ours):
            yield rule.theirs, tuple((path, (), shapes[path]) for path in rule.ours)
        return
    places = {layer: (slot, i) for slot, stack in enumerate(config.stacks()) for i, layer in enumerate(stack)}
    for layer, (slot, place) in sorted(places.items()):
        paths = [f"layers.{slot}.{path}" for path in rule.ours]
        if not all(path in shapes for path in paths):
            continue
        index = (place,)
        if "{expert}" in rule.theirs:
            for expert in range(shapes[paths[0]][1]):
                leaves = tuple((path, (*index, expert), shapes[path][2:]) for path in paths)
                yield rule.theirs.format(layer=layer, expert=expert), leaves
        else:
            yield rule.theirs.format(layer=layer), tuple((path, index, shapes[path][1:]) for path in paths)


def linear(
    theirs: str, *ours: str, dims_in: int = 1, turned: bool = True, join: Literal["beside", "in_head"] = "beside"
) -> tuple[Rule, Rule]:
    """The weight and, where the model has one, the bias of a linear layer; several of ours in one of theirs."""
    return (
        Rule(f"{theirs}.weight", ours, turned, dims_in, join),
        Rule(f"{theirs}.bias", tuple(f"{name}_bias" for name in ours), dims_in=0, join=join),
    )
