"""What a user holds: a sealed, read-only descriptor with the bytes of one reference."""

import fcntl
import mmap
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dgcache_core.errors import CacheCorruptionError
from dgcache_core.handouts import Handout
from dgcache_core.references import Sha256

_PIECE_BYTES = 1 << 20


class Reference:
    """The plaintext of one reference, which nobody can change while you hold it.

    A context manager: closing it gives the descriptor back. A reference that is dropped unclosed
    warns (`ResourceWarning`) and closes itself. Reading does not move any shared offset, so threads
    may share a reference.

    Attributes:
        size: length in bytes.
        sha256: 64 lower-case hexadecimal digits.
        source: where it came from: "dg-cached", "memory", "filesystem", or "fetched".
    """

    def __init__(
        self,
        handout: Handout,
        *,
        source: str,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Take over the handout's descriptor."""
        self._fd = handout.fd
        self._on_close = on_close
        self._mapping: mmap.mmap | None = None
        self.size = handout.size
        self.sha256 = str(handout.sha256)
        self.source = source

    @property
    def fd(self) -> int:
        """The descriptor, close-on-exec; it stays this object's. ValueError after close."""
        if self._fd < 0:
            raise ValueError("this reference is closed")
        return self._fd

    @property
    def path(self) -> Path:
        """A path for other programs, valid while this reference is open and this process lives.

        The other program must run as the same user (proc_pid_fd(5)). Do not resolve it: the file
        has no other name.
        """
        return Path(f"/proc/{os.getpid()}/fd/{self.fd}")

    def read(self) -> bytes:
        """Return a copy of all bytes."""
        return b"".join(
            os.pread(self.fd, min(_PIECE_BYTES, self.size - offset), offset)
            for offset in range(0, self.size, _PIECE_BYTES)
        )

    def buffer(self) -> memoryview:
        """Return the bytes without copying, read-only. The view may outlive the reference."""
        if self.size == 0:
            return memoryview(b"")
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
        return memoryview(self._mapping)

    def __buffer__(self, flags: int) -> memoryview:
        """Let `memoryview(reference)` do the same, from Python 3.12 on (PEP 688)."""
        return self.buffer()

    def verify(self) -> None:
        """Hash all bytes.

        Raises:
            CacheCorruptionError: the digest is another.
        """
        digest = sha256_of_descriptor(self.fd, self.size)
        if digest != self.sha256:
            raise CacheCorruptionError(f"SHA mismatch: {self.sha256} was asked for, got {digest}")

    def move_descriptor(self, lowest: int) -> None:
        """Change the descriptor to a free number of at least `lowest`; `path` changes with it.

        Raises:
            OSError: no such number is free below RLIMIT_NOFILE (fcntl(2), F_DUPFD).
        """
        moved = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, lowest)
        os.close(self._fd)
        self._fd = moved

    def close(self) -> None:
        """Give the descriptor back. A second call does nothing."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        if self._mapping is not None:
            with suppress(BufferError):  # a view is still in use: the mapping goes with the last
                self._mapping.close()
            self._mapping = None
        os.close(fd)
        if self._on_close is not None:
            self._on_close()

    def __enter__(self) -> "Reference":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            warnings.warn(f"unclosed reference {self!r}", ResourceWarning, 2, self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd {self._fd}"
        return f"<Reference {self.sha256[:12]} of {self.size} bytes, {state}>"


def sha256_of_descriptor(fd: int, size: int) -> Sha256:
    """Return the digest of the first `size` bytes of an open file."""
    import hashlib

    digest = hashlib.sha256()
    for offset in range(0, size, _PIECE_BYTES):
        digest.update(os.pread(fd, min(_PIECE_BYTES, size - offset), offset))
    return Sha256(digest.hexdigest())
