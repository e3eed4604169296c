"""Code that tries to get out of the sandbox, each attempt with how to tell that it did.

An attempt wins when it prints what it should not know (a trophy), or calls `win()` where it got what it should not
get. `world` is what there is to get at: a secret file, servers that tell a secret, a variable of the environment.
"""

# ruff: noqa: E501 - an attempt is a line
import contextlib
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from llmlab.core import errors

ROOT = "root"  # wins outside only for root
NEVER = "never"  # too dangerous, or impossible, outside


class Attempt(NamedTuple):
    """`control`: who wins with it outside the sandbox; empty for everybody. alone: it may end its process."""

    kind: str
    name: str
    code: str
    trophy: str = "the mark"
    control: str = ""
    alone: bool = False


class World(NamedTuple):
    secret: str
    mark: str
    prelude: str


@contextlib.contextmanager
def world(folder: Path):
    """Something to steal, reached by the names that the prelude defines."""
    secret, mark = secrets.token_hex(8), secrets.token_hex(8)
    (folder / "secret.txt").write_text(f"{secret}\n")
    abstract = f"\0llmlab-{secrets.token_hex(8)}"
    servers = {
        "TCP": _server(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0), secret),
        "UDP": _server(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0), secret),
        "UNIX": _server(socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "unix"), secret),
        "ABSTRACT": _server(socket.AF_UNIX, socket.SOCK_STREAM, abstract, secret),
    }
    names = {
        "SECRET": str(folder / "secret.txt"),
        "PARENT": os.getpid(),
        "TCP": servers["TCP"].getsockname()[1],
        "UDP": servers["UDP"].getsockname()[1],
        "UNIX": str(folder / "unix"),
        "ABSTRACT": abstract,
        "SOURCE": errors.__file__,
        "PACKAGE": pytest.__file__,
    }
    lines = [f"{name} = {value!r}" for name, value in names.items()]
    # Spelt backwards, so that no traceback shows it.
    lines += ["import os, sys, ctypes", f"def win(): os.write(1, {mark[::-1]!r}[::-1].encode())"]
    lines += ["libc = ctypes.CDLL(None, use_errno=True)", "x86 = os.uname().machine == 'x86_64'"]
    lines += ["def call(*a):\n  assert libc.syscall(*a) >= 0, os.strerror(ctypes.get_errno())\n  win()"]
    before = os.environ.get("LLMLAB_SECRET")
    os.environ["LLMLAB_SECRET"] = secret
    try:
        yield World(secret, mark, "\n".join(lines))
    finally:
        os.environ.pop("LLMLAB_SECRET")
        if before is not None:
            os.environ["LLMLAB_SECRET"] = before
        for server in servers.values():
            server.close()


def _server(family, kind, address, secret):
    """Tells the secret to whoever connects, or sends it a word."""
    server = socket.socket(family, kind)
    server.bind(address)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                if kind == socket.SOCK_DGRAM:
                    server.sendto(secret.encode(), server.recvfrom(99)[1])
                else:
                    with server.accept()[0] as client:
                        client.sendall(f"{secret}\r\n".encode())

    if kind == socket.SOCK_STREAM:
        server.listen()
    threading.Thread(target=serve, daemon=True).start()
    return server


