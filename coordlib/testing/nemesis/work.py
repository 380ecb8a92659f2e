"""What the applications work at: threads that use maps and locks, and note every operation in a history.

Keys live for a second or two: what many processes do to one key stays little enough to be judged. All processes
of a machine share CLOCK_MONOTONIC, so they agree on the keys without being told.

    registers   put, get, compare and set, delete on keys that all share
    counters    compare and set from n to n + 1 on keys that all share
    own         put on a key of the thread's own; the key's version then counts how often each was executed
    unique      put of a key that is never touched again: at the end every member must have it
    locks       acquire, a guarded put, release; the times for which the lock was certainly held

Beside the history goes a file of sections, JSON lines: {"lock", "token", "from_ns", "to_ns"} for a time at whose
begin and end the grant said it was held, {"lock", "token", "revision"} for a guarded write.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from time import monotonic_ns
from typing import Any, Final, TypeVar

import coordlib
from coordlib.errors import CoordError, DefiniteError, FatalError, UsageError
from coordlib.testing.history import HistoryWriter

__all__ = ["GUARDED", "MAPS", "OWN", "REGISTERS", "SABOTAGES", "UNIQUE", "Sections", "Work"]

T = TypeVar("T")

REGISTERS: Final = "registers"
OWN: Final = "own"
UNIQUE: Final = "unique"
GUARDED: Final = "guarded"
MAPS: Final = (REGISTERS, OWN, UNIQUE, GUARDED)

REGISTER_KEYS: Final = 6
COUNTER_KEYS: Final = 2
LOCKS: Final = 3
REGISTER_LIFE_NS: Final = 1_000_000_000
LOCK_LIFE_NS: Final = 2_000_000_000
ERROR_PAUSE_SECONDS: Final = 0.03
JOIN_SECONDS: Final = 15.0

SABOTAGES: Final = ("lost-write", "stale-read", "two-holders")
"""What an application can be told to do wrong, so that the verdict must fail."""


class Sections:
    """A file of lines that survive their writer: each is one write."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, **facts: Any) -> None:
        os.write(self._fd, (json.dumps(facts, separators=(",", ":")) + "\n").encode())

    def close(self) -> None:
        os.close(self._fd)


