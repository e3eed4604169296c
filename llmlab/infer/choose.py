"""Several answers, and one to choose: by what most of them come to, or by a reward model.

Self-consistency (Wang et al., arXiv 2203.11171) and best-of-n (Stiennon et al., arXiv 2009.01325).
"""

import collections
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.data.chat import Message, template_for
from llmlab.model.score import check_scores
from llmlab.model.types import Inputs, Params
from llmlab.workdir.open import Opened

BATCH = 16
SHORTEST = 32


def final_answer(text: str) -> str | None:
    """What a text comes to: its last number, else all of it, but for case, blanks and a full stop; None of nothing."""
    if found := numbers(text):
        digits = f"{found[-1]:f}"
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return "0" if digits == "-0" else digits
    return " ".join(text.casefold().split()).rstrip(". ") or None


def majority(answers: Sequence[str | None]) -> int:
    """The place of the first answer that most others agree with; None counts only where there is nothing else."""
    return int(np.argmax(votes(answers)))


def votes(answers: Sequence[str | None]) -> list[int]:
    """How many answers come to the same as each, itself included; 0 of None."""
    counts = collections.Counter(answers)
    counts[None] = 0
    return [counts[answer] for answer in answers]


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order; 1,234.50 is 1234.50."""
    found = re.findall(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text)
    return [Decimal(digits.replace(",", "")) for digits in found]


class Judge:
    """A reward model, asked about whole conversations.

    Raises:
      UserError: a model that predicts tokens, or whose tokenizer has no chat template.
    """

    def __init__(self, opened: Opened):
        check_scores(opened.model.config)
        model, self._params, self._template = opened.model, opened.params, template_for(opened.tokenizer)
        partition = model.partition
        self._reach = model.config.max_positions
        devices, self._pieces = (1, 1) if partition is None else (partition.size("batch"), partition.size("time"))
        self._rows = -(-BATCH // devices) * devices
        self._sharding = None if partition is None else partition.sharding("batch", "time")

        def last_scores(params: Params, inputs: Inputs) -> jax.Array:
            score_BT = model.score(params, model.apply(params, inputs).hidden_BTD)
            last_B = jnp.sum(inputs.segment_ids_BT, axis=1) - 1
            is_last_BT = jnp.arange(score_BT.shape[1])[None] == last_B[:, None]
            return jnp.sum(jnp.where(is_last_BT, score_BT, 0), axis=1)

        self._last_scores = jax.jit(last_scores, out_shardings=None if partition is None else partition.sharding())

    def scores(
        self, conversations: Sequence[Sequence[Message]], progress: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """The reward of each, float64 [N]: the score of its last token.

        -inf where the positions do not reach it, or the model gives no number.
        """
        ids = [
            self._template.render([turn._replace(train=False) for turn in conversation]).ids
            for conversation in conversations
        ]
        scores_N = np.full(len(ids), -np.inf)
        order = sorted((i for i in range(len(ids)) if len(ids[i]) <= self._reach), key=lambda i: -len(ids[i]))
        for begin in range(0, len(order), self._rows):
            chosen = order[begin : begin + self._rows]
            width = min(self._reach, max(SHORTEST, 1 << (len(ids[chosen[0]]) - 1).bit_length()))
            shape = self._rows, -(-width // self._pieces) * self._pieces
            tokens_BT, is_real_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            for row, place in enumerate(chosen):
                tokens_BT[row, : len(ids[place])], is_real_BT[row, : len(ids[place])] = ids[place], 1
            positions_BT = np.broadcast_to(np.minimum(np.arange(shape[1], dtype=np.int32), self._reach - 1), shape)
            inputs = Inputs(*jax.device_put((tokens_BT, positions_BT, is_real_BT), self._sharding))
            scores_B = jax.device_get(self._last_scores(self._params, inputs))
            scores_N[chosen] = np.asarray(scores_B, np.float64)[: len(chosen)]
            scores_N[np.isnan(scores_N)] = -np.inf
            progress(begin + len(chosen))
        return scores_N
