"""Tokenizers: nothing is lost, nothing in a text becomes a marker, every file is taken for what it is."""

import errno
import io
import os
import pickle

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmlab.core.errors import DiskFull, UserError
from llmlab.data import tokenizer as tokenizer_module
from llmlab.data.tokenizer import (
    CHAT_MARKERS,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    visible,
)
from llmlab.data.tokenizer_train import train_tokenizer

TRAINING_TEXT = "def area(width, height):\n    if width < 10:\n        return width * height  # café 2024\n\n\n" * 40
MARKERS = ("<s>", "</s>", "<pad>", "<unk>", "<0x41>", "<0xE2>", *CHAT_MARKERS, "<|reserved_0|>")
AWKWARD = (
    "\u2581",
    "\u2585",
    "\0",
    "\r\n",
    "\n",
    "\ufeff",
    "\t",
    "  ",
    "\u0301",
    "👩‍👩‍👧",
    "ﬁ",
    "\u2047",
    "\ufffd",
    "\U0010ffff",
)
TEXTS = st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD + MARKERS + ("width", " return")))).map("".join)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=370), [TRAINING_TEXT])


@pytest.fixture(scope="module")
def character() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind="character"), ["hello, wörld\n"])


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
@example(text="".join(AWKWARD))
@example(text="".join(MARKERS))
@example(text="\u2581\u2581 a\u2581b \u2581")
@example(text="")
def test_sentencepiece_loses_nothing(bpe: Tokenizer, text: str):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.decode_bytes(ids) == text.encode()
    assert bpe.token_bytes()[ids].sum() == len(text.encode())
    assert not {bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.unk_id, *bpe.control.values()} & set(ids)


def test_every_code_point_survives(bpe: Tokenizer):
    for start in range(0, 0x110000, 0x1000):
        block = "".join(chr(code) for code in range(start, start + 0x1000) if not 0xD800 <= code < 0xE000)
        assert bpe.decode(bpe.encode(block)) == block, hex(start)


def test_a_long_text_cut_for_speed_gives_the_ids_of_the_whole(bpe: Tokenizer, tmp_path, monkeypatch):
    text = TRAINING_TEXT[:3000] + "    x   y" * 50 + "\n\n   return" * 50 + "longword" * 100 + "   "
    bpe.save(tmp_path / "bpe.model")
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model")).encode(text)
    for length in (1, 7, 64):
        monkeypatch.setattr(tokenizer_module, "_SLICE", length)
        assert bpe.encode(text) == whole


def test_pieces_that_join_words_keep_a_text_whole(monkeypatch):
    model = trained_elsewhere(split_by_whitespace=False)
    joined = SentencePieceTokenizer(model)
    text = TRAINING_TEXT[:1000]
    monkeypatch.setattr(tokenizer_module, "_SLICE", 8)
    assert joined.lossless
    assert joined.encode(text) == sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)


@pytest.mark.parametrize("name", ["bpe", "character"])
def test_a_lone_surrogate_is_refused_in_a_sentence(name: str, request):
    with pytest.raises(UserError, match=r"lone surrogate, U\+D83D at character 2, .* remove it$"):
        request.getfixturevalue(name).encode("ab\ud83d!")


def test_digits_are_tokens_of_their_own(bpe: Tokenizer):
    assert [bpe.decode([id]) for id in bpe.encode("2024")] == list("2024")


def test_indentation_and_line_ends_compress(bpe: Tokenizer):
    pieces = [bpe.piece(id) for id in bpe.encode("):\n        return")]
    assert "········" in pieces
    assert any(piece.endswith("↵") and len(piece) > 1 for piece in pieces)


def test_markers_have_ids_that_stand_for_no_text(bpe: Tokenizer):
    assert set(CHAT_MARKERS) <= set(bpe.control)
    ids = [bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.unk_id, *bpe.control.values()]
    assert len(set(ids)) == len(ids) == 4 + len(bpe.control)
    assert bpe.decode([bpe.bos_id, bpe.control["<|user|>"], *bpe.encode("x"), bpe.eos_id]) == "x"
    assert bpe.piece(bpe.control["<|user|>"]) == "<|user|>"
    assert bpe.token_bytes()[bpe.control["<|user|>"]] == 0


def test_an_incomplete_character_is_held_back_by_its_bytes(bpe: Tokenizer):
    ids = bpe.encode("漢")
    assert len(ids) == 3
    assert bpe.decode(ids[:2]) == "\ufffd"
    assert bpe.decode_bytes(ids[:2]) == "漢".encode()[:2]


