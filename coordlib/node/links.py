"""Who is at which end of which connection: handshakes, seals, and what to do about bad input.

Between the transport, which moves frames, and the kernel, which takes messages of peers it can trust to
be who they say. No clock, no randomness of its own; the transport is handed in, and only its non-blocking
calls are used.

A member keeps two connections to every other: control, and bulk for snapshots. A client keeps one to every
member it has heard of. Nothing that arrives here can end the node: it is dropped, counted, and told once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from coordlib.errors import AuthenticationError, CoordError, LocalProtocolError, ProtocolError
from coordlib.node.client import ClientKernel
from coordlib.node.effects import LogEvent
from coordlib.node.kernel import MemberKernel
from coordlib.transport.base import (
    ConnectionDown,
    ConnectionUp,
    FrameReceived,
    HandshakeFailed,
    Lane,
    Transport,
    TransportEvent,
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
from coordlib.wire.keys import ClusterKeys
from coordlib.wire.quarantine import Misbehaviour, SayOnce
from coordlib.wire.schema import decode_messages, encode_messages

__all__ = ["Links"]

HELLO_AGAIN_MS: Final = 1000
REKEY_MS: Final = 3_600_000
_NEVER: Final = 1 << 62

_HANDSHAKE_WORDS: Final = {
    "wrong-key": "it does not accept our keys, or we not its: are COORDLIB_SECRET and the cluster's name the same on both?",
    "refused-key": "it refuses our key: COORDLIB_SECRET differs, or the old one was retired too early",
    "no-handshake": "somebody listens there, but does not finish the handshake: is it a member of this cluster, "
    "with the same secret?",
    "protocol": "what answers there does not speak our protocol: check the address",
}


class _Connection:
    __slots__ = (
        "endpoint",
        "established_ms",
        "hello_ms",
        "id",
        "initiator",
        "is_established",
        "is_up",
        "lane",
        "name",
    )

    def __init__(self, id: int, endpoint: str, lane: str, name: str, initiator: Initiator) -> None:
        self.id = id
        self.endpoint = endpoint
        self.lane = lane
        self.name = name  # "" until the peer has said it (clients only)
        self.initiator = initiator
        self.is_up = False
        self.is_established = False
        self.hello_ms = 0
        self.established_ms = 0


class Links:
    def __init__(
        self,
        transport: Transport,
        keys: ClusterKeys,
        identity: ChannelIdentity,
        *,
        members: Iterable[str],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._transport = transport
        self._keys = keys
        self._identity = identity
        self._members = frozenset(members)
        self._random_bytes = random_bytes
        self._responder = Responder(keys, identity, random_bytes=random_bytes)
        self._connections: dict[int, _Connection] = {}
        self._control: dict[str, _Connection] = {}  # peer -> its established control connection
        self._bulk: dict[str, _Connection] = {}
        self._attached: set[bytes] = set()
        self._last_messages: Sequence[tuple[int, Any]] | None = None
        self._last_kinds: list[type] = []
        self._last_plaintext = b""
        # Member -> its newest run, and the latest of that run's greetings that led to a session.
        self._incarnations: dict[str, tuple[int, int]] = {}
        self._misbehaviour = Misbehaviour()
        self._say_once = SayOnce()
        self._is_anyone_quarantined = False
        self._next_check = 0
        self.events: list[LogEvent] = []
        self.problems: dict[str, str] = {}  # peer or endpoint -> why it cannot be talked to, in words
        self.counters: dict[str, int] = {"frames_received": 0, "frames_sent": 0, "sends_dropped": 0}

    # -- connections ---------------------------------------------------------------------------------------

    def connect(self, endpoint: str, name: str = "", lanes: Sequence[str] = (Lane.CONTROL,)) -> None:
        """Keep a connection to an endpoint. `name` empty: whichever member answers."""
        for lane in lanes:
            initiator = Initiator(
                self._keys, self._identity, expected_peer=name or None, random_bytes=self._random_bytes
            )
            id = self._transport.connect(endpoint, lane)
            self._connections[id] = _Connection(id, endpoint, lane, name, initiator)

    def connect_missing(self, endpoints: dict[str, str]) -> None:
        """Connect to the members that no connection covers yet."""
        covered = {c.endpoint for c in self._connections.values()} | set(self._control)
        for name, endpoint in endpoints.items():
            if name not in covered and endpoint not in covered:
                self.connect(endpoint, name)

    def is_connected(self, name: str) -> bool:
        return name in self._control

    # -- receiving -----------------------------------------------------------------------------------------

    def receive(
        self, events: Sequence[TransportEvent], kernel: MemberKernel | ClientKernel, now: int
    ) -> None:
        """
        Pass on what the transport brought.

        Raises:
            FatalError, StartError: From the kernel: this node must stop. Nothing else.
        """
        for event in events:
            if type(event) is FrameReceived:
                self.counters["frames_received"] += 1
                if event.connection:
                    connection = self._connections.get(event.connection)
                    if connection is not None:
                        self._receive_on_connection(connection, event.frame, kernel, now)
                else:
                    self._receive_on_route(event.route, event.frame, kernel, now)
            elif type(event) is ConnectionUp:
                connection = self._connections.get(event.connection)
                if connection is not None:
                    connection.is_up = True
                    self._start_over(connection, kernel, now)
            elif type(event) is ConnectionDown:
                connection = self._connections.get(event.connection)
                if connection is not None:
                    connection.is_up = False
                    self._lost(connection, kernel)
            elif type(event) is HandshakeFailed:
                self._handshake_failed(event, now)

    def _receive_on_route(
        self, route: bytes, frame: bytes, kernel: MemberKernel | ClientKernel, now: int
    ) -> None:
        where = ""
        if self._is_anyone_quarantined and self._misbehaviour.is_quarantined(route.hex(), now):
            self._count("quarantined")
            return
        try:
            result = self._responder.receive(route, frame)
            if type(result) is Opened:
                peer = result.peer
                messages = decode_messages(result.plaintext)
            elif isinstance(result, HelloAccepted):
                self._transport.reply(route, result.reply_frame)
                return
            else:
                assert isinstance(result, RejectFrame)
                self._transport.reply(route, result.reply_frame)
                self._fault(where, result.code, f"refused a peer: {result.message}", now)
                return
        except ProtocolError as error:
            if isinstance(error, AuthenticationError) and self._misbehaviour.record(
                route.hex(), error.code, now
            ):
                self._is_anyone_quarantined = True
                self._transport.drop_route(route)
            self._fault(where, error.code, f"dropped a bad message: {error}", now)
            return
        assert isinstance(kernel, MemberKernel)
        if peer.is_member:
            if peer.node not in self._members or peer.node == self._identity.node:
                what = (
                    "under this node's own name"
                    if peer.node == self._identity.node
                    else "that is not in our members list"
                )
                self._fault(
                    where,
                    "not-a-member",
                    f"a member {peer.node!r} {what} talks to us: give every member its own name and the same list",
                    now,
                )
                return
            newest, greeting = self._incarnations.get(peer.node, (peer.incarnation, 0))
            if result.is_first and (newest == peer.incarnation or result.greeting > greeting):
                self._incarnations[peer.node] = peer.incarnation, max(greeting, result.greeting)
                kernel.peer_incarnation(peer.node, peer.incarnation)
            elif newest != peer.incarnation:
                # What an earlier run of it sent, still on its way.
                self._count("stale-incarnation")
                self._responder.drop(route)
                return
            kernel.peer_messages(peer.node, messages, now)
            return
        if route not in self._attached:
            self._attached.add(route)
            kernel.client_attached(route, peer.node)
        kernel.client_messages(route, messages, now)

    def _receive_on_connection(
        self, connection: _Connection, frame: bytes, kernel: MemberKernel | ClientKernel, now: int
    ) -> None:
        where = connection.name or connection.endpoint
        try:
            result = connection.initiator.receive(frame)
            if type(result) is Opened:
                messages = decode_messages(result.plaintext)
            elif isinstance(result, Established):
                if not connection.is_up:
                    # Of the connection that is lost already, read late: there is nobody at its other end.
                    self._count("late-welcome")
                    return
                self._established(connection, result.peer, kernel, now)
                return
            elif isinstance(result, RehelloWanted):
                self._start_over(connection, kernel, now)
                return
            else:
                assert isinstance(result, Rejected)
                self._rejected(connection, result, kernel, now)
                return
        except ProtocolError as error:
            if error.code == "wrong-peer":
                self.problems[where] = str(error)
            self._fault(where, error.code, f"dropped a bad message from {where}: {error}", now)
            return
        kernel.peer_messages(connection.name, messages, now)

    def _established(
        self, connection: _Connection, peer: ChannelIdentity, kernel: MemberKernel | ClientKernel, now: int
    ) -> None:
        was_established = connection.is_established
        connection.is_established = True
        connection.established_ms = now
        connection.name = peer.node
        self.problems.pop(peer.node, None)
        self.problems.pop(connection.endpoint, None)
        if connection.lane == Lane.BULK:
            self._bulk[peer.node] = connection
            return
        other = self._control.get(peer.node)
        if other is not None and other is not connection and other.is_established:
            return  # a client that reached one member by two addresses: the first serves
        self._control[peer.node] = connection
        if not was_established:
            kernel.peer_up(peer.node, peer.incarnation, now)
            if isinstance(kernel, ClientKernel):
                self._greet(connection)

    def _greet(self, connection: _Connection) -> None:
        # An empty batch makes the session live at the member, which then tells who leads.
        self._transport.send(connection.id, connection.initiator.seal(encode_messages([])))

    def _rejected(
        self, connection: _Connection, result: Rejected, kernel: MemberKernel | ClientKernel, now: int
    ) -> None:
        where = connection.name or connection.endpoint
        if result.retry_epoch_index is not None:
            connection.initiator.use_epoch(result.retry_epoch_index)
            self._start_over(connection, kernel, now)
            return
        self.problems[where] = result.message
        self._fault(where, result.code, result.message, now)

    def _handshake_failed(self, event: HandshakeFailed, now: int) -> None:
        if event.connection:
            connection = self._connections.get(event.connection)
            if connection is None:
                return
            words = _HANDSHAKE_WORDS.get(event.reason, event.reason)
            who = (
                f"member {connection.name!r} at {connection.endpoint}"
                if connection.name
                else f"the member at {connection.endpoint}"
            )
            text = f"cannot talk to {who}: {words}"
            self.problems[connection.name or connection.endpoint] = text
            self._fault(connection.name or connection.endpoint, f"handshake-{event.reason}", text, now)
            return
        address = event.address or "an unknown address"
        text = f"refused a connection from {address} ({event.reason}): a wrong secret, or not one of ours"
        self._fault("", f"refused-{event.reason}", text, now)

    def _fault(self, where: str, code: str, text: str, now: int) -> None:
        self._count(code)
        said = self._say_once.say(f"{code} {where}", text, now)
        if said is not None:
            self.events.append(LogEvent(logging.WARNING, f"wire.{code}", said, {"peer": where}))

    def _count(self, code: str) -> None:
        self.counters[code] = self.counters.get(code, 0) + 1

    def _lost(self, connection: _Connection, kernel: MemberKernel | ClientKernel) -> None:
        if not connection.is_established:
            return
        connection.is_established = False
        table = self._bulk if connection.lane == Lane.BULK else self._control
        if table.get(connection.name) is connection:
            del table[connection.name]
            if connection.lane == Lane.CONTROL:
                kernel.peer_down(connection.name)

    def _start_over(self, connection: _Connection, kernel: MemberKernel | ClientKernel, now: int) -> None:
        # A new greeting forgets the old session, so nobody may go on believing that it can be sent on.
        self._lost(connection, kernel)
        self._hello(connection, now)

    def _hello(self, connection: _Connection, now: int, *, is_rekey: bool = False) -> None:
        connection.hello_ms = now
        self._transport.send(connection.id, connection.initiator.hello(is_rekey=is_rekey))

    # -- time ----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> int:
        return self._next_check

    def tick(self, now: int) -> None:
        """Handshakes that got no answer are begun anew, old keys are changed."""
        if now < self._next_check:
            return
        self._next_check = now + HELLO_AGAIN_MS
        for connection in self._connections.values():
            if not connection.is_up:
                continue
            if not connection.is_established:
                if now - connection.hello_ms >= HELLO_AGAIN_MS:
                    self._hello(connection, now)
            elif (
                connection.initiator.needs_rekey((now - connection.established_ms) / 1000)
                and now - connection.hello_ms >= HELLO_AGAIN_MS
            ):
                self._hello(connection, now, is_rekey=True)

    # -- sending -------------------------------------------------------------------------------------------

    def send(self, name: str, messages: Sequence[tuple[int, Any]], *, is_bulk: bool = False) -> bool:
        """Send to a peer; False when there is no connection or its queue is full. Everyone above sends again."""
        connection = (self._bulk if is_bulk else self._control).get(name)
        if connection is None:
            self.counters["sends_dropped"] += 1
            return False
        try:
            # What a leader sends to its followers in one round is mostly the same: encode it once.
            kinds = [type(message) for _, message in messages]
            if kinds != self._last_kinds:
                # Messages are tuples: those of two kinds are equal if their fields are.
                self._last_messages, self._last_kinds = None, kinds
            if messages == self._last_messages:
                plaintext = self._last_plaintext
            else:
                plaintext = encode_messages(messages)
                self._last_messages, self._last_plaintext = messages, plaintext
        except LocalProtocolError:
            if len(messages) <= 1:
                # Larger than a frame can be; whoever waits for it is told by its deadline. Never a reason to stop.
                self._count("unsendable")
                return False
            middle = len(messages) // 2
            is_first_sent = self.send(name, messages[:middle], is_bulk=is_bulk)
            return self.send(name, messages[middle:], is_bulk=is_bulk) and is_first_sent
        if self._transport.send(connection.id, connection.initiator.seal(plaintext)):
            self.counters["frames_sent"] += 1
            return True
        self.counters["sends_dropped"] += 1
        return False

    def reply(self, route: bytes, messages: Sequence[tuple[int, Any]], kernel: MemberKernel) -> bool:
        """
        Send to a client; False when it is gone or does not read: it is forgotten then, and greets again.
        """
        try:
            plaintext = encode_messages(messages)
        except LocalProtocolError:
            if len(messages) <= 1:
                self._count("unsendable")
                return False
            middle = len(messages) // 2
            # A client that was dropped over the first half has no session for the second: refused at once.
            is_first_sent = self.reply(route, messages[:middle], kernel)
            return self.reply(route, messages[middle:], kernel) and is_first_sent
        try:
            is_sent = self._transport.reply(route, self._responder.seal(route, plaintext))
        except CoordError:
            is_sent = False
        if is_sent:
            self.counters["frames_sent"] += 1
            return True
        self._count("clients_dropped")
        self._responder.drop(route)
        self._attached.discard(route)
        kernel.client_gone(route, messages)
        return False

    def wipe(self) -> None:
        """Forget the keys: after a fork, in the child."""
        for connection in self._connections.values():
            connection.initiator.wipe()
        self._responder.wipe()
