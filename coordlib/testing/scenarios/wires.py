"""The network of a scenario: a `Transport` on which nothing moves unless it is told to.

Every frame carries one message, so that a scenario can name it. A frame may be delivered in any order, twice, or never,
as Raft's own model of a network allows; connections come and go with their processes. Connections are plain unless the
scenario asks for sealed ones, whose rules about order and repetition are then production's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from coordlib.node.links import Links
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Heartbeat,
    HeartbeatReply,
    RequestVote,
    TimeoutNow,
    VoteReply,
)
from coordlib.testing.simulation.network import SimulatedTransport
from coordlib.transport.base import ConnectionDown, ConnectionUp, FrameReceived, Lane, TransportEvent
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
from coordlib.wire.messages import (
    Announce,
    Form,
    LeaderInfo,
    MemberStatus,
    Refusal,
    Replies,
    Requests,
    SnapshotAck,
    SnapshotChunk,
)

if TYPE_CHECKING:
    from coordlib.testing.scenarios.stage import Stage
    from coordlib.testing.simulation.processes import SimulatedProcess

__all__ = [
    "AUTOMATIC",
    "KINDS",
    "Letter",
    "PlainLinks",
    "SealedLinks",
    "StageTransport",
    "describe",
    "kind_of",
]

_NAMES: dict[type, str] = {
    Heartbeat: "heartbeat",
    HeartbeatReply: "heartbeat-reply",
    TimeoutNow: "timeout-now",
    Announce: "announce",
    Form: "form",
    Refusal: "refusal",
    MemberStatus: "status",
    SnapshotChunk: "chunk",
    SnapshotAck: "chunk-ack",
    Requests: "request",
    Replies: "reply",
    LeaderInfo: "leader-info",
}
KINDS = frozenset(
    {
        *_NAMES.values(),
        *("append", "ack", "nack", "vote", "vote-reply", "prevote", "prevote-reply", "handshake", "greeting"),
    }
)
AUTOMATIC = frozenset(("handshake", "greeting", "announce", "form", "status", "leader-info"))
"""What moves by itself, unless the scenario says `manual`: how connections are made and clusters form."""


def kind_of(message: Any) -> str:
    """The name by which a scenario calls such a message."""
    if isinstance(message, AppendEntries):
        return "append"
    if isinstance(message, AppendReply):
        return "ack" if message.is_success else "nack"
    if isinstance(message, RequestVote):
        return "prevote" if message.is_pre_vote else "vote"
    if isinstance(message, VoteReply):
        return "prevote-reply" if message.is_pre_vote else "vote-reply"
    return _NAMES.get(type(message), "handshake")


def describe(message: Any) -> str:
    """One message in one short line."""
    kind = kind_of(message)
    if isinstance(message, RequestVote):
        text = f"term={message.term} last={message.last_index}@{message.last_term}"
        return f"{kind} {text}" + (" transfer" if message.is_transfer else "")
    if isinstance(message, VoteReply):
        return f"{kind} term={message.term} {'granted' if message.is_granted else 'refused'}"
    if isinstance(message, AppendEntries):
        entries = " ".join(f"{entry.index}@{entry.term}" for entry in message.entries)
        head = f"{kind} term={message.term} prev={message.prev_index}@{message.prev_term}"
        return f"{head} commit={message.commit} [{entries}]"
    if isinstance(message, AppendReply):
        what = "match" if message.is_success else f"prev={message.prev_index} hint"
        return f"{kind} term={message.term} {what}={message.match_index}@{message.match_term}"
    if isinstance(message, Heartbeat):
        return f"{kind} term={message.term} commit={message.commit} round={message.round}"
    if isinstance(message, Requests):
        wanted = " ".join(f"{r.kind}:{r.session}/{r.sequence}" for r in message.requests)
        return f"{kind} {wanted}"
    if isinstance(message, SnapshotChunk):
        return f"{kind} term={message.term} {message.meta.index}@{message.meta.term} offset={message.offset}"
    term = getattr(message, "term", None)
    return kind if term is None else f"{kind} term={term}"


class Letter:
    """A frame under way: from whom to whom, what is in it, and by which connection."""

    __slots__ = ("event", "kind", "message", "receiver", "sender", "to")

    def __init__(
        self, sender: str, to: StageTransport, kind: str, message: Any, event: FrameReceived
    ) -> None:
        self.sender = sender
        self.receiver = to.process.name
        self.to = to  # the very process that it was sent to: another one of that name never gets it
        self.kind = kind
        self.message = message
        self.event = event

    def __str__(self) -> str:
        text = self.kind if self.message is None else describe(self.message)
        return f"{self.sender} -> {self.receiver}  {text}"


class _Wire:
    """A connection that a transport keeps up."""

    __slots__ = ("dialer", "endpoint", "id", "listener", "route")

    def __init__(self, dialer: StageTransport, id: int, endpoint: str) -> None:
        self.dialer = dialer
        self.id = id
        self.endpoint = endpoint
        self.listener: StageTransport | None = None  # while it is up
        self.route = b""


class StageTransport(SimulatedTransport):
    """A `Transport` whose frames wait on the stage."""

    def __init__(self, stage: Stage, process: SimulatedProcess) -> None:
        super().__init__(stage, process)
        self.stage = stage
        self.events: list[TransportEvent] = []
        self.wires: dict[int, _Wire] = {}
        self.accepted: dict[bytes, _Wire] = {}
        self.note: Any = None  # the message in the next frame
        self.note_kind = "handshake"

    def bind(self, endpoint: str) -> str:
        self.stage.listeners[endpoint] = self
        return endpoint

    def connect(self, endpoint: str, lane: str = Lane.CONTROL) -> int:
        id = len(self.wires) + 1
        self.wires[id] = _Wire(self, id, endpoint)
        return id

    def dial(self) -> bool:
        """Make the connections that can be made; whether there were any."""
        stage = self.stage
        is_any = False
        for wire in self.wires.values():
            if wire.listener is not None:
                continue
            listener = stage.listeners.get(wire.endpoint)
            if not isinstance(listener, StageTransport) or not listener.process.is_up:
                continue
            if stage.is_cut_off(self.process.name, listener.process.name):
                continue
            wire.listener = listener
            wire.route = b"route-%d" % stage.next_serial()
            listener.accepted[wire.route] = wire
            self.events.append(ConnectionUp(wire.id))
            is_any = True
        return is_any

    def lose(self, wire: _Wire) -> None:
        """The connection is gone; what was under way on it may still arrive."""
        if wire.listener is not None:
            wire.listener.accepted.pop(wire.route, None)
            wire.listener = None
            if self.process.is_up:
                self.events.append(ConnectionDown(wire.id))

    def disconnect(self, connection: int) -> None:
        wire = self.wires.pop(connection, None)
        if wire is not None:
            self.lose(wire)

    def send(self, connection: int, frame: bytes) -> bool:
        self.process.count_effect()
        wire = self.wires.get(connection)
        if wire is None or wire.listener is None:
            return False
        self._post(wire.listener, FrameReceived(0, wire.route, frame))
        return True

    def reply(self, route: bytes, frame: bytes) -> bool:
        self.process.count_effect()
        wire = self.accepted.get(route)
        if wire is None:
            return False
        self._post(wire.dialer, FrameReceived(wire.id, b"", frame))
        return True

    def _post(self, to: StageTransport, event: FrameReceived) -> None:
        self.stage.under_way.append(Letter(self.process.name, to, self.note_kind, self.note, event))

    def drop_route(self, route: bytes) -> None:
        wire = self.accepted.get(route)
        if wire is not None:
            wire.dialer.lose(wire)

    def poll(self, timeout_seconds: float) -> list[TransportEvent]:
        events, self.events = self.events, []
        return events

    def wake(self) -> None:
        """Rounds are run when the scenario says so."""

    def close(self, *, is_silent: bool = False) -> None:
        listeners = self.stage.listeners
        for endpoint in [endpoint for endpoint, transport in listeners.items() if transport is self]:
            del listeners[endpoint]
        for wire in list(self.accepted.values()):
            wire.dialer.lose(wire)
        for wire in self.wires.values():
            self.lose(wire)
        self.stage.lose_letters_to(self)


class _OneByOne(Links):
    """Production's links, but every message has a frame of its own, and the transport knows what is in it."""

    _transport: StageTransport

    def send(self, name: str, messages: Sequence[tuple[int, Any]], *, is_bulk: bool = False) -> bool:
        transport = self._transport
        is_sent = True
        for item in messages:
            transport.note, transport.note_kind = item[1], kind_of(item[1])
            try:
                is_sent = super().send(name, [item], is_bulk=is_bulk) and is_sent
            finally:
                transport.note, transport.note_kind = None, "handshake"
        return is_sent

    def reply(self, route: bytes, messages: Sequence[tuple[int, Any]], kernel: Any) -> bool:
        transport = self._transport
        is_sent = True
        for item in messages:
            transport.note, transport.note_kind = item[1], kind_of(item[1])
            try:
                is_sent = super().reply(route, [item], kernel) and is_sent
            finally:
                transport.note, transport.note_kind = None, "handshake"
        return is_sent

    def _greet(self, connection: Any) -> None:
        self._transport.note_kind = "greeting"
        try:
            super()._greet(connection)
        finally:
            self._transport.note_kind = "handshake"


