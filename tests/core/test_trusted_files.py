"""A trusted file is one that nobody but root and me can have written, or it is refused."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dgcache_core.directories import read_trusted_file
from dgcache_core.errors import CacheRefusedError

SOMEBODY_ELSE = 12345
UID = os.geteuid()
needs_root = pytest.mark.skipif(UID != 0, reason="giving files to others needs root")
CONTENT = b"content"


@pytest.fixture
def place(short_directory: Path) -> Path:
    """A private directory whose ancestors are root's or mine."""
    return short_directory.resolve()


@pytest.fixture
def file(place: Path) -> Path:
    """A file as it should be."""
    path = place / "file"
    path.write_bytes(CONTENT)
    path.chmod(0o644)
    return path


def refusal(path: Path, most_bytes: int = 100, forbidden_mode: int = 0o022) -> str:
    """Assert that the file is refused, and return why."""
    with pytest.raises(CacheRefusedError) as error:
        read_trusted_file(path, most_bytes, forbidden_mode)
    return str(error.value)


def test_my_file_is_read(file: Path) -> None:
    """Up to exactly as many bytes as are allowed, without a descriptor left."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - no paths are wanted
    assert read_trusted_file(file, 100) == CONTENT
    assert read_trusted_file(file, len(CONTENT)) == CONTENT
    assert "larger than 6 bytes" in refusal(file, len(CONTENT) - 1)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208 - the same


def test_a_file_that_is_not_there_is_just_that(place: Path) -> None:
    """The caller decides what it means; so for a directory on the way."""
    for path in (place / "none", place / "none" / "file"):
        with pytest.raises(FileNotFoundError):
            read_trusted_file(path, 100)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(file: Path, mode: int) -> None:
    """With the command that mends it."""
    file.chmod(mode)
    message = refusal(file)
    assert f"mode {mode:04o}" in message
    assert f"chmod go-w {file}" in message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o660])
def test_a_private_file_is_nobody_elses_to_read(file: Path, mode: int) -> None:
    """Where the caller forbids everything to others, as for a key."""
    file.chmod(mode)
    assert f"chmod go-rwx {file}" in refusal(file, forbidden_mode=0o077)
    for private in (0o600, 0o400):
        file.chmod(private)
        assert read_trusted_file(file, 100, 0o077) == CONTENT


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(
    place: Path, file: Path, mode: int
) -> None:
    """Sticky or not: anybody could have put the file there."""
    place.chmod(mode)
    message = refusal(file)
    assert "can be written by others" in message
    if mode & stat.S_ISVTX:
        assert f"chmod go-w {place}" in message


def test_own_links_are_followed_and_what_they_lead_to_is_vetted(place: Path, file: Path) -> None:
    """As people keep their dotfiles in a repository."""
    link = place / "link"
    link.symlink_to("file")
    assert read_trusted_file(link, 100) == CONTENT
    below = place / "below"
    below.mkdir(0o700)
    file.rename(below / "file")
    link.unlink()
    link.symlink_to(below / ".." / "below" / "file")
    assert read_trusted_file(link, 100) == CONTENT
    below.chmod(0o777)
    assert "can be written by others" in refusal(link)
    below.chmod(0o700)
    (below / "file").chmod(0o666)
    assert "can be written by others" in refusal(link)


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "device"])
def test_what_is_no_regular_file_is_refused_at_once(place: Path, kind: str) -> None:
    """A FIFO without a writer would block whoever opens it for reading."""
    path = place / "odd"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "directory":
        path.mkdir(0o700)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        path = Path("/dev/zero")
    assert "not a regular file" in refusal(path)


@pytest.mark.parametrize("path", ["relative", "/", "/etc/../etc/passwd", "/etc/pass\0wd"])
def test_odd_paths_are_refused(path: str) -> None:
    """As for directories."""
    assert refusal(Path(path))


@pytest.mark.root
@needs_root
def test_somebody_elses_file_or_link_is_refused(place: Path, file: Path) -> None:
    """Though its mode is 0600, and root could read it."""
    link = place / "link"
    link.symlink_to("file")
    os.chown(link, SOMEBODY_ELSE, SOMEBODY_ELSE, follow_symlinks=False)
    assert f"'link' is a link of uid {SOMEBODY_ELSE}" in refusal(link)
    file.chmod(0o600)
    os.chown(file, SOMEBODY_ELSE, SOMEBODY_ELSE)
    message = refusal(file)
    assert f"belongs to uid {SOMEBODY_ELSE}, not to root or uid {UID}" in message
    assert f"chown {UID} {file}" in message
    os.chown(place, SOMEBODY_ELSE, SOMEBODY_ELSE)
    assert "belongs to uid" in refusal(file)


@pytest.mark.root
@needs_root
def test_an_ordinary_user_reads_roots_file_and_not_a_third_persons(
    place: Path, file: Path, as_somebody_else: Callable[[Callable[[], str]], str]
) -> None:
    """As /etc/dg-cached/config.toml is root's; what he cannot read is refused as such."""
    place.chmod(0o755)
    assert as_somebody_else(lambda: read_trusted_file(file, 100).decode()) == "content"
    os.chown(file, SOMEBODY_ELSE + 1, SOMEBODY_ELSE + 1)
    assert f"uid {SOMEBODY_ELSE + 1}" in as_somebody_else(lambda: refusal(file))
    os.chown(file, 0, 0)
    file.chmod(0o600)
    assert "Permission denied" in as_somebody_else(lambda: refusal(file))
