"""Code that is shut in: what it can do, what it cannot, and that nothing of it is left. Needs namespaces."""

import contextlib
import ctypes
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmlab.core import sandbox
from llmlab.core.errors import UserError
from llmlab.core.sandbox import CannotIsolate, available, run_python
from llmlab.core.system_calls import numbers, seccomp_filter
from tests.hostile import NEVER, ROOT, attempts, endless, forgeries, world

HERE = Path(__file__).parent.parent
CLONE = {"x86_64": 56, "aarch64": 220}
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, EPERM, ENOSYS, KILLED = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


@pytest.fixture(scope="module")
def shut_in():
    """Skips where nothing can be shut in."""
    if why := available():
        pytest.skip(why)


needs_namespaces = pytest.mark.usefixtures("shut_in")


def descendants(pid: int) -> set[int]:
    """The processes below this one, zombies too."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


@pytest.fixture
def new_processes():
    """Gives the processes below this one that other tests have not left there."""
    before = descendants(os.getpid())
    return lambda: descendants(os.getpid()) - before


def judged(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What a filter of system calls says, by the rules of classic BPF that it uses."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    place, held = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("HBBI", program, 8 * place)
        place += 1
        if code == 0x20:
            held = struct.unpack_from("<I", data, value)[0]
        elif code == 0x54:
            held &= value
        elif code == 0x15:
            place += if_true if held == value else if_false
        else:
            assert code == 0x06
            return value


@pytest.mark.parametrize("machine", list(AUDIT))
def test_the_filter_allows_what_is_in_its_table_and_nothing_else(machine):
    program, allowed = seccomp_filter(machine), numbers(machine)
    judge = lambda number, *arguments: judged(program, AUDIT[machine], number, *arguments)  # noqa: E731
    assert len(set(allowed.values())) == len(allowed)
    plain = {number for name, number in allowed.items() if name not in ("clone", "ioctl", "socketpair")}
    assert {number for number in range(1024) if judge(number) == ALLOWED} == plain
    assert judge(435) == judge(0x40000000 + 39) == judge(2**32 - 1) == ENOSYS  # clone3, and another numbering
    assert judged(program, 0x40000003, allowed["read"]) == KILLED  # a 32-bit call
    thread = 0x3D0F00  # what pthread_create asks for
    assert judge(CLONE[machine], thread) == ALLOWED
    for flags in (17, 0x4111, thread | 0x10000000, thread | 0x20000, thread & ~0x10000):
        assert judge(CLONE[machine], flags) == EPERM
    assert [judge(allowed["socketpair"], family) for family in (1, 2, 10, 16)] == [ALLOWED, EPERM, EPERM, EPERM]
    assert [judge(allowed["ioctl"], 0, what) for what in (0x5401, 0x5412)] == [ALLOWED, EPERM]  # not TIOCSTI


@pytest.mark.skipif(not Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").exists(), reason="no kernel headers")
def test_the_table_is_the_kernels():
    kernel = {}
    for line in Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h").read_text().splitlines():
        if line.startswith("#define __NR_"):
            _, name, number = line.split()
            kernel[name.removeprefix("__NR_")] = int(number)
    assert numbers("x86_64") == {name: kernel[name] for name in numbers("x86_64")}


@needs_namespaces
def test_code_runs_and_says_what_it_has_to_say():
    code = "import json, math, sys, asyncio\nprint(json.dumps(['é', math.isqrt(49)]))\nprint('w', file=sys.stderr)\n"
    code += "open('kept', 'w').write('x'); print(open('kept').read(), sys.argv)\nasyncio.run(asyncio.sleep(0))"
    assert run_python(code) == ("[\"\\u00e9\", 7]\nx ['-']\n", "w\n", "ok")
    # What one leaves in its folder, the next does not find.
    assert run_python("import os; print(os.listdir(), os.getcwd(), dict(os.environ))") == ("[] /tmp {}\n", "", "ok")


@needs_namespaces
@pytest.mark.parametrize(
    "code, output, error, status",
    [
        ("print(1)\n1 / 0", "1\n", "ZeroDivisionError: division by zero", "error"),
        ("print(1", "", "SyntaxError: '(' was never closed", "error"),
        ("import sys; sys.exit('no')", "", "no", "error"),
        ("import os; os._exit(0)", "", "", "ok"),
        ("import ctypes; ctypes.string_at(0)", "", "ended by signal 11, Segmentation fault", "error"),
        ("x = bytearray(1 << 40)", "", "MemoryError", "error"),
        ("print('\\ud800 \\0')", "\\ud800 \0\n", "", "ok"),
        ("\0", "", "null bytes", "error"),
        ("\ud800", "", "surrogates not allowed", "error"),
        ("print(input())", "", "EOFError", "error"),
    ],
)
def test_how_it_ended_is_said(code, output, error, status):
    done = run_python(code, seconds=60)
    assert (done.output, done.status) == (output, status)
    assert error in done.error
    assert "sandbox_child" not in done.error


@needs_namespaces
def test_too_much_output_is_cut():
    done = run_python("while True: print('x' * 99)", output_bytes=1000, seconds=60)
    assert done == (("x" * 99 + "\n") * 10, "", "output")
    done = run_python("import sys; print('a' * 600); sys.stderr.write('b' * 600)", output_bytes=1000, seconds=60)
    assert done == ("a" * 600 + "\n", "b" * 399, "output")
    assert run_python("print('x' * 999)", output_bytes=1000, seconds=60).status == "ok"


@needs_namespaces
def test_code_of_any_length_runs():
    assert run_python("#" * 10**6 + "\nprint(1)", seconds=60).output == "1\n"


@needs_namespaces
def test_no_file_of_ours_is_open_whatever_its_number():
    pipes = [os.pipe() for _ in range(40)]
    try:
        code = "import os\nfor f in range(4096):\n  try: os.fstat(f); print(f)\n  except OSError: pass"
        assert run_python(code, seconds=60).output == "0\n1\n2\n"
    finally:
        for end in sum(pipes, ()):
            os.close(end)


def test_a_limit_under_which_nothing_runs_is_a_mistake():
    with pytest.raises(UserError, match="memory_bytes=1000000"):
        run_python("", memory_bytes=10**6)


def test_elsewhere_it_refuses(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    with pytest.raises(CannotIsolate, match="x86_64 or aarch64 alone, and this is linux on riscv64: .* leave out"):
        run_python("print(1)")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(CannotIsolate, match="this is darwin"):
        run_python("print(1)")


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs util-linux")
@pytest.mark.parametrize("limit", [None, 0])
def test_an_ordinary_user_gets_the_same_or_a_refusal(limit):
    """In a user namespace even root is an ordinary user; one that may make no more of them is where we refuse."""
    code = "from llmlab.core.sandbox import *\nimport os\n"
    code += "try: print(run_python('import os; print(os.getuid(), os.listdir())', seconds=60))\n"
    code += "except CannotIsolate as error: print(error)"
    begin = "" if limit is None else f"echo {limit} > /proc/sys/user/max_user_namespaces && "
    shell = f'{begin} exec "$0" -c "$1"'
    command = ["unshare", "-U", "--map-root-user", "sh", "-c", shell, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    if "unshare failed" in done.stderr:
        pytest.skip("needs leave to make user namespaces")
    if limit is None:
        assert "65534 []" in done.stdout
    else:
        assert "cannot be shut in here" in done.stdout
        assert "unshare: No space left on device" in done.stdout


TALKS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from llmlab.core.sandbox import run_python
try: print(run_python("import time; time.sleep(60)", seconds=60))
except KeyboardInterrupt: sys.exit(7)
"""


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_when_we_end_the_code_ends(number):
    process = subprocess.Popen([sys.executable, "-c", TALKS], env={**os.environ, "PYTHONPATH": str(HERE)})
    while len(below := descendants(process.pid)) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == (7 if number == signal.SIGINT else -number)
    while any(alive(pid) for pid in below):
        time.sleep(0.01)


