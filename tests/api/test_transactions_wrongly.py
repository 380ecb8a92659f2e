"""Transactions used wrongly, interrupted, or by several at once: nothing is half done, and errors say what to do."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import coordlib
from coordlib.errors import (
    ClusterClosed,
    FlavourError,
    ForkedError,
    HeuristicOutcome,
    ResourceNotTwoPhase,
    TransactionAborted,
    TransactionConflict,
    TransactionOutcomeUnknown,
    UsageError,
)
from coordlib.txn.branches import BranchFailed, BranchHeuristic, BranchUnknown, Finish
from tests.api.test_transactions import LastStore, Store, StoreBranch, in_another_thread


@pytest.fixture
def stores(cluster: coordlib.Cluster) -> tuple[Store, Store]:
    return cluster.resource(Store("orders")), cluster.resource(Store("billing"))


# --- by several at once -----------------------------------------------------------------------------------


def test_branches_that_are_enlisted_at_once_have_one_name() -> None:
    """Of two names only one would be decided; whoever finds the other one prepared would roll it back."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            orders, billing = (
                await cluster.resource(Store("orders")),
                await cluster.resource(Store("billing")),
            )
            async with cluster.transaction() as tx:
                for rows in await asyncio.gather(tx.enlist(orders), tx.enlist(billing)):
                    rows.append("row")
                assert tx._record is not None
                names = {
                    getattr(member.branch, "gtid", b"")
                    for member in tx._record.members
                    if hasattr(member, "branch")
                }
                assert names == {tx.gtid}
            assert cluster._coordinator._live == {}

    asyncio.run(check())


def test_absences_that_are_read_at_once_are_of_one_moment() -> None:
    """Tasks of one transaction that read side by side see one revision, or a conflict."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            stock, other = cluster.map("stock"), cluster.map("other")
            await stock.put("a", 1)
            async with cluster.transaction(read_only=True):
                assert await stock.get("a") == 1
                await contextvars.Context().run(asyncio.ensure_future, other.put("noise", 1))
                found = await asyncio.gather(*(other.get(key, 0) for key in "bcd"), stock.get("a"))
            assert found == [0, 0, 0, 1]

    asyncio.run(check())


def test_a_service_is_not_called_twice_at_once_in_a_transaction(cluster: coordlib.Cluster) -> None:
    """The calls are numbered, and answers told apart by that: two at once could get each other's."""
    outcomes: list[object] = []
    is_in, may_go = threading.Event(), threading.Event()

    @cluster.participant("slow")
    class Slow:
        def work(self) -> str:
            is_in.set()
            may_go.wait(30)
            return "done"

    with cluster.transaction(timeout=60):
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: outcomes.append(context.run(cluster.service("slow").work)))
        thread.start()
        is_in.wait(30)
        with pytest.raises(UsageError, match="one after the other"):
            cluster.service("slow").work()
        may_go.set()
        thread.join()
    assert outcomes == ["done"]


def test_a_call_that_nobody_waits_for_any_more_dooms() -> None:
    """Whether it was run there is not known, so that its caller cannot just go on."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            may_go = threading.Event()

            class Slow:
                def work(self) -> None:
                    may_go.wait(30)

            host = cluster._hosting()
            await asyncio.to_thread(host.add, "slow", Slow(), lambda: None)  # type: ignore[arg-type, return-value]
            with pytest.raises(TransactionAborted, match="given up") as caught:
                async with cluster.transaction():
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(cluster.service("slow").work(), 0.05)
                    may_go.set()
            assert caught.value.reason == "doomed"

    asyncio.run(check())


def test_transactions_of_two_clusters_are_apart_also_within_each_other(cluster: coordlib.Cluster) -> None:
    """What is between them belongs to each handle's innermost, wherever the other's begins and ends."""
    with coordlib.local() as other:
        ours, theirs = cluster.map("m"), other.map("m")
        with pytest.raises(ValueError, match="no"), cluster.transaction() as outer:
            with other.transaction():
                ours["a"] = theirs["a"] = 1
                with cluster.transaction() as inner:
                    ours["b"] = 1
                    assert inner._joined is outer
            assert theirs["a"] == 1
            assert ours["a"] == 1
            raise ValueError("no")
        assert ours.snapshot() == {}


# --- once more --------------------------------------------------------------------------------------------


def test_what_is_enlisted_again_is_the_same_connection(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """Functions that join do not see each other as strangers, or wait for each other's locks."""
    orders, billing = stores
    local = cluster.resource(LastStore("local"))
    with cluster.transaction() as tx:
        first = tx.enlist(local, read_only=True)
        with cluster.transaction() as inner:
            assert inner.enlist(local) is first
            assert inner.gtid == tx.gtid
            rows = inner.enlist(orders, read_only=True)
            assert tx.enlist(orders, read_only=True) is rows
        own = StoreBranch(billing, tx.gtid, b"own")
        assert tx.enlist(own) is tx.enlist(own) is own
        first.append("row")
        assert tx._record is not None
        assert len(tx._record.members) == 3
        with pytest.raises(UsageError, match="takes part already"):
            tx.enlist(orders, using=[])
        with pytest.raises(UsageError, match="without using"):
            tx.enlist(cluster.resource(Store("other")), using=[])
    assert local.rows == ["row"]


