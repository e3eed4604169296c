"""The device mesh, and the one table that lays logical axes of arrays onto it.

Every weight and activation names its axes logically ("embed", "heads", "batch"); `Rules` maps those to mesh axes. XLA
inserts the communication. `Partition` is the pair of mesh and rules that the rest of the code carries around.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmlab.core.errors import UserError, nearest

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. An empty tuple replicates; an axis that a mesh does not split costs nothing."""

    # Activations.
    batch: tuple[str, ...] = ("data", "fsdp")
    time: tuple[str, ...] = ("sequence",)
    act_embed: tuple[str, ...] = ()
    act_mlp: tuple[str, ...] = ("tensor",)
    act_heads: tuple[str, ...] = ("tensor",)
    act_vocab: tuple[str, ...] = ("tensor",)
    # Weights.
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    mlp: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    # Each device multiplies its own tokens with all experts: split over devices, they would be gathered at every use.
    experts: tuple[str, ...] = ()
    latent: tuple[str, ...] = ("fsdp",)
    norm: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 on one of them takes all that are left.

    `data` replicates the weights, `fsdp` also splits them (and the optimizer state), `tensor` splits heads and
    feed-forward width, `sequence` splits time.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    rules: Rules = Rules()

    def __post_init__(self) -> None:
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(
                f"mesh.{{{','.join(MESH_AXES)}}}={sizes} should be positive, with -1 (all that are left) at most once"
            )
        for field in dataclasses.fields(self.rules):
            for axis in getattr(self.rules, field.name):
                if axis not in MESH_AXES:
                    raise UserError(f"mesh.rules.{field.name} names no mesh axis {axis!r}: {nearest(axis, MESH_AXES)}")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Devices along each of MESH_AXES, for this many devices in all."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        if devices % fixed or (-1 not in sizes and fixed != devices):
            asked = "×".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1)
            raise UserError(
                f"mesh {asked} does not fit {devices} devices: their product should be that, or divide it and one be -1"
            )
        return tuple(devices // fixed if size == -1 else size for size in sizes)


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh and the rules that lay arrays onto it."""

    mesh: Mesh
    rules: Rules = Rules()

    def size(self, logical: str) -> int:
        """Devices that share one array axis of this logical name."""
        return math.prod(self.mesh.shape[axis] for axis in getattr(self.rules, logical))

    def spec(self, axes: Axes) -> PartitionSpec:
        """The PartitionSpec for an array with these logical axes (None: replicated).

        Raises:
          UserError: two axes of the array would use the same mesh axis.
        """
        entries = [getattr(self.rules, axis) if axis is not None else () for axis in axes]
        used = [axis for entry in entries for axis in entry]
        if len(set(used)) != len(used):
            raise UserError(f"mesh.rules map two axes of {axes} to one mesh axis: {entries}")
        return PartitionSpec(*[entry if len(entry) > 1 else entry[0] if entry else None for entry in entries])

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x`, laid out by its logical axes; nothing at all on one device."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def with_whole_batch(self) -> "Partition":
        """The same for batches too small to divide: rows and time are replicated, weights stay where they are."""
        return Partition(self.mesh, dataclasses.replace(self.rules, batch=(), time=()))

    def shardings(self, axes_tree: Any) -> Any:
        """A tree of shardings for a tree of logical-axes tuples."""
        return jax.tree.map(lambda axes: self.sharding(*axes), axes_tree, is_leaf=is_axes)


def make_partition(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Partition:
    """The partition of `config` over these devices (all of them by default, on every host)."""
    devices = jax.devices() if devices is None else list(devices)
    shape = config.shape(len(devices))
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)
    return Partition(mesh, config.rules)


def single_device(device: jax.Device | None = None) -> Partition:
    """A partition over one device."""
    return make_partition(MeshConfig(), [device or jax.local_devices()[0]])


def is_axes(node: Any) -> bool:
    """Whether `node` is a tuple of logical axis names: the leaf of an axes tree."""
    return isinstance(node, tuple) and all(item is None or isinstance(item, str) for item in node)


def fetch(tree: Any) -> Any:
    """Arrays of any sharding as numpy arrays on every host (a collective on several hosts)."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
