"""The engine: requests come and go while the batch runs.

Every row of the batch is a slot, with the keys and values of its request in pages. A step reads at most one piece of
one prompt, so that a long one does not stall the others, and draws one token for every request that is past its prompt.
The device is always one step ahead: what a step drew is looked at while the next one runs. A request's tokens depend on
its own prompt, settings and seed, whatever else is in the batch.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.core.errors import UserError
from llmlab.infer import engine_step as device
from llmlab.infer.decoder import Decoder, ready
from llmlab.infer.paging import Pages
from llmlab.infer.request import Event, Finish, Request
from llmlab.infer.speculative import look_up, propose
from llmlab.model.score import check_predicts_tokens
from llmlab.model.transformer import make_model
from llmlab.model.types import Model, Params

PATIENCE = 0.002  # seconds that a step waits for the limits of its rows, while the device runs the one before


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """slots: requests that run at once. page_size: tokens in a page. pages: 0 for as many as all slots can fill.
    prefill: tokens of a prompt that are read in one step. int8: keys and values in 8 bits, a scale for each token and
    head, where they lie in pages. reuse: keep pages for prompts that begin alike. guesses: tokens of a request that are
    guessed in a step, and checked at once; see `llmlab.infer.speculative`.
    """

    slots: int = 8
    page_size: int = 16
    pages: int = 0
    prefill: int = 128
    int8: bool = False
    reuse: bool = True
    guesses: int = 0

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("page_size", 1), ("pages", 0), ("prefill", 1), ("guesses", 0)):
            if getattr(self, name) < least:
                raise UserError(f"engine.{name}={getattr(self, name)} should be at least {least}")


@dataclasses.dataclass
class _Run:
    """A request on its way.

    tokens: the prompt, and what was drawn and looked at. waits_for: a request with the same prompt, which reads it
    first. cached: tokens in the cache, that of the step under way included. known: pages that others can find.
    reported: tokens of the prompt that have been given out. allowed: what its limit says of the next token.
    """

    number: int
    request: Request
    tokens: list[int]
    waits_for: "_Run | None" = None
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    cached: int = 0
    known: int = 0
    reported: int = 0
    allowed: np.ndarray | None = None

    @property
    def reads(self) -> bool:
        """Whether some of its tokens, but for the last, are not in the cache yet."""
        return self.slot >= 0 and self.cached < len(self.tokens) - 1


class _Flight(NamedTuple):
    """A step whose tokens were not looked at yet. counts: of each row, the guesses that went in, and one more."""

    runs: list[_Run]
    slots: list[int]
    counts: list[int]
    guess_RT: jax.Array | np.ndarray
    drawn: device.Drawn


class Engine:
    """Not thread-safe: one thread calls it.

    draft: a smaller model of the same vocabulary, and its parameters, which makes the guesses; None: they are looked up
    in the text. guessed, right: how many guesses there were, and how many of them were kept.

    Raises:
      UserError: a model that predicts no tokens, pages that do not hold one whole row, or guesses with layers whose
        state cannot be taken back.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        config: EngineConfig = EngineConfig(),
        *,
        draft: tuple[Model, Params] | None = None,
    ):
        check_predicts_tokens(model.config)
        if model.partition is not None:
            model = make_model(model.config, model.partition.with_whole_batch())
        self.config, self._model = config, model
        self.guessed = self.right = 0
        self._decoder = Decoder.of(model)
        self._reach = model.config.max_positions
        self._row_pages = -(-self._reach // config.page_size)
        pages = config.pages or config.slots * self._row_pages
        if pages < self._row_pages:
            raise UserError(
                f"engine.pages={pages} of {config.page_size} tokens do not hold one row of the model's {self._reach} "
                f"positions: give at least {self._row_pages}"
            )
        self.pages = Pages(pages, config.page_size)
        self._params, self._state = self._started(self._decoder, params, pages)
        # What rings and recurrent states hold of a row's beginning is gone once it has gone on.
        self._reuse = config.reuse and _all_in_pages(self._state)
        self._draft = self._drafter(draft, pages)
        if config.guesses and not _all_in_pages(self._state):
            raise UserError(
                "engine.guesses needs a model whose layers all look back to the beginning: what windows and recurrent "
                "states have read cannot be taken back; set it to 0"
            )
        self._free_slots = list(range(config.slots - 1, -1, -1))
        self._waiting: collections.deque[_Run] = collections.deque()
        self._running: list[_Run] = []
        self._flight: _Flight | None = None
        self._numbers = itertools.count()
        self._unsaid: list[Event] = []
        self._row_buckets = _buckets(1, config.slots)
        self._page_buckets = _buckets(8, self._row_pages)
        self._read_buckets = _buckets(32, min(config.prefill, self._reach))

    # --- what callers see ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, n: int = 1) -> list[int]:
        """The number of the request, by which its events are known; or of `n` like it with seed, seed + 1, …, for which
        the prompt is read once.

        Raises:
          UserError: the request can never be run.
        """
        self.check(request)
        first = _Run(next(self._numbers), request, list(request.prompt))
        runs = [first]
        for copy in range(1, n):
            sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + copy)
            limit = request.limit.fresh() if request.limit is not None else None
            like = dataclasses.replace(request, sampling=sampling, scored=False, limit=limit)
            runs.append(_Run(next(self._numbers), like, list(request.prompt), waits_for=first))
        self._waiting += runs
        return [run.number for run in runs]

    def check(self, request: Request) -> None:
        """Raises UserError where the request can never be run. Any thread may call this."""
        vocab, length = self._model.config.vocab_size, len(request.prompt)
        if min(request.prompt) < 0 or max(request.prompt) >= vocab:
            raise UserError(f"the prompt holds what is no id of this model: ids are integers from 0 to {vocab - 1}")
        if wrong := [id for id in request.sampling.bias if not 0 <= id < vocab]:
            raise UserError(f"a bias is for token {wrong[0]}, and ids are from 0 to {vocab - 1}")
        if length + request.max_tokens > self._reach:
            raise UserError(
                f"a prompt of {length} tokens and max_tokens={request.max_tokens} exceed the model's {self._reach} "
                f"positions: "
                + (f"ask for at most {self._reach - length}" if length < self._reach else "shorten the prompt")
            )

    def cancel(self, number: int) -> bool:
        """Ends a request, whose slot and pages are free at once; whether it was still there."""
        for run in (*self._waiting, *self._running):
            if run.number == number:
                self._end(run, "cancelled")
                return True
        return False

    def step(self) -> list[Event]:
        """What has been drawn, one step late; nothing comes where nothing is left to do."""
        self._admit()
        before, self._flight = self._flight, None
        self._read_one()
        rows = self._rows_to_draw(before)
        if rows:
            self._flight = self._draw(rows)
        if before is not None:
            self._look(before)
        if self._flight is not None and self.config.guesses:
            # What goes in next depends on which guesses were right.
            before, self._flight = self._flight, None
            self._look(before)
        events, self._unsaid = self._unsaid, []
        return events

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running or self._flight or self._unsaid)

    @property
    def load(self) -> dict[str, int]:
        """How many requests run and wait, and how many pages are in use."""
        return {
            "running": len(self._running),
            "waiting": len(self._waiting),
            "pages_used": self.pages.count - self.pages.available,
            "pages": self.pages.count,
        }

    def publish(self, params: Params) -> None:
        """Other weights of the same model from the next step on; what was kept of earlier prompts is forgotten."""
        self._params = ready(self._decoder, params)
        self.pages.forget()

    def compile(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compiles every shape that can come, so that no request waits for it; how many they are.

        They are kept in the compilation cache, where there is one. `progress` gets how many are done, of how many.
        """
        widths = {1, 1 + self.config.guesses}
        shapes = [(R, P, T, True) for P in self._page_buckets for R in self._row_buckets for T in sorted(widths)]
        shapes += [(1, P, T, False) for P in self._page_buckets for T in self._read_buckets]
        for number, (R, P, T, draws) in enumerate(shapes):
            rows = self._rows([], R, P)
            if draws:
                self._step(rows, self._wanted([], [], R, T))
            else:
                self._read(rows, np.zeros((1, T), np.int32), np.zeros(1, np.int32))
            progress(number + 1, len(shapes))
        jax.block_until_ready(self._state.last_B)
        return len(shapes)

    # --- what a step does ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Slots for those who wait, in their order; those whose prompt another one is reading wait on."""
        for run in list(self._waiting):
            leader = run.waits_for
            if leader is not None and leader.slot < 0 and leader not in self._waiting:
                leader = run.waits_for = None
            if leader is not None and leader.cached < len(leader.request.prompt) - 1:
                continue
            forks = leader is not None and leader.slot >= 0 and leader.cached == len(run.tokens) - 1 > 0
            needed = 1 if forks else -(-len(run.tokens) // self.config.page_size)
            if not self._free_slots or needed > self.pages.available:
                # A leader does not stay for those who cannot come.
                run.waits_for = None if forks else run.waits_for
                return
            self._waiting.remove(run)
            run.slot, run.waits_for = self._free_slots.pop(), None
            self._running.append(run)
            if forks:
                assert leader is not None
                self._fork(leader, run)
            elif self._reuse and not run.request.scored:
                run.digests = self.pages.digests(run.tokens[:-1])
                run.pages = self.pages.find(run.digests)
                run.cached = len(run.pages) * self.config.page_size
            if run.request.sampling.adjusts:
                self._load(run)

    def _fork(self, leader: _Run, run: _Run) -> None:
        whole = leader.cached // self.config.page_size
        run.pages = leader.pages[:whole]
        self.pages.share(run.pages)
        page = new_page = self.pages.count  # out of range
        if leader.cached % self.config.page_size:
            taken = self.pages.take()
            assert taken is not None
            page, new_page = leader.pages[whole], taken
            run.pages.append(taken)
        run.cached, run.digests = leader.cached, list(leader.digests)
        given = [np.int32(number) for number in (leader.slot, run.slot, page, new_page)]
        self._state = device.fork(self._state, *given)
        if self._draft is not None:
            decoder, params, state = self._draft
            self._draft = decoder, params, device.fork(state, *given)

    def _load(self, run: _Run) -> None:
        vocab, prompt = self._model.config.vocab_size, len(run.request.prompt)
        in_prompt, bias = np.zeros(vocab, bool), np.zeros(vocab, np.float32)
        in_prompt[list(run.request.prompt)] = True
        for id, value in run.request.sampling.bias.items():
            bias[id] = value
        count = np.bincount(np.asarray(run.tokens[prompt:], np.int64), minlength=vocab).astype(np.int32)
        self._state = device.load(self._state, np.int32(run.slot), in_prompt, count, bias)

    def _read_one(self) -> None:
        """A piece of the earliest prompt that is not read yet."""
        run = next((run for run in self._running if run.reads), None)
        if run is None:
            return
        piece = run.tokens[run.cached : min(run.cached + self.config.prefill, len(run.tokens) - 1)]
        if not self._reserve(run, run.cached + len(piece)):
            return
        tokens = np.zeros((1, _at_least(len(piece), self._read_buckets)), np.int32)
        tokens[0, : len(piece)] = piece
        rows, count = self._rows([run], 1), np.array([len(piece)], np.int32)
        following = None
        if run.reported < len(run.request.prompt) and run.request.scored:
            following = np.zeros_like(tokens)
            following[0, : len(piece)] = run.tokens[run.cached + 1 : run.cached + 1 + len(piece)]
        scored = self._read(rows, tokens, count, following)
        if scored is not None:
            self._report(run, run.cached + 1, jax.device_get(scored))
        run.cached += len(piece)
        self._know(run)

    def _report(self, run: _Run, begin: int, scored: device.Scored) -> None:
        """The tokens of a prompt from `begin` on, as far as they were scored and not reported before."""
        self._report_first(run)
        prompt, top = run.request.prompt, run.request.top
        if not run.reported:
            self._unsaid.append(Event(run.number, prompt[0], in_prompt=True))
            run.reported = 1
        for place in range(max(begin, run.reported), min(begin + scored.logp_RT.shape[1], len(prompt))):
            at = (0, place - begin)
            likeliest = zip(scored.top_RTK[at][:top].tolist(), scored.top_logp_RTK[at][:top].tolist(), strict=True)
            self._unsaid.append(
                Event(run.number, prompt[place], float(scored.logp_RT[at]), tuple(likeliest), in_prompt=True)
            )
            run.reported = place + 1

    def _report_first(self, run: _Run) -> None:
        """The token that nothing comes before, and that so has no log-probability."""
        if run.request.scored and not run.reported:
            self._unsaid.append(Event(run.number, run.request.prompt[0], in_prompt=True))
            run.reported = 1

    def _rows_to_draw(self, before: _Flight | None) -> list[_Run]:
        """Those whose next input is there, or on the device, with room for it.

        Where a limit takes long to say what may come next, its row waits for a later step, and the others go on.
        """
        patience = time.perf_counter() + PATIENCE
        flying = {run.number for run in before.runs if run.slot >= 0} if before is not None else set()
        rows: list[_Run] = []
        late: list[_Run] = []
        for run in list(self._running):
            if run.slot < 0 or run.reads:
                continue
            self._report_first(run)
            if run.request.max_tokens == 0:
                self._end(run, "length")
                continue
            drawn = len(run.tokens) - len(run.request.prompt) + (run.number in flying)
            limited = run.request.limit is not None and run.number in flying
            if drawn >= run.request.max_tokens or limited or self._leads(run):
                continue
            limit = run.request.limit
            if limit is not None and not limit.ready(max(0.0, patience - time.perf_counter())):
                late.append(run)
            elif self._may_draw(run):
                rows.append(run)
        if not rows and before is None:
            rows = [run for run in late if run.slot >= 0 and self._may_draw(run)]
        return [run for run in rows if run.slot >= 0]

    def _may_draw(self, run: _Run) -> bool:
        """Whether something can follow, and there is room for it."""
        if run.request.limit is not None:
            run.allowed = run.request.limit.allowed()
            if not run.allowed.any():
                self._end(run, "dead_end")
                return False
        return self._reserve(run, run.cached + 1)

    def _leads(self, run: _Run) -> bool:
        """Whether it should stay at the end of its prompt, for others to begin from there in the next step."""
        is_there = run.cached == len(run.request.prompt) - 1 == len(run.tokens) - 1 > 0
        return is_there and bool(self._free_slots) and any(other.waits_for is run for other in self._waiting)

    def _draw(self, runs: list[_Run]) -> _Flight:
        R = _at_least(len(runs), self._row_buckets)
        room = [self._room(run) for run in runs]
        inputs = [[run.tokens[run.cached] if run.cached < len(run.tokens) else -1] for run in runs]
        if self._draft is None:
            for run, given, most in zip(runs, inputs, room, strict=True):
                given += look_up(run.tokens, most) if most else []
            room = [len(given) - 1 for given in inputs]
        T = 1 + self.config.guesses if any(room) else 1
        rows, wanted = self._rows(runs, R), self._wanted(runs, inputs, R, T)
        counts = [1 + most for most in room]
        count_R = np.array(counts + [0] * (R - len(runs)), np.int32)
        wanted, drawn = self._step(rows, wanted._replace(count_R=jnp.asarray(count_R)))
        for run in runs:
            run.cached += 1
        self.guessed += sum(room)
        return _Flight(runs, [run.slot for run in runs], counts, wanted.token_RT[:, 1:], drawn)

    def _room(self, run: _Run) -> int:
        """How many tokens can be guessed for it, in the pages that are free."""
        request = run.request
        if not self.config.guesses or request.sampling.adjusts or request.limit is not None:
            return 0
        written = len(run.tokens) - len(request.prompt)
        most = min(self.config.guesses, request.max_tokens - written - 1)
        while len(run.pages) * self.config.page_size < run.cached + 1 + most and self.pages.available:
            page = self.pages.take()
            assert page is not None
            run.pages.append(page)
        return min(most, len(run.pages) * self.config.page_size - run.cached - 1)

    def _look(self, flight: _Flight) -> None:
        """At what a step has drawn, but for requests that have ended since, or lost their slot."""
        drawn, guess_RT = jax.device_get((flight.drawn, flight.guess_RT))
        for row, (run, slot, count) in enumerate(zip(flight.runs, flight.slots, flight.counts, strict=True)):
            if run.slot != slot:
                continue
            for place in range(count):
                self._take(run, drawn, (row, place))
                if run.slot < 0 or place + 1 == count or run.tokens[-1] != guess_RT[row, place]:
                    break
                run.cached += 1
                self.right += 1
            if run.slot >= 0:
                self._know(run)

    def _take(self, run: _Run, drawn: device.Drawn, at: tuple[int, int]) -> None:
        token, request = int(drawn.token_RT[at]), run.request
        run.tokens.append(token)
        if request.limit is not None:
            request.limit.accept(token)
        finish: Finish | None = None
        if token in request.stop_ids:
            finish = "stop"
        elif len(run.tokens) - len(request.prompt) >= request.max_tokens:
            finish = "length"
        top = zip(drawn.top_RTK[at][: request.top].tolist(), drawn.top_logp_RTK[at].tolist(), strict=False)
        self._unsaid.append(Event(run.number, token, float(drawn.logp_RT[at]), tuple(top), finish=finish))
        if finish:
            self._know(run)
            self._finish(run)

    # --- what the device does -----------------------------------------------------------------------------------------

    def _started(self, decoder: Decoder, params: Params, pages: int) -> tuple[Params, device.State]:
        c = self.config
        shape = dict(slots=c.slots, pages=pages, size=c.page_size, vocab=self._model.config.vocab_size)
        return ready(decoder, params), device.start(decoder, int8=c.int8, **shape)

    def _drafter(self, draft: tuple[Model, Params] | None, pages: int) -> tuple[Decoder, Params, device.State] | None:
        if draft is None:
            return None
        model, params = draft
        check_predicts_tokens(model.config)
        if model.config.vocab_size != self._model.config.vocab_size or model.config.max_positions < self._reach:
            raise UserError(
                f"the draft model has {model.config.vocab_size} tokens and {model.config.max_positions} positions, and "
                f"should have {self._model.config.vocab_size} and at least {self._reach}: choose another"
            )
        if model.partition is not None:
            model = make_model(model.config, model.partition.with_whole_batch())
        decoder = Decoder.of(model)
        params, state = self._started(decoder, params, pages)
        if not _all_in_pages(state):
            raise UserError("a draft model needs layers that all look back to the beginning: choose another")
        return decoder, params, state

    def _read(
        self, rows: device.Rows, tokens: np.ndarray, count: np.ndarray, following: np.ndarray | None = None
    ) -> device.Scored | None:
        given: Any = (rows, tokens, count)
        if self._draft is not None:
            decoder, params, state = self._draft
            self._draft = decoder, params, device.read(decoder, params, state, *given)
        if following is None:
            self._state = device.read(self._decoder, self._params, self._state, *given)
            return None
        self._state, scored = device.score(self._decoder, self._params, self._state, *given, following)
        return scored

    def _step(self, rows: device.Rows, wanted: device.Wanted) -> tuple[device.Wanted, device.Drawn]:
        """What went in, guesses of a draft model with it, and what was drawn."""
        if self._draft is not None and wanted.token_RT.shape[1] > 1:
            decoder, params, state = self._draft
            state, guess_RT = propose(decoder, params, state, rows, wanted, most=self.config.guesses)
            self._draft = decoder, params, state
            wanted = wanted._replace(token_RT=jnp.concatenate([wanted.token_RT[:, :1], guess_RT], axis=1))
        self._state, drawn = device.step(self._decoder, self._params, self._state, rows, wanted)
        return wanted, drawn

    # --- books --------------------------------------------------------------------------------------------------------

    def _reserve(self, run: _Run, tokens: int) -> bool:
        """Pages for so many tokens of a run, if need be those of the latest others, which begin again later."""
        while len(run.pages) * self.config.page_size < tokens:
            page = self.pages.take()
            if page is not None:
                run.pages.append(page)
                continue
            last = max(self._running, key=lambda other: other.number)
            self._put_back(last)
            if last is run:
                return False
        return True

    def _put_back(self, run: _Run) -> None:
        self._leave(run)
        run.cached, run.known, run.digests = 0, 0, []
        place = next((i for i, other in enumerate(self._waiting) if other.number > run.number), len(self._waiting))
        self._waiting.insert(place, run)

    def _end(self, run: _Run, finish: Finish) -> None:
        self._finish(run)
        self._unsaid.append(Event(run.number, finish=finish))

    def _finish(self, run: _Run) -> None:
        if run.slot < 0:
            self._waiting.remove(run)
        else:
            self._leave(run)

    def _leave(self, run: _Run) -> None:
        self._running.remove(run)
        self._free_slots.append(run.slot)
        self.pages.release(run.pages)
        run.slot, run.pages = -1, []

    def _know(self, run: _Run) -> None:
        """Its full pages can be found, where the tokens in them are known."""
        full = min(run.cached, len(run.tokens)) // self.config.page_size
        if not self._reuse or full <= run.known:
            return
        run.digests = self.pages.digests(run.tokens[: full * self.config.page_size], run.digests)
        for place in range(run.known, full):
            self.pages.know(run.pages[place], run.digests[place])
        run.known = full

    def _rows(self, runs: Sequence[_Run], R: int, pages: int = 0) -> device.Rows:
        most = max((len(run.pages) for run in runs), default=0)
        table = np.full((R, pages or _at_least(most, self._page_buckets)), self.pages.count, np.int32)
        slot, length = np.full(R, self.config.slots, np.int32), np.zeros(R, np.int32)
        for row, run in enumerate(runs):
            slot[row], length[row] = run.slot, run.cached
            table[row, : len(run.pages)] = run.pages
        return device.Rows(slot, length, table)  # type: ignore[arg-type]

    def _wanted(self, runs: Sequence[_Run], inputs: Sequence[list[int]], R: int, T: int) -> device.Wanted:
        def of(name: str, off: float, dtype: Any = np.float32) -> Any:
            values = np.full(R, off, dtype)
            values[: len(runs)] = [getattr(run.request.sampling, name) for run in runs]
            return values

        token, count, limited = np.zeros((R, T), np.int32), np.zeros(R, np.int32), np.zeros(R, bool)
        allowed = np.zeros((R, -(-self._model.config.vocab_size // 32)), np.uint32)
        seed, top = np.zeros(R, np.uint32), np.zeros(R, bool)
        for row, (run, given) in enumerate(zip(runs, inputs, strict=True)):
            token[row, : len(given)], count[row] = given, len(given)
            seed[row], top[row] = run.request.sampling.seed % 2**32, run.request.top > 0
            if run.allowed is not None:
                limited[row], allowed[row] = True, run.allowed
        settings = (
            *(of("temperature", 0), of("top_k", 0, np.int32), of("top_p", 1), of("min_p", 0)),
            *(of("repetition", 1), of("presence", 0), of("frequency", 0), of("adjusts", False, bool)),
        )
        arrays: Any = (token, count, seed, *settings, limited, allowed, top)
        return device.Wanted(*arrays)


def _all_in_pages(state: device.State) -> bool:
    return all(isinstance(kept, device.Pool) for layer in state.layers for kept in layer.values())


def _buckets(least: int, most: int) -> list[int]:
    """least, four times that, and so on below `most`, and `most`."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(4 * sizes[-1])
    return [*sizes[:-1], most]


def _at_least(size: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if bucket >= size)
