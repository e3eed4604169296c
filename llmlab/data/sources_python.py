"""The built-in corpus: sources and language reference of the running interpreter's standard library.

Left out are tests, `encodings` (tables of characters rather than text) and whatever pip installed. About 10 MB; the
bytes differ between Python builds.
"""

import functools
import os
import sysconfig
from pathlib import Path

from llmlab.core.errors import UserError

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


@functools.cache
def names() -> tuple[str, ...]:
    """Every document's name, sorted: paths below the standard library, and `topics/NAME` for the reference."""
    return tuple(sorted([*_files(), *(f"topics/{name}" for name in _topics())]))


def read_bytes(name: str) -> bytes:
    """One document; of a few builds, some are not UTF-8."""
    if name.startswith("topics/"):
        return _topics()[name.removeprefix("topics/")].encode()
    return (_root() / name).read_bytes()


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files() -> list[str]:
    root, found = _root(), []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT]
        paths = [Path(folder, name) for name in files if name.endswith(".py")]
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file() and path.stat().st_size]
    if not found:
        raise UserError(
            f"data.source='python' finds no sources in {root}: this Python comes without them; "
            "set data.source=text and data.files"
        )
    return found


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics
