"""The simulated world: time, chance, clocks, and what can be done to a process."""

from __future__ import annotations

import pytest

from coordlib.api.maps import _MapBase
from coordlib.errors import IndeterminateError, StorageFailed
from coordlib.testing.simulation.model import Violation
from coordlib.testing.simulation.processes import MemberProcess
from coordlib.testing.simulation.surroundings import ClockProfile, NetworkProfile
from coordlib.testing.simulation.world import AT_ONCE_MAX, World

PATIENCE_MS = 15_000


def all_work(world: World) -> bool:
    return all(process.kernel.has_usable_leader for process in world.up_members)


def formed(world: World) -> MemberProcess:
    """Start everybody; returns the leader."""
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all_work(world) and world.leader is not None)
    assert world.leader is not None
    return world.leader


def follower(world: World) -> MemberProcess:
    return next(process for process in world.up_members if process is not world.leader)


def test_the_same_seed_is_the_same_run_to_the_last_frame() -> None:
    """And another seed is another one."""

    def trace(seed: int) -> tuple[int, bytes]:
        network = NetworkProfile(duplicate_chance=0.02, replay_chance=0.02, corrupt_chance=0.02)
        with World(seed, network=network) as world:
            formed(world).crash()
            world.run(3000)
            return world.trace, world.choices.digest()

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


def test_everything_of_a_moment_comes_before_the_turns_that_it_leads_to() -> None:
    """A process that is woken twice has one turn, after both."""
    with World(1) as world:
        leader = formed(world)
        order: list[str] = []
        turn = leader.take_turn

        def watched() -> None:
            order.append("turn")
            turn()

        leader.take_turn = watched  # type: ignore[method-assign]  # looked at, not changed

        def happen(what: str) -> None:
            order.append(what)
            leader.wake()

        world.after(5, happen, "first")
        world.after(5, happen, "second")
        world.run(5)
        place = order.index("first")
        assert order[place : place + 3] == ["first", "second", "turn"]


def test_a_process_hears_what_came_before_its_timers_when_it_goes_on_after_a_pause() -> None:
    """A follower that stood still for a minute, with a leader that went on, does not campaign."""
    with World(2) as world:
        formed(world)
        member = follower(world)
        assert member.kernel.raft is not None
        term = member.kernel.raft.term
        member.pause()
        world.run(60_000)
        assert len(member.transport.inbox) > 100
        member.resume()
        world.run(2000)
        assert member.kernel.raft.term == term
        assert member.kernel.raft.counters.get("pre_campaigns", 0) == 0
        assert all_work(world)


def test_lateness_reaches_the_kernel() -> None:
    """A member reports to the leader how long it was kept from running, as in production."""
    with World(3) as world:
        leader = formed(world)
        member = follower(world)
        seen: list[int] = []
        member.pause()
        world.run(700)
        member.resume()
        for _ in range(30):
            world.run(100)
            status = leader.kernel.peers.known[member.name].status
            seen.append(status.late_ms if status is not None else 0)
        assert 700 <= max(seen) <= 710
        assert seen[-1] == 0


def test_a_leader_that_stands_still_is_replaced_and_steps_down_when_it_goes_on() -> None:
    """It hears of its successor before it does anything as a leader."""
    with World(4) as world:
        old = formed(world)
        old.pause()
        assert world.run(5000, lambda: world.leader is not None and world.leader is not old)
        world.run(30_000)
        old.resume()
        assert world.run(2000, lambda: not old.kernel.is_leader)
        assert all_work(world)
        assert world.fatal == []


@pytest.mark.parametrize("rate", [996, 1004, 1150])
def test_a_clock_keeps_its_time_when_its_rate_changes(rate: int) -> None:
    """It never goes back or jumps, and goes at its new rate from then on."""
    with World(5) as world:
        member = formed(world)
        before = member.clock()
        member.set_rate(rate)
        assert member.clock() == before
        world.run(10_000)
        assert abs(member.clock() - before - 10 * rate) <= 1


