"""Adapters in the format of Hugging Face's PEFT: a folder with adapter_config.json and adapter_model.safetensors.

There every layer stands by itself, under the name that the family's weight table gives it; a linear layer's lora_A is
[rank, in], its lora_B [out, rank], whichever way its weight lies. The score of a reward model is in there whole.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llmlab.core.arrays import accumulation_dtype
from llmlab.core.errors import UserError
from llmlab.core.mesh import fetch
from llmlab.core.paths import write_atomic
from llmlab.model import hf
from llmlab.model.adapters import Adapter, AdapterConfig, LowRank
from llmlab.model.cost import abstract_params
from llmlab.model.hf_weights import Place, Rule, places
from llmlab.model.matrices import Matrix, leaf_at, matrices
from llmlab.model.score import SCORE
from llmlab.model.types import Model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# The layer of transformers' reward models that gives the score, as PEFT keeps it: whole.
_SCORE, _SCORE_WEIGHT = "score", f"{_PREFIX}score.weight"
# What these ask for, where they ask for anything, our adapters do not do.
_NOT_HERE = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
)
# Initialisations that change the weights under the adapter.
_OTHER_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


class Linear(NamedTuple):
    """One of our matrices: its path, where in its stack, and the layer of transformers' model that holds it.

    alone: the layer's weight is this matrix and nothing else. turned: it is [out, in], as torch.nn.Linear has it.
    """

    path: str
    where: tuple[int, ...]
    name: str
    alone: bool
    turned: bool


def save_peft(
    model: Model, adapter: Adapter, config: AdapterConfig, folder: str | os.PathLike[str], *, base_model: str = ""
) -> None:
    """Writes the adapter into `folder`, for PEFT to load. `base_model`: the name or folder of the weights it is for.

    Raises:
      UserError: no open family has this model's settings, or one of the matrices is no linear layer of its own there.
    """
    scores = model.config.head == "score"
    linears = list(_linears(model, adapter.keys() - {SCORE}))
    tensors = {_SCORE_WEIGHT: fetch(adapter[SCORE])[None].astype(np.float32)} if scores else {}
    for linear in linears:
        _check_alone(linear)
        update = adapter[linear.path]
        parts = {
            "lora_A.weight": fetch(update.a[linear.where]).reshape(-1, update.a.shape[-1]).T,
            "lora_B.weight": fetch(update.b[linear.where]).reshape(update.a.shape[-1], -1).T,
        }
        if update.magnitude is not None:
            parts["lora_magnitude_vector"] = fetch(update.magnitude[linear.where]).reshape(-1)
        # The writer takes the bytes as they lie: a transposed view would be written untransposed.
        tensors |= {f"{_PREFIX}{linear.name}.{k}": np.ascontiguousarray(v, np.float32) for k, v in parts.items()}
    names = [linear.name for linear in linears]
    ends = [name.rpartition(".")[2] for name in names]
    everywhere = all(ends.count(end) == model.config.layers for end in ends)
    about = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scores else "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rslora,
        "use_dora": config.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": not all(linear.turned for linear in linears),
        "target_modules": sorted(set(ends if everywhere else names)),
        "modules_to_save": [_SCORE] if scores else None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / TENSORS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(about, indent=2).encode() + b"\n")


def is_scorer(folder: str | os.PathLike[str]) -> bool:
    """Whether the adapter in `folder` makes a reward model of what is under it."""
    return _about(Path(folder)).get("task_type") == "SEQ_CLS"


def load_peft(model: Model, folder: str | os.PathLike[str]) -> tuple[Adapter, AdapterConfig]:
    """The adapter that PEFT, or `save_peft`, left in `folder`, and its settings.

    Raises:
      UserError: it is not there, is for another model, or asks for what our adapters do not do.
    """
    folder = Path(folder)
    about, tensors = _read(folder, scores := model.config.head == "score")
    kind, rank, alpha = "dora" if about.get("use_dora") else "lora", about.get("r"), about.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(f"{folder / CONFIG} has r={rank!r} and lora_alpha={alpha!r}: they should be numbers")
    config = AdapterConfig(kind, rank, float(alpha), bool(about.get("use_rslora")))  # type: ignore[arg-type]
    known, shapes = matrices(model), abstract_params(model)
    found: dict[str, list[tuple[np.ndarray, ...]]] = {}

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise UserError(f"{folder / TENSORS} holds no {name}: it is cut short, or for another model")
        if tensors[name].shape != shape:
            raise UserError(f"{name} is {tensors[name].shape} in {folder / TENSORS}, and {shape} for this model")
        return tensors.pop(name)

    for linear in _linears(model, known):
        place = f"{_PREFIX}{linear.name}.lora_"
        if f"{place}A.weight" not in tensors:
            continue
        _check_alone(linear)
        inside, outside = _sides(shapes, linear.path, known[linear.path])
        size_in, size_out = math.prod(inside), math.prod(outside)
        parts = [
            take(f"{place}A.weight", rank, size_in).T.reshape(*inside, rank),
            take(f"{place}B.weight", size_out, rank).T.reshape(rank, *outside),
        ]
        if kind == "dora":
            parts.append(take(f"{place}magnitude_vector", size_out).reshape(outside))
        found.setdefault(linear.path, []).append(tuple(parts))
    score_1D = take(_SCORE_WEIGHT, 1, model.config.width) if scores else None
    if tensors:
        raise UserError(f"{folder / TENSORS} holds {min(tensors)}, which is no part of an adapter for this model")
    adapter: Adapter = {}
    for path, layers in found.items():
        leaf = leaf_at(shapes, path)
        if known[path].stack and len(layers) != leaf.shape[0]:
            raise UserError(f"{folder / TENSORS} adapts {path} in {len(layers)} of {leaf.shape[0]} layers: all or none")
        arrays = [np.stack(part) if known[path].stack else part[0] for part in zip(*layers, strict=True)]
        a, b, *magnitude = (jnp.asarray(array, accumulation_dtype(leaf.dtype)) for array in arrays)
        adapter[path] = LowRank(a, b, magnitude[0] if magnitude else None, config.scale)
    include = "|".join(re.escape(path) for path in adapter)
    if score_1D is not None:
        adapter[SCORE] = jnp.asarray(score_1D[0], leaf_at(shapes, SCORE).dtype)
    return adapter, dataclasses.replace(config, include=f"^({include})$")


def _linears(model: Model, paths: Iterable[str]) -> Iterator[Linear]:
    """Every single matrix of these stacks, in their order and that of the layers."""
    family, _ = hf.config_for(model.config)
    wanted, known = set(paths), matrices(model)
    for name, place in places(model, family.weights).items():
        for path, index, _ in place.leaves:
            if path in wanted:
                alone = known[path].stack == len(index) < 2 and _is_plain(place)
                yield Linear(path, index, name.removesuffix(".weight"), alone, place.rule.turned)


def _is_plain(place: Place) -> bool:
    """Whether the tensor is one matrix of ours, laid out by nothing but its sides."""
    rule = place.rule
    return len(place.leaves) == 1 and rule == Rule(rule.theirs, rule.ours, rule.turned, rule.dims_in)


def _check_alone(linear: Linear) -> None:
    if not linear.alone:
        raise UserError(
            f"{linear.path} is no linear layer of its own in transformers' model but part of {linear.name}, which "
            f"PEFT's format has no place for: set adapter.include to other matrices"
        )


def _sides(shapes: Any, path: str, matrix: Matrix) -> tuple[tuple[int, ...], tuple[int, ...]]:
    own = leaf_at(shapes, path).shape[matrix.stack :]
    return own[: matrix.dims_in], own[matrix.dims_in :]


def _about(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says."""
    try:
        return json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is no PEFT adapter: it has no {CONFIG} or no {TENSORS}") from None
    except ValueError as error:
        raise UserError(f"the PEFT adapter in {folder} cannot be read ({error}): copy it anew") from error


