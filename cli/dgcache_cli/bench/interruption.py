"""SIGINT, SIGTERM and SIGHUP as something to ask for between two steps.

A signal never raises in the middle of something: a daemon that is just starting would be left
behind. No step takes longer than one write or read of the largest reference, or its own deadline.
"""

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
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
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

    def check(self) -> None:
        """Raise Interrupted if a signal came."""
        if self._number:
            raise Interrupted(self._number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number = self._number or number
