"""What `llmlab tokenize` prints."""

import io
import itertools
import re
import sys

import pytest

from llmlab.core.errors import UserError
from llmlab.data.token_view import render, tokenize_command
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
