"""A private directory is mine, 0700, reached through nobody else's hands, or it is refused."""

import os
import shlex
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError

SOMEBODY_ELSE = 12345
UID = os.geteuid()
needs_root = pytest.mark.skipif(UID != 0, reason="giving files to others needs root")


@pytest.fixture
def place(short_directory: Path) -> Path:
    """A vetted place to put things: its ancestors are root's or mine."""
    return short_directory.resolve()


def accepted(path: Path, *, create: bool = False) -> os.stat_result:
    """Open the directory, which must be the one at `path`, and return what it is."""
    descriptor = open_private_directory(path, create=create)
    try:
        status = os.fstat(descriptor)
        assert not os.get_inheritable(descriptor)
        assert os.path.samestat(status, path.stat())
        return status
    finally:
        os.close(descriptor)


def refusal(path: Path, *, create: bool = False) -> str:
    """Assert that the path is refused, and return why."""
    with pytest.raises(CacheRefusedError) as error:
        open_private_directory(path, create=create)
    return str(error.value)


def private(path: Path) -> Path:
    """Make a directory as it should be."""
    path.mkdir(0o700)
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_what_is_made_is_0700_whatever_the_umask(place: Path, any_umask: None, umask: int) -> None:
    """Every new directory on the way, with umask 0 and with 0777."""
    path = place / "one" / "two" / "three"
    os.umask(umask)
    status = accepted(path, create=True)
    assert stat.S_IMODE(status.st_mode) == 0o700
    assert status.st_uid == UID
    for made in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_what_is_made_in_a_setgid_directory_is_0700(place: Path) -> None:
    """The bit that a new directory inherits there is taken off."""
    place.chmod(0o2700)
    path = place / "made"
    assert stat.S_IMODE(accepted(path, create=True).st_mode) == 0o700


def test_what_is_there_is_opened_again(place: Path) -> None:
    """With and without `create`, the same directory."""
    path = private(place / "there")
    assert accepted(path).st_ino == accepted(path, create=True).st_ino


def test_what_is_missing_is_not_made_unless_asked(place: Path) -> None:
    """FileNotFoundError, also where an ancestor is missing, and nothing is there afterwards."""
    for path in (place / "missing", place / "missing" / "below"):
        with pytest.raises(FileNotFoundError):
            open_private_directory(path)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "path", ["relative", "./relative", "/tmp/../tmp/x", "..", "/..", "", "/", "//", "/tmp/a\0b"]
)
@pytest.mark.parametrize("create", [False, True])
def test_a_path_that_is_no_place_of_its_own_is_refused(path: str, create: bool) -> None:
    """Relative, with '..', the root itself, with NUL: refused before anything is opened."""
    assert refusal(Path(path), create=create)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777, 0o600, 0o500, 0o000, 0o1700, 0o2700])
@pytest.mark.parametrize("create", [False, True])
def test_any_other_mode_is_refused_with_the_command_that_mends_it(
    place: Path, mode: int, create: bool
) -> None:
    """Not mended in silence: who opened it may have put something in. The command works."""
    path = private(place / "with 'quotes' and $(spaces)")
    path.chmod(mode)
    message = refusal(path, create=create)
    assert f"mode {mode:04o}, not 0700" in message
    assert stat.S_IMODE(path.stat().st_mode) == mode
    command = message.partition(": run ")[2]
    assert command.endswith(shlex.quote(str(path)))
    assert shlex.split(command)[0] == "chmod"
    assert shlex.split(command)[1].lstrip("0") == "700"
    subprocess.run(shlex.split(command), check=True)
    accepted(path)


@pytest.mark.parametrize("target", ["private directory", "file", "nowhere", "itself"])
@pytest.mark.parametrize("create", [False, True])
def test_a_link_in_place_of_the_directory_is_refused(
    place: Path, target: str, create: bool
) -> None:
    """Even one's own to one's own; the command removes the link, not what it leads to."""
    path, there = place / "link", place / target
    if target == "private directory":
        private(there)
    elif target == "file":
        there.touch()
    path.symlink_to("link" if target == "itself" else there)
    message = refusal(path, create=create)
    assert "symbolic link" in message
    subprocess.run(shlex.split(message.partition("with ")[2]), check=True)
    assert not path.is_symlink()
    assert there.exists() == (target in ("private directory", "file"))


@pytest.mark.parametrize("kind", ["file", "pipe"])
@pytest.mark.parametrize("create", [False, True])
def test_what_is_no_directory_is_refused(place: Path, kind: str, create: bool) -> None:
    """A file and a pipe, which is not even opened: that would wait for a writer."""
    path = place / "here"
    os.mkfifo(path) if kind == "pipe" else path.touch()
    message = refusal(path, create=create)
    assert "is not a directory" in message
    subprocess.run(shlex.split(message.partition("with ")[2]), check=True)
    assert not path.exists()


@pytest.mark.parametrize("create", [False, True])
def test_a_file_among_the_ancestors_is_refused(place: Path, create: bool) -> None:
    """The message names it, and no command that could not mend it."""
    (place / "file").touch()
    message = refusal(place / "file" / "below", create=create)
    assert "'file' is not a directory" in message
    assert f"rm {place / 'file' / 'below'}" not in message


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702])
def test_an_ancestor_that_others_can_write_to_is_refused(place: Path, mode: int) -> None:
    """They could have swapped what is below it; nothing is made there."""
    open_to_others = private(place / "open")
    open_to_others.chmod(mode)
    assert "can be written by others" in refusal(open_to_others / "below", create=True)
    assert not list(open_to_others.iterdir())


