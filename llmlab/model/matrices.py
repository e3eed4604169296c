"""Which weights are matrices that something is multiplied with, by their path; and trees with some leaves replaced."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from llmlab.core.errors import UserError, nearest
from llmlab.core.mesh import Axes, is_axes
from llmlab.model.types import Model, Params

# What `include` is by default: all matrices of layers, the head apart.
OF_LAYERS = r"^layers\."
# Of an array with one of these, each entry is a weight of its own.
STACKED = ("layers", "experts")
# What is looked up by row, and what chooses by differences that rounding would turn.
_APART = re.compile(r"^embedding\.|\.router_DE$")


class Matrix(NamedTuple):
    """A weight [*stack, *in, *out]: `stack` dimensions of layers and experts first, then `dims_in` contracted ones."""

    axes: Axes
    stack: int
    dims_in: int


def matrices(model: Model, include: str = "") -> dict[str, Matrix]:
    """The matrices of layers and head in whose path, `layers.0.mlp.up_DF`, the regular expression `include` is found.

    Routers of experts are not among them: they stay as they are.

    Raises:
      UserError: it is no regular expression, or found in none of them.
    """
    known = {}
    for keys, axes in jax.tree_util.tree_leaves_with_path(model.axes, is_leaf=is_axes):
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if is_matrix(axes) and not _APART.search(path):
            stack = sum(axis in STACKED for axis in axes)
            known[path] = Matrix(axes, stack, 1 if axes[stack] in ("embed", "latent") else len(axes) - stack - 1)
    check_regex(include)
    found = {path: matrix for path, matrix in known.items() if re.search(include, path)}
    if not found:
        raise UserError(
            f"include={include!r} is found in the path of no matrix of this model: {nearest(include, known)}"
        )
    return found


def is_matrix(axes: Axes) -> bool:
    """Whether these are the logical axes of a matrix: one side of it is the residual stream, a latent or a rank.

    Never by its number of dimensions: a stacked norm has two and is a vector, a bias of query heads or of experts too.
    """
    sides = {"embed", "latent", "rank"}
    return not sides.isdisjoint(axes) and len([axis for axis in axes if axis not in STACKED]) > 1


def check_regex(include: str) -> None:
    """Raises UserError where `include` is no regular expression."""
    try:
        re.compile(include)
    except re.error as error:
        raise UserError(f"include={include!r} is no regular expression: {error}") from None


def leaf_at(params: Params, path: str) -> Any:
    """What stands at `layers.0.mlp.up_DF`."""
    node: Any = params
    for name in path.split("."):
        node = node[name]
    return node


def with_leaves(params: Params, leaves: Mapping[str, Any]) -> Params:
    """The same tree with other leaves at these paths; all others are shared, not copied."""
    out = dict(params)
    for path, leaf in leaves.items():
        *folders, name = path.split(".")
        node = out
        for folder in folders:
            node[folder] = dict(node[folder])
            node = node[folder]
        node[name] = leaf
    return out
