"""cleanup: remove what DeltaGlider's own shared and forgotten caches left on this host."""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dgcache import Settings
from dgcache_cli import exits, legacy
from dgcache_cli.output import human_seconds, human_size, print_json, print_table
from dgcache_cli.removals import Removal
from dgcache_cli.verdicts import Cache, Judgement, name_of
from dgcache_core.errors import CacheUnavailableError
from dgcache_core.runtime_directory import candidates

_DESCRIPTION = """\
Find and remove the caches that DeltaGlider itself left: /tmp/.deltaglider
(up to 5.0.2, shared, in plaintext), /tmp/deltaglider-* (later releases,
left when a process was killed; also below $TMPDIR), and what is older than
dg-cached in ~/.cache/deltaglider and $DG_CACHE_DIR. Each is shown with what is
wrong with it, and goes only after you said y. No reference is migrated: it is
fetched again where it is needed.

Only files of your own go; links are removed and never followed. What another
process has open stays, and so does a /tmp/deltaglider-* that changed in the
last 24 hours or holds other files than DeltaGlider's. Processes of other users
are not seen, unless root asks.
"""

_EPILOG = """\
examples:
  dg-cache cleanup --dry-run    show what is there, and change nothing
  dg-cache cleanup              ask for each cache
  dg-cache cleanup --yes        ask nothing: for scripts
  dg-cache cleanup --json       the same as --dry-run, for programs
  dg-cache cleanup --json --yes

exit status:
  0 done, or nothing to do; also where standard input is no terminal and --yes
  is missing: then nothing changes. 77 something of yours could not be removed
"""


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add this group's command."""
    cleanup = commands.add_parser(
        "cleanup",
        help="remove what DeltaGlider's own caches left in /tmp and your home",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    how = cleanup.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="remove without asking")
    how.add_argument("--dry-run", action="store_true", help="show what is there, remove nothing")
    cleanup.add_argument("--json", action="store_true", help="print JSON; removes only with --yes")
    cleanup.set_defaults(run=_cleanup)


def _cleanup(arguments: argparse.Namespace) -> int:
    try:
        return _searched(arguments)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CacheUnavailableError(f"cannot look for caches ({error}): is /proc there?") from error


def _searched(arguments: argparse.Namespace) -> int:
    with legacy.Search(_places(Settings.from_environment())) as search:
        judged = list(zip(search.caches, search.judge_all(time.time()), strict=True))
        if arguments.json:
            return _as_json(search, judged, remove=arguments.yes)
        for problem in search.problems:
            print(f"dg-cache: {shown(problem)}", file=sys.stderr)
        if not judged:
            print("nothing of DeltaGlider's own caches is here")
            return exits.OK
        _show(judged)
        return _go_through(search, judged, ask=not arguments.yes, dry_run=arguments.dry_run)


_Judged = list[tuple[Cache, Judgement]]


def _places(settings: Settings) -> legacy.Places:
    # what tempfile.gettempdir() goes by; it would write a file to find out whether it can
    named = [os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")]
    temporary = [legacy.SYSTEM_TEMPORARY, *(Path(name) for name in named if name)]
    account = None
    with suppress(RuntimeError):  # there is no home
        account = Path("~/.cache/deltaglider").expanduser()
    bases = [base for base in (account, settings.cache_dir) if base is not None]
    sockets = [place.path for place in candidates(settings.socket_dir, os.environ)]
    live = [*sockets, *(base / name for base in bases for name in legacy.CURRENT)]
    return legacy.Places(temporary, account, settings.cache_dir, live)


def _go_through(search: legacy.Search, judged: _Judged, *, ask: bool, dry_run: bool) -> int:
    removable = [(cache, judgement) for cache, judgement in judged if judgement.kept is None]
    if not removable or dry_run:
        return exits.OK
    if ask and not sys.stdin.isatty():
        print("nothing was removed, since nobody can be asked here: dg-cache cleanup --yes")
        return exits.OK
    removals = []
    for cache, judgement in removable:
        if ask and not _agreed(cache, judgement):
            continue
        removal = search.remove(cache, judgement, time.time())
        removals.append(removal)
        _say(cache, removal)
    print(f"freed {human_size(sum(removal.size for removal in removals))}")
    return _status(removals)


def _agreed(cache: Cache, judgement: Judgement) -> bool:
    question = f"remove {_named(cache)} ({human_size(judgement.found.size)})? [y/N] "
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _status(removals: Iterable[Removal]) -> int:
    incomplete = any(one.failed or one.stopped is not None for one in removals)
    return exits.REFUSED if incomplete else exits.OK


# -- for people ------------------------------------------------------------------------------------


def _show(judged: _Judged) -> None:
    print_table(
        ("cache", "owner", "mode", "size", "unchanged for"),
        [
            (
                _named(cache),
                shown(name_of(judgement.owner_uid)),
                f"{judgement.mode:04o}",
                human_size(judgement.found.size),
                human_seconds(judgement.age_seconds),
            )
            for cache, judgement in judged
        ],
    )
    for cache, judgement in judged:
        print(_named(cache))
        for wrong in judgement.wrong:
            _print_item(wrong)
        if judgement.kept is not None:
            _print_item(f"stays: {judgement.kept}")


def _say(cache: Cache, removal: Removal) -> None:
    if removal.entries:
        print(f"removed {_named(cache)}: {removal.entries} entries, {human_size(removal.size)}")
    for left in removal.left:
        _print_item(f"{left.path} stays: {left.reason}".lstrip())
    if removal.left_entries > len(removal.left):
        _print_item(f"and {removal.left_entries - len(removal.left)} more stay")
    if removal.stopped is not None:
        _print_item(f"{removal.stopped}: dg-cache cleanup again removes more")


def _print_item(text: str) -> None:
    print(f"  {shown(text)}")  # not folded: there may be a command in it to be copied


def _named(cache: Cache) -> str:
    return shown(str(cache.path))


def shown(text: str) -> str:
    """Return a text that does to a terminal what it says: others choose names in /tmp."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


# -- for programs ----------------------------------------------------------------------------------


def _as_json(search: legacy.Search, judged: _Judged, *, remove: bool) -> int:
    removals = [
        search.remove(cache, judgement, time.time()) if remove and judgement.kept is None else None
        for cache, judgement in judged
    ]
    done = [removal for removal in removals if removal is not None]
    print_json(
        {
            "caches": [
                _described(cache, judgement, removal)
                for (cache, judgement), removal in zip(judged, removals, strict=True)
            ],
            "freed_bytes": sum(removal.size for removal in done),
            "problems": search.problems,
        }
    )
    return _status(done)


def _described(cache: Cache, judgement: Judgement, removal: Removal | None) -> dict[str, Any]:
    found = judgement.found
    return {
        "path": str(cache.path),
        "kind": str(cache.kind),
        "names": list(cache.names),
        "owner": name_of(judgement.owner_uid),
        "uid": judgement.owner_uid,
        "mode": f"{judgement.mode:04o}",
        "size": found.size,
        "files": found.files,
        "age_seconds": judgement.age_seconds,
        "complete": found.is_complete,
        "wrong": list(judgement.wrong),
        "kept": judgement.kept,
        "removed": _removed(removal),
    }


def _removed(removal: Removal | None) -> dict[str, Any] | None:
    return None if removal is None else asdict(removal)
