"""Every setting of the transformer. A model family is a choice of these, never a file of its own."""

import dataclasses
from typing import Literal

from llmlab.core.errors import UserError, nearest
from llmlab.model.rope import RopeConfig
from llmlab.model.routing import ExpertsConfig
from llmlab.model.ssm import SsmConfig


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one small vector.

    kv_rank: numbers in the vector that a token leaves behind; 0 means ordinary attention. q_rank: of the one that its
    queries come from; 0 means from the residual stream at once. nope_dim, rope_dim: of queries and keys, without
    position and turned by it; the turned key is shared by all heads. value_dim: of a head's values.
    """

    kv_rank: int = 0
    q_rank: int = 0
    nope_dim: int = 32
    rope_dim: int = 16
    value_dim: int = 32

    def __post_init__(self) -> None:
        for name in ("kv_rank", "q_rank"):
            if getattr(self, name) < 0:
                raise UserError(f"model.latent.{name}={getattr(self, name)} should be 0 (without) or more")
        for name in ("nope_dim", "rope_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"model.latent.{name}={getattr(self, name)} should be at least 1")


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
      head: what reads the last hidden state: tokens, a logit for each of the vocabulary; score, one number a token,
        which makes it a reward model: no unembedding, and `tied_embedding` and `logit_softcap` are without effect.
      norm: layernorm or rmsnorm (arXiv 1910.07467). norm_from_zero: its scale is 1 + the weight (Gemma).
      norm_before, norm_after: where attention and MLP have a norm: before them (Llama), after them and before they are
        added to the residual stream (OLMo 2, arXiv 2501.00656), or both (Gemma 2, arXiv 2408.00118).
      activation, gated: gelu is GPT-2's tanh form; gated silu is SwiGLU (arXiv 2002.05202); swiglu_clamped is gpt-oss's
        (up + 1) · gate · sigmoid(1.702 · gate), with the gate at most 7 and up within ±7.
      experts: several MLPs in place of one, of which each token sees a few.
      bias: on the linear layers and in layernorm. attention_bias: on queries, keys and values (Qwen 2), or on the
        attention's output too, where `bias` is off.
      qk_norm: RMSNorm on queries and keys before rotation: on each head (Qwen 3), or over all heads at once (OLMo 2).
      attention_scale: multiplies the scores; 0 means head_dim^-0.5.
      attention_softcap, logit_softcap: c·tanh(x/c) on scores and logits (Gemma 2).
      attention_sinks: a learned logit for each head that joins the softmax's denominator only (gpt-oss).
      latent: multi-head latent attention in place of the ordinary kind.
      pattern: the kinds of consecutive layers, repeated to the depth: global, local within `window` tokens, or mamba.
      ssm: the mamba layers.
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
    head: Literal["tokens", "score"] = "tokens"
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_epsilon: float = 1e-5
    norm_from_zero: bool = False
    norm_before: bool = True
    norm_after: bool = False
    activation: Literal["gelu", "silu", "swiglu_clamped"] = "silu"
    gated: bool = True
    experts: ExpertsConfig = dataclasses.field(default_factory=ExpertsConfig)
    bias: bool = False
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    qk_norm: Literal["none", "head", "all"] = "none"
    attention_scale: float = 0.0
    attention_softcap: float | None = None
    attention_sinks: bool = False
    latent: LatentConfig = dataclasses.field(default_factory=LatentConfig)
    logit_softcap: float | None = None
    window: int | None = None
    pattern: tuple[Literal["global", "local", "mamba"], ...] = ("global",)
    ssm: SsmConfig = dataclasses.field(default_factory=SsmConfig)

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
        if self.attends and not self.head_dim and not self.latent.kv_rank and self.width % self.heads:
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
        if self.attends and self.positions == "rotary" and self.rotary_dim % 2:
            key = "latent.rope_dim" if self.latent.kv_rank else "head_dim"
            raise UserError(f"model.{key}={self.rotary_dim} should be even: rotary positions turn pairs of numbers")
        if not self.pattern:
            raise UserError("model.pattern is empty: name at least one kind of layer, such as ('global',)")
        if "local" in self.pattern and not self.window:
            raise UserError("model.pattern has local layers: set model.window to the tokens each of them sees")
        if self.window is not None and self.window < 1:
            raise UserError(f"model.window={self.window} should be at least 1 token")
        if self.activation == "swiglu_clamped" and not self.gated:
            raise UserError("model.activation=swiglu_clamped is a product of two: set model.gated")
        if self.experts.count and self.experts.first_dense >= self.layers:
            raise UserError(
                f"model.experts.first_dense={self.experts.first_dense} leaves no layer of model.layers={self.layers} "
                f"for experts: lower it, or set model.experts.count=0"
            )
        if self.experts.count and self.pattern and not any(map(self.has_experts, range(self.layers))):
            raise UserError(
                f"model.experts.count={self.experts.count} has no MLP to stand for in layers of "
                f"model.pattern={self.pattern}: set model.ssm.mlp, or model.experts.count=0"
            )
        if self.positions == "rotary" and self.attends and self.rope.scaling == "ntk" and self.rotary_dim < 4:
            raise UserError("model.rope.scaling=ntk needs two pairs of numbers that turn: choose linear")
        if self.latent.kv_rank:
            self._check_latent()
        if "mamba" in self.pattern:
            self.ssm.check(self.width)

    def _check_latent(self) -> None:
        """Refuses what latent attention has no place for."""
        if self.head_dim or self.heads != self.K:
            raise UserError(
                "model.latent gives every head its width and its own keys: leave model.head_dim and model.kv_heads at 0"
            )
        if self.positions != "rotary":
            raise UserError("model.latent.kv_rank needs model.positions=rotary: its rope_dim carries the position")
        for name, off in (("attention_bias", "none"), ("qk_norm", "none"), ("attention_sinks", False)):
            if getattr(self, name) != off:
                raise UserError(
                    f"model.{name} is for ordinary attention: leave it at {off!r} with model.latent.kv_rank"
                )

    @property
    def K(self) -> int:
        return self.kv_heads or self.heads

    @property
    def H(self) -> int:
        if self.latent.kv_rank:
            return self.latent.nope_dim + self.latent.rope_dim
        return self.head_dim or self.width // self.heads

    @property
    def value_dim(self) -> int:
        """Numbers in a head's values."""
        return self.latent.value_dim if self.latent.kv_rank else self.H

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that rotary positions turn."""
        return self.latent.rope_dim if self.latent.kv_rank else self.H

    @property
    def F(self) -> int:
        if self.mlp_width:
            return self.mlp_width
        return -(-8 * self.width // 3 // 32) * 32 if self.gated else 4 * self.width

    @property
    def expert_width(self) -> int:
        """F of one expert."""
        return self.experts.width or self.F

    @property
    def attends(self) -> bool:
        """Whether any layer has attention."""
        return set(self.pattern) != {"mamba"}

    @property
    def ssm_heads(self) -> int:
        """N of the mamba layers."""
        return self.ssm.heads_at(self.width)

    def kind(self, layer: int) -> Literal["global", "local", "mamba"]:
        """The kind of this layer: `pattern`, repeated to the depth."""
        return self.pattern[layer % len(self.pattern)]

    def has_mlp(self, kind: str) -> bool:
        """Whether layers of this kind have an MLP."""
        return kind != "mamba" or self.ssm.mlp

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has a mixture of experts in place of its MLP."""
        return self.experts.count > 0 and layer >= self.experts.first_dense and self.has_mlp(self.kind(layer))

    def segments(self) -> tuple[range, ...]:
        """The layers, in runs that repeat `pattern` with the same kind of MLP."""
        first = self.experts.first_dense if self.experts.count else 0
        return tuple(run for run in (range(first), range(first, self.layers)) if run)

    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """The layers that params["layers"]["0"], ["1"], … each stack: a slot for each place of a segment's pattern."""
        places = len(self.pattern)
        return tuple(tuple(run[place::places]) for run in self.segments() for place in range(min(places, len(run))))


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

