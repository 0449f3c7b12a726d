"""get, put, has, ls, evict, clear: what is in the cache."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import dgcache
from dgcache import Settings
from dgcache.connecting import connect
from dgcache.reference import Reference
from dgcache_cli import exits
from dgcache_cli.output import human_seconds, human_size, print_json, print_table, progress
from dgcache_cli.patience import patient
from dgcache_core.errors import CacheMissError, InvalidReferenceError
from dgcache_core.references import Deltaspace, parse_deltaspace, parse_sha256

if TYPE_CHECKING:
    from dgcache_core.store import EntryInfo

_PIECE_BYTES = 1 << 20
_DELTASPACE = "s3://bucket/prefix or bucket/prefix"

_GET_EXAMPLES = """\
examples:
  dg-cache get s3://releases/app 5e88…d8 -o reference.bin
  dg-cache get s3://releases/app 5e88…d8 --exec xdelta3 -d -s {} new.delta new.zip
  dg-cache get s3://releases/app 5e88…d8 -o reference.bin \\
      --fetch 'aws s3 cp s3://releases/app/reference.bin -'

With --exec, {} becomes the path of a sealed descriptor that nobody can change; it is
valid while the command runs, and its exit status becomes ours. Without -o and --exec
the bytes go to standard output.
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's commands."""
    get = commands.add_parser(
        "get",
        help="hand a reference to a file, a pipe or a command",
        epilog=_GET_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    get.add_argument("deltaspace", metavar="DELTASPACE", help=_DELTASPACE)
    get.add_argument("sha256", metavar="SHA256", help="64 hexadecimal digits")
    get.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the bytes there")
    get.add_argument("--fetch", metavar="CMD", help="on a miss, run CMD: its output is the bytes")
    get.add_argument("--verify", action="store_true", help="hash all bytes here once more")
    get.add_argument(
        "--exec",
        nargs=argparse.REMAINDER,
        metavar="CMD",
        help="run CMD with {} replaced by the sealed path; must come last",
    )
    get.set_defaults(run=_get)

    put = commands.add_parser("put", help="store a file; prints its digest")
    put.add_argument("deltaspace", metavar="DELTASPACE", help=_DELTASPACE)
    put.add_argument("file", type=Path, metavar="FILE", help="a regular file; - is standard input")
    put.add_argument("--sha256", metavar="HEX", help="what the digest must be")
    put.add_argument("--json", action="store_true", help="print JSON")
    put.set_defaults(run=_put)

    has = commands.add_parser("has", help="exit status 0 if a get would find it, else 1")
    has.add_argument("deltaspace", metavar="DELTASPACE", help=_DELTASPACE)
    has.add_argument("sha256", metavar="SHA256")
    has.add_argument("--json", action="store_true", help="print JSON")
    has.set_defaults(run=_has)

    ls = commands.add_parser("ls", help="list the references, most recently used first")
    ls.add_argument("--json", action="store_true", help="print JSON")
    ls.set_defaults(run=_ls)

    evict = commands.add_parser("evict", help="forget a deltaspace")
    evict.add_argument("deltaspace", metavar="DELTASPACE", help=_DELTASPACE)
    evict.add_argument("--json", action="store_true", help="print JSON")
    evict.set_defaults(run=_evict)

    clear = commands.add_parser("clear", help="free every entry; says what that freed")
    clear.add_argument(
        "--rekey",
        action="store_true",
        help="also make every key anew: the old keys' memory is zeroed and unmapped",
    )
    clear.add_argument("--json", action="store_true", help="print JSON")
    clear.set_defaults(run=_clear)


def _get(arguments: argparse.Namespace) -> int:
    deltaspace, sha256 = parse_deltaspace(arguments.deltaspace), parse_sha256(arguments.sha256)
    if arguments.exec is not None and (not arguments.exec or arguments.output is not None):
        raise InvalidReferenceError("--exec needs a command, and goes without -o")
    if arguments.exec is None and arguments.output is None and sys.stdout.isatty():
        raise InvalidReferenceError("these are bytes, not text: use -o FILE, a pipe, or --exec")
    with _reference(deltaspace, sha256, arguments.fetch) as reference:
        if arguments.verify:
            reference.verify()
        if arguments.exec is not None:
            return _execute(arguments.exec, reference)
        if arguments.output is None:
            _copy(reference, sys.stdout.buffer)
        else:
            _write(reference, arguments.output)
    return exits.OK


@contextmanager
def _reference(deltaspace: Deltaspace, sha256: str, fetch: str | None) -> Iterator[Reference]:
    """Get it from the daemon, or fetch it, with or without one."""
    if fetch is None:
        with _daemon() as daemon:
            handout = daemon.get(deltaspace, parse_sha256(sha256))
            with Reference(handout, source=daemon.name) as reference:
                yield reference
        return
    with (
        dgcache.open(patient(Settings.from_environment())) as cache,
        progress("fetching", None) as advance,
        cache.get_or_fetch(
            deltaspace.bucket, deltaspace.prefix, sha256, lambda: _Fetch(fetch, advance)
        ) as reference,
    ):
        yield reference


class _Fetch:
    """The output of a shell command as a stream; its failure is a miss."""

    def __init__(self, command: str, advance: Callable[[int], None]) -> None:
        import subprocess

        self._command = command
        self._advance = advance
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )

    def read(self, size: int) -> bytes:
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        piece = self._process.stdout.read(size)
        self._advance(len(piece))
        if not piece and self._process.wait() != 0:
            import shlex

            raise CacheMissError(
                f"the fetch command ended with status {self._process.returncode}: "
                f"{shlex.quote(self._command)}"
            )
        return piece

    def close(self) -> None:
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdout.close()
        self._process.wait()


