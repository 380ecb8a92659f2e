"""Connections that need no cryptography, which costs more than all the rest of a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordlib.node.links import Links
from coordlib.testing.simulation.network import SimulatedTransport
from coordlib.transport.base import (
    Lane,
)
from coordlib.wire.channel import (
    ChannelIdentity,
    Established,
    HelloAccepted,
    Initiator,
    Opened,
    RehelloWanted,
    Rejected,
    RejectFrame,
    Responder,
)
from coordlib.wire.faults import UnknownSession
from coordlib.wire.keys import ClusterKeys

__all__ = ["CLUSTER", "PlainLinks"]

CLUSTER = "simulated"


class _PlainInitiator(Initiator):
    """The handshake and its outcomes, without the cryptography: the identity is sent as it is."""

    __slots__ = ("_peer", "_token")

    def hello(self, *, is_rekey: bool = False) -> bytes:
        self._peer: ChannelIdentity | None = None
        self._token = self._random_bytes(8)
        identity = self._identity
        numbers = identity.incarnation.to_bytes(8, "big") + bytes([identity.is_member])
        return b"H" + self._token + numbers + identity.disk_id.ljust(16, b"\0") + identity.node.encode()

    def seal(self, plaintext: bytes) -> bytes:
        return b"D" + self._token + plaintext

    def needs_rekey(self, age_seconds: float = 0.0) -> bool:
        return False

    def receive(self, frame: bytes) -> Established | Opened | Rejected | RehelloWanted:
        if frame[1:9] != self._token:
            raise UnknownSession("of a connection that is over")
        if frame[:1] == b"W":
            self._peer = _identity_of(frame)
            return Established(self._peer)
        if frame[:1] == b"R":
            return RehelloWanted()
        if self._peer is None:
            raise UnknownSession("before the welcome")
        return Opened(self._peer, frame[9:], False)


class _PlainResponder(Responder):
    __slots__ = ("_tokens",)

    def __init__(self, identity: ChannelIdentity) -> None:
        self._identity = identity
        self._tokens: dict[bytes, list[Any]] = {}  # route -> [token, peer, is live]

    def seal(self, route: bytes, plaintext: bytes) -> bytes:
        session = self._tokens.get(route)
        if session is None:
            raise UnknownSession("no session on this route")
        return b"D" + bytes(session[0]) + plaintext

    def drop(self, route: bytes) -> None:
        self._tokens.pop(route, None)

    def wipe(self) -> None:
        self._tokens.clear()

    def receive(self, route: bytes, frame: bytes) -> HelloAccepted | Opened | RejectFrame:
        if frame[:1] == b"H":
            peer = _identity_of(frame)
            self._tokens[route] = [frame[1:9], peer, False]
            ours = self._identity
            numbers = ours.incarnation.to_bytes(8, "big") + bytes([ours.is_member])
            welcome = b"W" + frame[1:9] + numbers + ours.disk_id.ljust(16, b"\0") + ours.node.encode()
            return HelloAccepted(welcome, peer)
        session = self._tokens.get(route)
        if session is None or session[0] != frame[1:9]:
            return RejectFrame(b"R" + frame[1:9], "unknown-session", "a session that this node does not have")
        is_first = not session[2]
        session[2] = True
        return Opened(session[1], frame[9:], is_first)


def _identity_of(frame: bytes) -> ChannelIdentity:
    incarnation = int.from_bytes(frame[9:17], "big")
    disk_id = frame[18:34].rstrip(b"\0")
    return ChannelIdentity(CLUSTER, frame[34:].decode(), incarnation, bool(frame[17]), disk_id)


class PlainLinks(Links):
    """Production links over connections that are not sealed."""

    def __init__(
        self, transport: SimulatedTransport, keys: ClusterKeys, identity: ChannelIdentity, **more: Any
    ):
        super().__init__(transport, keys, identity, **more)
        self._responder = _PlainResponder(identity)

    def connect(self, endpoint: str, name: str = "", lanes: Sequence[str] = (Lane.CONTROL,)) -> None:
        super().connect(endpoint, name, lanes)
        for connection in self._connections.values():
            if not isinstance(connection.initiator, _PlainInitiator):
                connection.initiator = _PlainInitiator(
                    self._keys, self._identity, expected_peer=None, random_bytes=self._random_bytes
                )
