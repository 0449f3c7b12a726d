"""xdelta3, the program DeltaGlider makes deltas with: found, or installed where that is allowed.

`python -m benchmarks.xdelta3` installs it with apt-get when it is missing and this is root, or sudo
asks for no password; elsewhere it prints the one command to run and exits with status 1.
"""

import os
import shlex
import shutil
import subprocess
import sys

INSTALL_SECONDS = 600.0
_INSTALLERS = {
    "apt-get": "apt-get install -y xdelta3",
    "dnf": "dnf install -y xdelta",
    "zypper": "zypper install -y xdelta3",
    "pacman": "pacman -S --noconfirm xdelta3",
    "apk": "apk add xdelta3",
}


class NoXdelta3Error(Exception):
    """xdelta3 is missing; the message is the command that installs it."""


def ensure_xdelta3() -> None:
    """Return once xdelta3 can be run, installing it where this user may.

    Raises:
        NoXdelta3Error: it is missing and cannot be installed from here.
    """
    if _found():
        return
    rights = _administrator()
    if shutil.which("apt-get") and rights is not None:
        print("xdelta3 is missing: installing it with apt-get", file=sys.stderr, flush=True)
        _apt_get(rights, "install")
        if not _found():  # an image without package lists
            _apt_get(rights, "update")
            _apt_get(rights, "install")
        if _found():
            return
    raise NoXdelta3Error(f"xdelta3 is missing; install it with: {_command()}")


def _found() -> bool:
    return shutil.which("xdelta3") is not None


def _administrator() -> list[str] | None:
    """Return what to put before a command to run it as root, or None where we may not."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo"):
        asked = subprocess.run(
            ["sudo", "-n", "true"],  # noqa: S607 - whichever sudo this user runs
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        if asked.returncode == 0:
            return ["sudo", "-n"]
    return None


def _apt_get(rights: list[str], action: str) -> None:
    arguments = {"update": ["update"], "install": ["install", "-y", "xdelta3"]}[action]
    command = [
        *(*rights, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"),
        *("-o", "DPkg::Lock::Timeout=60", "-o", "Dpkg::Use-Pty=0"),
        *arguments,
    ]
    subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        timeout=INSTALL_SECONDS,
        check=False,
    )


def _command() -> str:
    known = next((text for name, text in _INSTALLERS.items() if shutil.which(name)), None)
    if known is None:
        return "your system's package manager (the package is called xdelta3)"
    if os.geteuid() == 0:
        return known
    return f"sudo {known}" if shutil.which("sudo") else f"su -c {shlex.quote(known)}"


if __name__ == "__main__":
    try:
        ensure_xdelta3()
    except NoXdelta3Error as error:
        sys.exit(str(error))
