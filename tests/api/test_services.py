"""Services of other applications, called by name, in a transaction and without."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coordlib
from coordlib.errors import (
    ConfigError,
    FlavourError,
    NoQuorum,
    ServiceError,
    ServiceUnreachable,
    TransactionAborted,
    UsageError,
)
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.txn.branches import BranchFailed
from coordlib.wire.messages import RequestKind
from tests.api.conftest import Trio
from tests.api.test_transactions import LastStore, Store


class Shelf:
    """A service without a database: what it has is in memory, what it promised in the journal."""

    def __init__(self, cluster: coordlib.Cluster, pieces: int = 5) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self.pieces = pieces
        self.reserved = 0
        self.ended = threading.Event()

    def take(self, count: int) -> int:
        with self._cluster.transaction() as tx:
            tx.notes["count"] = tx.notes.get("count", 0) + count
            return self.pieces - self.reserved

    def fail(self) -> None:
        raise ValueError("no such piece")

    def add(self, a: int, *, b: int) -> int:
        return a + b

    def prepare(self, tx: Any) -> bytes | None:
        count = tx.notes.get("count", 0)
        if not count:
            return None
        with self._lock:
            if self.pieces - self.reserved < count:
                raise ValueError("not enough on the shelf")
            self.reserved += count
        return bytes([count])

    def restore(self, redo: bytes) -> None:
        self.reserved += redo[0]

    def commit(self, redo: bytes) -> None:
        with self._lock:
            self.reserved -= redo[0]
            self.pieces -= redo[0]
        self.ended.set()

    def abort(self, redo: bytes) -> None:
        with self._lock:
            self.reserved -= redo[0]
        self.ended.set()


@pytest.fixture
def shelf(cluster: coordlib.Cluster) -> Shelf:
    shelf = Shelf(cluster)
    cluster.participant("shelf")(shelf)
    return shelf


def test_a_service_is_called_without_a_transaction(cluster: coordlib.Cluster, shelf: Shelf) -> None:
    """Arguments and results travel as values; what the operation raises arrives as an error of its own."""
    service = cluster.service("shelf")
    assert service.add(1, b=2) == 3
    assert service.call("add", 3, b=4) == 7
    with pytest.raises(ServiceError, match="no such piece") as caught:
        service.fail()
    assert caught.value.type_name == "ValueError"
    with pytest.raises(ServiceError, match="no operation"):
        service.prepare(None)  # not for callers
    with pytest.raises(ServiceUnreachable, match="nobody hosts"):
        cluster.service("attic").add(1)


def test_a_service_takes_part_in_its_caller_s_transaction(cluster: coordlib.Cluster, shelf: Shelf) -> None:
    """With a map and a database: all or nothing, and one entry decides."""
    orders, stock = cluster.resource(Store("orders")), cluster.map("stock")
    service = cluster.service("shelf")
    with cluster.transaction() as tx:
        assert service.take(2) == 5
        assert service.take(1) == 5
        tx.enlist(orders).append("order")
        stock["sold"] = 3
        assert shelf.pieces == 5
    assert (shelf.pieces, shelf.reserved, orders.rows, stock["sold"]) == (2, 0, ["order"], 3)
    with pytest.raises(TransactionAborted, match="not enough") as caught, cluster.transaction() as tx:
        service.take(9)
        tx.enlist(orders).append("order")
        stock["sold"] = 12
    assert caught.value.reason == "vote-no"
    assert (shelf.pieces, shelf.reserved, orders.rows, stock["sold"]) == (2, 0, ["order"], 3)
    counters = cluster._coordinator.counters
    assert (counters["two_phase"], counters["log_entries"]) == (1, 1)


def test_a_service_that_only_answers_costs_no_entry(cluster: coordlib.Cluster, shelf: Shelf) -> None:
    """Its answers say that it seems to have read only, so it votes first, and the database commits in one phase."""
    orders = cluster.resource(Store("orders"))
    service = cluster.service("shelf")
    with cluster.transaction() as tx:
        assert service.add(1, b=2) == 3
        tx.enlist(orders).append("order")
    assert (orders.rows, orders.log) == (["order"], ["one-phase"])
    counters = cluster._coordinator.counters
    assert (counters["dynamic_one_phase"], counters.get("log_entries", 0)) == (1, 0)
    with cluster.transaction() as tx:
        service.add(1, b=2)
        service.take(1)
        tx.enlist(orders).append("order")
    assert (shelf.pieces, len(orders.rows), counters["two_phase"]) == (4, 2, 1)


def test_a_service_alone_commits_in_one_phase(cluster: coordlib.Cluster, shelf: Shelf) -> None:
    """No entry in the log; a block that raises rolls it back there."""
    service = cluster.service("shelf")
    with cluster.transaction():
        service.take(1)
    assert (shelf.pieces, shelf.reserved) == (4, 0)
    with pytest.raises(ValueError, match="no"), cluster.transaction():
        service.take(1)
        raise ValueError("no")
    host = cluster._host
    assert host is not None
    assert host.participants.works == {}
    assert (shelf.pieces, shelf.reserved) == (4, 0)
    assert "log_entries" not in cluster._coordinator.counters


def test_an_operation_that_raised_cannot_be_committed(cluster: coordlib.Cluster, shelf: Shelf) -> None:
    """Also if its caller swallows the error."""
    service = cluster.service("shelf")
    with pytest.raises(TransactionAborted, match="fail raised"), cluster.transaction():
        service.take(1)
        with pytest.raises(ServiceError):
            service.fail()
    assert (shelf.pieces, shelf.reserved) == (5, 0)


def test_a_service_enlists_databases_of_its_own(cluster: coordlib.Cluster) -> None:
    """Its branch is the caller's transaction's; it may read maps, but not change them there."""
    bills = cluster.resource(Store("bills"))
    prices = cluster.map("prices")
    prices["sku"] = 7

    @cluster.participant("billing")
    class Billing:
        def charge(self, sku: str) -> int:
            with cluster.transaction() as tx:
                price: int = prices[sku]
                tx.enlist(bills).append(f"{price}")
                with pytest.raises(UsageError, match="cannot change maps"):
                    prices[sku] = 0
            return price

    with cluster.transaction():
        assert cluster.service("billing").charge("sku") == 7
        prices["sold"] = 1
        assert bills.rows == []
    assert (bills.rows, prices["sold"]) == (["7"], 1)
    bills.at, bills.problem = "prepare", BranchFailed("credit limit")
    with pytest.raises(TransactionAborted, match="credit limit"), cluster.transaction():
        cluster.service("billing").charge("sku")
        prices["sold"] = 2
    assert (bills.rows, prices["sold"]) == (["7"], 1)


def test_what_cannot_be_hosted_is_refused(cluster: coordlib.Cluster, shelf: Shelf) -> None:
    """Twice the same name, half of a handler, no place for the journal, a face for tasks."""
    with pytest.raises(UsageError, match="already"):
        cluster.participant("shelf")(shelf)

    class Half:
        def prepare(self, tx: Any) -> bytes | None: ...

    with pytest.raises(UsageError, match="abort"):
        cluster.participant("half")(Half)
    with pytest.raises(FlavourError):
        coordlib.AsyncCluster.local().participant("x")
    with pytest.raises(UsageError):
        cluster.service("")


def test_a_handler_is_in_its_caller_s_transaction(cluster: coordlib.Cluster) -> None:
    """It has its name, state and time; its doom, and an error that it swallows, are a vote of no."""
    local = cluster.resource(LastStore("local"))
    heard: list[Any] = []

    @cluster.participant("till")
    class Till:
        def look(self) -> None:
            with cluster.transaction() as tx:
                heard.extend((tx.gtid, tx.state))
                assert 0 < tx.remaining() <= 5

        def doom(self) -> None:
            with cluster.transaction() as tx:
                tx.doom("wrong moon")

        def swallow(self) -> None:
            with pytest.raises(ZeroDivisionError), cluster.transaction():
                raise ZeroDivisionError

        def undo(self) -> None:
            cluster.transaction().begin().rollback()

        def misuse(self) -> None:
            with cluster.transaction() as tx:
                heard.append(tx)
                for add in (tx.before_commit, tx.on_commit, tx.on_abort):
                    with pytest.raises(UsageError, match="application that began"):
                        add(list)
                with pytest.raises(UsageError, match="application that began"), tx.savepoint():
                    pass
                with pytest.raises(UsageError, match="SQLite"):
                    tx.enlist(local)

    till = cluster.service("till")
    with cluster.transaction() as tx:
        till.look()
        assert heard == [tx.gtid, "active"]
    for operation, why in (("doom", "wrong moon"), ("swallow", "inner block"), ("undo", "inner block")):
        with pytest.raises(TransactionAborted, match=why), cluster.transaction():
            till.call(operation)
    with cluster.transaction():
        till.misuse()
        with pytest.raises(UsageError, match="has returned"):
            heard[-1].enlist(local)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("it has no words")


def test_whatever_an_operation_raises_or_returns_is_answered(cluster: coordlib.Cluster) -> None:
    """Once: as an error that travels. No thread of the service dies of it, and its transaction does not commit."""
    runs: list[str] = []
    circle: list[Any] = []
    circle.append(circle)

    class Odd:
        def leave(self) -> None:
            runs.append("leave")
            sys.exit("for good")

        def mumble(self) -> None:
            runs.append("mumble")
            raise Unspeakable

        def shout(self) -> None:
            runs.append("shout")
            raise ValueError("x" * 10_000_000)

        def stammer(self) -> None:
            runs.append("stammer")
            raise ValueError("\udcff")

        def turn(self) -> Any:
            runs.append("turn")
            return circle

        def hand_over(self) -> Any:
            runs.append("hand_over")
            return threading.Lock()

        def flood(self) -> Any:
            runs.append("flood")
            return b"x" * 10_000_000

        def again(self) -> None:
            runs.append("again")
            cluster.service("odd").stammer()

        def answer(self) -> int:
            return 42

    cluster.participant("odd")(Odd())
    odd = cluster.service("odd")
    expected = {
        "leave": "SystemExit: for good",
        "mumble": "cannot be shown",
        "shout": "10000000 characters",
        "stammer": "udcff",
        "turn": "contains itself",
        "hand_over": "cannot be stored",
        "flood": "10000",
    }
    for operation, text in expected.items():
        with pytest.raises(ServiceError, match=text):
            odd.call(operation)
        with pytest.raises(TransactionAborted), cluster.transaction():
            odd.answer()
            with pytest.raises(ServiceError, match=text):
                odd.call(operation)
    with (
        pytest.raises(TransactionAborted),
        cluster.transaction(),
        pytest.raises(ServiceError, match="let its caller do it"),
    ):
        odd.again()  # a service that calls itself, or a circle of them
    assert runs == [operation for operation in expected for _ in range(2)] + ["again"]
    host = cluster._host
    assert host is not None
    assert all(thread.is_alive() for thread in host._threads)
    assert odd.answer() == 42


def test_operations_are_plain_functions(cluster: coordlib.Cluster) -> None:
    """A coroutine would be made and never run."""

    class Tasks:
        async def work(self) -> None: ...

    with pytest.raises(FlavourError, match="async def"):
        cluster.participant("tasks")(Tasks)
    assert "tasks" not in cluster._hosting()._hosted


def test_hosting_that_could_not_be_registered_is_tried_again(
    cluster: coordlib.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same handler: what it was given back of its promises it has."""
    shelf, host = Shelf(cluster), cluster._hosting()

    def no_quorum(name: str) -> OpGen[None]:
        raise NoQuorum("nobody there")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(host, "_register_gen", no_quorum)
        with pytest.raises(NoQuorum):
            cluster.participant("shelf")(shelf)
        with pytest.raises(UsageError, match="already"):
            cluster.participant("shelf")(Shelf(cluster))
    cluster.participant("shelf")(shelf)
    assert cluster.service("shelf").add(1, b=2) == 3
    with pytest.raises(UsageError, match="already"):
        cluster.participant("shelf")(shelf)


