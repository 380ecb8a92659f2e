"""Sessions: who is alive, and which of its requests have been executed with what reply.

Exactly once: a request is known by its session and sequence. Its reply is kept until the session says, with a
later request, that every sequence below some mark has been answered. A request that has a reply gets it
again; one below the mark, or of a session that is gone, is refused and never executed. So a request is
executed at most once whatever is sent, lost or sent again, and the table of replies stays small.

What must not live here: what ends with a session (the composition in `machine/__init__` asks the others), and
any clock: a session ends because a log entry says so. `live` gives the leader what its timers need.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from coordlib.cbor import decode, encode
from coordlib.errors import Overloaded, RemoteProtocolError, SessionExpired, invariant
from coordlib.machine.commands import StaleRequest, encode_error
from coordlib.machine.effects import Effect, Meta, SessionOpened
from coordlib.machine.limits import Limits, exceeded
from coordlib.machine.table import Reclaimer, Table

__all__ = ["LiveSession", "Session", "Sessions"]

_ID = struct.Struct(">Q")

# Beyond the limit, replies are refusals; a session that goes on regardless is ended at this multiple of it.
# No correct leader lets it come so far: it refuses before it appends.
OVERLOAD_FACTOR = 4


class LiveSession(NamedTuple):
    """What the leader's timers need to know. `remaining_ms` is None when the full TTL is to be given."""

    session: int
    ttl_ms: int
    remaining_ms: int | None
    owner: str


class Session:
    """One session's state. Changed only by `Sessions`."""

    __slots__ = (
        "id",
        "mark",
        "nonce",
        "opened_ms",
        "owner",
        "remaining_ms",
        "replies",
        "replies_bytes",
        "ttl_ms",
    )

    def __init__(self, id: int, nonce: bytes, ttl_ms: int, owner: str, opened_ms: int) -> None:
        self.id = id
        self.nonce = nonce
        self.ttl_ms = ttl_ms
        self.owner = owner
        self.opened_ms = opened_ms
        self.remaining_ms: int | None = None
        self.mark = 0  # sequences below it have been answered
        self.replies: dict[int, bytes] = {}  # Invariant: every key >= mark
        self.replies_bytes = 0


def _freeze(session: Session) -> bytes:
    return encode(
        (
            session.id,
            session.nonce,
            session.ttl_ms,
            session.owner,
            session.opened_ms,
            session.remaining_ms,
            session.mark,
            [item for pair in sorted(session.replies.items()) for item in pair],
        )
    )


