"""Seeded clusters under random faults. To repeat a failure: `Simulation(seed).run()`."""

from __future__ import annotations

from tests.raft.simulation import Simulation

SEEDS = 150


def test_random_faults_break_no_promise() -> None:
    """
    Election Safety, Log Matching, Leader Completeness, State Machine Safety (Raft Fig. 3), durable quorums
    and fresh reads hold at every step; and once the faults end, every member applies a new command.

    The runs must have reached the branches that they are for: a simulation that never truncates a log or
    installs a snapshot proves nothing about either.
    """
    marks: dict[str, int] = {}
    for seed in range(SEEDS):
        simulation = Simulation(seed)
        try:
            for name, count in simulation.run().items():
                marks[name] = marks.get(name, 0) + count
        except Exception as exc:
            exc.add_note(simulation.describe())
            raise
    expected = """
        changes compactions crashes elected overloaded quorum_lost reads rejected snapshots_installed
        stale_rejections stepped_down transfers truncated windows_lost
    """
    assert [name for name in expected.split() if not marks.get(name)] == []


def test_the_same_seed_gives_the_same_run() -> None:
    """Nothing but the seed decides: no clock, no hash order."""
    first, second = Simulation(7), Simulation(7)
    assert first.run() == second.run()
    assert first.describe() == second.describe()
