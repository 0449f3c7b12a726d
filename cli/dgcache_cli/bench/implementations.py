"""The table of what is compared. One row is one implementation; nothing else names them.

To add one: a row with how it is opened below a directory, and the modules its lines are counted in.
Whatever needs a process of its own beside it has a `site`, which stands while it is used.
"""

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgcache_cli.bench.content_addressed import ContentAddressed
from dgcache_cli.bench.disk import opened_on_disk
from dgcache_cli.bench.fernet_files import FernetFiles
from dgcache_cli.bench.plain_directory import PlainDirectory
from dgcache_cli.bench.plain_memory import PlainMemory
from dgcache_cli.bench.port import (
    BUCKET,
    PREFIX,
    CachePort,
    Contender,
    FirstCachePort,
    PortContender,
)
from dgcache_cli.bench.sdk import (
    SdkContender,
    opened,
    running_daemon,
    running_daemon_with_disk,
)
from dgcache_core.errors import CacheMissError

BASELINE = "v5"
CHECKED_BASELINE = "v5-checked"

Site = Callable[
    [Path, int, Mapping[str, str]], AbstractContextManager["subprocess.Popen[bytes] | None"]
]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One row. Where a function takes a path and a number: a directory, and its budget in MiB."""

    name: str
    """What JSON and the command line call it."""
    title: str
    """What people read: at most 18 characters."""
    short: str
    """The head of a narrow column: at most 6 characters."""
    about: str
    """What a write and a read are."""
    opened: Callable[[Path, int], AbstractContextManager[Contender]]
    """Opens it below a directory."""
    port: Callable[[Path, int], AbstractContextManager[Any]]
    """Opens what DeltaGlider would call."""
    modules: tuple[str, ...]
    """Where its code begins; what these import of the project counts as well."""
    site: Site = lambda *_: nullcontext()
    """What stands beside it while it is used: a private daemon."""


def by_name(name: str) -> Implementation:
    """Return the row of this name."""
    return next(row for row in IMPLEMENTATIONS if row.name == name)


# -- the earlier ones ------------------------------------------------------------------------------


def _first(place: Path) -> PlainDirectory:
    return PlainDirectory(place / "reference_cache")


def _unchecked(place: Path, _: int) -> AbstractContextManager[Contender]:
    port = _first(place)
    return nullcontext(_first_contender(port, lambda _: port.ref_path(BUCKET, PREFIX)))


def _checked(place: Path, _: int) -> AbstractContextManager[Contender]:
    port = _first(place)

    def path_of(sha256: str) -> Path:
        if not port.has_ref(BUCKET, PREFIX, sha256):
            raise CacheMissError(f"{BUCKET}/{PREFIX} has no {sha256}")
        return port.ref_path(BUCKET, PREFIX)

    return nullcontext(_first_contender(port, path_of))


def _first_contender(port: FirstCachePort, path_of: Callable[[str], Path]) -> PortContender:
    return PortContender(port, path_of, clear=lambda: port.evict(BUCKET, PREFIX))


def _contender(
    make: Callable[[Path], CachePort],
) -> Callable[[Path, int], AbstractContextManager[Contender]]:
    """Return how a port of today is opened as a contender."""

    def open_it(place: Path, _: int) -> AbstractContextManager[Contender]:
        port = make(place)
        return nullcontext(
            PortContender(
                port,
                path_of=lambda sha256: port.get_validated_ref(BUCKET, PREFIX, sha256),
                clear=port.clear,
            )
        )

    return open_it


def _port(make: Callable[[Path], Any]) -> Callable[[Path, int], AbstractContextManager[Any]]:
    return lambda place, _: nullcontext(make(place))


def _content_addressed(place: Path) -> ContentAddressed:
    return ContentAddressed(_directory_of_this_process(place))


def _plain_memory(place: Path) -> PlainMemory:
    return PlainMemory(place / "deltaglider-mem-cache")


def _fernet_files(place: Path) -> FernetFiles:
    return FernetFiles(_directory_of_this_process(place))


def _directory_of_this_process(place: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="deltaglider-", dir=place))


# -- dg-cached -------------------------------------------------------------------------------------


def _sdk(backend: str) -> Callable[[Path, int], AbstractContextManager[Contender]]:
    @contextmanager
    def open_it(place: Path, size_mb: int) -> Iterator[Contender]:
        with opened(backend, place, size_mb) as cache:
            yield SdkContender(cache, backend)

    return open_it


def _sdk_port(backend: str) -> Callable[[Path, int], AbstractContextManager[Any]]:
    @contextmanager
    def open_it(place: Path, size_mb: int) -> Iterator[Any]:
        from dgcache.deltaglider import ReferenceCachePort  # needs DeltaGlider

        with opened(backend, place, size_mb) as cache:
            yield ReferenceCachePort(cache)

    return open_it


_BENCH = "dgcache_cli.bench"

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        BASELINE,
        "v5 filesystem",
        "v5",
        "DeltaGlider 5.0.0's shared directory: a write copies the file, a read is its path, "
        "nothing checked",
        _unchecked,
        _port(_first),
        (f"{_BENCH}.plain_directory",),
    ),
    Implementation(
        CHECKED_BASELINE,
        "v5 with has_ref",
        "v5+sha",
        "the same as DeltaGlider 5.0.0's service used it: `has_ref` hashes the file, then its path "
        "is used unchecked",
        _checked,
        _port(_first),
        (f"{_BENCH}.plain_directory",),
    ),
    Implementation(
        "sha-at-use",
        "SHA-256 at use",
        "sha",
        "content-addressed as from 5.0.3 on: a write hashes and copies, a read hashes the whole "
        "file, then its path is used",
        _contender(_content_addressed),
        _port(_content_addressed),
        (f"{_BENCH}.content_addressed",),
    ),
    Implementation(
        "plain-memory",
        "plaintext memory",
        "plain",
        "the roadmap's MemoryCache: bytes in a dict; a read compares digests and writes the bytes "
        "to a file for xdelta3, as DeltaGlider's does",
        _contender(_plain_memory),
        _port(_plain_memory),
        (f"{_BENCH}.plain_memory",),
    ),
    Implementation(
        "fernet",
        "Fernet files",
        "fernet",
        "the roadmap's encryption: Fernet over content-addressed files; a read decrypts and hashes "
        "the whole and writes it to a file",
        _contender(_fernet_files),
        _port(_fernet_files),
        (f"{_BENCH}.fernet_files",),
    ),
    Implementation(
        "memory",
        "dgcache memory",
        "memory",
        "`dgcache` in process, backend `memory`: AES-256-GCM in memory; a read is a sealed memory "
        "file",
        _sdk("memory"),
        _sdk_port("memory"),
        ("dgcache.local", "dgcache.reference"),
    ),
    Implementation(
        "filesystem",
        "dgcache filesystem",
        "files",
        "`dgcache` in process, backend `filesystem`: AES-256-GCM in nameless files; a read is a "
        "sealed memory file",
        _sdk("filesystem"),
        _sdk_port("filesystem"),
        ("dgcache.local", "dgcache.reference"),
    ),
    Implementation(
        "disk",
        "dgcache disk tier",
        "disk",
        "memory over the disk tier, as a daemon has it: signed, encrypted files; a read finds "
        "memory empty, brings the bytes back and is a sealed memory file",
        opened_on_disk,
        _sdk_port("dg-cached"),
        ("dgcache_core.tiered_store",),
        site=running_daemon_with_disk,
    ),
    Implementation(
        "daemon",
        "dg-cached daemon",
        "daemon",
        "the daemon through the SDK: AES-256-GCM in its memory; a read is a sealed memory file "
        "that it passes over",
        _sdk("dg-cached"),
        _sdk_port("dg-cached"),
        ("dgcache.cache", "dgcache.grpc_transport", "dgcached.main"),
        site=running_daemon,
    ),
)
