"""Token files on disk: written once with checksums, read at random by document.

A store is a folder: `tokens.bin` (uint16 or uint32, little-endian, every document after the other), `documents.bin`
(int64 pairs: where the next document starts, and the bytes of text of this one; a zeroth row of zeros), the tokenizer,
and `manifest.json`, written last. Only a folder with a manifest that its files agree with is a store.

Where documents are responses to a prompt there are three files more. `marks.bin` has a byte for each token: 0, or 1
where the model is to say it, or from `STEP` to `LAST_MARK` where a step of the answer ends, from wrong to right.
`values.bin` has a float32 for each document, what its row says of it, and `groups.bin` an int64, the example that it
belongs to.

Sizes are checked at every open. Hashes are checked too, but for files above `HASH_ALWAYS_BYTES` only if the file
changed since they were last found right.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmlab.core.errors import UserError
from llmlab.core.paths import clear_when_full, sync_folder, write_atomic

FORMAT = 2
COUNTS = ("items", "documents", "tokens", "text_bytes")
HASH_ALWAYS_BYTES = 1 << 26
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
TOKENS = "tokens.bin"
DOCUMENTS = "documents.bin"
MARKS, VALUES, GROUPS = "marks.bin", "values.bin", "groups.bin"
OF_TEXTS, OF_RESPONSES = (TOKENS, DOCUMENTS), (TOKENS, DOCUMENTS, MARKS, VALUES, GROUPS)
DTYPES = {DOCUMENTS: "<i8", MARKS: "u1", VALUES: "<f4", GROUPS: "<i8"}
STEP, LAST_MARK = 2, 255
TOKENIZER = "tokenizer.model"


NONE = np.empty(0, np.int64)


class Encoded(NamedTuple):
    """Documents as tokens: all joined, the number of tokens of each, and the bytes of text of each.

    marks: of each token. values: of each document. documents: how many each example has. The three are empty where the
    documents are texts.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: np.ndarray
    marks: np.ndarray = NONE
    values: np.ndarray = NONE
    documents: np.ndarray = NONE


class Judged(NamedTuple):
    """What a store of responses holds beside their tokens: see above."""

    marks: np.ndarray
    values: np.ndarray
    groups: np.ndarray


class TornError(UserError):
    """What lies in a folder is not what its manifest promises."""


class TokenStore:
    """A split of a source as tokens. `manifest` holds the counts; the arrays are memory-mapped.

    `judged` is None where the documents are texts.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        """Use `TokenStore.open`, which checks the files."""
        self.path = path
        self.manifest = manifest
        self.tokens = mapped(path / TOKENS, np.dtype(manifest["dtype"]))
        rows = mapped(path / DOCUMENTS, np.dtype(DTYPES[DOCUMENTS])).reshape(-1, 2)
        self.offsets = rows[:, 0]
        self.text_bytes = rows[1:, 1]
        self.judged: Judged | None = None
        if MARKS in manifest["files"]:
            self.judged = Judged(*(mapped(path / name, np.dtype(DTYPES[name])) for name in (MARKS, VALUES, GROUPS)))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "TokenStore":
        """The store in folder `path`.

        Raises:
          TornError: there is none, or it is damaged.
        """
        return cls(Path(path), open_sealed(Path(path), MANIFEST))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, from its BOS to its EOS."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document, BOS and EOS included."""
        return np.diff(self.offsets)


