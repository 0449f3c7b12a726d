"""Counts what a client sends beside its calls: PING, SETTINGS, RST_STREAM and the like.

Each is a few bytes for its sender and work for gRPC, which answers every one and goes on reading
while its answers wait for a client that takes none: twenty thousand pings of ten such clients keep
it busy for seconds. So the relay walks over the frames (RFC 9113, 4.1), reads nothing but their
heads, and tells when there are too many. gRPC's own limits bound headers, data and windows.
"""

from dgcache_core.clock import boottime_seconds

_PREFACE_BYTES = 24
_HEAD_BYTES = 9
_NOT_COUNTED = frozenset({0x0, 0x1, 0x8})
"""DATA, HEADERS, WINDOW_UPDATE (RFC 9113, 6)."""


class ControlFrames:
    """The frames of one connection, as they come in pieces of any size."""

    def __init__(self, per_second: int) -> None:
        """Allow so many at once, and again every second."""
        self._per_second = per_second
        self._left = float(per_second)
        self._at = boottime_seconds()
        self._skip = _PREFACE_BYTES
        self._head = b""

    def too_many(self, data: bytes) -> bool:
        """Walk over what came next, and tell whether it is over the limit."""
        now = boottime_seconds()
        earned = (now - self._at) * self._per_second
        self._left, self._at = min(self._per_second, self._left + earned), now
        position = 0
        while position < len(data) and self._left >= 0:
            position = self._step(data, position)
        return self._left < 0

    def _step(self, data: bytes, position: int) -> int:
        """Go on behind a payload, or to the end of a head."""
        if self._skip:
            skipped = min(self._skip, len(data) - position)
            self._skip -= skipped
            return position + skipped
        more = data[position : position + _HEAD_BYTES - len(self._head)]
        self._head += more
        if len(self._head) == _HEAD_BYTES:
            self._skip = int.from_bytes(self._head[:3], "big")
            self._left -= self._head[3] not in _NOT_COUNTED
            self._head = b""
        return position + len(more)
