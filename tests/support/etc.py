"""An /etc of one process's own, in a mount namespace of its own; the machine's stays as it is."""

import shutil
from pathlib import Path

_KEPT = ("passwd", "group", "machine-id", "ld.so.cache", "localtime", "nsswitch.conf")


def own_etc(base: Path, text: str) -> tuple[str, ...]:
    """Make an /etc with this as dg-cached/config.toml and return a program that starts in it.

    Needs root.
    """
    etc = base / "etc"
    (etc / "dg-cached").mkdir(parents=True)
    for name in _KEPT:
        if (Path("/etc") / name).exists():
            shutil.copy(Path("/etc") / name, etc / name)
    (etc / "dg-cached" / "config.toml").write_text(text)
    for path in (etc, etc / "dg-cached", etc / "dg-cached" / "config.toml"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    script = 'mount --bind "$0" /etc && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, str(etc))
