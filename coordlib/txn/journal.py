"""The participant's journal: for services that keep their state in no database of their own.

What such a service would need to commit (*redo*) is kept here from before its vote until it has obeyed. The journal is a
resource like a database, so that recovery finds what is prepared in it. ::

    record: PREPARED ──▶ COMMITTED ──handler.commit(redo) done──▶ gone
                   └──▶ ABORTED ────handler.abort(redo) done──▶ gone

The outcome is durable before the handler hears of it, and the record goes after the handler has returned: a crash in
between runs the handler again. So handlers' `commit` and `abort` are idempotent.

Disk: ``participants.db`` is an SQLite database in WAL mode with `synchronous=FULL`; its table `journal` has the
columns below, its table `identity` one random number by which this journal's branches are known again in the log;
`user_version` is the format, and a newer format is refused.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from coordlib.errors import StorageCorrupt, StorageFailed, invariant
from coordlib.txn.branches import BranchFailed, BranchHeuristic, Finish, PreparedBranch, Resource, Vote
from coordlib.txn.gtid import BranchName, resource_tag

__all__ = [
    "BranchBusy",
    "Handler",
    "Journal",
    "JournalBranch",
    "JournalResource",
    "JournalState",
    "MemoryJournal",
    "Record",
    "SqliteJournal",
]

log = logging.getLogger("coordlib")
FORMAT: Final = 1


class JournalState:
    """As in the file."""

    PREPARED = 0
    COMMITTED = 1
    ABORTED = 2


class Record(NamedTuple):
    """What is kept of one branch. Its deadline is in log time: after it nobody decides to commit."""

    service: str
    gtid: bytes
    bqual: bytes
    deadline_ms: int
    state: int
    redo: bytes


class Journal(Protocol):
    """
    Records by (gtid, bqual). Thread-safe. Every method that changes something is durable when it returns.

    Attributes:
        id: Tells this journal from every other one for as long as it exists; at most 16 bytes. Empty: it cannot be told,
            so that branches which have obeyed stay pending in the log if their initiator dies before it says so.
    """

    @property
    def id(self) -> bytes: ...

    def add(self, record: Record) -> None:
        """
        Raises:
            StorageFailed: It may be there or not; the branch must not be promised.
        """

    def decide(self, gtid: bytes, bqual: bytes, state: int) -> None:
        """Note the outcome; nothing if the record is not there."""

    def remove(self, gtid: bytes, bqual: bytes) -> None:
        """The handler has obeyed."""

    def get(self, gtid: bytes, bqual: bytes) -> Record | None: ...

    def records(self, service: str) -> list[Record]:
        """All there are of a service, in the order of (gtid, bqual)."""

    def close(self) -> None: ...


class MemoryJournal:
    """For tests and the simulator: what outlives a process there. `before_write` may raise, as a crash does."""

    def __init__(self, before_write: Callable[[str], None] = lambda what: None, id: bytes = b"") -> None:
        self.id = id
        self._records: dict[tuple[bytes, bytes], Record] = {}
        self.before_write = before_write

    def add(self, record: Record) -> None:
        self.before_write("add")
        self._records[(record.gtid, record.bqual)] = record

    def decide(self, gtid: bytes, bqual: bytes, state: int) -> None:
        self.before_write("decide")
        found = self._records.get((gtid, bqual))
        if found is not None:
            self._records[(gtid, bqual)] = found._replace(state=state)

    def remove(self, gtid: bytes, bqual: bytes) -> None:
        self.before_write("remove")
        self._records.pop((gtid, bqual), None)

    def get(self, gtid: bytes, bqual: bytes) -> Record | None:
        return self._records.get((gtid, bqual))

    def records(self, service: str) -> list[Record]:
        return sorted(
            (r for r in self._records.values() if r.service == service), key=lambda r: (r.gtid, r.bqual)
        )

    def close(self) -> None:
        pass


_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS journal (
    service TEXT NOT NULL,
    gtid BLOB NOT NULL,
    bqual BLOB NOT NULL,
    deadline_ms INTEGER NOT NULL,
    state INTEGER NOT NULL,
    redo BLOB NOT NULL,
    PRIMARY KEY (gtid, bqual)
) WITHOUT ROWID
"""

_IDENTITY: Final = "CREATE TABLE IF NOT EXISTS identity (id BLOB NOT NULL)"
_ID_SIZE: Final = 8


