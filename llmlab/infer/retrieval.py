"""Retrieval: an index over the user's files, and what is found there laid before a question, with its sources.

Passages are found by their words (BM25), by vectors of a model of ours where the index has them, or by both, fused by
rank. An index is a folder of JSON and plain arrays, sealed by a manifest; it knows which files it was made from.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llmlab.core.errors import UserError
from llmlab.core.paths import new_folder, write_atomic
from llmlab.data.chat import Message
from llmlab.infer.embed import Embedder
from llmlab.infer.passages import SUFFIXES, Passage, passages_of
from llmlab.workdir import manifest

By = Literal["words", "vectors", "both"]
_INDEX, _PASSAGES, _VECTORS = "index.json", "passages.jsonl", "vectors.npy"
_FORMAT = "llmlab index 1"
_RANK = 60  # of reciprocal rank fusion (Cormack et al., SIGIR 2009)
_CANDIDATES = 100
_HEADING = 3  # times that a heading counts where it begins
_NAMES = 32  # of a question that may be looked for whole
_NAME = re.compile(r"\w+(?:\.\w+)*")
_PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """files: paths, patterns such as docs/**/*.md, or folders. limit: characters of a passage at most. field: of JSON
    lines, what holds the text.
    """

    files: tuple[str, ...] = ()
    limit: int = 1200
    field: str = "text"

    def __post_init__(self) -> None:
        if self.limit < 100:
            raise UserError(f"--limit={self.limit} should be at least 100 characters")


class Found(NamedTuple):
    """A passage, and how well it answers: higher is better, by a scale of its own for words, vectors and both."""

    score: float
    passage: Passage


class Index:
    """Made by `build` or `open_index`. embedder: of the model that its vectors are of; without, words alone count."""

    def __init__(
        self,
        facts: dict[str, Any],
        passages: Sequence[Passage],
        words: Any,
        vectors_ND: np.ndarray | None,
        embedder: Embedder | None = None,
    ):
        self.facts, self.passages, self._words, self._vectors_ND = facts, passages, words, vectors_ND
        self._embedder = embedder

    @property
    def has_vectors(self) -> bool:
        """Whether passages can be found by what they mean, given the model."""
        return self._vectors_ND is not None

    def search(self, query: str, k: int = 5, by: By | None = None) -> list[Found]:
        """The k best passages, the best first. by: None for both where there are vectors and an embedder.

        Raises:
          UserError: `by` asks for vectors, which are not there.
        """
        has_vectors = self._vectors_ND is not None and self._embedder is not None
        by = by or ("both" if has_vectors else "words")
        if by != "words" and not has_vectors:
            raise UserError("this index has no vectors, or was opened without its model: search by words")
        rankings = []
        if by != "vectors":
            known = self._words.get_tokens_ids(_asked(query))
            scores_N = self._words.get_scores_from_ids(known) if known else np.zeros(len(self.passages), np.float32)
            rankings.append(_best(scores_N, _CANDIDATES, above=0.0))
        if by != "words":
            assert self._vectors_ND is not None
            assert self._embedder is not None
            rankings.append(_best(self._vectors_ND @ self._embedder([query])[0], _CANDIDATES))
        if by != "both":
            return [Found(score, self.passages[place]) for place, score in rankings[0][:k]]
        fused: dict[int, float] = collections.defaultdict(float)
        for ranking in rankings:
            for rank, (place, _) in enumerate(ranking, start=1):
                fused[place] += 1 / (_RANK + rank)
        best = sorted(fused.items(), key=lambda each: (-each[1], each[0]))[:k]
        return [Found(score, self.passages[place]) for place, score in best]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index, in the place of an older one that is there, which stays until this one is whole.

        Raises:
          UserError: something else is there.
        """
        target = Path(folder).expanduser().absolute()
        replaces = (target / _INDEX).exists() and (target / manifest.NAME).exists()
        made, old = (target.with_name(f".{target.name}.{what}") for what in ("new", "old"))
        for left in (made, old) if replaces else ():
            shutil.rmtree(left, ignore_errors=True)
        with new_folder(made if replaces else target) as partial:
            rows = [json.dumps(passage, ensure_ascii=False) + "\n" for passage in self.passages]
            write_atomic(partial / _PASSAGES, "".join(rows).encode(errors="surrogatepass"))
            self._words.save(partial / "words", show_progress=False)
            if self._vectors_ND is not None:
                np.save(partial / _VECTORS, self._vectors_ND, allow_pickle=False)
            write_atomic(partial / _INDEX, json.dumps({"format": _FORMAT, **self.facts}, indent=1).encode())
            manifest.write(partial, step=0, metrics={}, arrays={})
        if replaces:
            os.replace(target, old)
            os.replace(made, target)
            shutil.rmtree(old)

    def changed(self) -> list[str]:
        """The files that are not what they were when the index was made: changed, gone or new."""
        root, known = Path(self.facts["root"]), self.facts["files"]
        try:
            now = {_name(path, root): path for path in _paths(self.facts["patterns"])}
        except UserError:
            now = {}
        return sorted(
            name for name in {*now, *known} if name not in now or name not in known or _seal(now[name]) != known[name]
        )


