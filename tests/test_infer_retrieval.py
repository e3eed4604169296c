"""Retrieval: passages of files, found by words, by vectors and by both, from an index that knows when it is stale."""

import json

import jax
import numpy as np
import pytest

from llmlab.core.errors import UserError
from llmlab.data import library, sources_python
from llmlab.data.assistant_chat import question
from llmlab.data.split import place
from llmlab.infer.embed import Embedder
from llmlab.infer.passages import Passage, passages_of
from llmlab.infer.retrieval import IndexConfig, asked_with, build, open_index, search_tool, sources, terms
from llmlab.model.transformer import make_model
from llmlab.model.types import inputs
from tests.helpers import random_params, tiny_llama
from tests.scripted import ByteTokenizer
from tests.small_library import small_library as small_library

GUIDE = """# Guide

How to begin.

## Installing

Use the wheel.
It is small.

```
# no title
```

## Running

Run `start --now`.
"""
CODE = '''"""Counts things."""

import os

class Jar:
    """Holds marbles."""

    def shake(self):
        """Mixes the marbles."""
        return 1


def pour(jar):
    """Empties a jar."""
'''


def embedder(pooling="mean", seed=7):
    model = make_model(tiny_llama(vocab_size=300, max_positions=128))
    return Embedder(model, random_params(model, seed=seed), ByteTokenizer(), pooling=pooling, rows=4)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "guide.md").write_text(GUIDE)
    (folder / "jars.py").write_text(CODE)
    (folder / "rows.jsonl").write_text('{"text": "Apples are red."}\n{"text": "Plums are blue."}\n')
    (folder / "notes.rst").write_text("Notes\n=====\n\nFirst.\n\nSecond part\n-----------\n\nPears are green.\n")
    return folder


def test_passages_are_paragraphs_with_their_lines_and_headings(files):
    found = {name: list(passages_of(files / name, name, limit=200)) for name in ("guide.md", "jars.py", "rows.jsonl")}
    assert [each[1:4] for each in found["guide.md"]] == [
        (1, 3, "Guide"),
        (5, 12, "Guide / Installing"),
        (14, 16, "Guide / Running"),
    ]
    assert [each[1:4] for each in found["jars.py"]] == [
        (1, 3, "module jars"),
        (5, 6, "class jars.Jar"),
        (8, 10, "function jars.Jar.shake"),
        (13, 14, "function jars.pour"),
    ]
    assert found["rows.jsonl"][1] == Passage("rows.jsonl", 2, 2, "", "Plums are blue.")
    assert [each.heading for each in passages_of(files / "notes.rst", "notes.rst", limit=200)] == [
        "Notes",
        "Second part",
    ]


