"""A real systemd user manager for a real ordinary user, also where systemd is not PID 1.

Only the user, the home and an empty control group exist outside (`real_users`); all else is in a
mount namespace of its own. `/run` and `/var/log` are fresh there, with the directory by which
systemd knows that it runs (sd_booted(3)), so the machine's own are not touched and nothing needs
unmounting. A journald of its own runs in it: services have a real journal stream, the user has a
journal, and `log` has every line. Entering waits for READY=1 of both. Leaving asks the manager to
exit and ends what is left. Both get SIGTERM when the test run dies.

The interpreter that runs the tests, and the packages beside it, may be below a home that others
cannot enter. They are bound, read-only and at their own paths, into the namespace, below an empty
stand-in for the first closed directory on the way. Nothing is copied and no mode of the machine
changes; scripts, links and `pyvenv.cfg` hold as they are, whichever the interpreter.
"""

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.real_users import (
    call,
    control_groups,
    end_processes_of,
    own_control_groups,
    pidfd_of,
    poll,
    real_user,
)

_SYSTEMD = Path("/lib/systemd/systemd")
_JOURNALD = Path("/lib/systemd/systemd-journald")
_TOOLS = ("journalctl", "mount", "nsenter", "setpriv", "systemctl", "unshare", "useradd", "userdel")
_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin"
_CHECKOUT = Path(__file__).resolve().parents[2]
_START_SECONDS = 30.0
_CALL_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LOG_LINES = 10_000

_MOUNTS = """\
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /run
mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /var/log
mkdir /run/systemd /run/credentials
cd /run/systemd
mkdir -p system unit-root journal journald.conf.d user.conf.d /var/log/journal
mkdir -p user/dg-cached.service.d
"""
# Only a persistent journal has a file for each user (journald.conf(5), SplitMode=), and only one
# that was flushed is used; it may not read the kernel's messages or change its auditing.
_JOURNALD_CONF = """\
[Journal]
Storage=persistent
SystemMaxUse=64M
ReadKMsg=no
Audit=
ForwardToSyslog=no
ForwardToWall=no
"""
# Our service has a /tmp of its own, where the wheel under test would not be found. Here are the
# drop-ins of a machine; the user's own directory stays as an installation left it.
_DROP_IN = "/run/systemd/user/dg-cached.service.d"
# A file and not options, which the manager forgets at its first daemon-reload.
_MANAGER_CONF = """\
[Manager]
LogTarget=journal
"""


