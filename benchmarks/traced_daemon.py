"""dg-cached with marks of time where a lookup passes, for the budget in performance.md.

`python -m benchmarks.traced_daemon RING` is dg-cached itself, unchanged but for wrappers that are
put around its functions here, before it starts.
"""

import sys
from pathlib import Path

from benchmarks.trace_marks import Marks, both

DAEMON_POINTS = both(
    "relay in", "relay out", "intercept", "admit", "packet", "Lookup", "now", "decrypt", "announce"
)


def main() -> int:
    """Put the wrappers on and be the daemon."""
    marks = Marks(Path(sys.argv[1]), DAEMON_POINTS)
    from dgcache_core.memory_store import MemoryStore
    from dgcached import admission, direct_calls, listener, service, sessions
    from dgcached.main import main as serve

    marks.around(listener._Outer, "_received", "relay in")
    marks.around(listener._Inner, "_received", "relay out")
    marks.around_coroutine(admission.AdmissionInterceptor, "intercept_service", "intercept")
    marks.around(admission.AdmissionInterceptor, "_admit", "admit")
    marks.around_coroutine(service.CacheService, "Lookup", "Lookup")
    marks.around(direct_calls.DirectCalls, "take", "packet")
    marks.around(MemoryStore, "lookup_now", "now")
    marks.around(MemoryStore, "_opened_handout", "decrypt")
    marks.around(sessions.Session, "send_descriptor", "announce")
    return serve([])


if __name__ == "__main__":
    sys.exit(main())
