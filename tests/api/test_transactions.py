"""Transactions over replicated maps, locks and resources, as users hold them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import coordlib
from coordlib.errors import (
    FlavourError,
    ForkedError,
    HeuristicOutcome,
    LockLost,
    ResourceNotTwoPhase,
    TooManyLastResources,
    TransactionAborted,
    TransactionConflict,
    UsageError,
)
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.txn.branches import BranchFailed, BranchHeuristic, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import BranchName, cluster_tag, join_gtid, resource_tag
from coordlib.wire.messages import RequestKind


def entries(cluster: coordlib.Cluster) -> int:
    """How many entries the log has."""
    reply = cluster._run(_ask(commands.query_tx_read(b"none", b"k")))
    last = commands.decode_reply(reply)[4]
    assert isinstance(last, int)
    return last


def _ask(query: bytes) -> OpGen[bytes]:
    reply: bytes = yield Step(RequestKind.QUERY, query, monotonic_ms() + 10_000)
    return reply


def test_all_writes_of_a_transaction_are_one_entry(cluster: coordlib.Cluster) -> None:
    """Nothing is seen before, all of it afterwards, at one revision."""
    stock, orders = cluster.map("stock"), cluster.map("orders")
    stock["sku"] = 3
    before = entries(cluster)
    with cluster.transaction() as tx:
        stock["sku"] -= 1
        orders["o-1"] = {"sku": "sku"}
        assert stock["sku"] == 2
        assert entries(cluster) == before
        assert tx.state == "active"
    assert entries(cluster) == before + 1
    assert (stock["sku"], orders["o-1"]) == (2, {"sku": "sku"})
    assert tx.revision == before + 1
    found = stock.get_versioned("sku")
    assert found is not None
    assert found.mod_revision == tx.revision
    assert tx.state == "ended"


def test_a_block_that_raises_changes_nothing(cluster: coordlib.Cluster) -> None:
    """Whatever it had written; the exception comes out as it is."""
    stock = cluster.map("stock")
    before = entries(cluster)
    with pytest.raises(ValueError, match="no"), cluster.transaction():
        stock["sku"] = 1
        raise ValueError("no")
    assert "sku" not in stock
    assert entries(cluster) == before


def test_a_transaction_that_only_reads_makes_no_entry(cluster: coordlib.Cluster) -> None:
    """What it read was true at one revision; there is nothing to decide."""
    stock = cluster.map("stock")
    stock.update(a=1, b=2)
    before = entries(cluster)
    with cluster.transaction(read_only=True):
        assert stock["a"] + stock["b"] == 3
        assert stock.snapshot() == {"a": 1, "b": 2}
        with pytest.raises(UsageError, match="read_only"):
            stock["a"] = 2
    assert entries(cluster) == before


def in_another_thread(change: Any) -> None:
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()


def test_what_was_read_and_changed_by_others_is_a_conflict(cluster: coordlib.Cluster) -> None:
    """At the commit, if nothing else was read since; nothing of it happens."""
    stock = cluster.map("stock")
    stock["a"] = 1
    with pytest.raises(TransactionConflict) as caught, cluster.transaction():
        stock["b"] = stock["a"]
        in_another_thread(lambda: stock.put("a", 5))
    assert caught.value.reason == "conflict"
    assert caught.value.retryable
    assert "b" not in stock


def test_a_read_of_what_has_changed_since_the_first_is_a_conflict_at_once(cluster: coordlib.Cluster) -> None:
    """The code never sees two halves that do not belong together; what was read stays as it was."""
    stock = cluster.map("stock")
    stock.update(a=1, b=1)
    with pytest.raises(TransactionConflict, match="revision"), cluster.transaction():
        assert stock["a"] == 1
        in_another_thread(lambda: stock.update(a=2, b=2))
        assert stock["a"] == 1
        stock["b"]


def test_an_absence_is_read_at_the_same_moment_as_the_rest(cluster: coordlib.Cluster) -> None:
    """A key that was moved away meanwhile is not just not there."""
    stock, other = cluster.map("stock"), cluster.map("other")
    stock.update(a=1, b=1)
    with cluster.transaction():
        assert stock["a"] == 1
        assert "c" not in stock  # fine: nothing has changed
        assert "x" not in other
        in_another_thread(lambda: other.put("noise", 1))
        assert "y" not in other  # fine: what was read still holds
    with pytest.raises(TransactionConflict), cluster.transaction():
        assert stock["a"] == 1

        def move() -> None:
            del stock["b"]
            stock["a"] = 2

        in_another_thread(move)
        assert "b" not in stock


def test_a_scan_is_under_the_condition_of_the_whole_map(cluster: coordlib.Cluster) -> None:
    """A key that comes into a map that was summed up is a conflict."""
    stock = cluster.map("stock")
    stock.update(a=1, b=2)
    with pytest.raises(TransactionConflict), cluster.transaction():
        stock["sum"] = sum(stock.values())
        in_another_thread(lambda: stock.put("c", 3))
    assert "sum" not in stock
    with cluster.transaction():
        stock["sum"] = sum(stock.values())
        assert len(stock) == 4
    assert stock["sum"] == 6


def test_snapshot_isolation_lets_others_change_what_is_only_read(cluster: coordlib.Cluster) -> None:
    """But not what it writes after having read it."""
    stock = cluster.map("stock")
    stock.update(a=1, b=2)
    with cluster.transaction(isolation="snapshot"):
        stock["b"] = stock["a"] + stock["b"]
        in_another_thread(lambda: stock.put("a", 9))
    assert stock["b"] == 3
    with pytest.raises(TransactionConflict), cluster.transaction(isolation="snapshot"):
        stock["b"] += 1
        in_another_thread(lambda: stock.put("b", 9))
    assert stock["b"] == 9


def test_every_method_of_a_map_reads_and_writes_the_transaction_s_view(cluster: coordlib.Cluster) -> None:
    """As a dict would be, until it commits; then the map is that dict."""
    stock = cluster.map("stock")
    stock.update(a=1, b=2, c=3)
    with cluster.transaction():
        assert stock.pop("a") == 1
        assert stock.pop("a", None) is None
        with pytest.raises(KeyError):
            stock["a"]
        assert stock.setdefault("d", 4) == 4
        assert stock.setdefault("b", 9) == 2
        with pytest.raises(coordlib.KeyExists):
            stock.insert("b", 1)
        stock.insert("e", 5)
        assert stock.delete("c")
        assert not stock.delete("c")
        assert stock.compare_and_set("b", 2, 20)
        assert not stock.compare_and_set("b", 2, 30)
        assert stock.compare_and_set("f", coordlib.ABSENT, 6)
        stock.update({"g": 7}, h=8)
        assert sorted(stock) == ["b", "d", "e", "f", "g", "h"]
        assert "c" not in stock
        assert stock.get("zzz") is None
        key, value = stock.popitem()
        stock[key] = value
        with pytest.raises(UsageError, match="version"):
            stock.get_versioned("b")
        assert stock.read_stale("a") == 1
        expected = stock.snapshot()
    assert stock.snapshot() == expected == {"b": 20, "d": 4, "e": 5, "f": 6, "g": 7, "h": 8}
    with cluster.transaction():
        stock.clear()
        with pytest.raises(coordlib.KeyMissing):
            stock.popitem()
    assert stock.snapshot() == {}


def test_other_threads_and_handles_are_outside(cluster: coordlib.Cluster) -> None:
    """A transaction is its thread's; what others do meanwhile is their own."""
    stock = cluster.map("stock")
    with coordlib.local() as other:
        theirs = other.map("stock")
        with pytest.raises(ValueError, match="no"), cluster.transaction():
            theirs["a"] = 1
            in_another_thread(lambda: stock.put("b", 1))
            raise ValueError("no")
        assert theirs["a"] == 1
    assert stock["b"] == 1


