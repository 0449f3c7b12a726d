"""A real systemd user manager for a real ordinary user, also where systemd did not boot the machine.

Only the user, the home and an empty control group exist outside; all else is in a mount namespace
of its own. `/run` is a fresh tmpfs there, with the directory by which systemd knows that it runs
(sd_booted(3)), so the machine's own is not touched and nothing needs unmounting. Entering waits for
the manager's READY=1. Leaving asks it to exit, kills what is left of that user by pidfd, and
removes control groups, user and home. The manager gets SIGTERM when the test run dies, and the next
run removes the user of one that was killed. No journald runs: services inherit the manager's
standard error, and `log` has the lines of both.

The interpreter that runs the tests, and the packages beside it, may be below a home that others
cannot enter. They are bound, read-only and at their own paths, into the namespace, below an empty
stand-in for the first closed directory on the way. Nothing is copied and no mode of the machine
changes; scripts, links and `pyvenv.cfg` hold as they are, whichever the interpreter.
"""

import contextlib
import importlib.util
import os
import pwd
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pytest

_MANAGERS = ("/lib/systemd/systemd", "/usr/lib/systemd/systemd")
_TOOLS = ("mount", "nsenter", "setpriv", "systemctl", "unshare", "useradd", "userdel")
_SEARCH_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
_CHECKOUT = Path(__file__).resolve().parents[2]
_USER_NAME = re.compile(r"dgt-([0-9]+)-[0-9a-f]+")
_START_SECONDS = 30.0
_CALL_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LOG_LINES = 10_000
_CONF = Path("/run/systemd/user.conf.d/50-log.conf")
# A file and not options, which the manager forgets at its first daemon-reload.
_CONF_TEXT = """\
[Manager]
LogTarget=console
DefaultStandardOutput=inherit
DefaultStandardError=inherit
"""


def require_user_manager() -> None:
    """Skip the test, with the reason, where no user manager can be run."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        pytest.skip("needs root: a user manager runs as a second real user")
    if not any(Path(manager).exists() for manager in _MANAGERS):
        pytest.skip("needs systemd: apt-get install systemd")
    if missing:
        pytest.skip(f"needs the programs {', '.join(missing)}")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace, which this container does not allow")
    if not all(os.access(group, os.W_OK) for group in _own_control_groups()):
        pytest.skip("needs control groups that can be written")


def installed_wheel(prefix: Path) -> Path:
    """Build the wheel of this checkout, install it at `prefix`, and return its `bin` directory.

    The new environment belongs to the interpreter that runs the tests. Dependencies are found where
    the tests find them, by a `.pth` file; since `.pth` files over there are not read (site), an
    editable installation of this checkout stays out of sight and the wheel is what is tested.
    """
    places = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    _call(str(Path(sys.executable).resolve()), "-m", "venv", str(prefix))
    (own,) = prefix.glob("lib/python3*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(places) + "\n")
    offline = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = (str(prefix / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--quiet")
    _call(*pip, "--ignore-installed", *offline, str(_CHECKOUT))
    return prefix / "bin"


class UserManager:
    """A running user manager; a context manager. `readable` are directories its user must reach."""

    def __init__(self, readable: Iterable[Path] = ()) -> None:
        self._readable = [*_interpreter_places(), *(path.resolve() for path in readable)]
        self._stack = contextlib.ExitStack()
        self.log = _Log()

    def __enter__(self) -> Self:
        _remove_abandoned()
        with contextlib.ExitStack() as stack:
            account = stack.enter_context(_account())
            self.name, self.uid, self._gid = account.pw_name, account.pw_uid, account.pw_gid
            self.home = Path(account.pw_dir)
            self.runtime_dir = Path(f"/run/user/{self.uid}")
            self._namespace_fd = stack.enter_context(self._manager())
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
        """Run a program as the user, at home, in the manager's namespace, with a login's environment."""
        namespace = f"--mount=/proc/self/fd/{self._namespace_fd}"
        return subprocess.run(
            ["nsenter", namespace, *self._as_user(), "env", f"--chdir={self.home}", *argv],
            env=self._environment() | dict(env or {}),
            pass_fds=[self._namespace_fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `systemctl --user …`, which waits for the job it queues, at most a minute."""
        return self.run(["systemctl", "--user", "--no-pager", *arguments])

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit."""
        shown = self.systemctl("show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in shown.stdout.splitlines())

    def wait_for(self, holds: Callable[[], bool], seconds: float = _START_SECONDS) -> None:
        """Wait until `holds`, asked again at each new line of the log: the manager logs each change.

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

    @contextlib.contextmanager
    def _manager(self) -> Iterator[int]:
        """Run the manager and yield its mount namespace."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            address = f"{self.name}-{secrets.token_hex(8)}"
            ready.bind(f"\0{address}")
            process = subprocess.Popen(
                ["unshare", "--mount", "--propagation=private", "sh", "-euc", self._script()],
                env=self._environment() | {"NOTIFY_SOCKET": f"@{address}"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.log.write_end(),
                start_new_session=True,  # Ctrl-C in the terminal is for pytest, which then ends it
            )
            try:
                with _pidfd(process.pid) as pidfd:
                    self._await_ready(ready, pidfd)
                    namespace_fd = os.open(f"/proc/{process.pid}/ns/mnt", os.O_RDONLY)
                    try:
                        self._namespace_fd = namespace_fd
                        yield namespace_fd
                        self.systemctl("exit")
                        _poll([pidfd], _STOP_SECONDS)
                    finally:
                        os.close(namespace_fd)
            finally:
                process.kill()
                process.wait(_STOP_SECONDS)
                _end_processes_of(self.uid)
                self.log.close()

    def _await_ready(self, ready: socket.socket, pidfd: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while ready.fileno() in _poll([ready.fileno(), pidfd], deadline - time.monotonic()):
            if b"READY=1" in ready.recv(4096).split(b"\n"):
                return
        raise AssertionError(f"the user manager did not start; its log:\n{self.log.text()}")

    def _script(self) -> str:
        """Return what turns a root shell in a new mount namespace into the user's manager.

        It is shell, since Python has neither mount(2) nor, before 3.12, unshare(2).
        """
        ids = f"uid={self.uid},gid={self._gid}"
        manager = next(path for path in _MANAGERS if Path(path).exists())
        lines = [f"echo 0 > {shlex.quote(f'{group}/cgroup.procs')}" for group in _groups(self.name)]
        lines += _stand_ins(self._readable)
        lines += [
            "mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /run",
            f"mkdir -p /run/systemd/system /run/systemd/unit-root {_CONF.parent} {self.runtime_dir}",
            f"mount -t tmpfs -o mode=0700,{ids},nosuid,nodev tmpfs {self.runtime_dir}",
            f"echo {shlex.quote(_CONF_TEXT)} > {_CONF}",
            f"exec {shlex.join(self._as_user())} --pdeathsig=TERM {manager} --user",
        ]
        return "\n".join(lines)


class _Log:
    """The last lines of a pipe, read by a thread so that no writer ever waits."""

    def __init__(self) -> None:
        self.count = 0
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._changed = threading.Condition()
        self._write_fd = -1
        self._reader: threading.Thread | None = None

    def write_end(self) -> int:
        """Open the pipe, whose write end this object goes on owning."""
        read_fd, self._write_fd = os.pipe()
        self._reader = threading.Thread(
            target=self._read, args=[os.fdopen(read_fd, errors="replace")], daemon=True
        )
        self._reader.start()
        return self._write_fd

    def close(self) -> None:
        """Let go of the pipe and wait for its end."""
        os.close(self._write_fd)
        if self._reader:
            self._reader.join(_STOP_SECONDS)

    def text(self) -> str:
        """Return the lines so far."""
        with self._changed:
            return "".join(self._lines)

    def grows(self, seen: int, seconds: float) -> bool:
        """Wait until more than `seen` lines were read."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count > seen, max(seconds, 0))

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line)
                    self.count += 1
                    self._changed.notify_all()