def build(
    config: IndexConfig,
    embedder: Embedder | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Index:
    """An index of all files; with vectors where there is an embedder. `progress` gets how many of these are made.

    Raises:
      UserError: bm25s is not installed, there are no files, or one cannot be read.
    """
    library = _library()
    patterns = [str(Path(pattern).expanduser().absolute()) for pattern in config.files]
    paths = _paths(patterns)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    passages = [
        passage
        for path in paths
        for passage in passages_of(path, _name(path, root), limit=config.limit, field=config.field)
    ]
    if not passages:
        raise UserError(f"--files={','.join(config.files)} hold no text: name others")
    words = library.BM25(method="lucene", backend="numpy")
    words.index(_words_of(passages), show_progress=False)
    vectors_ND = embedder([_spoken(passage) for passage in passages], progress) if embedder else None
    facts = {
        "root": str(root),
        "patterns": patterns,
        "files": {_name(path, root): _seal(path) for path in paths},
        "settings": dataclasses.asdict(config),
        "probe": _probe(embedder),
    }
    return Index(facts, passages, words, vectors_ND, embedder)


def open_index(folder: str | os.PathLike[str], embedder: Embedder | None = None) -> Index:
    """The index that `save` wrote; that its files have changed since is logged. Its vectors count where the embedder
    gives the same as that of `build`.

    Raises:
      UserError: there is none, or it is torn.
    """
    path = Path(folder).expanduser().absolute()
    if not (path / _INDEX).exists():
        raise UserError(f"{folder} is no index: make one with `llmlab index --files=… --out={folder}`")
    try:
        manifest.verify(path)
        facts = json.loads((path / _INDEX).read_bytes())
    except (manifest.Torn, ValueError) as error:
        raise UserError(f"{error}: make the index again") from None
    if facts.get("format") != _FORMAT:
        raise UserError(f"{folder} was written by another version of llmlab: make the index again")
    lines = (path / _PASSAGES).read_bytes().decode(errors="surrogatepass").split("\n")[:-1]
    passages = [Passage(*json.loads(line)) for line in lines]
    words = _library().BM25.load(path / "words", show_progress=False)
    vectors_ND = np.load(path / _VECTORS, allow_pickle=False) if (path / _VECTORS).exists() else None
    if embedder is not None and not (facts["probe"] and np.allclose(facts["probe"], _probe(embedder), atol=1e-2)):
        log.warning("%s has no vectors of this model: it is searched by words alone", folder)
        embedder = None
    index = Index(facts, passages, words, vectors_ND, embedder)
    if changed := index.changed():
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        log.warning("%s is stale, as %s%s changed since: make it again", folder, ", ".join(changed[:3]), more)
    return index


def search_tool(index: Index, k: int = 5) -> Callable[[str], str]:
    """A tool: a question, to the passages that may answer it, each under the name to give as its source."""

    def search(question: str) -> str:
        return cited(index.search(question, k)) or "nothing found"

    return search


def cited(found: Iterable[Found]) -> str:
    """Passages as a model reads them: [1] the source, and the text below."""
    return "\n\n".join(
        f"[{number}] {each.passage.source}\n{each.passage.text}" for number, each in enumerate(found, start=1)
    )


def asked_with(found: Sequence[Found], question: str) -> Message:
    """The user's turn: the passages, and the question below them. What the passages say is no instruction."""
    if not found:
        return Message("user", question)
    return Message(
        "user",
        f"Passages from my files:\n\n{cited(found)}\n\nAnswer from these passages, and name the ones you use, as [1]."
        f"\n\n{question}",
    )


def sources(answer: str, found: Sequence[Found]) -> list[str]:
    """The sources that an answer names, as [1] or in full; where it names none, all that it was given."""
    numbers = {int(number) for number in re.findall(r"\[(\d{1,4})\]", answer)}
    named = [
        each.passage.source
        for number, each in enumerate(found, start=1)
        if number in numbers or each.passage.source in answer
    ]
    return named or [each.passage.source for each in found]


def terms(text: str) -> list[str]:
    """What a text is found by: its words in lower case, dotted and underscored names also whole and by their parts."""
    return [term for name in _NAME.findall(text) for term in _terms_of(name)]


@functools.lru_cache(2**16)
def _terms_of(name: str) -> tuple[str, ...]:
    parts = name.split(".")
    found = [".".join(parts[:end]).lower() for end in (len(parts), len(parts) - 1) if end > 1]
    for part in parts:
        pieces = _PIECE.findall(part)
        found += [part.lower(), *(piece.lower() for piece in pieces if len(pieces) > 1)]
    return tuple(found)


def _asked(query: str) -> list[str]:
    """The terms of a question, and what it may be the whole name of: each name in it, and each in each other."""
    names = list(dict.fromkeys(name.lower() for name in _NAME.findall(query)[:_NAMES]))
    whole = [*names, *(f"{parent}.{name}" for parent in names for name in names if parent != name)]
    return [*terms(query), *(f"={name}" for name in whole)]


def _words_of(passages: Sequence[Passage]) -> list[list[str]]:
    """The terms of each passage: where one begins what its heading names, that counts more."""
    seen: set[tuple[str, str]] = set()
    found = []
    for passage in passages:
        begins = (passage.file, passage.heading) not in seen
        seen.add((passage.file, passage.heading))
        name = f"={passage.heading.rpartition(' ')[2].lower()}"
        about = terms(passage.heading) + terms(Path(passage.file).stem)
        found.append([*(_HEADING * [name, *about] if begins else about), *terms(passage.text)])
    return found


def _spoken(passage: Passage) -> str:
    return f"{passage.heading}\n{passage.text}" if passage.heading else passage.text


def _best(scores_N: np.ndarray, count: int, above: float = -np.inf) -> list[tuple[int, float]]:
    """(place, score) of the highest, in falling order, the earliest first among equals."""
    order = np.argsort(-scores_N, kind="stable")[:count]
    return [(int(place), float(scores_N[place])) for place in order if scores_N[place] > above]


def _probe(embedder: Embedder | None) -> list[float]:
    """What tells one model's vectors from another's."""
    return embedder(["Which model is this?"])[0].tolist() if embedder else []


def _paths(patterns: Iterable[str]) -> list[Path]:
    paths: set[Path] = set()
    for pattern in patterns:
        inside = [os.path.join(pattern, "**", f"*{suffix}") for suffix in SUFFIXES] if os.path.isdir(pattern) else []
        for each in inside or [pattern]:
            paths |= {Path(name) for name in glob.glob(each, recursive=True) if os.path.isfile(name)}
    if not paths:
        raise UserError(f"--files={','.join(patterns)} name no file: check the pattern, such as 'docs/**/*.md'")
    return sorted(paths)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _seal(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _library() -> Any:
    try:
        import bm25s
    except ImportError:
        raise UserError("retrieval needs bm25s: pip install 'llmlab[serve]'") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks for every detail, wherever our messages go
    return bm25s
