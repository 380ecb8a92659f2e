"""What every transport must do: subclass `TransportSuite`, say how one is made, and run it with pytest.

::

    class TestMine(TransportSuite):
        def make(self, settings: TransportSettings) -> Transport:
            return MyTransport(settings)

        def endpoint(self) -> str:
            return "mine://localhost:0"

The suite uses real time only as a limit: it polls until what it waits for has happened. What a transport
does with bytes that no transport of its kind would send is the business of tests that know its wire.
"""

from __future__ import annotations

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from coordlib.errors import ClusterClosed, LocalProtocolError, StartError, UsageError
from coordlib.transport.base import (
    ConnectionDown,
    ConnectionUp,
    FrameReceived,
    HandshakeFailed,
    Lane,
    Transport,
    TransportEvent,
    TransportKeys,
    TransportSettings,
)

__all__ = ["Endpoint", "TransportSuite", "cluster_keys", "pump"]

_SECONDS_MAX = 20.0
_SLICE_SECONDS = 0.01


def cluster_keys(secret: str = "shop") -> TransportKeys:
    """The key set of a cluster whose secret this is: always the same one."""

    def pair(purpose: str) -> tuple[bytes, bytes]:
        private = X25519PrivateKey.from_private_bytes(hashlib.sha256(f"{purpose} {secret}".encode()).digest())
        return private.public_key().public_bytes_raw(), private.private_bytes_raw()

    return TransportKeys(*pair("server"), *pair("client"))


