"""Landlock by its three system calls: a thread gives up rights, for good (landlock(7)).

It binds the calling thread and all it starts later, so it comes before any other thread. What this
kernel does not know is not asked for. Below ABI 2 (Linux 5.19) it is not used: no file could move
to another directory there, which the disk tier needs.
"""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

OLDEST_ABI = 2
READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
CHANGE = READ | 1 << 1 | 0b11 << 4 | 0b111 << 7 | 0b11 << 13
"""WRITE_FILE, REMOVE_*, MAKE_DIR, MAKE_REG, MAKE_SOCK, REFER, TRUNCATE: no links, no devices."""
_OF_FILES = 1 << 1 | 1 << 2 | 1 << 14
_HANDLED_FS = {2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP_ABI, _BIND_AND_CONNECT = 4, 3
_SCOPE_ABI, _ABSTRACT_SOCKETS_AND_SIGNALS = 6, 3
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Return the version of the kernel's Landlock; 0 where it has none or none is switched on."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def restrict(version: int, allowed: Iterable[tuple[str, int]]) -> None:
    """Keep these rights below these paths and give up all others; TCP and foreign abstract sockets
    and signals, too, where the kernel can. What does not exist is left out.

    Raises:
        OSError: the kernel refuses; nothing is given up then.
    """
    files = _HANDLED_FS[max(known for known in _HANDLED_FS if known <= version)]
    tcp = _BIND_AND_CONNECT if version >= _TCP_ABI else 0
    scopes = _ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPE_ABI else 0
    ruleset = _call(_CREATE_RULESET, struct.pack("=QQQ", files, tcp, scopes), 24, 0)
    try:
        for path, rights in allowed:
            _allow(ruleset, path, rights & files)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        node = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # what cannot be opened now is not needed later
        return
    try:
        if not stat.S_ISDIR(os.fstat(node).st_mode):
            rights &= _OF_FILES
        _call(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, node), 0)
    finally:
        os.close(node)


def _call(number: int, *arguments: int | bytes) -> int:
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
