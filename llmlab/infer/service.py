"""An engine for many callers at once: a thread steps it, and what it draws goes to the event loops that asked.

As many requests wait as `queue` says; more are refused at once, so that neither memory nor patience is used up. Whoever
leaves a ticket's `with` block gives its slots back. The thread sleeps while there is nothing to do.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from llmlab.core.errors import UserError
from llmlab.infer.engine import Engine
from llmlab.infer.request import Event, Request

_log = logging.getLogger(__name__)
_FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Overloaded(Exception):
    """The queue is full. retry_after: seconds, by how long requests have taken."""

    def __init__(self, waiting: int, retry_after: int):
        super().__init__(f"{waiting} requests are waiting already: try again in about {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The service takes no more requests."""


class Failed(Exception):
    """The engine has stopped on an error, which is the cause of this."""


@dataclasses.dataclass
class Histogram:
    """How many values were at most as large as each bound; the last count is of those above all."""

    bounds: Sequence[float]
    counts: list[int] = dataclasses.field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """One more value."""
        self.counts[next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))] += 1
        self.sum += value


@dataclasses.dataclass
class Metrics:
    """What a service has done since it began; every sample of a request counts."""

    prompt_tokens: int = 0
    tokens: int = 0
    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: int = 0
    first_seconds: Histogram = dataclasses.field(default_factory=lambda: Histogram(_FIRST_SECONDS))
    between_seconds: Histogram = dataclasses.field(default_factory=lambda: Histogram(_BETWEEN_SECONDS))


@dataclasses.dataclass
class _Sample:
    """One number of the engine's: whose it is, and when something last came of it."""

    ticket: "Ticket"
    index: int
    begun: float
    last: float = 0.0


class Ticket:
    """Places for `count` samples, and, once it is said what they go on from, an async iterator of (index, event) of all
    of them, in the order in which they come.

    It ends once every sample has. Leaving its `with` block cancels what is left, and gives the places back.
    """

    def __init__(self, service: "Service", count: int):
        self._service, self.count, self._left = service, count, count
        self.since, self.begun = time.monotonic(), False
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[tuple[int, Event] | Failed] = asyncio.Queue()
        self.numbers: list[int] = []

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service._leave(self, cancel=self._left > 0)
        self._left = 0

    def begin(self, *requests: Request, n: int = 1) -> None:
        """What the samples go on from, as `Service.submit` takes it; once.

        Raises:
          UserError: a request can never be run.
          Failed: the engine has stopped.
        """
        assert len(requests) * n == self.count
        self._service._order(self, requests, n)

    def drop(self, index: int) -> None:
        """Cancels one sample; its end comes as an event."""
        self._service._drop(self, index)

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if not self._left:
            raise StopAsyncIteration
        came = await self._came.get()
        if isinstance(came, Failed):
            self._left = 0
            raise came
        self._left -= came[1].finish is not None
        return came


