"""What strangers, and peers that know the keys, may put on the wire: dropped, counted, survived.

Each test drives one row through real sockets and then shows that a good peer is still served.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.testing.suites.transport import Endpoint, cluster_keys, pump
from coordlib.transport.base import ConnectionDown, ConnectionUp, TransportKeys, TransportSettings
from coordlib_zmq import ZmqTransport

_FRAME_SIZE_BYTES_MAX = 65536
_KEYS = cluster_keys()


def _greeting(mechanism: bytes) -> bytes:
    return b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def _open(**settings_: Any) -> Endpoint:
    settings_ = {"handshake_timeout_ms": 150, "reconnect_interval_ms": 20, **settings_}
    return Endpoint(
        ZmqTransport(TransportSettings(keys=[_KEYS], frame_size_bytes_max=_FRAME_SIZE_BYTES_MAX, **settings_))
    )


class Service:
    """A transport that listens, a good peer of it, and whatever else comes."""

    def __init__(self) -> None:
        self.server = _open()
        self.good = _open()
        self.bound = self.server.transport.bind("tcp://127.0.0.1:0")
        self.port = int(self.bound.rpartition(":")[2])
        self.connection = self.good.transport.connect(self.bound)
        pump(self.server, self.good, until=lambda: self.good.saw(ConnectionUp(self.connection)))

    def expect(self, counter: str, count: int = 1) -> None:
        pump(self.server, until=lambda: self.server.transport.counters()[counter] >= count)

    def expect_failure(self, reason: str) -> None:
        pump(self.server, until=lambda: reason in {each.reason for each in self.server.failures()})

    def serves_the_good_peer(self) -> None:
        self.server.events.clear()
        assert self.good.transport.send(self.connection, b"are you there?")
        pump(self.server, self.good, until=lambda: self.server.frames)
        assert self.server.frames == [b"are you there?"]
        assert self.server.transport.reply(self.server.routes[0], b"yes")
        pump(self.server, self.good, until=lambda: b"yes" in self.good.frames)
        assert not any(isinstance(event, ConnectionDown) for event in self.good.events)

    def close(self) -> None:
        self.good.transport.close()
        self.server.transport.close()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@contextlib.contextmanager
def _raw(service: Service, data: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", service.port)) as raw:
        if data:
            raw.sendall(data)
        yield raw


@contextlib.contextmanager
def _libzmq(kind: int, keys: TransportKeys = _KEYS) -> Iterator[zmq.Socket[bytes]]:
    """A socket of plain libzmq that knows these keys, on the side that `kind` says."""
    context = zmq.Context()
    raw = context.socket(kind)
    raw.setsockopt(zmq.LINGER, 0)
    if kind == zmq.ROUTER:
        raw.setsockopt(zmq.CURVE_SERVER, 1)
        raw.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret)
    else:
        raw.setsockopt(zmq.CURVE_SERVERKEY, keys.server_public)
        raw.setsockopt(zmq.CURVE_PUBLICKEY, keys.client_public)
        raw.setsockopt(zmq.CURVE_SECRETKEY, keys.client_secret)
    try:
        yield raw
    finally:
        raw.close(0)
        context.term()


# -- strangers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: node\r\n\r\n" + b"x" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 200,
        b"\xff" * 300,
        _greeting(b"NULL"),
        _greeting(b"PLAIN"),
        _greeting(b"GSSAPI"),
        _greeting(b"CURVE") + b"\x04\xc8\x05HELLO" + bytes(194),
        _greeting(b"CURVE") + b"\x04\x06\x05READY",
        _greeting(b"CURVE") + b"\x06\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=[
        "an HTTP request",
        "a TLS hello",
        "all ones",
        "mechanism NULL",
        "mechanism PLAIN",
        "mechanism GSSAPI",
        "CURVE with an empty hello",
        "CURVE with a command out of turn",
        "CURVE with an endless command",
    ],
)
def test_bytes_of_a_stranger_are_refused_and_counted(service: Service, data: bytes) -> None:
    """Garbage, other protocols and other mechanisms end with the connection, and are told of."""
    with _raw(service, data) as raw:
        service.expect("handshake_failed")
        assert service.server.failures()[0].connection == 0
        raw.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while raw.recv(1000):
                pass
    service.serves_the_good_peer()


@pytest.mark.parametrize(
    "data", [b"", b"\xff", _greeting(b"CURVE")], ids=["nothing", "one byte", "a greeting"]
)
def test_a_silent_connection_is_dropped_after_the_handshake_timeout(service: Service, data: bytes) -> None:
    """It does not keep a descriptor for ever, and its address is known."""
    with _raw(service, data) as raw:
        host, port = raw.getsockname()
        service.expect_failure("no-handshake")
        assert f"{host}:{port}" == service.server.failures()[0].address
        assert service.server.transport.counters()["no_handshake"] == 1
    service.serves_the_good_peer()


def test_a_client_key_that_is_not_the_clusters_is_refused(service: Service) -> None:
    """Knowing the server's public key is not enough."""
    stranger = cluster_keys("another")
    keys = TransportKeys(_KEYS.server_public, b"", stranger.client_public, stranger.client_secret)
    with _libzmq(zmq.DEALER, keys) as raw:
        raw.connect(service.bound)
        service.expect_failure("refused-key")
        assert service.server.transport.counters()["refused_key"] == 1
        assert service.server.failures()[0].address == "127.0.0.1"
    service.serves_the_good_peer()


