"""Stores that take part in simulated transactions: databases that can prepare, ones that cannot, and services.

A `Book` is what outlives processes: accounts, and what became of each piece of work (`Part`). What a process has of a
book ends with it. A book judges by itself: whatever it is asked against the rules of `coordlib.txn.branches`, or in
contradiction to what was decided, is a broken promise.

What must not live here: who transfers what, and when anything is recovered (see `bank`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn, Protocol

from coordlib.cbor import decode, encode
from coordlib.errors import StorageFailed
from coordlib.testing.simulation.choices import Stream
from coordlib.txn.branches import BranchFailed, BranchHeuristic, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import resource_tag
from coordlib.txn.journal import MemoryJournal, Record

__all__ = [
    "Book",
    "Connection",
    "FailingJournal",
    "Judge",
    "LastBook",
    "LastPart",
    "Ledger",
    "LedgerHandler",
    "Part",
    "State",
]

BALANCE: Final = 100


class State:
    """Of a part, as its store has it."""

    ACTIVE: Final = "active"
    PREPARED: Final = "prepared"
    READ_ONLY: Final = "read-only"
    COMMITTED: Final = "committed"
    ROLLED_BACK: Final = "rolled back"


class Judge(Protocol):
    """Who knows what was decided, and is told what becomes of it."""

    def broken(self, check: str, message: str) -> NoReturn: ...

    def hit(self, mark: str) -> None: ...

    def now(self) -> int: ...

    def ending(self, part: Part, commit: bool) -> None:
        """What had promised is about to be ended."""

    def ending_of_marker(self, book: LastBook, gtid: bytes) -> None:
        """Nobody will ask a last resource about it any more."""


class Part:
    """One transaction's work in one book."""

    __slots__ = ("book", "bqual", "changes", "gtid", "is_by_hand", "prepared_ms", "state", "was_prepared")

    def __init__(self, book: Book, gtid: bytes, bqual: bytes) -> None:
        self.book = book
        self.gtid = gtid
        self.bqual = bqual
        self.changes: dict[str, int] = {}
        self.state = State.ACTIVE
        self.was_prepared = False
        self.is_by_hand = False  # somebody else has ended it, whatever was decided
        self.prepared_ms = 0

    def __str__(self) -> str:
        return (
            f"{self.state} branch {self.bqual.hex()} of {self.gtid.hex()} in {self.book.name} {self.changes}"
        )

    def add(self, account: str, amount: int) -> None:
        """Change an account; nothing is seen of it before it is committed."""
        if self.state != State.ACTIVE:
            raise ConnectionError("the transaction is gone")
        self.changes[account] = self.changes.get(account, 0) + amount


class Book:
    """Accounts in one place. No account falls below 0."""

    def __init__(self, judge: Judge, name: str, accounts: int = 2) -> None:
        self.judge = judge
        self.name = name
        self.tag = resource_tag(name)
        self.accounts = {f"{name}/{place}": BALANCE for place in range(accounts)}
        self.parts: dict[tuple[bytes, bytes], Part] = {}  # all there ever were
        self.prepared: dict[tuple[bytes, bytes], Part] = {}

    @property
    def total(self) -> int:
        return sum(self.accounts.values())

    @property
    def is_quiet(self) -> bool:
        return not self.prepared

    def begin(self, gtid: bytes, bqual: bytes) -> Part:
        return Part(self, gtid, bqual)

    def prepare(self, part: Part) -> Vote:
        """
        Raises:
            BranchFailed: An account would be overdrawn, or is locked by what has promised.
        """
        key = (part.gtid, part.bqual)
        if part.state != State.ACTIVE or key in self.parts:
            self.judge.broken("branch rules", f"asked to prepare {self.parts.get(key, part)}")
        changes = {account: amount for account, amount in part.changes.items() if amount}
        if not changes:
            part.state = State.READ_ONLY
            return Vote.READ_ONLY
        locked = {account for other in self.prepared.values() for account in other.changes}
        for account, amount in changes.items():
            if account in locked or self.accounts[account] + amount < 0:
                part.state = State.ROLLED_BACK
                raise BranchFailed(f"{account} is {'locked' if account in locked else 'overdrawn'}")
        part.changes = changes
        part.state = State.PREPARED
        part.was_prepared = True
        part.prepared_ms = self.judge.now()
        self.parts[key] = self.prepared[key] = part
        return Vote.YES

    def commit_alone(self, part: Part) -> None:
        """One phase: raises as `prepare` does."""
        if self.prepare(part) is Vote.YES:
            part.was_prepared = False
            self._end(part, True)

    def end(self, part: Part, commit: bool) -> Finish:
        """End what has promised, or was never asked to."""
        if part.state in (State.ACTIVE, State.READ_ONLY) or (
            part.state == State.ROLLED_BACK and not part.was_prepared
        ):
            if commit:
                self.judge.broken("branch rules", f"told to commit what has not promised: {part}")
            part.state = State.ROLLED_BACK
            return Finish.DONE
        if part.state == State.PREPARED:
            self.judge.ending(part, commit)
            self._end(part, commit)
            return Finish.DONE
        if (part.state == State.COMMITTED) is commit:
            return Finish.ALREADY
        if not part.was_prepared:
            return Finish.DONE  # committed in one phase: there is nothing left to roll back
        if not part.is_by_hand:
            self.judge.broken("false alarm", f"told to {'commit' if commit else 'roll back'}: {part}")
        return Finish.HEURISTIC_ROLLBACK if commit else Finish.HEURISTIC_COMMIT

    def _end(self, part: Part, commit: bool) -> None:
        del self.prepared[part.gtid, part.bqual]
        part.state = State.COMMITTED if commit else State.ROLLED_BACK
        if commit:
            for account, amount in part.changes.items():
                self.accounts[account] += amount

    def end_by_hand(self, part: Part) -> None:
        """A database administrator loses patience."""
        part.is_by_hand = True
        self._end(part, False)


