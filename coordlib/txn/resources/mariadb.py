"""MariaDB (10.5 or later) through PyMySQL, by raw XA statements.

What has to be watched, and is:

* A branch that is prepared on a living connection belongs to that connection: from any other, XA COMMIT answers
  "unknown XID", and so it does when the branch has ended. So each branch that wrote inserts a row into a table of ours,
  and the row is asked for with a lock, which meets that of whoever still holds it: it is there (committed), or not (rolled
  back), or locked (ask again).
* While a connection closes, there is a moment in which the server lets others commit its prepared branch, answers OK,
  and does not do it: the branch goes on holding its locks, unlisted, until the server starts again (seen with 10.11.19,
  in one of 300 commits right after a disconnection). So a branch holds a lock by name (`GET_LOCK`), which its connection
  frees when it closes; others touch the branch some time after that, and look at the row again when they were told OK.
* A statement that fails is rolled back alone, and the transaction goes on. As a NO is what a swallowed error means in
  this library, the connection's results are watched; going back to a savepoint from before the error heals it.
* The server does not tell that nothing was written: its counters of written rows are compared.
* Statements and waits for locks end with the transaction's time, and so does a session that hears nothing for so long: as
  nobody else can end what is prepared on it, a process that is cut off from the cluster, or stands still, would keep it
  locked. These are settings of the session, put back for a connection of the application's.
* Before 10.5 a prepared branch was rolled back with its connection: refused. Tables without transactions (MyISAM,
  Aria) keep what was written to them whatever is decided; nothing can be done about that here.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeVar

from coordlib.errors import ConfigError, FlavourError, UsageError, invariant
from coordlib.txn.branches import BranchFailed, BranchHeuristic, BranchUnknown, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import (
    FORMAT_ID,
    bqual_text,
    gtrid_of,
    join_gtid,
    mint_ms_of,
    parse_bqual,
    parse_gtrid,
    text_of,
)
from coordlib.txn.resources.common import (
    HAS_ENDED,
    Failures,
    IdleConnections,
    ResourceBase,
    ResourceBusy,
    missing_driver,
    warn_of_late_use,
)
from coordlib.txn.resources.watchdog import GRACE_SECONDS, watchdog

try:
    import pymysql
except ImportError as exc:  # pragma: no cover - the test environment has it
    raise missing_driver(__name__, "PyMySQL", "mariadb") from exc
from pymysql.constants import ER
from pymysql.cursors import Cursor

__all__ = ["MARKER_TABLE", "MariaDB", "MariaDBBranch"]

T = TypeVar("T")
if TYPE_CHECKING:
    _Connection = pymysql.connections.Connection[Any]  # generic in its stubs alone

MARKER_TABLE: Final = "coordlib_tx"

_VERSION_MIN: Final = (10, 5)
_NOTA: Final = 1397  # XAER_NOTA: no such XID, or another connection's
_RMFAIL: Final = 1399  # XAER_RMFAIL: not in a transaction of this kind
_LEAVE_IT: Final = (
    "leave BEGIN, COMMIT and ROLLBACK to the block that enlisted it, and do outside of it what commits by itself, as "
    "CREATE does"
)
_NO_TABLE: Final = ER.NO_SUCH_TABLE
_LOCK_WAIT: Final = ER.LOCK_WAIT_TIMEOUT
_DEADLOCK: Final = ER.LOCK_DEADLOCK
_ROLLED_BACK: Final = (1402, 1613, 1614)  # XA_RBROLLBACK, XA_RBTIMEOUT, XA_RBDEADLOCK
_DENIED: Final = (ER.TABLEACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR)
_CONFLICTS: Final = (_DEADLOCK, _LOCK_WAIT, *_ROLLED_BACK)

_ASK_S: Final = 5.0  # how long a one-phase commit whose connection broke is asked about, at least
_ASK_PAUSE_S: Final = 0.05
_CONNECT_S: Final = 5  # where the application says nothing else
_RECOVERY_S: Final = 10.0  # one look into a database, or one branch's end
_DETACHED_S: Final = (
    0.5  # after its connection has closed, until others may touch a branch; the server needs microseconds
)
_SEEN_MAX: Final = 10_000
_MARKERS_KEPT_MS: Final = 7 * 24 * 3600 * 1000
"""Longer than any outcome is kept in the log: who asks after that gets HAZARD."""
_PRUNED_MAX: Final = 10_000

_CREATE: Final = (
    "CREATE TABLE IF NOT EXISTS {} (gtid VARBINARY(16) NOT NULL, bqual VARBINARY(64) NOT NULL, "
    "PRIMARY KEY (gtid, bqual)) ENGINE=InnoDB"
)
_WRITES: Final = (
    "SELECT SUM(variable_value) FROM information_schema.session_status "
    "WHERE variable_name IN ('HANDLER_WRITE', 'HANDLER_UPDATE', 'HANDLER_DELETE')"
)
_SESSION: Final = (
    "SELECT GET_LOCK(%s, 0), @@in_transaction, "
    "@@innodb_lock_wait_timeout, @@lock_wait_timeout, @@max_statement_time, @@wait_timeout"
)


class _Limits(NamedTuple):
    """Settings of a session, in seconds."""

    row_lock_s: int
    table_lock_s: int
    statement_s: float  # 0: none
    idle_s: int


class MariaDB(ResourceBase):
    """
    A MariaDB database as a resource. It keeps idle connections of its own; recovery uses one of them.

    Args:
        name: The same on every node that reaches this database.
        connect: Makes a connection; instead of `parameters`.
        configure: Called with each new connection.
        idle_max: How many connections are kept.
        has_markers: Whether branches that wrote leave a row in the table `coordlib_tx`, which `open` creates if it is
            allowed to. Without, a branch that has ended behind our back is a HAZARD, and a one-phase commit whose
            connection breaks is unknown.
        is_durable: False accepts settings by which a promise does not outlive a loss of power.
        parameters: For `pymysql.connect`; `database` among them. `connect_timeout` is 5 s unless it is given.
    """

    def __init__(
        self,
        name: str,
        *,
        connect: Callable[[], _Connection] | None = None,
        configure: Callable[[_Connection], object] | None = None,
        idle_max: int = 8,
        has_markers: bool = True,
        is_durable: bool = True,
        **parameters: Any,
    ) -> None:
        super().__init__(name)
        if "autocommit" in parameters:
            raise UsageError(
                f"'autocommit' is not for parameters of {name!r}: transactions are ours to begin"
            )
        self._parameters = parameters
        self._new = connect or (lambda: _dial(parameters))
        self._configure = configure
        self._has_markers = has_markers
        self._is_durable = is_durable
        self._idle: IdleConnections[_Connection] = IdleConnections(idle_max, _close)
        self._detached: dict[
            tuple[bytes, bytes], float
        ] = {}  # when a branch was first seen without its connection

    def __repr__(self) -> str:
        return f"<MariaDB {self.name!r}>"

    def open(self, cluster: bytes) -> None:
        """
        See whether the database can keep what its branches promise. From now on, prepared branches of `cluster`
        (`gtid.cluster_tag`) are ours.

        Raises:
            ConfigError: It cannot; the message names the setting or the privilege.
            pymysql.OperationalError: It cannot be reached.
        """
        connection = self._connect()
        try:
            self._check(connection)
        except BaseException:
            _close(connection)
            raise
        self._cluster = cluster
        self._give(connection)

    def _check(self, connection: _Connection) -> None:
        version, flushes, database = _row(
            connection, "SELECT VERSION(), @@innodb_flush_log_at_trx_commit, DATABASE()"
        )
        numbers = re.match(r"(?:5\.5\.5-)?(\d+)\.(\d+)", version)
        if "MariaDB" not in version or numbers is None:
            raise ConfigError(
                f"{self.name!r} is {version}, not MariaDB: only MariaDB from 10.5 on is supported"
            )
        if (int(numbers[1]), int(numbers[2])) < _VERSION_MIN:
            raise ConfigError(
                f"{self.name!r} is MariaDB {version}, which rolls a prepared branch back when its connection closes: "
                "10.5 or later is needed"
            )
        if flushes not in (1, 3) and self._is_durable:
            raise ConfigError(
                f"{self.name!r} has innodb_flush_log_at_trx_commit = {flushes}: a promise would not outlive a loss of "
                "power. Set it to 1, or say is_durable=False for a server whose data nobody will miss"
            )
        if not self._has_markers:
            return
        if database is None:
            raise ConfigError(
                f"{self.name!r} has no database selected, and needs one for the table {MARKER_TABLE}: "
                "pass database=..., or has_markers=False"
            )
        try:
            _row(connection, f"SELECT 1 FROM {MARKER_TABLE} LIMIT 1")
        except pymysql.MySQLError as exc:
            if _code(exc) != _NO_TABLE and _code(exc) not in _DENIED:
                raise
            try:
                _execute(connection, _CREATE.format(MARKER_TABLE))
                _row(connection, f"SELECT 1 FROM {MARKER_TABLE} LIMIT 1")
            except pymysql.MySQLError as denied:
                raise ConfigError(
                    f"{self.name!r} needs a table by which it can tell how a branch ended, and may not make it "
                    f"({_text(denied)}). Have somebody run: {_CREATE.format(f'{database}.{MARKER_TABLE}')}; "
                    f"GRANT SELECT, INSERT, DELETE ON {database}.{MARKER_TABLE} TO {self._parameters.get('user')!r}; "
                    "or pass has_markers=False, and take every doubt for a hazard"
                ) from denied

    def close(self) -> None:
        """Close the idle connections. Branches that are under way keep theirs."""
        self._idle.clear()

    def is_conflict(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed when it is tried again: deadlocks, and waits that were too long."""
        while not isinstance(error, pymysql.MySQLError):
            if error.__cause__ is None:
                return False
            error = error.__cause__
        return _code(error) in _CONFLICTS

    # -- branches -------------------------------------------------------------

    def begin(self, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]) -> MariaDBBranch:
        """
        A branch on a connection of the resource's own, its transaction begun.

        Args:
            remaining_s: Seconds that are left of the transaction's time, whenever it is asked.

        Raises:
            pymysql.OperationalError: No connection.
        """
        self.check_bqual(bqual)
        while (idle := self._take()) is not None:
            try:
                return MariaDBBranch(self, idle, gtid, bqual, remaining_s, is_ours=True)
            except pymysql.MySQLError:
                _close(idle)  # it had been closed by the server while it was idle; nothing has happened on it
            except UsageError:
                warn_of_late_use(self.name)
                _close(idle)
            except BaseException:
                _close(idle)
                raise
        fresh = self._connect()
        try:
            return MariaDBBranch(self, fresh, gtid, bqual, remaining_s, is_ours=True)
        except BaseException:
            _close(fresh)
            raise

    def enlist(
        self, connection: _Connection, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]
    ) -> MariaDBBranch:
        """
        A branch on a connection of the application's, which gets it back when the branch has ended.

        Raises:
            UsageError: It is in a transaction already, or of another flavour.
        """
        if not isinstance(connection, pymysql.connections.Connection):
            raise FlavourError(f"enlist() takes a pymysql Connection, got {type(connection).__name__}")
        self.check_bqual(bqual)
        return MariaDBBranch(self, connection, gtid, bqual, remaining_s, is_ours=False)

    # -- recovery -------------------------------------------------------------

    def prepared(self) -> list[PreparedBranch]:
        """The branches of this resource and cluster that the server holds prepared."""
        cluster = self.cluster
        rows = self._with_connection(lambda connection: _listing(connection, self._has_markers))
        found = []
        for format_id, gtrid_size, bqual_size, data in rows:
            if format_id != FORMAT_ID or len(data) != gtrid_size + bqual_size:
                continue
            text = bytes(data).decode("latin-1")
            gtid, bqual = parse_gtrid(cluster, text[:gtrid_size]), parse_bqual(text[gtrid_size:])
            if gtid is not None and bqual is not None and self.is_mine(bqual):
                found.append(
                    PreparedBranch(gtid, bqual, f"{text[:gtrid_size]},{text[gtrid_size:]},{format_id}")
                )
        return sorted(found)

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        """
        End a prepared branch.

        Raises:
            ResourceBusy: A connection that still lives holds it.
            pymysql.MySQLError: The database cannot be reached.
        """
        return self._with_connection(
            lambda connection: self._finish_from_elsewhere(connection, branch.gtid, branch.bqual, commit)
        )

    def _finish_from_elsewhere(
        self, connection: _Connection, gtid: bytes, bqual: bytes, commit: bool
    ) -> Finish:
        if self._has_markers:
            with contextlib.suppress(ResourceBusy):  # the row is locked: the branch is still prepared
                return self._how_it_ended(connection, gtid, bqual, commit)
        key, now = (gtid, bqual), time.monotonic()
        if _row(connection, "SELECT IS_USED_LOCK(%s)", (_lock_name(gtid, bqual),))[0] is not None:
            self._detached.pop(key, None)
            raise ResourceBusy("the branch is held by a connection that is still open")
        if len(self._detached) >= _SEEN_MAX:
            self._detached.clear()
        if now - self._detached.setdefault(key, now) < _DETACHED_S:
            raise ResourceBusy("the connection of the branch has closed just now")
        finish = self._finish_on(connection, gtid, bqual, commit)
        if finish is Finish.DONE and self._has_markers and _is_marked(connection, gtid, bqual) is not commit:
            finish = Finish.HAZARD
        self._detached.pop(key, None)
        return finish

    def _finish_on(self, connection: _Connection, gtid: bytes, bqual: bytes, commit: bool) -> Finish:
        verb = "COMMIT" if commit else "ROLLBACK"
        try:
            _execute(connection, f"XA {verb} {self._xid(gtid, bqual)}")
        except pymysql.MySQLError as exc:
            if _code(exc) != _NOTA:
                raise
            return self._how_it_ended(connection, gtid, bqual, commit)
        return Finish.DONE

    def _how_it_ended(self, connection: _Connection, gtid: bytes, bqual: bytes, commit: bool) -> Finish:
        """What became of a branch that is not there, or held by another connection. Raises ResourceBusy."""
        if not self._has_markers:
            if any((gtid, bqual) == (found.gtid, found.bqual) for found in self.prepared()):
                raise ResourceBusy("the branch is held by a connection that is still open")
            return Finish.HAZARD
        was_committed = _is_marked(connection, gtid, bqual)
        if not was_committed:
            horizon = _row(connection, f"SELECT MAX(bqual) FROM {MARKER_TABLE} WHERE gtid = ''")[0]
            if horizon is not None and gtid < horizon:
                return Finish.HAZARD  # it may have been there, and been removed
        if was_committed:
            return Finish.ALREADY if commit else Finish.HEURISTIC_COMMIT
        return Finish.HEURISTIC_ROLLBACK if commit else Finish.ALREADY

    # -- connections ----------------------------------------------------------

    def _xid(self, gtid: bytes, bqual: bytes) -> str:
        gtrid, branch = gtrid_of(self.cluster, gtid), bqual_text(bqual)
        return f"X'{gtrid.encode().hex()}',X'{branch.encode().hex()}',{FORMAT_ID}"

    def _connect(self) -> _Connection:
        connection = self._new()
        try:
            # XA START is refused in a transaction, and without autocommit any SELECT begins one.
            connection.autocommit(True)
            if self._configure is not None:
                self._configure(connection)
        except BaseException:
            _close(connection)
            raise
        return connection

    def _give(self, connection: _Connection) -> None:
        # Somebody may have kept it: a statement would commit by itself.
        connection.query = _refuse  # type: ignore[method-assign]
        self._idle.give(connection)

    def _take(self) -> _Connection | None:
        connection = self._idle.take()
        if connection is not None:
            connection.__dict__.pop("query", None)
        return connection

    def _with_connection(self, work: Callable[[_Connection], T]) -> T:
        """Work on an idle connection, or on a fresh one; what an idle one cannot do any more, a fresh one does."""
        idle = self._take()
        if idle is not None:
            try:
                result = _watched(idle, work)
            except pymysql.OperationalError:
                _close(idle)
            except BaseException:
                _close(idle)
                raise
            else:
                self._give(idle)
                return result
        connection = self._connect()
        try:
            result = _watched(connection, work)
        except BaseException:
            _close(connection)
            raise
        self._give(connection)
        return result


