"""All planted defects, and what kinds of check there are to catch them."""

from __future__ import annotations

from tests.mutants import (
    calls,
    elections,
    ids,
    locks,
    log,
    reads,
    replication,
    sessions,
    snapshots,
    transactions,
    wire,
)
from tests.mutants.patching import Mutant

__all__ = ["AREAS", "INVARIANTS", "KINDS", "MUTANTS", "kind_of"]

AREAS: dict[str, tuple[Mutant, ...]] = {
    "elections": elections.MUTANTS,
    "replication": replication.MUTANTS,
    "log": log.MUTANTS,
    "snapshots": snapshots.MUTANTS,
    "sessions": sessions.MUTANTS,
    "locks": locks.MUTANTS,
    "ids": ids.MUTANTS,
    "reads and clocks": reads.MUTANTS,
    "wire": wire.MUTANTS,
    "transactions": transactions.MUTANTS,
    "calls": calls.MUTANTS,
}
MUTANTS: dict[str, Mutant] = {mutant.name: mutant for mutants in AREAS.values() for mutant in mutants}

INVARIANTS = frozenset(
    (
        "applied order",
        "commit quorum",
        "commit safety",
        "commit term",
        "current read",
        "decision",
        "durable promise",
        "election safety",
        "exactly once",
        "fencing token",
        "horizon",
        "id window",
        "leader completeness",
        "log matching",
        "match index",
        "one cluster",
        "one holder",
        "one outcome",
        "one vote",
        "pending branch",
        "recovered log",
        "same reply",
        "same state",
        "service registry",
        "session belief",
        "synced write",
        "term order",
    )
)
"""The global invariants of `coordlib.testing.simulation.invariants`: what judges a cluster from outside."""

_SYMPTOMS = {
    "busy loop": "liveness",
    "crash": "crash",
    "hang": "liveness",
    "invariant()": "invariant()",
    "history": "history checker",
    "liveness": "liveness",
    "member stopped": "crash",
    "scenario": "scenario",
    "unit test": "unit test",
}

KINDS = (
    "global invariant",
    "history checker",
    "service check",
    "liveness",
    "crash",
    "invariant()",
    "scenario",
    "unit test",
    "nobody",
)


def kind_of(check: str) -> str:
    """To which of `KINDS` a check belongs; those of the workload's services are the rest."""
    if check in INVARIANTS:
        return "global invariant"
    return _SYMPTOMS.get(check, "service check")
