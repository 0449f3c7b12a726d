"""The unit files: which there are, what stands in them, where they go, and what was there before.

No manager has the PATH of a login, so the units name the program in full. A unit is replaced as a
whole and only where it differs; a drop-in (systemd.unit(5)) is the user's and never touched.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgcache_core.errors import CacheRefusedError, CacheUnavailableError

SOCKET = "dg-cached.socket"
SERVICE = "dg-cached.service"
SYSTEM_SOCKET = "dg-cached@.socket"
SYSTEM_SERVICE = "dg-cached@.service"
USER_UNITS = (SOCKET, SERVICE)
SYSTEM_UNITS = (SYSTEM_SOCKET, SYSTEM_SERVICE, "dgcached.slice")
SYSTEM_DIRECTORY = Path("/etc/systemd/system")

_PLACEHOLDER = "@DG_CACHED@"
_MASK = "/dev/null"


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit file as it should be."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """Return what systemd calls it."""
        return self.path.name

    def found(self) -> str | None:
        """Return what is there now; None where nothing is.

        Raises:
            CacheRefusedError: it is masked, or cannot be read.
        """
        try:
            if self.path.is_symlink() and str(self.path.readlink()) == _MASK:
                raise CacheRefusedError(f"{self.path} masks the unit: remove it with {self._rm()}")
            return self.path.read_text(errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheRefusedError(f"cannot read {self.path}: {error.strerror}") from error

    def write(self) -> None:
        """Put it in place of whatever is there, at once and as a whole.

        Raises:
            CacheRefusedError: it cannot be written.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.text)
            temporary.chmod(0o644)
            temporary.replace(self.path)
        except OSError as error:
            raise CacheRefusedError(f"cannot write {self.path}: {error.strerror}") from error

    def _rm(self) -> str:
        return f"rm {self.path}"


def units_in(directory: Path, names: Sequence[str]) -> list[Unit]:
    """Return units as they should be in a directory.

    Raises:
        CacheUnavailableError: the daemon's program is not installed beside this one.
    """
    program = str(daemon_program()).replace("%", "%%")  # systemd.unit(5), specifiers
    return [Unit(directory / name, _source(name).replace(_PLACEHOLDER, program)) for name in names]


def user_directory(environ: Mapping[str, str]) -> Path:
    """Return where the units of this account go (systemd.unit(5)).

    Raises:
        CacheRefusedError: it is somebody else's, as after sudo with the HOME of who called it.
    """
    config = environ.get("XDG_CONFIG_HOME", "")
    base = Path(config) if config.startswith("/") else Path.home() / ".config"
    directory = base / "systemd" / "user"
    nearest = next(place for place in (directory, *directory.parents) if place.exists())
    uid = nearest.stat().st_uid
    if uid != os.geteuid():
        raise CacheRefusedError(
            f"{nearest} belongs to uid {uid}, not to uid {os.geteuid()}: "
            "run this as its owner, without sudo"
        )
    return directory


def drop_ins(directory: Path, names: Sequence[str]) -> list[Path]:
    """Return what the user, or the administrator, adds to units by files of their own."""
    stems = [name.partition("@") for name in names]
    patterns = [f"{stem}@*{rest}.d/*" if at else f"{stem}.d/*" for stem, at, rest in stems]
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def lost_lines(before: str, after: str) -> list[str]:
    """Return the lines that say something and are not in the new text."""
    kept = {line.strip() for line in after.splitlines()}
    said = [line.strip() for line in before.splitlines()]
    return [line for line in said if line and line[0] not in "#;" and line not in kept]


def links_to(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yield what `enable` made: links in the directories that [Install] sections name."""
    for name in names:
        stem, at, rest = name.partition("@")
        pattern = f"{stem}@*{rest}" if at else name
        for target in ("sockets.target.wants", "multi-user.target.wants"):
            for path in sorted((directory / target).glob(pattern)):
                if path.is_symlink() and path.readlink().name == name:
                    yield path


def daemon_program() -> Path:
    """Return the dg-cached beside this interpreter: the one that belongs to this installation.

    Raises:
        CacheUnavailableError: there is none.
    """
    beside = Path(sys.executable).with_name("dg-cached")
    found = str(beside) if beside.exists() else shutil.which("dg-cached")
    if found is None:
        raise CacheUnavailableError("dg-cached is not installed beside this dg-cache: reinstall it")
    return Path(found).absolute()


def _source(name: str) -> str:
    """Read a unit from the wheel, or from the tree in an editable installation."""
    from importlib.resources import files

    packaged = files("dgcache_cli") / "units" / name
    if packaged.is_file():
        return packaged.read_text()
    return (Path(__file__).parents[2] / "systemd" / name).read_text()