def test_a_block_within_a_block_is_the_same_transaction(cluster: coordlib.Cluster) -> None:
    """Unless it asks for one of its own; an error that leaves the inner one dooms the whole."""
    stock = cluster.map("stock")
    with cluster.transaction():
        stock["a"] = 1
        with cluster.transaction() as inner:
            stock["b"] = stock["a"]
            assert inner.state == "active"
        with cluster.transaction(propagation="requires_new"):
            assert "a" not in stock
            stock["c"] = 1
        assert stock["b"] == 1
        with pytest.raises(UsageError), cluster.transaction(propagation="never"):
            pass
    assert stock.snapshot() == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(UsageError), cluster.transaction(propagation="mandatory"):
        pass

    def swallowing() -> None:
        with cluster.transaction():
            stock["d"] = 1
            try:
                with cluster.transaction():
                    raise ValueError("swallowed")
            except ValueError:
                pass

    with pytest.raises(TransactionAborted, match="inner block") as caught:
        swallowing()
    assert caught.value.reason == "doomed"
    assert "d" not in stock


def test_a_doomed_or_late_transaction_is_aborted(cluster: coordlib.Cluster, monkeypatch: Any) -> None:
    """Neither is decided; the error says why."""
    stock = cluster.map("stock")
    with pytest.raises(TransactionAborted, match="wrong moon") as caught, cluster.transaction() as tx:
        stock["a"] = 1
        tx.doom("wrong moon")
    assert caught.value.reason == "doomed"
    with pytest.raises(TransactionAborted) as caught, cluster.transaction(timeout=60) as tx:
        stock["a"] = 1
        assert 0 < tx.remaining() <= 60
        record = tx._record
        assert record is not None
        record.expires_ms = 0
    assert caught.value.reason == "deadline"
    assert "a" not in stock