PATHS = {
    "secret": ("SECRET", "the secret"),
    "passwd": ("'/etc/passwd'", "root:"),
    "parent": ("f'/proc/{PARENT}/status'", "VmPeak"),
    "source": ("SOURCE", "class DiskFull"),
    "package": ("PACKAGE", "from _pytest"),
}
READ = {
    "open": "print(open(P).read())",
    "os.open": "print(os.read(os.open(P, 0), 9999))",
    "FileIO": "import io; print(io.FileIO(P).read())",
    "pathlib": "import pathlib; print(pathlib.Path(P).read_text())",
    "codecs": "import codecs; print(codecs.open(P, encoding='utf-8').read())",
    "libc": "b = ctypes.create_string_buffer(9999); libc.read(libc.open(P.encode(), 0), b, 9999); print(b.value)",
    "openat": "print(os.read(libc.syscall(257 if x86 else 56, -100, P.encode(), 0), 9999))",
    "openat2": "h = (ctypes.c_uint64 * 3)(); print(os.read(libc.syscall(437, -100, P.encode(), h, 24), 9999))",
    "symlink": "os.path.lexists('l') and os.unlink('l'); os.symlink(P, 'l'); print(open('l').read())",
    "dots": "print(open('../' * 40 + P).read())",
    "folder fd": "print(os.read(os.open('..' + P, 0, dir_fd=os.open('/', 0)), 9999))",
    "chdir": "os.chdir(os.path.dirname(P)); print(open(os.path.basename(P)).read())",
    "linecache": "import linecache; print(linecache.getlines(P))",
    "loader": "import importlib.machinery as m; print(m.SourceFileLoader('x', P).get_data(P))",
    "copy": "import shutil; shutil.copyfile(P, 'c'); print(open('c').read())",
    "fileinput": "import fileinput; print(list(fileinput.input(P)))",
    "cat": "import subprocess; print(subprocess.run(['cat', P], capture_output=True).stdout)",
    "root of process": "print(open('/proc/self/root' + P).read())",
    "root of the parent": "print(open(f'/proc/{PARENT}/root' + P).read())",
    "fd of process": "f = os.open(P, 0); print(open(f'/proc/self/fd/{f}').read())",
}
FILES = {
    "list root": ("print(os.listdir('/'))", "etc"),
    "list home": ("print(os.listdir(os.path.dirname(SECRET)))", "secret.txt"),
    "list proc": ("print(os.listdir('/proc'))", "meminfo"),
    "list dev": ("print(os.listdir('/dev'))", "null"),
    "walk": ("import glob; print(glob.glob(os.path.dirname(SECRET) + '/**', recursive=True))", "secret.txt"),
    "stat": ("os.stat(SECRET); win()", "the mark"),
    "mmap": ("import mmap; print(mmap.mmap(os.open(SECRET, 0), 0, prot=1)[:])", "the secret"),
    "environ": ("print(os.environ)", "the secret"),
    "getenv": ("libc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'LLMLAB_SECRET'))", "the secret"),
    "proc environ": ("print(open('/proc/self/environ').read())", "the secret"),
    "append": ("open(SECRET, 'a').write(''); win()", "the mark"),
    "hard link": ("os.link(SECRET, SECRET + '.2'); os.unlink(SECRET + '.2'); win()", "the mark"),
    "rename": ("os.rename(SECRET, SECRET + '.3'); os.rename(SECRET + '.3', SECRET); win()", "the mark"),
    "chmod": ("os.chmod(SECRET, 0o644); win()", "the mark"),
    "utime": ("os.utime(SECRET); win()", "the mark"),
    "make beside": ("d = os.path.dirname(SECRET) + '/d'; os.mkdir(d); os.rmdir(d); win()", "the mark"),
    "make in library": ("d = os.path.dirname(os.__file__) + '/zz'; os.mkdir(d); os.rmdir(d); win()", "the mark"),
    "make in root": ("os.mkdir('/llmlab-zz'); os.rmdir('/llmlab-zz'); win()", "the mark"),
    "packages": ("import site; print(os.listdir(os.path.dirname(os.__file__) + '/site-packages'))", "README.txt"),
    "disk": ("open('/dev/vda', 'rb').read(9); win()", "the mark"),
    "memory": ("open('/dev/mem', 'rb').read(9); win()", "the mark"),
    "terminal": ("open('/dev/tty', 'w').write('x'); win()", "the mark"),
}
NOT_FOR_ALL = {"make in library": ROOT, "make in root": ROOT}
NOT_OUTSIDE = ("packages", "disk", "memory", "terminal")

