"""Our own work never raises an alarm, however much of it there is and whoever looks meanwhile."""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dgcache_core.disk_records import DiskEventKind
from dgcache_core.errors import CacheFullError
from dgcache_core.memory import anonymous_memory

from .support import NIGHTLY, RELEASES, content, digest_of
from .tier import TIER_KEY, Tier, plaintext, some

FOREIGN = DiskEventKind.FOREIGN


@pytest.mark.parametrize(
    ("key", "batches"), [(None, 100), (TIER_KEY, 20)], ids=["ephemeral", "persistent"]
)
def test_3000_rewrites_are_no_finding(tier: Tier, key: bytes | None, batches: int) -> None:
    """Written, evicted, forgotten, cleared and written again: after each batch nothing is found.

    Fewer of those that wait for the disk (a persistent key).
    """
    store = tier.open(key, max_bytes=20 * 8192)
    blobs = [tier.blob(data, [RELEASES]) for data in some(30)]
    for batch in range(batches):
        for blob in blobs:
            assert store.keep(blob)
        store.forget(blobs[batch % 30].sha256)
        assert store.audit_all() == []
        if batch % 10 == 9:
            store.clear(rekey=batch % 20 == 19)
            assert store.audit_all() == []
    assert store.status().counters.keeps == 30 * batches
    assert not tier.events


def test_an_auditor_at_work_never_mistakes_us_for_somebody_else(tier: Tier) -> None:
    """Threads write, load and remove the same few entries while others audit names and all."""
    store = tier.open(None, max_bytes=6 * 8192)
    blobs = [tier.blob(data, [RELEASES, NIGHTLY]) for data in some(10)]
    with store._ring.lend() as keys:
        names = [keys.file_name(blob.sha256) for blob in blobs]
    end, findings = threading.Event(), []

    def write(first: int) -> int:
        kept = 0
        for turn in range(300):
            blob = blobs[(first + turn) % len(blobs)]
            kept += store.keep(blob)
            if turn % 7 == 0:
                store.forget(blob.sha256)
            if turn % 50 == 49:
                store.evict(NIGHTLY)
        return kept

    def read() -> int:
        loads = 0
        for turn in itertools.count():
            if end.is_set():
                return loads
            try:
                loaded = store.load(blobs[turn % len(blobs)].sha256, anonymous_memory, tier.slab)
            except CacheFullError:
                continue
            if loaded is not None:
                assert plaintext(loaded) == some(10)[turn % len(blobs)]
                loads += 1
        raise AssertionError("there is always another turn")

    def audit() -> None:
        while not end.is_set():
            findings.extend(store.audit_all())
            for name in names:
                findings.extend(store.audit(name))

    with ThreadPoolExecutor(6) as threads:
        auditors = [threads.submit(audit) for _ in range(2)]
        writers = [threads.submit(write, first) for first in (0, 5)]
        readers = [threads.submit(read) for _ in range(2)]
        try:
            kept = [writer.result() for writer in writers]
        finally:
            end.set()
        loads = [reader.result() for reader in readers]
        for auditor in auditors:
            auditor.result()
    assert findings == []
    assert not tier.events
    assert min(kept) > 50
    assert min(loads) > 10
    assert store._table.index.reserved_bytes == 0
    assert not store._table._busy
    assert len(tier.files()) == store.status().entries


def test_a_new_generation_under_load_leaves_nothing_of_the_old(tier: Tier) -> None:
    """Writes that began before it end with no entry; keys in use outlive their generation."""
    store = tier.open()
    blobs = [tier.blob(data) for data in some(10)]
    end = threading.Event()

    def work(first: int) -> None:
        turn = first
        while not end.is_set():
            store.keep(blobs[turn % 10])
            loaded = store.load(blobs[turn % 10].sha256, anonymous_memory, tier.slab)
            if loaded is not None:
                assert plaintext(loaded) == some(10)[turn % 10]
            turn += 1

    with ThreadPoolExecutor(3) as threads:
        workers = [threads.submit(work, first) for first in range(3)]
        try:
            for _ in range(30):
                store.clear(rekey=True)
        finally:
            end.set()
        for worker in workers:
            worker.result()
    assert store.audit_all() == []
    with store._ring.lend() as keys:
        assert store._ring._users == {keys: 1}
        assert keys.generation.counter == 31
        for entry in store._table.index.oldest_first():
            assert entry.name == keys.file_name(entry.sha256)
    assert len(tier.files()) == store.status().entries
    assert not tier.events


