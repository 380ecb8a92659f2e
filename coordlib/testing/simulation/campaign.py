"""Many seeds at once, on all cores, and what they add up to.

    python -m coordlib.testing.simulation --seeds 0-999 [--jobs 2] [--twice 10] [--loaded]
    python -m coordlib.testing.simulation --seed 17 [--faults 3,9] [--calm network] [--without locks] [--clients 0]

The first runs seeds; every failing one is cut down and shown with the second, which runs one again. `--twice` runs the
first so many seeds again, in another process with another PYTHONHASHSEED, and compares their traces.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import logging
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from itertools import islice
from pprint import pformat
from tempfile import TemporaryDirectory
from time import monotonic, process_time
from typing import NamedTuple

from coordlib.testing.history import HistoryWriter
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS
from coordlib.testing.simulation.invariants import Violation
from coordlib.testing.simulation.marks import Marks
from coordlib.testing.simulation.plan import Plan, Reduction, draw_plan, loaded_plan
from coordlib.testing.simulation.run import MARKS, Report, simulate
from coordlib.testing.simulation.shrink import shrink

__all__ = ["Outcome", "main", "run_seeds"]

logging.getLogger("coordlib").addHandler(
    logging.NullHandler()
)  # what is logged of faults is not of interest here

MARKS_FROM_SEEDS = 300
"""A campaign of so many seeds must have seen every situation at least once."""
UNKNOWN_SHARE_MAX = 0.01
SHRUNK_MAX = 3
LIMIT_SECONDS = 300.0
"""A seed takes seconds, a hundred times less than this."""
HANGS = "hangs"


class Outcome(NamedTuple):
    seed: int
    report: Report | None
    check: str  # what was violated; empty if nothing
    message: str
    at_ms: int
    cpu_seconds: float


def _attempt(plan: Plan) -> str:
    try:
        simulate(plan.seed, plan)
    except Violation as violation:
        return violation.check
    return ""


def _run_one(seed: int, is_loaded: bool = False) -> Outcome:
    # A run makes few cycles and ends soon: looking for them takes a tenth of its time.
    gc.disable()
    began = process_time()
    try:
        report = simulate(seed, loaded_plan(seed) if is_loaded else None)
    except Violation as violation:
        return Outcome(
            seed, None, violation.check, violation.message, violation.at_ms, process_time() - began
        )
    finally:
        gc.enable()
        gc.collect()
    return Outcome(seed, report, "", "", 0, process_time() - began)


def _watched(run: Callable[[int], Outcome], seed: int, reports: str, limit_seconds: float) -> Outcome:
    """Run a seed in a process that ends when it takes too long, and leaves where it was in `reports`."""
    path = os.path.join(reports, str(seed))
    with open(path, "w") as report:
        faulthandler.dump_traceback_later(limit_seconds, exit=True, file=report)
        try:
            return run(seed)
        finally:
            faulthandler.cancel_dump_traceback_later()
            os.unlink(path)


def _hung(reports: str) -> list[Outcome]:
    """The seeds whose processes ended because they took too long; each is said once."""
    found = []
    for name in sorted(os.listdir(reports), key=int):
        path = os.path.join(reports, name)
        with open(path) as report:
            stack = report.read()
        os.unlink(path)
        if stack:
            found.append(Outcome(int(name), None, HANGS, f"it does not end; it was here:\n{stack}", 0, 0.0))
    return found


def _run_all(
    run: Callable[[int], Outcome], seeds: Sequence[int], jobs: int, limit_seconds: float
) -> Iterator[Outcome]:
    # Whoever hangs takes the whole pool with it: the others that were under way go on in another one.
    left = dict.fromkeys(seeds)
    with TemporaryDirectory() as reports:
        while left:
            running: set[Future[Outcome]] = set()
            try:
                with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                    waiting = iter(list(left))
                    while True:
                        for seed in islice(waiting, 2 * jobs - len(running)):
                            running.add(pool.submit(_watched, run, seed, reports, limit_seconds))
                        if not running:
                            break
                        done, running = wait(running, return_when=FIRST_COMPLETED)
                        for outcome in [future.result() for future in done if future.exception() is None]:
                            del left[outcome.seed]
                            yield outcome
                        for future in done:
                            future.result()
            except BrokenProcessPool:
                hung = _hung(reports)
                if not hung:
                    raise  # it ended of something else
                for outcome in hung:
                    del left[outcome.seed]
                    yield outcome


def run_seeds(
    seeds: Sequence[int],
    *,
    jobs: int,
    is_loaded: bool = False,
    hash_seed: str | None = None,
    run: Callable[[int], Outcome] | None = None,
    limit_seconds: float = LIMIT_SECONDS,
) -> Iterator[Outcome]:
    """
    Outcomes as they come, from `jobs` processes; each began with `hash_seed` as its PYTHONHASHSEED, if given.

    Args:
        run: What to do with a seed, in place of simulating it; other processes must be able to import it.
        limit_seconds: A seed that takes longer fails, with the stack at which it was. It is there for what goes on for
            ever within one moment, and should be so long that no other seed comes near it, however slow the machine.
    """
    before = os.environ.get("PYTHONHASHSEED")
    if hash_seed is not None:
        os.environ["PYTHONHASHSEED"] = hash_seed
    try:
        yield from _run_all(run or partial(_run_one, is_loaded=is_loaded), seeds, jobs, limit_seconds)
    finally:
        if hash_seed is not None:
            if before is None:
                del os.environ["PYTHONHASHSEED"]
            else:
                os.environ["PYTHONHASHSEED"] = before


class _Sum:
    """What a campaign adds up to."""

    def __init__(self) -> None:
        self.marks = Marks(MARKS)
        self.faults: Counter[str] = Counter()
        self.traces: dict[int, str] = {}
        self.failed: list[Outcome] = []
        self.short: list[str] = []
        self.operations = self.leader_changes = self.simulated_ms = 0
        self.keys = self.unknown = 0
        self.cpu_seconds = 0.0
        self.count = 0

    def add(self, outcome: Outcome) -> None:
        self.count += 1
        self.cpu_seconds += outcome.cpu_seconds
        report = outcome.report
        if report is None:
            self.failed.append(outcome)
            self.simulated_ms += outcome.at_ms
            return
        self.simulated_ms += report.simulated_ms
        self.operations += report.operations
        self.leader_changes += report.leader_changes
        self.faults.update(report.faults)
        self.marks.counts.update(report.marks)
        self.keys += report.checked_keys
        self.unknown += report.unknown_keys
        self.traces[outcome.seed] = report.trace
        if report.shortfall:
            self.short.append(f"seed {outcome.seed}: {report.shortfall}")

    def show(self) -> None:
        hours = self.simulated_ms / 3_600_000
        core_hours = self.cpu_seconds / 3600
        print(
            f"{self.count} seeds, {hours:.2f} simulated hours in {core_hours:.3f} hours of a core: "
            f"{hours / max(core_hours, 1e-9):.1f} : 1"
        )
        print(
            f"{self.operations} operations, {self.faults.total()} faults, {self.leader_changes} changes of leader; "
            f"{self.keys} histories checked, {self.unknown} without a verdict"
        )
        print("faults:     " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())))
        print(
            "situations: " + ", ".join(f"{name} {count}" for name, count in sorted(self.marks.counts.items()))
        )


def _show_failure(outcome: Outcome, *, is_loaded: bool, is_shrunk: bool) -> None:
    print(f"\nseed {outcome.seed} at {outcome.at_ms} ms: {outcome.check}: {outcome.message}")
    arguments = f"--seed {outcome.seed}" + (" --loaded" if is_loaded else "")
    if is_shrunk:
        plan = (loaded_plan if is_loaded else draw_plan)(outcome.seed)
        reduction, runs = shrink(plan, outcome.check, _attempt)
        print(
            f"cut down in {runs} runs to {len(reduction.faults or ())} of {len(plan.faults)} faults; again with:"
        )
        arguments += " " + reduction.arguments()
    print(f"    python -m coordlib.testing.simulation {arguments}", flush=True)


def _campaign(options: argparse.Namespace) -> int:
    first, _, last = options.seeds.partition("-")
    seeds = range(int(first), int(last) + 1) if last else range(int(first))
    total = _Sum()
    shown = monotonic()
    is_good = True
    for outcome in run_seeds(seeds, jobs=options.jobs, is_loaded=options.loaded):
        total.add(outcome)
        if outcome.check:
            # One that hangs would hang here, too, as often as it is tried.
            is_shrunk = len(total.failed) <= SHRUNK_MAX and outcome.check != HANGS
            _show_failure(outcome, is_loaded=options.loaded, is_shrunk=is_shrunk)
        if monotonic() - shown > 30:
            shown = monotonic()
            print(f"... {total.count} of {len(seeds)} seeds, {len(total.failed)} failed", flush=True)
    total.show()
    if options.twice:
        again = list(seeds)[: options.twice]
        differing = [
            outcome.seed
            for outcome in run_seeds(again, jobs=options.jobs, is_loaded=options.loaded, hash_seed="4711")
            if (outcome.report.trace if outcome.report else "") != total.traces.get(outcome.seed, "")
        ]
        print(
            f"{len(again)} seeds run again in other processes with another PYTHONHASHSEED: {len(differing)} differ"
        )
        if differing:
            print(f"the same seed is not the same run: {sorted(differing)}")
            is_good = False
    for short in total.short:
        print(f"too quiet: {short}")
    if total.unknown > UNKNOWN_SHARE_MAX * max(1, total.keys):
        print(f"{total.unknown} of {total.keys} histories got no verdict: more than one in a hundred")
        is_good = False
    missing = total.marks.missing()
    if len(seeds) >= MARKS_FROM_SEEDS and not options.loaded:
        unapplied = sorted(FAULT_KINDS.keys() - total.faults.keys())
        if unapplied:
            print(f"never had an effect: {', '.join(unapplied)}")
            is_good = False
        for name in missing:
            print(f"never occurred: {name} ({MARKS[name]})")
        is_good = is_good and not missing
    if total.failed:
        print(f"{len(total.failed)} seeds failed: {sorted(outcome.seed for outcome in total.failed)}")
    return 0 if is_good and not total.failed and not total.short else 1


def _numbers(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _single(options: argparse.Namespace) -> int:
    plan = (loaded_plan if options.loaded else draw_plan)(options.seed)
    reduction = Reduction(options.faults, options.calm, options.without, options.clients)
    plan = reduction.apply(plan)
    print(pformat(asdict(plan), sort_dicts=False, width=160), flush=True)
    history = HistoryWriter()
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True, file=2)
    try:
        report = simulate(options.seed, plan, history=history)
    except Violation as violation:
        print(f"\nat {violation.at_ms} ms: {violation}")
        return 1
    finally:
        faulthandler.cancel_dump_traceback_later()
        if options.history:
            history.dump(options.history)
    print(pformat(asdict(report), sort_dicts=False, width=160))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m coordlib.testing.simulation", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", default="100", help="N (the first N) or A-B, both included")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument(
        "--twice", type=int, default=0, help="run so many of them again and compare the traces"
    )
    parser.add_argument(
        "--loaded", action="store_true", help="five members, 50 operations a second, every fault"
    )
    parser.add_argument("--seed", type=int, help="run one seed and show its plan")
    parser.add_argument("--faults", type=_numbers, help="only these of its faults, by their places; or: none")
    parser.add_argument("--calm", type=_names, default=(), help="of forming,network,disk,clock")
    parser.add_argument("--without", type=_names, default=(), help="services to leave out")
    parser.add_argument("--history", help="write what was asked and answered to this file (`coordlib check`)")
    parser.add_argument("--clients", type=int, help="how many clients instead of the plan's")
    options = parser.parse_args(arguments)
    return _campaign(options) if options.seed is None else _single(options)


if __name__ == "__main__":
    sys.exit(main())
