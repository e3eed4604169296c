"""Training a tokenizer: the same texts, in the same order, with the same seed give the same bytes.

SentencePiece skips, without a word, a sentence that is too long or holds a character it keeps for itself. Here texts
are cut into chunks that it takes whole, newlines included, so that it learns `):⏎` and indentation as pieces.
"""

import heapq
import io
import random
import re
from collections.abc import Callable, Iterable, Iterator

import sentencepiece

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    refuse_surrogates,
)
from llmlab.data.tokenizer_character import CharacterTokenizer


def train_tokenizer(
    config: TokenizerConfig,
    texts: Iterable[str],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """The tokenizer that `config` describes, trained on `texts`, or loaded if `config.file` names one.

    `progress` is called with the number of characters read so far, after each text. Memory is bounded by
    `config.sample_bytes`, however many texts there are, as long as no single one is too large for it.

    Raises:
      UserError: no text, a lone surrogate in it, or a vocabulary size that this text cannot give.
    """
    if config.file:
        return load_tokenizer(config.file)
    texts = _counted(texts, progress)
    if config.kind == "character":
        return _train_character(texts, config.markers())
    return SentencePieceTokenizer(_train_sentencepiece(config, _sample(texts, config.sample_bytes, seed)))


def _train_character(texts: Iterable[str], markers: tuple[str, ...]) -> CharacterTokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise UserError(_NO_TEXT)
    return CharacterTokenizer("".join(sorted(characters)), markers)


def _train_sentencepiece(config: TokenizerConfig, chunks: list[str]) -> bytes:
    if not chunks:
        raise UserError(_NO_TEXT)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentencepiece_length=24,
            max_sentence_length=4 * _CHUNK + 1,
            control_symbols=list(config.markers()),
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            unk_surface="\ufffd",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, config) from error
    return model.getvalue()


def _explained(error: RuntimeError, config: TokenizerConfig) -> Exception:
    given = f"data.tokenizer.vocab_size={config.vocab_size}"
    if found := re.search(r"Vocabulary size too high .* value <= (\d+)", str(error)):
        return UserError(f"{given} is more than this text can fill: at most {found[1]}, or give more text")
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return UserError(
            f"{given} is too small for the characters of this text: at least {int(found[1]) + 1}, or lower "
            f"data.tokenizer.character_coverage={config.character_coverage}"
        )
    return error


def _sample(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """All chunks of `texts`, or a uniform sample of them of at most `limit` bytes, in their order."""
    draw = random.Random(seed).random
    kept: list[tuple[float, int, int, str]] = []  # a heap: what was drawn lowest leaves first
    total = index = 0
    for text in texts:
        for chunk in _chunks(text):
            size = len(chunk.encode())
            heapq.heappush(kept, (draw(), index, size, chunk))
            total, index = total + size, index + 1
            while total > limit and len(kept) > 1:
                total -= heapq.heappop(kept)[2]
    return [chunk for _, _, _, chunk in sorted(kept, key=lambda item: item[1])]


def _chunks(text: str) -> Iterator[str]:
    """Cuts `text` at line ends where it can, leaving out the three characters that SentencePiece cannot learn."""
    for part in re.split("[\0\u2581\u2585]", text):
        start = 0
        while start < len(part):
            end = start + _CHUNK
            if end < len(part):
                end = (part.rfind("\n", start, end) + 1) or end
            yield part[start:end]
            start = end


def _counted(texts: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[str]:
    characters = 0
    for text in texts:
        refuse_surrogates(text)
        yield text
        characters += len(text)
        if progress:
            progress(characters)


_CHUNK = 2**13  # characters
_NO_TEXT = "there is no text to train a tokenizer on: check data.source and data.files"
