"""What one node knows, and the transitions that every part of the core needs. Pure data and small steps.

`State` <- `Replication` (the log, commit, reads) <- `Elections` (votes, timers) <- `RawNode` (the surface).

Time. `step` is given no time: what happened is only known to lie between two ticks. So whatever a node
*promises* (silence towards candidates, its own patience) counts from the next tick, and whatever it
*claims* (its lease) counts from the last. Both err on the safe side, however long the process was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

from coordlib.errors import invariant
from coordlib.raft.config import RaftConfig
from coordlib.raft.log import ConfigurationDecoder, RaftLog
from coordlib.raft.messages import Configuration, Entry, HardState, RaftMessage, RequestVote, SnapshotMeta
from coordlib.raft.progress import Progress, ProgressState
from coordlib.raft.quorum import is_voter, members, value_reached
from coordlib.raft.reads import Lease, ReadQueue

__all__ = ["Role", "State"]


class Role(IntEnum):
    FOLLOWER = 0
    PRE_CANDIDATE = 1
    CANDIDATE = 2
    LEADER = 3


class State:
    """Fields and the transitions down to follower. Read the public ones, never write them."""

    __slots__ = (
        "_bar",
        "_deferred_votes",
        "_durable",
        "_election_at",
        "_election_timeout",
        "_handed",
        "_handed_commit",
        "_heard",
        "_heard_from",
        "_heartbeat_at",
        "_is_leader_heard",
        "_is_rearm_due",
        "_is_send_due",
        "_late",
        "_lease",
        "_notice_at",
        "_notice_index",
        "_outgoing_progress",
        "_own",
        "_peers",
        "_progress",
        "_quorum_check_at",
        "_random_ticks",
        "_reads",
        "_restored",
        "_round",
        "_shown",
        "_silent_until",
        "_snapshots_wanted",
        "_term_start",
        "_transfer_at",
        "_transfer_target",
        "_uncommitted_bytes",
        "_voter_progress",
        "_votes",
        "applied_index",
        "commit_index",
        "config",
        "counters",
        "leader",
        "log",
        "node_id",
        "now",
        "role",
        "term",
        "vote",
    )

    def __init__(
        self,
        config: RaftConfig,
        *,
        hard_state: HardState,
        snapshot: SnapshotMeta,
        entries: Sequence[Entry],
        random_ticks: Callable[[int, int], int],
        now: int,
        decode_configuration: ConfigurationDecoder | None = None,
    ) -> None:
        self.config = config
        self.node_id = config.node_id
        self.now = now
        self.log = RaftLog(snapshot, entries, decode_configuration)
        self.term, self.vote = hard_state
        invariant(self.term >= self.log.last_term, "term %d, log has %d", self.term, self.log.last_term)
        self.role = Role.FOLLOWER
        self.leader = ""
        self.commit_index = self.applied_index = snapshot.index
        self.counters: dict[str, int] = {}

        self._durable = hard_state  # (term, vote) on the disk
        self._handed = hard_state  # ... or on its way there
        self._handed_commit = snapshot.index  # committed entries up to here were handed over
        self._restored: SnapshotMeta | None = None  # the machine is to be restored to this
        self._late: list[tuple[str, RaftMessage]] = []  # leave when all of this is durable
        self._bar: tuple[int, int] | None = None
        # (term, index): up to there the leader of that term has shown since our start that our log is its own.
        self._shown = (0, 0)

        self._random_ticks = random_ticks
        self._election_timeout = 0
        self._election_at = now
        self._is_rearm_due = False  # at the next tick, patience starts anew
        self._is_leader_heard = False  # since the last tick
        self._heard_from = ""  # the last leader to whom silence was promised
        # It may have promised silence to a leader before it crashed: see `Elections`.
        self._silent_until = now
        if not self._is_alone:
            self._silent_until += config.election_ticks_min
            self._draw_election_timeout()
            self._election_at += self._election_timeout
        self._votes: dict[str, bool] = {}
        self._deferred_votes: dict[str, RequestVote] = {}

        self._progress: dict[str, Progress] = {}
        self._peers: list[Progress] = []
        self._voter_progress: list[Progress] = []
        self._outgoing_progress: list[Progress] = []
        self._own = Progress(self.node_id, 1, now, False)
        self._heard: list[Progress] = []  # answered since the last tick
        self._term_start = 0  # index of this leader's no-op
        self._round = 0
        self._is_send_due = False
        self._uncommitted_bytes = 0
        self._heartbeat_at = self._quorum_check_at = now
        self._notice_at = 0  # 0: none due
        self._notice_index = 0
        self._transfer_target = ""
        self._transfer_at: int | None = None  # None: counts from the next tick
        self._reads = ReadQueue()
        self._lease = Lease(config.lease_ticks)
        self._snapshots_wanted: list[str] = []

    # -- views

    @property
    def configuration(self) -> Configuration:
        """The newest in the log, in force from the moment it was appended (Thesis §4.1)."""
        return self.log.configuration

    @property
    def last_index(self) -> int:
        return self.log.last_index

    @property
    def is_leader(self) -> bool:
        return self.role is Role.LEADER

    @property
    def is_barred(self) -> bool:
        """Whether this disk has come back with less than it had acknowledged, and has not caught up yet."""
        return self._bar is not None

    @property
    def _is_alone(self) -> bool:
        """Whether this node is a quorum all by itself."""
        configuration = self.log.configuration
        return configuration.voters == (self.node_id,) and not configuration.outgoing

    # -- small steps

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1

    def _is_member(self, node_id: str) -> bool:
        configuration = self.log.configuration
        return is_voter(configuration, node_id) or node_id in configuration.learners

    def _send_late(self, receiver: str, message: RaftMessage) -> None:
        """Queue a message that leaves when all that was decided so far is durable."""
        self._late.append((receiver, message))

    def _draw_election_timeout(self) -> None:
        config = self.config
        self._election_timeout = self._random_ticks(config.election_ticks_min, config.election_ticks_max)

    def _become_follower(self, term: int, leader: str) -> None:
        """
        Follow `leader` ("" = not known yet) in `term`, which is not below the present one.

        Within a term the vote is kept: a former candidate must not vote a second time (Raft §5.2).
        """
        invariant(term >= self.term, "term falls from %d to %d", self.term, term)
        if term > self.term:
            self.term = term
            self.vote = ""
        if self.role is not Role.FOLLOWER:
            if self.role is Role.LEADER:
                self._leave_office()
            self.role = Role.FOLLOWER
            self._draw_election_timeout()
            self._is_rearm_due = True
        self.leader = leader
        self._votes.clear()

    def _leave_office(self) -> None:
        """Drop everything that only a leader has; what was promised by it ends here."""
        self._count("stepped_down")
        self._progress = {}
        self._peers = []
        self._voter_progress = []
        self._outgoing_progress = []
        self._heard.clear()
        self._snapshots_wanted.clear()
        self._reads.fail_all()
        self._lease.reset()
        self._transfer_target = ""
        self._transfer_at = None
        self._uncommitted_bytes = 0
        self._notice_at = 0
        self._is_send_due = False

    def _start_round(self) -> None:
        self._round += 1
        if self.config.reads_by_lease:
            self._lease.begin(self._round, self.now)

    def _quorum_round(self) -> int:
        """The newest round that a quorum has echoed. The leader itself has echoed all."""
        self._own.round_acked = self._round
        value = value_reached([progress.round_acked for progress in self._voter_progress])
        if self._outgoing_progress:
            outgoing = value_reached([progress.round_acked for progress in self._outgoing_progress])
            value = min(value, outgoing)
        return value

    def _rebuild_progress(self) -> None:
        """After election or a change of configuration: know every member, and nobody else."""
        configuration = self.log.configuration
        old = self._progress
        self._progress = {}
        for name in members(configuration):
            progress = old.get(name)
            if progress is None:
                # The last entry goes with the first message: a leader's no-op, or the change that adds it.
                progress = Progress(name, self.log.last_index, self.now, False)
                progress.is_heard = True
                self._heard.append(progress)
            progress.is_voter = is_voter(configuration, name)
            self._progress[name] = progress
        own = self._progress.get(self.node_id)
        if own is None:
            own = Progress(self.node_id, self.log.last_index + 1, self.now, False)
        self._own = own
        own.state = ProgressState.REPLICATE
        own.match = self.log.stable_index
        own.next = self.log.last_index + 1
        self._peers = [progress for progress in self._progress.values() if progress is not own]
        self._voter_progress = [self._progress[name] for name in configuration.voters]
        self._outgoing_progress = [self._progress[name] for name in configuration.outgoing]
        self._is_send_due = True

    def _check_state_invariants(self) -> None:
        log = self.log
        log.check_invariants()
        invariant(self.commit_index <= log.last_index, "commit past the log: was it truncated or lost?")
        invariant(log.snapshot.index <= self.commit_index, "snapshot of what is not committed")
        invariant(self.applied_index <= self.commit_index, "applied past the commit")
        invariant(self._handed_commit <= self.commit_index, "handed over what is not committed")
        invariant(self.term >= log.last_term, "log has a later term than the node")
        invariant(
            self._shown[0] < self.term or self._shown[1] <= log.last_index, "shown to match what is not there"
        )
        invariant(self._durable.term <= self._handed.term <= self.term, "terms out of order")
        if self.role is Role.LEADER:
            mine = (self.term, self.node_id)
            invariant(self._durable == mine, "leader whose own vote is not durable")
            invariant(self.leader == self.node_id, "leader that follows another")
            invariant(self._own.match == log.stable_index, "own acknowledgement before the disk's")
            invariant(log.term_at(self._term_start) in (self.term, -1), "leader without its no-op")
            for progress in self._peers:
                progress.check_invariants(log.last_index)
        else:
            invariant(not self._progress and not self._peers, "progress without office")
            invariant(not self._is_send_due and not self._notice_at, "something to send without office")
            invariant(not self._transfer_target, "transfer without office")
            invariant(not self._reads.waiting and not self._reads.rounds, "reads without office")
        if self.role in (Role.CANDIDATE, Role.PRE_CANDIDATE):
            invariant(not self.leader, "candidate that knows a leader")
        if self.role is Role.CANDIDATE:
            invariant(self.vote == self.node_id, "candidate that did not vote for itself")
