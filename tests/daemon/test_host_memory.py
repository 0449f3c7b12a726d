"""What is left, of the host and of every control group above us: v1 and v2, read as they are."""

from pathlib import Path

import psutil
import pytest

from dgcached.host_memory import effective_memory_bytes, read_places, stall_files
from dgcached.pressure import Place
from tests.support.memory_group import memory_group
from tests.support.wire import script_running

MIB = 1 << 20
STALLS = """\
some avg10={some} avg60=0.50 avg300=0.10 total=123
full avg10={full} avg60=0.20 avg300=0.05 total=45
"""


class Tree:
    """Files as the kernel shows them, in a directory of the test."""

    def __init__(self, base: Path) -> None:
        self.root = base / "cgroup"
        self.membership = base / "membership"
        self.host_stalls = base / "host.pressure"
        self.membership.write_text("0::/user.slice/app.service\n")

    def write(self, group: str, **files: str) -> Path:
        """Write a group's files; `__` in a name stands for a dot."""
        directory = self.root / group
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)
        return directory

    def places(self, *alarmed: Path) -> list[Place]:
        """Return what is read there, without the host."""
        return read_places(frozenset(alarmed), self.membership, self.root, self.host_stalls)[1:]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A v2 hierarchy of two groups, without any limit."""
    tree = Tree(tmp_path)
    tree.write("user.slice", memory__max="max\n", memory__high="max\n", memory__current="1\n")
    tree.write("user.slice/app.service", memory__max="max\n", memory__current="1\n")
    return tree


def test_the_host_is_read_as_the_kernel_has_it(tree: Tree) -> None:
    """Total and available as /proc/meminfo tells them, give or take what happens meanwhile."""
    host = read_places()[0]
    meminfo = {
        line.split(":")[0]: int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    assert (host.name, host.total_bytes) == ("host", meminfo["MemTotal"])
    assert abs(host.available_bytes - meminfo["MemAvailable"]) < host.total_bytes // 10
    assert tree.places() == []


def test_a_v2_group_has_what_its_limit_leaves(tree: Tree) -> None:
    """The lower of max and high, less the usage, and page cache that can be dropped is no usage."""
    tree.write(
        "user.slice",
        memory__max=str(400 * MIB),
        memory__high=str(300 * MIB),
        memory__current=f"{250 * MIB}\n",
        memory__stat=f"anon 5\nactive_file {40 * MIB}\ninactive_file {30 * MIB}\n",
        memory__pressure=STALLS.format(some="12.34", full="5.67"),
    )
    (place,) = tree.places()
    assert place.name == f"control group {tree.root}/user.slice"
    assert (place.total_bytes, place.available_bytes) == (300 * MIB, 100 * MIB)
    assert (place.some_percent, place.full_percent, place.alarmed) == (12.34, 5.67, False)
    alarmed = tree.places(tree.root / "user.slice" / "memory.pressure")
    assert [place.alarmed for place in alarmed] == [True]


def test_every_group_above_us_counts(tree: Tree) -> None:
    """The nearest first; the least of all is the memory there really is."""
    for group, limit in (("user.slice", 200), ("user.slice/app.service", 100)):
        tree.write(group, memory__max=str(limit * MIB), memory__current="0", memory__stat="a 0")
    assert [place.total_bytes for place in tree.places()] == [100 * MIB, 200 * MIB]
    assert effective_memory_bytes(tree.membership, tree.root) == 100 * MIB


def test_a_v1_group_counts_with_the_groups_below_it(tree: Tree) -> None:
    """Its usage does, so its page cache must: the fields that begin with total_."""
    tree.membership.write_text("4:memory:/docker/x\n1:name=systemd:/\n0::/\n")
    tree.write(
        "memory/docker/x",
        memory__limit_in_bytes=str(100 * MIB),
        memory__usage_in_bytes=str(90 * MIB),
        memory__stat=f"inactive_file 0\ntotal_inactive_file {20 * MIB}\n"
        f"active_file 0\ntotal_active_file {10 * MIB}\n",
    )
    (place,) = tree.places()
    assert (place.total_bytes, place.available_bytes) == (100 * MIB, 35 * MIB)


@pytest.mark.parametrize("usage", ["", "max", "-"])
def test_what_cannot_be_read_sets_no_limit(tree: Tree, usage: str) -> None:
    """A half-readable group is left out; one that is over its limit has nothing left, not less."""
    tree.write("user.slice", memory__max=str(MIB), memory__current=usage, memory__stat="a 0\n")
    assert tree.places() == []
    tree.write("user.slice", memory__current=str(3 * MIB))
    assert [place.available_bytes for place in tree.places()] == [0]
    tree.membership.unlink()
    assert tree.places() == []


def test_a_limit_above_the_hosts_memory_is_none(tree: Tree) -> None:
    """As v1 writes it where nobody set one."""
    tree.write("user.slice", memory__max=str(1 << 62), memory__current="5", memory__stat="a 0")
    assert tree.places() == []
    assert effective_memory_bytes(tree.membership, tree.root) == psutil.virtual_memory().total


def test_alarms_are_wanted_of_the_host_our_own_group_and_those_with_a_limit(tree: Tree) -> None:
    """Others above us, without a limit, stall for reasons that the host's file tells as well."""
    tree.host_stalls.write_text(STALLS)
    for group in ("", "user.slice", "user.slice/app.service"):
        tree.write(group, memory__pressure=STALLS)
    own = tree.root / "user.slice" / "app.service" / "memory.pressure"
    assert stall_files(tree.membership, tree.root, tree.host_stalls) == [tree.host_stalls, own]
    tree.write("user.slice", memory__max=str(MIB))
    wanted = [tree.host_stalls, own, tree.root / "user.slice" / "memory.pressure"]
    assert stall_files(tree.membership, tree.root, tree.host_stalls) == wanted


READ = """
from dgcached.host_memory import read_places
ballast = bytearray(b"x") * int(sys.argv[1])
for place in read_places()[1:]:
    print(place.name, place.total_bytes, place.available_bytes)
"""


@pytest.mark.root
def test_a_real_group_is_read_as_the_kernel_has_it() -> None:
    """A process in a group of 100 MiB that touched 40 MiB sees that limit, and what it leaves."""
    with memory_group(100 * MIB) as group:
        join = f"open({str(group.path / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        with script_running(None, join + READ, 40 * MIB) as process:
            said, complaint = process.communicate(timeout=20)
        assert process.returncode == 0, complaint
    (line,) = [line for line in said.splitlines() if str(group.path) in line]
    total, available = map(int, line.split()[-2:])
    assert total == 100 * MIB
    assert 40 * MIB <= available <= 60 * MIB
