"""What a person sees while text is read: a bar on a terminal, now and then a line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY_SECONDS = 10.0

Advance = Callable[[int], None]


@contextlib.contextmanager
def shown(title: str, total_bytes: int | None, progress: bool) -> Iterator[Advance]:
    """Yields a function to call with the bytes of text done so far. Everything goes to stderr."""
    if not progress:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar(title, total_bytes) as advance:
            yield advance
    else:
        yield _lines(title, total_bytes)


@contextlib.contextmanager
def _bar(title: str, total_bytes: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(title), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total_bytes)

        def advance(done: int) -> None:
            bar.update(task, completed=done, total=None if total_bytes is None else max(total_bytes, done))

        yield advance
        bar.update(task, total=bar.tasks[0].completed)


def _lines(title: str, total_bytes: int | None) -> Advance:
    last = time.monotonic()
    of_total = "" if total_bytes is None else f" of about {total_bytes / 1e6:.1f}"

    def advance(done: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_EVERY_SECONDS:
            last = now
            print(f"{title}: {done / 1e6:.1f}{of_total} MB", file=sys.stderr, flush=True)

    return advance
