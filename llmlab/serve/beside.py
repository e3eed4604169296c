"""Work that is too long for the event loop, which answers everybody: on threads, and no more than can be waited for."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

from llmlab.infer.service import Overloaded

_T = TypeVar("_T")


class Beside:
    """A thread, or several, for one kind of work, of which `most` pieces are taken in at once."""

    def __init__(self, name: str, *, threads: int = 1, most: int = 64):
        self._executor = concurrent.futures.ThreadPoolExecutor(threads, name)
        self._most, self._places = most, threading.Semaphore(most)

    async def __call__(self, work: Callable[..., _T], *given: object) -> _T:
        """What `work` returns or raises. It is done to its end once it has begun, whoever waits for it or does not.

        Raises:
          Overloaded: there is too much of it already.
        """
        if not self._places.acquire(blocking=False):
            raise Overloaded(self._most, 1)
        future = self._executor.submit(work, *given)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)