def _read(folder: Path, scores: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What adapter_config.json says, and the tensors by name; those of a reward model where `scores` is set."""
    about = _about(folder)
    try:
        with safe_open(folder / TENSORS, framework="flax") as file:
            # Of an adapted head PEFT keeps a copy as it was beneath the adapter.
            names = [name for name in file.keys() if not name.endswith(".base_layer.weight")]  # noqa: SIM118
            tensors = {name: np.asarray(file.get_tensor(name)) for name in names}
    except FileNotFoundError:
        raise UserError(f"{folder} is no PEFT adapter: it has no {CONFIG} or no {TENSORS}") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(f"the PEFT adapter in {folder} cannot be read ({error}): copy it anew") from error
    if about.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / CONFIG} has peft_type={about.get('peft_type')!r}: only LORA, with DoRA, is known here"
        )
    if scores and set(about.get("modules_to_save") or ()) <= {_SCORE, "classifier"}:
        about.pop("modules_to_save", None)
    asked = [key for key in _NOT_HERE if about.get(key)]
    if about.get("bias", "none") != "none":
        asked.append("bias")
    if str(about.get("init_lora_weights", "")).lower().startswith(_OTHER_BASE):
        asked.append("init_lora_weights")
    if asked:
        raise UserError(f"{folder / CONFIG} has {asked[0]}={about[asked[0]]!r}, which adapters here do not do")
    return about, tensors
