"""One line per event that matters, as `event key=value …`: never a key, session id or content.

On the journal's pipe each line carries its priority as sd-daemon(3) has it; elsewhere the time and
the level's name. Values from outside are quoted, so that none can forge a line.
"""

import json
import logging
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger("dgcached")

MAX_LOG_BYTES = 1 << 20
"""Of the log file and of the one before it."""

_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}
_PLAIN = re.compile(r"[\w./:+-]+")


def event(level: int, name: str, /, **fields: Any) -> None:
    """Log one event."""
    if logger.isEnabledFor(level):
        logger.log(level, " ".join([name, *(f"{k}={_quoted(v)}" for k, v in fields.items())]))


def as_unicode(value: object) -> str:
    """Return a text that can be printed and sent: a path may hold bytes that are no character."""
    return str(value).encode(errors="replace").decode()


def set_up(log_file: Path | None, *, verbose: bool) -> str:
    """Choose where events go and return its name: a path, "journal", or "stderr"."""
    handler: logging.Handler
    if log_file is not None:
        handler = _BoundedFile(log_file)
        where = str(log_file)
    else:
        handler = logging.StreamHandler(sys.stderr)
        where = "journal" if stderr_is_journal() else "stderr"
    handler.setFormatter(
        _JournalFormatter()
        if where == "journal"
        else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    return where


class _BoundedFile(logging.FileHandler):
    """A file and the one before it, `.1`, both open from the beginning.

    A full file is copied and emptied and not renamed: nothing needs to be made or removed later,
    when no right to do so is left, and standard error, which may be the same file, stays with it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = self._before = -1
        if stat.S_ISREG(path.stat().st_mode):
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._before = os.open(f"{path}.1", flags, 0o600)

    def emit(self, record: logging.LogRecord) -> None:
        if self._file >= 0:
            try:
                self._make_room(len(self.format(record).encode(errors="replace")) + 1)
            except OSError:
                self.handleError(record)
        super().emit(record)

    def _make_room(self, more_bytes: int) -> None:
        size = os.fstat(self._file).st_size
        if size + more_bytes <= MAX_LOG_BYTES:
            return
        try:
            last = os.pread(self._file, MAX_LOG_BYTES, max(0, size - MAX_LOG_BYTES))
            os.ftruncate(self._before, 0)
            os.pwrite(self._before, last, 0)
        finally:
            os.ftruncate(self._file, 0)  # the bound holds on a full disk, too

    def close(self) -> None:
        for descriptor in (self._file, self._before):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._before = -1
        super().close()


class _JournalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record).replace("\n", "\\n")
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{message}"


def _quoted(value: Any) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def stderr_is_journal() -> bool:
    """JOURNAL_STREAM names the device and inode of the pipe (systemd.exec(5))."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
