"""What the processes under `benchmarks.kill9` do, and what they note about it outside of coordlib.

Notes go to files opened with O_APPEND, one `write` a line: what is in them was said before the process died.

`locks`: as in `coordlib.cli.demo.records`. One file of each process besides, `<name>-<pid>`:

    try KEY NUMBER      about to write NUMBER, which only grows, to a key that only this thread writes
    ack KEY NUMBER      that returned
    add KEY NUMBER      about to compare and set KEY from NUMBER - 1 to NUMBER
    added KEY NUMBER    that returned True
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from time import monotonic_ns, sleep

import coordlib
from coordlib.errors import CoordError, DefiniteError, IndeterminateError

__all__ = ["COUNTERS", "LOCKS", "MAP", "Load", "Notes", "check_notes"]

MAP = "kill9"
COUNTERS = ("cas-0", "cas-1")
LOCKS = ("lock-0", "lock-1", "lock-2")
SLOTS = 8


class Notes:
    """A file of lines that survive their writer."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, line: str) -> None:
        """One line, whole or not at all."""
        os.write(self._fd, f"{line}\n".encode())


class Load:
    """Threads that put, compare and set, and write under locks, until told to stop."""

    def __init__(self, cluster: coordlib.Cluster, directory: str, name: str, seed: int) -> None:
        self._cluster = cluster
        self._map = cluster.map(MAP)
        self._who = f"{name}-{os.getpid()}"
        self._notes = Notes(os.path.join(directory, self._who))
        self._journal = Notes(os.path.join(directory, "locks"))
        self._stop = threading.Event()
        self.errors: dict[str, int] = {}
        self._threads = [
            threading.Thread(
                target=self._repeat, args=(loop, number, random.Random(seed * 100 + number)), daemon=True
            )
            for number, loop in enumerate((self._put, self._put, self._add, self._hold, self._hold))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every thread after what it is doing."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _repeat(
        self, once: Callable[[int, int, random.Random], None], number: int, chance: random.Random
    ) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            try:
                once(number, turn, chance)
            except CoordError as error:
                kind = type(error).__name__
                self.errors[kind] = self.errors.get(kind, 0) + 1
                sleep(0.02)
            # A load, not a flood: the cores are shared by all members.
            sleep(0.005)

    def _put(self, number: int, turn: int, _: random.Random) -> None:
        key = f"{self._who}-{number}-{turn % SLOTS}"
        self._notes.add(f"try {key} {turn}")
        self._map.put(key, turn)
        self._notes.add(f"ack {key} {turn}")

    def _add(self, _: int, turn: int, chance: random.Random) -> None:
        key = chance.choice(COUNTERS)
        before = self._map.setdefault(key, 0)
        after = before + 1
        self._notes.add(f"add {key} {after}")
        if self._map.compare_and_set(key, before, after):
            self._notes.add(f"added {key} {after}")

    def _hold(self, number: int, turn: int, chance: random.Random) -> None:
        name = chance.choice(LOCKS)
        worker, pid = f"{self._who}-{number}", os.getpid()
        with self._cluster.lock(name, timeout=5) as grant:
            self._journal.add(f"enter {monotonic_ns()} {name} {grant.token} {pid} {worker}")
            outcome = "unknown"
            try:
                count = self._map.get(name) or 0
                sleep(chance.random() * 0.01)
                self._map.put(name, count + 1, guard=grant)
                outcome = "done"
            except IndeterminateError:
                raise
            except DefiniteError:
                outcome = "refused"
                raise
            finally:
                self._journal.add(f"leave {monotonic_ns()} {name} {grant.token} {pid} {worker} {outcome}")


def check_notes(files: Iterable[Iterable[str]], states: Mapping[str, Mapping[str, int]]) -> list[str]:
    """
    Hold what every member has against what was noted: violations in words, none if all is well.

    Args:
        files: The lines of every process's notes.
        states: For each member, what its map holds.
    """
    tried: dict[str, int] = {}
    acknowledged: dict[str, int] = {}
    added: dict[str, set[int]] = {}
    adds_tried: dict[str, int] = {}
    violations: list[str] = []
    for lines in files:
        for line in lines:
            what, key, text = line.split()
            number = int(text)
            if what == "try":
                tried[key] = number
            elif what == "ack":
                acknowledged[key] = number
            elif what == "add":
                adds_tried[key] = max(number, adds_tried.get(key, 0))
            elif number in added.setdefault(key, set()):
                violations.append(f"{key} was set from {number - 1} to {number} twice")
            else:
                added[key].add(number)
    for member, state in states.items():
        for key, number in acknowledged.items():
            if not number <= state.get(key, 0) <= tried[key]:
                violations.append(
                    f"member {member} has {state.get(key)} at {key}: {number} was acknowledged, {tried[key]} tried last"
                )
        for key, numbers in added.items():
            found = state.get(key, 0)
            if not max(numbers) <= found <= adds_tried[key]:
                violations.append(
                    f"member {member} counts {found} {key}, but {max(numbers)} was acknowledged"
                )
        for key in set(tried) - set(acknowledged):
            if state.get(key, 0) > tried[key]:
                violations.append(f"member {member} has {state[key]} at {key}, which nobody wrote")
    return violations
