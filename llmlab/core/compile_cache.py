"""The folder in which jax keeps what it compiled, looked over so that a torn entry is never loaded.

jax writes entries in place, so a kill or a full disk can tear one. It then warns and compiles again at every start,
for it never replaces an entry; and garbled code that still parses would run. So a ledger beside them says what each
should hold; what does not agree is removed, and compiled and kept anew.
"""

import contextlib
import hashlib
import json
import logging
import os
import zlib
from pathlib import Path

import zstandard

from llmlab.core.errors import DiskFull
from llmlab.core.paths import write_atomic

log = logging.getLogger(__name__)

LEDGER = "ledger.json"
_ENTRIES = "*-cache"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def look_over(folder: str | os.PathLike[str]) -> None:
    """Removes torn entries from the folder and notes new ones: call before the first compilation and after the last.

    An entry whose size and date are as noted is not read again.
    """
    folder = Path(folder)
    known, found = _noted(folder), {}
    for path in folder.glob(_ENTRIES):
        try:
            stat = path.stat()
            version = [stat.st_size, stat.st_mtime_ns]
            entry = known.get(path.name)
            if entry is not None and entry[:2] == version:
                found[path.name] = entry
                continue
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if digest == entry[2] if entry is not None else _unpacks(content):
                found[path.name] = [*version, digest]
            else:
                path.unlink()
                log.warning("removed a torn entry of the compilation cache: %s", path)
        except FileNotFoundError:
            continue  # Another process removed it first.
    if found != known:
        _note(folder, found)


def _noted(folder: Path) -> dict[str, list]:
    """Name of an entry -> [bytes, date, sha256]."""
    try:
        known = json.loads((folder / LEDGER).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _note(folder: Path, found: dict[str, list]) -> None:
    with contextlib.suppress(DiskFull, OSError):  # It saves time; a run does not stop for it.
        write_atomic(folder / LEDGER, json.dumps(found).encode())


def _unpacks(content: bytes) -> bool:
    """Whether `content` is compressed data that was not cut short: all that can be said of an entry not yet noted."""
    try:
        if content.startswith(_ZSTD_MAGIC):
            zstandard.ZstdDecompressor().decompress(content)
        else:
            zlib.decompress(content)
    except (zstandard.ZstdError, zlib.error):
        return False
    return True
