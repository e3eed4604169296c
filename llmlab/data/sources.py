"""The documents of a source, in an order that never changes, split into training and held-out text."""

import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from llmlab.core.errors import UserError
from llmlab.data import readers, sources_python
from llmlab.data.config import DataConfig
from llmlab.data.readers import BadInput, Numbered

Split = Literal["train", "held_out", "all"]
Item = TypeVar("Item", str, Path)

EMPTY_TEXT = "empty text"
ROW_READERS: dict[str, Callable[[Path, str], Iterator[Numbered]]] = {
    "jsonl": readers.jsonl_rows,
    "parquet": readers.parquet_rows,
    "huggingface": readers.huggingface_rows,
}


@dataclass(frozen=True)
class Document:
    """One text. Its name says which file and row it came from, below the folder that all files share."""

    name: str
    text: str


@dataclass
class Report:
    """What was skipped: how often for each reason, and the first case of each."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Counts one skip."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def summary(self, bad_only: bool = False) -> str:
        """One line for a person; empty when nothing was skipped. A row without text is not bad, only of no use."""
        reasons = [
            f"{count} x {reason} (first: {self.first[reason]})"
            for reason, count in self.counts.items()
            if not (bad_only and reason == EMPTY_TEXT)
        ]
        return f"skipped {'; '.join(reasons)}" if reasons else ""


def documents(config: DataConfig, split: Split, report: Report) -> Iterator[Document]:
    """The texts of `split`, a mixture's parts one after another. Texts of no characters are skipped and counted.

    Raises:
      UserError: nothing matches `data.files`, or a file or row is bad and `data.on_bad_input` is `error`.
    """
    for part, _ in config.parts():
        for name, text in _numbered(part, split):
            if isinstance(text, BadInput):
                _judge(text, part, report)
            elif text:
                yield Document(name, text)
            else:
                report.add(EMPTY_TEXT, name)


def source_paths(config: DataConfig) -> list[Path]:
    """Every file or folder that a config without a mixture reads, for training or held out."""
    if config.source == "python":
        return []
    return [Path(path) for path in sorted({*_training_files(config), *_expand(config, "held_out_files")})]


def names_of(paths: list[Path]) -> dict[Path, str]:
    """Names that stay the same when all the files move together: paths below the folder that they share."""
    shared = os.path.commonpath([path.parent.absolute() for path in paths]) if paths else ""
    return {path: Path(os.path.relpath(path.absolute(), shared)).as_posix() for path in paths}


def _judge(bad: BadInput, config: DataConfig, report: Report) -> None:
    if config.on_bad_input == "error":
        raise UserError(f"{bad}, or set data.on_bad_input=skip")
    report.add(bad.reason, bad.where)


def _numbered(config: DataConfig, split: Split) -> Iterator[tuple[str, str | BadInput]]:
    if config.source == "python":
        yield from _python(config, split)
        return
    training, held_out = _training_files(config), [Path(p) for p in _expand(config, "held_out_files")]
    names = names_of(sorted({*training, *held_out}))
    chosen = {"train": training, "held_out": held_out, "all": [*training, *held_out]}[split]
    if config.source == "text":
        spans: list[tuple[Path, int, int | None]]
        if held_out:
            spans = [(path, 0, None) for path in chosen]
        elif len(training) == 1:
            spans = [_by_position(training[0], config.held_out, split)]
        else:
            spans = [(path, 0, None) for path in _by_name(training, names, config.held_out, split)]
        for path, start, stop in spans:
            for number, text in readers.text_rows(path, start, stop):
                yield f"{names[path]}:{number}" if number else names[path], text
        return
    for path in chosen if held_out else training:
        for number, text in ROW_READERS[config.source](path, config.field):
            name = f"{names[path]}:{number}"
            # A bad row has no side: both splits meet it, so that neither hides it.
            if isinstance(text, BadInput) or held_out or _takes(split, _place(name) < config.held_out):
                yield name, text


def _python(config: DataConfig, split: Split) -> Iterator[tuple[str, str | BadInput]]:
    names = list(sources_python.names())
    for name in _by_name(names, {name: name for name in names}, config.held_out, split):
        try:
            yield name, sources_python.read_bytes(name).decode()
        except UnicodeDecodeError:
            continue  # another build's oddity is nothing that the user could mend


def _by_position(path: Path, held_out: float, split: Split) -> tuple[Path, int, int | None]:
    """The characters of a single file that belong to `split`: its end is held out. One that is bad is bad for both."""
    length = None if split == "all" else readers.count_characters(path)
    if length is None:
        return path, 0, None
    cut = int(length * (1 - held_out))
    return (path, 0, cut) if split == "train" else (path, cut, None)


def _by_name(items: list[Item], names: dict[Item, str], held_out: float, split: Split) -> list[Item]:
    """The items of `split`. With few of them the hash may choose none to hold out: then the nearest to it is."""
    chosen = {item for item in items if _place(names[item]) < held_out}
    if not chosen and len(items) > 1:
        chosen = {min(items, key=lambda item: _place(names[item]))}
    return [item for item in items if _takes(split, item in chosen)]


def _takes(split: Split, held_out: bool) -> bool:
    return split == "all" or held_out == (split == "held_out")


def _place(name: str) -> float:
    """A number in [0, 1) that only depends on `name`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _training_files(config: DataConfig) -> list[Path]:
    if not config.files:
        raise UserError(
            f"data.files is empty: data.source={config.source!r} needs a path or pattern, such as books/*.txt"
        )
    excluded = {os.path.realpath(path) for path in _expand(config, "held_out_files")}
    files = [path for path in _expand(config, "files") if os.path.realpath(path) not in excluded]
    if not files:
        raise UserError(f"data.held_out_files takes every file that data.files={config.files!r} matches: none is left")
    return files


def _expand(config: DataConfig, key: str) -> list[Path]:
    """The sorted paths that match the patterns of `data.<key>`; a file that several of them lead to comes once.

    Read twice it could be trained on by one name and held out by the other.
    """
    folders = config.source == "huggingface"
    found: set[Path] = set()
    for pattern in getattr(config, key):
        full = os.path.expanduser(pattern)
        matches = [full] if os.path.exists(full) else glob.glob(full, recursive=True)
        good = [Path(match) for match in matches if os.path.isdir(match) == folders]
        if not good:
            raise UserError(f"data.{key}={pattern!r} {_why_none(matches, folders)} (looked from {os.getcwd()})")
        found.update(good)
    once: dict[str, Path] = {}
    for path in sorted(found):
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def _why_none(matches: list[str], folders: bool) -> str:
    if not matches:
        return "matches nothing: check the path"
    if folders:
        return "matches no folder: name one that save_to_disk wrote"
    return f"is a folder: name the files in it, such as {matches[0].rstrip('/')}/**/*.txt"