class SealedLinks(_OneByOne):
    """With production's cryptography."""


class PlainLinks(_OneByOne):
    """Over connections that believe every frame, in whatever order and however often it comes."""

    def __init__(self, transport: StageTransport, keys: Any, identity: ChannelIdentity, **more: Any) -> None:
        super().__init__(transport, keys, identity, **more)
        self._responder = _BelievingResponder(identity)

    def connect(self, endpoint: str, name: str = "", lanes: Sequence[str] = (Lane.CONTROL,)) -> None:
        super().connect(endpoint, name, lanes)
        for connection in self._connections.values():
            if not isinstance(connection.initiator, _BelievingInitiator):
                connection.initiator = _BelievingInitiator(
                    self._keys, self._identity, expected_peer=None, random_bytes=self._random_bytes
                )


def _pack(identity: ChannelIdentity) -> bytes:
    numbers = identity.incarnation.to_bytes(8, "big") + bytes([identity.is_member])
    return numbers + identity.disk_id.ljust(16, b"\0") + identity.node.encode()


def _unpack(frame: bytes, cluster: str) -> ChannelIdentity:
    incarnation = int.from_bytes(frame[9:17], "big")
    disk_id = b"" if not any(frame[18:34]) else frame[18:34]
    return ChannelIdentity(cluster, frame[34:].decode(), incarnation, bool(frame[17]), disk_id)


