"""Budget forcing (s1: Muennighoff et al., arXiv 2501.19393): how long a model thinks before it answers.

A turn thinks once, at its beginning. What s1 reaches by writing into the model's turn is a limit here: no token but
the marker may come where a span has to begin or to end, and none but text within it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from llmlab.core.errors import UserError
from llmlab.data.tokenizer import Tokenizer
from llmlab.infer.request import Limit, token_bits
from llmlab.infer.spoken import texts_of

_MARKERS = (("<|think|>", "<|/think|>"), ("<think>", "</think>"))  # ours, and those of published models


class Thinking:
    """How the models of one tokenizer think, with `vocab_size` logits. Several threads may share it.

    `stop_ids` are what the requests end with; none of them comes while a model thinks.

    Raises:
      UserError: the tokenizer has no ids for the beginning and the end of thinking.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]):
        self.begin, self.end = thinking_markers(tokenizer)
        self.stop_ids = tuple(stop_ids)
        texts = texts_of(tokenizer, vocab_size, stop_ids)
        text = [id for id, each in enumerate(texts) if each]
        self.begin_W, self.end_W = (token_bits([id], vocab_size) for id in (self.begin, self.end))
        self.text_W = token_bits(text, vocab_size)
        self.answer_W = token_bits(range(vocab_size), vocab_size) & ~(self.begin_W | self.end_W)

    def budget(
        self, prompt: Sequence[int], least: int = 0, most: int | None = None, answer: Limit | None = None
    ) -> "ThinkingBudget":
        """From `least` to `most` tokens of thinking, markers not counted, after a prompt; then `answer`, if anything,
        limits what follows.

        With `least` above 0 the turn begins with thinking, unless the prompt has begun it. With `most` 0 it does not
        think: thinking that the prompt has begun ends at once. None is no bound.

        Raises:
          UserError: `least` is below 0, or `most` below `least`.
        """
        if least < 0 or (most is not None and most < least):
            raise UserError(f"thinking from {least} to {most} tokens: give two numbers, from 0 on, that rise")
        marks = {self.begin, self.end, *self.stop_ids}
        begun = next((id for id in reversed(prompt) if id in marks), None) == self.begin
        return ThinkingBudget(self, begun, least, most, answer)


class ThinkingBudget:
    """What may come next in one request; see `llmlab.infer.request.Limit`, and `Thinking.budget`."""

    def __init__(self, thinking: Thinking, begun: bool, least: int, most: int | None, answer: Limit | None):
        self._thinking, self._begun, self._least, self._most = thinking, begun, least, most
        self._answer = answer
        self._at: Literal["start", "thought", "answer"] = "thought" if begun else "start"
        self._count = 0  # tokens of the thought

    def fresh(self) -> "ThinkingBudget":
        answer = None if self._answer is None else self._answer.fresh()
        return ThinkingBudget(self._thinking, self._begun, self._least, self._most, answer)

    def ready(self, within: float) -> bool:
        return self._answer is None or not self._may_answer or self._answer.ready(within)

    def allowed(self) -> np.ndarray:
        marks = self._thinking
        if self._at == "thought":
            if self._count < self._least:
                return marks.text_W
            return marks.end_W if self._count == self._most else marks.text_W | marks.end_W
        if not self._may_answer:
            return marks.begin_W
        answer_W = marks.answer_W if self._answer is None else self._answer.allowed()
        return answer_W | marks.begin_W if self._at == "start" and self._most != 0 else answer_W

    def accept(self, token: int) -> None:
        if self._at == "start" and token == self._thinking.begin:
            self._at = "thought"
        elif self._at == "thought":
            if token == self._thinking.end:
                self._at = "answer"
            else:
                self._count += 1
        else:
            self._at = "answer"
            if self._answer is not None:
                self._answer.accept(token)

    @property
    def _may_answer(self) -> bool:
        """Whether the next token may be one of the answer."""
        return self._at == "answer" or (self._at == "start" and not self._least)


def thinking_markers(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the beginning and of the end of thinking.

    Raises:
      UserError: the tokenizer has none.
    """
    for pair in _MARKERS:
        ids = [[tokenizer.control[name]] if name in tokenizer.control else tokenizer.encode(name) for name in pair]
        if all(len(spelt) == 1 for spelt in ids):
            return ids[0][0], ids[1][0]
    raise UserError(
        "this tokenizer has no ids for the beginning and the end of thinking, <|think|> and <|/think|> or <think> and "
        "</think>: leave the budget out, or train a tokenizer with data.tokenizer.chat_markers=True"
    )
