"""Three members and clients, on real sockets and files."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

import coordlib
from tests.api.conftest import SECRET, Trio

PATIENCE_SECONDS = 15.0


def eventually(condition: Callable[[], bool]) -> None:
    """Ask again until it holds; what is waited for happens in other threads."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


def test_every_member_and_client_sees_what_any_wrote(trio: Trio) -> None:
    """Writes of each are read by all others at once: reads are linearizable."""
    with trio.connect(name="visitor") as client:
        handles = {**trio.nodes, "client": client}
        for writer, handle in handles.items():
            handle.map("m")["writer"] = writer
            assert [other.map("m")["writer"] for other in handles.values()] == [writer] * 4
        with client.lock("a") as grant:
            assert trio.nodes["n1"].lock("a").info() == ("visitor", grant.token, 0)
            with pytest.raises(coordlib.LockTimeout):
                trio.nodes["n2"].lock("a").acquire(timeout=0)


def test_a_leader_that_leaves_hands_over(trio: Trio) -> None:
    """Its locks are free at once, and another leads. (How long that takes: `stop_graceful` in the benchmarks.)"""
    leader = trio.leader
    rest = [node for name, node in trio.nodes.items() if name != leader]
    with trio.connect() as client:
        client.map("m")["k"] = 1
        trio.nodes[leader].lock("a").acquire()
        trio.nodes.pop(leader).close()
        rest[0].map("m")["k"] = 2
        with client.lock("a", timeout=1):
            assert client.map("m")["k"] == 2
    assert rest[0].stats()["leader"] != leader


def test_a_member_comes_back_with_its_disk(trio: Trio) -> None:
    """Whatever was acknowledged while it was away is there for it too."""
    gone = next(name for name in trio.nodes if name != trio.leader)
    trio.nodes.pop(gone).close()
    writer = next(iter(trio.nodes.values()))
    for i in range(50):
        writer.map("m")[i] = i
    trio.start_together([gone])
    back = trio.nodes[gone]
    assert back.map("m").snapshot() == {i: i for i in range(50)}
    eventually(lambda: back.map("m").read_stale(49) == 49)


def test_the_whole_cluster_restarts_from_its_disks(trio: Trio) -> None:
    """Nothing acknowledged is lost, and tokens go on rising."""
    trio.nodes["n1"].map("m")["k"] = "kept"
    with trio.nodes["n2"].lock("a") as grant:
        token = grant.token
    names = list(trio.nodes)
    with trio.connect() as client:
        uuids = {node._cluster_uuid() for node in (*trio.nodes.values(), client)}
    trio.close()
    trio.start_together(names)
    assert {node._cluster_uuid() for node in trio.nodes.values()} == uuids  # one, for its whole life
    assert len(uuids) == 1
    assert trio.nodes["n3"].map("m")["k"] == "kept"
    with trio.nodes["n1"].lock("a") as grant:
        assert grant.token > token