CONNECT = {
    "create_connection": "import socket; print(socket.create_connection(('127.0.0.1', TCP)).recv(99))",
    "_socket": "import _socket; s = _socket.socket(); s.connect(('127.0.0.1', TCP)); print(s.recv(99))",
    "non-blocking": "import socket, select; s = socket.socket(); s.setblocking(0); s.connect_ex(('127.0.0.1', TCP)); "
    "select.select([s], [], [], 5); print(s.recv(99))",
    "http": "import http.client as h\ntry: h.HTTPConnection('127.0.0.1', TCP, timeout=5).request('GET', '/') or "
    "print(h.HTTPConnection('127.0.0.1', TCP).connect() or win())\nexcept h.HTTPException: win()",
    "urllib": "import urllib.request as u, http.client as h\ntry: u.urlopen(f'http://127.0.0.1:{TCP}')\n"
    "except h.BadStatusLine as e: print(e)",
    "asyncio": "import asyncio\nasync def f(): r, _ = await asyncio.open_connection('127.0.0.1', TCP); "
    "print(await r.read())\nasyncio.run(f())",
    "ftp": "import ftplib\ntry: print(ftplib.FTP().connect('127.0.0.1', TCP, 5))\nexcept ftplib.Error as e: print(e)",
    "smtp": "import smtplib\ntry: smtplib.SMTP('127.0.0.1', TCP, timeout=5)\nexcept (smtplib.SMTPException, ValueError): win()",
    "libc": "import struct; s = libc.socket(2, 1, 0); a = struct.pack('=H', 2) + struct.pack('>H', TCP) + "
    "bytes([127, 0, 0, 1] + [0] * 8); assert not libc.connect(s, a, 16); print(os.read(s, 99))",
    "raw call": "import struct; s = libc.syscall(41 if x86 else 198, 2, 1, 0); a = struct.pack('=H', 2) + "
    "struct.pack('>H', TCP) + bytes([127, 0, 0, 1] + [0] * 8); assert not libc.connect(s, a, 16); print(os.read(s, 99))",
    "udp": "import socket; s = socket.socket(2, 2); s.sendto(b'x', ('127.0.0.1', UDP)); s.settimeout(5); print(s.recv(99))",
    "unix": "import socket; s = socket.socket(1); s.connect(UNIX); print(s.recv(99))",
    "abstract": "import socket; s = socket.socket(1); s.connect(ABSTRACT); print(s.recv(99))",
    "client": "from multiprocessing.connection import Client; Client(UNIX); win()",
    "listen": "import socket; s = socket.create_server(('127.0.0.1', 0)); win()",
    "server": "import socketserver as s; s.TCPServer(('127.0.0.1', 0), s.BaseRequestHandler).server_close(); win()",
}
FAMILIES = {
    "inet tcp": (2, 1, 0, ""),
    "inet udp": (2, 2, 0, ""),
    "inet raw": (2, 3, 1, ROOT),
    "inet6 tcp": (10, 1, 0, NEVER),
    "inet6 udp": (10, 2, 0, NEVER),
    "unix": (1, 1, 0, ""),
    "unix datagrams": (1, 2, 0, ""),
    "netlink": (16, 3, 0, ""),
    "packets": (17, 3, 0, ROOT),
    "crypto": (38, 5, 0, NEVER),
    "virtual machine": (40, 1, 0, NEVER),
    "bluetooth": (31, 3, 0, NEVER),
    "can": (29, 3, 0, NEVER),
}

