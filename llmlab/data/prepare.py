"""Tokenises a source once: found by what it was made from, built under a lock, continued where it was stopped."""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmlab.core.config import to_json
from llmlab.core.errors import UserError
from llmlab.core.paths import cache_root, clear_when_full, locked
from llmlab.data import readers, sources_assistant, sources_python, store, sums
from llmlab.data.chat import Example, template_for
from llmlab.data.config import DataConfig
from llmlab.data.progress import shown
from llmlab.data.sources import Report, documents, names_of, source_paths
from llmlab.data.split import Split
from llmlab.data.store import StoreWriter, TokenStore, TornError
from llmlab.data.tokenise import WorkerDiedError, encode_all
from llmlab.data.tokenizer import Tokenizer, load_tokenizer
from llmlab.data.tokenizer_train import train_tokenizer

COMMIT_SECONDS = 2.0
HASH_CONTENT_BYTES = 1 << 28
TOKENIZER_SEED = 0

log = logging.getLogger(__name__)


def prepare_parts(
    config: DataConfig, tokenizer: Tokenizer, split: Split, *, progress: bool = True
) -> list[tuple[TokenStore, float]]:
    """The stores of `split`, each with its weight: one, or one per part of a mixture."""
    return [(prepare(part, tokenizer, split, progress=progress), weight) for part, weight in config.parts()]


def prepare(config: DataConfig, tokenizer: Tokenizer, split: Split, *, progress: bool = True) -> TokenStore:
    """The tokens of `split` of one source, every document as [BOS] + tokens + [EOS]; from the cache if they are there.

    Processes that ask at the same time, on any host that shares the cache, wait for the first, then use its work.

    Raises:
      UserError: bad input (with `on_bad_input=error`), or a split without text.
      DiskFull: no room; the next start goes on from the last commit.
    """
    fingerprint = _store_fingerprint(config, tokenizer, split)
    folder = _cache(config, "tokens") / fingerprint
    found = _found(folder)
    if found is None:
        with locked(folder.with_suffix(".lock"), f"another process tokenises the same text: waiting for {folder}"):
            found = _found(folder)
            if found is None:
                _build(folder, fingerprint, config, tokenizer, split, progress)
                found = TokenStore.open(folder)
    if found.manifest["bad_input"] and config.on_bad_input == "error":
        raise UserError(f"tokenised before, {found.manifest['bad_input']}: mend them, or set data.on_bad_input=skip")
    return found


def tokenizer_for(config: DataConfig, *, progress: bool = True) -> Tokenizer:
    """The tokenizer that `config` names or describes, trained at most once for the same text and settings."""
    if config.tokenizer.file:
        return load_tokenizer(config.tokenizer.file)
    split_rule = [config.held_out, *([part.held_out_files for part, _ in config.parts()])]
    facts = [data_fingerprint(config), split_rule, to_json(config.tokenizer)]
    key = _digest("tokenizer", *facts, *([config.rows, config.system] if config.rows != "text" else []))
    path = _cache(config, "tokenizers") / f"{key}.model"
    found = _loaded(path)
    if found is None:
        with locked(path.with_suffix(".lock"), f"another process trains the same tokenizer: waiting for {path}"):
            found = _loaded(path) or _trained(path, config, progress)
    return found


def data_fingerprint(config: DataConfig) -> str:
    """A hash of the text that `config` reads: of its bytes, or above 256 MiB of its files' sizes and dates."""
    return _digest("data", [_source_identity(part) for part, _ in config.parts()])


def _found(folder: Path) -> TokenStore | None:
    if not (folder / store.MANIFEST).exists():
        return None
    try:
        return TokenStore.open(folder)
    except TornError as error:
        log.warning("%s. Tokenising again.", error)
        return None


def _build(
    folder: Path, fingerprint: str, config: DataConfig, tokenizer: Tokenizer, split: Split, progress: bool
) -> None:
    if (folder / store.MANIFEST).exists():
        store.remove(folder)
    report = Report()
    with clear_when_full(folder):
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder / store.TOKENIZER)
        narrow = tokenizer.vocab_size <= 1 << 16
        writer = StoreWriter(folder, np.dtype("<u2" if narrow else "<u4"), judged=config.rows != "text")
    if writer.items:
        log.warning("going on after %d documents that were tokenised before", writer.items)
    with _closed(writer), shown(f"tokenising {split}", _size_hint(config, split), progress) as advance:
        texts = (document.text for document in documents(config, split, report))
        rest = itertools.islice(texts, writer.items, None)
        committed = time.monotonic()
        encoding = encode_all(rest, tokenizer, str(folder / store.TOKENIZER), config.workers, config.rows)
        with contextlib.closing(encoding) as results:
            for encoded in results:
                writer.append(encoded)
                advance(writer.text_bytes)
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    writer.commit()
                    committed = time.monotonic()
        if not writer.documents:
            raise UserError(_why_no_text(config, split))
        writer.finish(
            fingerprint=fingerprint,
            tokenizer=tokenizer.fingerprint,
            skipped=report.counts,
            bad_input=report.summary(bad_only=True),
        )
    if report.summary():
        log.warning("%s: %s", split, report.summary())


