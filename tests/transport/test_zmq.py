"""What only the ZeroMQ transport promises: addresses, options, descriptors, and how it waits."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordlib.errors import ConfigError, StartError
from coordlib.testing.suites.transport import Endpoint, cluster_keys, pump
from coordlib.transport.base import ConnectionUp, TransportKeys, TransportSettings
from coordlib_zmq import ZmqTransport
from coordlib_zmq.listen import Endpoint as Address
from coordlib_zmq.listen import parse_endpoint
from coordlib_zmq.waiting import Waker
from coordlib_zmq.wires import identify


def _settings(**settings: Any) -> TransportSettings:
    return TransportSettings(**{"keys": [cluster_keys()], "reconnect_interval_ms": 20, **settings})


@pytest.fixture
def server() -> Iterator[Endpoint]:
    endpoint = Endpoint(ZmqTransport(_settings()))
    yield endpoint
    endpoint.transport.close()


@pytest.fixture
def client() -> Iterator[Endpoint]:
    endpoint = Endpoint(ZmqTransport(_settings()))
    yield endpoint
    endpoint.transport.close()


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("tcp://10.0.0.1:7400", Address("tcp", "10.0.0.1", 7400, "")),
        ("tcp://*:0", Address("tcp", "*", 0, "")),
        ("tcp://node.example:7400", Address("tcp", "node.example", 7400, "")),
        ("tcp://[fd00::1]:7400", Address("tcp", "fd00::1", 7400, "")),
        ("ipc:///run/app/node.sock", Address("ipc", "", 0, "/run/app/node.sock")),
    ],
)
def test_endpoints_are_read(endpoint: str, address: Address) -> None:
    """Host, port or path, as documented."""
    assert parse_endpoint(endpoint) == address


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "tcp",
        "tcp://",
        "tcp://host",
        "tcp://:1",
        "tcp://h:-1",
        "tcp://h:65536",
        "tcp://h:٣",
        "tcp://fd00::1:7400",
        "ipc://",
        "udp://h:1",
        "inproc://x",
        "h:7400",
        "tcp:/h:1",
    ],
)
def test_other_endpoints_are_refused_with_an_example(endpoint: str) -> None:
    """The message shows what would have been right."""
    with pytest.raises(ConfigError, match=r"tcp://10\.0\.0\.1:7400"):
        parse_endpoint(endpoint)


def test_the_bound_endpoint_has_the_real_port(server: Endpoint) -> None:
    """Port 0 asks for a free one, with one key and with several."""
    several = ZmqTransport(_settings(keys=[cluster_keys("new"), cluster_keys("old")]))
    for transport in (server.transport, several):
        bound = transport.bind("tcp://127.0.0.1:0")
        assert bound.startswith("tcp://127.0.0.1:")
        assert int(bound.rpartition(":")[2]) > 0
    several.close()


def test_a_host_name_may_be_connected_to(server: Endpoint, client: Endpoint) -> None:
    """Names are resolved by the system."""
    port = server.transport.bind("tcp://127.0.0.1:0").rpartition(":")[2]
    connection = client.transport.connect(f"tcp://localhost:{port}")
    pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))


@pytest.mark.parametrize(
    ("endpoint", "word"),
    [
        ("tcp://192.0.2.1:0", "not one of this machine's"),
        ("ipc:///no/such/folder/node.sock", "folder"),
        (f"ipc:///tmp/{'x' * 200}.sock", "longer"),
    ],
)
@pytest.mark.parametrize("secrets", [["shop"], ["new", "shop"]], ids=["one key", "two keys"])
def test_an_address_that_cannot_be_had_is_explained(endpoint: str, word: str, secrets: list[str]) -> None:
    """StartError says why, and what to do."""
    transport = ZmqTransport(_settings(keys=[cluster_keys(secret) for secret in secrets]))
    with pytest.raises(StartError, match=word):
        transport.bind(endpoint)
    transport.close()


def test_the_socket_file_of_a_dead_process_is_replaced(
    server: Endpoint, client: Endpoint, tmp_path: Path
) -> None:
    """A crash leaves the file behind; the next start must not need a hand."""
    path = tmp_path / "node.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert server.transport.bind(f"ipc://{path}") == f"ipc://{path}"
    connection = client.transport.connect(f"ipc://{path}")
    pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))
    server.transport.close()
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(server: Endpoint, tmp_path: Path) -> None:
    """A mistyped path must not cost a file."""
    path = tmp_path / "notes.txt"
    path.write_text("keep me")
    with pytest.raises(StartError, match="no socket"):
        server.transport.bind(f"ipc://{path}")
    assert path.read_text() == "keep me"


# -- settings --------------------------------------------------------------------------------------


def test_there_is_no_mode_without_keys() -> None:
    """Without a secret nothing is opened at all."""
    with pytest.raises(ConfigError, match="secret"):
        ZmqTransport(TransportSettings())


def test_keys_of_another_size_and_limits_of_zero_are_refused() -> None:
    """When constructing, naming the setting."""
    with pytest.raises(ConfigError, match="32 bytes"):
        ZmqTransport(TransportSettings(keys=[TransportKeys(b"x" * 32, b"x" * 31, b"x" * 32, b"x" * 32)]))
    with pytest.raises(ConfigError, match="bulk_queue_frames_max"):
        ZmqTransport(_settings(bulk_queue_frames_max=0))


def test_construction_opens_nothing() -> None:
    """No descriptor, no thread: a module may construct one when imported."""
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    transport = ZmqTransport(_settings())
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert threading.active_count() == threads
    transport.close()


def test_close_returns_every_descriptor(server: Endpoint, client: Endpoint) -> None:
    """Also those of connections that failed and were tried again, and of a wake-up before the first poll."""
    bound = server.transport.bind("tcp://127.0.0.1:0")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        stranger = Endpoint(ZmqTransport(_settings(keys=[cluster_keys("another")], reconnect_interval_ms=1)))
        stranger.transport.wake()
        for _ in range(3):
            stranger.transport.connect(bound)
        pump(server, stranger, until=lambda: len(stranger.failures()) >= 6)  # noqa: B023
        stranger.transport.close()
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > descriptors and time.monotonic() < deadline:
        server.transport.poll(0.01)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_connections_may_come_and_go_quickly(server: Endpoint, client: Endpoint) -> None:
    """libzmq takes its time to forget a closed socket; the next one must not notice."""
    bound = server.transport.bind("tcp://127.0.0.1:0")
    for _ in range(300):
        client.transport.disconnect(client.transport.connect(bound))
    connection = client.transport.connect(bound)
    pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))
    assert client.transport.counters()["dial_failed"] == 0


def test_a_connection_that_finds_no_descriptor_is_dialled_later(server: Endpoint, client: Endpoint) -> None:
    """Neither connect nor poll raises when the system has run out of them."""
    bound = server.transport.bind("tcp://127.0.0.1:0")
    client.transport.poll(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = client.transport.connect(bound)
    pump(server, client, until=lambda: client.saw(ConnectionUp(first)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), hard))
    try:
        second = client.transport.connect(bound)
        client.transport.poll(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert client.transport.counters()["dial_failed"] >= 1
    pump(server, client, until=lambda: client.saw(ConnectionUp(second)))


# -- waiting ---------------------------------------------------------------------------------------


def test_an_idle_loop_sleeps(server: Endpoint, client: Endpoint) -> None:
    """Waiting costs next to no processor time, with connections that are up and one that is refused."""
    connection = client.transport.connect(server.transport.bind("tcp://127.0.0.1:0"))
    client.transport.connect("tcp://127.0.0.1:1")
    pump(server, client, until=lambda: client.saw(ConnectionUp(connection)))
    before = time.thread_time()
    client.transport.poll(0.3)
    server.transport.poll(0.3)
    assert time.thread_time() - before < 0.05


def test_many_wake_ups_are_one_system_call() -> None:
    """The descriptor holds one wake-up whatever was asked, and another can follow it."""
    waker = Waker()
    for _ in range(3):
        for _ in range(100):
            waker.wake()
        assert os.read(waker.fileno, 8) in (b"\1\0\0\0\0\0\0\0", b"\1")
        waker.clear()
        with pytest.raises(BlockingIOError):
            os.read(waker.fileno, 8)


def test_wakes_during_close_do_not_fail(server: Endpoint) -> None:
    """A thread that hands in work while the node closes is not punished."""
    server.transport.poll(0)
    running = threading.Event()
    ended = threading.Event()
    errors: list[BaseException] = []

    def wake_until_ended() -> None:
        try:
            while not ended.is_set():
                server.transport.wake()
                running.set()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=wake_until_ended)
    thread.start()
    running.wait()
    server.transport.poll(1)
    server.transport.close()
    ended.set()
    thread.join()
    assert errors == []


# -- descriptors -----------------------------------------------------------------------------------


def test_a_descriptor_that_changed_hands_is_left_alone() -> None:
    """A number is not a connection: the wire of a closed one cuts nobody else's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        wire = identify(near.fileno(), lambda twin: True, 0.0)
        assert wire is not None
        fd = near.fileno()
        near.close()
        with socket.create_connection(listener.getsockname()) as other:
            # The system has given it the number that was free.
            assert other.fileno() == fd
            assert not wire.cut()
            wire.sample(1.0)
            assert wire.undelivered == 0
            other.sendall(b"still open")


