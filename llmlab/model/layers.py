"""The layers: each a thin Linen module that owns its weights' shapes, names, initialisers and logical axes.

Whatever is computed is a pure function of those weights and the arguments; the cache goes in and comes out. Names of
weights spell their shape, as everywhere: `query_DNH`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.mesh import Axes, Partition
from llmlab.kernels.attention import attention
from llmlab.model import cache as caches
from llmlab.model import weights
from llmlab.model.config import ModelConfig
from llmlab.model.rope import Rotary, rotate
from llmlab.model.types import Inputs

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"gelu": nn.gelu, "silu": nn.silu}


class Layer(nn.Module):
    """What every layer has: the config, the partition it runs under, and one way to declare a weight.

    `stack` is how many layers alike `init` makes at once, as [stack, …]; it reads the first of them. One draw for all
    compiles five times faster than a vmapped draw for each.
    """

    config: ModelConfig
    partition: Partition | None = None
    stack: int = 0

    def weight(self, name: str, init: Initializer, shape: tuple[int, ...], axes: Axes) -> Any:
        """The leaf `name`: created in param_dtype at init; afterwards whatever stands there, its shape unchecked."""
        if self.is_initializing():
            dtype = jnp.dtype(self.config.param_dtype)
            if not self.stack:
                return self.param(name, nn.with_partitioning(init, axes), shape, dtype)
            boxed: Any = nn.with_partitioning(init, ("layers", *axes))
            return self.param(name, boxed, (self.stack, *shape), dtype)[0]
        return self.get_variable("params", name)

    def linear(
        self, x: jax.Array, name: str, shape: tuple[int, ...], axes: Axes, dims_in: int = 1, bias: bool = False
    ) -> jax.Array:
        """x against the weight `name`, plus its bias: with `bias`, or where the config has biases everywhere."""
        leaf = self._linear_weight(name, shape, axes, dims_in)
        out = weights.product(x, leaf, shape, dims_in, flatten=self._flat)
        return self._biased(out, name, shape, axes, dims_in, bias)

    def linears(
        self, x: jax.Array, wanted: dict[str, tuple[tuple[int, ...], Axes]], bias: bool = False
    ) -> list[jax.Array]:
        """`linear` for several weights, {name: (shape, axes)}, at once."""
        leaves = [self._linear_weight(name, shape, axes, 1) for name, (shape, axes) in wanted.items()]
        whole = self.partition is None or all(
            self.partition.size(axis) == 1 for _, axes in wanted.values() for axis in axes[1:] if axis
        )
        shapes = [shape for shape, _ in wanted.values()]
        outs = weights.products(x, leaves, shapes, flatten=self._flat, join=whole and x.shape[1] > 1)
        return [self._biased(out, name, *wanted[name], 1, bias) for out, name in zip(outs, wanted, strict=True)]

    def _linear_weight(self, name: str, shape: tuple[int, ...], axes: Axes, dims_in: int) -> Any:
        into_residual = axes[-1] == "embed"
        return self.weight(name, _linear_init(self.config, math.prod(shape[:dims_in]), into_residual), shape, axes)

    def _biased(
        self, out: jax.Array, name: str, shape: tuple[int, ...], axes: Axes, dims_in: int, bias: bool
    ) -> jax.Array:
        if not (self.config.bias or bias):
            return out
        vector = self.weight(f"{name}_bias", nn.initializers.zeros, shape[dims_in:], axes[dims_in:])
        return out + jnp.broadcast_to(weights.dense(vector, out.dtype), out.shape)

    @property
    def _flat(self) -> bool:
        return self.partition is None or self.partition.size("time") == 1

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, laid out over the mesh by its logical axes."""
        return x if self.partition is None else self.partition.constrain(x, *axes)


