"""What a cache must withstand, tried on each implementation in processes of its own.

Each check really does what it says: it searches the disk, opens files as another user, changes
bytes, kills. The changes are made by a process of the same user, which is who could replace the
files of a directory of mode 0700; where the directory is open to others, they could as well.
"""

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dgcache_cli.bench.child import BUDGET_MB
from dgcache_cli.bench.implementations import Implementation
from dgcache_cli.bench.place import own_place, random_file
from dgcache_cli.bench.timing import digest_of
from dgcache_cli.bench.traces import files_below, files_with_plaintext
from dgcache_cli.bench.victim import ANSWER_SECONDS, RefusedError, Victim, victim
from dgcache_core.errors import CacheUnavailableError

_SIZE = 300_000
_STRANGER_UID = 65_534
_ANOTHER_DIGEST = hashlib.sha256(b"another reference").hexdigest()


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    how: str


@dataclass(frozen=True, slots=True)
class Withstood:
    """What an implementation withstood, and whether the next process found it warm."""

    checks: list[Check]
    warm_for_next_process: bool


@dataclass(frozen=True, slots=True)
class _Scene:
    """An implementation in use by another process."""

    place: Path
    source: Path
    sha256: str
    ask: Victim

    def traces(self) -> list[str]:
        """Return where plaintext is found on disk."""
        found = files_with_plaintext(self.place, self.source.read_bytes())
        named = [str(path.relative_to(self.place)) for path in found]
        return [*named, *(["a nameless file"] if self.ask("holds_plaintext") else [])]


def attack(implementation: Implementation, base: Path, environ: Mapping[str, str]) -> Withstood:
    """Try everything on one implementation, below `base`.

    Raises:
        CacheError: it cannot be used at all.
    """
    place = own_place(base, f"attacked-{implementation.name}")
    source = random_file(base / f"secret-{implementation.name}.bin", _SIZE)
    sha256 = digest_of(source)
    with implementation.site(place, BUDGET_MB, environ) as beside:
        with victim(implementation.name, place, source) as process:
            scene = _Scene(place, source, sha256, process)
            checks = [Check(name, *tried(scene)) for name, tried in _ATTACKS.items()]
            process("put")
            process("get", sha256)
            process.kill()
        warm = _is_warm(implementation.name, scene)
        if beside is not None:
            beside.kill()
            beside.wait()
    left = [path.name for path in files_with_plaintext(place, source.read_bytes())]
    how = f"left: {_shown(left)}" if left else "nothing is left"
    return Withstood([*checks, Check(AFTER_KILL, not left, how)], warm)


def _at_rest(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    return _judged(scene.traces())


def _in_use(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    scene.ask("get", scene.sha256)
    return _judged(scene.traces())


def _other_user(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    path = Path(scene.ask("get", scene.sha256))
    sockets = [one for one in scene.place.rglob("*") if stat.S_ISSOCK(one.lstat().st_mode)]
    wanted = [path, *files_below(scene.place), *sockets]
    names = list(dict.fromkeys(_below(scene.place, one) for one in wanted))
    if os.geteuid() == 0:
        opened, how = _as_stranger(scene.place, names), f"tried as uid {_STRANGER_UID}"
    else:
        opened = [name for name in names if lets_others_read(scene.place, name)]
        how = "judged by modes: only root can try as another user"
    return not opened, f"{how}: {_shown(opened) if opened else 'nothing'} can be read"


def _changed_on_disk(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    changed = [path for path in files_below(scene.place) if path.stat().st_size >= _SIZE]
    for path in changed:
        _flip_a_byte(path)
    how = f"changed {len(changed)} files" if changed else "there is no file to change"
    try:
        path = Path(scene.ask("get", scene.sha256))
    except RefusedError as refusal:
        return True, f"{how}: refused, {str(refusal).partition(':')[0]}"
    right = digest_of(path) == scene.sha256
    return right, f"{how}: {'the right' if right else 'the changed'} bytes were served"


def _another_digest(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    try:
        scene.ask("get", _ANOTHER_DIGEST)
    except RefusedError as refusal:
        return True, f"refused, {str(refusal).partition(':')[0]}"
    return False, "what is there was served for another digest"


def _changed_path(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    path = Path(scene.ask("get", scene.sha256))
    how = "nothing could be changed"
    for name, change in (("written to", _flip_a_byte), ("replaced", _replace)):
        with contextlib.suppress(OSError):
            change(path)
            how = f"the path that was handed out was {name}"
            break
    return digest_of(path) == scene.sha256, how


def _after_eviction(scene: _Scene) -> tuple[bool, str]:
    scene.ask("put")
    scene.ask("get", scene.sha256)
    scene.ask("evict")
    return _judged(scene.traces())


_ATTACKS: dict[str, Callable[[_Scene], tuple[bool, str]]] = {
    "no plaintext on disk after a put": _at_rest,
    "no plaintext on disk while in use": _in_use,
    "other users cannot read it": _other_user,
    "a changed file is not served": _changed_on_disk,
    "another digest is not served": _another_digest,
    "a path cannot change once validated": _changed_path,
    "no plaintext on disk after an evict": _after_eviction,
}
AFTER_KILL = "no plaintext on disk after kill -9"


def _is_warm(name: str, scene: _Scene) -> bool:
    """Tell whether a process that comes later finds the reference."""
    with victim(name, scene.place, scene.source) as later:
        try:
            later("get", scene.sha256)
        except RefusedError:
            return False
    return True


def _judged(traces: list[str]) -> tuple[bool, str]:
    return not traces, f"found in {_shown(traces)}" if traces else "searched, nothing found"


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{Path(names[0]).name}{more}"


def _below(place: Path, path: Path) -> str:
    return str(path.relative_to(place)) if path.is_relative_to(place) else str(path)


def _as_stranger(place: Path, names: list[str]) -> list[str]:
    """Return which names gave another user a byte.

    Raises:
        CacheUnavailableError: root may not become another user here, or it took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dgcache_cli.bench.stranger", str(place), str(_STRANGER_UID)],
            input=json.dumps(names).encode(),
            capture_output=True,
            check=True,
            timeout=ANSWER_SECONDS,
            process_group=0,
        )
    except subprocess.SubprocessError as error:
        raise CacheUnavailableError(f"cannot try as another user: {error}") from error
    opened: list[str] = json.loads(done.stdout)
    return opened


def lets_others_read(place: Path, name: str) -> bool:
    """Tell whether the modes from `place` on let others open a file (path_resolution(7))."""
    path = place / name  # an absolute name stays as it is
    inside = path.is_relative_to(place)
    for directory in path.parents:
        if inside and not directory.is_relative_to(place):
            break  # what is further up is not the implementation's merit
        if not directory.stat().st_mode & stat.S_IXOTH:
            return False
    return bool(path.stat().st_mode & stat.S_IROTH)


def _flip_a_byte(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        (byte,) = os.pread(descriptor, 1, _SIZE // 2)
        os.pwrite(descriptor, bytes([byte ^ 1]), _SIZE // 2)
    finally:
        os.close(descriptor)


def _replace(path: Path) -> None:
    beside = path.with_name("replacement")
    random_file(beside, _SIZE)
    beside.replace(path)
