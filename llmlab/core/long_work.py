"""How work that takes long meets what happens around it: its reader leaves, or it is told to end before it began."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from llmlab.core.errors import StoppedAndSaved


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Inside, what is written to stdout or stderr after its reader has left goes nowhere, and is no error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Outliving, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises StoppedAndSaved, wherever nobody else handles it: there is nothing to save then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise StoppedAndSaved("stopped between steps; the same command goes on from there")

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Outliving:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_reader():
            self._stream.flush()

    @contextlib.contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
