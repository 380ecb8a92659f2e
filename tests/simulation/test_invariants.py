"""Each invariant notices its violation, made by hand: a cluster of stand-ins lives legally, and then does one wrong thing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from coordlib.cbor import encode
from coordlib.errors import CoordError, NotHolder, QuotaExceeded
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.machine.effects import Applied, LockGranted, LockWithdrawn, SessionEnded, SessionOpened
from coordlib.node.effects import LogEvent
from coordlib.raft import RawNode
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    RequestVote,
    SnapshotMeta,
    VoteReply,
)
from coordlib.storage.base import DiskIdentity, Persist, RecoveredGroup
from coordlib.testing.disk import PendingChange
from coordlib.testing.simulation import decisions, invariants, marks, model
from coordlib.testing.simulation.invariants import ROUNDS_MAX, Impostor, Invariants, Violation, watched_reads
from coordlib.testing.simulation.marks import Marks
from tests.simulation.test_decisions import LIES

NAMES: Final = ("n1", "n2", "n3")
CONFIGURATION: Final = Configuration(NAMES)
COMMAND: Final = int(EntryKind.COMMAND)
LOCK: Final = b"door"
GOOD: Final = encode((0,))


class Log:
    """As much of a core's log as is looked at."""

    def __init__(self) -> None:
        self.start_index = self.start_term = 0
        self.entries: list[Entry] = []

    def term_at(self, index: int) -> int:
        place = index - self.start_index - 1
        if place == -1:
            return self.start_term
        return self.entries[place].term if 0 <= place < len(self.entries) else -1

    def slice(self, after: int, to: int) -> list[Entry]:
        return self.entries[after - self.start_index : to - self.start_index]

    def put(self, entry: Entry) -> None:
        del self.entries[entry.index - self.start_index - 1 :]
        self.entries.append(entry)


