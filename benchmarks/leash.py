"""Run a program in place of this one, and have the kernel end it when its parent ends.

`python -m benchmarks.leash PARENT PROGRAM [ARGUMENT ...]`, PARENT being the parent's process id.
For programs that, unlike the S3 server, do not watch their standard input.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2); stays over execve(2)


def main() -> None:
    """Become the program named on the command line."""
    parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the parent ended before the program began")
    os.execv(command[0], command)  # noqa: S606 - becoming it is what this is for


if __name__ == "__main__":
    main()
