"""Calls from one application to another, over the connections that are there anyway. Sans-I/O.

Every member and every client has one `Calls`: for the calls of its own application, for those that reach it,
and, in a member, for those that it passes on. An application is named by its session. Whoever takes calls says
so to every member that it is connected to (Serving), and they know the way then::

    calling application ────────────────────────▶ the called one      a member to another member or to its client
    calling application ───▶ a member ──────────▶ the called one      a client's call, or one to a client that only
                        ◀───          ◀──────────                     another member is connected to

A client asks the leader first, then the other members; a member whom nobody has told the way asks the others. Only
what was certainly not delivered is tried on another way; nothing is ever sent again that may have been.

What is *not* here: what is in a body, what the called application does, sending again (the caller's affair, who
knows whether that does harm), connections.

Invariant: an application gets a call at most once, and only for the session that it has at that moment.
Invariant: "unreachable" is said only of a call that no application got or will get. A connection that is lost
says nothing: what was sent on it may arrive.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, Protocol, TypeAlias

from coordlib.errors import (
    CallLost,
    CallTimeout,
    CoordError,
    Overloaded,
    QuotaExceeded,
    RemoteProtocolError,
    ServiceUnreachable,
    UsageError,
)
from coordlib.machine import commands
from coordlib.node.effects import Effects, InboundCall
from coordlib.node.service import Source
from coordlib.node.session import BODY_SIZE_BYTES_MAX, Call
from coordlib.wire.messages import CallStatus, ServiceCall, ServiceReply, Serving

__all__ = ["CallHandler", "CallNode", "Calls", "check_answer"]

PENDING_MAX: Final = 8192
"""Calls of one process that may wait for their answers at once; more are refused with Overloaded."""

FORWARDS_MAX: Final = 8192
"""Calls that a member may have passed on at once; more are refused with Overloaded."""

INBOUND_MAX: Final = 8192
"""Calls that an application may have before it at once; more are refused with Overloaded."""

BUDGET_MS_MAX: Final = 3_600_000
"""No call waits for longer, whatever its deadline: what is kept of one ends some time."""

SERVING_EVERY_MS: Final = 5000
"""How often a member is told the way anew: one such word may have been lost, or come before we were trusted."""

_STALE_MAX: Final = 64
_GROUP: Final = 0
_NEVER: Final = 1 << 62


CallHandler: TypeAlias = Callable[[InboundCall], None]


class CallNode(Protocol):
    """What of a kernel is needed here."""

    def can_reach(self, source: Source) -> bool:
        """There is a connection to it, and whoever is there belongs to this cluster."""

    def reachable_members(self) -> Iterable[str]:
        """In the order in which they are to be asked for a way."""


class _Pending:
    """A call of this process's own application."""

    __slots__ = ("call", "deadline_ms", "via", "ways_tried")

    def __init__(self, call: Call, deadline_ms: int) -> None:
        self.call = call
        self.deadline_ms = deadline_ms
        self.via: Source = ""
        self.ways_tried: list[Source] = []


class _Forward(NamedTuple):
    """A call that was passed on."""

    asker: Source
    asked_id: int  # under which the asker knows it
    via: Source


def check_answer(status: int, body: bytes) -> None:
    """
    Raises:
        UsageError: This cannot be an answer; nothing was sent, and the call waits for another one.
    """
    if status not in tuple(CallStatus):
        raise UsageError(f"an answer has one of the statuses {[s.name for s in CallStatus]}; got {status}")
    if len(body) > BODY_SIZE_BYTES_MAX:
        raise UsageError(f"the answer has {len(body)} bytes; at most {BODY_SIZE_BYTES_MAX} can be sent")


