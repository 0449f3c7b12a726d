"""The tier's directory: files that are made whole or not at all, opened without following a link.

`<directory>/` holds `tier.lock`, `generation-<key>`, `new/` for files that are being written, and
the entries as `ab/cd/<60 digits>`. Every name is resolved from the directory's descriptor, one
component after the other (openat(2)); every directory on the way is mine and 0700. One process at
a time has the directory: the second is told so.

Errors of the system leave this module as `OSError`, since `disk_store` decides by errno; whatever
stands where it should not is a `CacheRefusedError`.
"""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dgcache_core.directories import open_private_directory, open_private_subdirectory
from dgcache_core.disk_names import (
    LOCK,
    NEW,
    is_entry_name,
    is_level_name,
    is_ours,
    is_temporary_name,
)
from dgcache_core.errors import CacheRefusedError, CacheUnavailableError
from dgcache_core.ledger import FileState

FILE_MODE = 0o600

_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_IN_THE_WAY = (
    *(errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ELOOP, errno.ENXIO),
    *(errno.EACCES, errno.EPERM),  # every directory on the way is mine and 0700: it is the file
)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class TierDirectory:
    """An open, locked tier directory. Thread-safe; nobody may use it after `close`."""

    def __init__(self, path: Path, on_directory: Callable[[Path], None]) -> None:
        """Open the directory, make it where it is missing, and lock it.

        Raises:
            CacheRefusedError: a check of the directory failed.
            CacheUnavailableError: another process uses it, or the disk is full or read-only.
        """
        self.path = path
        self._on_directory = on_directory
        self.fd = open_private_directory(path, create=True)
        self._lock_fd = -1
        try:
            self._lock_fd = self._lock()
            os.utime(self._lock_fd)
            self.opened_ctime_ns = os.fstat(self._lock_fd).st_ctime_ns
            """When it was opened, by the clock of its file system: what was changed later was
            changed by us, or by somebody who should not."""
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise CacheUnavailableError(f"{path / LOCK}: {error.strerror}") from error
            raise

    def close(self) -> None:
        """Give lock and descriptors back. A second call does nothing."""
        for descriptor in (self._lock_fd, self.fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock_fd = self.fd = -1

    @property
    def is_gone(self) -> bool:
        """Tell whether the directory, or only its lock, was removed underneath us."""
        try:
            found = os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False)
        except OSError:
            return True
        return not os.path.samestat(found, os.fstat(self._lock_fd))

    def relative(self, name: str | Path) -> str:
        """Return a name below the directory, given relative to it or absolute."""
        path = Path(name)
        below = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        return "" if below == Path() else str(below)

    # -- one file --------------------------------------------------------------------------------

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open something for reading, without blocking on what is no file.

        Raises:
            CacheRefusedError: a link or a socket is in its place.
        """
        with self._parent(name) as (parent, base), _refusing(name):
            descriptor = os.open(base, os.O_RDONLY | _OPEN, dir_fd=parent)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def look(self, name: str) -> os.stat_result:
        """Return the status of what has this name, a link's own for a link."""
        with self._parent(name) as (parent, base):
            return os.stat(base, dir_fd=parent, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        """Remove a file or a link.

        Raises:
            CacheRefusedError: a directory is in its place.
        """
        with self._parent(name) as (parent, base), _refusing(name):
            os.unlink(base, dir_fd=parent)

    def remove_links(self, name: str) -> bool:
        """Remove the first link on the way to `name`, itself included; tell whether there was."""
        parts = name.split("/")
        for depth in range(1, len(parts) + 1):
            part = "/".join(parts[:depth])
            with suppress(CacheRefusedError, OSError):
                if stat.S_ISLNK(self.look(part).st_mode):
                    self.unlink(part)
                    return True
        return False

    # -- a new file ------------------------------------------------------------------------------

    @contextmanager
    def new_file(self, size: int) -> Iterator[tuple[str, int]]:
        """Make a file of `size` bytes below `new/`: its name and a writable descriptor.

        It is gone when the block ends, unless it was published.
        """
        name = f"{NEW}/{secrets.token_hex(16)}"
        with self._parent(name, create=True) as (parent, base):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN
            descriptor = os.open(base, flags, FILE_MODE, dir_fd=parent)
            try:
                if stat.S_IMODE(os.fstat(descriptor).st_mode) != FILE_MODE:
                    os.fchmod(descriptor, FILE_MODE)  # the umask took something
                _reserve_blocks(descriptor, size)
                yield name, descriptor
            finally:
                os.close(descriptor)
                with suppress(OSError):
                    os.unlink(base, dir_fd=parent)

    def publish(self, new: str, name: str, *, durable: bool) -> None:
        """Give a finished file its name, which replaces what has it.

        Args:
            new: the name it was made with.
            name: the name it shall have.
            durable: the name is on the disk when this returns.

        Raises:
            CacheRefusedError: a directory is in its place.
        """
        with (
            self._parent(new) as (source, source_base),
            self._parent(name, create=True, durable=durable) as (parent, base),
            _refusing(name),
        ):
            os.rename(source_base, base, src_dir_fd=source, dst_dir_fd=parent)
            if durable:
                os.fsync(parent)

    # -- all of them -----------------------------------------------------------------------------

    def entry_names(self) -> Iterator[str | None]:
        """Go through the names of possible entries, one directory after the other.

        None stands for something that has no name of ours, so that the caller can count it.
        """
        for first in self._level("") or ():
            for second in self._level(first) or ():
                try:
                    listing = self._list(f"{first}/{second}")
                except (OSError, CacheRefusedError):
                    continue
                for base in listing:
                    name = f"{first}/{second}/{base}"
                    yield name if is_entry_name(name) else None

    def foreign_names(self) -> int:
        """Count what is in the top directory and has no name of ours."""
        return sum(not is_ours(base) for base in self._list(""))

    def temporaries(self) -> Iterator[str]:
        """Go through the files that a killed process was writing."""
        with suppress(FileNotFoundError, CacheRefusedError):
            for base in self._list(NEW):
                if is_temporary_name(f"{NEW}/{base}"):
                    yield f"{NEW}/{base}"

    def directories(self) -> list[Path]:
        """Return the top directory and those that entries are in."""
        found = [self.path]
        for first in self._level(""):
            found.append(self.path / first)
            found += [self.path / first / second for second in self._level(first)]
        return found

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _parent(
        self, name: str, *, create: bool = False, durable: bool = False
    ) -> Iterator[tuple[int, str]]:
        """Open the directory that a name stands in, and return its last component with it."""
        *parts, base = name.split("/")
        node, opened = self.fd, []
        path = self.path
        try:
            for part in parts:
                path /= part
                node = self._subdirectory(node, part, path, create=create, durable=durable)
                opened.append(node)
            yield node, base
        finally:
            for descriptor in opened:
                os.close(descriptor)

    def _subdirectory(
        self, parent: int, name: str, path: Path, *, create: bool, durable: bool
    ) -> int:
        try:
            return open_private_subdirectory(parent, name, path)
        except FileNotFoundError:
            if not create:
                raise
        made = open_private_subdirectory(parent, name, path, create=True)
        try:
            if durable:
                os.fsync(parent)
            if name != NEW:
                self._on_directory(path)
        except BaseException:
            os.close(made)
            raise
        return made

    def _level(self, name: str) -> list[str]:
        try:
            return [base for base in self._list(name) if is_level_name(base)]
        except (OSError, CacheRefusedError):
            return []

    def _list(self, name: str) -> list[str]:
        with self._parent(f"{name}/." if name else ".") as (directory, _):
            return os.listdir(directory)  # noqa: PTH208 - by descriptor

    def _lock(self) -> int:
        with _refusing(LOCK):
            descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | _OPEN, FILE_MODE, dir_fd=self.fd)
        try:
            require_own_file(LOCK, os.fstat(descriptor))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise CacheUnavailableError(
                f"{self.path} is used by another process: each needs a DG_CACHE_DIR of its own"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def require_own_file(name: str, status: os.stat_result) -> FileState:
    """Check that this is a regular file with one name, mine and for me only.

    Raises:
        CacheRefusedError: it is not; the message tells what it is.
    """
    if not stat.S_ISREG(status.st_mode):
        raise CacheRefusedError(f"{name} is not a regular file")
    if status.st_uid != os.geteuid():
        raise CacheRefusedError(f"{name} belongs to uid {status.st_uid}")
    if stat.S_IMODE(status.st_mode) != FILE_MODE:
        raise CacheRefusedError(f"{name} has mode {stat.S_IMODE(status.st_mode):04o}, not 0600")
    if status.st_nlink != 1:
        raise CacheRefusedError(f"{name} has {status.st_nlink} names")
    return FileState.of(status)


def _reserve_blocks(descriptor: int, size: int) -> None:
    """A full disk is an error here, before anything is written (posix_fallocate(3))."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _IN_THE_WAY:
            raise CacheRefusedError(f"{name}: something else is there: {error.strerror}") from error
        raise
