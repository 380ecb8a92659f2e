"""Whole clusters, seeded: what the applications were promised holds through crashes, partitions and pauses."""

from __future__ import annotations

import pytest

from tests.node.linearizable import FOREVER, Event, is_linearizable
from tests.node.workload import Run


@pytest.mark.parametrize("seed", range(14))
def test_promises_hold_through_faults(seed: int) -> None:
    """Exactly once, nothing acknowledged is lost, one holder for each lock, and it all goes on when healed."""
    Run(seed, faults_ms=8000).run()


def test_promises_hold_over_sealed_connections() -> None:
    """The same with the handshakes and seals of production, and their resets."""
    Run(100, faults_ms=3000, is_sealed=True).run()


def test_a_run_is_repeated_by_its_seed() -> None:
    """The same seed is the same run, to the last entry of the log."""
    runs = [Run(7, faults_ms=2000) for _ in range(2)]
    for run in runs:
        run.run()
    assert runs[0].entries == runs[1].entries


def test_the_checker_accepts_what_one_order_explains() -> None:
    """A put of unknown outcome may take effect at any time after it began, or never."""
    put = Event(0, FOREVER, "put", 1, None)
    assert is_linearizable([put, Event(5, 6, "get", None, None), Event(7, 8, "get", None, 1)])
    assert is_linearizable([put, Event(5, 6, "get", None, None)])


def test_the_checker_refuses_a_stale_read_and_a_lost_write() -> None:
    """What was acknowledged before a read began must be seen by it."""
    put = Event(0, 2, "put", 1, None)
    assert not is_linearizable([put, Event(3, 4, "get", None, None)])
    assert not is_linearizable([put, Event(3, 4, "get", None, 1), Event(5, 6, "get", None, 2)])
    assert not is_linearizable([put, Event(3, 4, "cas", (1, 2), False)])
