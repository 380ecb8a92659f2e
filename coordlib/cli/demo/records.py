"""What the records prove. Pure: lines in, findings out.

The records are made outside of coordlib: files opened with O_APPEND, whose lines the operating system puts
in order. This module reads them and nothing else; it knows no cluster, and believes no counter of coordlib's.

Lines of the lock journal, which all processes and the demo append to:

    enter TIME LOCK TOKEN PID WORKER             a worker is about to do what the lock protects
    leave TIME LOCK TOKEN PID WORKER OUTCOME     it has: done, refused (certainly not done) or unknown
    killed TIME PID                              the process is dead: its workers are no longer inside

Lines of the acknowledgements, one file for each writer: TIME KEY VALUE, noted after the write had returned.
TIME is CLOCK_MONOTONIC in nanoseconds, the same clock for all processes of a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

__all__ = [
    "Acknowledged",
    "Exclusion",
    "longest_gap_ns",
    "parse_acknowledged",
    "prove_counters",
    "prove_exclusion",
    "prove_writes",
]

_FIELDS = {"enter": 6, "leave": 7, "killed": 3}


class Exclusion(NamedTuple):
    """The lock journal, read to the end."""

    entered: int
    handed_on_ns: list[tuple[str, int]]  # (lock, time from its holder's death to the next holder)
    done: dict[str, int]  # lock -> updates whose write was acknowledged
    unknown: dict[str, int]  # lock -> updates of which nobody knows: the holder was killed, or told so
    violations: list[str]


class _Stay(NamedTuple):
    token: int
    who: str
    pid: int
    line: int


def prove_exclusion(lines: Iterable[str]) -> Exclusion:
    """
    Check that no lock had two holders at once, and that every lock's tokens strictly increase.

    The order is that of the lines. A stay ends with its `leave`, or with its process's death.
    """
    inside: dict[str, list[_Stay]] = {}
    last: dict[str, _Stay] = {}
    bereaved: dict[str, int] = {}
    exclusion = Exclusion(0, [], {}, {}, [])
    violations = exclusion.violations
    entered = 0
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or len(words) != _FIELDS.get(words[0]) or not line.endswith("\n"):
            violations.append(f"line {number} is damaged: {line!r}")
            continue
        if words[0] == "killed":
            _bury(int(words[2]), int(words[1]), inside, bereaved, exclusion)
            continue
        time_ns, lock, token, pid = int(words[1]), words[2], int(words[3]), int(words[4])
        stay = _Stay(token, f"process {pid}, worker {words[5]}", pid, number)
        stays = inside.setdefault(lock, [])
        if words[0] == "enter":
            entered += 1
            violations.extend(
                f"lock {lock!r} had two holders: {stay.who} entered with token {token} (line {number}) while "
                f"{other.who} was inside with token {other.token} (since line {other.line})"
                for other in stays
            )
            before = last.get(lock)
            if before is not None and token <= before.token:
                violations.append(
                    f"lock {lock!r}: {stay.who} entered with token {token} (line {number}), but {before.who} "
                    f"had already had token {before.token} (line {before.line})"
                )
            else:
                last[lock] = stay
            if lock in bereaved:
                exclusion.handed_on_ns.append((lock, time_ns - bereaved.pop(lock)))
            stays.append(stay)
            continue
        found = next((other for other in stays if (other.token, other.who) == (token, stay.who)), None)
        if found is None:
            violations.append(f"lock {lock!r}: {stay.who} left (line {number}) without having entered")
            continue
        stays.remove(found)
        tally = {"done": exclusion.done, "unknown": exclusion.unknown}.get(words[6])
        if tally is not None:
            tally[lock] = tally.get(lock, 0) + 1
    for lock, stays in inside.items():
        for _ in stays:  # still inside at the end: what they did is not on record
            exclusion.unknown[lock] = exclusion.unknown.get(lock, 0) + 1
    return exclusion._replace(entered=entered)


def _bury(
    pid: int, time_ns: int, inside: dict[str, list[_Stay]], bereaved: dict[str, int], exclusion: Exclusion
) -> None:
    for lock, stays in inside.items():
        for stay in [stay for stay in stays if stay.pid == pid]:
            stays.remove(stay)
            exclusion.unknown[lock] = exclusion.unknown.get(lock, 0) + 1
            bereaved[lock] = time_ns


def prove_counters(exclusion: Exclusion, members: Mapping[str, Mapping[str, str]]) -> list[str]:
    """
    Check that no update made under a lock was lost: each counter is what its lock's holders made it.

    Args:
        members: For each member, the counters by lock, as that member has applied them.
    """
    violations = []
    for name, counters in members.items():
        for lock in sorted({*exclusion.done, *exclusion.unknown, *counters}):
            done, unknown = exclusion.done.get(lock, 0), exclusion.unknown.get(lock, 0)
            text = counters.get(lock, "None")
            found = int(text) if text.isdecimal() else 0
            if not done <= found <= done + unknown:
                violations.append(
                    f"member {name} counts {found} {lock}, but {done} were acknowledged under the lock"
                    + (f", and {unknown} more may have happened" if unknown else "")
                )
    return violations


class Acknowledged(NamedTuple):
    """One writer's notes."""

    times_ns: list[int]
    values: dict[str, str]
    violations: list[str]


def parse_acknowledged(files: Mapping[str, Iterable[str]]) -> Acknowledged:
    """Merge the notes of all writers; the times come out in order."""
    merged = Acknowledged([], {}, [])
    for name, lines in files.items():
        for number, line in enumerate(lines, 1):
            words = line.split()
            if len(words) != 3 or not line.endswith("\n"):
                merged.violations.append(f"{name}, line {number} is damaged: {line!r}")
                continue
            time_ns, key, value = words
            if key in merged.values:
                merged.violations.append(f"{name}, line {number}: key {key} was acknowledged twice")
            merged.times_ns.append(int(time_ns))
            merged.values[key] = value
    merged.times_ns.sort()
    return merged


def prove_writes(acknowledged: Mapping[str, str], members: Mapping[str, Mapping[str, str]]) -> list[str]:
    """
    Check that every acknowledged write is on every member.

    Args:
        acknowledged: Key and value of every write whose caller was told that it is done.
        members: For each member, key and value as that member itself has applied them.
    """
    violations = []
    for key, value in acknowledged.items():
        wrong = [name for name, found in members.items() if found.get(key) != value]
        if wrong:
            found = ", ".join(f"{members[name].get(key)} on {name}" for name in wrong)
            violations.append(f"write {key} = {value} was acknowledged, but is {found}")
    return violations


def longest_gap_ns(times_ns: Iterable[int], start_ns: int, end_ns: int) -> int:
    """The longest time between two consecutive instants, in the stretch from `start_ns` to `end_ns`."""
    times = [start_ns, *(time for time in times_ns if start_ns < time < end_ns), end_ns]
    return max(after - before for before, after in pairwise(times))