def test_our_client_tells_a_refused_key_from_a_wrong_one() -> None:
    """The transport says in words which of the two keys the peer objected to."""
    stranger = cluster_keys("another")
    server = _open()
    bound = server.transport.bind("tcp://127.0.0.1:0")
    half_right = TransportKeys(_KEYS.server_public, bytes(32), stranger.client_public, stranger.client_secret)
    client = Endpoint(ZmqTransport(TransportSettings(keys=[half_right], reconnect_interval_ms=20)))
    client.transport.connect(bound)
    # It is refused again and again: it does not give up after the first time, as libzmq alone would.
    pump(server, client, until=lambda: len(client.failures()) >= 3)
    assert {"refused-key"} == {each.reason for each in client.failures()}
    client.transport.close()
    server.transport.close()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.lists(st.binary(min_size=1, max_size=300), max_size=4), greets=st.booleans())
def test_no_bytes_of_a_stranger_stop_the_loop(data: list[bytes], greets: bool) -> None:
    """Whatever comes in is an event or nothing, never an exception."""
    server = _shared_server()
    with socket.create_connection(("127.0.0.1", server[1])) as raw:
        with contextlib.suppress(OSError):
            for piece in [_greeting(b"CURVE"), *data] if greets else data:
                raw.sendall(piece)
        server[0].transport.poll(0.002)


_shared: list[tuple[Endpoint, int]] = []


def _shared_server() -> tuple[Endpoint, int]:
    if not _shared:
        server = _open()
        _shared.append((server, int(server.transport.bind("tcp://127.0.0.1:0").rpartition(":")[2])))
    return _shared[0]


@pytest.fixture(scope="module", autouse=True)
def _close_shared() -> Iterator[None]:
    yield
    for server, _ in _shared:
        server.transport.close()


# -- peers that know the keys ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "counter"),
    [
        ([b""], "malformed_empty"),
        ([b"one", b"two"], "malformed_multipart"),
        ([b"", b""], "malformed_multipart"),
        ([b"x"] * 5000, "malformed_multipart"),
        ([b"x" * (_FRAME_SIZE_BYTES_MAX + 1)], "oversize"),
    ],
    ids=[
        "an empty frame",
        "two frames",
        "two empty frames",
        "thousands of frames",
        "a frame a byte too long",
    ],
)
def test_a_malformed_message_of_a_peer_is_dropped(
    service: Service, message: list[bytes], counter: str
) -> None:
    """Nothing of it is delivered, and what the same peer sends next is."""
    with _libzmq(zmq.DEALER) as raw:
        raw.connect(service.bound)
        raw.send_multipart(message)
        raw.send(b"proper")
        pump(service.server, until=lambda: service.server.frames)
        assert service.server.frames == [b"proper"]
        assert service.server.transport.counters()[counter] == 1
    service.serves_the_good_peer()


def test_a_stream_of_malformed_messages_does_not_keep_the_caller(service: Service) -> None:
    """A poll that has dropped its fill returns, with nothing, long before its timeout."""
    service.server.events += service.server.transport.poll(0)
    with _libzmq(zmq.DEALER) as raw:
        raw.setsockopt(zmq.SNDHWM, 10_000)
        raw.connect(service.bound)
        raw.send(b"first")
        pump(service.server, until=lambda: service.server.frames)
        for _ in range(3000):
            raw.send(b"")
        raw.send(b"last")
        longest = 0.0
        while service.server.frames[-1] != b"last":
            started = time.monotonic()
            service.server.events += service.server.transport.poll(5)
            longest = max(longest, time.monotonic() - started)
        assert longest < 4
        assert service.server.transport.counters()["malformed_empty"] == 3000
    service.serves_the_good_peer()


def test_a_frame_far_above_the_limit_costs_its_sender_the_connection(service: Service) -> None:
    """libzmq closes before it takes memory for it; the sender may come again."""
    with _libzmq(zmq.DEALER) as raw:
        raw.setsockopt(zmq.RECONNECT_IVL, 10)
        raw.connect(service.bound)
        raw.send(b"x" * (4 * _FRAME_SIZE_BYTES_MAX))
        service.expect("disconnected")
        assert service.server.frames == []
    service.serves_the_good_peer()


