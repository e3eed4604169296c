"""How far a long evaluation is: one live line on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_PLAIN_LINES = 10.0


@contextlib.contextmanager
def counted(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with how much of `total` is done. Everything goes to stderr."""
    live, shown_at = sys.stderr.isatty(), time.monotonic()

    def advance(done: int) -> None:
        nonlocal shown_at
        if live:
            print(f"\r{title}: {done:,} of {total:,}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - shown_at >= SECONDS_BETWEEN_PLAIN_LINES:
            shown_at = time.monotonic()
            print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

    yield advance if not quiet else lambda done: None
    if live and not quiet:
        print("\r" + " " * len(f"{title}: {total:,} of {total:,}") + "\r", end="", file=sys.stderr, flush=True)