class Connection:
    """
    A process's way to a book that can prepare: the `Resource` of it there.

    Now and then a request is lost, or its answer.
    """

    def __init__(self, book: Book, stream: Stream, flaky: float) -> None:
        self.book = book
        self.name = book.name
        self.tag = book.tag
        self._stream = stream
        self._flaky = flaky

    def ask(self, request: Callable[[], Any]) -> Any:
        if not self._flaky or self._stream.random() >= self._flaky:
            return request()
        if self._stream.random() < 0.5:
            request()
        raise ConnectionError("the connection is lost")

    def prepared(self) -> list[PreparedBranch]:
        found: list[PreparedBranch] = self.ask(
            lambda: [PreparedBranch(gtid, bqual, self.name) for gtid, bqual in self.book.prepared]
        )
        return found

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        part = self.book.parts.get((branch.gtid, branch.bqual))
        if part is None:
            self.book.judge.broken("branch rules", f"told to finish {branch}, which never was prepared")
        finish: Finish = self.ask(lambda: self.book.end(part, commit))
        if finish is Finish.DONE:
            self.book.judge.hit("tx_recovered_by_another")
        return finish

    def branch(self, gtid: bytes, bqual: bytes) -> BookBranch:
        return BookBranch(self, self.book.begin(gtid, bqual))


class BookBranch:
    """The `Branch` of a part over one connection."""

    is_last_resource = False

    def __init__(self, connection: Connection, part: Part) -> None:
        self.resource = connection
        self.part = part
        self.bqual = part.bqual
        self._ask = connection.ask

    def prepare(self) -> Vote:
        try:
            vote: Vote = self._ask(lambda: self.part.book.prepare(self.part))
        except ConnectionError:
            if self.part.state == State.ACTIVE:
                self.part.state = State.ROLLED_BACK  # with its connection
            raise
        return vote

    def commit_one_phase(self) -> None:
        try:
            self._ask(lambda: self.part.book.commit_alone(self.part))
        except ConnectionError:
            if self.part.state == State.ACTIVE:
                self.part.state = State.ROLLED_BACK
            raise

    def commit(self) -> None:
        self._finish(True)

    def rollback(self) -> None:
        self._finish(False)

    def _finish(self, commit: bool) -> None:
        finish = self._ask(lambda: self.part.book.end(self.part, commit))
        if finish not in (Finish.DONE, Finish.ALREADY):
            raise BranchHeuristic(finish, f"{self.part} was ended by hand")


class LastBook(Book):
    """A book that cannot prepare, on one machine: it decides by its own commit, as SQLite does."""

    def __init__(self, judge: Judge, name: str) -> None:
        super().__init__(judge, name)
        self.markers: set[bytes] = set()
        self.fences: set[bytes] = set()
        self.decided: set[bytes] = set()  # markers there ever were

    def outcome(self, gtid: bytes) -> bool:
        if gtid in self.markers:
            return True
        self.fences.add(gtid)
        return False

    def forget(self, gtid: bytes) -> None:
        self.markers.discard(gtid)

    def decide(self, part: Part) -> None:
        if part.state != State.ACTIVE:
            self.judge.broken("branch rules", f"asked to decide by {part}")
        if part.gtid in self.fences:
            part.state = State.ROLLED_BACK
            self.judge.hit("tx_last_resource_fenced")
            raise BranchFailed("somebody has asked, and was told that it is not committed")
        self.commit_alone(part)
        self.markers.add(part.gtid)
        self.decided.add(part.gtid)


class LastPart:
    """The `DecidingBranch`, and its `DecidingResource`, of a process."""

    is_last_resource = True

    def __init__(self, book: LastBook, connection: LastConnection, gtid: bytes, bqual: bytes) -> None:
        self.book = book
        self.resource = connection
        self.part = book.begin(gtid, bqual)
        self.bqual = bqual

    def prepare(self) -> Vote:
        raise AssertionError("a last resource is never asked to prepare")

    def commit_one_phase(self) -> None:
        self.resource.ask(lambda: self.book.commit_alone(self.part))

    def commit(self) -> None:
        raise AssertionError("a last resource is never told to commit")

    def rollback(self) -> None:
        if self.part.state == State.ACTIVE:
            self.part.state = State.ROLLED_BACK

    def decide(self, gtid: bytes) -> None:
        self.resource.ask(lambda: self.book.decide(self.part))


