"""The memory transport: frames are handed from one transport's inbox to another's, in one process.

Everything is guarded by one lock, the hub's; a poll waits on a condition of its own over that lock.
The hub is the one piece of global state: it is what a network is to other transports.

Frames are passed, not copied. What a connection had sent before it ended is still delivered, and
before the report of the end; nothing is delivered after it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from time import monotonic
from typing import Final

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

__all__ = ["BYTES_MAX", "FRAMES_MAX", "MemoryTransport"]

FRAMES_MAX: Final = 1000  # frames that one poll returns
BYTES_MAX: Final = 8 * 1024 * 1024  # ... or about as many bytes

_SCHEME: Final = "memory://"
_WAIT_SECONDS_MAX: Final = 3600.0
_COUNTERS: Final = (
    "connection_lost",
    "disconnected",
    "dropped_full",
    "handshake_failed",
    "malformed_empty",
    "malformed_multipart",
    "oversize",
    "reply_dropped_full",
    "reply_dropped_gone",
    "route_dropped",
    "wrong_key",
)


class _Hub:
    """Who listens where, and who waits for somebody to."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.listeners: dict[str, MemoryTransport] = {}
        self.waiting: dict[str, list[_Link]] = {}
        self.name_last = 0
        self.route_last = 0

    def free_name(self) -> str:
        while True:
            self.name_last += 1
            endpoint = f"{_SCHEME}{self.name_last}"
            if endpoint not in self.listeners:
                return endpoint


_hub = _Hub()


class _Queue:
    """How much of one direction of a link is in the other end's inbox."""

    __slots__ = ("count", "count_max")

    def __init__(self, count_max: int) -> None:
        self.count = 0
        self.count_max = count_max


class _Link:
    """One `connect`: both ends of it while it is up."""

    __slots__ = (
        "acceptor",
        "connection",
        "dialler",
        "endpoint",
        "is_up",
        "queue_max",
        "replies",
        "route",
        "sent",
    )

    def __init__(self, dialler: MemoryTransport, connection: int, endpoint: str, queue_max: int) -> None:
        self.dialler = dialler
        self.connection = connection
        self.endpoint = endpoint
        self.queue_max = queue_max
        self.acceptor: MemoryTransport | None = None
        self.is_up = False  # and the dialler knows
        self.route = b""
        self.sent = _Queue(queue_max)
        self.replies = _Queue(queue_max)


