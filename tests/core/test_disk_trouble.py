"""A disk that is full, read-only or gone is nobody's error: one alarm, and the tier says no."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgcache_core.disk_records import DiskEventKind
from dgcache_core.memory import anonymous_memory

from .support import content, digest_of
from .tier import MIB, Tier, some

DISABLED, ENABLED = DiskEventKind.DISABLED, DiskEventKind.ENABLED

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems of its own")


def in_a_small_file_system(place: Path, program: str) -> None:
    """Run a program with a tmpfs of 4 MiB on `place`, in a mount namespace of its own."""
    mounting = 'mount -t tmpfs -o size=4m,mode=700 tmpfs "$1" && exec "$2" -W error -c "$3" "$1"'
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            mounting,
            "sh",
            place,
            sys.executable,
            PREAMBLE + program,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PREAMBLE = """
import os, subprocess, sys
from pathlib import Path
from dgcache_core.disk_records import DiskEventKind
from tests.core.support import content, digest_of
from tests.core.tier import MIB, Tier
DISABLED, ENABLED = DiskEventKind.DISABLED, DiskEventKind.ENABLED
place = Path(sys.argv[1])
tier = Tier(place / "tier")
def remount(option):
    # the lock's descriptor keeps mount(8) from doing what a failing disk does without asking
    if option == "ro" and not tier.stores[-1]._ring._when_unused:
        reading = os.open(tier.path / "tier.lock", os.O_RDONLY)
        os.dup2(reading, tier.stores[-1]._directory._lock_fd, inheritable=False)
        os.close(reading)
    subprocess.run(["mount", "-o", f"remount,{option}", place], check=True)
"""


@needs_mounts
def test_a_full_disk_turns_the_tier_off_and_later_on_again(short_directory: Path) -> None:
    """Blocks are reserved first: nothing half-written stays, one alarm, and a sweep mends it."""
    in_a_small_file_system(
        short_directory,
        """