def test_a_savepoint_undoes_its_own_changes_only(cluster: coordlib.Cluster) -> None:
    """The rest of the transaction goes on."""
    stock = cluster.map("stock")
    with cluster.transaction() as tx:
        stock["a"] = 1
        with pytest.raises(ValueError, match="no"), tx.savepoint():
            stock["a"] = 2
            stock["b"] = 2
            raise ValueError("no")
        assert stock["a"] == 1
        with tx.savepoint():
            stock["c"] = 3
    assert stock.snapshot() == {"a": 1, "c": 3}


def test_a_transaction_without_a_block(cluster: coordlib.Cluster) -> None:
    """Begun and ended by hand: for those who are told by others when."""
    stock = cluster.map("stock")
    tx = cluster.transaction()
    with pytest.raises(UsageError, match="not begun"):
        tx.commit()
    tx.begin()
    stock["a"] = 1
    tx.commit()
    assert stock["a"] == 1
    with pytest.raises(UsageError, match="ended"):
        tx.commit()
    tx.rollback()
    tx = cluster.transaction().begin()
    stock["a"] = 2
    tx.rollback()
    assert stock["a"] == 1


def test_a_forked_child_is_not_in_its_parent_s_transaction(
    cluster: coordlib.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is buffered there as if it would ever be committed."""
    stock = cluster.map("stock")
    with cluster.transaction() as tx:
        stock["a"] = 1
        pid = os.getpid()
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        with pytest.raises(ForkedError):
            stock["b"] = 1
        with pytest.raises(ForkedError):
            tx.remaining()
        monkeypatch.undo()
    assert stock.snapshot() == {"a": 1}


def test_hooks_are_called_at_the_end(cluster: coordlib.Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Before the commit they may still write or refuse; after it what they raise undoes nothing."""
    stock, seen = cluster.map("stock"), []
    with cluster.transaction() as tx:
        tx.before_commit(lambda: stock.put("a", 1))
        tx.on_commit(lambda: seen.append("committed"))
        tx.on_commit(lambda: 1 / 0)
        tx.on_abort(lambda: seen.append("aborted"))
    assert (stock["a"], seen) == (1, ["committed"])
    assert "hook of a transaction failed" in caplog.text
    with pytest.raises(ZeroDivisionError), cluster.transaction() as tx:
        stock["a"] = 2
        tx.before_commit(lambda: 1 / 0)
        tx.on_commit(lambda: seen.append("committed"))
        tx.on_abort(lambda: seen.append("aborted"))
    assert (stock["a"], seen) == (1, ["committed", "aborted"])


def test_a_lock_guards_and_is_released_by_the_decision(cluster: coordlib.Cluster) -> None:
    """In the same entry: nobody gets the lock before the writes are there."""
    stock, lock = cluster.map("stock"), cluster.lock("sku")
    grant = lock.acquire()
    with cluster.transaction() as tx:
        stock["a"] = 1
        tx.release(grant)
    assert not lock.locked()
    assert grant.state == coordlib.GrantState.RELEASED
    second = cluster.lock("sku").acquire()
    with pytest.raises(TransactionAborted) as caught, cluster.transaction() as tx:
        stock.put("a", 2, guard=grant)
    assert caught.value.reason == "lock-lost"
    assert stock["a"] == 1
    with pytest.raises(LockLost):
        grant.ensure_held()
    second.ensure_held()


def test_a_decorated_function_is_run_again_after_a_conflict(cluster: coordlib.Cluster) -> None:
    """As often as it was said, and no more; its result is the last one's."""
    stock = cluster.map("stock")
    stock["a"] = 0
    runs = []

    @cluster.transactional(retries=2)
    def increase(conflicts: int) -> int:
        value: int = stock["a"]
        runs.append(value)
        if len(runs) <= conflicts:
            in_another_thread(lambda: stock.put("a", value + 10))
        stock["a"] = value + 1
        return value + 1

    assert increase(2) == 21
    assert stock["a"] == 21
    runs.clear()
    with pytest.raises(TransactionConflict):
        increase(9)
    assert len(runs) == 3


def test_many_threads_lose_no_update(cluster: coordlib.Cluster) -> None:
    """Each transfer is atomic: the sum stays, whoever meets whom."""
    accounts = cluster.map("accounts")
    accounts.update({str(i): 100 for i in range(4)})

    @cluster.transactional(retries=100, timeout=60)
    def transfer(source: str, target: str) -> None:
        accounts[source] -= 1
        accounts[target] += 1

    def work(offset: int) -> None:
        for i in range(10):
            transfer(str((i + offset) % 4), str((i + offset + 1) % 4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(accounts.values()) == 400
    assert accounts.snapshot() == {str(i): 100 for i in range(4)}


def test_functions_of_the_wrong_flavour_are_refused_when_decorated(cluster: coordlib.Cluster) -> None:
    """So are generators, whose body would run later, and settings that mean nothing."""

    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    for function in (coroutine, generator):
        with pytest.raises(FlavourError):
            cluster.transactional()(function)
    with pytest.raises(FlavourError):
        coordlib.AsyncCluster.local().transactional()(lambda: None)
    for wrong in ({"isolation": "none"}, {"ack": "maybe"}, {"propagation": "sometimes"}, {"timeout": 0}):
        with pytest.raises(UsageError):
            cluster.transaction(**wrong)
    with pytest.raises(UsageError):
        cluster.transactional(retries=-1)


# --- resources --------------------------------------------------------------------------------------------


class Store:
    """A resource in memory that can do everything a database can, and fail like one."""

    is_last_resource = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.tag = resource_tag(name)
        self.rows: list[str] = []
        self.held: dict[tuple[bytes, bytes], list[str]] = {}
        self.markers: set[bytes] = set()
        self.problem: Exception | None = None
        self.at = ""  # where the problem arises
        self.ended = threading.Event()
        self.log: list[str] = []
        self.guesses = False  # whether it notices what reads only

    def begin(self, gtid: bytes, bqual: bytes, remaining_s: Any) -> StoreBranch:
        assert remaining_s() > 0
        return StoreBranch(self, gtid, bqual)

    def prepared(self) -> list[PreparedBranch]:
        return [PreparedBranch(gtid, bqual, "") for gtid, bqual in self.held]

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        rows = self.held.pop((branch.gtid, branch.bqual), None)
        if rows is None:
            return Finish.ALREADY
        if commit:
            self.rows += rows
        self.ended.set()
        return Finish.DONE


class LastStore(Store):
    """One that cannot prepare, and so decides by itself."""

    is_last_resource = True

    def outcome(self, gtid: bytes) -> bool:
        return gtid in self.markers

    def forget(self, gtid: bytes) -> None:
        self.markers.discard(gtid)
        self.ended.set()


class StoreBranch:
    def __init__(self, resource: Store, gtid: bytes, bqual: bytes) -> None:
        self.resource = resource
        self.gtid = gtid
        self.bqual = bqual
        self.is_last_resource = resource.is_last_resource
        self.connection: list[str] = []

    @property
    def seems_read_only(self) -> bool:
        return self.resource.guesses and not self.connection

    def _fail(self, where: str) -> None:
        self.resource.log.append(where)
        if self.resource.at == where and self.resource.problem is not None:
            problem, self.resource.problem = self.resource.problem, None
            raise problem

    def prepare(self) -> Vote:
        self._fail("prepare")
        if not self.connection:
            return Vote.READ_ONLY
        self.resource.held[(self.gtid, self.bqual)] = self.connection
        return Vote.YES

    def commit_one_phase(self) -> None:
        self._fail("one-phase")
        self.resource.rows += self.connection

    def decide(self, gtid: bytes) -> None:
        self._fail("decide")
        self.resource.rows += self.connection
        self.resource.markers.add(gtid)

    def commit(self) -> None:
        self._fail("commit")
        self.resource.finish(PreparedBranch(self.gtid, self.bqual, ""), True)

    def rollback(self) -> None:
        self._fail("rollback")
        self.resource.held.pop((self.gtid, self.bqual), None)


@pytest.fixture
def stores(cluster: coordlib.Cluster) -> tuple[Store, Store]:
    return cluster.resource(Store("orders")), cluster.resource(Store("billing"))


def test_an_estimate_of_time_that_has_become_wrong_is_wrong_once(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """The log's time may run faster than that of whoever asked for it; else all that follow would come too late."""

    def transaction() -> None:
        with cluster.transaction(timeout=30) as tx:
            for store in stores:
                tx.enlist(store).append("row")

    transaction()
    cluster._coordinator._log_time_ms -= 60_000
    with pytest.raises(TransactionAborted, match="deadline"):
        transaction()
    transaction()


def test_databases_and_maps_are_committed_together(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """One entry in the log decides for all; the outcome can be asked for afterwards."""
    orders, billing = stores
    stock = cluster.map("stock")
    before = entries(cluster)
    with cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing).append("bill")
        stock["sku"] = 1
        gtid = tx.gtid
        assert cluster.outcome(gtid) == "none"
    assert (orders.rows, billing.rows, stock["sku"]) == (["order"], ["bill"], 1)
    assert entries(cluster) - before in (1, 2)  # the decision; the branches are forgotten behind it
    assert cluster.outcome(gtid) == "committed"
    assert orders.log == billing.log == ["prepare", "commit"]


def test_a_database_that_refuses_aborts_everything(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """The other one's branch is rolled back, the map is as it was, and the cause says why."""
    orders, billing = stores
    stock = cluster.map("stock")
    billing.at, billing.problem = "prepare", BranchFailed("credit limit")
    with pytest.raises(TransactionAborted, match="credit limit") as caught, cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing).append("bill")
        stock["sku"] = 1
    assert caught.value.reason == "vote-no"
    assert (orders.rows, billing.rows, orders.held, "sku" in stock) == ([], [], {}, False)


def test_short_cuts_need_no_entry(cluster: coordlib.Cluster, stores: tuple[Store, Store]) -> None:
    """One database alone, and databases that only read."""
    orders, billing = stores
    before = entries(cluster)
    with cluster.transaction() as tx:
        tx.enlist(orders).append("order")
    with cluster.transaction() as tx:
        tx.enlist(orders)
        tx.enlist(billing)
        assert "a" not in cluster.map("stock")
    assert orders.rows == ["order"]
    assert entries(cluster) == before
    assert cluster._coordinator._live == {}
    counters = cluster._coordinator.counters
    assert (counters["one_phase"], counters["read_only"]) == (1, 1)
    assert "log_entries" not in counters


@pytest.mark.parametrize("is_declared", [True, False])
def test_a_reader_and_a_writer_need_no_entry(
    cluster: coordlib.Cluster, stores: tuple[Store, Store], is_declared: bool
) -> None:
    """Declared, or noticed by the adapter: the reader votes first, and the writer commits in one phase."""
    orders, billing = stores
    billing.guesses = not is_declared
    before = entries(cluster)
    with cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing, read_only=is_declared)
    assert entries(cluster) == before
    assert (orders.log, billing.log, orders.rows) == (["one-phase"], ["prepare"], ["order"])
    assert cluster._coordinator.counters["dynamic_one_phase"] == 1


def test_a_reader_that_has_written_all_the_same_costs_a_round(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """What was declared wrongly is committed as what it is; and a reader whose vote is no stops the writer."""
    orders, billing = stores
    with cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing, read_only=True).append("bill")
    assert (orders.rows, billing.rows) == (["order"], ["bill"])
    counters = cluster._coordinator.counters
    assert (counters["two_phase"], counters["prepare_rounds"]) == (1, 2)
    billing.at, billing.problem = "prepare", BranchFailed("could not serialize")
    with pytest.raises(TransactionAborted, match="serialize"), cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing, read_only=True)
    assert orders.rows == ["order"]


def test_a_commit_that_was_not_heard_is_told_again_behind_the_caller(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """Decided, the caller goes on; with ack="decided" it does not even wait for the first attempt."""
    orders, billing = stores
    orders.at, orders.problem = "commit", ConnectionError("lost")
    with cluster.transaction(ack="decided") as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing).append("bill")
    assert orders.ended.wait(30)
    assert billing.ended.wait(30)
    assert (orders.rows, billing.rows) == (["order"], ["bill"])


def test_what_a_dead_process_has_prepared_is_finished_by_another(cluster: coordlib.Cluster) -> None:
    """Found in the resource when that is registered; nobody decided, and nobody alive will."""
    store = Store("orders")
    store.held[(b"\0" * 16, BranchName(store.tag, b"nn", 1).pack())] = ["lost"]
    cluster.resource(store)
    assert store.ended.wait(30)
    assert (store.rows, store.held) == ([], {})
    assert cluster.outcome(b"\0" * 16) == "aborted"


def test_a_branch_that_somebody_rolled_back_by_hand_is_reported(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """It is committed, and that one is not: people must know, and the cluster keeps it for them."""
    orders, billing = stores
    orders.at = "commit"
    orders.problem = BranchHeuristic(Finish.HEURISTIC_ROLLBACK, "rolled back by hand")
    with pytest.raises(HeuristicOutcome) as caught, cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing).append("bill")
    assert len(caught.value.branches) == 1
    assert billing.rows == ["bill"]
    assert cluster.outcome(caught.value.gtid) == "committed"


def test_a_last_resource_decides_for_the_others(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """It is enlisted first, commits in the middle, and no entry is needed; two of them, or maps, are refused."""
    orders, _ = stores
    local = cluster.resource(LastStore("local"))
    before = entries(cluster)
    with cluster.transaction() as tx:
        tx.enlist(local).append("row")
        tx.enlist(orders).append("order")
    assert (local.rows, orders.rows) == (["row"], ["order"])
    assert local.log == ["decide"]
    assert local.ended.wait(30)  # its marker has gone
    assert entries(cluster) == before
    with pytest.raises(UsageError, match="first"), cluster.transaction() as tx:
        tx.enlist(orders)
        tx.enlist(local)
    with pytest.raises(ResourceNotTwoPhase), cluster.transaction() as tx:
        tx.enlist(local).append("row")
        cluster.map("stock")["a"] = 1
    assert (local.rows, "a" in cluster.map("stock")) == (["row"], False)
    second = cluster.resource(LastStore("second"))
    with pytest.raises((UsageError, TooManyLastResources)), cluster.transaction() as tx:
        tx.enlist(local).append("row")
        tx.enlist(second).append("row")
    assert (local.rows, second.rows) == (["row"], [])


def test_stats_tell_what_transactions_came_to(cluster: coordlib.Cluster, stores: tuple[Store, Store]) -> None:
    """Outcomes by kind, the way each was committed, the entries waited for, and phases with their time."""
    orders, billing = stores
    stock = cluster.map("stock")
    before = entries(cluster)
    with cluster.transaction():
        stock["a"] = 1
    with cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing).append("bill")
    billing.at, billing.problem = "prepare", BranchFailed("credit limit")
    with pytest.raises(TransactionAborted), cluster.transaction() as tx:
        tx.enlist(orders).append("order")
        tx.enlist(billing).append("bill")
    with pytest.raises(TransactionConflict), cluster.transaction():
        stock["b"] = stock["a"]
        in_another_thread(lambda: stock.put("a", 5))
    with pytest.raises(ZeroDivisionError), cluster.transaction():
        stock["b"] = 1 // 0
    here = cluster.stats()["transactions_here"]
    counters = here["counters"]
    times = {name: counters.pop(name) for name in list(counters) if name.endswith("_ms")}
    lazy = counters.pop("log_entries_lazy", 0)
    assert counters == {
        "aborted_conflict": 1,
        "aborted_vote-no": 1,
        "apply_rounds": 1,
        "committed": 2,
        "decide_rounds": 3,
        "log_entries": 3,
        "prepare_rounds": 2,
        "rollback_rounds": 1,
        "rolled_back": 1,
        "state_only": 2,
        "two_phase": 1,
        "votes_no": 1,
    }
    assert set(times) == {"apply_ms", "decide_ms", "prepare_ms", "rollback_ms"}
    assert all(time >= 0 for time in times.values())
    # The other thread's put is one, too; and that branches have obeyed may be on its way.
    assert entries(cluster) - before - lazy in (4, 5)
    assert (here["in_doubt"], here["in_doubt_oldest_ms"], here["live"]) == (0, 0, 0)


def test_stats_tell_what_is_in_doubt_and_since_when(cluster: coordlib.Cluster) -> None:
    """A branch that was found in a resource, is not decided, and whose initiator is alive."""
    store = Store("orders")
    cluster.resource(store)
    (log_time_ms,) = commands.decode_reply(cluster._run(_ask(commands.query_time())))
    gtid = join_gtid(log_time_ms - 3000, cluster._engine.view.session_id, 0)
    store.held[(gtid, BranchName(store.tag, b"nn", 1).pack())] = ["lost"]
    cluster._coordinator.recover()
    here = cluster.stats()["transactions_here"]
    assert here["in_doubt"] == 1
    assert here["in_doubt_oldest_ms"] >= 3000
    assert commands.decode_reply(cluster._run(_resolve(gtid)))[0] == TxStatus.ABORTED
    cluster._coordinator.recover()
    here = cluster.stats()["transactions_here"]
    assert (here["in_doubt"], here["in_doubt_oldest_ms"]) == (0, 0)
    assert here["counters"]["recovered"] >= 1  # the handle's own search may come at the same time


def _resolve(gtid: bytes) -> OpGen[bytes]:
    reply: bytes = yield Step(RequestKind.COMMAND, commands.tx_resolve(gtid), monotonic_ms() + 10_000)
    return reply


def test_clusters_of_one_name_do_not_know_each_other_s_branches(cluster: coordlib.Cluster) -> None:
    """What branches are called by comes from the cluster's identity, which every cluster has for itself."""
    tags: list[bytes] = []

    class Opened(Store):
        def open(self, tag: bytes) -> None:
            tags.append(tag)

    cluster.resource(Opened("orders"))
    cluster.resource(Opened("bills"))
    with coordlib.local() as other:
        other.resource(Opened("orders"))
        uuid = bytes.fromhex(other.stats()["cluster_uuid"])
    assert tags[0] == tags[1] != tags[2] == cluster_tag(uuid)


def test_a_resource_that_is_not_registered_is_refused(cluster: coordlib.Cluster) -> None:
    """Nobody would finish what it has prepared; and two of one name would be taken for each other."""
    with pytest.raises(UsageError, match="registered"), cluster.transaction() as tx:
        tx.enlist(Store("orders"))
    cluster.resource(Store("orders"))
    with pytest.raises(UsageError, match="another"):
        cluster.resource(Store("orders"))


# --- tasks ------------------------------------------------------------------------------------------------


def test_tasks_have_transactions_of_their_own() -> None:
    """The same over awaits: conflicts, retries, databases; each task is in its own."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            accounts = cluster.map("accounts")
            await accounts.put("a", 100)
            await accounts.put("b", 100)
            orders, billing = (
                await cluster.resource(Store("orders")),
                await cluster.resource(Store("billing")),
            )

            @cluster.transactional(retries=100, timeout=60)
            async def transfer() -> None:
                await accounts.put("a", await accounts.get("a") - 1)
                await accounts.put("b", await accounts.get("b") + 1)

            await asyncio.gather(*(transfer() for _ in range(5)))
            assert dict(await accounts.items()) == {"a": 95, "b": 105}
            for ack in ("applied", "decided"):
                async with cluster.transaction(ack=ack) as tx:
                    (await tx.enlist(orders)).append(ack)
                    (await tx.enlist(billing)).append(ack)
                    await accounts.put("a", 0)
                assert await cluster.outcome(tx.gtid) == "committed"
            with pytest.raises(ValueError, match="no"):
                async with cluster.transaction():
                    await accounts.put("a", 1)
                    raise ValueError("no")
            assert await accounts.get("a") == 0
            await asyncio.to_thread(orders.ended.wait, 30)
            await asyncio.to_thread(billing.ended.wait, 30)
            assert orders.rows[0] == billing.rows[0] == "applied"

    asyncio.run(check())


def test_a_cancelled_task_rolls_back() -> None:
    """In the middle of its block: nothing has happened when the CancelledError comes out."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            stock, orders = cluster.map("stock"), await cluster.resource(Store("orders"))
            is_in = asyncio.Event()

            async def work() -> None:
                async with cluster.transaction() as tx:
                    (await tx.enlist(orders)).append("order")
                    await stock.put("a", 1)
                    is_in.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(work())
            await is_in.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert orders.log == ["rollback"]
            assert not await stock.contains("a")

    asyncio.run(check())
