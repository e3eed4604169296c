"""Between a Hugging Face config.json and our settings: a family lists the parts that its config is made of.

Each part reads some keys and gives some settings, and writes the same keys from the same settings. Here are those that
several families have; what one alone has stands beside its entry in `families`. Whatever key no part has read is an
error, unless it is known to change no logit.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from llmlab.core.errors import UserError, nearest
from llmlab.model.config import ModelConfig
from llmlab.model.rope import RopeConfig

REQUIRED = object()

# What says how a model is trained, generated from, labelled or run, and changes no logit.
IGNORED = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "auto_map", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "use_cache"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "embedding_dropout"),
    *("pretraining_tp", "cache_implementation", "_attn_implementation", "attn_implementation", "torchscript"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "tokenizer_class"),
    *("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
    *("summary_proj_to_labels", "reorder_and_upcast_attn", "use_bfloat16", "is_decoder", "tie_encoder_decoder"),
    *("_attn_implementation_autoset", "attn_implementation_internal"),
    *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size"),
}

USUAL = ModelConfig()


class Part(Protocol):
    """Some keys of a config.json, and the settings that they are."""

    def read(self, keys: "Keys") -> dict[str, Any]:
        """Fields of ModelConfig; those of one of its sections by their dotted names, such as "experts.count"."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of config.json."""


class Keys:
    """The keys of a config.json, and which of them have been read."""

    def __init__(self, keys: Mapping[str, Any]):
        self._keys, self._read = keys, set[str]()
        self.latest = ""

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of this key, or the default where the key is not there."""
        self._read.add(name)
        self.latest = name if name in self._keys else self.latest
        if name not in self._keys and default is REQUIRED:
            raise UserError(f"config.json has no {name}: is the file whole?")
        return self._keys.get(name, default)

    def fields(self, parts: Iterable[Part]) -> dict[str, Any]:
        """What the parts read, together.

        Raises:
          UserError: a key that is missing, or whose value no part can make sense of.
        """
        found: dict[str, Any] = {}
        for part in parts:
            try:
                found |= part.read(self)
            except (TypeError, ValueError, AttributeError, KeyError, IndexError):
                value = json.dumps(self._keys.get(self.latest))
                raise UserError(f"config.json: {self.latest}={value} is no value of its kind") from None
        return found

    def unread(self) -> list[str]:
        """The keys that nothing has read and that may change the numbers."""
        return sorted(set(self._keys) - self._read - IGNORED)


def assembled(fields: Mapping[str, Any]) -> ModelConfig:
    """The config of these fields, of which the dotted ones belong to a section."""
    whole = {name: value for name, value in fields.items() if "." not in name}
    for section in {name.partition(".")[0] for name in fields if "." in name}:
        inside = {name.partition(".")[2]: fields[name] for name in fields if name.startswith(f"{section}.")}
        whole[section] = dataclasses.replace(whole.get(section, getattr(USUAL, section)), **inside)
    return ModelConfig(**whole)


class Same(NamedTuple):
    """A key that is a setting. null reads as the setting's own default.

    resolved: the property that is written. also: another name that the key may have. null_for_0: how 0 is written.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    resolved: str = ""
    also: str = ""
    null_for_0: bool = False

    def read(self, keys: Keys) -> dict[str, Any]:
        value = keys.take(self.also, None) if self.also else None
        value = keys.take(self.theirs, self.default if value is None else value)
        usual = attrgetter(self.ours)(USUAL)
        if value is None and (self.default is REQUIRED):
            raise ValueError(value)
        if value is None:
            return {self.ours: usual}
        if isinstance(usual, bool) or isinstance(value, bool):
            fits = isinstance(usual, bool) and isinstance(value, bool)
        else:
            fits = isinstance(value, int if isinstance(usual, int) else int | float)
        if not fits:
            raise ValueError(value)
        return {self.ours: float(value) if isinstance(usual, float) else value}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        value = attrgetter(self.resolved or self.ours)(config)
        return {self.theirs: None if self.null_for_0 and not value else value}


