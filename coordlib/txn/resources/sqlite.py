"""SQLite, which cannot prepare, and so decides: the logging last resource.

Its local transaction writes a marker, the gtid with "committed", and commits: that is the decision. Whoever is in doubt
asks `outcome`, which either finds the marker or leaves one that says "aborted" (a fence), on which a late decision fails.

What has to be watched, and is:

* Whoever is in doubt must ask the very file that decided. A name says too little: every node may have a file of its own
  under it. So the file holds a random identity, and the tag is of both.
* The decision must outlive a loss of power. `synchronous` is set to FULL, or to EXTRA with the journal mode DELETE,
  whose last commit could come undone otherwise; lower settings and journals in memory are refused. So are databases in
  memory, and attached ones, with which a commit is not atomic in WAL mode.
* Python's driver commits behind the application's back: `with connection:`, `executescript()`, `commit()`. An
  authorizer refuses whatever would begin, end or weaken the transaction. Connections are the resource's own for that
  reason: whether one of the application's has such a thing already cannot be asked.
* A statement that fails is rolled back alone, and the transaction goes on. As a NO is what a swallowed error means in
  this library, cursors are watched; going back to a savepoint from before the error heals it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from coordlib.errors import ConfigError, UsageError, invariant
from coordlib.txn.branches import BranchFailed, BranchUnknown, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import resource_tag, text_of
from coordlib.txn.resources.common import HAS_ENDED, Failures, IdleConnections, ResourceBase

__all__ = ["MARKER_TABLE", "SQLite", "SQLiteBranch"]

MARKER_TABLE: Final = "coordlib_tx"
IDENTITY_TABLE: Final = "coordlib_identity"

_IDENTITY_SIZE: Final = 8
_FULL: Final = 2
_EXTRA: Final = 3
_FORGET_AT: Final = 100  # markers that are removed at the latest then; else with the next decision
_NOT_AUTHORIZED: Final = "not authorized"
_WHY_NOT: Final = (
    "in a transaction of coordlib's: it begins, commits and rolls back by itself, attaches no files and stays as durable as "
    "it is"
)
_BUSY_CODES: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_PRAGMAS_REFUSED: Final = frozenset(
    ("journal_mode", "synchronous", "fullfsync", "locking_mode", "writable_schema", "journal_size_limit")
)


class _Connection(sqlite3.Connection):
    """Watches its cursors, and lets nobody but its branch end the transaction."""

    failures: Failures
    is_open_to_all = True
    is_lent = False  # to a transaction, until that ends

    def authorize(self, action: int, argument: str | None, value: str | None, *_: str | None) -> int:
        if self.is_open_to_all:
            return sqlite3.SQLITE_OK
        if action in (sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
            return sqlite3.SQLITE_DENY
        if (
            action == sqlite3.SQLITE_PRAGMA
            and value is not None
            and (argument or "").lower() in _PRAGMAS_REFUSED
        ):
            return sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or _Cursor)

    def execute(self, *arguments: Any) -> Any:
        return self.cursor().execute(*arguments)

    def executemany(self, *arguments: Any) -> Any:
        return self.cursor().executemany(*arguments)

    def executescript(self, *arguments: Any) -> Any:
        return self.cursor().executescript(*arguments)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """For the branch's own statements."""
        self.is_open_to_all = True
        try:
            yield
        finally:
            self.is_open_to_all = False


