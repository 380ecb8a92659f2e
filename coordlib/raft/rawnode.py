"""The core's surface: one Raft member as a value that takes inputs and gives Readies.

What must not live here: decisions about terms, logs or votes (see `Elections`, `Replication`). What does:
the order in which decisions, durability and messages leave. See the package's docstring for the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from coordlib.errors import NotLeader, Overloaded, UsageError, invariant
from coordlib.raft.config import RaftConfig
from coordlib.raft.elections import Elections
from coordlib.raft.log import ENTRY_OVERHEAD_BYTES, ConfigurationDecoder
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftMessage,
    RequestVote,
    SnapshotMeta,
    SnapshotStatus,
    TimeoutNow,
    VoteReply,
)
from coordlib.raft.progress import ProgressState, ProgressView
from coordlib.raft.state import Role

__all__ = ["RawNode", "Ready"]

_LEADER = Role.LEADER
_COMMAND = int(EntryKind.COMMAND)
_CONFIGURATION = int(EntryKind.CONFIGURATION)

COMPACTION_HOLD_FACTOR = 8
"""While a snapshot is being sent, up to this many times `retain` entries are kept, so that its receiver can
go on from it (openraft #1706: else it may never catch up). Bounded, because a receiver may be very slow."""


class Ready:
    """
    What the caller is to do now. Hand it to `persisted` when it is durable, in order.

    `messages` may leave at once, before the disk: they are a leader's, whose term and vote are durable.
    """

    __slots__ = (
        "_epoch",
        "_late",
        "_made_at",
        "committed",
        "entries",
        "failed_reads",
        "hard_state",
        "is_leadership_changed",
        "leader",
        "messages",
        "reads",
        "role",
        "snapshot",
        "snapshots_wanted",
        "term",
    )

    def __init__(self, term: int, leader: str, role: Role) -> None:
        self.messages: list[tuple[str, RaftMessage]] = []
        self.hard_state: HardState | None = None
        self.entries: Sequence[Entry] = ()
        self.snapshot: SnapshotMeta | None = None
        self.committed: Sequence[Entry] = ()
        self.reads: Sequence[tuple[object, int]] = ()
        self.failed_reads: Sequence[object] = ()
        self.snapshots_wanted: Sequence[str] = ()
        self.is_leadership_changed = False  # term, leader or role differ from the last Ready's
        self.term = term
        self.leader = leader
        self.role = role
        self._late: list[tuple[str, RaftMessage]] = []
        self._epoch = 0
        self._made_at = 0

    @property
    def must_persist(self) -> bool:
        """Whether there is anything for the disk; if not, `persisted` may be called at once."""
        return bool(self.entries) or self.hard_state is not None or self.snapshot is not None


class RawNode(Elections):
    """
    One member of one group. Single-threaded; does no I/O and reads no clock.

    Args:
        config: Settings; validated.
        hard_state: As recovered; `HardState(0, "")` at first.
        snapshot: The newest durable one, to which the machine is already restored; index 0 and term 0 with
            the initial configuration for a group that never had one.
        entries: As recovered, all durable, see `RaftLog`.
        random_ticks: `random_ticks(low, high)`, both inclusive.
        now: The present tick. Votes are granted from `election_ticks_min` later on, see `elections`.
        decode_configuration: Reads the data of CONFIGURATION entries; without it they are refused.

    Raises:
        InvariantViolation: What was recovered is not a log with its term; the node must not run.
    """

    __slots__ = ("_outstanding", "_told")

    def __init__(
        self,
        config: RaftConfig,
        *,
        hard_state: HardState,
        snapshot: SnapshotMeta,
        entries: Sequence[Entry] = (),
        random_ticks: Callable[[int, int], int],
        now: int,
        decode_configuration: ConfigurationDecoder | None = None,
    ) -> None:
        super().__init__(
            config,
            hard_state=hard_state,
            snapshot=snapshot,
            entries=entries,
            random_ticks=random_ticks,
            now=now,
            decode_configuration=decode_configuration,
        )
        self._outstanding: deque[Ready] = deque()
        self._told: tuple[int, str, Role] = (self.term, "", Role.FOLLOWER)

    # -- input

    def step(self, sender: str, message: RaftMessage) -> None:
        """
        Take a message that an authenticated `sender` sent to this node in this group.

        Nothing that a peer sends makes this raise: what makes no sense is dropped and counted in
        `counters`. Call `tick` after all that has arrived was stepped, then `ready`.
        """
        handler = _HANDLERS.get(type(message))
        if handler is None or not sender or sender == self.node_id or message.term < 0:
            self._count("malformed")
            return
        handler(self, sender, message)

    def propose(self, data: bytes, kind: int = _COMMAND) -> Entry:
        """
        Append an entry to the leader's log. It is sent with the next Ready, and may still be lost.

        Returns:
            The entry. It is committed exactly if `Ready.committed` brings an entry with this index *and*
            this term; another term at its index says that it never will be.

        Raises:
            NotLeader: Nothing was appended.
            Overloaded: Nothing was appended: too many bytes are uncommitted, or leadership is being
                transferred, or (CONFIGURATION) an earlier change is not committed.
        """
        if self.role is not _LEADER:
            raise NotLeader(f"{self.node_id} does not lead", leader_hint=self.leader)
        if self._transfer_target:
            raise Overloaded(f"leadership is being transferred to {self._transfer_target}")
        size = self._uncommitted_bytes + len(data) + ENTRY_OVERHEAD_BYTES
        if size > self.config.uncommitted_size_bytes_max and self._uncommitted_bytes:
            raise Overloaded("too many bytes wait to be committed", bytes=self._uncommitted_bytes)
        log = self.log
        entry = Entry(self.term, log.last_index + 1, kind, data)
        if kind == _CONFIGURATION:
            self._append_configuration(entry)
        else:
            log.append_own(entry)
        self._uncommitted_bytes = size
        self._is_send_due = True
        return entry

    def _append_configuration(self, entry: Entry) -> None:
        log = self.log
        if not log.can_decode_configuration:
            raise UsageError("this node was given nothing to decode configurations with")
        # One change at a time, and none before an entry of this term: else two may be in force whose
        # quorums do not meet (raft-dev 2015, "bug in single-server membership changes").
        if log.configuration_index > self.commit_index or self.commit_index < self._term_start:
            raise Overloaded("an earlier configuration or this term's first entry is not committed yet")
        log.append_own(entry)
        self._rebuild_progress()

    def request_read(self, context: object, *, by_quorum: bool = False) -> None:
        """
        Ask for a linearizable read; `Ready.reads` or `Ready.failed_reads` will bring `context` back.

        With leases on, it may be confirmed by one, at the next `tick`; `by_quorum` asks for a round of probes
        all the same.

        Raises:
            NotLeader, Overloaded: Nothing was asked.
        """
        if self.role is not _LEADER:
            raise NotLeader(f"{self.node_id} does not lead", leader_hint=self.leader)
        if self._reads.pending_count >= self.config.reads_pending_max:
            raise Overloaded("too many reads wait for a quorum", reads=self._reads.pending_count)
        self._reads.ask(context, by_quorum=by_quorum)

    def transfer_leadership(self, target: str | None = None) -> bool:
        """
        Hand leadership to `target`, or to the most caught-up voter (Thesis §3.10).

        Proposals are refused until it has happened or `election_ticks_min` have passed. A second call
        names another target. False, and nothing changed: not the leader, or no such voter but itself.
        """
        if self.role is not _LEADER:
            return False
        name = self._choose_transfer_target() if target is None else target
        progress = self._progress.get(name)
        if progress is None or not progress.is_voter or name == self.node_id:
            return False
        if name != self._transfer_target:
            self._transfer_target = name
            self._transfer_at = None
            if progress.match == self.log.last_index:
                self._send_timeout_now(progress)
        return True

    def compact(self, index: int, retain: int) -> None:
        """
        Note that the machine's snapshot at `index` is durable; drop the log up to `index - retain`.

        Older snapshots than the newest are ignored. Storage may forget what is below `log.start_index`.
        """
        log = self.log
        if index <= log.snapshot.index:
            return
        invariant(index <= self.commit_index, "snapshot at %d, committed %d", index, self.commit_index)
        meta = SnapshotMeta(index, log.term_at(index), log.configuration_at(index))
        start_index = index - retain
        for progress in self._peers:
            if progress.state is ProgressState.SNAPSHOT:
                start_index = min(start_index, progress.pending_snapshot)
        log.compact(meta, max(start_index, index - COMPACTION_HOLD_FACTOR * retain))

    def report_snapshot(self, follower: str, status: SnapshotStatus) -> None:
        """Note that the transfer to `follower` ended. Every transfer that was wanted must be reported."""
        progress = self._progress.get(follower)
        if progress is None or progress.state is not ProgressState.SNAPSHOT:
            return
        if not status.is_success:
            progress.pending_snapshot = 0
        progress.become_probe()
        # After a failure, the answer to a heartbeat sets off the next try.
        progress.is_paused = not status.is_success
        self._is_send_due = True

    def report_unreachable(self, follower: str) -> None:
        """Note that the connection is down: what was in flight may be lost."""
        progress = self._progress.get(follower)
        if progress is None or progress.state is ProgressState.SNAPSHOT:
            return
        if progress.state is ProgressState.REPLICATE:
            progress.become_probe()
        # One that is probed already is not searched for from the beginning: that would cost it a snapshot.
        progress.is_paused = True

    def report_reachable(self, follower: str) -> None:
        """Note that a connection was made, or that another run of it has begun: probe at once what it has."""
        progress = self._progress.get(follower)
        if progress is None or progress.state is ProgressState.SNAPSHOT:
            return
        if progress.state is ProgressState.REPLICATE:
            progress.become_probe()
        progress.is_paused = False
        self._is_send_due = True

    def report_lost(self, follower: str, last_index: int) -> None:
        """
        Note that a follower has come back with less than it had acknowledged, ending at `last_index` at most.

        What it acknowledged before counts no more, for nothing says that it is still there: entries that wait for a quorum
        wait for others, or for it to have them again. Call it after `report_reachable`. What is committed stays so.

        Differs: Raft takes it that a disk keeps what it has acknowledged, and never takes an acknowledgement back.
        Believing less of a follower is always safe.
        """
        progress = self._progress.get(follower)
        if progress is None or progress is self._own:
            return
        if progress.match:
            self._count("matches_taken_back")
            progress.match = 0
        if progress.state is ProgressState.PROBE:
            progress.next = max(1, min(progress.next, last_index + 1))
            progress.is_paused = False
            self._is_send_due = True

    def campaign(self) -> None:
        """Do not wait for the election timeout. Ignored where that would break a promise, or by a leader."""
        if self.role is _LEADER or not self._can_campaign() or self._is_leader_heard:
            return
        # A node in term 0 has never answered a leader, so it has promised nothing.
        if self.term == 0 or self.now >= self._silent_until:
            self._begin_campaign()

    def bar_until(self, term: int, index: int) -> None:
        """
        Neither vote nor campaign until the durable log has reached (term, index): peers remember this disk
        to have acknowledged that much, and it has come back with less.
        """
        bar = (term, index)
        if self._bar is None or bar > self._bar:
            self._bar = bar
            self._lift_bar()
        if self._bar is not None and self.role is not Role.FOLLOWER:
            self._become_follower(self.term, "")

    def _lift_bar(self) -> None:
        log = self.log
        if self._bar is not None and (log.term_at(log.stable_index), log.stable_index) >= self._bar:
            self._bar = None

    def applied_to(self, index: int) -> None:
        """Note how far the machine has come. Never falls."""
        if index > self.applied_index:
            invariant(index <= self.commit_index, "applied %d, committed %d", index, self.commit_index)
            self.applied_index = index

    # -- output

    def has_ready(self) -> bool:
        """Whether `ready` would bring anything."""
        log = self.log
        reads = self._reads
        return bool(
            self._is_send_due
            or self._late
            or log.handed_index < log.last_index
            or self._handed_commit < self.commit_index
            or reads.confirmed
            or reads.failed
            or self._restored is not None
            or self._snapshots_wanted
            or (reads.is_asked and self.commit_index >= self._term_start)
            or (self.term, self.vote) != self._handed
            or (self.term, self.leader, self.role) != self._told
        )

    def ready(self) -> Ready:
        """Take everything that is to be done now; what was taken is not offered again."""
        term, leader, role = self.term, self.leader, self.role
        ready = Ready(term, leader, role)
        log = self.log
        reads = self._reads
        if role is _LEADER:
            if reads.is_asked and self.commit_index >= self._term_start:
                self._begin_read_round()
            if self._is_send_due:
                self._is_send_due = False
                ready.messages = self._build_messages()
                if self._snapshots_wanted:
                    ready.snapshots_wanted = self._snapshots_wanted
                    self._snapshots_wanted = []
        if (term, self.vote) != self._handed:
            ready.hard_state = self._handed = HardState(term, self.vote)
        if self._restored is not None:
            ready.snapshot = self._restored
            self._restored = None
        if log.handed_index < log.last_index:
            ready.entries = log.take_unhanded()
        handed_commit = self._handed_commit
        if handed_commit < self.commit_index:
            to = min(self.commit_index, handed_commit + self.config.committed_entries_max)
            ready.committed = log.slice(handed_commit, to)
            self._handed_commit = to
        if reads.confirmed:
            ready.reads = reads.confirmed
            reads.confirmed = []
        if reads.failed:
            ready.failed_reads = reads.failed
            reads.failed = []
        if (term, leader, role) != self._told:
            ready.is_leadership_changed = True
            self._told = (term, leader, role)
        ready._late, self._late = self._late, []
        ready._epoch = log.epoch
        ready._made_at = self.now
        self._outstanding.append(ready)
        return ready

    def _begin_read_round(self) -> None:
        reads = self._reads
        self._start_round()
        reads.begin(self._round, self.commit_index)
        if self._is_alone:
            reads.confirm(self._round)
        for progress in self._peers:
            if progress.is_voter:
                progress.is_heartbeat_due = True
                self._is_send_due = True

    def persisted(self, ready: Ready) -> list[tuple[str, RaftMessage]]:
        """
        Note that everything in `ready`, and in all before it, is durable.

        Returns:
            The messages that may leave now: they promise what is durable since now.
        """
        invariant(self._outstanding and self._outstanding[0] is ready, "Readies must become durable in order")
        self._outstanding.popleft()
        log = self.log
        if ready.entries:
            last = ready.entries[-1]
            log.stable_to(last.index, last.term, ready._epoch)
            if self.role is _LEADER:
                self._own.match = log.stable_index
                self._own.next = log.last_index + 1
                if log.stable_index > self.commit_index:
                    self._maybe_commit()
        if ready.hard_state is not None:
            self._durable = ready.hard_state
            self._count_own_vote()
        if self._bar is not None:
            self._lift_bar()
        # Those of a term that is over were true when they were decided, but nobody needs them any more; and what they
        # acknowledge may have been replaced since, even by a later message of the same round.
        term = self.term
        return [item for item in ready._late if item[1].term >= term]

    def _is_disk_stuck(self, now: int) -> bool:
        if not self._outstanding:
            return False
        ready = self._outstanding[0]
        return ready.must_persist and now - ready._made_at >= self.config.election_ticks_max

    # -- views

    @property
    def deadline(self) -> int:
        """The next tick value at which `tick` must be called. It may be past: then at once."""
        if self.config.reads_by_lease and self._reads.waiting and self.commit_index >= self._term_start:
            return self.now
        if self._is_rearm_due or self._is_leader_heard or self._deferred_votes:
            return self.now
        if self.role is not _LEADER:
            return self._election_at
        deadline = self._quorum_check_at
        if self._peers:
            deadline = min(deadline, self._heartbeat_at)
        if self._notice_at:
            deadline = min(deadline, self._notice_at)
        if self._transfer_target:
            deadline = min(deadline, self.now if self._transfer_at is None else self._transfer_at)
        if self._outstanding and self._outstanding[0].must_persist:
            deadline = min(deadline, self._outstanding[0]._made_at + self.config.election_ticks_max)
        return deadline

    @property
    def is_transferring(self) -> bool:
        return bool(self._transfer_target)

    @property
    def progress(self) -> dict[str, ProgressView]:
        """What a leader knows of each member, itself included; empty for others."""
        limit = self.config.election_ticks_max
        return {
            name: ProgressView(
                item.match,
                item.next,
                item.state,
                item is self._own or item.is_heard or self.now - item.heard_at < limit,
            )
            for name, item in self._progress.items()
        }

    def check_invariants(self) -> None:
        """
        Check everything that must always hold within one node.

        Raises:
            InvariantViolation: A bug. The node must stop.
        """
        self._check_state_invariants()
        if self.role in (Role.PRE_CANDIDATE, Role.CANDIDATE):
            invariant(self._can_campaign(), "candidate that may not lead")


_HANDLERS: dict[type, Callable[[RawNode, str, object], None]] = {
    AppendEntries: RawNode._handle_append,  # type: ignore[dict-item]
    AppendReply: RawNode._handle_append_reply,  # type: ignore[dict-item]
    Heartbeat: RawNode._handle_heartbeat,  # type: ignore[dict-item]
    HeartbeatReply: RawNode._handle_heartbeat_reply,  # type: ignore[dict-item]
    InstallSnapshot: RawNode._handle_install_snapshot,  # type: ignore[dict-item]
    RequestVote: RawNode._handle_request_vote,  # type: ignore[dict-item]
    TimeoutNow: RawNode._handle_timeout_now,  # type: ignore[dict-item]
    VoteReply: RawNode._handle_vote_reply,  # type: ignore[dict-item]
}
