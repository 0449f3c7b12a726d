"""The findings for people: as tables of 80 columns for a terminal, and as a Markdown document."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from dgcache_cli.bench.findings import JUDGED, Findings, Found, Spread, Timing, Verdict
from dgcache_cli.bench.implementations import BASELINE, CHECKED_BASELINE
from dgcache_cli.output import print_fields, print_table

_JUDGED_AS = {
    (BASELINE, "write"): "write",
    (BASELINE, "path"): "path",
    (BASELINE, "last_byte"): "bytes",
    (CHECKED_BASELINE, "path"): "path*",
    (CHECKED_BASELINE, "last_byte"): "bytes*",
}
_TIMES = ("write", "path", "bytes", "shared")
_MATRIX = ("implementation", "security", "performance", "complexity", "breaking")

Row = tuple[str, ...]


def print_findings(findings: Findings) -> None:
    """Print everything that fits."""
    for index, size_mb in enumerate(findings.sizes_mb):
        print(f"{size_mb:g} MB, median of {findings.runs}")
        print_table(("", *_TIMES), [*_times(findings, index)])
        print(f"times v5's; the target is less than {findings.target:.2f}x")
        print_table(("", *_JUDGED_AS.values()), [*_ratios(findings, size_mb)])
    print_fields(_COLUMNS)
    print()
    print_table(("withstood", *_numbers(findings), "warm"), [*_withstood(findings)])
    print_fields([*zip(_numbers(findings), _checks(findings), strict=True), _WARM])
    print()
    print_table(_MATRIX, [*_matrix(findings)])
    print_fields([(one.title, one.port_calls.why) for one in findings.implementations])
    print(target_met(findings))


def target_met(findings: Findings) -> str:
    """Say in one sentence how often the target was met by dg-cached itself."""
    own = [one for one in findings.verdicts if one.implementation in _OWN]
    return (
        f"Less than 10 % slower than v5: met in {sum(one.met for one in own)} of {len(own)} "
        "comparisons of dg-cached."
    )


_COLUMNS = [
    ("write", "a file is kept"),
    ("path", "a read of what nobody holds, until there is a path that xdelta3 can open"),
    ("bytes", "the same, until the last byte is read through it"),
    ("shared", "a read to the path while somebody else holds the reference"),
    ("*", "against v5 with has_ref, as DeltaGlider 5.0.0's service used it"),
]
_OWN = ("memory", "filesystem", "disk", "daemon")
_WARM = ("warm", "a process that comes later finds the reference")


def document(findings: Findings, chart: str | None) -> str:
    """Return the findings as Markdown; `chart` is a link relative to the document."""
    return "\n".join(_document(findings, chart)) + "\n"


def _document(findings: Findings, chart: str | None) -> Iterator[str]:
    yield from (
        "# Implementations",
        "",
        f"Written by `dg-cache bench` on {datetime.now(UTC):%Y-%m-%d}; `make bench` writes it "
        "anew. Nothing here is written by hand.",
        "",
        *_markdown(("", ""), [*findings.machine.items()]),
        "",
        f"Medians of {findings.runs} rounds, all in one run and in turn, A B C A B C; the least "
        "and the most stand beside them. 1 MB is 1,000,000 bytes; data is random; files are in the "
        "page cache. A *write* keeps a file. A *read* goes from the need for a reference that "
        "nobody holds to a *path* that xdelta3 can open, and on to the *last byte* read through "
        "it (*bytes*). *Shared* is a read up to the path while somebody else holds the reference.",
        "",
        *_markdown(
            ("implementation", "what it does"),
            [(one.title, one.about) for one in findings.implementations],
        ),
        "",
        "The first five are small re-implementations, written for this comparison.",
    )
    if chart is not None:
        yield from ("", f"![Times by implementation and size]({chart})")
    yield from ("", "## Times")
    for index, size_mb in enumerate(findings.sizes_mb):
        yield from ("", f"### {size_mb:g} MB", "")
        yield from _markdown(("", *_TIMES), [*_times(findings, index, spread=True)], numbers=True)
    yield from _target(findings)
    yield from _security(findings)
    yield from _decisions(findings)


def _target(findings: Findings) -> Iterator[str]:
    yield from (
        "",
        "## The target: less than 10 % slower than v5",
        "",
        f"{target_met(findings)} Each figure is the time over v5's in the same round, less than "
        f"{findings.target:.2f}x to meet the target. v5's path is handed out unchecked, in "
        "microseconds whatever the size, so that whoever checks a byte misses the target there. "
        "The columns with * compare with v5 as DeltaGlider 5.0.0's service used it: `has_ref` "
        "hashed the file each time.",
    )
    for size_mb in findings.sizes_mb:
        yield from ("", f"### {size_mb:g} MB, against v5", "")
        heads = ("", *_JUDGED_AS.values())
        yield from _markdown(heads, [*_ratios(findings, size_mb, emphasis="**")], numbers=True)


def _security(findings: Findings) -> Iterator[str]:
    heads = ("implementation", *_numbers(findings), "warm")
    yield from (
        "",
        "## What they withstood",
        "",
        "Each was really tried, on a process of its own with the umask 022, by a process of the "
        "same user unless another user is named.",
        "",
        *(f"{number}. {name}" for number, name in enumerate(_checks(findings), 1)),
        "",
        f"*Warm*: {_WARM[1]}. That is no matter of security, and what a daemon is for.",
        "",
        *_markdown(heads, [*_withstood(findings)]),
        "",
        "What happened:",
        "",
        *(
            f"- {one.title}, {check.name}: {'passed' if check.passed else '**failed**'}; "
            f"{check.how}"
            for one in findings.implementations
            for check in one.checks
        ),
    )


def _decisions(findings: Findings) -> Iterator[str]:
    yield from (
        "",
        "## Decision matrix",
        "",
        "The roadmap's, with figures in the place of stars. Security: how many of the checks above "
        f"it passes. Performance: reads of {_matrix_size(findings):g} MB to the last byte, and "
        "their time over v5's. Complexity: lines of code, without comments and docstrings, of all "
        "that it needs of this project. Breaking: whether a call of DeltaGlider 6.2's cache port "
        "fails; each was made.",
        "",
        *_markdown(_MATRIX, [*_matrix(findings)]),
        "",
        *(f"- {one.title}: {one.port_calls.why}" for one in findings.implementations),
    )


def _times(findings: Findings, index: int, *, spread: bool = False) -> Iterator[Row]:
    for one in findings.implementations:
        timing = one.timings[index]
        yield (one.title, *(_shown(taken, spread) for taken in _taken(timing)))


def _taken(timing: Timing) -> Sequence[Spread | None]:
    return (timing.write_ms, timing.path_ms, timing.last_byte_ms, timing.shared_ms)


def _shown(taken: Spread | None, spread: bool) -> str:
    if taken is None:
        return "-"
    around = f" ({_digits(taken.low)} to {_digits(taken.high)})" if spread else ""
    return f"{_digits(taken.median)} ms{around}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratios(findings: Findings, size_mb: float, emphasis: str = "") -> Iterator[Row]:
    for one in findings.implementations:
        judged = [
            findings.ratio(one.name, size_mb, operation, baseline) for baseline, operation in JUDGED
        ]
        if any(judged):
            yield (one.title, *(_judged(verdict, emphasis) for verdict in judged))


def _judged(verdict: Verdict | None, emphasis: str) -> str:
    if verdict is None:
        return "-"
    times = f"{_times_v5(verdict)} "
    return f"{times}met" if verdict.met else f"{times}{emphasis}no{emphasis}"


def _times_v5(verdict: Verdict) -> str:
    return f"{verdict.ratio:.0f}x" if verdict.ratio >= 100 else f"{verdict.ratio:.2f}x"


def _checks(findings: Findings) -> list[str]:
    return [check.name for check in findings.implementations[0].checks]


def _numbers(findings: Findings) -> list[str]:
    return [str(number) for number, _ in enumerate(_checks(findings), 1)]


def _withstood(findings: Findings) -> Iterator[Row]:
    for one in findings.implementations:
        warm = "yes" if one.warm_for_next_process else "no"
        yield (one.title, *("yes" if check.passed else "NO" for check in one.checks), warm)


def _matrix(findings: Findings) -> Iterator[Row]:
    for one in findings.implementations:
        passed = sum(check.passed for check in one.checks)
        yield (
            one.title,
            f"{passed} of {len(one.checks)}",
            _performance(findings, one),
            f"{one.code_lines} lines",
            {True: "no", False: "yes", None: "not tried"}[one.port_calls.work],
        )


def _performance(findings: Findings, one: Found) -> str:
    size_mb = _matrix_size(findings)
    timing = next(timing for timing in one.timings if timing.size_mb == size_mb)
    verdict = findings.ratio(one.name, size_mb, "last_byte", BASELINE)
    against = f", {_times_v5(verdict)}" if verdict is not None else ""
    return f"{timing.read_mb_per_s:.0f} MB/s{against}"


def _matrix_size(findings: Findings) -> float:
    """Return 100 MB, or the largest size there is."""
    return 100 if 100 in findings.sizes_mb else max(findings.sizes_mb)


def _markdown(heads: Sequence[str], rows: Sequence[Row], *, numbers: bool = False) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1) if numbers else ' --- |' * (len(heads) - 1)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
