"""Transactions in simulated clusters: whatever befalls them, no sum is ever seen that is not whole."""

from __future__ import annotations

import time

import coordlib
import coordlib.testing
from coordlib.errors import CoordError
from coordlib.testing import Simulation

TOTAL = 200


def transfer(cluster: coordlib.Cluster) -> None:
    """Move money to and fro. What fails has failed as a whole, or not at all."""
    accounts = cluster.map("accounts")

    @cluster.transactional(retries=20)
    def move(amount: int) -> None:
        if "a" not in accounts:
            accounts.update(a=TOTAL, b=0)
        accounts["a"] -= amount
        accounts["b"] += amount

    for amount in range(1, 15):
        try:
            move(amount)
        except CoordError:
            pass
        time.sleep(0.3)  # so that it goes on while the sums are looked at


def audit(cluster: coordlib.Cluster, seen: list[int]) -> None:
    """Read both accounts at one revision, again and again."""
    accounts = cluster.map("accounts")
    for _ in range(30):
        try:
            with cluster.transaction(read_only=True):
                if "a" in accounts:
                    assert accounts["a"] + accounts["b"] == TOTAL
                    seen.append(accounts["b"])
        except CoordError:
            pass
        time.sleep(0.3)


def test_the_sum_of_the_accounts_is_whole_at_every_revision() -> None:
    """Two that transfer and one that sums up, while members crash, hang, and are cut off."""
    seen: list[int] = []

    def scenario(sim: Simulation) -> None:
        sim.start("n1", transfer)
        sim.start("n2", transfer)
        sim.start("n3", audit, seen)
        sim.run(30)

    coordlib.testing.simulate(scenario, seeds=range(4), faults="all")
    assert len(set(seen)) > 10


def test_a_service_takes_part_in_a_simulated_cluster() -> None:
    """Hosted by one member and called by another; the same from the same seed."""
    results: list[list[int]] = []

    class Shelf:
        def __init__(self, cluster: coordlib.Cluster) -> None:
            self._cluster = cluster

        def price(self, sku: str) -> int:
            with self._cluster.transaction(propagation="mandatory"):
                return len(sku)

    def host(cluster: coordlib.Cluster) -> None:
        cluster.participant("shelf")(Shelf(cluster))
        time.sleep(20)

    def order(cluster: coordlib.Cluster, found: list[int]) -> None:
        time.sleep(5)
        with cluster.transaction():
            found.append(cluster.service("shelf").price("sku"))
            cluster.map("orders")["sku"] = found[-1]
        found.append(cluster.map("orders")["sku"])

    def scenario(sim: Simulation) -> None:
        results.append([])
        sim.start("n1", host)
        sim.start("n2", order, results[-1])
        sim.run(15)

    for _ in range(2):
        coordlib.testing.simulate(scenario, seeds=range(1), faults="none")
    assert results == [[3, 3], [3, 3]]