@pytest.mark.parametrize("turns_before", range(8))
def test_a_store_closed_under_load_ends_by_itself(tier: Tier, turns_before: int) -> None:
    """Whatever is in progress ends well or with a no; then the directory is free."""
    store = tier.open()
    blobs = [tier.blob(data) for data in some(10)]
    begun = threading.Semaphore(0)

    def work(first: int) -> None:
        for turn in range(first, first + 20):
            begun.release()
            store.keep(blobs[turn % 10])
            loaded = store.load(blobs[turn % 10].sha256, anonymous_memory, tier.slab)
            if loaded is not None:
                assert plaintext(loaded) == some(10)[turn % 10]

    with ThreadPoolExecutor(3) as threads:
        workers = [threads.submit(work, first) for first in range(3)]
        for _ in range(1 + 3 * turns_before):
            assert begun.acquire(timeout=10)
        store.close()
        for worker in workers:
            worker.result()
    tier.open()
    assert not tier.events


def test_a_file_that_somebody_put_there_is_told_and_left(tier: Tier) -> None:
    """It is used by nobody, so it costs no entry."""
    store = tier.open()
    tier.keep(store, b"content")
    planted = [tier.path / "planted", tier.only_file().with_name("0" * 60)]
    for path in planted:
        path.write_bytes(b"planted")
        (finding,) = store.audit(path)
        assert (finding.kind, finding.name) == (FOREIGN, str(path.relative_to(tier.path)))
        assert path.exists()
    assert tier.take_events() == [FOREIGN, FOREIGN]
    assert store.audit_all() == []
    assert store.status().entries == 1


def test_a_file_that_is_seen_while_we_work_is_looked_at_again(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It might have been ours; once nothing of ours came between, it is not."""
    store = tier.open()
    planted = tier.path / "planted"
    planted.write_bytes(b"planted")
    look, works_meanwhile = store._table.directory.look, [1, 1, 1]

    def look_beside_work(name: str) -> os.stat_result:
        store._table.works += works_meanwhile.pop() if works_meanwhile else 0
        return look(name)

    monkeypatch.setattr(store._table.directory, "look", look_beside_work)
    (finding,) = store.audit(planted)
    assert (finding.kind, works_meanwhile) == (FOREIGN, [])


def test_what_belongs_there_is_no_finding(tier: Tier) -> None:
    """Directories, the lock, temporaries, names that lead nowhere; relative and absolute."""
    store = tier.open()
    tier.keep(store, b"content")
    entry = tier.only_file()
    for path in (
        *(tier.path, tier.path / "new", tier.path / "new" / ("0" * 32), tier.path / "tier.lock"),
        *(entry, entry.parent, entry.parent.parent, entry.with_name("f" * 60)),
    ):
        assert store.audit(path) == []
        assert store.audit(str(path.relative_to(tier.path))) == []
    assert not tier.events


def test_an_entry_at_work_is_known_by_name(tier: Tier) -> None:
    """While its file is written its name is busy; before and after it is not."""
    store = tier.open()
    stored = tier.blob(content(5000))
    seen = []
    with store._ring.lend() as keys:
        name = keys.file_name(stored.sha256)

    def look(_: Path) -> None:  # called in the middle: the file's directory is being made
        seen.append(store.is_own_write_in_progress(name))

    store._directory._on_directory = look
    assert not store.is_own_write_in_progress(name)
    assert store.keep(stored)
    assert not store.is_own_write_in_progress(name)
    assert seen == [True, True]
    store.forget(digest_of(content(5000)))
    assert not store.is_own_write_in_progress(name)


def test_an_event_may_be_answered_with_a_call(tier: Tier) -> None:
    """No lock is held while somebody is told: the listener may ask, audit, and clear."""
    store = tier.open()
    answers = []

    def answer(_: object) -> None:
        answers.append((store.status().entries, store.audit_all(), store.clear()))

    tier.keep(store, b"content")
    store._table._on_event = answer
    os.utime(tier.only_file())
    (finding,) = store.audit_all()
    assert finding.kind is DiskEventKind.SECURITY
    assert len(answers) == 1
