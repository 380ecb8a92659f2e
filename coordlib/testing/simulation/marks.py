"""Situations that must sometimes occur: a campaign of many seeds in which one never did has proven less than it says.

Each mark stands for a corner that has bitten somebody. Whoever sees it happen hits the mark; who runs many seeds asks
afterwards which were `missing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

__all__ = ["SOMETIMES", "Marks"]

SOMETIMES: dict[str, str] = {
    "committed_earlier_term": "entries of an earlier term became committed with the first of a new leader (Raft §5.4.2)",
    "truncated_conflict": "a follower's entries were replaced because a later leader did not have them",
    "truncated_two_terms": "... and they were of at least two terms (Raft figure 7)",
    "snapshot_installed": "a member took over a leader's snapshot",
    "snapshot_recovered": "a member began from its own snapshot and the log after it",
    "leader_deposed": "a leader learned of its successor, or gave up for want of a quorum",
    "restart_lost_unsynced": "a power cut took what had not been synced",
    "restart_kept_unsynced": "... or left it, although nobody had been told",
    "crash_within_round": "a process ended between two effects of one round",
    "all_members_down": "no member was running",
    "storage_failed": "a disk failed, and its member stopped instead of going on",
    "hold_burst": "what a way had held back for a while arrived at once",
    "hold_leader_burst": "... and so did what had been held back of a leader's",
    "flapping_mended": "a way that broke and mended let through what had waited for it",
    "step_wall_told": "a leader was told of a wall clock that had jumped",
    "drift_felt": "a process was told of less or more time than had passed",
    "latent_rot_found": "a file that had changed unnoticed was found out when it was read",
    "formed_under_faults": "a cluster formed, or had to, while things went wrong",
    "session_expired": "a session ran out",
    "lock_handed_over": "a lock went from a dead or released holder to one who waited",
    "lock_holder_died": "a session ended while it held a lock",
}
"""What the invariants and faults see, by name, in words. Workloads name theirs (`run.MARKS` is all)."""


class Marks:
    """Counts of the situations that occurred."""

    def __init__(self, required: Iterable[str] = SOMETIMES) -> None:
        self.counts: Counter[str] = Counter()
        self.required = set(required)

    def hit(self, name: str) -> None:
        """The situation occurred."""
        self.counts[name] += 1

    def missing(self) -> list[str]:
        """Those that must sometimes occur and never did, sorted."""
        return sorted(name for name in self.required if not self.counts[name])