class _BelievingInitiator(Initiator):
    __slots__ = ("_peer", "_token")

    def hello(self, *, is_rekey: bool = False) -> bytes:
        self._peer: ChannelIdentity | None = None
        self._token = self._random_bytes(8)
        return b"H" + self._token + _pack(self._identity)

    def seal(self, plaintext: bytes) -> bytes:
        return b"D" + self._token + plaintext

    def needs_rekey(self, age_seconds: float = 0.0) -> bool:
        return False

    def receive(self, frame: bytes) -> Established | Opened | Rejected | RehelloWanted:
        if frame[1:9] != self._token:
            raise UnknownSession("of a connection that is over")
        if frame[:1] == b"W":
            self._peer = _unpack(frame, self._identity.cluster)
            return Established(self._peer)
        if frame[:1] == b"R":
            return RehelloWanted()
        if self._peer is None:
            raise UnknownSession("before the welcome")
        return Opened(self._peer, frame[9:], False)


class _BelievingResponder(Responder):
    __slots__ = ("_sessions_by_route",)

    def __init__(self, identity: ChannelIdentity) -> None:
        self._identity = identity
        self._sessions_by_route: dict[
            bytes, list[Any]
        ] = {}  # route -> [token, peer, was heard before, greeting]
        self._greetings = 0

    def seal(self, route: bytes, plaintext: bytes) -> bytes:
        session = self._sessions_by_route.get(route)
        if session is None:
            raise UnknownSession("no session on this route")
        return b"D" + bytes(session[0]) + plaintext

    def drop(self, route: bytes) -> None:
        self._sessions_by_route.pop(route, None)

    def wipe(self) -> None:
        self._sessions_by_route.clear()

    def receive(self, route: bytes, frame: bytes) -> HelloAccepted | Opened | RejectFrame:
        token = frame[1:9]
        if frame[:1] == b"H":
            peer = _unpack(frame, self._identity.cluster)
            self._greetings += 1
            self._sessions_by_route[route] = [token, peer, False, self._greetings]
            return HelloAccepted(b"W" + token + _pack(self._identity), peer)
        session = self._sessions_by_route.get(route)
        if session is None or session[0] != token:
            return RejectFrame(b"R" + token, "unknown-session", "a session that this node does not have")
        is_first = not session[2]
        session[2] = True
        return Opened(session[1], frame[9:], is_first, session[3])
