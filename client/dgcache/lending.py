"""vmsplice(2): a pipe that reads a process's own pages, which are not copied into it first.

The reader copies them when it reads. What is changed before that, the reader sees changed: as with
splice(2) from a file, the daemon hashes and keeps one copy of its own.
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_NONBLOCK = 2  # SPLICE_F_NONBLOCK, <fcntl.h>


class _Iovec(ctypes.Structure):
    """struct iovec, readv(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Buffer(ctypes.Structure):
    """Py_buffer, of the stable ABI from 3.11 on: how C asks for the address of read-only bytes."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.py_object),
        ("length", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def lend_pages(pipe: int, data: memoryview) -> int:
    """Put bytes into a non-blocking pipe by reference where the C library can, else copy them.

    Args:
        pipe: its write end.
        data: contiguous bytes, which stay as they are until they were read.

    Returns:
        How many bytes.

    Raises:
        BlockingIOError: the pipe is full.
        BrokenPipeError: nobody reads it any more.
    """
    vmsplice = _vmsplice()
    if vmsplice is None:
        return os.write(pipe, data)
    with _address_of(data) as address:
        sent: int = vmsplice(pipe, ctypes.byref(_Iovec(address, data.nbytes)), 1, _NONBLOCK)
    if sent >= 0:
        return sent
    number = ctypes.get_errno()
    if number in (errno.EAGAIN, errno.EPIPE):
        raise OSError(number, os.strerror(number))
    return os.write(pipe, data)  # some kernels and sandboxes refuse the call


@contextmanager
def _address_of(data: memoryview) -> Iterator[int]:
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    try:
        yield buffer.address
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


@cache
def _vmsplice() -> Any:
    function = getattr(ctypes.CDLL(None, use_errno=True), "vmsplice", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_uint)
        function.restype = ctypes.c_ssize_t
    return function