def test_a_service_s_calls_share_its_branches(cluster: coordlib.Cluster) -> None:
    """Ten calls of one transaction are one branch of the service's database, with all that they have written."""
    bills = cluster.resource(Store("bills"))

    @cluster.participant("billing")
    class Billing:
        def charge(self, number: int) -> int:
            with cluster.transaction() as tx:
                rows: list[str] = tx.enlist(bills)
                rows.append(str(number))
            return len(rows)

    with cluster.transaction():
        counts = [cluster.service("billing").charge(number) for number in range(10)]
    assert counts == list(range(1, 11))
    assert bills.rows == [str(number) for number in range(10)]


def test_there_is_a_limit_to_branches(cluster: coordlib.Cluster, stores: tuple[Store, Store]) -> None:
    """An error at the one too many, and no thread for each of ten thousand."""
    orders, _ = stores
    with pytest.raises(UsageError, match="at most 64"), cluster.transaction() as tx:
        for number in range(10_000):
            tx.enlist(StoreBranch(orders, b"", b"%d" % number))
    assert orders.log == ["rollback"] * 64


# --- ended in a wrong way ---------------------------------------------------------------------------------


def test_a_block_ends_its_transaction_itself(cluster: coordlib.Cluster) -> None:
    """What comes after a commit in the middle would be in none; and threads end what they have begun."""
    stock = cluster.map("stock")
    with cluster.transaction() as tx:
        stock["a"] = 1
        for end in (tx.commit, tx.rollback):
            with pytest.raises(UsageError, match="block"):
                end()
    assert stock["a"] == 1
    tx = cluster.transaction().begin()
    stock["a"] = 2
    errors: list[str] = []

    def commit() -> None:
        try:
            tx.commit()
        except UsageError as error:
            errors.append(str(error))

    in_another_thread(commit)
    assert errors == ["commit() is for the thread or task that began the transaction"]
    assert tx.state == "active"
    tx.rollback()
    assert stock["a"] == 1


def test_transactions_that_end_in_another_order_leave_nobody_in_them(cluster: coordlib.Cluster) -> None:
    """Nor does a block that is left in another context than it was entered in, as generators are."""
    stock = cluster.map("stock")
    first = cluster.transaction().begin()
    stock["a"] = 1
    second = cluster.transaction(propagation="requires_new").begin()
    stock["b"] = 2
    first.commit()
    stock["c"] = 3
    assert second.state == "active"
    second.rollback()
    assert stock.snapshot() == {"a": 1}
    with cluster.transaction():
        stock["d"] = 4

    def block() -> Iterator[None]:
        with cluster.transaction():
            stock["e"] = 5
            yield

    generator = block()
    contextvars.copy_context().run(next, generator)
    assert list(generator) == []
    assert stock.snapshot() == {"a": 1, "d": 4, "e": 5}


