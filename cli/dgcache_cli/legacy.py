"""The caches DeltaGlider itself left on this host: where they are, and how they go.

Where, as its releases have it: up to 5.0.2 they share `/tmp/.deltaglider/cache` (SDK) and
`/tmp/.deltaglider/reference_cache` or `$DG_CACHE_DIR` (CLI) between all processes, in plaintext;
from 5.0.3 every process makes `/tmp/deltaglider-*`, which stays when it is killed. In
`~/.cache/deltaglider`, whatever is not of dg-cached (`v2/`, `run/`) is older than it.

Nothing is migrated: a reference is fetched again where it is needed. `verdicts` has the rules of
what may go. Looking changes nothing; a removal judges again first, and takes only what has the
inode that was judged.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dgcache_cli.open_files import find_holders
from dgcache_cli.removals import Removal, remove
from dgcache_cli.trees import (
    Bounds,
    Identity,
    Rules,
    Survey,
    identity,
    mount_of,
    opened_node,
    survey,
)
from dgcache_cli.verdicts import (
    Cache,
    Judgement,
    Kind,
    is_plaintext,
    is_reference,
    judge,
    path_of,
    roots,
)

SYSTEM_TEMPORARY = Path("/tmp")  # noqa: S108 - the very directory DeltaGlider names
MAX_CACHES = 1000
_SHARED = ".deltaglider"
_SHARED_NAMES = ("cache", "reference_cache")
_PROCESS_PREFIX = "deltaglider-"
CURRENT = ("v2", "run")
"""What in the cache of an account is dg-cached's own."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look.

    Args:
        temporary: directories such as /tmp.
        account: the cache of this account, `~/.cache/deltaglider`; None without a home.
        chosen: `$DG_CACHE_DIR`, where it is set.
        live: directories that dg-cached itself uses.
    """

    temporary: Sequence[Path]
    account: Path | None
    chosen: Path | None
    live: Sequence[Path]


class Search:
    """Finds the caches and holds their directories open; a context manager."""

    def __init__(self, places: Places, bounds: Bounds = Bounds()) -> None:  # noqa: B008 - frozen
        self._stack = ExitStack()
        self._bounds = bounds
        self._seen: set[Identity] = set()
        self._live = frozenset(_identities_of(places.live))
        self.caches: list[Cache] = []
        self.problems: list[str] = []
        """Where it could not look, or stopped."""
        try:
            self._look(places)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def judge_all(self, now: float) -> list[Judgement]:
        """Return a judgement for each of the caches.

        Args:
            now: seconds since the epoch.
        """
        wanted = {root for cache in self.caches for root in roots(cache)}
        holders = find_holders(wanted)
        return [judge(cache, self._rules(cache), now, holders) for cache in self.caches]

    def remove(self, cache: Cache, judged: Judgement, now: float) -> Removal:
        """Remove a cache as it was judged, unless it is not any more what it was."""
        result = Removal()
        again = judge(cache, self._rules(cache), now, find_holders(roots(cache)))
        if again.kept is not None:
            result.leave("", again.kept, by_rule=True)
            return result
        rules = self._rules(cache)
        for name, expected in judged.identities.items():
            try:
                remove(cache.parent, name, expected, rules, result)
            except OSError as error:
                result.leave(name, error.strerror or str(error), by_rule=False)
        if cache.empties is not None and not result.left_entries:
            with suppress(OSError):  # not empty, or not ours
                os.rmdir(cache.empties[1], dir_fd=cache.empties[0])
        return result

    def _rules(self, cache: Cache) -> Rules:
        if cache.only_references:
            return Rules(self._bounds, self._live, is_plaintext, is_reference)
        return Rules(self._bounds, self._live, is_plaintext)

    # -- looking ---------------------------------------------------------------------------------

    def _look(self, places: Places) -> None:
        for temporary in places.temporary:
            directory = self._open(temporary)
            if directory is not None:
                self._look_for_shared(directory)
                self._look_for_processes(directory)
        if places.account is not None:
            self._look_at_account(places.account, is_chosen=places.account.is_symlink())
        if places.chosen is not None:
            self._look_at_account(places.chosen, is_chosen=True)
        if len(self.caches) > MAX_CACHES:
            del self.caches[MAX_CACHES:]
            self.problems.append(f"stopped after {MAX_CACHES} caches: run it again for the others")

    def _open(self, path: Path) -> int | None:
        """Open a directory once, whatever it is called; the search closes it."""
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.problems.append(f"cannot look into {path}: {error.strerror}")
            return None
        self._stack.callback(os.close, directory)
        itself = identity(os.fstat(directory))
        if itself in self._seen:
            return None
        self._seen.add(itself)
        return directory

    def _look_for_shared(self, directory: int) -> None:
        try:
            node = self._stack.enter_context(opened_node(_SHARED, directory))
        except FileNotFoundError:
            return
        path = path_of(directory) / _SHARED
        status = os.fstat(node)
        if stat.S_ISLNK(status.st_mode) or mount_of(node) != mount_of(directory):
            self._add(Kind.SHARED, path, directory, (_SHARED,))
            return
        if not stat.S_ISDIR(status.st_mode):
            return
        emptied = (directory, _SHARED) if status.st_uid == os.geteuid() else None
        for name in _SHARED_NAMES:
            try:
                found = os.stat(name, dir_fd=node, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                self.problems.append(f"cannot look into {path}: {error.strerror}")
                return
            self._seen.add(identity(found))
            self._add(Kind.SHARED, path / name, node, (name,), empties=emptied)

    def _look_for_processes(self, directory: int) -> None:
        path = path_of(directory)
        for name in sorted(self._names(directory)):
            if not name.startswith(_PROCESS_PREFIX):
                continue
            with suppress(FileNotFoundError):
                mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode) or stat.S_ISLNK(mode):
                    self._add(Kind.PROCESS, path / name, directory, (name,), only_references=True)

    def _look_at_account(self, base: Path, *, is_chosen: bool) -> None:
        directory = self._open(base)
        if directory is None:
            return
        path = path_of(directory)
        with suppress(RuntimeError):
            if path in (Path.home().resolve(), *Path.home().resolve().parents):
                self.problems.append(f"did not look into {path}: it holds your home")
                return
        names = [name for name in self._names(directory) if name not in CURRENT]
        if is_chosen:
            names = [name for name in names if self._holds_references(directory, name)]
        if names:
            self._add(
                Kind.ACCOUNT, path, directory, tuple(sorted(names)), only_references=is_chosen
            )

    def _names(self, directory: int) -> Iterator[str]:
        count = 0
        with os.scandir(directory) as entries:
            for entry in entries:
                count += 1
                if count > self._bounds.max_entries:
                    self.problems.append(
                        f"stopped after {self._bounds.max_entries} entries of {path_of(directory)}"
                    )
                    return
                yield entry.name

    def _holds_references(self, directory: int, name: str) -> bool:
        found = Survey()
        rules = Rules(self._bounds, self._live, is_plaintext, is_reference)
        with suppress(FileNotFoundError):
            survey(directory, name, rules, found, reachable=False)
        return found.files > 0 and found.unexpected is None and found.is_complete

    def _add(
        self,
        kind: Kind,
        path: Path,
        parent: int,
        names: tuple[str, ...],
        *,
        only_references: bool = False,
        empties: tuple[int, str] | None = None,
    ) -> None:
        self.caches.append(Cache(kind, path, parent, names, only_references, empties))


def _identities_of(paths: Iterable[Path]) -> Iterator[Identity]:
    for path in paths:
        with suppress(OSError):
            yield identity(path.stat())
