"""Documents of every source: what is read, how it is split, and what each kind of bad input says."""

import builtins
import gzip
import itertools
import json
import os
import sysconfig
from pathlib import Path

import pytest

from llmlab.core.errors import UserError
from llmlab.data import readers, sources_python, text
from llmlab.data.chat import Example
from llmlab.data.config import MixturePart
from llmlab.data.rows import examples
from llmlab.data.sources import Report, documents, source_paths

zstandard = pytest.importorskip("zstandard")


def read(config, split="all", report=None):
    return [document.text for document in documents(config, split, report or Report())]


def packed(path: Path, data: bytes) -> Path:
    """Writes `data`, compressed as the suffix says."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def rows(*texts, field="text"):
    return "".join(json.dumps({field: t}) + "\n" for t in texts).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_is_read_byte_for_byte(tmp_path, suffix):
    content = "\ufeffa\r\nb\n\n 漢字 \U0001f600\0"
    path = packed(tmp_path / f"a.txt{suffix}", content.encode())
    assert read(text("text", files=str(path))) == [content]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_gives_the_named_field(tmp_path, suffix):
    data = b"\xef\xbb\xbf" + rows("one", "two\nlines", field="body") + b"\n" + rows("drei", field="body").rstrip()
    path = packed(tmp_path / f"a.jsonl{suffix}", data)
    assert read(text("jsonl", files=str(path), field="body")) == ["one", "two\nlines", "drei"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_json_file_may_be_one_array(tmp_path, suffix):
    found = [{"text": "one"}, {"text": 'two "[{\\', "n": [1.5e3, {"a": None}]}, {"text": "é漢😀\n"}]
    config = text("jsonl", files=str(tmp_path / f"a.json{suffix}"))
    for indent, ascii in itertools.product((None, 2), (True, False)):
        content = json.dumps(found, indent=indent, ensure_ascii=ascii)
        packed(tmp_path / f"a.json{suffix}", f"\ufeff {content}\n".encode())
        assert read(config) == [row["text"] for row in found]
    packed(tmp_path / f"a.json{suffix}", rows("line", "by line"))
    assert read(config) == ["line", "by line"]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_an_array_is_the_same_however_it_is_read(tmp_path, monkeypatch, size):
    """A piece may end within a word, a number, an escape, a string or a bracket."""
    monkeypatch.setattr(readers, "READ_BYTES", size)
    long = [{"x": "😀é\\" * 9, "y": [True, False, None, -1.25e-7, 12345678901234567890]}] * 3
    for found in ([{"a": 1}], long, [{}, {"b": {"c": ["]", "}", '"']}}, {"d": float("inf"), "e": -float("inf")}]):
        (tmp_path / "a.json").write_text(json.dumps(found))
        assert [row.fields for row in readers.jsonl_rows(tmp_path / "a.json")] == found
    (tmp_path / "a.json").write_text('[12345, {"a": 1}]')
    number, row = readers.jsonl_rows(tmp_path / "a.json")
    assert (number.reason, row.fields) == ("not a JSON object", {"a": 1})


def test_of_a_long_array_only_a_part_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 50}] * 5000))
    held = []
    real = readers._Cursor.value
    monkeypatch.setattr(readers._Cursor, "value", lambda self: held.append(len(self._text)) or real(self))
    assert len(list(readers.jsonl_rows(tmp_path / "a.json"))) == len(held) == 5000
    assert max(held) < 400


def test_a_row_of_an_array_is_named_by_line_and_number(tmp_path):
    (tmp_path / "a.json").write_text('[\n  {"text": "a"},\n\n  {"text":\n 3}\n]')
    with pytest.raises(UserError, match=r"a\.json line 4, row 2 \('text' is int\): field is not text"):
        read(text("jsonl", files=str(tmp_path / "a.json")))


def test_characters_cut_by_a_read_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READ_BYTES", 1)
    path = packed(tmp_path / "a.txt.gz", "añ漢😀".encode())
    assert read(text("text", files=str(path))) == ["añ漢😀"]
    path = packed(tmp_path / "b.jsonl.zst", rows("añ漢😀", "b"))
    assert read(text("jsonl", files=str(path))) == ["añ漢😀", "b"]


def test_a_file_of_several_compressed_frames_is_read_to_its_end(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"one ") + zstandard.compress(b"two"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three ") + gzip.compress(b"four"))
    assert read(text("text", files=str(tmp_path / "*.txt.*"))) == ["one two", "three four"]


def test_parquet_and_hugging_face(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"n": [1, 2], "body": ["one", "two"]}), tmp_path / "a.parquet")
    assert read(text("parquet", files=str(tmp_path / "a.parquet"), field="body")) == ["one", "two"]
    assert [row.fields for row in readers.parquet_rows(tmp_path / "a.parquet", "body")] == [
        {"body": "one"},
        {"body": "two"},
    ]
    with pytest.raises(UserError, match=r"it has 'n', 'body'.*no field 'text'; set data\.field"):
        read(text("parquet", files=str(tmp_path / "a.parquet")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match=r"b\.parquet .*not a readable Parquet file"):
        read(text("parquet", files=str(tmp_path / "b.parquet")))


@pytest.mark.slow
def test_hugging_face_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "set")
    assert read(text("huggingface", files=str(tmp_path / "set"))) == ["one", "two"]
    chat = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    datasets.Dataset.from_list(chat).save_to_disk(tmp_path / "chat")
    (found,) = read(text("huggingface", files=str(tmp_path / "chat"), rows="chat"))
    assert [Example.loads(found)] == examples(chat[0], "chat")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"splits train: set data\.files=.*both/train"):
        read(text("huggingface", files=str(tmp_path / "both")))


@pytest.mark.parametrize(
    "library,source,name", [("zstandard", "text", "a.txt.zst"), ("pyarrow", "parquet", "a.parquet")]
)
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, library, source, name):
    (tmp_path / name).write_bytes(b"x")
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == library:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=rf"needs {library}: pip install"):
        read(text(source, files=str(tmp_path / name)))


# (source, file name, content, what the message says, the texts left by skipping; None where a decoder may give some)
BAD = {
    "empty": ("text", "a.txt", b"", r"a\.txt: empty file", []),
    "empty_gzip": ("text", "a.txt.gz", gzip.compress(b""), r"a\.txt\.gz: empty file", []),
    "empty_jsonl": ("jsonl", "a.jsonl", b"", r"a\.jsonl: empty file", []),
    "utf8": ("text", "a.txt", b"one\ntwo\n\xff", r"a\.txt line 3 \(byte 0xff\): invalid UTF-8", []),
    "utf8_cut": ("text", "a.txt", "漢".encode()[:2], r"a\.txt line 1 \(byte 0xe6\): invalid UTF-8", []),
    "gzip_cut": ("text", "a.txt.gz", gzip.compress(b"some text" * 99)[:-9], r"cut short", []),
    "gzip_not": ("text", "a.txt.gz", b"plain", r"damaged gzip", []),
    "zstd_cut": ("text", "a.txt.zst", zstandard.compress(bytes(range(128)) * 99)[:-9], r"cut short", []),
    "zstd_not": ("text", "a.txt.zst", b"plain", r"damaged zstd", []),
    "no_field": ("jsonl", "a.jsonl", rows("a") + b'{"b": "x"}\n', r"line 2 .*has 'b'.*no field 'text'", ["a"]),
    "not_json": ("jsonl", "a.jsonl", rows("a") + b"{\n" + rows("c"), r"a\.jsonl line 2 .*not JSON", ["a", "c"]),
    "not_object": ("jsonl", "a.jsonl", rows("a") + b"[1]\n", r"line 2: not a JSON object", ["a"]),
    "not_text": ("jsonl", "a.jsonl", rows("a") + b'{"text": 3}\n', r"line 2 .*is int.*field is not text", ["a"]),
    "row_utf8": ("jsonl", "a.jsonl", rows("a") + b'{"text": "\xff"}\n', r"line 2 .*invalid UTF-8", ["a"]),
    "nested": ("jsonl", "a.jsonl", rows("a") + b'{"text": ' + b"[" * 200_000 + b"\n", r"line 2 .*not JSON", ["a"]),
    "surrogate": ("jsonl", "a.jsonl", rows("a") + b'{"text": "\\ud800"}\n', r"line 2: lone surrogate", ["a"]),
    "array_empty": ("jsonl", "a.json", b" [ ]", r"a\.json: empty file", []),
    "array_cut": ("jsonl", "a.json", b'[{"text": "a"},\n{"text": "b"}', r"line 2 .'the end' where ',' sho", ["a", "b"]),
    "array_cut_row": ("jsonl", "a.json", b'[{"text": "a"}, {"text": "b', r"line 1 .Unterminated.*not JSON", ["a"]),
    "array_comma": ("jsonl", "a.json", b'[{"text": "a"}\n{"text": "b"}]', r"line 2 .*where ',' should come", ["a"]),
    "array_more": ("jsonl", "a.json", b'[{"text": "a"}]\n[]', r"line 2 \('\[' where 'the end' should", ["a"]),
    "array_row": ("jsonl", "a.json", b'[{"text": "a"}, 12, {"text": "b"}]', r"row 2: not a JSON object", ["a", "b"]),
    "array_nonsense": ("jsonl", "a.json", b'[{"text": "a"},\n{"text": nul}]' + b" " * 99, r"line 2 .*not JSON", ["a"]),
    "array_utf8": ("jsonl", "a.json", b'[{"text": "a"},\n{"text": "\xff"}]', r"line 2 .*invalid UTF-8", []),
    "array_nested": ("jsonl", "a.json", b'[{"text": ' + b"[" * 200_000, r"line 1 .*not JSON", []),
    "jsonl_cut": ("jsonl", "a.jsonl.zst", zstandard.compress(rows(*"abcdefgh"))[:-1], r"cut short", None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_or_a_counted_skip(tmp_path, case):
    source, name, content, message, left = BAD[case]
    (tmp_path / name).write_bytes(content)
    config = {"files": str(tmp_path / name)}
    with pytest.raises(UserError, match=message) as caught:
        read(text(source, **config))
    assert "\n" not in str(caught.value)
    assert "data.on_bad_input=skip" in str(caught.value)
    report = Report()
    found = read(text(source, on_bad_input="skip", **config), report=report)
    assert list(report.counts.values()) == [1]
    assert report.summary().startswith("skipped 1 x")
    assert name in report.summary()
    if left is not None:
        assert found == left


def test_other_files_are_still_read_past_a_skipped_one(tmp_path):
    for name, content in (("a", b"one"), ("b", b"\xff"), ("c", b"three")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    report = Report()
    assert read(text("text", files=str(tmp_path / "*.txt"), on_bad_input="skip"), report=report) == ["one", "three"]
    assert report.counts == {"invalid UTF-8": 1}


def test_empty_rows_are_counted_but_never_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows("a", "", "b", ""))
    report = Report()
    assert read(text("jsonl", files=str(tmp_path / "a.jsonl")), report=report) == ["a", "b"]
    assert report.counts == {"empty text": 2}
    assert report.summary(bad_only=True) == ""


def test_patterns_that_find_nothing_say_why(tmp_path):
    with pytest.raises(UserError, match=r"data\.files is empty"):
        read(text("text"))
    with pytest.raises(UserError, match=r"data\.files='.*nothing\*' matches nothing"):
        read(text("text", files=str(tmp_path / "nothing*")))
    with pytest.raises(UserError, match=r"is a folder: name the files in it"):
        read(text("text", files=str(tmp_path)))


def test_patterns_are_sorted_and_a_file_counts_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "[1].txt"):
        (tmp_path / name).write_text(name)
    patterns = [str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")]
    assert read(text("text", files=patterns)) == ["[1].txt", "a.txt", "b.txt", "sub/c.txt"]
    assert read(text("text", files=str(tmp_path / "[1].txt"))) == ["[1].txt"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_single_file_is_split_by_position(tmp_path, suffix):
    content = "".join(chr(0x100 + i) for i in range(1003))
    path = packed(tmp_path / f"a.txt{suffix}", content.encode())
    cut = int(1003 * 0.9)
    config = text("text", files=str(path))
    assert (read(config, "train"), read(config, "held_out")) == ([content[:cut]], [content[cut:]])
    assert read(config, "all") == [content]


def test_a_huge_file_comes_in_pieces_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARACTERS", 10)
    monkeypatch.setattr(readers, "READ_BYTES", 7)
    (tmp_path / "a.txt").write_text("12345\n78\nabcdefghijklmn\nxy")
    config = text("text", files=str(tmp_path / "a.txt"))
    assert read(config, "all") == ["12345\n78\n", "abcdefghij", "klmn\nxy"]


@pytest.mark.parametrize("others", [0, 20])
@pytest.mark.parametrize("name, spoil", [("a.txt", lambda data: data + b"\xff"), ("a.txt.gz", lambda data: data[:-9])])
def test_a_huge_file_that_turns_bad_gives_neither_split_any_text(tmp_path, monkeypatch, name, spoil, others):
    """Its beginning is read long before the bad byte: what was given by then would be half a file."""
    monkeypatch.setattr(readers, "MAX_DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(readers, "READ_BYTES", 50)
    packed(tmp_path / name, b"a line of it\n" * 200)
    (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    for i in range(others):
        (tmp_path / f"{i}.txt").write_text("good")
    config = text("text", files=str(tmp_path / "*"), held_out=0.5, on_bad_input="skip")
    report = {split: Report() for split in ("train", "held_out", "all")}
    found = {split: read(config, split, report[split]) for split in report}
    assert all(set(texts) <= {"good"} for texts in found.values())
    assert len(found["train"]) + len(found["held_out"]) == others
    assert list(report["all"].counts.values()) == [1]
    met = [split for split in ("train", "held_out") if report[split].counts]
    assert len(met) == (1 if others else 2)  # a file among others is of one split, a single one of both
    assert all(report[split].counts == report["all"].counts for split in met)


def test_files_are_held_out_by_name_wherever_they_lie(tmp_path):
    for folder in ("here", "there/deep"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(40):
            (tmp_path / folder / f"{i}.txt").write_text(f"text {i}")
    here = text("text", files=str(tmp_path / "here/*.txt"), held_out=0.3)
    there = text("text", files=str(tmp_path / "there/deep/*.txt"), held_out=0.3)
    assert read(here, "held_out") == read(there, "held_out")
    assert 4 <= len(read(here, "held_out")) <= 20
    assert sorted(read(here, "held_out") + read(here, "train")) == sorted(read(here, "all"))


def test_of_two_files_one_is_held_out(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    config = text("text", files=str(tmp_path / "*.txt"), held_out=0.0001)
    assert (len(read(config, "train")), len(read(config, "held_out"))) == (1, 1)


def test_rows_are_held_out_one_by_one(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rows(*map(str, range(1000))))
    config = text("jsonl", files=str(tmp_path / "a.jsonl"))
    train, held_out = read(config, "train"), read(config, "held_out")
    assert sorted(train + held_out) == sorted(map(str, range(1000)))
    assert 60 <= len(held_out) <= 140


def test_held_out_files_are_kept_from_training(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    config = text("text", files=str(tmp_path / "*.txt"), held_out_files=str(tmp_path / "b.txt"))
    assert (read(config, "train"), read(config, "held_out"), read(config)) == (["a", "c"], ["b"], ["a", "c", "b"])
    with pytest.raises(UserError, match=r"data\.held_out_files takes every file"):
        read(text("text", files=str(tmp_path / "a.txt"), held_out_files=str(tmp_path / "*.txt")))


def test_a_file_is_held_out_by_whatever_path(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    for held_out in (str(tmp_path / "b.txt"), "./b.txt", f"../{tmp_path.name}/b.txt"):
        config = text("text", files="*.txt", held_out_files=held_out)
        assert (read(config, "train"), read(config, "held_out")) == (["a", "c"], ["b"])


def test_a_file_under_two_spellings_counts_once(tmp_path, monkeypatch):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    config = text("text", files=("*.txt", str(tmp_path / "*.txt"), f"../{tmp_path.name}/a.txt"), held_out=0.5)
    assert sorted(read(config)) == ["a", "b", "c", "d"]
    assert sorted(read(config, "train") + read(config, "held_out")) == ["a", "b", "c", "d"]
    assert len(source_paths(config)) == 4


def test_a_linked_folder_shows_nothing_that_is_held_out(tmp_path):
    (tmp_path / "real").mkdir()
    for name in "abc":
        (tmp_path / "real" / f"{name}.txt").write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = text("text", files=str(tmp_path / "*/*.txt"), held_out_files=str(tmp_path / "real" / "b.txt"))
    assert (read(config, "train"), read(config, "held_out")) == (["a", "c"], ["b"])
    assert sorted(read(text("text", files=str(tmp_path / "**/*.txt")))) == ["a", "b", "c"]


CHATS = [
    {"conversations": [{"from": who, "value": f"{i}"} for who in ("human", "gpt", "human", "gpt")]} for i in range(200)
]


def test_rows_of_chat_come_as_examples(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    config = text(
        "jsonl", files=str(tmp_path / "a.jsonl"), rows="chat", system="Be brief.", train_on="last", held_out=0.2
    )
    found = {split: list(documents(config, split, Report())) for split in ("train", "held_out", "all")}
    assert [Example.loads(document.text) for document in found["all"]] == [
        only for row in CHATS for only in examples(row, "chat", system="Be brief.", train_on="last")
    ]
    assert [document.name for document in found["all"]][:2] == ["a.jsonl:1", "a.jsonl:2"]
    assert sorted(found["train"] + found["held_out"], key=str) == sorted(found["all"], key=str)
    assert 20 <= len(found["held_out"]) <= 60


def test_both_answers_of_a_row_are_on_one_side(tmp_path):
    pairs = [{"question": f"Q{i}", "chosen": "good", "rejected": "bad"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = text("jsonl", files=str(tmp_path / "a.jsonl"), rows="binary", held_out=0.3)
    asked = {
        split: [Example.loads(t).responses[0].conversation[0].content for t in read(config, split)]
        for split in ("train", "held_out")
    }
    assert all(one == other for found in asked.values() for one, other in zip(found[::2], found[1::2], strict=True))
    assert len(asked["train"]) + len(asked["held_out"]) == 100
    assert not set(asked["train"]) & set(asked["held_out"])


def test_a_bad_row_of_chat_is_an_error_or_a_counted_skip_in_both_splits(tmp_path):
    bad = [{"question": "Q", "answer": ""}, {"text": "Q"}, {"question": "Q", "answer": " "}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*CHATS, *bad]))
    config = {"files": str(tmp_path / "a.jsonl"), "rows": "chat"}
    for split in ("train", "held_out"):
        with pytest.raises(UserError, match=r"a\.jsonl line 201 .*: empty answer; .*, or set data\.on_bad_input=skip"):
            read(text("jsonl", **config), split)
        report = Report()
        read(text("jsonl", on_bad_input="skip", **config), split, report)
        assert report.counts == {"empty answer": 2, "no row of data.rows=chat": 1}


def test_parquet_gives_conversations(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    call = {"function": {"name": "f", "arguments": "1"}}
    table = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "kind": None},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}], "kind": "k"},
    ]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    found = [Example.loads(t) for t in read(text("parquet", files=str(tmp_path / "a.parquet"), rows="chat"))]
    assert found == [only for row in table for only in examples(row, "chat")]


@pytest.mark.parametrize("source", ["python", "text"])
def test_a_source_without_fields_has_no_rows_of_chat(tmp_path, source):
    (tmp_path / "a.txt").write_text("Q")
    files = str(tmp_path / "a.txt") if source == "text" else ()
    with pytest.raises(
        UserError, match=rf"data\.rows='chat' needs rows with fields, and data\.source='{source}' has none"
    ):
        read(text(source, files=files, rows="chat"))


@pytest.mark.parametrize(
    "name, kind, found, refused",
    [
        ("instruction-data.json.gz", "chat", 1100, {}),
        ("instruction-data-with-preference.json.gz", "chat", 1100, {}),
        ("instruction-data-with-preference.json.gz", "preference", 1094, {"answers that are the same": 6}),
        ("instruction-data-with-preference.json.gz", "binary", 2188, {"answers that are the same": 6}),
        ("gsm8k_train.jsonl.gz", "chat", 7473, {}),
    ],
)
def test_published_rows(name, kind, found, refused):
    path = Path(os.environ.get("LLMLAB_PUBLISHED_ROWS", "")) / name
    if not path.is_file():
        pytest.skip(f"needs {name} in the folder that LLMLAB_PUBLISHED_ROWS names")
    report = Report()
    texts = read(text("jsonl", files=str(path), rows=kind, on_bad_input="skip"), report=report)
    assert (len(texts), report.counts) == (found, refused)
    assert all(r.conversation[-1].content.strip() for t in texts[:50] for r in Example.loads(t).responses)


def test_a_mixture_reads_its_parts_in_turn(tmp_path):
    (tmp_path / "a.txt").write_text("prose")
    (tmp_path / "b.jsonl").write_bytes(rows("row", field="body"))
    parts = (
        MixturePart(source="text", files=(str(tmp_path / "a.txt"),)),
        MixturePart(weight=2.0, source="jsonl", files=(str(tmp_path / "b.jsonl"),), field="body"),
    )
    assert read(text("mixture", mixture=parts)) == ["prose", "row"]


def test_the_built_in_corpus_is_the_standard_library_without_its_tests():
    config = text("python")
    train = {d.name: d.text for d in documents(config, "train", Report())}
    held_out = {d.name: d.text for d in documents(config, "held_out", Report())}
    assert not train.keys() & held_out.keys()
    both = train | held_out
    assert list(train) == sorted(train)
    assert both["json/decoder.py"] == (Path(sysconfig.get_paths()["stdlib"]) / "json/decoder.py").read_bytes().decode()
    assert "lambda" in both["topics/lambda"]
    assert not [name for name in both if "/test/" in f"/{name}" or "/tests/" in f"/{name}" or "site-packages" in name]
    size = sum(len(t) for t in both.values())
    assert 4e6 < size < 30e6
    assert 0.03 < sum(len(t) for t in held_out.values()) / size < 0.2


def test_links_to_nothing_are_no_sources(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "was_here.py")
    (tmp_path / "empty.py").touch()
    monkeypatch.setattr(sources_python, "_root", lambda: tmp_path)
    assert sources_python._files() == ["a.py"]