def _interpreter_places() -> list[Path]:
    packages = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    return [Path(path).resolve() for path in [sys.base_prefix, *packages]]


def _stand_ins(readable: Iterable[Path]) -> list[str]:
    """Return shell lines that make directories reachable whose ancestors are closed to others.

    Descriptor 3 leads to what the stand-in covers; without --no-canonicalize mount(8) resolves
    /proc/self/fd/3 to the covered path. With mode 0711 known names are reached and none are listed.
    """
    closed: dict[Path, list[Path]] = {}
    for path in sorted(set(readable)):
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


@contextlib.contextmanager
def _account() -> Iterator[pwd.struct_passwd]:
    """Make a user with a home and delegated control groups; take all of it away at the end."""
    name = f"dgt-{os.getpid()}-{secrets.token_hex(3)}"
    _call("useradd", "--create-home", "--user-group", "--shell=/bin/sh", name)
    try:
        account = pwd.getpwnam(name)
        for group in _groups(name):
            group.mkdir()
            # what cgroups(7) names as delegation: limits stay with the owner of the parent
            delegated = ("cgroup.procs", "tasks", "cgroup.subtree_control", "cgroup.threads")
            for path in [group, *(group / file for file in delegated)]:
                with contextlib.suppress(FileNotFoundError):
                    os.chown(path, account.pw_uid, account.pw_gid)
        yield account
    finally:
        _remove_account(name)


def _remove_account(name: str) -> None:
    _end_processes_of(pwd.getpwnam(name).pw_uid)
    for group in _groups(name):
        for directory, _, _ in os.walk(group, topdown=False):
            Path(directory).rmdir()
    # --force: a zombie that its parent has not yet reaped still counts as a use of the account
    _call("userdel", "--remove", "--force", name)


def _remove_abandoned() -> None:
    """Remove the users of test runs that were killed."""
    for entry in pwd.getpwall():
        match = _USER_NAME.fullmatch(entry.pw_name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(KeyError, OSError, subprocess.CalledProcessError):
                _remove_account(entry.pw_name)  # or another worker just did


def _own_control_groups() -> list[Path]:
    """Return our own group in the hierarchies a manager uses: v2, and v1's named `systemd`."""
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path.lstrip("/")
    top = Path("/sys/fs/cgroup")
    if "name=systemd" not in own:
        return [top / own[""]]
    groups = [top / "systemd" / own["name=systemd"]]
    return [*groups, top / "unified" / own[""]] if (top / "unified").is_dir() else groups


def _groups(name: str) -> list[Path]:
    return [group / name for group in _own_control_groups()]


def _end_processes_of(uid: int) -> None:
    """Kill every process of a user that this module made, and wait until they have ended."""
    deadline = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < deadline:
        ended = False
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), _pidfd(
                int(entry.name)
            ) as pidfd:
                # status, not the owner of the directory, which is root for who is not dumpable
                status = (entry / "status").read_text()
                if f"\nUid:\t{uid}\t" in status and "\nState:\tZ" not in status:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    _poll([pidfd], deadline - time.monotonic())
                    ended = True
        if not ended:
            return


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _poll(descriptors: Iterable[int], seconds: float) -> list[int]:
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poller.poll(max(seconds, 0) * 1000)]


def _call(*argv: str) -> None:
    """Run a program, and have what it said in the error where it fails."""
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=300, umask=0o022
    )
    if done.returncode:
        raise AssertionError(f"{shlex.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}")
