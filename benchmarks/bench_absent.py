"""Times one first use of the SDK in a fresh process: `python -m benchmarks.bench_absent CASE`.

CASE is `miss` (a first `get` in an empty cache) or `hit` (a first `get` after a `put` of 1 MB,
which is not counted), with `-memory` where the in-process cache is asked for, without where the
environment leads to no daemon. Prints milliseconds, from before `import dgcache`. Nothing is
imported before that the SDK would not find loaded in any Python program.
"""

import os
import sys
import time


def main(case: str) -> float:
    """Return the milliseconds of import, open and first get."""
    data = os.urandom(1_000_000)
    start = time.perf_counter()
    import dgcache

    settings = dgcache.Settings(backend="memory") if case.endswith("-memory") else None
    cache = dgcache.open(settings)
    storing, sha256 = 0.0, "0" * 64
    if case.startswith("hit"):
        before = time.perf_counter()
        sha256 = cache.put("bench", "absent", data)
        storing = time.perf_counter() - before
    try:
        cache.get("bench", "absent", sha256).close()
    except dgcache.CacheMissError:
        if case.startswith("hit"):
            raise
    took = time.perf_counter() - start - storing
    if cache.backend != "memory":
        raise RuntimeError(f"the backend is {cache.backend}")
    return took * 1000


if __name__ == "__main__":
    print(main(sys.argv[1]))
