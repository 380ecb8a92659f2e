"""Plants each defect in turn and tells who caught it.

First the code as it is must pass, and at the end once more with the seeds that caught something; a simulator that cries
wolf proves nothing. In between, for each defect, in this order and until it is caught:

1. the simulator, with every `invariant()` of the code under test switched off: only what looks from outside is left;
2. the same with `invariant()` on;
3. the scenarios;
4. the tests that the defect names.

What a run found is kept (results.json, a part of the source): the next one gives a defect a few times the seeds that it
needed, and goes soon to the scenario that caught it, so that a full run takes minutes instead of hours. --seeds-max asks
for more: with 2000, also those that only a scenario has caught are given 2000 seeds first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from tests.mutants.patching import Mutant
from tests.mutants.table import AREAS, KINDS, MUTANTS, kind_of
from tests.mutants.worker import Finding

__all__ = ["document", "main"]

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = "tests/scenarios"
RESULTS = Path(__file__).with_name("results.json")

FROM_OUTSIDE = ("global invariant", "history checker")
FROM_OUTSIDE_MIN = 35
UNSEEN_SEEDS = 5
CHECKED_SEEDS = 40
NEW_SEEDS = 100
"""For a defect of which nothing is known yet."""

SEEDS_MARGIN = 4
"""So many times what a defect needed the last time: a change of the simulator gives every seed another plan."""


@dataclass
class Result:
    """Of one defect. `stage` says by which means it was looked for when it was caught."""

    name: str
    finding: Finding
    stage: str = ""
    seeds_in_vain: int = 0  # of the simulator, before other means were tried
    hits: int = 0  # over all stages
    seconds: float = 0.0
    fingerprint: str = ""

    @property
    def kind(self) -> str:
        return kind_of(self.finding.check) if self.finding.check else "nobody"

    @property
    def is_by_seed(self) -> bool:
        """Whether a simulated run caught it; else a test did, or nobody."""
        return bool(self.finding.check) and self.stage.startswith("simulator")


class Workers:
    """Child processes, a few at a time. `end` ends those that run."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._is_ending = False

    def run(self, **arguments: Any) -> Finding:
        with self._lock:
            if self._is_ending:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.mutants.worker", json.dumps(arguments)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._running.add(process)
        try:
            output, errors = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        lines = output.splitlines()
        if process.returncode or not lines:
            if self._is_ending:
                raise KeyboardInterrupt
            if arguments["mutant"] and process.returncode < 0:
                return Finding("crash", f"the interpreter died of signal {-process.returncode}", 1, 1)
            raise SystemExit(f"a worker failed: {arguments}\n{errors[-4000:]}")
        return Finding(**json.loads(lines[-1]))

    def end(self) -> None:
        with self._lock:
            self._is_ending = True
            for process in self._running:
                process.kill()


def _fingerprint(mutant: Mutant) -> str:
    return hashlib.sha256(repr(mutant.edits).encode()).hexdigest()[:16]


def _is_there(test: str) -> bool:
    return (ROOT / test.partition("::")[0]).exists()


def _seeds(mutant: Mutant, known: Result | None, seeds_max: int | None) -> int:
    """How many seeds the simulator is given."""
    if mutant.unseen:
        return UNSEEN_SEEDS
    if seeds_max is not None:
        return seeds_max
    if known is None or not known.finding.check:
        return NEW_SEEDS
    return max(NEW_SEEDS, SEEDS_MARGIN * known.finding.runs) if known.is_by_seed else UNSEEN_SEEDS


def _examine(
    mutant: Mutant,
    workers: Workers,
    known: Result | None,
    seeds_max: int | None,
    seconds_max: float,
    has_scenarios: bool,
) -> Result:
    seeds = _seeds(mutant, known, seeds_max)
    stages: list[tuple[str, dict[str, Any]]] = [
        ("simulator", {"first": 0, "count": seeds, "is_checking": False, "seconds_max": seconds_max}),
        (
            "simulator with invariant()",
            {"first": 0, "count": min(seeds, CHECKED_SEEDS), "is_checking": True, "seconds_max": seconds_max},
        ),
    ]
    if known is not None and known.kind in ("scenario", "unit test") and _is_there(known.finding.message):
        stages.append((known.stage, {"tests": [known.finding.message]}))  # the same one, most likely
    if has_scenarios:
        stages.append(("scenarios", {"tests": [SCENARIOS]}))
    if mutant.tests:
        stages.append(("tests", {"tests": list(mutant.tests)}))
    result = Result(mutant.name, Finding(), fingerprint=_fingerprint(mutant))
    for stage, arguments in stages:
        finding = workers.run(mutant=mutant.name, **arguments)
        result.hits += finding.hits
        result.seconds += finding.seconds
        result.finding, result.stage = finding, stage
        if finding.check:
            break
        if stage == "simulator":
            result.seeds_in_vain = finding.runs
    return result


