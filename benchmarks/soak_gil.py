"""Ten minutes beside hosts that hog the interpreter: no change of leader, and what a put costs meanwhile.

Every application has a CPU-bound Python thread, and a C call that holds the GIL 200 ms in every second. The last
line is one JSON object; the exit code is 1 when the leader changed.

    python -m benchmarks.soak_gil [--minutes M] [--hold-ms MS] [--isolation thread|process] [--dir PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import machine, quantiles
from benchmarks.processes import Fleet

__all__ = ["main"]

CHUNK_SECONDS = 10.0


def _changes(fleet: Fleet) -> dict[str, int]:
    """Leader changes that each member has seen since it was started."""
    return {
        name: int(member.do("stats").get("counters", {}).get("leader_changes", 0))
        for name, member in fleet.members.items()
    }


def _terms(fleet: Fleet) -> list[int]:
    return sorted({int(member.do("stats").get("term", 0)) for member in fleet.members.values()})


def _soak(fleet: Fleet, seconds: float, hold_ms: int) -> dict[str, Any]:
    leader, client = fleet.leader(), fleet.client()
    callers = {"leader": leader, "follower": fleet.followers(leader)[0], "client": client}
    for caller in callers.values():
        caller.do("put", count=200)
    quiet = {who: caller.do("put", count=500)["samples_us"] for who, caller in callers.items()}
    changes_before, terms_before = _changes(fleet), _terms(fleet)
    for member in fleet.members.values():
        member.do("disturb", burn=True, hold_ms=hold_ms)
    samples: dict[str, list[int]] = {who: [] for who in callers}
    began = monotonic()
    while (left := began + seconds - monotonic()) > 0:
        for caller in callers.values():
            caller.begin("put", count=1_000_000, seconds=min(CHUNK_SECONDS, left))
        for who, caller in callers.items():
            samples[who] += caller.answer()["samples_us"]
        changed = sum(_changes(fleet).values()) - sum(changes_before.values())
        puts = sum(len(one) for one in samples.values())
        print(f"{monotonic() - began:6.0f} s  {puts} puts, {changed} leader changes seen", flush=True)
    for member in fleet.members.values():
        member.do("disturb")
    changes_after, terms_after = _changes(fleet), _terms(fleet)
    late = {name: member.do("stats").get("late_ms_max", 0) for name, member in fleet.members.items()}
    return {
        "leader_changes": max(changes_after[name] - changes_before[name] for name in changes_after),
        "terms": [terms_before, terms_after],
        "late_ms_max": late,
        "seconds": round(monotonic() - began, 1),
        **{f"put_{who}": quantiles(one) for who, one in samples.items()},
        **{f"put_{who}_quiet": quantiles(one) for who, one in quiet.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak_gil", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--hold-ms", type=int, default=200, help="of every second, with the GIL held in C")
    parser.add_argument("--isolation", choices=("thread", "process"), default="thread")
    parser.add_argument("--dir", default="/var/tmp")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="coordlib-soak-", dir=options.dir) as scratch,
        Fleet(scratch, isolation=options.isolation) as fleet,
    ):
        result = _soak(fleet, options.minutes * 60, options.hold_ms)
    for who in ("leader", "follower", "client"):
        noisy, quiet = result[f"put_{who}"], result[f"put_{who}_quiet"]
        print(
            f"put_{who:<9} p50 {noisy['p50_us'] / 1000:.1f} ms, p99 {noisy['p99_us'] / 1000:.0f} ms, longest "
            f"{noisy['max_us'] / 1000:.0f} ms, of {noisy['count']} (quiet: p50 {quiet['p50_us'] / 1000:.1f} ms)"
        )
    is_steady = result["leader_changes"] == 0 and result["terms"][0] == result["terms"][1]
    print("the leader did not change" if is_steady else "MISS: the leader changed")
    configuration = {"isolation": options.isolation, "hold_ms": options.hold_ms, "minutes": options.minutes}
    print(json.dumps({"machine": machine(), "configuration": configuration, "soak_gil": result}), flush=True)
    return 0 if is_steady else 1


if __name__ == "__main__":
    sys.exit(main())
