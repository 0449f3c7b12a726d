"""One daemon for the tests of a module, emptied between them."""

import os
from collections.abc import Iterator

import pytest

from dgcache_proto.v1 import dgcache_pb2 as pb
from tests.support.wire import Client, Daemon, eventually, running


@pytest.fixture(autouse=True)
def _root_only(request: pytest.FixtureRequest) -> None:
    """A second real user is made by root alone."""
    if request.node.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: it makes a second real user, or looks into the daemon's /proc")


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """The module's daemon, with the default limits."""
    with running() as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.logged()


@pytest.fixture
def daemon(shared: Daemon) -> Daemon:
    """The module's daemon, with nothing in it and nothing in progress."""
    with Client(shared.directory, session=False) as client:
        eventually(lambda: client.status().sessions == 0)
        eventually(lambda: client.status().store.reserved_bytes == 0)
        client.stub.Clear(pb.ClearRequest(), timeout=10)
    return shared


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """A client of that daemon."""
    with Client(daemon.directory) as connected:
        yield connected
