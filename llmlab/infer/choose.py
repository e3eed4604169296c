"""Several answers, and one to choose: by what most of them come to, by a reward, or by both.

Self-consistency (Wang et al., arXiv 2203.11171), best-of-n (Stiennon et al., arXiv 2009.01325) and votes that weigh as
much as their rewards (Li et al., arXiv 2206.02336), which a reward that likes some wrong answers misleads less.
"""

import collections
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from llmlab.data.chat import Message, template_for
from llmlab.model.types import Inputs, Params
from llmlab.objective.base import target_logps
from llmlab.objective.preference import PER_TOKEN
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


def shares(answers: Sequence[str | None], rewards: ArrayLike) -> list[float]:
    """Of each answer: what share of all rewards those have that come to the same, itself included; 0 of None.

    A reward counts as e^reward, the strength that a reward model of pairs learns (Bradley & Terry 1952).
    """
    finite_N = np.where([answer is None for answer in answers], -np.inf, np.asarray(rewards, np.float64))
    if not np.isfinite(finite_N).any():
        return [0.0] * len(answers)
    strength_N = np.exp(finite_N - finite_N.max())
    of_answer: collections.Counter[str | None] = collections.Counter()
    for answer, strength in zip(answers, strength_N, strict=True):
        of_answer[answer] += strength
    return [float(of_answer[answer] / strength_N.sum()) for answer in answers]


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order; 1,234.50 is 1234.50."""
    found = re.findall(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text)
    return [Decimal(digits.replace(",", "")) for digits in found]


class Judge:
    """A model that gives whole conversations a reward.

    Of a reward model that is the score of their last token; of a model that predicts tokens the log-probability of
    their last turn, or, where the objective of its run compares means over tokens, its mean.

    Raises:
      UserError: the model's tokenizer has no chat template.
    """

    def __init__(self, opened: Opened):
        model, self._params, self._template = opened.model, opened.params, template_for(opened.tokenizer)
        partition = model.partition
        self._scores = model.config.head == "score"
        self._mean = opened.config.get("objective", {}).get("kind") in PER_TOKEN
        self._reach = model.config.max_positions
        devices, self._pieces = (1, 1) if partition is None else (partition.size("batch"), partition.size("time"))
        self._rows = -(-BATCH // devices) * devices
        self._sharding = None if partition is None else partition.sharding("batch", "time")

        def rewards(params: Params, inputs: Inputs, targets_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
            hidden_BTD = model.apply(params, inputs).hidden_BTD
            if self._scores:
                reward_BT = model.score(params, hidden_BTD)
            else:
                reward_BT = target_logps(model, params, hidden_BTD, targets_BT, "auto").logp_BT
            return jnp.sum(jnp.where(weight_BT > 0, weight_BT * reward_BT, 0), axis=1)

        self._rewards = jax.jit(rewards, out_shardings=None if partition is None else partition.sharding())

    def scores(
        self, conversations: Sequence[Sequence[Message]], progress: Callable[[int], None] = lambda done: None
    ) -> np.ndarray:
        """The reward of each, float64 [N].

        -inf where the positions do not reach it, nothing of it was said, or the model gives no number.
        """
        weighted = [self._weighted(conversation) for conversation in conversations]
        ids = [each for each, _ in weighted]
        scores_N = np.full(len(ids), -np.inf)
        judged = [i for i, (each, weight) in enumerate(weighted) if len(each) <= self._reach and any(weight)]
        order = sorted(judged, key=lambda i: -len(ids[i]))
        for begin in range(0, len(order), self._rows):
            chosen = order[begin : begin + self._rows]
            width = min(self._reach, max(SHORTEST, 1 << (len(ids[chosen[0]]) - 1).bit_length()))
            shape = self._rows, -(-width // self._pieces) * self._pieces
            tokens_BT, targets_BT, is_real_BT = (np.zeros(shape, np.int32) for _ in range(3))
            weight_BT = np.zeros(shape, np.float32)
            for row, place in enumerate(chosen):
                size = len(ids[place])
                tokens_BT[row, :size], is_real_BT[row, :size], weight_BT[row, :size] = ids[place], 1, weighted[place][1]
                targets_BT[row, : size - 1] = ids[place][1:]
            positions_BT = np.broadcast_to(np.minimum(np.arange(shape[1], dtype=np.int32), self._reach - 1), shape)
            given = (tokens_BT, positions_BT, is_real_BT, targets_BT, weight_BT)
            *read, targets, weight = jax.device_put(given, self._sharding)
            scores_B = jax.device_get(self._rewards(self._params, Inputs(*read), targets, weight))
            scores_N[chosen] = np.asarray(scores_B, np.float64)[: len(chosen)]
            scores_N[~np.isfinite(scores_N)] = -np.inf
            progress(begin + len(chosen))
        return scores_N

    def _weighted(self, conversation: Sequence[Message]) -> tuple[list[int], list[float]]:
        """The ids, and the weight that what the model gives at each has in the reward."""
        *before, last = (turn._replace(train=False) for turn in conversation)
        if self._scores:
            ids = self._template.render([*before, last]).ids
            return ids, [*[0.0] * (len(ids) - 1), 1.0]
        ids, mask, _ = self._template.render([*before, last._replace(train=True)])
        one = 1 / max(1, sum(mask)) if self._mean else 1.0
        return ids, [*(one * said for said in mask[1:]), 0.0]
