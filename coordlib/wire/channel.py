"""The session between two nodes: handshake, sealed messages, and who is at the other end. Sans I/O.

Frames come in and go out as bytes; randomness is handed in; there is no clock. What is *not* here: sockets,
what the plaintext means (schema.py), and what to do with a misbehaving peer (quarantine.py).

::

    Initiator (opened the connection)              Responder (listens)
    ---------------------------------              -------------------
    hello()          -- HELLO -->                  MAC under a known epoch's key? our cluster? for us?
                     <-- WELCOME --                a half-open session: not yet used for sealing
    Established
    seal(...)        -- sealed -->                 opens: the session is live, the route is the peer's
                     <-- sealed --                 seal(route, ...)

A session is live at the responder only when the first sealed message opens: a replayed HELLO makes a
half-open session that nobody can use, and steals no route. So the initiator speaks first.

Wire: every frame begins with two bytes, 0xC1 and the wire version; what follows is CBOR::

    version 1   0x84  HELLO, WELCOME: COSE_Mac0, kid = epoch id, under the epoch's "handshake mac" key
                      HELLO   payload [1, version_min, version_max, cluster, node, incarnation, is_member,
                                       disk_id, to ("" = any member), ephemeral:32, nonce:16, kid:4]
                              external_aad ["coordlib", "hello"]
                      WELCOME payload [2, version, answers:8, cluster, node, incarnation, is_member, disk_id,
                                       ephemeral:32, nonce:16, kid:4]
                              external_aad ["coordlib", "welcome", SHA-256(HELLO frame)]
                0x83  a sealed message: COSE_Encrypt0, layout in cose.py; plaintext: schema.py
    version 0   the same for ever, not authenticated, so only ever a hint:
                REJECT   [3, answers:8, code, node, cluster, version_min, version_max, [epoch id:4, ...]]
                REHELLO  [4, kid:4]      "I have no session of that kid": say HELLO again

    `answers` = the first 8 bytes of SHA-256(the frame that is answered)
    `kid`     = chosen by who sends the payload: whoever seals for the sender names it
    keys      = HKDF-SHA256(ikm = handshake psk | X25519(ephemerals),
                            salt = SHA-256(HELLO frame | WELCOME frame),
                            info = CBOR ["coordlib 1", direction, kid], 44 bytes): 32 key, 12 IV
    external_aad = CBOR ["coordlib", version, cluster, sender, sender's incarnation, receiver, receiver's
                   incarnation, direction, epoch id];      direction 0: from the initiator, 1: to it

Source: the shape is SIGMA's with a pre-shared key (as TLS 1.3 psk_dhe_ke); the messages are OSCORE-like
(RFC 8613: directional keys, Partial IV, replay window).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from coordlib import cbor
from coordlib.errors import LocalProtocolError, UsageError
from coordlib.wire.cose import Encrypt0Opener, Encrypt0Seal, make_mac0, open_mac0, peek_mac0, session_kid
from coordlib.wire.faults import (
    MalformedFrame,
    SealBroken,
    UnknownSession,
    UnsupportedVersion,
    WrongCluster,
    WrongPeer,
    WrongSecret,
)
from coordlib.wire.keys import ClusterKeys, EpochKeys, hkdf

__all__ = [
    "REKEY_AGE_SECONDS",
    "REKEY_MESSAGES",
    "WIRE_VERSION_MAX",
    "WIRE_VERSION_MIN",
    "ChannelIdentity",
    "Established",
    "HelloAccepted",
    "Initiator",
    "Opened",
    "RehelloWanted",
    "RejectFrame",
    "Rejected",
    "Responder",
]

WIRE_VERSION_MIN: Final = 1
WIRE_VERSION_MAX: Final = 1
REKEY_MESSAGES: Final = 2**30
REKEY_AGE_SECONDS: Final = 3600.0

NAME_CHARACTERS_MAX: Final = 255
DISK_ID_SIZE_MAX: Final = 64
HANDSHAKE_SIZE_MAX: Final = 4096
_EPOCHS_MAX: Final = 8
_FAULTS_PER_ANSWER: Final = 64
_INT_MAX: Final = 2**63 - 1

_MAGIC: Final = 0xC1
_HINT_HEAD: Final = b"\xc1\x00"
_HEAD: Final = b"\xc1\x01"
_SEALED_HEAD: Final = b"\xc1\x01\x83"
_HANDSHAKE_HEAD: Final = b"\xc1\x01\x84"
_HEAD_SIZE: Final = 2

_HELLO, _WELCOME, _REJECT, _REHELLO = 1, 2, 3, 4
_FROM_INITIATOR, _TO_INITIATOR = 0, 1

_HELLO_SIGNATURE: list[type] = [int, int, int, str, str, int, bool, bytes, str, bytes, bytes, bytes]
_WELCOME_SIGNATURE: list[type] = [int, int, bytes, str, str, int, bool, bytes, bytes, bytes, bytes]
_REJECT_SIGNATURE: list[type] = [int, bytes, str, str, str, int, int, list]
_HELLO_AAD: Final = cbor.encode(("coordlib", "hello"))

RandomBytes: TypeAlias = Callable[[int], bytes]


class ChannelIdentity(NamedTuple):
    """Who is at one end of a channel."""

    cluster: str
    node: str
    incarnation: int  # random 63 bits of one run of one process: another run is another incarnation
    is_member: bool
    disk_id: bytes  # empty: no disk (a client)


class Established(NamedTuple):
    """The initiator may seal. Say something soon: only that makes the session live at the other end."""

    peer: ChannelIdentity


class Opened(NamedTuple):
    """
    A sealed message of `peer`. `is_first`: of this session (a new connection, or a re-keyed one).

    `greeting` numbers the greetings that a responder has answered, this session's among them; 0 at the initiator.
    Of two runs of one node that both sealed something, the later one greeted later: nobody seals before it has got
    the answer to its greeting, and the earlier run had ended before the later one greeted. Their first messages, on
    two connections, may come in either order.
    """

    peer: ChannelIdentity
    plaintext: bytes
    is_first: bool
    greeting: int = 0


class Rejected(NamedTuple):
    """
    The other side refused our HELLO. Not authenticated: good for a log and for another try, no more.

    `retry_epoch_index` is not None when the other side accepts another of our secrets: call
    `use_epoch(retry_epoch_index)` and send a new `hello()`.
    """

    code: str  # "unsupported-version" | "wrong-cluster" | "wrong-secret" | "wrong-peer"
    message: str  # in words, for a person
    versions: tuple[int, int]  # wire versions that the other side speaks
    retry_epoch_index: int | None


class RehelloWanted(NamedTuple):
    """The other side has lost our session. Send a new `hello()`, at most about once a second."""


class HelloAccepted(NamedTuple):
    """Send `reply_frame` to the route. The peer is authentic, but is not yet known to be alive."""

    reply_frame: bytes
    peer: ChannelIdentity


class RejectFrame(NamedTuple):
    """
    Send `reply_frame` to the route, count `code`, log `message`.

    Given for a route's first fault since its last accepted HELLO, its 2nd, 4th, 8th and so on, and every 64th; the others
    are raised.
    """

    reply_frame: bytes
    code: str
    message: str


class _Session:
    __slots__ = ("greeting", "is_live", "kid", "opener", "peer", "route", "seal", "was_used")

    def __init__(
        self, peer: ChannelIdentity, kid: bytes, opener: Encrypt0Opener, seal: Encrypt0Seal, route: bytes
    ) -> None:
        self.peer = peer
        self.kid = kid  # by which messages to us name this session
        self.opener = opener
        self.seal = seal
        self.route = route
        self.is_live = False  # something that the peer sealed has opened
        self.was_used = False  # since eviction last looked
        self.greeting = 0


class _PendingHello(NamedTuple):
    frame: bytes
    private: X25519PrivateKey
    kid: bytes
    epoch: EpochKeys


def _check_identity(identity: ChannelIdentity) -> None:
    if not (
        0 < len(identity.cluster) <= NAME_CHARACTERS_MAX
        and 0 < len(identity.node) <= NAME_CHARACTERS_MAX
        and 0 <= identity.incarnation <= _INT_MAX
        and len(identity.disk_id) <= DISK_ID_SIZE_MAX
    ):
        raise UsageError(
            f"names have 1 to {NAME_CHARACTERS_MAX} characters, incarnations 63 bits: {identity!r}"
        )


def _answers(frame: bytes) -> bytes:
    return hashlib.sha256(frame).digest()[:8]


def _welcome_aad(hello_frame: bytes) -> bytes:
    return cbor.encode(("coordlib", "welcome", hashlib.sha256(hello_frame).digest()))


def _decode_fields(data: bytes, signature: list[type], what: str) -> list[Any]:
    """The fields of a handshake payload: right number, right types, bounded."""
    try:
        fields = cbor.decode(data)
    except cbor.CBORError as exc:
        raise MalformedFrame(f"{what}: {exc.message}") from exc
    if type(fields) is not list or list(map(type, fields)) != signature:
        raise MalformedFrame(f"{what}: fields of the wrong number or type")
    for field in fields:
        if type(field) is int and not 0 <= field <= _INT_MAX:
            raise MalformedFrame(f"{what}: integer out of range")
        if type(field) is str and len(field) > NAME_CHARACTERS_MAX:
            raise MalformedFrame(f"{what}: name of {len(field)} characters")
    return fields


def _check_peer_fields(what: str, disk_id: bytes, ephemeral: bytes, nonce: bytes, kid: bytes) -> None:
    if len(disk_id) > DISK_ID_SIZE_MAX or len(ephemeral) != 32 or len(nonce) != 16 or len(kid) != 4:
        raise MalformedFrame(f"{what}: a field of the wrong length")


def _check_head(frame: bytes) -> int:
    """The wire version of a frame that is long enough to be one of ours."""
    if len(frame) < 3 or frame[0] != _MAGIC:
        raise MalformedFrame("empty frame, or not one of ours" if frame else "empty frame")
    version = frame[1]
    if version > WIRE_VERSION_MAX:
        raise UnsupportedVersion(
            f"wire version {version}; this node speaks {WIRE_VERSION_MIN}..{WIRE_VERSION_MAX}"
        )
    return version


def _shared_secret(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as exc:  # a point of low order: no honest peer sends one
        raise SealBroken("handshake: unusable ephemeral key") from exc


def _make_session(
    *,
    epoch: EpochKeys,
    shared: bytes,
    hello_frame: bytes,
    welcome_frame: bytes,
    version: int,
    ours: ChannelIdentity,
    theirs: ChannelIdentity,
    our_kid: bytes,
    their_kid: bytes,
    sending: int,
    route: bytes,
) -> _Session:
    """Both directions of a session, once both sides know the whole transcript."""
    transcript = hashlib.sha256(hello_frame + welcome_frame).digest()
    ikm = epoch.handshake_psk + shared

    def direction(
        number: int, kid: bytes, sender: ChannelIdentity, receiver: ChannelIdentity
    ) -> tuple[bytes, bytes, bytes, bytes]:
        okm = hkdf(ikm, salt=transcript, info=cbor.encode(("coordlib 1", number, kid)), size=44)
        aad = cbor.encode(
            (
                *("coordlib", version, sender.cluster),
                *(sender.node, sender.incarnation, receiver.node, receiver.incarnation),
                *(number, epoch.epoch_id),
            )
        )
        return okm[:32], okm[32:], kid, aad

    seal = Encrypt0Seal(*direction(sending, their_kid, ours, theirs), prefix=_HEAD)
    opener = Encrypt0Opener(*direction(1 - sending, our_kid, theirs, ours))
    return _Session(theirs, our_kid, opener, seal, route)


class Initiator:
    """One end of one connection that we opened."""

    __slots__ = (
        "_expected_peer",
        "_identity",
        "_keys",
        "_pending",
        "_previous",
        "_random_bytes",
        "_session",
        "epoch_index",
    )

    def __init__(
        self,
        keys: ClusterKeys,
        identity: ChannelIdentity,
        *,
        expected_peer: str | None,
        random_bytes: RandomBytes,
        epoch_index: int = 0,
    ) -> None:
        """
        Args:
            expected_peer: The node that must answer; None accepts any member, for who knows only addresses.
            random_bytes: `os.urandom`, or what repeats in a simulation.
            epoch_index: Which of the cluster's secrets to begin with.
        """
        _check_identity(identity)
        self._keys = keys
        self._identity = identity
        self._expected_peer = expected_peer
        self._random_bytes = random_bytes
        self._pending: _PendingHello | None = None
        self._session: _Session | None = None
        # After a re-key: still opens what was sealed before the other side heard of the new session.
        self._previous: _Session | None = None
        self.epoch_index = 0
        self.use_epoch(epoch_index)

    @property
    def is_established(self) -> bool:
        return self._session is not None

    @property
    def peer(self) -> ChannelIdentity | None:
        """Who answered; None until established."""
        return None if self._session is None else self._session.peer

    @property
    def epoch_count(self) -> int:
        return len(self._keys.epochs)

    def use_epoch(self, index: int) -> None:
        """Use another of our secrets from the next `hello()` on."""
        if not 0 <= index < len(self._keys.epochs):
            raise UsageError(f"there is no secret {index}, only {len(self._keys.epochs)}")
        self.epoch_index = index

    def hello(self, *, is_rekey: bool = False) -> bytes:
        """
        Begin a handshake and return the frame to send. Every call uses a fresh ephemeral key.

        After a re-connect the old session is of no use and is forgotten; with `is_rekey` it goes on
        being used until the new one is established.
        """
        self._keys.index_of(b"")  # refuses wiped keys before anything else is forgotten
        if not is_rekey:
            self._session = None
            self._previous = None
        epoch = self._keys.epochs[self.epoch_index]
        private = X25519PrivateKey.from_private_bytes(self._random_bytes(32))
        kid = self._random_bytes(4)
        while any(session is not None and session.kid == kid for session in (self._session, self._previous)):
            kid = self._random_bytes(4)
        cluster, node, incarnation, is_member, disk_id = self._identity
        payload = cbor.encode(
            (
                *(_HELLO, WIRE_VERSION_MIN, WIRE_VERSION_MAX),
                *(cluster, node, incarnation, is_member, disk_id, self._expected_peer or ""),
                *(private.public_key().public_bytes_raw(), self._random_bytes(16), kid),
            )
        )
        frame = _HEAD + make_mac0(epoch.handshake_mac, payload, _HELLO_AAD, kid=epoch.epoch_id)
        self._pending = _PendingHello(frame, private, kid, epoch)
        return frame

    def seal(self, plaintext: bytes) -> bytes:
        """
        The frame to send.

        Raises:
            LocalProtocolError: Not established.
        """
        session = self._session
        if session is None:
            raise LocalProtocolError("no session yet: send hello() and wait for Established")
        return session.seal.seal(plaintext)

    def needs_rekey(self, age_seconds: float = 0.0) -> bool:
        """Whether to call `hello(is_rekey=True)`; `age_seconds` is the time since Established."""
        session = self._session
        return session is not None and (
            session.seal.counter >= REKEY_MESSAGES
            or session.opener.highest >= REKEY_MESSAGES
            or age_seconds >= REKEY_AGE_SECONDS
        )

    def receive(self, frame: bytes) -> Established | Opened | Rejected | RehelloWanted:
        """
        Take one frame from the connection.

        Raises:
            RemoteProtocolError, AuthenticationError: Drop the frame and count `.code`; the session and a
                pending handshake are as they were.
        """
        if frame[:3] == _SEALED_HEAD:
            return self._open(frame)
        version = _check_head(frame)
        if len(frame) > HANDSHAKE_SIZE_MAX:
            raise MalformedFrame(f"handshake of {len(frame)} bytes")
        if version == 0:
            return self._receive_hint(frame)
        return self._receive_welcome(frame)

    def wipe(self) -> None:
        """Forget the session's keys (best effort): a forked child must not speak in its parent's name."""
        self._pending = self._session = self._previous = None

    def _open(self, frame: bytes) -> Opened:
        kid = session_kid(frame, _HEAD_SIZE)
        session = self._session
        if session is None or session.kid != kid:
            session = self._previous
            if session is None or session.kid != kid:
                raise UnknownSession("sealed for a session that is over")
            return Opened(session.peer, session.opener.open(frame, _HEAD_SIZE), False)
        plaintext = session.opener.open(frame, _HEAD_SIZE)
        is_first = not session.is_live
        if is_first:
            # One connection keeps the order: nothing sealed for the previous session can follow.
            session.is_live = True
            self._previous = None
        return Opened(session.peer, plaintext, is_first)

    def _receive_welcome(self, frame: bytes) -> Established:
        if frame[:3] != _HANDSHAKE_HEAD:
            raise MalformedFrame("neither sealed nor a handshake")
        epoch_id, payload = peek_mac0(frame[_HEAD_SIZE:])
        fields = _decode_fields(payload, _WELCOME_SIGNATURE, "WELCOME")
        kind, version, answers, cluster, node, incarnation, is_member, disk_id, ephemeral, nonce, kid = fields
        if kind != _WELCOME or version == 0:
            raise MalformedFrame("WELCOME: of another kind or version")
        _check_peer_fields("WELCOME", disk_id, ephemeral, nonce, kid)
        pending = self._pending
        if pending is None or answers != _answers(pending.frame):
            raise UnknownSession("WELCOME to an older HELLO")
        if epoch_id != pending.epoch.epoch_id:
            raise SealBroken("WELCOME under another key than our HELLO")
        open_mac0(pending.epoch.handshake_mac, frame[_HEAD_SIZE:], _welcome_aad(pending.frame))
        if not WIRE_VERSION_MIN <= version <= WIRE_VERSION_MAX:
            raise UnsupportedVersion(f"node {node!r} chose wire version {version}, which we did not offer")
        peer = ChannelIdentity(cluster, node, incarnation, is_member, disk_id)
        if cluster != self._identity.cluster:
            raise WrongCluster(
                f"node {node!r} belongs to cluster {cluster!r}, not to {self._identity.cluster!r}"
            )
        if self._expected_peer is not None and node != self._expected_peer:
            raise WrongPeer(
                f"node {node!r} answers where {self._expected_peer!r} was expected: check the addresses"
            )
        if not is_member:
            raise WrongPeer(f"{node!r} answers but is not a member of the cluster")
        shared = _shared_secret(pending.private, ephemeral)
        session = _make_session(
            epoch=pending.epoch,
            shared=shared,
            hello_frame=pending.frame,
            welcome_frame=frame,
            version=version,
            ours=self._identity,
            theirs=peer,
            our_kid=pending.kid,
            their_kid=kid,
            sending=_FROM_INITIATOR,
            route=b"",
        )
        self._pending = None
        self._previous = self._session
        self._session = session
        return Established(peer)

    def _receive_hint(self, frame: bytes) -> Rejected | RehelloWanted:
        if frame[_HEAD_SIZE] == 0x82:
            kind, kid = _decode_fields(frame[_HEAD_SIZE:], [int, bytes], "REHELLO")
            if kind != _REHELLO or len(kid) != 4:
                raise MalformedFrame("REHELLO: of another kind")
            session = self._session
            # Only about what we use now: a late one for an older session would make us start over and over.
            if session is None or kid != session.seal.kid:
                raise UnknownSession("REHELLO for a session that is over")
            return RehelloWanted()
        fields = _decode_fields(frame[_HEAD_SIZE:], _REJECT_SIGNATURE, "REJECT")
        kind, answers, code, node, cluster, version_min, version_max, epoch_ids = fields
        if kind != _REJECT or len(epoch_ids) > _EPOCHS_MAX:
            raise MalformedFrame("REJECT: of another kind")
        if any(type(epoch_id) is not bytes or len(epoch_id) != 4 for epoch_id in epoch_ids):
            raise MalformedFrame("REJECT: epoch ids of the wrong form")
        pending = self._pending
        if pending is None or answers != _answers(pending.frame):
            raise UnknownSession("REJECT of an older HELLO")
        self._pending = None
        return self._explain_reject(code, node, cluster, (version_min, version_max), epoch_ids, pending.epoch)

    def _explain_reject(
        self,
        code: str,
        node: str,
        cluster: str,
        versions: tuple[int, int],
        epoch_ids: list[bytes],
        epoch: EpochKeys,
    ) -> Rejected:
        retry_epoch_index: int | None = None
        if code == WrongSecret.code:
            for index, ours in enumerate(self._keys.epochs):
                if ours.epoch_id in epoch_ids and ours.epoch_id != epoch.epoch_id:
                    retry_epoch_index = index
                    break
            accepted = ", ".join(epoch_id.hex() for epoch_id in epoch_ids) or "none"
            message = (
                f"node {node!r} refused our cluster secret: COORDLIB_SECRET differs "
                f"(our key epoch is {epoch.epoch_id.hex()}, it accepts {accepted})"
            )
        elif code == UnsupportedVersion.code:
            message = (
                f"node {node!r} speaks wire versions {versions[0]}..{versions[1]}, this node "
                f"{WIRE_VERSION_MIN}..{WIRE_VERSION_MAX}: upgrade coordlib on the older side"
            )
        elif code == WrongCluster.code:
            message = (
                f"node {node!r} belongs to cluster {cluster!r}, this node to {self._identity.cluster!r}: "
                "check the address and the cluster's name"
            )
        elif code == WrongPeer.code:
            message = f"node {node!r} answers where {self._expected_peer!r} was expected: check the addresses"
        else:
            message = f"node {node!r} refused us: {code!r}"
        return Rejected(code, message, versions, retry_epoch_index)


class Responder:
    """
    The accepting end of all connections to one endpoint: sessions by route.

    Bounded: at most `half_open_max` handshakes without a message yet, the oldest makes room; at most
    `open_max` live sessions, of which one that has been silent for long makes room (its peer is told
    to say HELLO again when it next speaks).
    """

    __slots__ = (
        *("_half_open", "_half_open_by_route", "_half_open_max", "_identity", "_keys", "_open", "_open_max"),
        *("_random_bytes", "_routes", "_faults", "_greetings"),
    )

    def __init__(
        self,
        keys: ClusterKeys,
        identity: ChannelIdentity,
        *,
        random_bytes: RandomBytes,
        half_open_max: int = 256,
        open_max: int = 4096,
    ) -> None:
        _check_identity(identity)
        self._keys = keys
        self._identity = identity
        self._random_bytes = random_bytes
        self._half_open_max = half_open_max
        self._open_max = open_max
        # Dictionaries keep the order of insertion: the first is the oldest.
        self._half_open: dict[bytes, _Session] = {}  # by kid
        self._half_open_by_route: dict[bytes, _Session] = {}  # the newest of each route
        self._open: dict[bytes, _Session] = {}  # by kid; Invariant: exactly the values of _routes
        self._routes: dict[bytes, _Session] = {}
        self._greetings = 0
        self._faults: dict[bytes, int] = {}  # by route, since its last accepted HELLO; for `_answer`

    @property
    def half_open_count(self) -> int:
        return len(self._half_open)

    @property
    def open_count(self) -> int:
        return len(self._open)

    def peer_of(self, route: bytes) -> ChannelIdentity | None:
        """Who is at the other end of a live route."""
        session = self._routes.get(route)
        return None if session is None else session.peer

    def seal(self, route: bytes, plaintext: bytes) -> bytes:
        """
        The frame to send to a route.

        Raises:
            LocalProtocolError: The route has no live session.
        """
        session = self._routes.get(route)
        if session is None:
            raise LocalProtocolError("no live session on this route")
        return session.seal.seal(plaintext)

    def drop(self, route: bytes) -> None:
        """Forget all about a route. Unknown routes are ignored."""
        session = self._routes.pop(route, None)
        if session is not None:
            del self._open[session.kid]
        session = self._half_open_by_route.pop(route, None)
        if session is not None:
            del self._half_open[session.kid]
        self._faults.pop(route, None)

    def wipe(self) -> None:
        """Forget all sessions' keys (best effort): a forked child must not speak in its parent's name."""
        for table in (self._half_open, self._half_open_by_route, self._open, self._routes):
            table.clear()
        self._faults.clear()

    def receive(self, route: bytes, frame: bytes) -> HelloAccepted | Opened | RejectFrame:
        """
        Take one frame from a route.

        Raises:
            RemoteProtocolError, AuthenticationError: Drop the frame and count `.code`; no session
                has changed.
        """
        if frame[:3] == _SEALED_HEAD:
            return self._receive_sealed(route, frame)
        try:
            version = _check_head(frame)
        except UnsupportedVersion as exc:
            return self._reject(route, frame, exc)
        if version == 0:
            raise MalformedFrame("REJECT or REHELLO from the side that connects")
        if frame[:3] != _HANDSHAKE_HEAD or len(frame) > HANDSHAKE_SIZE_MAX:
            raise MalformedFrame("neither sealed nor a handshake")
        return self._receive_hello(route, frame)

    def _receive_sealed(self, route: bytes, frame: bytes) -> Opened | RejectFrame:
        kid = session_kid(frame, _HEAD_SIZE)
        session = self._open.get(kid)
        if session is None:
            session = self._half_open.get(kid)
        if session is None or session.route != route:
            unknown = UnknownSession("sealed for a session that this node does not have")
            return self._answer(route, _HINT_HEAD + cbor.encode((_REHELLO, kid)), unknown)
        plaintext = session.opener.open(frame, _HEAD_SIZE)
        session.was_used = True
        if session.is_live:
            return Opened(session.peer, plaintext, False)
        self._become_live(session)
        return Opened(session.peer, plaintext, True, session.greeting)

    def _become_live(self, session: _Session) -> None:
        """The first message of a half-open session has opened: the route is this peer's from now on."""
        route = session.route
        self._remove_half_open(session)
        replaced = self._routes.pop(route, None)
        if replaced is not None:
            del self._open[replaced.kid]
        while len(self._open) >= self._open_max:
            self._evict_open()
        session.is_live = True
        self._open[session.kid] = session
        self._routes[route] = session

    def _evict_open(self) -> None:
        """Second chance: who has spoken since we last looked goes to the end of the queue."""
        while True:
            kid = next(iter(self._open))
            session = self._open.pop(kid)
            if not session.was_used:
                del self._routes[session.route]
                return
            session.was_used = False
            self._open[kid] = session

    def _remove_half_open(self, session: _Session) -> None:
        del self._half_open[session.kid]
        if self._half_open_by_route.get(session.route) is session:
            del self._half_open_by_route[session.route]

    def _receive_hello(self, route: bytes, frame: bytes) -> HelloAccepted | RejectFrame:
        epoch_id, payload = peek_mac0(frame[_HEAD_SIZE:])
        fields = _decode_fields(payload, _HELLO_SIGNATURE, "HELLO")
        (
            kind,
            version_min,
            version_max,
            cluster,
            node,
            incarnation,
            is_member,
            disk_id,
            to,
            ephemeral,
            nonce,
            kid,
        ) = fields
        if kind != _HELLO or not node or epoch_id is None:
            raise MalformedFrame("HELLO: of another kind, or without a name or key id")
        _check_peer_fields("HELLO", disk_id, ephemeral, nonce, kid)

        # Not authenticated up to here. A refusal tells nothing secret, and whoever can reach us can provoke
        # it; it is worth that, because a wrong address or secret is what people get wrong first.
        version = min(version_max, WIRE_VERSION_MAX)
        if not max(version_min, WIRE_VERSION_MIN) <= version:
            problem = f"{node!r} speaks wire versions {version_min}..{version_max}"
            return self._reject(route, frame, UnsupportedVersion(problem))
        ours = self._identity
        if cluster != ours.cluster:
            problem = f"{node!r} belongs to cluster {cluster!r}, this node to {ours.cluster!r}"
            return self._reject(route, frame, WrongCluster(problem))
        index = self._keys.index_of(epoch_id)
        if index is None:
            problem = f"{node!r} uses another cluster secret (its key epoch is {epoch_id.hex()[:64]})"
            return self._reject(route, frame, WrongSecret(problem))
        epoch = self._keys.epochs[index]
        open_mac0(epoch.handshake_mac, frame[_HEAD_SIZE:], _HELLO_AAD)
        if to not in ("", ours.node):
            problem = f"{node!r} expected to reach {to!r} here: its member list or ours has a wrong address"
            return self._reject(route, frame, WrongPeer(problem))

        private = X25519PrivateKey.from_private_bytes(self._random_bytes(32))
        shared = _shared_secret(private, ephemeral)
        our_kid = self._random_bytes(4)
        while our_kid in self._open or our_kid in self._half_open:
            our_kid = self._random_bytes(4)
        welcome = cbor.encode(
            (
                *(_WELCOME, version, _answers(frame)),
                *(ours.cluster, ours.node, ours.incarnation, ours.is_member, ours.disk_id),
                *(private.public_key().public_bytes_raw(), self._random_bytes(16), our_kid),
            )
        )
        reply = _HEAD + make_mac0(epoch.handshake_mac, welcome, _welcome_aad(frame), kid=epoch.epoch_id)
        peer = ChannelIdentity(cluster, node, incarnation, is_member, disk_id)
        session = _make_session(
            epoch=epoch,
            shared=shared,
            hello_frame=frame,
            welcome_frame=reply,
            version=version,
            ours=ours,
            theirs=peer,
            our_kid=our_kid,
            their_kid=kid,
            sending=_TO_INITIATOR,
            route=route,
        )
        self._greetings += 1
        session.greeting = self._greetings
        self._add_half_open(session)
        self._faults.pop(route, None)
        return HelloAccepted(reply, peer)

    def _add_half_open(self, session: _Session) -> None:
        older = self._half_open_by_route.get(session.route)
        if older is not None:
            self._remove_half_open(older)
        while len(self._half_open) >= self._half_open_max:
            self._remove_half_open(next(iter(self._half_open.values())))
        self._half_open[session.kid] = session
        self._half_open_by_route[session.route] = session

    def _reject(
        self, route: bytes, frame: bytes, problem: UnsupportedVersion | WrongCluster | WrongPeer | WrongSecret
    ) -> RejectFrame:
        ours = self._identity
        fields = (
            *(_REJECT, _answers(frame), problem.code, ours.node, ours.cluster),
            *(WIRE_VERSION_MIN, WIRE_VERSION_MAX, self._keys.epoch_ids),
        )
        return self._answer(route, _HINT_HEAD + cbor.encode(fields), problem)

    def _answer(
        self,
        route: bytes,
        reply: bytes,
        problem: UnsupportedVersion | UnknownSession | WrongCluster | WrongPeer | WrongSecret,
    ) -> RejectFrame:
        """
        Answer a route's first fault since its last accepted HELLO, and raise most others.

        A reply that was lost in a full queue must not part two nodes: the 2nd, 4th, 8th and so on are answered again, as
        little may be sent on a connection (four pieces of a snapshot, every three seconds), and every 64th.
        """
        count = self._faults.pop(route, 0) + 1
        if count == 1 and len(self._faults) >= self._open_max:
            del self._faults[next(iter(self._faults))]
        self._faults[route] = count
        is_power_of_two = count & (count - 1) == 0
        if not is_power_of_two and count % _FAULTS_PER_ANSWER:
            raise problem
        return RejectFrame(reply, problem.code, problem.message)