class _Cursor(sqlite3.Cursor):
    def execute(self, *arguments: Any) -> Any:
        return self._watched(super().execute, arguments)

    def executemany(self, *arguments: Any) -> Any:
        return self._watched(super().executemany, arguments)

    def executescript(self, *arguments: Any) -> Any:
        return self._watched(super().executescript, arguments)

    def _watched(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        connection = self.connection
        assert isinstance(connection, _Connection)
        if not (connection.is_lent or connection.is_open_to_all):
            raise sqlite3.ProgrammingError(HAS_ENDED)
        try:
            result = work(*arguments)
        except sqlite3.Error as exc:
            if str(exc) == _NOT_AUTHORIZED:
                exc.args = (f"{exc} {_WHY_NOT}",)
            connection.failures.note(exc)
            raise
        if arguments and isinstance(arguments[0], str):
            connection.failures.statement(arguments[0])
        return result


class SQLite(ResourceBase):
    """
    A SQLite database as a resource: the last one of a transaction, at most, and the one that decides.

    While this node is away, transactions in which others have prepared stay in doubt. Enlist it before the others.

    Args:
        name: The same after a restart. A database file belongs to one node.
        path: Of the file; a URI if it begins with `file:`.
        configure: Called with each new connection.
        timeout: Seconds to wait for other connections, where no transaction's time says otherwise.
        idle_max: How many connections are kept.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        *,
        configure: Callable[[sqlite3.Connection], object] | None = None,
        timeout: float = 5.0,
        idle_max: int = 4,
    ) -> None:
        super().__init__(name)
        self._path = str(path)
        self._configure = configure
        self._timeout = timeout
        self._idle: IdleConnections[_Connection] = IdleConnections(idle_max, _Connection.close)
        self._forgotten: list[bytes] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<SQLite {self.name!r}>"

    def open(self, cluster: bytes) -> None:
        """
        See whether the database can keep a decision; make the tables of markers and of its identity, and learn that.

        Raises:
            ConfigError: It cannot; the message names the setting.
            sqlite3.Error: It cannot be opened.
        """
        connection = self._connect()
        try:
            with connection.opened():
                connection.execute(
                    f"CREATE TABLE IF NOT EXISTS {MARKER_TABLE} (gtid BLOB PRIMARY KEY, is_committed INTEGER NOT NULL) "
                    "WITHOUT ROWID"
                )
                identity = self._learn_identity(connection)
        except BaseException:
            connection.close()
            raise
        self._cluster = cluster
        self._tag = resource_tag(f"{self.name} {identity.hex()}")
        self._idle.give(connection)

    @staticmethod
    def _learn_identity(connection: _Connection) -> bytes:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"CREATE TABLE IF NOT EXISTS {IDENTITY_TABLE} (id BLOB NOT NULL)")
        connection.execute(
            f"INSERT INTO {IDENTITY_TABLE} SELECT randomblob(?) WHERE NOT EXISTS (SELECT 1 FROM {IDENTITY_TABLE})",
            (_IDENTITY_SIZE,),
        )
        found: bytes = connection.execute(f"SELECT id FROM {IDENTITY_TABLE}").fetchone()[0]
        connection.commit()
        return found

    def close(self) -> None:
        """Close the idle connections. Branches that are under way keep theirs."""
        with contextlib.suppress(sqlite3.Error):  # the markers stay; they are in nobody's way
            self._sweep()
        self._idle.clear()

    def is_conflict(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed when it is tried again: others were using the database."""
        while not isinstance(error, sqlite3.Error):
            if error.__cause__ is None:
                return False
            error = error.__cause__
        return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _BUSY_CODES

    def begin(self, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]) -> SQLiteBranch:
        """
        A branch on a connection of the resource's own, its transaction begun, and the database locked for writing.

        Raises:
            sqlite3.OperationalError: Others write, for longer than the transaction has time.
        """
        self.check_bqual(bqual)
        connection = self._idle.take() or self._connect()
        try:
            return SQLiteBranch(self, connection, gtid, bqual, remaining_s)
        except BaseException:
            connection.close()
            raise

    # -- the decision's memory

    def prepared(self) -> list[PreparedBranch]:
        """None: it never prepares."""
        return []

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        """What it has decided is the outcome, and needs no finishing."""
        was_committed = self.outcome(branch.gtid)
        if was_committed:
            return Finish.ALREADY if commit else Finish.HEURISTIC_COMMIT
        return Finish.HEURISTIC_ROLLBACK if commit else Finish.ALREADY

    def outcome(self, gtid: bytes) -> bool:
        """
        Whether it has committed the transaction; if not, it never will.

        Raises:
            sqlite3.Error: It cannot be reached now, or the transaction is under way; nobody may conclude anything.
        """
        with self._writing() as connection:
            connection.execute(f"INSERT OR IGNORE INTO {MARKER_TABLE} VALUES (?, 0)", (gtid,))
            found = connection.execute(f"SELECT is_committed FROM {MARKER_TABLE} WHERE gtid = ?", (gtid,))
            (is_committed,) = found.fetchone()
        return bool(is_committed)

    def forget(self, gtid: bytes) -> None:
        """Remove the marker, with the next decision or some others: nobody will ask again."""
        with self._lock:
            self._forgotten.append(gtid)
            is_due = len(self._forgotten) >= _FORGET_AT
        if is_due:
            with contextlib.suppress(sqlite3.Error):  # the markers stay; they are in nobody's way
                self._sweep()

    def _sweep(self) -> None:
        if self._forgotten and self._cluster is not None:
            with self._writing() as connection:
                self._remove_forgotten(connection)

    def _remove_forgotten(self, connection: sqlite3.Connection) -> None:
        """Within a transaction. If that does not commit they stay, in nobody's way."""
        with self._lock:
            forgotten, self._forgotten = self._forgotten, []
        if forgotten:
            marks = ((gtid,) for gtid in forgotten)
            connection.executemany(f"DELETE FROM {MARKER_TABLE} WHERE gtid = ?", marks)

    # -- connections

    @contextlib.contextmanager
    def _writing(self) -> Iterator[_Connection]:
        """A transaction of the resource's own."""
        assert self.cluster  # or it says that the resource is not open
        connection = self._idle.take() or self._connect()
        try:
            with connection.opened():
                connection.execute(f"PRAGMA busy_timeout = {int(self._timeout * 1000)}")
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.commit()
        except BaseException:
            connection.close()  # and whatever it had begun ends
            raise
        self._idle.give(connection)

    def _connect(self) -> _Connection:
        try:
            connection = sqlite3.connect(
                self._path,
                timeout=self._timeout,
                isolation_level=None,
                # Commit runs where the decision is waited for; branches are used by one thread at a time.
                check_same_thread=False,
                factory=_Connection,
                uri=self._path.startswith("file:"),
            )
        except sqlite3.OperationalError as exc:
            exc.args = (f"{self.name!r} at {self._path}: {exc}",)
            raise
        try:
            connection.failures = Failures()
            if sys.platform == "darwin":
                connection.execute("PRAGMA fullfsync = ON")
            journal = _value(connection, "PRAGMA journal_mode")
            connection.execute(f"PRAGMA synchronous = {_EXTRA if journal == 'delete' else _FULL}")
            if self._configure is not None:
                self._configure(connection)
            self._check(connection)
            connection.set_authorizer(connection.authorize)
            connection.is_open_to_all = False
        except BaseException:
            connection.close()
            raise
        return connection

    def _check(self, connection: _Connection) -> None:
        name = self.name
        databases = {alias: file for _, alias, file in connection.execute("PRAGMA database_list")}
        if not databases.get("main"):
            raise ConfigError(
                f"{name!r} is in memory: a decision would not outlive the process; give a file's path"
            )
        others = sorted(set(databases) - {"main", "temp"})
        if others:
            raise ConfigError(
                f"{name!r} has {', '.join(others)} attached: a commit is not atomic over several files. Make each a "
                "resource, or have what belongs together in one file"
            )
        if connection.isolation_level is not None or connection.in_transaction:
            raise ConfigError(
                f"configure() of {name!r} must leave isolation_level at None and no transaction open"
            )
        journal = _value(connection, "PRAGMA journal_mode")
        synchronous = _value(connection, "PRAGMA synchronous")
        if journal not in ("wal", "delete", "truncate", "persist"):
            raise ConfigError(
                f"{name!r} has journal_mode = {journal}: a commit that a crash interrupts would destroy it. Use wal"
            )
        if synchronous < (_EXTRA if journal == "delete" else _FULL):
            need = "EXTRA (or another journal_mode)" if journal == "delete" else "FULL"
            raise ConfigError(
                f"{name!r} has synchronous = {synchronous} with journal_mode = {journal}: a decision would not outlive "
                f"a loss of power. Set synchronous to {need}"
            )