class Norm(Layer):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) over the last axis."""

    kind: str = "rmsnorm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x_ = x.astype(accumulation_dtype(x.dtype))
        init = nn.initializers.zeros if self.config.norm_from_zero else nn.initializers.ones
        scale = weights.dense(self.weight("scale", init, (width,), ("norm",)), x_.dtype)
        if self.config.norm_from_zero:
            scale = 1 + scale
        if self.kind == "layernorm":
            x_ = x_ - jnp.mean(x_, axis=-1, keepdims=True)
        x_ = x_ * jax.lax.rsqrt(jnp.mean(jnp.square(x_), axis=-1, keepdims=True) + self.config.norm_epsilon)
        out = x_ * _last_axis(scale, x.ndim)
        if self.kind == "layernorm" and self.config.bias:
            bias = weights.dense(self.weight("bias", nn.initializers.zeros, (width,), ("norm",)), x_.dtype)
            out = out + _last_axis(bias, x.ndim)
        return out.astype(x.dtype)


class Attention(Layer):
    """Grouped-query attention with what its kind of layer sees: everything before it, or a window."""

    kind: str = "global"

    @property
    def window(self) -> int | None:
        """Tokens that this layer sees, itself included; None: all."""
        return self.config.window if self.kind == "local" else None

    def cache_specs(self, capacity: int) -> dict[str, caches.CacheSpec]:
        """Keys and values, for as many tokens as this layer can ever look back."""
        c = self.config
        slots = min(capacity, self.window or capacity)
        spec = caches.CacheSpec((c.K, slots, c.H), ("batch", "kv_heads", None, "head_dim"), jnp.dtype(c.dtype))
        return {"k_BKSH": spec, "v_BKSH": spec}

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: Inputs, rotary: Rotary | None, lengths_B: jax.Array | None, cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        c = self.config
        of_queries = ((c.width, c.heads, c.H), ("embed", "heads", "head_dim"))
        of_keys = ((c.width, c.K, c.H), ("embed", "kv_heads", "head_dim"))
        q_BTNH, k_BTKH, v_BTKH = self.linears(
            x_BTD,
            {"query_DNH": of_queries, "key_DKH": of_keys, "value_DKH": of_keys},
            bias=c.attention_bias != "none",
        )
        if c.qk_norm != "none":
            q_BTNH, k_BTKH = self._normed(q_BTNH, "query_norm"), self._normed(k_BTKH, "key_norm")
        if rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotary), rotate(k_BTKH, rotary)
        q_BTNH = self.constrain(q_BTNH, "batch", "time", "act_heads", None)
        # Every query may look at any key: with time sharded, keys and values are gathered here.
        k_BSKH = self.constrain(k_BTKH, "batch", None, "act_heads", None)
        v_BSKH = self.constrain(v_BTKH, "batch", None, "act_heads", None)
        k_positions_BS, k_segment_ids_BS = inputs.positions_BT, inputs.segment_ids_BT
        q_segment_ids_BT, same_rows = inputs.segment_ids_BT, True
        if cache is not None:
            assert lengths_B is not None
            k_BSKH, v_BSKH, k_positions_BS, k_segment_ids_BS, cache = self._through_cache(
                k_BSKH, v_BSKH, inputs, lengths_B, cache
            )
            q_segment_ids_BT, same_rows = (q_segment_ids_BT > 0).astype(jnp.int32), False
        out_BTNH = attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_positions_BT=inputs.positions_BT,
            k_positions_BS=k_positions_BS,
            q_segment_ids_BT=q_segment_ids_BT,
            k_segment_ids_BS=k_segment_ids_BS,
            window=self.window,
            softcap=c.attention_softcap,
            scale=c.attention_scale or None,
            implementation=c.attention,
            rows_in_order=same_rows,
        )
        shape, axes = (c.heads, c.H, c.width), ("heads", "head_dim", "embed")
        return self.linear(out_BTNH, "out_NHD", shape, axes, dims_in=2, bias=c.attention_bias == "qkvo"), cache

    def _normed(self, x_BTNH: jax.Array, name: str) -> jax.Array:
        """Each head normalised, or all heads at once."""
        norm = Norm(self.config, self.partition, self.stack, name=name)
        if self.config.qk_norm == "head":
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], math.prod(x_BTNH.shape[2:]))).reshape(x_BTNH.shape)

    def _through_cache(
        self, k_BTKH: jax.Array, v_BTKH: jax.Array, inputs: Inputs, lengths_B: jax.Array, cache: dict
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, dict]:
        """The keys and values to look at, their positions and segments, and the cache with the new ones written."""
        time, slots = k_BTKH.shape[1], cache["k_BKSH"].shape[2]
        added_B = jnp.sum(inputs.segment_ids_BT > 0, axis=1, dtype=jnp.int32)
        after = caches.slots_after(lengths_B, added_B, time, slots)
        written = {
            "k_BKSH": caches.write(cache["k_BKSH"], k_BTKH, after.index_BT),
            "v_BKSH": caches.write(cache["v_BKSH"], v_BTKH, after.index_BT),
        }
        if time == 1 or self.window is None:
            k_BSKH, v_BSKH = written["k_BKSH"].swapaxes(1, 2), written["v_BKSH"].swapaxes(1, 2)
            return k_BSKH, v_BSKH, after.positions_BS, after.segment_ids_BS, written
        # Several tokens at once overwrite slots of a ring that the first of them still see: look at both.
        before_positions_BS, before_segment_ids_BS = caches.held_by(lengths_B, slots)
        return (
            jnp.concatenate([cache["k_BKSH"].swapaxes(1, 2), k_BTKH.astype(cache["k_BKSH"].dtype)], axis=1),
            jnp.concatenate([cache["v_BKSH"].swapaxes(1, 2), v_BTKH.astype(cache["v_BKSH"].dtype)], axis=1),
            jnp.concatenate([before_positions_BS, inputs.positions_BT], axis=1),
            jnp.concatenate([before_segment_ids_BS, (inputs.segment_ids_BT > 0).astype(jnp.int32)], axis=1),
            written,
        )


class MLP(Layer):
    """Two projections with an activation between; gated: act(x·gate)·(x·up) (arXiv 2002.05202)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        into_hidden = ((c.width, c.F), ("embed", "mlp"))
        if c.gated:
            gate_BTF, up_BTF = self.linears(x_BTD, {"gate_DF": into_hidden, "up_DF": into_hidden})
            hidden_BTF = act(gate_BTF) * up_BTF
        else:
            hidden_BTF = act(self.linear(x_BTD, "up_DF", *into_hidden))
        hidden_BTF = self.constrain(hidden_BTF, "batch", "time", "act_mlp")
        return self.linear(hidden_BTF, "down_FD", (c.F, c.width), ("mlp", "embed"))


