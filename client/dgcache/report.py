"""What the SDK says, always through the logger `dgcache`: fallbacks, and what was saved."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from dgcache_core.errors import CacheError, DaemonAbsentError
from dgcache_core.runtime_directory import SESSION_SOCKET, candidates

logger = logging.getLogger("dgcache")

_UNIT = "dg-cached.socket"
_UNIT_DIRECTORIES = (
    Path("/etc/systemd/user"),
    Path("/run/systemd/user"),
    Path("/usr/local/lib/systemd/user"),
    Path("/usr/lib/systemd/user"),
)


def report_fallback(error: CacheError, socket_dir: Path | None, environ: Mapping[str, str]) -> None:
    """Say why the in-process cache is used: a warning where a daemon was to be expected."""
    absent = isinstance(error, DaemonAbsentError) and not _is_expected(socket_dir, environ)
    logger.log(
        logging.INFO if absent else logging.WARNING,
        "using the in-process cache: %s",
        error,
    )


def report_hit(source: str, size: int, seconds: float) -> None:
    """Say what a hit saved: one GET and the reference's bytes."""
    logger.info(
        "reference %s from %s in %.0f ms; 1 GET, %s saved",
        megabytes(size),
        source,
        seconds * 1000,
        megabytes(size),
    )


def report_fetch(size: int, seconds: float, stored_in: str | None) -> None:
    """Say that a reference was fetched, and whether it is warm now."""
    kept = f"now warm in {stored_in}" if stored_in else "could not be kept"
    logger.info("reference %s fetched in %.0f ms; %s", megabytes(size), seconds * 1000, kept)


def megabytes(size: int) -> str:
    """Return a size as people read it, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _is_expected(socket_dir: Path | None, environ: Mapping[str, str]) -> bool:
    if any(os.path.lexists(p.path / SESSION_SOCKET) for p in candidates(socket_dir, environ)):
        return True
    config = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME", "/")) / ".config")
    return any(
        (directory / _UNIT).exists()
        for directory in (Path(config) / "systemd/user", *_UNIT_DIRECTORIES)
    )