CHILD = "\nif pid == 0:\n  win(); os._exit(0)\nos.waitpid(pid, 0)"
PYTHON = "[sys.executable, '-I', '-S', '-c', 'print(2 ** 100)']"
BIG = "1267650600228229401496703205376"
PROCESS = {
    "fork": ("pid = os.fork()" + CHILD, "the mark"),
    "forkpty": ("import pty; pid, f = os.forkpty()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0); win()", "the mark"),
    "pty.fork": ("import pty; pid, f = pty.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0); win()", "the mark"),
    "libc.fork": ("pid = libc.fork(); assert pid >= 0" + CHILD, "the mark"),
    "clone": ("pid = libc.syscall(56 if x86 else 220, 17, 0, 0, 0, 0); assert pid >= 0" + CHILD, "the mark"),
    "clone parent": ("pid = libc.syscall(56 if x86 else 220, 0x8011, 0, 0, 0, 0); assert pid >= 0\nif pid == 0:\n"
    "  win(); os._exit(0)\nimport time; time.sleep(0.2)", "the mark"),
    "clone3": ("a = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17); pid = libc.syscall(435, a, 88); assert pid >= 0" + CHILD,
    "the mark"),
    "double fork": ("pid = os.fork()\nif pid == 0:\n  if os.fork() == 0: win()\n  os._exit(0)\nos.waitpid(pid, 0)\n"
    "import time; time.sleep(0.2)", "the mark"),
    "daemon": ("pid = os.fork()\nif pid == 0:\n  os.setsid(); win(); os._exit(0)\nos.waitpid(pid, 0)", "the mark"),
    "posix_spawn": (f"a = {PYTHON}; os.waitpid(os.posix_spawn(a[0], a, {{}}), 0)", BIG),
    "posix_spawnp": ("os.waitpid(os.posix_spawnp('expr', ['expr', '1', '+', '1267650600'], os.environ), 0)", "1267650601"),
    "spawnv": ("os.spawnvp(os.P_WAIT, 'expr', ['expr', '1', '+', '1267650600'])", "1267650601"),
    "system": ("os.system('expr 1 + 1267650600')", "1267650601"),
    "popen": ("print(os.popen('expr 1 + 1267650600').read())", "1267650601"),
    "subprocess": (f"import subprocess; print(subprocess.run({PYTHON}, capture_output=True).stdout)", BIG),
    "shell": ("import subprocess; print(subprocess.getoutput('expr 1 + 1267650600'))", "1267650601"),
    "preexec": (f"import subprocess; subprocess.run({PYTHON}, preexec_fn=win)", "the mark"),
    "libc.system": ("libc.system(b'expr 1 + 1267650600')", "1267650601"),
    "multiprocessing": ("import multiprocessing as m; p = m.get_context('fork').Process(target=win); p.start(); p.join()",
    "the mark"),
    "pool": ("import multiprocessing as m; from concurrent.futures import ProcessPoolExecutor as E\n"
    "with E(1, mp_context=m.get_context('fork')) as e: print(e.submit(pow, 2, 100).result())", BIG),
    "asyncio": (f"import asyncio\nasync def f():\n  p = await asyncio.create_subprocess_exec(*{PYTHON}); await p.wait()\n"
    "asyncio.run(f())", BIG),
    "threads": ("import threading, time\nfor i in range(100): threading.Thread(target=time.sleep, args=(0.5,)).start()\n"
    "win()", "the mark"),
    "preload": (f"import subprocess; subprocess.run({PYTHON}, env={{'LD_PRELOAD': '/tmp/x.so'}})", BIG),
    "killing all": ("os.kill(-1, 0); os.kill(PARENT, 0); win()", "the mark"),
    "killing the parent": ("os.kill(PARENT, 0); win()", "the mark"),
    "seeing the parent": ("assert os.getppid(); win()", "the mark"),
    "its group": ("os.getpgid(PARENT); win()", "the mark"),
}  # fmt: skip
EXEC = {
    "execv": (f"a = {PYTHON}; os.execv(a[0], a)", BIG),
    "execve by fd": (f"a = {PYTHON}; os.execve(os.open(a[0], 0), a, {{}})", BIG),
    "libc.execv": ("a = (ctypes.c_char_p * 4)(b'/bin/echo', b'12676', b'50600', None); libc.execv(b'/bin/echo', a)",
    "12676 50600"),
    "loader": ("a = ['/lib64/ld-linux-x86-64.so.2', '/bin/echo', '12676', '50600']; os.execv(a[0], a)", "12676 50600"),
    "memory file": ("f = os.memfd_create('x'); os.write(f, open('/bin/echo', 'rb').read())\n"
    "os.execve(f, ['echo', '12676', '50600'], {})", "12676 50600"),
    "script": ("open('s', 'w').write('#!/bin/sh\\necho 12676 50600'); os.chmod('s', 0o755); os.execv('./s', ['s'])",
    "12676 50600"),
}  # fmt: skip

