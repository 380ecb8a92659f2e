"""The contract between a node and whatever carries its frames.

A transport moves opaque frames of bytes. It never decodes them, keeps no cluster state, starts no
thread that runs Python, and is used by one thread only (`wake` and the descriptors named by
`after_fork_in_child` are the exceptions). Order holds within one connection, never across two.

Two kinds of traffic, as in DEALER / ROUTER: *connections* that this side opened (`connect`, `send`),
and *routes*, the other ends of connections that peers opened to us (`reply`). A route is opaque,
belongs to one connection of one peer, and dies with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

__all__ = [
    "ConnectionDown",
    "ConnectionUp",
    "FrameReceived",
    "HandshakeFailed",
    "Lane",
    "Transport",
    "TransportEvent",
    "TransportSettings",
]


class Lane:
    """Lanes of a connection: separate queues, so that bulk never delays control."""

    CONTROL = "control"
    BULK = "bulk"


class FrameReceived(NamedTuple):
    """A frame from a connection of ours (`connection` > 0, route empty) or from a route (connection 0)."""

    connection: int
    route: bytes
    frame: bytes


class ConnectionUp(NamedTuple):
    """The connection finished its transport handshake: frames can flow. May come again after a Down."""

    connection: int


class ConnectionDown(NamedTuple):
    """The connection was lost and is being retried. Frames sent before may or may not have arrived."""

    connection: int


class HandshakeFailed(NamedTuple):
    """
    A peer was refused or refused us before any frame could flow.

    `connection` > 0: one of ours, `reason` says in words what the peer objected to.
    `connection` = 0: somebody tried to reach us; `address` says from where, if it is known.
    """

    connection: int
    address: str
    reason: str  # "wrong-key" | "refused-key" | "no-handshake" | "protocol" | "oversize" | "flood"


TransportEvent: TypeAlias = FrameReceived | ConnectionUp | ConnectionDown | HandshakeFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """
    What a transport needs to know. Keys are raw 32-byte Curve25519 keys, the same for all members.

    `server_*` is the pair of accepting sockets, `client_*` that of connecting ones; the only client
    key that may be admitted is `client_public` of one of `accepted`. During a change of secret there is
    more than one set: the first is used to connect and to accept, the others also accept.
    """

    keys: Sequence[TransportKeys] = ()
    frame_size_bytes_max: int = 8 * 1024 * 1024
    handshake_timeout_ms: int = 3000
    heartbeat_interval_ms: int = 1000
    heartbeat_timeout_ms: int = 3000
    reconnect_interval_ms: int = 100
    reconnect_interval_ms_max: int = 2000
    control_queue_frames_max: int = 1000
    bulk_queue_frames_max: int = 64
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TransportKeys:
    server_public: bytes
    server_secret: bytes = field(repr=False)
    client_public: bytes
    client_secret: bytes = field(repr=False)


@runtime_checkable
class Transport(Protocol):
    """See the module's docstring. Constructed as `factory(settings)`; construction opens nothing."""

    def bind(self, endpoint: str) -> str:
        """
        Accept connections at `endpoint`; the returned one has the real port where 0 was asked for.

        Raises:
            StartError: The address is taken, not ours or malformed; the message says which.
        """

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        """Open a connection that is kept up until `disconnect`; its id is > 0 and never reused."""

    def disconnect(self, connection: int) -> None:
        """Close a connection for good. Unknown ids are ignored."""

    def send(self, connection: int, frame: bytes) -> bool:
        """Queue a frame; False (and nothing queued) when not connected or the queue is full. Never blocks."""

    def reply(self, route: bytes, frame: bytes) -> bool:
        """Queue a frame to the other end of a route; False when it is gone or full. Never blocks."""

    def drop_route(self, route: bytes) -> None:
        """Close a misbehaving peer's connection if the transport can; otherwise do nothing."""

    def poll(self, timeout_seconds: float) -> list[TransportEvent]:
        """
        Wait for something to happen, at most `timeout_seconds` (0: do not wait), and return all that did.

        Bounded: at most some thousand events a call, the rest stays queued. Returns early after `wake`.
        Bad input is dropped and reported as an event, never raised.
        """

    def wake(self) -> None:
        """Make a running or the next `poll` return at once. Any thread; never blocks; may be called often."""

    def close(self) -> None:
        """Close everything at once; unsent frames may be lost. Idempotent."""

    def after_fork_in_child(self) -> None:
        """In a forked child: let go of inherited descriptors so that peers see the parent's death."""

    def counters(self) -> dict[str, int]:
        """Counts of what was dropped or refused, by stable names."""
