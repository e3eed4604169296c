"""Where files go, and how they get there whole: the cache folder, atomic writes, a lock between processes."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmlab.core.errors import DiskFull, UserError, is_disk_full

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """The folder for what can be made again: `$LLMLAB_CACHE`, or `~/.cache/llmlab`."""
    return Path(os.environ.get("LLMLAB_CACHE") or "~/.cache/llmlab").expanduser()


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes `data` so that `path` holds either all of it or what it held before, even if the machine stops.

    Raises:
      DiskFull: there is no room; nothing of the attempt is left behind.
    """
    path = Path(path)
    with clear_when_full(path):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes the names in `folder` durable; without it a rename can be lost though the file's bytes are safe."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(folder: Path) -> None:
    """Raises UserError where a new folder cannot have this name: it is there, and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: choose another folder")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if all went well and is gone if not.

    Raises:
      UserError: `target` is there already.
    """
    check_free(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with clear_when_full(target):
        partial.mkdir(parents=True)
        try:
            yield partial
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def clear_when_full(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns "no space left" while `path` is written into a `DiskFull` that says where room is needed."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(
            f"no room left to write {path}: free some space there, then run the same command again"
        ) from error


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], waiting: str) -> Iterator[None]:
    """Holds the lock file `path` against every other process, on every host that shares the file system.

    Logs `waiting` when it has to wait. The lock goes with its process, however that ends, so none is ever stale.
    """
    with clear_when_full(path):
        file = open(path, "ab")  # noqa: SIM115 - held for as long as the lock is
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP):
                raise UserError(
                    f"{path}: this file system has no locks; choose another folder for the cache"
                ) from error
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            log.warning("%s", waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