MEBIBYTES = 128
FILL = f"n = {MEBIBYTES} << 20\n"
MEMORY = {
    "bytearray": "x = bytearray(n); x[::4096] = b'x' * len(x[::4096])",
    "bytes": "x = b'x' * n",
    "list": "x = [None] * (n // 8)",
    "growing list": "x = []\nwhile len(x) < n >> 20: x.append(bytearray(b'x') * (1 << 20))",
    "dict": "x = {i: i for i in range(n // 100)}",
    "set": "x = set(range(n // 60))",
    "str": "x = 'x' * n",
    "doubling str": "x = 'x'\nwhile len(x) < n: x += x",
    "join": "x = ''.join('abc' * 1000 for _ in range(n // 3000))",
    "array": "import array; x = array.array('b', [1]) * n",
    "deque": "import collections; x = collections.deque(range(n // 40))",
    "BytesIO": "import io; x = io.BytesIO(); [x.write(b'x' * (1 << 20)) for _ in range(n >> 20)]",
    "integer": "x = 1 << (8 * n)",
    "tuple": "x = (0,) * (n // 8)",
    "mmap": "import mmap; x = mmap.mmap(-1, n, flags=mmap.MAP_PRIVATE); x.write(b'x' * n)",
    "shared mmap": "import mmap; x = mmap.mmap(-1, n); x.write(b'x' * n)",
    "many mmaps": "import mmap; x = [mmap.mmap(-1, 1 << 20) for _ in range(n >> 20)]; [m.write(b'x' * (1 << 20)) for m in x]",
    "memory file": "f = os.memfd_create('x'); [os.write(f, b'x' * (1 << 20)) for _ in range(n >> 20)]; os.close(f)",
    "file": "f = open('big', 'wb'); [f.write(b'x' * (1 << 20)) for _ in range(n >> 20)]; f.close(); os.unlink('big')",
    "unlinked file": "f = os.open('u', 66); os.unlink('u'); [os.write(f, b'x' * (1 << 20)) for _ in range(n >> 20)]",
    "many files": "for i in range(n >> 20):\n  assert os.write(os.open('unlinked', 66), b'x' * (1 << 20)) == 1 << 20; "
    "os.unlink('unlinked')",
    "sparse file": "f = os.open('s', 66); os.unlink('s'); os.ftruncate(f, n); os.pwrite(f, b'x', n - 1)",
    "shared memory": "from multiprocessing.shared_memory import SharedMemory as S; x = S(create=True, size=n); "
    "x.buf[:] = b'x' * n; x.unlink()",
    "System V": "i = libc.syscall(29 if x86 else 194, 0, n, 0o1600); assert i >= 0; "
    "libc.syscall(31 if x86 else 195, i, 0, 0)",
    "malloc": "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]; p = libc.malloc("
    "ctypes.c_size_t(n)); assert p; ctypes.memset(p, 1, n); libc.free(p)",
    "many mallocs": "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]; x = [libc.malloc(1 << "
    "20) for _ in range(n >> 20)]; assert all(x); [libc.free(p) for p in x]",
    "brk": "libc.sbrk.restype = ctypes.c_void_p; libc.sbrk.argtypes = [ctypes.c_ssize_t]; assert libc.sbrk(n) != "
    "ctypes.c_void_p(-1).value; libc.sbrk(-n)",
    "zlib": "import zlib; x = zlib.decompress(zlib.compress(bytes(1 << 20), 9) and zlib.compress(bytes(n), 1))",
    "stacks": "import threading, time; threading.stack_size(32 << 20); x = [threading.Thread(target=time.sleep, "
    "args=(0.1,)) for _ in range(n >> 25)]; [t.start() for t in x]; [t.join() for t in x]; threading.stack_size(0)",
    "raising the limit": "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1)); x = b'x' * n",
    "raw limit": "libc.syscall(302 if x86 else 261, 0, 9, (ctypes.c_uint64 * 2)(2**64 - 1, 2**64 - 1), 0); x = b'x' * n",
    "generator": "x = list(bytes(999) for _ in range(n // 999))",
}

