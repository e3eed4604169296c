"""What is held out from training: chosen by a hash of its name, the same wherever and whenever it is asked."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

Split = Literal["train", "held_out", "all"]
Item = TypeVar("Item", str, Path)


def by_name(items: list[Item], names: Mapping[Item, str], held_out: float, split: Split) -> list[Item]:
    """The items of `split`. With few of them the hash may choose none to hold out: then the nearest to it is."""
    chosen = {item for item in items if place(names[item]) < held_out}
    if not chosen and len(items) > 1:
        chosen = {min(items, key=lambda item: place(names[item]))}
    return [item for item in items if takes(split, item in chosen)]


def takes(split: Split, held_out: bool) -> bool:
    """Whether `split` takes what is, or is not, held out."""
    return split == "all" or held_out == (split == "held_out")


def place(name: str) -> float:
    """A number in [0, 1) that only depends on `name`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64