class Service:
    """Owns an engine from now on. `queue` requests may wait beside those that have a slot.

    name: of its thread, and in the log.
    """

    def __init__(self, engine: Engine, queue: int = 64, name: str = "engine"):
        self.metrics = Metrics()
        self.capacity = engine.config.slots + queue
        self._engine, self._slots = engine, engine.config.slots
        self._changed = threading.Condition()
        self._orders: list[Callable[[], None]] = []
        self._samples: dict[int, _Sample] = {}
        self._admitted = 0  # samples that have not ended
        self._seconds = 1.0  # that a sample takes, a running mean
        self._tickets: set[Ticket] = set()  # whose `with` block goes on
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, *requests: Request, n: int = 1) -> Ticket:
        """`n` samples of each request, with its seed, seed + 1, …; the index of a sample is that of its request times
        `n`, and its own. A coroutine, or a callback of an event loop, calls this.

        Raises:
          UserError: a request can never be run.
          Overloaded, Closing, Failed: it cannot be taken now; Failed never again.
        """
        for request in requests:
            self._engine.check(request, n)
        ticket = self.admit(len(requests) * n)
        ticket.begin(*requests, n=n)
        return ticket

    def admit(self, count: int) -> Ticket:
        """Places for `count` samples, taken before it is known what they are to go on from: whoever is refused has cost
        nothing by then. The ticket's `begin` says it.

        Raises:
          Overloaded, Closing, Failed: as `submit` does.
        """
        with self._changed:
            self._check()
            if self._closing:
                raise Closing("the server is shutting down")
            if self._admitted + count > self.capacity:
                self.metrics.refused += count
                raise Overloaded(max(0, self._admitted - self._slots), self._wait_seconds())
            ticket = Ticket(self, count)
            self._admitted += count
            self._tickets.add(ticket)
        return ticket

    @property
    def load(self) -> dict[str, int]:
        """The engine's, with those that have not reached it among the waiting."""
        load = self._engine.load
        return load | {"waiting": max(load["waiting"], self._admitted - load["running"])}

    @property
    def error(self) -> BaseException | None:
        """What has stopped the engine, if anything has."""
        return self._error

    async def close(self) -> None:
        """Takes no more requests, and returns once those that were admitted have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    # --- what the thread does -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._hand_out(self._engine.step())
        except BaseException as error:
            _log.exception("the engine has stopped, and every request with it")
            self._fail(error)

    def _wait_for_work(self) -> bool:
        """Whether there is some, with what was ordered done; False once the service is closed and idle."""
        with self._changed:
            while self._engine.idle and not self._orders:
                if self._closing and not self._admitted:
                    return False
                self._changed.wait()
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        return True

    def _check(self) -> None:
        if self._error is not None:
            raise Failed(f"the engine has stopped: {self._error}") from self._error

    def _order(self, ticket: Ticket, requests: Sequence[Request], n: int) -> None:
        for request in requests:
            self._engine.check(request, n)
        with self._changed:
            self._check()
            ticket.begun = True
            self._orders.append(lambda: self._begin(ticket, requests, n))
            self._changed.notify()

    def _begin(self, ticket: Ticket, requests: Sequence[Request], n: int) -> None:
        try:
            for request in requests:
                for number in self._engine.submit(request, n):
                    self._samples[number] = _Sample(ticket, len(ticket.numbers), ticket.since)
                    ticket.numbers.append(number)
                self.metrics.prompt_tokens += len(request.prompt)
        except UserError as error:  # which concerns nobody else
            with self._changed:
                self._admitted -= len(requests) * n - len(ticket.numbers)
            _tell(ticket._loop, [(ticket, Failed(str(error)))])

    def _drop(self, ticket: Ticket, index: int) -> None:
        with self._changed:
            self._orders.append(lambda: self._cancel(ticket, index))
            self._changed.notify()

    def _leave(self, ticket: Ticket, *, cancel: bool) -> None:
        with self._changed:
            self._tickets.discard(ticket)
            if not ticket.begun:
                self._admitted -= ticket.count
            elif cancel:
                self._orders.append(lambda: self._cancel(ticket))
            self._changed.notify()

    def _cancel(self, ticket: Ticket, index: int | None = None) -> None:
        for number in ticket.numbers if index is None else ticket.numbers[index : index + 1]:
            if number in self._samples:
                self._engine.cancel(number)

    def _hand_out(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, tuple[int, Event] | Failed]]] = {}
        for event in events:
            sample = self._samples[event.number]
            by_loop.setdefault(sample.ticket._loop, []).append((sample.ticket, (sample.index, event)))
            self._measure(sample, event, now)
            if event.finish is not None:
                del self._samples[event.number]
                with self._changed:
                    self._admitted -= 1
                    self._seconds += 0.1 * (now - sample.begun - self._seconds)
        for loop, news in by_loop.items():
            _tell(loop, news)

    def _measure(self, sample: _Sample, event: Event, now: float) -> None:
        if event.token is not None and not event.in_prompt:
            self.metrics.tokens += 1
            histogram = self.metrics.between_seconds if sample.last else self.metrics.first_seconds
            histogram.add(now - (sample.last or sample.begun))
            sample.last = now
        if event.finish is not None:
            self.metrics.finished[event.finish] += 1

    def _fail(self, error: BaseException) -> None:
        """Everybody who waits is told, those whom the engine has not heard of too."""
        with self._changed:
            self._error, tickets = error, list(self._tickets)
        failed = Failed(f"the engine has stopped: {error}")
        failed.__cause__ = error
        for ticket in tickets:
            _tell(ticket._loop, [(ticket, failed)])

    def _wait_seconds(self) -> int:
        return min(60, max(1, math.ceil(self._seconds * self._admitted / self._slots)))


def _tell(loop: asyncio.AbstractEventLoop, news: Sequence[tuple[Ticket, tuple[int, Event] | Failed]]) -> None:
    def put() -> None:
        for ticket, came in news:
            ticket._came.put_nowait(came)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(put)
