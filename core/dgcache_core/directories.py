"""Directories nobody else can have prepared, swapped or opened to others.

Every component is opened relative to the descriptor of the one before, so that no name is looked up
twice (openat(2); CWE-367). Ancestors must belong to root or to me and be writable by nobody else
unless sticky; a link among them is followed only if it belongs to root or to me. The last component
of a private directory is never a link: it is mine, mode 0700, without a default ACL. A trusted file
is root's or mine, as its directory is, and nobody else can write to either. `ownership` says what
is root's in a user namespace that does not know root.
"""

import errno
import os
import shlex
import stat
from collections import deque
from pathlib import Path
from typing import Protocol

from dgcache_core.errors import CacheRefusedError
from dgcache_core.ownership import (
    is_directory_of_root_or_me,
    is_file_of_root_or_me,
    is_link_of_root_or_me,
    is_mine,
    owner_name,
)

PRIVATE_MODE = 0o700
_MAX_LINKS = 40  # as the kernel's own walk (path_resolution(7))
_OPEN_NODE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def open_private_directory(path: Path, *, create: bool = False) -> int:
    """Return a descriptor of the vetted directory at `path`. The caller closes it.

    Args:
        path: absolute, without `..`.
        create: make what is missing, each new directory with mode 0700 whatever the umask.

    Raises:
        CacheRefusedError: a check failed; the message names it and the command that mends it.
        FileNotFoundError: it is not there and `create` is False.
    """
    node = _walk(path, _vet, create=create)
    try:
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=node)
    except OSError as error:
        raise CacheRefusedError(f"{path}: {error.strerror}") from error
    finally:
        os.close(node)


def read_trusted_file(path: Path, most_bytes: int, forbidden_mode: int = 0o022) -> bytes:
    """Return what a file holds that nobody but root and me can have written.

    A FIFO or a device is never opened, only looked at.

    Args:
        path: absolute, without `..`. A link of root's or of mine is followed and its target vetted.
        most_bytes: how large it may be.
        forbidden_mode: permissions it must not have: 0o022 keeps writers out, 0o077 readers, too.

    Raises:
        CacheRefusedError: a check failed; the message names it and the command that mends it.
        FileNotFoundError: it is not there.
    """

    def vet(node: int, path: Path, *, is_last: bool, place: Path, parent: int) -> str | None:
        status = os.fstat(node)
        if stat.S_ISLNK(status.st_mode) or not is_last:
            return _vet(node, path, is_last=False, place=place, parent=parent)
        _vet_file(status, os.fstat(parent), path, place, forbidden_mode)
        return None

    node = _walk(path, vet, create=False)
    try:
        # that very inode; a FIFO put in its place meanwhile is not in our way
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with os.fdopen(os.open(f"/proc/self/fd/{node}", flags), "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise CacheRefusedError(f"{path}: {error.strerror}") from error
    finally:
        os.close(node)
    if len(content) > most_bytes:
        raise CacheRefusedError(f"{path} is larger than {most_bytes} bytes: make it smaller")
    return content


class _Check(Protocol):
    """Vets one component; returns a link's target where it is one that may be followed.

    `path` is what was asked for; `place` is where the component really is, without links.
    """

    def __call__(
        self, node: int, path: Path, *, is_last: bool, place: Path, parent: int
    ) -> str | None: ...


def _walk(path: Path, vet: _Check, *, create: bool) -> int:
    """Return an O_PATH descriptor of what is at `path`, each component vetted on the way."""
    if not path.is_absolute() or ".." in path.parts or len(path.parts) < 2:
        raise CacheRefusedError(f"{path} must be an absolute path below / without '..'")
    if "\0" in str(path):
        raise CacheRefusedError("a path cannot hold a NUL character")
    names = deque(path.parts[1:])
    here = Path("/")
    node = os.open("/", _OPEN_NODE | os.O_DIRECTORY)
    try:
        links = 0
        while names:
            name = names.popleft()
            child = _open_or_make(node, name, create=create)
            place = here.parent if name == ".." else here / name
            try:
                link = vet(child, path, is_last=not names, place=place, parent=node)
            except BaseException:
                os.close(child)
                raise
            if link is None:
                os.close(node)
                node, here = child, place
                continue
            os.close(child)
            links += 1
            if links > _MAX_LINKS:
                raise CacheRefusedError(f"{path}: too many links on the way")
            names.extendleft(reversed([part for part in link.split("/") if part not in ("", ".")]))
            if link.startswith("/"):
                os.close(node)
                node, here = os.open("/", _OPEN_NODE | os.O_DIRECTORY), Path("/")
        return node
    except BaseException as error:
        os.close(node)
        if not isinstance(error, OSError) or (error.errno == errno.ENOENT and not create):
            raise
        raise CacheRefusedError(f"{path}: {error.strerror}") from error


def open_private_subdirectory(parent: int, name: str, path: Path, *, create: bool = False) -> int:
    """Return a descriptor of the vetted directory `name` in an open one. The caller closes it.

    Args:
        parent: the descriptor of a directory that was vetted before.
        name: one component.
        path: what messages call it.
        create: make it where it is missing, with mode 0700 whatever the umask.

    Raises:
        CacheRefusedError: it is a link, no directory, not mine, not 0700, or has a default ACL.
        OSError: it is not there and `create` is False, or it cannot be made.
    """
    node = _open_or_make(parent, name, create=create)
    try:
        _vet(node, path, is_last=True, place=path, parent=parent)
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=node)
    finally:
        os.close(node)


