"""`make kill9`: kill -9 of random members under load, again and again; then prove that nothing was lost.

Every member's application, and two client processes, put, compare and set, and write under locks. Members are
killed at random moments, the leader often, now and then two at once, and start again from their own disks. At the
end all is read back from every member, and once more after all were killed together, and held against notes
made outside of coordlib: no acknowledged write lost, no lock with two holders, tokens strictly increasing.

    python -m benchmarks.kill9 [--kills N] [--seed N] [--members N] [--minutes M] [--dir PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, monotonic_ns, sleep
from typing import Any, Final

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import machine
from benchmarks.load import COUNTERS, LOCKS, Notes, check_notes
from benchmarks.processes import Application, Fleet
from coordlib.cli.demo.records import prove_counters, prove_exclusion

__all__ = ["main"]

SESSION_TTL_SECONDS: Final = 3.0
CLIENTS: Final = 2
CATCH_UP_SECONDS: Final = 30.0


class _Killing:
    def __init__(self, fleet: Fleet, notes: str, seed: int) -> None:
        self._fleet = fleet
        self._notes_directory = notes
        self._journal = Notes(os.path.join(notes, "locks"))
        self._chance = random.Random(seed)
        self._seed = seed
        self._starting: dict[str, float] = {}
        self.kills = 0
        self.leader_kills = 0
        self.start_seconds: list[float] = []
        for member in fleet.members.values():
            self._load(member)
        self._clients = [fleet.client() for _ in range(CLIENTS)]
        for client in self._clients:
            self._load(client)

    def _load(self, application: Application) -> None:
        self._seed += 1
        application.do("load", directory=self._notes_directory, name=application.name, seed=self._seed)

    def _leader(self) -> str:
        """The leader by the word of a member that runs; empty while nobody knows."""
        for name, member in self._fleet.members.items():
            if name not in self._starting and (leader := member.do("stats").get("leader")):
                return str(leader)
        return ""

    def _kill(self, name: str) -> None:
        member = self._fleet.members[name]
        member.kill()
        self._journal.add(f"killed {monotonic_ns()} {member.pid}")
        self.kills += 1

    def _begin_again(self, name: str) -> None:
        self._fleet.restart(name, is_waited_for=False)
        self._starting[name] = monotonic()

    def _settle(self) -> None:
        """Wait for those that start, and give them their load."""
        for name, began in list(self._starting.items()):
            self._fleet.members[name].answer()
            self.start_seconds.append(monotonic() - began)
            del self._starting[name]
            self._load(self._fleet.members[name])

    def strike(self) -> None:
        """One kill, or two at once, and the restart."""
        chance, names = self._chance, sorted(self._fleet.members)
        sleep(chance.uniform(0.1, 1.2))
        leader = self._leader()
        victims = [leader] if leader and chance.random() < 0.4 else [chance.choice(names)]
        if chance.random() < 0.15:
            victims.append(chance.choice([name for name in names if name not in victims]))
        for victim in victims:
            self.leader_kills += victim == leader
            self._kill(victim)
        sleep(chance.choice((0.0, 0.05, 0.3, 1.0)))
        for victim in victims:
            self._begin_again(victim)
        self._settle()

    def finish(self) -> dict[str, int]:
        """Stop all load; returns how often which error was met by those that survived."""
        applications = [*self._fleet.members.values(), *self._clients]
        for application in applications:
            application.begin("unload")
        errors: dict[str, int] = {}
        for application in applications:
            for kind, count in application.answer()["errors"].items():
                errors[kind] = errors.get(kind, 0) + count
        return errors

    def kill_all(self) -> None:
        """As after a power failure of the whole rack, but for what the page cache keeps."""
        for name in list(self._fleet.members):
            self._kill(name)
        for name in list(self._fleet.members):
            self._begin_again(name)
        for name in list(self._starting):
            self._fleet.members[name].answer()
        self._starting.clear()

    def contents(self) -> dict[str, dict[str, int]]:
        """What every member itself has applied, when all have applied the same."""
        deadline = monotonic() + CATCH_UP_SECONDS
        while True:
            stats = {name: member.do("stats") for name, member in self._fleet.members.items()}
            if len({one.get("applied_index") for one in stats.values()}) == 1:
                return {
                    name: member.do("contents")["contents"] for name, member in self._fleet.members.items()
                }
            if monotonic() > deadline:
                for name, log in self._fleet.logs().items():
                    print(f"--- {name}\n{log[-3000:]}\n{json.dumps(stats.get(name))}")
                raise RuntimeError("the members do not catch up with each other: see above")
            sleep(0.05)


def _prove(notes: str, states: dict[str, dict[str, int]]) -> tuple[list[str], dict[str, int]]:
    files = [path.read_text().splitlines() for path in sorted(Path(notes).iterdir()) if path.name != "locks"]
    exclusion = prove_exclusion(Path(notes, "locks").read_text().splitlines(keepends=True))
    locks = {member: {lock: str(state.get(lock, 0)) for lock in LOCKS} for member, state in states.items()}
    violations = [*exclusion.violations, *prove_counters(exclusion, locks), *check_notes(files, states)]
    first = next(iter(states.values()))
    violations += [
        f"member {name} holds other state than the rest" for name, state in states.items() if state != first
    ]
    proven = {
        "acknowledged": sum(line.startswith(("ack ", "added ")) for lines in files for line in lines),
        "lock_sections": exclusion.entered,
        "compare_and_sets": sum(first.get(key, 0) for key in COUNTERS),
        "keys": len(first),
    }
    return violations, proven


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, prove, print, and return the exit code: 1 when anything was lost or held twice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill9", description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of victims and moments; 0: a new one"
    )
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="fail when it takes longer")
    parser.add_argument("--dir", default="/var/tmp")
    options = parser.parse_args(arguments)
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    print(f"seed {seed}", flush=True)
    began = monotonic()
    with tempfile.TemporaryDirectory(prefix="coordlib-kill9-", dir=options.dir) as scratch:
        notes = os.path.join(scratch, "notes")
        os.mkdir(notes)
        with Fleet(scratch, members=options.members, session_ttl=SESSION_TTL_SECONDS) as fleet:
            killing = _Killing(fleet, notes, seed)
            shown = 0
            while killing.kills < options.kills and monotonic() - began < options.minutes * 60:
                killing.strike()
                if killing.kills // 10 > shown:
                    shown = killing.kills // 10
                    print(
                        f"{monotonic() - began:6.0f} s  {killing.kills} kills, {killing.leader_kills} of leaders",
                        flush=True,
                    )
            kills = killing.kills
            errors = killing.finish()
            violations, proven = _prove(notes, killing.contents())
            killing.kill_all()
            violations += [f"after all were killed: {one}" for one in _prove(notes, killing.contents())[0]]
    if kills < options.kills:
        violations.append(f"only {kills} of {options.kills} kills in {options.minutes:g} minutes")
    result: dict[str, Any] = {
        "kills": killing.kills,
        "leader_kills": killing.leader_kills,
        "seed": seed,
        "seconds": round(monotonic() - began, 1),
        "start_s_longest": round(max(killing.start_seconds, default=0.0), 2),
        "errors_met": errors,
        **proven,
        "violations": len(violations),
    }
    for violation in violations[:50]:
        print(f"VIOLATION: {violation}")
    print(
        f"{killing.kills} kills ({killing.leader_kills} of leaders): {proven['acknowledged']} acknowledged writes and "
        f"{proven['lock_sections']} lock sections checked on {options.members} members, {len(violations)} violations"
    )
    print(json.dumps({"machine": machine(), "kill9": result}), flush=True)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
