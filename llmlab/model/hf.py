"""Open weights in and out: a folder in the Hugging Face layout to a model and its parameters, and back.

model, params = hf.load("path/to/Llama-3.2-1B")
hf.save(model, params, "out/folder")
"""

import collections
import dataclasses
import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.errors import UserError, nearest
from llmlab.core.mesh import Partition, fetch
from llmlab.core.paths import check_free, new_folder, write_atomic
from llmlab.data.tokenizer import Tokenizer
from llmlab.data.tokenizer_imported import export_tokenizer
from llmlab.model.config import LatentConfig, ModelConfig
from llmlab.model.cost import abstract_params
from llmlab.model.families import FAMILIES, Family
from llmlab.model.hf_config import USUAL, Keys, assembled
from llmlab.model.hf_files import Tensors, read_json, write_tensors
from llmlab.model.hf_weights import Place, places
from llmlab.model.matrices import leaf_at
from llmlab.model.rope import RopeConfig
from llmlab.model.routing import ExpertsConfig
from llmlab.model.ssm import SsmConfig
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Params

log = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float64"]
# How a model runs and how it was initialised: no part of what it is.
_RUNNING = ("dtype", "param_dtype", "scan", "remat", "attention", "initializer", "init_std")
_RUNNING_OF_SSM = ("expand", "chunk", "implementation", "dt_init_min", "dt_init_max", "dt_init_floor")
# What a model without attention has no use for.
_ATTENDING = (
    *("heads", "kv_heads", "head_dim", "max_positions", "positions", "rope", "qk_norm", "attention_bias"),
    *("attention_scale", "attention_softcap", "attention_sinks", "latent", "activation", "gated"),
)


def load(
    folder: str | os.PathLike[str], *, partition: Partition | None = None, dtype: DType | None = None
) -> tuple[Model, Params]:
    """The model in `folder` and its weights, each tensor streamed to its place in the stacked, sharded parameters.

    Args:
      dtype: of the weights and of compute; None: what config.json says, with float16 as float32.

    Raises:
      UserError: an architecture or setting that is not supported; a file that is missing, torn or unfit; a weight that
        is missing, not known, or of another shape.
    """
    folder = Path(folder)
    config, family = read_config(folder)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    model = make_model(config, partition)
    return model, load_weights(folder, family, model)


def read_config(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Family]:
    """The settings in a folder's config.json, and whose they are."""
    keys = read_json(Path(folder) / "config.json")
    family = family_of(keys)
    if packed := keys.get("quantization_config"):
        method = packed.get("quant_method", "in a way of their own") if isinstance(packed, dict) else packed
        raise UserError(
            f"{folder}: its weights are quantised ({method}), which is not read: load them dequantised with "
            "transformers and save that"
        )
    reader = Keys(keys)
    fields = reader.fields(family.config)
    if unread := reader.unread():
        raise UserError(
            f"{folder}/config.json: {unread[0]}={json.dumps(keys[unread[0]])} is not known for {family.model_type}, "
            "and may change the logits: if it does not, take it out of the file"
        )
    head = "score" if family.scorer and family.scorer in (keys.get("architectures") or []) else "tokens"
    if head == "score" and (labels := len(keys.get("id2label") or ()) or keys.get("num_labels", 2)) != 1:
        raise UserError(
            f"{folder}/config.json: {labels} labels are not supported: a reward model has one (num_labels=1)"
        )
    named = keys.get("dtype") or keys.get("torch_dtype")
    dtype: DType = "bfloat16" if named == "bfloat16" else "float64" if named == "float64" else "float32"
    return assembled(fields | {"head": head, "dtype": dtype, "param_dtype": dtype}), family