def test_only_what_is_ours_is_identified(tmp_path: Path) -> None:
    """Files, closed numbers and other people's sockets are nobody's wire."""
    with (tmp_path / "file").open("w") as file:
        assert identify(file.fileno(), lambda twin: True, 0.0) is None
        closed = file.fileno()
    assert identify(closed, lambda twin: True, 0.0) is None
    with socket.socket() as other:
        assert identify(other.fileno(), lambda twin: False, 0.0) is None


def test_an_idle_connection_is_never_suspect_and_a_growing_one_is() -> None:
    """Heartbeats are forgiven by the second; bytes that were delivered are taken off."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
    ):
        receiver, _ = listener.accept()
        with receiver:
            wire = identify(receiver.fileno(), lambda twin: True, 0.0)
            assert wire is not None

            def receive(size: int) -> None:
                sender.sendall(b"x" * size)
                receiver.recv(size, socket.MSG_WAITALL)

            receive(100)
            wire.sample(1.0)
            assert wire.undelivered == 0
            receive(50_000)
            wire.sample(1.0)
            assert wire.undelivered == 50_000
            wire.delivered += 50_000
            assert wire.settle() == 0
            # Delivered before it was sampled: the credit is not lost.
            receive(50_000)
            wire.delivered += 50_000
            wire.settle()
            wire.sample(1.0)
            assert wire.undelivered == 0
            # Not read by anybody yet: the system's business, not libzmq's memory.
            sender.sendall(b"x" * 50_000)
            wire.sample(1.0)
            assert wire.undelivered == 0
