"""The engine: requests come and go while the batch runs.

Every row of the batch is a slot, with the keys and values of its request in pages. A step reads at most one piece of
one prompt, so that a long one does not stall the others, and draws one token for every request that is past its prompt,
or as many as the config's `steps` where there is no prompt to read. The device is always one step ahead: what a step
drew is looked at while the next one runs. Only the token that is drawn as the last piece of a prompt is read, where
nothing else has to be asked first, is looked at as soon as it is there. A request's tokens depend on its own prompt,
settings and seed, whatever else is in the batch, but for the rounding of sums.
"""

import collections
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from llmlab.core.errors import UserError
from llmlab.infer.engine_device import Device
from llmlab.infer.engine_run import Flight, Run, Shapes, at_least, buckets
from llmlab.infer.engine_step import Drawn, Scored
from llmlab.infer.paging import Pages
from llmlab.infer.request import Event, Finish, Request
from llmlab.model.cache import loops_over_pages
from llmlab.model.types import Model, Params

NEVER = sys.maxsize  # pages that a request has to fill before any of them is known
PATIENCE = 0.002  # seconds that a step waits for the limits of its rows, while the device runs the one before


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """slots: requests that run at once. page_size: tokens in a page. pages: 0 for as many as all slots can fill.
    prefill: tokens of a prompt that are read in one step. int8: keys and values in 8 bits, a scale for each token and
    head, where they lie in pages. reuse: keep pages for prompts that begin alike. guesses: tokens of a request that are
    guessed in a step, and checked at once; see `llmlab.infer.speculative`. steps: tokens of each request that are drawn
    in one call of the device where no prompt is to be read, which takes less time for all; but whoever comes meanwhile
    waits for the end of it, tokens come in bursts, and some are drawn in vain after a stop.
    """

    slots: int = 8
    page_size: int = 16
    pages: int = 0
    prefill: int = 128
    int8: bool = False
    reuse: bool = True
    guesses: int = 0
    steps: int = 1

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("page_size", 1), ("pages", 0), ("prefill", 1), ("guesses", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"engine.{name}={getattr(self, name)} should be at least {least}")
        if self.guesses and self.steps > 1:
            raise UserError("engine.guesses and engine.steps both draw several tokens in a call: set steps to 1")


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
        self.config, self._vocab, self._reach = config, model.config.vocab_size, model.config.max_positions
        self.guessed = self.right = self._passed_over = 0
        row_pages = -(-self._reach // config.page_size)
        pages = config.pages or config.slots * row_pages
        if pages < row_pages:
            raise UserError(
                f"engine.pages={pages} of {config.page_size} tokens do not hold one row of the model's {self._reach} "
                f"positions: give at least {row_pages}"
            )
        self.pages = Pages(pages, config.page_size)
        of_device = {name: getattr(config, name) for name in ("slots", "page_size", "int8", "guesses")}
        self._device = Device(model, params, draft, pages=pages, **of_device)
        # What rings and recurrent states hold of a row's beginning is gone once it has gone on.
        self._reuse = config.reuse and self._device.all_in_pages
        reads = buckets(32, min(config.prefill, self._reach))

        def tables(rows: int) -> list[int]:
            sizes = buckets(8, row_pages)
            return [each for each in sizes if each == row_pages or not loops_over_pages(rows, each * config.page_size)]

        sizes = (buckets(1, config.slots), (tables(2), tables(1)), reads)
        self._shapes = Shapes(config.slots, pages, self._vocab, *sizes)
        self._free_slots = list(range(config.slots - 1, -1, -1))
        self._waiting: collections.deque[Run] = collections.deque()
        self._running: list[Run] = []
        self._flight: Flight | None = None
        self._numbers = itertools.count()
        self._unsaid: list[Event] = []

    # --- what callers see ---------------------------------------------------------------------------------------------

    def submit(self, request: Request, n: int = 1) -> list[int]:
        """The number of the request, by which its events are known; or of `n` like it with seed, seed + 1, …

        As many of these as find a slot once the first has read the prompt go on from there.

        Raises:
          UserError: the request can never be run.
        """
        self.check(request, n)
        first = Run(next(self._numbers), request, list(request.prompt))
        runs = [first]
        for copy in range(1, n):
            sampling = dataclasses.replace(request.sampling, seed=request.sampling.seed + copy)
            limit = request.limit.fresh() if request.limit is not None else None
            like = dataclasses.replace(request, sampling=sampling, scored=False, limit=limit)
            runs.append(Run(next(self._numbers), like, list(request.prompt), waits_for=first))
        self._waiting += runs
        return [run.number for run in runs]

    def check(self, request: Request, n: int = 1) -> None:
        """Raises UserError where `n` of this request can never be run. Any thread may call this."""
        if request.max_tokens == 0 and n > 1:
            raise UserError(f"n={n} with max_tokens=0 would score one prompt several times: ask for n=1")
        vocab, length = self._vocab, len(request.prompt)
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
        """What has been drawn: what follows a prompt mostly at once, the rest one step late; nothing where nothing is
        left to do.
        """
        self._admit()
        before, self._flight = self._flight, None
        first = self._read_one()
        if first is not None and self.config.guesses:
            # What goes in next depends on it; it is given out with the others' tokens.
            self._look(first)
            first = None
        under_way = {
            run.number: count
            for flight in (before, first)
            if flight is not None
            for run, count in zip(flight.runs, flight.counts, strict=True)
            if run.slot >= 0
        }
        rows = self._rows_to_draw(under_way)
        if rows:
            self._flight = self._draw_and_check(rows) if self.config.guesses else self._draw(rows, under_way)
        if before is not None:
            self._look(before)
        if first is not None:
            # While the device goes on with the others: a first token is not to wait for theirs.
            self._look(first)
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
        """Other weights of the same model from the next step on; what was kept of earlier prompts is forgotten.

        Requests under way go on from what the earlier weights have read, and leave nothing for others to find. Weights
        as `infer.decoder.ready` leaves them are not copied: do not donate them. A draft model keeps its own: as these
        move away from it, fewer of its guesses are kept.
        """
        self._device.publish(params)
        self.pages.forget()
        for run in self._running:
            run.known = NEVER

    def compile(self, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
        """Compiles every shape that can come, so that no request waits for it (on a mesh of several devices, the first
        ones may wait for one more, of the state as a step leaves it); how many they are.

        They are kept in the compilation cache, where there is one. `progress` gets how many are done, of how many.
        """
        sizes, widths = self._shapes, sorted({1, 1 + self.config.guesses})
        shapes = [(R, P, T, 1) for R in sizes.row_buckets for P in sizes.tables(R) for T in widths]
        if self.config.steps > 1:
            shapes += [(R, P, 1, self.config.steps) for R, P, _, _ in shapes]
        shapes += [(1, P, T, 0) for P in sizes.tables(1) for T in sizes.read_buckets]
        for number, (R, P, T, steps) in enumerate(shapes):
            rows = sizes.rows([], R, P)
            if steps:
                self._device.step(rows, sizes.wanted([], [], [], R, T), steps)
            else:
                zeros, wanted = np.zeros((1, T), np.int32), sizes.wanted([], [], [], 1, 1)
                self._device.read(rows, zeros, np.zeros(1, np.int32), wanted)
                self._device.score(rows, zeros, np.zeros(1, np.int32), zeros)
            progress(number + 1, len(shapes))
        nowhere, V = self.config.slots, self._vocab
        self._device.load(nowhere, np.zeros(V, bool), np.zeros(V, np.int32), np.zeros(V, np.float32))
        self._device.fork(0, nowhere, 0, self.pages.count)
        self._device.wait()
        return len(shapes)

    # --- what a step does ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        self._give_slots()
        # A leader at the end of its prompt does not stay for those who could not come.
        for run in self._waiting:
            leader = run.waits_for
            if leader is not None and leader.slot >= 0 and leader.cached >= len(leader.request.prompt) - 1:
                run.waits_for = None

    def _give_slots(self) -> None:
        """To those who wait, in their order; those whose prompt another one is reading wait on."""
        for run in list(self._waiting):
            leader = run.waits_for
            if leader is not None and leader.slot < 0 and leader not in self._waiting:
                leader = run.waits_for = None
            if leader is not None and leader.cached < len(leader.request.prompt) - 1:
                continue
            forks = leader is not None and leader.slot >= 0 and leader.cached == len(run.tokens) - 1 > 0
            needed = 1 if forks else -(-len(run.tokens) // self.config.page_size)
            if not self._free_slots or needed > self.pages.available:
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

    def _fork(self, leader: Run, run: Run) -> None:
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
        self._device.fork(leader.slot, run.slot, page, new_page)

    def _load(self, run: Run) -> None:
        vocab, prompt = self._vocab, len(run.request.prompt)
        in_prompt, bias = np.zeros(vocab, bool), np.zeros(vocab, np.float32)
        in_prompt[list(run.request.prompt)] = True
        for id, value in run.request.sampling.bias.items():
            bias[id] = value
        count = np.bincount(np.asarray(run.tokens[prompt:], np.int64), minlength=vocab).astype(np.int32)
        self._device.load(run.slot, in_prompt, count, bias)

    def _read_one(self) -> Flight | None:
        """A piece of the prompt that has the least left, or, once others went before it three times, of the one that
        came first; and the token after it, where it is the last piece.

        So neither do short ones wait for a long one, nor does it wait for ever for them.
        """
        reading = [run for run in self._running if run.reads]
        if not reading:
            return None
        oldest = reading[0]
        run = oldest if self._passed_over == 3 else min(reading, key=lambda run: len(run.tokens) - run.cached)
        self._passed_over = 0 if run is oldest else self._passed_over + 1
        end = len(run.tokens) if self._may_draw_at_once(run) else len(run.tokens) - 1
        piece = run.tokens[run.cached : min(run.cached + self.config.prefill, end)]
        if not self._reserve(run, run.cached + len(piece)):
            return None
        tokens = np.zeros((1, at_least(len(piece), self._shapes.read_buckets)), np.int32)
        tokens[0, : len(piece)] = piece
        rows, count = self._shapes.rows([run], 1), np.array([len(piece)], np.int32)
        draws = run.cached + len(piece) == len(run.tokens)
        wanted = self._shapes.wanted([run], [[0]], [int(draws)], 1, 1)
        if run.reported < len(run.request.prompt) and run.request.scored:
            following = np.zeros_like(tokens)
            following[0, : len(piece)] = run.tokens[run.cached + 1 : run.cached + 1 + len(piece)]
            scored = self._device.score(rows, tokens, count, following)
            self._report(run, run.cached + 1, jax.device_get(scored))
        else:
            drawn = self._device.read(rows, tokens, count, wanted)
        run.cached += len(piece)
        self._know(run)
        return Flight([run], [run.slot], [1], None, drawn) if draws else None

    def _may_draw_at_once(self, run: Run) -> bool:
        """Whether what follows its prompt can be drawn as the last of it is read.

        Not where its limit would have to be asked first, its prompt is scored, or others begin where it ends.
        """
        return run.request.limit is None and not run.request.scored and not self._has_followers(run)

    def _report(self, run: Run, begin: int, scored: Scored) -> None:
        """The tokens of a prompt from `begin` on, as far as they were scored and not reported before."""
        self._report_first(run)
        prompt, top = run.request.prompt, run.request.top
        for place in range(max(begin, run.reported), min(begin + scored.logp_RT.shape[1], len(prompt))):
            at = (0, place - begin)
            likeliest = zip(scored.top_RTK[at][:top].tolist(), scored.top_logp_RTK[at][:top].tolist(), strict=True)
            self._unsaid.append(
                Event(run.number, prompt[place], float(scored.logp_RT[at]), tuple(likeliest), in_prompt=True)
            )
            run.reported = place + 1

    def _report_first(self, run: Run) -> None:
        """The token that nothing comes before, and that so has no log-probability."""
        if run.request.scored and not run.reported:
            self._unsaid.append(Event(run.number, run.request.prompt[0], in_prompt=True))
            run.reported = 1

    def _rows_to_draw(self, under_way: Mapping[int, int]) -> list[Run]:
        """Those whose next input is there, or on the device, with room for it; `under_way`: tokens by number.

        Where a limit takes long to say what may come next, its row waits for a later step, and the others go on.
        """
        patience = time.perf_counter() + PATIENCE
        rows: list[Run] = []
        late: list[Run] = []
        for run in list(self._running):
            if run.slot < 0 or run.reads:
                continue
            self._report_first(run)
            if run.request.max_tokens == 0:
                self._end(run, "length")
                continue
            drawn = run.written + under_way.get(run.number, 0)
            limited = run.request.limit is not None and run.number in under_way
            if drawn >= run.request.max_tokens or limited or self._leads(run):
                continue
            limit = run.request.limit
            if limit is not None and not limit.ready(max(0.0, patience - time.perf_counter())):
                late.append(run)
            elif self._may_draw(run):
                rows.append(run)
        if not rows and not under_way:
            rows = [run for run in late if run.slot >= 0 and self._may_draw(run)]
        return [run for run in rows if run.slot >= 0]

    def _may_draw(self, run: Run) -> bool:
        """Whether something can follow, and there is room for it."""
        if run.request.limit is not None:
            run.allowed = run.request.limit.allowed()
            if not run.allowed.any():
                self._end(run, "dead_end")
                return False
        return self._reserve(run, run.cached + 1)

    def _leads(self, run: Run) -> bool:
        """Whether it should stay at the end of its prompt, for others to begin from there in the next step."""
        is_there = run.cached == len(run.request.prompt) - 1 == len(run.tokens) - 1 > 0
        return is_there and bool(self._free_slots) and self._has_followers(run)

    def _has_followers(self, run: Run) -> bool:
        return any(other.waits_for is run for other in self._waiting)

    def _draw(self, runs: list[Run], under_way: Mapping[int, int]) -> Flight:
        """One more token for each, or several one after the other where nothing else has to be done in between."""
        most = 1 if self._has_to_stop() else self.config.steps
        left = [run.request.max_tokens - run.written - under_way.get(run.number, 0) for run in runs]
        counts = [1 + self._room(run, min(most, each) - 1) for run, each in zip(runs, left, strict=True)]
        rows = self._shapes.rows(runs)
        wanted = self._shapes.wanted(runs, _next(runs), counts, len(rows.slot_R), 1)
        _, drawn = self._device.step(rows, wanted, self.config.steps if max(counts) > 1 else 1)
        for run, count in zip(runs, counts, strict=True):
            run.cached += count
        return Flight(runs, [run.slot for run in runs], counts, None, drawn)

    def _has_to_stop(self) -> bool:
        """Whether there is something to do after one more token: a prompt to read, or somebody's limit to ask."""
        return any(run.reads or run.request.limit is not None for run in self._running)

    def _draw_and_check(self, runs: list[Run]) -> Flight:
        """What comes after the last token of each, and after guesses of what comes then."""
        inputs, room = _next(runs), [self._room(run, self._guessable(run)) for run in runs]
        if not self._device.drafts:
            for run, given, most in zip(runs, inputs, room, strict=True):
                given += run.ends.after(run.tokens, most) if most else []
            room = [len(given) - 1 for given in inputs]
        counts = [1 + most for most in room]
        rows = self._shapes.rows(runs)
        wanted = self._shapes.wanted(runs, inputs, counts, len(rows.slot_R), 1 + self.config.guesses * any(room))
        wanted, drawn = self._device.step(rows, wanted)
        for run in runs:
            run.cached += 1
        self.guessed += sum(room)
        return Flight(runs, [run.slot for run in runs], counts, wanted.token_RT[:, 1:], drawn)

    def _guessable(self, run: Run) -> int:
        """How many tokens may be guessed for it."""
        if run.request.sampling.adjusts or run.request.limit is not None:
            return 0
        return min(self.config.guesses, run.request.max_tokens - run.written - 1)

    def _room(self, run: Run, most: int) -> int:
        """How many tokens can go in beside the next one, of so many, in the pages that are free."""
        while len(run.pages) * self.config.page_size < run.cached + 1 + most and self.pages.available:
            page = self.pages.take()
            assert page is not None
            run.pages.append(page)
        return min(most, len(run.pages) * self.config.page_size - run.cached - 1)

    def _look(self, flight: Flight) -> None:
        """At what a step has drawn, but for requests that have ended since, or lost their slot."""
        drawn, guess_RT = jax.device_get((flight.drawn, flight.guess_RT))
        for row, (run, slot, count) in enumerate(zip(flight.runs, flight.slots, flight.counts, strict=True)):
            if run.slot != slot:
                continue
            for place in range(count):
                self._take(run, drawn, (row, place))
                if run.slot < 0 or place + 1 == count:
                    break
                if guess_RT is not None:
                    if run.tokens[-1] != guess_RT[row, place]:
                        break
                    run.cached += 1
                    self.right += 1
            if run.slot >= 0:
                self._know(run)

    def _take(self, run: Run, drawn: Drawn, at: tuple[int, int]) -> None:
        token, request = int(drawn.token_RT[at]), run.request
        run.tokens.append(token)
        if request.limit is not None:
            request.limit.accept(token)
        finish: Finish | None = None
        if token in request.stop_ids:
            finish = "stop"
        elif run.written >= request.max_tokens:
            finish = "length"
        top = zip(drawn.top_RTK[at][: request.top].tolist(), drawn.top_logp_RTK[at].tolist(), strict=False)
        self._unsaid.append(Event(run.number, token, float(drawn.logp_RT[at]), tuple(top), finish=finish))
        if finish:
            self._know(run)
            self._finish(run)

    # --- books --------------------------------------------------------------------------------------------------------

    def _reserve(self, run: Run, tokens: int) -> bool:
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

    def _put_back(self, run: Run) -> None:
        self._leave(run)
        run.cached, run.known, run.digests = 0, 0, []
        place = next((i for i, other in enumerate(self._waiting) if other.number > run.number), len(self._waiting))
        self._waiting.insert(place, run)

    def _end(self, run: Run, finish: Finish) -> None:
        self._finish(run)
        self._unsaid.append(Event(run.number, finish=finish))

    def _finish(self, run: Run) -> None:
        if run.slot < 0:
            self._waiting.remove(run)
        else:
            self._leave(run)

    def _leave(self, run: Run) -> None:
        self._running.remove(run)
        self._free_slots.append(run.slot)
        self.pages.release(run.pages)
        run.slot, run.pages = -1, []

    def _know(self, run: Run) -> None:
        """Its full pages can be found, where the tokens in them are known."""
        full = min(run.cached, len(run.tokens)) // self.config.page_size
        if not self._reuse or full <= run.known:
            return
        run.digests = self.pages.digests(run.tokens[: full * self.config.page_size], run.digests)
        for place in range(run.known, full):
            self.pages.know(run.pages[place], run.digests[place])
        run.known = full


def _next(runs: Sequence[Run]) -> list[list[int]]:
    """The last token of each; below 0 where only the device knows it yet."""
    return [[run.tokens[run.cached] if run.cached < len(run.tokens) else -1] for run in runs]
