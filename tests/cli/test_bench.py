"""`dg-cache bench` as a user meets it: what it finds, what it draws, and that nothing is left."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgcache_cli.bench.attacks import lets_others_read
from dgcache_cli.bench.code_lines import code_lines
from dgcache_cli.bench.place import require_room
from dgcache_core.errors import CacheFullError
from tests.support.wire import eventually

ROOT = Path(__file__).parents[2]
DELTAGLIDER = ROOT / ".venv-deltaglider" / "bin" / "python"
NAMES = [
    *("v5", "v5-checked", "sha-at-use", "plain-memory", "fernet"),
    *("memory", "filesystem", "disk", "daemon"),
]
OURS = NAMES[5:]
ENDLESS = ("--sizes", ",".join(f"0.0{n}" for n in range(10, 40)), "--runs", "1000")
CHANGED_FILE = "a changed file is not served"
CHANGED_PATH = "a path cannot change once validated"
OTHER_DIGEST = "another digest is not served"
AT_REST = "no plaintext on disk after a put"
AFTER_EVICT = "no plaintext on disk after an evict"
AFTER_KILL = "no plaintext on disk after kill -9"
OTHER_USERS = "other users cannot read it"


class Bench:
    """Runs `dg-cache bench` with its temporary directory and its home below one directory."""

    def __init__(self, base: Path) -> None:
        self.home = base / "h"
        self.temporary = base / "t"
        for directory in (self.home, self.temporary):
            directory.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DG_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "COLUMNS": "80",
            # a daemon of the user's that must not be touched, and a setting that must not matter
            "DG_CACHE_SOCKET_DIR": str(base / "users"),
            "DG_CACHE_BACKEND": "memory",
        }

    def start(self, *words: str | Path, stderr: int, python: str | Path = sys.executable) -> Any:
        return subprocess.Popen(
            [str(python), "-m", "dgcache_cli", "bench", *map(str, words)],
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )

    def __call__(self, *words: str | Path, status: int = 0, **given: Any) -> tuple[str, str]:
        process = self.start(*words, stderr=subprocess.PIPE, **given)
        out, error = process.communicate(timeout=300)
        assert process.returncode == status, error.decode()
        return out.decode(), error.decode()

    def processes(self) -> list[str]:
        """Return the command lines of processes that have this bench's directory in them."""
        found = []
        for process in Path("/proc").glob("[1-9]*"):
            try:
                words = (process / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(self.temporary) in words:
                found.append(words)
        return found

    def left(self) -> list[Path]:
        return list(self.temporary.iterdir())


@pytest.fixture
def bench(short_directory: Path) -> Bench:
    return Bench(short_directory)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


@pytest.fixture(scope="module")
def findings(base: Path) -> dict[str, Any]:
    """What one run found, as JSON."""
    bench = Bench(base)
    words = ("--sizes", "0.1,0.02", "--runs", "2", "--json", "--deltaglider", DELTAGLIDER)
    out, error = bench(*words)
    assert error == ""
    assert bench.left() == []
    assert bench.processes() == []
    assert not (base / "users").exists()
    found: dict[str, Any] = json.loads(out)
    return found


def checks(findings: dict[str, Any], name: str) -> dict[str, bool]:
    (one,) = [one for one in findings["implementations"] if one["name"] == name]
    return {check["name"]: check["passed"] for check in one["checks"]}


def test_every_implementation_is_measured_at_every_size(findings: dict[str, Any]) -> None:
    """In milliseconds, in order: the path comes before the last byte."""
    assert [one["name"] for one in findings["implementations"]] == NAMES
    for one in findings["implementations"]:
        assert [timing["size_mb"] for timing in one["timings"]] == [0.02, 0.1]
        for timing in one["timings"]:
            assert timing["write_ms"]["median"] > 0
            for end in ("low", "median", "high"):
                assert 0 < timing["path_ms"][end] < timing["last_byte_ms"][end] < 10_000
            assert (timing["shared_ms"] is not None) == (one["name"] in OURS)
        assert one["code_lines"] > 10
    lines = {one["name"]: one["code_lines"] for one in findings["implementations"]}
    assert lines["v5"] < lines["fernet"] < lines["memory"] < lines["daemon"]


def test_the_target_is_judged_per_size_for_reads_and_writes(findings: dict[str, Any]) -> None:
    """Less than 1.10 times v5's time, for each implementation but the two that are v5."""
    verdicts = findings["verdicts"]
    judged = {
        (one["implementation"], one["size_mb"], one["baseline"], one["operation"])
        for one in verdicts
    }
    operations = [("v5", "write"), ("v5", "path"), ("v5", "last_byte")]
    operations += [("v5-checked", "path"), ("v5-checked", "last_byte")]
    assert judged == {
        (name, size, *operation)
        for name in NAMES[2:]
        for size in (0.02, 0.1)
        for operation in operations
    }
    assert len(verdicts) == len(judged)
    assert all(one["met"] == (one["ratio"] < 1.10) for one in verdicts)
    assert not any(
        one["met"]
        for one in verdicts
        if one["implementation"] == "fernet" and one["baseline"] == "v5"
    )


def test_v5_fails_where_it_is_known_to_fail(findings: dict[str, Any]) -> None:
    """Unchecked, it serves what somebody changed; with has_ref, what is changed after."""
    unchecked, checked = checks(findings, "v5"), checks(findings, "v5-checked")
    for name in (CHANGED_FILE, OTHER_DIGEST, CHANGED_PATH, AT_REST, AFTER_KILL, OTHER_USERS):
        assert unchecked[name] is False, name
    assert unchecked[AFTER_EVICT] is True
    assert (checked[CHANGED_FILE], checked[OTHER_DIGEST]) == (True, True)
    assert checked[CHANGED_PATH] is False


def test_hashing_and_encrypting_help_until_the_path_is_handed_out(
    findings: dict[str, Any],
) -> None:
    """A file that was validated can be changed, and stays when its process is killed."""
    for name in ("sha-at-use", "plain-memory", "fernet"):
        found = checks(findings, name)
        assert (found[CHANGED_FILE], found[OTHER_DIGEST], found[OTHER_USERS]) == (True,) * 3
        assert (found[CHANGED_PATH], found[AFTER_KILL]) == (False, False)
    assert checks(findings, "fernet")[AT_REST] is True
    assert checks(findings, "sha-at-use")[AFTER_EVICT] is False


@pytest.mark.parametrize("name", OURS)
def test_dg_cached_withstands_everything(findings: dict[str, Any], name: str) -> None:
    """In process and as a daemon."""
    assert set(checks(findings, name).values()) == {True}
    assert len(checks(findings, name)) == 8


def test_only_what_is_shared_is_warm_for_the_next_process(findings: dict[str, Any]) -> None:
    """v5's directory, and the daemon."""
    warm = {one["name"] for one in findings["implementations"] if one["warm_for_next_process"]}
    assert warm == {"v5", "v5-checked", "daemon"}


def test_deltaglider_s_calls_are_made(findings: dict[str, Any]) -> None:
    """On dg-cached in DeltaGlider's environment, with its adapter."""
    calls = {one["name"]: one["port_calls"] for one in findings["implementations"]}
    for name in ("sha-at-use", "plain-memory", *OURS):
        assert calls[name] == {"work": True, "why": "all 6 calls were made"}
    assert calls["v5"] == {"work": False, "why": "has no get_validated_ref, clear"}
    assert calls["fernet"]["work"] is False
    assert "downloads again" in calls["fernet"]["why"]


def test_people_get_tables_a_document_and_a_chart(bench: Bench) -> None:
    """In 80 columns; progress is on the terminal that standard error is."""
    controller, terminal = pty.openpty()
    words = ("--sizes", "0.1", "--runs", "1", "--report", "r.md", "--chart", "c.svg")
    process = bench.start(*words, stderr=terminal)
    os.close(terminal)
    drawn = bytearray()
    try:
        while piece := os.read(controller, 1 << 16):
            drawn += piece
    except OSError:  # EIO: nobody has the terminal open any more (pty(7))
        pass
    finally:
        os.close(controller)
    text = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, drawn.decode(errors="replace")
    assert b"27/27" in drawn
    assert max(map(len, text.splitlines())) <= 80
    report, chart = (bench.home / "r.md").read_text(), (bench.home / "c.svg").read_text()
    for title in ("v5 filesystem", "Fernet files", "dg-cached daemon"):
        assert text.count(title) >= 4
        assert report.count(title) >= 4
        assert title in chart
    assert "](c.svg)" in report
    assert "## Decision matrix" in report
    assert "the changed bytes were served" in report
    assert "not tried: it needs DeltaGlider" in text
    assert "Less than 10 % slower than v5: met in " in text
    assert chart.lstrip().startswith("<?xml")
    assert bench.left() == []


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGINT, "daemon/s/session.sock"),
        (signal.SIGTERM, "daemon/s/session.sock"),
        (signal.SIGTERM, "attacked-v5/reference_cache"),
    ],
    ids=["SIGINT-measures", "SIGTERM-measures", "SIGTERM-attacks"],
)
def test_a_signal_leaves_nothing_behind(bench: Bench, number: signal.Signals, stage: str) -> None:
    """While it measures and while it attacks: no file, no daemon, 128 plus the signal's number."""
    words = ("--sizes", "0.001", "--runs", "1") if stage.startswith("attacked") else ENDLESS
    process = bench.start(*words, "--report", "r.md", stderr=subprocess.PIPE)
    try:
        eventually(lambda: list(bench.temporary.glob(f"dgb-*/{stage}")), 60)
        assert bench.processes() != []
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        eventually(lambda: not bench.processes(), 60)  # what stands by clears up after a failure
    assert (process.returncode, out) == (128 + number, b"")
    assert error.decode() == f"dg-cache: {number.name}: what was made is removed\n"
    assert bench.left() == []
    assert bench.processes() == []
    assert not (bench.home / "r.md").exists()