class Choice(NamedTuple):
    """A key with a word for each of our words; the first word of theirs for one of ours is the one written."""

    theirs: str
    ours: str
    words: dict[Any, Any]
    default: Any = REQUIRED

    def read(self, keys: Keys) -> dict[str, Any]:
        value = keys.take(self.theirs, self.default)
        if value not in self.words:
            known = nearest(str(value), (json.dumps(word).strip('"') for word in self.words))
            raise UserError(f"config.json: {self.theirs}={json.dumps(value)} is not supported: {known}")
        return {self.ours: self.words[value]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        wanted = attrgetter(self.ours)(config)
        for word, meaning in self.words.items():
            if meaning == wanted:
                return {self.theirs: word}
        raise UserError(f"{self.theirs} has no word for model.{self.ours}={wanted!r}")


class Only(NamedTuple):
    """A key that may have one value, or null, which is none: any other would change the numbers."""

    theirs: str
    value: Any

    def read(self, keys: Keys) -> dict[str, Any]:
        if (value := keys.take(self.theirs, self.value)) not in (self.value, None):
            raise UserError(
                f"config.json: {self.theirs}={json.dumps(value)} is not supported, only {json.dumps(self.value)}: "
                "the logits would be others"
            )
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.value}


class Ours(NamedTuple):
    """Settings that the family always has and its config.json does not mention."""

    settings: dict[str, Any]

    def read(self, keys: Keys) -> dict[str, Any]:
        return self.settings

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class Unused(NamedTuple):
    """Keys that say again what others say, or that no logit depends on in this family."""

    names: tuple[str, ...]

    def read(self, keys: Keys) -> dict[str, Any]:
        for name in self.names:
            keys.take(name, None)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class Biases(NamedTuple):
    """attention_bias, on queries, keys, values and the output; and mlp_bias, which only goes with it."""

    mlp: bool = False

    def read(self, keys: Keys) -> dict[str, Any]:
        attention, mlp = (_switch(keys, "attention_bias"), self.mlp and _switch(keys, "mlp_bias"))
        if mlp and not attention:
            raise UserError("config.json: mlp_bias=true without attention_bias is not supported: nothing here has it")
        return {"bias": mlp, "attention_bias": "qkvo" if attention and not mlp else "none"}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        attention = config.bias or config.attention_bias == "qkvo"
        return {"attention_bias": attention} | ({"mlp_bias": config.bias} if self.mlp else {})


def _switch(keys: Keys, name: str) -> bool:
    if not isinstance(value := keys.take(name, False), bool):
        raise ValueError(value)
    return value


LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


