"""A real systemd as the first process of a namespace of its own, on a machine that runs on.

It has its own pids, mounts, control groups, IPC and host name. Mounts propagate in it, as where a
machine booted it, or units would not see their credentials; none leaves it. `/run`, `/var/log`,
`/var/cache` and the administrator's units are fresh there, /proc/sys is read-only, and what a boot
starts is left out, so that nothing of the machine changes. Leaving kills the first process, and the
kernel all others with it.
"""

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import pytest

from tests.support.real_users import pidfd_of, poll
from tests.support.user_manager import _package_places, _stand_ins, require_user_manager
from tests.support.wire import eventually

_TARGET = """\
[Unit]
Description=what the tests need
Requires=basic.target
After=basic.target
Wants=systemd-journald.service
"""
_GROUPS = Path("/sys/fs/cgroup")
_MOUNTS = """\
for place in /run /var/log /var/cache /etc/systemd/system /lib/systemd/system-generators \\
    /lib/systemd/system/sysinit.target.wants; do
    mount -t tmpfs -o mode=0755 tmpfs $place
done
umount -R /sys/fs/cgroup
mount -t tmpfs -o mode=0755 tmpfs /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --make-rshared /
mkdir -p /run/systemd/system
"""
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_SECONDS = 60.0


def require_system_manager() -> None:
    """Skip the test, with the reason, where no system manager can be run."""
    require_user_manager()
    try:
        subprocess.run(["unshare", "--pid", "--fork", "--cgroup", "true"], check=True, timeout=30)
    except subprocess.CalledProcessError:
        pytest.skip("needs namespaces of pids and control groups")


class SystemManager:
    """A running system manager; a context manager. `readable` are what every account must reach."""

    def __init__(self, readable: Iterable[Path] = ()) -> None:
        self._readable = {Path(path).resolve() for path in [sys.base_prefix, *_package_places()]}
        self._readable |= {path.resolve() for path in readable}
        self._stack = contextlib.ExitStack()
        self._pid = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            groups = stack.enter_context(_own_groups())
            self._pid = stack.enter_context(self._booted(groups))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        uid: int = 0,
        home: str = "/root",
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in the namespaces, as root or as another."""
        inside = ["nsenter", f"--target={self._pid}", *("-m", "-p", "-i", "-u")]
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        return subprocess.run(
            [*inside, *become, *map(str, argv)],
            env={**_ENVIRONMENT, "HOME": home, "LANG": "C.UTF-8", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )

    def succeed(self, *argv: str | Path) -> str:
        """Run a program as root, which must succeed, and return what it prints."""
        done = self.run(argv)
        assert done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}\n{self.log()}"
        return done.stdout

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        shown = self.succeed("systemctl", "show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in shown.splitlines())

    def log(self) -> str:
        """Return what units logged."""
        return self.run(
            [
                "journalctl",
                "--no-pager",
                "--lines=60",
                "_TRANSPORT=stdout",
                "+",
                "_TRANSPORT=journal",
            ]
        ).stdout

    @contextlib.contextmanager
    def _booted(self, groups: list[Path]) -> Iterator[int]:
        inner = "\n".join(
            [
                "umask 022",
                *_stand_ins(self._readable),
                _MOUNTS,
                f"printf %s {shlex.quote(_TARGET)} > /run/systemd/system/tests.target",
                "exec env container=tests /lib/systemd/systemd --system --unit=tests.target "
                "--log-target=journal --show-status=no",
            ]
        )
        new = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            "--cgroup",
            "--ipc",
            "--uts",
            "--propagation=private",
            "sh",
            "-euc",
            inner,
        ]
        script = [
            *(f"echo 0 > {group}/cgroup.procs" for group in groups),
            f"exec setpriv --pdeathsig=KILL {shlex.join(new)}",
        ]
        with _started(["sh", "-euc", "\n".join(script)], _ENVIRONMENT) as pid:
            (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            with pidfd_of(int(child)) as first:
                try:
                    yield int(child)
                finally:
                    signal.pidfd_send_signal(first, signal.SIGKILL)
                    poll([first], _SECONDS)


@contextlib.contextmanager
def _started(argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[int]:
    """Run a program, and yield its pid once something in it said READY=1 (sd_notify(3))."""
    address = f"dgt-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"\0{address}")
        process = subprocess.Popen(
            argv,
            env={**environment, "NOTIFY_SOCKET": f"@{address}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            with pidfd_of(process.pid) as ended:
                deadline = time.monotonic() + _SECONDS
                while ready.fileno() in poll([ready.fileno(), ended], deadline - time.monotonic()):
                    if b"READY=1" in ready.recv(4096).split(b"\n"):
                        yield process.pid
                        return
            raise AssertionError("systemd did not start")
        finally:
            process.kill()
            process.communicate(timeout=_SECONDS)


@contextlib.contextmanager
def _own_groups() -> Iterator[list[Path]]:
    """Make a group in every hierarchy there is: the manager's is a tree of its own below each."""
    name = f"dgt-{os.getpid()}-{secrets.token_hex(3)}"
    tops = [path.parent for path in _GROUPS.glob("*/cgroup.procs") if path.parent.is_mount()]
    groups = [top / name for top in tops or [_GROUPS]]
    try:
        for group in groups:
            group.mkdir()
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (group / file).exists() and "cpuset" in str(group.parent):
                    (group / file).write_text((group.parent / file).read_text())
        yield groups
    finally:
        for group in groups:
            for directory, _, _ in os.walk(group, topdown=False):
                _remove_group(Path(directory))


def _remove_group(group: Path) -> None:
    """Those who were killed leave their group a moment after they ended."""

    def removed() -> bool:
        with contextlib.suppress(OSError):
            group.rmdir()
        return not group.exists()

    eventually(removed)