def family_of(keys: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      UserError: it is none of ours, or a model of one with another head.
    """
    name = keys.get("model_type")
    known = {family.model_type: family for family in FAMILIES}
    if str(name) not in known:
        raise UserError(f"config.json: model_type={name!r} is not supported: {nearest(str(name), known)}")
    family, architectures = known[str(name)], keys.get("architectures") or []
    supported = [name for name in (family.architecture, family.scorer) if name]
    if architectures and set(supported).isdisjoint(architectures) and not architectures[0].endswith("Model"):
        raise UserError(f"config.json: {architectures[0]} is not supported for {name}, only {' and '.join(supported)}")
    return family


def load_weights(folder: Path, family: Family, model: Model) -> Params:
    """The weights in `folder`, as `model` has them."""
    tensors, wanted = Tensors(folder), places(model, family.weights)
    named = _with_prefix(tensors.names, wanted)
    tied = {"lm_head.weight"} if model.config.tied_embedding else set()
    extra = read_json(folder / "config.json").get(family.extra_layers) or 0
    unused = {name: reason for name in named if (reason := _why_unused(name, family, model.config.layers, extra))}
    for reason in sorted(set(unused.values())):
        count = sum(why == reason for why in unused.values())
        log.warning("%s: not read: %d tensor%s: %s", folder, count, "s" * (count > 1), reason)
    if missing := [name for name in wanted if name not in named]:
        raise UserError(f"{folder} has no weight {missing[0]} ({len(missing)} of {len(wanted)} are missing)")
    if unknown := sorted(set(named) - set(wanted) - set(unused) - tied):
        raise UserError(f"{folder} has a weight {unknown[0]!r} that is no part of this {family.model_type} model")
    for name, place in wanted.items():
        if (shape := tensors.shape(named[name])) != place.rule.shape(place.shapes):
            raise UserError(f"{folder}: {name} has shape {shape}, not {place.rule.shape(place.shapes)}")
    params = _empty(model)
    for name, place in wanted.items():
        parts = place.rule.split(tensors.read(named[name]), place.shapes)
        for (path, index, _), part in zip(place.leaves, parts, strict=True):
            _put(params, model, path, index, part)
    return params


def _why_unused(name: str, family: Family, layers: int, extra: int) -> str:
    """What a tensor is that inference does not use; "" for any other. `extra` layers may lie behind the last."""
    for pattern, reason in family.unused.items():
        if re.fullmatch(pattern, name):
            return reason
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and layers <= int(layer[1]) < layers + extra:
        return f"layers behind the last, which {family.extra_layers}={extra} counts: they predict further tokens"
    return ""


def save(
    model: Model,
    params: Params,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = 2 * 2**30,
    beside: Iterable[Path] = (),
) -> Family:
    """Writes a folder that `transformers` and `load` read, whole or not at all; the family it is of.

    Every process of several hosts calls this; the first one writes.

    Args:
      beside: files that are copied into the folder, such as a licence.
      tokenizer: saved beside the weights; the ids it begins, ends and pads documents with go into config.json.
        Without the last of them transformers scores one text at a time.
      shard_bytes: of one file; larger models are written in several, with an index.

    Raises:
      UserError: no family has this model's settings, or `folder` is there already.
    """
    target = Path(folder).absolute()
    check_free(target)
    family, keys = config_for(model.config)
    wanted = places(model, family.weights)
    tensors = ((name, _theirs(params, place)) for name, place in wanted.items())
    if jax.process_index():
        collections.deque(tensors, maxlen=0)  # to fetch what is split over hosts takes all of them
        return family
    with new_folder(target) as partial:
        content = {"architectures": [family.architecture], "model_type": family.model_type, **keys}
        if model.config.head == "score":
            content |= {"architectures": [family.scorer], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        content["dtype"] = model.config.param_dtype
        for file in beside:
            shutil.copyfile(file, partial / file.name)
        if tokenizer is not None:
            content |= export_tokenizer(tokenizer, partial)
        write_atomic(partial / "config.json", json.dumps(content, indent=2).encode() + b"\n")
        write_tensors(partial, tensors, shard_bytes)
    return family


def config_for(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that has just these settings, and its config.json's keys.

    Raises:
      UserError: none has: the message says what the nearest one lacks.
    """
    wanted = identity(config)
    differences: dict[str, list[str]] = {}
    for family in FAMILIES:
        keys: dict[str, Any] = {}
        try:
            for part in family.config:
                keys |= part.write(config)
            found = identity(assembled(Keys(keys).fields(family.config) | {"head": config.head}))
        except UserError as error:
            differences[family.model_type] = [str(error)] * len(wanted)
            continue
        differences[family.model_type] = [
            f"model.{name}={wanted[name]!r} (it has {found[name]!r})" for name in wanted if found[name] != wanted[name]
        ]
        if not differences[family.model_type]:
            if config.head == "score" and not family.scorer:
                raise UserError(
                    f"transformers has no reward models (model.head=score) of the family {family.model_type}"
                )
            return family, keys
    closest = min(differences, key=lambda name: len(differences[name]))
    raise UserError(
        f"no open family has this model's settings; {closest} comes nearest, but for " + differences[closest][0]
    )


def identity(config: ModelConfig) -> dict[str, Any]:
    """What a model is, spelt out: defaults resolved, settings without effect set aside."""
    local, latent, mamba = "local" in config.pattern, config.latent.kv_rank > 0, "mamba" in config.pattern
    experts, ssm = ExpertsConfig(), SsmConfig()
    if config.experts.count:
        # What routes and weighs; the losses and the speed of balance are of training.
        experts = dataclasses.replace(
            config.experts, width=config.expert_width, balance_loss=0.0, z_loss=0.0, correction_speed=0.0
        )
    if mamba:
        ssm = dataclasses.replace(
            config.ssm, heads=config.ssm_heads, **{name: getattr(ssm, name) for name in _RUNNING_OF_SSM}
        )
    dense = any(config.has_mlp(config.kind(layer)) and not config.has_experts(layer) for layer in range(config.layers))
    spelt = dataclasses.replace(
        config,
        kv_heads=config.K,
        head_dim=0 if latent else config.H,
        mlp_width=config.F if dense else 0,
        window=config.window if local else None,
        attention_scale=float(f"{config.attention_scale or config.H**-0.5:.9g}"),
        attention_bias="none" if config.bias else config.attention_bias,
        pattern=tuple(config.kind(layer) for layer in range(config.layers)),
        rope=_effective_rope(config),
        experts=experts,
        latent=config.latent if latent else LatentConfig(),
        ssm=ssm,
    )
    if config.head == "score":
        spelt = dataclasses.replace(spelt, tied_embedding=False, logit_softcap=None)
    if not config.attends:
        usual = {name: getattr(USUAL, name) for name in _ATTENDING}
        spelt = dataclasses.replace(spelt, **usual)
    return {field.name: getattr(spelt, field.name) for field in dataclasses.fields(spelt) if field.name not in _RUNNING}


def _effective_rope(config: ModelConfig) -> RopeConfig:
    """The rotary settings that make a difference."""
    rope = config.rope
    if config.positions == "learned":
        return RopeConfig()
    if "local" not in config.pattern:
        return dataclasses.replace(rope, local_base=0.0)
    unscaled = 0.0 if rope.scaling != "none" else rope.base
    return dataclasses.replace(rope, local_base=rope.local_base or unscaled)


def _with_prefix(names: set[str], wanted: dict[str, Place]) -> dict[str, str]:
    """Their names by ours: a folder saved without its head leaves out the name of the base model in front."""
    prefix = next(iter(wanted)).partition(".")[0] + "."
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {name if name in ("lm_head.weight", "score.weight") else prefix + name: name for name in names}


def _empty(model: Model) -> Params:
    """Parameters to be filled, where and how they shall lie."""
    abstract = abstract_params(model)

    def zeros() -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    shardings = None if model.partition is None else model.partition.shardings(model.axes)
    return jax.jit(zeros, out_shardings=shardings)()


def _put(params: Params, model: Model, path: str, index: tuple[int, ...], part: np.ndarray) -> None:
    """Writes one layer of a leaf, in place."""
    *way, last = path.split(".")
    holder = leaf_at(params, ".".join(way))
    stored = holder[last].dtype
    if not index:
        del holder[last]  # a leaf of one tensor is that tensor: its place is given up before the tensor comes
    if model.partition is None:
        piece = jnp.asarray(part)
    else:
        axes = leaf_at(model.axes, path)[len(index) :]
        sharding = model.partition.sharding(*axes)
        piece = jax.make_array_from_callback(part.shape, sharding, lambda place: part[place])
    if not index:
        holder[last] = piece if piece.dtype == stored else piece.astype(stored)
        return
    holder[last] = _written(holder[last], piece, jnp.asarray(index, jnp.int32), len(index))


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _written(stack: jax.Array, piece: jax.Array, index: jax.Array, dims: int) -> jax.Array:
    starts = [index[i] for i in range(dims)] + [0] * piece.ndim
    return jax.lax.dynamic_update_slice(stack, piece.astype(stack.dtype).reshape((1,) * dims + piece.shape), starts)


def _theirs(params: Params, place: Place) -> np.ndarray:
    leaves = [fetch(leaf_at(params, path)[index]) for path, index, _ in place.leaves]
    return place.rule.joined(leaves)
