"""The manifest of a checkpoint: sizes and hashes of its files. It is written last, so one without it is not whole."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from llmlab.core.errors import UserError
from llmlab.core.paths import sync_folder, write_atomic

NAME = "manifest.json"


class Manifest(NamedTuple):
    """What a whole checkpoint holds. `arrays`: name -> [shape, dtype]; `files`: path inside it -> [bytes, sha256]."""

    step: int
    metrics: dict[str, float]
    arrays: dict[str, list[Any]]
    files: dict[str, list[Any]]


class Torn(UserError):
    """The checkpoint is not whole; the message says which, and in what way."""


def write(folder: Path, *, step: int, metrics: Mapping[str, float], arrays: Mapping[str, list[Any]]) -> None:
    """Commits the checkpoint in `folder`: from here on it counts.

    Raises:
      DiskFull: there is no room for the manifest; the checkpoint does not count.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    hashes = _hashes(folder, [str(path.relative_to(folder)) for path in paths])
    files = {name: [(folder / name).stat().st_size, digest] for name, digest in hashes.items()}
    # The files' bytes are synced by whoever wrote them; their names must be, before the manifest vouches for them.
    for inner in {path.parent for path in paths}:
        sync_folder(inner)
    content = Manifest(step, dict(metrics), dict(arrays), files)._asdict()
    write_atomic(folder / NAME, json.dumps(content | {"digest": _digest(content)}, indent=1).encode())
    sync_folder(folder.parent)


def read(folder: Path) -> Manifest:
    """The manifest in `folder`, with every file that it names there and of the right size.

    Raises:
      Torn: not so.
    """
    try:
        content = json.loads((folder / NAME).read_bytes())
        digest = content.pop("digest")
        manifest = Manifest(**content)
    except FileNotFoundError:
        raise Torn(f"{folder} has no manifest: it is still being saved, or its save was cut short") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Torn(f"the manifest of {folder} cannot be read ({error})") from error
    if digest != _digest(content):
        raise Torn(f"the manifest of {folder} has changed since it was written")
    for name, (size, _) in manifest.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise Torn(f"{folder} has lost its file {name}") from None
        if found != size:
            raise Torn(f"{folder / name} has {found} bytes instead of {size}")
    return manifest


def verify(folder: Path) -> Manifest:
    """The same, with every byte compared with its hash. Reads all of the checkpoint.

    Raises:
      Torn: not so.
    """
    manifest = read(folder)
    try:
        found = _hashes(folder, list(manifest.files))
    except OSError as error:
        raise Torn(f"{folder} cannot be read ({error})") from error
    for name, (_, digest) in manifest.files.items():
        if found[name] != digest:
            raise Torn(f"{folder / name} has changed since it was written")
    return manifest


def digest(manifest: Manifest) -> str:
    """What tells this checkpoint from all others: a hash of the manifest, and so of the hashes of every file."""
    return _digest(manifest._asdict())


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    def hash_file(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(hash_file, names), strict=True))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
