"""Whether DeltaGlider's calls of its cache port work: they are made, in its order.

`python -m dgcache_cli.bench.port_calls NAME DIRECTORY SOURCE` prints what went wrong, as JSON. It
is a program of its own because dg-cached's port needs DeltaGlider, which may be in another
environment: `calls` is told which Python has it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgcache_cli.bench.child import BUDGET_MB
from dgcache_cli.bench.implementations import Implementation, by_name
from dgcache_cli.bench.place import own_place, random_file
from dgcache_cli.bench.port import BUCKET, PREFIX
from dgcache_cli.bench.timing import digest_of
from dgcache_core.errors import InvalidReferenceError

_CALLS = ("ref_path", "has_ref", "get_validated_ref", "write_ref", "evict", "clear")
_SIZE = 300_000
_SECONDS = 60.0
_NO_DELTAGLIDER = 69


@dataclass(frozen=True, slots=True)
class PortCalls:
    """Whether the calls work unchanged; None where it could not be tried."""

    work: bool | None
    why: str


def calls(
    implementation: Implementation, base: Path, environ: Mapping[str, str], python: str
) -> PortCalls:
    """Make DeltaGlider's calls of an implementation, in a process of its own.

    Raises:
        InvalidReferenceError: there is no such Python.
    """
    place = own_place(base, f"called-{implementation.name}")
    source = random_file(base / f"called-{implementation.name}.bin", _SIZE)
    command = [python, "-m", __name__, implementation.name, str(place), str(source)]
    with implementation.site(place, BUDGET_MB, environ):
        try:
            done = subprocess.run(
                command, capture_output=True, check=False, timeout=_SECONDS, process_group=0
            )
        except OSError as error:
            raise InvalidReferenceError(f"--deltaglider {python}: {error.strerror}") from error
        except subprocess.TimeoutExpired:
            return PortCalls(False, f"did not end within {_SECONDS:.0f} s")
    if done.returncode == _NO_DELTAGLIDER:
        return PortCalls(None, "not tried: it needs DeltaGlider (--deltaglider PYTHON)")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return PortCalls(False, f"ended with {last}")
    wrong: list[str] = json.loads(done.stdout)
    return PortCalls(not wrong, "; ".join(wrong) or f"all {len(_CALLS)} calls were made")


def main() -> int:
    """Make the calls and print what went wrong."""
    name, place, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        with by_name(name).port(place, BUDGET_MB) as port:
            print(json.dumps(list(_what_goes_wrong(port, source))))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "deltaglider":
            raise
        return _NO_DELTAGLIDER
    return 0


def _what_goes_wrong(port: Any, source: Path) -> Iterator[str]:
    missing = [name for name in _CALLS if not hasattr(port, name)]
    if missing:
        yield f"has no {', '.join(missing)}"
    sha256 = digest_of(source)
    if port.has_ref(BUCKET, PREFIX, sha256):
        yield "has_ref says yes before anything was written"
    port.write_ref(BUCKET, PREFIX, source)
    if not port.has_ref(BUCKET, PREFIX, sha256):
        yield "has_ref never says yes, so that each use downloads again"
    if "get_validated_ref" not in missing:
        yield from _reads(port, sha256)
    elif digest_of(port.ref_path(BUCKET, PREFIX)) != sha256:
        yield "ref_path leads to other bytes"
    for last in ("evict", "clear"):
        if last not in missing:
            getattr(port, last)(*((BUCKET, PREFIX) if last == "evict" else ()))


def _reads(port: Any, sha256: str) -> Iterator[str]:
    if digest_of(port.get_validated_ref(BUCKET, PREFIX, sha256)) != sha256:
        yield "get_validated_ref leads to other bytes"
    try:
        port.get_validated_ref(BUCKET, PREFIX, "0" * 64)
    except Exception:  # noqa: S110 - DeltaGlider's errors or ours, whichever are installed
        pass
    else:
        yield "get_validated_ref gives a path for a digest it has not"


if __name__ == "__main__":
    sys.exit(main())