@pytest.mark.parametrize("limit", [100, 137, 1000])
def test_passages_hold_all_text_within_their_limit(limit, tmp_path):
    rng = np.random.default_rng(limit)
    lines = ["x" * int(n) for n in rng.choice([0, 0, 5, 30, 90, 300], 400)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    passages = list(passages_of(path, "a.txt", limit=limit))
    assert max(len(each.text) for each in passages) <= limit
    assert sum(each.text.count("x") for each in passages) == sum(map(len, lines))
    for each in passages:
        if each.first < each.last:
            whole = "\n".join(lines[each.first - 1 : each.last])
            assert each.text in whole


def test_words_find_a_passage_by_its_name_and_by_what_it_says(files):
    index = build(IndexConfig((str(files),)))
    assert index.search("What does jars.Jar.shake do?", 1)[0].passage.heading == "function jars.Jar.shake"
    assert index.search("what is shake in jars.Jar", 1)[0].passage.heading == "function jars.Jar.shake"
    assert index.search("are plums blue", 1)[0].passage.source == "rows.jsonl:2-2"
    assert index.search("how is installing done", 1)[0].passage.heading == "Guide / Installing"
    assert index.search("zebra") == index.search("") == index.search("?!") == []
    scores = [each.score for each in index.search("marbles jar", 9)]
    assert scores == sorted(scores, reverse=True)
    assert terms("json.decoder.JSONDecoder.raw_decode2")[:2] == [
        "json.decoder.jsondecoder.raw_decode2",
        "json.decoder.jsondecoder",
    ]
    assert {"json", "decoder", "jsondecoder", "raw", "decode", "raw_decode2"} <= set(
        terms("json.JSONDecoder.raw_decode2")
    )


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_each_text_alone_and_find_it(pooling, files):
    texts = ["Apples are red.", "a", "Plums are blue, and so is the sea at noon. " * 3, "Pears"] * 2
    embed = embedder(pooling)
    vectors = embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    model = make_model(tiny_llama(vocab_size=300, max_positions=128))
    for text, vector in zip(texts[1:3], vectors[1:3], strict=True):
        ids_1T = np.asarray([[256, *text.encode()][:128]], np.int32)
        hidden_TD = np.asarray(jax.jit(model.apply)(random_params(model), inputs(ids_1T)).hidden_BTD)[0]
        want = hidden_TD.mean(0) if pooling == "mean" else hidden_TD[-1]
        np.testing.assert_allclose(vector, want / np.linalg.norm(want), atol=1e-4)
    index = build(IndexConfig((str(files / "rows.jsonl"),)), embed)
    assert index.search("Plums are blue.", 1, by="vectors")[0].passage.first == 2


def test_both_are_fused_by_rank(files):
    index = build(IndexConfig((str(files),)), embedder())
    query = "Apples are red."
    ranks = {
        by: {each.passage: rank for rank, each in enumerate(index.search(query, 100, by=by), 1)}
        for by in ("words", "vectors")
    }
    for each in index.search(query, 100, by="both"):
        want = sum(1 / (60 + of[each.passage]) for of in ranks.values() if each.passage in of)
        assert each.score == pytest.approx(want)
    assert index.search(query, 1)[0].passage.text == query


def test_an_index_comes_back_as_it_was_and_knows_when_it_is_stale(files, tmp_path, caplog):
    out, embed = tmp_path / "index", embedder()
    made = build(IndexConfig((str(files),)), embed)
    made.save(out)
    for by, query in (("words", "marbles"), ("vectors", "blue"), ("both", "start now")):
        assert open_index(out, embed).search(query, by=by) == made.search(query, by=by)
    assert open_index(out).search("marbles") == made.search("marbles", by="words")
    with pytest.raises(UserError, match="no vectors"):
        open_index(out).search("marbles", by="both")
    assert not caplog.records
    assert open_index(out, embedder(seed=8)).search("marbles") == made.search("marbles", by="words")
    assert "no vectors of this model" in caplog.text
    (files / "guide.md").write_text(GUIDE.replace("wheel", "whale"))
    (files / "new.txt").write_text("New.")
    (files / "rows.jsonl").unlink()
    assert open_index(out).changed() == ["guide.md", "new.txt", "rows.jsonl"]
    assert "is stale, as guide.md, new.txt, rows.jsonl changed" in caplog.text
    build(IndexConfig((str(files),))).save(out)
    assert open_index(out).changed() == []


def test_an_older_index_stays_until_the_next_is_whole(files, tmp_path, monkeypatch):
    out = tmp_path / "index"
    made = build(IndexConfig((str(files),)))
    made.save(out)
    (files / "new.txt").write_text("New marbles.")
    with monkeypatch.context() as patch:
        patch.setattr("llmlab.workdir.manifest.write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(IndexConfig((str(files),))).save(out)
    assert open_index(out).search("marbles") == made.search("marbles")
    build(IndexConfig((str(files),))).save(out)
    assert open_index(out).changed() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "index"]


def test_a_torn_index_is_known_for_torn(files, tmp_path):
    out = tmp_path / "index"
    build(IndexConfig((str(files),)), embedder()).save(out)
    for path in sorted(each for each in out.rglob("*") if each.is_file()):
        content = path.read_bytes()
        for torn in (content[:-1], bytes([content[0] ^ 1]) + content[1:], None):
            path.unlink() if torn is None else path.write_bytes(torn)
            with pytest.raises(UserError, match="make the index again|is no index"):
                open_index(out)
            path.write_bytes(content)
    open_index(out)
    with pytest.raises(UserError, match="is no index"):
        open_index(files)
    with pytest.raises(UserError, match="there already"):
        build(IndexConfig((str(files),))).save(files)
    with pytest.raises(UserError, match="name no file"):
        build(IndexConfig((str(files / "*.pdf"),)))
    (files / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match=r"bad\.txt"):
        build(IndexConfig((str(files),)))


def test_an_answer_can_name_its_sources(files):
    index = build(IndexConfig((str(files),)))
    found = index.search("marbles in a jar", 3)
    names = [each.passage.source for each in found]
    assert names[0].startswith("jars.py:")
    tool = search_tool(index, 3)("marbles in a jar")
    turn = asked_with(found, "Where are the marbles?")
    for number, each in enumerate(found, 1):
        assert f"[{number}] {each.passage.source}\n{each.passage.text}" in tool
        assert f"[{number}] {each.passage.source}\n{each.passage.text}" in turn.content
    assert turn.content.endswith("\n\nWhere are the marbles?")
    assert sources("In the jar [2].", found) == [names[1]]
    assert sources(f"See {names[0]}.", found) == [names[0]]
    assert sources("In the jar [9].", found) == names
    assert search_tool(index)("zebra") == "nothing found"


def hits(index, count: int, by: str) -> float:
    """Of so many questions about the library, for how many the passage with the answer is among the first five."""
    entries = sorted(library.library(), key=lambda entry: place(entry.name))[:count]

    def plain(text):
        return " ".join(library.words(library.MARKUP.sub("", text)))

    found = 0
    for number, entry in enumerate(entries):
        best = index.search(question(entry, number), 5, by=by)
        found += any(
            each.passage.file == entry.document and plain(entry.summary) in plain(each.passage.text) for each in best
        )
    return found / len(entries)


def test_questions_about_a_library_find_the_passage_that_answers(small_library):
    index = build(IndexConfig((str(small_library),)))
    assert hits(index, 40, "words") >= 0.9


@pytest.mark.slow
def test_two_hundred_questions_about_the_standard_library():
    """With random weights vectors find little; what counts is what words find."""
    root = sources_python._root()
    documents = sorted({entry.document for entry in library.library()})
    config = IndexConfig(tuple(str(root / document) for document in documents))
    index = build(config, embedder())
    figures = {by: hits(index, 200, by) for by in ("words", "vectors", "both")}
    print(json.dumps(figures))
    assert figures["words"] >= 0.9