@pytest.mark.parametrize("name", ["bpe", "character"])
def test_saving_loading_and_sending_to_a_process_change_nothing(name: str, tmp_path, request):
    saved: Tokenizer = request.getfixturevalue(name)
    saved.save(tmp_path / "tokenizer.model")
    assert os.listdir(tmp_path) == ["tokenizer.model"]
    for same in (load_tokenizer(tmp_path / "tokenizer.model"), pickle.loads(pickle.dumps(saved))):
        assert same.fingerprint == saved.fingerprint
        assert (same.kind, same.vocab_size, dict(same.control)) == (saved.kind, saved.vocab_size, dict(saved.control))
        assert same.encode_batch(["hello", "wörld"]) == saved.encode_batch(["hello", "wörld"])


@pytest.mark.parametrize("name", ["bpe", "character"])
def test_a_save_without_room_keeps_what_was_there(name: str, tmp_path, request, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    saved: Tokenizer = request.getfixturevalue(name)
    (tmp_path / "tokenizer.model").write_bytes(b"earlier")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull):
        saved.save(tmp_path / "tokenizer.model")
    assert os.listdir(tmp_path) == ["tokenizer.model"]
    assert (tmp_path / "tokenizer.model").read_bytes() == b"earlier"


@given(text=st.text(alphabet="helo, wörd\n"))
def test_characters_known_are_characters_kept(character: Tokenizer, text: str):
    ids = character.encode(text)
    assert ids == [sorted(set("hello, wörld\n")).index(c) for c in text]
    assert character.decode(ids) == text
    assert character.token_bytes()[ids].sum() == len(text.encode())


def test_a_character_never_seen_is_unknown_and_shows(character: Tokenizer):
    ids = character.encode("hex")
    assert ids[2] == character.unk_id
    assert character.decode(ids) == "he\ufffd"
    assert (character.piece(ids[2]), character.decode_bytes(ids[2:])) == ("<unk>", "\ufffd".encode())


def test_characters_alone_make_the_vocabulary_when_no_markers_are_wanted():
    bare = train_tokenizer(TokenizerConfig(kind="character", chat_markers=False), ["ba", "c"])
    assert (bare.encode("abc"), bare.vocab_size, bare.control) == ([0, 1, 2], 3 + 4, {})
    assert [bare.pad_id, bare.bos_id, bare.eos_id, bare.unk_id] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes.* is not a tokenizer"),
        (b"garbage\n" * 9, "72 bytes.* is not a tokenizer"),
        (b"{", "starts as JSON"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "starts as JSON"),
    ],
)
def test_what_is_no_tokenizer_is_refused(content: bytes, message: str, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.model.*{message}"):
        load_tokenizer(file)


def test_a_torn_model_is_refused(bpe: Tokenizer, tmp_path):
    bpe.save(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "torn").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "torn")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer .*absent"):
        load_tokenizer(tmp_path / "absent.model")
    with pytest.raises(UserError, match=r"is a folder.*tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_ids_that_only_the_model_has_stand_for_no_text(bpe: Tokenizer, character: Tokenizer):
    foreign = SentencePieceTokenizer(trained_elsewhere(add_dummy_prefix=True))
    for tokenizer, text in ((bpe, "a b"), (character, "hello"), (foreign, "return")):
        ids = tokenizer.encode(text)
        beyond = [tokenizer.vocab_size, *ids, tokenizer.vocab_size + 7]
        assert tokenizer.decode(beyond) == text
        assert tokenizer.decode_bytes(beyond) == tokenizer.decode_bytes(ids)


def test_a_model_that_normalises_is_used_as_it_is():
    model = trained_elsewhere(normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, remove_extra_whitespaces=True)
    processor, foreign = sentencepiece.SentencePieceProcessor(model_proto=model), SentencePieceTokenizer(model)
    text = " return  ﬁ\u2581width "
    ids = foreign.encode(text)
    assert not foreign.lossless
    assert ids == processor.encode(text)
    assert foreign.decode(ids) == processor.decode(ids) == "return fi width"
    assert foreign.decode_bytes(ids) == b" return fi width"
    assert foreign.token_bytes()[ids].sum() == len(b" return fi width")


def test_a_model_without_padding_pads_with_its_unknown_id():
    foreign = SentencePieceTokenizer(trained_elsewhere(pad_id=-1, unk_id=0, bos_id=1, eos_id=2))
    assert (foreign.pad_id, foreign.bos_id, foreign.eos_id) == (0, 1, 2)


def test_visible_text_cannot_command_a_terminal():
    assert visible("a b\n\t\x1b[2J\u202e\x7f") == "a·b↵␉␛[2J\\u{202E}\\u{7F}"


def trained_elsewhere(**options) -> bytes:
    """A SentencePiece model trained with other options than ours."""
    model = io.BytesIO()
    ours = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING_TEXT.splitlines(keepends=True)),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
        **(ours | options),
    )
    return model.getvalue()
