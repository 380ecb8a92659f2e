"""Cut a failing plan down to what is needed for it to fail in the same way.

Since every purpose draws from a stream of its own, what stays behaves much as before, and a shorter list of faults still
leads to the same failure surprisingly often. Faults are removed by halves, then one by one (delta debugging: Zeller and
Hildebrandt 2002); then surroundings are calmed, services and clients left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coordlib.testing.simulation.plan import Plan, Reduction

__all__ = ["shrink"]

Attempt = Callable[[Plan], str]


def shrink(plan: Plan, check: str, attempt: Attempt, *, attempts_max: int = 120) -> tuple[Reduction, int]:
    """
    The smallest reduction found under which the plan still fails with `check`.

    Args:
        plan: As drawn.
        attempt: Runs a plan; returns the name of the check that failed, or "" if none did.

    Returns:
        The reduction and how many runs it took.
    """
    best = Reduction(faults=tuple(range(len(plan.faults))))
    runs = 0

    def still_fails(candidate: Reduction) -> bool:
        nonlocal best, runs
        if runs >= attempts_max:
            return False
        runs += 1
        if attempt(candidate.apply(plan)) != check:
            return False
        best = candidate
        return True

    assert best.faults is not None
    size = max(1, len(best.faults) // 2)
    while best.faults and runs < attempts_max:
        start = 0
        while start < len(best.faults):
            kept = best.faults[:start] + best.faults[start + size :]
            if not still_fails(replace(best, faults=kept)):
                start += size
        if size == 1:
            break
        size //= 2
    for name in ("forming", "network", "disk", "clock"):
        still_fails(replace(best, calm=(*best.calm, name)))
    for name in plan.load.weights:
        if len(best.without) + 1 < len(plan.load.weights):
            still_fails(replace(best, without=(*best.without, name)))
    for clients in range(plan.clients):
        if still_fails(replace(best, clients=clients)):
            break
    return best, runs