@needs_namespaces
def test_the_inner_process_ends_with_the_outer(new_processes):
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run_python, "import time; time.sleep(60)", seconds=60)
        while len(below := new_processes()) < 2:
            time.sleep(0.01)
        os.kill(min(below), signal.SIGKILL)
        assert done.result()[1:] == ("the sandbox was ended from outside\n", "error")
    while any(alive(pid) for pid in below):
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


BATCH = """
here = os.getcwd()
for place, code in enumerate(CODES):
    os.write(1, f"\\x1e{place}\\x1f".encode())
    os.chdir(here)
    try:
        exec(compile(code, f"<{place}>", "exec"), dict(globals()))
    except BaseException as error:
        os.write(1, f"[{type(error).__name__} {getattr(error, 'errno', '')}]".encode())
    sys.stdout.flush()
"""


def said(run, batch, prelude) -> list[str]:
    """What each prints, run one after the other; where one takes the process with it, the rest in a new one."""
    texts = []
    while len(texts) < len(batch):
        codes = [attempt.code for attempt in batch[len(texts) :]]
        output = run(f"{prelude}\nCODES = {codes!r}\n{BATCH}")
        pieces = [piece.partition("\x1f")[2] for piece in output.split("\x1e")[1:]]
        assert pieces, output
        texts += pieces
    return texts


def inside(code: str) -> str:
    return run_python(code, seconds=60, memory_bytes=96 << 20, output_bytes=1 << 22).output


def outside(folder: Path):
    """Runs code with nothing around it."""

    def run(code: str) -> str:
        command = [sys.executable, "-I", "-S", "-"]
        done = subprocess.run(command, input=code.encode(), capture_output=True, cwd=folder, timeout=300)
        return done.stdout.decode(errors="replace")

    return run


