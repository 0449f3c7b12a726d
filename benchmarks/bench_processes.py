"""Measures whole processes from start to end: one that gets a reference, and 32 on a cold cache."""

import hashlib
import os
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.bench_figures import MEGABYTE, Figure, Group, of, ratios
from benchmarks.bench_site import CHILD_SECONDS, Site
from benchmarks.processes import run
from benchmarks.testbed import REFERENCE_SUFFIX, ROOT, S3Server

COLD_PROCESSES = 32
_ONE_SHOTS_A_ROUND = 5
_SPACE = "s3://bench/app"
_AT_MOST_PYTHONS = 8.0
_STRETCH_PYTHONS = 5.0
_COLD_AT_MOST = 1.3


def one_shot(site: Site, programs: Path, environment: Mapping[str, str]) -> Group:
    """Measure `dg-cache get … -o FILE` of 1 MB that the daemon has, against an empty Python."""
    source, target = site.place / "one-shot.bin", site.place / "one-shot.out"
    source.write_bytes(os.urandom(MEGABYTE))
    dg_cache = str(programs / "dg-cache")
    sha256 = site.run(environment, dg_cache, "put", _SPACE, str(source))
    bare, got, version = [], [], []
    for _ in range(_ONE_SHOTS_A_ROUND * site.rounds):
        bare.append(_took(site, environment, str(programs / "python"), "-c", "pass"))
        version.append(_took(site, environment, dg_cache, "--version"))
        got.append(_took(site, environment, dg_cache, "get", _SPACE, sha256, "-o", str(target)))
    if target.read_bytes() != source.read_bytes():
        raise RuntimeError("dg-cache get wrote other bytes than were stored")
    pythons = ratios(got, bare)
    return Group(
        "one-shot process",
        "`dg-cache get s3://… SHA256 -o FILE` of 1 MB that the daemon has and nobody holds, start "
        "to end, against `python -c pass` of the same environment, in turn. `dg-cache --version` "
        "tells what of it is Python and the command line",
        [
            of("python -c pass", bare, "ms"),
            of("dg-cache --version", version, "ms"),
            of("dg-cache get, 1 MB", got, "ms"),
            of("against python -c pass", pythons, "x", at_most=_AT_MOST_PYTHONS),
            of("against python -c pass, stretch", pythons, "x", at_most=_STRETCH_PYTHONS),
        ],
    )


def cold(
    site: Site, programs: Path, environment: Mapping[str, str], server: S3Server, rounds: int
) -> Group:
    """Measure 32 processes that want a reference which nobody has yet."""
    body = os.urandom(100 * MEGABYTE)
    sha256 = hashlib.sha256(body).hexdigest()
    server.create_bucket("bench")
    server.put("bench", f"app{REFERENCE_SUFFIX}", body)
    del body
    dg_cache = str(programs / "dg-cache")
    url = f"{server.url}/bench/app{REFERENCE_SUFFIX}"
    fetch = shlex.join([str(programs / "python"), "-m", "benchmarks.fetch", url])
    words = shlex.join([dg_cache, "get", _SPACE, sha256, "--fetch", fetch])
    command = ("/bin/sh", "-c", f"exec {words} > /dev/null")
    alone, together, warm, fetches = [], [], [], []
    for _ in range(rounds):
        site.run(environment, dg_cache, "clear")
        alone.append(_all_took(site, environment, command, 1))
        site.run(environment, dg_cache, "clear")
        server.reset_counts()
        together.append(_all_took(site, environment, command, COLD_PROCESSES))
        fetches.append(server.count("GET", REFERENCE_SUFFIX))
        warm.append(_all_took(site, environment, command, COLD_PROCESSES))
    parts = [one + after for one, after in zip(alone, warm, strict=True)]
    return Group(
        f"{COLD_PROCESSES} cold processes",
        f"{COLD_PROCESSES} processes `dg-cache get … --fetch CMD > /dev/null` started at once for "
        "100 MB that the daemon has not; CMD downloads from an S3 server on loopback, which "
        "counts. Held against one such process alone on a cold cache, and all of them once more "
        "on a warm one, added up: each process needs its Python whatever the cache does",
        [
            Figure("fetches", max(fetches), "", at_most=1),
            of("one process alone, cold", alone, "s"),
            of(f"{COLD_PROCESSES} processes, warm", warm, "s"),
            of(f"{COLD_PROCESSES} processes, cold", together, "s"),
            of(
                "cold, against one fetch and one warm round",
                ratios(together, parts),
                "x",
                at_most=_COLD_AT_MOST,
            ),
        ],
    )


def _took(site: Site, environment: Mapping[str, str], *command: str) -> float:
    measured = run(
        command,
        environment=environment,
        directory=ROOT,
        log=site.place / "output",
        seconds=CHILD_SECONDS,
        interruption=site.interruption,
    )
    return measured.seconds * 1000


def _all_took(
    site: Site, environment: Mapping[str, str], command: tuple[str, ...], count: int
) -> float:
    """Return the seconds from the first start to the last end."""

    def one(number: int) -> None:
        run(
            command,
            environment=environment,
            directory=ROOT,
            log=site.place / f"output-{number}",
            seconds=CHILD_SECONDS,
            interruption=site.interruption,
        )

    start = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))
    return time.monotonic() - start
