"""One line per event that matters, as `event key=value …`: never a key, session id or content.

On the journal's pipe each line carries its priority as sd-daemon(3) has it; elsewhere the time and
the level's name. Values from outside are quoted, so that none can forge a line.
"""

import json
import logging
import os
import re
import sys
from logging.handlers import RotatingFileHandler
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
        handler = RotatingFileHandler(log_file, maxBytes=MAX_LOG_BYTES, backupCount=1)
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
