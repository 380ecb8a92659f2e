"""What a user of transactions is told who has done it wrongly: what happened, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import coordlib
from coordlib.errors import (
    ServiceError,
    ServiceUnreachable,
    TooManyLastResources,
    TransactionAborted,
    UsageError,
)
from coordlib.txn.resources import SQLite
from tests.api.test_transactions import Store


@pytest.mark.parametrize("wrong", ["postgresql://shop", object(), None])
def test_what_is_no_resource_is_refused(cluster: coordlib.Cluster, wrong: Any) -> None:
    """Registered, with an example of what is; enlisted, with where it comes from. The transaction goes on without it."""
    with pytest.raises(UsageError, match=r"is no resource: give one of coordlib\.txn\.resources"):
        cluster.resource(wrong)
    with cluster.transaction() as tx:
        with pytest.raises(UsageError, match=r"takes what was given to cluster\.resource.*goes into `using`"):
            tx.enlist(wrong)
        cluster.map("stock")["sku-1"] = 1
    assert cluster.map("stock")["sku-1"] == 1


def test_a_resource_that_is_not_registered_is_refused(cluster: coordlib.Cluster) -> None:
    with cluster.transaction() as tx, pytest.raises(UsageError, match=r"give it to cluster\.resource"):
        tx.enlist(Store("orders"))


def test_a_second_last_resource_is_refused_at_once(cluster: coordlib.Cluster, tmp_path: Path) -> None:
    """Not by saying that it must be the first."""
    ledgers = [cluster.resource(SQLite(name, tmp_path / name)) for name in ("first", "second")]
    try:
        with (
            pytest.raises(TooManyLastResources, match="a transaction of its own"),
            cluster.transaction() as tx,
        ):
            for ledger in ledgers:
                tx.enlist(ledger).execute("CREATE TABLE entry (name TEXT)")
    finally:
        for ledger in ledgers:
            ledger.close()


def test_a_transaction_that_has_ended_says_how(cluster: coordlib.Cluster) -> None:
    with cluster.transaction() as committed:
        cluster.map("stock")["sku-1"] = 1
    with pytest.raises(RuntimeError), cluster.transaction() as rolled_back:
        raise RuntimeError
    for tx, how in ((committed, "committed"), (rolled_back, "rolled back")):
        with pytest.raises(UsageError, match=rf"has ended \({how}\): begin another one"):
            tx.doom()


def test_propagation_that_is_not_so_is_named(cluster: coordlib.Cluster) -> None:
    with pytest.raises(UsageError, match=r"propagation='mandatory'.* there is none"):
        cluster.transaction(propagation="mandatory").begin()
    with cluster.transaction(), pytest.raises(UsageError, match=r"propagation='never'.* there is one"):
        cluster.transaction(propagation="never").begin()


def test_digits_instead_of_a_name_are_told_apart(cluster: coordlib.Cluster) -> None:
    """Messages show 32 digits; what is asked for is the bytes."""
    text: Any = "00" * 16
    with pytest.raises(UsageError, match=rf"got '{text}'.*{re.escape('bytes.fromhex(...)')}"):
        cluster.outcome(text)


def test_an_operation_that_is_not_there_is_answered_with_those_that_are(cluster: coordlib.Cluster) -> None:
    class Inventory:
        def reserve(self) -> None: ...

        def count(self) -> None: ...

    cluster.participant("inventory")(Inventory())
    with pytest.raises(ServiceError, match="has no operation 'reserv'; it has 'count', 'reserve'"):
        cluster.service("inventory").reserv()


def test_a_service_that_changes_a_map_is_told_to_leave_it_to_its_caller(cluster: coordlib.Cluster) -> None:
    """It has not begun any transaction as read only."""

    class Inventory:
        def reserve(self) -> None:
            cluster.map("stock")["sku-1"] = 1

    cluster.participant("inventory")(Inventory())
    with (
        pytest.raises(ServiceError, match=r"cannot change maps in it: let its caller do it"),
        cluster.transaction(),
    ):
        cluster.service("inventory").reserve()


def test_a_promise_of_the_wrong_type_is_a_no(cluster: coordlib.Cluster) -> None:
    """What was reserved for it is let go of; else it would come back from the journal as something else."""
    aborted: list[object] = []

    class Inventory:
        def reserve(self) -> None:
            with cluster.transaction() as tx:
                tx.notes["wanted"] = 1

        def prepare(self, tx: Any) -> Any:
            return "one"

        def restore(self, redo: bytes) -> None: ...

        def commit(self, redo: bytes) -> None: ...

        def abort(self, redo: bytes) -> None:
            aborted.append(redo)

    cluster.participant("inventory")(Inventory())
    with (
        pytest.raises(
            TransactionAborted, match=r"prepare\(\) of service 'inventory' returned a str: it returns bytes"
        ),
        cluster.transaction(),
    ):
        cluster.service("inventory").reserve()
        cluster.map("orders")["o-1"] = "placed"
    assert aborted == ["one"]
    assert "o-1" not in cluster.map("orders")


def test_a_service_that_nobody_hosts_is_told_with_what_happened(cluster: coordlib.Cluster) -> None:
    """Nothing; within a transaction that goes on as well."""
    with pytest.raises(
        ServiceUnreachable, match=r"nobody hosts service 'billing' .* nothing was done: start"
    ):
        cluster.service("billing").charge()
    with cluster.transaction():
        with pytest.raises(ServiceUnreachable, match="nothing was done"):
            cluster.service("billing").charge()
        cluster.map("orders")["o-1"] = "placed"
    assert cluster.map("orders")["o-1"] == "placed"