def _open_or_make(parent: int, name: str, *, create: bool) -> int:
    try:
        return os.open(name, _OPEN_NODE, dir_fd=parent)
    except FileNotFoundError:
        if not create:
            raise
    try:
        os.mkdir(name, PRIVATE_MODE, dir_fd=parent)
    except FileExistsError:
        return os.open(name, _OPEN_NODE, dir_fd=parent)  # somebody was faster: it is vetted anyway
    child = os.open(name, _OPEN_NODE | os.O_DIRECTORY, dir_fd=parent)
    if os.fstat(child).st_uid == os.geteuid():
        os.chmod(f"/proc/self/fd/{child}", PRIVATE_MODE)  # noqa: PTH101 - that very inode
    return child


def _vet(
    node: int,
    path: Path,
    *,
    is_last: bool,
    place: Path,
    parent: int,  # noqa: ARG001 - of no interest here
) -> str | None:
    """Check one component of the way to a private directory, see `_Check`."""
    status = os.fstat(node)
    name = place.name
    if stat.S_ISLNK(status.st_mode):
        if is_last:
            raise CacheRefusedError(f"{path} is a symbolic link: {_remove(path)}")
        if not is_link_of_root_or_me(status.st_uid):
            raise CacheRefusedError(f"{path}: {name!r} is a link of {owner_name(status.st_uid)}")
        return os.readlink("", dir_fd=node)
    if not stat.S_ISDIR(status.st_mode):
        mending = f": {_remove(path)}" if is_last else ""
        raise CacheRefusedError(f"{path}: {name!r} is not a directory{mending}")
    mode = stat.S_IMODE(status.st_mode)
    if is_last:
        _vet_own(node, path, status.st_uid, mode)
    elif not is_directory_of_root_or_me(status.st_uid, place):
        raise CacheRefusedError(
            f"{path}: {name!r} belongs to {owner_name(status.st_uid)}, "
            f"not to root or uid {os.geteuid()}"
        )
    elif mode & 0o022 and not mode & stat.S_ISVTX:
        raise CacheRefusedError(
            f"{path}: {name!r} can be written by others (mode {mode:04o}): run chmod go-w on it"
        )
    return None


def _vet_file(
    status: os.stat_result,
    directory: os.stat_result,
    path: Path,
    place: Path,
    forbidden_mode: int,
) -> None:
    quoted, own_uid = shlex.quote(str(path)), os.geteuid()
    if not stat.S_ISREG(status.st_mode):
        raise CacheRefusedError(f"{path} is not a regular file: put one in its place")
    if not is_file_of_root_or_me(status.st_uid, place):
        raise CacheRefusedError(
            f"{path} belongs to {owner_name(status.st_uid)}, not to root or uid {own_uid}: "
            f"run sudo chown {own_uid} {quoted}, or set HOME to your own"
        )
    if directory.st_mode & 0o022:  # sticky or not: others could put a file there, or a link
        raise CacheRefusedError(
            f"the directory of {path} can be written by others: "
            f"run chmod go-w {shlex.quote(str(path.parent))}"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & forbidden_mode:
        who, mending = ("read", "go-rwx") if forbidden_mode & 0o044 else ("written", "go-w")
        raise CacheRefusedError(
            f"{path} can be {who} by others (mode {mode:04o}): run chmod {mending} {quoted}"
        )


def _vet_own(node: int, path: Path, uid: int, mode: int) -> None:
    own_uid = os.geteuid()
    if not is_mine(uid):
        raise CacheRefusedError(
            f"{path} belongs to {owner_name(uid)}, not to uid {own_uid}: "
            f"run sudo chown {own_uid} {shlex.quote(str(path))}"
        )
    if mode != PRIVATE_MODE:
        # GNU chmod leaves a directory's set-id bits alone unless the mode has five digits
        digits = "00700" if mode & 0o6000 else "0700"
        raise CacheRefusedError(
            f"{path} has mode {mode:04o}, not 0700: run chmod {digits} {shlex.quote(str(path))}"
        )
    try:
        os.getxattr(f"/proc/self/fd/{node}", "system.posix_acl_default")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return
        raise
    raise CacheRefusedError(f"{path} has a default ACL: run setfacl -k {shlex.quote(str(path))}")


def _remove(path: Path) -> str:
    return f"remove it with rm {shlex.quote(str(path))}"
