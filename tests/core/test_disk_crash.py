"""Killed at any moment of a write, a tier has the whole file or none, and leaves nothing behind.

The write is interrupted before, after, and in the middle of each of its system calls: a child does
them one by one and kills itself (SIGKILL) at the chosen one.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .support import digest_of, run_python
from .tier import TIER_KEY, Tier

# Wraps every function of `os` that the core calls; the chosen call is the last.
CHILD = """
import functools, json, os, shutil, signal, sys
from pathlib import Path
from tests.core.tier import TIER_KEY, Tier
path, key_hex, action = sys.argv[1:4]
CALLS = ("open", "close", "mkdir", "chmod", "fchmod", "fstat", "stat", "pwrite", "pread", "preadv",
         "fsync", "rename", "unlink", "utime", "posix_fallocate", "getxattr", "listdir", "readv")
state = {"count": 0, "last": -1, "when": "", "names": []}
def wrap(name, real):
    @functools.wraps(real)
    def call(*arguments, **options):
        number, state["count"] = state["count"], state["count"] + 1
        state["names"].append(name)
        die = number == state["last"]
        if die and state["when"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if die and name == "pwrite":  # half of it
            descriptor, data, offset = arguments
            arguments = descriptor, bytes(data[: len(data) // 2]), offset
        try:
            return real(*arguments, **options)
        finally:
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
    return call
for name in CALLS:
    setattr(os, name, wrap(name, getattr(os, name)))
def life(number, last, when):
    tier = Tier(Path(path) / str(number) / "tier")
    store = tier.open(bytes.fromhex(key_hex) or None)
    blobs = [tier.blob(data) for data in (b"first" * 1000, b"second" * 1000)]
    if action != "keep":
        assert store.keep(blobs[0])
    if action == "replace":
        store._table.index.max_bytes = 8192  # room for one
    state.update(count=0, last=last, when=when, names=[])
    if action == "rekey":
        store.clear(rekey=True)
    else:
        assert store.keep(blobs[1])
    return list(state["names"])
os.mkdir(f"{path}/whole")
names = life("whole", -1, "")
for last in range(len(names)):
    for when in ("before", "after"):
        place = f"{last}-{when}"
        os.mkdir(f"{path}/{place}")
        for generation in Path(path, "whole", "tier").glob("generation-*"):
            os.makedirs(f"{path}/{place}/tier/new", 0o700)  # as when the generation is written
            os.chmod(f"{path}/{place}/tier", 0o700)
            shutil.copy(generation, f"{path}/{place}/tier")  # the same names, so the same calls
        pid = os.fork()
        if not pid:
            try:
                life(place, last, when)
            finally:
                os._exit(99)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (place, status)
print(json.dumps(names))
"""

FIRST, SECOND = b"first" * 1000, b"second" * 1000


def killed_everywhere(place: Path, key: bytes | None, action: str) -> tuple[list[str], list[Path]]:
    """Do it in children that are killed; return the calls of one, and the directories of all."""
    printed = run_python(CHILD, str(place), (key or b"").hex(), action, timeout=110)
    names = json.loads(printed)
    return names, sorted(path / "tier" for path in place.iterdir() if path.name != "whole")


def clean(tier: Tier) -> bool:
    """Tell whether no half-written file is left, and each file there is has an entry."""
    new = tier.path / "new"
    return not new.exists() or not list(new.iterdir())


@pytest.mark.parametrize("action", ["keep", "replace"])
def test_a_write_that_is_killed_leaves_the_whole_file_or_none(
    short_directory: Path, action: str
) -> None:
    """With a persistent key: absent before the rename, whole from then on; what was there stays,
    unless it had to make room."""
    place = short_directory.resolve()
    names, directories = killed_everywhere(place, TIER_KEY, action)
    assert len(directories) == 2 * len(names) > 60
    assert {"open", "pwrite", "fsync", "rename", "posix_fallocate"} <= set(names)
    outcomes = {}
    for directory in directories:
        tier = Tier(directory)
        store = tier.open()
        found = tier.load(store, digest_of(SECOND))
        assert found in (None, SECOND)
        assert not tier.events, directory
        assert clean(tier), directory
        assert len(tier.files()) == store.status().entries
        step, when = directory.parent.name.split("-")
        outcomes[int(step), when == "after"] = found is not None
        if action == "replace" and found is None:
            assert tier.load(store, digest_of(FIRST)) in (None, FIRST)
        assert tier.load(store, tier.keep(store, SECOND)) == SECOND
        tier.close()
        tier.slab.close()
    found_at = [moment for moment, whole in sorted(outcomes.items()) if whole]
    assert found_at == sorted(outcomes)[-len(found_at) :]  # from one moment on, always
    rename = len(names) - 1 - names[::-1].index("rename")
    assert found_at[0] == (rename, True), (found_at[0], names)


def test_a_write_with_a_lost_key_that_is_killed_leaves_nothing(short_directory: Path) -> None:
    """Whatever the moment: the next life removes what nobody can read."""
    _, directories = killed_everywhere(short_directory.resolve(), None, "keep")
    for directory in directories:
        tier = Tier(directory)
        store = tier.open(None)
        assert not tier.files()
        assert clean(tier)
        assert not tier.events
        assert store.status().entries == 0
        tier.close()
        tier.slab.close()


def test_a_new_generation_that_is_killed_is_the_old_one_or_the_new(short_directory: Path) -> None:
    """Entries are all there until the generation's file is renamed, and unreadable from then on."""
    names, directories = killed_everywhere(short_directory.resolve(), TIER_KEY, "rekey")
    rename = names.index("rename")
    for directory in directories:
        tier = Tier(directory)
        store = tier.open()
        step, when = directory.parent.name.split("-")
        renewed = (int(step), when == "after") >= (rename, True)
        assert tier.load(store, digest_of(FIRST)) == (None if renewed else FIRST)
        assert len(tier.files()) == (0 if renewed else 1)
        assert clean(tier)
        assert not tier.events
        tier.close()
        tier.slab.close()


@pytest.mark.parametrize("key", [TIER_KEY, None], ids=["persistent", "ephemeral"])
def test_a_file_is_on_the_disk_before_it_has_its_name(
    tier: Tier, monkeypatch: pytest.MonkeyPatch, key: bytes | None
) -> None:
    """With a persistent key: file, then name, then directory; with an ephemeral one none waits."""
    store, stored = tier.open(key), tier.blob(SECOND)
    done: list[str] = []

    def watched(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            done.append(name)
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("pwrite", "fsync", "rename", "mkdir"):
            patch.setattr(os, name, watched(name))
        assert store.keep(stored)
    if key is None:
        assert "fsync" not in done
        return
    written, renamed = len(done) - 1 - done[::-1].index("pwrite"), done.index("rename")
    assert done[written + 1] == "fsync"
    assert done[renamed:] == ["rename", "fsync"]
    made = [place for place, name in enumerate(done) if name == "mkdir" and place > written]
    assert len(made) == 2
    for place in made:
        assert done[place + 1] == "fsync"  # of the directory that has a new one
