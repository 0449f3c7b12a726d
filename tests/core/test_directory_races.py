"""While an attacker swaps names, what is opened is ours or refused: never somebody else's."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError

ROUNDS = 2_000
ATTACKER = 12345
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="an attacker needs a uid of his own"),
]


@pytest.fixture
def sticky(short_directory: Path) -> Path:
    """A directory as /tmp, with a trap in it: the attacker's directory, ready to be swapped in."""
    place = short_directory.resolve()
    place.chmod(0o1777)
    trap = place / "trap"
    for made in (trap, trap / "cache"):
        made.mkdir(0o700)
        os.chown(made, ATTACKER, ATTACKER)
    return place


@contextlib.contextmanager
def attack(step: Callable[[int], None]) -> Iterator[None]:
    """Do the steps 0, 1, 2 … in a thread, as fast as they go, and see that they were done."""
    end, begun, failures = Event(), Event(), []

    def work() -> None:
        turn = 0
        try:
            while not end.is_set():
                step(turn)
                turn += 1
                if turn > 10:
                    begun.set()
        except BaseException as error:
            failures.append(error)
            begun.set()

    thread = Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield
    finally:
        end.set()
        thread.join()
    assert not failures


def opened_safely(path: Path, *, create: bool) -> int:
    """Open the path once: what comes out is ours and private (its inode), or nothing (0)."""
    try:
        descriptor = open_private_directory(path, create=create)
    except (CacheRefusedError, FileNotFoundError):
        return 0
    try:
        status = os.fstat(descriptor)
        assert status.st_uid == os.geteuid()
        assert stat.S_IMODE(status.st_mode) == 0o700
        return status.st_ino
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("target", ["trap", "decoy"])
def test_a_link_swapped_in_among_the_ancestors_never_leads_astray(
    sticky: Path, target: str, create: bool
) -> None:
    """The attacker's link takes turns with our directory: it leads to his own, or to another one
    of ours, which he may not choose for us either."""
    name, ours, decoy, link = (sticky / one for one in ("name", "ours", "decoy", "link"))
    for made in (ours, decoy, ours / "cache", decoy / "cache"):
        made.mkdir(0o700)
    link.symlink_to(sticky / target)
    os.chown(link, ATTACKER, ATTACKER, follow_symlinks=False)

    def step(turn: int) -> None:
        one = link if turn % 2 else ours
        with contextlib.suppress(OSError):  # what is made in a gap stands in the way for a while
            one.rename(name)
            name.rename(one)

    astray = (decoy / "cache").stat().st_ino
    with attack(step):
        for _ in range(ROUNDS):
            assert opened_safely(name / "cache", create=create) != astray
    assert len(list((sticky / target).iterdir())) == 1, "nothing was made where the link leads"


@pytest.mark.parametrize("create", [False, True])
def test_a_link_swapped_in_for_the_directory_itself_is_never_opened(
    sticky: Path, create: bool
) -> None:
    """The last component is a link half of the time: to a private directory of ours even."""
    other = sticky / "other"
    other.mkdir(0o700)
    name, aside = sticky / "name", sticky / "aside"

    def step(_: int) -> None:
        with contextlib.suppress(OSError):
            name.symlink_to(other)
        with contextlib.suppress(OSError):
            name.unlink()
        with contextlib.suppress(OSError):
            name.rename(aside)
        with contextlib.suppress(OSError):
            aside.rmdir()

    astray = other.stat().st_ino
    with attack(step):
        for _ in range(ROUNDS):
            assert opened_safely(name, create=create) != astray


def test_an_attackers_directory_in_place_of_ours_is_never_opened(sticky: Path) -> None:
    """His directory takes turns with ours under the name we open and make."""
    name, his, ours = sticky / "name", sticky / "his", sticky / "ours"
    for made in (his, ours):
        made.mkdir(0o700)
    os.chown(his, ATTACKER, ATTACKER)

    def step(turn: int) -> None:
        one = his if turn % 2 else ours
        with contextlib.suppress(OSError):
            one.rename(name)
            name.rename(one)

    with attack(step):
        seen = {opened_safely(name, create=False) for _ in range(ROUNDS)}
    assert seen <= {0, ours.stat().st_ino}


def test_many_who_make_it_at_once_get_the_same(sticky: Path) -> None:
    """Eight threads, one directory: a herd of clients on the first day."""
    path = sticky / "new" / "cache"
    inodes: list[int] = []

    def make() -> None:
        descriptor = open_private_directory(path, create=True)
        inodes.append(os.fstat(descriptor).st_ino)
        os.close(descriptor)

    threads = [Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(inodes) == 8
    assert len(set(inodes)) == 1
