"""Ids from the cluster, through both faces: what a caller sees, and what is asked of the cluster for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

import coordlib
from coordlib.api.ids import FIRST_WINDOW_MS, WINDOW_MS_MAX
from coordlib.ids.layout import COORDLIB_EPOCH_MS, DEFAULT, DISCORD, JS53, SONYFLAKE, TWITTER, Layout
from coordlib.machine import commands
from coordlib.machine.ids import DEFAULT_EPOCH_MS
from coordlib.machine.limits import Limits
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.wire.messages import RequestKind
from tests.api.conftest import SECRET, free_ports
from tests.api.test_fork import in_child, refused

TINY = Layout(time_bits=41, sequence_bits=12, worker_bits=1, name="two workers")


def member(directory: Path, **settings: Any) -> coordlib.Cluster:
    port = free_ports(1)[0]
    return coordlib.Cluster(
        "shop",
        node="n1",
        members={"n1": f"tcp://127.0.0.1:{port}"},
        secret=SECRET,
        data_dir=directory,
        start_timeout=15.0,
        **settings,
    )


def client_of(cluster: coordlib.Cluster, endpoint: str, name: str = "") -> coordlib.Cluster:
    return coordlib.connect(endpoint, cluster="shop", secret=SECRET, name=name)


def endpoint_of(cluster: coordlib.Cluster) -> str:
    (row,) = cluster.stats()["members"].values()
    return str(row["endpoint"])


def leased(cluster: coordlib.Cluster, name: str = "default") -> int:
    """How many workers of a generator are in use, as the cluster has it."""

    def ask() -> OpGen[int]:
        body = commands.query_ids_info(name.encode())
        reply = yield Step(RequestKind.QUERY, body, monotonic_ms() + 5000)
        return int(commands.decode_reply(reply)[3])

    return cluster._run(ask())


def test_constants_are_those_of_the_replicated_state() -> None:
    """They are written down twice, since neither may import the other."""
    assert COORDLIB_EPOCH_MS == DEFAULT_EPOCH_MS
    assert Limits().ids_window_ms_max == WINDOW_MS_MAX


def test_ids_rise_strictly_however_they_are_minted(cluster: coordlib.Cluster) -> None:
    """By mint, next, iteration and in blocks; all of one worker, all positive."""
    ids = cluster.ids()
    minted = [ids.mint(), ids.next(), next(ids), *islice(ids, 1000), *ids.mint_many(5000), ids.mint()]
    assert all(before < after for before, after in pairwise(minted))
    assert minted[0] > 0 and minted[-1] < 1 << 63
    assert {DEFAULT.decompose(number)[2] for number in minted} == {ids.worker} == {0}


def test_tasks_mint_the_same_way() -> None:
    """And with a window there, without suspending: no other task gets a turn."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            ids = cluster.ids()
            minted = [await ids.mint()]
            turns: list[int] = []
            asyncio.get_running_loop().call_soon(turns.append, 1)
            minted += [await ids.mint(), await ids.next(), *await ids.mint_many(1000)]
            async for number in ids:
                minted.append(number)
                if len(minted) == 2000:
                    break
            assert turns == []
            assert all(before < after for before, after in pairwise(minted))
            assert ids.worker == 0

    asyncio.run(check())


def test_a_block_is_a_range_where_the_worker_is_lowest(cluster: coordlib.Cluster) -> None:
    """And a sequence of as many in order elsewhere; more than a second has are refused."""
    assert isinstance(cluster.ids().mint_many(1000), range)
    block = cluster.ids("t", layout=TWITTER).mint_many(5000)
    assert len(block) == 5000
    assert sorted(set(block)) == list(block)
    assert list(cluster.ids().mint_many(0)) == []
    for count in (-1, 5_000_000):
        with pytest.raises(coordlib.UsageError, match="at once"):
            cluster.ids().mint_many(count)


