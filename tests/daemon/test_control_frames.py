"""What a connection may send beside its calls, counted over frames in pieces of any size."""

import pytest

from dgcached.control_frames import ControlFrames
from tests.support.http2 import PREFACE, SETTINGS, data, ping
from tests.support.wire import eventually

ORDINARY = PREFACE + SETTINGS + data(1, bytes(60_000), ends=True) * 50


@pytest.mark.parametrize("piece", [1, 8, 9, 10, 1000, 1 << 20])
def test_the_limit_is_on_control_frames_alone_however_they_are_cut(piece: int) -> None:
    """Calls of any length are none; the one over the limit is found in whichever piece it is."""
    frames = ControlFrames(3)
    flood = ORDINARY + ping() * 2
    assert not any(frames.too_many(flood[at : at + piece]) for at in range(0, len(flood), piece))
    assert any([frames.too_many(ping() * 1000)])


def test_what_was_used_up_is_earned_again() -> None:
    """A thousand a second: over the limit at once, and below it a moment later."""
    frames = ControlFrames(1000)
    assert frames.too_many(PREFACE + ping() * 1020)
    eventually(lambda: not frames.too_many(b""))
