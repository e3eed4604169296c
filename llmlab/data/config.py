"""The `data` section: what is read, how it becomes rows, and what is held out."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from llmlab.core.errors import UserError, nearest
from llmlab.data.tokenizer import TokenizerConfig

PartSource = Literal["python", "assistant", "sums", "text", "jsonl", "parquet", "huggingface"]
BUILT_IN = ("python", "assistant", "sums")  # which read no files
Rows = Literal["text", "chat", "preference", "ranking", "binary", "steps"]


@dataclass(frozen=True)
class MixturePart:
    """One source of a mixture, which fills the share weight / (sum of weights) of the rows, forever repeated.

    weight: relative to the other parts' weights.
    source, files, field, held_out_files: as in `DataConfig`.
    """

    weight: float = 1.0
    source: PartSource = "text"
    files: tuple[str, ...] = ()
    field: str = "text"
    held_out_files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _as_tuples(self, "files", "held_out_files")
        _check_choice("data.mixture.source", self.source, PartSource)
        if not 0 < self.weight < float("inf"):
            raise UserError(f"data.mixture.weight={self.weight} should be above 0: leave a part out by removing it")
        _check_files(self, "data.mixture")


@dataclass(frozen=True)
class DataConfig:
    """Text, and how it becomes batches.

    source: `python` is the sources and language reference of the running interpreter's standard library; `assistant`
      the same without the functions that are held out from an assistant, or, as `rows` says, conversations about that
      library and preferences between answers; `sums` are conversations about sums, and preferences; `text`, `jsonl` and
      `parquet` read files (`.gz` and `.zst` too, where they are text); `huggingface` reads folders written by
      `save_to_disk`; `mixture` draws rows from several.
    files: a pattern or several, such as `books/*.txt` or `crawl/**/*.jsonl.zst`. In `text`, a file is a document; one
      of more than about four million characters becomes several, cut at line ends.
    field: which field of a row holds the text, where rows have fields.
    rows: what a row is: `text`; `chat`, a conversation; `preference`, two answers of which one is better; `ranking`,
      several in order; `binary`, one that is good or bad; `steps`, one whose parts are judged.
    train_on: which turns of a conversation are learned: every `assistant` turn that its row does not exclude, or the
      `last` of them.
    system: what a conversation begins with where it has no system turn of its own; empty for nothing.
    sequence_length: predicted tokens in a row.
    batch_size: rows in a step, all hosts together.
    packing: `best_fit` packs whole documents together, each seeing only itself, and cuts only those longer than a row;
      `chunk` joins all documents and cuts every `sequence_length` tokens; `none` gives each a row of its own. Answers
      that are judged together share a row.
    shuffle: visit the rows in a new random order every epoch, or in the order of the files.
    held_out: the share kept from training, above 0. Files (`python`, `text`) and rows (the others) are chosen by a
      hash of their name or place, rows with answers that are judged by one of their prompt; a single `text` file is
      split by position, its end held out; `assistant` and `sums` have splits of their own.
    held_out_files: instead, hold out exactly these; they are not trained on even if `files` matches them too.
    on_bad_input: whether an unreadable file or row is an error, or skipped, counted and reported.
    workers: processes that tokenise; 0 for one per core, up to 16; 1 for none beside this one.
    tokenizer: which tokenizer to train or load.
    mixture: the parts, when source is `mixture`.
    cache_dir: where tokens and tokenizers are kept; empty for `$LLMLAB_CACHE`, or `~/.cache/llmlab`.
    """

    source: Literal["python", "assistant", "sums", "text", "jsonl", "parquet", "huggingface", "mixture"] = "python"
    files: tuple[str, ...] = ()
    field: str = "text"
    rows: Rows = "text"
    train_on: Literal["assistant", "last"] = "assistant"
    system: str = ""
    sequence_length: int = 256
    batch_size: int = 16
    packing: Literal["best_fit", "chunk", "none"] = "best_fit"
    shuffle: bool = True
    held_out: float = 0.1
    held_out_files: tuple[str, ...] = ()
    on_bad_input: Literal["error", "skip"] = "error"
    workers: int = 0
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    mixture: tuple[MixturePart, ...] = ()
    cache_dir: str = ""

    def __post_init__(self) -> None:
        _as_tuples(self, "files", "held_out_files")
        hints = typing.get_type_hints(DataConfig)
        for name in ("source", "rows", "train_on", "packing", "on_bad_input"):
            _check_choice(f"data.{name}", getattr(self, name), hints[name])
        for name, least in (("sequence_length", 1), ("batch_size", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name}={getattr(self, name)} should be at least {least}")
        if not 0 < self.held_out < 1:
            raise UserError(
                f"data.held_out={self.held_out} is the share that every run is evaluated on: choose one above 0 and "
                "below 1, such as 0.1"
            )
        for source in (self.source, *(part.source for part in self.mixture)):
            if self.rows != "text" and source in ("text", "python"):
                raise UserError(
                    f"data.rows={self.rows!r} needs rows with fields, and data.source={source!r} has none: set "
                    "data.source to jsonl, parquet or huggingface, or data.rows=text"
                )
        if self.packing == "chunk" and self.rows != "text":
            raise UserError(f"data.packing=chunk cuts texts anywhere, but data.rows={self.rows}: set it to best_fit")
        if self.mixture and self.source != "mixture":
            raise UserError(
                f"data.mixture is set, but data.source={self.source!r} reads no parts: set data.source=mixture"
            )
        _check_files(self, "data")

    def parts(self) -> tuple[tuple["DataConfig", float], ...]:
        """The sources to read, each as a config without a mixture, with its weight."""
        if self.source != "mixture":
            return ((self, 1.0),)
        if not self.mixture:
            raise UserError("data.mixture is empty: data.source='mixture' needs parts, each with a weight and a source")
        return tuple(
            (dataclasses.replace(self, mixture=(), **_part_fields(part)), part.weight) for part in self.mixture
        )


def _part_fields(part: MixturePart) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name != "weight"}


def _as_tuples(section: Any, *names: str) -> None:
    """Lets a user write one pattern where a list of them is meant."""
    for name in names:
        value = getattr(section, name)
        object.__setattr__(section, name, (value,) if isinstance(value, str) else tuple(value))


def _check_choice(key: str, value: str, hint: Any) -> None:
    choices = typing.get_args(hint)
    if value not in choices:
        raise UserError(f"{key}={value!r} is not a choice: {nearest(str(value), choices)}")


def _check_files(section: DataConfig | MixturePart, key: str) -> None:
    for name in ("files", "held_out_files"):
        if getattr(section, name) and section.source in (*BUILT_IN, "mixture"):
            raise UserError(
                f"{key}.{name}={getattr(section, name)!r} is not read when {key}.source={section.source!r}: "
                f"set {key}.source to text, jsonl, parquet or huggingface"
            )
