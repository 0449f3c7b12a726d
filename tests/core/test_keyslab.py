"""Keys live in one protected page, die by zeroing, and are nowhere else."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgcache_core.errors import CacheError, CacheFullError
from dgcache_core.keyslab import KEY_BYTES, KeyProtection, KeySlab

from .support import open_descriptors, run_python

_MEMFD_SECRET = 447


def kernel_has_secret_memory() -> bool:
    """Ask the kernel itself."""
    descriptor = ctypes.CDLL(None).syscall(_MEMFD_SECRET, os.O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0


@pytest.fixture(params=[False, True], ids=["never forks", "may fork"])
def slab(request: pytest.FixtureRequest) -> Iterator[KeySlab]:
    """A slab of four slots, of either kind."""
    made = KeySlab(4, may_fork=request.param)
    yield made
    made.close()


def page_of(slab: KeySlab) -> bytes:
    """Return what is in the whole region, free slots included."""
    return ctypes.string_at(slab._address, slab._bytes)


def test_every_key_is_another(slab: KeySlab) -> None:
    """Keys are 32 random bytes: no two are the same, and none is zero."""
    keys = {bytes(slab.new_key().view) for _ in range(4)}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert bytes(KEY_BYTES) not in keys


def test_a_slot_used_again_has_another_key(slab: KeySlab) -> None:
    """200 keys in four slots are 200 keys."""
    seen = set()
    for _ in range(50):
        slots = [slab.new_key() for _ in range(4)]
        seen |= {bytes(slot.view) for slot in slots}
        for slot in slots:
            slot.erase()
    assert len(seen) == 200


def test_an_erased_key_is_zero_in_memory(slab: KeySlab) -> None:
    """Erasing one key leaves zeros in its place and its neighbours as they are."""
    slots = [slab.new_key() for _ in range(3)]
    keys = [bytes(slot.view) for slot in slots]
    slots[1].erase()
    page = page_of(slab)
    assert [key in page for key in keys] == [True, False, True]
    slots[0].erase()
    slots[2].erase()
    assert page_of(slab) == bytes(slab._bytes)


def test_an_erased_key_cannot_be_used(slab: KeySlab) -> None:
    """Its view is gone, so that nothing is encrypted with zeros by mistake."""
    slot = slab.new_key()
    view = slot.view
    slot.erase()
    with pytest.raises(ValueError, match="released"):
        bytes(view)


def test_erasing_twice_gives_the_slot_back_once(slab: KeySlab) -> None:
    """A second erase neither touches the slot's next key nor makes a slot too many."""
    first = slab.new_key()
    first.erase()
    others = [slab.new_key() for _ in range(4)]
    first.erase()
    assert all(any(bytes(other.view)) for other in others)
    with pytest.raises(CacheFullError):
        slab.new_key()


def test_a_full_slab_says_so_and_goes_on_when_a_slot_is_free(slab: KeySlab) -> None:
    """The fifth key of four is CacheFullError; an erased one makes room for it."""
    slots = [slab.new_key() for _ in range(4)]
    with pytest.raises(CacheFullError, match="slot"):
        slab.new_key()
    slots[2].erase()
    assert any(slab.new_key().view)


def test_no_representation_shows_a_key(slab: KeySlab) -> None:
    """repr and str of slab and slot hold no byte of a key, as hexadecimal or otherwise."""
    slot = slab.new_key()
    key = bytes(slot.view)
    for text in (repr(slot), str(slot), repr(slab), str(slab)):
        assert key.hex()[:8] not in text
        assert str(key)[2:10] not in text
    slot.erase()
    assert "erased" in repr(slot)


def test_secret_memory_is_used_where_the_process_does_not_fork() -> None:
    """memfd_secret where the kernel has it, or else locked memory; never for one that may fork."""
    never, may = KeySlab(4, may_fork=False), KeySlab(4, may_fork=True)
    try:
        if kernel_has_secret_memory():
            assert never.protection is KeyProtection.SECRET_MEMORY
            assert "secretmem" in mapping_of(never)
        assert may.protection in (KeyProtection.LOCKED, KeyProtection.UNLOCKED)
        assert "secretmem" not in mapping_of(may)
    finally:
        never.close()
        may.close()


