"""What a handle does for transactions behind the scenes: what has obeyed is forgotten, whoever was to say so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

import coordlib
from coordlib.api.coordinator import FINISHERS, HELPERS
from coordlib.errors import NoQuorum, StorageFailed
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import FOREVER_MS, Do, OpGen, Step
from coordlib.txn.branches import Finish, PreparedBranch
from coordlib.txn.commit import Unfinished
from coordlib.txn.gtid import BranchName, join_gtid, node_tag, resource_tag, session_of
from coordlib.txn.journal import Handler, JournalResource, MemoryJournal, Record, SqliteJournal
from coordlib.txn.members import Ending, Member
from coordlib.wire.messages import RequestKind

LEFT = HELPERS + FINISHERS
GONE = 1 << 40  # no session has this number


def ask(cluster: coordlib.Cluster, kind: int, body: bytes) -> Any:
    def operation() -> OpGen[Any]:
        return commands.decode_reply((yield Step(kind, body, monotonic_ms() + 5000)))

    return cluster._run(operation())


class Store:
    """Holds nothing prepared; what it is told to finish had ended as `finish_as` says."""

    def __init__(self, name: str, finish_as: Finish = Finish.ALREADY) -> None:
        self.name = name
        self.tag = resource_tag(name)
        self.finish_as = finish_as
        self.told: list[tuple[bytes, bytes, bool]] = []

    def prepared(self) -> list[PreparedBranch]:
        return []

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        self.told.append((branch.gtid, branch.bqual, commit))
        return self.finish_as


class Log:
    """Decisions whose initiator died right after them."""

    def __init__(self, cluster: coordlib.Cluster) -> None:
        self.cluster = cluster
        (self.now_ms,) = ask(cluster, RequestKind.QUERY, commands.query_time())
        self._number = 0

    def commit(self, *participants: tuple[str, bytes]) -> bytes:
        self._number += 1
        gtid = join_gtid(self.now_ms, GONE, self._number)
        body = commands.tx_decide(gtid, participants=[(name, "n", bqual) for name, bqual in participants])
        assert ask(self.cluster, RequestKind.COMMAND, body)[0] == TxStatus.COMMITTED
        return gtid

    def pending(self, gtid: bytes) -> list[bytes]:
        state = ask(self.cluster, RequestKind.QUERY, commands.query_tx_state(gtid))
        return [bqual for _, _, bqual in state[5]]

    def sweep(self, resource: Store) -> None:
        """As the agent does, twice: what is pending for the first time is left alone."""
        coordinator = self.cluster._coordinator
        coordinator._thread = threading.current_thread()  # by this test alone
        coordinator.resources[resource.name] = resource
        coordinator.sweep()
        assert resource.told == []
        coordinator.sweep()
        self.flush()

    def flush(self) -> None:
        """Until nothing is left to be forgotten."""
        coordinator = self.cluster._coordinator
        while coordinator._forgotten or coordinator._is_forgetting:
            coordinator.flush()
            self.cluster.map("m").put("k", 1)


def bqual(name: str, number: int) -> bytes:
    return BranchName(resource_tag(name), node_tag("n"), number).pack()


@pytest.fixture
def log() -> Iterator[Log]:
    with coordlib.local() as cluster:
        yield Log(cluster)


def test_a_branch_that_has_obeyed_is_forgotten_though_its_initiator_died(log: Log) -> None:
    """Else what is pending would only grow, and in the end no transaction be possible any more."""
    first, other = bqual("orders", 1), bqual("stock", 2)
    gtid = log.commit(("orders", first), ("stock", other))
    orders = Store("orders")
    log.sweep(orders)
    assert orders.told == [(gtid, first, True)]
    assert log.pending(gtid) == [other]  # of a resource that nobody here has


def test_a_journal_that_was_opened_again_speaks_for_its_own_branches_alone(log: Log, tmp_path: Path) -> None:
    """Whoever had it open when they were promised; that another replica's is not prepared here says nothing of it."""
    mine, others = SqliteJournal(tmp_path / "a.db"), SqliteJournal(tmp_path / "b.db")
    bquals = [
        BranchName(resource_tag("service:s"), node_tag("n"), number, evidence=journal.id).pack()
        for number, journal in enumerate((mine, others), 1)
    ]
    gtid = log.commit(*[("service:s", name) for name in bquals])
    resource = JournalResource("s", mine, cast(Handler, None))  # nothing is left for the handler to do
    coordinator = log.cluster._coordinator
    coordinator._thread = threading.current_thread()
    coordinator.resources[resource.name] = resource
    coordinator.sweep()
    coordinator.sweep()
    log.flush()
    assert log.pending(gtid) == bquals[1:]
    mine.close()
    others.close()