def test_a_follower_far_behind_catches_up_by_a_snapshot(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the others have forgotten the part of the log that it lacks."""
    monkeypatch.setattr("coordlib.node.transfer.LOG_ENTRIES_MAX", 40)
    monkeypatch.setattr("coordlib.node.transfer.CHUNK_SIZE_BYTES", 5000)
    monkeypatch.setattr("coordlib.node.kernel.ENTRIES_RETAINED", 5)
    gone = next(name for name in trio.nodes if name != trio.leader)
    trio.nodes.pop(gone).close()
    writer = next(iter(trio.nodes.values()))
    expected = {}
    for i in range(100):
        expected[i] = "x" * 500
        writer.map("m")[i] = expected[i]
    assert writer.stats()["first_index"] > 50
    trio.start_together([gone])
    back = trio.nodes[gone]
    eventually(lambda: back.map("m").read_stale(99) == expected[99])
    assert back.map("m").snapshot() == expected
    assert back.stats()["snapshot_index"] > 0


def test_a_client_follows_the_leader(trio: Trio) -> None:
    """Its session, its locks and its calls live on when the leader goes."""
    with trio.connect() as client:
        client.map("m")["k"] = 0
        with client.lock("a") as grant:
            trio.nodes.pop(trio.leader).close()
            for i in range(1, 20):
                client.map("m").put("k", i, guard=grant)
            grant.ensure_held()
        assert client.map("m")["k"] == 19


def test_a_client_attaches_by_any_one_member(trio: Trio) -> None:
    """It learns of the others, the leader among them."""
    for endpoint in trio.members.values():
        with coordlib.connect(endpoint, cluster="trio", secret=SECRET) as client:
            client.map("m")["k"] = endpoint


def test_a_wrong_secret_is_told_in_words(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    """By the one that has it, in its error, and by the others, in their log; they go on working."""
    gone = next(name for name in trio.nodes if name != trio.leader)
    trio.nodes.pop(gone).close()
    stranger = trio.make(gone, secret="another secret, which is long enough as well", start_timeout=2.0)
    with caplog.at_level(logging.WARNING, "coordlib"), pytest.raises(coordlib.StartError) as caught:
        stranger.start()
    assert "COORDLIB_SECRET" in str(caught.value)
    texts = [record.getMessage() for record in caplog.records if "secret" in record.getMessage()]
    assert any(text.startswith(name) for text in texts for name in trio.nodes), texts
    assert len(texts) < 12, "said once, not a thousand times"
    node = next(iter(trio.nodes.values()))
    node.map("m")["k"] = 1
    assert any(key.startswith("refused") for key in node.stats()["wire"])
    client = trio.connect(secret="another secret, which is long enough as well", start_timeout=1.0)
    with pytest.raises(coordlib.StartError, match="COORDLIB_SECRET"):
        client.start()


def test_a_wiped_directory_is_refused_with_the_remedy(trio: Trio) -> None:
    """What the lost disk had promised cannot be known."""
    gone = next(name for name in trio.nodes if name != trio.leader)
    trio.nodes.pop(gone).close()
    (trio.directory / gone).rename(trio.directory / "elsewhere")
    wiped = trio.make(gone, start_timeout=5.0)
    with pytest.raises(coordlib.StartError, match="wiped"):
        wiped.start()
    next(iter(trio.nodes.values())).map("m")["k"] = 1


def test_a_call_without_a_quorum_ends_at_its_deadline(make_trio: Callable[..., Trio]) -> None:
    """And says whether it may have happened."""
    trio = make_trio(request_timeout=1.0)
    last = next(name for name in trio.nodes if name != trio.leader)
    node = trio.nodes[last]
    for name in list(trio.nodes):
        if name != last:
            trio.nodes.pop(name).close()
    begin = time.monotonic()
    with pytest.raises((coordlib.NoQuorum, coordlib.CommitTimeout)):
        node.map("m")["k"] = 1
    with pytest.raises(coordlib.NoQuorum):
        node.map("m").get("k")
    assert time.monotonic() - begin < 4
    begin = time.monotonic()
    trio.close()
    assert time.monotonic() - begin < 6


def test_tasks_use_members_and_clients(trio: Trio) -> None:
    """Many at once, from one event loop."""

    async def check() -> None:
        client = coordlib.connect_async(
            list(trio.members.values()), cluster="trio", secret=SECRET, session_ttl=3.0
        )
        async with client:
            numbers = client.map("m")

            async def add(_: int) -> None:
                async with client.lock("a"):
                    await numbers.put("n", await numbers.get("n", 0) + 1)

            await asyncio.gather(*(add(i) for i in range(30)))
            assert await numbers.get("n") == 30

    asyncio.run(check())


def test_stats_tell_how_the_cluster_is(trio: Trio) -> None:
    """Members, roles, indexes and counters under stable names."""
    leader = trio.leader

    def known() -> dict[str, Any]:
        return trio.nodes[leader].stats()

    stats = known()
    assert stats["role"] == "leader"
    assert {"term", "commit_index", "applied_index", "sessions", "members", "counters", "wire"} <= set(stats)
    assert set(stats["members"]) == set(trio.members)
    eventually(lambda: all("lag" in entry for entry in known()["members"].values()))
