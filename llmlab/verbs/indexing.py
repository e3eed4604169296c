"""The verb that makes an index of files: index."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags as f
from absl.flags import FlagValues

from llmlab.core.flags import define_workdir, none_left, required
from llmlab.verbs.common import Verb, start_jax

if TYPE_CHECKING:
    from llmlab.infer.retrieval import Found


def finder(opened: Any, folder: str, passages: int) -> "Callable[[str], list[Found]]":
    """What finds so many passages of the index in `folder`."""
    from llmlab.infer.embed import Embedder
    from llmlab.infer.retrieval import open_index

    index = open_index(folder)
    if index.has_vectors:
        index = open_index(folder, Embedder(opened.model, opened.params, opened.tokenizer))
    return lambda question: index.search(question, passages)


def _define_index(flags: FlagValues, argv: list[str]) -> None:
    f.DEFINE_list("files", [], "The files, as paths, patterns or folders: .txt .md .rst .py .jsonl.", flag_values=flags)
    f.DEFINE_string("out", "", "The folder to write the index to.", flag_values=flags)
    f.DEFINE_integer("limit", 1200, "Characters of a passage, at most.", flag_values=flags)
    f.DEFINE_string("field", "text", "Of JSON lines, what holds the text.", flag_values=flags)
    define_workdir(flags, "A run whose model also finds passages by what they mean; without, by their words.")


def _index(flags: FlagValues, rest: list[str]) -> None:
    none_left(rest)
    from llmlab.infer.retrieval import IndexConfig, build

    out = required(flags, "out")
    required(flags, "files")
    embedder = None
    if flags.workdir:
        start_jax()
        import llmlab
        from llmlab.infer.embed import Embedder

        opened = llmlab.open(flags.workdir)
        embedder = Embedder(opened.model, opened.params, opened.tokenizer)
    index = build(IndexConfig(tuple(flags.files), flags.limit, flags.field), embedder)
    index.save(out)
    print(f"{len(index.passages):,} passages of {len(index.facts['files']):,} files in {out}")


VERBS = {
    "index": Verb(
        "make files searchable, for answers that name their sources",
        "--files=PATTERN,… --out=DIR [--workdir=DIR]",
        "Example:  llmlab index --files='docs/**/*.md' --out=index\n"
        "          llmlab chat --workdir=runs/sft --index=index",
        _define_index,
        _index,
    ),
}