# Of the families' kinds, for a laptop.
MIXTRAL_SIZES = {
    "tiny": dict(width=32, layers=2, heads=4, kv_heads=2, experts=ExpertsConfig(count=4, width=32, balance_loss=0.02)),
    "small": dict(
        width=128, layers=4, heads=4, kv_heads=2, experts=ExpertsConfig(count=8, width=192, balance_loss=0.02)
    ),
}
_DEEPSEEK_ROUTER: dict = dict(score="sigmoid", scale=2.5, groups=4, chosen_groups=2, correction=True)
DEEPSEEK_SIZES = {
    "tiny": dict(
        width=32,
        layers=3,
        heads=4,
        latent=LatentConfig(kv_rank=16, q_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
        experts=ExpertsConfig(count=8, chosen=2, width=16, shared=1, first_dense=1, **_DEEPSEEK_ROUTER),
    ),
    "small": dict(
        width=128,
        layers=4,
        heads=4,
        latent=LatentConfig(kv_rank=48, q_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
        experts=ExpertsConfig(count=16, chosen=3, width=96, shared=1, first_dense=1, **_DEEPSEEK_ROUTER),
    ),
}

# The released sizes, with a vocabulary of 50288.
MAMBA2_SIZES = {
    "130m": dict(width=768, layers=24),
    "370m": dict(width=1024, layers=48),
    "780m": dict(width=1536, layers=48),
    "1300m": dict(width=2048, layers=48),
    "2700m": dict(width=2560, layers=64),
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


def mixtral(size: str = "", **overrides: object) -> ModelConfig:
    """Mixtral (arXiv 2401.04088): Llama with experts in place of every MLP, kept even by a loss."""
    return _build({}, MIXTRAL_SIZES, size or "small", overrides)


def deepseek(size: str = "", **overrides: object) -> ModelConfig:
    """DeepSeek-V3 (arXiv 2412.19437): latent attention, many small experts and a shared one, kept even by a bias."""
    return _build({}, DEEPSEEK_SIZES, size or "small", overrides)


def mamba2(size: str = "", **overrides: object) -> ModelConfig:
    """Mamba-2 (arXiv 2405.21060): mixers alone, no positions, so that `max_positions` only bounds; tied embedding."""
    return _build(
        {"pattern": ("mamba",), "tied_embedding": True, "max_positions": 2**20}, MAMBA2_SIZES, size, overrides
    )


def _build(family: dict, sizes: dict[str, dict], size: str, overrides: dict) -> ModelConfig:
    if size and size not in sizes:
        raise UserError(f"no model size {size!r}: {nearest(size, sizes)}")
    return ModelConfig(**{**family, **(sizes[size] if size else {}), **overrides})


def _nearest_divisor(whole: int, wanted: int) -> int:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