def test_a_task_that_outlives_its_transaction_is_told_so() -> None:
    """What it does would be in none, without its knowing; a transaction of its own is its own."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            stock, ended = cluster.map("stock"), asyncio.Event()

            async def worker() -> None:
                await ended.wait()
                with pytest.raises(UsageError, match="outlive"):
                    await stock.put("a", 1)
                with pytest.raises(UsageError, match="outlive"):
                    async with cluster.transaction():
                        pass
                async with cluster.transaction(propagation="requires_new"):
                    await stock.put("b", 1)

            async with cluster.transaction():
                task = asyncio.create_task(worker())
            ended.set()
            await task
            assert await stock.get("b") == 1

    asyncio.run(check())


def test_a_handle_that_is_closed_in_the_middle_rolls_back() -> None:
    """Whether the block raises or not: what is open in databases does not wait for anybody."""
    for is_failing in (False, True):
        heard: list[str] = []
        cluster = coordlib.local()
        cluster.start()
        orders = cluster.resource(Store("orders"))
        with (
            pytest.raises(ZeroDivisionError if is_failing else ClusterClosed),
            cluster.transaction() as tx,
        ):
            tx.on_abort(functools.partial(heard.append, "aborted"))
            tx.before_commit(functools.partial(heard.append, "asked"))
            tx.enlist(orders).append("row")
            cluster.close()
            with pytest.raises(ClusterClosed):
                tx.enlist(orders)
            if is_failing:
                raise ZeroDivisionError
        assert (orders.log, orders.rows, heard) == (["rollback"], [], ["aborted"])


def test_a_forked_child_ends_nothing(
    cluster: coordlib.Cluster, stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the end of the block nor when it raises there; hooks are the parent's, too."""
    orders, heard = stores[0], []
    pid = os.getpid()
    for error in (None, ValueError("of the child")):
        tx = cluster.transaction().__enter__()
        tx.enlist(orders).append("row")
        for hook in (tx.before_commit, tx.on_commit, tx.on_abort):
            hook(lambda: heard.append("called"))
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: pid + 1)
            if error is None:
                with pytest.raises(ForkedError):
                    tx.__exit__(None, None, None)
            else:
                tx.__exit__(ValueError, error, None)
        assert (orders.log, heard) == ([], [])
        with monkeypatch.context() as patched:
            patched.setattr(tx, "_hooks", {})
            tx.__exit__(ValueError, ValueError("of the parent"), None)  # which can still end it
        assert orders.log.pop() == "rollback"


def test_an_inner_block_s_conflict_cannot_be_swallowed(cluster: coordlib.Cluster) -> None:
    """What it had done before is half of something."""
    stock = cluster.map("stock")
    stock.update(a=1, b=1)
    with (
        pytest.raises(TransactionAborted, match="inner block raised TransactionConflict"),
        cluster.transaction(),
    ):
        assert stock["a"] == 1
        in_another_thread(lambda: stock.put("b", 2))
        with pytest.raises(TransactionConflict), cluster.transaction():
            stock["half"] = 1
            stock["half-two"] = stock["b"]
    assert "half" not in stock


def test_dooming_without_a_reason_dooms(cluster: coordlib.Cluster) -> None:
    """An empty reason is one."""
    with pytest.raises(TransactionAborted, match="doom"), cluster.transaction() as tx:
        tx.doom("")


def test_a_release_that_a_savepoint_undid_has_not_happened(cluster: coordlib.Cluster) -> None:
    """The grant is as it was: held, and its holder's to give back."""
    lock = cluster.lock("sku")
    grant = lock.acquire()
    with cluster.transaction() as tx:
        cluster.map("stock")["a"] = 1
        with pytest.raises(ValueError, match="no"), tx.savepoint():
            tx.release(grant)
            raise ValueError("no")
    assert grant.state == coordlib.GrantState.HELD
    assert lock.locked()
    lock.release()
    assert not lock.locked()


# --- again, or not ----------------------------------------------------------------------------------------


