"""Text as it comes: whole characters, stop strings, and what `llmlab sample` prints."""

import io
import types

import jax
import pytest

from llmlab.core.errors import UserError
from llmlab.infer.generate import stream
from llmlab.infer.stream import sample_command, text_of
from llmlab.model.config import llama
from llmlab.model.transformer import make_model

TEXT = "naïve 日本語 🙂 e\u0301 ok"


class ByteTokenizer:
    """Ids below 256 are bytes, then <s> and </s>."""

    bos_id, eos_id, vocab_size = 256, 257, 258

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(id for id in ids if id < 256)


def pieces(data, stop=()):
    return list(text_of(data, ByteTokenizer(), stop))


def test_every_piece_is_whole_characters():
    assert pieces(TEXT.encode()) == list(TEXT)


@pytest.mark.parametrize("data", [b"ab\xf0\x9f\x99", b"\xe6\x97", b"a\xffb", b"\xf0\x9fab", b"\xed\xa0\x80"])
def test_broken_bytes_become_what_decoding_all_gives(data):
    assert "".join(pieces(data)) == data.decode(errors="replace")


def test_nothing_is_held_back_longer_than_it_must():
    given = []

    def ids():
        for id in "a🙂".encode():
            yield id
            given.append("|")

    seen = []
    for piece in text_of(ids(), ByteTokenizer()):
        seen.append((piece, len(given)))
    assert seen == [("a", 0), ("🙂", 4)]


@pytest.mark.parametrize(
    "stop, want",
    [
        (["<end>"], "abc"),
        (["c<", "<end>"], "ab"),
        (["<enx>"], "abc<end>d<en"),
        (["zzz"], "abc<end>d<en"),
        (["a"], ""),
    ],
)
def test_stop_strings(stop, want):
    assert "".join(pieces(b"abc<end>d<en", stop)) == want


def test_a_stop_string_never_shows_in_part():
    text = "".join(pieces("1🙂2🙂🙂3".encode(), ["🙂🙂"]))
    assert text == "1🙂2"


@pytest.fixture(scope="module")
def opened():
    model = make_model(llama(width=32, layers=1, heads=2, vocab_size=258, max_positions=64, init_std=0.5))
    params = jax.jit(model.init)(jax.random.key(0))
    return types.SimpleNamespace(model=model, params=params, tokenizer=ByteTokenizer(), step=1, config={})


def sampled(opened, prompt="héllo", **overrides):
    settings = {"max_tokens": 20, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    settings |= {"repetition_penalty": 1.0, "seed": 0} | overrides
    out = io.StringIO()
    sample_command(opened, prompt, **settings, out=out)
    return out.getvalue()


def test_the_sample_command_prints_text_and_speed(opened, capsys):
    text = sampled(opened)
    assert text.startswith("héllo")
    assert text.endswith("\n")
    error = capsys.readouterr().err
    assert "tokens/s" in error
    assert error.count("\n") == 1
    assert sampled(opened) == text
    assert sampled(opened, seed=1) != text


def test_the_sample_command_stops_at_eos(opened):
    start = [ByteTokenizer.bos_id, *b"h"]
    free = list(stream(opened.model, opened.params, start, max_tokens=20, temperature=1.0))
    end = next(place for place, id in enumerate(free) if place and id < 128 and id not in free[:place])
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = free[end]
    before = "".join(text_of(free[:end], tokenizer))
    ended = types.SimpleNamespace(**vars(opened) | {"tokenizer": tokenizer})
    # A real tokenizer's </s> has no bytes; this one's stands for the character that ends the text.
    assert sampled(ended, prompt="h") == "h" + before + chr(free[end]) + "\n"


def test_a_prompt_that_leaves_no_room(opened):
    with pytest.raises(UserError, match="64 positions"):
        sampled(opened, prompt="x" * 50)
