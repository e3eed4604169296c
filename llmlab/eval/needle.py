"""A needle in a haystack: does a model find one sentence again, by how deep it lies and how long the text is?

Held-out text hides a sentence such as "The secret number of Lisbon is 48213.", and ends by asking for it. A needle is
found where every token of the answer is the likeliest (what greedy decoding would write); `nats` is the mean of
-log p of the answer's tokens. After G. Kamradt's test (2023).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import Tokenizer
from llmlab.model.transformer import unembed
from llmlab.model.types import Inputs, Model, Params

PLACES = ("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Cairo", "Lima", "Riga", "Accra", "Perth")
NEEDLE = "\nThe secret number of {place} is {number}.\n"
QUESTION = "\nThe secret number of {place} is"


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """lengths: tokens of whole prompts. depths: so many, from the beginning (0) to the end (1). samples: at each."""

    lengths: tuple[int, ...]
    depths: int = 5
    samples: int = 8
    seed: int = 0
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--needle_{name}={getattr(self, name)} should be at least 1")

    @property
    def places(self) -> list[float]:
        """The depths, as shares of the haystack."""
        return [0.5] if self.depths == 1 else [depth / (self.depths - 1) for depth in range(self.depths)]


def needle(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    haystack: Sequence[int],
    config: NeedleConfig,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """{"lengths", "depths", "found", "nats"}: tables by depth, then length; `found` is a share of the samples.

    Args:
      haystack: ids of held-out text, more than the longest prompt.

    Raises:
      UserError: a length that the model's positions do not reach, that holds no needle, or that the text does not fill.
    """
    _check(model, tokenizer, haystack, config)
    score = _scorer(model)
    table = {name: np.zeros((config.depths, len(config.lengths))) for name in ("found", "nats")}
    done = 0
    for column, length in enumerate(config.lengths):
        prompts = [
            (row, *_prompt(tokenizer, haystack, length, depth, np.random.default_rng([config.seed, sample, row])))
            for row, depth in enumerate(config.places)
            for sample in range(config.samples)
        ]
        for begin in range(0, len(prompts), config.batch_size):
            rows, batch = prompts[begin : begin + config.batch_size], config.batch_size
            found_B, nats_B = score(params, *_arrays([row[1:] for row in rows], batch, length))
            for (row, _, _), found, nats in zip(rows, np.asarray(found_B), np.asarray(nats_B), strict=False):
                table["found"][row, column] += float(found) / config.samples
                table["nats"][row, column] += float(nats) / config.samples
            done += len(rows)
            progress(done)
    return {
        "lengths": list(config.lengths),
        "depths": config.places,
        **{name: values.tolist() for name, values in table.items()},
    }


def text_table(result: dict[str, Any]) -> str:
    """The share found, by depth down and by length across."""
    head = "needle found    " + "".join(f"{length:>8,}" for length in result["lengths"]) + "  tokens"
    rows = [
        f"  at depth {depth:4.0%}  " + "".join(f"{share:>8.0%}" for share in shares)
        for depth, shares in zip(result["depths"], result["found"], strict=True)
    ]
    nats = "  nats a token  " + "".join(f"{mean:>8.2f}" for mean in np.mean(result["nats"], axis=0))
    return "\n".join([head, *rows, nats])


def _check(model: Model, tokenizer: Tokenizer, haystack: Sequence[int], config: NeedleConfig) -> None:
    least = 2 * len(tokenizer.encode(NEEDLE.format(place=PLACES[0], number=10_000))) + 8
    for length in config.lengths:
        if not least <= length <= model.config.max_positions:
            raise UserError(
                f"--needle_lengths={length} should be from {least} (needle and question) to "
                f"model.max_positions={model.config.max_positions}"
            )
        if length > len(haystack):
            raise UserError(f"--needle_lengths={length}: the text has {len(haystack)} tokens only: give more --files")


def _prompt(
    tokenizer: Tokenizer, haystack: Sequence[int], length: int, depth: float, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """(prompt, answer), together `length` + 1 tokens: the last one is only predicted."""
    place, number = str(rng.choice(PLACES)), int(rng.integers(10_000, 100_000))
    hidden = tokenizer.encode(NEEDLE.format(place=place, number=number))
    # What follows the question in one text: encoded alone, many tokenizers would begin the answer as they do a text.
    alone, asked = (tokenizer.encode(QUESTION.format(place=place) + more) for more in ("", f" {number}"))
    shared = next((i for i, pair in enumerate(zip(alone, asked, strict=False)) if pair[0] != pair[1]), len(alone))
    question, answer = asked[:shared], asked[shared:]
    room = length - len(hidden) - len(question) - len(answer)
    begin = int(rng.integers(len(haystack) - room + 1))
    hay = list(haystack[begin : begin + room])
    cut = round(depth * room)
    return [tokenizer.bos_id, *hay[:cut], *hidden, *hay[cut:], *question], answer


def _arrays(pairs: Sequence[tuple[list[int], list[int]]], batch: int, length: int) -> tuple[np.ndarray, ...]:
    """tokens_BT, and of each answer's tokens: where they are predicted, what they are, and whether they are there."""
    most = max(len(answer) for _, answer in pairs)
    tokens_BT = np.zeros((batch, length), np.int32)
    index_BA, target_BA, there_BA = (np.zeros((batch, most), np.int32) for _ in range(3))
    for row, (prompt, answer) in enumerate(pairs):
        tokens_BT[row] = [*prompt, *answer][:-1]
        index_BA[row, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
        target_BA[row, : len(answer)], there_BA[row, : len(answer)] = answer, 1
    return tokens_BT, index_BA, target_BA, there_BA


def _scorer(model: Model) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, arrays) -> (found_B, nats_B)."""

    @jax.jit
    def score(
        params: Params, tokens_BT: jax.Array, index_BA: jax.Array, target_BA: jax.Array, there_BA: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        hidden_BTD = model.apply(params, Inputs(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))).hidden_BTD
        hidden_BAD = jnp.take_along_axis(hidden_BTD, index_BA[..., None], axis=1)
        logp_BAV = jax.nn.log_softmax(unembed(hidden_BAD, model.head(params), model.config.logit_softcap))
        logp_BA = jnp.take_along_axis(logp_BAV, target_BA[..., None], axis=-1)[..., 0]
        right_BA = (jnp.argmax(logp_BAV, axis=-1) == target_BA) | (there_BA == 0)
        return jnp.all(right_BA, axis=1), -jnp.sum(logp_BA * there_BA, axis=1) / jnp.sum(there_BA, axis=1)

    return score
