"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a cache of one small vector a token.

R are the numbers of that vector. Every head's keys and values are expanded from it; position is carried apart, by a
key of a few numbers that all heads share.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from llmlab.model import cache as caches
from llmlab.model.base import Norm
from llmlab.model.layers import Attention
from llmlab.model.rope import Rotary, rotate
from llmlab.model.types import Inputs

# Of the latents' norms in DeepSeek's code, whatever rms_norm_eps is.
LATENT_EPSILON = 1e-6


class LatentAttention(Attention):
    """Attention whose cache keeps the normalised latent and the turned shared key of each token, and nothing else.

    Plain: keys and values of all heads are expanded whenever they are looked at, in decoding too.
    """

    def cache_specs(self, capacity: int) -> dict[str, caches.CacheSpec]:
        """As if of one head: the latent, and the shared key."""
        latent, slots = self.config.latent, min(capacity, self.window or capacity)
        axes, dtype = ("batch", None, None, None), jnp.dtype(self.config.dtype)
        sizes = {"latent_B1SR": latent.kv_rank, "turned_key_B1SH": latent.rope_dim}
        return {
            name: caches.CacheSpec((1, slots, size), axes, dtype, self.window is None) for name, size in sizes.items()
        }

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: Inputs, rotary: Rotary | None, filled: caches.Filled | None, cache: dict | None
    ) -> tuple[jax.Array, dict | None]:
        c, latent = self.config, self.config.latent
        assert rotary is not None
        down: Any = {
            "latent_DR": ((c.width, latent.kv_rank), ("embed", None)),
            "turned_key_DH": ((c.width, latent.rope_dim), ("embed", None)),
        }
        latent_BTR, turned_BTH = self.linears(x_BTD, down)
        new = {
            "latent_B1SR": self._norm("latent_norm")(latent_BTR)[:, :, None],
            "turned_key_B1SH": rotate(turned_BTH[:, :, None], rotary, c.rope.interleaved),
        }
        q_BTNH = self._queries(x_BTD)
        turned_BTNH = rotate(q_BTNH[..., latent.nope_dim :], rotary, c.rope.interleaved)
        q_BTNH = jnp.concatenate([q_BTNH[..., : latent.nope_dim], turned_BTNH], axis=-1)
        q_BTNH = self.constrain(q_BTNH, "batch", "time", "act_heads", None)
        out_BTNH, cache = caches.attend(
            q_BTNH,
            new,
            inputs,
            filled,
            cache,
            expand=lambda kept: self._keys_and_values(kept["latent_B1SR"][:, :, 0], kept["turned_key_B1SH"]),
            window=self.window,
            scale=c.attention_scale or None,
            softcap=c.attention_softcap,
            implementation=c.attention,
        )
        shape = (c.heads, latent.value_dim, c.width)
        return self.linear(out_BTNH, "out_NHD", shape, ("heads", "head_dim", "embed"), dims_in=2), cache

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        """q_BTNH before rotation, through a latent of their own where `q_rank` says so."""
        c, rank = self.config, self.config.latent.q_rank
        if not rank:
            return self.linear(x_BTD, "query_DNH", (c.width, c.heads, c.H), ("embed", "heads", "head_dim"))
        latent_BTR = self._norm("query_norm")(self.linear(x_BTD, "query_DR", (c.width, rank), ("embed", None)))
        return self.linear(latent_BTR, "query_RNH", (rank, c.heads, c.H), ("latent", "heads", "head_dim"))

    def _keys_and_values(self, latent_BSR: jax.Array, turned_BS1H: jax.Array) -> tuple[jax.Array, jax.Array]:
        """k_BSNH and v_BSNH of all heads; with time sharded, they are gathered here."""
        c, latent, axes = self.config, self.config.latent, ("latent", "heads", "head_dim")
        wanted: Any = {
            "key_RNH": ((latent.kv_rank, c.heads, latent.nope_dim), axes),
            "value_RNH": ((latent.kv_rank, c.heads, latent.value_dim), axes),
        }
        k_BSNH, v_BSNH = self.linears(latent_BSR, wanted)
        shared_BSNH = jnp.broadcast_to(turned_BS1H, (*k_BSNH.shape[:3], latent.rope_dim))
        k_BSNH = jnp.concatenate([k_BSNH, shared_BSNH], axis=-1)
        whole = ("batch", None, "act_heads", None)
        return self.constrain(k_BSNH, *whole), self.constrain(v_BSNH, *whole)

    def _norm(self, name: str) -> Norm:
        return Norm(self.config, self.partition, self.stack, epsilon=LATENT_EPSILON, name=name)