class SQLiteBranch:
    """A branch of a database that decides: `connection` is for the application's statements."""

    is_last_resource = True

    def __init__(
        self,
        resource: SQLite,
        connection: _Connection,
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
    ) -> None:
        self._resource = resource
        self._connection = connection
        self._gtid = gtid
        self._bqual = bqual
        self._remaining_s = remaining_s
        self._state = "active"  # ended
        connection.failures = Failures()
        connection.is_lent = True
        with connection.opened():
            self._limit_waiting()
            # At once for writing: who has read first may find that others have written since, and could only give up.
            connection.execute("BEGIN IMMEDIATE")

    def __repr__(self) -> str:
        return f"<branch of {text_of(self._gtid)} in {self._resource.name!r}, {self._state}>"

    @property
    def resource(self) -> SQLite:
        return self._resource

    @property
    def bqual(self) -> bytes:
        return self._bqual

    @property
    def connection(self) -> sqlite3.Connection:
        return self._connection

    def prepare(self) -> Vote:
        raise UsageError(f"{self._resource.name!r} cannot prepare: it decides")

    def commit(self) -> None:
        raise UsageError(f"{self._resource.name!r} has nothing prepared to commit: it decides")

    def commit_one_phase(self) -> None:
        self._commit(None)

    def decide(self, gtid: bytes) -> None:
        invariant(gtid == self._gtid, "a branch of %s was to decide %s", self._gtid.hex(), gtid.hex())
        self._commit(gtid)

    def rollback(self) -> None:
        if self._state == "ended":
            return
        connection = self._connection
        try:
            with connection.opened():
                connection.rollback()
        except sqlite3.Error:
            connection.close()
            self._state = "ended"
        else:
            self._end()

    def _commit(self, gtid: bytes | None) -> None:
        if self._state == "ended":
            raise BranchFailed(f"the branch in {self._resource.name!r} has been rolled back")
        connection, name = self._connection, self._resource.name
        problem, cause = connection.failures.problem(), connection.failures.error
        if problem is None and not connection.in_transaction:
            # What makes SQLite roll everything back by itself: a full disk, an error of the device.
            problem = "the database has rolled it back"
        if problem is not None:
            self.rollback()
            raise BranchFailed(f"the branch in {name!r} is rolled back: {problem}") from cause
        try:
            with connection.opened():
                self._limit_waiting()
                if gtid is not None:
                    connection.execute(f"INSERT INTO {MARKER_TABLE} VALUES (?, 1)", (gtid,))
                self._resource._remove_forgotten(connection)
                connection.commit()
        except sqlite3.IntegrityError as exc:
            self.rollback()
            raise BranchFailed(
                f"{name!r} did not commit: {exc}; somebody in doubt may have asked before"
            ) from exc
        except sqlite3.Error as exc:
            if connection.in_transaction:
                self.rollback()
                raise BranchFailed(f"{name!r} did not commit: {exc}") from exc
            connection.close()
            self._state = "ended"
            raise BranchUnknown(
                f"{name!r} failed while it committed, and whether it did must be asked: {exc}"
            ) from exc
        self._end()

    def _limit_waiting(self) -> None:
        milliseconds = max(1, min(int(self._remaining_s() * 1000), 2**31 - 1))
        self._connection.execute(f"PRAGMA busy_timeout = {milliseconds}")

    def _end(self) -> None:
        self._state = "ended"
        connection = self._connection
        connection.row_factory = None
        connection.is_lent = False
        self._resource._idle.give(connection)


def _value(connection: sqlite3.Connection, sql: str) -> Any:
    return connection.execute(sql).fetchone()[0]
