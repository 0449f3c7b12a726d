"""Lines of the log that a client can cause as often as it likes: at most one of a kind a second.

The first is written at once. What follows within a second is counted; one line at its end has the
count and what was different about the last of them.

Used from the event loop alone.
"""

from dgcached.logs import event
from dgcached.windows import Windows

SECONDS = 1.0

_Kind = tuple[int, str, tuple[tuple[str, object], ...]]


class Repeated:
    """Writes such lines until it is closed."""

    def __init__(self) -> None:
        self._windows: Windows[_Kind, dict[str, object]] = Windows(
            SECONDS, SECONDS, tell=_write, tell_further=_write_further
        )

    def event(
        self, level: int, name: str, /, *, of: dict[str, object] | None = None, **same: object
    ) -> None:
        """Log an event, now or within a second.

        Args:
            level: as logging has it.
            name: of the event.
            of: fields that differ each time, such as a pid.
            same: fields that tell kinds apart; their values are few and ours.
        """
        self._windows.take((level, name, tuple(same.items())), of or {})

    def close(self) -> None:
        """Write what is not written yet."""
        self._windows.close()


def _write(kind: _Kind, of: dict[str, object]) -> None:
    level, name, same = kind
    event(level, name, **dict(same), **of)


def _write_further(kind: _Kind, of: dict[str, object], times: int) -> None:
    level, name, same = kind
    last = {f"last_{field}": value for field, value in of.items()}
    event(level, name, **dict(same), **last, times=times)
