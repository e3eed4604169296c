"""What the engine has on the device: the model and what it keeps of every slot, and those of a draft model, if any."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.errors import UserError
from llmlab.infer import engine_step
from llmlab.infer.decoder import Decoder, ready
from llmlab.infer.engine_step import Drawn, Rows, Scored, State, Wanted
from llmlab.infer.speculative import propose
from llmlab.model.pages import Pool
from llmlab.model.score import check_predicts_tokens
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Params


class Loaded(NamedTuple):
    """A model's parameters ready for steps, and its state."""

    decoder: Decoder
    params: Params
    state: State

    @property
    def all_in_pages(self) -> bool:
        """Whether no layer keeps anything else, such as a window or a recurrent state."""
        return all(isinstance(kept, Pool) for layer in self.state.layers for kept in layer.values())


class Device:
    """Prompts are read into both models; the draft makes `guesses` at once, and misses what is drawn without any.

    Raises:
      UserError: a model that predicts no tokens, or guesses with layers whose state cannot be taken back.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        draft: tuple[Model, Params] | None,
        *,
        slots: int,
        pages: int,
        page_size: int,
        int8: bool,
        guesses: int,
    ):
        def load(model: Model, params: Params) -> Loaded:
            check_predicts_tokens(model.config)
            if model.partition is not None:
                model = make_model(model.config, model.partition.with_whole_batch())
            decoder, vocab = Decoder.of(model), model.config.vocab_size
            state = engine_step.start(decoder, slots=slots, pages=pages, size=page_size, int8=int8, vocab=vocab)
            params = ready(decoder, params)
            if model.partition is None:
                # Bound to the device, as what a step leaves is: the first step would else be compiled for itself alone.
                state = jax.device_put(state, *jax.tree.leaves(params)[0].devices())
            return Loaded(decoder, params, state)

        self._main, self._draft, self._guesses = load(model, params), None, guesses
        if guesses and not self._main.all_in_pages:
            raise UserError(
                "engine.guesses needs a model whose layers all look back to the beginning: what windows and recurrent "
                "states have read cannot be taken back; set it to 0"
            )
        if draft is not None:
            wanted, has = model.config, draft[0].config
            if has.vocab_size != wanted.vocab_size or has.max_positions < wanted.max_positions:
                raise UserError(
                    f"the draft model has {has.vocab_size} tokens and {has.max_positions} positions, and should have "
                    f"{wanted.vocab_size} and at least {wanted.max_positions}: choose another"
                )
            self._draft = load(*draft)
            if not self._draft.all_in_pages:
                raise UserError("a draft model needs layers that all look back to the beginning: choose another")

    @property
    def all_in_pages(self) -> bool:
        """Whether what is kept of a row's beginning can be used by other rows, and what is kept of its end dropped."""
        return self._main.all_in_pages

    @property
    def drafts(self) -> bool:
        """Whether a model makes the guesses."""
        return self._draft is not None

    def read(self, rows: Rows, tokens_RT: np.ndarray, count_R: np.ndarray, wanted: Wanted) -> Drawn:
        """Tokens into the cache, and the one after them for rows that want one."""
        given: Any = (rows, tokens_RT, count_R)
        self._feed_draft(*given)
        state, drawn = engine_step.read(*self._main, *given, wanted)
        self._main = self._main._replace(state=state)
        return drawn

    def score(self, rows: Rows, tokens_RT: np.ndarray, count_R: np.ndarray, following_RT: np.ndarray) -> Scored:
        """Tokens into the cache, and how likely those that follow were."""
        given: Any = (rows, tokens_RT, count_R)
        self._feed_draft(*given)
        state, scored = engine_step.score(*self._main, *given, following_RT)
        self._main = self._main._replace(state=state)
        return scored

    def _feed_draft(self, rows: Rows, tokens_RT: jax.Array, count_R: jax.Array) -> None:
        if self._draft is not None:
            self._draft = self._draft._replace(state=engine_step.feed(*self._draft, rows, tokens_RT, count_R))

    def step(self, rows: Rows, wanted: Wanted, steps: int = 1) -> tuple[Wanted, Drawn]:
        """What went in, with the guesses of the draft model where there is room for some; and what was drawn, in so
        many steps.
        """
        if self._draft is not None and wanted.token_RT.shape[1] > 1:
            state, guess_RT = propose(*self._draft, rows, wanted, most=self._guesses)
            self._draft = self._draft._replace(state=state)
            wanted = wanted._replace(token_RT=jnp.concatenate([wanted.token_RT[:, :1], guess_RT], axis=1))
        state, drawn = engine_step.step(*self._main, rows, wanted, steps=steps)
        self._main = self._main._replace(state=state)
        return wanted, drawn

    def fork(self, slot: int, new_slot: int, page: int, new_page: int) -> None:
        """A slot that goes on from where another is, and a page from where another is; pages out of range are none."""
        given: Any = [np.int32(number) for number in (slot, new_slot, page, new_page)]
        self._main = self._main._replace(state=engine_step.fork(self._main.state, *given))
        if self._draft is not None:
            self._draft = self._draft._replace(state=engine_step.fork(self._draft.state, *given))

    def load(self, slot: int, in_prompt_V: np.ndarray, count_V: np.ndarray, bias_V: np.ndarray) -> None:
        """What penalties and biases are to know of a slot."""
        given: Any = (np.int32(slot), in_prompt_V, count_V, bias_V)
        self._main = self._main._replace(state=engine_step.load(self._main.state, *given))

    def publish(self, params: Params) -> None:
        """Other weights of the same model."""
        self._main = self._main._replace(params=ready(self._main.decoder, params))

    def wait(self) -> None:
        """Until all that was asked for is done."""
        jax.block_until_ready(self._main.state.last_B)
