"""The simulated network: what it does to frames, and that production's seals stop what they must."""

from __future__ import annotations

from collections import Counter

import pytest

from coordlib.api.maps import _MapBase
from coordlib.testing.simulation.network import Wire
from coordlib.testing.simulation.surroundings import NetworkProfile, quantiles
from coordlib.testing.simulation.world import World
from coordlib.transport.base import FrameReceived

PATIENCE_MS = 15_000


def formed(world: World) -> World:
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
    return world


def put(world: World, name: str, value: int) -> bool:
    """Whether a member's application gets something done."""
    operation = world.member(name).start_operation(_MapBase("m", None, 3000)._put_gen("k", value, None))
    return world.run(PATIENCE_MS, lambda: operation.is_done) and operation.error is None


def work(world: World, duration_ms: int) -> None:
    """Let every member's application put something all the time."""
    end = world.now + duration_ms
    count = 0
    while world.now < end:
        for process in world.up_members:
            count += 1
            process.start_operation(_MapBase("m", None, 3000)._put_gen("k", count, None))
        world.run(20)


def counted(world: World) -> Counter[str]:
    """What the links of all processes count."""
    total: Counter[str] = Counter()
    for process in world.processes.values():
        total.update(process._links.counters)
    return total


def wire_between(world: World, one: str, other: str) -> Wire:
    return next(
        link.wire for link in world.links() if link.wire is not None and link.wire.pairs[0] == (one, other)
    )


@pytest.mark.parametrize("is_sealed", [False, True])
def test_copies_and_replays_are_refused_by_the_seals(is_sealed: bool) -> None:
    """With checksums for a cipher as with the cipher: every one is counted, and none is believed."""
    network = NetworkProfile(duplicate_chance=0.05, replay_chance=0.05)
    with World(1, network=network, is_sealed=is_sealed) as world:
        formed(world)
        work(world, 2000)
        assert put(world, "n1", 0)
        counts, links = world.counts, counted(world)
        assert counts["frames_duplicated"] > 20
        assert counts["frames_replayed"] > 20
        # Those of an older session are told apart by their key id, the others by their counter.
        assert links["replayed"] + links["unknown-session"] > 0.8 * (
            counts["frames_duplicated"] + counts["frames_replayed"]
        )
        assert world.fatal == []


@pytest.mark.parametrize("is_sealed", [False, True])
def test_damaged_and_alien_frames_are_refused_by_the_seals(is_sealed: bool) -> None:
    """Flipped bits, cuts, noise and frames of another cluster are counted, and the cluster goes on."""
    with World(2, network=NetworkProfile(corrupt_chance=0.03), is_sealed=is_sealed) as world:
        formed(world)
        work(world, 3000)
        links = counted(world)
        assert world.counts["frames_corrupted"] > 50
        assert links["auth-failed"] > 5
        assert links["malformed"] > 5
        assert links["wrong-cluster"] > 0
        assert "malformed-authenticated" not in links
        assert world.fatal == []
        world.rare_chance = 0.0
        assert put(world, "n2", 1)


def test_frames_of_one_connection_stay_in_order_through_a_cut() -> None:
    """What waits for a cut to end arrives as it was sent."""
    with World(3, network=NetworkProfile(delay_ms_mean=10, delay_ms_max=40)) as world:
        formed(world)
        one, other = world.member("n1").transport, world.member("n2").transport
        wire = wire_between(world, "n1", "n2")
        other.process.pause()  # so that nobody empties the inbox
        for number in range(50):
            if number == 20:
                world.cut("n1", "n2")
            assert one.send(wire.link.id, b"frame %d" % number)
            world.run(2)
        world.mend_all([("n1", "n2")])
        world.run(200)
        frames = [event.frame for event in other.inbox if isinstance(event, FrameReceived)]
        assert [frame for frame in frames if frame.startswith(b"frame")] == [
            b"frame %d" % number for number in range(50)
        ]


def test_a_cut_that_lasts_ends_the_connection_and_a_hold_does_not() -> None:
    """A held way loses nothing, and gives everything at once; a cut one is dialled again."""
    with World(4) as world:
        formed(world)
        held, cut = wire_between(world, "n1", "n2"), wire_between(world, "n1", "n3")
        world.hold_all([("n1", "n2")])
        world.cut_all([("n1", "n3")])
        world.run(5000)
        assert held.is_up
        assert len(held.held[0]) > 0
        assert not cut.is_up
        world.member("n2").pause()
        before = len(world.member("n2").transport.inbox)
        count = sum(len(wire.held[0]) for wire in world.held if wire.pairs[0] == ("n1", "n2"))
        world.release_all([("n1", "n2")])
        world.member("n2").resume()
        assert len(world.member("n2").transport.inbox) - before >= count
        assert world.held == {}


def test_a_way_that_is_cut_twice_is_open_when_it_was_mended_twice() -> None:
    """Faults overlap, and none ends another."""
    with World(5) as world:
        world.cut_all([("n1", "n2")])
        world.cut_all([("n1", "n2"), ("n2", "n3")])
        world.hold_all([("n1", "n2")])
        world.mend_all([("n1", "n2")])
        assert world.blocked == {("n1", "n2"), ("n2", "n3")}
        world.mend_all([("n1", "n2"), ("n2", "n3")])
        assert world.blocked == {("n1", "n2")}
        world.release_all([("n1", "n2")])
        assert world.blocked == set()


def test_a_full_queue_refuses_frames_and_empties_again() -> None:
    """A sender is told at once, and nothing that was taken is lost."""
    with World(6, network=NetworkProfile(queue_frames_max=20)) as world:
        formed(world)
        wire = wire_between(world, "n1", "n2")
        transport = world.member("n1").transport
        world.hold_all([("n1", "n2")])
        taken = [transport.send(wire.link.id, b"x") for _ in range(50)]
        assert sum(taken) <= 20
        assert world.counts["frames_refused"] >= 30
        world.release_all([("n1", "n2")])
        world.run(300)
        assert wire.under_way[0] < 5
        assert transport.send(wire.link.id, b"x")


def test_some_frames_of_a_lost_connection_arrive_late() -> None:
    """All of them or none, if so asked."""
    for chance in (0.0, 1.0):
        with World(7, network=NetworkProfile(late_chance=chance, delay_ms_min=5, delay_ms_mean=8)) as world:
            formed(world)
            for _ in range(20):
                world.run(50)
                world.reset_links_of(world.up_members[0].name)
            assert (world.counts["frames_late"] > 0) == (chance > 0)
            assert world.fatal == []


def test_delays_follow_their_profile() -> None:
    """Most are about the mean, none above the maximum, and the slow ones far beyond."""
    table = quantiles(2, 5.0, 20, 0.02, 500)
    usual = [delay for delay in table if delay <= 20]
    assert table == sorted(table)
    assert table[0] == 2
    assert table[-1] == 500
    assert len(table) - len(usual) == round(0.02 * len(table))
    assert 4.5 < sum(usual) / len(usual) < 5.2
    assert set(quantiles(3, 3.0, 3, 0.0, 0)) == {3}