class Sessions:
    """All live sessions."""

    __slots__ = ("_limits", "_live", "_nonces", "replies_bytes", "table")

    def __init__(self, limits: Limits, reclaimer: Reclaimer) -> None:
        self._limits = limits
        self.table: Table[Session] = Table(reclaimer, _freeze)
        # Derived from the table, to spare the hot path packing an id; never iterated without sorting.
        self._live: dict[int, Session] = {}
        self._nonces: dict[bytes, int] = {}
        self.replies_bytes = 0

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> Iterator[LiveSession]:
        """Yield what the leader's timers need about each session, oldest first."""
        for id in sorted(self._live):
            session = self._live[id]
            yield LiveSession(id, session.ttl_ms, session.remaining_ms, session.owner)

    def is_alive(self, id: int) -> bool:
        return id in self._live

    def get(self, id: int) -> Session | None:
        """The session if it is alive."""
        return self._live.get(id)

    def ttl_ms(self, id: int) -> int:
        """The TTL that a live session was opened with."""
        return self._live[id].ttl_ms

    def remaining_ms(self, id: int) -> int | None:
        """What a checkpoint left of a session's TTL; None: the full one, or no such session."""
        session = self._live.get(id)
        return None if session is None else session.remaining_ms

    def owner_of(self, id: int) -> str:
        """The name that the session gave itself, empty if it is gone."""
        session = self._live.get(id)
        return "" if session is None else session.owner

    def lookup(self, id: int, sequence: int) -> bytes | None:
        """
        The reply kept for a request; None if it was never applied.

        Raises:
            SessionExpired: There is no such session.
            StaleRequest: The session has said that it has the reply.
        """
        session = self._live.get(id)
        if session is None:
            raise expired(id)
        if sequence < session.mark:
            raise stale(id, sequence, session.mark)
        return session.replies.get(sequence)

    def check(self, id: int, sequence: int, acknowledged: int, pending: int) -> None:
        """
        Refuse a request that would not be executed, before it is appended.

        Args:
            pending: Requests of this session that were appended and are not yet applied.

        Raises:
            SessionExpired, StaleRequest: See `lookup`.
            Overloaded: Too many replies are waiting for the session's acknowledgement.
            RemoteProtocolError: Sequence or acknowledgement cannot be right.
        """
        session = self._live.get(id)
        if session is None:
            raise expired(id)
        if sequence < 1 or acknowledged > sequence:
            raise RemoteProtocolError(f"sequence {sequence} with acknowledgement of all below {acknowledged}")
        if sequence < session.mark:
            raise stale(id, sequence, session.mark)
        limits = self._limits
        replies = session.replies
        if (
            len(replies) + pending >= limits.replies_max
            or session.replies_bytes >= limits.replies_size_bytes_max
        ):
            kept = [reply for number, reply in replies.items() if number >= acknowledged]
            if len(kept) + pending >= limits.replies_max:
                raise _overloaded("replies_max", limits.replies_max)
            if sum(map(len, kept)) >= limits.replies_size_bytes_max:
                raise _overloaded("replies_size_bytes_max", limits.replies_size_bytes_max)

    def begin(self, id: int, sequence: int, acknowledged: int) -> Session | bytes:
        """
        Begin to apply a request: note the acknowledgement, and find out whether it is to be executed.

        Returns:
            The reply it already has, or the session in which it is to be executed and then `finish`ed.

        Raises:
            SessionExpired, StaleRequest, RemoteProtocolError: It must not be executed; nothing was changed.
        """
        session = self._live.get(id)
        if session is None:
            raise expired(id)
        if sequence < 1 or acknowledged > sequence:
            raise RemoteProtocolError(f"sequence {sequence} with acknowledgement of all below {acknowledged}")
        if sequence < session.mark:
            raise stale(id, sequence, session.mark)
        replies = session.replies
        kept = replies.get(sequence)
        if acknowledged > session.mark:
            if self.table.views:
                self.table.touch(_ID.pack(id))
            self._advance(session, acknowledged)
        return session if kept is None else kept

    def is_overloaded(self, session: Session) -> bool:
        """Whether so many replies are kept that a request is to be refused instead of executed."""
        limits = self._limits
        return (
            len(session.replies) >= limits.replies_max
            or session.replies_bytes >= limits.replies_size_bytes_max
        )

    def is_hopeless(self, session: Session) -> bool:
        """Whether even the refusals have become too many."""
        return len(session.replies) >= OVERLOAD_FACTOR * self._limits.replies_max

    def refusal(self) -> Overloaded:
        """
        What an overloaded session is told. It is kept as the reply, so that the request cannot run later.
        """
        return _overloaded("replies_max", self._limits.replies_max)

    def finish(self, session: Session, sequence: int, reply: bytes) -> None:
        """Keep the reply of a request that was executed."""
        if self.table.views:
            self.table.touch(_ID.pack(session.id))
        session.replies[sequence] = reply
        size = len(reply)
        session.replies_bytes += size
        self.replies_bytes += size

    def forbid(self, session: Session, sequence: int) -> None:
        """Have a request that was withdrawn before it arrived refused when it does."""
        if sequence >= session.mark and sequence not in session.replies:
            error = StaleRequest(
                f"request {sequence} of session {session.id} was withdrawn before it arrived",
                session=session.id,
                sequence=sequence,
            )
            self.finish(session, sequence, encode_error(error))

    def check_open(self, nonce: bytes) -> None:
        """
        Refuse a session too many.

        Raises:
            QuotaExceeded: Of `sessions_max`.
        """
        if len(self._live) >= self._limits.sessions_max and nonce not in self._nonces:
            raise exceeded("sessions_max", self._limits.sessions_max, len(self._live) + 1)

    def open(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], effects: list[Effect]
    ) -> tuple[Any, ...]:
        _, nonce, ttl_ms, owner = args
        id = self._nonces.get(nonce)
        if id is None:
            self.check_open(nonce)
            id = meta.index
            self._insert(Session(id, nonce, ttl_ms, owner, meta.now_ms))
            effects.append(SessionOpened(id, ttl_ms))
        return (0, id)

    def checkpoint(
        self, _meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> tuple[Any, ...]:
        for id, remaining_ms in args[1]:
            session = self._live.get(id)
            if session is not None:
                if self.table.views:
                    self.table.touch(_ID.pack(id))
                session.remaining_ms = None if remaining_ms < 0 else min(remaining_ms, session.ttl_ms)
        return (0,)

    def remove(self, id: int) -> bool:
        """End a session; False if there is none."""
        session = self._live.pop(id, None)
        if session is None:
            return False
        del self._nonces[session.nonce]
        self.replies_bytes -= session.replies_bytes
        self.table.delete(_ID.pack(id))
        return True

    def load(self, record: bytes) -> None:
        """Take a record of a snapshot."""
        id, nonce, ttl_ms, owner, opened_ms, remaining_ms, mark, replies = decode(record)
        session = Session(id, nonce, ttl_ms, owner, opened_ms)
        session.remaining_ms = remaining_ms
        session.mark = mark
        session.replies = dict(zip(replies[::2], replies[1::2], strict=True))
        session.replies_bytes = sum(map(len, replies[1::2]))
        self.replies_bytes += session.replies_bytes
        self._insert(session)

    def check_invariants(self) -> None:
        """For tests: the sums are right, and no reply is kept below its session's mark."""
        invariant(len(self.table) == len(self._live) == len(self._nonces), "sessions and their index differ")
        total = 0
        for session in self._live.values():
            size = sum(map(len, session.replies.values()))
            invariant(session.replies_bytes == size, "size of the replies of session %d", session.id)
            invariant(all(number >= session.mark for number in session.replies), "a reply below the mark")
            total += size
        invariant(self.replies_bytes == total, "size of all replies")

    def _insert(self, session: Session) -> None:
        self._live[session.id] = session
        self._nonces[session.nonce] = session.id
        self.table.put(_ID.pack(session.id), session)

    def _advance(self, session: Session, mark: int) -> None:
        replies = session.replies
        freed = 0
        if mark - session.mark <= len(replies):
            for sequence in range(session.mark, mark):
                reply = replies.pop(sequence, None)
                if reply is not None:
                    freed += len(reply)
        else:
            for sequence in [number for number in replies if number < mark]:
                freed += len(replies.pop(sequence))
        session.mark = mark
        session.replies_bytes -= freed
        self.replies_bytes -= freed


def expired(id: int) -> SessionExpired:
    """The error for a request of a session that is not there."""
    return SessionExpired(f"session {id} has ended; what it held is free again. Open a new one", session=id)


def stale(id: int, sequence: int, mark: int) -> StaleRequest:
    """The error for a request whose reply the session said it has."""
    return StaleRequest(
        f"request {sequence} of session {id} was answered before (all below {mark} were)",
        session=id,
        sequence=sequence,
        acknowledged=mark,
    )


def _overloaded(limit: str, maximum: int) -> Overloaded:
    return Overloaded(
        f"{limit} ({maximum}) is reached: take in replies, then retry", limit=limit, maximum=maximum
    )
