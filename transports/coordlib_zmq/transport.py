"""The ZeroMQ transport: one loop over every socket, in the thread that calls `poll`.

How it waits. libzmq gives each socket a descriptor that becomes readable when *something* has happened
to it; all of them, and the wake-up, are in one epoll. Such a descriptor is edge-triggered: any call on
the socket, a send too, may take the signal away. So a socket that was used since it was last found
empty is *dirty*, and no wait begins before each dirty socket has been looked at again.

    poll:  wait (not at all while a socket is dirty)
           -> keys to admit, reports of connections      [zap, monitor]
           -> frames                                     [at most FRAMES_MAX, BYTES_MAX a call]
           -> connections to dial again, wires to look at

A connection's life. One DEALER socket carries at most one connection: when that is lost or its
handshake fails, the socket is closed and a new one dials, so nothing queued for, or received from, one
connection can turn up in the next. Only while nobody answers the TCP connect does libzmq retry by itself.

::

    dialling --handshake done--> up --lost--> waiting --interval--> dialling
        \\--handshake failed--> waiting --backed off, next key set--> dialling

Rules: this module never decodes a frame, and starts no thread of Python (libzmq's I/O thread runs none).
"""

from __future__ import annotations

import os
import random
import select
import socket as os_socket
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Final, TypeAlias, TypeVar

import zmq

from coordlib.errors import ClusterClosed, ConfigError, ForkedError, LocalProtocolError, StartError
from coordlib.transport.base import (
    ConnectionDown,
    ConnectionUp,
    FrameReceived,
    HandshakeFailed,
    Lane,
    TransportEvent,
    TransportSettings,
)
from coordlib_zmq import listen, monitor, options, wires
from coordlib_zmq.listen import Endpoint, is_other_end
from coordlib_zmq.monitor import Monitor
from coordlib_zmq.options import WIRE_OVERHEAD
from coordlib_zmq.waiting import Waker, open_selector
from coordlib_zmq.wires import Wire
from coordlib_zmq.zap import KeyAdmission

__all__ = ["BYTES_MAX", "FRAMES_MAX", "ZmqTransport"]

FRAMES_MAX: Final = 1000  # frames that one poll returns
BYTES_MAX: Final = 8 * 1024 * 1024  # ... or about as many bytes

_Socket: TypeAlias = "zmq.Socket[bytes]"

_NOBLOCK: Final = int(zmq.NOBLOCK)
_SEND_MORE: Final = int(zmq.SNDMORE | zmq.NOBLOCK)
_POLLIN: Final = int(zmq.POLLIN)
_POLLOUT: Final = int(zmq.POLLOUT)
_EVENTS: Final = int(zmq.EVENTS)

_SOCKETS_MAX: Final = 4096  # libzmq's default of 1023 is three for each connection
_WAIT_SECONDS_MAX: Final = 3600.0

# Bytes that one connection may have sent without finishing a message, beyond the largest frame.
_UNDELIVERED_SLACK: Final = 1024 * 1024
_WIRE_INTERVAL_SECONDS: Final = 0.25
_WIRE_INTERVAL_SUSPECT_SECONDS: Final = 0.02
_WIRES_PER_ROUND: Final = 16

_COUNTERS: Final = (
    "accept_failed",  # the system refused a descriptor for an arriving connection
    "connection_lost",  # of connections that we opened
    "dial_failed",  # a socket could not be opened to connect again; retried
    "disconnected",  # of connections that were opened to us
    "dropped_full",  # send: not queued, the peer does not keep up
    "flood_cut",  # connections cut for a message without end
    "handshake_failed",  # all of them, on both sides
    "malformed_empty",  # frames without a byte
    "malformed_multipart",  # messages of more than one frame
    "no_handshake",  # handshake_failed: silence
    "oversize",  # frames above the limit
    "protocol",  # handshake_failed: something that does not speak our protocol
    "refused_key",  # handshake_failed: a client key that is not the cluster's
    "reply_dropped_full",  # reply: not queued, the peer does not keep up
    "reply_dropped_gone",  # reply: the route has ended
    "route_dropped",  # drop_route
    "stale_frame",  # frames of a connection that had ended
    "wrong_key",  # handshake_failed: a server key that is not ours
)

