"""Text as it comes: the pieces joined are the whole, nothing leaks past a stop, and nothing is held back in vain."""

import json
import random

import pytest

from llmlab.data.tokenizer import CHAT_MARKERS, DOCUMENT_MARKERS, TokenizerConfig
from llmlab.data.tokenizer_character import CharacterTokenizer
from llmlab.data.tokenizer_imported import ImportedTokenizer
from llmlab.data.tokenizer_train import train_tokenizer
from llmlab.infer.text_stream import Stops, TextStream
from tests import chat_families

PARTS = (
    *("a", "b", "ab", "<end>", "<", "end>", "\n\n", " ", "\0", "\ufeff", "\ufffd", "\u2581"),
    *("é", "e\u0301", "\u0301", "日本", "語", "ｶﾞ", "🙂", "👨\u200d👩\u200d👧", "🏳️\u200d🌈", "🇩🇪", "\u200d", "नि"),
)
BROKEN = (b"\xff", b"\xf0\x9f", b"\xe6\x97", b"\xc3", b"\x80", b"\xed\xa0\x80", b"\xf0\x9f\x99")


class Pieces:
    """Each id stands for any bytes: a character may begin in one token and end in another."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode_bytes(self, ids):
        return b"".join(self.pieces[id] for id in ids)


def cut(text, stops):
    """Up to the stop string that is complete first, looked for at every end in turn."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def joined(stream, ids):
    """The pieces; what is asked for after a stop is nothing."""
    pieces = []
    for id in ids:
        pieces.append(stream.add(id))
        if stream.stopped:
            return pieces
    return [*pieces, stream.end()]


def check(seed):
    rng = random.Random(seed)
    parts = [rng.choice(PARTS).encode() for _ in range(rng.randrange(12))]
    if rng.random() < 0.3:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(BROKEN))
    data = b"".join(parts)
    borders = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(10)))
    tokens = [data[a:b] for a, b in zip([0, *borders], [*borders, len(data)], strict=True)]
    stops = ["".join(rng.choices(PARTS, k=rng.choice([1, 1, 2]))) for _ in range(rng.randrange(4))]
    stream = TextStream(Pieces(tokens), stops)
    pieces = joined(stream, range(len(tokens)))
    want, stopped = cut(data.decode(errors="replace"), stops)
    assert ("".join(pieces), stream.stopped) == (want, stopped), f"seed {seed}"
    # Nothing was held back that could be given: all but half a character and what a stop string begins with.
    seen = so_far = ""
    for count, piece in enumerate(pieces[: len(tokens)], start=1):
        seen += piece
        whole = b"".join(tokens[:count])
        so_far = whole.decode(errors="ignore")
        if whole.decode(errors="replace") == so_far and not stream.stopped:
            assert not seen or so_far.startswith(seen)
            held = so_far[len(seen) :]
            assert not held or any(stop.startswith(held) for stop in stops), f"seed {seed}"


def test_random_texts_cut_anywhere():
    for seed in range(300):
        check(seed)


@pytest.mark.slow
def test_ten_thousand_texts_cut_anywhere():
    for seed in range(300, 10_300):
        check(seed)


def test_which_stop_is_first_does_not_depend_on_the_tokens():
    for tokens in (["abc"], ["a", "bc"], ["ab", "c"], ["a", "b", "c"]):
        stream = TextStream(Pieces([token.encode() for token in tokens]), ["abc", "b"])
        assert "".join(joined(stream, range(len(tokens)))) == "a"


def test_half_a_character_at_the_end_is_one_replacement_and_may_end_a_stop():
    assert joined(TextStream(Pieces([b"a\xf0\x9f", b"\x99"])), [0, 1]) == ["a", "", "\ufffd"]
    stream = TextStream(Pieces([b"a\xf0\x9f\x99"]), ["\ufffd"])
    assert joined(stream, [0]) == ["a", ""]
    assert stream.stopped


def test_markers_and_unknown_characters():
    tokenizer = CharacterTokenizer("ab", CHAT_MARKERS)
    marker = tokenizer.control["<|end|>"]
    assert joined(TextStream(tokenizer), [0, marker, 1, tokenizer.unk_id]) == ["a", "", "b", "\ufffd", ""]
    assert tokenizer.vocab_size == 2 + len(DOCUMENT_MARKERS) + len(CHAT_MARKERS)


def test_text_alone():
    stops = Stops(["\n\n"])
    assert [stops.add("a\n"), stops.add("b\n"), stops.end(), stops.stopped] == ["a", "\nb", "\n", False]
    assert [stops.add("\n\nc"), stops.add("d"), stops.stopped] == ["", "", True]


def ours():
    return train_tokenizer(TokenizerConfig(vocab_size=350), ["the quick brown fox, naïve 日本 🙂\n"] * 30)


def imported():
    content = chat_families.byte_level(["<s>", "</s>"]).to_str()
    return ImportedTokenizer(content, *(json.loads(content)["added_tokens"][place]["id"] for place in (0, 1, 0)))


@pytest.mark.parametrize("make", [ours, imported])
def test_real_tokenizers(make):
    tokenizer, rng = make(), random.Random(0)
    for _ in range(100):
        text = "".join(rng.choice([*PARTS, "the quick", " fox"]) for _ in range(rng.randrange(15)))
        stops = [rng.choice(PARTS) for _ in range(rng.randrange(2))]
        ids = tokenizer.encode(text)
        pieces = joined(TextStream(tokenizer, stops), ids)
        assert "".join(pieces) == cut(text, stops)[0]
