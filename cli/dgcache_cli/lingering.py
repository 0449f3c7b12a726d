"""Whether the user manager of an account outlives its last session (loginctl(1), enable-linger).

Where it does not, it starts at the first login and ends after the last, and the daemon with it:
cron and CI agents, which log in nowhere, then find nothing. logind keeps one empty file for each
account that lingers; the file is asked for, since logind itself may not run.
"""

import os
import pwd
from pathlib import Path

LINGERING = Path("/var/lib/systemd/linger")
BOOTED = Path("/run/systemd/system")
"""There where systemd is what booted the machine (sd_booted(3))."""


def lingers(user: str, lingering: Path = LINGERING, booted: Path = BOOTED) -> bool | None:
    """Tell whether an account lingers; None where that has no meaning or cannot be known.

    Args:
        user: a name, as in passwd(5).
        lingering: the directory of logind's files.
        booted: what exists where systemd runs the machine.
    """
    if not user or "/" in user or user in (".", "..") or not booted.is_dir():
        return None
    try:
        os.lstat(lingering / user)
    except FileNotFoundError:
        return False  # the directory is made for the first who lingers
    except OSError:
        return None
    return True


def enabling(user: str) -> str:
    """Return the command that makes an account linger."""
    return f"sudo loginctl enable-linger {user}"


def lingering_here() -> str:
    """Return in a word or two whether this account lingers."""
    try:
        answer = lingers(pwd.getpwuid(os.geteuid()).pw_name)
    except KeyError:
        answer = None
    return {True: "on", False: "off", None: "of no meaning here, or unknown"}[answer]