# What a forked child inherits is never finalised: libzmq would signal threads that only the parent has.
_GRAVEYARD: list[object] = []


class _Source:
    """A socket that frames come from, and what is needed to look at it cheaply."""

    __slots__ = ("fileno", "item", "monitor", "socket")

    socket: _Socket
    monitor: Monitor
    fileno: int
    item: list[tuple[_Socket, int]]

    def adopt(self, socket: _Socket, watcher: Monitor) -> None:
        self.socket = socket
        self.monitor = watcher
        self.fileno = _descriptor(socket)
        self.item = [(socket, _POLLIN)]


_SourceT = TypeVar("_SourceT", bound=_Source)


class _Connection(_Source):
    """One `connect`: its present socket, if it has one, and how it fares."""

    __slots__ = (
        "dial_at",
        "endpoint",
        "failed",
        "failure",
        "id",
        "is_dialled",
        "is_up",
        "key_index",
        "lane",
        "where",
        "wire",
    )

    def __init__(self, identifier: int, endpoint: str, where: Endpoint, lane: str) -> None:
        self.id = identifier
        self.endpoint = endpoint
        self.where = where
        self.lane = lane
        self.is_dialled = False  # there is a socket
        self.is_up = False
        self.failed = 0  # handshakes in a row
        self.key_index = 0  # stays with what worked
        self.failure: tuple[int, int] | None = None  # what the monitor said about this one
        self.dial_at = 0.0
        self.wire: Wire | None = None

    def take_wire(self) -> Wire | None:
        wire, self.wire = self.wire, None
        return wire


