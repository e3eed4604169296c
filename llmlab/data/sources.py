"""The documents of a source, in an order that never changes, split into training and held-out text."""

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmlab.core.errors import UserError
from llmlab.data import readers, sources_assistant, sources_python, sums
from llmlab.data.chat import Example
from llmlab.data.config import BUILT_IN, DataConfig
from llmlab.data.readers import BadInput, Row
from llmlab.data.rows import BadRowError, examples
from llmlab.data.split import Split, by_name, place, takes

EMPTY_TEXT = "empty text"
ROW_READERS: dict[str, Callable[[Path, str | None], Iterator[Row | BadInput]]] = {
    "jsonl": lambda path, _: readers.jsonl_rows(path),
    "parquet": readers.parquet_rows,
    "huggingface": readers.huggingface_rows,
}


@dataclass(frozen=True)
class Document:
    """One text, or an `Example` as it dumps, where `data.rows` is not text.

    Its name says which file and row it came from, below the folder that all files share.
    """

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
    if config.source in BUILT_IN:
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
    if config.source == "assistant":
        yield from sources_assistant.assistant_rows(config.rows, split)
        return
    if config.source == "sums":
        yield from sums.sums(config.rows, split)
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
            spans = [(path, 0, None) for path in by_name(training, names, config.held_out, split)]
        for path, start, stop in spans:
            for number, text in readers.text_rows(path, start, stop):
                yield f"{names[path]}:{number}" if number else names[path], text
        return
    field = config.field if config.rows == "text" else None
    for path in chosen if held_out else training:
        for row in ROW_READERS[config.source](path, field):
            if isinstance(row, BadInput):
                yield names[path], row
                continue
            name, texts = f"{names[path]}:{row.number}", _texts(row, config)
            # A bad row has no side: both splits meet it, so that neither hides it.
            if isinstance(texts, BadInput):
                yield name, texts
            elif held_out or takes(split, place(_side(name, texts, config)) < config.held_out):
                for text in texts:
                    yield name, text


def _side(name: str, texts: Sequence[str], config: DataConfig) -> str:
    """By what a row is held out: its place; where answers are judged their prompt, which several rows may have."""
    if config.rows in ("text", "chat"):
        return name
    return str(Example.loads(texts[0]).responses[0].conversation[:-1])


def _texts(row: Row, config: DataConfig) -> Sequence[str] | BadInput:
    """What a row holds; both examples of one that holds two."""
    if config.rows == "text":
        text = readers.text_of(row, config.field)
        return text if isinstance(text, BadInput) else (text,)
    try:
        found = examples(row.fields, config.rows, system=config.system, train_on=config.train_on)
    except BadRowError as error:
        return error.at(row.where)
    return [example.dumps() for example in found]


def _python(config: DataConfig, split: Split) -> Iterator[tuple[str, str | BadInput]]:
    names = list(sources_python.names())
    for name in by_name(names, {name: name for name in names}, config.held_out, split):
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