@pytest.mark.parametrize("layout", [TWITTER, DISCORD, SONYFLAKE, JS53], ids=lambda layout: layout.name)
def test_every_layout_is_minted_as_it_is_read(cluster: coordlib.Cluster, layout: Layout) -> None:
    """The presets of others too: what is minted says when and by which worker."""
    ids = cluster.ids("t", layout=layout)
    for number in (ids.mint(), *ids.mint_many(20)):
        assert layout.decompose(number)[2] == ids.worker
        assert ids.window_ends is not None and layout.time_of(number) < ids.window_ends
    assert layout is not JS53 or ids.mint() < 1 << 53


def test_a_name_has_one_generator_in_a_handle(cluster: coordlib.Cluster) -> None:
    """Whoever asks again gets it; with another layout nobody does, nor with what is none."""
    ids = cluster.ids("orders", layout=JS53)
    assert cluster.ids("orders") is ids
    assert cluster.ids("orders", layout=JS53) is ids
    assert cluster.ids("others") is not ids
    with pytest.raises(coordlib.UsageError, match="another name"):
        cluster.ids("orders", layout=DEFAULT)
    for arguments in ({"layout": "twitter"}, {"window": 0}, {"window": 601}, {"window": "1"}, {"name": ""}):
        with pytest.raises(coordlib.UsageError):
            cluster.ids(**arguments)


def test_asking_for_a_generator_asks_the_cluster_nothing() -> None:
    """Before the start, too; and then there is no id without a start."""
    cluster = coordlib.local()
    ids = cluster.ids()
    assert (ids.worker, ids.window_ends) == (None, None)
    for attempt in (ids.mint, lambda: ids.mint_many(2), lambda: ids.inspect(1)):
        with pytest.raises(coordlib.NotStarted):
            attempt()
    with cluster:
        assert ids.mint() > 0
        assert ids.counters == {"leases": 1, "renewals": 0, "borrowed": 0, "regressions": 0, "waits": 0}


def test_a_closed_cluster_mints_nothing(cluster: coordlib.Cluster) -> None:
    """Neither from what there was of the window, nor for a generator that is asked for later."""
    ids = cluster.ids()
    ids.mint()
    cluster.close()
    for attempt in (ids.mint, ids.next, lambda: next(ids), lambda: ids.mint_many(1), lambda: ids.inspect(1)):
        with pytest.raises(coordlib.ClusterClosed):
            attempt()
    with pytest.raises(coordlib.ClusterClosed):
        cluster.ids("later").mint()


def test_many_threads_that_need_a_window_ask_once(cluster: coordlib.Cluster) -> None:
    """One worker for all of them, and no id twice."""
    ids = cluster.ids()
    together = threading.Barrier(20)
    minted: list[int] = []

    def mint() -> None:
        together.wait()
        minted.extend([ids.mint() for _ in range(100)])

    threads = [threading.Thread(target=mint) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(minted)) == 2000
    assert ids.counters["leases"] == 1