class ZmqTransport:
    """
    See `coordlib.transport.base.Transport`.

    While `settings.keys` holds more than one set (a change of secret), connections try them in turn and
    every set is accepted; see `listen` for how one port presents several server keys.

    `settings.options` may hold `ipv6` (bool): resolve host names to IPv6 addresses, and listen at `*` on
    both. Literal IPv6 addresses need no option.

    Args:
        settings: `keys` must not be empty: there is no unauthenticated mode.

    Raises:
        ConfigError: A setting is missing or wrong.
    """

    def __init__(self, settings: TransportSettings) -> None:
        options.check(settings)
        self._settings = settings
        self._keys = tuple(settings.keys)
        self._ipv6 = bool(settings.options.get("ipv6", False))
        self._frame_size_bytes_max = settings.frame_size_bytes_max
        self._undelivered_bytes_max = settings.frame_size_bytes_max + _UNDELIVERED_SLACK
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._pid = os.getpid()
        self._is_closed = False
        self._is_forked = False
        # Guards only the birth of the waker, which `wake` may be the first to need.
        self._waker_lock = threading.Lock()
        self._waker: Waker | None = None
        self._context: zmq.Context[_Socket] | None = None
        self._selector: Any = None
        self._data: dict[int, _Source] = {}  # descriptor -> socket with frames
        self._reports: dict[int, Callable[[list[TransportEvent]], None]] = {}
        self._dirty: dict[_Source, None] = {}
        self._frames_left = 0
        self._bytes_left = 0

        self._connections: dict[int, _Connection] = {}
        self._connection_last = 0
        self._due = 0.0  # when `_housekeep` has something to do
        self._wires: dict[int, Wire] = {}  # inode -> connection, the longest unseen first

        self._router: _Source | None = None
        self._admission: KeyAdmission | None = None
        self._listening: list[Endpoint] = []
        self._listener_inodes: set[int] = set()
        self._accepted: dict[int, Wire] = {}  # descriptor -> connection
        self._routes: dict[bytes, Wire] = {}
        self._successes = 0
        self._failure: str | None = None
        self._socket_last = 0
        self._is_discarding = False  # in the middle of a message of several frames

    # -- opening -----------------------------------------------------------------------------------

    def bind(self, endpoint: str) -> str:
        """
        Accept connections at `endpoint`; may be called again for another.

        A socket file left by a dead process is removed. The folder of an `ipc` path is the caller's to
        protect (mode 0700): the keys keep strangers out, not from trying.
        """
        try:
            where = listen.parse_endpoint(endpoint)
        except ConfigError as exc:
            raise StartError(str(exc), endpoint=endpoint) from exc
        self._open()
        router = self._router or self._open_router()
        socket = router.socket
        socket.setsockopt(zmq.IPV6, int(self._ipv6 or where.is_ipv6))
        try:
            if where.scheme == "ipc":
                listen.clear_stale_path(where.path)
            if len(self._keys) > 1 and listen.can_share_port(where):
                self._bind_each_key(socket, where)
            else:
                socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys[0].server_secret)
                socket.bind(endpoint)
        except (OSError, zmq.ZMQError) as exc:
            raise listen.start_error(endpoint, exc) from exc
        bound = str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._listening.append(listen.parse_endpoint(bound))
        return bound

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        """
        Open a connection; its host need neither exist nor answer yet.

        Raises:
            ConfigError: The endpoint or the lane is malformed.
        """
        if lane not in (Lane.CONTROL, Lane.BULK):
            raise ConfigError(f"no lane is called {lane!r}; there are {Lane.CONTROL!r} and {Lane.BULK!r}")
        where = listen.parse_endpoint(endpoint)
        self._open()
        self._connection_last += 1
        connection = _Connection(self._connection_last, endpoint, where, lane)
        self._connections[connection.id] = connection
        self._dial_or_retry(connection, monotonic())
        return connection.id

    def disconnect(self, connection: int) -> None:
        known = self._connections.pop(connection, None)
        if known is not None and not self._is_closed:
            self._hang_up(known)

    # -- sending -----------------------------------------------------------------------------------

    def send(self, connection: int, frame: bytes) -> bool:
        """
        Queue a frame; False when the connection has not been reported up, or its queue is full.

        Raises:
            LocalProtocolError: The frame is empty or above `frame_size_bytes_max`: the peer would refuse it.
        """
        known = self._connections.get(connection)
        if known is None or not known.is_up:
            return False
        if not 0 < len(frame) <= self._frame_size_bytes_max:
            raise self._unsendable(frame)
        self._dirty[known] = None
        try:
            known.socket.send(frame, _NOBLOCK)
        except zmq.Again:
            return self._send_again(known, frame)
        return True

    def reply(self, route: bytes, frame: bytes) -> bool:
        """
        Queue a frame to the other end of a route; False when it is gone or full.

        Raises:
            LocalProtocolError: As for `send`.
        """
        router = self._router
        if router is None:
            return False
        if not 0 < len(frame) <= self._frame_size_bytes_max:
            raise self._unsendable(frame)
        self._dirty[router] = None
        send = router.socket.send
        try:
            send(route, _SEND_MORE)
        except zmq.Again:
            # As in `_send_again`: the peer may have made room that this socket has not heard of.
            router.socket.getsockopt(_EVENTS)
            try:
                send(route, _SEND_MORE)
            except zmq.ZMQError:
                self._counters["reply_dropped_full"] += 1
                return False
        except zmq.ZMQError:  # EHOSTUNREACH
            self._counters["reply_dropped_gone"] += 1
            return False
        # Accepted with its route: from here on the frame is queued, or dropped with the connection.
        send(frame, _NOBLOCK)
        return True

    def drop_route(self, route: bytes) -> None:
        wire = self._routes.get(route)
        if wire is not None and wire.cut():
            self._counters["route_dropped"] += 1

    # -- waiting -----------------------------------------------------------------------------------

    def poll(self, timeout_seconds: float) -> list[TransportEvent]:
        """
        Wait for something to happen; see the module's docstring.

        Raises:
            ClusterClosed, ForkedError: It is no longer, or not here, to be used.
        """
        if self._pid != os.getpid() or self._is_forked:
            raise ForkedError("this transport belongs to the parent process; open a new one")
        if self._context is None or self._is_closed:
            self._open()
        events: list[TransportEvent] = []
        dirty = self._dirty
        data = self._data
        waker = self._waker
        assert waker is not None
        waker_fd = waker.fileno
        wait_for = self._selector.poll
        self._frames_left = FRAMES_MAX
        self._bytes_left = BYTES_MAX
        now = monotonic()
        deadline = now + min(timeout_seconds, _WAIT_SECONDS_MAX)
        while True:
            if dirty:
                self._drain_dirty(events)
            # Whatever was found, the other sockets get their turn before the caller does.
            wait_seconds = 0.0 if events or dirty else max(0.0, min(deadline, self._due) - now)
            is_woken = False
            arrived = None
            for fd, _ in wait_for(wait_seconds):
                source = data.get(fd)
                if source is not None:
                    arrived = [source] if arrived is None else [*arrived, source]
                elif fd == waker_fd:
                    waker.clear()
                    is_woken = True
                else:
                    # A report may have closed the socket that this one is about.
                    handler = self._reports.get(fd)
                    if handler is not None:
                        handler(events)
            if arrived is not None:
                for source in arrived:
                    if data.get(source.fileno) is source:
                        dirty[source] = None
                        self._drain(source, events)
            now = monotonic()
            if now >= self._due:
                self._housekeep(now, events)
            # Also when all there was had to be dropped: a flood of nothing must not keep the caller.
            is_full = self._frames_left <= 0 or self._bytes_left <= 0
            if events or is_woken or is_full or now >= deadline:
                return events

    def wake(self) -> None:
        waker = self._waker
        if waker is None:
            with self._waker_lock:
                if self._is_closed:
                    return
                waker = self._waker = self._waker or Waker()
        waker.wake()

    # -- ending ------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._waker_lock:
            if self._is_closed:
                return
            self._is_closed = True
            waker, self._waker = self._waker, None
        if self._is_forked or self._pid != os.getpid():
            _GRAVEYARD.append((self.__dict__.copy(), waker))
            return
        if self._context is None:
            return
        for connection in self._connections.values():
            self._hang_up(connection)
        self._connections.clear()
        router, self._router = self._router, None
        # While the listener still answers, nobody else can have taken the path.
        for where in self._listening:
            if where.scheme == "ipc":
                listen.remove_path(where.path)
        if router is not None:
            _close(router)
        if self._admission is not None:
            self._admission.close()
        self._forget()
        self._selector.close()
        self._context.destroy(linger=0)

    def after_fork_in_child(self) -> None:
        """
        In a forked child: let go of inherited descriptors so that peers see the parent's death.

        The transport is closed for the child; the parent's works on. May be called from a fork hook:
        takes no lock, and waits for nothing.
        """
        if self._is_forked or self._context is None:
            self._is_forked = self._is_closed = True
            return
        inodes = self._listener_inodes | set(self._wires)
        if not self._is_closed:
            wires.let_go_of_inherited(inodes, self._is_ours)
        _GRAVEYARD.append(self.__dict__.copy())
        self._is_forked = self._is_closed = True
        self._waker_lock = threading.Lock()  # its holder may have stayed in the parent
        self._waker = None
        self._router = None
        self._connections = {}
        self._forget()

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    # -- sockets -----------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._is_forked or self._pid != os.getpid():
            raise ForkedError("this transport belongs to the parent process; open a new one")
        if self._is_closed:
            raise ClusterClosed("this transport is closed; open a new one")
        if self._context is not None:
            return
        with self._waker_lock:
            waker = self._waker = self._waker or Waker()
        self._selector = open_selector()
        self._selector.register(waker.fileno, select.POLLIN)
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, _SOCKETS_MAX)
        self._due = monotonic() + _WIRE_INTERVAL_SECONDS

    def _open_source(
        self, source: _SourceT, kind: int, events: int, dress: Callable[[_Socket], None]
    ) -> _SourceT:
        """Give a source a new socket with its options, and a monitor."""
        assert self._context is not None
        self._socket_last += 1
        socket = self._context.socket(kind)
        try:
            dress(socket)
            source.adopt(socket, Monitor(self._context, socket, events, self._socket_last))
        except BaseException:
            socket.close(0)  # one that is forgotten would keep close() waiting for ever
            raise
        return source

    def _open_router(self) -> _Source:
        assert self._context is not None
        self._admission = KeyAdmission(self._context, {keys.client_public for keys in self._keys})
        self._watch(self._admission.fileno, self._on_admission)
        router = self._open_source(
            _Source(),
            zmq.ROUTER,
            monitor.ROUTER_EVENTS,
            lambda socket: options.dress_router(socket, self._settings),
        )
        self._watch(router.monitor.fileno, self._on_router_report)
        self._watch_data(router)
        self._router = router
        return router

    def _bind_each_key(self, socket: _Socket, where: Endpoint) -> None:
        listeners, port = listen.share_port(where, len(self._keys))
        host = f"[{where.host}]" if where.is_ipv6 else where.host
        try:
            for keys in self._keys:
                socket.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret)
                socket.setsockopt(zmq.USE_FD, listeners[0].fileno())
                socket.bind(f"tcp://{host}:{port}")
                listeners.pop(0).detach()  # libzmq's from now on
        finally:
            socket.setsockopt(zmq.USE_FD, -1)
            for listener in listeners:
                listener.close()

    def _dial(self, connection: _Connection) -> None:
        """Give a connection a fresh socket that dials, with the key set whose turn it is."""
        assert self._context is not None
        settings = self._settings
        is_bulk = connection.lane == Lane.BULK
        self._open_source(
            connection,
            zmq.DEALER,
            monitor.CONNECTION_EVENTS,
            lambda socket: options.dress_dealer(
                socket,
                settings,
                self._keys[connection.key_index % len(self._keys)],
                queue_frames_max=settings.bulk_queue_frames_max
                if is_bulk
                else settings.control_queue_frames_max,
                is_ipv6=self._ipv6 or connection.where.is_ipv6,
            ),
        )
        connection.is_dialled = True
        connection.failure = None
        connection.dial_at = 0.0
        self._watch(connection.monitor.fileno, lambda events: self._on_connection_report(connection, events))
        self._watch_data(connection)
        connection.socket.connect(connection.endpoint)

    def _dial_or_retry(self, connection: _Connection, now: float) -> None:
        try:
            self._dial(connection)
        except zmq.ZMQError:
            # Out of descriptors, most likely. An endpoint that libzmq alone objects to ends up here too:
            # it stays down and is counted, like one where nobody listens.
            self._counters["dial_failed"] += 1
            self._dial_later(connection, now)

    def _hang_up(self, connection: _Connection) -> None:
        """Close a connection's socket; whatever is queued in it is gone."""
        connection.is_up = False
        wire = connection.take_wire()
        if wire is not None:
            self._wires.pop(wire.inode, None)
        if not connection.is_dialled:
            return
        connection.is_dialled = False
        for fd in (connection.fileno, connection.monitor.fileno):
            self._selector.unregister(fd)
        del self._data[connection.fileno]
        del self._reports[connection.monitor.fileno]
        self._dirty.pop(connection, None)
        _close(connection)

    def _dial_later(self, connection: _Connection, now: float) -> None:
        settings = self._settings
        self._hang_up(connection)
        # Each key set gets its try before the interval grows.
        doublings = min(connection.failed // len(self._keys), 16)
        interval_ms = min(settings.reconnect_interval_ms << doublings, settings.reconnect_interval_ms_max)
        connection.dial_at = now + interval_ms / 1000 * random.uniform(0.5, 1.0)
        self._due = min(self._due, connection.dial_at)

    def _watch(self, fd: int, handler: Callable[[list[TransportEvent]], None]) -> None:
        self._selector.register(fd, select.POLLIN)
        self._reports[fd] = handler

    def _watch_data(self, source: _Source) -> None:
        self._selector.register(source.fileno, select.POLLIN)
        self._data[source.fileno] = source
        self._dirty[source] = None

    def _forget(self) -> None:
        self._data.clear()
        self._reports.clear()
        self._dirty.clear()
        self._wires.clear()
        self._accepted.clear()
        self._routes.clear()

    # -- frames ------------------------------------------------------------------------------------

    def _drain_dirty(self, events: list[TransportEvent]) -> None:
        """Take frames from dirty sockets, each in turn, until they are empty or this poll has its fill."""
        dirty = self._dirty
        if len(dirty) == 1:
            (source,) = dirty
            if zmq.zmq_poll(source.item, 0):
                self._drain(source, events)
            else:
                del dirty[source]
            return
        readable = {socket for socket, _ in zmq.zmq_poll([source.item[0] for source in dirty], 0)}
        for source in list(dirty):
            if source not in dirty:  # closed by a report meanwhile
                continue
            # Last in the queue now, so that a busy socket does not starve the others.
            del dirty[source]
            if source.socket in readable:
                dirty[source] = None
                self._drain(source, events)

    def _drain(self, source: _Source, events: list[TransportEvent]) -> None:
        if isinstance(source, _Connection):
            self._drain_connection(source, events)
        else:
            self._drain_router(source, events)

    def _drain_router(self, router: _Source, events: list[TransportEvent]) -> None:
        recv = router.socket.recv
        poll_router = zmq.zmq_poll
        item = router.item
        routes = self._routes
        size_max = self._frame_size_bytes_max
        append = events.append
        frames_left = self._frames_left
        bytes_left = self._bytes_left
        if self._is_discarding:
            frames_left = self._discard(router, None, frames_left)
        frames_taken = 0
        while frames_left > 0 and bytes_left > 0:
            try:
                route = recv(_NOBLOCK)
            except zmq.Again:
                self._dirty.pop(router, None)
                break
            part = recv(_NOBLOCK, False)
            frame = part.bytes
            size = len(frame)
            frames_left -= 1
            bytes_left -= size
            wire = routes.get(route)
            if wire is None:
                wire = self._learn_route(route, part, events)
            if wire is not None:
                wire.delivered += size + WIRE_OVERHEAD
            if part.more:
                self._counters["malformed_multipart"] += 1
                frames_left = self._discard(router, wire, frames_left)
            elif 0 < size <= size_max:
                append(FrameReceived(0, route, frame))
            else:
                self._refuse_frame(size)
            # Asking costs a quarter of what it costs to be told "no" by an exception; for the third
            # frame in a row it is likelier that there are many.
            frames_taken += 1
            if frames_taken < 3 and not poll_router(item, 0):
                self._dirty.pop(router, None)
                break
        self._frames_left = frames_left
        self._bytes_left = bytes_left

    def _drain_connection(self, connection: _Connection, events: list[TransportEvent]) -> None:
        recv = connection.socket.recv
        item = connection.item
        size_max = self._frame_size_bytes_max
        identifier = connection.id
        wire = connection.wire
        is_up = connection.is_up
        frames_taken = 0
        while self._frames_left > 0 and self._bytes_left > 0:
            try:
                part = recv(_NOBLOCK, False)
            except zmq.Again:
                self._dirty.pop(connection, None)
                return
            frame = part.bytes
            size = len(frame)
            self._frames_left -= 1
            self._bytes_left -= size
            if not is_up:
                # The report that it is up was made before any frame was queued, but after we looked.
                self._on_connection_report(connection, events)
                is_up, wire = connection.is_up, connection.wire
                if not connection.is_dialled:
                    return
            if wire is not None:
                wire.delivered += size + WIRE_OVERHEAD
            if part.more:
                self._counters["malformed_multipart"] += 1
                while recv(_NOBLOCK, False).more:
                    self._frames_left -= 1
            elif not is_up:
                self._counters["stale_frame"] += 1
            elif 0 < size <= size_max:
                events.append(FrameReceived(identifier, b"", frame))
            else:
                self._refuse_frame(size)
            frames_taken += 1
            if frames_taken < 3 and not zmq.zmq_poll(item, 0):
                self._dirty.pop(connection, None)
                return

    def _discard(self, router: _Source, wire: Wire | None, frames_left: int) -> int:
        """Drop the rest of a message of several frames; go on at the next poll if it is a long one."""
        recv = router.socket.recv
        self._is_discarding = True
        while frames_left > 0:
            part = recv(_NOBLOCK, False)
            frames_left -= 1
            if wire is not None:
                wire.delivered += len(part) + WIRE_OVERHEAD
            if not part.more:
                self._is_discarding = False
                break
        return frames_left

    def _learn_route(self, route: bytes, part: zmq.Frame, events: list[TransportEvent]) -> Wire | None:
        """Find the wire behind a route at its first frame; None when that has ended since."""
        try:
            fd = int(part.get(zmq.SRCFD))
        except zmq.ZMQError:
            return None
        if fd not in self._accepted:
            self._on_router_report(events)
        wire = self._accepted.get(fd)
        if wire is not None:
            # Another route's last frames may have been read after its descriptor was given to this one.
            self._routes.pop(wire.route, None)
            wire.route = route
            self._routes[route] = wire
        return wire

    def _refuse_frame(self, size: int) -> None:
        self._counters["oversize" if size else "malformed_empty"] += 1

    def _send_again(self, connection: _Connection, frame: bytes) -> bool:
        # libzmq looks at most once in a while for news of room in the queue, unless it is asked.
        if int(connection.socket.getsockopt(_EVENTS)) & _POLLOUT:
            try:
                connection.socket.send(frame, _NOBLOCK)
                return True
            except zmq.Again:
                pass
        self._counters["dropped_full"] += 1
        return False

    def _unsendable(self, frame: bytes) -> LocalProtocolError:
        return LocalProtocolError(
            f"a frame has 1 to {self._frame_size_bytes_max} bytes, not {len(frame)}; send more of them",
            size=len(frame),
        )

    # -- reports of libzmq ---------------------------------------------------------------------------

    def _on_admission(self, events: list[TransportEvent]) -> None:
        assert self._admission is not None
        for address in self._admission.refused_addresses():
            self._count_failure("refused-key")
            events.append(HandshakeFailed(0, address, "refused-key"))

    def _on_router_report(self, events: list[TransportEvent]) -> None:
        assert self._router is not None
        for event, value in self._router.monitor.events():
            if event == monitor.HANDSHAKE_SUCCEEDED:
                self._successes += 1
            elif event == monitor.ACCEPTED:
                now = monotonic()
                wire = wires.identify(value, self._is_accepted, now)
                if wire is None:  # gone already; its end is still to be reported
                    wire = Wire(value, 0, "", False, now)
                else:
                    self._wires[wire.inode] = wire
                wire.successes_before = self._successes
                self._accepted[value] = wire
            elif event & monitor.HANDSHAKE_FAILED:
                self._failure = monitor.failure_reason(event, value, we_dialled=False)
            elif event == monitor.DISCONNECTED:
                self._on_accepted_end(value, events)
            elif event == monitor.LISTENING:
                listener = wires.identify(value, lambda _: True, 0.0)
                if listener is not None:
                    self._listener_inodes.add(listener.inode)
            elif event == monitor.ACCEPT_FAILED:
                self._counters["accept_failed"] += 1

    def _on_accepted_end(self, fd: int, events: list[TransportEvent]) -> None:
        reason, self._failure = self._failure, None
        wire = self._accepted.pop(fd, None)
        address = ""
        if wire is not None:
            address = wire.address
            self._wires.pop(wire.inode, None)
            self._routes.pop(wire.route, None)
            if reason is None and wire.successes_before == self._successes:
                # No handshake at all succeeded in its lifetime, so its own did not. libzmq reports no
                # failure for what did not even look like a greeting.
                reason = "protocol"
        if reason is None:
            self._counters["disconnected"] += 1
        elif reason != "refused-key":  # that was counted where it was refused
            self._count_failure(reason)
            # With two keys a correct peer may have asked for the other one first.
            if reason != "wrong-key" or len(self._keys) == 1:
                events.append(HandshakeFailed(0, address, reason))

    def _on_connection_report(self, connection: _Connection, events: list[TransportEvent]) -> None:
        for event, value in connection.monitor.events():
            if event == monitor.HANDSHAKE_SUCCEEDED:
                connection.is_up = True
                connection.failed = 0
                # Makes libzmq take note of the connection now: a send must not find it missing.
                connection.socket.getsockopt(_EVENTS)
                self._dirty[connection] = None
                events.append(ConnectionUp(connection.id))
            elif event == monitor.CONNECTED:
                wire = wires.identify(value, lambda twin: is_other_end(connection.where, twin), monotonic())
                if wire is not None:
                    wire.connection = connection.id
                    connection.wire = wire
                    self._wires[wire.inode] = wire
            elif event & monitor.HANDSHAKE_FAILED:
                connection.failure = (event, value)
            elif event == monitor.DISCONNECTED:
                # What comes after belongs to an attempt of libzmq's own, which ends with the socket.
                self._on_connection_end(connection, events)
                return

    def _on_connection_end(self, connection: _Connection, events: list[TransportEvent]) -> None:
        now = monotonic()
        if connection.is_up:
            # Frames that arrived before the end are delivered before its report: a full queue at most.
            fill = self._frames_left, self._bytes_left
            self._frames_left = self._settings.control_queue_frames_max + 1
            self._bytes_left = self._frames_left * self._frame_size_bytes_max
            self._drain_connection(connection, events)
            self._frames_left, self._bytes_left = fill
            self._counters["connection_lost"] += 1
            events.append(ConnectionDown(connection.id))
        else:
            connection.failed += 1
            connection.key_index += 1
            reason = (
                monitor.failure_reason(*connection.failure, we_dialled=True)
                if connection.failure
                else "protocol"
            )
            self._count_failure(reason)
            # While there are key sets left to try, nothing has failed yet.
            if connection.failed % len(self._keys) == 0:
                events.append(HandshakeFailed(connection.id, connection.endpoint, reason))
        self._dial_later(connection, now)

    def _count_failure(self, reason: str) -> None:
        self._counters["handshake_failed"] += 1
        self._counters[reason.replace("-", "_")] += 1

    # -- what is due -------------------------------------------------------------------------------

    def _housekeep(self, now: float, events: list[TransportEvent]) -> None:
        due = now + _WIRE_INTERVAL_SECONDS
        for connection in list(self._connections.values()):
            if connection.is_dialled:
                continue
            if connection.dial_at <= now:
                self._dial_or_retry(connection, now)
            if not connection.is_dialled:
                due = min(due, connection.dial_at)
        for wire in list(self._wires.values())[:_WIRES_PER_ROUND]:
            del self._wires[wire.inode]
            self._wires[wire.inode] = wire
            if self._look_at(wire, now, events):
                due = min(due, now + _WIRE_INTERVAL_SUSPECT_SECONDS)
        self._due = due

    def _look_at(self, wire: Wire, now: float, events: list[TransportEvent]) -> bool:
        """
        Cut the wire if a message on it does not end; True while it is suspect.

        Only what had come in at the *previous* look counts, and only when the socket has been emptied
        since: every finished message of then has been delivered by now.
        """
        source: _Source | None = self._connections.get(wire.connection) if wire.connection else self._router
        if source is None or source in self._dirty:
            return False
        if wire.settle() > self._undelivered_bytes_max and wire.cut():
            self._counters["flood_cut"] += 1
            events.append(HandshakeFailed(wire.connection, wire.address, "flood"))
            return False
        wire.sample(now)
        return wire.undelivered > self._undelivered_bytes_max

    # -- whose descriptor is it? -------------------------------------------------------------------

    def _is_accepted(self, twin: os_socket.socket) -> bool:
        return self._is_local(twin) and twin.getpeername() is not None

    def _is_local(self, twin: os_socket.socket) -> bool:
        name = twin.getsockname()
        if twin.family == os_socket.AF_UNIX:
            return any(where.path == name for where in self._listening if where.scheme == "ipc")
        if twin.family in (os_socket.AF_INET, os_socket.AF_INET6):
            return any(where.port == name[1] for where in self._listening if where.scheme == "tcp")
        return False

    def _is_ours(self, twin: os_socket.socket) -> bool:
        if self._is_local(twin):
            return True
        try:
            return any(is_other_end(connection.where, twin) for connection in self._connections.values())
        except OSError:  # not connected
            return False


def _descriptor(socket: _Socket) -> int:
    return int(socket.getsockopt(zmq.FD))


def _close(source: _Source) -> None:
    # The monitor first: an event nobody reads any more would block libzmq's I/O thread.
    source.socket.monitor(None, 0)
    source.socket.close(0)
    source.monitor.close()
