"""What keys are kept in where the kernel does not give the best: each fallback in a real daemon."""

import errno
import json
import os
import resource

import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.core.test_keyslab import kernel_has_secret_memory
from tests.support.key_memory import key_regions
from tests.support.refused_syscalls import MEMFD_SECRET, MLOCK, refusing
from tests.support.wire import MIB, OWNER_UID, SECONDS, Client, Daemon, running, script_running

pytestmark = pytest.mark.root

NO_SECRET = refusing(MEMFD_SECRET)
NO_LOCK = refusing(MEMFD_SECRET, MLOCK, error=errno.EPERM)

# Clients must be of the daemon's user; what they need is imported before.
AS_OWNER = """
import json
from pathlib import Path
from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import Client
become(int(sys.argv[2]))
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, or the files in /proc/self are root's
with Client(Path(sys.argv[1])) as client:
    data = os.urandom(3 << 20)
    handout = client.lookup(client.store(data))
    served = os.pread(handout, len(data), 0) == data
    client.call("Clear", pb.ClearRequest(rekey=True))
    print(json.dumps([client.status().hardening.keys, served]))
"""


def serves(client: Client) -> bool:
    """Store, look up and compare."""
    data = os.urandom(3 * MIB)
    handout = client.lookup(client.store(data))
    try:
        return os.pread(handout, len(data) + 1, 0) == data
    finally:
        os.close(handout)


def keys_of_an_ordinary_user(daemon: Daemon) -> str:
    """Use the daemon as its user, rekey it, and return what its status says of the keys."""
    with script_running(None, AS_OWNER, daemon.directory, OWNER_UID) as process:
        said, complaint = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, complaint
    keys, served = json.loads(said)
    assert served
    return str(keys)


def warnings(daemon: Daemon) -> int:
    """Count the lines of the log that warn of unlocked keys."""
    lines = [line for line in daemon.logged().splitlines() if "keys-unlocked" in line]
    assert all("WARNING" in line and "RLIMIT_MEMLOCK" in line for line in lines)
    return len(lines)


def test_without_memfd_secret_keys_are_locked() -> None:
    """Status says so and the kernel agrees: locked, no part of a dump, zero in a child."""
    with running(prefix=NO_SECRET) as daemon, Client(daemon.directory) as client:
        assert serves(client)
        assert client.status().hardening.keys == "locked"
        (region,) = key_regions(daemon.pid)
        assert region.flags >= {"lo", "dd", "wf"}
        assert region.locked_kib << 10 == region.end - region.start
        assert warnings(daemon) == 0
        assert "keys=locked" in daemon.logged()


@pytest.mark.skipif(MLOCK < 0, reason="needs the number of mlock(2) on this architecture")
def test_without_mlock_keys_are_unlocked_and_the_log_warns_once() -> None:
    """However often they are made anew. They are in no dump and in no child all the same."""
    with running(prefix=NO_LOCK) as daemon, Client(daemon.directory) as client:
        assert serves(client)
        for _ in range(3):
            client.call("Clear", pb.ClearRequest(rekey=True))
            assert client.status().hardening.keys == "unlocked"
            assert warnings(daemon) == 1
        assert serves(client)
        (region,) = key_regions(daemon.pid)
        assert region.flags >= {"dd", "wf"}
        assert "lo" not in region.flags
        assert "keys=unlocked" in daemon.logged()


@pytest.mark.parametrize("limit", [0, 64 << 10])
def test_an_ordinary_user_who_may_lock_too_little_has_unlocked_keys(limit: int) -> None:
    """Nothing, or less than the region: memfd_secret(2) gives a descriptor that cannot be mapped,
    mlock(2) refuses, and the user's cache works all the same."""
    with running(uid=OWNER_UID, prefix=("prlimit", f"--memlock={limit}")) as daemon:
        assert keys_of_an_ordinary_user(daemon) == "unlocked"
        assert warnings(daemon) == 1


def test_an_ordinary_user_has_the_best_there_is() -> None:
    """Under the limit that systems give: memfd_secret where the kernel has it, else locked."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if hard != resource.RLIM_INFINITY and hard < MIB:
        pytest.skip("needs a hard RLIMIT_MEMLOCK of 1 MiB")
    prefix = ("prlimit", f"--memlock={MIB}")
    with running(uid=OWNER_UID, prefix=prefix) as daemon:
        best = "memfd_secret" if kernel_has_secret_memory() else "locked"
        assert keys_of_an_ordinary_user(daemon) == best
        assert warnings(daemon) == 0
    with running(uid=OWNER_UID, prefix=(*NO_SECRET, "/usr/bin/env", *prefix)) as daemon:
        assert keys_of_an_ordinary_user(daemon) == "locked"
        assert warnings(daemon) == 0


def test_a_rekey_fits_where_only_one_region_may_be_locked() -> None:
    """The old region goes before the new one comes, where nobody uses it."""
    with running(uid=OWNER_UID, prefix=("prlimit", f"--memlock={128 << 10}")) as daemon:
        assert keys_of_an_ordinary_user(daemon) in {"memfd_secret", "locked"}
        assert warnings(daemon) == 0