def test_locked_keys_stay_out_of_swap_core_dumps_and_children() -> None:
    """The kernel's own account of the region: locked, left out of dumps, wiped on fork."""
    slab = KeySlab(4, may_fork=True)
    try:
        flags = mapping_of(slab).partition("VmFlags:")[2].split()
        assert {"dd", "wf"} <= set(flags)
        assert ("lo" in flags) == (slab.protection is KeyProtection.LOCKED)
    finally:
        slab.close()


def mapping_of(slab: KeySlab) -> str:
    """Return the kernel's lines about the mapping that the slab's region is in (proc(5))."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        span = line.split(" ")[0].split("-")
        if len(span) == 2 and int(span[0], 16) <= slab._address < int(span[1], 16):
            rest = lines[number + 1 :]
            end = next(i for i, one in enumerate(rest) if one.startswith("VmFlags"))
            return "\n".join([line, *rest[: end + 1]])
    raise AssertionError("the region is not mapped")


@pytest.mark.parametrize("may_fork", [False, True])
def test_no_descriptor_leads_to_the_keys(may_fork: bool) -> None:
    """Neither the region nor a new key keeps a descriptor open."""
    before = open_descriptors()
    slab = KeySlab(4, may_fork=may_fork)
    slot = slab.new_key()
    assert open_descriptors() == before
    slot.erase()
    slab.close()
    assert open_descriptors() == before


WITHOUT_LOCK = """
import os, resource
from dgcache_core.keyslab import KeySlab
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
if os.geteuid() == 0:
    os.setgid(65533)
    os.setuid(65533)
print(*(KeySlab(4, may_fork=may_fork).protection for may_fork in (False, True)))
"""


def test_what_protects_the_keys_is_told_as_it_is() -> None:
    """An ordinary user who may lock nothing still gets keys, and `protection` says `unlocked`."""
    assert run_python(WITHOUT_LOCK) == "unlocked unlocked"


WITHOUT_DESCRIPTORS = """
import os, resource
from dgcache_core.errors import CacheError
from dgcache_core.keyslab import KeySlab
slab = KeySlab(1, may_fork=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096))
try:
    slab.new_key()
except CacheError:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    print(any(slab.new_key().view))
"""


def test_a_key_that_could_not_be_made_costs_no_slot() -> None:
    """No descriptor for the random generator is a CacheError, and the slot is there afterwards."""
    assert run_python(WITHOUT_DESCRIPTORS) == "True"


ERASED_AFTER_CLOSE = """
from dgcache_core.keyslab import KeySlab
slab = KeySlab(2, may_fork=True)
slot = slab.new_key()
slab.close()
slot.erase()
slab.close()
print("alive")
"""


def test_erasing_a_key_after_its_slab_was_closed_is_harmless() -> None:
    """A store in progress ends after its store was closed: that must not touch unmapped memory."""
    assert run_python(ERASED_AFTER_CLOSE) == "alive"


def test_a_closed_slab_makes_no_key() -> None:
    """The answer is a CacheError, as all the cache's answers are."""
    slab = KeySlab(2, may_fork=True)
    slab.close()
    with pytest.raises(CacheError):
        slab.new_key()


# -- retiring ------------------------------------------------------------------------------------


def is_mapped(address: int) -> bool:
    """Ask the kernel whether anything is mapped there."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_a_retired_slab_goes_with_its_last_key(slab: KeySlab) -> None:
    """Keys in use can be used until they are erased; then the region is unmapped."""
    slots = [slab.new_key() for _ in range(3)]
    address, keys = slab._address, [bytes(slot.view) for slot in slots]
    slab.retire()
    assert [bytes(slot.view) for slot in slots] == keys
    with pytest.raises(CacheFullError, match="rotated"):
        slab.new_key()
    slots[0].erase()
    slots[2].erase()
    assert bytes(slots[1].view) == keys[1]
    assert is_mapped(address)
    slots[1].erase()
    assert slab._address == 0
    assert not is_mapped(address)
    slots[1].erase()
    slab.retire()


def test_a_retired_slab_without_keys_goes_at_once(slab: KeySlab) -> None:
    """Nothing waits for a slot that was given back before."""
    slab.new_key().erase()
    address = slab._address
    slab.retire()
    assert not is_mapped(address)
    slab.close()
