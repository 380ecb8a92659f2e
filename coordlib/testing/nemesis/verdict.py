"""What was promised, held against what was noted and what every member has at the end.

What must not live here: processes, files other than those of a finished run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, TypeAlias

from coordlib.testing.checkers import check
from coordlib.testing.history import HistoryWriter, Operation, load
from coordlib.testing.nemesis.work import OWN, UNIQUE

__all__ = [
    "Contents",
    "Verdict",
    "judge",
    "judge_agreement",
    "judge_executions",
    "judge_sections",
    "judge_unique",
    "read_back",
]

Contents: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What one member has: map -> key -> value."""

CHECK_SECONDS_MAX: Final = 120.0
SHOWN_MAX: Final = 5


@dataclass
class Verdict:
    """Violations in words, none if all is well; and how much there was to judge."""

    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def judge(directory: Path, contents: Mapping[str, Contents], versions: Mapping[str, int]) -> Verdict:
    """
    Judge a run.

    Args:
        directory: Of its histories (`*.jsonl`) and sections (`*.sections`).
        contents: What every member has, after all work has ended and all have applied the same.
        versions: Of every key of `own`, how often the cluster says it was written.
    """
    operations = load(*sorted(directory.glob("*.jsonl")))
    sections = [
        json.loads(line)
        for path in sorted(directory.glob("*.sections"))
        for line in path.read_text("utf-8").splitlines()
    ]
    verdict = Verdict()
    for found in (
        judge_agreement(contents),
        judge_unique(operations, contents),
        judge_executions(operations, versions),
        judge_sections(sections),
    ):
        verdict.violations += found[:SHOWN_MAX]
        if len(found) > SHOWN_MAX:
            verdict.violations.append(f"... and {len(found) - SHOWN_MAX} more like the last")
    checked = check(operations, time_limit_seconds=CHECK_SECONDS_MAX, clock=monotonic)
    if checked.result != "legal":
        verdict.violations.append(f"the history is {checked.result}:\n{checked.explanation}")
    verdict.counts = {
        "operations": len(operations),
        "ok": sum(one.status == "ok" for one in operations),
        "fail": sum(one.status == "fail" for one in operations),
        "unknown": sum(one.status is None for one in operations),
        "keys": len({one.key for one in operations}),
        "unique writes acknowledged": sum(1 for _ in _unique_puts(operations)),
        "lock sections": sum("from_ns" in one for one in sections),
        "guarded writes": sum("revision" in one for one in sections),
    }
    return verdict


def read_back(
    path: Path, member: str, contents: Contents, keys: Iterable[str], call_ns: int, return_ns: int
) -> None:
    """
    Write what a member has as a history: one read of each key, by one client.

    So the histories of a run show a lost write by themselves, to whoever judges them.

    Args:
        keys: As in histories: map, slash, key. What the member does not have was read as missing.
    """
    writer = HistoryWriter()
    for key in sorted(keys):
        name, _, rest = key.partition("/")
        number = writer.invoke(f"read-back-{member}-{key}", "get", key, None, call_ns)
        writer.ok(number, contents[name].get(rest), return_ns)
    writer.dump(path)


def judge_agreement(contents: Mapping[str, Contents]) -> list[str]:
    """Members that have applied the same have the same."""
    violations = []
    members = sorted(contents)
    for member in members[1:]:
        for name, first in contents[members[0]].items():
            other = contents[member][name]
            differing = sorted(key for key in {*first, *other} if first.get(key) != other.get(key))
            if differing:
                key = differing[0]
                violations.append(
                    f"{members[0]} and {member} have applied the same and differ in {len(differing)} keys of {name}: "
                    f"{key} is {first.get(key)!r} and {other.get(key)!r}"
                )
    return violations


def _unique_puts(operations: Iterable[Operation]) -> Iterable[Operation]:
    return (
        one for one in operations if one.op == "put" and one.status == "ok" and one.key.startswith(UNIQUE)
    )


def judge_unique(operations: Iterable[Operation], contents: Mapping[str, Contents]) -> list[str]:
    """Every member has every acknowledged write of a key that was written once."""
    violations = []
    for one in _unique_puts(operations):
        key = one.key.partition("/")[2]
        for member, has in sorted(contents.items()):
            if has[UNIQUE].get(key) != one.input:
                violations.append(
                    f"{member} has {has[UNIQUE].get(key)!r} at {one.key}: {one.input!r} was acknowledged to {one.client}"
                )
    return violations


def judge_executions(operations: Iterable[Operation], versions: Mapping[str, int]) -> list[str]:
    """Every write of a key with one writer was executed once if it was acknowledged, once at most if unknown."""
    acknowledged: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for one in operations:
        name, _, key = one.key.partition("/")
        if name == OWN and one.op == "put" and one.status != "fail":
            counts = acknowledged if one.status == "ok" else unknown
            counts[key] = counts.get(key, 0) + 1
    violations = []
    for key in sorted({*acknowledged, *unknown, *versions}):
        least = acknowledged.get(key, 0)
        most = least + unknown.get(key, 0)
        if not least <= versions.get(key, 0) <= most:
            violations.append(
                f"{OWN}/{key} was written {versions.get(key, 0)} times: {least} writes were acknowledged, "
                f"{most - least} are unknown"
            )
    return violations


def judge_sections(sections: Iterable[Mapping[str, Any]]) -> list[str]:
    """No lock was held by two at a time, tokens rose with time, and guarded writes' tokens never fell."""
    violations = []
    held: dict[str, list[tuple[int, int, int]]] = {}
    guarded: dict[str, list[tuple[int, int]]] = {}
    for one in sections:
        if "revision" in one:
            guarded.setdefault(one["lock"], []).append((one["revision"], one["token"]))
        else:
            held.setdefault(one["lock"], []).append((one["from_ns"], one["to_ns"], one["token"]))
    for lock, times in sorted(held.items()):
        times.sort()
        for (_, ended, token), (began, _, later) in itertools.pairwise(times):
            if began < ended:
                violations.append(
                    f"{lock} was held under tokens {token} and {later} at once, for {(ended - began) / 1e6:.3f} ms"
                )
            if later <= token:
                violations.append(f"{lock}: token {later} was given after {token}")
    for lock, writes in sorted(guarded.items()):
        writes.sort()
        for (revision, token), (next_revision, later) in itertools.pairwise(writes):
            if later < token:
                violations.append(
                    f"{lock}: a write under token {later} has revision {next_revision}, after one under {token} "
                    f"has {revision}"
                )
    return violations