def test_one_that_was_ended_otherwise_is_put_on_record(log: Log) -> None:
    """It is no longer pending, and people are told."""
    gtid = log.commit(("orders", bqual("orders", 1)))
    log.sweep(Store("orders", Finish.HEURISTIC_ROLLBACK))
    assert log.pending(gtid) == []
    state = ask(log.cluster, RequestKind.QUERY, commands.query_tx_state(gtid))
    assert [outcome for _, outcome, _, _ in state[6]] == ["heuristic-rollback"]


def test_what_has_obeyed_is_forgotten_many_at_once(log: Log) -> None:
    """A full batch is sent at once, less than that when it is time: two entries for six hundred branches."""
    decided = [log.commit(("orders", bqual("orders", 1))) for _ in range(600)]
    coordinator = log.cluster._coordinator
    coordinator._thread = threading.current_thread()  # no agent of its own
    coordinator._forget_at = FOREVER_MS
    for gtid in decided:
        coordinator.forget([(gtid, bqual("orders", 1))])
    log.flush()
    assert not any(map(log.pending, decided))
    assert coordinator.counters["log_entries_lazy"] == 2


def test_closing_leaves_nothing_to_be_forgotten(log: Log) -> None:
    """The last are sent by the closing itself."""
    decided = [log.commit(("orders", bqual("orders", 1))) for _ in range(3)]
    coordinator = log.cluster._coordinator
    coordinator._thread = threading.current_thread()
    coordinator._forget_at = FOREVER_MS
    for gtid in decided:
        coordinator.forget([(gtid, bqual("orders", 1))])
    coordinator.close(5, log.cluster._run)
    assert not any(map(log.pending, decided))


def test_without_a_session_no_transaction_gets_a_name(log: Log) -> None:
    """Two processes that have lost their sessions at once would give the same name to two transactions."""
    coordinator = log.cluster._coordinator
    session = coordinator._session()
    found = iter([0, 0, session])
    coordinator._session = lambda: next(found)
    gtid, _ = log.cluster._run(coordinator.name_gen())
    assert session_of(gtid) == session
    coordinator._session = lambda: 0
    coordinator.request_timeout_ms = 0
    with pytest.raises(NoQuorum, match="no session"):
        log.cluster._run(coordinator.name_gen())


def test_who_is_away_holds_up_no_search(log: Log) -> None:
    """As many as there are to tell them wait for members that do not answer: what is in doubt is looked for all the same."""
    coordinator = log.cluster._coordinator
    is_over, was_searched = threading.Event(), threading.Event()

    class Away:
        is_remote = True
        participants = (("service:away", "n", b"x"),)

        def finish(self, commit: bool, deadline_ms: int) -> Do:
            return Do(is_over.wait)

        def read_ending(self, commit: bool, outcome: object) -> Ending:
            return Ending(True)

    class Searched(Store):
        def prepared(self) -> list[PreparedBranch]:
            was_searched.set()
            return []

    for number in range(LEFT):
        unfinished = Unfinished(join_gtid(log.now_ms, GONE, number), True, (cast(Member, Away()),))
        coordinator.finish_later(unfinished)
    try:
        coordinator.register(Searched("stock"))
        assert was_searched.wait(30)
        assert coordinator.stats()["backlog"] >= LEFT
    finally:
        is_over.set()


class Broken(MemoryJournal):
    """Its disk is full."""

    def records(self, service: str) -> list[Record]:
        raise StorageFailed("no space left on the device")


def test_a_journal_that_cannot_be_used_is_told_of_and_looked_at_again(
    log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    """The node is well, and nothing else would say that what the service has promised is not done."""
    resource = JournalResource("s", Broken(), cast(Handler, None))
    assert not log.cluster._coordinator.search(resource)
    assert "no space left" in caplog.text
