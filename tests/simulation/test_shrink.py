"""A failing plan is cut down to what it needs, and never to something that fails in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.testing.simulation.fault_kinds import Fault
from coordlib.testing.simulation.plan import Plan, draw_plan
from coordlib.testing.simulation.shrink import shrink
from coordlib.testing.simulation.surroundings import ClockProfile, DiskProfile, NetworkProfile

CHECK = "commit quorum"
BASE = next(plan for plan in map(draw_plan, range(100)) if plan.clients == 3 and plan.members == 5)


def with_faults(count: int) -> Plan:
    return replace(BASE, faults=tuple(Fault(1000 * place, "reset", place, 0, 0.5) for place in range(count)))


def failing(needed: Callable[[Plan], bool], tried: list[Plan] | None = None) -> Callable[[Plan], str]:
    """An attempt that fails with the check if the plan has what is needed."""

    def attempt(plan: Plan) -> str:
        if tried is not None:
            tried.append(plan)
        return CHECK if needed(plan) else ""

    return attempt


@settings(max_examples=60)
@given(
    st.integers(2, 40).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=2, max_size=2))
    )
)
def test_two_faults_that_are_needed_are_all_that_stays(drawn: tuple[int, set[int]]) -> None:
    """Wherever they are among the others, and nothing else is kept."""
    count, needed = drawn
    plan = with_faults(count)
    wanted = {plan.faults[place] for place in needed}
    reduction, runs = shrink(plan, CHECK, failing(lambda p: wanted <= set(p.faults)))
    assert reduction.faults == tuple(sorted(needed))
    assert set(reduction.calm) == {"forming", "network", "disk", "clock"}
    assert len(reduction.without) == len(plan.load.weights) - 1, "somebody must ask something"
    assert reduction.clients == 0
    assert runs <= 120


@pytest.mark.parametrize("needed", [0, 1])
def test_what_needs_few_faults_keeps_none_or_one(needed: int) -> None:
    """None at all, too."""
    reduction, _ = shrink(with_faults(30), CHECK, failing(lambda p: len(p.faults) >= needed))
    assert len(reduction.faults or ()) == needed


def test_what_is_needed_besides_faults_is_kept() -> None:
    """Surroundings as they were drawn, a service, clients: of each what the failure needs."""
    plan = replace(with_faults(5), network=replace(NetworkProfile(), corrupt_chance=0.01))
    plan = replace(plan, disk=replace(DiskProfile(), write_ms_mean=10.0), clock=ClockProfile(1, 0))

    def needed(p: Plan) -> bool:
        return p.network != NetworkProfile() and p.clients >= 2 and "locks" in p.load.weights

    reduction, _ = shrink(plan, CHECK, failing(needed))
    assert reduction.calm == ("forming", "disk", "clock")
    assert reduction.clients == 2
    assert "locks" not in reduction.without
    assert needed(reduction.apply(plan))


def test_another_failure_is_not_taken_for_this_one() -> None:
    """Fewer faults break something else: what is kept still breaks what was to be explained."""
    plan = with_faults(8)

    def attempt(p: Plan) -> str:
        return CHECK if set(p.faults) >= set(plan.faults[2:6]) else "liveness"

    reduction, _ = shrink(plan, CHECK, attempt)
    assert reduction.faults == (2, 3, 4, 5)
    assert attempt(reduction.apply(plan)) == CHECK


def test_what_cannot_be_cut_down_stays_as_it_is() -> None:
    """And whatever is shown was run: the result is the plan itself, or one that was tried and failed."""
    plan = with_faults(6)
    tried: list[Plan] = []
    reduction, runs = shrink(plan, CHECK, failing(lambda p: p == plan, tried))
    assert reduction.apply(plan) == plan
    assert len(tried) == runs


def test_cutting_down_ends() -> None:
    """After so many runs with the best there is until then, which is one that fails."""
    tried: list[Plan] = []
    plan = with_faults(200)
    wanted = set(plan.faults[::2])
    reduction, runs = shrink(plan, CHECK, failing(lambda p: wanted <= set(p.faults), tried), attempts_max=30)
    assert runs == len(tried) == 30
    assert wanted <= set(reduction.apply(plan).faults)
