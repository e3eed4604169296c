"""What is read from the sources of a library: names, arguments, one sentence on each."""

import pytest

from llmlab.data import library, sources_python
from llmlab.data.library import Entry, summarise
from tests.small_library import AREAS, small_library, word

__all__ = ["small_library"]

SOURCE = '''#!/usr/bin/env python
"""shapes -- Drawing of plain shapes. More."""
if True:
    def area(self: int, *sizes: float, scale: float = 1.5, **rest) -> float:
        """Return the area of a shape.

        Long story.
        """
else:
    def area(self):
        """Return nothing at all, ever."""

try:
    pass
except ImportError:
    async def later(a, /, b): "Draw the shape some time later."

def _private():
    """Return what nobody should ask for."""

def bare(): pass

class Shape:
    """A shape with corners and
    an inside."""
    def __init__(self, corners, /, name="x"): pass

    @property
    def inside(self):
        """The part that is not outside."""

    @staticmethod
    @cached
    def parse(text="(a, b)"):
        """Parse a shape from its text."""

    class Corner:
        """Where two of the edges meet."""
        def move(self, *, by: int):
            """Move this corner by a distance."""

class _Hidden:
    def seen(self):
        """Return what nobody sees here."""
'''


@pytest.fixture
def entries(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/__init__.py").write_text(SOURCE)
    monkeypatch.setattr(sources_python, "_root", lambda: tmp_path)
    return {entry.name: entry for entry in library._entries("shapes/__init__.py")}


def test_names_arguments_and_summaries_of_a_file(entries):
    assert {name: (entry.kind, entry.arguments, entry.summary) for name, entry in entries.items()} == {
        "shapes": ("module", None, "Drawing of plain shapes."),
        "shapes.area": ("function", "self, *sizes, scale=1.5, **rest", "Return the area of a shape."),
        "shapes.later": ("function", "a, /, b", "Draw the shape some time later."),
        "shapes.Shape": ("class", "corners, /, name='x'", "A shape with corners and an inside."),
        "shapes.Shape.inside": ("function", None, "The part that is not outside."),
        "shapes.Shape.parse": ("function", "text='(a, b)'", "Parse a shape from its text."),
        "shapes.Shape.Corner": ("class", None, "Where two of the edges meet."),
        "shapes.Shape.Corner.move": ("function", "*, by", "Move this corner by a distance."),
    }
    assert (entries["shapes.Shape.parse"].parent, entries["shapes.Shape.parse"].short) == ("shapes.Shape", "parse")


def test_where_things_are_defined(entries):
    lines = SOURCE.split("\n")
    area, parse = entries["shapes.area"], entries["shapes.Shape.parse"]
    assert [lines[first].strip()[:8] for first, _ in area.spans] == ["def area", "def area"]
    assert [lines[last].strip()[:6] for _, last in area.spans] == ['"""', '"""Ret']
    assert area.headers[1] == "def area(self):"
    assert [line.strip() for line in lines[parse.spans[0][0] : parse.spans[0][1] + 1]] == [
        "@staticmethod",
        "@cached",
        parse.headers[0],
        '"""Parse a shape from its text."""',
    ]
    assert entries["shapes"].spans == ((1, 1),)


@pytest.mark.parametrize(
    "docstring, summary",
    [
        ("Return a new copy of it.", "Return a new copy of it."),
        ("\n    return a new\n    copy of :class:`it`!  Then more.\n\n    And.", "Return a new copy of it."),
        ("Return an ``int``, e.g. 3, or i.e. None. More.", "Return an int, e.g. 3, or i.e. None."),
        ("Return version 3.11 of it", "Return version 3.11 of it."),
        ("shlex - A lexical analyzer of shells", "A lexical analyzer of shells."),
        ("Too short.", ""),
        ("Onlyasingleveryverylongword.", ""),
        ("x" * 200 + " and more words.", ""),
        ("See the documentation for help.", ""),
        ("Deprecated, use another function.", ""),
        ("An alias that is deprecated by now.", ""),
        ("join(a, b) joins a and b to c.", ""),
        ("fetch the file -> its bytes and size", ""),
        ("Options that can be given are:", ""),
        (">>> print('what it does')", ""),
        ("Return the naïve answer to it.", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_a_docstring_becomes_one_sentence_or_nothing(docstring, summary):
    assert summarise(docstring) == summary


def test_a_summary_has_one_entry_and_private_files_none(small_library):
    (small_library / "_secret.py").write_text('"""What nobody should know of."""')
    (small_library / "lib2to3").mkdir()
    (small_library / "lib2to3/fixer.py").write_text('"""What a program is made of."""')
    (small_library / "broken.py").write_text('"""What cannot be parsed at all."""\n(')
    (small_library / "twin.py").write_text(
        f'def gather():\n    """Gather EVERY {word(3)} that lies below the first!"""'
    )
    found = {entry.name: entry for entry in library.library()}
    assert [name for name in found if "secret" in name or "fixer" in name or "broken" in name] == []
    assert "twin.gather" in found  # a shorter name than area3.gather_3
    assert "area3.gather_3" not in found
    assert isinstance(found["area4.Area4.measure_4"], Entry)
    assert len(found) == 7 * AREAS + 1  # seven an area, of one of them the twin instead, and one for all the notes
    assert list(found) == sorted(found)


@pytest.mark.slow
def test_the_real_library_has_thousands_of_entries():
    library.library.cache_clear()
    found = {entry.name: entry for entry in library.library()}
    assert len(found) > 2000
    assert found["json.dumps"].summary == "Serialize obj to a JSON formatted str."
    assert found["json.dump"].arguments.startswith("obj, fp, *, skipkeys=False")
    assert all(20 < len(entry.summary) <= 160 and entry.summary.endswith(".") for entry in found.values())
    assert len({entry.summary.lower() for entry in found.values()}) == len(found)
