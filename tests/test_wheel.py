"""What users install: the wheel, in an environment of its own, used from an empty directory."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

_SCRIPT = """
import hashlib, subprocess, sys
import dgcache
for module in list(sys.modules.values()):
    file = getattr(module, "__file__", None) or ""
    assert not file.startswith(sys.argv[1]), f"{file} comes from the source tree"
with dgcache.open() as cache:
    assert cache.backend == "dg-cached", cache.backend
    digest = cache.put("bucket", "prefix", b"bytes")
    with cache.get("bucket", "prefix", digest) as reference:
        assert reference.read() == b"bytes"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, as a release would be."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
        timeout=110,
    )
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    """Packages, types, the contract, the units, the licence; no tests."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for wanted in (
        "dgcache_cli/units/dg-cached.socket",
        "dgcache_cli/units/dg-cached.service",
        "dgcache_cli/units/dg-cached@.socket",
        "dgcache_cli/units/dg-cached@.service",
        "dgcache_cli/units/dgcached.slice",
        "dgcache_cli/units/drop-ins/credential.conf",
        "dgcache_cli/units/drop-ins/disk-tier.conf",
        "dgcache_cli/units/drop-ins/no-user-namespaces.conf",
        "dgcache_proto/v1/dgcache.proto",
        "dgcache_proto/v1/dgcache_pb2.pyi",
        "dgcache/py.typed",
        "dgcache_core/py.typed",
        "dgcache_proto/py.typed",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    roots = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert roots == {"dgcache", "dgcache_cli", "dgcache_core", "dgcache_proto", "dgcached"}


def test_the_wheel_works_in_an_empty_environment(
    wheel: Path, short_directory: Path, tmp_path: Path
) -> None:
    """Its declared dependencies are enough to start, use, and stop it; the tree is out of reach."""
    venv.create(short_directory / "v", with_pip=True)
    python = short_directory / "v" / "bin" / "python"
    pinned = tmp_path / "pinned.txt"  # without hashes, which pip would then want for the wheel too
    lock = (ROOT / "constraints" / "project.txt").read_text().splitlines()
    pinned.write_text("\n".join(line.rstrip("\\ ") for line in lock if "==" in line.split(";")[0]))
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--constraint", pinned, wheel],
        check=True,
        timeout=110,
    )
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("DG_", "PYTHON"))},
        "DG_CACHE_SOCKET_DIR": str(short_directory / "s"),
        "DG_CACHE_CONNECT_TIMEOUT_MS": "10000",
        "HOME": str(short_directory),
        "XDG_CONFIG_HOME": "",
    }

    def run(*argv: str | Path) -> str:
        return subprocess.run(
            argv,
            env=environment,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    command = python.with_name("dg-cache")
    run(command, "start")
    try:
        run(python, "-W", "error", "-c", _SCRIPT, ROOT)
        assert "1 for 1 deltaspaces" in run(command, "status")
        run(command, "install", "--units-only")
    finally:
        run(command, "stop")
    service = short_directory / ".config/systemd/user/dg-cached.service"
    assert f'ExecStart="{python.with_name("dg-cached")}"' in service.read_text()
