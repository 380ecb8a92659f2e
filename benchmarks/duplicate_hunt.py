"""`make duplicates`: many processes mint, everything goes wrong that can, and no id may be there twice.

Real processes: three members on loopback, and clients that mint one by one and in blocks from few workers with short
windows, so that worker numbers go from one process to the next. Minters are closed, killed, stopped for longer than
their windows and forked; members are killed, the leader and two at once among them; wall clocks step by an hour (a
library in front of libc; it needs a C compiler). Every id of every process, killed ones included, is compared with every
other: each file must rise, and stretches of one worker must not overlap; that is exact, and takes no memory to speak of.

    python -m benchmarks.duplicate_hunt [--ids N] [--processes N] [--seed N] [--minutes M] [--dir PATH]
    python -m benchmarks.duplicate_hunt --ids 1000000 --sabotage same-window     # must fail

Exit code 0: so many ids, none twice, and each fault had its effect.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import signal
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from operator import sub
from pathlib import Path
from time import monotonic, sleep
from typing import Final

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.duplicate_minter import EXIT_OF_CHILD, PROGRAM
from benchmarks.figures import machine
from benchmarks.processes import Application, Fleet
from coordlib.testing.nemesis.shim import Shim, build

__all__ = ["compare", "main"]

WINDOW_SECONDS: Final = 2.0
PAUSE_SECONDS: Final = 3.0
SESSION_TTL_SECONDS: Final = 3.0
HOUR_NS: Final = 3_600_000_000_000
CHILD_IDS: Final = 20_000
FEW: Final = 10_000_000
REST_SECONDS: Final = (0.005, 0.02)
"""Between batches, so that minters do not outrun the faults; the second up to `FEW` ids."""

CHUNK: Final = 1 << 14
SABOTAGES: Final = ("same-window", "fork-keeps-lease")
FAULTS: Final = {
    "minters closed": "their exit code is 0, and others take their places",
    "minters killed": "their exit code is -9, and they had minted",
    "minters stopped": "for longer than a window, and they went on",
    "forks": "the child is refused its parent's generator, and mints by its own",
    "members killed": "and started again on their own disks",
    "leader changes": "terms with a leader, by what members say",
    "quorum losses": "two members were down, and ids were minted meanwhile",
    "steps in minters": "a minter saw its wall clock jump by an hour or two",
    "steps in members": "a member read its wall clock after the step",
    "workers passed on": "ids of one worker number, by one process after another",
}
"""What must have happened, by what it is seen."""


# -- the check ---------------------------------------------------------------------------------------------


class _Counted:
    """What went by."""

    def __init__(self) -> None:
        self.ids = 0
        self.violations: list[str] = []

    def violation(self, text: str) -> None:
        if len(self.violations) < 1000:
            self.violations.append(text)


def _stretches(path: Path, place: int, step: int, counted: _Counted) -> Iterator[tuple[int, int, int]]:
    """(first, last, place) of each stretch of ids that follow each other in a file; they must rise."""
    first = last = -1
    with path.open("rb") as file:
        while data := file.read(CHUNK * 8):
            ids = array("q", data[: len(data) // 8 * 8])  # the last one may have been cut off by a kill
            if not ids:
                break
            counted.ids += len(ids)
            if last < 0:
                first = ids[0]
            elif ids[0] - last != step:
                yield first, last, place
                if ids[0] <= last:
                    counted.violation(f"{path.name}: {ids[0]} comes after {last}")
                first = ids[0]
            gaps = enumerate(map(sub, islice(ids, 1, None), ids), 1)
            for index in [index for index, gap in gaps if gap != step]:
                yield first, ids[index - 1], place
                if ids[index] <= ids[index - 1]:
                    counted.violation(f"{path.name}: {ids[index]} comes after {ids[index - 1]}")
                first = ids[index]
            last = ids[-1]
    if last >= 0:
        yield first, last, place


def compare(paths: Sequence[Path], worker_bits: int) -> tuple[int, int, list[str]]:
    """
    Hold every id in these files against every other; they are of layouts whose worker is lowest.

    Memory for a few thousand ids of each file, however many there are.

    Returns:
        How many ids there are; how often a worker number went from one file to another; and what is wrong.
    """
    counted = _Counted()
    step, mask = 1 << worker_bits, (1 << worker_bits) - 1
    # As each file rises, so do its stretches; merged by their first ids, two of one worker overlap if the later begins
    # before the end of what came before.
    ends: dict[int, tuple[int, int]] = {}
    passed_on = 0
    for first, last, place in heapq.merge(
        *(_stretches(path, place, step, counted) for place, path in enumerate(paths))
    ):
        end, before = ends.get(first & mask, (-1, place))
        if first <= end:
            counted.violation(
                f"{first} to {min(end, last)}: by {paths[before].name}, and again by {paths[place].name}"
            )
        passed_on += before != place
        ends[first & mask] = max((end, before), (last, place))
    return counted.ids, passed_on, counted.violations


# -- the hunt ----------------------------------------------------------------------------------------------


class _Hunt:
    def __init__(
        self, fleet: Fleet, directory: Path, shims: dict[str, Shim], options: argparse.Namespace, seed: int
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._shims = shims
        self._options = options
        self._chance = random.Random(seed)
        # Hardly more workers than processes, so that those of the dead are needed.
        self.worker_bits = (options.processes + 1).bit_length()
        self._lives = 0
        self.paths: list[Path] = []
        self.seen: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
        self.errors: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self._leaders: dict[int, str] = {}
        self._jumps: dict[str, int] = {}
        self.minters: dict[str, Application] = {}

    def start(self) -> None:
        for number in range(self._options.processes):
            self.minters[f"m{number}"] = self._spawn(f"m{number}")
        for minter in self.minters.values():
            minter.answer()

    # -- minters

    def _new_path(self, name: str) -> Path:
        self._lives += 1
        path = self._directory / f"{name}-{self._lives}.ids"
        self.paths.append(path)
        return path

    def _spawn(self, name: str) -> Application:
        options = self._options
        given = {
            "endpoints": list(self._fleet.endpoints.values()),
            "secret": self._fleet.secret,
            "layout": {
                "time_bits": 41,
                "sequence_bits": 12,
                "worker_bits": self.worker_bits,
                "name": "hunted",
            },
            "window": WINDOW_SECONDS if options.sabotage != "same-window" else 60.0,
            "path": str(self._new_path(name)),
            "seed": self._chance.randrange(1 << 31),
            "pause_seconds": REST_SECONDS[options.ids <= FEW],
            "sabotage": options.sabotage if options.sabotage != "same-window" or name in ("m0", "m1") else "",
            "window_path": str(self._directory / "window"),
            "is_second": name == "m1",
        }
        log = str(self._directory / f"{name}.log")
        minter = Application(name, given, log, program=PROGRAM, environment=self._shims[name].environment)
        minter.begin("start")
        return minter

    def _again(self, name: str) -> None:
        self.minters[name] = self._spawn(name)
        self.minters[name].answer()

    def _ask(self, name: str, *, is_last: bool = False) -> None:
        """What a minter knows, before it is gone."""
        facts = self.minters[name].do("facts")
        errors, jumps = facts.pop("errors"), facts.pop("jumps")
        self.seen["steps in minters"] += jumps - self._jumps.get(name, 0)
        self._jumps[name] = jumps
        if is_last:
            del self._jumps[name]
            self.errors.update(errors)
            self.counters.update(facts)

    def _some(self) -> str:
        return self._chance.choice(sorted(self.minters))

    def size(self) -> int:
        """Ids that were written down so far."""
        return sum(path.stat().st_size for path in self.paths if path.exists()) // 8

    def close_one(self) -> None:
        name = self._some()
        self._ask(name, is_last=True)
        if self.minters[name].end() == 0:
            self.seen["minters closed"] += 1
        self._again(name)

    def kill_one(self) -> None:
        name = self._some()
        self._ask(name, is_last=True)
        minter = self.minters[name]
        if minter.kill() == -signal.SIGKILL and self.paths_of(name)[-1].stat().st_size:
            self.seen["minters killed"] += 1
        self._again(name)

    def paths_of(self, name: str) -> list[Path]:
        return [path for path in self.paths if path.name.startswith(f"{name}-") and path.exists()]

    def stop_one(self) -> None:
        name = self._some()
        minter = self.minters[name]
        path = self.paths_of(name)[-1]
        os.kill(minter.pid, signal.SIGSTOP)
        try:
            sleep(0.1)
            before = path.stat().st_size
            sleep(PAUSE_SECONDS)
            has_stood_still = path.stat().st_size == before
        finally:
            os.kill(minter.pid, signal.SIGCONT)
        if has_stood_still and self._wait(lambda: path.stat().st_size > before):
            self.seen["minters stopped"] += 1

    def fork_one(self) -> None:
        name = self._some()
        path = self._new_path(f"{name}-child")
        if (
            self.minters[name].do("fork", path=str(path), count=CHILD_IDS).get("exit") == EXIT_OF_CHILD
            and path.stat().st_size
        ):
            self.seen["forks"] += 1

    # -- members

    def look(self) -> None:
        """Who leads."""
        for name, member in self._fleet.members.items():
            stats = member.do("stats")
            if stats.get("role") == "leader":
                self._leaders.setdefault(stats["term"], name)
        self.seen["leader changes"] = max(0, len(self._leaders) - 1)

    def _leader(self) -> str:
        self.look()
        return self._leaders[max(self._leaders)] if self._leaders else sorted(self._fleet.members)[0]

    def _kill_members(self, names: Sequence[str], down_seconds: float) -> int:
        """Returns how many ids were minted while they were down."""
        for name in names:
            self.seen["members killed"] += self._fleet.members[name].kill() == -signal.SIGKILL
        before = self.size()
        sleep(down_seconds)
        minted = self.size() - before
        for name in names:
            self._fleet.restart(name, is_waited_for=False)
        for name in names:
            self._fleet.members[name].answer()
        return minted

    def kill_leader(self) -> None:
        self._kill_members([self._leader()], self._chance.choice((0.0, 0.5, 1.5)))

    def lose_quorum(self) -> None:
        names = self._chance.sample(sorted(self._fleet.members), 2)
        self.seen["quorum losses"] += self._kill_members(names, self._chance.choice((0.5, 1.0, 3.0))) > 0

    # -- clocks

    def step_clocks(self) -> None:
        """Of about half of all processes, by an hour: forward, back, or right again."""
        names = [name for name in sorted(self._shims) if self._chance.random() < 0.5]
        reads = {name: self._shims[name].get("wall_reads") for name in names}
        for name in names:
            self._shims[name].set("wall_shift_ns", self._chance.choice((-HOUR_NS, 0, HOUR_NS)))
        members = [
            name for name in names if name in self._fleet.members and self._shims[name].get("wall_shift_ns")
        ]
        if members and self._wait(
            lambda: all(self._shims[name].get("wall_reads") > reads[name] for name in members)
        ):
            self.seen["steps in members"] += len(members)

    # -- all of it

    def _wait(self, condition: Callable[[], bool]) -> bool:
        deadline = monotonic() + 10
        while not condition():
            if monotonic() > deadline:
                return False
            sleep(0.02)
        return True

    def missing(self) -> list[str]:
        """Faults that had no effect yet; what only the comparison knows is not asked for here."""
        return [fault for fault in FAULTS if not self.seen[fault] and fault != "workers passed on"]

    def run(self, ids: int, deadline: float) -> None:
        faults = [
            self.kill_one,
            self.close_one,
            self.fork_one,
            self.step_clocks,
            self.kill_leader,
            self.stop_one,
            self.lose_quorum,
        ]
        shown = monotonic()
        while monotonic() < deadline:
            self._chance.shuffle(faults)
            for fault in faults:
                fault()
                self.look()
                sleep(self._chance.uniform(0.0, 0.3))
                if self.size() >= ids and self._lives > (1 << self.worker_bits) + 2 and not self.missing():
                    return
            for name in sorted(self.minters):
                self._ask(name)
            if monotonic() - shown > 10:
                shown = monotonic()
                print(f"... {self.size():,} ids, {sum(self.seen.values())} faults", flush=True)

    def finish(self) -> list[str]:
        """Close all minters; returns what went wrong with that."""
        wrong = []
        for name in self.minters:
            self._ask(name, is_last=True)
        for name, minter in self.minters.items():
            code = minter.end()
            if code != 0:
                wrong.append(f"{name} ended with {code}")
        return wrong

    def end(self) -> None:
        """Whatever still runs."""
        for minter in self.minters.values():
            minter.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """Hunt, compare, print, and return the exit code: 1 if an id is there twice, or a fault had no effect."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.duplicate_hunt", description=__doc__)
    parser.add_argument("--ids", type=int, default=100_000_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments; 0: a new one")
    parser.add_argument("--minutes", type=float, default=30.0, help="fail when it takes longer")
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("--sabotage", choices=SABOTAGES, default="", help="do what must be found")
    options = parser.parse_args(arguments)
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    print(f"seed {seed}", flush=True)
    began = monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="coordlib-duplicates-", dir=options.dir) as scratch,
        ExitStack() as stack,
    ):
        directory = Path(scratch)
        library = build(directory)
        names = [f"n{number + 1}" for number in range(3)] + [
            f"m{number}" for number in range(options.processes)
        ]
        shims = {name: Shim(library, directory / f"{name}.shim") for name in names}
        for shim in shims.values():
            stack.callback(shim.close)
        fleet = stack.enter_context(
            Fleet(
                scratch,
                session_ttl=SESSION_TTL_SECONDS,
                environment=lambda name: shims[name].environment,
            )
        )
        hunt = _Hunt(fleet, directory, shims, options, seed)
        stack.callback(hunt.end)
        hunt.start()
        hunt.run(options.ids, began + options.minutes * 60)
        violations = hunt.finish()
        minted_seconds = monotonic() - began
        paths = [path for path in hunt.paths if path.exists()]
        count, passed_on, wrong = compare(paths, hunt.worker_bits)
        hunt.seen["workers passed on"] = passed_on
    violations += wrong
    if count < options.ids:
        violations.append(f"only {count:,} of {options.ids:,} ids in {options.minutes:g} minutes")
    violations += [f"no effect: {fault} ({FAULTS[fault]})" for fault in FAULTS if not hunt.seen[fault]]
    for violation in violations[:20]:
        print(f"VIOLATION: {violation}")
    for fault, how in FAULTS.items():
        print(f"{fault:<18} {hunt.seen[fault]:>6}   {how}")
    result = {
        "ids": count,
        "processes": len(paths),
        "seed": seed,
        "minting_seconds": round(minted_seconds, 1),
        "seconds": round(monotonic() - began, 1),
        "faults": dict(hunt.seen),
        "counters": dict(hunt.counters),
        "errors_met": dict(hunt.errors),
        "violations": len(violations),
    }
    print(f"{count:,} ids by {len(paths)} processes: {len(violations)} violations")
    print(json.dumps({"machine": machine(), "duplicates": result}), flush=True)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
