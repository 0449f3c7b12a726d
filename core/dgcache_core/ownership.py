"""Who can have made a file: me, root, or somebody else, also in a user namespace without root.

In such a namespace (`PrivateUsers=yes`, a container of the user's) root is not mapped: like every
other user who is not, it shows as the overflow uid (user_namespaces(7)), and no system call tells
them apart. There the path has to: the few directories on our ways that only root may make
(file-hierarchy(7)) are taken for root's where they show as the overflow uid, and so are files in
/etc/dg-cached. Whoever walks a path to them must have come by that very path, without a link.
Everything else of that uid is somebody else's, and so is all that is "mine" where I am not mapped.
"""

import os
from pathlib import Path

_ROOTS_DIRECTORIES = frozenset(
    map(Path, ("/", "/etc", "/etc/dg-cached", "/home", "/run", "/run/dg-cached", "/run/user"))
)
_ROOTS_FILES_IN = Path("/etc/dg-cached")
_ROOTS_EVERYWHERE = Path("/proc/sys/kernel/overflowuid")
"""The kernel gives its settings to the real root in every user namespace (procfs), and this one
says how those show who are not mapped."""


def is_mine(uid: int) -> bool:
    """Tell whether what belongs to `uid` belongs to me."""
    return uid == os.geteuid() and uid != _unmapped_root()


def is_directory_of_root_or_me(uid: int, place: Path) -> bool:
    """Tell whether only root or I can have made what is at a place and belongs to `uid`.

    Args:
        uid: its owner, as fstat(2) shows it here.
        place: its canonical path, by which it was reached.
    """
    return _is_roots_or_mine(uid, is_roots_place=place in _ROOTS_DIRECTORIES)


def is_file_of_root_or_me(uid: int, place: Path) -> bool:
    """Tell the same of a file; see `is_directory_of_root_or_me`."""
    return _is_roots_or_mine(uid, is_roots_place=place.parent == _ROOTS_FILES_IN)


def is_link_of_root_or_me(uid: int) -> bool:
    """Tell the same of a link: no place makes one root's."""
    return _is_roots_or_mine(uid, is_roots_place=False)


def owner_name(uid: int) -> str:
    """Return what messages call the owner."""
    if uid == _unmapped_root():
        return f"uid {uid} (anybody: root is not mapped into this user namespace)"
    return f"uid {uid}"


def _is_roots_or_mine(uid: int, *, is_roots_place: bool) -> bool:
    if uid == 0:  # who is 0 here was decided by root, or is the user who made the namespace
        return True
    return is_mine(uid) or (is_roots_place and uid == _unmapped_root())


def _unmapped_root() -> int | None:
    """Return the overflow uid where the real root shows as that; None where root is mapped, as in
    the initial namespace, or where it cannot be known."""
    try:
        shown = _ROOTS_EVERYWHERE.stat().st_uid
        return shown if shown == int(_ROOTS_EVERYWHERE.read_text()) else None
    except (OSError, ValueError):
        return None