class Work:
    """
    Threads that work until told to stop.

    Args:
        name: Of the process; with `incarnation`, unique among all that ever ran in this run.
        pause_ms: Mean pause of a thread between two operations: a load, not a flood.
        on_fatal: Called, in the thread that met it, when the node has stopped for good.
    """

    def __init__(
        self,
        cluster: coordlib.Cluster,
        *,
        name: str,
        history: HistoryWriter,
        sections: Sections,
        seed: int,
        pause_ms: int,
        sabotage: tuple[str, ...],
        on_fatal: Callable[[FatalError], None],
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._history = history
        self._sections = sections
        self._pause_seconds = pause_ms / 1000
        self._sabotage = sabotage
        self._on_fatal = on_fatal
        self._stopping = threading.Event()
        self._registers = cluster.map(REGISTERS)
        self._own = cluster.map(OWN)
        self._unique = cluster.map(UNIQUE)
        self._guarded = cluster.map(GUARDED)
        self.errors: dict[str, int] = {}
        self.done = 0
        kinds = (_Registers, _Registers, _Counters, _Own, _Unique, _Locks, _Locks)
        self._threads = [
            threading.Thread(
                target=self._repeat,
                args=(kind(self, f"{name}.{number}", random.Random(f"{seed}.{number}")),),
                name=f"work-{number}",
                daemon=True,
            )
            for number, kind in enumerate(kinds)
        ]
        for thread in self._threads:
            thread.start()

    def begin_stop(self) -> None:
        """Begin nothing more."""
        self._stopping.set()

    def stop(self) -> list[str]:
        """End every thread after what it is doing; the names of those that did not end."""
        self.begin_stop()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _repeat(self, worker: _Worker) -> None:
        while not self._stopping.wait(worker.chance.uniform(0.5, 1.5) * self._pause_seconds):
            try:
                worker.work()
            except FatalError as error:
                self._on_fatal(error)
                return
            except CoordError as error:
                kind = type(error).__name__
                self.errors[kind] = self.errors.get(kind, 0) + 1
                self._stopping.wait(ERROR_PAUSE_SECONDS)
            else:
                self.done += 1


class _Worker:
    """One thread of work; it does one thing at a time, as the clients of a history do."""

    def __init__(self, work: Work, client: str, chance: random.Random) -> None:
        self._work = work
        self.client = client
        self.chance = chance
        self._count = 0

    def work(self) -> None:
        """Do one thing; note it. Raises what coordlib raises."""
        raise NotImplementedError

    def note(
        self, op: str, key: str, given: Any, do: Callable[[], T], output: Callable[[T], Any] = lambda _: None
    ) -> T:
        """Do an operation with its lines in the history around it."""
        history = self._work._history
        number = history.invoke(self.client, op, key, given, monotonic_ns())
        try:
            answer = do()
        except (DefiniteError, UsageError):
            history.fail(number, monotonic_ns())
            raise
        # Any other error leaves it open: it may have happened, or may yet.
        history.ok(number, output(answer), monotonic_ns())
        return answer

    def is_sabotaged(self, how: str, every: int) -> bool:
        return how in self._work._sabotage and self._count % every == 0

    def next_value(self) -> str:
        """A value that nobody else ever writes."""
        self._count += 1
        return f"{self.client}:{self._count}"


def _shared_key(kind: str, keys: int, chance: random.Random) -> str:
    return f"{kind}-{monotonic_ns() // REGISTER_LIFE_NS}-{chance.randrange(keys)}"


class _Registers(_Worker):
    _last_seen: tuple[str, Any] = ("", None)

    def work(self) -> None:
        registers = self._work._registers
        key = _shared_key("register", REGISTER_KEYS, self.chance)
        name = f"{REGISTERS}/{key}"
        turn = self.chance.random()
        value = self.next_value()
        if self.is_sabotaged("stale-read", 20):
            # Two puts of its own, then an answer from before the second.
            self.note("put", name, value, lambda: registers.put(key, value))
            later = self.next_value()
            self.note("put", name, later, lambda: registers.put(key, later))
            self.note("get", name, None, lambda: value, lambda found: found)
        elif turn < 0.35:
            found = self.note("get", name, None, lambda: registers.get(key), lambda found: found)
            self._last_seen = (key, found)
        elif turn < 0.65:
            self.note("put", name, value, lambda: registers.put(key, value))
            self._last_seen = (key, value)
        elif turn < 0.9:
            expected = self._last_seen[1] if self._last_seen[0] == key else None
            before = coordlib.ABSENT if expected is None else expected
            swapped = self.note(
                "cas",
                name,
                [expected, value],
                lambda: registers.compare_and_set(key, before, value),
                lambda swapped: swapped,
            )
            if swapped:
                self._last_seen = (key, value)
        else:
            self.note("delete", name, None, lambda: registers.delete(key), lambda was_there: was_there)
            self._last_seen = (key, None)


class _Counters(_Worker):
    def work(self) -> None:
        registers = self._work._registers
        key = _shared_key("counter", COUNTER_KEYS, self.chance)
        name = f"{REGISTERS}/{key}"
        found = self.note("get", name, None, lambda: registers.get(key), lambda found: found)
        before = coordlib.ABSENT if found is None else found
        after = (found or 0) + 1
        self.note(
            "cas",
            name,
            [found, after],
            lambda: registers.compare_and_set(key, before, after),
            lambda swapped: swapped,
        )


class _Own(_Worker):
    def work(self) -> None:
        value = self.next_value()
        self.note("put", f"{OWN}/{self.client}", value, lambda: self._work._own.put(self.client, value))


class _Unique(_Worker):
    def work(self) -> None:
        value = self.next_value()
        unique = self._work._unique
        is_hidden = self.is_sabotaged("lost-write", 20)
        self.note(
            "put", f"{UNIQUE}/{value}", self._count, lambda: is_hidden or unique.put(value, self._count)
        )


class _Locks(_Worker):
    def work(self) -> None:
        name = f"lock-{monotonic_ns() // LOCK_LIFE_NS}-{self.chance.randrange(LOCKS)}"
        # Without callbacks: what the grant itself says is what is judged.
        lock = self._work._cluster.lock(name)
        owner = {"owner": self.client, "ttl_ns": None}
        wait_seconds = self.chance.choice((0, 0.2, 1.0, 4.0))
        try:
            grant = self.note(
                "acquire",
                f"lock/{name}",
                owner,
                lambda: lock.acquire(timeout=wait_seconds),
                lambda grant: {"ok": True, "token": int(grant.token)},
            )
        except coordlib.LockTimeout:
            return
        try:
            self._hold(name, grant)
        finally:
            self.note(
                "release",
                f"lock/{name}",
                {"token": int(grant.token)},
                lambda: _release(lock),
                lambda was_held: {"ok": was_held},
            )
        if self.is_sabotaged("two-holders", 5):
            # As if it had not been given back, while others take it.
            began = monotonic_ns()
            self._work._stopping.wait(1.0)
            self._work._sections.note(lock=name, token=int(grant.token), from_ns=began, to_ns=monotonic_ns())

    def _hold(self, name: str, grant: coordlib.Grant) -> None:
        token = int(grant.token)
        value = f"{token}:{self.next_value()}"
        # Held when it was granted, before this; held when `ensure_held` returns, after the end: held all the time.
        began = monotonic_ns()
        self._work._stopping.wait(self.chance.choice((0.0, 0.002, 0.02, 0.2)))
        revision = self.note(
            "put",
            f"{GUARDED}/{name}",
            value,
            lambda: self._work._guarded.put(name, value, guard=grant),
        )
        self._work._sections.note(lock=name, token=token, revision=int(revision))
        ended = monotonic_ns()
        grant.ensure_held()
        self._work._sections.note(lock=name, token=token, from_ns=began, to_ns=ended)


def _release(lock: coordlib.Lock) -> bool:
    try:
        lock.release()
    except coordlib.LockLost:
        return False
    return True