class Member:
    """As much of a member's process as is looked at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_up = True
        self.pending: list[tuple[str, PendingChange]] = []
        self.fs = SimpleNamespace(pending=lambda: self.pending, open_files=0)
        self.events: list[LogEvent] = []
        self.state = b"state"
        self.clock_ms = 0
        self.clock = lambda: self.clock_ms
        machine = SimpleNamespace(
            applied_index=0, digest=lambda: self.state, check_invariants=lambda: None, sessions=()
        )
        machine._transactions = SimpleNamespace(horizon_ms=0, close_ms=0)
        self.start_number = 1
        service = SimpleNamespace(
            **dict.fromkeys(("_proposed", "_by_key", "_pending_of", "_held", "_reads", "_waits"), ()),
            **dict.fromkeys(("_pending_bytes", "_reads_asked", "_waits_count"), 0),
            _expiring={},
        )
        view: Any = SimpleNamespace(session_id=0, valid_until_ms=1000)
        view.is_valid = lambda now_ms: now_ms < view.valid_until_ms
        raft = SimpleNamespace(term=0, is_leader=False, commit_index=0, log=Log(), _peers=[])
        session = SimpleNamespace(view=view)
        self._kernel = SimpleNamespace(
            raft=raft, machine=machine, session=session, service=service, _senders=None
        )


class Cluster:
    """Three stand-ins, and what is told of them."""

    def __init__(self) -> None:
        self.marks = Marks(())
        seen: Any = Invariants(NAMES, self.marks, are_clocks_bounded=True)
        self.seen = seen  # of stand-ins
        self.members = {name: Member(name) for name in NAMES}
        self.now = 0
        self.last = 0
        for member in self.members.values():
            seen.started(member, None)

    def kernel(self, name: str) -> Any:
        return self.members[name]._kernel

    def write(
        self,
        name: str,
        *entries: Entry,
        state: HardState | None = None,
        restored: SnapshotMeta | None = None,
    ) -> None:
        batch = Persist(0, state, entries, restored)
        self.seen.writing(self.members[name], batch)
        self.seen.wrote(self.members[name], batch)
        for entry in entries:
            self.kernel(name).raft.log.put(entry)

    def send(self, name: str, to: str, message: Any) -> None:
        self.seen.sending(self.members[name], to, [(0, message)])

    def turn(self, name: str) -> None:
        self.seen.turned(self.members[name], self.now)

    def elect(self, name: str, term: int, voters: tuple[str, ...] = NAMES) -> None:
        for voter in voters:
            self.kernel(voter).raft.term = term
            self.kernel(voter).raft.is_leader = False
            self.write(voter, state=HardState(term, name))
            self.turn(voter)
            if voter == name:
                self.send(name, "", RequestVote(term, 0, 0, False, False))
            else:
                self.send(voter, name, VoteReply(term, term, True, False))
        self.kernel(name).raft.is_leader = True
        self.turn(name)
        self.send(name, "", Heartbeat(term, 0, 0))

    def replicate(self, entry: Entry, *names: str) -> None:
        for name in names:
            self.write(name, entry)

    def commit(self, name: str, index: int) -> None:
        self.kernel(name).raft.commit_index = index
        self.turn(name)

    def apply(self, name: str, entry: Entry, reply: bytes = GOOD, *effects: Any) -> None:
        kernel = self.kernel(name)
        _, session, sequence, _, _ = commands.unpack_entry(entry.data)
        kernel.raft.commit_index = max(kernel.raft.commit_index, entry.index)
        kernel.machine.applied_index = entry.index
        self.seen.applied(self.members[name], entry, Applied(session, sequence, reply, tuple(effects)))

    def happen(
        self,
        operation: bytes,
        session: int = 0,
        sequence: int = 0,
        *,
        reply: bytes = GOOD,
        effects: Any = (),
        at_ms: int = 0,
    ) -> None:
        """A command goes through all of it, in the term of n1, and is applied by n1."""
        self.last += 1
        entry = Entry(1, self.last, COMMAND, commands.pack_entry(at_ms, session, sequence, 0, operation))
        self.replicate(entry, *NAMES)
        self.apply("n1", entry, reply, *effects)
        self.turn("n1")

    def restart(
        self, name: str, state: HardState, *entries: Entry, snapshot: SnapshotMeta | None = None
    ) -> None:
        self.members[name] = Member(name)
        self.seen.started(self.members[name], RecoveredGroup(state, snapshot, list(entries)))


def command(term: int, index: int, what: bytes = b"put") -> Entry:
    return Entry(term, index, COMMAND, commands.pack_entry(0, 0, 0, 0, encode((999, what))))


def begun() -> Cluster:
    """n1 leads term 1, and its first entry is on every disk, committed by all."""
    cluster = Cluster()
    cluster.elect("n1", 1)
    cluster.last = 1
    cluster.replicate(Entry(1, 1, int(EntryKind.NOOP), b""), *NAMES)
    for name in NAMES[1:]:
        cluster.send(name, "n1", AppendReply(1, 0, True, 0, 1, 1, 1))
    for name in NAMES:
        cluster.commit(name, 1)
        cluster.kernel(name).machine.applied_index = 1
        cluster.turn(name)
    return cluster


def with_sessions() -> Cluster:
    """Sessions 1 and 2 are open, and 1 holds the lock with token 5."""
    cluster = begun()
    for session in (1, 2):
        cluster.happen(
            commands.open_session(b"%d" % session, 3000, "owner"), effects=(SessionOpened(session, 3000),)
        )
    cluster.happen(commands.acquire(LOCK), 1, 1, reply=granted(5))
    return cluster


def granted(token: int) -> bytes:
    return encode((0, True, token, 0))


class Leases:
    """Ids of a layout with two workers, units of 1 ms from the first millisecond of 1970 on, windows of 10 s."""

    def __init__(self) -> None:
        self.cluster = with_sessions()
        self.layout = (41, 12, 1, 1, 1, 1)

    def _happen(self, operation: bytes, results: tuple[int, ...] | CoordError, at_ms: int) -> None:
        reply = commands.encode_error(results) if isinstance(results, CoordError) else encode((0, *results))
        self.cluster.happen(operation, 1, self.cluster.last + 10, reply=reply, at_ms=at_ms)

    def lease(self, results: tuple[int, ...] | CoordError, at_ms: int, epoch_ms: int = 1) -> None:
        """Granted: worker, number, from, until."""
        if not isinstance(results, CoordError):
            results = (*results, results[2], epoch_ms)
        self._happen(commands.ids_lease(b"ids", self.layout, 10_000), results, at_ms)

    def renew(self, worker: int, number: int, results: tuple[int, ...] | CoordError, at_ms: int) -> None:
        self._happen(commands.ids_renew(b"ids", worker, number, 10_000), results, at_ms)

    def give_back(self, worker: int, number: int, used_until: int, until: int, at_ms: int) -> None:
        self._happen(commands.ids_return(b"ids", worker, number, used_until), (until,), at_ms)

    def skip(self, floor_ms: int, at_ms: int) -> None:
        self._happen(commands.ids_skip(floor_ms), (floor_ms, 1), at_ms)

    def begin(self) -> Leases:
        """Worker 0 until 12 s, extended at 5 s to 15 s; worker 1 given back at 4 s."""
        self.lease((0, 1, 2000, 12_000), 2001)
        self.lease((1, 2, 3000, 13_000), 3001)
        self.give_back(1, 2, 4000, 4000, 4001)
        self.renew(0, 1, (15_000, 5000), 5001)
        return self


NO_WORKER: Final = QuotaExceeded("none", limit="worker_bits", maximum=2, wanted=3, free_in_ms=1)
NOT_HELD: Final = NotHolder("ended", name=b"ids", worker=0, lease=1)


def test_leases_that_keep_to_the_rules_are_no_violation() -> None:
    """Granted, extended, given back, lapsed, passed on, refused, and skipped."""
    leases = Leases().begin()
    leases.lease((1, 3, 6000, 16_000), 6001)
    leases.lease(NO_WORKER, 6002)
    leases.renew(1, 2, NOT_HELD, 6003)
    leases.renew(0, 1, NOT_HELD, 15_001)
    leases.lease((0, 4, 15_000, 25_000), 15_001)
    leases.skip(40_000, 15_002)
    leases.renew(0, 4, NOT_HELD, 15_003)
    leases.lease((1, 5, 39_999, 49_999), 15_004)
    leases.renew(1, 5, (50_998, 40_998), 16_003)  # its time runs ahead as it did when it began


def test_a_legal_life_is_no_violation() -> None:
    """Elections, replication, a conflict that is replaced, snapshots, restarts, sessions and locks: nothing to complain of."""
    cluster = with_sessions()
    cluster.happen(commands.acquire(LOCK), 2, 1, reply=encode((0, False, 0, 1)))
    cluster.happen(commands.release(LOCK, 1), 1, 2, effects=(LockGranted(2, 1, LOCK, 6),))
    cluster.happen(commands.close_session(), 2, 2, effects=(LockWithdrawn(2, 1), SessionEnded(2, "closed")))
    index = cluster.last
    cluster.kernel("n1").raft.is_leader = False
    alone = command(1, index + 1, b"alone")
    cluster.replicate(alone, "n1")
    cluster.elect("n2", 2, ("n2", "n3"))
    later = command(2, index + 1, b"later")
    cluster.replicate(later, "n2", "n3")
    cluster.kernel("n1").raft.term = 2
    cluster.write("n1", later, state=HardState(2, ""))
    cluster.commit("n2", index + 1)
    cluster.apply("n1", later)
    cluster.turn("n1")
    cluster.restart("n3", HardState(2, "n2"), *cluster.kernel("n3").raft.log.entries)
    cluster.restart("n3", HardState(2, "n2"), snapshot=SnapshotMeta(index + 1, 2, CONFIGURATION))
    assert cluster.marks.counts["truncated_conflict"] == 1
    assert cluster.marks.counts["lock_handed_over"] == 1


def late_write(*, is_third_leader_heard: bool) -> None:
    """Entry 2 of n1 in term 1 is replaced by n3's of term 2 on n1's slow disk only after n2 has committed it in term 3."""
    cluster = begun()
    first, other = command(1, 2), command(2, 2, b"other")
    cluster.replicate(first, "n1", "n2")
    cluster.kernel("n1").raft.is_leader = False
    cluster.elect("n3", 2, ("n3", "n1"))
    cluster.replicate(other, "n3")
    cluster.kernel("n3").raft.is_leader = False
    cluster.elect("n2", 3, ("n2", "n3"))
    last = command(3, 3, b"last")
    cluster.write("n3", first, last)
    cluster.replicate(last, "n2")
    cluster.commit("n2", 3)
    if is_third_leader_heard:
        cluster.kernel("n1").raft.term = 3
        cluster.write("n1", state=HardState(3, ""))
    cluster.write("n1", other)


def test_a_late_write_of_an_earlier_leaders_entry_loses_nothing() -> None:
    """Nobody counted on that disk: it has acknowledged nothing in the term of the leader who committed."""
    late_write(is_third_leader_heard=False)


# -- the wrong things ---------------------------------------------------------------------------------------


def two_leaders() -> None:
    cluster = begun()
    cluster.write("n2", state=HardState(1, "n1"))
    cluster.kernel("n2").raft.is_leader = True
    cluster.turn("n2")


def two_leaders_by_their_messages() -> None:
    begun().send("n2", "n3", AppendEntries(1, 0, 0, 0, 0, ()))


def two_votes() -> None:
    cluster = begun()
    cluster.write("n2", state=HardState(1, "n3"))
    cluster.send("n2", "n3", VoteReply(1, 1, True, False))


def two_votes_over_a_restart() -> None:
    cluster = begun()
    cluster.restart("n2", HardState(1, "n1"), *cluster.kernel("n2").raft.log.entries)
    cluster.send("n2", "n3", VoteReply(1, 1, True, False))


def a_term_that_falls() -> None:
    cluster = begun()
    cluster.kernel("n2").raft.term = 0
    cluster.turn("n2")


def a_term_that_is_forgotten() -> None:
    cluster = begun()
    cluster.restart("n2", HardState(0, ""), *cluster.kernel("n2").raft.log.entries)


def a_vote_before_its_disk() -> None:
    begun().send("n2", "n3", VoteReply(2, 2, True, False))


def a_candidacy_before_its_disk() -> None:
    begun().send("n2", "n3", RequestVote(2, 1, 1, False, False))


def an_acknowledgement_before_its_disk() -> None:
    begun().send("n2", "n1", AppendReply(1, 0, True, 1, 2, 1, 2))


def an_acknowledgement_in_a_term_that_is_not_on_the_disk() -> None:
    begun().send("n2", "n1", AppendReply(2, 0, True, 0, 1, 1, 1))


def an_append_without_a_vote_of_its_own() -> None:
    begun().send("n2", "n3", AppendEntries(2, 0, 0, 0, 0, ()))


def a_write_that_is_not_synced() -> None:
    cluster = begun()
    cluster.members["n2"].pending.append(("/data/1.log", PendingChange(0, b"\0entry")))
    cluster.write("n2", command(1, 2))


def an_entry_that_is_gone() -> None:
    begun().restart("n2", HardState(1, "n1"))


def an_entry_that_nobody_wrote() -> None:
    cluster = begun()
    cluster.restart("n2", HardState(1, "n1"), *cluster.kernel("n2").raft.log.entries, command(1, 2))


def a_snapshot_that_is_gone() -> None:
    cluster = begun()
    cluster.restart("n2", HardState(1, "n1"), snapshot=SnapshotMeta(1, 1, CONFIGURATION))
    cluster.restart("n2", HardState(1, "n1"), command(1, 2))


def a_log_that_begins_behind_what_its_snapshot_stood_for() -> None:
    cluster = begun()
    cluster.write("n2", command(1, 2), command(1, 3), command(1, 4))
    cluster.restart("n2", HardState(1, "n1"), command(1, 4), snapshot=SnapshotMeta(3, 1, CONFIGURATION))
    cluster.restart("n2", HardState(1, "n1"), command(1, 3), command(1, 4))


def two_entries_of_one_index_and_term() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2, b"one"), "n1")
    cluster.replicate(command(1, 2, b"other"), "n2")


def another_entry_than_one_whose_predecessor_is_not_known() -> None:
    cluster = begun()
    cluster.seen.wrote(cluster.members["n2"], Persist(0, None, [command(1, 5, b"one")]))
    cluster.seen.wrote(cluster.members["n3"], Persist(0, None, [command(1, 4), command(1, 5, b"other")]))


def one_entry_after_two_predecessors() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), "n1")
    cluster.replicate(command(2, 2), "n2")
    cluster.replicate(command(3, 3), "n1", "n2")


def what_is_committed_is_replaced() -> None:
    begun().replicate(command(2, 1), "n3")


def what_is_committed_is_replaced_by_whom_nobody_follows() -> None:
    late_write(is_third_leader_heard=True)


def what_is_committed_is_cut_off() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), *NAMES)
    cluster.commit("n1", 2)
    cluster.write("n3", Entry(1, 1, int(EntryKind.NOOP), b""))


def two_commit_differently() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), *NAMES)
    cluster.commit("n1", 2)
    cluster.kernel("n2").raft.log.put(command(2, 2))
    cluster.commit("n2", 2)


def a_commit_index_that_falls() -> None:
    cluster = begun()
    cluster.commit("n1", 0)


def a_snapshot_of_what_is_not_committed() -> None:
    cluster = begun()
    cluster.write("n3", restored=SnapshotMeta(7, 1, CONFIGURATION))


def a_commit_without_a_quorum() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), "n1")
    cluster.commit("n1", 2)


def a_commit_of_an_earlier_term_by_counting() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), "n1", "n2")
    cluster.elect("n2", 2, ("n2", "n3"))
    cluster.commit("n2", 2)


def a_leader_that_lacks_what_is_committed() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), "n1", "n2")
    cluster.commit("n1", 2)
    cluster.elect("n3", 2, ("n2", "n3"))


def a_match_that_is_not_on_the_disk() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), "n1")
    cluster.kernel("n1").raft._peers.append(SimpleNamespace(match=2, node_id="n2"))
    cluster.turn("n1")


def a_command_that_is_left_out() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), *NAMES)
    cluster.commit("n1", 2)
    cluster.kernel("n1").machine.applied_index = 2
    cluster.turn("n1")


def a_command_that_is_applied_twice() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), *NAMES)
    cluster.apply("n1", command(1, 2))
    cluster.apply("n1", command(1, 2))
    cluster.turn("n1")


def something_applied_that_is_not_committed() -> None:
    cluster = begun()
    cluster.kernel("n1").machine.applied_index = 2
    cluster.turn("n1")


def a_state_that_goes_back() -> None:
    cluster = begun()
    cluster.kernel("n1").machine.applied_index = 0
    cluster.turn("n1")


def another_reply() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), *NAMES)
    cluster.apply("n1", command(1, 2), GOOD)
    cluster.apply("n2", command(1, 2), encode((0, 1)))


def other_effects() -> None:
    cluster = begun()
    cluster.replicate(command(1, 2), *NAMES)
    cluster.apply("n1", command(1, 2), GOOD)
    cluster.apply("n2", command(1, 2), GOOD, SessionEnded(1, "expired"))


def another_state_at_an_interval() -> None:
    cluster = begun()
    for index in range(2, invariants.DIGEST_EVERY + 1):
        cluster.replicate(command(1, index), *NAMES)
        for name in ("n1", "n2"):
            cluster.members[name].state = b"state of %s" % name.encode()
            cluster.apply(name, command(1, index))
            cluster.turn(name)


def another_state_from_a_snapshot() -> None:
    cluster = begun()
    for index in range(2, invariants.DIGEST_EVERY + 1):
        cluster.replicate(command(1, index), *NAMES)
        cluster.apply("n1", command(1, index))
        cluster.turn("n1")
    other = cluster.members["n3"] = Member("n3")
    other._kernel.machine.applied_index = invariants.DIGEST_EVERY
    other.state = b"something else"
    meta = SnapshotMeta(invariants.DIGEST_EVERY, 1, CONFIGURATION)
    cluster.seen.started(other, RecoveredGroup(HardState(1, "n1"), meta, []))


def another_state_at_the_end() -> None:
    cluster = begun()
    cluster.members["n2"].state = b"something else"
    cluster.seen.finish(list(cluster.members.values()))


def different_numbers_of_entries_at_the_end() -> None:
    cluster = begun()
    cluster.kernel("n2").machine.applied_index = 0
    cluster.seen.finish(list(cluster.members.values()))


def a_command_that_is_executed_twice() -> None:
    cluster = with_sessions()
    cluster.happen(commands.map_put(b"m", b"k", b"v"), 1, 2, reply=encode((0, 1)))
    cluster.happen(commands.map_put(b"m", b"k", b"v"), 1, 2, reply=encode((0, 2)))


def an_acquisition_that_is_executed_twice() -> None:
    cluster = with_sessions()
    cluster.happen(commands.release(LOCK, 1), 1, 2)
    cluster.happen(commands.release(LOCK, 1), 1, 2, effects=(LockGranted(2, 1, LOCK, 6),))


def a_command_of_a_session_that_has_ended() -> None:
    cluster = with_sessions()
    cluster.happen(commands.close_session(), 2, 1, effects=(SessionEnded(2, "closed"),))
    cluster.happen(commands.map_put(b"m", b"k", b"v"), 2, 2, reply=encode((0, 1)))


def an_answer_to_another_command() -> None:
    cluster = with_sessions()
    cluster.happen(commands.acquire(b"gate"), 2, 1, reply=encode((0, 17)))


def a_token_that_falls() -> None:
    cluster = with_sessions()
    cluster.happen(commands.acquire(b"gate"), 2, 1, reply=granted(4))


def a_token_that_is_given_again() -> None:
    cluster = with_sessions()
    cluster.happen(commands.release(LOCK, 1), 1, 2)
    cluster.happen(commands.acquire(LOCK), 2, 1, reply=granted(5))


def two_holders() -> None:
    cluster = with_sessions()
    cluster.happen(commands.acquire(LOCK), 2, 1, reply=granted(6))


def two_holders_by_a_grant_to_a_waiter() -> None:
    cluster = with_sessions()
    cluster.happen(commands.map_put(b"m", b"k", b"v"), 1, 2, effects=(LockGranted(2, 1, LOCK, 6),))


def a_holder_whose_session_has_ended() -> None:
    cluster = with_sessions()
    cluster.happen(commands.close_session(), 2, 1, effects=(SessionEnded(2, "closed"),))
    cluster.happen(commands.release(LOCK, 1), 1, 2, effects=(LockGranted(2, 1, LOCK, 6),))


def a_lock_that_is_held_after_the_decision_that_gives_it_back() -> None:
    cluster = with_sessions()
    _told_of(cluster, commands.query_lock(LOCK), [[1, 1, 5, 0, 0], []])
    body = commands.tx_decide(b"", releases=[(LOCK, 1)])
    cluster.happen(body, 1, 2, reply=encode((0, TxStatus.COMMITTED.value, "", cluster.last + 1, 0, -1)))


def a_lock_that_is_free_after_a_decision_that_was_aborted() -> None:
    cluster = with_sessions()
    _told_of(cluster, commands.query_lock(LOCK), [None, []])
    body = commands.tx_decide(b"", guards=[(LOCK, 9)], releases=[(LOCK, 1)])
    cluster.happen(body, 1, 2, reply=encode((0, TxStatus.ABORTED.value, "lock-lost", 0, 0, -1)))


def a_service_of_a_session_that_has_ended() -> None:
    cluster = with_sessions()
    _told_of(cluster, commands.query_services(), [[["desk", 2, "b", "b", 0]], False])
    cluster.happen(commands.service_register("desk", "b"), 2, 1, reply=encode((0, True)))
    cluster.happen(commands.close_session(), 2, 2, effects=(SessionEnded(2, "closed"),))


def a_service_that_nobody_finds() -> None:
    cluster = with_sessions()
    _told_of(cluster, commands.query_services(), [[], False])
    cluster.happen(commands.service_register("desk", "b"), 2, 1, reply=encode((0, True)))


def _told_of(cluster: Cluster, query: bytes, results: list[Any]) -> None:
    """All members answer this query with that."""
    for name in NAMES:
        cluster.kernel(name).machine.query = {query: encode((0, *results))}.__getitem__


def a_read_from_before() -> None:
    cluster = begun()
    _read(cluster, committed=5, answered=4)


def _read(cluster: Cluster, *, committed: int, answered: int, is_lease_trusted: bool = True) -> list[Any]:
    """What comes out of a core that was asked when `committed` was, and answers from `answered`."""
    raft: Any = RawNode.__new__(RawNode)
    asked: list[Any] = []

    def ready(_: Any) -> Any:
        return SimpleNamespace(reads=[(context, answered) for context in asked], failed_reads=[])

    cluster.seen.committed_max = committed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RawNode, "request_read", lambda _, context, *, by_quorum=False: asked.append(context))
        patch.setattr(RawNode, "ready", ready)
        with watched_reads(cluster.seen, is_lease_trusted=is_lease_trusted):
            patch.setattr(raft, "node_id", "n1", raising=False)
            patch.setattr(raft, "term", 1, raising=False)
            raft.request_read("context")
            return list(raft.ready().reads)


def a_session_that_ends_under_its_owner() -> None:
    cluster = with_sessions()
    cluster.kernel("n2").session.view.session_id = 2
    cluster.members["n2"].clock_ms = 999
    cluster.turn("n2")
    cluster.happen(commands.expire_sessions([2]), effects=(SessionEnded(2, "expired"),))


def a_process_that_never_rests() -> None:
    cluster = begun()
    for _ in range(ROUNDS_MAX + 1):
        cluster.turn("n3")


def a_wait_that_nobody_ends() -> None:
    cluster = begun()
    cluster.kernel("n2").service._waits_count = 1
    cluster.seen.finish([cluster.members["n2"]])


def an_alarm_without_a_cause() -> None:
    cluster = begun()
    cluster.members["n2"].events.append(LogEvent(logging.ERROR, "disk.behind", "it holds less", {}))
    cluster.seen.events(cluster.members["n2"], is_any_disk_spoiled=True)
    cluster.seen.events(cluster.members["n2"], is_any_disk_spoiled=False)


def identities(*identities: DiskIdentity) -> None:
    """What members write down of the cluster that forms, one after the other."""
    seen = Cluster().seen
    for identity in identities:
        member: Any = Member(identity.node_id)
        seen.identified(member, identity)


def founder(name: str, *, backs: str = "", cluster: bytes = b"") -> DiskIdentity:
    return DiskIdentity(1, name, name.encode() * 8, "shop", cluster, (), backs)


def two_clusters() -> None:
    identities(founder("n1", backs="n1"), founder("n1", cluster=b"1"), founder("n3", cluster=b"3"))


def a_candidate_that_was_none_any_more() -> None:
    identities(founder("n2"), founder("n2", backs="n2"), founder("n2", backs="n1"), founder("n2", backs="n2"))


def an_impostor_that_helps_to_form_a_cluster() -> None:
    member: Any = Member("n1")
    Impostor().identified(member, founder("n1", backs="n2"))


def an_impostor_that_writes() -> None:
    member: Any = Member("n1")
    Impostor().writing(member, Persist(0, HardState(1, "n2"), []))


def an_impostor_that_speaks() -> None:
    member: Any = Member("n1")
    Impostor().started(member, None)
    Impostor().sending(member, "n2", [(0, VoteReply(1, 1, True, False))])


def an_impostor_that_applies() -> None:
    member: Any = Member("n1")
    Impostor().turned(member, 0)
    Impostor().applied(member, Entry(1, 1, COMMAND, b""), Applied(0, 0, GOOD, ()))


def a_window_that_overlaps() -> None:
    Leases().begin().lease((1, 3, 3999, 13_999), 4001)


def a_worker_that_somebody_has() -> None:
    Leases().begin().lease((0, 3, 15_000, 25_000), 9001)


def a_window_before_its_time() -> None:
    Leases().begin().lease((1, 3, 8999, 18_999), 9001)


def a_window_before_the_floor() -> None:
    leases = Leases().begin()
    leases.skip(40_000, 9001)
    leases.lease((1, 3, 9001, 19_001), 9002)


def a_window_that_is_too_long() -> None:
    Leases().begin().lease((1, 3, 9000, 19_001), 9001)


def a_worker_that_does_not_exist() -> None:
    Leases().begin().lease((2, 3, 9000, 19_000), 9001)


def a_lease_by_another_layout() -> None:
    leases = Leases().begin()
    leases.layout = (41, 11, 1, 1, 1, 1)
    leases.lease((1, 3, 9000, 19_000), 9001)


def a_lease_with_an_old_number() -> None:
    Leases().begin().lease((1, 2, 9000, 19_000), 9001)


def a_free_worker_that_nobody_finds() -> None:
    Leases().begin().lease(NO_WORKER, 9001)


def a_renewal_of_a_lapsed_lease() -> None:
    Leases().begin().renew(0, 1, (25_000, 15_000), 15_001)


def a_renewal_of_what_was_given_back() -> None:
    Leases().begin().renew(1, 2, (14_000, 4000), 4001)


def a_renewal_after_a_skip() -> None:
    leases = Leases().begin()
    leases.skip(40_000, 6000)
    leases.renew(0, 1, (16_000, 6000), 6001)


def a_renewal_of_anothers_lease() -> None:
    Leases().begin().renew(0, 2, (16_000, 6000), 6001)


def a_renewal_by_too_much() -> None:
    Leases().begin().renew(0, 1, (16_001, 6000), 6001)


def a_renewal_that_cuts_short() -> None:
    Leases().begin().renew(0, 1, (14_999, 5000), 5001)


def a_renewal_that_is_refused_to_the_holder() -> None:
    Leases().begin().renew(0, 1, NOT_HELD, 15_000)


def a_return_that_gives_back_what_was_used() -> None:
    Leases().begin().give_back(0, 1, 6000, 5999, 6001)


def a_member_that_has_forgotten_a_lease() -> None:
    leases = Leases().begin()
    machine = leases.cluster.kernel("n1").machine
    machine.query = lambda _: encode((0, None, 2, 1, 0, 5000, 0))
    leases.cluster.seen.finish([leases.cluster.members["n1"]])


VIOLATIONS: Final[dict[str, tuple[Callable[[], None], ...]]] = {
    "election safety": (two_leaders, two_leaders_by_their_messages),
    "one vote": (two_votes, two_votes_over_a_restart),
    "term order": (a_term_that_falls, a_term_that_is_forgotten),
    "durable promise": (
        a_vote_before_its_disk,
        a_candidacy_before_its_disk,
        an_acknowledgement_before_its_disk,
        an_acknowledgement_in_a_term_that_is_not_on_the_disk,
        an_append_without_a_vote_of_its_own,
    ),
    "synced write": (a_write_that_is_not_synced,),
    "recovered log": (
        an_entry_that_is_gone,
        an_entry_that_nobody_wrote,
        a_snapshot_that_is_gone,
        a_log_that_begins_behind_what_its_snapshot_stood_for,
    ),
    "log matching": (
        two_entries_of_one_index_and_term,
        another_entry_than_one_whose_predecessor_is_not_known,
        one_entry_after_two_predecessors,
    ),
    "commit safety": (
        what_is_committed_is_replaced,
        what_is_committed_is_replaced_by_whom_nobody_follows,
        what_is_committed_is_cut_off,
        two_commit_differently,
        a_commit_index_that_falls,
        a_snapshot_of_what_is_not_committed,
    ),
    "commit quorum": (a_commit_without_a_quorum,),
    "commit term": (a_commit_of_an_earlier_term_by_counting,),
    "leader completeness": (a_leader_that_lacks_what_is_committed,),
    "match index": (a_match_that_is_not_on_the_disk,),
    "applied order": (
        a_command_that_is_left_out,
        a_command_that_is_applied_twice,
        something_applied_that_is_not_committed,
        a_state_that_goes_back,
    ),
    "same reply": (another_reply, other_effects),
    "same state": (
        another_state_at_an_interval,
        another_state_from_a_snapshot,
        another_state_at_the_end,
        different_numbers_of_entries_at_the_end,
    ),
    "exactly once": (
        a_command_that_is_executed_twice,
        an_acquisition_that_is_executed_twice,
        a_command_of_a_session_that_has_ended,
        an_answer_to_another_command,
    ),
    "fencing token": (a_token_that_falls, a_token_that_is_given_again),
    "one holder": (
        two_holders,
        two_holders_by_a_grant_to_a_waiter,
        a_holder_whose_session_has_ended,
        a_lock_that_is_held_after_the_decision_that_gives_it_back,
        a_lock_that_is_free_after_a_decision_that_was_aborted,
    ),
    "service registry": (a_service_of_a_session_that_has_ended, a_service_that_nobody_finds),
    "id window": (
        a_window_that_overlaps,
        a_worker_that_somebody_has,
        a_window_before_its_time,
        a_window_before_the_floor,
        a_window_that_is_too_long,
        a_worker_that_does_not_exist,
        a_lease_by_another_layout,
        a_lease_with_an_old_number,
        a_free_worker_that_nobody_finds,
        a_renewal_of_a_lapsed_lease,
        a_renewal_of_what_was_given_back,
        a_renewal_after_a_skip,
        a_renewal_of_anothers_lease,
        a_renewal_by_too_much,
        a_renewal_that_cuts_short,
        a_renewal_that_is_refused_to_the_holder,
        a_return_that_gives_back_what_was_used,
        a_member_that_has_forgotten_a_lease,
    ),
    "current read": (a_read_from_before,),
    "session belief": (a_session_that_ends_under_its_owner,),
    "busy loop": (a_process_that_never_rests,),
    "one cluster": (two_clusters, a_candidate_that_was_none_any_more),
    "impostor": (
        an_impostor_that_helps_to_form_a_cluster,
        an_impostor_that_writes,
        an_impostor_that_speaks,
        an_impostor_that_applies,
    ),
    "false alarm": (an_alarm_without_a_cause,),
    "left behind": (a_wait_that_nobody_ends,),
}


def test_the_table_names_what_is_checked_and_nothing_else() -> None:
    """Each row of the module's table has a violation here; and no check goes by a name that the table does not have."""
    rows = re.findall(r"^([a-z]+(?: [a-z]+)*)  +\S", invariants.__doc__ or "", re.MULTILINE)
    elsewhere = set(LIES.values())  # see test_decisions
    assert sorted(rows) == sorted([*VIOLATIONS, *elsewhere])
    modules = (decisions, invariants, model)
    source = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    assert set(re.findall(r'Violation\(\s*"([a-z ]+)"', source)) == set(VIOLATIONS) | elsewhere


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        pytest.param(check, wrong, id=f"{check}: {wrong.__name__.replace('_', ' ')}")
        for check, all_wrong in VIOLATIONS.items()
        for wrong in all_wrong
    ],
)
def test_a_violation_is_noticed_by_its_name(check: str, wrong: Callable[[], None]) -> None:
    """By the first of the checks that can see it, which is the one that says what is wrong."""
    with pytest.raises(Violation) as caught:
        wrong()
    assert caught.value.check == check, caught.value