def _check_unmutated(
    workers: Workers, mutants: Sequence[Mutant], seeds: int, jobs: int, has_scenarios: bool
) -> list[str]:
    """What fails without any defect; nothing may."""
    share = -(-seeds // jobs)
    tasks: list[dict[str, Any]] = [
        {"first": first, "count": min(share, seeds - first), "is_checking": False}
        for first in range(0, seeds, share)
    ]
    suites = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    if has_scenarios:
        suites[SCENARIOS] = None
    if suites:
        tasks.append({"tests": list(suites)})
    with ThreadPoolExecutor(jobs) as pool:
        findings = list(pool.map(lambda task: workers.run(mutant="", **task), tasks))
    return [f"{finding.check}: {finding.message}" for finding in findings if finding.check]


def _test_name(finding: Finding) -> str:
    """A scenario's own name, or a test's with its file."""
    name = finding.message.rpartition("/")[2]
    return name.rpartition("[")[2].rstrip("]") if finding.check == "scenario" and "[" in name else name


def _row(result: Result) -> str:
    finding = result.finding
    caught = f"{result.kind}: {finding.check}" if finding.check else "NOBODY"
    if result.kind in ("scenario", "unit test"):
        caught = f"{result.kind}: {_test_name(finding)}"
    seeds = str(finding.runs) if result.is_by_seed else f"({result.seeds_in_vain})"
    return f"{result.name:<56} {caught:<48.48} {seeds:>6} {result.seconds:>7.1f} s {result.hits:>9} times"


def _load() -> dict[str, Result]:
    if not RESULTS.exists():
        return {}
    found = {}
    for fields in json.loads(RESULTS.read_text()):
        result = Result(**{**fields, "finding": Finding(**fields["finding"])})
        mutant = MUTANTS.get(result.name)
        if mutant is not None and result.fingerprint == _fingerprint(mutant):
            found[result.name] = result
    return found


def _store(results: dict[str, Result]) -> None:
    text = json.dumps([asdict(results[name]) for name in sorted(results)], indent=1)
    RESULTS.write_text(text + "\n")


def document(results: dict[str, Result]) -> str:
    """docs/planted-bugs.md."""
    kinds = Counter(result.kind for result in results.values())
    needed = [result.finding.runs for result in results.values() if result.is_by_seed] or [0]
    lines = [
        "# Planted bugs",
        "",
        "Each of these defects was put into the running code, one at a time, by `make mutants`, which writes down who",
        "caught it. The code's own `invariant()` calls were switched off first, and no unit test ran: what the columns call",
        "*global invariant* and *history checker* judged a simulated cluster from outside (coordlib/testing/simulation).",
        "Only what these missed was looked for by other means. *Seeds* is how many runs of 60 simulated seconds it took;",
        "in brackets, how many were tried in vain before. This file is written by `python -m tests.mutants --document`.",
        "",
        f"Of {len(results)} defects a simulated run caught {len(needed)}. Seeds that they needed: {median_low(needed)} in the "
        f"median, {max(needed)} at most.",
        "",
        "| caught by | defects |",
        "|---|---|",
        *(f"| {kind} | {kinds[kind]} |" for kind in KINDS if kinds[kind]),
        "",
    ]
    for area, mutants in AREAS.items():
        lines += [
            f"## {area.capitalize()}",
            "",
            "| defect | stands for | caught by | seeds |",
            "|---|---|---|---|",
        ]
        for mutant in mutants:
            result = results.get(mutant.name)
            if result is None:
                lines.append(f"| {mutant.name} | {mutant.bug} | not run yet | |")
                continue
            finding = result.finding
            caught = f"{result.kind}: {finding.check}"
            if result.kind in ("scenario", "unit test"):
                caught = f"{result.kind}: `{_test_name(finding)}`"
            elif result.kind in ("invariant()", "nobody"):
                caught = result.kind
            seeds = f"{finding.runs}" if result.is_by_seed else f"({result.seeds_in_vain})"
            why = f" ({mutant.unseen})" if mutant.unseen and not result.is_by_seed else ""
            lines.append(f"| {mutant.name} | {mutant.bug} | {caught}{why} | {seeds} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's docstring. 0 if all is as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; or an area's name")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--seeds-max", type=int, help="for each defect, instead of a few times what it needed"
    )
    parser.add_argument(
        "--seconds-max", type=float, default=1e9, help="of CPU time of the simulator, for each"
    )
    parser.add_argument("--unmutated", type=int, default=40, help="seeds that must pass without a defect")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--document", action="store_true", help="write docs/planted-bugs.md from all results")
    options = parser.parse_args(arguments)
    say = sys.stdout.write
    names = list(
        dict.fromkeys(
            name
            for given in options.names or MUTANTS
            for name in ([mutant.name for mutant in AREAS[given]] if given in AREAS else [given])
        )
    )
    unknown = [name for name in names if name not in MUTANTS]
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}: see --list")
    if options.list:
        for area, mutants in AREAS.items():
            for mutant in mutants:
                say(f"{area:<17} {mutant.name:<56} {mutant.bug}\n")
        return 0
    has_scenarios = any((ROOT / SCENARIOS).glob("test_*.py"))
    known = _load()
    if options.document:
        missing = sorted(MUTANTS.keys() - known.keys())
        if missing:
            say(f"not run yet: {', '.join(missing)}\n")
        (ROOT / "docs" / "planted-bugs.md").write_text(document(known))
        return 0
    chosen = [MUTANTS[name] for name in names]
    workers = Workers()
    try:
        return _run(options, chosen, workers, known, has_scenarios)
    finally:
        workers.end()