class MariaDBBranch:
    """A branch on a connection: `connection` is for the application's statements."""

    is_last_resource = False

    def __init__(
        self,
        resource: MariaDB,
        connection: _Connection,
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
        *,
        is_ours: bool,
    ) -> None:
        self._resource = resource
        self._connection = connection
        self._gtid = gtid
        self._bqual = bqual
        self._remaining_s = remaining_s
        self._is_ours = is_ours
        self._xid = resource._xid(gtid, bqual)
        self._state = "active"  # idle, preparing, prepared, ended
        self._lock = _lock_name(gtid, bqual)
        self._watched = watchdog.watch(_file(connection), remaining_s() + GRACE_SECONDS)
        try:
            self._begin()
        except BaseException:
            watchdog.unwatch(self._watched)
            raise

    def _begin(self) -> None:
        resource, connection, remaining_s = self._resource, self._connection, self._remaining_s
        is_locked, is_in_transaction, *limits = _row(connection, _SESSION, (self._lock,))
        if not is_locked:
            raise ResourceBusy(f"another connection to {resource.name!r} has a branch of this name")
        if is_in_transaction:
            _execute(connection, "DO RELEASE_LOCK(%s)", (self._lock,))
            raise UsageError(
                f"a connection to {resource.name!r} is in a transaction of its own already: commit or roll back before "
                "enlisting"
            )
        self._limits = _Limits(*limits)
        budget = max(1, math.ceil(remaining_s()))
        wanted = _Limits(
            min(self._limits.row_lock_s, budget),
            min(self._limits.table_lock_s, budget),
            min(float(self._limits.statement_s) or budget, max(remaining_s(), 0.001)),
            min(self._limits.idle_s, budget),
        )
        self._set(wanted)
        self._writes_before = _row(connection, _WRITES)[0]
        _execute(connection, f"XA START {self._xid}")
        self._watch = _Watch(connection)

    def __repr__(self) -> str:
        return f"<branch of {text_of(self._gtid)} in {self._resource.name!r}, {self._state}>"

    @property
    def resource(self) -> MariaDB:
        return self._resource

    @property
    def bqual(self) -> bytes:
        return self._bqual

    @property
    def connection(self) -> _Connection:
        return self._connection

    @property
    def seems_read_only(self) -> bool:
        return self._watch.seems_read_only

    def prepare(self) -> Vote:
        if not self._conclude():
            self._one_phase()
            return Vote.READ_ONLY
        self._state = "preparing"
        try:
            _execute(self._connection, f"XA PREPARE {self._xid}")
        except pymysql.MySQLError as exc:
            if not self._connection.open:
                raise  # it may be prepared
            self._state = "idle"
            self._undo()
            raise BranchFailed(f"{self._resource.name!r} refused to prepare: {_text(exc)}") from exc
        self._state = "prepared"
        return Vote.YES

    def commit_one_phase(self) -> None:
        wrote = self._conclude()
        try:
            self._one_phase()
        except pymysql.MySQLError as exc:
            if self._connection.open:
                self._undo()
                raise BranchFailed(f"{self._resource.name!r} did not commit: {_text(exc)}") from exc
            self._end()
            self._ask(exc, wrote)

    def commit(self) -> None:
        if self._state == "ended":
            return
        invariant(self._state == "prepared", "commit of a branch that is %s", self._state)
        self._finish(True)

    def rollback(self) -> None:
        if self._state in ("active", "idle"):
            self._undo()
        elif self._state != "ended":
            self._finish(False)

    # -- the vote

    def _conclude(self) -> bool:
        """
        End the application's part: see whether it is whole, and leave the marker if it wrote. Returns whether it did.

        Raises:
            BranchFailed: It is not; it has been rolled back.
        """
        invariant(self._state == "active", "a branch that is %s was asked for a vote", self._state)
        connection, name = self._connection, self._resource.name
        problem, cause = self._watch.problem(), self._watch.error
        self._watch.end()
        try:
            if problem is None:
                writes = _row(connection, _WRITES)[0]
                wrote: bool = writes != self._writes_before
                if wrote and self._resource._has_markers:
                    _execute(
                        connection, f"INSERT INTO {MARKER_TABLE} VALUES (%s, %s)", (self._gtid, self._bqual)
                    )
                _execute(connection, f"XA END {self._xid}")
                self._state = "idle"
                return wrote
        except pymysql.MySQLError as exc:
            problem, cause = _text(exc), exc
        self._undo()
        raise BranchFailed(f"the branch in {name!r} is rolled back: {problem}") from cause

    def _one_phase(self) -> None:
        _execute(self._connection, f"XA COMMIT {self._xid} ONE PHASE")
        self._end()

    def _ask(self, lost: pymysql.MySQLError, wrote: bool) -> None:
        """The connection broke during a one-phase commit: find out whether that happened."""
        resource = self._resource
        if not wrote:
            raise BranchFailed(
                f"the connection to {resource.name!r} was lost; nothing had been written"
            ) from lost
        budget_s = max(_ASK_S, self._remaining_s()) if resource._has_markers else 0
        pauses, until = budget_s / _ASK_PAUSE_S, time.monotonic() + budget_s  # connecting takes time, too
        while pauses > 0 and time.monotonic() < until:
            pauses -= 1
            try:
                connection = resource._connect()
            except pymysql.MySQLError:
                self._pause(_ASK_PAUSE_S)
                continue
            try:
                was_committed = _watched(
                    connection, lambda connection: _is_marked(connection, self._gtid, self._bqual)
                )
            except (ResourceBusy, pymysql.MySQLError):
                self._pause(_ASK_PAUSE_S)
                continue
            finally:
                _close(connection)
            if was_committed:
                return
            raise BranchFailed(
                f"the connection to {resource.name!r} was lost, and nothing was committed"
            ) from lost
        raise BranchUnknown(
            f"the connection to {resource.name!r} was lost during XA COMMIT, and whether it happened cannot be found "
            f"out; the row of {text_of(self._gtid)} in {MARKER_TABLE} would tell"
        ) from lost

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    # -- the end

    def _finish(self, commit: bool) -> None:
        """End what is prepared, or may be."""
        resource, connection = self._resource, self._connection
        if self._state == "preparing":
            _close(connection)  # what is not prepared yet ends with it
        if connection.open:
            finish = resource._finish_on(connection, self._gtid, self._bqual, commit)
        else:
            finish = resource.finish(PreparedBranch(self._gtid, self._bqual, self._xid), commit)
        self._end()
        if finish not in (Finish.DONE, Finish.ALREADY):
            outcome = "committed" if commit else "rolled back"
            raise BranchHeuristic(
                finish, f"{self._xid} in {resource.name!r} was to be {outcome}: {finish.value}"
            )

    def _undo(self) -> None:
        """Roll back what was not prepared; a connection on which that fails is closed, which does it, too."""
        self._watch.end()
        connection = self._connection
        if connection.open:
            try:
                if self._state == "active":
                    try:
                        _execute(connection, f"XA END {self._xid}")
                    except pymysql.MySQLError as exc:
                        if _code(exc) not in _ROLLED_BACK:  # it is to be rolled back, and says so
                            raise
                _execute(connection, f"XA ROLLBACK {self._xid}")
            except pymysql.MySQLError:
                _close(connection)
        self._end()

    def _set(self, limits: _Limits, more: str = "", *parameters: str) -> None:
        _execute(
            self._connection,
            "SET innodb_lock_wait_timeout = %s, lock_wait_timeout = %s, max_statement_time = %s, wait_timeout = %s"
            + more,
            (*limits, *parameters),
        )

    def _end(self) -> None:
        self._state = "ended"
        self._watch.end()
        watchdog.unwatch(self._watched)
        if self._connection.open:
            try:
                self._set(self._limits, ", @coordlib = RELEASE_LOCK(%s)", self._lock)
            except pymysql.MySQLError:
                _close(self._connection)
        if self._is_ours:
            self._is_ours = False
            if self._connection.open:
                self._resource._give(self._connection)


