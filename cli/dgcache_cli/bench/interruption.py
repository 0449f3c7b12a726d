"""SIGINT, SIGTERM and SIGHUP as something to ask and to wait for between two steps.

A signal never raises in the middle of something: a daemon that is just starting would be left
behind. No step takes longer than one write or read of the largest reference, or its own deadline.
"""

import os
import signal
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):  # noqa: N818 - an answer, not an error
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number


class Interruption:
    """Notes the first signal while its block runs."""

    def __init__(self) -> None:
        self._number = 0
        self._receiver = self._sender = -1
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._receiver, self._sender = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # typeshed: what signal() gave
        os.close(self._receiver)
        os.close(self._sender)

    def fileno(self) -> int:
        """Return a descriptor that is readable once a signal came."""
        return self._receiver

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._number:
            raise Interrupted(self._number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._number:
            self._number = number
            os.write(self._sender, b"!")
