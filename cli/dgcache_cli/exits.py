"""Exit statuses, and the one place where an error becomes one (sysexits.h where it has a word)."""

import sys

from dgcache_core.errors import (
    CacheCorruptionError,
    CacheError,
    CacheFullError,
    CacheMissError,
    CacheRefusedError,
    CacheUnavailableError,
    InvalidReferenceError,
    SettingsError,
)

OK = 0
MISS = 1
USAGE = 2
CORRUPTION = 65
UNAVAILABLE = 69
NO_ROOM = 75
REFUSED = 77
SETTINGS = 78

_STATUSES: dict[type[CacheError], int] = {
    CacheMissError: MISS,
    InvalidReferenceError: USAGE,
    CacheCorruptionError: CORRUPTION,
    CacheUnavailableError: UNAVAILABLE,
    CacheFullError: NO_ROOM,
    CacheRefusedError: REFUSED,
    SettingsError: SETTINGS,
}

EXPLAINED = """\
exit status:
  0 done; 1 miss; 2 usage; 65 a check of stored bytes failed; 69 no daemon;
  75 no room; 77 refused; 78 a setting does not parse"""


def failed(error: CacheError) -> int:
    """Print the error as one line and return its exit status."""
    print(f"dg-cache: {error}", file=sys.stderr)
    return next(_STATUSES[kind] for kind in type(error).__mro__ if kind in _STATUSES)
