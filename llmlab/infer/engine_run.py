"""A request on its way, and requests as the arrays that a step on the device takes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llmlab.infer.engine_step import Drawn, Rows, Wanted
from llmlab.infer.request import Request
from llmlab.infer.speculative import Ends


@dataclasses.dataclass(eq=False)
class Run:
    """A request on its way.

    tokens: the prompt, and what was drawn and looked at. waits_for: a request with the same prompt, which reads it
    first. cached: tokens in the cache, those of the call under way included. known: pages that others can find.
    reported: tokens of the prompt that have been given out. allowed: what its limit says of the next token. ends: what
    its tokens so far tell of the next ones.
    """

    number: int
    request: Request
    tokens: list[int]
    waits_for: "Run | None" = None
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    cached: int = 0
    known: int = 0
    reported: int = 0
    allowed: np.ndarray | None = None
    ends: Ends = dataclasses.field(default_factory=Ends)

    @property
    def reads(self) -> bool:
        """Whether some of its tokens, but for the last, are not in the cache yet."""
        return self.slot >= 0 and self.cached < len(self.tokens) - 1

    @property
    def written(self) -> int:
        """Tokens after the prompt that were looked at."""
        return len(self.tokens) - len(self.request.prompt)


class Flight(NamedTuple):
    """A call whose tokens were not looked at yet. counts: tokens of each row. guess_RT: those that went in after its
    first one, where they are guesses; None where each was drawn before it went in.
    """

    runs: list[Run]
    slots: list[int]
    counts: list[int]
    guess_RT: jax.Array | np.ndarray | None
    drawn: Drawn


class Shapes(NamedTuple):
    """The sizes that compile. slots, pages: how many there are, and so the numbers that stand for none of them.

    page_buckets: pages in the tables of several rows, and of one.
    """

    slots: int
    pages: int
    vocab: int
    row_buckets: list[int]
    page_buckets: tuple[list[int], list[int]]
    read_buckets: list[int]

    def rows(self, runs: Sequence[Run], R: int = 0, P: int = 0) -> Rows:
        """These runs, padded to a bucket, or to R rows of P pages."""
        R = R or at_least(len(runs), self.row_buckets)
        most = max((len(run.pages) for run in runs), default=0)
        table = np.full((R, P or at_least(most, self.tables(R))), self.pages, np.int32)
        slot, length = np.full(R, self.slots, np.int32), np.zeros(R, np.int32)
        for row, run in enumerate(runs):
            slot[row], length[row] = run.slot, run.cached
            table[row, : len(run.pages)] = run.pages
        arrays: Any = (slot, length, table)
        return Rows(*arrays)

    def tables(self, R: int) -> list[int]:
        """How many pages the tables of R rows may have."""
        return self.page_buckets[R == 1]

    def wanted(self, runs: Sequence[Run], inputs: Sequence[list[int]], counts: Sequence[int], R: int, T: int) -> Wanted:
        """What goes into each run, of which `counts` are real, and how it is drawn from; padded to [R, T]."""

        def of(name: str, off: float, dtype: Any = np.float32) -> Any:
            values = np.full(R, off, dtype)
            values[: len(runs)] = [getattr(run.request.sampling, name) for run in runs]
            return values

        token, count, limited = np.zeros((R, T), np.int32), np.zeros(R, np.int32), np.zeros(R, bool)
        allowed = np.zeros((R, -(-self.vocab // 32)), np.uint32)
        seed, top = np.zeros(R, np.uint32), np.zeros(R, bool)
        count[: len(runs)] = counts
        for row, (run, given) in enumerate(zip(runs, inputs, strict=True)):
            token[row, : len(given)] = given
            seed[row], top[row] = run.request.sampling.seed % 2**32, run.request.top > 0
            if run.allowed is not None:
                limited[row], allowed[row] = True, run.allowed
        settings = (
            *(of("temperature", 0), of("top_k", 0, np.int32), of("top_p", 1), of("min_p", 0)),
            *(of("repetition", 1), of("presence", 0), of("frequency", 0), of("adjusts", False, bool)),
        )
        arrays: Any = (token, count, seed, *settings, limited, allowed, top)
        return Wanted(*arrays)


def buckets(least: int, most: int) -> list[int]:
    """least, twice that, and so on below `most`, and `most`."""
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], most]


def at_least(size: int, sizes: Sequence[int]) -> int:
    """The first of these rising sizes that is large enough."""
    return next(each for each in sizes if each >= size)
