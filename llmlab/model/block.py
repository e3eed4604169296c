"""One layer of the stack, put together from what its config asks for."""

import functools
from typing import Any

import jax

from llmlab.core.arrays import Metrics
from llmlab.model import cache as caches
from llmlab.model.base import Layer, Norm
from llmlab.model.experts import Experts
from llmlab.model.latent import LatentAttention
from llmlab.model.layers import MLP, Attention
from llmlab.model.mamba import Mamba
from llmlab.model.rope import Rotary
from llmlab.model.types import Inputs


class Block(Layer):
    """Attention or Mamba, then mostly an MLP or experts, each with its norms and added to the residual stream."""

    kind: str = "global"
    has_experts: bool = False

    def setup(self) -> None:
        c = self.config
        norm = functools.partial(Norm, c, self.partition, self.stack, kind=c.norm)
        mixer = "mamba" if self.kind == "mamba" else "attention"
        if c.norm_before:
            self.mixer_norm, self.mlp_norm = norm(name=f"{mixer}_norm"), norm()
        if c.norm_after:
            self.mixer_norm_after, self.mlp_norm_after = norm(name=f"{mixer}_norm_after"), norm()
        if self.kind == "mamba":
            self.mamba = Mamba(c, self.partition, self.stack)
        else:
            self.attention = self._attention(c, self.partition, self.stack, kind=self.kind)
        mlp: Any = Experts if self.has_experts else MLP
        self.mlp = mlp(c, self.partition, self.stack)

    def __call__(
        self, x_BTD: jax.Array, inputs: Inputs, rotary: Rotary | None, filled: caches.Filled | None, cache: dict | None
    ) -> tuple[jax.Array, dict | None, Metrics]:
        c = self.config
        aux: Metrics = {}
        with jax.named_scope("mamba" if self.kind == "mamba" else "attention"):
            read_BTD = self.mixer_norm(x_BTD) if c.norm_before else x_BTD
            if self.kind == "mamba":
                added_BTD, cache = self.mamba(read_BTD, inputs, filled, cache)
            else:
                added_BTD, cache = self.attention(read_BTD, inputs, rotary, filled, cache)
            added_BTD = self.mixer_norm_after(added_BTD) if c.norm_after else added_BTD
            x_BTD = self.constrain(x_BTD + added_BTD, "batch", "time", "act_embed")
        if not c.has_mlp(self.kind):
            return x_BTD, cache, aux
        with jax.named_scope("mlp"):
            read_BTD = self.mlp_norm(x_BTD) if c.norm_before else x_BTD
            if self.has_experts:
                added_BTD, aux = self.mlp(read_BTD, inputs.segment_ids_BT)
            else:
                added_BTD = self.mlp(read_BTD)
            added_BTD = self.mlp_norm_after(added_BTD) if c.norm_after else added_BTD
            x_BTD = self.constrain(x_BTD + added_BTD, "batch", "time", "act_embed")
        return x_BTD, cache, aux

    def cache_specs(self, capacity: int) -> dict[str, caches.CacheSpec]:
        """What this layer keeps of the tokens it has seen."""
        if self.kind == "mamba":
            return Mamba(self.config, parent=None).cache_specs(capacity)
        return self._attention(self.config, kind=self.kind, parent=None).cache_specs(capacity)

    @property
    def _attention(self) -> type[Attention] | type[LatentAttention]:
        return LatentAttention if self.config.latent.kv_rank else Attention