@pytest.mark.parametrize(
    ("message", "counter"),
    [
        ([b""], "malformed_empty"),
        ([b"one", b"two", b"three"], "malformed_multipart"),
        ([b"x" * (_FRAME_SIZE_BYTES_MAX + 1)], "oversize"),
    ],
    ids=["an empty frame", "three frames", "a frame a byte too long"],
)
def test_a_malformed_answer_is_dropped(message: list[bytes], counter: str) -> None:
    """The same on connections that we opened."""
    with _libzmq(zmq.ROUTER) as raw:
        client = _open()
        raw.bind("tcp://127.0.0.1:0")
        connection = client.transport.connect(str(raw.getsockopt_string(zmq.LAST_ENDPOINT)))
        pump(client, until=lambda: client.saw(ConnectionUp(connection)))
        assert client.transport.send(connection, b"hello")
        route, _ = raw.recv_multipart()
        raw.send_multipart([route, *message])
        raw.send_multipart([route, b"proper"])
        pump(client, until=lambda: client.frames)
        assert client.frames == [b"proper"]
        assert client.transport.counters()[counter] == 1
        client.transport.close()


class Narrows:
    """A TCP relay that stops forwarding toward the server after so many bytes, and keeps both ends open."""

    def __init__(self, port: int, bytes_max: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._left = bytes_max
        self._server = socket.create_connection(("127.0.0.1", port))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._client: socket.socket | None = None
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            self._client, _ = self._listener.accept()
            back = threading.Thread(
                target=self._forward, args=(self._server, self._client, None), daemon=True
            )
            self._threads.append(back)
            back.start()
            self._forward(self._client, self._server, self._left)

    @staticmethod
    def _forward(source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while left is None or left > 0:
                data = source.recv(65536 if left is None else min(left, 65536))
                if not data:
                    return
                sink.sendall(data)
                left = None if left is None else left - len(data)

    def close(self) -> None:
        for end in (self._listener, self._server, self._client):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        for thread in self._threads:
            thread.join(10)


@contextlib.contextmanager
def _narrows(port: int, bytes_max: int) -> Iterator[Narrows]:
    narrows = Narrows(port, bytes_max)
    try:
        yield narrows
    finally:
        narrows.close()


def test_a_message_without_end_is_cut(service: Service) -> None:
    """
    No option of libzmq bounds a message of many frames; the guard does, and takes only its sender's connection.
    """
    with _narrows(service.port, 3_000_000) as narrows, _libzmq(zmq.DEALER) as raw:
        raw.connect(f"tcp://127.0.0.1:{narrows.port}")
        raw.send_multipart([b"x" * 60_000] * 100)
        service.expect_failure("flood")
        assert service.server.transport.counters()["flood_cut"] == 1
        service.expect("disconnected")
        assert service.server.frames == []
        service.serves_the_good_peer()


def test_an_answer_without_end_is_cut() -> None:
    """The same on connections that we opened, which are then tried again."""
    with _libzmq(zmq.ROUTER) as raw:
        client = _open()
        raw.bind("tcp://127.0.0.1:0")
        port = int(str(raw.getsockopt_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])
        relay = socket.create_server(("127.0.0.1", 0))

        def relay_once() -> None:
            with contextlib.suppress(OSError):
                near, _ = relay.accept()
                with near, socket.create_connection(("127.0.0.1", port)) as far:
                    up = threading.Thread(target=Narrows._forward, args=(near, far, None), daemon=True)
                    up.start()
                    Narrows._forward(far, near, 3_000_000)
                    up.join(20)

        thread = threading.Thread(target=relay_once, daemon=True)
        thread.start()
        connection = client.transport.connect(f"tcp://127.0.0.1:{relay.getsockname()[1]}")
        pump(client, until=lambda: client.saw(ConnectionUp(connection)))
        assert client.transport.send(connection, b"hello")
        route, _ = raw.recv_multipart()
        raw.send_multipart([route, *[b"x" * 60_000] * 100])
        pump(client, until=lambda: client.saw(ConnectionDown(connection)))
        assert [each.reason for each in client.failures()] == ["flood"]
        assert connection == client.failures()[0].connection
        client.transport.close()
        relay.close()
        thread.join(20)


def test_a_backlog_of_proper_frames_is_not_taken_for_a_flood(service: Service) -> None:
    """However much waits while the loop is away, it is delivered, and nobody is cut."""
    frame = b"x" * 60_000
    taken = 0
    while service.good.transport.send(service.connection, frame):
        taken += 1
    assert taken * len(frame) > 8 * 1024 * 1024
    _until_due_twice(service.server, lambda: len(service.server.frames) == taken)
    assert service.server.transport.counters()["flood_cut"] == 0
    service.serves_the_good_peer()


def _until_due_twice(endpoint: Endpoint, until: Callable[[], bool]) -> None:
    pump(endpoint, until=until)
    # The guard looks at what had come in at its previous look; give it two more.
    for _ in range(2):
        endpoint.events += endpoint.transport.poll(0.3)