_READS: Final = re.compile(
    r"\s*(?:SELECT|SHOW|SET|EXPLAIN|DESC|DESCRIBE|VALUES|SAVEPOINT|RELEASE)\b", re.IGNORECASE
)


def _refuse(sql: str | bytes, unbuffered: bool = False) -> NoReturn:
    raise pymysql.ProgrammingError(HAS_ENDED)


class _Watch:
    """
    Sees the statements of a connection.

    Attributes:
        seems_read_only: Every statement so far began like one that reads. One that calls a function which writes does, too.
    """

    def __init__(self, connection: _Connection) -> None:
        self.seems_read_only = True
        self._connection = connection
        self._query = connection.query
        self._next_result = connection.next_result
        self._failures = Failures()
        connection.query = self._watched_query  # type: ignore[method-assign]
        connection.next_result = self._watched_next_result  # type: ignore[method-assign]

    def end(self) -> None:
        """Leave the connection as it was."""
        for name in ("query", "next_result"):
            self._connection.__dict__.pop(name, None)

    @property
    def error(self) -> Exception | None:
        return self._failures.error

    def problem(self) -> str | None:
        return self._failures.problem() if self._connection.open else "its connection is lost"

    def _watched_query(self, sql: str | bytes, unbuffered: bool = False) -> int:
        try:
            result = self._query(sql, unbuffered)
        except pymysql.MySQLError as exc:
            if _code(exc) == _RMFAIL:
                exc.args = (_RMFAIL, f"{_text(exc)}: {_LEAVE_IT}")
            self._failures.note(exc)
            raise
        text = sql.decode("latin-1") if isinstance(sql, bytes | bytearray) else sql
        self._failures.statement(text)
        if self.seems_read_only and not _READS.match(text):
            self.seems_read_only = False
        return result

    def _watched_next_result(self, unbuffered: bool = False) -> int:
        try:
            return self._next_result(unbuffered)
        except pymysql.MySQLError as exc:
            self._failures.note(exc)
            raise


