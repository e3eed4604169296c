"""What `llmlab tokenize` prints."""

import io
import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from llmlab.cli import run
from llmlab.core.errors import UserError
from llmlab.data.token_view import chat_command, render, tokenize_command
from llmlab.data.tokenizer import Tokenizer, TokenizerConfig
from llmlab.data.tokenizer_train import train_tokenizer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def character() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind="character"), ["ab é\n"])


def test_plain_pieces_carry_their_ids_line_by_line(character: Tokenizer):
    assert render(character, "a\nb é", color=False) == "a:2 ↵:0\nb:3 ·:1 é:4\n5 tokens, 6 bytes, 1.20 bytes per token\n"
    assert render(character, "ab", color=False, ids=False) == "a b\n2 tokens, 2 bytes, 1.00 bytes per token\n"


def test_an_empty_text_divides_nothing_by_zero(character: Tokenizer):
    assert render(character, "", color=False) == "0 tokens, 0 bytes\n"


def test_neighbours_differ_in_colour_and_the_pieces_are_those_of_plain(character: Tokenizer):
    colored = render(character, "aab", color=True)
    backgrounds = re.findall(r"48;5;(\d+)m", colored)
    assert len(backgrounds) == 3
    assert all(one != other for one, other in itertools.pairwise(backgrounds))
    assert re.sub(r"\x1b\[[\d;]*m", "", colored).splitlines()[0] == "a2a2b3"


def test_text_cannot_smuggle_escapes_to_the_terminal():
    tokenizer = train_tokenizer(TokenizerConfig(kind="character"), ["\x1b[2J"])
    assert "\x1b" not in render(tokenizer, "\x1b[2J", color=False)


def test_colour_is_for_terminals_that_want_it(character: Tokenizer, tmp_path, monkeypatch):
    character.save(tmp_path / "tokenizer.model")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for out, colored in ((Terminal(), True), (io.StringIO(), False)):
        tokenize_command(tmp_path, "ab", out)  # the workdir and the file in it are the same
        assert ("\x1b[" in out.getvalue()) == colored
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    tokenize_command(tmp_path / "tokenizer.model", "ab", out)
    assert "\x1b[" not in out.getvalue()


def test_without_text_standard_input_is_read(character: Tokenizer, tmp_path, monkeypatch):
    character.save(tmp_path / "tokenizer.model")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode())))
    tokenize_command(tmp_path, None, out)
    assert out.getvalue().startswith("é:4\n1 token, 2 bytes")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(UserError, match="not UTF-8: byte 0xff at 2"):
        tokenize_command(tmp_path, None, out)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer .*tokenizer\.model"):
        tokenize_command(tmp_path, "a", io.StringIO())


ROWS = [
    {
        "messages": [
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "user", "content": "<|end|>"},
            {"role": "assistant", "content": "a\n", "thinking": "b", "tool_calls": [{"name": "ab", "arguments": "a"}]},
            {"role": "tool", "content": "b"},
            {"role": "assistant", "content": "ab"},
        ]
    },
    {"prompt": "a", "chosen": "a", "rejected": "b", "margin": 2, "kind": "cut"},
    {"prompt": "a", "completions": ["ab", "b"], "labels": [True, 0.5]},
]
CHAT = """\
{file} line 1, chat
<s> <|user|> a ↵
b <|end|>
<|assistant|> b <|end|>
<|user|> < | e n d | > <|end|>
<|assistant|> [<|think|>] [b] [<|/think|>] [a] [↵]
[<|call|>] [a] [b] [·] [a] [<|/call|>] [<|end|>]
<|tool|> a b <|result|> b <|end|>
<|assistant|> [a] [b] [<|end|>]

"""
PAIR = """\
{file} line 2, preference, cut, answer 1 of 2, value 2
<s> <|user|> a <|end|>
<|assistant|> [a] [<|end|>]

{file} line 2, preference, cut, answer 2 of 2
<s> <|user|> a <|end|>
<|assistant|> [b] [<|end|>]

"""
STEPS = """\
{file} line 3, steps
<s> <|user|> a <|end|>
<|assistant|> [a] [b] [↵]=1
[b]=0.5 [<|end|>]

"""


@pytest.fixture
def chats(tmp_path) -> Path:
    """A workdir with a tokenizer, and a file of chats in it."""
    train_tokenizer(TokenizerConfig(kind="character"), ["ab \n<|end|>"]).save(tmp_path / "tokenizer.model")
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def shown(chats: Path, out: io.StringIO | None = None, **options) -> str:
    out = out or io.StringIO()
    chat_command(chats.parent, chats, out, **options)
    return out.getvalue()


def test_conversations_are_shown_with_what_is_learned_of_them(chats):
    expected = (CHAT + PAIR + STEPS).replace("{file}", str(chats))
    assert shown(chats) == expected + "4 conversations, 65 tokens, 24 learned (in brackets), 36.9%\n"
    assert shown(chats, limit=0) == shown(chats)
    assert shown(chats, limit=1).endswith("; there are more rows: --limit=0 shows all\n")


def test_what_is_learned_is_green_and_nothing_else_is(chats):
    plain, colored = shown(chats, limit=1), shown(chats, Terminal(), limit=1)
    pieces = re.findall(r"\x1b\[30;48;5;(\d+)m(?:\x1b\[1m)?(.*?)\x1b\[0m", colored)
    learned = [piece for background, piece in pieces if background in ("157", "114")]
    words = [word for line in plain.splitlines()[1:-1] for word in line.split()]
    assert learned == [word[1:-1] for word in words if word.startswith("[")]
    assert [piece for _, piece in pieces] == [word.strip("[]") for word in words]
    assert all(one != other for (one, _), (other, _) in itertools.pairwise(pieces))
    assert re.findall(r"\x1b\[1m(.*?)\x1b", colored) == [
        word.strip("[]") for word in words if "|>" in word or word == "<s>"
    ]


def test_rows_may_be_named_and_counted(chats, capsys):
    chats.write_text(json.dumps(ROWS[1]))
    command = ["llmlab", "tokenize", f"--workdir={chats.parent}", f"--chat={chats}"]
    assert run([*command, "--rows=binary"]) == 0
    said = capsys.readouterr().out
    assert f"{chats} line 1, binary, cut, value 1\n" in said
    assert f"{chats} line 1, binary, cut, value 0\n" in said
    assert said.endswith("2 conversations, 14 tokens, 4 learned (in brackets), 28.6%\n")
    for wrong, message in (
        (["--rows=steps"], "it has 'prompt', 'chosen', 'rejected', 'margin', 'kind'"),
        (["--rows=binry"], "--rows=binry"),
        (["--limit=-1"], "--limit=-1 should be a number of rows"),
        (["text"], "'text' is no flag"),
    ):
        assert run([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert run([*command[:3], "--limit=2", "text"]) == 2
    assert "--limit is of conversations" in capsys.readouterr().err


def test_a_bad_row_or_a_tokenizer_without_markers_is_named(chats, tmp_path):
    chats.write_text(json.dumps({"prompt": "a", "completion": ""}))
    with pytest.raises(UserError, match=r"chats\.jsonl line 1 .*: empty answer; give it text"):
        shown(chats)
    chats.write_text("{")
    with pytest.raises(UserError, match=r"chats\.jsonl line 1 .*: not JSON"):
        shown(chats)
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        shown(tmp_path / "nowhere.jsonl")
    train_tokenizer(TokenizerConfig(kind="character", chat_markers=False), ["ab"]).save(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="has no chat markers"):
        shown(chats)
