"""Directories that another user, or the umask, prepared for us: refused, and the client goes on.

The attacker is a process of a second uid in a directory as /tmp is; daemon and client are processes
of the owner. What the attacker would have heard is counted by itself.
"""

import json
import os
import shlex
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.wire import (
    FOREIGN_UID,
    OWNER_UID,
    SECONDS,
    as_user,
    poll,
    script_running,
)

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="a second real user is made by root"),
]

# Imported as ourselves, since the owner may not be able to read the interpreter's files.
_CLIENT = """
import hashlib, json, logging
from pathlib import Path
import dgcache, dgcache.local, dgcache.grpc_transport, dgcache.remote
become(int(sys.argv[1]))
os.environ.update(json.loads(sys.argv[2]))
said = []
handler = logging.Handler(logging.INFO)
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("dgcache").addHandler(handler)
logging.getLogger("dgcache").setLevel(logging.INFO)
data = os.urandom(100_000)
with dgcache.open() as cache:
    digest = cache.put("bucket", "prefix", data)
    with cache.get("bucket", "prefix", digest) as reference:
        right = reference.read() == data
    print(json.dumps({"backend": cache.backend, "right": right, "said": said}))
"""

_DAEMON = """
import asyncinotify, dgcached.main, dgcached.server, dgcached.logs
become(int(sys.argv[1]))
import json
os.environ.update(json.loads(sys.argv[2]))
sys.exit(dgcached.main.main([]))
"""


def use(directory: Path | None, **environ: str) -> dict[str, Any]:
    """Let the owner store and read with the SDK; return the backend, and what was logged."""
    if directory is not None:
        environ["DG_CACHE_SOCKET_DIR"] = str(directory)
    said: dict[str, Any] = json.loads(as_user(None, _CLIENT, OWNER_UID, json.dumps(environ)))
    return said


def refusal_of_the_daemon(directory: Path, umask: int = 0o022) -> str:
    """Let the owner start a daemon there, which must end with status 77, and return its words."""
    environ = json.dumps({"DG_CACHE_SOCKET_DIR": str(directory)})
    with script_running(None, f"os.umask({umask})\n{_DAEMON}", OWNER_UID, environ) as daemon:
        _, said = daemon.communicate(timeout=SECONDS)
        assert daemon.returncode == 77, said
    return said


def refused_by_both(directory: Path, words: str) -> None:
    """The daemon does not serve there, and the owner's operation goes on without it, with one
    warning."""
    assert words in refusal_of_the_daemon(directory)
    told = use(directory)
    assert (told["backend"], told["right"], len(told["said"])) == ("memory", True, 1)
    assert words in told["said"][0]


@pytest.fixture
def sticky(short_directory: Path) -> Path:
    """A directory as /tmp."""
    place = short_directory.resolve()
    place.chmod(0o1777)
    return place


@pytest.fixture
def owners(short_directory: Path) -> Path:
    """A directory of the owner."""
    place = short_directory.resolve() / "owners"
    short_directory.chmod(stat.S_IMODE(short_directory.stat().st_mode) | 0o055)
    place.mkdir(0o755)
    os.chown(place, OWNER_UID, OWNER_UID)
    return place


# Listens on both sockets in a directory, says so, and at the end of its input how many came.
_SQUAT = """
import stat
directory, mode = sys.argv[1], int(sys.argv[2], 8)
if mode:
    os.mkdir(directory)
listeners = []
for name, kind in {"session": socket.SOCK_SEQPACKET, "rpc": socket.SOCK_STREAM}.items():
    if name not in sys.argv[3]:
        continue
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(f"{directory}/{name}.sock")
    listener.listen(64)
    os.chmod(f"{directory}/{name}.sock", 0o777)
    listener.setblocking(False)
    listeners.append(listener)
if mode:
    os.chmod(directory, mode)
print("squatting", flush=True)
sys.stdin.read()
came, heard_bytes = 0, 0
for listener in listeners:
    try:
        while True:
            connection = listener.accept()[0]
            came += 1
            connection.setblocking(False)
            try:
                while data := connection.recv(65536):
                    heard_bytes += len(data)
            except OSError:
                pass
    except BlockingIOError:
        pass
print(came, heard_bytes)
"""


