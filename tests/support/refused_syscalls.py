"""A program that finds some system calls refused, as on a kernel that lacks them or forbids them.

By seccomp (seccomp(2)): the kernel itself answers, to this process and to all it starts.
"""

import errno
import platform
import sys

MEMFD_SECRET = 447
MLOCK = {"x86_64": 149, "aarch64": 228}.get(platform.machine(), -1)

_PROGRAM = """\
import ctypes, os, sys
class Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte),
                ("k", ctypes.c_uint)]
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]
LOAD_NUMBER, JUMP_IF_EQUAL, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x06, 0x7fff0000, 0x00050000
numbers = [int(number) for number in sys.argv[2].split(",")]
steps = [Step(LOAD_NUMBER, 0, 0, 0)]
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
os.execv(sys.argv[3], sys.argv[3:])
"""


def refusing(*numbers: int, error: int = errno.ENOSYS) -> tuple[str, ...]:
    """Return what starts a program that gets this error for these system calls."""
    return (sys.executable, "-c", _PROGRAM, str(error), ",".join(map(str, numbers)))
