"""A client, sans-I/O: a session without a vote or a disk, that follows the leader from member to member."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from coordlib import cbor
from coordlib.config import Timing
from coordlib.errors import ClusterClosed, CoordError
from coordlib.node.calls import Calls
from coordlib.node.effects import Effects, LogEvent
from coordlib.node.service import Source
from coordlib.node.session import Call, SessionClient
from coordlib.wire.messages import (
    LeaderInfo,
    Refusal,
    Replies,
    RequestKind,
    Requests,
    ServiceCall,
    ServiceReply,
    StatusQuery,
    StatusReply,
)

__all__ = ["ClientKernel"]

HOPELESS_MS: Final = 1000
"""A closing client waits this long for members without a leader: its session ends by itself anyway."""

_NEVER: Final = 1 << 62


class ClientKernel:
    """The same inputs and effects as a member's kernel, as far as a client has them."""

    def __init__(
        self,
        *,
        name: str,
        timing: Timing,
        random_bytes: Callable[[int], bytes],
        now: int,
        wants_session: bool = True,
    ) -> None:
        self.node_id = name
        self.session = SessionClient(timing, name, random_bytes)
        self.calls = Calls(self, lambda: self._out, random_bytes, is_member=False)
        self._wants_session = wants_session
        self._out = Effects()
        self._events: list[LogEvent] = []
        self._up: dict[str, None] = {}
        self._leader = ""
        self._term = 0
        self.wanted_endpoints: dict[str, str] = {}  # as told by members: the driver connects to all of them
        self._status_calls: dict[int, Callable[[str, dict[str, Any]], None]] = {}
        self._status_id = 0
        self._is_leaderless = False  # as the members say
        self._is_closing = False
        self._closing_since = now
        self._close_call: Call | None = None
        self._close_deadline = _NEVER
        self._now = now
        self.counters: dict[str, int] = {"leader_changes": 0}
        self.cluster_uuid = b""  # as the members say

    @property
    def leader(self) -> str:
        return self._leader

    @property
    def has_usable_leader(self) -> bool:
        """Whether it is of use: with a session, or, where none is wanted, with anyone to ask."""
        if not self._wants_session:
            return bool(self._up)
        return self.session.view.session_id != 0

    def open_session(self, now: int) -> None:
        if self._wants_session:
            self.session.open(now)

    def peer_up(self, name: str, incarnation: int, now: int) -> None:
        self._up[name] = None
        if name == self._leader or not self._leader:
            # Nobody known to lead: any member can tell who does.
            self._follow(self._leader or name, now)
        self.calls.link_up(name)

    def peer_down(self, name: str) -> None:
        self._up.pop(name, None)
        self.calls.source_gone(name)
        if name == self.session.leader:
            self.session.leader_changed(next(iter(self._up), ""), self._now)

    def peer_incarnation(self, name: str, incarnation: int) -> None:
        """A member restarted; what it told is repeated by the new one."""

    def _follow(self, name: str, now: int) -> None:
        target = name if name in self._up else next(iter(self._up), "")
        self.session.leader_changed(target, now)

    def peer_messages(self, name: str, messages: Sequence[tuple[int, Any]], now: int) -> None:
        self._now = now
        for _, message in messages:
            if isinstance(message, Replies):
                hint = self.session.receive(message.replies, now)
                self._is_leaderless = hint == ""
                if hint and hint != self.session.leader and hint in self._up:
                    self._follow(hint, now)
            elif isinstance(message, LeaderInfo):
                self.wanted_endpoints = dict(message.endpoints)
                self.cluster_uuid = message.cluster_uuid or self.cluster_uuid
                if message.term >= self._term and message.leader:
                    if (message.term, message.leader) != (self._term, self._leader):
                        self.counters["leader_changes"] += 1
                        self._say(
                            logging.INFO,
                            "leader.changed",
                            f"{message.leader!r} leads term {message.term}",
                            term=message.term,
                        )
                    self._term, self._leader = message.term, message.leader
                    if self.session.leader != message.leader:
                        self._follow(message.leader, now)
            elif isinstance(message, StatusReply):
                answer = self._status_calls.pop(message.request_id, None)
                if answer is not None:
                    try:
                        answer(name, cbor.decode(message.body))
                    except cbor.CBORError as error:
                        self._say(
                            logging.WARNING,
                            "status.unreadable",
                            f"the status of {name!r} cannot be read: {error}",
                        )
            elif isinstance(message, ServiceCall | ServiceReply):
                self.calls.receive(name, message, now)
            elif isinstance(message, Refusal):
                self._say(
                    logging.ERROR, "refused", f"member {name!r} refused us: {message.message}", peer=name
                )

    def ask_status(self, name: str, answer: Callable[[str, dict[str, Any]], None]) -> None:
        """Ask one connected member how it is; `answer` is called in the node thread."""
        self._status_id += 1
        self._status_calls[self._status_id] = answer
        self._send(name, StatusQuery(self._status_id))

    @property
    def connected(self) -> list[str]:
        return sorted(self._up)

    def submit(self, call: Call, now: int) -> None:
        if self._is_closing and not call.is_detached:
            call.error = ClusterClosed("the client is closing; nothing was sent")
            self._out.completed.append(call)
            return
        if call.kind == RequestKind.CALL:
            self.calls.submit(call, now)
            return
        self.session.submit(call, now)

    # -- for calls between applications --------------------------------------------------------------------

    def can_reach(self, source: Source) -> bool:
        return source in self._up

    def reachable_members(self) -> list[str]:
        leader = self._leader
        return sorted(self._up, key=lambda name: (name != leader, name))

    # -- leaving -------------------------------------------------------------------------------------------

    def begin_close(self, now: int, deadline_ms: int) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._closing_since = now
            self._close_deadline = deadline_ms
            self._close_call = self.session.close(now, deadline_ms)

    def has_left(self, now: int) -> bool:
        if not self._is_closing:
            return False
        call = self._close_call
        is_answered = call is None or call.reply is not None or call.error is not None
        is_hopeless = (self._is_leaderless or not self._up) and now >= self._closing_since + HOPELESS_MS
        if is_answered or is_hopeless or now >= self._close_deadline:
            self.session.closed()
            return True
        return False

    def fail(self, error: CoordError) -> Effects | None:
        self.session.fail_all(error)
        self.calls.fail_all(error)
        self._up.clear()
        self._out.calls = None
        return self.collect(self._now)

    @property
    def deadline(self) -> int:
        return min(self.session.deadline, self._close_deadline, self.calls.next_ms)

    def tick(self, now: int, wall_ms: int, late_ms: int = 0) -> None:
        self._now = now
        self.session.tick(now)
        if now >= self.calls.next_ms:
            self.calls.tick(now)

    def collect(self, now: int) -> Effects | None:
        self._now = now
        session = self.session
        if session.has_outgoing and session.leader in self._up:
            requests = session.flush(now)
            if requests:
                self._send(session.leader, Requests(tuple(requests)))
        out = self._out
        if session.completed:
            out.completed.extend(session.completed)
            session.completed.clear()
        if session.changes:
            self.calls.session_changed(session.id, now)
            out.changes.extend(session.changes)
            session.changes.clear()
        if self._events:
            out.events.extend(self._events)
            self._events.clear()
        if not (out.sends or out.completed or out.events or out.changes or out.calls):
            return None
        self._out = Effects()
        return out

    def status(self, now: int) -> dict[str, Any]:
        return {
            "node": self.node_id,
            "is_client": True,
            "cluster_uuid": self.cluster_uuid.hex(),
            "leader": self._leader,
            "term": self._term,
            "connected": self.connected,
            "session": self.session.view.session_id,
            "calls_pending": self.session.pending_count,
            "application_calls": {**self.calls.sizes, **self.calls.counters},
            "counters": dict(self.counters),
            "session_counters": dict(self.session.counters),
        }

    def _send(self, name: str, message: Any) -> None:
        self._out.sends.setdefault(name, []).append((0, message))

    def _say(self, level: int, name: str, message: str, **fields: Any) -> None:
        self._events.append(LogEvent(level, name, message, fields))