def test_a_client_of_a_cluster_that_is_named_local_keeps_its_promises_on_a_disk() -> None:
    """Only `coordlib.local()` may keep them in memory; a name says nothing."""
    secret, endpoint = "a secret that is long enough for this", "memory://named-local"
    member = coordlib.Cluster("local", node="n1", members={"n1": endpoint}, secret=secret, transport="memory")
    client = coordlib.connect(endpoint, cluster="local", secret=secret, transport="memory")
    with member, client, pytest.raises(ConfigError, match="directory"):
        client.participant("till")(Shelf(client))


def test_services_of_other_processes_take_part(make_trio: Callable[..., Trio], tmp_path: Path) -> None:
    """Hosted by one member and by a client, called by another member; the client's restart keeps its promise."""
    trio = make_trio()
    host, caller = trio.nodes["n1"], trio.nodes["n2"]
    shelf = Shelf(host)
    host.participant("shelf")(shelf)
    with trio.connect(name="till") as client:
        with pytest.raises(ConfigError, match="directory"):
            client.participant("till")(Shelf(client))
        till = Shelf(client)
        client.participant("till", directory=tmp_path / "till")(till)
        with caller.transaction():
            caller.service("shelf").take(2)
            caller.service("till").take(3)
        assert (shelf.pieces, till.pieces) == (3, 2)
        with pytest.raises(TransactionAborted), caller.transaction():
            caller.service("shelf").take(1)
            caller.service("till").take(9)
        assert (shelf.pieces, till.pieces, shelf.reserved, till.reserved) == (3, 2, 0, 0)
    with pytest.raises(ServiceUnreachable):
        caller.service("till").add(1, b=1)