@contextmanager
def squatted(directory: Path, mode: int, names: str = "session rpc") -> Iterator[list[int]]:
    """Let a stranger listen; in the list afterwards: the connections and bytes that he got."""
    got: list[int] = []
    with script_running(FOREIGN_UID, _SQUAT, directory, f"{mode:o}", names) as squatter:
        assert squatter.stdout is not None
        assert poll([squatter.stdout.fileno()])
        assert squatter.stdout.readline() == "squatting\n"
        yield got
        said, complaint = squatter.communicate(timeout=SECONDS)
        assert squatter.returncode == 0, complaint
        got.extend(map(int, said.split()))


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777, 0o1777])
def test_12_a_squatted_runtime_directory_is_refused(sticky: Path, mode: int) -> None:
    """The stranger made it first and listens in it: nobody so much as connects."""
    with squatted(sticky / "s", mode) as got:
        refused_by_both(sticky / "s", f"belongs to uid {FOREIGN_UID}")
    assert got == [0, 0]


def test_13_a_squatted_session_socket_gets_nothing(owners: Path) -> None:
    """Made while the directory was open to all, which it is no more: the kernel tells the client
    who listens, and it sends not a byte."""
    place = owners / "s"
    place.mkdir()
    os.chown(place, OWNER_UID, OWNER_UID)
    place.chmod(0o777)
    with squatted(place, 0) as got:
        place.chmod(0o700)
        told = use(place)
    assert (told["backend"], told["right"], len(told["said"])) == ("memory", True, 1)
    assert f"peer uid {FOREIGN_UID} is not the own uid {OWNER_UID}" in told["said"][0]
    assert got == [1, 0]


def link_of_the_stranger(link: Path, target: Path) -> None:
    """Let him make one."""
    as_user(FOREIGN_UID, "os.symlink(sys.argv[1], sys.argv[2])", target, link)


@pytest.mark.parametrize("whose", ["stranger", "owner"])
def test_14_a_link_as_last_component_is_refused(sticky: Path, owners: Path, whose: str) -> None:
    """To a private directory of the owner even, and even the owner's own link."""
    target, link = owners / "target", sticky / "link"
    target.mkdir(0o700)
    os.chown(target, OWNER_UID, OWNER_UID)
    uid = FOREIGN_UID if whose == "stranger" else OWNER_UID
    as_user(uid, "os.symlink(sys.argv[1], sys.argv[2])", target, link)
    refused_by_both(link, "is a symbolic link")
    assert list(target.iterdir()) == []


def test_14_a_strangers_link_as_ancestor_is_refused(sticky: Path, owners: Path) -> None:
    """Wherever it leads; nothing is made behind it."""
    link_of_the_stranger(sticky / "link", owners)
    refused_by_both(sticky / "link" / "s", f"is a link of uid {FOREIGN_UID}")
    assert list(owners.iterdir()) == []


# What the owner does so many times: open or make the directory, and see what came.
_OPEN = """
import json, stat
from dgcache_core.directories import open_private_directory
from dgcache_core.errors import CacheRefusedError
from pathlib import Path
path, decoy, rounds = Path(sys.argv[1]), os.stat(sys.argv[2]), int(sys.argv[3])
become(int(sys.argv[4]))
counts = dict(good=0, refused=0, bad=0)
for _ in range(rounds):
    try:
        descriptor = open_private_directory(path, create=True)
    except (CacheRefusedError, FileNotFoundError):
        counts["refused"] += 1
        continue
    status = os.fstat(descriptor)
    os.close(descriptor)
    private = status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
    counts["good" if private and not os.path.samestat(status, decoy) else "bad"] += 1
    try:
        path.rmdir()
    except OSError:
        pass
print(json.dumps(counts))
"""

