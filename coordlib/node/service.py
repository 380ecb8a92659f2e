"""The leader's side of requests: propose, confirm, answer, and end sessions that fell silent. Sans-I/O.

Every member has one; only the leader's does anything but refuse. A *source* is who asked: "" is this
node's own application, a member's name, or a client's route as bytes. Answers leave in `replies`.

Invariant: a definite refusal is given only for a request of which no copy can have been appended by
this leader, and, if it depends on the state, only once everything committed before this leader's term
has been applied here. Until then, and until the time of day is known, it is not `is_ready`, and requests are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from coordlib.config import Timing
from coordlib.errors import CoordError, NotLeader, Overloaded, SessionExpired, UsageError, invariant
from coordlib.machine import Machine, commands
from coordlib.machine.effects import Applied, LockGranted, LockWithdrawn, SessionEnded, SessionOpened
from coordlib.node.logtime import LogClock
from coordlib.raft import RawNode
from coordlib.raft.messages import Entry
from coordlib.wire.messages import Reply, ReplyStatus, Request, RequestKind

__all__ = ["RequestService", "Source"]

Source: TypeAlias = str | bytes

HELD_MAX: Final = 20_000
"""Requests that may wait for a new leader to be ready, or for reads to be confirmed."""

WAITS_MAX: Final = 100_000
EXPIRE_BATCH_MAX: Final = 256
STALL_MS: Final = 1000
_NEVER: Final = 1 << 62


class _Proposed(NamedTuple):
    term: int
    key: tuple[int, int] | None  # (session, sequence), None for opening ones
    size_bytes: int
    askers: list[tuple[Source, int]]


class _Read(NamedTuple):
    """Context of a read-confirmation: what to do when leadership has been confirmed."""

    source: Source
    request: Request


class RequestService:
    def __init__(self, node_id: str, timing: Timing, raft: RawNode, machine: Machine) -> None:
        self._node_id = node_id
        self._timing = timing
        self._raft = raft
        self._machine = machine
        self.replies: list[tuple[Source, Reply]] = []
        self.counters = {
            "commands": 0,
            "queries": 0,
            "keep_alives": 0,
            "waits": 0,
            "refused": 0,
            "expired": 0,
        }
        self._proposed: dict[int, _Proposed] = {}
        self._by_key: dict[tuple[int, int], _Proposed] = {}
        self._held: list[tuple[Source, Request]] = []
        self._reads: list[tuple[int, _Read]] = []  # confirmed, waiting for apply; read index ascending
        self._reads_asked = 0
        self._waits: dict[tuple[int, int], dict[tuple[Source, int], Request]] = {}
        self._waits_count = 0
        self._pending_of: dict[int, int] = {}  # session -> its commands in the log, not applied yet
        self._pending_bytes = 0  # of all commands in the log, not applied yet
        self._deadlines: dict[int, int] = {}
        self._next_expiry = _NEVER
        self._expiring: dict[
            int, list[tuple[Source, Request]]
        ] = {}  # session -> keep-alives that wait for its fate
        self._clearing: dict[
            int, list[tuple[Source, Request]]
        ] = {}  # session -> ... for its checkpoint to be cleared
        self._clear_index: dict[int, int] = {}  # session -> where in the log its checkpoint is cleared
        self._checkpointed: set[int] = set()
        self._last_tick = 0
        self._opened_at_index = 0
        self.log_clock: LogClock | None = None
        self.is_ready = False

    # -- leadership ----------------------------------------------------------------------------------------

    def become_leader(self, now: int, noop_index: int, quorum: int) -> None:
        """The node was elected; requests are held until its no-op is applied, and the time is known."""
        self._opened_at_index = noop_index
        self.is_ready = False
        self._last_tick = now
        self.log_clock = LogClock(self._machine.log_time_ms, now, quorum)

    def lose_leadership(self, leader: str) -> None:
        """Everyone who waits is told to ask the next leader; what was proposed may still commit there."""
        self.is_ready = False
        self.log_clock = None
        hint = leader.encode()
        for proposed in self._proposed.values():
            for source, request_id in proposed.askers:
                self._reply(source, request_id, ReplyStatus.UNKNOWN, hint)
        held = self._held
        held.extend((read.source, read.request) for _, read in self._reads)
        for waiting in (self._expiring, self._clearing):
            for keep_alives in waiting.values():
                held.extend(keep_alives)
        for waits in self._waits.values():
            held.extend((source, request) for (source, _), request in waits.items())
        for source, request in held:
            self._reply(source, request.request_id, ReplyStatus.NOT_LEADER, hint)
        self._held = []
        self._proposed.clear()
        self._by_key.clear()
        self._pending_of.clear()
        self._pending_bytes = 0
        self._machine.close_cursors()
        self._reads.clear()
        self._reads_asked = 0
        self._waits.clear()
        self._waits_count = 0
        self._expiring.clear()
        self._clearing.clear()
        self._clear_index.clear()
        self._checkpointed.clear()
        self._deadlines.clear()
        self._next_expiry = _NEVER

    def observe_clock(self, voter: str, wall_ms: int, now: int) -> None:
        """A voter's wall clock, as of about now. Of interest to a leader only."""
        if self.log_clock is not None:
            self.log_clock.observe(voter, wall_ms, now)
            if not self.is_ready:
                self._look_ready(now)

    def _look_ready(self, now: int) -> None:
        clock = self.log_clock
        if clock is None or not self._machine.applied_index >= self._opened_at_index > 0:
            return
        clock.follow(self._machine.log_time_ms)
        # Else what is logged would be dated to 1970, and an id with it. Every voter tells its clock once a second.
        if clock.is_set:
            self._become_ready(now)

    def _become_ready(self, now: int) -> None:
        self.is_ready = True
        # TTL is a lower bound, counted anew by each leader; what an earlier leader logged as already
        # spent stays spent, so that frequent changes of leader do not keep the dead alive.
        for session in self._machine.sessions.live():
            remaining = session.ttl_ms if session.remaining_ms is None else session.remaining_ms
            self._deadlines[session.session] = now + remaining
            if session.remaining_ms is not None:
                self._checkpointed.add(session.session)
        self._next_expiry = now  # look at them at once: when to log the silence of which
        held, self._held = self._held, []
        for source, request in held:
            self._handle(source, request, now)

    # -- requests ------------------------------------------------------------------------------------------

    def handle(self, source: Source, requests: Sequence[Request], now: int) -> None:
        """Take requests; every one of them is answered, sooner or later, or its asker asks again."""
        if not self._raft.is_leader:
            hint = self._raft.leader.encode()
            for request in requests:
                if request.kind == RequestKind.STALE_QUERY:
                    self._reply(source, request.request_id, ReplyStatus.OK, self._machine.query(request.body))
                else:
                    self._reply(source, request.request_id, ReplyStatus.NOT_LEADER, hint)
            return
        if not self.is_ready:
            room = HELD_MAX - len(self._held)
            self._held.extend((source, request) for request in requests[:room])
            for request in requests[room:]:
                self._refuse(
                    source, request, Overloaded("the new leader is not ready yet and its queue is full")
                )
            return
        if self._raft.is_transferring:
            # In a moment there is another leader, who takes them.
            for request in requests:
                self._reply(source, request.request_id, ReplyStatus.NOT_LEADER, b"")
            return
        for request in requests:
            self._handle(source, request, now)

    def _handle(self, source: Source, request: Request, now: int) -> None:
        kind = request.kind
        try:
            if kind == RequestKind.COMMAND:
                self._command(source, request, now)
            elif kind in (RequestKind.QUERY, RequestKind.WAIT, RequestKind.KEEP_ALIVE):
                if self._reads_asked + len(self._reads) >= HELD_MAX:
                    raise Overloaded("too many reads wait for confirmation; back off and retry")
                if kind == RequestKind.KEEP_ALIVE:
                    self._keep_alive(source, request, now)
                else:
                    self._raft.request_read(_Read(source, request))
                    self._reads_asked += 1
            elif kind == RequestKind.STALE_QUERY:
                self._reply(source, request.request_id, ReplyStatus.OK, self._machine.query(request.body))
            else:
                raise UsageError(f"unknown kind of request {kind}: upgrade this node")
        except NotLeader as error:
            self._reply(source, request.request_id, ReplyStatus.NOT_LEADER, str(error.leader_hint).encode())
        except CoordError as error:
            if isinstance(error, SessionExpired) and kind == RequestKind.COMMAND:
                self._confirm(source, request)
            else:
                self._refuse(source, request, error)

    def _confirm(self, source: Source, request: Request) -> None:
        """
        The session of a command is not known here. One who was deposed without having noticed knows none of the
        sessions that were opened since, and must not call them ended: have the leadership confirmed first.
        """
        try:
            self._raft.request_read(_Read(source, request))
            self._reads_asked += 1
        except CoordError:
            self._reply(source, request.request_id, ReplyStatus.NOT_LEADER, b"")

    def _command(self, source: Source, request: Request, now: int) -> None:
        session, sequence = request.session, request.sequence
        key: tuple[int, int] | None = None
        if session:
            reply = self._machine.lookup(session, sequence)
            if reply is not None:
                self._reply(source, request.request_id, ReplyStatus.OK, reply)
                return
            key = (session, sequence)
            known = self._by_key.get(key)
            if known is not None:
                asker = (source, request.request_id)
                if asker not in known.askers:
                    known.askers.append(asker)
                return
        if commands.is_internal(request.body):
            raise UsageError("this command is the cluster's own; it cannot be sent")
        self._machine.check(
            session,
            sequence,
            request.acknowledged,
            request.body,
            self._pending_of.get(session, 0),
            self._pending_bytes,
        )
        self.counters["commands"] += 1
        entry = self._propose(session, sequence, request.acknowledged, request.body, now)
        proposed = _Proposed(entry.term, key, len(request.body), [(source, request.request_id)])
        self._proposed[entry.index] = proposed
        self._pending_bytes += len(request.body)
        if key is not None:
            self._by_key[key] = proposed
            self._pending_of[session] = self._pending_of.get(session, 0) + 1

    def _propose(self, session: int, sequence: int, acknowledged: int, operation: bytes, now: int) -> Entry:
        log_clock = self.log_clock
        assert log_clock is not None
        data = commands.pack_entry(log_clock.read(now), session, sequence, acknowledged, operation)
        return self._raft.propose(data)

    def _propose_internal(self, operation: bytes, now: int) -> None:
        try:
            self._propose(0, 0, 0, operation, now)
        except (NotLeader, Overloaded):
            # Nothing is owed to anybody: the timer that led here fires again.
            pass

    def propose_internal(self, operation: bytes, now: int) -> None:
        """A command of the cluster's own, such as the recording of a disk."""
        if self.is_ready:
            self._propose_internal(operation, now)

    def _keep_alive(self, source: Source, request: Request, now: int) -> None:
        session = request.session
        self.counters["keep_alives"] += 1
        waiting = self._expiring.get(session)
        if waiting is not None:
            # EXPIRE is in the log: only its fate decides. Acknowledging now would promise what may be undone.
            waiting.append((source, request))
            return
        if session not in self._deadlines:
            # Or it was opened by a later leader, of whom this one has not heard yet: see `_confirm`.
            self._raft.request_read(_Read(source, request), by_quorum=True)
            self._reads_asked += 1
            return
        session_ttl = self._machine.sessions.ttl_ms(session)
        self._deadlines[session] = now + session_ttl
        if session in self._checkpointed:
            # A later leader would start from the remaining time that is in the log: have it cleared first.
            if session not in self._clearing:
                entry = self._propose(0, 0, 0, commands.checkpoint_sessions([(session, -1)]), now)
                self._clear_index[session] = entry.index
                self._clearing[session] = []
            self._clearing[session].append((source, request))
            return
        # Never by lease: this answer prolongs a promise that others rely on.
        self._raft.request_read(_Read(source, request), by_quorum=True)
        self._reads_asked += 1

    # -- confirmations and applied entries -----------------------------------------------------------------

    def reads_confirmed(self, reads: Sequence[tuple[object, int]]) -> None:
        for context, index in reads:
            assert isinstance(context, _Read)
            self._reads.append((index, context))
        self._reads_asked = max(0, self._reads_asked - len(reads))

    def reads_failed(self, contexts: Sequence[object]) -> None:
        hint = self._raft.leader.encode()
        for context in contexts:
            assert isinstance(context, _Read)
            self._reply(context.source, context.request.request_id, ReplyStatus.NOT_LEADER, hint)
        self._reads_asked = max(0, self._reads_asked - len(contexts))

    def serve_reads(self, now: int) -> None:
        """Answer the confirmed reads whose index has been applied."""
        if not self._reads:
            return
        applied = self._machine.applied_index
        remaining: list[tuple[int, _Read]] = []
        for item in self._reads:
            if item[0] > applied:
                remaining.append(item)
            else:
                self._serve(item[1].source, item[1].request, now)
        self._reads = remaining

    def _serve(self, source: Source, request: Request, now: int) -> None:
        if request.kind == RequestKind.QUERY:
            self.counters["queries"] += 1
            clock = self.log_clock
            log_now = None if clock is None else lambda: clock.read(now)
            reply = self._machine.query(request.body, log_now)
            self._reply(source, request.request_id, ReplyStatus.OK, reply)
        elif request.kind == RequestKind.KEEP_ALIVE:
            if request.session in self._expiring:
                self._expiring[request.session].append((source, request))
            elif request.session in self._deadlines:
                self._reply(source, request.request_id, ReplyStatus.OK, b"")
            else:
                self._refuse(
                    source, request, SessionExpired("the session has ended; everything it held is released")
                )
        elif request.kind == RequestKind.COMMAND:
            try:
                self._command(source, request, now)
            except NotLeader as error:
                self._reply(
                    source, request.request_id, ReplyStatus.NOT_LEADER, str(error.leader_hint).encode()
                )
            except CoordError as error:
                self._refuse(source, request, error)
        else:
            self._wait(source, request)

    def _wait(self, source: Source, request: Request) -> None:
        reply = self._machine.wait_condition(request.body)
        if reply is not None:
            self._reply(source, request.request_id, ReplyStatus.OK, reply)
            return
        if self._waits_count >= WAITS_MAX:
            self._refuse(source, request, Overloaded("too many waiters; back off and retry"))
            return
        waits = self._waits.setdefault((request.session, request.sequence), {})
        if (source, request.request_id) not in waits:
            self.counters["waits"] += 1
            self._waits_count += 1
            waits[(source, request.request_id)] = request

    def _wake_waits(self, key: tuple[int, int]) -> None:
        waits = self._waits.pop(key, None)
        if waits:
            self._waits_count -= len(waits)
            for (source, _), request in waits.items():
                self._wait(source, request)

    def applied(self, entry: Entry, applied: Applied, now: int) -> None:
        """An entry was applied here: answer whoever waits for it, and follow its effects."""
        proposed = self._proposed.pop(entry.index, None)
        if proposed is not None:
            key = proposed.key
            self._pending_bytes -= proposed.size_bytes
            if key is not None:
                self._by_key.pop(key, None)
                pending = self._pending_of.get(key[0], 0)
                if pending > 1:
                    self._pending_of[key[0]] = pending - 1
                else:
                    self._pending_of.pop(key[0], None)
            invariant(proposed.term == entry.term, "entry %d changed its term under its leader", entry.index)
            for source, request_id in proposed.askers:
                self._reply(source, request_id, ReplyStatus.OK, applied.reply)
        for effect in applied.effects:
            if isinstance(effect, LockGranted | LockWithdrawn):
                self._wake_waits((effect.session, effect.sequence))
            elif isinstance(effect, SessionOpened):
                if self.is_ready:
                    self._deadlines[effect.session] = now + effect.ttl_ms
                    self._next_expiry = min(self._next_expiry, now + effect.ttl_ms - effect.ttl_ms // 2)
            elif isinstance(effect, SessionEnded):
                self._session_ended(effect.session)

    def settled(self, now: int) -> None:
        """Called once after a batch was applied: keep-alives that waited for the log go on."""
        if not self._raft.is_leader:
            return
        if not self.is_ready:
            self._look_ready(now)
            return
        if self._clearing:
            for session in list(self._clearing):
                # Not "no remaining time is applied": the checkpoint itself may still be on its way.
                if self._machine.applied_index >= self._clear_index[session]:
                    del self._clear_index[session]
                    self._checkpointed.discard(session)
                    for source, request in self._clearing.pop(session):
                        self._handle(source, request, now)

    def _session_ended(self, session: int) -> None:
        self._deadlines.pop(session, None)
        self._checkpointed.discard(session)
        self._clear_index.pop(session, None)
        self._pending_of.pop(session, None)
        for waiting in (self._expiring, self._clearing):
            for source, request in waiting.pop(session, ()):
                self._refuse(
                    source, request, SessionExpired("the session has expired; everything it held is released")
                )
        for key in [key for key in self._waits if key[0] == session]:
            self._wake_waits(key)

    # -- time ----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> int:
        return self._next_expiry if self.is_ready else _NEVER

    def tick(self, now: int) -> None:
        stalled_ms = now - self._last_tick
        self._last_tick = now
        if not self.is_ready or now < self._next_expiry:
            return
        if stalled_ms > STALL_MS + self._timing.session_ttl_ms // 2:
            # We were kept from running ourselves: keep-alives may have waited in front of us. Start over.
            for session in self._deadlines:
                self._deadlines[session] = now + self._machine.sessions.ttl_ms(session)
        due: list[int] = []
        quiet: list[tuple[int, int]] = []
        next_expiry = _NEVER
        for session, deadline in self._deadlines.items():
            if session in self._expiring:
                continue
            ttl = self._machine.sessions.ttl_ms(session)
            if deadline <= now:
                due.append(session)
                continue
            checkpoint_at = deadline - ttl // 2
            if session not in self._checkpointed:
                if checkpoint_at <= now:
                    quiet.append((session, deadline - now))
                    next_expiry = min(next_expiry, deadline)
                else:
                    next_expiry = min(next_expiry, checkpoint_at)
            else:
                next_expiry = min(next_expiry, deadline)
        self._next_expiry = next_expiry
        if quiet:
            self._checkpointed.update(session for session, _ in quiet)
            self._propose_internal(commands.checkpoint_sessions(quiet), now)
        if due:
            for session in due[:EXPIRE_BATCH_MAX]:
                self._expiring[session] = []
            self.counters["expired"] += len(due[:EXPIRE_BATCH_MAX])
            try:
                self._propose(0, 0, 0, commands.expire_sessions(due[:EXPIRE_BATCH_MAX]), now)
            except (NotLeader, Overloaded):
                for session in due[:EXPIRE_BATCH_MAX]:
                    for source, request in self._expiring.pop(session):
                        self._reply(source, request.request_id, ReplyStatus.NOT_LEADER, b"")
                self._next_expiry = now + 50
            else:
                if len(due) > EXPIRE_BATCH_MAX:
                    self._next_expiry = now

    # -- answers -------------------------------------------------------------------------------------------

    def _reply(self, source: Source, request_id: int, status: int, body: bytes) -> None:
        self.replies.append((source, Reply(request_id, status, body)))

    def _refuse(self, source: Source, request: Request, error: CoordError) -> None:
        self.counters["refused"] += 1
        self._reply(source, request.request_id, ReplyStatus.ERROR, commands.encode_error(error))

    def source_gone(self, source: Source) -> None:
        """The way back to a source is lost: forget its waits; it asks again over a new one."""
        for key in [key for key, waits in self._waits.items() if any(s == source for s, _ in waits)]:
            waits = self._waits[key]
            for asker in [asker for asker in waits if asker[0] == source]:
                del waits[asker]
                self._waits_count -= 1
            if not waits:
                del self._waits[key]