def test_a_transaction_of_its_own_within_another_is_run_again(cluster: coordlib.Cluster) -> None:
    """Its conflicts are its own; those of one that has joined are the outer one's."""
    stock = cluster.map("stock")
    stock["a"] = 0
    runs: list[int] = []

    def increase() -> None:
        value: int = stock["a"]
        runs.append(value)
        if len(runs) == 1:
            in_another_thread(lambda: stock.put("a", 10))
        stock["a"] = value + 1

    with cluster.transaction():
        cluster.transactional(propagation="requires_new")(increase)()
    assert (runs, stock["a"]) == ([0, 10], 11)


def test_what_may_have_happened_is_not_run_again(
    cluster: coordlib.Cluster, stores: tuple[Store, Store]
) -> None:
    """Also where the lost answer is the kind of error that otherwise is."""
    orders, _ = stores
    orders.is_conflict = lambda error: isinstance(error, ConnectionError)  # type: ignore[attr-defined]
    runs: list[int] = []

    @cluster.transactional()
    def place() -> None:
        runs.append(1)
        with cluster.transaction() as tx:
            tx.enlist(orders).append("row")
        orders.at, orders.problem = "one-phase", BranchUnknown("lost")
        orders.problem.__cause__ = ConnectionError("lost")

    with pytest.raises(TransactionOutcomeUnknown) as caught:
        place()
    assert runs == [1]
    assert len(caught.value.gtid) == 16


# --- hooks ------------------------------------------------------------------------------------------------


def test_hooks_hear_of_every_certain_outcome(cluster: coordlib.Cluster, stores: tuple[Store, Store]) -> None:
    """Committed with a branch ended by hand; refused before the votes; interrupted; and of none that is not known."""
    orders, billing = stores
    local = cluster.resource(LastStore("local"))
    heard: list[str] = []

    def begin() -> coordlib.Transaction:
        tx = cluster.transaction().begin()
        tx.on_commit(lambda: heard.append("committed"))
        tx.on_abort(lambda: heard.append("aborted"))
        return tx

    tx = begin()
    tx.enlist(orders).append("row")
    tx.enlist(billing).append("row")
    orders.at, orders.problem = "commit", BranchHeuristic(Finish.HEURISTIC_ROLLBACK, "by hand")
    with pytest.raises(HeuristicOutcome):
        tx.commit()
    assert heard.pop() == "committed"

    tx = begin()
    tx.enlist(local).append("row")
    cluster.map("stock")["a"] = 1
    with pytest.raises(ResourceNotTwoPhase):
        tx.commit()
    assert heard.pop() == "aborted"

    tx = begin()
    tx.enlist(orders).append("row")
    orders.at, orders.problem = "one-phase", BranchUnknown("lost")
    with pytest.raises(TransactionOutcomeUnknown):
        tx.commit()
    assert heard == []


def test_hooks_of_tasks_are_awaited() -> None:
    """A coroutine function is a hook for tasks, and refused for threads, which could not run it."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            heard: list[str] = []

            async def hear(what: str) -> None:
                await asyncio.sleep(0)
                heard.append(what)

            async with cluster.transaction() as tx:
                tx.before_commit(lambda: hear("before"))
                tx.on_commit(lambda: hear("committed"))
                tx.on_abort(lambda: hear("aborted"))
            with pytest.raises(ValueError, match="no"):
                async with cluster.transaction() as tx:
                    tx.on_abort(lambda: hear("aborted"))
                    raise ValueError("no")
            assert heard == ["before", "committed", "aborted"]

    asyncio.run(check())

    async def hook() -> None: ...

    with coordlib.local() as cluster, cluster.transaction() as tx:
        for add in (tx.before_commit, tx.on_commit, tx.on_abort):
            with pytest.raises(FlavourError, match="async def"):
                add(hook)


# --- interrupted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ConnectionError, BranchFailed])
@pytest.mark.parametrize("at", ["prepare", "commit", "rollback", "one-phase", "decide"])
def test_an_interrupt_at_any_step_leaves_nothing_half_done(
    cluster: coordlib.Cluster, at: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows or none, nothing prepared in the end; and whoever hears "aborted" finds none."""
    orders, billing = cluster.resource(Store("orders")), cluster.resource(Store("billing"))
    local = cluster.resource(LastStore("local"))
    target = {"one-phase": local, "decide": local}.get(at, orders)
    coordinator, nothing_is_live = cluster._coordinator, threading.Condition()
    ended = coordinator.ended

    def tell(gtid: bytes) -> None:
        with nothing_is_live:
            ended(gtid)
            nothing_is_live.notify()

    monkeypatch.setattr(coordinator, "ended", tell)
    target.at, target.problem = at, kind("now")  # type: ignore[assignment]
    error: BaseException | None = None
    try:
        with cluster.transaction() as tx:
            if target is local:
                tx.enlist(local).append("row")
            if at != "one-phase":
                tx.enlist(orders).append("row")
                tx.enlist(billing).append("row")
            if at == "rollback":
                raise ZeroDivisionError
    except BaseException as caught:
        error = caught
    stores = [local] if at == "one-phase" else [orders, billing, *[local] * (at == "decide")]
    with nothing_is_live:
        assert nothing_is_live.wait_for(lambda: not coordinator._live, 30)
    coordinator.recover()
    assert (orders.held, billing.held) == ({}, {})
    rows = [store.rows for store in stores]
    assert rows in ([[]] * len(stores), [["row"]] * len(stores))
    if isinstance(error, TransactionAborted):
        assert rows == [[]] * len(stores)
    assert not isinstance(error, AssertionError)


