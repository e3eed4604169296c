"""What the model writes after a prompt, as a file to read beside the curves."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from llmlab.core.paths import write_atomic
from llmlab.data.tokenizer import Tokenizer
from llmlab.eval.likelihood import fit
from llmlab.infer.generate import complete
from llmlab.model.types import Model, Params


def write_samples(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    path: str | os.PathLike[str],
) -> list[str]:
    """The continuation of each prompt, also written to `path` with its prompt. On several hosts, all call this.

    A prompt that leaves no room for `max_tokens` in the model's positions loses its beginning.

    Raises:
      DiskFull: no room for the file.
    """
    room = model.config.max_positions - max_tokens
    ids = [fit([tokenizer.bos_id, *tokenizer.encode(prompt)], room)[0] for prompt in prompts]
    seeds = range(seed, seed + len(ids))
    written = complete(
        model, params, ids, max_tokens=max_tokens, temperature=temperature, seeds=seeds, stop_ids=[tokenizer.eos_id]
    )
    texts = [tokenizer.decode(row) for row in written]
    if jax.process_index() == 0:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _page(prompts, texts).encode())
    return texts


def _page(prompts: Sequence[str], texts: Sequence[str]) -> str:
    parts = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        parts.append(f"=== prompt {number} ===\n{prompt}\n--- the model goes on ---\n{text}\n")
    return "\n".join(parts)
