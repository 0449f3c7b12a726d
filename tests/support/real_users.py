"""A real ordinary user for one test: account, home, and an empty control group of its own.

Leaving kills what that user still runs, by pidfd, and removes everything. What a killed test run
left behind is removed by the next one: the name has the pid of the process that made it.
"""

import contextlib
import os
import pwd
import re
import secrets
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_NAME = re.compile(r"dgt-([0-9]+)-[0-9a-f]+")
_CALL_SECONDS = 300.0
_END_SECONDS = 30.0
# What cgroups(7) names as delegation; limits stay with the owner of the parent.
_DELEGATED = ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "tasks")


@contextlib.contextmanager
def real_user() -> Iterator[pwd.struct_passwd]:
    """Make a user, and take it away again."""
    _remove_abandoned()
    name = f"dgt-{os.getpid()}-{secrets.token_hex(3)}"
    call("useradd", "--create-home", "--user-group", "--shell=/bin/sh", name)
    try:
        account = pwd.getpwnam(name)
        for group in control_groups(account.pw_uid):
            group.mkdir(parents=True)
            group.parent.chmod(0o755)  # whatever the umask of the test run
            for path in [group, *(group / file for file in _DELEGATED)]:
                with contextlib.suppress(FileNotFoundError):
                    os.chown(path, account.pw_uid, account.pw_gid)
        yield account
    finally:
        _remove(name)


def own_control_groups() -> list[Path]:
    """Return our own group in each hierarchy a user manager uses: v2, and v1's named `systemd`."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {line.split(":", 2)[1]: line.split(":", 2)[2].lstrip("/") for line in lines}
    top = Path("/sys/fs/cgroup")
    hybrid = [(top / "systemd", "name=systemd"), (top / "unified", "")]
    hierarchies = [pair for pair in hybrid if pair[0].is_dir()] or [(top, "")]
    return [place / own.get(name, "") for place, name in hierarchies]


def control_groups(uid: int) -> list[Path]:
    """Return the groups of a user, named so that journald knows the units in them (cgroup-util)."""
    below = Path(f"user-{uid}.slice", f"user@{uid}.service")
    return [group / below for group in own_control_groups()]


def end_processes_of(uid: int) -> None:
    """Kill every process of a user that `real_user` made, and wait until they have ended."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        ended = [_end(int(entry.name), uid, deadline) for entry in Path("/proc").glob("[0-9]*")]
        if not any(ended):  # a process may have forked while the others were looked at
            return


def call(*argv: str) -> None:
    """Run a program, with what it said in the error where it fails."""
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=_CALL_SECONDS, umask=0o022
    )
    if done.returncode:
        raise AssertionError(f"{shlex.join(argv)}: {done.returncode}\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    """Open what goes on naming this very process (pidfd_open(2))."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def poll(descriptors: Iterable[int], seconds: float) -> list[int]:
    """Wait until one can be read, or a process has ended, and return which."""
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poller.poll(max(seconds, 0) * 1000)]


def _end(pid: int, uid: int, deadline: float) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), pidfd_of(pid) as pidfd:
        # the file and not its owner, which is root where a process is not dumpable
        status = Path(f"/proc/{pid}/status").read_text()
        if f"\nUid:\t{uid}\t" in status and "\nState:\tZ" not in status:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll([pidfd], deadline - time.monotonic())
            return True
    return False


def _remove(name: str) -> None:
    uid = pwd.getpwnam(name).pw_uid
    end_processes_of(uid)
    for group in control_groups(uid):
        for directory, _, _ in os.walk(group.parent, topdown=False):
            Path(directory).rmdir()
    # --force: a zombie that its parent has not yet reaped still counts as a use of the account
    call("userdel", "--remove", "--force", name)


def _remove_abandoned() -> None:
    for entry in pwd.getpwall():
        match = _NAME.fullmatch(entry.pw_name)
        if match and not Path("/proc", match[1]).exists():
            with contextlib.suppress(KeyError, OSError, AssertionError):
                _remove(entry.pw_name)  # or another worker just did