class Block(Layer):
    """One layer of the stack: attention, then the MLP, each with its norms and added to the residual stream."""

    kind: str = "global"

    def setup(self) -> None:
        c = self.config
        norm = functools.partial(Norm, c, self.partition, self.stack, kind=c.norm)
        if c.norm_before:
            self.attention_norm, self.mlp_norm = norm(), norm()
        if c.norm_after:
            self.attention_norm_after, self.mlp_norm_after = norm(), norm()
        self.attention = Attention(c, self.partition, self.stack, kind=self.kind)
        self.mlp = MLP(c, self.partition, self.stack)

    def __call__(
        self, x_BTD: jax.Array, inputs: Inputs, rotary: Rotary | None, lengths_B: jax.Array | None, cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        c = self.config
        with jax.named_scope("attention"):
            read_BTD = self.attention_norm(x_BTD) if c.norm_before else x_BTD
            added_BTD, cache = self.attention(read_BTD, inputs, rotary, lengths_B, cache)
            added_BTD = self.attention_norm_after(added_BTD) if c.norm_after else added_BTD
            x_BTD = self.constrain(x_BTD + added_BTD, "batch", "time", "act_embed")
        with jax.named_scope("mlp"):
            added_BTD = self.mlp(self.mlp_norm(x_BTD) if c.norm_before else x_BTD)
            added_BTD = self.mlp_norm_after(added_BTD) if c.norm_after else added_BTD
            x_BTD = self.constrain(x_BTD + added_BTD, "batch", "time", "act_embed")
        return x_BTD, cache

    def cache_specs(self, capacity: int) -> dict[str, caches.CacheSpec]:
        """What this layer keeps of the tokens it has seen."""
        return Attention(self.config, kind=self.kind, parent=None).cache_specs(capacity)


class Embedding(Layer):
    """Tokens to vectors, plus learned positions where the config has them."""

    @nn.compact
    def __call__(self, inputs: Inputs) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.init_std)
        table_VD = self.weight("tokens_VD", init, (c.vocab_size, c.width), ("vocab", "embed"))
        x_BTD = inputs.embeddings_BTD
        if x_BTD is None:
            x_BTD = self._rows(table_VD, inputs.tokens_BT, "vocab")
        if c.scaled_embedding:
            # The factor itself is rounded to the compute dtype, as in Gemma's release.
            x_BTD = x_BTD * jnp.asarray(c.width**0.5, x_BTD.dtype)
        if c.positions == "learned":
            positions_PD = self.weight("positions_PD", init, (c.max_positions, c.width), ("positions", "embed"))
            x_BTD = x_BTD + self._rows(positions_PD, inputs.positions_BT, "positions")
        return self.constrain(x_BTD, "batch", "time", "act_embed")

    def _rows(self, leaf: Any, ids_BT: jax.Array, axis: str) -> jax.Array:
        if isinstance(leaf, jax.Array):
            # The mesh axes that split the width split the batch too: gather the width before the look-up, or XLA
            # replicates the whole result to move from one split to the other.
            leaf = self.constrain(leaf, axis, None)
        return weights.rows(leaf, ids_BT, jnp.dtype(self.config.dtype))


class Head(Layer):
    """What reads the residual stream: the final norm, and the unembedding unless it is the embedding."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        if not c.tied_embedding:
            init = _linear_init(c, c.width, into_residual=False)
            self.weight("unembedding_DV", init, (c.width, c.vocab_size), ("embed", "vocab"))
        return Norm(c, self.partition, kind=c.norm, name="norm")(x_BTD)


def _linear_init(config: ModelConfig, fan_in: int, into_residual: bool) -> Initializer:
    std = config.init_std if config.initializer == "normal" else fan_in**-0.5
    return nn.initializers.normal(std * ((2 * config.layers) ** -0.5 if into_residual else 1.0))


def _last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    return vector.reshape((1,) * (ndim - 1) + vector.shape)