class LastConnection(Connection):
    """See `LastPart`."""

    book: LastBook

    def prepared(self) -> list[PreparedBranch]:
        return []

    def outcome(self, gtid: bytes) -> bool:
        answer: bool = self.ask(lambda: self.book.outcome(gtid))
        return answer

    def forget(self, gtid: bytes) -> None:
        self.book.judge.ending_of_marker(self.book, gtid)
        self.ask(lambda: self.book.forget(gtid))

    def last(self, gtid: bytes, bqual: bytes) -> LastPart:
        return LastPart(self.book, self, gtid, bqual)


class FailingJournal(MemoryJournal):
    """
    A journal on a disk whose writes fail now and then, before or after they are there.

    Attributes:
        share: Of writes that fail.
    """

    def __init__(self, judge: Judge, stream: Stream, share: float) -> None:
        super().__init__()
        self._judge = judge
        self._stream = stream
        self.share = share

    def _write(self, write: Callable[[], None]) -> None:
        if not self.share or self._stream.random() >= self.share:
            write()
            return
        self._judge.hit("tx_journal_failed")
        if self._stream.random() < 0.5:
            write()
        raise StorageFailed("the journal cannot be written")

    def add(self, record: Record) -> None:
        self._write(lambda: MemoryJournal.add(self, record))

    def decide(self, gtid: bytes, bqual: bytes, state: int) -> None:
        self._write(lambda: MemoryJournal.decide(self, gtid, bqual, state))

    def remove(self, gtid: bytes, bqual: bytes) -> None:
        self._write(lambda: MemoryJournal.remove(self, gtid, bqual))


class Ledger(Book):
    """The accounts of a service that has no database: on one machine, beside its journal."""

    def __init__(self, judge: Judge, name: str, journal: FailingJournal) -> None:
        super().__init__(judge, name)
        self.journal = journal
        self.done: dict[bytes, bool] = {}  # by branch: whether it was committed

    @property
    def is_quiet(self) -> bool:
        return not self.journal.records(self.name)


class LedgerHandler:
    """
    The handler of a ledger in one process: reservations are in its memory.

    Money that is promised is not promised again; a promise is the redo, and is kept or let go once.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._reserved: dict[bytes, Mapping[str, int]] = {}

    def prepare(self, work: object) -> bytes | None:
        assert isinstance(work, Part)
        changes = {account: amount for account, amount in work.changes.items() if amount}
        if not changes:
            work.state = State.READ_ONLY
            return None
        for account, amount in changes.items():
            if amount < 0 and self._free(account) + amount < 0:
                work.state = State.ROLLED_BACK
                raise BranchFailed(f"{account} would be overdrawn")
        id = work.gtid + work.bqual
        self._reserved[id] = work.changes = changes
        work.state, work.was_prepared, work.prepared_ms = State.PREPARED, True, self.ledger.judge.now()
        self.ledger.parts[work.gtid, work.bqual] = work
        return encode((id, changes))

    def _free(self, account: str) -> int:
        reserved = sum(min(0, changes.get(account, 0)) for changes in self._reserved.values())
        return self.ledger.accounts[account] + reserved

    def restore(self, redo: bytes) -> None:
        id, changes = decode(redo)
        self.ledger.judge.hit("tx_promise_restored")
        if id in self.ledger.done:
            self.ledger.judge.broken(
                "branch rules", f"{id.hex()} is restored in {self.ledger.name}, and has ended"
            )
        self._reserved[id] = changes

    def commit(self, redo: bytes) -> None:
        self._end(redo, True)

    def abort(self, redo: bytes) -> None:
        self._end(redo, False)

    def _end(self, redo: bytes, commit: bool) -> None:
        id, changes = decode(redo)
        ledger = self.ledger
        self._reserved.pop(id, None)
        before = ledger.done.get(id)
        if before is not None:
            if before is not commit:
                ledger.judge.broken(
                    "atomic",
                    f"{id.hex()} is ended twice in {ledger.name}, and differently: {before}, {commit}",
                )
            ledger.judge.hit("tx_obeyed_again")
            return
        part = ledger.parts[id[:16], id[16:]]
        ledger.judge.ending(part, commit)
        ledger.done[id] = commit
        part.state = State.COMMITTED if commit else State.ROLLED_BACK
        if not commit:
            return
        for account, amount in changes.items():
            ledger.accounts[account] += amount
            if ledger.accounts[account] < 0:
                ledger.judge.broken(
                    "reservations", f"{account} is overdrawn by {part}, which had been promised"
                )