def require_user_manager() -> None:
    """Skip the test, with the reason, where no user manager can be run."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        pytest.skip("needs root: a user manager runs as a second real user")
    if not (_SYSTEMD.exists() and _JOURNALD.exists()):
        pytest.skip("needs systemd: apt-get install systemd")
    if missing:
        pytest.skip(f"needs the programs {', '.join(missing)}")
    try:
        call("unshare", "--mount", "true")
    except AssertionError as error:
        pytest.skip(f"needs a mount namespace: {error}")
    if not all(os.access(group / "cgroup.procs", os.W_OK) for group in own_control_groups()):
        pytest.skip("needs control groups that can be written")


def installed_wheel(prefix: Path) -> Path:
    """Build the wheel of this checkout, install it at `prefix`, and return its `bin` directory.

    It is done once: who comes later, or meanwhile from another process, gets what is there. The new
    environment belongs to the interpreter that runs the tests. Dependencies are found where the
    tests find them, by a `.pth` file; since `.pth` files over there are not read (site), an
    editable installation of this checkout stays out of sight and the wheel is what is tested.
    """
    with prefix.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (prefix / "complete").exists():
            call(str(Path(sys.executable).resolve()), "-m", "venv", "--clear", str(prefix))
            (own,) = prefix.glob("lib/python3*/site-packages")
            dependencies = own / "dependencies.pth"
            dependencies.write_text("\n".join(_package_places()) + "\n")
            dependencies.chmod(0o644)  # whatever the umask of the test run
            pip = (str(prefix / "bin" / "python"), "-m", "pip", "install", "--quiet")
            call(*pip, "--no-deps", "--ignore-installed", "--no-build-isolation", str(_CHECKOUT))
            (prefix / "complete").touch()
    return prefix / "bin"


def shared_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` directory of the installed wheel, one for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return installed_wheel(shared / "wheel")


class UserManager:
    """A running user manager; a context manager. `readable` are directories its user must reach."""

    _namespace_fd = -1

    def __init__(self, readable: Iterable[Path] = ()) -> None:
        self._readable = {Path(path).resolve() for path in [sys.base_prefix, *_package_places()]}
        self._readable |= {path.resolve() for path in readable}
        self._stack = contextlib.ExitStack()
        self.log = _Log()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            account = stack.enter_context(real_user())
            self.name, self.uid, self._gid = account.pw_name, account.pw_uid, account.pw_gid
            self.home = Path(account.pw_dir)
            self.runtime_dir = Path(f"/run/user/{self.uid}")
            stack.enter_context(self.log)
            stack.enter_context(self._journald())
            stack.enter_context(self._following())
            stack.enter_context(self._manager())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def run(
        self,
        argv: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        *,
        seconds: float = _CALL_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as the user: at home, in the namespace, with the environment of a login."""
        return subprocess.run(
            [*self._inside(), *self._as_user(), "env", f"--chdir={self.home}", *argv],
            env=self._environment() | dict(env or {}),
            pass_fds=[self._namespace_fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def run_as_root(self, argv: Sequence[str]) -> None:
        """Run a program in the namespace; what it mounts there is gone with it."""
        done = subprocess.run(
            [*self._inside(), *argv],
            pass_fds=[self._namespace_fd],
            stdin=subprocess.DEVNULL,
            timeout=_CALL_SECONDS,
            check=False,
        )
        assert done.returncode == 0, argv

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `systemctl --user …`, which waits for the job it queues, at most a minute."""
        return self.run(["systemctl", "--user", "--no-pager", *arguments])

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        shown = self.systemctl("show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in shown.stdout.splitlines())

    def wait_for(self, holds: Callable[[], bool], seconds: float = _START_SECONDS) -> None:
        """Wait until `holds`; ask again at each line of the log, where every change of state is.

        Raises:
            AssertionError: it did not hold in time; the log is in the message.
        """
        deadline = time.monotonic() + seconds
        while True:
            seen = self.log.count
            if holds():
                return
            if not self.log.grows(seen, deadline - time.monotonic()):
                raise AssertionError(f"not within {seconds} s; the log:\n{self.log.text()}")

    def _readable_below_tmp(self) -> str:
        below = sorted(path for path in self._readable if Path("/tmp") in path.parents)
        return "".join(["[Service]\n", *(f"BindReadOnlyPaths={path}\n" for path in below)])

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "LOGNAME": self.name,
            "PATH": _SEARCH_PATH,
            "SHELL": "/bin/sh",
            "USER": self.name,
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
        }

    def _as_user(self) -> list[str]:
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self._gid}", "--init-groups"]

    def _inside(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/self/fd/{self._namespace_fd}"]

    @contextlib.contextmanager
    def _journald(self) -> Iterator[None]:
        """Make the namespace, and run a journald in it."""
        options = f"mode=0700,uid={self.uid},gid={self._gid},nosuid,nodev"
        script = [
            *_stand_ins(self._readable),
            _MOUNTS,
            f"mkdir -p {self.runtime_dir}",
            f"mount -t tmpfs -o {options} tmpfs {self.runtime_dir}",
            f"printf %s {shlex.quote(_JOURNALD_CONF)} > /run/systemd/journald.conf.d/tests.conf",
            f"printf %s {shlex.quote(_MANAGER_CONF)} > /run/systemd/user.conf.d/tests.conf",
            f"printf %s {shlex.quote(self._readable_below_tmp())} > {_DROP_IN}/tests.conf",
            "touch /run/systemd/journal/flushed",
            f"exec setpriv --pdeathsig=TERM {_JOURNALD}",
        ]
        new = ["unshare", "--mount", "--propagation=private", "sh", "-euc", "\n".join(script)]
        with self._service(new, {"PATH": os.environ["PATH"]}) as pid:
            self._namespace_fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
            try:
                yield
            finally:
                os.close(self._namespace_fd)

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """Copy the journal into the log, line by line."""
        follow = ["journalctl", "--follow", "--no-tail", "--quiet", "--output=short-monotonic"]
        with self._process([*self._inside(), *follow], {"PATH": _SEARCH_PATH}):
            yield

    @contextlib.contextmanager
    def _manager(self) -> Iterator[None]:
        groups = [f"echo 0 > {group}/cgroup.procs" for group in control_groups(self.uid)]
        become = shlex.join([*self._as_user(), "--pdeathsig=TERM", str(_SYSTEMD), "--user"])
        script = "\n".join([*groups, f"exec {become}"])
        start = [*self._inside(), "sh", "-euc", script]
        try:
            with self._service(start, self._environment()) as pid, pidfd_of(pid) as pidfd:
                yield
                self.systemctl("exit")
                poll([pidfd], _STOP_SECONDS)
        finally:
            end_processes_of(self.uid)

    @contextlib.contextmanager
    def _service(self, argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[int]:
        """Run a program that says READY=1 (sd_notify(3)), wait for that, and yield its pid."""
        address = f"{self.name}-{secrets.token_hex(8)}"
        with contextlib.ExitStack() as stack:
            ready = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            ready.bind(f"\0{address}")
            told = {**environment, "NOTIFY_SOCKET": f"@{address}"}
            process = stack.enter_context(self._process(argv, told))
            pidfd = stack.enter_context(pidfd_of(process.pid))
            deadline = time.monotonic() + _START_SECONDS
            while ready.fileno() in poll([ready.fileno(), pidfd], deadline - time.monotonic()):
                if b"READY=1" in ready.recv(4096).split(b"\n"):
                    yield process.pid
                    return
            raise AssertionError(f"{argv} did not start; the log:\n{self.log.text()}")

    @contextlib.contextmanager
    def _process(
        self, argv: Sequence[str], environment: Mapping[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(
            argv,
            env=environment,
            pass_fds=[self._namespace_fd] if self._namespace_fd >= 0 else [],
            stdin=subprocess.DEVNULL,
            stdout=self.log.write_fd,
            stderr=self.log.write_fd,
            umask=0o022,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends this in its order
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(_STOP_SECONDS)


def succeed(manager: UserManager, *arguments: str) -> str:
    """Run `systemctl --user …`, which must succeed, and return what it prints."""
    done = manager.systemctl(*arguments)
    assert done.returncode == 0, f"{done.stderr}\n{manager.log.text()}"
    return done.stdout


class _Log:
    """The last lines of a pipe, read by a thread so that no writer ever waits."""

    def __init__(self) -> None:
        self.count = 0
        self.write_fd = -1
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._read_fd, self.write_fd = os.pipe()
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.write_fd)
        self._reader.join(_STOP_SECONDS)

    def text(self) -> str:
        """Return the lines so far."""
        with self._changed:
            return "".join(self._lines)

    def grows(self, seen: int, seconds: float) -> bool:
        """Wait until more than `seen` lines were read."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count > seen, max(seconds, 0))

    def _read(self) -> None:
        with os.fdopen(self._read_fd, errors="replace") as stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line)
                    self.count += 1
                    self._changed.notify_all()


def _package_places() -> list[str]:
    return [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]


def _stand_ins(readable: Iterable[Path]) -> list[str]:
    """Return shell lines that make directories reachable whose ancestors are closed to others.

    Descriptor 3 leads to what the stand-in covers; without --no-canonicalize mount(8) resolves
    /proc/self/fd/3 to the covered path. With mode 0711 known names are reached and none are listed.
    """
    closed: dict[Path, list[Path]] = {}
    for path in sorted(readable):
        for ancestor in reversed(path.parents):
            if not ancestor.stat().st_mode & 0o001:
                closed.setdefault(ancestor, []).append(path)
                break
    lines = []
    for ancestor, paths in closed.items():
        place = shlex.quote(str(ancestor))
        lines += [f"exec 3< {place}", f"mount -t tmpfs -o mode=0711,nosuid,nodev tmpfs {place}"]
        for path in paths:
            source = shlex.quote(f"/proc/self/fd/3/{path.relative_to(ancestor)}")
            target = shlex.quote(str(path))
            lines += [
                f"mkdir -p {target}",
                f"mount --no-canonicalize --bind {source} {target}",
                f"mount -o remount,bind,ro {target}",
            ]
        lines.append("exec 3<&-")
    return lines