@contextlib.contextmanager
def _closed(writer: StoreWriter) -> Iterator[None]:
    """Leaves behind only what the next start can use."""
    try:
        yield
    except WorkerDiedError:
        raise
    except UserError:
        if not (writer.path / store.PROGRESS).exists():
            shutil.rmtree(writer.path)
        raise
    finally:
        writer.close()


def _loaded(path: Path) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        return load_tokenizer(path)
    except UserError as error:
        log.warning("%s. Training it again.", error)
        return None


def _trained(path: Path, config: DataConfig, progress: bool) -> Tokenizer:
    report = Report()
    items = (document.text for document in documents(config, "train", report))
    texts = items if config.rows == "text" else itertools.chain.from_iterable(map(_said, items))
    with shown("reading text for the tokenizer", _size_hint(config, "train"), progress) as advance:
        tokenizer = train_tokenizer(config.tokenizer, texts, seed=TOKENIZER_SEED, progress=advance)
    tokenizer.save(path)
    return tokenizer


def _said(item: str) -> Iterator[str]:
    """The texts of an example, each once."""
    turns = (message for response in Example.loads(item).responses for message in response.conversation)
    said = ((turn.content, turn.thinking, *(" ".join(call) for call in turn.calls)) for turn in turns)
    yield from dict.fromkeys(text for texts in said for text in texts if text)


def _cache(config: DataConfig, kind: str) -> Path:
    root = Path(config.cache_dir).expanduser() if config.cache_dir else cache_root()
    try:
        with clear_when_full(root):
            (root / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {root} cannot be made ({error.strerror}): set data.cache_dir or LLMLAB_CACHE"
        ) from error
    return root / kind


def _store_fingerprint(config: DataConfig, tokenizer: Tokenizer, split: Split) -> str:
    """`on_bad_input` is no part of it: after a bad row stops the work, `skip` goes on from where it was."""
    split_rule = [split, config.held_out, config.held_out_files]
    cut = readers.MAX_DOCUMENT_CHARACTERS
    facts: list[Any] = [store.FORMAT, _source_identity(config), split_rule, cut, tokenizer.fingerprint]
    if config.rows != "text":
        facts += [config.rows, config.train_on, config.system, template_for(tokenizer).fingerprint]
    return _digest("tokens", *facts)


def _source_identity(config: DataConfig) -> list[Any]:
    if config.source == "python":
        return ["python", _python_digest()]
    if config.source == "assistant":
        return ["assistant", config.rows, _python_digest(), sources_assistant.fingerprint()]
    if config.source == "sums":
        return ["sums", config.rows, sums.fingerprint()]
    paths = source_paths(config)
    names = names_of(paths)
    files = [(names[path], file) for path in paths for file in _files_below(path)]
    if sum(file.stat().st_size for _, file in files) > HASH_CONTENT_BYTES:
        stats = [(str(file.absolute()), file.stat()) for _, file in files]
        return [config.source, config.field, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]]
    return [config.source, config.field, [(name, file.name, _file_digest(file)) for name, file in files]]


@functools.cache
def _python_digest() -> str:
    digest = hashlib.sha256()
    for name in sources_python.names():
        digest.update(f"{name}\n".encode() + sources_python.read_bytes(name))
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_below(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _size_hint(config: DataConfig, split: Split) -> int | None:
    """About how many bytes of text `split` has; unknown for what is compressed."""
    total = 0
    for part, _ in config.parts():
        if part.source in ("python", "assistant"):
            total += sum(len(sources_python.read_bytes(name)) for name in sources_python.names())
        elif part.source in ("text", "jsonl") and not any(p.suffix in (".gz", ".zst") for p in source_paths(part)):
            total += sum(path.stat().st_size for path in source_paths(part))
        else:
            return None
    share = {"train": 1 - config.held_out, "held_out": config.held_out, "all": 1.0}[split]
    return int(total * share)


def _why_no_text(config: DataConfig, split: Split) -> str:
    where = f"data.source={config.source!r}" + (f", data.files={config.files!r}" if config.files else "")
    if split != "held_out":
        return f"{where} holds no text to train on: give other files, or lower data.held_out={config.held_out}"
    return (
        f"{where} leaves no text to evaluate on with data.held_out={config.held_out}: raise it, "
        "or name files in data.held_out_files"
    )


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
