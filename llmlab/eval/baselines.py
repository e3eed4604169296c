"""What a general-purpose compressor makes of the same text: the number a language model has to beat."""

import lzma
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from llmlab.core.errors import UserError


def xz_bits_per_byte(
    texts: Iterable[bytes | str], *, threads: int = 0, progress: Callable[[int], None] | None = None
) -> float:
    """Bits per byte of what `xz -9` makes of each text as a file of its own, its container included.

    `threads`: 0 for one per core, up to 4. `progress` is called with the bytes compressed so far.

    Raises:
      UserError: no text at all.
    """
    contents = (text.encode() if isinstance(text, str) else text for text in texts)
    done = compressed = 0
    with ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1)) as pool:
        for before, after in pool.map(lambda content: (len(content), _xz_size(content)), contents):
            done, compressed = done + before, compressed + after
            if progress:
                progress(done)
    if not done:
        raise UserError("there is no text to compress: every document is empty")
    return 8 * compressed / done


def _xz_size(content: bytes) -> int:
    # A dictionary as long as the text finds whatever preset 9's 64 MiB would, without clearing their tables each time.
    size = min(max(len(content), 4096), 1 << 26)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": size}]
    return len(lzma.compress(content, format=lzma.FORMAT_XZ, filters=filters))
