"""Clusters of bare cores under random faults, with the invariants of Raft checked at every step.

The simulator of whole clusters (docs/simulation.md) runs a core as the node drives it. Here it is driven as its contract
allows: with configurations that change, members that only learn, several Readies on their way to the disk, messages
without the order and the protection of a connection, and no storage, session or application in the way.

One seed decides everything. Faults: messages lost, repeated, late and out of order; partitions, also in one
direction; pauses with a burst afterwards; slow disks with several Readies outstanding; crashes that lose
what the disk had not written; snapshots and compaction; transfers; changes of configuration. Each seed has
its own selection of these and its own rates.
"""

from __future__ import annotations

import heapq
import random
from typing import Any

from coordlib.errors import NotLeader, Overloaded
from coordlib.raft import RawNode, Ready, Role
from coordlib.raft.messages import (
    Configuration,
    Entry,
    EntryKind,
    InstallSnapshot,
    RaftMessage,
    SnapshotMeta,
    SnapshotStatus,
    VoteReply,
)
from coordlib.raft.quorum import members
from tests.raft.harness import Member, encode_configuration

FORBIDDEN_COUNTS = ("conflicts_with_committed", "two_leaders", "malformed", "acknowledged_entries_lost")


class Simulation:
    """One run. Raises AssertionError or InvariantViolation when a promise is broken."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        count = rng.choice((1, 2, 3, 3, 3, 4, 5, 5, 5))
        names = [f"n{i}" for i in range(1, count + 1)]
        self.is_changing = count >= 4 and rng.random() < 0.6
        voters = tuple(names[:3]) if self.is_changing else tuple(names)
        learners = () if self.is_changing or count < 3 or rng.random() < 0.7 else (names[-1],)
        voters = tuple(name for name in voters if name not in learners)
        self.configuration = Configuration(voters, learners)
        self.by_lease = rng.random() < 0.4
        settings: dict[str, Any] = {
            # Short, so that a run sees many elections; the rates of faults below are made for these.
            "heartbeat_ticks": 8,
            "election_ticks_min": 24,
            "election_ticks_max": 60,
            "reads_by_lease": self.by_lease,
            "drift_percent": 4,
            "append_entries_max": rng.choice((1, 3, 1024)),
            "inflight_messages_max": rng.choice((1, 4, 64)),
            "commit_notice_ticks": rng.choice((0, 5)),
            "committed_entries_max": rng.choice((2, 4096)),
            "uncommitted_size_bytes_max": rng.choice((400, 1 << 20)),
        }
        self.loss = rng.choice((0.0, 0.02, 0.1, 0.25))
        self.repeat = rng.choice((0.0, 0.1))
        self.delay_max = rng.choice((2, 6, 15, 30))
        self.disk_delay_max = rng.choice((0, 0, 10, 40))
        self.crash_rate = rng.choice((0.0, 0.003, 0.01))
        self.coup_rate = rng.choice((0.0, 0.01, 0.03))  # at which a leader crashes
        self.partition_rate = rng.choice((0.0, 0.03, 0.1))
        self.pause_rate = rng.choice((0.0, 0.003))
        self.compact_rate = rng.choice((0.0, 0.01, 0.1))
        self.transfer_rate = rng.choice((0.0, 0.03))

        self.time = 0
        self.members = {name: Member(name, self.configuration, **settings) for name in names}
        self.rate = {name: rng.randint(985, 1015) for name in names}
        self.paused_until = dict.fromkeys(names, 0)
        self.down_until = dict.fromkeys(names, 0)
        self.cut: set[tuple[str, str]] = set()
        self.cut_until = 0
        self.network: list[tuple[int, int, str, str, RaftMessage]] = []
        self.disk_due: dict[str, list[int]] = {name: [] for name in names}
        self.serial = 0

        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[str, int], str] = {}
        self.known: dict[tuple[int, int], tuple[Entry, int]] = {}
        self.committed: dict[int, Entry] = {}
        self.committed_in: dict[int, int] = {}  # index -> a term by which it was committed
        self.committed_index = 0
        self.reads: dict[object, int] = {}
        self.marks: dict[str, int] = {}
        self.transfers: list[tuple[int, str, RawNode, str, SnapshotMeta]] = []
        for member in self.members.values():
            self._start(member)

    # -- the world

    def clock(self, name: str) -> int:
        return self.time * self.rate[name] // 1000

    def mark(self, name: str) -> None:
        self.marks[name] = self.marks.get(name, 0) + 1

    def _start(self, member: Member) -> None:
        member.start(self.clock(member.node_id), self.rng.randint)
        self.disk_due[member.node_id] = []

    def _crash(self, member: Member) -> None:
        assert member.node is not None
        for name, value in member.node.counters.items():
            self.marks[name] = self.marks.get(name, 0) + value
        # The disk may have come any number of Readies further than we were told.
        for _ in range(self.rng.randint(0, len(member.outstanding))):
            member.disk.write(member.outstanding.popleft())
        member.crash()
        self.mark("crashes")

    def send(self, sender: str, messages: list[tuple[str, RaftMessage]]) -> None:
        rng = self.rng
        for receiver, message in messages:
            if isinstance(message, VoteReply) and message.is_granted and not message.is_pre_vote:
                earlier = self.votes.setdefault((sender, message.term), receiver)
                assert earlier == receiver, f"{sender} votes twice in term {message.term}"
            if receiver not in self.members or (sender, receiver) in self.cut or rng.random() < self.loss:
                continue
            for _ in range(2 if rng.random() < self.repeat else 1):
                self.serial += 1
                due = self.time + rng.randint(1, self.delay_max)
                heapq.heappush(self.network, (due, self.serial, sender, receiver, message))

    def _disturb(self) -> None:
        rng = self.rng
        for name, member in self.members.items():
            if member.node is None:
                if self.time >= self.down_until[name]:
                    self._start(member)
            elif rng.random() < (self.crash_rate + self.coup_rate * member.core.is_leader):
                self._crash(member)
                self.down_until[name] = self.time + rng.choice((0, 10, 100))
            elif rng.random() < self.pause_rate:
                self.paused_until[name] = self.time + rng.choice((20, 50, 150))
        if self.cut and self.time >= self.cut_until:
            self.cut = set()
        elif not self.cut and rng.random() < self.partition_rate:
            names = list(self.members)
            side = set(rng.sample(names, rng.randint(1, max(1, len(names) // 2))))
            leaders = {
                name for name in names if self.members[name].node and self.members[name].core.is_leader
            }
            if rng.random() < 0.5 and leaders:
                side = leaders
            pairs = [(a, b) for a in names for b in names if (a in side) != (b in side)]
            if rng.random() < 0.3:
                pairs = [(a, b) for a, b in pairs if a in side]
            self.cut = set(pairs)
            self.cut_until = self.time + rng.randint(10, 150)

    # -- one round of one member, as a driver does it

    def _round(self, member: Member, inbox: list[tuple[str, RaftMessage]]) -> None:
        name = member.node_id
        core = member.core
        for sender, message in inbox:
            if isinstance(message, InstallSnapshot) and message.meta.index > member.disk.snapshot.index:
                member.disk.snapshot = message.meta  # the file became durable, whatever the core makes of it
            core.step(sender, message)
            core.check_invariants()
        self._ask(member)
        core.tick(self.clock(name))
        core.check_invariants()
        self._write(member)
        limit = 3 if self.disk_delay_max else 1
        while core.has_ready() and len(member.outstanding) < limit:
            ready = member.take_ready()
            self._check_ready(member, ready)
            self.send(name, ready.messages)
            for follower in ready.snapshots_wanted:
                due = self.time + self.rng.randint(1, 40)
                self.transfers.append((due, name, core, follower, core.log.snapshot))
            delay = self.rng.randint(0, self.disk_delay_max) if ready.must_persist else 0
            self.disk_due[name].append(self.time + delay)
            core.check_invariants()
            self._write(member)
        self._check_reads(member)

    def _write(self, member: Member) -> None:
        due = self.disk_due[member.node_id]
        while due and due[0] <= self.time:
            due.pop(0)
            self.send(member.node_id, member.write_next())
            member.core.check_invariants()
        self._check_leader(member)

    def _ask(self, member: Member) -> None:
        rng = self.rng
        core = member.core
        if core.role is not Role.LEADER:
            return
        backlog = core.last_index - core.commit_index
        for _ in range(rng.choice((0, 0, 1, 1, 5)) if backlog < 40 else 0):
            self.serial += 1
            try:
                core.propose(b"command %d" % self.serial)
            except Overloaded:
                self.mark("overloaded")
        if rng.random() < 0.2:
            self.serial += 1
            context = ("read", self.serial)
            self.reads[context] = self.committed_index
            core.request_read(context)
        if rng.random() < self.transfer_rate and core.transfer_leadership(None):
            self.mark("transfers")
        if self.is_changing and rng.random() < 0.05:
            self._change(core)
        applied = member.applied_index
        if applied > core.log.snapshot.index and rng.random() < self.compact_rate:
            member.snapshot_at(rng.randint(core.log.snapshot.index + 1, applied), rng.choice((0, 2, 20)))
            self.mark("compactions")

    def _change(self, core: RawNode) -> None:
        voters, learners, outgoing = core.configuration
        if outgoing:
            new = Configuration(voters, learners, ())
        elif self.rng.random() < 0.5:
            names = sorted(self.rng.sample(list(self.members), self.rng.randint(2, len(self.members))))
            new = Configuration(tuple(names), (), voters)
        else:
            name = self.rng.choice(list(self.members))
            changed = set(voters) ^ {name}
            if len(changed) < 2:
                return
            new = Configuration(tuple(sorted(changed)))
        try:
            core.propose(encode_configuration(new), int(EntryKind.CONFIGURATION))
            self.mark("changes")
        except (Overloaded, NotLeader):
            pass

    def _deliver_snapshots(self) -> None:
        waiting = self.transfers
        self.transfers = []
        for item in waiting:
            due, sender, core, follower, meta = item
            if self.members[sender].node is not core:
                continue  # the sender crashed, and the transfer with it
            if due > self.time:
                self.transfers.append(item)
                continue
            is_cut = (sender, follower) in self.cut or self.members[follower].node is None
            if not is_cut:
                self.serial += 1
                message = InstallSnapshot(core.term, meta)
                if core.role is Role.LEADER:
                    heapq.heappush(self.network, (self.time, self.serial, sender, follower, message))
            core.report_snapshot(follower, SnapshotStatus(meta.index, not is_cut))

    def step(self) -> None:
        self.time += self.rng.randint(1, 6)
        self._disturb()
        self._deliver_snapshots()
        inbox: dict[str, list[tuple[str, RaftMessage]]] = {name: [] for name in self.members}
        held = []
        while self.network and self.network[0][0] <= self.time:
            item = heapq.heappop(self.network)
            receiver = item[3]
            if self.members[receiver].node is None:
                continue
            if self.paused_until[receiver] > self.time:
                held.append(item)
            else:
                inbox[receiver].append((item[2], item[4]))
        for item in held:
            heapq.heappush(self.network, item)
        for name, member in self.members.items():
            if member.node is not None and self.paused_until[name] <= self.time:
                self._round(member, inbox[name])

    # -- what must hold

    def _check_ready(self, member: Member, ready: Ready) -> None:
        core = member.core
        for entry in ready.entries:
            # Log Matching: (index, term) determines the entry and all before it.
            before = core.log.term_at(entry.index - 1)
            known, known_before = self.known.setdefault((entry.index, entry.term), (entry, before))
            assert known == entry, f"two entries at {entry.index} in term {entry.term}"
            assert before == known_before or -1 in (before, known_before), (
                f"histories differ at {entry.index}"
            )
        for entry in ready.committed:
            # State Machine Safety.
            known_entry = self.committed.setdefault(entry.index, entry)
            assert known_entry == entry, f"{member.node_id} applies another entry at {entry.index}"
            self.committed_in.setdefault(entry.index, core.term)
            self.committed_index = max(self.committed_index, entry.index)
        if ready.snapshot is not None:
            self.mark("restores")
            known_entry = self.committed[ready.snapshot.index]
            assert known_entry.term == ready.snapshot.term

    def _check_leader(self, member: Member) -> None:
        core = member.core
        if core.role is not Role.LEADER:
            return
        name = member.node_id
        log = core.log
        if core.term not in self.leaders:
            self.leaders[core.term] = name
            # Leader Completeness. (One elected late may not know what later terms have committed.)
            for index in range(log.start_index + 1, self.committed_index + 1):
                if self.committed_in[index] < core.term:
                    assert log.term_at(index) == self.committed[index].term, f"leader {name} lacks {index}"
        known = self.leaders[core.term]
        assert known == name, f"two leaders in term {core.term}: {known}, {name}"
        # What is committed is on the disks of a quorum, and what is said to match is on the follower's.
        for follower, progress in core.progress.items():
            held = self.members[follower].disk
            term = log.term_at(progress.match)
            is_current = held.hard_state.term <= core.term  # a later leader may have truncated what matched
            if progress.match > held.snapshot.index and term != -1 and is_current:
                assert held.holds(progress.match, term), f"{follower} lacks {progress.match}"
        commit = core.commit_index
        if log.term_at(commit) == core.term and log.configuration_index <= commit:
            for names in (core.configuration.voters, core.configuration.outgoing):
                disks = [self.members[item].disk for item in names]
                count = sum(disk.holds(commit, core.term) for disk in disks)
                assert not names or count > len(names) // 2, f"{commit} is committed on {count} disks"

    def _check_reads(self, member: Member) -> None:
        for context, index in member.reads:
            asked_at = self.reads.pop(context)
            assert index >= asked_at, f"stale read: {index} where {asked_at} was committed"
            self.mark("reads")
        member.reads.clear()
        for context in member.failed_reads:
            self.reads.pop(context)
        member.failed_reads.clear()

    # -- the run

    def run(self, steps: int = 400, heal: int = 3000) -> dict[str, int]:
        """Faults for a while; then none, and the cluster must agree and go on."""
        for _ in range(steps):
            self.step()
        self.loss = self.crash_rate = self.coup_rate = self.partition_rate = self.pause_rate = (
            self.transfer_rate
        ) = 0.0
        self.compact_rate = 0.0
        self.is_changing = False
        self.delay_max = 5
        self.disk_delay_max = 0
        self.cut = set()
        self.paused_until = dict.fromkeys(self.members, 0)
        self.down_until = dict.fromkeys(self.members, 0)
        end = self.time + heal
        while self.time < end and not self._is_settled():
            self.step()
        assert self._is_settled(), f"no agreement after healing: {self.describe()}"
        for member in self.members.values():
            for name, value in member.core.counters.items():
                self.marks[name] = self.marks.get(name, 0) + value
        for name in FORBIDDEN_COUNTS:
            assert not self.marks.get(name), f"{name}: {self.marks[name]}"
        return self.marks

    def _is_settled(self) -> bool:
        """One leader, and a command of its term applied by every member of its configuration."""
        cores = [member.node for member in self.members.values() if member.node is not None]
        if len(cores) < len(self.members):
            return False
        leaders = [core for core in cores if core.role is Role.LEADER]
        if len(leaders) != 1:
            return False
        leader = leaders[0]
        target = leader._term_start + 3
        names = members(leader.configuration)
        return leader.commit_index >= target and all(
            self.members[name].applied_index >= target and self.members[name].core.term == leader.term
            for name in names
        )

    def describe(self) -> str:
        lines = [f"seed {self.seed} time {self.time}"]
        for name, member in self.members.items():
            core = member.node
            if core is None:
                lines.append(f"{name} down")
                continue
            lines.append(
                f"{name} {core.role.name} term={core.term} leader={core.leader} last={core.log.last_index}"
                f"@{core.log.last_term} commit={core.commit_index} applied={member.applied_index}"
                f" start={core.log.start_index} {core.configuration} {core.progress}"
            )
        return "\n".join(lines)