# What the attacker does until its input ends: everything that can have the name, in turn.
_SWAP = """
import itertools
path, trap, decoy = sys.argv[1:]
def attempt(what, *arguments):
    try:
        what(*arguments)
        return 1
    except OSError:
        return 0
poller = select.poll()
poller.register(0, select.POLLIN | select.POLLHUP)
won = 0
print("swapping", flush=True)
for turn in itertools.count():
    won += attempt(os.symlink, (trap, decoy)[turn % 2], path)
    attempt(os.unlink, path)
    won += attempt(os.mkdir, path, 0o777)
    attempt(os.rename, trap, path)
    attempt(os.rename, path, trap)
    attempt(os.rmdir, path)
    if turn % 64 == 0 and poller.poll(0):
        break
print(won)
"""


@pytest.mark.parametrize("attacker", [FOREIGN_UID, OWNER_UID], ids=["stranger", "same user"])
def test_15_a_swap_race_never_gives_a_bad_directory(sticky: Path, attacker: int) -> None:
    """10,000 rounds of making and opening while another process puts links and directories there:
    what comes out is the owner's, 0700, and under its own name, or nothing."""
    path, trap, decoy = sticky / "name", sticky / "trap", sticky / "decoy"
    as_user(attacker, "os.mkdir(sys.argv[1], 0o755)", trap)
    as_user(OWNER_UID, "os.mkdir(sys.argv[1], 0o700)", decoy)
    with script_running(attacker, _SWAP, path, trap, decoy) as swapper:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == "swapping\n"
        with script_running(None, _OPEN, path, decoy, 10_000, OWNER_UID) as owner:
            said, complaint = owner.communicate(timeout=5 * SECONDS)
            assert owner.returncode == 0, complaint
        won, complaint = swapper.communicate(timeout=SECONDS)
        assert swapper.returncode == 0, complaint
    counts = json.loads(said)
    assert counts["bad"] == 0
    assert counts["good"] > 0
    assert counts["refused"] > 0
    assert sum(counts.values()) == 10_000
    assert int(won) > 100  # how many is the scheduler's doing, not the owner's
    assert list(decoy.iterdir()) == []


# A host of its own: a mount namespace with another machine-id over /etc/machine-id.
_HOST = """
import dgcache, dgcache.local, dgcache.grpc_transport, dgcache.remote, json, time
import asyncinotify, dgcached.main, dgcached.server, dgcached.logs, dgcache.launcher
from pathlib import Path
from dgcache_proto.v1 import dgcache_pb2, dgcache_pb2_grpc
libc = ctypes.CDLL(None, use_errno=True)
home, machine_id, uid = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert libc.unshare(0x20000) == 0, os.strerror(ctypes.get_errno())
assert libc.mount(None, b"/", None, 0x44000, None) == 0  # MS_REC | MS_PRIVATE
assert libc.mount(machine_id.encode(), b"/etc/machine-id", None, 0x1000, None) == 0
become(uid)
os.environ["HOME"] = home
os.environ["XDG_CONFIG_HOME"] = "/dev/null"
read_end, write_end = os.pipe()
daemon = os.fork()
if daemon == 0:
    os.dup2(write_end, 2)
    os.set_inheritable(2, True)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.exit(dgcached.main.main(["--memory-size-mb", "64", "--disk-size-mb", "64"]))
os.close(write_end)
log = os.fdopen(read_end)
for line in log:
    if " started " in line:
        break
else:
    sys.exit("the daemon did not start")
with dgcache.open(dgcache.Settings(connect_timeout_ms=20_000)) as cache:
    def tell(*said):
        print(json.dumps(said), flush=True)
    tell(cache.backend, cache.status()["pid"] == daemon)
    for line in sys.stdin:
        command, content = line.split()
        if command == "put":
            tell(cache.put("bucket", "prefix", content.encode() * 1000))
        elif command == "get":
            with cache.get("bucket", "prefix", content) as reference:
                tell(reference.source, len(reference.read()))
        elif command == "status":
            status = cache.status()
            directory = next(one["value"] for one in status["settings"]
                             if one["name"] == "DG_CACHE_SOCKET_DIR")
            tell(directory, status["security_events"], status["disk"]["directory"])
        elif command == "kill":
            os.kill(daemon, int(content))
            tell(os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1]))
"""


