"""Training a tokenizer: repeatable, bounded in memory, and nothing of the text is passed over in silence."""

import pytest

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import TokenizerConfig
from llmlab.data.tokenizer_train import _CHUNK, _chunks, _sample, train_tokenizer

TEXTS = [
    f"line {i % 7} of the text\n    says: hello, hello world {chr(97 + i % 26)}{chr(97 + i % 23)}\n" for i in range(400)
]
SMALL = TokenizerConfig(vocab_size=400)


def pieces(tokenizer) -> set[str]:
    return {tokenizer.piece(id) for id in range(tokenizer.vocab_size)}


@pytest.mark.parametrize("kind", ["sentencepiece", "character"])
def test_the_same_text_gives_the_same_bytes(kind: str, tmp_path):
    config = TokenizerConfig(kind=kind, vocab_size=400, sample_bytes=8000)
    for name in ("first", "second"):
        train_tokenizer(config, iter(TEXTS), seed=3).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_another_text_gives_another_fingerprint():
    assert train_tokenizer(SMALL, TEXTS).fingerprint != train_tokenizer(SMALL, TEXTS[:-50]).fingerprint


def test_the_end_of_a_line_of_a_megabyte_is_learnt():
    text = "common filler words " * 50_000 + "zyxwvu " * 3000
    assert len(text) > 1_000_000
    assert "\n" not in text
    assert "·zyxwvu" in pieces(train_tokenizer(TokenizerConfig(vocab_size=350), [text]))


def test_text_beside_a_character_sentencepiece_keeps_for_itself_is_learnt():
    learnt = pieces(train_tokenizer(TokenizerConfig(vocab_size=304), ["quux quux \u2585 xyzzy xyzzy " * 200]))
    assert {"·xyzzy", "·quux"} <= learnt


def test_the_character_that_spells_a_space_is_not_learnt_as_one():
    learnt = pieces(train_tokenizer(TokenizerConfig(vocab_size=308), ["quux\u2581xyzzy abc " * 200]))
    assert "xyzzy" in learnt
    assert "·xyzzy" not in learnt


def test_chunks_are_the_whole_text_cut_at_line_ends():
    text = "".join(f"{'é' * (i % 300)} line {i}\n" for i in range(500))
    chunks = list(_chunks(text))
    assert "".join(chunks) == text
    assert len(chunks) > 1
    assert all(len(chunk) <= _CHUNK and chunk.endswith("\n") for chunk in chunks)
    assert "".join(_chunks("x" * 3 * _CHUNK + "y")) == "x" * 3 * _CHUNK + "y"


def test_a_sample_is_bounded_spread_out_and_repeatable():
    texts = [f"{i:04d}" for i in range(4000)]
    sample = _sample(iter(texts), 4000, seed=0)
    assert sample == sorted(sample)
    assert len(sample) == 1000
    assert sample == _sample(texts, 4000, seed=0) != _sample(texts, 4000, seed=1)
    # A uniform sample has 250 ± 14 of its texts in each quarter.
    quarters = [sum(1 for text in sample if int(text) // 1000 == quarter) for quarter in range(4)]
    assert all(abs(count - 250) < 70 for count in quarters), quarters


def test_a_text_within_the_limit_is_used_whole():
    assert _sample(["aé", "b"], 4, seed=0) == ["aé", "b"]


def test_a_vocabulary_that_the_text_cannot_fill_names_the_largest():
    with pytest.raises(UserError, match=r"vocab_size=4096 is more than this text can fill: at most \d+,") as error:
        train_tokenizer(TokenizerConfig(vocab_size=4096), TEXTS)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert train_tokenizer(TokenizerConfig(vocab_size=largest), TEXTS).vocab_size == largest


def test_a_vocabulary_too_small_for_the_characters_names_the_smallest():
    text = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(UserError, match=r"vocab_size=400 is too small .* at least \d+,") as error:
        train_tokenizer(SMALL, [text])
    smallest = int(str(error.value).split("at least ")[1].split(",")[0])
    repeated = [text + text[:2] * 50]
    assert train_tokenizer(TokenizerConfig(vocab_size=smallest), repeated).vocab_size == smallest


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 288), ("sample_bytes", 0), ("character_coverage", 0.5)],
)
def test_settings_that_cannot_work_are_refused_by_name(field: str, value: float):
    with pytest.raises(UserError, match=rf"data\.tokenizer\.{field}={value} "):
        TokenizerConfig(**{field: value})


@pytest.mark.parametrize("kind", ["sentencepiece", "character"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_refused(kind: str, texts: list[str]):
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(TokenizerConfig(kind=kind), texts)


def test_a_lone_surrogate_in_the_text_is_refused():
    with pytest.raises(UserError, match="lone surrogate"):
        train_tokenizer(SMALL, ["fine", "not \udc80"])


def test_a_file_is_loaded_and_no_text_is_read(tmp_path):
    trained = train_tokenizer(SMALL, TEXTS)
    trained.save(tmp_path / "given.model")

    def never():
        raise AssertionError("the text was read")
        yield

    loaded = train_tokenizer(TokenizerConfig(file=str(tmp_path / "given.model")), never())
    assert loaded.fingerprint == trained.fingerprint


def test_progress_counts_the_characters_read():
    seen: list[int] = []
    train_tokenizer(TokenizerConfig(kind="character"), ["abc", "é", ""], progress=seen.append)
    assert seen == [3, 4, 4]
