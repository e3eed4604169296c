"""Every setting of the transformer. A model family is a choice of these, never a file of its own."""

import dataclasses
from typing import Literal

from llmlab.core.errors import UserError, nearest
from llmlab.model.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Shape:
      width: D, of the residual stream. layers: L. heads: N, of queries.
      kv_heads: K; 0 means as many as heads; fewer is grouped-query attention.
      head_dim: H; 0 means width / heads.
      mlp_width: F; 0 means 4·width, or 8/3·width rounded up to a multiple of 32 where the MLP is gated.
      vocab_size: V; 0 means the tokenizer's.
      max_positions: the longest sequence the positions reach.
    Layers:
      positions: learned vectors added to the embedding (GPT-2) or rotary, as `rope` says.
      scaled_embedding: the embedding times sqrt(width) (Gemma). tied_embedding: the head is the embedding.
      norm: layernorm or rmsnorm (arXiv 1910.07467). norm_from_zero: its scale is 1 + the weight (Gemma).
      norm_before, norm_after: where attention and MLP have a norm: before them (Llama), after them and before they are
        added to the residual stream (OLMo 2, arXiv 2501.00656), or both (Gemma 2, arXiv 2408.00118).
      activation, gated: gelu is GPT-2's tanh form; gated silu is SwiGLU (arXiv 2002.05202).
      bias: on the linear layers and in layernorm. attention_bias: on queries, keys and values (Qwen 2), or on the
        attention's output too, where `bias` is off.
      qk_norm: RMSNorm on queries and keys before rotation: on each head (Qwen 3), or over all heads at once (OLMo 2).
      attention_scale: multiplies the scores; 0 means head_dim^-0.5.
      attention_softcap, logit_softcap: c·tanh(x/c) on scores and logits (Gemma 2).
      pattern: the kinds of consecutive layers, repeated to the depth: global, or local within `window` tokens.
    Initialisation:
      initializer: normal(init_std), or fan_in (normal of variance 1/fan-in); projections back into the residual stream
        are scaled by 1/sqrt(2·layers) in both (GPT-2). The embedding is normal(init_std).
    How it runs (changes no weight and, but for rounding, no number):
      dtype: of compute. param_dtype: of the stored weights. scan: one compiled layer, looped; or all unrolled.
      remat: what the backward pass recomputes: none; dots saves only the results of weight products; full saves only
      each layer's input. attention: auto, reference, short (keeps all scores), blockwise, cudnn.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    mlp_width: int = 0
    vocab_size: int = 0
    max_positions: int = 1024

    positions: Literal["learned", "rotary"] = "rotary"
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    scaled_embedding: bool = False
    tied_embedding: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_from_zero: bool = False
    norm_before: bool = True
    norm_after: bool = False
    activation: Literal["gelu", "silu"] = "silu"
    gated: bool = True
    bias: bool = False
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    qk_norm: Literal["none", "head", "all"] = "none"
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    pattern: tuple[Literal["global", "local"], ...] = ("global",)

    initializer: Literal["normal", "fan_in"] = "fan_in"
    init_std: float = 0.02

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    scan: bool = False
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "reference", "short", "blockwise", "cudnn"] = "auto"

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "max_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} should be at least 1")
        for name in ("kv_heads", "head_dim", "mlp_width", "vocab_size"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name}={getattr(self, name)} should be 0 (chosen for you) or more")
        if not self.head_dim and self.width % self.heads:
            raise UserError(
                f"model.heads={self.heads} does not divide model.width={self.width}: "
                f"try heads={_nearest_divisor(self.width, self.heads)}, or set model.head_dim"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}: "
                f"try kv_heads={_nearest_divisor(self.heads, self.kv_heads)}"
            )
        if not (self.norm_before or self.norm_after):
            raise UserError(
                "model.norm_before and model.norm_after are both off: a layer needs a norm, set one of them"
            )
        if self.norm_from_zero and self.norm == "layernorm":
            raise UserError("model.norm_from_zero is for model.norm=rmsnorm")
        if self.positions == "rotary" and self.H % 2:
            raise UserError(f"model.head_dim={self.H} should be even: rotary positions turn pairs of numbers")
        if not self.pattern:
            raise UserError("model.pattern is empty: name at least one kind of layer, such as ('global',)")
        if "local" in self.pattern and not self.window:
            raise UserError("model.pattern has local layers: set model.window to the tokens each of them sees")
        if self.window is not None and self.window < 1:
            raise UserError(f"model.window={self.window} should be at least 1 token")

    @property
    def K(self) -> int:
        return self.kv_heads or self.heads

    @property
    def H(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def F(self) -> int:
        if self.mlp_width:
            return self.mlp_width
        return -(-8 * self.width // 3 // 32) * 32 if self.gated else 4 * self.width

    def kind(self, layer: int) -> Literal["global", "local"]:
        """The kind of this layer: `pattern`, repeated to the depth."""
        return self.pattern[layer % len(self.pattern)]


GPT2_SIZES = {
    "124m": dict(width=768, layers=12, heads=12),
    "350m": dict(width=1024, layers=24, heads=16),
    "774m": dict(width=1280, layers=36, heads=20),
    "1558m": dict(width=1600, layers=48, heads=25),
}

# Sizes below 1B share one shape, depth growing with width; 1b, 3b and 8b are Llama 3's (arXiv 2407.21783).
LLAMA_SIZES = {
    "10m": dict(width=256, layers=8, heads=4, kv_heads=2),
    "30m": dict(width=384, layers=12, heads=6, kv_heads=6),
    "70m": dict(width=640, layers=12, heads=10, kv_heads=5),
    "150m": dict(width=896, layers=16, heads=14, kv_heads=7),
    "400m": dict(width=1280, layers=24, heads=20, kv_heads=5),
    "1b": dict(width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, tied_embedding=True),
    "3b": dict(width=3072, layers=28, heads=24, kv_heads=8, mlp_width=8192, tied_embedding=True),
    "8b": dict(width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336),
}


def gpt2(size: str = "", **overrides: object) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied embedding."""
    family = dict(
        positions="learned",
        norm="layernorm",
        activation="gelu",
        gated=False,
        bias=True,
        tied_embedding=True,
        initializer="normal",
        max_positions=1024,
    )
    return _build(family, GPT2_SIZES, size, overrides)


def llama(size: str = "", **overrides: object) -> ModelConfig:
    """Llama (arXiv 2302.13971): rotary positions, RMSNorm, SwiGLU, no bias, grouped-query attention."""
    return _build({}, LLAMA_SIZES, size, overrides)


def _build(family: dict, sizes: dict[str, dict], size: str, overrides: dict) -> ModelConfig:
    if size and size not in sizes:
        raise UserError(f"no model size {size!r}: {nearest(size, sizes)}")
    return ModelConfig(**{**family, **(sizes[size] if size else {}), **overrides})


def _nearest_divisor(whole: int, wanted: int) -> int:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
