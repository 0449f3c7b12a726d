"""The kernel's alarms for memory stalls: PSI triggers on the host's file and on our groups'.

An ordinary user may set a trigger whose window is a multiple of two seconds (Linux 6.5; before that
it took CAP_SYS_RESOURCE). Where none can be set there is no alarm, and `armed` says so.
See Documentation/accounting/psi.rst.
"""

import asyncio
import os
import select
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

_TRIGGER = b"some 150000 2000000\0"
"""Microseconds: some process waited for memory for 150 ms of 2 s. At most one alarm a window."""


class StallAlarms:
    """Triggers on some PSI files; each lives as long as its descriptor is open.

    A PSI file can always be read, and only POLLPRI means an alarm, which an event loop does not
    tell apart. So each is in an epoll instance of its own, which is readable when it goes off.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        """Set a trigger on each file where that is allowed."""
        self._alarms: dict[Path, tuple[int, select.epoll]] = {}
        for file in files:
            with suppress(OSError):  # no permission, read-only, or a kernel that takes no trigger
                self._alarms[file] = _armed(file)

    @property
    def armed(self) -> frozenset[Path]:
        """The files whose stalls the kernel tells us of."""
        return frozenset(self._alarms)

    def start(self, on_alarm: Callable[[Path], None]) -> None:
        """Call back in this event loop when one goes off."""

        def gone_off(file: Path, poll: select.epoll) -> None:
            poll.poll(0)  # the loop's own look took the alarm off the file; this ends the rest
            on_alarm(file)

        loop = asyncio.get_running_loop()
        for file, (_, poll) in self._alarms.items():
            loop.add_reader(poll.fileno(), gone_off, file, poll)

    def stop(self) -> None:
        """Take every trigger back; in the event loop that watches them."""
        loop = asyncio.get_running_loop()
        while self._alarms:
            descriptor, poll = self._alarms.popitem()[1]
            loop.remove_reader(poll.fileno())
            poll.close()
            os.close(descriptor)


def _armed(file: Path) -> tuple[int, select.epoll]:
    poll = select.epoll()
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(descriptor, _TRIGGER)
            poll.register(descriptor, select.EPOLLPRI)
        except OSError:
            os.close(descriptor)
            raise
    except OSError:
        poll.close()
        raise
    return descriptor, poll