def test_an_owner_that_has_given_up_may_lose_its_session() -> None:
    """At the moment at which its promise ends, it does not count on it any more."""
    cluster = with_sessions()
    cluster.kernel("n2").session.view.session_id = 2
    cluster.members["n2"].clock_ms = 1000
    cluster.turn("n2")
    cluster.happen(commands.expire_sessions([2]), effects=(SessionEnded(2, "expired"),))
    assert cluster.marks.counts["session_expired"] == 1


def test_a_read_may_know_more_than_it_must_and_keeps_its_context() -> None:
    """Nothing of the watching is left in what production gets back; and a lease that nobody trusts may be late."""
    assert _read(begun(), committed=5, answered=5) == [("context", 5)]
    assert _read(begun(), committed=5, answered=4, is_lease_trusted=False) == [("context", 4)]


def test_a_damaged_disk_may_have_forgotten() -> None:
    """Less is expected of it, and a leader may believe for a while what it had."""
    cluster = begun()
    cluster.kernel("n1").raft._peers.append(SimpleNamespace(match=1, node_id="n2"))
    cluster.members["n2"] = Member("n2")
    cluster.seen.started(cluster.members["n2"], None, is_damaged=True)
    cluster.turn("n1")


def test_what_was_being_written_may_be_there_or_not() -> None:
    """After a crash within a write, either is what a disk may hold; and that is a mark each."""
    for is_kept in (True, False):
        cluster = begun()
        entries = list(cluster.kernel("n2").raft.log.entries)
        cluster.seen.writing(cluster.members["n2"], Persist(0, None, [command(1, 2)]))
        cluster.restart("n2", HardState(1, "n1"), *entries, *([command(1, 2)] if is_kept else []))
        assert cluster.marks.counts["restart_kept_unsynced" if is_kept else "restart_lost_unsynced"] == 1


def test_marks_that_never_occurred_are_missing() -> None:
    """Of those that are required; a mark that nobody asked for is only counted."""
    counted = Marks(("b", "a", "c"))
    for name in ("c", "more", "c"):
        counted.hit(name)
    assert counted.missing() == ["a", "b"]
    assert counted.counts == {"c": 2, "more": 1}
    assert Marks().missing() == sorted(marks.SOMETIMES)