def test_a_task_that_is_cancelled_while_it_enlists_leaves_no_branch() -> None:
    """A driver that blocks goes on without it: what it has begun is rolled back when it is there."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            is_in, may_go, ended = threading.Event(), threading.Event(), threading.Event()

            class Slow(Store):
                def begin(self, gtid: bytes, bqual: bytes, remaining_s: Any) -> StoreBranch:
                    is_in.set()
                    may_go.wait(30)
                    return Ending(self, gtid, bqual)

            class Ending(StoreBranch):
                def rollback(self) -> None:
                    super().rollback()
                    ended.set()

            slow = await cluster.resource(Slow("slow"))

            async def work() -> None:
                async with cluster.transaction() as tx:
                    await tx.enlist(slow)

            task = asyncio.create_task(work())
            await asyncio.to_thread(is_in.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            may_go.set()
            assert await asyncio.to_thread(ended.wait, 30)
            assert slow.log == ["rollback"]

    asyncio.run(check())


def test_an_interrupt_before_the_commit_begins_rolls_back(
    cluster: coordlib.Cluster, stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block was over, nothing was asked: the databases are not left in their transactions."""
    heard: list[str] = []

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(coordlib.Transaction, "_commit_gen", interrupt)
    with pytest.raises(KeyboardInterrupt), cluster.transaction() as tx:
        tx.on_abort(lambda: heard.append("aborted"))
        for store in stores:
            tx.enlist(store).append("row")
    assert [store.log for store in stores] == [["rollback"], ["rollback"]]
    assert heard == ["aborted"]
    assert cluster._coordinator._live == {}


def test_an_interrupt_after_the_decision_leaves_nobody_untold(
    cluster: coordlib.Cluster, stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who promised would keep their locks for as long as this process lives."""
    heard: list[str] = []

    def interrupt(finish: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster._coordinator, "later", interrupt)
    with pytest.raises(KeyboardInterrupt), cluster.transaction(ack="decided") as tx:
        tx.on_commit(lambda: heard.append("committed"))
        for store in stores:
            tx.enlist(store).append("row")
    assert heard == ["committed"]
    for store in stores:
        assert store.ended.wait(30)
        assert store.rows == ["row"]


def test_a_decorated_callable_that_returns_what_has_yet_to_run_is_refused(cluster: coordlib.Cluster) -> None:
    """It would run when the transaction has ended; what the callable has done so far is not committed."""
    stock = cluster.map("stock")

    class Later:
        async def __call__(self) -> None:
            stock["a"] = 1

    class Piecemeal:
        def __call__(self) -> Iterator[None]:
            stock["b"] = 1
            yield

    functions: list[Callable[[], Any]] = [Later(), Piecemeal()]
    for function in functions:
        with pytest.raises(FlavourError, match="has ended"):
            cluster.transactional()(function)()
    assert stock.snapshot() == {}
