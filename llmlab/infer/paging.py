"""Which pages of a cache are whose: a free list, pages that several rows share, and those kept for who begins alike.

A full page is known by a digest of all tokens up to its end. Once no row uses it, it stays until room is needed, the
longest unused first to go.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


class Pages:
    """The books of `count` pages of `size` tokens; what is in them lies elsewhere."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # known, and used by no row

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    def digests(self, tokens: Sequence[int], before: Sequence[bytes] = ()) -> list[bytes]:
        """Of every full page of `tokens`, of which those of the first pages are known already."""
        found = list(before)
        for begin in range(len(found) * self.size, len(tokens) - self.size + 1, self.size):
            page = np.asarray(tokens[begin : begin + self.size], "<i8").tobytes()
            found.append(hashlib.blake2b((found[-1] if found else b"") + page, digest_size=16).digest())
        return found

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The longest run of known pages from the first on, which the caller then uses."""
        found = []
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                break
            found.append(page)
        self.share(found)
        return found

    def share(self, pages: Iterable[int]) -> None:
        """One more user of these pages."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def take(self) -> int | None:
        """A page for one user; None where all are in use."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        else:
            return None
        self._users[page] = 1
        return page

    def know(self, page: int, digest: bytes) -> None:
        """From now on the page is found by this digest, unless another is."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """One user less of these pages. The end of a row goes first when room is needed, the beginning last."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """What is kept for later is no longer true, as after new weights."""
        # From the lowest on again: what is taken together lies together, and is read sooner.
        self._free = sorted([*self._free, *self._idle], reverse=True)
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()
