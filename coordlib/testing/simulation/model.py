"""What the log says that must be: sessions, locks and windows of ids, read from the same commands another way.

It follows the first member that applies each command, and holds the reply against what came before. What is here
knows neither members nor time, but the log's own.
"""

from __future__ import annotations

from typing import Any

from coordlib.cbor import decode
from coordlib.errors import CoordError, NotHolder, QuotaExceeded
from coordlib.machine import Machine, commands
from coordlib.machine.commands import OpCode, TxStatus
from coordlib.machine.effects import Applied, LockGranted, LockWithdrawn, SessionEnded, SessionOpened
from coordlib.raft.messages import Entry
from coordlib.testing.simulation.marks import Marks

__all__ = ["LogModel", "Violation"]


class Violation(AssertionError):
    """A promise of the product is broken. `check` names the one, as in the table of `invariants`."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check
        self.message = message
        self.at_ms = 0  # when, by the world's time


class LogModel:
    """Sessions, locks and windows as they must be, by the log alone; another reading of the same commands."""

    __slots__ = (
        "_answers",
        "_ended",
        "_marks",
        "_sessions",
        "_token",
        "decided_about",
        "has_services_changed",
        "holders",
        "services",
        "windows",
    )

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._answers: dict[tuple[int, int], bytes] = {}
        self._sessions: set[int] = set()
        self._ended: set[int] = set()
        self.holders: dict[bytes, tuple[int, int, int]] = {}  # lock -> session, sequence, token
        self.decided_about: tuple[bytes, ...] = ()  # locks that the last command gives back if it commits
        self.services: dict[tuple[str, int], None] = {}  # name, session
        self.has_services_changed = False  # by the last command
        self._token = 0
        self.windows = _Windows()

    def apply(self, entry: Entry, applied: Applied) -> set[int]:
        """Returns the sessions that it ends because nothing was heard of them."""
        log_time_ms, session, sequence, _, operation = commands.unpack_entry(entry.data)
        self.windows.log_time_ms = max(self.windows.log_time_ms, log_time_ms)
        self.decided_about = ()
        self.has_services_changed = False
        if session and not self._is_due(entry.index, session, sequence, applied):
            return set()
        try:
            args = decode(operation)
        except CoordError:
            return set()
        for effect in applied.effects:
            if isinstance(effect, SessionOpened):
                self._sessions.add(effect.session)
        opcode = args[0]
        if OpCode.IDS_LEASE <= opcode <= OpCode.IDS_SKIP:
            self.windows.apply(entry.index, args, applied.reply)
            return set()
        if commands.is_success(applied.reply):
            if opcode == OpCode.ACQUIRE:
                results = commands.decode_reply(applied.reply)
                if len(results) != 3:
                    raise Violation(
                        "exactly once",
                        f"entry {entry.index}, command {sequence} of session {session}, is answered with {results}, "
                        "the answer to another command",
                    )
                is_granted, token, _ = results
                if is_granted:
                    self._grant(entry.index, args[1], session, sequence, token)
            elif opcode == OpCode.RELEASE:
                self._release(args[1], session, args[2])
            elif opcode == OpCode.BREAK:
                self.holders.pop(args[1], None)
            elif opcode == OpCode.SERVICE_REGISTER:
                self.services[args[1], session] = None
                self.has_services_changed = True
            elif opcode == OpCode.SERVICE_UNREGISTER:
                self.services.pop((args[1], session), None)
                self.has_services_changed = True
            elif opcode == OpCode.TX_DECIDE and args[7]:
                self._decide(entry.index, session, args[7], commands.decode_reply(applied.reply))
        ended = {effect.session for effect in applied.effects if isinstance(effect, SessionEnded)}
        for lost in ended:
            self._ended.add(lost)
            self._sessions.discard(lost)
            if opcode == OpCode.SESSION_EXPIRE:
                self._marks.hit("session_expired")
        for place in [place for place in self.services if place[1] in ended]:
            self._marks.hit("service_host_died")
            del self.services[place]
            self.has_services_changed = True
        for lock in [lock for lock, holder in self.holders.items() if holder[0] in ended]:
            self._marks.hit("lock_holder_died")
            del self.holders[lock]
        for effect in applied.effects:
            if isinstance(effect, LockGranted):
                self._marks.hit("lock_handed_over")
                self._grant(entry.index, effect.lock, effect.session, effect.sequence, effect.token)
            elif isinstance(effect, LockWithdrawn):
                holder = next(
                    (
                        lock
                        for lock, held in self.holders.items()
                        if held[:2] == (effect.session, effect.sequence)
                    ),
                    None,
                )
                if holder is not None:
                    del self.holders[holder]
        return ended if opcode == OpCode.SESSION_EXPIRE else set()

    def _is_due(self, index: int, session: int, sequence: int, applied: Applied) -> bool:
        """Whether the command was to be executed; if it was not, that nothing came of it."""
        answer = self._answers.get((session, sequence))
        is_alive = session in self._sessions
        if answer is None and is_alive:
            self._answers[session, sequence] = applied.reply
            return True
        if answer is not None:
            self._marks.hit("request_repeated")  # rare: leaders answer what they have seen themselves
        is_refusal = not commands.is_success(applied.reply)
        if applied.effects or not (is_refusal or applied.reply == answer):
            raise Violation(
                "exactly once",
                f"entry {index} executes command {sequence} of session {session}, "
                + ("which has ended" if not is_alive else "a second time"),
            )
        return False

    def _grant(self, index: int, lock: bytes, session: int, sequence: int, token: int) -> None:
        holder = self.holders.get(lock)
        if holder is not None and holder[:2] != (session, sequence):
            raise Violation(
                "one holder", f"entry {index} grants {lock!r} to session {session}, while {holder} holds it"
            )
        if holder is not None and holder[2] == token:
            return
        if session not in self._sessions:
            raise Violation(
                "one holder", f"entry {index} grants {lock!r} to session {session}, which is not alive"
            )
        if token <= self._token:
            raise Violation(
                "fencing token", f"entry {index} grants {lock!r} with token {token}, after {self._token}"
            )
        self._token = token
        self.holders[lock] = (session, sequence, token)

    def _decide(self, index: int, session: int, releases: list[list[Any]], results: list[Any]) -> None:
        self.decided_about = tuple(lock for lock, _ in releases)
        status, _, revision, _, _ = results
        if status == TxStatus.COMMITTED and revision == index:  # else it was decided before
            for lock, sequence in releases:
                self._release(lock, session, sequence)

    def check_services(self, machine: Machine) -> None:
        """A member that has just applied the last command names those who host services, and nobody else."""
        if self.has_services_changed:
            rows, _ = commands.decode_reply(machine.query(commands.query_services()))
            found = [(name, session) for name, session, _, _, _ in rows]
            if found != sorted(self.services):
                raise Violation(
                    "service registry", f"it says {found}, and hosted are {sorted(self.services)}"
                )

    def check_decided(self, machine: Machine) -> None:
        """A member that has just applied the last command holds those locks free, or by whom they were held."""
        for lock in self.decided_about:
            found = commands.decode_reply(machine.query(commands.query_lock(lock)))[0]
            held = self.holders.get(lock)
            if (None if found is None else found[2]) != (None if held is None else held[2]):
                raise Violation(
                    "one holder", f"after a decision {lock!r} is held by {found}, and was to be by {held}"
                )

    def _release(self, lock: bytes, session: int, sequence: int) -> None:
        holder = self.holders.get(lock)
        if holder is not None and holder[:2] == (session, sequence):
            del self.holders[lock]


class _Lease:
    """The last one of a worker, as the log has it."""

    __slots__ = ("begin", "is_returned", "is_skipped", "number", "offset", "until")

    def __init__(self, number: int, begin: int, until: int, offset: int) -> None:
        self.number = number
        self.begin = begin
        self.until = until
        self.offset = offset  # how far its window is ahead of log_time
        self.is_returned = False
        self.is_skipped = False

    def is_free(self, now: int) -> bool:
        return self.is_skipped or now >= self.until - self.offset


class _Windows:
    """Who may mint ids with which worker and when, by the log alone."""

    __slots__ = ("_floor_ms", "_layouts", "_leases", "_number", "log_time_ms")

    def __init__(self) -> None:
        self.log_time_ms = 0
        self._layouts: dict[
            bytes, tuple[int, ...]
        ] = {}  # time, sequence, worker bits; unit, epoch in ms; order
        self._leases: dict[bytes, dict[int, _Lease]] = {}
        self._number = 0
        self._floor_ms = 0

    def apply(self, index: int, args: list[Any], reply: bytes) -> None:
        """An IDS command, and how it was answered."""
        opcode, error = args[0], commands.error_reply(reply)
        results = commands.decode_reply(reply) if error is None else []
        if opcode == OpCode.IDS_LEASE:
            if error is None:
                self._granted(index, args[1], args[2], args[3], results)
            elif isinstance(error, QuotaExceeded) and args[1] in self._layouts:
                self._exhausted(index, args[1])
        elif opcode != OpCode.IDS_SKIP:
            self._asked_by_a_holder(index, args, error, results)
        elif error is None and args[1] > self._floor_ms:
            self._floor_ms = args[1]
            for leases in self._leases.values():
                for lease in leases.values():
                    lease.is_skipped = True

    def _unit(self, name: bytes, time_ms: int) -> int:
        """The first that begins at this time or later."""
        _, _, _, unit_ms, epoch_ms, _ = self._layouts[name]
        return max(0, (time_ms - epoch_ms + unit_ms - 1) // unit_ms)

    def _granted(
        self, index: int, name: bytes, fields: list[int], window_ms: int, results: list[Any]
    ) -> None:
        worker, number, begin, until, now_unit, epoch_ms = results
        layout = self._layouts.setdefault(name, (*fields[:4], epoch_ms, fields[5]))
        leases = self._leases.setdefault(name, {})
        last = leases.get(worker)
        now, earliest = self._unit(name, self.log_time_ms), self._unit(name, self._floor_ms)
        wrong = ""
        if last is not None and begin < last.until:
            wrong = f"overlaps with a window up to {last.until}"
        elif last is not None and not last.is_free(now):
            wrong = f"is of a worker that lease {last.number} has up to {last.until}, {last.offset} ahead of log_time"
        elif layout != (*fields[:4], epoch_ms, fields[5]) or fields[4] not in (0, epoch_ms):
            wrong = f"is of another layout: {layout}"
        elif not 0 <= worker < 1 << layout[2] or not begin < until <= 1 << layout[0]:
            wrong = "is outside of the layout"
        elif begin < max(now, earliest) or now_unit != begin:
            wrong = f"begins before its time: it is {now}, the floor {earliest}"
        elif until - begin > max(1, window_ms // layout[3]):
            wrong = f"is longer than the {window_ms} ms asked for"
        elif number <= self._number:
            wrong = f"has no new number: {self._number} was given before"
        if wrong:
            raise Violation(
                "id window",
                f"entry {index} grants worker {worker} of {name!r} {begin} to {until} as lease {number}, which {wrong}",
            )
        self._number = number
        leases[worker] = _Lease(number, begin, until, begin - now)

    def _exhausted(self, index: int, name: bytes) -> None:
        leases, now = self._leases[name], self._unit(name, self.log_time_ms)
        free = [worker for worker, lease in leases.items() if lease.is_free(now)]
        if free or len(leases) < 1 << self._layouts[name][2]:
            raise Violation(
                "id window",
                f"entry {index} finds no free worker for {name!r}, of which {len(leases)} were ever used and "
                f"{sorted(free)} are free at {now}",
            )

    def _asked_by_a_holder(
        self, index: int, args: list[Any], error: CoordError | None, results: list[Any]
    ) -> None:
        opcode, name, worker, number, wanted = args
        what = f"entry {index} ({OpCode(opcode).name}) of lease {number} of worker {worker} of {name!r}"
        lease = self._leases.get(name, {}).get(worker)
        is_holder = lease is not None and lease.number == number
        if lease is None or not is_holder:
            if error is None:
                raise Violation("id window", f"{what} is accepted, and it is another's")
            return
        now = self._unit(name, self.log_time_ms) + lease.offset
        if opcode == OpCode.IDS_RENEW:
            is_due = not (lease.is_returned or lease.is_skipped) and now < lease.until
            if error is None:
                until, _ = results
                if not is_due:
                    raise Violation(
                        "id window", f"{what} is accepted at {now}, and it ended at {lease.until}"
                    )
                most = now + max(1, wanted // self._layouts[name][3])
                if not lease.until <= until <= max(lease.until, most):
                    raise Violation(
                        "id window",
                        f"{what} extends it from {lease.until} to {until}, at most to {most} was asked",
                    )
                lease.until = until
            elif is_due and isinstance(error, NotHolder):
                raise Violation(
                    "id window", f"{what} is refused at {now}, and it lasts until {lease.until}: {error}"
                )
        elif error is None:
            (until,) = results
            if not lease.is_returned:
                lease.until = max(lease.begin, min(lease.until, wanted))
                lease.is_returned = True
            if until != lease.until:
                raise Violation(
                    "id window", f"{what} leaves it until {until}, and used was up to {lease.until}"
                )

    def check(self, member: str, machine: Machine) -> None:
        """A member's own table at the end: it knows every window, and no other worker is taken."""
        for name, leases in self._leases.items():
            now = self._unit(name, self.log_time_ms)
            taken = sum(not lease.is_free(now) for lease in leases.values())
            _, _, used, leased, _, _ = commands.decode_reply(machine.query(commands.query_ids_info(name)))
            if (used, leased) != (len(leases), taken):
                raise Violation(
                    "id window",
                    f"{member} counts {leased} of {used} workers of {name!r} as leased, the log {taken} of {len(leases)}",
                )
