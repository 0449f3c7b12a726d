"""fanotify without privileges: marks on single directories, events with a name.

Since Linux 5.13 an ordinary user may make a group that reports file handles, with marks on inodes
alone (fanotify_init(2), under VERSIONS). An event then has the handle of the directory and the name
in it, and the pid of whoever did it, which is 0 unless it was this process (fanotify(7)). A handle
is what name_to_handle_at(2) gives for the directory.

There is no maintained library that speaks this part; all numbers are of <linux/fanotify.h>.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_CLOEXEC, _NONBLOCK = 0x1, 0x2
_REPORT_DFID_NAME = 0xC00  # FAN_REPORT_DIR_FID | FAN_REPORT_NAME, with FAN_CLASS_NOTIF, which is 0
_MARK_ADD, _MARK_ONLYDIR = 0x1, 0x8

_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_Q_OVERFLOW = 0x4000
_ONDIR, _EVENT_ON_CHILD = 0x4000_0000, 0x0800_0000
_MASK = (
    (_MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE)
    | (_DELETE_SELF | _MOVE_SELF)
    | (_ONDIR | _EVENT_ON_CHILD)
)

_METADATA = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata
_METADATA_VERSION = 3
_INFO = struct.Struct("=BBHQIi")  # fanotify_event_info_fid: header, fsid; file_handle: size, type
_INFO_DFID_NAME = 2
_BUFFER_BYTES = 1 << 16

_AT_FDCWD = -100
_MAX_HANDLE_BYTES = 128  # MAX_HANDLE_SZ
_PR_GET_SECCOMP = 21

_libc = ctypes.CDLL(None, use_errno=True)

WatchedHandle = tuple[int, bytes]
"""A file handle: its type and its bytes."""


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_BYTES),
    )


@dataclass(frozen=True, slots=True)
class Event:
    """Somebody else did something to `name` in a directory; without a handle, events were lost."""

    handle: WatchedHandle | None
    name: str = ""
    is_over: bool = False
    """What was removed is the directory itself, if `name` is "."."""


class Fanotify:
    """One group. Whoever made it closes it."""

    def __init__(self) -> None:
        """Make the group.

        Raises:
            OSError: this kernel or a limit does not allow it. A filter of system calls is reason
                enough not to try: systemd's sets do not have fanotify, and kill who calls it.
        """
        self.fd = -1
        if _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) > 0:
            raise PermissionError("a filter of system calls is in effect")
        flags = _REPORT_DFID_NAME | _CLOEXEC | _NONBLOCK
        self.fd = _checked(_libc.fanotify_init(flags, os.O_RDONLY), "fanotify_init")

    def mark(self, path: str) -> WatchedHandle:
        """Watch a directory and what is in it, and return the handle its events will have.

        Raises:
            OSError: its file system has no handles, or a limit was reached.
        """
        handle = _FileHandle(handle_bytes=_MAX_HANDLE_BYTES)
        mount_id = ctypes.c_int()
        _checked(
            _libc.name_to_handle_at(
                _AT_FDCWD, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount_id), 0
            ),
            "name_to_handle_at",
        )
        _checked(
            _libc.fanotify_mark(
                ctypes.c_int(self.fd),
                ctypes.c_uint(_MARK_ADD | _MARK_ONLYDIR),
                ctypes.c_uint64(_MASK),
                ctypes.c_int(_AT_FDCWD),
                ctypes.c_char_p(os.fsencode(path)),
            ),
            "fanotify_mark",
        )
        return handle.handle_type, bytes(handle.f_handle[: handle.handle_bytes])

    def read(self) -> list[Event]:
        """Return the events that are there; of our own only that a directory is over.

        Raises:
            OSError: the kernel speaks another version of it.
        """
        try:
            buffer = os.read(self.fd, _BUFFER_BYTES)
        except BlockingIOError:
            return []
        return list(_events(buffer))

    def close(self) -> None:
        """Give the group back, with its marks."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _events(buffer: bytes) -> Iterator[Event]:
    own_pid, offset = os.getpid(), 0
    while offset < len(buffer):
        length, version, _, header, mask, _, pid = _METADATA.unpack_from(buffer, offset)
        if version != _METADATA_VERSION:
            raise OSError(f"fanotify speaks version {version}, not {_METADATA_VERSION}")
        if mask & _Q_OVERFLOW:
            yield Event(None)
        elif pid != own_pid or mask & _DELETE_SELF:
            is_over = bool(mask & _DELETE_SELF)
            yield from _named(buffer, offset + header, offset + length, is_over=is_over)
        offset += length


def _named(buffer: bytes, offset: int, end: int, *, is_over: bool) -> Iterator[Event]:
    """Read the information records of one event."""
    while offset < end:
        kind, _, length, _, size, handle_type = _INFO.unpack_from(buffer, offset)
        if kind == _INFO_DFID_NAME:
            start = offset + _INFO.size
            name = buffer[start + size : offset + length].split(b"\0", 1)[0]
            yield Event((handle_type, buffer[start : start + size]), os.fsdecode(name), is_over)
        offset += length


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), call)
    return result