def test_many_tasks_that_need_a_window_ask_once_and_may_be_cancelled() -> None:
    """The window comes for those who still wait, whoever asked first."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            ids = cluster.ids()
            tasks = [asyncio.create_task(ids.mint()) for _ in range(20)]
            await asyncio.sleep(0)
            tasks[0].cancel()
            minted = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(minted[0], asyncio.CancelledError)
            assert len(set(minted[1:])) == 19
            assert ids.counters["leases"] == 1

    asyncio.run(check())


def test_every_process_has_a_worker_of_its_own_and_gives_it_back(tmp_path: Path) -> None:
    """A third one of two workers is refused until one of them is free: by a close, at once."""
    with member(tmp_path / "d") as cluster:
        endpoint = endpoint_of(cluster)
        ours = cluster.ids("t", layout=TINY)
        with client_of(cluster, endpoint) as client, client_of(cluster, endpoint) as another:
            theirs = client.ids("t", layout=TINY)
            minted = [*ours.mint_many(1000), *theirs.mint_many(1000)]
            assert len(set(minted)) == 2000
            assert {ours.worker, theirs.worker} == {0, 1}
            third = another.ids("t", layout=TINY)
            with pytest.raises(coordlib.QuotaExceeded, match="becomes free in"):
                third.mint()
            client.close()
            number = third.mint()
            assert third.worker == 1
            assert number > max(minted)
            with pytest.raises(coordlib.ConditionFailed, match="another name"):
                another.ids("default").mint_many(1) and cluster.ids("default", layout=JS53).mint()
        assert leased(cluster, "t") == 1


def test_an_unused_rest_is_given_back_by_tasks_too(tmp_path: Path) -> None:
    """And by a generator that never minted nothing is."""
    with member(tmp_path / "d") as cluster:
        endpoint = endpoint_of(cluster)

        async def work() -> int:
            client = coordlib.connect_async(endpoint, cluster="shop", secret=SECRET)
            async with client:
                client.ids("never")
                return await client.ids().mint()

        assert asyncio.run(work()) > 0
        assert leased(cluster) == 0


def test_an_id_tells_who_minted_it(tmp_path: Path) -> None:
    """By the name of the member or client; not for one that was never granted to anybody."""
    with member(tmp_path / "d") as cluster, client_of(cluster, endpoint_of(cluster), "worker-7") as client:
        ours, theirs = cluster.ids().mint(), client.ids().mint()
        ids = cluster.ids()
        assert ids.inspect(ours).node == "n1"
        info = ids.inspect(theirs)
        assert (info.node, info.worker, info.id) == ("worker-7", 1, theirs)
        assert ids.inspect(theirs - (1 << 50)).node is None
        with pytest.raises(coordlib.UsageError):
            ids.inspect(-1)

        async def ask() -> Any:
            client = coordlib.connect_async(endpoint_of(cluster), cluster="shop", secret=SECRET)
            async with client:
                return await client.ids().inspect(theirs)

        assert asyncio.run(ask()) == info


def test_a_member_in_a_process_of_its_own_grants_windows_too(tmp_path: Path) -> None:
    """To its application, which mints under its own name."""
    with member(tmp_path / "d", isolation="process") as cluster:
        ids = cluster.ids()
        assert ids.inspect(ids.mint()).node == "n1.app"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_mints_nothing_from_its_parents_window(tmp_path: Path) -> None:
    """It is told what to do, and attaching gives it a worker of its own."""
    with member(tmp_path / "d") as cluster:
        endpoint, ids = endpoint_of(cluster), cluster.ids()
        before = ids.mint()

        def check() -> None:
            for attempt in (ids.mint, ids.next, lambda: ids.mint_many(2), lambda: next(ids)):
                refused(attempt)
            with pytest.raises(coordlib.ForkedError, match="connect"):
                ids.mint()
            refused(cluster.ids)
            cluster.close()
            with client_of(cluster, endpoint) as client:
                assert client.ids().mint() > before
                assert client.ids().worker == 1

        in_child(check)
        assert ids.mint() > before
        assert ids.worker == 0


def test_first_windows_are_small() -> None:
    """What a process that dies at once keeps from others; and smaller yet if less is asked for."""
    with coordlib.local() as cluster:
        for window, expected_ms in ((60, FIRST_WINDOW_MS), (2, 2000)):
            ids = cluster.ids(f"w{window}", window=window)
            number = ids.mint()
            assert ids.window_ends is not None
            span = ids.window_ends - ids.layout.time_of(number)
            assert 0 < span.total_seconds() * 1000 <= expected_ms


def error_of(mint: Callable[[], int]) -> type[BaseException]:
    try:
        mint()
    except coordlib.CoordError as error:
        return type(error)
    raise AssertionError("minted")


def test_what_stops_the_node_stops_the_waiting() -> None:
    """Whoever waits for a window when the cluster is closed is told so, at once."""
    cluster = coordlib.local()
    with cluster:
        ids = cluster.ids()
        asked = threading.Event()
        # The request is swallowed, as by a leader that is about to die.
        ids._begin = lambda operation: asked.set()
        results: list[type[BaseException]] = []
        thread = threading.Thread(target=lambda: results.append(error_of(ids.mint)))
        thread.start()
        asked.wait()
    thread.join()
    assert results == [coordlib.ClusterClosed]
