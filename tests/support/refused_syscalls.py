"""A program that finds some system calls refused, as on a kernel that lacks them or forbids them.

By seccomp (seccomp(2)): the kernel itself answers, to this process and to all it starts.
"""

import errno
import platform
import sys

MEMFD_SECRET = 447
MLOCK = {"x86_64": 149, "aarch64": 228}.get(platform.machine(), -1)
FLOCK = {"x86_64": 73, "aarch64": 32}.get(platform.machine(), -1)
_OPENAT = {"x86_64": 257, "aarch64": 56}.get(platform.machine(), -1)
_O_TMPFILE = 0o20000000  # the bit of its own; os.O_TMPFILE has O_DIRECTORY's as well

_PROGRAM = """\
import ctypes, os, sys
class Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, ERRNO, THIRD_ARGUMENT = 0x7fff0000, 0x00050000, 32
numbers = [int(number) for number in sys.argv[2].split(",")]
flag = int(sys.argv[3])
steps = [Step(LOAD, 0, 0, 0)]
if flag:
    steps += [Step(JUMP_IF_EQUAL, 0, 2, numbers[0]), Step(LOAD, 0, 0, THIRD_ARGUMENT),
              Step(JUMP_IF_SET, 1, 0, flag)]
else:
    steps += [Step(JUMP_IF_EQUAL, len(numbers) - at, 0, one) for at, one in enumerate(numbers)]
steps += [Step(RETURN, 0, 0, ALLOW), Step(RETURN, 0, 0, ERRNO | int(sys.argv[1]))]
table = (Step * len(steps))(*steps)
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
filter = Filter(len(steps), table)
if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
    PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter), 0, 0
):
    sys.exit(f"no seccomp: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[4], sys.argv[4:])
"""


def refusing(*numbers: int, error: int = errno.ENOSYS) -> tuple[str, ...]:
    """Return what starts a program that gets this error for these system calls."""
    return (sys.executable, "-c", _PROGRAM, str(error), ",".join(map(str, numbers)), "0")


def without_nameless_files() -> tuple[str, ...]:
    """Return what starts a program for which no file system has O_TMPFILE."""
    return (
        *(sys.executable, "-c", _PROGRAM),
        *(str(errno.EOPNOTSUPP), str(_OPENAT), str(_O_TMPFILE)),
    )
