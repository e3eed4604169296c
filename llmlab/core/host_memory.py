"""Host memory that is kept when freed, because XLA on CPU asks for its temporaries anew at every step.

glibc gives large blocks back to the system at once. A step then pays a page fault for every 4 KiB of its temporaries:
a seventh of its time at 0.8M parameters on 2 cores (69 ms, where 59 ms do).
"""

import ctypes

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Larger ones are given back as before: kept, they leave holes a little too small for the next request, and a step of
# 14M parameters held two to three times the memory.
_LARGEST_KEPT = 64 * 2**20


def keep_freed_memory() -> bool:
    """Keeps freed blocks of up to 64 MiB for the next request; whether this C library can.

    Call it before jax starts its threads: an arena of a thread's own cannot hold such blocks, so all share one. Other C
    libraries, and a glibc that refuses the threshold (older than 2.35), are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    if not mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_KEPT) and mallopt(_M_ARENA_MAX, 1))