class _Host:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.heard()

    def heard(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.stderr and self._process.stderr.read()
        return json.loads(line)

    def asked(self, command: str, content: object = "-") -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command} {content}\n")
        self._process.stdin.flush()
        return self.heard()


@pytest.mark.parametrize("number", [15, 9], ids=["SIGTERM", "SIGKILL"])
def test_15a_two_hosts_on_one_home_do_not_disturb_each_other(owners: Path, number: int) -> None:
    """Two machine-ids, two directories of sockets and of the disk tier below one home: both serve,
    neither sees what the other does as an attack, and the end of one is nothing to the other."""
    if not Path("/etc/machine-id").is_file():
        pytest.skip("there is no /etc/machine-id to mount another one over")
    ids = [owners.parent / f"id{host}" for host in "ab"]
    for host, path in enumerate(ids):
        path.write_text(f"{host:032x}\n")
        path.chmod(0o644)
    with (
        script_running(None, _HOST, owners, ids[0], OWNER_UID) as one,
        script_running(None, _HOST, owners, ids[1], OWNER_UID) as two,
    ):
        first, second = _Host(one), _Host(two)
        [digest] = first.asked("put", "x")
        [theirs] = second.asked("put", "other")
        assert first.asked("get", digest) == ["dg-cached", 1000]
        assert second.asked("get", theirs) == ["dg-cached", 5000]
        places = [host.asked("status") for host in (first, second)]
        for directory, events, disk in places:
            assert Path(directory).parent == owners / ".cache/deltaglider/run"
            assert owners in Path(disk).parents
            assert events == {}
        assert len({place[0] for place in places}) == len({place[2] for place in places}) == 2
        assert first.asked("kill", number) == [0 if number == 15 else -9]
        assert second.asked("get", theirs) == ["dg-cached", 5000]
        assert second.asked("status")[1] == {}
        assert second.asked("kill", 15) == [0]


@pytest.mark.parametrize("how", ["setfacl", "attribute"])
def test_17_a_default_acl_is_refused(owners: Path, how: str) -> None:
    """It gives a stranger access to every new socket, whatever its mode; the message has the
    command that mends it."""
    place = owners / "s"
    place.mkdir(0o700)
    os.chown(place, OWNER_UID, OWNER_UID)
    if how == "setfacl":
        try:
            subprocess.run(
                ["setfacl", "-d", "-m", f"u:{FOREIGN_UID}:rwx", place],
                check=True,
                timeout=SECONDS,
                capture_output=True,
            )
        except (FileNotFoundError, subprocess.CalledProcessError):
            pytest.skip("there is no setfacl, or the file system has no ACLs")
    else:
        acl = bytes.fromhex("02000000") + b"".join(
            tag.to_bytes(2, "little") + permissions.to_bytes(2, "little") + who
            for tag, permissions, who in (
                (0x01, 7, b"\xff" * 4),
                (0x02, 7, FOREIGN_UID.to_bytes(4, "little")),
                (0x04, 0, b"\xff" * 4),
                (0x10, 7, b"\xff" * 4),
                (0x20, 0, b"\xff" * 4),
            )
        )
        try:
            os.setxattr(place, "system.posix_acl_default", acl)
        except OSError:
            pytest.skip("the file system has no ACLs")
    refused_by_both(place, f"has a default ACL: run setfacl -k {shlex.quote(str(place))}")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o702])
def test_18_a_parent_that_others_can_write_to_is_refused(owners: Path, mode: int) -> None:
    """A member of its group could swap what is in it, and does, where the mode lets him."""
    parent = owners / "shared"
    parent.mkdir()
    os.chown(parent, OWNER_UID, FOREIGN_UID)
    parent.chmod(mode)
    refused_by_both(parent / "s", "can be written by others")
    assert list(parent.iterdir()) == []
    (parent / "s").mkdir(0o700)
    os.chown(parent / "s", OWNER_UID, OWNER_UID)
    refused_by_both(parent / "s", "can be written by others")
    if mode == 0o770:
        swap = "os.rename(sys.argv[1] + '/s', sys.argv[1] + '/gone')"
        as_user(FOREIGN_UID, swap, parent)
        assert stat.S_ISDIR((parent / "gone").stat().st_mode)
