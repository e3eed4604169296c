"""What a person sees while something long is counted off: a bar on a terminal, now and then a line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY_SECONDS = 10.0

Advance = Callable[[int], None]


@contextlib.contextmanager
def shown(title: str, total: int | None, progress: bool, *, in_bytes: bool = True) -> Iterator[Advance]:
    """Yields a function to call with how much is done so far: bytes, of about `total`, or else things, of exactly it.

    Everything goes to stderr; nothing unless `progress`.
    """
    if not progress:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar(title, total, in_bytes) as advance:
            yield advance
    else:
        yield _lines(title, total, in_bytes)


@contextlib.contextmanager
def _bar(title: str, total: int | None, in_bytes: bool) -> Iterator[Advance]:
    from rich import progress as rich
    from rich.console import Console

    counts = (rich.DownloadColumn(), rich.TransferSpeedColumn()) if in_bytes else (rich.MofNCompleteColumn(),)
    columns = (rich.TextColumn(title), rich.BarColumn(), *counts, rich.TimeRemainingColumn())
    with rich.Progress(*columns, console=Console(stderr=True), transient=not in_bytes) as bar:
        task = bar.add_task(title, total=total)

        def advance(done: int) -> None:
            bar.update(task, completed=done, total=None if total is None else max(total, done))

        yield advance
        bar.update(task, total=bar.tasks[0].completed)


def _lines(title: str, total: int | None, in_bytes: bool) -> Advance:
    last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_EVERY_SECONDS:
            last = now
            print(f"{title}: {_so_far(done, total, in_bytes)}", file=sys.stderr, flush=True)

    return advance


def _so_far(done: int, total: int | None, in_bytes: bool) -> str:
    if in_bytes:
        return f"{done / 1e6:.1f}" + ("" if total is None else f" of about {total / 1e6:.1f}") + " MB"
    return f"{done:,}" + ("" if total is None else f" of {total:,}")
