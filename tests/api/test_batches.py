"""Conditional batches: compare, then or otherwise write, as users hold them."""

from __future__ import annotations

import asyncio

import pytest

import coordlib
from coordlib import ABSENT, BatchResult, Delete, Equals, Put, Revision, Unchanged
from coordlib.cbor import encode
from coordlib.errors import LockLost, QuotaExceeded, UsageError
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.wire.messages import RequestKind


def entries(cluster: coordlib.Cluster) -> int:
    """How many entries the log has."""
    last = commands.decode_reply(cluster._run(_ask()))[4]
    assert isinstance(last, int)
    return last


def _ask() -> OpGen[bytes]:
    query = commands.query_tx_read(b"none", b"k")
    reply: bytes = yield Step(RequestKind.QUERY, query, monotonic_ms() + 10_000)
    return reply


def test_if_all_conditions_hold_all_is_written_in_one_entry(cluster: coordlib.Cluster) -> None:
    """Over several maps, at one revision."""
    stock, orders = cluster.map("stock"), cluster.map("orders")
    stock["sku"] = 3
    stock["old"] = 1
    before = entries(cluster)
    result = (
        cluster.compare(Equals(stock, "sku", 3), Equals(orders, "o-1", ABSENT))
        .then(Put(stock, "sku", 2), Delete(stock, "old"), Put(orders, "o-1", {"sku": "sku"}))
        .otherwise(Put(orders, "missed", True))
        .commit()
    )
    assert result == BatchResult(True, Revision(before + 1), None)
    assert result
    assert entries(cluster) == before + 1
    assert (stock.snapshot(), orders.snapshot()) == ({"sku": 2}, {"o-1": {"sku": "sku"}})
    found = orders.get_versioned("o-1")
    assert found is not None
    assert found.mod_revision == result.revision


def test_if_one_does_not_hold_the_others_are_written(cluster: coordlib.Cluster) -> None:
    """And the result says which; without `otherwise` nothing is."""
    stock = cluster.map("stock")
    stock["sku"] = 3
    batch = cluster.compare(Equals(stock, "sku", 3), Equals(stock, "sku", 4)).then(Put(stock, "sku", 5))
    result = batch.commit()
    assert (result.succeeded, result.failed) == (False, 1)
    assert not result
    assert stock["sku"] == 3
    assert not batch.otherwise(Put(stock, "sku", 4)).commit()
    assert stock["sku"] == 4
    assert batch.commit().failed == 0  # a batch is immutable, and can be committed again
    assert stock["sku"] == 4


def test_a_revision_tells_whether_a_key_was_touched(cluster: coordlib.Cluster) -> None:
    """Also if it has the same value again; 0 is that of a key that is not there."""
    stock = cluster.map("stock")
    revision = stock.put("sku", 3)
    assert cluster.compare(Unchanged(stock, "sku", revision)).then(Put(stock, "n", 1)).commit()
    stock["sku"] = 3
    assert not cluster.compare(Unchanged(stock, "sku", revision)).then(Put(stock, "n", 2)).commit()
    assert cluster.compare(Unchanged(stock, "none", 0)).then(Put(stock, "none", ABSENT)).commit()
    assert stock.snapshot() == {"sku": 3, "n": 1}


def test_without_conditions_it_writes_to_many_maps_at_once(cluster: coordlib.Cluster) -> None:
    """Of several writes to one key the last one counts."""
    stock, orders = cluster.map("stock"), cluster.map("orders")
    batch = cluster.compare().then(Put(stock, "a", 1), Put(orders, "b", 2))
    assert batch.then(Put(stock, "a", 3)).commit().succeeded
    assert (stock["a"], orders["b"]) == (3, 2)


def test_a_question_alone_makes_no_entry(cluster: coordlib.Cluster) -> None:
    """All conditions are looked at in one moment; the revision says which."""
    stock = cluster.map("stock")
    stock.update(a=1, b=2)
    before = entries(cluster)
    assert cluster.compare(Equals(stock, "a", 1), Equals(stock, "b", 2)).commit() == (True, before, None)
    assert cluster.compare(Equals(stock, "a", 1), Equals(stock, "b", 1)).commit() == (False, before, 1)
    assert entries(cluster) == before


def test_a_guard_that_is_lost_refuses_both_ways(cluster: coordlib.Cluster) -> None:
    """Nothing is written, neither then nor otherwise."""
    stock = cluster.map("stock")
    lock = cluster.lock("l")
    grant = lock.acquire()
    batch = cluster.compare(Equals(stock, "a", ABSENT)).then(Put(stock, "a", 1)).otherwise(Put(stock, "b", 1))
    assert batch.guard(grant).commit()
    lock.release()
    with pytest.raises(LockLost):
        batch.guard(grant).commit()
    assert stock.snapshot() == {"a": 1}


def test_what_makes_no_sense_is_refused_before_it_is_sent(cluster: coordlib.Cluster) -> None:
    """Maps of others, things that are no conditions or writes, values that cannot be stored, too many of them."""
    stock = cluster.map("stock")
    with coordlib.local() as other, pytest.raises(UsageError, match="handle"):
        cluster.compare(Equals(other.map("stock"), "a", 1))
    with pytest.raises(UsageError, match="condition"):
        cluster.compare(Put(stock, "a", 1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="write"):
        cluster.compare().then(Equals(stock, "a", 1))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="object"):
        cluster.compare().then(Put(stock, "a", object()))
    with pytest.raises(UsageError, match="revision"):
        cluster.compare(Unchanged(stock, "a", -1))
    with pytest.raises(UsageError, match="map"):
        cluster.compare(Equals("stock", "a", 1))  # type: ignore[arg-type]
    many = [Put(stock, number, 1) for number in range(5000)]
    with pytest.raises(QuotaExceeded, match="tx_writes_max"):
        cluster.compare().then(*many).commit()
    with cluster.transaction(), pytest.raises(UsageError, match="transaction"):
        cluster.compare().then(Put(stock, "a", 1)).commit()
    assert len(stock) == 0


def test_a_state_that_is_too_large_by_the_time_is_an_error(cluster: coordlib.Cluster) -> None:
    """The cluster checks before it appends, and again when it applies: the answer is the same."""
    operation = cluster.compare().then(Put(cluster.map("stock"), "a", 1))._commit_gen()
    next(operation)
    with pytest.raises(QuotaExceeded, match="nothing was written"):
        operation.send(encode((0, TxStatus.ABORTED.value, "quota", 7, 0, -1)))


def test_tasks_have_batches_too() -> None:
    """The same, awaited."""

    async def work() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            stock = cluster.map("stock")
            batch = cluster.compare(Equals(stock, "a", ABSENT)).then(Put(stock, "a", 1))
            results = await asyncio.gather(*[batch.commit() for _ in range(8)])
            assert sum(result.succeeded for result in results) == 1
            assert await stock.get("a") == 1
            assert "1 conditions, 1 writes" in repr(batch)

    asyncio.run(work())
