"""The files of a Hugging Face folder: safetensors in one file or in shards with an index, read a tensor at a time.

What is read cannot execute, and no name in it can lead out of the folder.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from llmlab.core.errors import UserError
from llmlab.core.paths import clear_when_full, write_atomic

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {path}: give the folder of a model in the Hugging Face layout") from None
    except (ValueError, OSError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is torn or not JSON: fetch it again")
    return content


class Tensors:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path):
        self._shard_of = _shards(folder)
        self._files: dict[Path, Any] = {}
        for shard in sorted(set(self._shard_of.values())):
            self._files[shard] = _opened(shard)
        for shard, file in self._files.items():
            held, listed = set(file.keys()), {name for name, of in self._shard_of.items() if of == shard}
            if wrong := sorted(held ^ listed):
                where = "is not there" if wrong[0] in listed else "is there and not listed"
                raise UserError(f"{folder / INDEX} does not fit {shard.name}: {wrong[0]} {where}; fetch both again")

    @property
    def names(self) -> set[str]:
        return set(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in the file's dtype."""
        return np.asarray(self._slice(name)[:]) if self.shape(name) else self._file(name).get_tensor(name)

    def _file(self, name: str) -> Any:
        return self._files[self._shard_of[name]]

    def _slice(self, name: str) -> Any:
        return self._file(name).get_slice(name)


def _shards(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    if (folder / SINGLE).exists():
        file = _opened(folder / SINGLE)
        return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).exists():
        pickled = " It has pickled weights, which can execute code: convert them to safetensors." * bool(
            any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        )
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}.{pickled}")
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()) or not listed:
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files: fetch it again")
    for file in sorted(set(listed.values())):
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX} names the file {file!r}: only .safetensors beside it are read")
        if not (folder / file).exists():
            raise UserError(f"{folder / file} is missing: {INDEX} lists it, fetch it again")
    return {name: folder / file for name, file in listed.items()}


def _opened(path: Path) -> Any:
    # safetensors checks the header against the file's length, and that the tensors tile it without a hole.
    try:
        return safetensors.safe_open(path, framework="np")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is cut short or corrupt ({reason}): fetch it again") from None


def write_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Writes tensors one after the other, holding no more than a shard (or one tensor) in memory."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def write() -> None:
        shards.append(list(held))
        with clear_when_full(folder):
            save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and sum(x.nbytes for x in held.values()) + tensor.nbytes > shard_bytes:
            write()
        held[name] = tensor
        total += tensor.nbytes
    write()
    if len(shards) == 1:
        os.replace(folder / "shard-1", folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        os.replace(folder / f"shard-{number}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