def test_a_wall_clock_may_jump_and_drift_without_harm() -> None:
    """It dates things; nothing waits for it."""
    with World(6) as world:
        formed(world)
        for step, rate in ((365 * 86_400_000, 1100), (-365 * 86_400_000, 900), (1, 1000)):
            member = follower(world)
            before = member.wall_clock()
            member.wall_offset += step
            member.set_wall_rate(rate)
            assert abs(member.wall_clock() - before - step) <= 1
            world.run(2000)
        assert all_work(world)
        assert world.fatal == []


def test_the_drift_of_a_profile_is_within_the_bound_or_is_said_not_to_be() -> None:
    """What is drawn keeps the promises of leases testable."""
    with World(7) as world:
        percent = world.timing.drift_percent
        for seed in range(50):
            with World(seed) as other:
                assert ClockProfile.draw(other.choices.stream("plan")).is_bounded(percent)
        assert not ClockProfile.unbounded().is_bounded(percent)


def test_a_slow_process_takes_time_for_every_turn() -> None:
    """Turns become rare, and the cluster goes on all the same."""
    with World(8) as world:
        formed(world)
        member = follower(world)
        member.slow_ms_max = 100
        turns = 0
        turn = member.take_turn

        def counted() -> None:
            nonlocal turns
            turns += 1
            turn()

        member.take_turn = counted  # type: ignore[method-assign]  # looked at, not changed
        world.run(5000)
        assert 5000 / 100 - 5 < turns < 5000 / 100 * 4
        assert world.fatal == []


def test_an_expected_error_stops_a_member_and_an_unexpected_one_is_told() -> None:
    """Only what a fault leads to is taken for granted; and the disk is let go of."""
    with World(9) as world:
        formed(world)
        first, second = (process for process in world.up_members if process is not world.leader)
        world.expect(first.name, StorageFailed)
        for process in (first, second):
            process.fs.fail("datasync")
        operation = first.start_operation(_MapBase("m", None, 3000)._put_gen("k", 1, None))
        assert world.run(PATIENCE_MS, lambda: not first.is_up and not second.is_up)
        assert [name for _, name, _ in world.stopped] == [first.name]
        assert [name for name, _ in world.fatal] == [second.name]
        assert isinstance(operation.error, IndeterminateError)  # its write was on the way
        for process in (first, second):
            world.start_member(process.name)
        assert world.run(PATIENCE_MS, lambda: all_work(world) and len(world.up_members) == 3)


def test_the_end_of_a_process_is_told_once() -> None:
    """Whichever way it ends, and however often."""
    with World(10) as world:
        leader = formed(world)
        ended: list[str] = []
        world.on_end = lambda process: ended.append(process.name)
        leader.crash()
        leader.kill()
        leader.end()
        assert ended == [leader.name]


def test_a_power_cut_is_noticed_later_than_a_kill() -> None:
    """The operating system of a killed process closes its connections; nobody does for a machine without power."""
    with World(11) as world:
        formed(world)
        one, other = (process for process in world.up_members if process is not world.leader)
        leader = world.leader
        assert leader is not None
        one.kill()
        world.run(70)
        assert not leader._links.is_connected(one.name)
        other.crash()
        world.run(10)
        assert leader._links.is_connected(other.name)
        assert world.run(2000, lambda: not leader._links.is_connected(other.name))


def test_a_moment_without_end_is_a_violation_that_names_what_goes_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process whose every turn wakes it again: time stands still, and a bound on events ends it the same way every time."""
    with World(1, members=1) as world:
        process = world.start_member("n1")
        world.run(500)
        turn = process.take_turn

        def again() -> None:
            turn()
            world.at(world.now, process.wake)

        monkeypatch.setattr(process, "take_turn", again)
        process.wake()
        now = world.now
        with pytest.raises(Violation) as caught:
            world.run(1000)
        assert caught.value.check == "no progress"
        assert "a turn of n1, SimulatedProcess.wake" in str(caught.value)
        assert world.now == now


def test_as_much_as_happens_at_one_moment_may_happen_at_every_one() -> None:
    """The bound is on a moment, not on a run."""
    with World(1, members=1) as world:
        seen: list[int] = []
        for moment in range(3):
            for _ in range(AT_ONCE_MAX * 2 // 3):
                world.at(moment, seen.append, moment)
        world.run(10)
        assert len(seen) == 3 * (AT_ONCE_MAX * 2 // 3)