def winners(run, chosen, around) -> list[str]:
    """The names of the attempts that got what they wanted."""
    trophies = {"the mark": around.mark, "the secret": around.secret}
    batches = [[attempt] for attempt in chosen if attempt.alone]
    together = [attempt for attempt in chosen if not attempt.alone]
    batches += [together[place : place + 30] for place in range(0, len(together), 30)]
    won = []
    for batch in batches:
        for attempt, text in zip(batch, said(run, batch, around.prelude), strict=True):
            if trophies.get(attempt.trophy, attempt.trophy) in text:
                won.append(f"{attempt.kind}: {attempt.name}")
    return won


QUICK = (
    [
        "secret by os.open",
        "passwd by openat",
        "source by root of the parent",
        "secret by symlink",
        "list proc",
        "environ",
    ]
    + ["make in library", "create_connection", "raw call", "abstract", "netlink", "fork", "clone", "clone3", "system"]
    + ["threads", "bytearray", "shared mmap", "memory file", "file", "keyctl", "read the parent", "x32 getpid"]
)


@needs_namespaces
def test_some_attempts_fail_at_once(tmp_path, new_processes):
    chosen = [attempt for attempt in attempts() if attempt.name in QUICK and not attempt.alone]
    assert {attempt.name for attempt in chosen} == set(QUICK)
    with world(tmp_path) as around:
        assert winners(inside, chosen, around) == []
    (forged,) = [attempt for attempt in forgeries() if attempt.name == "both to every file"]
    assert run_python(forged.code.join(["import os\n", ""])).status == "error"
    (stubborn,) = [attempt for attempt in endless() if attempt.name == "signals ignored"]
    assert run_python(stubborn.code, seconds=0.2).status == "timeout"
    assert new_processes() == set()


@pytest.mark.slow
@needs_namespaces
def test_no_attempt_gets_what_it_wants(tmp_path, new_processes):
    assert len(attempts()) + len(endless()) + len(forgeries()) >= 200
    with world(tmp_path) as around:
        assert winners(inside, attempts(), around) == []
        assert (tmp_path / "secret.txt").read_text() == f"{around.secret}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.txt", "unix"]
    assert new_processes() == set()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="attempts are Linux's")
def test_outside_each_attempt_wins(tmp_path):
    """Those that are safe to let win: else nothing would be shown by their failing inside."""
    rights = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    is_root = os.geteuid() == 0 and rights >> 21 & 1
    chosen = [one for one in attempts() if one.control != NEVER and (is_root or one.control != ROOT)]
    folder = tmp_path / "empty"
    folder.mkdir()
    with world(tmp_path) as around:
        won = winners(outside(folder), chosen, around)
    assert [
        f"{attempt.kind}: {attempt.name}" for attempt in chosen if f"{attempt.kind}: {attempt.name}" not in won
    ] == []
    assert len(won) >= 150


@pytest.mark.slow
@needs_namespaces
def test_nothing_outlives_its_time(tmp_path, new_processes):
    prelude = "import os, sys, ctypes; libc = ctypes.CDLL(None); x86 = os.uname().machine == 'x86_64'\n"
    reaper = ctypes.CDLL(None)
    reaper.prctl(36, 1, 0, 0, 0)  # whoever loses its parent becomes our child, and would be found
    try:
        for attempt in endless():
            done = run_python(prelude + attempt.code, seconds=0.5)
            assert (attempt.name, done.status, done.output[:6]) == (attempt.name, "timeout", "begun\n")
            assert new_processes() == set()
    finally:
        reaper.prctl(36, 0, 0, 0, 0)
    for attempt in endless():
        command = [sys.executable, "-I", "-S", "-c", prelude + attempt.code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"begun\n"
            time.sleep(0.6)
            assert process.poll() is None, attempt.name
            process.kill()


@pytest.mark.slow
@needs_namespaces
def test_no_end_is_forged(tmp_path):
    with world(tmp_path) as around:
        for attempt in forgeries():
            done = run_python(f"{around.prelude}\n{attempt.code}", seconds=60)
            assert (attempt.name, done.status) == (attempt.name, "error")
        # Without a sandbox, the same code writes into whatever pipe it was left with.
        for attempt in forgeries():
            if attempt.control in ("stdout", "stderr", "every file"):
                read, write = os.pipe()
                command = [sys.executable, "-I", "-S", "-c", f"{around.prelude}\n{attempt.code}"]
                files = {"stdout": {"stdout": write}, "stderr": {"stderr": write}}.get(attempt.control, {})
                assert subprocess.run(command, pass_fds=[write], **files).returncode == 3
                os.close(write)
                with os.fdopen(read, "rb") as pipe:
                    assert pipe.read(), attempt.name
