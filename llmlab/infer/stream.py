"""Tokens to text as they come, and what `llmlab sample` prints."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from llmlab.data.tokenizer import Tokenizer
from llmlab.infer.generate import stream
from llmlab.infer.text_stream import TextStream
from llmlab.workdir.open import Opened


def text_of(ids: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of `ids`, in pieces that split neither a character nor a stop string.

    Ends before the first stop string. Bytes that are no UTF-8, or end in the middle of a character, give U+FFFD.
    """
    text = TextStream(tokenizer, stop)
    for id in ids:
        if piece := text.add(id):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece


def sample_command(
    opened: Opened,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    out: TextIO,
) -> None:
    """Writes the prompt and what the model makes of it to `out` as it comes, and the speed to stderr.

    Raises:
      UserError: a setting out of its range, or a prompt that leaves no room for `max_tokens`.
    """
    tokenizer = opened.tokenizer
    ids = stream(
        opened.model,
        opened.params,
        [tokenizer.bos_id, *tokenizer.encode(prompt)],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_ids=[tokenizer.eos_id],
    )
    arrivals: list[float] = []

    def timed() -> Iterator[int]:
        for id in ids:
            arrivals.append(time.perf_counter())
            yield id

    out.write(prompt)
    for piece in text_of(timed(), tokenizer):
        out.write(piece)
        out.flush()
    out.write("\n")
    if len(arrivals) > 1:
        speed = (len(arrivals) - 1) / (arrivals[-1] - arrivals[0])
        print(f"{len(arrivals)} tokens, {speed:.1f} tokens/s after the first", file=sys.stderr)
