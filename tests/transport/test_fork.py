"""A forked child holds nothing of its parent's: peers see the parent die, and its address is free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordlib.errors import ForkedError
from coordlib.testing.suites.transport import Endpoint, cluster_keys, pump
from coordlib.transport.base import ConnectionDown, ConnectionUp, TransportSettings
from coordlib_memory import MemoryTransport
from coordlib_zmq import ZmqTransport

# Heartbeats are slow here: only closed connections can tell a peer that the parent is dead.
_SETTINGS = TransportSettings(
    keys=[cluster_keys()],
    heartbeat_interval_ms=60_000,
    heartbeat_timeout_ms=60_000,
    reconnect_interval_ms=20,
)

_PARENT = """
import os, sys
from coordlib.errors import ForkedError
from coordlib.testing.suites.transport import cluster_keys
from coordlib.transport.base import ConnectionUp, TransportSettings
from coordlib_zmq import ZmqTransport

listen_at, connect_to, lets_go = sys.argv[1], sys.argv[2], sys.argv[3] == "lets-go"
transport = ZmqTransport(TransportSettings(keys=[cluster_keys()], heartbeat_interval_ms=60_000))
print(transport.bind(listen_at), flush=True)
connection = transport.connect(connect_to)
while not any(type(event) is ConnectionUp for event in transport.poll(1)):
    pass
transport.send(connection, b"from the parent")
while not any(getattr(event, "frame", b"") == b"fork now" for event in transport.poll(1)):
    pass
child = os.fork()
if child == 0:
    said = "nothing"
    if lets_go:
        transport.after_fork_in_child()
        try:
            transport.poll(0)
        except ForkedError:
            said = "forked"
        assert not transport.send(connection, b"from the child")
        transport.wake()
        transport.close()
    print(os.getpid(), said, flush=True)
    sys.stdin.read()  # until the test ends
    os._exit(0)
while True:  # the parent works on
    for event in transport.poll(1):
        if getattr(event, "frame", b"") == b"still there?":
            transport.reply(event.route, b"yes")
"""


class Family:
    """A parent that listens, is connected to a peer of ours, and has forked a child that lives on."""

    def __init__(self, listen_at: str, meet_at: str, *, lets_go: bool) -> None:
        self.peer = Endpoint(ZmqTransport(_SETTINGS))
        meeting = self.peer.transport.bind(meet_at)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PARENT, listen_at, meeting, "lets-go" if lets_go else "keeps"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout is not None
        self.bound = self.process.stdout.readline().strip()
        self.connection = self.peer.transport.connect(self.bound)
        pump(self.peer, until=lambda: self.peer.saw(ConnectionUp(self.connection)) and self.peer.routes)
        self.route = self.peer.routes[0]
        assert self.peer.transport.send(self.connection, b"fork now")
        self.peer.transport.poll(0)
        self.child, self.said = self.process.stdout.readline().split()

    def kill_parent(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)

    def child_is_alive(self) -> bool:
        return Path(f"/proc/{self.child}").exists()

    def close(self) -> None:
        self.peer.transport.close()
        if self.process.poll() is None:
            self.process.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(20)


@pytest.fixture(params=["tcp", "ipc"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Family]:
    if request.param == "tcp":
        family = Family("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", lets_go=True)
    else:
        family = Family(f"ipc://{tmp_path}/parent.sock", f"ipc://{tmp_path}/peer.sock", lets_go=True)
    yield family
    family.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_peers_see_the_parents_death_although_a_child_lives(family: Family) -> None:
    """Both directions end at once, and the address can be bound again."""
    assert family.said == "forked"
    assert family.peer.transport.send(family.connection, b"still there?")
    pump(family.peer, until=lambda: b"yes" in family.peer.frames)
    family.kill_parent()
    pump(family.peer, until=lambda: family.peer.saw(ConnectionDown(family.connection)))
    pump(family.peer, until=lambda: not family.peer.transport.reply(family.route, b"anybody?"))
    assert family.child_is_alive()
    successor = Endpoint(ZmqTransport(_SETTINGS))
    assert successor.transport.bind(family.bound) == family.bound
    pump(successor, family.peer, until=lambda: family.peer.count(ConnectionUp(family.connection)) == 2)
    successor.transport.close()


@pytest.mark.parametrize("transport", [ZmqTransport(_SETTINGS), MemoryTransport(_SETTINGS)])
def test_a_transport_that_was_never_used_may_be_let_go_of(transport: ZmqTransport | MemoryTransport) -> None:
    """There is nothing to close, and nothing else to be done with it in the child."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            transport.after_fork_in_child()
            transport.poll(0)
        except ForkedError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    transport.poll(0)
    transport.close()


def test_a_child_has_a_hub_of_its_own() -> None:
    """Within the child, memory transports work; they never reach the parent's."""
    parent = Endpoint(MemoryTransport(_SETTINGS))
    bound = parent.transport.bind("memory://parent")
    connection = parent.transport.connect(bound)
    pump(parent, until=lambda: parent.saw(ConnectionUp(connection)))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            parent.transport.after_fork_in_child()
            assert not parent.transport.send(connection, b"x")
            fresh = Endpoint(MemoryTransport(_SETTINGS))
            other = fresh.transport.connect(fresh.transport.bind("memory://parent"))
            pump(fresh, until=lambda: fresh.saw(ConnectionUp(other)))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert parent.transport.send(connection, b"x")
    parent.transport.close()