def _run(
    options: argparse.Namespace,
    mutants: list[Mutant],
    workers: Workers,
    known: dict[str, Result],
    has_scenarios: bool,
) -> int:
    say = sys.stdout.write
    if options.unmutated:
        failures = _check_unmutated(workers, mutants, options.unmutated, options.jobs, has_scenarios)
        if failures:
            say("the code fails as it is, so that nothing can be said about defects:\n")
            say("".join(f"  {failure}\n" for failure in failures))
            return 1
        say(f"without a defect: {options.unmutated} seeds passed\n")
    results: list[Result] = []
    lock = threading.Lock()

    def examine(mutant: Mutant) -> None:
        before = known.get(mutant.name)
        result = _examine(mutant, workers, before, options.seeds_max, options.seconds_max, has_scenarios)
        result.seconds = round(result.seconds, 1)
        result.finding.seconds = round(result.finding.seconds, 1)
        with lock:
            results.append(result)
            known[mutant.name] = result
            _store(known)
            say(_row(result) + "\n")
            if not result.finding.check or result.finding.runs > 100:
                say(f"    {result.finding.message}\n")
            sys.stdout.flush()

    with ThreadPoolExecutor(options.jobs) as pool:
        for future in [pool.submit(examine, mutant) for mutant in mutants]:
            future.result()
    false = _false_catches(workers, results, options.unmutated, options.jobs)
    for result in false:
        say(f"what caught {result.name} is there without it, too: {result.finding.message}\n")
        del known[result.name]
    if false:
        _store(known)
    return _judge(results, is_complete=len(mutants) == len(MUTANTS)) or bool(false)


def _false_catches(workers: Workers, results: Sequence[Result], unmutated: int, jobs: int) -> list[Result]:
    """Those whose seed fails without the defect as well."""
    by_run: dict[tuple[int, bool], list[Result]] = {}
    for result in results:
        run = (result.finding.runs - 1, result.stage != "simulator")  # with `invariant()`, or without
        if result.is_by_seed and not (run[0] < unmutated and not run[1]):
            by_run.setdefault(run, []).append(result)
    with ThreadPoolExecutor(jobs) as pool:
        findings = pool.map(
            lambda run: workers.run(mutant="", first=run[0], count=1, is_checking=run[1]), by_run
        )
        return [
            result
            for run, finding in zip(by_run, findings, strict=True)
            if finding.check
            for result in by_run[run]
        ]


def _judge(results: list[Result], *, is_complete: bool) -> int:
    say = sys.stdout.write
    kinds = Counter(result.kind for result in results)
    say("\n" + "".join(f"{kind:<17} {kinds[kind]:>3}\n" for kind in KINDS if kinds[kind]))
    idle = sorted(result.name for result in results if not result.hits)
    uncaught = sorted(result.name for result in results if not result.finding.check)
    from_outside = sum(kinds[kind] for kind in FROM_OUTSIDE)
    if idle:
        say(f"never executed, so that nothing was tried: {', '.join(idle)}\n")
    if uncaught:
        say(f"caught by nobody: {', '.join(uncaught)}\n")
    is_too_few = is_complete and from_outside < FROM_OUTSIDE_MIN
    if is_too_few:
        say(f"only {from_outside} caught from outside, {FROM_OUTSIDE_MIN} wanted\n")
    return 1 if idle or uncaught or is_too_few else 0
