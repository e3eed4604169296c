"""A mixture of experts: each token goes through a few of many MLPs, as `routing` chooses. No token is ever dropped.

Letters: M are the tokens that one device holds, C the experts that each goes to, R = M · C the rows of the products.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from llmlab.core.arrays import Metrics, accumulation_dtype
from llmlab.core.mesh import Axes
from llmlab.model import weights
from llmlab.model.base import Layer, linear_init
from llmlab.model.config import ModelConfig
from llmlab.model.layers import ACTIVATIONS, MLP, gated
from llmlab.model.routing import Tally, route, statistics, tallied

Reduce = Callable[[Any], Any]


class Experts(Layer):
    """What stands in place of the MLP: a router, E experts, and the MLP that every token sees besides, if any.

    Devices keep their own tokens, and fetch what they lack of the weights: XLA cannot split a grouped product by its
    groups. Only the experts' width stays split, where no tokens are split over the same devices.
    """

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, Metrics]:
        c, e = self.config, self.config.experts
        leaves, axes = self._weights(x_BTD.dtype)
        # One token of initialisation is not divided by any mesh.
        if self.is_initializing() or self.partition is None or self.partition.mesh.size == 1:
            out_BTD, tally = _mixture(c, x_BTD, segment_ids_BT, leaves)
        else:
            out_BTD, tally = self._on_mesh(x_BTD, segment_ids_BT, leaves, axes)
        if e.shared:
            out_BTD += MLP(c, self.partition, self.stack, width=e.shared * c.expert_width, name="shared")(x_BTD)
        return out_BTD, statistics(tally, e)

    def _weights(self, dtype: Any) -> tuple[dict[str, Any], dict[str, Axes]]:
        """The weights by name, arrays of `dtype` but for matrices that something stands for; their logical axes."""
        c, e = self.config, self.config.experts
        E, D, F = e.count, c.width, c.expert_width
        into, out_of = linear_init(c, D, into_residual=False), linear_init(c, F, into_residual=True)
        zeros, biased = nn.initializers.zeros, e.bias or c.bias
        wanted: dict[str, tuple[Any, tuple[int, ...], Axes]] = {"router_DE": (into, (D, E), ("embed", None))}
        if biased:
            wanted["router_DE_bias"] = (zeros, (E,), (None,))
        for name in ("gate_EDF", "up_EDF")[not c.gated :]:
            wanted[name] = (into, (E, D, F), ("experts", "embed", "mlp"))
            if biased:
                wanted[f"{name}_bias"] = (zeros, (E, F), ("experts", "mlp"))
        wanted["down_EFD"] = (out_of, (E, F, D), ("experts", "mlp", "embed"))
        if biased:
            wanted["down_EFD_bias"] = (zeros, (E, D), ("experts", "embed"))
        leaves = {name: self.weight(name, *made) for name, made in wanted.items()}
        leaves = {name: leaf if _stands(name, leaf) else weights.dense(leaf, dtype) for name, leaf in leaves.items()}
        axes = {name: made[2] for name, made in wanted.items()}
        if e.correction:
            # Steps of a thousandth would be lost in bfloat16.
            precise, axes["correction_E"] = accumulation_dtype(c.param_dtype), ("experts",)
            leaf = self.weight("correction_E", zeros, (E,), ("experts",), precise)
            leaves["correction_E"] = weights.dense(leaf, precise)
        return leaves, axes

    def _on_mesh(
        self, x_BTD: jax.Array, segment_ids_BT: jax.Array, leaves: dict[str, Any], axes: dict[str, Axes]
    ) -> tuple[jax.Array, Tally]:
        """`_mixture` on each device's own tokens; outputs add up over the experts' width, tallies over tokens.

        What stands for a matrix is fetched whole: scales of its groups and norms of its columns go by all of it.
        """
        assert self.partition is not None
        rules, P = self.partition.rules, PartitionSpec
        over_tokens = (*rules.batch, *rules.time)
        whole = set(rules.mlp) & set(over_tokens) or any(_stands(name, leaf) for name, leaf in leaves.items())
        over_width = () if whole else rules.mlp
        split = {
            name: P() if whole else P(*(over_width if axis == "mlp" else None for axis in axes[name]))
            for name in leaves
        }
        x_spec, segments_spec = (self.partition.spec(("batch", "time", *rest)) for rest in ((None,), ()))
        on_device = functools.partial(
            _mixture,
            self.config,
            over_width=functools.partial(jax.lax.psum, axis_name=over_width),
            over_tokens=functools.partial(jax.lax.psum, axis_name=over_tokens),
        )
        specs = (x_spec, segments_spec, split)
        run = jax.shard_map(on_device, mesh=self.partition.mesh, in_specs=specs, out_specs=(x_spec, P()))
        return run(x_BTD, segment_ids_BT, leaves)


def _stands(name: str, leaf: Any) -> bool:
    """Whether this is one of the experts' matrices, and something else than an array stands for it."""
    return name in ("gate_EDF", "up_EDF", "down_EFD") and isinstance(leaf, weights.WeightLeaf)