def _dial(parameters: dict[str, Any]) -> _Connection:
    # The driver's connect_timeout ends before the server's first word; the time to read that is one of its own.
    timeout_s = parameters.get("connect_timeout", _CONNECT_S)
    limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
    connection = pymysql.connect(**{**limits, **parameters})
    if "read_timeout" not in parameters:
        connection.__dict__["_read_timeout"] = None
    return connection


def _file(connection: _Connection) -> int:
    """
    Raises:
        pymysql.OperationalError: It is closed.
    """
    found = connection.__dict__.get("_sock")
    if found is None:
        raise pymysql.OperationalError(2006, "the connection is closed")
    file: int = found.fileno()
    return file


def _watched(connection: _Connection, work: Callable[[_Connection], T]) -> T:
    """
    Raises:
        pymysql.OperationalError: No answer in time.
    """
    watched = watchdog.watch(_file(connection), _RECOVERY_S)
    try:
        return work(connection)
    finally:
        watchdog.unwatch(watched)


def _lock_name(gtid: bytes, bqual: bytes) -> str:
    return "coordlib " + hashlib.sha256(gtid + bqual).hexdigest()[:40]


def _execute(connection: _Connection, sql: str, parameters: Any = None) -> Cursor:
    """By a plain cursor, whatever the application has set its connection to."""
    cursor = connection.cursor(Cursor)
    cursor.execute(sql, parameters)
    return cursor


