"""Windows of ids as time passes, the leader changes and the cluster cannot be reached: in simulated time."""

from __future__ import annotations

import asyncio
import threading
import time
from itertools import pairwise
from typing import Any

import pytest

import coordlib
from coordlib.ids.layout import Layout
from coordlib.testing import Simulation

SLOW = Layout(time_bits=32, sequence_bits=0, worker_bits=8, unit_ms=1000, name="one a second")


class Minted:
    """All ids of a test, and how long the longest mint took, in simulated seconds."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.longest = 0.0

    def mint(self, ids: coordlib.Ids) -> int:
        began = time.monotonic()
        number = ids.mint()
        self.longest = max(self.longest, time.monotonic() - began)
        self.ids.append(number)
        return number

    def check(self) -> None:
        assert len(set(self.ids)) == len(self.ids) > 0


def test_windows_are_renewed_behind_the_callers_backs_and_grow() -> None:
    """From 10 seconds to what was asked for; after the first id nobody ever waits."""
    minted = Minted()
    ends: list[float] = []

    def work(cluster: coordlib.Cluster) -> dict[str, int]:
        ids = cluster.ids(window=60)
        ids.mint()
        for _ in range(2000):
            time.sleep(0.1)
            minted.mint(ids)
            assert ids.window_ends is not None
            ends.append((ids.window_ends - ids.layout.time_of(minted.ids[-1])).total_seconds())
        return ids.counters

    with Simulation(1) as simulation:
        application = simulation.start("n1", work)
        simulation.run_until(lambda: application.is_done, seconds=300)
    minted.check()
    assert minted.longest == 0
    assert application.result["leases"] == 1
    assert 5 <= application.result["renewals"] <= 20
    assert min(ends) > 5
    assert 55 < max(ends) <= 60


def test_nobody_waits_while_the_leader_changes() -> None:
    """However often it does: the request goes on to the next leader."""
    minted = Minted()

    def work(cluster: coordlib.Cluster) -> int:
        ids = cluster.ids(window=10)
        ids.mint()
        for _ in range(1000):
            time.sleep(0.1)
            minted.mint(ids)
        return ids.counters["leases"]

    with Simulation(2) as simulation:
        application = simulation.start("worker", work)
        for _ in range(12):
            simulation.run(seconds=7)
            simulation.crash(leader := simulation.leader or "n1")
            simulation.run(seconds=1)
            simulation.restart(leader)
        simulation.run_until(lambda: application.is_done, seconds=60)
    minted.check()
    assert minted.longest == 0
    assert application.result == 1


def test_minting_goes_on_without_a_quorum_until_the_window_ends() -> None:
    """Then it is refused, saying why, and goes on when there is a quorum again."""
    minted = Minted()
    refused: list[coordlib.IdLeaseExpired] = []

    def work(cluster: coordlib.Cluster) -> tuple[float, Any]:
        ids = cluster.ids(window=20)
        ids.mint()
        for _ in range(300):  # the window grows
            time.sleep(0.1)
            minted.mint(ids)
        simulation.isolate("n1")
        began = time.monotonic()
        while not refused:
            time.sleep(0.05)
            try:
                minted.mint(ids)
            except coordlib.IdLeaseExpired as error:
                refused.append(error)
        alone = time.monotonic() - began
        simulation.heal()
        minted.mint(ids)
        return alone, ids.counters

    with Simulation(3, request_timeout=2) as simulation:
        application = simulation.start("n1", work)
        simulation.run_until(lambda: application.is_done, seconds=120)
    alone, counters = application.result
    assert 10 < alone < 25  # more than half of the window, and the wait
    assert isinstance(refused[0].__cause__, coordlib.NoQuorum)
    assert "no id was minted" in str(refused[0])
    minted.check()
    assert sorted(minted.ids) == minted.ids
    assert counters["leases"] <= 2


def test_tasks_wait_for_a_window_while_others_go_on() -> None:
    """The wait is awaited, and ends at the deadline of each."""

    async def work(cluster: coordlib.AsyncCluster) -> tuple[int, str]:
        ids = cluster.ids(window=1)
        await ids.mint()
        simulation.isolate("n1")
        await asyncio.sleep(2)
        mint = asyncio.create_task(ids.mint())
        turns = 0
        while not mint.done():
            await asyncio.sleep(0.1)
            turns += 1
        error = mint.exception()
        simulation.heal()
        assert await ids.mint() > 0
        return turns, type(error).__name__

    with Simulation(4, request_timeout=1) as simulation:
        application = simulation.start("n1", work)
        simulation.run_until(lambda: application.is_done, seconds=60)
    turns, error = application.result
    assert error == "IdLeaseExpired"
    assert 10 <= turns <= 20


def test_a_close_without_a_quorum_ends_all_the_same() -> None:
    """What cannot be given back lapses; whoever waits for a window at that time is told that it is closed."""

    def work(cluster: coordlib.Cluster) -> tuple[float, list[str]]:
        cluster.ids("held").mint()
        simulation.isolate("n1")
        told: list[str] = []

        def mint() -> None:
            try:
                cluster.ids("wanted").mint()
            except coordlib.CoordError as error:
                told.append(error.code)

        waiting = threading.Thread(target=mint)
        waiting.start()
        time.sleep(0.5)
        began = time.monotonic()
        cluster.close(timeout=3)
        took = time.monotonic() - began
        waiting.join()
        return took, told

    with Simulation(8) as simulation:
        application = simulation.start("n1", work)
        simulation.run_until(lambda: application.is_done, seconds=60)
    took, told = application.result
    assert took < 3.5
    assert told == ["closed"]


def test_who_mints_nothing_keeps_no_worker_and_begins_anew() -> None:
    """The window lapses, costing nothing; the next id is of a new one, and larger."""

    def work(cluster: coordlib.Cluster) -> tuple[list[int], dict[str, int]]:
        ids = cluster.ids()
        minted = [ids.mint()]
        time.sleep(150)
        minted += [ids.mint(), ids.mint()]
        return minted, ids.counters

    with Simulation(5) as simulation:
        application = simulation.start("n1", work)
        simulation.run_until(lambda: application.is_done, seconds=200)
    minted, counters = application.result
    assert sorted(set(minted)) == minted
    assert (counters["leases"], counters["renewals"]) == (2, 0)


def test_a_process_that_stood_still_mints_nothing_that_others_have() -> None:
    """Neither of the time in which it slept, nor of what was granted meanwhile to others."""
    minted = Minted()

    def work(cluster: coordlib.Cluster) -> None:
        ids = cluster.ids(layout=SLOW, window=1)
        for _ in range(60):
            time.sleep(0.5)
            minted.mint(ids)

    with Simulation(6) as simulation:
        applications = [simulation.start(name, work) for name in ("n1", "n2", "a", "b")]
        for name in ("a", "n1", "b", "n2"):
            simulation.run(seconds=3)
            simulation.pause(name)
            simulation.run(seconds=8)
            simulation.resume(name)
        simulation.run_until(lambda: all(a.is_done for a in applications), seconds=300)
    minted.check()


def test_more_than_there_is_time_for_waits_and_is_refused_at_last() -> None:
    """One id a second: one who asks waits for its time; of twenty, most wait in vain."""
    refused: list[coordlib.Overloaded] = []
    minted: list[int] = []

    def work(cluster: coordlib.Cluster) -> float:
        ids = cluster.ids(layout=SLOW)
        began = time.monotonic()
        single = [ids.mint() for _ in range(5)]
        took = time.monotonic() - began
        assert sorted(set(single)) == single

        def ask() -> None:
            try:
                minted.extend(ids.mint_many(1))
            except coordlib.Overloaded as error:
                refused.append(error)

        threads = [threading.Thread(target=ask) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return took

    with Simulation(7, request_timeout=5) as simulation:
        application = simulation.start("n1", work)
        simulation.run_until(lambda: application.is_done, seconds=60)
    assert 2 < application.result < 6
    assert len(minted) + len(refused) == 20
    assert 3 <= len(set(minted)) == len(minted) <= 8
    assert "Mint less" in str(refused[0])


@pytest.mark.parametrize("seed", range(3))
def test_no_id_comes_twice_whatever_happens(seed: int) -> None:
    """Crashes, cuts, pauses, bad disks and wrong clocks, with as few workers and as short windows as may be."""
    minted: list[int] = []
    layout = Layout(time_bits=39, sequence_bits=2, worker_bits=3, unit_ms=100, name="small")

    def work(cluster: coordlib.Cluster) -> None:
        ids = cluster.ids(layout=layout, window=2)
        before = 0
        while True:
            try:
                block = [*ids.mint_many(3), ids.mint()]
            except (coordlib.IdLeaseExpired, coordlib.QuotaExceeded):
                time.sleep(0.5)
                continue
            assert all(a < b for a, b in pairwise([before, *block]))
            before = block[-1]
            minted.extend(block)
            time.sleep(0.1)

    with Simulation(seed, faults="all", fault_seconds=30, request_timeout=2) as simulation:
        for name in ("n1", "n2", "a", "b"):
            simulation.start(name, work, restart_on=(coordlib.CoordError,))
        simulation.run(seconds=35)
        simulation.heal()
        before = len(minted)
        simulation.run(seconds=15)
    assert len(minted) > before > 200
    assert len(set(minted)) == len(minted)


def test_the_same_seed_mints_the_same_ids() -> None:
    """Nothing but the seed decides: not the machine's clock, nor what goes on in the background."""

    def run() -> tuple[list[int], str]:
        minted: list[int] = []

        def work(cluster: coordlib.Cluster) -> None:
            ids = cluster.ids(window=1)
            for _ in range(50):
                time.sleep(0.1)
                minted.append(ids.mint())

        with Simulation(11, faults="all", fault_seconds=10) as simulation:
            for name in ("n1", "a"):
                simulation.start(name, work, restart_on=(coordlib.CoordError,))
            simulation.run(seconds=20)
            return minted, simulation.digest()

    assert run() == run()