class SqliteJournal:
    """
    A journal in a file on a local disk, of one process at a time.

    Raises:
        StorageFailed: It cannot be opened, or another process has it open.
        StorageCorrupt: The file is not a journal of this format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False, timeout=5.0
            )
        except sqlite3.Error as error:
            raise StorageFailed(f"the participants' journal {self.path} cannot be opened: {error}") from error
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        run = self._connection.execute
        try:
            # Exclusive from the first lock on: two processes with one journal would both obey for it.
            run("PRAGMA locking_mode=EXCLUSIVE")
            (mode,) = run("PRAGMA journal_mode=WAL").fetchone()
            run("PRAGMA synchronous=FULL")
            (version,) = run("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT):
                raise StorageCorrupt(
                    f"the participants' journal {self.path} has format {version}, this version reads {FORMAT}: "
                    "upgrade coordlib on this node"
                )
            run("BEGIN EXCLUSIVE")
            run(_SCHEMA)
            run(_IDENTITY)
            run(
                "INSERT INTO identity SELECT randomblob(?) WHERE NOT EXISTS (SELECT 1 FROM identity)",
                (_ID_SIZE,),
            )
            (identity,) = run("SELECT id FROM identity").fetchone()
            self.id: bytes = identity
            run(f"PRAGMA user_version={FORMAT}")
            run("COMMIT")
        except sqlite3.DatabaseError as error:
            kind = StorageFailed if isinstance(error, sqlite3.OperationalError) else StorageCorrupt
            raise kind(
                f"the participants' journal {self.path} cannot be used: {error}. Does another process have it open?"
            ) from error
        if mode != "wal":
            raise StorageFailed(
                f"the participants' journal {self.path} needs WAL mode; its file system gave {mode!r}"
            )

    def _write(self, statement: str, *values: object) -> None:
        with self._lock:
            try:
                self._connection.execute(
                    statement, values
                )  # a transaction of its own, durable when it returns
            except sqlite3.Error as error:
                raise StorageFailed(
                    f"the participants' journal {self.path} cannot be written: {error}"
                ) from error

    def add(self, record: Record) -> None:
        self._write("INSERT INTO journal VALUES (?, ?, ?, ?, ?, ?)", *record)

    def decide(self, gtid: bytes, bqual: bytes, state: int) -> None:
        self._write("UPDATE journal SET state = ? WHERE gtid = ? AND bqual = ?", state, gtid, bqual)

    def remove(self, gtid: bytes, bqual: bytes) -> None:
        self._write("DELETE FROM journal WHERE gtid = ? AND bqual = ?", gtid, bqual)

    def _read(self, condition: str, *values: object) -> list[Record]:
        with self._lock:
            try:
                rows = self._connection.execute(
                    f"SELECT service, gtid, bqual, deadline_ms, state, redo FROM journal WHERE {condition} "
                    "ORDER BY gtid, bqual",
                    values,
                ).fetchall()
            except sqlite3.Error as error:
                raise StorageFailed(
                    f"the participants' journal {self.path} cannot be read: {error}"
                ) from error
        return [Record(*row) for row in rows]

    def get(self, gtid: bytes, bqual: bytes) -> Record | None:
        return next(iter(self._read("gtid = ? AND bqual = ?", gtid, bqual)), None)

    def records(self, service: str) -> list[Record]:
        return self._read("service = ?", service)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._connection.close()


class BranchBusy(Exception):
    """What is decided is being carried out on another thread: ask again."""


class Handler(Protocol):
    """
    What a service without a database of its own is asked at the end of a transaction. All may block; they are called on
    any thread, several at a time, but never two for the same transaction.
    """

    def prepare(self, work: object) -> bytes | None:
        """
        Promise what was done in this transaction: reserve it, and return what commit and abort will need.

        None: nothing was changed.

        Raises:
            Exception: It cannot be promised; nothing is left reserved.
        """

    def restore(self, redo: bytes) -> None:
        """After a restart, before anything is served: reserve again what was promised. Its outcome comes later."""

    def commit(self, redo: bytes) -> None:
        """Do what was promised. Idempotent: it may be run again, also after a restart."""

    def abort(self, redo: bytes) -> None:
        """Let go of what was promised. Idempotent."""


class JournalResource:
    """The journal of one service, as recovery sees it. See `Resource`."""

    def __init__(self, service: str, journal: Journal, handler: Handler) -> None:
        self.name = f"service:{service}"
        self.tag = resource_tag(self.name)
        self.service = service
        self.journal = journal
        self.handler = handler
        self._lock = threading.Lock()
        self._obeying: set[tuple[bytes, bytes]] = set()  # given to the handler, on whatever thread

    def start(self) -> None:
        """
        After a start, before anything is served: finish what is decided, and reserve again what is not.

        Raises:
            Exception: Of the handler or the journal; the service must not be started.
        """
        for record in self.journal.records(self.service):
            if record.state == JournalState.PREPARED:
                self.handler.restore(record.redo)
            else:
                self.obey(record)

    def obey_again(self) -> None:
        """
        Let the handler have what is decided and what it has failed on before.

        Raises:
            Exception: Of the handler or the journal.
        """
        for record in self.journal.records(self.service):
            if record.state != JournalState.PREPARED and (record.gtid, record.bqual) not in self._obeying:
                self.obey(record)

    def obey(self, record: Record) -> None:
        """
        The outcome is durable: let the handler have it, then forget it.

        Raises:
            BranchBusy: The handler has it already, on another thread.
            Exception: Of the handler or the journal; it is to be obeyed again.
        """
        key = record.gtid, record.bqual
        with self._lock:
            if key in self._obeying:
                # Handlers need not bear the same thing twice at once: one that looks, and then acts, would do it twice.
                raise BranchBusy(f"service {self.service!r} is at work on it")
            self._obeying.add(key)
        try:
            if self.journal.get(*key) is None:
                return  # it has obeyed since it was looked up
            if record.state == JournalState.COMMITTED:
                self.handler.commit(record.redo)
            else:
                self.handler.abort(record.redo)
            self.journal.remove(*key)
        finally:
            with self._lock:
                self._obeying.discard(key)

    def holds(self, bqual: bytes) -> bool:
        name = BranchName.unpack(bqual)
        return name is not None and name.evidence == self.journal.id != b""

    def prepared(self) -> list[PreparedBranch]:
        return [
            PreparedBranch(record.gtid, record.bqual, f"{self.service} in the participants' journal")
            for record in self.journal.records(self.service)
            if record.state == JournalState.PREPARED
        ]

    def deadline_ms(self, gtid: bytes, bqual: bytes) -> int | None:
        """Of a branch that is prepared."""
        record = self.journal.get(gtid, bqual)
        return None if record is None else record.deadline_ms

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        record = self.journal.get(branch.gtid, branch.bqual)
        if record is None:
            return Finish.ALREADY  # only we remove it, and only after it has obeyed the one outcome there is
        state = JournalState.COMMITTED if commit else JournalState.ABORTED
        if record.state == JournalState.PREPARED:
            self.journal.decide(branch.gtid, branch.bqual, state)
        elif record.state != state:
            return Finish.HEURISTIC_ROLLBACK if commit else Finish.HEURISTIC_COMMIT
        self.obey(record._replace(state=state))
        return Finish.DONE


class JournalBranch:
    """One transaction's work in a service without a database."""

    is_last_resource = False

    def __init__(
        self, resource: JournalResource, gtid: bytes, bqual: bytes, deadline_ms: int, work: object
    ) -> None:
        self._journal = resource
        self.resource: Resource = resource
        self.bqual = bqual
        self._gtid = gtid
        self._deadline_ms = deadline_ms
        self._work = work
        self._reserved: bytes | None = None  # what the handler has reserved, and nobody has let go of

    @property
    def seems_read_only(self) -> bool:
        return not getattr(self._work, "notes", True)

    def prepare(self) -> Vote:
        try:
            redo = self._journal.handler.prepare(self._work)
        except Exception as error:
            raise BranchFailed(f"service {self._journal.service!r} refused: {error}") from error
        if redo is None:
            return Vote.READ_ONLY
        if type(redo) is not bytes:
            self._journal.handler.abort(redo)
            raise BranchFailed(
                f"prepare() of service {self._journal.service!r} returned a {type(redo).__name__}: it returns bytes, which "
                "commit() and abort() are given, or None if nothing was changed"
            )
        self._reserved = redo
        name = BranchName.unpack(self.bqual)
        invariant(name is not None, "a branch whose name is none: %s", self.bqual.hex())
        assert name is not None
        self.bqual = name._replace(evidence=self._journal.journal.id).pack()
        service = self._journal.service
        self._journal.journal.add(
            Record(service, self._gtid, self.bqual, self._deadline_ms, JournalState.PREPARED, redo)
        )
        return Vote.YES

    def commit_one_phase(self) -> None:
        if self.prepare() is Vote.READ_ONLY:
            return
        self._journal.journal.decide(self._gtid, self.bqual, JournalState.COMMITTED)
        try:
            self.commit()
        except Exception:
            # It is committed: what the handler failed on it gets again, at the latest after the next start.
            log.exception(
                "service %r failed to do what is committed; it will be asked again",
                self._journal.service,
                extra={"event": "transaction.obey-failed"},
            )

    def commit(self) -> None:
        self._end(True)

    def rollback(self) -> None:
        self._end(False)

    def _end(self, commit: bool) -> None:
        branch = PreparedBranch(self._gtid, self.bqual, "")
        if not commit and self._journal.journal.get(self._gtid, self.bqual) is None:
            # Never prepared; or reserved, and the journal could not keep it; or ended before.
            redo, self._reserved = self._reserved, None
            if redo is not None:
                self._journal.handler.abort(redo)
            return
        finish = self._journal.finish(branch, commit)
        self._reserved = None
        if finish not in (Finish.DONE, Finish.ALREADY):
            raise BranchHeuristic(finish, f"service {self._journal.service!r} has ended otherwise before")