store = tier.open()
first = tier.keep(store, content(3 * MIB // 2))
(place / "ballast").write_bytes(bytes(3 * MIB // 2))
for _ in range(3):
    assert not store.keep(tier.blob(content(3 * MIB // 2, seed=1)))
    assert tier.load(store, first) is None
assert tier.take_events() == [DISABLED]
status = store.status()
assert not status.enabled and "No space" in status.disabled_reason, status
assert list((tier.path / "new").iterdir()) == []
store.sweep()
assert not store.status().enabled
tier.advance(61)
store.sweep()  # there is still no room for what failed
assert not store.status().enabled and tier.take_events() == []
(place / "ballast").unlink()
tier.advance(61)
store.sweep()  # a second try comes later than the first
assert not store.status().enabled
tier.advance(61)
store.sweep()
assert tier.take_events() == [ENABLED]
assert tier.load(store, first) == content(3 * MIB // 2)
store.forget(first)
tier.load(store, tier.keep(store, content(3 * MIB // 2, seed=1)))
store.close()
""",
    )


@needs_mounts
def test_a_disk_that_becomes_read_only_turns_the_tier_off(short_directory: Path) -> None:
    """Found by a write, or by a removal; the entry that could not be removed is not served."""
    in_a_small_file_system(
        short_directory,
        """
for find_out in (
    lambda: store.keep(tier.blob(b"other")),
    lambda: store.forget(digest) and False,
    lambda: store.clear() and False,
):
    store = tier.open()
    digest = tier.keep(store, b"content")
    remount("ro")
    assert not find_out()
    assert not store.keep(tier.blob(b"other"))
    assert tier.load(store, digest) is None
    assert tier.take_events() == [DISABLED]
    assert "Read-only" in store.status().disabled_reason
    remount("rw")
    tier.advance(61)
    store.sweep()
    assert tier.take_events() == [ENABLED]
    tier.keep(store, b"other")
    store.clear()
    store.close()
""",
    )


@needs_mounts
def test_a_tier_on_a_read_only_or_full_disk_says_so_when_opened(short_directory: Path) -> None:
    """CacheUnavailableError names the directory and the reason; nothing else is raised."""
    in_a_small_file_system(
        short_directory,
        """
from dgcache_core.errors import CacheRefusedError, CacheUnavailableError
def refused(key):
    try:
        tier.open(key)
    except (CacheUnavailableError, CacheRefusedError) as error:
        return str(error)
tier.open(None)
tier.close()
remount("ro")
assert "Read-only" in refused(None), refused(None)
remount("rw")
with (place / "ballast").open("wb", buffering=0) as ballast:
    try:
        while ballast.write(bytes(4096)):
            pass
    except OSError:
        pass
message = refused(os.urandom(32))
assert str(tier.path) in message and "No space" in message, message
(place / "ballast").unlink()
tier.open()
tier.close()
""",
    )


@pytest.mark.parametrize("how", ["removed", "emptied", "replaced"])
@pytest.mark.parametrize("find_out", ["load", "keep", "audit", "sweep and load"])
def test_a_directory_removed_underneath_is_one_alarm(tier: Tier, how: str, find_out: str) -> None:
    """Whoever removes the cache while it is in use: it is off until the next start."""
    store = tier.open()
    digest = tier.keep(store, b"content")
    shutil.rmtree(tier.path)
    if how != "removed":
        tier.path.mkdir(0o700)
    if how == "emptied":
        tier.path.rmdir()
    if find_out == "load":
        assert tier.load(store, digest) is None
    elif find_out == "keep":
        assert not store.keep(tier.blob(b"other"))
    elif find_out == "audit":
        assert store.audit_all() == []
    else:
        store.sweep()
        assert tier.load(store, digest) is None
    for _ in range(3):
        assert tier.load(store, digest) is None
        assert not store.keep(tier.blob(b"other"))
        assert store.audit_all() == []
        tier.clock.advance(4000)
        store.sweep()
    assert tier.take_events() == [DISABLED]
    assert not store.status().enabled
    store.clear()
    assert tier.load(tier.open(), digest) is None  # the next start makes a new one
    tier.keep(tier.stores[-1], b"content")


PASSING = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR]
LASTING = [errno.EIO, errno.EDQUOT, errno.ESTALE, errno.ENODEV]


@pytest.mark.parametrize("number", PASSING + LASTING)
@pytest.mark.parametrize("call", ["open", "fsync", "pwrite", "posix_fallocate", "rename", "preadv"])
def test_an_error_of_any_call_is_a_no_and_nothing_half_done(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    """A passing lack costs this one operation, a lasting one turns the tier off with one alarm."""
    store = tier.open()
    digest = tier.keep(store, b"content")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for _ in range(2):
            if call == "preadv":
                assert store.load(digest, anonymous_memory, tier.slab) is None
            else:
                assert not store.keep(tier.blob(b"other"))
    assert len(tier.files()) == 1
    assert list((tier.path / "new").iterdir()) == []
    assert tier.take_events() == ([DISABLED] if number in LASTING else [])
    assert store.status().enabled == (number in PASSING)
    assert store._table.index.reserved_bytes == 0
    if number in PASSING:
        assert tier.load(store, digest) == b"content"
        tier.keep(store, b"other")


def test_no_descriptor_left_is_a_no(tier: Tier) -> None:
    """With the real limit of the real kernel."""
    store = tier.open()
    digest, stored = tier.keep(store, content(5000)), tier.blob(b"other")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for free in range(12):
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            while True:
                try:
                    taken.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
                except OSError:
                    break
            for descriptor in taken[:free]:
                os.close(descriptor)
            del taken[:free]
            kept = store.keep(stored)
            loaded = store.load(digest, anonymous_memory, tier.slab)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if loaded is not None:
            loaded.key.erase()
            loaded.blob.close()
        if kept:
            store.forget(stored.sha256)
        assert store.status().enabled
        assert store.contains(digest)
    assert kept
    assert loaded is not None
    assert not tier.events


def test_a_file_size_limit_is_no_reason_to_turn_off(tier: Tier) -> None:
    """RLIMIT_FSIZE refuses the large one (EFBIG); small ones are written as before."""
    store = tier.open()
    large = tier.blob(content(2 * MIB))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        assert not store.keep(large)
        assert [tier.load(store, tier.keep(store, data)) for data in some(3)] == some(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not store.contains(digest_of(content(2 * MIB)))
    assert not tier.events