class Endpoint:
    """A transport under test and everything that it has reported, in order."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.events: list[TransportEvent] = []

    @property
    def frames(self) -> list[bytes]:
        return [event.frame for event in self.events if isinstance(event, FrameReceived)]

    @property
    def routes(self) -> list[bytes]:
        """The routes that frames came by, each once, in the order of their first frame."""
        return list(dict.fromkeys(e.route for e in self.events if isinstance(e, FrameReceived) and e.route))

    def saw(self, event: TransportEvent) -> bool:
        return self.count(event) > 0

    def count(self, event: TransportEvent) -> int:
        # Events are tuples: an Up equals a Down of the same connection unless their types are compared.
        return sum(type(event) is type(each) and event == each for each in self.events)

    def failures(self) -> list[HandshakeFailed]:
        return [event for event in self.events if isinstance(event, HandshakeFailed)]


def pump(*endpoints: Endpoint, until: Callable[[], object], seconds_max: float = _SECONDS_MAX) -> None:
    """Poll all in turn until the condition holds; fail with what was seen when it never does."""
    deadline = time.monotonic() + seconds_max
    while not until():
        assert time.monotonic() < deadline, [endpoint.events[-20:] for endpoint in endpoints]
        for endpoint in endpoints:
            endpoint.events += endpoint.transport.poll(_SLICE_SECONDS)


class TransportSuite(ABC):
    """See the module's docstring. Transports that a test opened are closed behind it."""

    @abstractmethod
    def make(self, settings: TransportSettings) -> Transport:
        """Make a transport."""

    @abstractmethod
    def endpoint(self) -> str:
        """Name an address to bind: a fresh one, or one that lets the transport choose."""

    @abstractmethod
    def dead_endpoint(self) -> str:
        """Name an address where nobody listens and nobody will."""

    def malformed_endpoint(self) -> str:
        return "no such scheme"

    can_drop_routes = True

    @pytest.fixture(autouse=True)
    def _closed_at_the_end(self) -> Iterator[None]:
        self._opened: list[Transport] = []
        yield
        for transport in self._opened:
            transport.close()

    def open(self, *secrets: str, **settings: Any) -> Endpoint:
        """Open a transport that uses these secrets, the newest first (by default: one, the same for all)."""
        settings.setdefault("reconnect_interval_ms", 20)
        settings.setdefault("reconnect_interval_ms_max", 100)
        keys = tuple(cluster_keys(secret) for secret in secrets or ("shop",))
        transport = self.make(TransportSettings(keys=keys, **settings))
        self._opened.append(transport)
        return Endpoint(transport)

    def open_pair(self, **settings: Any) -> tuple[Endpoint, Endpoint, int]:
        """Open two transports, the second connected to the first."""
        server, client = self.open(**settings), self.open(**settings)
        connection = client.transport.connect(server.transport.bind(self.endpoint()))
        pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))
        return server, client, connection

    def open_route(self, **settings: Any) -> tuple[Endpoint, Endpoint, int, bytes]:
        """Open two transports with a route from the first back to the second."""
        server, client, connection = self.open_pair(**settings)
        assert client.transport.send(connection, b"hello")
        pump(server, client, until=lambda: server.routes)
        return server, client, connection, server.routes[0]

    # -- frames ------------------------------------------------------------------------------------

    def test_it_is_a_transport(self) -> None:
        """It has the whole contract's methods."""
        assert isinstance(self.open().transport, Transport)

    def test_frames_arrive_intact_and_in_order(self) -> None:
        """Order and bytes hold within a connection, whatever the bytes are."""
        server, client, connection = self.open_pair()
        frames = [bytes([index % 256]) * (index % 97 + 1) + b"%d" % index for index in range(500)]
        for frame in frames:
            assert client.transport.send(connection, frame)
        pump(server, client, until=lambda: len(server.frames) == len(frames))
        assert frames == server.frames
        assert len(server.routes) == 1
        assert {0} == {event.connection for event in server.events if isinstance(event, FrameReceived)}

    def test_replies_arrive_at_the_connection_that_asked(self) -> None:
        """A route leads back to its own connection, and to no other."""
        server, client, first = self.open_pair()
        second = client.transport.connect(server.transport.bind(self.endpoint()))
        pump(server, client, until=lambda: client.saw(ConnectionUp(second)))
        assert client.transport.send(first, b"to first")
        assert client.transport.send(second, b"to second")
        pump(server, client, until=lambda: len(server.frames) == 2)
        for event in server.events:
            if isinstance(event, FrameReceived):
                assert server.transport.reply(event.route, event.frame)
        pump(server, client, until=lambda: len(client.frames) == 2)
        received = {event for event in client.events if isinstance(event, FrameReceived)}
        assert {FrameReceived(first, b"", b"to first"), FrameReceived(second, b"", b"to second")} == received

    def test_a_frame_of_the_largest_size_arrives(self) -> None:
        """The stated limit is usable to the last byte, both ways."""
        server, client, connection, route = self.open_route(frame_size_bytes_max=1_000_000)
        frame = bytes(range(250)) * 4000
        assert client.transport.send(connection, frame)
        assert server.transport.reply(route, frame)
        pump(server, client, until=lambda: len(server.frames) == 2 and client.frames)
        assert [b"hello", frame] == server.frames
        assert [frame] == client.frames

    def test_a_frame_that_the_peer_would_refuse_is_not_sent(self) -> None:
        """Above the limit, and empty: the caller's mistake, and the connection is none the worse."""
        server, client, connection, route = self.open_route(frame_size_bytes_max=1000)
        for frame in (b"", b"x" * 1001):
            with pytest.raises(LocalProtocolError):
                client.transport.send(connection, frame)
            with pytest.raises(LocalProtocolError):
                server.transport.reply(route, frame)
        assert client.transport.send(connection, b"after")
        pump(server, client, until=lambda: server.frames == [b"hello", b"after"])

    def test_a_poll_returns_a_bounded_number_of_events(self) -> None:
        """What one poll does not return, the next ones do, in order."""
        count = 3000
        server, client, connection = self.open_pair(control_queue_frames_max=count)
        for index in range(count):
            assert client.transport.send(connection, b"%d" % index)
        largest = 0
        deadline = time.monotonic() + _SECONDS_MAX
        while len(server.frames) < count and time.monotonic() < deadline:
            events = server.transport.poll(_SLICE_SECONDS)
            largest = max(largest, len(events))
            server.events += events
        assert [b"%d" % index for index in range(count)] == server.frames
        assert largest <= 2000

    # -- never blocking ----------------------------------------------------------------------------

    def test_send_is_refused_while_nobody_listens(self) -> None:
        """Not connected: False at once, and nothing is kept for later."""
        client = self.open()
        connection = client.transport.connect(self.dead_endpoint())
        client.events += client.transport.poll(_SLICE_SECONDS)
        assert not client.transport.send(connection, b"lost")
        assert not client.saw(ConnectionUp(connection))

    def test_send_is_refused_before_the_connection_is_reported_up(self) -> None:
        """A caller that has not seen ConnectionUp cannot have sent anything."""
        server, client = self.open(), self.open()
        connection = client.transport.connect(server.transport.bind(self.endpoint()))
        assert not client.transport.send(connection, b"too early")
        pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))
        assert client.transport.send(connection, b"in time")
        pump(server, client, until=lambda: server.frames)
        assert server.frames == [b"in time"]

    def test_send_is_refused_when_the_queue_is_full_and_nothing_taken_is_lost(self) -> None:
        """A peer that does not read costs its frames, not our time; what was taken arrives once it reads."""
        server, client, connection = self.open_pair(control_queue_frames_max=10)
        taken = self._fill(lambda frame: client.transport.send(connection, frame))
        assert client.transport.counters()["dropped_full"] >= 1
        pump(server, client, until=lambda: len(server.frames) >= taken)
        assert [_numbered(index) for index in range(taken)] == server.frames
        assert client.transport.send(connection, b"room again")
        pump(server, client, until=lambda: server.frames[-1] == b"room again")

    def test_reply_is_refused_when_the_queue_is_full_and_nothing_taken_is_lost(self) -> None:
        """The same for the way back."""
        server, client, _, route = self.open_route(control_queue_frames_max=10)
        taken = self._fill(lambda frame: server.transport.reply(route, frame))
        assert server.transport.counters()["reply_dropped_full"] >= 1
        pump(server, client, until=lambda: len(client.frames) >= taken)
        assert [_numbered(index) for index in range(taken)] == client.frames
        assert server.transport.reply(route, b"room again")

    def test_a_full_bulk_lane_does_not_hold_up_the_control_lane(self) -> None:
        """Lanes are separate queues: bulk never delays control."""
        server, client, control = self.open_pair(bulk_queue_frames_max=4)
        bulk = client.transport.connect(server.transport.bind(self.endpoint()), Lane.BULK)
        pump(server, client, until=lambda: client.saw(ConnectionUp(bulk)))
        taken = self._fill(lambda frame: client.transport.send(bulk, frame))
        assert client.transport.send(control, b"urgent")
        pump(server, client, until=lambda: len(server.frames) == taken + 1)
        assert b"urgent" in server.frames

    @staticmethod
    def _fill(send: Callable[[bytes], bool]) -> int:
        """Send until refused; return how many were taken."""
        started = time.monotonic()
        taken = 0
        while send(_numbered(taken)):
            taken += 1
            assert taken < 20_000, "the queue has no end"
        assert time.monotonic() - started < _SECONDS_MAX, "sending blocks"
        return taken

    # -- poll and wake -----------------------------------------------------------------------------

    def test_poll_with_zero_does_not_wait(self) -> None:
        """Nothing has happened: an empty list, at once."""
        endpoint = self.open()
        endpoint.transport.poll(0)
        started = time.monotonic()
        assert endpoint.transport.poll(0) == []
        assert time.monotonic() - started < 1

    def test_poll_waits_as_long_as_told(self) -> None:
        """A timeout is a real one: neither a spin nor forever."""
        endpoint = self.open()
        started = time.monotonic()
        assert endpoint.transport.poll(0.05) == []
        assert 0.04 <= time.monotonic() - started < 5

    def test_wake_makes_the_next_poll_return_at_once(self) -> None:
        """Also when it was called often, before the poll, and before anything else was."""
        endpoint = self.open()
        for _ in range(1000):
            endpoint.transport.wake()
        started = time.monotonic()
        assert endpoint.transport.poll(30) == []
        assert time.monotonic() - started < 5
        assert endpoint.transport.poll(0) == []

    def test_wake_interrupts_a_poll_of_another_thread(self) -> None:
        """The poll that is waiting now returns, and none is missed over many rounds."""
        endpoint = self.open()
        rounds = 200
        polled, waking = threading.Semaphore(0), threading.Semaphore(0)
        slowest = 0.0

        def wake_each_round() -> None:
            for _ in range(rounds):
                waking.acquire()
                endpoint.transport.wake()
                polled.release()

        thread = threading.Thread(target=wake_each_round, daemon=True)
        thread.start()
        for _ in range(rounds):
            waking.release()
            started = time.monotonic()
            endpoint.transport.poll(10)
            slowest = max(slowest, time.monotonic() - started)
            polled.acquire()
        thread.join()
        assert slowest < 5

    # -- connections that come and go --------------------------------------------------------------

    def test_a_connection_may_be_opened_before_its_peer_listens(self) -> None:
        """It comes up when the peer does."""
        server = self.open()
        bound = server.transport.bind(self.endpoint())
        server.transport.close()
        client = self.open()
        connection = client.transport.connect(bound)
        client.events += client.transport.poll(_SLICE_SECONDS)
        later = self.open()
        assert bound == later.transport.bind(bound)
        pump(later, client, until=lambda: client.saw(ConnectionUp(connection)))

    def test_a_peer_that_restarts_is_reported_down_and_up_again(self) -> None:
        """Down, then Up, with the same id; frames flow again, and none of before turns up."""
        server = self.open()
        bound = server.transport.bind(self.endpoint())
        client = self.open()
        connection = client.transport.connect(bound)
        pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))
        assert client.transport.send(connection, b"before")
        pump(server, client, until=lambda: server.frames)
        server.transport.close()
        pump(client, until=lambda: client.saw(ConnectionDown(connection)))
        assert not client.transport.send(connection, b"while it is away")
        restarted = self.open()
        restarted.transport.bind(bound)
        pump(restarted, client, until=lambda: client.count(ConnectionUp(connection)) == 2)
        assert client.transport.send(connection, b"after")
        pump(restarted, client, until=lambda: restarted.frames)
        assert restarted.frames == [b"after"]
        assert [ConnectionUp, ConnectionDown, ConnectionUp] == [type(event) for event in client.events]

    def test_no_frame_comes_from_a_connection_that_is_down(self) -> None:
        """Frames stand between an Up and a Down of their connection."""
        server, client, connection, route = self.open_route()
        for index in range(200):
            server.transport.reply(route, b"%d" % index)
        server.transport.close()
        pump(client, until=lambda: client.saw(ConnectionDown(connection)))
        kinds = [type(event) for event in client.events]
        assert ConnectionUp is kinds[0]
        assert kinds.index(ConnectionDown) == len(kinds) - 1
        assert [b"%d" % index for index in range(len(client.frames))] == client.frames

    def test_a_route_ends_with_its_connection(self) -> None:
        """A reply to a peer that has gone is refused, as is one to a route that never was."""
        server, client, connection, route = self.open_route()
        assert not server.transport.reply(b"never heard of", b"x")
        client.transport.disconnect(connection)
        pump(server, client, until=lambda: not server.transport.reply(route, b"are you there?"))
        assert server.transport.counters()["reply_dropped_gone"] >= 1
        server.transport.drop_route(route)

    def test_a_disconnected_connection_is_gone_for_good(self) -> None:
        """No event, no frame, no id used twice; unknown ids are ignored."""
        server, client, connection, route = self.open_route()
        server.transport.reply(route, b"late")
        client.transport.disconnect(connection)
        client.transport.disconnect(connection)
        client.transport.disconnect(12345)
        assert not client.transport.send(connection, b"x")
        heard = len(client.events)
        again = client.transport.connect(server.transport.bind(self.endpoint()))
        assert connection != again
        pump(server, client, until=lambda: client.saw(ConnectionUp(again)))
        assert len(client.events[heard:]) == 1

    def test_a_dropped_route_costs_its_peer_the_connection(self) -> None:
        """The peer is told, and may come again by another route."""
        if not self.can_drop_routes:
            pytest.skip("this transport cannot close a peer's connection")
        server, client, connection, route = self.open_route()
        server.transport.drop_route(route)
        pump(server, client, until=lambda: client.count(ConnectionUp(connection)) == 2)
        assert client.saw(ConnectionDown(connection))
        assert client.transport.send(connection, b"again")
        pump(server, client, until=lambda: server.frames[-1] == b"again")
        assert len(server.routes) == 2
        assert not server.transport.reply(route, b"x")
        assert server.transport.counters()["route_dropped"] == 1

    # -- keys --------------------------------------------------------------------------------------

    def test_a_peer_with_another_secret_is_refused_in_words(self) -> None:
        """Both sides are told, no connection comes up, and the next correct peer is served."""
        server, stranger = self.open("ours"), self.open("theirs")
        bound = server.transport.bind(self.endpoint())
        connection = stranger.transport.connect(bound)
        pump(server, stranger, until=lambda: stranger.failures() and server.failures())
        told = stranger.failures()[0]
        assert (connection, bound) == (told.connection, told.address)
        assert told.reason in ("wrong-key", "refused-key")
        assert server.failures()[0].connection == 0
        assert server.failures()[0].reason in ("wrong-key", "refused-key")
        assert not stranger.saw(ConnectionUp(connection))
        assert not stranger.transport.send(connection, b"x")
        friend = self.open("ours")
        welcome = friend.transport.connect(bound)
        pump(server, stranger, friend, until=lambda: friend.saw(ConnectionUp(welcome)))
        assert friend.transport.send(welcome, b"hello")
        pump(server, stranger, friend, until=lambda: server.frames)
        assert server.frames == [b"hello"]

    def test_a_refused_connection_comes_up_once_the_secrets_agree(self) -> None:
        """It is tried again and again, so that correcting one side is enough."""
        wrong = self.open("theirs")
        bound = wrong.transport.bind(self.endpoint())
        client = self.open("ours")
        connection = client.transport.connect(bound)
        pump(wrong, client, until=client.failures)
        wrong.transport.close()
        corrected = self.open("ours")
        corrected.transport.bind(bound)
        pump(corrected, client, until=lambda: client.saw(ConnectionUp(connection)))

    @pytest.mark.parametrize(
        ("acceptor", "dialler"),
        [
            (["old"], ["new", "old"]),
            (["new", "old"], ["old"]),
            (["new", "old"], ["new", "old"]),
            (["new", "old"], ["new"]),
            (["new"], ["new", "old"]),
        ],
        ids="+".join,
    )
    def test_a_secret_can_be_changed_one_node_after_the_other(
        self, acceptor: list[str], dialler: list[str]
    ) -> None:
        """Whichever two nodes meet in the middle of a change, they connect, in both directions."""
        server, client = self.open(*acceptor), self.open(*dialler)
        bound = server.transport.bind(self.endpoint())
        connections = [client.transport.connect(bound) for _ in range(3)]
        pump(server, client, until=lambda: all(client.saw(ConnectionUp(each)) for each in connections))
        for each in connections:
            assert client.transport.send(each, b"%d" % each)
        pump(server, client, until=lambda: len(server.frames) == len(connections))

    # -- beginnings and ends -----------------------------------------------------------------------

    def test_an_address_that_is_taken_is_refused(self) -> None:
        """StartError, and the one who has it keeps it. In the middle of a change of secret, too."""
        server = self.open()
        bound = server.transport.bind(self.endpoint())
        for secrets in (["shop"], ["new", "shop"]):
            with pytest.raises(StartError):
                self.open(*secrets).transport.bind(bound)
        client = self.open()
        connection = client.transport.connect(bound)
        pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))

    def test_malformed_addresses_are_refused(self) -> None:
        """By both, before anything is opened."""
        endpoint = self.open()
        with pytest.raises(StartError):
            endpoint.transport.bind(self.malformed_endpoint())
        with pytest.raises(UsageError):
            endpoint.transport.connect(self.malformed_endpoint())
        with pytest.raises(UsageError):
            endpoint.transport.connect(self.dead_endpoint(), "no such lane")

    def test_close_is_idempotent_and_final(self) -> None:
        """Afterwards nothing is sent, nothing is waited for, and a late wake-up does no harm."""
        server, client, connection, route = self.open_route()
        for endpoint in (server, client):
            endpoint.transport.close()
            endpoint.transport.close()
            endpoint.transport.wake()
            with pytest.raises(ClusterClosed):
                endpoint.transport.poll(0)
        assert not client.transport.send(connection, b"x")
        assert not server.transport.reply(route, b"x")
        client.transport.disconnect(connection)
        server.transport.drop_route(route)
        assert isinstance(server.transport.counters(), dict)

    def test_close_before_use_is_allowed(self) -> None:
        """Construction opened nothing, so there is nothing to close."""
        self.open().transport.close()

    def test_the_address_is_free_after_close(self) -> None:
        """The next one may bind it."""
        server, client, _ = self.open_pair()
        bound = server.transport.bind(self.endpoint())
        server.transport.close()
        assert bound == self.open().transport.bind(bound)
        client.transport.close()

    def test_counters_have_stable_names_and_start_at_zero(self) -> None:
        """Every name is there from the start, and the answer is a copy."""
        transport = self.open().transport
        counters = transport.counters()
        assert {0} == set(counters.values())
        counters["dropped_full"] = 7
        assert transport.counters()["dropped_full"] == 0


def _numbered(index: int) -> bytes:
    # Large enough that the system's own socket buffers fill within some hundred frames.
    return b"%d " % index + b"x" * 60_000
