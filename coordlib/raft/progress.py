"""What a leader knows of one member's log, and how it sends to it. No messages are built here.

::

                   rejected, unreachable, window lost
        +--------------------------------------------------+
        v                                                  |
      PROBE -- success --------------------------------> REPLICATE
        |  ^                                               ^
        |  | transfer failed, or ended                     | success at or above the log's start
        v  |                                               |
      SNAPSHOT --------------------------------------------+

PROBE: one message, then wait for its answer or for a heartbeat's. REPLICATE: optimistic, up to a window
of unanswered messages and bytes. SNAPSHOT: the log no longer has what the follower needs; wait.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import NamedTuple

from coordlib.errors import invariant

__all__ = ["Inflight", "Progress", "ProgressState", "ProgressView"]


class ProgressState(IntEnum):
    PROBE = 0
    REPLICATE = 1
    SNAPSHOT = 2


class Inflight(NamedTuple):
    last_index: int
    size_bytes: int
    round: int
    sent_at: int


class ProgressView(NamedTuple):
    """For status and tests: what the leader knows of a member."""

    match: int
    next: int
    state: ProgressState
    is_recent: bool  # it answered within election_ticks_max


class Progress:
    """One member as the leader sees it. `match` is what it is known to hold durably and to share."""

    __slots__ = (
        "commit_sent",
        "heard_at",
        "inflight",
        "inflight_bytes",
        "is_heard",
        "is_heartbeat_due",
        "is_paused",
        "is_voter",
        "match",
        "next",
        "node_id",
        "pending_snapshot",
        "round_acked",
        "sent_at",
        "state",
    )

    def __init__(self, node_id: str, next_index: int, now: int, is_voter: bool) -> None:
        self.node_id = node_id
        self.match = 0
        self.next = next_index  # Invariant: next > match
        self.state = ProgressState.PROBE
        self.is_paused = False  # PROBE only: one message is on its way
        self.inflight: deque[Inflight] = deque()  # REPLICATE only: oldest first
        self.inflight_bytes = 0
        self.pending_snapshot = 0  # SNAPSHOT only: index of what is being transferred
        self.round_acked = 0
        self.heard_at = now
        self.is_heard = False  # since the last tick
        self.sent_at = now
        self.commit_sent = 0
        self.is_heartbeat_due = False
        self.is_voter = is_voter

    def become_probe(self) -> None:
        """Go back to one message at a time, from what is known to match."""
        if self.state is ProgressState.SNAPSHOT:
            self.next = max(self.match, self.pending_snapshot) + 1
        else:
            self.next = self.match + 1
        self.state = ProgressState.PROBE
        self.is_paused = False
        self.pending_snapshot = 0
        self.inflight.clear()
        self.inflight_bytes = 0

    def become_replicate(self) -> None:
        self.state = ProgressState.REPLICATE
        self.next = self.match + 1
        self.is_paused = False
        self.pending_snapshot = 0
        self.inflight.clear()
        self.inflight_bytes = 0

    def become_snapshot(self, index: int) -> None:
        self.state = ProgressState.SNAPSHOT
        self.pending_snapshot = index
        self.is_paused = False
        self.inflight.clear()
        self.inflight_bytes = 0

    def free_to(self, index: int) -> None:
        """Messages that end at or before `index` are answered."""
        inflight = self.inflight
        while inflight and inflight[0][0] <= index:
            self.inflight_bytes -= inflight.popleft()[1]

    def check_invariants(self, last_index: int) -> None:
        invariant(self.next > self.match, "%s: next %d, match %d", self.node_id, self.next, self.match)
        invariant(self.match <= last_index, "%s matches past the leader's log", self.node_id)
        invariant(not self.inflight or self.state is ProgressState.REPLICATE, "window outside of REPLICATE")
        total = sum(item.size_bytes for item in self.inflight)
        invariant(self.inflight_bytes == total, "%s: window counts %d", self.node_id, self.inflight_bytes)
        invariant(
            all(
                a.last_index < b.last_index
                for a, b in zip(self.inflight, list(self.inflight)[1:], strict=False)
            ),
            "%s: window out of order",
            self.node_id,
        )
