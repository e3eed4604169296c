"""The layers: each a thin Linen module that owns its weights' shapes, names, initialisers and logical axes.

Whatever is computed is a pure function of those weights and the arguments; the cache goes in and comes out. Names of
weights spell their shape, as everywhere: `query_DNH`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmlab.core.arrays import accumulation_dtype
from llmlab.model import cache as caches
from llmlab.model import weights
from llmlab.model.base import Layer, Norm, linear_init
from llmlab.model.rope import Rotary, rotate
from llmlab.model.score import score_init
from llmlab.model.types import Inputs

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"gelu": nn.gelu, "silu": nn.silu}
# Of gpt-oss: no gate or value beyond the limit, and the gate's sigmoid a little steeper.
CLAMPED_LIMIT, CLAMPED_SLOPE = 7.0, 1.702


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
        axes = ("batch", "kv_heads", None, "head_dim")
        spec = caches.CacheSpec((c.K, slots, c.H), axes, jnp.dtype(c.dtype), grows=self.window is None)
        return {"k_BKSH": spec, "v_BKSH": spec}

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: Inputs, rotary: Rotary | None, filled: caches.Filled | None, cache: dict | None
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
            q_BTNH, k_BTKH = (rotate(x, rotary, c.rope.interleaved) for x in (q_BTNH, k_BTKH))
        q_BTNH = self.constrain(q_BTNH, "batch", "time", "act_heads", None)
        # Every query may look at any key: with time sharded, keys and values are gathered here.
        k_BSKH = self.constrain(k_BTKH, "batch", None, "act_heads", None)
        v_BSKH = self.constrain(v_BTKH, "batch", None, "act_heads", None)
        sinks_N = None
        if c.attention_sinks:
            leaf = self.weight("sinks_N", nn.initializers.zeros, (c.heads,), ("heads",))
            sinks_N = weights.dense(leaf, accumulation_dtype(c.dtype))
        out_BTNH, cache = caches.attend(
            q_BTNH,
            {"k_BKSH": k_BSKH, "v_BKSH": v_BSKH},
            inputs,
            filled,
            cache,
            window=self.window,
            scale=c.attention_scale or None,
            softcap=c.attention_softcap,
            sinks_N=sinks_N,
            implementation=c.attention,
        )
        shape, axes = (c.heads, c.H, c.width), ("heads", "head_dim", "embed")
        return self.linear(out_BTNH, "out_NHD", shape, axes, dims_in=2, bias=c.attention_bias == "qkvo"), cache

    def _normed(self, x_BTNH: jax.Array, name: str) -> jax.Array:
        """Each head normalised, or all heads at once."""
        norm = Norm(self.config, self.partition, self.stack, name=name)
        if self.config.qk_norm == "head":
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], math.prod(x_BTNH.shape[2:]))).reshape(x_BTNH.shape)


class MLP(Layer):
    """Two projections with an activation between; gated: act(x·gate)·(x·up) (arXiv 2002.05202)."""

    width: int = 0

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, F = self.config, self.width or self.config.F
        into_hidden = ((c.width, F), ("embed", "mlp"))
        if c.gated:
            gate_BTF, up_BTF = self.linears(x_BTD, {"gate_DF": into_hidden, "up_DF": into_hidden})
            hidden_BTF = gated(c.activation, gate_BTF, up_BTF)
        else:
            hidden_BTF = ACTIVATIONS[c.activation](self.linear(x_BTD, "up_DF", *into_hidden))
        hidden_BTF = self.constrain(hidden_BTF, "batch", "time", "act_mlp")
        return self.linear(hidden_BTF, "down_FD", (F, c.width), ("mlp", "embed"))


def gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """act(gate) · up, or what gpt-oss has in its place."""
    if activation == "swiglu_clamped":
        gate, up = jnp.minimum(gate, CLAMPED_LIMIT), jnp.clip(up, -CLAMPED_LIMIT, CLAMPED_LIMIT)
        return (up + 1) * gate * nn.sigmoid(CLAMPED_SLOPE * gate)
    return ACTIVATIONS[activation](gate) * up


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

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """The vectors of tokens, as `Inputs.embeddings_BTD` takes their place: not scaled, without positions."""
        return self._rows(self.get_variable("params", "tokens_VD"), tokens_BT, "vocab")

    def _rows(self, leaf: Any, ids_BT: jax.Array, axis: str) -> jax.Array:
        if isinstance(leaf, jax.Array):
            # The mesh axes that split the width split the batch too: gather the width before the look-up, or XLA
            # replicates the whole result to move from one split to the other.
            leaf = self.constrain(leaf, axis, None)
        return weights.rows(leaf, ids_BT, jnp.dtype(self.config.dtype))


class Head(Layer):
    """What reads the residual stream: the final norm, and the unembedding unless it is the embedding, or the score."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        if c.head == "score":
            self.weight("score_D", score_init(c.width), (c.width,), ("embed",), accumulation_dtype(c.param_dtype))
        elif not c.tied_embedding:
            init = linear_init(c, c.width, into_residual=False)
            self.weight("unembedding_DV", init, (c.width, c.vocab_size), ("embed", "vocab"))
        return Norm(c, self.partition, kind=c.norm, name="norm")(x_BTD)
