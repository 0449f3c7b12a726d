"""Measures a `get` of dg-cached beside the same of every peer, round after round.

`python -m benchmarks.bench_peers OUT --rounds N --stock PYTHON --place DIR` uses the daemon that
DG_CACHE_SOCKET_DIR leads to. What a get is, the same for all, stands in `peers`.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from benchmarks.bench_daemon import connected, get, unheld_lookup
from benchmarks.bench_figures import (
    MEGABYTE,
    Chart,
    Figure,
    Group,
    Panel,
    of,
    pays_from,
    ratios,
    save,
)
from benchmarks.bench_store import FLOOR, parse, write_memory_file
from benchmarks.peers import PEERS, UNCHECKED, Peer, PeerContender
from benchmarks.servers import memcached_program, redis_program
from dgcache import ReferenceCache
from dgcache_cli.bench.timing import digest_of

GETS_A_ROUND = {1: 8, 10: 3, 100: 1, 500: 1}
_MOST_OF_500_MB = 2
"""Fernet alone takes four seconds for one."""
_OURS = "dg-cached"
_FLOOR = "memfd alone (the floor)"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the figures."""
    arguments = parse(argv, "Measure dg-cached beside its peers.")
    with connected() as cache, _opened(arguments.place, arguments.stock) as (contenders, absent):
        took = {
            size: _measured(cache, contenders, size, arguments.rounds, arguments.place)
            for size in arguments.sizes
        }
    save(arguments.out, [_group(took, absent)], versions=peer_versions())
    return 0


def peer_versions() -> dict[str, str]:
    """Return the version of every server and library that is compared, where it is installed."""
    found = {}
    for package in ("redis", "hiredis", "pymemcache", "diskcache"):
        try:
            found[f"{package} (Python)"] = version(package)
        except PackageNotFoundError:
            found[f"{package} (Python)"] = "not installed"
    for program, option in ((redis_program(), "--version"), (memcached_program(), "-V")):
        if program is not None:
            found[Path(program).name] = _version_of(program, option)
    return found


def _version_of(program: str, option: str) -> str:
    told = subprocess.run([program, option], capture_output=True, check=False, text=True)
    number = re.search(r"\d+\.\d+\.\d+", told.stdout + told.stderr)
    return number[0] if number else "unknown"


@contextmanager
def _opened(
    place: Path, python: Path
) -> Iterator[tuple[dict[str, PeerContender], list[tuple[Peer, str]]]]:
    """Open every peer that is installed; yield them, and the others with what installs them."""
    absent = []
    with ExitStack() as stack:
        contenders = {}
        for number, peer in enumerate(PEERS):
            if (command := peer.missing()) is not None:
                absent.append((peer, command))
                continue
            own = place / f"peer-{number}"
            own.mkdir(mode=0o700)
            contenders[peer.name] = stack.enter_context(peer.opened(own, python))
        yield contenders, absent


def _measured(
    cache: ReferenceCache,
    contenders: dict[str, PeerContender],
    size: int,
    rounds: int,
    place: Path,
) -> dict[str, list[float]]:
    """Time every get of one size in turn, A B C A B C."""
    source = place / "source.bin"
    data = memoryview(os.urandom(size * MEGABYTE))
    source.write_bytes(data)
    sha256 = digest_of(source)
    cache.put("bench", "peers", source)
    with get(cache, sha256) as reference:
        reference.verify()
    unheld_lookup(cache, sha256)
    for name, contender in contenders.items():
        contender.write(source)
        if contender.digest(sha256) != sha256:
            raise RuntimeError(f"{name} handed out other bytes than were written")
    took: dict[str, list[float]] = {name: [] for name in (_FLOOR, _OURS, *contenders)}
    for _ in range(_samples(size, rounds)):
        took[_FLOOR].append(write_memory_file(data))
        took[_OURS].append(unheld_lookup(cache, sha256))
        for name, contender in contenders.items():
            took[name].append(contender.get(sha256))
    for contender in contenders.values():
        contender.clear()
    cache.clear()
    source.unlink()
    return took


def _samples(size: int, rounds: int) -> int:
    many = rounds * GETS_A_ROUND[size]
    return min(many, _MOST_OF_500_MB) if size >= 500 else many


def _group(took: dict[int, dict[str, list[float]]], absent: Sequence[tuple[Peer, str]]) -> Group:
    figures: list[Figure] = []
    for size, samples in took.items():
        figures += _figures(f"{size} MB", samples)
    names = next(iter(took.values()))
    lines = {
        name: [(float(size), median(samples[name])) for size, samples in took.items()]
        for name in names
    }
    figures += [
        pays_from(f"dg-cached against {name}", lines[_OURS], line)
        for name, line in lines.items()
        if name not in (_OURS, _FLOOR)
    ]
    chart = Chart(
        "get",
        "A get of what nobody holds, with full validation: less is better",
        "size in MB",
        "ms",
        [Panel("", lines)],
    )
    return Group("get, beside its peers", _how(absent), figures, charts=[chart])


def _figures(size: str, samples: dict[str, list[float]]) -> Iterator[Figure]:
    ours = samples[_OURS]
    for name, times in samples.items():
        yield of(f"{size}, {name}", times, "ms")
    yield of(f"{size}, dg-cached against the floor", ratios(ours, samples[_FLOOR]), "x")
    against = {
        name: of(f"{size}, {name}, against dg-cached", ratios(times, ours), "x")
        for name, times in samples.items()
        if name not in (_OURS, _FLOOR)
    }
    yield from against.values()
    checked = {name: figure.value for name, figure in against.items() if name not in UNCHECKED}
    if checked:
        fastest = min(checked, key=lambda name: checked[name])
        yield Figure(
            f"{size}, the fastest peer ({fastest}), against dg-cached",
            checked[fastest],
            "x",
            at_least=1.0,
        )


def _how(absent: Sequence[tuple[Peer, str]]) -> str:
    missing = "".join(
        f" {peer.name} was not measured: it is not installed ({command})."
        for peer, command in absent
    )
    return (
        "From the digest to a path that xdelta3 can read, its bytes checked; each get of each "
        f"contender in turn, in one process on {platform.system()}, servers warm, files in the "
        f"page cache. {FLOOR}. dg-cached decrypts and authenticates into a sealed memory file; "
        f"nobody held it.{missing} What a get of each peer is, and what it protects, is in the "
        "table of peers above"
    )


if __name__ == "__main__":
    sys.exit(main())