class StoreWriter:
    """Appends documents to a store, and goes on from the last commit when the process before it was stopped.

    `.items` counts the texts or examples already in the folder: the caller passes over as many.
    """

    def __init__(self, path: Path, dtype: np.dtype, *, judged: bool = False):
        self.path, self._dtype, self._names = path, dtype, OF_RESPONSES if judged else OF_TEXTS
        path.mkdir(parents=True, exist_ok=True)
        state, self._hashes = self._committed()
        self.items, self.documents, self.tokens, self.text_bytes = (state[key] for key in COUNTS)
        self._files = {name: open(path / name, "ab", buffering=0) for name in self._hashes}  # noqa: SIM115
        for name, file in self._files.items():
            file.truncate(state["files"][name]["bytes"])
        if not state["files"][DOCUMENTS]["bytes"]:
            self._append(DOCUMENTS, np.zeros(2))

    def append(self, encoded: Encoded) -> None:
        """Adds documents."""
        tokens, lengths, text_bytes, marks, values, documents = encoded
        rows = np.stack([self.tokens + np.cumsum(lengths), text_bytes], axis=1)
        self._append(TOKENS, tokens)
        self._append(DOCUMENTS, rows)
        if MARKS in self._names:
            self._append(MARKS, marks)
            self._append(VALUES, values)
            self._append(GROUPS, np.repeat(np.arange(len(documents)) + self.items, documents))
            self.items += len(documents)
        else:
            self.items += len(lengths)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.text_bytes += int(text_bytes.sum())

    def commit(self) -> None:
        """What was appended until now is kept if the process is stopped."""
        with clear_when_full(self.path):
            for file in self._files.values():
                os.fsync(file.fileno())
        write_atomic(self.path / PROGRESS, _json(self._state()))

    def finish(self, **facts: Any) -> None:
        """Makes the folder a store, with the tokenizer saved in it; `facts` join the counts in its manifest."""
        self.commit()
        for name in self._files:
            _mark_verified(self.path / name)
        state = self._state()
        model = self.path / TOKENIZER
        state["files"][TOKENIZER] = {"bytes": model.stat().st_size, "sha256": _hash(model).hexdigest()}
        write_atomic(self.path / MANIFEST, _json({**state, **facts}))
        (self.path / PROGRESS).unlink()

    def close(self) -> None:
        """Closes the files; what was not committed is lost."""
        for file in self._files.values():
            file.close()

    def _append(self, name: str, array: np.ndarray) -> None:
        data = memoryview(array.astype(DTYPES.get(name, self._dtype)).tobytes())
        self._hashes[name].update(data)
        with clear_when_full(self.path):
            while data:
                data = data[self._files[name].write(data) :]

    def _state(self) -> dict[str, Any]:
        files = {
            name: {"bytes": os.fstat(file.fileno()).st_size, "sha256": self._hashes[name].hexdigest()}
            for name, file in self._files.items()
        }
        counts = {key: getattr(self, key) for key in COUNTS}
        return {"format": FORMAT, "dtype": self._dtype.str, **counts, "files": files}

    def _committed(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What an earlier process committed, with its hashes, if the files still hold it; else an empty state."""
        files = {name: {"bytes": 0} for name in self._names}
        empty = {**dict.fromkeys(COUNTS, 0), "files": files}
        try:
            state = json.loads((self.path / PROGRESS).read_bytes())
            hashes = {name: _hash(self.path / name, state["files"][name]["bytes"]) for name in files}
            whole = all(hashes[name].hexdigest() == state["files"][name]["sha256"] for name in files)
            if whole and (state["format"], state["dtype"]) == (FORMAT, self._dtype.str):
                return {key: state[key] for key in empty}, hashes
        except (OSError, ValueError, KeyError, TypeError):
            pass  # torn, or not ours
        return empty, {name: hashlib.sha256() for name in files}


def seal(folder: Path, manifest: str, arrays: dict[str, np.ndarray], **facts: Any) -> None:
    """Writes arrays as files of `folder`, then the manifest that makes them count."""
    files = {}
    for name, array in arrays.items():
        data = array.tobytes()
        write_atomic(folder / name, data)
        _mark_verified(folder / name)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_atomic(folder / manifest, _json({"format": FORMAT, **facts, "files": files}))


def open_sealed(folder: Path, manifest: str) -> dict[str, Any]:
    """The manifest, once every file it names was found as it says.

    Raises:
      TornError: a file is missing, of another size or of another hash, or there is no whole manifest.
    """
    path = folder / manifest
    try:
        facts = json.loads(path.read_bytes())
        found, files = facts["format"], facts["files"]
    except FileNotFoundError as error:
        raise TornError(f"{folder} holds no {manifest}: it was never finished; make it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TornError(f"{path} is torn: delete {folder} and make it again") from error
    if found != FORMAT:
        raise TornError(f"{path} has format {found}, not {FORMAT}: delete {folder} and make it again")
    for name, expected in files.items():
        _verify(folder / name, expected["bytes"], expected["sha256"])
    return facts


def remove(folder: Path) -> None:
    """Deletes a store, its manifest first, so that one deleted half-way is no store."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        sync_folder(folder)
        shutil.rmtree(folder)


def _verify(path: Path, size: int, sha256: str) -> None:
    found = path.stat().st_size if path.exists() else -1
    if found != size:
        what = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
        raise TornError(f"{path} {what}: delete {path.parent} and make it again")
    if size > HASH_ALWAYS_BYTES and _marker(path).exists() and _marker(path).read_text() == _version(path):
        return
    if _hash(path).hexdigest() != sha256:
        raise TornError(f"{path} does not have the contents that were written: delete {path.parent} and make it again")
    _mark_verified(path)


def _mark_verified(path: Path) -> None:
    if path.stat().st_size > HASH_ALWAYS_BYTES and os.access(path.parent, os.W_OK):
        write_atomic(_marker(path), _version(path).encode())


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _version(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _hash(path: Path, size: int | None = None) -> Any:
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
    return digest


def mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A read-only view; a plain array, since slicing numpy's memmap class costs ten times as much."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
