"""Plans of faults: drawn richly, applied one at a time, healed without a trace, and bounded in what they destroy."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from coordlib.api.maps import _MapBase
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS, LEADER_KINDS, Fault, draw_faults
from coordlib.testing.simulation.faults import FaultInjector
from coordlib.testing.simulation.invariants import Invariants
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.network import KEEPALIVE_MS
from coordlib.testing.simulation.processes import Process
from coordlib.testing.simulation.world import ClockProfile, World

PATIENCE_MS = 20_000
LATER = {
    *("crash_within", "fsync_fails", "write_fails", "read_fails", "disk_full", "bit_rot", "old_copy"),
    "mute_leaders",
}
"""Kinds that count only when what they prepare has come."""


class Cluster:
    """Members and two clients, one of which after the other puts something."""

    def __init__(self, world: World, faults: tuple[Fault, ...] = (), marks: Marks | None = None) -> None:
        self.world = world
        self.ended: list[str] = []
        self.restarted: list[str] = []
        self.count = 0
        world.start_all()
        assert world.run(PATIENCE_MS, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        for name in ("c1", "c2"):
            world.start_client(name)
        self.injector = FaultInjector(
            world, faults, self._restarted, lambda process: self.ended.append(process.name), marks=marks
        )
        world.run(300)
        self._work()

    def _restarted(self, process: Process) -> None:
        self.restarted.append(process.name)

    def _work(self) -> None:
        self.count += 1
        running = [process for process in self.world.processes.values() if process.is_up]
        if running:
            process = running[self.count % len(running)]
            process.start_operation(_MapBase("m", None, 3000)._put_gen("k", bytes(100), None))
        self.world.after(25, self._work)

    def heals(self) -> bool:
        """Everybody is there again and has the same state, and nobody stopped who was not expected to."""
        world = self.world
        self.injector.heal()

        def is_well() -> bool:
            return (
                len(world.up_members) == len(world.members)
                and len(world.up_clients) == 2
                and all(p.kernel.has_usable_leader for p in world.up_members)
                and len({p.kernel.raft.term for p in world.up_members if p.kernel.raft}) == 1
            )

        return world.run(PATIENCE_MS, is_well) and world.fatal == []


@pytest.mark.parametrize("kind", sorted(FAULT_KINDS))
def test_every_kind_has_its_effect_and_heals(kind: str) -> None:
    """Each alone, on a cluster at work: it is applied, nobody stops unexpectedly, and all is as before when healed."""
    with World(sorted(FAULT_KINDS).index(kind), segment_size_bytes=2048) as world:
        cluster = Cluster(world)
        injector = cluster.injector
        world.run(500)
        for attempt in range(12):
            fault = Fault(
                world.now, kind, attempt, min(1500, max(500, FAULT_KINDS[kind].duration_ms_min)), 0.7
            )
            if injector.apply(fault):
                injector.applied[kind] += 1
            assert injector.applied[kind] or kind in LATER | {"latent_rot", "drift"}
            if not injector.applied[kind]:
                world.run(2500)
            else:
                world.run(500)
                break
        assert injector.applied[kind]
        assert cluster.heals(), world.fatal


def test_a_plan_repeats_and_is_made_of_plain_values() -> None:
    """It can be written as JSON and read again."""
    plan = draw_faults(Stream(1, "plan"), members=5, clients=2, from_ms=2000, to_ms=42_000)
    assert plan == draw_faults(Stream(1, "plan"), members=5, clients=2, from_ms=2000, to_ms=42_000)
    assert plan == tuple(Fault(*fault) for fault in json.loads(json.dumps(plan)))
    assert plan == tuple(sorted(plan))
    assert all(2000 <= fault.at_ms <= 42_000 for fault in plan)


def test_plans_are_rich_and_differ() -> None:
    """At least 12 faults a minute in each, the leader among the hit at least three times; all kinds among many."""
    kinds: Counter[str] = Counter()
    sets = set()
    for seed in range(200):
        plan = draw_faults(Stream(seed, "plan"), members=5, clients=2, from_ms=0, to_ms=60_000)
        assert len(plan) >= 12
        assert sum(fault.kind in LEADER_KINDS for fault in plan) >= 3
        kinds.update({fault.kind for fault in plan})
        sets.add(frozenset(fault.kind for fault in plan))
        for fault in plan:
            kind = FAULT_KINDS[fault.kind]
            assert kind.duration_ms_min <= fault.duration_ms <= kind.duration_ms_max
    assert kinds.keys() == FAULT_KINDS.keys()
    assert len(sets) > 190


def test_plans_fit_the_cluster() -> None:
    """Nothing is drawn that needs more members or clients than there are, nor what was not asked for."""
    for seed in range(50):
        for fault in draw_faults(Stream(seed, "plan"), members=1, clients=0, from_ms=0, to_ms=60_000):
            assert FAULT_KINDS[fault.kind].members_min <= 1
            assert FAULT_KINDS[fault.kind].clients_min == 0
        asked = {"crash", "hold"}
        plan = draw_faults(Stream(seed, "plan"), members=3, clients=0, from_ms=0, to_ms=60_000, kinds=asked)
        assert {fault.kind for fault in plan} <= asked


def test_what_ends_comes_back_and_is_told() -> None:
    """A member under its name, a client as another one."""
    with World(1) as world:
        cluster = Cluster(world)
        assert cluster.injector.apply(Fault(world.now, "kill", 1, 300, 0.5))
        assert cluster.injector.apply(Fault(world.now, "crash_client", 1, 300, 0.5))
        assert len(world.up_members) == 2
        assert len(world.up_clients) == 1
        world.run(1000)
        assert len(world.up_members) == 3
        assert len(world.up_clients) == 2
        assert len(cluster.ended) == 2
        assert len(cluster.restarted) == 2
        assert sum(name in world.members for name in cluster.restarted) == 1
        assert not {name for name in cluster.restarted if name not in world.members} & {"c1", "c2"}


def test_the_dead_stay_dead_until_everything_is_healed() -> None:
    """Some down, some cut off; the rest works, whatever was still to come is forgotten."""
    faults = tuple(Fault(at, "crash_all", at, 3000, 0.5) for at in range(4000, 60_000, 1000))
    with World(2, members=5) as world:
        cluster = Cluster(world, faults)
        cluster.injector.schedule()
        injector = cluster.injector
        injector.heal(frozenset({"n1", "n2"}))
        assert injector.gone == {"n1", "n2"}
        rest = [world.member(name) for name in ("n3", "n4", "n5")]
        world.run(5000)
        assert injector.applied["crash_all"] == 0
        assert not world.member("n1").is_up
        assert world.member("n2").is_up
        assert all(process.is_up and process.kernel.has_usable_leader for process in rest)
        assert world.member("n2").kernel.leader == ""
        assert cluster.heals()
        assert injector.gone == frozenset()


def test_never_more_than_a_minority_of_disks_is_spoiled() -> None:
    """However many faults ask for it, a majority has its data."""
    kinds = ("wipe", "bit_rot", "latent_rot", "wipe")
    faults = tuple(Fault(3000 + 50 * n, kinds[n % 4], n, 4000, 0.5) for n in range(60))
    with World(3, members=5, segment_size_bytes=4096) as world:
        cluster = Cluster(world, faults)
        cluster.injector.schedule()
        worst = 0
        for _ in range(200):
            world.run(20)
            worst = max(worst, len({*cluster.injector._rotten, *cluster.injector._own_disks}))
        assert worst == 2
        assert cluster.heals(), world.fatal


def test_a_fault_that_is_left_out_leaves_the_others_as_they_were() -> None:
    """Whom a fault hits is in its pick, not in what was drawn before."""

    def hit(faults: tuple[Fault, ...]) -> str:
        with World(4, members=5) as world:
            cluster = Cluster(world, faults)
            cluster.injector.schedule()
            world.run(4000 - world.now)
            cluster.ended.clear()
            world.run(1000)
            return cluster.ended[0]

    first, second = Fault(3000, "reset", 3, 0, 0.1), Fault(4500, "kill", 9, 100, 0.1)
    assert hit((first, second)) == hit((second,))


SEEN = {
    "hold": "hold_burst",
    "hold_leader": "hold_leader_burst",
    "flapping": "flapping_mended",
    "step_wall": "step_wall_told",
    "drift": "drift_felt",
    "latent_rot": "latent_rot_found",
}
"""Kinds of which it must be seen what they do, besides that they were applied."""


@pytest.mark.parametrize("kind", sorted(SEEN))
def test_what_a_fault_does_is_seen(kind: str) -> None:
    """Each alone, on a cluster at work; without it nothing of the kind is seen."""
    with World(3, segment_size_bytes=2048, clock=ClockProfile(rate_error_permille_max=4)) as world:
        marks = Marks(())
        cluster = Cluster(world, marks=marks)
        world.run(4000)
        assert not marks.counts
        for attempt in range(40):
            cluster.injector.apply(Fault(world.now, kind, attempt, 700, 0.7))
            world.run(1200)
            if kind == "latent_rot":
                cluster.injector.apply(Fault(world.now, "kill", attempt, 100, 0.5))
                world.run(1200)
            if marks.counts[SEEN[kind]]:
                break
        assert marks.counts[SEEN[kind]]
        assert cluster.heals()


@pytest.mark.parametrize("members", [3, 5])
def test_leaders_that_nobody_hears_leave_logs_that_differ_over_terms(members: int) -> None:
    """One after the other is not heard; then none is cut off any more, and logs were cut back over several terms."""
    with World(members, members=members) as world:
        marks = Marks(())
        world.observer = Invariants(list(world.members), marks)
        cluster = Cluster(world)
        assert world.leader is not None
        assert world.leader.kernel.raft is not None
        term = world.leader.kernel.raft.term
        cluster.injector.apply(Fault(world.now, "mute_leaders", 1, 6000, 0.5))
        assert cluster.injector.applied["mute_leaders"] == 0
        world.run(6000)
        assert cluster.injector.applied["mute_leaders"] == 1
        world.run(KEEPALIVE_MS + 1)
        assert not world.blocked
        assert cluster.heals()
        assert world.leader.kernel.raft.term >= term + 3
        assert marks.counts["truncated_two_terms"]


def test_a_hold_that_holds_nothing_back_is_not_seen() -> None:
    """Applied, but to a way on which nothing goes: it shows nothing."""
    with World(3, segment_size_bytes=2048) as world:
        marks = Marks(())
        cluster = Cluster(world, marks=marks)
        assert cluster.injector.apply(Fault(world.now, "hold", 1, 0, 0.5))
        world.run(3000)
        assert not marks.counts["hold_burst"]


def test_a_small_step_of_a_wall_clock_is_not_seen() -> None:
    """What cannot be told from the time that a message takes."""
    with World(3, segment_size_bytes=2048) as world:
        marks = Marks(())
        cluster = Cluster(world, marks=marks)
        assert cluster.injector.apply(Fault(world.now, "step_wall", 1, 0, 0.2))
        world.run(8000)
        assert not marks.counts["step_wall_told"]
