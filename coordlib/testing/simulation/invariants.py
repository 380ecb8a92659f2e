"""What must hold in every cluster at every moment, checked from outside, after every event.

The core checks itself with `invariant()`. Nothing here trusts it: what is on a disk is known from what the storage
said it had written, and that it was synced from the disk itself; what was promised, from the messages that left; what
was applied, from the replies. A defect in the core that also blinds its own checks is still seen.

Checked here, by the names in `Violation.check`:

====================  ==============================================================================================
election safety       at most one leader a term, for ever (Raft figure 3)
one vote              one vote for each member and term over its whole life, restarts included
term order            a member's term never falls, and no restart takes it below what its disk was told
durable promise       a vote, an acknowledgement or a candidacy leaves only when what it promises is on the disk
synced write          what the storage calls durable leaves nothing un-synced in the log's files
recovered log         after a restart all is there that was durable, and nothing that nobody wrote
log matching          the same term and index mean the same entry and the same predecessor, on every disk
commit safety         nothing committed is overwritten, truncated or committed differently; commits never fall
commit quorum         when an entry is first committed, the disks of a quorum hold it
commit term           a leader commits by counting only entries of its own term (Raft figure 8)
leader completeness   who is elected has all that was committed before its term
match index           what a leader believes of a follower's log is on that follower's disk
applied order         every member applies every committed command once, in order, without a gap
same reply            ... with the same reply and the same effects as all others
same state            ... and the same state, compared at intervals and after every snapshot and restart
exactly once          a session's command is executed once; repeated, it gets the first answer or none
fencing token         tokens rise over all grants of all locks, for ever
one holder            a lock is granted to one acquisition of a living session at a time
service registry      services are hosted by living sessions that say so, and all of those are named
id window             windows of id time of one worker are disjoint; a worker is one lease's at a time, and none leaks
one outcome           a transaction has the outcome that the first decision gave it, in every answer and on every member
decision              it is committed if and only if its time, its guards and its conditions allow it
pending branch        of a committed one those branches are pending that have not been forgotten, of others none
horizon               an outcome is forgotten only when it may be, and nothing is remembered again
current read          what a leader answers a query from has all that was committed when it took the query up
session belief        when the cluster ends a session for its silence, its owner has already stopped to count on it
busy loop             no process runs more often than a bound allows
one cluster           all members are part of the same one; who has let another form it never forms one itself
impostor              a member on a wiped disk, or on another's, neither votes nor acknowledges nor applies
false alarm           nobody is told of a damaged, wiped or swapped disk while no disk was
left behind           when all is quiet, no member keeps a request, a read, a wait or a transfer
====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from unittest.mock import patch

from coordlib.machine.effects import Applied
from coordlib.machine.limits import Limits
from coordlib.raft import RawNode, Ready
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    RequestVote,
    VoteReply,
)
from coordlib.storage.base import DiskIdentity, Persist, RecoveredGroup
from coordlib.testing.simulation.decisions import Decisions
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.model import LogModel, Violation

if TYPE_CHECKING:
    from coordlib.testing.simulation.processes import MemberProcess, SimulatedProcess

__all__ = ["Impostor", "Invariants", "Violation", "watched_reads"]

ALARMS: Final = frozenset(
    {"disk.behind", "disk.differs", "members.differ", "cluster.differs", "snapshot.unreadable"}
)
FILES_OPEN_MAX: Final = 8

LOOK_EVERY: Final = 16
DIGEST_EVERY: Final = 128
"""States are compared at every so many applied entries; comparing takes as long as writing a snapshot."""

ROUNDS_MAX: Final = 8000
ROUNDS_WITHIN_MS: Final = 10_000
"""A timer that fires every millisecond for ever is already more than this."""

_COMMAND: Final = int(EntryKind.COMMAND)
_SKIPPED: Final = b"not a command"


class _Committed(NamedTuple):
    term: int
    kind: int
    data: bytes
    seen_term: int  # of whom it was first seen committed by: committed in this term or before


class _Outcome(NamedTuple):
    """Of applying one command, as the first member saw it."""

    reply: bytes
    effects: tuple[Any, ...]


class _Disk:
    """What a member's disk holds, by what its storage said it had made durable."""

    __slots__ = ("attempt", "base", "forgotten", "hard_state", "last", "terms")

    def __init__(self) -> None:
        self.hard_state = HardState(0, "")
        self.forgotten = (
            0  # it had been told up to here before a fault damaged it; a leader may believe so still
        )
        self.base = 0  # a snapshot stands for everything up to here
        self.terms: dict[int, int] = {}  # index -> term
        self.last = 0
        self.attempt: Persist | None = None  # being written: after a crash it may be there, or parts of it

    def holds(self, index: int, term: int) -> bool:
        return index <= self.base or self.terms.get(index) == term

    def take(self, batch: Persist) -> None:
        if batch.restored is not None:
            self.base = self.last = batch.restored.index
            self.terms = {self.base: batch.restored.term}
        if batch.hard_state is not None:
            self.hard_state = batch.hard_state
        if batch.entries:
            terms = self.terms
            for index in range(batch.entries[0].index, self.last + 1):
                terms.pop(index, None)
            for entry in batch.entries:
                terms[entry.index] = entry.term
            self.last = batch.entries[-1].index