def test_a_bench_that_is_killed_is_cleared_up_after(bench: Bench) -> None:
    """By a process that stands by: the daemon ends, the directory goes."""
    process = bench.start(*ENDLESS, stderr=subprocess.PIPE)
    eventually(lambda: list(bench.temporary.glob("dgb-*/daemon/s/session.sock")), 60)
    process.kill()
    process.communicate(timeout=60)
    eventually(lambda: not bench.left() and not bench.processes(), 60)


def test_a_chart_without_matplotlib_says_how_to_install_it(bench: Bench) -> None:
    """DeltaGlider's environment has none; it is said before anything is measured."""
    out, error = bench("--chart", "c.svg", status=69, python=DELTAGLIDER)
    assert out == ""
    assert error == "dg-cache: --chart needs matplotlib: pip install 'dg-cached[bench]'\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--chart", "c.gif"), ".svg or .png"),
        (("--chart", "missing/c.svg"), "cannot write missing/c.svg"),
        (("--report", "."), "cannot write ."),
        (("--sizes", "1,x"), "is no list such as 1,10,100"),
        (("--sizes", "0"), "sizes are from"),
        (("--runs", "0"), "must be a number from 1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(bench: Bench, words: tuple[str, ...], said: str) -> None:
    """As usage."""
    out, error = bench(*words, status=2)
    assert out == ""
    assert said in error
    assert "Traceback" not in error


def test_more_than_there_is_room_for_is_refused() -> None:
    """Before a byte is written; the message says of what there is too little."""
    with pytest.raises(CacheFullError, match=r"needs \d+ MB of .*choose smaller --sizes"):
        require_room(1 << 60)
    require_room(1000)


def test_no_other_command_loads_the_bench() -> None:
    """Start-up time is a feature."""
    program = (
        "import sys; from dgcache_cli.main import make_parser; make_parser();"
        "print([m for m in sys.modules if m.startswith('dgcache_cli.bench') or m in"
        " ('psutil', 'statistics', 'matplotlib', 'cryptography')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_lines_of_code_are_lines_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No blank line, comment or docstring; what is imported of the project counts, and once."""
    package = tmp_path / "dgcached"
    package.mkdir()
    (package / "__init__.py").write_text('"""Nothing."""\n')
    (package / "one.py").write_text(
        '"""Two\n\nlines."""\n\nimport os\n\nfrom dgcached.two import x  # why\n\n\n'
        'def f():\n    """Doc."""\n    # comment\n    return """two\nlines"""\n'
    )
    (package / "two.py").write_text("import dgcached.one\nx = [\n    1,\n]\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "dgcached"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    assert code_lines(["dgcached.one"]) == 5 + 4


def test_modes_tell_whether_others_can_read(tmp_path: Path) -> None:
    """From the place on; what keeps others out further up is not the implementation's merit."""
    tmp_path.chmod(0o700)
    place = tmp_path / "place"
    inner = place / "inner"
    inner.mkdir(parents=True)
    (inner / "file").write_bytes(b"x")
    for directory in (place, inner):
        directory.chmod(0o711)
    (inner / "file").chmod(0o644)
    assert lets_others_read(place, "inner/file")
    (inner / "file").chmod(0o640)
    assert not lets_others_read(place, "inner/file")
    (inner / "file").chmod(0o644)
    inner.chmod(0o700)
    assert not lets_others_read(place, "inner/file")
    with (inner / "file").open("rb") as file:
        assert not lets_others_read(place, f"/proc/{os.getpid()}/fd/{file.fileno()}")