def _mixture(
    config: ModelConfig,
    x_BTD: jax.Array,
    segment_ids_BT: jax.Array,
    leaves: dict[str, Any],
    over_width: Reduce = lambda x: x,
    over_tokens: Reduce = lambda x: x,
) -> tuple[jax.Array, Tally]:
    """These tokens through their experts: sorted by expert, three grouped products, brought back and weighted."""
    e, D = config.experts, x_BTD.shape[-1]
    x_MD = x_BTD.reshape(-1, D)
    # The weights of the router are rounded to the compute dtype, as decoding has them; its logits are not.
    precise = accumulation_dtype(x_MD.dtype)
    logits_ME = jnp.einsum("MD,DE->ME", x_MD, leaves["router_DE"], preferred_element_type=precise)
    if "router_DE_bias" in leaves:
        logits_ME = logits_ME + leaves["router_DE_bias"][None].astype(precise)
    routing = route(logits_ME, leaves.get("correction_E"), e)
    expert_R = routing.expert_MC.reshape(-1)
    order_R = jnp.argsort(expert_R)
    back_R = jnp.argsort(order_R)
    rows_E = jnp.sum(expert_R[:, None] == jnp.arange(e.count)[None], axis=0, dtype=jnp.int32)
    sorted_R = expert_R[order_R]

    def through(x_RI: jax.Array, name: str) -> jax.Array:
        out = weights.grouped_product(x_RI, leaves[name], rows_E)
        return out + leaves[f"{name}_bias"][sorted_R] if f"{name}_bias" in leaves else out

    x_RD = _permuted(jnp.repeat(x_MD, e.chosen, axis=0), order_R, back_R)
    if config.gated:
        hidden_RF = gated(config.activation, through(x_RD, "gate_EDF"), through(x_RD, "up_EDF"))
    else:
        hidden_RF = ACTIVATIONS[config.activation](through(x_RD, "up_EDF"))
    out_RD = weights.grouped_product(hidden_RF, leaves["down_EFD"], rows_E)
    out_MCD = _permuted(out_RD, back_R, order_R).reshape(-1, e.chosen, D)
    weight_MC = routing.weight_MC.astype(x_MD.dtype)
    out_MD = over_width(jnp.einsum("MCD,MC->MD", out_MCD, weight_MC))
    if "down_EFD_bias" in leaves:
        out_MD = out_MD + jnp.einsum("MCD,MC->MD", leaves["down_EFD_bias"][routing.expert_MC], weight_MC)
    tally = tallied(routing, segment_ids_BT.reshape(-1) > 0)
    return out_MD.reshape(x_BTD.shape), over_tokens(tally)


@jax.custom_vjp
def _permuted(x_RD: jax.Array, order_R: jax.Array, back_R: jax.Array) -> jax.Array:
    """x_RD[order_R], whose gradient is another permutation: by itself it would be a scatter, slow on CPU."""
    return x_RD[order_R]


def _permuted_forward(x_RD: jax.Array, order_R: jax.Array, back_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x_RD[order_R], back_R


def _permuted_backward(back_R: jax.Array, gradient_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient_RD[back_R], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