class MemoryTransport:
    """
    See `coordlib.transport.base.Transport`.

    `settings.keys` are compared, not used: a connection is made when both sides have a set in common
    (or neither has any), and fails as a wrong key does otherwise.
    """

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._pid = os.getpid()
        self._hub = _hub
        self._news = threading.Condition(_hub.lock)
        self._counters = dict.fromkeys(_COUNTERS, 0)
        self._inbox: deque[tuple[_Queue | None, TransportEvent]] = deque()
        self._links: dict[int, _Link] = {}
        self._routes: dict[bytes, _Link] = {}
        self._listening: list[str] = []
        self._connection_last = 0
        self._is_woken = False
        self._is_closed = False

    # -- opening -----------------------------------------------------------------------------------

    def bind(self, endpoint: str) -> str:
        """Accept connections at `memory://name`; `memory://*` and `memory://` choose a free name."""
        if not endpoint.startswith(_SCHEME):
            raise StartError(f"cannot listen at {endpoint}: write memory://some-name", endpoint=endpoint)
        self._check_open()
        with self._hub.lock:
            if endpoint in (_SCHEME, f"{_SCHEME}*"):
                endpoint = self._hub.free_name()
            if endpoint in self._hub.listeners:
                raise StartError(
                    f"cannot listen at {endpoint}: the address is taken; choose another name",
                    endpoint=endpoint,
                )
            self._hub.listeners[endpoint] = self
            self._listening.append(endpoint)
            for link in self._hub.waiting.pop(endpoint, []):
                link.dialler._dial(link)
        return endpoint

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        if lane not in (Lane.CONTROL, Lane.BULK):
            raise ConfigError(f"no lane is called {lane!r}; there are {Lane.CONTROL!r} and {Lane.BULK!r}")
        if not endpoint.startswith(_SCHEME) or endpoint == _SCHEME:
            raise ConfigError(f"{endpoint!r} is no endpoint; write memory://some-name", endpoint=endpoint)
        self._check_open()
        settings = self._settings
        queue_max = settings.bulk_queue_frames_max if lane == Lane.BULK else settings.control_queue_frames_max
        with self._hub.lock:
            self._connection_last += 1
            link = _Link(self, self._connection_last, endpoint, queue_max)
            self._links[link.connection] = link
            self._dial(link)
            return link.connection

    def disconnect(self, connection: int) -> None:
        with self._hub.lock:
            link = self._links.pop(connection, None)
            if link is not None:
                self._hang_up(link)
                self._inbox = deque(item for item in self._inbox if item[1][0] != connection)

    # -- sending -----------------------------------------------------------------------------------

    def send(self, connection: int, frame: bytes) -> bool:
        """
        Queue a frame; False when not connected or the queue is full.

        Raises:
            LocalProtocolError: The frame is empty or above `frame_size_bytes_max`.
        """
        with self._hub.lock:
            link = self._links.get(connection)
            if link is None or link.acceptor is None or not link.is_up:
                return False
            self._check_frame(frame)
            if link.acceptor._take_in(link.sent, FrameReceived(0, link.route, frame)):
                return True
            self._counters["dropped_full"] += 1
            return False

    def reply(self, route: bytes, frame: bytes) -> bool:
        """
        Queue a frame to the other end of a route; False when it is gone or full.

        Raises:
            LocalProtocolError: As for `send`.
        """
        with self._hub.lock:
            link = self._routes.get(route)
            if link is None:
                self._counters["reply_dropped_gone"] += 1
                return False
            self._check_frame(frame)
            if link.dialler._take_in(link.replies, FrameReceived(link.connection, b"", frame)):
                return True
            self._counters["reply_dropped_full"] += 1
            return False

    def drop_route(self, route: bytes) -> None:
        with self._hub.lock:
            link = self._routes.get(route)
            if link is not None:
                self._counters["route_dropped"] += 1
                link.dialler._lose(link)
                link.dialler._dial(link)

    # -- waiting -----------------------------------------------------------------------------------

    def poll(self, timeout_seconds: float) -> list[TransportEvent]:
        self._check_open()
        deadline = monotonic() + min(timeout_seconds, _WAIT_SECONDS_MAX)
        events: list[TransportEvent] = []
        bytes_left = BYTES_MAX
        with self._hub.lock:
            while not self._inbox and not self._is_woken:
                remaining = deadline - monotonic()
                if remaining <= 0:
                    break
                self._news.wait(remaining)
            self._is_woken = False
            while self._inbox and len(events) < FRAMES_MAX and bytes_left > 0:
                queue, event = self._inbox.popleft()
                if queue is not None:
                    queue.count -= 1
                if isinstance(event, FrameReceived):
                    bytes_left -= len(event.frame)
                elif isinstance(event, ConnectionUp):
                    self._links[event.connection].is_up = True
                events.append(event)
        return events

    def wake(self) -> None:
        with self._hub.lock:
            self._is_woken = True
            self._news.notify()

    # -- ending ------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._is_closed or self._pid != os.getpid():
            return
        with self._hub.lock:
            self._is_closed = True
            for endpoint in self._listening:
                del self._hub.listeners[endpoint]
            for link in list(self._routes.values()):
                link.dialler._lose(link)
                link.dialler._dial(link)
            for link in self._links.values():
                self._hang_up(link)
            self._links.clear()
            self._inbox.clear()
            self._news.notify()

    def after_fork_in_child(self) -> None:
        """In a forked child: forget the hub. The memory is a copy; the parent's goes on without it."""
        global _hub
        if self._hub is _hub and self._pid != os.getpid():
            _hub = _Hub()  # its lock may be held by a thread that only the parent has
        self._hub = _hub
        self._news = threading.Condition(_hub.lock)
        self._is_closed = True
        self._links = {}
        self._routes = {}
        self._inbox = deque()

    def counters(self) -> dict[str, int]:
        return dict(self._counters)

    # -- links (under the hub's lock) ----------------------------------------------------------------

    def _dial(self, link: _Link) -> None:
        acceptor = self._hub.listeners.get(link.endpoint)
        if acceptor is None or not self._shares_key_with(acceptor):
            # Keys do not change while a transport lives, so the next chance is the next listener.
            self._hub.waiting.setdefault(link.endpoint, []).append(link)
            if acceptor is not None:
                self._fail(HandshakeFailed(link.connection, link.endpoint, "wrong-key"))
                acceptor._fail(HandshakeFailed(0, link.endpoint, "wrong-key"))
            return
        self._hub.route_last += 1
        link.acceptor = acceptor
        link.route = self._hub.route_last.to_bytes(8, "big")
        link.sent = _Queue(link.queue_max)
        link.replies = _Queue(acceptor._settings.control_queue_frames_max)
        acceptor._routes[link.route] = link
        self._take_in(None, ConnectionUp(link.connection))

    def _hang_up(self, link: _Link) -> None:
        acceptor, link.acceptor = link.acceptor, None
        link.is_up = False
        if acceptor is not None:
            del acceptor._routes[link.route]
            acceptor._counters["disconnected"] += 1
        waiting = self._hub.waiting.get(link.endpoint, [])
        if link in waiting:
            waiting.remove(link)

    def _lose(self, link: _Link) -> None:
        self._hang_up(link)
        self._counters["connection_lost"] += 1
        self._take_in(None, ConnectionDown(link.connection))

    def _fail(self, event: HandshakeFailed) -> None:
        self._counters["handshake_failed"] += 1
        self._counters["wrong_key"] += 1
        self._take_in(None, event)

    def _take_in(self, queue: _Queue | None, event: TransportEvent) -> bool:
        if queue is not None:
            if queue.count >= queue.count_max:
                return False
            queue.count += 1
        self._inbox.append((queue, event))
        self._news.notify()
        return True

    def _shares_key_with(self, other: MemoryTransport) -> bool:
        ours, theirs = self._settings.keys, other._settings.keys
        return any(keys in theirs for keys in ours) or not (ours or theirs)

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedError("this transport belongs to the parent process; open a new one")
        if self._is_closed:
            raise ClusterClosed("this transport is closed; open a new one")

    def _check_frame(self, frame: bytes) -> None:
        size_max = self._settings.frame_size_bytes_max
        if not 0 < len(frame) <= size_max:
            raise LocalProtocolError(
                f"a frame has 1 to {size_max} bytes, not {len(frame)}; send more of them",
                size=len(frame),
            )