def _row(connection: _Connection, sql: str, parameters: Any = None) -> Any:
    return _execute(connection, sql, parameters).fetchone()


def _is_marked(connection: _Connection, gtid: bytes, bqual: bytes) -> bool:
    """
    Whether the marker is there, for good.

    Raises:
        ResourceBusy: It is locked by who wrote it and has not ended yet.
    """
    try:
        return (
            _row(
                connection,
                f"SELECT 1 FROM {MARKER_TABLE} WHERE gtid = %s AND bqual = %s LOCK IN SHARE MODE NOWAIT",
                (gtid, bqual),
            )
            is not None
        )
    except pymysql.MySQLError as exc:
        if _code(exc) not in (_LOCK_WAIT, _DEADLOCK):
            raise
        raise ResourceBusy("the branch is held by a connection that is still open") from exc


def _listing(connection: _Connection, has_markers: bool) -> list[tuple[int, int, int, bytes]]:
    if has_markers:
        _prune(connection)
    rows = _execute(connection, "XA RECOVER").fetchall()
    return [
        (format_id, gtrid, bqual, data if isinstance(data, bytes) else data.encode("latin-1"))
        for format_id, gtrid, bqual, data in rows
    ]


def _prune(connection: _Connection) -> None:
    """Remove old markers, and remember up to where: for older branches their absence means nothing any more."""
    oldest, newest = _row(connection, f"SELECT MIN(gtid), MAX(gtid) FROM {MARKER_TABLE} WHERE gtid > ''")
    if newest is None:
        return
    horizon = join_gtid(max(0, mint_ms_of(newest) - _MARKERS_KEPT_MS), 0, 0)
    if oldest >= horizon:
        return
    _execute(connection, f"INSERT IGNORE INTO {MARKER_TABLE} VALUES ('', %s)", (horizon,))
    _execute(connection, f"DELETE FROM {MARKER_TABLE} WHERE gtid = '' AND bqual < %s", (horizon,))
    _execute(
        connection,
        f"DELETE FROM {MARKER_TABLE} WHERE gtid > '' AND gtid < %s ORDER BY gtid LIMIT {_PRUNED_MAX}",
        (horizon,),
    )


def _close(connection: _Connection) -> None:
    if connection.open:
        connection.close()


def _code(error: BaseException | None) -> int:
    code = error.args[0] if error is not None and error.args else 0
    return code if isinstance(code, int) else 0


def _text(error: BaseException | None) -> str:
    return "" if error is None else str(error.args[1] if len(error.args) > 1 else error)
