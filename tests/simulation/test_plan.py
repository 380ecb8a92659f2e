"""What a seed stands for: chance that does not depend on anything else, plans that are rich, and what is left out of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlib.testing.simulation import campaign
from coordlib.testing.simulation.choices import Choices, Stream
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS
from coordlib.testing.simulation.plan import SAFETY_MS, Reduction, draw_plan, loaded_plan
from coordlib.testing.simulation.surroundings import ClockProfile, DiskProfile, NetworkProfile
from coordlib.testing.simulation.workload import SERVICES

PLANS = [draw_plan(seed) for seed in range(300)]
SERVICE_NAMES = [service.name for service in SERVICES]


# -- chance -------------------------------------------------------------------------------------------------


def test_a_stream_depends_on_its_seed_and_its_name_alone() -> None:
    """Not on what else was drawn, nor when; another name or seed is another stream."""
    one, other = Choices(7), Choices(7)
    other.stream("network").random()
    drawn = [one.stream("disk").random() for _ in range(5)]
    assert [other.stream("disk").random() for _ in range(5)] == drawn
    assert [Stream(7, "disk").random() for _ in range(1)] == drawn[:1]
    assert Stream(7, "network").random() != drawn[0] != Stream(8, "disk").random()
    assert one.stream("disk") is one.stream("disk")


def test_a_seed_means_the_same_in_every_process() -> None:
    """A plan is drawn alike, whatever PYTHONHASHSEED says."""
    program = "from coordlib.testing.simulation.plan import draw_plan; print(draw_plan(5))"
    shown = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert shown == [f"{draw_plan(5)}\n"] * 2


def test_all_that_is_drawn_is_written_down() -> None:
    """In order, and in the digest; to ask for a stream changes that too, to ask again does not."""
    choices = Choices(1)
    stream = choices.stream("a")
    drawn = [stream.random(), stream.random()]
    assert list(stream.drawn) == drawn
    before = choices.digest()
    assert choices.digest() == before
    stream.randrange(10)
    assert choices.digest() != before


@given(st.integers(), st.integers(-50, 50), st.integers(0, 100))
def test_draws_are_within_their_bounds(seed: int, low: int, width: int) -> None:
    """Both ends of a range of whole numbers are possible, nothing beyond is."""
    stream = Stream(seed, "x")
    assert low <= stream.randint(low, low + width) <= low + width
    assert 0 <= stream.randrange(width + 1) <= width
    assert low <= stream.uniform(low, low + width) <= low + width
    assert 0 <= stream.getrandbits(width) < 1 << width
    assert len(stream.randbytes(width)) == width
    options = list(range(width + 1))
    assert stream.choice(options) in options
    chosen = stream.sample(options, width // 2)
    assert len(set(chosen)) == width // 2
    assert set(chosen) <= set(options)


def test_draws_reach_both_ends() -> None:
    """A die shows all its faces, about equally often."""
    stream = Stream(1, "die")
    throws = [stream.randint(1, 6) for _ in range(6000)]
    assert sorted(set(throws)) == [1, 2, 3, 4, 5, 6]
    assert all(850 < throws.count(face) < 1150 for face in range(1, 7))


# -- plans --------------------------------------------------------------------------------------------------


def test_plans_are_rich() -> None:
    """Among a campaign's seeds is every size, both kinds of reads and of ciphers, clocks beyond all bounds, every fault."""
    assert {plan.members for plan in PLANS} == set(range(1, 8))
    assert {plan.clients for plan in PLANS} == {0, 1, 2, 3}
    assert {plan.is_sealed for plan in PLANS} == {plan.reads_by_lease for plan in PLANS} == {True, False}
    assert {plan.clock.is_bounded(plan.timing.drift_percent) for plan in PLANS} == {True, False}
    assert {fault.kind for plan in PLANS for fault in plan.faults} == set(FAULT_KINDS)
    for name in ("corrupt_chance", "duplicate_chance", "replay_chance"):
        shares = [bool(getattr(plan.network, name)) for plan in PLANS]
        assert 0.3 < sum(shares) / len(shares) < 0.7, name
    for name in SERVICE_NAMES:
        used = [plan.load.weights[name] > 0 for plan in PLANS]
        assert any(used)
        assert not all(used) or name == SERVICE_NAMES[0]
    assert len({plan.snapshot_entries for plan in PLANS}) > 2
    assert len({plan.append_entries_max for plan in PLANS}) > 2


def test_plans_fit_themselves() -> None:
    """Faults come while they are expected; a single member has a client, and somebody always asks something."""
    for plan in PLANS:
        assert all(2000 <= fault.at_ms <= SAFETY_MS for fault in plan.faults)
        assert plan.members > 1 or plan.clients
        assert any(plan.load.weights.values())
        assert plan.safety_ms + plan.liveness_ms < plan.total_ms
        json.dumps(asdict(plan))


def test_the_loaded_plan_is_what_speed_is_measured_by() -> None:
    """Five members and 50 operations a second, for every seed, whatever else is drawn."""
    for seed in range(20):
        plan = loaded_plan(seed)
        assert (plan.members, plan.load.operations_per_second, plan.is_sealed) == (5, 50, False)
        assert plan.faults
        assert plan == loaded_plan(seed)


# -- what is left out ---------------------------------------------------------------------------------------


def test_a_reduction_leaves_out_what_it_says_and_nothing_else() -> None:
    """Faults by their places, surroundings made mild, services, clients."""
    plan = next(plan for plan in PLANS if plan.clients == 3 and len(plan.faults) > 8)
    assert Reduction().apply(plan) == plan
    reduced = Reduction((1, 5), ("network", "disk", "clock"), ("locks",), 1).apply(plan)
    assert reduced.faults == (plan.faults[1], plan.faults[5])
    assert (reduced.network, reduced.disk, reduced.clock) == (NetworkProfile(), DiskProfile(), ClockProfile())
    assert reduced.load.weights == {name: w for name, w in plan.load.weights.items() if name != "locks"}
    assert reduced.clients == 1
    assert (reduced.seed, reduced.members, reduced.timing) == (plan.seed, plan.members, plan.timing)
    assert Reduction(faults=()).apply(plan).faults == ()


reductions = st.builds(
    Reduction,
    faults=st.none() | st.lists(st.integers(0, 60), unique=True).map(lambda places: tuple(sorted(places))),
    calm=st.lists(st.sampled_from(("forming", "network", "disk", "clock")), unique=True).map(tuple),
    without=st.lists(st.sampled_from(SERVICE_NAMES), unique=True).map(tuple),
    clients=st.none() | st.integers(0, 3),
)


@given(reductions)
def test_the_command_line_of_a_reduction_asks_for_it(reduction: Reduction) -> None:
    """What is printed with a failing seed is what the command takes."""
    asked: list[Reduction] = []

    def take(options: object) -> int:
        asked.append(
            Reduction(*(getattr(options, name) for name in ("faults", "calm", "without", "clients")))
        )
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "_single", take)
        assert campaign.main(["--seed", "17", *reduction.arguments().split()]) == 0
    assert asked == [reduction]
