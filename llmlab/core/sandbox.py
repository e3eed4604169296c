"""Runs Python code that nobody vouches for, in a process that can touch nothing; refuses where it cannot shut it in.

What the code has: the interpreter, Python's standard library to read (no site-packages), an empty folder `/tmp` in
memory to write in, its output, threads, and as much time and memory as it is given. What it does not: any other file
(no /proc, no /dev, no shared library), a network, other processes and the means to start one, the environment, open
files of ours. Linux's namespaces, a filter of system calls, and limits of resources see to it, each on its own where
it can; root is not needed where ordinary users may make namespaces.

What the code prints is data. Whether it ended, and how, is said by the process around it, over a pipe that the code
never holds; what time it took is measured here.
"""

import functools
import math
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from llmlab.core.errors import UserError
from llmlab.core.system_calls import MACHINES, seccomp_filter

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 30.0  # a machine that is busy takes long to start a process
END_SECONDS = 5.0
FOLDER_BYTES = 16 << 20
LEAST_MEMORY, LEAST_FOLDER = 64 << 20, 4096

Status = Literal["ok", "error", "timeout", "output"]


class CannotIsolate(UserError):
    """This machine offers no way to shut code in; nothing has run."""


class Outcome(NamedTuple):
    """What code printed, and how its process ended; never whether what it printed is right.

    output, error: its stdout and stderr, with the traceback and what else there is to say of its end. status: `ok`, it
    ended with exit code 0; `error`, it ended otherwise, as it does when memory runs out; `timeout`, `output`: it was
    ended for taking too long, or printing too much.
    """

    output: str
    error: str
    status: Status


def run_python(
    code: str,
    *,
    seconds: float = 5.0,
    memory_bytes: int = 256 << 20,
    threads: int = 16,
    output_bytes: int = 64 << 10,
    folder_bytes: int = FOLDER_BYTES,
) -> Outcome:
    """Runs `code` as `python file.py` would. It cannot start processes; nothing of it is left when this returns.

    Args:
      seconds: by the clock, from when the code begins.
      memory_bytes: of address space, of which Python itself takes about 50 MiB; besides it there is the folder.
      output_bytes: of stdout and stderr together; more is cut.
      folder_bytes: what fits into the code's folder, which is kept in memory.

    Raises:
      CannotIsolate: no namespaces are to be had here; the message says how to get them.
      UserError: a limit under which Python itself does not start.
    """
    if seconds <= 0 or memory_bytes < LEAST_MEMORY or threads < 1 or folder_bytes < LEAST_FOLDER:
        raise UserError(
            f"seconds={seconds}, memory_bytes={memory_bytes}, threads={threads}, folder_bytes={folder_bytes}: give "
            f"code some time, {LEAST_MEMORY} bytes of memory, a thread, and a folder of {LEAST_FOLDER} bytes at least"
        )
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise CannotIsolate(
            f"code can be shut in on Linux on {' or '.join(MACHINES)} alone, and this is {sys.platform} on {machine}: "
            "run there, or leave out the tool python"
        )
    calls = seccomp_filter(machine)
    cpu_seconds = math.ceil(seconds * threads) + 1  # should nobody be there to look at the clock
    heard, verdict = os.pipe()
    limits = memory_bytes, folder_bytes, threads, cpu_seconds
    try:
        process = _start(calls, code, (verdict, os.getpid(), *limits, len(calls)), verdict)
    except BaseException:
        os.close(heard)
        raise
    finally:
        os.close(verdict)
    with os.fdopen(heard, "rb", 0) as channel, process:
        try:
            return _attend(process, channel.fileno(), seconds, output_bytes)
        finally:
            _end(process)


@functools.cache
def available() -> str:
    """Why `run_python` refuses here; empty where it does not. Tries it, once."""
    try:
        done = run_python("import json, math; print(6 * 7)", seconds=START_SECONDS)
    except CannotIsolate as error:
        return str(error)
    return "" if done == Outcome("42\n", "", "ok") else _refusal(done.error or done.status)


def _start(calls: bytes, code: str, numbers: Iterable[int], verdict: int) -> subprocess.Popen[bytes]:
    # A file without a name: unlike a pipe, it takes any length before anybody reads.
    with os.fdopen(os.memfd_create("request"), "w+b") as file:
        file.write(calls + code.encode(errors="surrogatepass"))
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", str(CHILD), *map(str, numbers)],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(verdict,),
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
            | {"MALLOC_ARENA_MAX": "1"},  # a heap for each thread would eat up the address space
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us
        )


def _attend(process: subprocess.Popen[bytes], channel: int, seconds: float, output_bytes: int) -> Outcome:
    """Reads until all has ended, or a limit is reached."""
    assert process.stdout
    assert process.stderr
    out, err = process.stdout.fileno(), process.stderr.fileno()
    read = {out: b"", err: b"", channel: b""}
    status: Status | None = None
    started, deadline = False, time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        for file in read:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map() and status is None:
            # What is there to read at the deadline was in time, should it be us who come late.
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                status = "timeout"
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                read[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
            if len(read[out]) + len(read[err]) > output_bytes:
                status = "output"
            if not started and read[channel].startswith(b"started\n"):
                started, deadline = True, time.monotonic() + seconds
    said = dict(line.partition(" ")[::2] for line in read[channel].decode().splitlines())
    output = read[out][:output_bytes].decode(errors="replace")
    error = read[err][: max(0, output_bytes - len(read[out]))].decode(errors="replace")
    if "started" not in said:
        raise CannotIsolate(_refusal(said.get("refused") or error.strip().rpartition("\n")[2] or "it does not start"))
    if status is None:
        status = "ok" if said.get("ended") == "0" else "error"
        error += _ending(said.get("ended"))
    return Outcome(output, error, status)


def _ending(exit_code: str | None) -> str:
    """What there is to say of an end by a signal, of which the code itself has said nothing."""
    if exit_code is None:
        return "the sandbox was ended from outside\n"
    number = -int(exit_code)
    return f"ended by signal {number}, {signal.strsignal(number)}\n" if number > 0 else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the outer process to kill the inner one and to wait for it; both die where it does not answer."""
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _refusal(reason: str) -> str:
    return (
        f"Python code cannot be shut in here ({reason}): let users make namespaces (sysctl user.max_user_namespaces; "
        "Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0; Docker: --security-opt seccomp=unconfined), run as "
        "root, or leave out the tool python"
    )
