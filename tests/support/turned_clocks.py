"""A program whose clocks are turned while it runs, and nobody else's.

A small library, built here and preloaded (ld.so(8)), adds to what clock_gettime(2), gettimeofday(2)
and time(2) answer. The machine's own clocks are left alone. Suspend is what it looks like to a
program: CLOCK_BOOTTIME has moved on, CLOCK_MONOTONIC, by which poll(2) waits, has not.
"""

import mmap
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile const long long *turned;
__attribute__((constructor)) static void find(void) {
    const char *path = getenv("TURNED_CLOCKS");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *page = mmap(0, 16, PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) turned = page;
    close(file);
}
int clock_gettime(clockid_t which, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, which, now);
    if (!failed && turned && which == CLOCK_REALTIME) now->tv_sec += turned[0];
    if (!failed && turned && which == CLOCK_BOOTTIME) now->tv_sec += turned[1];
    return failed;
}
int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int failed = clock_gettime(CLOCK_REALTIME, &precise);
    (void)zone;
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return failed;
}
time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
"""


class TurnedClocks:
    """What the program's clocks are off by, in seconds."""

    def __init__(self, library: Path, offsets: Path, page: mmap.mmap) -> None:
        self.prefix = ("env", f"LD_PRELOAD={library}", f"TURNED_CLOCKS={offsets}")
        """Starts a program under these clocks."""
        self._page = page

    def turn(self, *, wall: int = 0, boot: int = 0) -> None:
        """Turn them by so much in all."""
        self._page[:16] = struct.pack("=qq", wall, boot)


@contextmanager
def turned_clocks(directory: Path) -> Iterator[TurnedClocks]:
    """Build the library there; skip the test where nothing compiles C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler: it builds the library that turns one process's clocks")
    library, source, offsets = (directory / name for name in ("turn.so", "turn.c", "offsets"))
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    offsets.write_bytes(bytes(16))
    with offsets.open("r+b") as file, mmap.mmap(file.fileno(), 16) as page:
        yield TurnedClocks(library, offsets, page)
