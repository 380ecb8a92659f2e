"""Linearizable reads without log entries: who waits for which confirmation round, and the leader's lease.

A *round* is a number that rises with every broadcast of probes. Members echo the newest they have seen, so
an echo of round r, in this term, says: at some time after round r began I still followed this leader. A
read may be answered by a round that began after it was asked, and by no other (etcd #20418: retrying under
the same number lets an old confirmation answer a new read).

What must not live here: quorums, messages. The caller says which round a quorum has echoed.

Source: Thesis §6.4 (ReadIndex), §6.4.1 (leases).
"""

from __future__ import annotations

from collections import deque

__all__ = ["Lease", "ReadQueue"]


class ReadQueue:
    """Reads on their way from asked to confirmed or failed. Contexts are opaque."""

    __slots__ = ("confirmed", "failed", "pending_count", "rounds", "waiting", "waiting_for_quorum")

    def __init__(self) -> None:
        self.waiting: list[object] = []  # asked, no round yet
        self.waiting_for_quorum: list[object] = []  # the same, and a lease will not do
        self.rounds: deque[tuple[int, int, list[object]]] = (
            deque()
        )  # (round, read index, contexts), ascending
        self.confirmed: list[tuple[object, int]] = []
        self.failed: list[object] = []
        self.pending_count = 0

    @property
    def is_asked(self) -> bool:
        """Whether anything waits for a round to begin."""
        return bool(self.waiting or self.waiting_for_quorum)

    def ask(self, context: object, *, by_quorum: bool) -> None:
        (self.waiting_for_quorum if by_quorum else self.waiting).append(context)
        self.pending_count += 1

    def begin(self, round_number: int, index: int) -> None:
        """All that wait now are answered by this round, with the commit index of its beginning."""
        self.rounds.append((round_number, index, self.waiting + self.waiting_for_quorum))
        self.waiting = []
        self.waiting_for_quorum = []

    def confirm(self, round_number: int) -> None:
        """A quorum has echoed `round_number`: it and all older rounds are confirmed."""
        rounds = self.rounds
        while rounds and rounds[0][0] <= round_number:
            _, index, contexts = rounds.popleft()
            self.confirmed.extend([(context, index) for context in contexts])
            self.pending_count -= len(contexts)

    def confirm_waiting(self, index: int) -> None:
        """All that a lease will do for are confirmed at once: one holds now."""
        self.confirmed.extend([(context, index) for context in self.waiting])
        self.pending_count -= len(self.waiting)
        self.waiting = []

    def fail_all(self) -> None:
        """Leadership is lost: nothing that is not confirmed will be. What is confirmed stays so."""
        for _, _, contexts in self.rounds:
            self.failed.extend(contexts)
        self.rounds.clear()
        self.failed.extend(self.waiting)
        self.failed.extend(self.waiting_for_quorum)
        self.waiting = []
        self.waiting_for_quorum = []
        self.pending_count = 0


class Lease:
    """
    Until when a quorum has promised this leader not to vote for another.

    Counted from the *beginning* of a round, on the leader's clock; the members count from when they heard
    of it, which is later. Void for the rest of the term once a transfer told another node to campaign:
    that message may still arrive, and campaigns by transfer do not wait for the leader's silence.
    """

    __slots__ = ("_begun", "is_void", "ticks")

    ROUNDS_MAX = 4096  # kept without an echo; forgetting the oldest only shortens the lease

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks
        self.is_void = False
        self._begun: deque[tuple[int, int]] = deque(maxlen=self.ROUNDS_MAX)  # (round, tick of its beginning)

    def reset(self) -> None:
        self.is_void = False
        self._begun.clear()

    def begin(self, round_number: int, now: int) -> None:
        self._begun.append((round_number, now))

    def is_valid(self, round_echoed: int, now: int) -> bool:
        """Whether the promise made with the newest round that a quorum echoed still holds at `now`."""
        begun = self._begun
        while len(begun) > 1 and begun[1][0] <= round_echoed:
            begun.popleft()
        if self.is_void or not begun or begun[0][0] > round_echoed:
            return False
        return now < begun[0][1] + self.ticks
