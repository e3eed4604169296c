"""Rows that a person keeps: whole, in the shapes that readers know, and never at the cost of what was there."""

import errno
import json
import os

import pytest

from llmlab.core.errors import DiskFull, UserError
from llmlab.data.rows import examples
from llmlab.infer.kept import append_rows, as_turns, read_rows
from tests.scripted import assistant, tool, user


def test_turns_have_the_fields_of_the_published_shape():
    turns = [user("1+2?"), assistant("", ("add", "1+2"), thinking="hm"), tool("add", "3"), assistant("3")]
    assert as_turns(turns) == [
        {"role": "user", "content": "1+2?"},
        {
            "role": "assistant",
            "thinking": "hm",
            "content": "",
            "tool_calls": [{"name": "add", "arguments": "1+2"}],
        },
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]


def test_a_kept_conversation_is_what_training_reads():
    turns = (user("1+2?"), assistant("", ("add", "1+2"), thinking="hm"), tool("add", "3"), assistant("3"))
    (example,) = examples({"messages": as_turns(turns)}, "chat")
    assert example.responses[0].conversation == turns


def test_rows_are_added_to_what_is_there(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_rows(path, [{"a": "日本"}, {"b": 2}])
    append_rows(path, [])
    monkeypatch.setenv("HOME", str(tmp_path))
    append_rows("~/rows.jsonl", [{"c": "x\ny\u2028"}])
    assert read_rows("~/rows.jsonl") == [{"a": "日本"}, {"b": 2}, {"c": "x\ny\u2028"}]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == read_rows(path)
    assert "日本" in path.read_text()


@pytest.mark.parametrize(
    "before, want",
    [
        ('{"a": 1}\n{"b": "half of', [{"a": 1}, {"c": 3}]),
        ('{"half', [{"c": 3}]),
        ('{"a": 1}', [{"a": 1}, {"c": 3}]),
        ('{"a": 1}\n\n', [{"a": 1}, {"c": 3}]),
        ("", [{"c": 3}]),
    ],
)
def test_half_a_row_goes_and_a_whole_one_stays(tmp_path, before, want):
    path = tmp_path / "rows.jsonl"
    path.write_text(before)
    assert read_rows(path) == want[:-1]
    append_rows(path, [{"c": 3}])
    assert read_rows(path) == want
    assert all(json.loads(line) for line in path.read_text().split("\n") if line)


@pytest.mark.parametrize("content", ["my notes", "my notes\n", "[1, 2]\n", '{"a": 1}\nnotes', '{"a": \n'])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"notes\.txt ends in what is no row of JSON"):
        append_rows(path, [{"c": 3}])
    assert path.read_text() == content


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_rows(path)


def test_what_cannot_be_written_is_one_line(tmp_path):
    for path in (tmp_path / "none" / "rows.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            append_rows(path, [{"a": 1}])


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"a": 1}])
    write = os.write

    def full(descriptor, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:-15])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull, match=r"rows\.jsonl"):
        append_rows(path, [{"b": "x" * 30}])
    assert path.read_text() == '{"a": 1}\n'
