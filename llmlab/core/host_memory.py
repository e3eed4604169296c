"""Host memory for a process that asks for the same large blocks again and again, as XLA on CPU does at every step.

glibc gives large blocks back to the system at once, and the next step pays a page fault for every 4 KiB of its
temporaries: a third of its time at 0.8M parameters on 2 cores (104 ms, where 70 do). Three remedies: blocks of up to
512 MiB are kept when freed; all come in pages of 2 MiB, with a five-hundredth of the faults; and now and then the holes
that they leave, a little too small for the next request, are given back. At 17M parameters, with 422 MiB of
temporaries, a step takes 871 ms and the process 2.0 GiB; with blocks of 64 MiB kept, 909 ms and 1.0 GiB.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

# From glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGEST_KEPT = 512 * 2**20
_TUNABLE = "glibc.malloc.hugetlb=1"  # ask for huge pages with madvise; the GNU C Library Manual, 39.2
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def keep_freed_memory() -> bool:
    """Keeps freed blocks of up to 512 MiB for the next request; whether this C library can.

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


def give_back() -> None:
    """Gives the memory of free blocks back to the system; what is asked for again comes with new pages."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def huge_page_environment() -> dict[str, str]:
    """What a process's environment needs besides for glibc to ask for huge pages; empty where that is of no use.

    That is: on another system, where the kernel gives them unasked or never, and where it is set already.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    with contextlib.suppress(OSError):
        if (
            sys.platform == "linux"
            and "glibc.malloc.hugetlb" not in tunables
            and "[madvise]" in _HUGE_PAGES.read_text()
        ):
            return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, _TUNABLE)))}
    return {}


def restart_with_huge_pages() -> None:
    """Replaces this process by itself with that environment: glibc reads it only once, before Python starts.

    The process keeps its number, its parent and its open files. Call it first of all, in a program's entry point.
    """
    if more := huge_page_environment():
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **more})
