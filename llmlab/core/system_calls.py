"""The system calls that code in the sandbox may make, as a filter for Linux's seccomp: all others do not exist to it.

It can compute, read and write files that it sees, wait, and start threads. It can start no process and no program, make
no socket but a pair of its own, no memory that is no process's, no namespace, and watch nobody.
"""

import struct
from typing import NamedTuple


class Machine(NamedTuple):
    """A kind of processor: what the kernel calls it, and its column in the table of calls."""

    audit: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}

# Name, number on x86_64, number on aarch64; `-` where there is none. From the kernel's unistd.h.
_TABLE = """
read 0 63           write 1 64            open 2 -            close 3 57            stat 4 -
fstat 5 80          lstat 6 -             poll 7 -            lseek 8 62            mmap 9 222
mprotect 10 226     munmap 11 215         brk 12 214          rt_sigaction 13 134   rt_sigprocmask 14 135
rt_sigreturn 15 139 ioctl 16 29           pread64 17 67       pwrite64 18 68        readv 19 65
writev 20 66        access 21 -           pipe 22 -           select 23 -           sched_yield 24 124
mremap 25 216       msync 26 227          madvise 28 233      dup 32 23             dup2 33 -
pause 34 -          nanosleep 35 101      getitimer 36 102    alarm 37 -            setitimer 38 103
getpid 39 172       sendfile 40 71        sendto 44 206       recvfrom 45 207       sendmsg 46 211
recvmsg 47 212      shutdown 48 210       getsockname 51 204  getpeername 52 205    socketpair 53 199
getsockopt 55 209   clone 56 220          exit 60 93          wait4 61 260          kill 62 129
uname 63 160        fcntl 72 25           flock 73 32         fsync 74 82           fdatasync 75 83
truncate 76 45      ftruncate 77 46       getcwd 79 17        chdir 80 49           fchdir 81 50
rename 82 -         mkdir 83 -            rmdir 84 -          creat 85 -            link 86 -
unlink 87 -         symlink 88 -          readlink 89 -       chmod 90 -            fchmod 91 52
umask 95 166        gettimeofday 96 169   getrlimit 97 163    getrusage 98 165      times 100 153
getuid 102 174      getgid 104 176        geteuid 107 175     getegid 108 177       getppid 110 173
getpgrp 111 -       getgroups 115 158     getresuid 118 148   getresgid 120 150     getpgid 121 155
getsid 124 156      rt_sigpending 127 136 rt_sigtimedwait 128 137                   rt_sigsuspend 130 133
sigaltstack 131 132 statfs 137 43         fstatfs 138 44      arch_prctl 158 -      gettid 186 178
listxattr 194 11    llistxattr 195 12     flistxattr 196 13   tkill 200 130         time 201 -
futex 202 98        sched_getaffinity 204 123                 epoll_create 213 -    getdents64 217 61
set_tid_address 218 96                    restart_syscall 219 128                   fadvise64 221 223
clock_gettime 228 113                     clock_getres 229 114                      clock_nanosleep 230 115
exit_group 231 94   epoll_wait 232 -      epoll_ctl 233 21    tgkill 234 131        waitid 247 95
openat 257 56       mkdirat 258 34        newfstatat 262 79   unlinkat 263 35       renameat 264 38
linkat 265 37       symlinkat 266 36      readlinkat 267 78   fchmodat 268 53       faccessat 269 48
pselect6 270 72     ppoll 271 73          set_robust_list 273 99                    utimensat 280 88
epoll_pwait 281 22  eventfd2 290 19       epoll_create1 291 20                      dup3 292 24
pipe2 293 59        prlimit64 302 261     renameat2 316 276   getrandom 318 278     membarrier 324 283
statx 332 291       rseq 334 293          close_range 436 436 faccessat2 439 439
"""

_THREAD, _NEW_NAMESPACES = 0x00010000, 0x7E020000  # flags of clone
_UNIX = 1
_IOCTLS = (0x5401, 0x5413, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONBIO, FIONCLEX, FIOCLEX


class Only(NamedTuple):
    """The call is allowed where this argument, `& mask`, is one of `values`."""

    argument: int
    mask: int
    values: tuple[int, ...]


_ONLY = {
    "clone": Only(0, _THREAD | _NEW_NAMESPACES, (_THREAD,)),
    "socketpair": Only(0, 0xFFFFFFFF, (_UNIX,)),
    "ioctl": Only(1, 0xFFFFFFFF, _IOCTLS),
}

# Classic BPF, from linux/bpf_common.h and linux/seccomp.h.
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NUMBER_AT, _AUDIT_AT, _ARGUMENTS_AT = 0, 4, 16


def numbers(machine: str) -> dict[str, int]:
    """The number of every call that is allowed on this machine."""
    words = _TABLE.split()
    rows = zip(words[::3], words[1::3], words[2::3], strict=True)
    return {name: int(row[MACHINES[machine].column]) for name, *row in rows if row[MACHINES[machine].column] != "-"}


def seccomp_filter(machine: str) -> bytes:
    """The program: calls of another machine's kind kill the process, those not in the table fail with ENOSYS.

    glibc takes ENOSYS for an old kernel and goes on without: so `clone3`, whose flags a filter cannot see, becomes
    `clone`.
    """
    program = [_do(_LOAD, _AUDIT_AT), _do(_EQUAL, MACHINES[machine].audit, 1, 0), _do(_RETURN, _KILL)]
    program.append(_do(_LOAD, _NUMBER_AT))
    for name, number in numbers(machine).items():
        then = _judged(_ONLY[name]) if name in _ONLY else [_do(_RETURN, _ALLOW)]
        program += [_do(_EQUAL, number, 0, len(then)), *then]
    return b"".join([*program, _do(_RETURN, _ERROR | _ENOSYS)])


def _judged(only: Only) -> list[bytes]:
    # The lower half of a 64-bit argument, on little-endian machines: the kernel takes no more of these three.
    program = [_do(_LOAD, _ARGUMENTS_AT + 8 * only.argument), _do(_AND, only.mask)]
    program += [_do(_EQUAL, value, len(only.values) - place, 0) for place, value in enumerate(only.values)]
    return [*program, _do(_RETURN, _ERROR | _EPERM), _do(_RETURN, _ALLOW)]


def _do(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