ENDLESS = {
    "busy": "while True: pass",
    "sleep": "import time; time.sleep(99)",
    "sleeps": "import time\nwhile True:\n  try: time.sleep(99)\n  except BaseException: pass",
    "all excepted": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "signals ignored": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\nwhile True: pass",
    "signals caught": "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, lambda *_: None)\n"
    "  except (OSError, ValueError): pass\nwhile True: pass",
    "signals blocked": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
    "one long operation": "x = 10 ** 10 ** 8",
    "sum": "sum(range(10 ** 12))",
    "regular expression": "import re; re.match('(a+)+b', 'a' * 40)",
    "thread": "import threading\ndef f():\n  while True: pass\nthreading.Thread(target=f).start()",
    "many threads": "import threading\ndef f():\n  while True: pass\nfor _ in range(8): threading.Thread(target=f).start()",
    "sleeping thread": "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()",
    "deadlock": "import threading; l = threading.Lock(); l.acquire(); l.acquire()",
    "at exit": "import atexit, time; atexit.register(time.sleep, 99)",
    "finaliser": "import time\nclass A:\n  def __del__(self, sleep=time.sleep): sleep(99)\na = A(); a.b = a; del a",
    "exit caught": "import time\ntry: sys.exit(0)\nfinally: time.sleep(99)",
    "pipe": "r, w = os.pipe(); os.read(r, 1)",
    "select": "import select; select.select([], [], [])",
    "pause": "import signal\nwhile True: signal.pause()",
    "futex": "x = ctypes.c_int(0)\nwhile True: libc.syscall(202 if x86 else 98, ctypes.byref(x), 0, 0, None)",
    "stopped": "import signal, time; os.kill(os.getpid(), signal.SIGSTOP); time.sleep(99)",
    "silent": "os.close(1); os.close(2)\nwhile True: pass",
    "dribble": "import time\nwhile True: print('.'); time.sleep(0.01)",
    "no death signal": "libc.prctl(1, 0, 0, 0, 0)\nwhile True: pass",
    "own session": "import time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(99)",
    "no CPU limit": "import resource as r\ntry: r.setrlimit(r.RLIMIT_CPU, (-1, -1))\nexcept ValueError: pass\nwhile True: pass",
    "garbage collection": "import gc\nwhile True: gc.collect()",
    "switch interval": "import threading\nsys.setswitchinterval(1e6)\ndef f():\n  while True: pass\n"
    "threading.Thread(target=f).start(); f()",
    "alarm": "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(0, .01, .01)\nwhile True: pass",
}

