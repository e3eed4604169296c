"""The far side of `llmlab.core.sandbox`: a program of its own that shuts itself in and then runs the code.

`python -I -S sandbox_child.py` with the numbers of `Request`; on stdin the filter of system calls, then the code. Two
processes: the outer one sets the stage and waits; the inner one, process 1 of its own world, gives up every right and
becomes the code. Only the outer one holds the pipe for the verdict by then, and no call that the code has left reaches
it. Imports little, as each start pays for it, and nothing of llmlab.
"""

import _signal as signal  # without its enums, which take as long to load as Python
import contextlib
import ctypes
import os
import resource
import select
import sys
import types
from collections import namedtuple

# What the code may import of the standard library although its shared libraries are out of sight by then.
PRELOADED = ("math", "zlib", "_bz2", "_lzma", "_decimal", "pyexpat")
HIDDEN = ("site-packages", "dist-packages")
FOLDER = "/tmp"
FOLDER_FILES = 1024
OPEN_FILES = 64

# From linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h.
NEW_WORLD = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mounts, host name, IPC, processes, network
NEW_USER = 0x10000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 1 << 14, 1 << 18
KEPT_FLAGS = NO_EXEC | 1024 | 2048  # of what is bound, with how access times are kept
DETACH = 2
SET_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES, FILTER = 1, 22, 38, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPABILITIES_VERSION = 0x20080522
EVERY_USER = 2**32 - 1
NOBODY = 65534

Request = namedtuple("Request", "pipe parent memory_bytes folder_bytes threads cpu_seconds filter_bytes")

libc = ctypes.CDLL(None, use_errno=True)


def main(request: Request) -> None:
    """Runs the request, and writes what came of it to its pipe, a line each: refused WHY, started, ended EXIT_CODE."""
    verdict = 3  # low, whatever number it has: what is closed for the code are the files up to OPEN_FILES
    os.dup2(request.pipe, verdict)
    if request.pipe != verdict:
        os.close(request.pipe)
    with open(0, "rb", closefd=False) as file:
        calls, code = file.read(request.filter_bytes), file.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    inner = 0

    def stop(*_: object) -> None:
        if not inner:
            os._exit(1)
        os.kill(inner, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            __import__(name)
    try:
        as_root = _leave_the_world()
        _die_with_parent(signal.SIGTERM)
        if os.getppid() != request.parent:
            return
        _only_see_the_library(request.folder_bytes)
        outer_lives, outer = os.pipe()
        inner = os.fork()
    except OSError as error:
        _tell(verdict, f"refused {error}")
        return
    if inner:
        os.close(1)
        os.close(2)
        _, status = os.waitpid(inner, 0)
        _tell(verdict, f"ended {os.waitstatus_to_exitcode(status)}")
        return
    try:
        os.close(outer)
        _give_up_rights(request, as_root)
        if select.select([outer_lives], [], [], 0)[0]:  # it ended before we asked to end with it
            os._exit(1)
        _filter_calls(calls)
        _tell(verdict, "started")
        os.closerange(verdict, OPEN_FILES)
    except OSError as error:
        _tell(verdict, f"refused {error}")
        os._exit(1)
    _become(code.decode(errors="surrogatepass"))


def _leave_the_world() -> bool:
    """Into namespaces of our own; whether as root. Who is not, is alone in a user namespace as well."""
    user, group = os.geteuid(), os.getegid()
    with open("/proc/self/uid_map") as file:
        is_root = user == 0 and file.read().split() == ["0", "0", str(EVERY_USER)]
    if is_root:
        try:
            _done(libc.unshare(NEW_WORLD), "unshare")
        except PermissionError:
            is_root = False  # a container's root
    if not is_root:
        _done(libc.unshare(NEW_WORLD | NEW_USER), "unshare")
        for name, text in ("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1"):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return is_root


def _only_see_the_library(folder_bytes: int) -> None:
    """The root becomes an empty, read-only folder with the standard library in it, and /tmp, empty and to write in."""
    library = [path for path in sys.path if os.path.exists(path)]
    library = [path for path in library if not any(path.startswith(f"{other}/") for other in library)]
    _mount("none", "/", "", RECURSIVE | PRIVATE)
    root = "/tmp"
    _mount("sandbox", root, "tmpfs", NO_SUID | NO_DEVICES, "mode=0755,size=1m")
    os.mkdir(f"{root}/.old")
    number = PIVOT_ROOT[os.uname().machine]
    _done(libc.syscall(number, root.encode(), f"{root}/.old".encode()), "pivot_root")
    os.chdir("/")
    for path in library:
        source = f"/.old{path}"
        if os.path.isdir(source):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.close(os.open(path, os.O_CREAT))
        _mount(source, path, "", BIND)
        kept = os.statvfs(path).f_flag & KEPT_FLAGS
        _mount("none", path, "", BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES | kept)
        for name in HIDDEN:
            if os.path.isdir(f"{path}/{name}"):
                _mount("sandbox", f"{path}/{name}", "tmpfs", READ_ONLY, "mode=0755,size=4k")
    os.makedirs(FOLDER, exist_ok=True)
    _done(libc.umount2(b"/.old", DETACH), "umount")
    os.rmdir("/.old")
    _mount("none", "/", "", BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEVICES)
    limits = f"mode=1777,size={folder_bytes},nr_inodes={FOLDER_FILES}"
    _mount("sandbox", FOLDER, "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, limits)
    os.chdir(FOLDER)
    _done(libc.sethostname(b"sandbox", len(b"sandbox")), "sethostname")


def _give_up_rights(request: Request, as_root: bool) -> None:
    os.setsid()  # a signal to our group would reach the outer process
    for number in (signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    limits = {
        resource.RLIMIT_AS: request.memory_bytes,
        resource.RLIMIT_FSIZE: request.folder_bytes,
        resource.RLIMIT_NPROC: request.threads,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CPU: request.cpu_seconds,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 256,
        resource.RLIMIT_STACK: 8 << 20,
    }
    for limit, most in limits.items():
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
    if as_root:
        # A user that nothing belongs to, nor another sandbox: threads are counted by user.
        user = 2**30 + int.from_bytes(os.urandom(3), "little")
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0)
    _done(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _die_with_parent(signal.SIGKILL)  # after the change of user, which takes it back


def _filter_calls(program: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    _done(libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    loaded = Program(len(program) // 8, program)
    _done(libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(loaded), 0, 0), "seccomp")


def _become(code: str) -> None:
    """Runs the code as Python runs a file: its threads are waited for, its exit code is the process's."""
    os.environ.clear()
    sys.argv = ["-"]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    try:
        exec(compile(code, "<code>", "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        import linecache
        import traceback

        linecache.cache["<code>"] = (len(code), None, code.splitlines(keepends=True), "<code>")
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, trace)
        sys.exit(1)


def _die_with_parent(number: int) -> None:
    _done(libc.prctl(SET_DEATH_SIGNAL, number, 0, 0, 0), "prctl")


def _mount(source: str, path: str, kind: str, flags: int, options: str = "") -> None:
    encoded = [text.encode() or None for text in (source, path, kind)]
    _done(libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None), f"mount {path}")


def _done(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _tell(verdict: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(verdict, f"{line}\n".encode())


if __name__ == "__main__":
    main(Request(*map(int, sys.argv[1:])))