def test_a_replica_that_is_gone_but_still_registered_is_passed_over(make_trio: Callable[..., Trio]) -> None:
    """In a transaction and without one: what was certainly not delivered goes to another replica."""
    trio = make_trio()
    caller, host, ghost = trio.nodes.values()
    shelf = Shelf(host, pieces=50)
    host.participant("shelf")(shelf)

    def register() -> OpGen[None]:
        yield Step(RequestKind.COMMAND, commands.service_register("shelf", "ghost"), monotonic_ms() + 10_000)

    ghost._run(register())  # and takes no calls: as one that was killed, until its session ends
    service = caller.service("shelf")
    for number in range(4):
        assert service.add(number, b=1) == number + 1
        with caller.transaction():
            service.take(1)
            service.take(1)
    assert (shelf.pieces, shelf.reserved) == (42, 0)
    with pytest.raises(ServiceUnreachable), caller.transaction():
        host.close()
        service.take(1)


def test_who_is_in_doubt_asks_the_process_that_has_the_last_resource(make_trio: Callable[..., Trio]) -> None:
    """Yes, no, or no answer: while it is at work on the transaction, and when nobody has it."""
    trio = make_trio()
    local = trio.nodes["n1"].resource(LastStore("local"))
    yes, no, live = b"y" * 16, b"n" * 16, b"l" * 16
    local.markers.add(yes)
    trio.nodes["n1"]._coordinator._live[live] = 1
    asking = trio.nodes["n2"]

    def ask(tag: bytes, gtid: bytes) -> bool | None:
        return asking._run(asking._coordinator.ask_decider_gen(tag, gtid))

    assert ask(local.tag, yes) is True
    assert ask(local.tag, no) is False
    assert ask(local.tag, live) is None
    assert ask(b"other", yes) is None
