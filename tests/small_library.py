"""A standard library of a hundred small files, in the place of the real one, which takes seconds to read."""

import functools
import hashlib
from pathlib import Path

import pytest

from llmlab.data import assistant_preferences, library, sources_assistant, sources_python, tools

AREAS = 100
CACHES = (sources_python.names, library.library, sources_assistant._corpus, tools._index, tools._by_initial)
FILE = '''"""Tools of area {i}, word {w}."""
raise RuntimeError("this file was imported")

@functools.cache
def gather_{i}(first, *, depth={i}):
    """Gather every {w} that lies below the first.

    Secret of gather {i}.
    """
    return first + {i}

def spread_{i}(rows):
    """Spread the rows of {w}
    over all of the columns. And more.
    """
    return gather_{i}(rows)  # Spread the rows of {w}

def echo_{i}():
    """First, spread the rows of {w} over all of the columns."""

class Area{i}(Base):
    """An area that holds {w} and nothing else."""

    def __init__(self, path, mode="r"):
        """Undocumented so far and private too."""

    def close(self):
        """Close the area of {w} for ever."""

    def measure_{i}(self, unit):
        """Measure how wide {w} is in a unit."""
'''
NOTES = '''"""Notes that quote whatever they like."""
# gather
#  EVERY {w}, that lies
# below the first: quoted.
LEFT_{i} = {i}
'''


def install(folder: Path, patch) -> None:
    """Writes the library, and makes `sources_python` find it; `patch` sets an attribute, as `monkeypatch.setattr`."""
    for i in range(AREAS):
        (folder / f"area{i}.py").write_text(FILE.format(i=i, w=word(i)))
        (folder / f"notes{i}.py").write_text(NOTES.format(i=i, w=word(i)))
    patch(sources_python, "_root", lambda: folder)
    patch(assistant_preferences, "TRAINING_EXAMPLES", 300)
    patch(assistant_preferences, "HELD_OUT_EXAMPLES", 100)
    patch(sources_python, "_topics", lambda: {"areas": f"Of areas.\n\nMeasure how wide {word(7)} is in a unit.\n"})
    for cache in CACHES:
        cache.cache_clear()


@functools.cache
def word(i: int) -> str:
    """A word of letters that no other number has."""
    return "".join(chr(ord("a") + int(digit, 16)) for digit in hashlib.sha256(str(i).encode()).hexdigest()[:8])


@pytest.fixture
def small_library(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch.setattr)
    yield tmp_path
    monkeypatch.undo()
    for cache in CACHES:
        cache.cache_clear()