LINES = {
    "ended": b"ended 0\n",
    "both": b"started\nended 0\n",
    "after a line": b"\nended 0\n",
    "refused": b"refused all is well\n",
    "outcome": b'{"status": "ok", "output": "42"}\nOutcome(output="42", error="", status="ok")\n',
}
CHANNELS = {
    "stdout": "os.write(1, L)",
    "stderr": "os.write(2, L)",
    "every file": "for f in range(3, 1024):\n  try: os.write(f, L)\n  except OSError: pass",
    "every socket": "for f in range(3, 1024): libc.send(f, L, len(L), 0x4000)",
    "every file of the parent": "import glob\nfor f in glob.glob(f'/proc/{os.getppid()}/fd/*') + glob.glob(f'/proc/{PARENT}/fd/*'):\n"
    "  try: os.write(os.open(f, 1 | 2048), L)\n  except OSError: pass",
}
# What the code does before it exits with 3: to be believed, it would have to come out as anything but an error.
FORGE = {
    "its maker's frames": "f = sys._getframe()\nwhile f:\n  for name in ('_tell', 'verdict'):\n    if name in f.f_globals or "
    "name in f.f_locals:\n      try: f.f_globals['_tell'](f.f_locals.get('verdict', 3), 'ended 0')\n"
    "      except Exception: pass\n  f = f.f_back",
    "all functions": "import gc\nfor o in gc.get_objects():\n  if getattr(o, '__name__', '') == '_tell':\n"
    "    for f in range(3, 64):\n      try: o(f, 'ended 0')\n      except OSError: pass",
    "another exit": "os._exit = sys.exit = lambda code: None",
    "the parent killed": "import signal\nfor p in (os.getppid(), PARENT, 0, -1):\n  for s in (9, 15, 2):\n"
    "    try: p > 1 and os.kill(p, s)\n    except OSError: pass",
    "the group killed": "import signal; signal.signal(15, signal.SIG_IGN)\ntry: os.killpg(0, 15)\nexcept OSError: pass",
    "the parent traced": "libc.ptrace(16, PARENT, 0, 0); libc.ptrace(16, os.getppid(), 0, 0); libc.ptrace(0, 0, 0, 0)",
    "the parent's memory": "b = ctypes.create_string_buffer(8); v = (ctypes.c_void_p * 2)(ctypes.addressof(b), 8)\n"
    "for p in (PARENT, os.getppid()): libc.process_vm_writev(p, v, 1, v, 1, 0)",
    "memory by file": "for p in (PARENT, os.getppid(), 'self'):\n  try: open(f'/proc/{p}/mem', 'r+b').write(b'x')\n"
    "  except OSError: pass",
    "closed files": "os.close(1); os.close(2)",
    "the program": "import __main__; __main__.__file__ = 'x'\nfor f in sys.path:\n  try: open(f + '/sitecustomize.py', 'w')\n"
    "  except OSError: pass",
    "module": "class M:\n  def __getattr__(self, n): return lambda *a, **k: 0\nsys.modules.update(os=M(), sys=M())",
}

X86_CALLS = {
    "unshare user": ("272, 0x10000000", ""),
    "unshare net": ("272, 0x40000000", ROOT),
    "unshare mounts": ("272, 0x20000", ROOT),
    "setns": ("308, os.open('/proc/self/ns/net', 0), 0", ROOT),
    "mount": ("165, b'none', b'/tmp', b'tmpfs', 0, b'size=1m'", NEVER),
    "new mount": ("430, b'tmpfs', 0", ROOT),
    "umount": ("166, b'/tmp', 2", NEVER),
    "pivot_root": ("155, b'.', b'.'", NEVER),
    "chroot": ("161, b'.'", NEVER),
    "trace me": ("101, 0, 0, 0, 0", NEVER),
    "trace the parent": ("101, 16, PARENT, 0, 0", NEVER),
    "read the parent": ("310, PARENT, (ctypes.c_uint64 * 2)(), 0, (ctypes.c_uint64 * 2)(), 0, 0", ""),
    "prctl": ("157, 1, 0, 0, 0, 0", ""),
    "dumpable": ("157, 4, 1, 0, 0, 0", ""),
    "capset": ("126, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()", NEVER),
    "setuid": ("105, 0", ROOT),
    "setresuid": ("117, 0, 0, 0", ROOT),
    "setgroups": ("116, 0, 0", ROOT),
    "memory file": ("319, b'x', 0", ""),
    "secret memory": ("447, 0", NEVER),
    "page faults": ("323, 1", ""),
    "BPF": ("321, 0, 0, 0", NEVER),
    "perf": ("298, (ctypes.c_uint32 * 32)(1, 128), 0, -1, -1, 0", NEVER),
    "add_key": ("248, b'user', b'llmlab-x', b'y', 1, -2", NEVER),
    "keyctl": ("250, 0, -3, 0", NEVER),
    "ring": ("425, 1, (ctypes.c_uint8 * 120)()", NEVER),
    "handles": ("303, -100, b'.', (ctypes.c_uint32 * 64)(128), ctypes.byref(ctypes.c_int()), 0", ""),
    "mknod": ("133, b'n', 0o20666, 0x103", ROOT),
    "personality": ("135, 0x0040000", NEVER),
    "pidfd": ("434, PARENT, 0", ""),
    "watch files": ("294, 0", ""),
    "watch all files": ("300, 0, 0", NEVER),
    "host name": ("170, b'x', 1", NEVER),
    "scheduler": ("144, 0, 3, ctypes.byref(ctypes.c_int(0))", ""),
    "priority": ("141, 0, 0, 19", NEVER),
    "ports": ("173, 0, 1, 1", NEVER),
    "segments": ("154, 0, (ctypes.c_uint8 * 16)(), 16", ""),
    "kernel log": ("103, 10, 0, 0", ""),
    "clock": ("164, 0, 0", NEVER),
    "modules": ("313, 0, b'', 0", NEVER),
    "chown": ("92, b'.', 0, 0", ROOT),
    "socket": ("41, 1, 1, 0", ""),
    "timer": ("283, 1, 0", ""),
    "signal file": ("289, -1, (ctypes.c_uint64 * 1)(), 8, 0", ""),
    "landlock": ("444, 0, 0, 1", NEVER),
    "x32 getpid": ("0x40000000 + 39", NEVER),
    "x32 socket": ("0x40000000 + 41, 1, 1, 0", NEVER),
}
ALONE = {
    "32-bit call": "import mmap; m = mmap.mmap(-1, 4096, prot=7); m.write(bytes([0x53, 0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0x5b, 0xc3]))\n"
    "a = ctypes.addressof(ctypes.c_char.from_buffer(m)); assert ctypes.CFUNCTYPE(ctypes.c_int)(a)() > 0; win()",
}  # fmt: skip


