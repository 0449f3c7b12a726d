"""Units put in place and taken away, a step at a time; see `units` and `steps`."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from dgcache_cli import units
from dgcache_cli.steps import Steps
from dgcache_core.errors import CacheRefusedError

_LISTED_LINES = 20


def put(steps: Steps, directory: Path, names: Sequence[str]) -> bool:
    """Put units in place, and tell whether one was there that differed.

    Raises:
        CacheRefusedError: one is masked, or cannot be read or written.
        CacheUnavailableError: there is no daemon for them to start.
    """
    wanted = units.units_in(directory, names)
    found = [unit.found() for unit in wanted]  # what is refused is refused before a change
    for unit, before in zip(wanted, found, strict=True):
        if before is None:
            steps.do("write", unit.path, unit.write)
        elif before == unit.text:
            steps.find("unchanged", unit.path)
        else:
            steps.do("replace", unit.path, unit.write, _gone(before, unit.text))
    for path in units.drop_ins(directory, names):
        steps.find("kept", path, "a drop-in")
    return any(text not in (None, unit.text) for text, unit in zip(found, wanted, strict=True))


def take(steps: Steps, directory: Path, names: Sequence[str]) -> None:
    """Remove units and the links that enabled them; say what else of them stays.

    Raises:
        CacheRefusedError: one cannot be removed.
    """
    for path in units.links_to(directory, names):
        steps.do("remove", path, partial(_unlink, path))
        _remove_if_empty(steps, path.parent)
    for name in names:
        path = directory / name
        if path.is_symlink():
            steps.find("left", path, f"a link to {path.readlink()}, which install never makes")
        elif path.is_file():
            steps.do("remove", path, partial(_unlink, path))
    for path in units.drop_ins(directory, names):
        steps.find("left", path, "a drop-in")


def remove_empty(steps: Steps, directory: Path, home: Path) -> None:
    """Remove a directory with those above it, up to the home, as far as nothing is in them.

    Programs make these where they need them (XDG Base Directory Specification).
    """
    for place in (directory, *directory.parents):
        if home not in place.parents or place.is_symlink():
            return
        _remove_if_empty(steps, place)


def _remove_if_empty(steps: Steps, directory: Path) -> None:
    if not steps.dry_run:
        with suppress(OSError):  # not empty, not there, not ours
            directory.rmdir()


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheRefusedError(f"cannot remove {path}: {error.strerror}") from error


def _gone(before: str, after: str) -> str:
    lost = units.lost_lines(before, after)
    if not lost:
        return ""
    more = f"; and {len(lost) - _LISTED_LINES} more lines" if len(lost) > _LISTED_LINES else ""
    return f"gone is {'; '.join(lost[:_LISTED_LINES])}{more}"