class Pattern(NamedTuple):
    """layer_types and sliding_window. `usual(layer, keys)` is a layer's kind where layer_types is not there.

    `listed`: whether the family's config has layer_types, or all layers are of one kind. `also`: what `usual` reads.
    `window`: what sliding_window is where it is not there.
    """

    usual: Callable[[int, Keys], str]
    listed: bool = True
    also: tuple[str, ...] = ()
    window: int | None = 4096

    def read(self, keys: Keys) -> dict[str, Any]:
        layers, window = keys.take("num_hidden_layers"), keys.take("sliding_window", self.window)
        types = keys.take("layer_types", None) if self.listed else None
        for name in self.also:
            keys.take(name, None)
        if types is None:
            kinds = [self.usual(layer, keys) if window else "global" for layer in range(layers)]
        else:
            if unknown := [kind for kind in types if kind not in LAYER_TYPES]:
                raise UserError(f"config.json: layer_types has {unknown[0]!r}: {nearest(unknown[0], LAYER_TYPES)}")
            if len(types) != layers:
                raise UserError(f"config.json: {len(types)} layer_types for num_hidden_layers={layers}")
            kinds = [LAYER_TYPES[kind] for kind in types]
        return {"pattern": shortest_period(kinds), "window": window if "local" in kinds else None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        kinds = [config.kind(layer) for layer in range(config.layers)]
        theirs = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
        if foreign := [kind for kind in kinds if kind not in theirs]:
            raise UserError(f"model.pattern has {foreign[0]} layers, which layer_types has no word for")
        window = {"sliding_window": config.window if "local" in kinds else None}
        return window | ({"layer_types": [theirs[kind] for kind in kinds]} if self.listed else {})


def shortest_period(kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these layers."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    raise UserError("config.json: num_hidden_layers should be at least 1")


def _expected(keys: Keys, name: str, kinds: Any, default: Any = None) -> Any:
    """The value of a key, which is of these kinds."""
    value = keys.take(name, default)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"config.json: {name}={json.dumps(value)} is no value of its kind")
    return value


class Rope(NamedTuple):
    """Rotary positions, spelt rope_parameters or, before transformers 5, rope_theta and rope_scaling.

    scaling: what rope_scaling is where config.json has none of it.
    by_kind: local layers have parameters of their own, unscaled; `local_base` is theirs where config.json does not say,
      0 the base of the others (OLMo 3).
    """

    base: float = 10_000.0
    scaling: Mapping[str, Any] = MappingProxyType({})
    by_kind: bool = False
    local_base: float = 10_000.0

    def read(self, keys: Keys) -> dict[str, Any]:
        given, scaling = (_expected(keys, name, dict | None) for name in ("rope_parameters", "rope_scaling"))
        old = _expected(keys, "rope_theta", int | float | None)
        positions = _expected(keys, "max_position_embeddings", int, REQUIRED)
        local_given: Mapping[str, Any] = {}
        local = keys.take("rope_local_base_freq", self.local_base) if self.by_kind else 0.0
        if self.by_kind and given:
            if "full_attention" not in given:
                raise UserError("config.json: rope_parameters should have full_attention and sliding_attention")
            given, local_given = given["full_attention"], given.get("sliding_attention") or {}
            if local_given.get("rope_type", "default") != "default":
                raise UserError("config.json: rope_parameters.sliding_attention with scaling is not supported")
        given = dict(given or scaling or self.scaling)
        base = float(given.pop("rope_theta", None) or old or self.base)
        if self.by_kind:
            local = float(local_given.get("rope_theta", local) or base)
        rope = read_scaling(given, base, positions)
        return {"rope": RopeConfig(**rope, local_base=local), "max_positions": positions}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        rope: dict[str, Any] = write_scaling(config.rope)
        if self.by_kind:
            local = {"rope_type": "default", "rope_theta": config.rope.local_base or config.rope.base}
            rope = {"full_attention": rope, "sliding_attention": local}
        return {"rope_parameters": rope, "max_position_embeddings": config.max_positions}


YARN = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate", "attention_factor": "magnitude"}
LLAMA3 = {"low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"}


def read_scaling(given: dict[str, Any], base: float, positions: int) -> dict[str, Any]:
    """Fields of RopeConfig from what is left of rope_parameters or rope_scaling."""
    given = {name: value for name, value in given.items() if value is not None}
    old_kind = given.pop("type", "default")
    kind = given.pop("rope_type", old_kind)
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("config.json: partial_rotary_factor is not supported, only 1")
    if kind == "default":
        return {"base": base}
    if kind not in ("linear", "yarn", "llama3"):
        raise UserError(f"config.json: rope_type={kind!r} is not supported: choose default, linear, yarn or llama3")
    rope: dict[str, Any] = {"base": base, "scaling": kind}
    if kind == "linear":
        given.pop("original_max_position_embeddings", None)  # saved with it, and read by nothing
    else:
        rope["original_positions"] = given.pop("original_max_position_embeddings", positions)
    rope["factor"] = float(given.pop("factor", positions / rope.get("original_positions", positions)))
    if kind == "yarn":
        above, below = given.pop("mscale", 0), given.pop("mscale_all_dim", 0)
        if above and below and "attention_factor" not in given:
            rope["magnitude"] = yarn_magnitude(rope["factor"], above) / yarn_magnitude(rope["factor"], below)
    names = {"yarn": YARN, "llama3": LLAMA3}.get(kind, {})
    rope |= {names[name]: given.pop(name) for name in list(given) if name in names}
    if given:
        raise UserError(f"config.json: rope_type={kind!r} has {sorted(given)[0]!r}, which is not supported")
    return {name: float(value) if name in _FLOATS else value for name, value in rope.items()}


_FLOATS = {"beta_fast", "beta_slow", "magnitude", "low_frequency", "high_frequency"}


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1·weight·ln(factor) + 1 (YaRN, arXiv 2309.00071, eq. 22, with DeepSeek's weight)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def write_scaling(rope: RopeConfig) -> dict[str, Any]:
    """rope_parameters, as transformers 5 spells them."""
    if rope.scaling == "none":
        return {"rope_type": "default", "rope_theta": rope.base}
    if rope.scaling == "ntk":
        raise UserError("model.rope.scaling=ntk has no spelling in config.json: save it with the base that it makes")
    out = {"rope_type": rope.scaling, "rope_theta": rope.base, "factor": rope.factor}
    if rope.scaling != "linear":
        out["original_max_position_embeddings"] = rope.original_positions
    names = {"yarn": YARN, "llama3": LLAMA3}.get(rope.scaling, {})
    return out | {
        theirs: getattr(rope, ours) for theirs, ours in names.items() if ours != "magnitude" or rope.magnitude
    }