def _execute(command: list[str], reference: Reference) -> int:
    import subprocess

    argv = [word.replace("{}", str(reference.path)) for word in command]
    try:
        status = subprocess.run(argv, check=False).returncode
    except OSError as error:
        raise InvalidReferenceError(f"cannot run {argv[0]}: {error.strerror}") from error
    return status if status >= 0 else 128 - status


def _write(reference: Reference, path: Path) -> None:
    """Write into what is there and no regular file, a device or /dev/stdout; else a whole file."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            with path.open("wb") as out:
                _copy(reference, out)
        else:
            _write_whole(reference, path)
    except BrokenPipeError:  # main knows what that is
        raise
    except OSError as error:
        raise InvalidReferenceError(f"cannot write {path}: {error.strerror}") from error


def _write_whole(reference: Reference, path: Path) -> None:
    """Write to a temporary file beside `path`, then rename: never half a reference."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "xb") as out:  # noqa: PTH123 - mode x
            _copy(reference, out)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _copy(reference: Reference, out: IO[bytes]) -> None:
    with progress("writing", reference.size) as advance:
        for offset in range(0, reference.size, _PIECE_BYTES):
            piece = os.pread(reference.fd, _PIECE_BYTES, offset)
            out.write(piece)
            advance(len(piece))
    out.flush()


def _put(arguments: argparse.Namespace) -> int:
    deltaspace = parse_deltaspace(arguments.deltaspace)
    from dgcache.sources import WatchedSource, opened

    expected = parse_sha256(arguments.sha256) if arguments.sha256 else None
    what: Any = sys.stdin.buffer if str(arguments.file) == "-" else arguments.file
    with _daemon() as daemon, opened(what, daemon.max_entry_bytes) as source:
        with progress("storing", source.size) as advance:
            digest = daemon.put(deltaspace, WatchedSource(source, advance), expected)
        if arguments.json:
            print_json({"deltaspace": str(deltaspace), "sha256": digest, "size": source.size})
        else:
            print(digest)
    return exits.OK


def _has(arguments: argparse.Namespace) -> int:
    deltaspace, sha256 = parse_deltaspace(arguments.deltaspace), parse_sha256(arguments.sha256)
    with _daemon() as daemon:
        reason = daemon.miss_reason(deltaspace, sha256)
    if arguments.json:
        print_json({"cached": reason is None, "reason": reason})
    else:
        print("cached" if reason is None else f"not cached: {reason}")
    return exits.OK if reason is None else exits.MISS


def _ls(arguments: argparse.Namespace) -> int:
    with _daemon() as daemon:
        entries = daemon.entries()
    if arguments.json:
        print_json(
            [
                {
                    "sha256": entry.sha256,
                    "size": entry.size,
                    "deltaspaces": [str(d) for d in entry.deltaspaces],
                    "age_seconds": entry.age_seconds,
                    "expires_in_seconds": entry.expires_in_seconds,
                    "idle_seconds": entry.idle_seconds,
                    "hits": entry.hits,
                    "held": entry.held,
                    "tier": entry.tier,
                    "stored_by": entry.stored_by,
                }
                for entry in entries
            ]
        )
    elif entries:
        print_table(
            ("deltaspace", "sha256", "size", "hits", "used", "expires in"),
            [
                (
                    "\n".join(map(str, entry.deltaspaces)) or "-",
                    entry.sha256[:12],
                    human_size(entry.size),
                    str(entry.hits),
                    _last_use(entry),
                    human_seconds(entry.expires_in_seconds),
                )
                for entry in entries
            ],
        )
    else:
        print("the cache is empty")
    return exits.OK


def _last_use(entry: "EntryInfo") -> str:
    if entry.tier == "disk":
        return "on disk"
    return "now" if entry.held else f"{human_seconds(entry.idle_seconds)} ago"


def _evict(arguments: argparse.Namespace) -> int:
    with _daemon() as daemon:
        freed = daemon.evict(parse_deltaspace(arguments.deltaspace))
    return _print_freed(freed, as_json=arguments.json)


def _clear(arguments: argparse.Namespace) -> int:
    with _daemon() as daemon:
        freed = daemon.clear(rekey=arguments.rekey)
    if arguments.rekey and not arguments.json:
        print("every key was made anew")
    return _print_freed(freed, as_json=arguments.json)


def _print_freed(freed: Any, *, as_json: bool) -> int:
    if as_json:
        print_json({"freed_entries": freed.entries, "freed_bytes": freed.bytes})
    else:
        noun = "reference" if freed.entries == 1 else "references"
        print(f"freed {freed.entries} {noun}, {human_size(freed.bytes)}")
    return exits.OK


@contextmanager
def _daemon() -> Iterator[Any]:
    """Lend the daemon, without a fallback: these commands are about it."""
    daemon = connect(patient(Settings.from_environment()))
    try:
        yield daemon
    finally:
        daemon.close()