@pytest.mark.parametrize("mode", [0o1777, 0o1770, 0o755, 0o711, 0o700])
def test_an_ancestor_that_protects_what_is_below_is_accepted(place: Path, mode: int) -> None:
    """Sticky as /tmp, or writable by its owner only."""
    ancestor = private(place / "ancestor")
    ancestor.chmod(mode)
    accepted(ancestor / "below", create=True)


@pytest.mark.parametrize("absolute", [True, False])
def test_own_links_among_the_ancestors_are_followed(place: Path, absolute: bool) -> None:
    """As /var/run is: one after the other, up and down, and each part is vetted."""
    private(place / "real")
    below = private(place / "real" / "below")
    (place / "first").symlink_to(place / "second" if absolute else "real/../second")
    (place / "second").symlink_to(place / "real" if absolute else "./real/")
    accepted(below)
    assert os.path.samestat(accepted(place / "first" / "below"), below.stat())
    accepted(place / "first" / "made", create=True)
    assert (place / "real" / "made").is_dir()


def test_a_link_that_leads_through_an_open_directory_is_refused(place: Path) -> None:
    """What a link leads through is vetted as the path itself is."""
    private(place / "open")
    private(place / "open" / "below")
    private(place / "open" / "below" / "mine")
    (place / "link").symlink_to("open/below")
    accepted(place / "link" / "mine")
    (place / "open").chmod(0o777)
    assert "'open' can be written" in refusal(place / "link" / "mine")


def test_links_in_a_circle_are_refused(place: Path) -> None:
    """After as many as the kernel itself follows."""
    (place / "one").symlink_to("two")
    (place / "two").symlink_to("one")
    assert "too many links" in refusal(place / "one" / "below", create=True)


@pytest.mark.parametrize("command", ["setfacl", "attribute"])
def test_a_default_acl_is_refused_with_the_command_that_mends_it(place: Path, command: str) -> None:
    """It would give others access to every new file, whatever mode it is made with."""
    path = private(place / "acl")
    if command == "setfacl":
        try:
            subprocess.run(["setfacl", "-d", "-m", f"u:{SOMEBODY_ELSE}:rwx", path], check=True)
        except (FileNotFoundError, subprocess.CalledProcessError):
            pytest.skip("there is no setfacl, or the file system has no ACLs")
    else:
        entries = [(0x01, 7, -1), (0x02, 7, SOMEBODY_ELSE), (0x04, 0, -1), (0x10, 7, -1)]
        acl = struct.pack("<I", 2)
        acl += b"".join(struct.pack("<HHi", *entry) for entry in [*entries, (0x20, 0, -1)])
        try:
            os.setxattr(path, "system.posix_acl_default", acl)
        except OSError:
            pytest.skip("the file system has no ACLs")
    message = refusal(path)
    assert "default ACL" in message
    assert f"setfacl -k {path}" in message
    os.removexattr(path, "system.posix_acl_default")
    accepted(path)


# -- somebody else's -----------------------------------------------------------------------------


def give_away(path: Path) -> Path:
    """Make somebody else the owner, of a link itself."""
    os.chown(path, SOMEBODY_ELSE, SOMEBODY_ELSE, follow_symlinks=False)
    return path


@pytest.mark.root
@needs_root
def test_somebody_elses_directory_is_refused(place: Path) -> None:
    """Though root could use it: it is not mine; the message names both and the command."""
    path = give_away(private(place / "theirs"))
    message = refusal(path, create=True)
    assert f"belongs to uid {SOMEBODY_ELSE}, not to uid {UID}" in message
    assert f"chown {UID} {path}" in message


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777])
def test_somebody_elses_ancestor_is_refused(place: Path, mode: int) -> None:
    """Its owner can swap what is below, sticky or not."""
    theirs = private(place / "theirs")
    private(theirs / "mine")
    theirs.chmod(mode)
    give_away(theirs)
    assert f"'theirs' belongs to uid {SOMEBODY_ELSE}" in refusal(theirs / "mine")


@pytest.mark.root
@needs_root
def test_somebody_elses_link_is_not_followed(place: Path) -> None:
    """In a sticky directory anybody can put a link to a directory of mine."""
    place.chmod(0o1777)
    private(place / "mine")
    private(place / "mine" / "below")
    (place / "link").symlink_to("mine")
    accepted(place / "link" / "below")
    give_away(place / "link")
    assert f"'link' is a link of uid {SOMEBODY_ELSE}" in refusal(place / "link" / "below")


@pytest.mark.root
@needs_root
def test_an_ordinary_user_passes_through_roots_directories(
    place: Path, as_somebody_else: Callable[[Callable[[], str]], str]
) -> None:
    """Root's ancestors and root's links are fine for anybody; root's last component is not."""
    place.chmod(0o755)
    roots = private(place / "roots")
    (place / "link").symlink_to(".")
    give_away(private(place / "own"))
    assert as_somebody_else(lambda: str(accepted(place / "link" / "own").st_uid)) == "12345"
    assert "belongs to uid 0" in as_somebody_else(lambda: refusal(roots))
    roots.chmod(0o755)
    message = as_somebody_else(lambda: refusal(roots / "new", create=True))
    assert "Permission denied" in message