def attempts() -> list[Attempt]:
    """All of them."""
    made = []
    for place, (path, trophy) in PATHS.items():
        for way, code in READ.items():
            outside = NEVER if way == "fd of process" and place == "parent" else ""
            made.append(Attempt("read", f"{place} by {way}", f"P = {path}\n{code}", trophy, outside))
    for name, (code, trophy) in FILES.items():
        outside = NEVER if name in NOT_OUTSIDE else NOT_FOR_ALL.get(name, "")
        made.append(Attempt("file", name, code, trophy, outside))
    for name, code in CONNECT.items():
        trophy = "the mark" if "win()" in code else "the secret"
        made.append(Attempt("connect", name, code, trophy))
    for name, (family, kind, protocol, outside) in FAMILIES.items():
        made.append(
            Attempt(
                "socket",
                name,
                f"import socket; socket.socket({family}, {kind}, {protocol}).close(); win()",
                control=outside,
            )
        )
        made.append(
            Attempt(
                "socket",
                f"{name} by a raw call",
                f"call(41 if x86 else 198, {family}, {kind}, {protocol})",
                control=outside,
            )
        )
    for name, (code, trophy) in PROCESS.items():
        outside = NEVER if name == "killing all" else ""
        made.append(Attempt("process", name, code, trophy, outside))
    for name, (code, trophy) in EXEC.items():
        made.append(Attempt("exec", name, code, trophy, NEVER if name == "loader" else "", alone=True))
    for name, code in MEMORY.items():
        made.append(Attempt("memory", name, f"{FILL}{code}\nwin()"))
    for name, (arguments, outside) in X86_CALLS.items():
        alone = name.startswith(("unshare", "setns"))  # what comes after would have lost its rights
        made.append(Attempt("call", name, f"assert x86; call({arguments})", control=outside, alone=alone))
    for name, code in ALONE.items():
        made.append(Attempt("call", name, f"assert x86; {code}", control=NEVER, alone=True))
    return made


def endless() -> list[Attempt]:
    """Those that do not end; they print a line when they have begun."""
    return [Attempt("endless", name, f"print('begun', flush=True)\n{code}") for name, code in ENDLESS.items()]


def forgeries() -> list[Attempt]:
    """Those that fail, and would have it said that they did not."""
    made = [
        Attempt("forge", f"{line} to {channel}", f"L = {text!r}\n{code}\nos._exit(3)", control=channel)
        for line, text in LINES.items()
        for channel, code in CHANNELS.items()
    ]
    return made + [
        Attempt("forge", name, f"leave = os._exit\n{code}\nleave(3)", control=NEVER) for name, code in FORGE.items()
    ]
