"""Programs that find some system calls refused; the kernel itself answers.

By seccomp(2), as on a kernel that lacks or forbids the calls: `refusing` and
`without_nameless_files` from a program's start on and for all it starts, `REFUSE` from where
a script calls it. By strace(1), as where something runs short: `refusing_meanwhile`, in a process
that runs already.
"""

import errno
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MEMFD_SECRET = 447
MLOCK = {"x86_64": 149, "aarch64": 228}.get(platform.machine(), -1)
MADVISE = {"x86_64": 28, "aarch64": 233}.get(platform.machine(), -1)
FLOCK = {"x86_64": 73, "aarch64": 32}.get(platform.machine(), -1)
_OPENAT = {"x86_64": 257, "aarch64": 56}.get(platform.machine(), -1)
_O_TMPFILE = 0o20000000  # the bit of its own; os.O_TMPFILE has O_DIRECTORY's as well

_ATTACH_SECONDS = 20.0
_FCNTL = {"x86_64": 72, "aarch64": 25}.get(platform.machine(), -1)

_SECCOMP = """\
import ctypes, os, sys
class Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, ERRNO, SECOND_ARGUMENT, THIRD_ARGUMENT = 0x7fff0000, 0x00050000, 24, 32
def install(steps):
    table = (Step * len(steps))(*steps)
    libc = ctypes.CDLL(None, use_errno=True)
    PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
    filter = Filter(len(steps), table)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter), 0, 0
    ):
        sys.exit(f"no seccomp: {os.strerror(ctypes.get_errno())}")
"""

_PROGRAM = f"""{_SECCOMP}
numbers = [int(number) for number in sys.argv[2].split(",")]
flag = int(sys.argv[3])
steps = [Step(LOAD, 0, 0, 0)]
if flag:
    steps += [Step(JUMP_IF_EQUAL, 0, 2, numbers[0]), Step(LOAD, 0, 0, THIRD_ARGUMENT),
              Step(JUMP_IF_SET, 1, 0, flag)]
else:
    steps += [Step(JUMP_IF_EQUAL, len(numbers) - at, 0, one) for at, one in enumerate(numbers)]
steps += [Step(RETURN, 0, 0, ALLOW), Step(RETURN, 0, 0, ERRNO | int(sys.argv[1]))]
install(steps)
os.execv(sys.argv[4], sys.argv[4:])
"""

REFUSE = f"""{_SECCOMP}
def refuse(number, error):
    install([
        Step(LOAD, 0, 0, 0), Step(JUMP_IF_EQUAL, 0, 1, number),
        Step(RETURN, 0, 0, ERRNO | error), Step(RETURN, 0, 0, ALLOW),
    ])
def refuse_fcntl(command, argument, error):
    install([
        Step(LOAD, 0, 0, 0), Step(JUMP_IF_EQUAL, 0, 5, {_FCNTL}),
        Step(LOAD, 0, 0, SECOND_ARGUMENT), Step(JUMP_IF_EQUAL, 0, 3, command),
        Step(LOAD, 0, 0, THIRD_ARGUMENT), Step(JUMP_IF_EQUAL, 0, 1, argument),
        Step(RETURN, 0, 0, ERRNO | error), Step(RETURN, 0, 0, ALLOW),
    ])
"""
"""What a script begins with that refuses itself a call, or one command of fcntl(2) with one
argument."""


def refusing(*numbers: int, error: int = errno.ENOSYS) -> tuple[str, ...]:
    """Return what starts a program that gets this error for these system calls."""
    return (sys.executable, "-c", _PROGRAM, str(error), ",".join(map(str, numbers)), "0")


def without_nameless_files() -> tuple[str, ...]:
    """Return what starts a program for which no file system has O_TMPFILE."""
    return (
        *(sys.executable, "-c", _PROGRAM),
        *(str(errno.EOPNOTSUPP), str(_OPENAT), str(_O_TMPFILE)),
    )


@contextmanager
def refusing_meanwhile(
    pid: int, call: str, error: str, trace: Path, *, number: int | None = None
) -> Iterator[Callable[[], str]]:
    """Refuse a call of a running process while the block runs.

    Args:
        pid: of the process.
        call: its name.
        error: the name of the error it gets.
        trace: a file for what strace says.
        number: which of each thread's calls; None for all.

    Yields:
        what tells which calls there were, as strace writes them.
    """
    inject = f"inject={call}:error={error}" + (f":when={number}" if number is not None else "")
    command = ["strace", "-f", "-o", trace, "-e", f"trace={call}", "-e", inject]
    with subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        try:
            assert "attached" in said, said
            yield lambda: trace.read_text(errors="replace")
        finally:
            strace.send_signal(signal.SIGINT)
            strace.stderr.read()
            strace.wait(_ATTACH_SECONDS)