class _Life:
    """What was seen of one process from its start to its end."""

    __slots__ = ("applied", "commands", "commit", "must_compare", "rounds", "term", "was_leader", "window")

    def __init__(self, term: int, index: int) -> None:
        self.term = term
        self.commit = index
        self.applied = index
        self.commands: list[int] = []  # indexes of commands applied since `applied`
        self.was_leader = False
        self.window = -1
        self.must_compare = False  # it has just taken over a snapshot
        self.rounds = 0


class Invariants:
    """
    The observer of a world. Every method raises `Violation` when a promise is broken.

    Args:
        members: The names of all voters.
        marks: Where to note what was reached.
        are_clocks_bounded: No two clocks differ in rate by more than the cluster was told, so that sessions must keep
            what their owners count on.
        limits: The replicated ones.
    """

    def __init__(
        self,
        members: Sequence[str],
        marks: Marks,
        *,
        are_clocks_bounded: bool = False,
        limits: Limits = Limits(),  # noqa: B008  # immutable
    ) -> None:
        self._marks = marks
        self._are_clocks_bounded = are_clocks_bounded
        self._processes: dict[str, SimulatedProcess] = {}
        self._quorum = len(members) // 2 + 1
        self._disks = {name: _Disk() for name in members}
        self._lives: dict[str, _Life] = {}
        self._votes: dict[tuple[str, int], str] = {}
        self.leaders: dict[int, str] = {}
        self._entries: dict[tuple[int, int], tuple[int, int, bytes]] = {}  # -> predecessor's term, kind, data
        self.committed: dict[int, _Committed] = {}
        self.committed_max = 0
        self._outcomes: dict[int, _Outcome] = {}
        self._digests: dict[int, bytes] = {}
        self._cluster_uuid = b""
        self._gave_up: set[bytes] = set()  # disks whose members form no cluster themselves any more
        self._model = LogModel(marks)
        self.decisions = Decisions(marks, limits)

    # -- on the disk ---------------------------------------------------------------------------------------

    def started(
        self, process: MemberProcess, recovered: RecoveredGroup | None, *, is_damaged: bool = False
    ) -> None:
        """
        A member began on its disk.

        Args:
            is_damaged: The disk lost or changed by a fault what had been durable, so that less is expected of it.
        """
        name = process.name
        disk = self._disks[name]
        group = recovered or RecoveredGroup(HardState(0, ""), None, [])
        snapshot = group.snapshot
        base = snapshot.index if snapshot is not None else 0
        if not is_damaged:
            self._check_recovered(name, disk, group, base)
        # Another start on the same poor disk brings nothing back: that ends when the disk has all of it again.
        forgotten = disk.forgotten if disk.last < disk.forgotten else 0
        if is_damaged:
            forgotten = max(disk.last, disk.forgotten)
        self._disks[name] = disk = _Disk()
        disk.forgotten = forgotten
        disk.hard_state = group.hard_state
        disk.base = disk.last = base
        if snapshot is not None:
            disk.terms[base] = snapshot.term
            self._marks.hit("snapshot_recovered")
        for entry in group.entries:
            disk.terms[entry.index] = entry.term
            disk.last = max(disk.last, entry.index)
        self._note_entries(name, group.entries)
        self._lives[name] = _Life(group.hard_state.term, base)
        if base:
            self._compare_state(process)

    def identified(self, process: MemberProcess, identity: DiskIdentity) -> None:
        """A member wrote down, or found on its disk, whom it lets form the cluster, or which one it belongs to."""
        name, uuid = process.name, identity.cluster_uuid
        if uuid:
            self._cluster_uuid = self._cluster_uuid or uuid
            if uuid != self._cluster_uuid:
                raise Violation(
                    "one cluster", f"{name} is part of {uuid.hex()}, others of {self._cluster_uuid.hex()}"
                )
        elif identity.backs not in ("", name):
            self._gave_up.add(identity.disk_id)
        elif identity.backs and identity.disk_id in self._gave_up:
            raise Violation("one cluster", f"{name} would form one, and had left it to another")

    def is_behind(self, name: str) -> bool:
        """Whether a fault has taken from the member's disk what it had acknowledged, and it has not got all of it again."""
        disk = self._disks[name]
        return disk.last < disk.forgotten

    def _check_recovered(self, name: str, disk: _Disk, group: RecoveredGroup, base: int) -> None:
        attempt = disk.attempt
        known, found = disk.hard_state, group.hard_state
        attempted = attempt.hard_state if attempt is not None else None
        if found not in (known, attempted):
            raise Violation(
                "term order", f"{name} was told {known} (or {attempted}) and came back with {found}"
            )
        if base < disk.base and base + 1 < (group.entries[0].index if group.entries else disk.base + 1):
            raise Violation(
                "recovered log", f"{name} had a snapshot at {disk.base} and came back with one at {base}"
            )
        terms = {entry.index: entry.term for entry in group.entries}
        replaced_from = disk.last + 1
        others: dict[int, int] = {}
        if attempt is not None:
            others = {entry.index: entry.term for entry in attempt.entries}
            if attempt.restored is not None:
                replaced_from = 0
            elif attempt.entries:
                replaced_from = attempt.entries[0].index
        for index, term in disk.terms.items():
            if base < index < replaced_from and terms.get(index) != term:
                raise Violation(
                    "recovered log",
                    f"{name} had made entry {index} of term {term} durable and came back with {terms.get(index)}",
                )
        for index, term in terms.items():
            if index > base and disk.terms.get(index) != term and others.get(index) != term:
                raise Violation(
                    "recovered log", f"{name} came back with entry {index} of term {term}, never written"
                )
        if attempt is not None:
            is_kept = any(terms.get(index) == term for index, term in others.items()) or found == attempted
            self._marks.hit("restart_kept_unsynced" if is_kept else "restart_lost_unsynced")

    def writing(self, process: MemberProcess, batch: Persist) -> None:
        """The storage is about to make this durable."""
        disk = self._disks[process.name]
        disk.attempt = batch
        entries = batch.entries
        committed = self.committed
        if not entries:
            return
        first = entries[0].index
        if disk.last >= first and batch.restored is None:
            terms = {disk.terms[index] for index in range(first, disk.last + 1) if index in disk.terms}
            self._marks.hit("truncated_conflict")
            if len(terms) > 1:
                self._marks.hit("truncated_two_terms")
        kept = {entry.index: entry for entry in entries}
        accepted_in = self._accepted_in(disk, entries)
        for index in range(first, disk.last + 1):
            known = committed.get(index)
            if known is None or disk.terms.get(index) != known.term:
                continue  # a deposed leader may well have something else where the others go on
            entry = kept.get(index)
            if 0 <= accepted_in < known.seen_term:
                continue
            if entry is None or entry.term != known.term:
                raise Violation(
                    "commit safety",
                    f"{process.name} writes from {first} on and loses entry {index} of term {known.term}, "
                    "which is committed",
                )

    @staticmethod
    def _accepted_in(disk: _Disk, entries: Sequence[Entry]) -> int:
        """
        The term of the leader for whose entries others are replaced, if no later one has been heard durably; else none (-1).

        On a slow disk that may be written after a later leader has committed what it replaces. That one has not counted on this
        disk: nothing is acknowledged in a term that is not durable.
        """
        for entry in entries:
            replaced = disk.terms.get(entry.index)
            if replaced is not None and replaced != entry.term:
                return entry.term if replaced < entry.term >= disk.hard_state.term else -1
        return -1

    def wrote(self, process: MemberProcess, batch: Persist) -> None:
        """The storage said that this is durable."""
        name = process.name
        for path, change in process.fs.pending():
            # Zeros are written ahead of the log, and nothing is lost with them.
            if path.endswith(".log") and (change.data is None or change.data.strip(b"\0")):
                raise Violation("synced write", f"{name} calls a write durable and has not synced {path}")
        disk = self._disks[name]
        disk.attempt = None
        disk.take(batch)
        self._note_entries(name, batch.entries)
        if batch.restored is not None:
            self._marks.hit("snapshot_installed")
            index = batch.restored.index
            life = self._lives[name]
            life.applied = index
            life.commands.clear()
            known = self.committed.get(index)
            if known is None or known.term != batch.restored.term:
                raise Violation(
                    "commit safety", f"{name} installs a snapshot at {index}, which is not committed"
                )
            life.commit = max(life.commit, index)
            life.must_compare = True

    def snapshotting(self, process: MemberProcess, index: int) -> None:
        """A snapshot is begun: if it is of the member's own state, that is what whoever takes it over must have."""
        if process._kernel.machine.applied_index == index:
            self._compare_state(process)

    def _note_entries(self, name: str, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        known = self._entries
        terms = self._disks[name].terms
        before = terms.get(entries[0].index - 1, -1)  # -1: under a snapshot, not known
        for term, index, kind, data in entries:
            key = (index, term)
            found = known.get(key)
            if found is None or (found[0] < 0 and before >= 0):
                if found is not None and (found[1] != kind or found[2] != data):
                    raise Violation("log matching", f"{name} has another entry {index} of term {term}")
                known[key] = (before, kind, data)
            elif found[2] != data or found[1] != kind:
                raise Violation(
                    "log matching", f"{name} has another entry {index} of term {term} than it had elsewhere"
                )
            elif before >= 0 and found[0] != before:
                raise Violation(
                    "log matching",
                    f"{name} has entry {index} of term {term} after one of term {before}, elsewhere {found[0]}",
                )
            before = term

    # -- on the wire ---------------------------------------------------------------------------------------

    def sending(self, process: SimulatedProcess, receiver: str, messages: Sequence[tuple[int, Any]]) -> None:
        """Messages leave for another member."""
        for _, message in messages:
            check = _PROMISES.get(type(message))
            if check is not None:
                check(self, process.name, receiver, message)

    def _check_append(self, name: str, _receiver: str, message: AppendEntries | Heartbeat) -> None:
        leader = self.leaders.setdefault(message.term, name)
        if leader != name:
            raise Violation("election safety", f"{name} and {leader} both lead term {message.term}")
        if self._disks[name].hard_state != (message.term, name):
            raise Violation(
                "durable promise", f"{name} leads term {message.term} without having its own vote on the disk"
            )

    def _check_append_reply(self, name: str, _receiver: str, message: AppendReply) -> None:
        if not message.is_success:
            return
        disk = self._disks[name]
        if not disk.holds(message.match_index, message.match_term) and message.match_index:
            raise Violation(
                "durable promise",
                f"{name} acknowledges entry {message.match_index} of term {message.match_term}, and its disk has "
                f"{disk.terms.get(message.match_index)}",
            )
        if disk.hard_state.term < message.term:
            raise Violation(
                "durable promise", f"{name} answers in term {message.term}, its disk knows {disk.hard_state}"
            )

    def _check_vote_request(self, name: str, _receiver: str, message: RequestVote) -> None:
        if message.is_pre_vote:
            return
        self._vote(name, message.term, name)

    def _check_vote_reply(self, name: str, receiver: str, message: VoteReply) -> None:
        if message.is_granted and not message.is_pre_vote:
            self._vote(name, message.request_term, receiver)

    def _vote(self, name: str, term: int, candidate: str) -> None:
        before = self._votes.setdefault((name, term), candidate)
        if before != candidate:
            raise Violation(
                "one vote", f"{name} votes for {candidate} in term {term}, and had voted for {before}"
            )
        known = self._disks[name].hard_state
        if known.term < term or (known.term == term and known.vote != candidate):
            raise Violation(
                "durable promise",
                f"{name} gives its vote to {candidate} in term {term}, and its disk knows {known}",
            )

    # -- in memory -----------------------------------------------------------------------------------------

    def turned(self, process: SimulatedProcess, now_ms: int) -> None:
        """A process went round once, to its end or to its crash."""
        name = process.name
        self._processes[name] = process
        life = self._lives.get(name)
        if life is None:
            return
        window = now_ms // ROUNDS_WITHIN_MS
        if window != life.window:
            life.window, life.rounds = window, 0
        life.rounds += 1
        if life.rounds > ROUNDS_MAX:
            raise Violation("busy loop", f"{name} ran {life.rounds} rounds within {ROUNDS_WITHIN_MS} ms")
        kernel = process._kernel
        raft = kernel.raft
        if raft is None:
            return
        term = raft.term
        if term != life.term:
            if term < life.term:
                raise Violation("term order", f"{name} goes from term {life.term} back to {term}")
            life.term = term
            if life.was_leader:
                life.was_leader = False
                self._marks.hit("leader_deposed")
        if raft.is_leader:
            if not life.was_leader:
                life.was_leader = True
                self._elected(process)
            disks, term_at = self._disks, raft.log.term_at
            for peer in raft._peers:
                match, disk = peer.match, disks[peer.node_id]
                # A follower of a later term may have replaced what a deposed leader still counts on.
                if match <= disk.forgotten or match <= disk.base or disk.hard_state[0] > term:
                    continue
                held, expected = disk.terms.get(match), term_at(match)
                if held is None or (held != expected and expected >= 0):  # below 0: compacted here
                    raise Violation(
                        "match index",
                        f"{name} believes that {peer.node_id} has entry {match} of term {expected}, "
                        f"its disk has {held}",
                    )
        elif life.was_leader:
            life.was_leader = False
            self._marks.hit("leader_deposed")
        commit = raft.commit_index
        if commit != life.commit:
            self._committed_to(process, life, commit)
        if life.must_compare:
            life.must_compare = False
            self._compare_state(cast("MemberProcess", process))  # only members have lives
        applied = kernel.machine.applied_index
        if applied != life.applied:
            self._applied_to(name, life, applied)

    def _elected(self, process: SimulatedProcess) -> None:
        raft = process._kernel.raft
        name, term, log = process.name, raft.term, raft.log
        leader = self.leaders.setdefault(term, name)
        if leader != name:
            raise Violation("election safety", f"{name} and {leader} both lead term {term}")
        if any(later > term for later in self.leaders):
            self._marks.hit("late_leader")
        for index in range(log.start_index + 1, self.committed_max + 1):
            known = self.committed.get(index)
            if known is not None and known.seen_term < term and log.term_at(index) != known.term:
                raise Violation(
                    "leader completeness",
                    f"{name} leads term {term} with {log.term_at(index)} at {index}, where an entry of term {known.term} "
                    f"was committed by term {known.seen_term}",
                )

    def _committed_to(self, process: SimulatedProcess, life: _Life, commit: int) -> None:
        name, raft = process.name, process._kernel.raft
        if commit < life.commit:
            raise Violation("commit safety", f"{name}'s commit index falls from {life.commit} to {commit}")
        log = raft.log
        before = max(life.commit, log.start_index)
        is_first = False
        terms = self._disks[name].terms
        for index in range(life.commit + 1, before + 1):
            # Committed and compacted in one round. Commands were seen when they were applied; a no-op was not.
            term = terms.get(index)
            if term is not None and index not in self.committed:
                _, kind, data = self._entries[(index, term)]
                is_first |= self._note_committed(name, raft.term, Entry(term, index, kind, data))
        for entry in log.slice(before, commit):
            is_first |= self._note_committed(name, raft.term, entry)
        if is_first and raft.is_leader:
            if log.term_at(commit) != raft.term:
                raise Violation(
                    "commit term",
                    f"{name} in term {raft.term} commits up to {commit}, which is of term {log.term_at(commit)}",
                )
            if log.term_at(before + 1) not in (raft.term, -1):
                self._marks.hit("committed_earlier_term")
        life.commit = commit

    def _note_committed(self, name: str, term: int, entry: Entry) -> bool:
        """Whether nobody was seen to have committed it before."""
        index = entry.index
        known = self.committed.get(index)
        if known is not None:
            if known.term != entry.term or known.data != entry.data:
                raise Violation(
                    "commit safety",
                    f"{name} commits entry {index} of term {entry.term}, committed elsewhere with term {known.term}",
                )
            return False
        self._check_quorum(name, index, entry.term)
        self.committed[index] = _Committed(entry.term, entry.kind, entry.data, term)
        self.committed_max = max(self.committed_max, index)
        return True

    def _check_quorum(self, name: str, index: int, term: int) -> None:
        holders = [member for member, disk in self._disks.items() if disk.holds(index, term)]
        if len(holders) < self._quorum:
            raise Violation(
                "commit quorum",
                f"{name} commits entry {index} of term {term}, which only the disks of {holders} hold",
            )

    # -- in the machine ------------------------------------------------------------------------------------

    def applied(self, process: MemberProcess, entry: Entry, applied: Applied) -> None:
        """A member applied a command."""
        index = entry.index
        name = process.name
        self._lives[name].commands.append(index)
        # Here already, because it may be compacted at the end of the round.
        self._note_committed(name, process._kernel.raft.term, entry)
        outcome = self._outcomes.get(index)
        if outcome is None:
            self._outcomes[index] = _Outcome(applied.reply, applied.effects)
            self.decisions.apply(entry, applied, self._model.holders)
            expired = self._model.apply(entry, applied)
            self._model.check_decided(process._kernel.machine)
            self._model.check_services(process._kernel.machine)
            if expired and self._are_clocks_bounded:
                self._check_beliefs(index, expired)
        elif outcome.reply != applied.reply or outcome.effects != applied.effects:
            raise Violation(
                "same reply",
                f"{name} applied entry {index} with {applied.reply!r} {applied.effects}, another with {outcome}",
            )
        if index % LOOK_EVERY == 0:
            self.decisions.look(process)
        if index % DIGEST_EVERY == 0:
            self._compare_state(process)

    def _check_beliefs(self, index: int, expired: set[int]) -> None:
        """Nobody looks at another's clock: only here, both are seen at one moment."""
        for process in self._processes.values():
            if not process.is_up:
                continue
            view, clock = process._kernel.session.view, process.clock()
            if view.session_id in expired and view.is_valid(clock):
                raise Violation(
                    "session belief",
                    f"entry {index} ends session {view.session_id} of {process.name}, which counts on it for another "
                    f"{view.valid_until_ms - clock} ms",
                )

    def _compare_state(self, process: MemberProcess) -> None:
        machine = process._kernel.machine
        index, digest = machine.applied_index, machine.digest()
        if self._digests.setdefault(index, digest) != digest:
            raise Violation(
                "same state", f"{process.name} has another state at index {index} than another member had"
            )

    def _applied_to(self, name: str, life: _Life, applied: int) -> None:
        if applied < life.applied:
            raise Violation(
                "applied order", f"{name}'s state goes from entry {life.applied} back to {applied}"
            )
        if applied > life.commit:
            raise Violation("applied order", f"{name} applied entry {applied}, committed is {life.commit}")
        committed = self.committed
        due = [
            index
            for index in range(life.applied + 1, applied + 1)
            if (known := committed.get(index)) is not None and known.kind == _COMMAND
        ]
        if due != life.commands:
            raise Violation(
                "applied order",
                f"{name} went from {life.applied} to {applied} with {life.commands} instead of {due}",
            )
        life.applied = applied
        life.commands = []

    def finish(self, processes: Sequence[MemberProcess]) -> None:
        """Everything is healed and quiet: the members' states are one and the same, and nothing is left to do."""
        applied = {process.name: process._kernel.machine.applied_index for process in processes}
        if len(set(applied.values())) > 1:
            raise Violation("same state", f"the members applied different numbers of entries: {applied}")
        for process in processes:
            self._compare_state(process)
            process._kernel.machine.check_invariants()
            self._model.windows.check(process.name, process._kernel.machine)
            self.decisions.check(process.name, process._kernel.machine)
            self._check_leftovers(process)

    @staticmethod
    def _check_leftovers(process: MemberProcess) -> None:
        kernel = process._kernel
        service = kernel.service
        assert service is not None
        left = {
            "proposed": len(service._proposed) + len(service._by_key) + len(service._pending_of),
            "proposed bytes": service._pending_bytes,
            "held": len(service._held),
            # Keep-alives go on: one of each session may be on its way.
            "reads": max(0, len(service._reads) + service._reads_asked - len(kernel.machine.sessions)),
            "waits": len(service._waits) + service._waits_count,
            "keep-alives": sum(map(len, service._expiring.values())),
            "snapshots on the way": len(kernel._senders.followers) if kernel._senders is not None else 0,
            "files open": max(0, process.fs.open_files - FILES_OPEN_MAX),
        }
        if any(left.values()):
            raise Violation(
                "left behind", f"{process.name} still has { ({k: v for k, v in left.items() if v}) }"
            )

    @staticmethod
    def events(process: SimulatedProcess, *, is_any_disk_spoiled: bool) -> None:
        """What a process has logged over its life."""
        if is_any_disk_spoiled:
            return
        for event in process.events:
            if event.name in ALARMS:
                raise Violation("false alarm", f"{process.name} says: {event.message}")


class _Asked(NamedTuple):
    context: object
    floor: int


@contextmanager
def watched_reads(invariants: Invariants, *, is_lease_trusted: bool) -> Iterator[None]:
    """
    Note with every read that a core is asked for what was committed by then, whoever had committed it.

    Exact: a quorum of this term confirms nothing once a later leader has committed something, and what was committed
    in this term or before, its leader knows.

    Args:
        is_lease_trusted: Clocks are bounded; if not, a lease may be wrong about who leads.
    """
    request, take = RawNode.request_read, RawNode.ready

    def request_read(raft: RawNode, context: object, *, by_quorum: bool = False) -> None:
        floor = invariants.committed_max if by_quorum or is_lease_trusted else 0
        request(raft, _Asked(context, floor), by_quorum=by_quorum)

    def ready(raft: RawNode) -> Ready:
        taken = take(raft)
        for asked, index in cast("list[tuple[_Asked, int]]", taken.reads):
            if index < asked.floor:
                raise Violation(
                    "current read",
                    f"{raft.node_id} in term {raft.term} answers a read from entry {index}; {asked.floor} was committed "
                    "before it was asked",
                )
        if taken.reads:
            taken.reads = [(cast(_Asked, asked).context, index) for asked, index in taken.reads]
        if taken.failed_reads:
            taken.failed_reads = [cast(_Asked, asked).context for asked in taken.failed_reads]
        return taken

    with patch.object(RawNode, "request_read", request_read), patch.object(RawNode, "ready", ready):
        yield


class Impostor(Invariants):
    """Watches a member that runs on an empty disk or on another member's: nothing that it says may count."""

    def __init__(self) -> None:
        super().__init__((), Marks())

    def started(
        self, process: MemberProcess, recovered: RecoveredGroup | None, *, is_damaged: bool = False
    ) -> None:
        """That it starts is no harm: it has to hear from the others who it is not."""

    def identified(self, process: MemberProcess, identity: DiskIdentity) -> None:
        raise Violation(
            "impostor", f"{process.name} takes part in forming a cluster on a disk that is not its own"
        )

    def writing(self, process: MemberProcess, batch: Persist) -> None:
        raise Violation("impostor", f"{process.name} keeps a log on a disk that is not its own")

    def sending(self, process: SimulatedProcess, receiver: str, messages: Sequence[tuple[int, Any]]) -> None:
        for _, message in messages:
            if type(message) in _PROMISES:
                raise Violation(
                    "impostor", f"{process.name} says {message} to {receiver}, on a disk that is not its own"
                )

    def turned(self, process: SimulatedProcess, now_ms: int) -> None:
        """What matters is written, said or applied."""

    def applied(self, process: MemberProcess, entry: Entry, applied: Applied) -> None:
        raise Violation(
            "impostor", f"{process.name} applies entry {entry.index} on a disk that is not its own"
        )


_PROMISES: Final[dict[type, Any]] = {
    AppendEntries: Invariants._check_append,
    Heartbeat: Invariants._check_append,
    AppendReply: Invariants._check_append_reply,
    RequestVote: Invariants._check_vote_request,
    VoteReply: Invariants._check_vote_reply,
}
