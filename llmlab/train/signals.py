"""SIGTERM and Ctrl-C during a run: save, then leave. A second Ctrl-C leaves at once."""

import os
import signal
import sys
import threading
from types import FrameType

import jax

from llmlab.core.errors import EXIT_INTERRUPTED


class StopRequest:
    """Whether somebody asked the run to stop; on several hosts, at a step they all agree on.

    A context: inside, SIGTERM and SIGINT no longer end the process.
    """

    def __init__(self) -> None:
        self._asked = False
        self._interrupts = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # On several hosts the runtime's own handler turns SIGTERM into a step to stop at: leave it in place.
            handled = {signal.SIGINT: self._interrupt}
            if jax.process_count() == 1:
                handled[signal.SIGTERM] = self._terminate
            self._previous = {number: signal.signal(number, handler) for number, handler in handled.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def at(self, step: int) -> bool:
        """Whether to stop before this step. Every host must ask at every step, and all get the same answer."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            print("\nleft at once; the last committed checkpoint is what there is", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)
        print("\nstopping after this step, then saving; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        self._asked = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