class Calls:
    """
    See the module's docstring. Not thread-safe: owned by the node thread.

    Nothing here costs anything while there are no calls: no round asks it for output, and `next_ms` is only compared.
    """

    def __init__(
        self,
        node: CallNode,
        effects: Callable[[], Effects],
        random_bytes: Callable[[int], bytes],
        *,
        is_member: bool,
    ) -> None:
        self._node = node
        self._effects = effects  # those that the node carries out next
        self._random_bytes = random_bytes
        self._is_member = is_member
        self.session = 0  # of this process's application, while it lives
        self.is_serving = False
        self.next_ms = _NEVER  # when `tick` has something to do at the latest
        self._next_serving = _NEVER
        self._last_id = 0  # 0: none given yet
        # What waits for something has a number from one and the same sequence.
        self._pending: dict[int, _Pending] = {}
        self._forwards: dict[int, _Forward] = {}
        self._inbound: dict[int, InboundCall] = {}
        self._deadlines: list[tuple[int, int]] = []  # a heap; holds some that have ended before their time
        self._way_to: dict[int, Source] = {}  # session -> where it takes calls
        self._session_at: dict[Source, int] = {}  # the reverse
        self._newest_from: dict[Source, int] = {}  # the last call_id from there: none comes twice
        self.counters = {
            "calls": 0,
            "calls_forwarded": 0,
            "calls_delivered": 0,
            "calls_unreachable": 0,
            "calls_lost": 0,
            "calls_timed_out": 0,
            "calls_overloaded": 0,
            "calls_repeated": 0,
            "answers_late": 0,
            "replies_unknown": 0,
        }

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "pending": len(self._pending),
            "forwards": len(self._forwards),
            "inbound": len(self._inbound),
            "ways": len(self._way_to),
        }

    # -- of this process's application ---------------------------------------------------------------------

    def submit(self, call: Call, now: int) -> None:
        """Take a call with a target; it ends in the effects, at its deadline at the latest."""
        self.counters["calls"] += 1
        if len(call.body) > BODY_SIZE_BYTES_MAX:
            limit = "call_size_bytes_max"
            message = (
                f"the call has {len(call.body)} bytes, {limit} is {BODY_SIZE_BYTES_MAX}; nothing was sent"
            )
            self._end(call, None, QuotaExceeded(message, limit=limit))
        elif len(self._pending) >= PENDING_MAX:
            message = (
                f"{PENDING_MAX} calls of this process wait for their answers already; back off and retry"
            )
            self._end(call, None, Overloaded(message))
        elif now >= call.deadline_ms:
            self._unreachable(call, "its time was over before it could be sent")
        else:
            deadline_ms = min(call.deadline_ms, now + BUDGET_MS_MAX)
            self._try_ways(_Pending(call, deadline_ms), now)

    def _try_ways(self, pending: _Pending, now: int) -> None:
        """Send it on the first way that has not been tried yet."""
        call = pending.call
        target = call.target
        tried = pending.ways_tried
        if target and target == self.session and self.is_serving and not tried:
            id = self._begin(pending, "")
            self._deliver("", id, self.session, pending.deadline_ms - now, call.body, now)
            return
        known = self._way_to.get(target)
        ways = [known] if known is not None else []
        for way in (*ways, *self._node.reachable_members()):
            if way not in tried and self._node.can_reach(way):
                id = self._begin(pending, way)
                budget_ms = max(1, pending.deadline_ms - now)
                self._send(way, ServiceCall(id, target, self.session, budget_ms, call.body))
                return
        self._unreachable(
            call,
            "no member knows a way to it: its process has ended, or has a new session by now"
            if tried
            else "no way is known here, and no other member is connected that could be asked",
        )

    def _begin(self, pending: _Pending, way: Source) -> int:
        # A number of its own for each way: whoever gets it has seen no larger one from here.
        id = self._number(pending.deadline_ms)
        pending.via = way
        pending.ways_tried.append(way)
        pending.call.attempts += 1
        if pending.call.request_id == 0:
            pending.call.request_id = id
        self._pending[id] = pending
        return id

    def serve(self, is_serving: bool, now: int) -> None:
        """Take calls from now on, or none any more. Those that are here already are still to be answered."""
        if is_serving != self.is_serving:
            self.is_serving = is_serving
            self._tell_all(self.session if is_serving else 0)
            self._plan_serving(now)

    def session_changed(self, session: int, now: int) -> None:
        """The application's session is another one; 0: it has none."""
        if session != self.session:
            self.session = session
            if self.is_serving:
                self._tell_all(session)
                self._plan_serving(now)

    def answer(self, number: int, status: int, body: bytes, now: int) -> None:
        """Answer an inbound call. Dropped if nobody waits any more."""
        inbound = self._inbound.pop(number, None)
        if inbound is None:
            self.counters["answers_late"] += 1
            return
        reply = ServiceReply(inbound.call_id, status, body)
        if inbound.source == "":
            self._replied("", reply, now)
        else:
            self._send(inbound.source, reply)

    # -- from others ---------------------------------------------------------------------------------------

    def receive(self, source: Source, message: Serving | ServiceCall | ServiceReply, now: int) -> None:
        """Take a message of a member or a client that belongs to this cluster."""
        if type(message) is ServiceCall:
            self._called(source, message, now)
        elif type(message) is ServiceReply:
            self._replied(source, message, now)
        else:
            assert type(message) is Serving
            self._learn_way(source, message.session)

    def _learn_way(self, source: Source, session: int) -> None:
        before = self._session_at.get(source, 0)
        if before == session:
            return
        if before:
            del self._way_to[before], self._session_at[source]
        if not session:
            return
        other = self._way_to.get(session)
        if other is not None:
            # It came again over another connection; what went over the old one got no further.
            self._lose_way(other)
            del self._session_at[other]
        self._way_to[session] = source
        self._session_at[source] = session

    def _called(self, source: Source, message: ServiceCall, now: int) -> None:
        call_id, target, caller, budget_ms, body = message
        if call_id <= self._newest_from.get(source, 0):
            self.counters["calls_repeated"] += 1
            return
        self._newest_from[source] = call_id
        budget_ms = min(budget_ms, BUDGET_MS_MAX)
        if target and target == self.session and self.is_serving:
            self._deliver(source, call_id, caller, budget_ms, body, now)
            return
        way = self._way_to.get(target) if self._is_member else None
        # A member passes on what comes from a client, and to its clients: no call goes through two members.
        is_second_hop = isinstance(source, str) and isinstance(way, str)
        if way is None or way == source or is_second_hop or not self._node.can_reach(way):
            self._send(source, ServiceReply(call_id, CallStatus.UNREACHABLE, b""))
        elif len(self._forwards) >= FORWARDS_MAX:
            self._refuse(
                source, call_id, f"{FORWARDS_MAX} calls are being passed on by this member already", now
            )
        else:
            id = self._number(now + budget_ms)
            self._forwards[id] = _Forward(source, call_id, way)
            self.counters["calls_forwarded"] += 1
            self._send(way, ServiceCall(id, target, caller, budget_ms, body))

    def _deliver(
        self, source: Source, call_id: int, caller: int, budget_ms: int, body: bytes, now: int
    ) -> None:
        if len(self._inbound) >= INBOUND_MAX:
            self._refuse(
                source, call_id, f"{INBOUND_MAX} calls are before the called application already", now
            )
            return
        deadline_ms = now + budget_ms
        number = self._number(deadline_ms)
        inbound = InboundCall(number, source, call_id, caller, budget_ms, deadline_ms, body)
        self._inbound[number] = inbound
        self.counters["calls_delivered"] += 1
        effects = self._effects()
        if effects.calls is None:
            effects.calls = []
        effects.calls.append(inbound)

    def _refuse(self, source: Source, call_id: int, why: str, now: int) -> None:
        self.counters["calls_overloaded"] += 1
        error = Overloaded(f"{why}; back off and retry")
        reply = ServiceReply(call_id, CallStatus.ERROR, commands.encode_error(error))
        if source == "":
            self._replied("", reply, now)
        else:
            self._send(source, reply)

    def _replied(self, source: Source, message: ServiceReply, now: int) -> None:
        id, status, body = message
        forward = self._forwards.get(id)
        if forward is not None and forward.via == source:
            del self._forwards[id]
            self._send(forward.asker, ServiceReply(forward.asked_id, status, body))
            return
        pending = self._pending.get(id)
        if pending is None or pending.via != source:
            # It came too late, or is not for this run of this process.
            self.counters["replies_unknown"] += 1
            return
        del self._pending[id]
        call = pending.call
        if status == CallStatus.OK:
            self._end(call, body, None)
        elif status == CallStatus.ERROR:
            self._end(call, None, commands.error_reply(body) or RemoteProtocolError("a refusal that is none"))
        elif status == CallStatus.UNREACHABLE:
            self._try_ways(pending, now)
        else:
            self._lost(call)

    def not_sent(self, source: Source, call_id: int, now: int) -> None:
        """A ServiceCall to a source never left this process."""
        self._replied(source, ServiceReply(call_id, CallStatus.UNREACHABLE, b""), now)

    # -- connections ---------------------------------------------------------------------------------------

    def link_up(self, name: str) -> None:
        """A member can be sent to (again), and believes us."""
        if self.is_serving and self.session:
            self._send(name, Serving(self.session))

    def link_down(self, source: Source) -> None:
        """What was sent there may have been lost. Where it takes calls it will have to say again, or not at all."""
        self._lose_way(source)

    def source_gone(self, source: Source) -> None:
        """Its connection is gone for good, or its process is another one: nothing that it asked or said counts."""
        self._lose_way(source)
        session = self._session_at.pop(source, 0)
        if session:
            del self._way_to[session]
        self._newest_from.pop(source, None)
        for number in [number for number, inbound in self._inbound.items() if inbound.source == source]:
            del self._inbound[number]
        for id in [id for id, forward in self._forwards.items() if forward.asker == source]:
            del self._forwards[id]

    def _lose_way(self, source: Source) -> None:
        for id in [id for id, forward in self._forwards.items() if forward.via == source]:
            forward = self._forwards.pop(id)
            if self._node.can_reach(forward.asker):
                self._send(forward.asker, ServiceReply(forward.asked_id, CallStatus.UNKNOWN, b""))
        for id in [id for id, pending in self._pending.items() if pending.via == source]:
            self._lost(self._pending.pop(id).call)

    # -- time ----------------------------------------------------------------------------------------------

    def tick(self, now: int) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            _, id = heapq.heappop(deadlines)
            pending = self._pending.pop(id, None)
            if pending is not None:
                self._timed_out(pending.call)
                continue
            self._forwards.pop(id, None)  # its asker has given up by itself
            self._inbound.pop(id, None)
        if now >= self._next_serving:
            self._tell_all(self.session)
            self._plan_serving(now)
        self.next_ms = min(self._next_serving, deadlines[0][0] if deadlines else _NEVER)

    def _number(self, deadline_ms: int) -> int:
        """The next number, for what is forgotten after the deadline."""
        if not self._last_id:
            # Begins anywhere: an answer that was meant for an earlier run must not look like one for this.
            self._last_id = int.from_bytes(self._random_bytes(4), "big")
        self._last_id += 1
        deadlines = self._deadlines
        live = len(self._pending) + len(self._forwards) + len(self._inbound)
        if len(deadlines) > 2 * live + _STALE_MAX:
            kept = self._pending.keys() | self._forwards.keys() | self._inbound.keys()
            deadlines[:] = [entry for entry in deadlines if entry[1] in kept]
            heapq.heapify(deadlines)
        heapq.heappush(deadlines, (deadline_ms, self._last_id))
        if deadline_ms < self.next_ms:
            self.next_ms = deadline_ms
        return self._last_id

    def _plan_serving(self, now: int) -> None:
        self._next_serving = now + SERVING_EVERY_MS if self.is_serving and self.session else _NEVER
        self.next_ms = min(self.next_ms, self._next_serving)

    def _tell_all(self, session: int) -> None:
        for name in self._node.reachable_members():
            self._send(name, Serving(session))

    # -- endings -------------------------------------------------------------------------------------------

    def fail_all(self, error: CoordError) -> None:
        """The node is stopping: end every call. All of them were sent."""
        pending = list(self._pending.values())
        for table in (self._pending, self._forwards, self._inbound):
            table.clear()
        for one in pending:
            self._lost(one.call, f"the node stopped before the answer came ({error})")
        self._deadlines.clear()
        self.is_serving = False
        self._next_serving = self.next_ms = _NEVER

    def _unreachable(self, call: Call, why: str) -> None:
        self.counters["calls_unreachable"] += 1
        message = (
            f"the application with session {call.target} cannot be reached: {why}. The call was not delivered"
        )
        self._end(call, None, ServiceUnreachable(message, target=call.target))

    def _lost(
        self, call: Call, why: str = "the way to the called application broke before its answer came"
    ) -> None:
        self.counters["calls_lost"] += 1
        message = f"{why}: it may have acted on the call"
        self._end(call, None, CallLost(message, request_id=call.request_id, target=call.target))

    def _timed_out(self, call: Call) -> None:
        self.counters["calls_timed_out"] += 1
        message = "no answer from the called application in time: it may have acted on the call, or may yet"
        self._end(call, None, CallTimeout(message, request_id=call.request_id, target=call.target))

    def _end(self, call: Call, reply: bytes | None, error: CoordError | None) -> None:
        call.reply, call.error = reply, error
        if not call.is_detached or call.is_heard:
            self._effects().completed.append(call)

    def _send(self, source: Source, message: Serving | ServiceCall | ServiceReply) -> None:
        effects = self._effects()
        if isinstance(source, bytes):
            effects.client_sends.setdefault(source, []).append((_GROUP, message))
        else:
            effects.sends.setdefault(source, []).append((_GROUP, message))
