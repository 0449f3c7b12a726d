"""What the kernel must have."""

import os
import sys

from dgcache_core.errors import CacheUnavailableError


def require_linux() -> None:
    """Raise `CacheUnavailableError`, with what is missing, where references cannot be sealed."""
    if sys.platform != "linux":
        raise CacheUnavailableError(
            f"dg-cached needs Linux (sealed memory files, SO_PEERCRED); this is {sys.platform}"
        )
    if not hasattr(os, "memfd_create"):
        raise CacheUnavailableError("this Python was built without os.memfd_create (glibc 2.27)")
