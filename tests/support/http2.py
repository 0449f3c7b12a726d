"""A peer that speaks HTTP/2 frame by frame, also what no client library would let it say."""

import select
import socket
import time
from pathlib import Path

from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from dgcache_core.runtime_directory import RPC_SOCKET
from tests.support.wire import SECONDS, connected

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = SettingsFrame().serialize()
SERVICE = "/dgcache.v1.ReferenceCache/"
_CANCEL = 8  # RFC 9113, 7
_WHOLE_WINDOW = (1 << 31) - 1


def ping(number: int = 0) -> bytes:
    """Return a PING."""
    return PingFrame(opaque_data=number.to_bytes(8, "big")).serialize()


def message(raw: bytes) -> bytes:
    """Return a gRPC message with its prefix, not compressed."""
    return b"\0" + len(raw).to_bytes(4, "big") + raw


def data(stream: int, raw: bytes, *, ends: bool) -> bytes:
    """Return a DATA frame with one gRPC message."""
    return DataFrame(stream, message(raw), flags=["END_STREAM"] if ends else []).serialize()


def half_a_message(stream: int) -> bytes:
    """Return a DATA frame with the beginning of a gRPC message of a kibibyte."""
    return DataFrame(stream, message(bytes(1 << 10))[:100]).serialize()


def reset(stream: int) -> bytes:
    """Return a RST_STREAM that cancels."""
    return RstStreamFrame(stream, error_code=_CANCEL).serialize()


class Http2Peer:
    """One raw connection to rpc.sock. It sends what it is told and reads only when it is told."""

    def __init__(self, directory: Path, *, settings: bytes = SETTINGS, says: bool = True) -> None:
        """Connect, and send the preface and these settings unless it says nothing."""
        self._encoder = Encoder()
        self.connection = connected(str(directory / RPC_SOCKET), socket.SOCK_STREAM)
        if says:
            self.connection.sendall(PREFACE + settings)

    def headers(self, stream: int, method: str, *more: tuple[str, str]) -> bytes:
        """Return the HEADERS that open a call."""
        block = self._encoder.encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", SERVICE + method),
                (":authority", "local"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *more,
            ]
        )
        return HeadersFrame(stream, block, flags=["END_HEADERS"]).serialize()

    def pump(self, flood: bytes, seconds: float = SECONDS) -> bool:
        """Send all of it, reading and dropping what comes; tell whether the daemon hung up."""
        self.connection.setblocking(False)
        left, deadline = memoryview(flood), time.monotonic() + seconds
        try:
            while left:
                assert time.monotonic() < deadline, f"{len(left)} bytes were never taken"
                readable, writable, _ = select.select([self.connection], [self.connection], [], 1)
                if readable and not self.connection.recv(1 << 16):
                    return True
                if writable:
                    left = left[self.connection.send(left[: 1 << 16]) :]
            return False
        except (BrokenPipeError, ConnectionResetError):
            return True
        finally:
            self.connection.settimeout(SECONDS)

    def hung_up_on(self, seconds: float = SECONDS) -> bool:
        """Read until the daemon closes; False if it did not within that time."""
        deadline = time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    return True
        except ConnectionResetError:
            return True
        except TimeoutError:
            pass
        return False

    def frames(self, seconds: float = 1.0) -> list[Frame]:
        """Read what comes within a moment, and return the frames that are whole."""
        received, deadline = b"", time.monotonic() + seconds
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not (piece := self.connection.recv(1 << 16)):
                    break
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
        frames = []
        while len(received) >= 9:
            frame, length = Frame.parse_frame_header(memoryview(received[:9]))
            if len(received) < 9 + length:
                break
            frame.parse_body(memoryview(received[9 : 9 + length]))
            frames.append(frame)
            received = received[9 + length :]
        return frames

    def close(self) -> None:
        """Hang up."""
        self.connection.close()

    def __enter__(self) -> "Http2Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def greedy_settings() -> bytes:
    """Return settings by which the daemon may send everything at once, on every stream."""
    settings = SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: _WHOLE_WINDOW})
    window = WindowUpdateFrame(0, window_increment=_WHOLE_WINDOW - 65_535)
    return settings.serialize() + window.serialize()
