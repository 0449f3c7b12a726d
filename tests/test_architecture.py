"""The picture of the house is true: who imports whom, and what is loaded when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.descriptor_module import descriptor_module

ROOT = Path(__file__).parent.parent
ROOMS = {
    "proto/dgcache_proto": set(),
    "core/dgcache_core": set(),
    "daemon/dgcached": {"dgcache_proto", "dgcache_core"},
    "client/dgcache": {"dgcache_proto", "dgcache_core"},
    "cli/dgcache_cli": {"dgcache", "dgcache_core"},
}
OURS = {folder.split("/")[1] for folder in ROOMS}


def imported_names(path: Path) -> set[str]:
    """Return the top-level names a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_imports_only_what_it_may(folder: str) -> None:
    """proto and core stand alone; daemon and client never meet; cli stands on client."""
    own = folder.split("/")[1]
    modules = list((ROOT / folder).rglob("*.py"))
    assert modules
    for module in modules:
        foreign = (imported_names(module) & OURS) - ROOMS[folder] - {own}
        assert not foreign, f"{module.relative_to(ROOT)} imports {foreign}"


def test_core_has_no_grpc_no_environment_and_no_network() -> None:
    """Entry points read the environment; sockets are for daemon and client.

    `peers` is the exception: it reads the credentials of a socket that somebody else made.
    """
    for module in (ROOT / "core").rglob("*.py"):
        names = imported_names(module)
        assert not names & {"grpc", "asyncio", "http", "urllib"}, module
        assert "os.environ" not in module.read_text(), module
        if module.name != "peers.py":
            assert "socket" not in names, module


def test_only_entry_points_read_the_environment() -> None:
    """Everybody else is told."""
    readers = {
        str(path.relative_to(ROOT))
        for folder in ROOMS
        for path in (ROOT / folder).rglob("*.py")
        if "os.environ" in path.read_text()
    }
    assert readers == {
        "cli/dgcache_cli/commands/bench.py",
        "cli/dgcache_cli/commands/cleanup.py",
        "cli/dgcache_cli/commands/daemon.py",
        "cli/dgcache_cli/commands/deltaglider.py",
        "cli/dgcache_cli/commands/doctor.py",
        "cli/dgcache_cli/commands/install.py",
        "cli/dgcache_cli/commands/setup.py",
        "cli/dgcache_cli/commands/uninstall.py",
        "cli/dgcache_cli/main.py",
        "client/dgcache/cache.py",
        "client/dgcache/connecting.py",
        "client/dgcache/settings.py",
        "client/dgcache/testing.py",
        "daemon/dgcached/logs.py",
        "daemon/dgcached/main.py",
        "daemon/dgcached/supervisor.py",
    }


def test_no_folder_of_the_repository_is_a_package() -> None:
    """proto, core, daemon, client and cli are folders, not import names."""
    for folder in ROOMS:
        assert not (ROOT / folder).parent.joinpath("__init__.py").exists()


def test_the_stubs_are_what_the_proto_says(tmp_path: Path) -> None:
    """Generated anew, they are the same: `make proto` was not forgotten."""
    bin_ = Path(sys.executable).parent
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", ROOT / "proto"),
            f"--plugin=protoc-gen-mypy={bin_ / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={bin_ / 'protoc-gen-mypy_grpc'}",
            *(
                f"--{kind}_out={tmp_path}"
                for kind in ("python", "mypy", "grpc_python", "mypy_grpc")
            ),
            ROOT / "proto/dgcache_proto/v1/dgcache.proto",
        ],
        check=True,
        capture_output=True,
    )
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert len(generated) == 4
    for path in generated:
        assert (tmp_path / path).read_text() == (ROOT / "proto" / path).read_text(), path
    descriptor = (ROOT / "proto/dgcache_proto/v1/dgcache_descriptor.py").read_text()
    assert descriptor == descriptor_module()
