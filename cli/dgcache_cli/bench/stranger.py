"""Another user who tries to read what is in a directory.

`python -m dgcache_cli.bench.stranger DIRECTORY UID` begins as root, stands in the directory,
becomes that user for good, and then tries every name given on standard input, as JSON: a file is
opened, a socket is connected to. It prints the names that gave it a byte.

Standing in the directory first takes away what keeps others out further up, which would be the
place's merit and not the implementation's.
"""

import json
import os
import socket
import stat
import sys

_REPLY_SECONDS = 1.0


def main() -> int:
    """Become somebody else, try, tell."""
    directory, uid = sys.argv[1], int(sys.argv[2])
    names = json.load(sys.stdin)
    os.chdir(directory)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    print(json.dumps([name for name in names if _gives_a_byte(name)]))
    return 0


def _gives_a_byte(name: str) -> bool:
    try:
        if stat.S_ISSOCK(os.stat(name).st_mode):  # noqa: PTH116 - names, relative to where we stand
            return any(map(_is_answered, [name] * 2, [socket.SOCK_STREAM, socket.SOCK_SEQPACKET]))
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return bool(os.read(descriptor, 1))
    finally:
        os.close(descriptor)


def _is_answered(name: str, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as connection:
        connection.settimeout(_REPLY_SECONDS)
        try:
            connection.connect(name)
            return bool(connection.recv(1))
        except OSError:
            return False


if __name__ == "__main__":
    sys.exit(main())
