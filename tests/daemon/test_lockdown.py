"""What the daemon gave up before it served: attempts from inside, and looks from outside."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wire import SECONDS, Client, Daemon, eventually, own_environment, poll, running

_EVERY_ATTEMPT = """
import errno, os, signal, socket, sys
from dgcached.hardening import harden
from dgcached.landlock import abi, restrict
from dgcached.lockdown import _rules
own, elsewhere = sys.argv[1:3]
outside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
outside.bind("")
own_fd = os.open(own, os.O_RDONLY)
parent = os.getppid()
open(elsewhere + "/read", "w").close()
open(elsewhere + "/write", "w").close()
def execute():
    os.execv("/bin/true", ["true"])
def tcp(call, port):
    with socket.socket() as attempt:
        getattr(attempt, call)(("127.0.0.1", port))
def abstract():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as attempt:
        attempt.connect(outside.getsockname())
ATTEMPTS = {
    "read": lambda: open(elsewhere + "/read").close(),
    "list": lambda: os.listdir(elsewhere),
    "write": lambda: open(elsewhere + "/write", "r+").close(),
    "make": lambda: open(elsewhere + "/made", "w").close(),
    "mkdir": lambda: os.mkdir(elsewhere + "/directory"),
    "remove": lambda: os.unlink(elsewhere + "/write"),
    "link": lambda: os.symlink("x", own + "/link"),
    "fifo": lambda: os.mkfifo(own + "/fifo"),
    "bind": lambda: tcp("bind", 0),
    "connect": lambda: tcp("connect", 1),
    "abstract": abstract,
    "signal": lambda: os.kill(parent, 0),
    "environ": lambda: open(f"/proc/{parent}/environ").close(),
    "own": lambda: (open(own + "/new", "w").close(), os.mkdir(own + "/d"),
                    os.rename(own + "/new", own + "/d/new"), os.unlink(own + "/d/new")),
    "import": lambda: __import__("wave"),
}
if sys.argv[3] == "confined":
    harden()  # with CAP_PERFMON one may read of others what ptrace(2) may not
    restrict(abi(), _rules([own_fd]))
    ATTEMPTS["execute"] = execute
for name, attempt in ATTEMPTS.items():
    try:
        attempt()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "done")
"""

REFUSED = {
    **dict.fromkeys(("read", "list", "write", "make", "mkdir", "remove"), "EACCES"),
    **dict.fromkeys(("link", "fifo", "bind", "connect", "environ", "execute"), "EACCES"),
    **dict.fromkeys(("abstract", "signal"), "EPERM"),
    **dict.fromkeys(("own", "import"), "done"),
}


def attempts(base: Path, how: str) -> dict[str, str]:
    own, elsewhere = base / f"own-{how}", base / f"elsewhere-{how}"
    own.mkdir()
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_ATTEMPT, own, elsewhere, how],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def landlock_abi() -> int:
    from dgcached.landlock import abi

    return abi()


@pytest.mark.skipif(landlock_abi() < 6, reason="needs Landlock ABI 6 (Linux 6.12)")
def test_a_confined_process_is_refused_all_but_its_own_directories(short_directory: Path) -> None:
    """Each attempt is real, and succeeds in a process that is not confined."""
    assert attempts(short_directory, "confined") == REFUSED
    free = attempts(short_directory, "free")
    assert {name for name, found in free.items() if found != "done"} == {"connect"}
    assert free["connect"] == "ECONNREFUSED"


def test_status_says_what_is_refused(short_directory: Path) -> None:
    """Landlock is in effect as far as this kernel has it, and so is the rest, as /proc shows."""
    with running(short_directory / "s") as daemon, Client(daemon.directory) as client:
        hardening = client.status().hardening
        rows = (
            line.partition(":")
            for line in Path(f"/proc/{daemon.pid}/status").read_text().split("\n")
        )
        process = {name: value.strip() for name, _, value in rows}
        abi = landlock_abi()
        since = {"files": 2, "tcp": 4, "abstract-sockets": 6}
        assert hardening.landlock_abi == abi
        assert list(hardening.landlock_refuses) == [n for n, at in since.items() if abi >= at]
        assert hardening.landlock_trouble == "" or abi < 2
        assert hardening.no_new_privileges is (process["NoNewPrivs"] == "1") is True
        assert hardening.capabilities == int(process["CapPrm"], 16) == 0
        assert hardening.filters_system_calls is (process["Seccomp"] == "2")
        assert hardening.kernel == os.uname().release
        assert dict(hardening.directory_modes) == {str(daemon.directory): 0o700}


@pytest.mark.root
def test_inherited_descriptors_are_closed(short_directory: Path) -> None:
    """Who waits for the end of a pipe sees it while the daemon lives; stdin leads nowhere."""
    read_end, write_end = os.pipe()
    notices, address = _autobound()
    with (
        notices,
        subprocess.Popen(
            [sys.executable, "-m", "dgcached", "--socket-dir", short_directory / "s"],
            env={**own_environment(), "NOTIFY_SOCKET": address},
            stdin=subprocess.PIPE,
            stdout=write_end,
            stderr=subprocess.DEVNULL,
            pass_fds=(write_end,),
        ) as process,
    ):
        try:
            os.close(write_end)
            assert b"READY=1" in notices.recv(4096)
            assert poll([read_end]) == [read_end]
            assert os.read(read_end, 1) == b""
            assert Path(f"/proc/{process.pid}/fd/0").readlink() == Path("/dev/null")
        finally:
            os.close(read_end)
            process.send_signal(signal.SIGTERM)


def _autobound() -> tuple[socket.socket, str]:
    notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notices.settimeout(SECONDS)
    notices.bind("")
    return notices, "@" + notices.getsockname()[1:].decode()


@pytest.mark.root
def test_neither_key_nor_credentials_stay_in_the_environment(short_directory: Path) -> None:
    """The block that the kernel shows of the process has their names at most."""
    secret, key = "AKIA-not-for-the-daemon", "k" * 43 + "="
    environ = {"AWS_SECRET_ACCESS_KEY": secret, "DG_CACHE_ENCRYPTION_KEY": key}
    with running(short_directory / "s", environ=environ) as daemon:
        block = Path(f"/proc/{daemon.pid}/environ").read_bytes()
    assert b"AWS_SECRET_ACCESS_KEY=" in block
    assert secret.encode() not in block
    assert key.encode() not in block


@pytest.mark.root
def test_what_the_daemon_mends_and_writes_still_works(short_directory: Path) -> None:
    """Confined, it takes to the disk and from it, rotates its log, and makes a socket again."""
    log = short_directory / "log"
    options = ("--memory-size-mb", "8", "--disk-size-mb", "64", "--log-file", str(log))
    options += ("--cache-dir", str(short_directory / "c"))
    with (
        running(short_directory / "s", options=options, log_bytes=4096) as daemon,
        Client(daemon.directory) as client,
    ):
        assert "files" in client.status().hardening.landlock_refuses
        digests = [client.store(bytes([n]) * (3 << 20)) for n in range(4)]
        eventually(lambda: client.status().disk.entries >= 2)
        os.close(client.lookup(digests[0]))
        assert client.status().disk.loads >= 1
        _a_socket_comes_back(daemon, client)
        assert client.status().monitor.mechanism in {"fanotify", "inotify"}
        assert log.stat().st_mode & 0o777 == 0o600


def _a_socket_comes_back(daemon: Daemon, client: Client) -> None:
    (daemon.directory / "session.sock").unlink()
    eventually(lambda: client.status().security_events["deleted"] == 1)
    eventually((daemon.directory / "session.sock").exists)
