"""What the standard library defines, read from its sources without importing them: names, arguments, a line on each.

Packages that are programs, or on their way out, are left out, and so is what begins with an underscore.
"""

import ast
import collections
import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from llmlab.data import sources_python

LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "turtledemo"}
SUMMARY_CHARACTERS = (20, 160)
MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*]+")
OWN_NAME = re.compile(r"[\w.]+ --? ")
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<! vs)[.!?](?= +[A-Z(\"'])")
USELESS = re.compile(
    r"[^A-Za-z]|see\b|same as\b|like\b|ditto\b|internal|private\b|deprecated|obsolete|undocumented|test\b|todo\b|xxx"
    r"|\w+(\.\w+)*\(|.*(\bdeprecated\b|->|>>>|::|==| \| |\bXXX\b)",
    re.IGNORECASE,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Entry(NamedTuple):
    """One module, class or function.

    name: with its module and class, as `json.decoder.JSONDecoder.decode`. arguments: as a call is written, without
    `self`; None where there is no call or none is known. summary: one sentence. document: the name of the source file.
    spans: its definitions there, as (first, last) lines, counted from 0; of a module its docstring. headers: the line
    that opens each definition.
    """

    kind: Literal["module", "class", "function"]
    name: str
    arguments: str | None
    summary: str
    document: str
    spans: tuple[tuple[int, int], ...]
    headers: tuple[str, ...]

    @property
    def parent(self) -> str:
        """What it is defined in; of a top module nothing."""
        return self.name.rpartition(".")[0]

    @property
    def short(self) -> str:
        """Its name there."""
        return self.name.rpartition(".")[2]


@functools.cache
def library() -> tuple[Entry, ...]:
    """Every public entry with a summary of its own, by name. Of those that share a summary, the shortest name."""
    found = [entry for document in sources_python.names() if _public(document) for entry in _entries(document)]
    by_summary: dict[str, Entry] = {}
    for entry in sorted(found, key=lambda entry: (len(entry.name), entry.name)):
        by_summary.setdefault(" ".join(words(entry.summary)), entry)
    return tuple(sorted(by_summary.values(), key=lambda entry: entry.name))


def words(text: str) -> list[str]:
    """What a sentence is compared by: its words, whatever is between them."""
    return [word.lower() for word in re.findall(r"\w+", text)]


def summarise(docstring: str | None) -> str:
    """The first sentence of a docstring as one line, ending in a full stop; empty where that is no use as an answer."""
    paragraph = inspect.cleandoc(docstring or "").strip().partition("\n\n")[0]
    text = OWN_NAME.sub("", MARKUP.sub("", " ".join(paragraph.split())))
    end = SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).rstrip(" .!?")
    short, long = SUMMARY_CHARACTERS
    if USELESS.match(sentence) or not sentence.isascii() or sentence.endswith((":", ",", ";")) or len(words(text)) < 3:
        return ""
    return f"{sentence[0].upper()}{sentence[1:]}." if short <= len(sentence) < long else ""


def _public(document: str) -> bool:
    parts = document.removesuffix("/__init__.py").removesuffix(".py").split("/")
    return document.endswith(".py") and parts[0] not in LEFT_OUT and not any(part.startswith("_") for part in parts)


def _entries(document: str) -> list[Entry]:
    """What one file defines. A name that is defined twice is one entry, with the first summary that it has."""
    try:
        source = sources_python.read_bytes(document).decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about code that is not ours
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # another build's oddity is nothing that the user could mend
    lines = source.split("\n")
    module = document.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    definitions = collections.defaultdict(list)
    for name, node, in_class in _definitions(tree.body, module, False):
        definitions[name].append((node, in_class))
    entries = []
    if summary := summarise(ast.get_docstring(tree, clean=False)):
        span = (tree.body[0].lineno - 1, (tree.body[0].end_lineno or 1) - 1)
        entries.append(Entry("module", module, None, summary, document, (span,), ()))
    for name, defined in definitions.items():
        node, in_class = defined[0]
        if summary := next(filter(None, (summarise(ast.get_docstring(each, clean=False)) for each, _ in defined)), ""):
            spans = tuple((_first_line(each), (each.end_lineno or each.lineno) - 1) for each, _ in defined)
            headers = tuple(lines[each.lineno - 1].strip() for each, _ in defined)
            kind: Literal["class", "function"] = "class" if isinstance(node, ast.ClassDef) else "function"
            entries.append(Entry(kind, name, _arguments(node, in_class), summary, document, spans, headers))
    return entries


def _definitions(
    body: Iterable[ast.stmt], parent: str, in_class: bool
) -> Iterator[tuple[str, Function | ast.ClassDef, bool]]:
    """Public definitions, those under an `if` or a `try` too, each with its name and whether it is a class's."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            handlers = [each for handler in getattr(node, "handlers", ()) for each in handler.body]
            yield from _definitions([*node.body, *handlers, *node.orelse], parent, in_class)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{parent}.{node.name}", node, in_class
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{parent}.{node.name}", True)


def _first_line(node: Function | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def _arguments(node: Function | ast.ClassDef, in_class: bool) -> str | None:
    if isinstance(node, ast.ClassDef):
        makers = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        return _arguments(makers[0], True) if makers else None
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if any(text.endswith(("property", ".setter", ".getter", ".deleter")) for text in decorators):
        return None
    arguments = node.args
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    text = ast.unparse(arguments)
    bound = in_class and "staticmethod" not in decorators and (arguments.posonlyargs or arguments.args)
    return re.sub(r"^\w+(, )?(/(, |$))?", "", text) if bound else text
