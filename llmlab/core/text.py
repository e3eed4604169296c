"""Text that is not all there yet."""

from collections.abc import Sequence


def may_become(text: str, strings: Sequence[str]) -> int:
    """Characters at the end of `text` that one of `strings` begins with."""
    longest = max(map(len, strings), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(string.startswith(text[-size:]) for string in strings):
            return size
    return 0
