"""The application's side of a session: requests out, answers in, keep-alives, and when to give up. Sans-I/O.

One `SessionClient` serves one process, whether a member or a client without a vote. It numbers the
commands, keeps each until it is answered, sends it again after a change of leader under the same
(session, sequence), and counts the session's life down from *before* each keep-alive was sent.

It does not know how requests travel: the kernel takes `flush()` and brings what comes back.

::

    OPENING ──opened──▶ CONNECTED ◀──keep-alive answered── SUSPENDED
                            └──unanswered for half the TTL──────┘ │
       any ──expired, or counted down to nothing──▶ LOST ◀────────┘        any ──close()──▶ CLOSED
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from coordlib.config import Timing
from coordlib.errors import (
    ClusterClosed,
    CommitTimeout,
    CoordError,
    LeadershipLost,
    NoQuorum,
    Overloaded,
    QuotaExceeded,
    RemoteProtocolError,
    SessionExpired,
)
from coordlib.machine import commands
from coordlib.wire.messages import Reply, ReplyStatus, Request, RequestKind

__all__ = ["Call", "SessionClient", "SessionState", "SessionView"]

PENDING_MAX: Final = 8192
"""Calls of one process that may wait at once; more are refused with Overloaded."""

WINDOW_MAX: Final = 1000
"""Commands in flight: below the 1,024 replies that the machine keeps for a session."""

BODY_SIZE_BYTES_MAX: Final = 4 * 1024 * 1024
FLUSH_MAX: Final = 512
FLUSH_SIZE_BYTES_MAX: Final = 4 * 1024 * 1024
RESEND_MS: Final = 1000
RESEND_MS_MAX: Final = 5000
BACK_OFF_MS: Final = 20
_NEVER: Final = 1 << 62


class SessionState(IntEnum):
    OPENING = 0
    CONNECTED = 1
    SUSPENDED = 2
    LOST = 3
    CLOSED = 4


class SessionView:
    """
    What other threads may read of a session without asking the node: plain attributes, written by one thread.

    `valid_until_ms` is on the clock that the node was given; it only ever grows while the session lives.
    """

    __slots__ = ("session_id", "state", "ttl_ms", "valid_until_ms")

    def __init__(self, ttl_ms: int) -> None:
        self.session_id = 0
        self.ttl_ms = ttl_ms
        self.valid_until_ms = 0
        self.state = SessionState.OPENING

    def is_valid(self, now_ms: int) -> bool:
        return self.state in (SessionState.CONNECTED, SessionState.SUSPENDED) and now_ms < self.valid_until_ms


class Call:
    """
    One request of the application on its way; afterwards its outcome.

    Exactly one of `reply` and `error` is set by `SessionClient`, once. A *detached* call has no one
    waiting: it is retried until it is answered or its session ends, and only one that `is_heard` is told of
    when it has ended. One that `withdraws` another undoes it:
    if the other was never sent, by not sending it; else by the command built from the other's sequence.
    A CALL has a `target`, the session of the application that is called, and is no matter of `SessionClient`.
    """

    __slots__ = (
        "attempts",
        "body",
        "deadline_ms",
        "error",
        "is_detached",
        "is_queued",
        "kind",
        "reply",
        "request_id",
        "resend_ms",
        "sent_ms",
        "sequence",
        "target",
        "view",
        "withdraws",
    )

    is_heard = False

    def __init__(
        self,
        kind: int,
        body: bytes,
        deadline_ms: int = _NEVER,
        *,
        sequence: int = 0,
        view: SessionView | None = None,
        is_detached: bool = False,
        withdraws: tuple[Call, Callable[[int], bytes]] | None = None,
    ) -> None:
        self.kind = kind
        self.body = body
        self.deadline_ms = deadline_ms
        self.sequence = sequence
        self.view = view
        self.is_detached = is_detached
        self.withdraws = withdraws
        self.target = 0
        self.is_queued = False
        self.attempts = 0
        self.request_id = 0
        self.sent_ms = 0  # first
        self.resend_ms = 0
        self.reply: bytes | None = None
        self.error: CoordError | None = None

    def wake(self) -> None:
        """It has ended. Here nobody waits for that."""


def _error_of(body: bytes) -> CoordError:
    return commands.error_reply(body) or RemoteProtocolError("a refusal that is none")


class SessionClient:
    """See the module's docstring. Not thread-safe: owned by the node thread."""

    def __init__(self, timing: Timing, owner: str, random_bytes: Callable[[int], bytes]) -> None:
        self._timing = timing
        self._owner = owner
        self._random_bytes = random_bytes
        self.view = SessionView(timing.session_ttl_ms)
        self.leader = ""
        self._pending: dict[int, Call] = {}
        self._queue: deque[Call] = deque()
        # Begins anywhere: an answer that was meant for an earlier run of this member must not look like one for this.
        self._request_id = int.from_bytes(random_bytes(4), "big")
        self._keep_alives: dict[int, int] = {}  # request id -> when it was sent
        self._opening: Call | None = None
        self._wants_session = False
        self._hold_until = 0
        self._next_scan = _NEVER
        self._next_keep_alive = _NEVER
        self._last_answer_ms = 0
        self._reset_sequences()
        self.completed: list[Call] = []
        self.changes: list[tuple[SessionView, SessionState]] = []
        self._is_closing = False
        self.counters = {"calls": 0, "resent": 0, "timeouts": 0, "sessions_lost": 0}

    def _reset_sequences(self) -> None:
        self._next_sequence = 1
        self._lowest = 1  # every sequence below it is answered or given up
        self._answered: set[int] = set()  # above _lowest

    # -- calls ---------------------------------------------------------------------------------------------

    def open(self, now: int) -> None:
        """Open a session as soon as there is a leader, and keep one open from now on."""
        self._wants_session = True
        if self.view.state in (SessionState.LOST, SessionState.CLOSED):
            self.view = SessionView(self._timing.session_ttl_ms)
            self._reset_sequences()
        if self._opening is None and self.view.state is SessionState.OPENING:
            body = commands.open_session(self._random_bytes(16), self._timing.session_ttl_ms, self._owner)
            call = Call(RequestKind.COMMAND, body)
            self._opening = call
            self._enqueue(call, first=True)

    def submit(self, call: Call, now: int, *, is_essential: bool = False) -> None:
        """Take a call; it ends in `completed`, at its deadline at the latest."""
        self.counters["calls"] += 1
        if call.withdraws is not None:
            withdrawn, build = call.withdraws
            self.cancel(withdrawn)
            if not withdrawn.attempts:
                return
            call.view = withdrawn.view
            call.body = build(withdrawn.sequence)
        if len(call.body) > BODY_SIZE_BYTES_MAX:
            limit = "entry_size_bytes_max"
            self._fail(
                call,
                QuotaExceeded(
                    f"the request has {len(call.body)} bytes, {limit} is {BODY_SIZE_BYTES_MAX}; nothing was sent",
                    limit=limit,
                ),
            )
            return
        if len(self._pending) >= PENDING_MAX and not (call.is_detached or is_essential):
            self._fail(
                call,
                Overloaded(f"{PENDING_MAX} calls of this process are waiting already; back off and retry"),
            )
            return
        if call.view is not None and call.view is not self.view:
            # Bound to a session that is gone, and everything it held with it.
            self._fail(call, SessionExpired("the session that this call belongs to has ended"))
            return
        if self._is_closing:
            self._fail(call, ClusterClosed("the session is being closed; nothing was sent"))
            return
        if call.kind == RequestKind.COMMAND and self.view.state >= SessionState.LOST:
            self.open(now)
        self._enqueue(call)
        if call.deadline_ms < self._next_scan:
            self._next_scan = call.deadline_ms

    def cancel(self, call: Call) -> None:
        """Nobody waits for the call any more. A command that was sent may still take effect."""
        if self._pending.get(call.request_id) is call:
            self._forget(call)

    def _enqueue(self, call: Call, *, first: bool = False) -> None:
        self._request_id += 1
        call.request_id = self._request_id
        self._pending[call.request_id] = call
        if first:
            call.is_queued = True
            self._queue.appendleft(call)
        else:
            self._queue_again(call)

    def _queue_again(self, call: Call) -> None:
        if not call.is_queued:
            call.is_queued = True
            self._queue.append(call)

    @property
    def id(self) -> int:
        """Of the session that lives; 0: there is none, as far as is known here."""
        view = self.view
        return view.session_id if view.state in (SessionState.CONNECTED, SessionState.SUSPENDED) else 0

    @property
    def pending_count(self) -> int:
        return len(self._pending)

    # -- sending -------------------------------------------------------------------------------------------

    @property
    def has_outgoing(self) -> bool:
        return bool(self._queue) or self._keep_alive_due

    _keep_alive_due = False

    def flush(self, now: int) -> list[Request]:
        """Requests for the leader, oldest first; empty while there is none to send to."""
        if not self.leader or now < self._hold_until:
            return []
        out: list[Request] = []
        if self._keep_alive_due:
            self._keep_alive_due = False
            self._request_id += 1
            self._keep_alives[self._request_id] = now
            out.append(Request(self._request_id, RequestKind.KEEP_ALIVE, self.view.session_id, 0, 0, b""))
        if not self._queue:
            return out
        held: list[Call] = []
        size = 0
        queue, view, opening = self._queue, self.view, self._opening
        while queue and len(out) < FLUSH_MAX and size < FLUSH_SIZE_BYTES_MAX:
            call = queue.popleft()
            call.is_queued = False
            if call.request_id not in self._pending:
                continue
            if call.view is not None and call.view is not view:
                # Its sequences mean something else in the session of now: it ends with its own.
                self._finish(call, None, SessionExpired("the session that this call belongs to has ended"))
                continue
            if out and size + len(call.body) > FLUSH_SIZE_BYTES_MAX:
                call.is_queued = True
                queue.appendleft(call)
                break
            if now >= call.deadline_ms:
                # Its caller may have been told so already: nothing is sent behind its back.
                self._finish(call, None, self._timeout_error(call))
                continue
            session = sequence = 0
            if call.kind == RequestKind.COMMAND and call is not opening:
                if view.session_id == 0 or (
                    call.sequence == 0 and self._next_sequence - self._lowest >= WINDOW_MAX
                ):
                    call.is_queued = True
                    held.append(call)
                    if len(held) > FLUSH_MAX:
                        break
                    continue
                if call.sequence == 0:
                    call.sequence = self._next_sequence
                    call.view = view
                    self._next_sequence += 1
                session, sequence = view.session_id, call.sequence
            elif call.kind == RequestKind.WAIT:
                session, sequence = view.session_id, call.sequence
            if call.attempts == 0:
                call.sent_ms = now
            else:
                self.counters["resent"] += 1
            call.attempts += 1
            call.resend_ms = now + min(RESEND_MS * call.attempts, RESEND_MS_MAX)
            size += len(call.body)
            out.append(Request(call.request_id, call.kind, session, sequence, self._lowest, call.body))
        if held:
            queue.extendleft(reversed(held))
        if out and self._next_scan > now + RESEND_MS:
            self._next_scan = now + RESEND_MS
        return out

    def leader_changed(self, leader: str, now: int) -> None:
        """Everything unanswered goes to the new leader; the same one again means that the link was made anew."""
        self.leader = leader
        self._hold_until = 0
        self._requeue_all()
        if self._keep_alives:
            self._keep_alives.clear()
            self._keep_alive_due = self.view.state in (SessionState.CONNECTED, SessionState.SUSPENDED)

    def _requeue_all(self) -> None:
        # In the order of their request ids, which is the order in which they were asked.
        self._queue = deque(self._pending.values())
        for call in self._queue:
            call.is_queued = True
        if self._opening is not None and self._queue and self._queue[0] is not self._opening:
            self._queue.remove(self._opening)
            self._queue.appendleft(self._opening)

    # -- answers -------------------------------------------------------------------------------------------

    def receive(self, replies: tuple[Reply, ...] | list[Reply], now: int) -> str | None:
        """Take answers; returns another leader's name when one of them points to it."""
        hint: str | None = None
        for request_id, status, body in replies:
            call = self._pending.get(request_id)
            if call is None:
                sent_ms = self._keep_alives.pop(request_id, None)
                if sent_ms is not None:
                    self._keep_alive_answered(status, body, sent_ms, now)
                continue
            if status == ReplyStatus.OK and commands.is_success(body):
                if call is self._opening:
                    self._opened(call, body)
                else:
                    self._finish(call, body, None)
            elif status == ReplyStatus.OK:
                self._refused(call, _error_of(body), now)
            elif status == ReplyStatus.ERROR:
                self._refused_before_append(call, _error_of(body), now)
            else:
                if status == ReplyStatus.NOT_LEADER:
                    hint = body.decode("utf-8", "replace")
                    if hint == self.leader or not hint:
                        self._hold_until = now + BACK_OFF_MS
                else:
                    self._hold_until = now + BACK_OFF_MS
                self._queue_again(call)
        return hint

    def _refused_before_append(self, call: Call, error: CoordError, now: int) -> None:
        """This leader did not append it. An earlier one may have, if there was an earlier attempt."""
        if (
            isinstance(error, Overloaded)
            and (call.is_detached or call.attempts > 1)
            and call is not self._opening
        ):
            # Nobody is there to try again, or nothing definite could be said: try again ourselves.
            self._hold_until = now + BACK_OFF_MS
            self._queue_again(call)
            return
        is_retried = call.kind == RequestKind.COMMAND and call.attempts > 1 and call is not self._opening
        if is_retried and not isinstance(error, SessionExpired):
            error = LeadershipLost(
                f"the request was sent again after a change of leader and refused then ({error}): its first attempt "
                "may have taken effect",
                request_id=call.request_id,
            )
        self._refused(call, error, now)

    def _refused(self, call: Call, error: CoordError, now: int) -> None:
        if call is self._opening:
            # Refused by a limit: try again later; calls that wait for the session end at their deadlines.
            self._opening = None
            self._forget(call)
            self._open_error = error
            self._reopen_at = now + self._timing.keep_alive_ms
            self._next_scan = min(self._next_scan, self._reopen_at)
            return
        if isinstance(error, SessionExpired):
            if call.kind == RequestKind.COMMAND and call.attempts > 1:
                # An earlier attempt may have been applied before the session ended.
                error = LeadershipLost(
                    "the session ended while the request was being retried: it may have taken effect",
                    request_id=call.request_id,
                )
            self._finish(call, None, error)
            if call.view is None or call.view is self.view:
                self._lose(now)
            return
        self._finish(call, None, error)

    _open_error: CoordError | None = None
    _reopen_at = _NEVER

    def _opened(self, call: Call, body: bytes) -> None:
        self._opening = None
        self._pending.pop(call.request_id, None)
        self._open_error = None
        view = self.view
        view.session_id = commands.decode_reply(body)[0]
        view.valid_until_ms = self._promise(call.sent_ms)
        self._last_answer_ms = call.sent_ms
        self._next_keep_alive = call.sent_ms + self._timing.keep_alive_ms
        self._set_state(SessionState.CONNECTED)

    def _promise(self, sent_ms: int) -> int:
        # The holder counts from before it sent, less what the two clocks may drift apart meanwhile.
        ttl = self._timing.session_ttl_ms
        return sent_ms + ttl - (ttl * self._timing.drift_percent + 99) // 100

    def _keep_alive_answered(self, status: int, body: bytes, sent_ms: int, now: int) -> None:
        if status == ReplyStatus.OK:
            view = self.view
            if view.state in (SessionState.CONNECTED, SessionState.SUSPENDED):
                view.valid_until_ms = max(view.valid_until_ms, self._promise(sent_ms))
                self._last_answer_ms = now
                if view.state is SessionState.SUSPENDED:
                    self._set_state(SessionState.CONNECTED)
        elif status == ReplyStatus.ERROR and isinstance(_error_of(body), SessionExpired):
            self._lose(now)
        elif self.view.state in (SessionState.CONNECTED, SessionState.SUSPENDED):
            # Only then: one that is closed sends none, and would be looked at again and again for it.
            self._next_keep_alive = min(self._next_keep_alive, now + BACK_OFF_MS)

    def _finish(self, call: Call, reply: bytes | None, error: CoordError | None) -> None:
        self._forget(call)
        call.reply = reply
        call.error = error
        if not call.is_detached or call.is_heard:
            self.completed.append(call)

    def _fail(self, call: Call, error: CoordError) -> None:
        call.error = error
        if not call.is_detached or call.is_heard:
            self.completed.append(call)

    def _forget(self, call: Call) -> None:
        self._pending.pop(call.request_id, None)
        if call.kind == RequestKind.COMMAND and call.sequence and call.view is self.view:
            # A sequence given up counts as answered: should a late copy of it still arrive at the leader, it is
            # below the mark then, and refused.
            sequence = call.sequence
            if sequence == self._lowest:
                lowest = sequence + 1
                answered = self._answered
                while lowest in answered:
                    answered.remove(lowest)
                    lowest += 1
                self._lowest = lowest
            elif sequence > self._lowest:
                self._answered.add(sequence)

    # -- time ----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> int:
        """When `tick` has something to do at the latest."""
        view = self.view
        state = view.state
        if state is SessionState.CONNECTED:
            deadline = min(
                self._next_scan,
                self._next_keep_alive,
                view.valid_until_ms,
                self._last_answer_ms + self._timing.session_ttl_ms // 2,
            )
        elif state is SessionState.SUSPENDED:
            deadline = min(self._next_scan, self._next_keep_alive, view.valid_until_ms)
        else:
            deadline = min(self._next_scan, self._next_keep_alive)
        return min(deadline, self._hold_until) if self._hold_until else deadline

    def tick(self, now: int) -> None:
        view = self.view
        if now >= self._hold_until:
            self._hold_until = 0
        if view.state in (SessionState.CONNECTED, SessionState.SUSPENDED):
            if now >= view.valid_until_ms:
                self._lose(now)
            elif (
                view.state is SessionState.CONNECTED
                and now >= self._last_answer_ms + self._timing.session_ttl_ms // 2
            ):
                self._set_state(SessionState.SUSPENDED)
        if now >= self._next_keep_alive and view.state in (SessionState.CONNECTED, SessionState.SUSPENDED):
            self._keep_alive_due = True
            # Unanswered ones are not sent again under their old id: the time of sending is what counts.
            self._next_keep_alive = now + self._timing.keep_alive_ms
            while len(self._keep_alives) > 16:
                del self._keep_alives[next(iter(self._keep_alives))]
        if now >= self._next_scan:
            self._scan(now)

    def _scan(self, now: int) -> None:
        next_scan = _NEVER
        if now >= self._reopen_at:
            self._reopen_at = _NEVER
            if self._wants_session:
                self.open(now)
        else:
            next_scan = self._reopen_at
        for call in list(self._pending.values()):
            if now >= call.deadline_ms:
                self.counters["timeouts"] += 1
                self._finish(call, None, self._timeout_error(call))
                continue
            next_scan = min(next_scan, call.deadline_ms)
            if call.attempts:
                next_scan = min(next_scan, now + RESEND_MS)
                if now >= call.resend_ms and self.leader:
                    self._queue_again(call)
        self._next_scan = next_scan

    def _timeout_error(self, call: Call) -> CoordError:
        if call.kind != RequestKind.COMMAND:
            return NoQuorum(
                "no leader with a quorum answered in time; nothing was changed by asking. Look at `coordlib status`",
                leader_hint=self.leader,
            )
        if call.attempts:
            return CommitTimeout(
                "the request was sent, but no answer came in time: it may have taken effect, or may yet. "
                "Read back before repeating it",
                request_id=call.request_id,
                leader_hint=self.leader,
            )
        if self._open_error is not None:
            return self._open_error
        return NoQuorum(
            "no leader with a quorum was found in time; the request was never sent. Look at `coordlib status`",
            leader_hint=self.leader,
        )

    # -- endings -------------------------------------------------------------------------------------------

    def _set_state(self, state: SessionState) -> None:
        self.view.state = state
        self.changes.append((self.view, state))

    def _lose(self, now: int) -> None:
        """The session is gone, by the cluster's word or by our own clock."""
        if self.view.state >= SessionState.LOST:
            return
        lost = self.view
        self.counters["sessions_lost"] += 1
        self._set_state(SessionState.LOST)
        self._end_session_calls(lost)
        self._keep_alives.clear()
        self._keep_alive_due = False
        self._next_keep_alive = _NEVER
        if self._wants_session:
            self.open(now)

    def _end_session_calls(self, view: SessionView) -> None:
        for call in list(self._pending.values()):
            if call is self._opening:
                continue
            if call.kind == RequestKind.WAIT:
                self._finish(
                    call, None, SessionExpired("the session ended while waiting; it holds nothing any more")
                )
            elif call.kind == RequestKind.COMMAND and call.view is view and not call.attempts:
                self._finish(call, None, SessionExpired("the session that this call belongs to has ended"))
            elif call.kind == RequestKind.COMMAND and call.view is view:
                self._finish(
                    call,
                    None,
                    LeadershipLost(
                        "the session ended before the answer came: the request may have taken effect",
                        request_id=call.request_id,
                    ),
                )

    def close(self, now: int, deadline_ms: int) -> Call | None:
        """Start to close the session: its locks are free when the returned call completes. None: there is none."""
        self._wants_session = False
        if self.view.session_id == 0 or self.view.state >= SessionState.LOST:
            self._is_closing = True
            if self._opening is not None:
                self._forget(self._opening)  # one that was sent and is opened yet ends by its TTL
                self._opening = None
            return None
        call = Call(RequestKind.COMMAND, commands.close_session(), deadline_ms, view=self.view)
        self.submit(call, now, is_essential=True)
        self._is_closing = True
        # From here on its locks may be granted to others: no holder may believe in them any more.
        self._set_state(SessionState.CLOSED)
        self._next_keep_alive = _NEVER
        self._keep_alive_due = False
        return call

    def closed(self) -> None:
        """The session was closed, or is given up without word: nothing is sent any more."""
        if self.view.state < SessionState.LOST:
            self._set_state(SessionState.CLOSED)
        self._wants_session = False
        self._next_keep_alive = self._reopen_at = _NEVER
        self._keep_alive_due = False

    def fail_all(self, error: CoordError) -> None:
        """The node is stopping: end every call. Sent commands may have taken effect."""
        for call in list(self._pending.values()):
            if call.kind == RequestKind.COMMAND and call.attempts:
                reason: CoordError = LeadershipLost(
                    f"the node stopped before the answer came ({error}): the request may have taken effect",
                    request_id=call.request_id,
                )
            else:
                reason = error
            self._finish(call, None, reason)
        self._queue.clear()
        if self.view.state < SessionState.LOST:
            self._set_state(SessionState.LOST)
        self._next_keep_alive = self._reopen_at = self._next_scan = _NEVER
