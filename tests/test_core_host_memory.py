"""Freed memory is kept, and what is larger comes in huge pages: fewer page faults, in a thread as XLA's are."""

import os
import subprocess
import sys

import pytest

from llmlab.core.host_memory import huge_page_environment

USE_TWICE = """
import ctypes, resource, sys, threading
from llmlab.core.host_memory import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
size = 40 * 2**20

def use():
    block = c.malloc(ctypes.c_size_t(size))
    c.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t(size))
    c.free(ctypes.c_void_p(block))

def twice():
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("this C library cannot")
thread = threading.Thread(target=twice)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_block_is_used_again_without_new_pages():
    faults = {}
    for mode in ("keep", "as it was"):
        out = subprocess.run([sys.executable, "-c", USE_TWICE, mode], capture_output=True, text=True)
        if "this C library cannot" in out.stderr:
            pytest.skip("not glibc, or one older than 2.35")
        assert out.returncode == 0, out.stderr
        faults[mode] = int(out.stdout)
    assert faults["as it was"] > 20 * (faults["keep"] + 1)


RESTART = """
import os, sys
from llmlab.core.host_memory import huge_page_environment, restart_with_huge_pages
if len(sys.argv) == 2:
    restart_with_huge_pages()
print(os.getpid(), huge_page_environment(), os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.skipif(not huge_page_environment(), reason="this kernel's huge pages cannot be asked for")
def test_a_process_restarts_once_with_huge_pages(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(RESTART)
    mine = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.perturb=0"}
    with subprocess.Popen([sys.executable, str(script), "a b"], stdout=subprocess.PIPE, text=True, env=mine) as process:
        said = process.communicate()[0]
    tunables = "glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"
    assert said == f"{process.pid} {{}} {tunables} ['a b']\n"


GIVE_BACK = """
import ctypes, re, sys
from llmlab.core.host_memory import give_back, keep_freed_memory

c, size = ctypes.CDLL(None), 100 * 2**20
c.malloc.restype = ctypes.c_void_p

def held():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

if not keep_freed_memory():
    sys.exit("this C library cannot")
block, behind = c.malloc(ctypes.c_size_t(size)), c.malloc(ctypes.c_size_t(10_000))
c.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t(size))
c.free(ctypes.c_void_p(block))
kept = held()
give_back()
print(kept - held())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_hole_is_given_back():
    out = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True)
    if "this C library cannot" in out.stderr:
        pytest.skip("not glibc, or one older than 2.35")
    assert out.returncode == 0, out.stderr
    assert 90 < float(out.stdout) < 110
