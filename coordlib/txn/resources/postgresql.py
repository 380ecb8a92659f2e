"""PostgreSQL (13 or later) through psycopg 3, blocking and asynchronous.

What has to be watched, and is:

* PREPARE TRANSACTION in a failed transaction is no error: it rolls back and says so in the command tag. The state is
  read before, the tag after.
* COMMIT PREPARED of a name that is not there means that somebody has ended it, not how. So a branch that votes YES
  takes down its transaction number and the history of the server (system identifier and timeline: a number may be
  given a second time after a restore) as evidence in its bqual, and `pg_xact_status` is asked.
* An application that ends the transaction itself, in SQL, has the next statement begin another one. A setting that is
  local to the transaction tells them apart.
* A transaction that was given no number wrote nothing: it commits at once and votes READ_ONLY. Such a transaction may
  have sent a NOTIFY, which then goes out with the vote; with anything written as well the server refuses to prepare it.
* Statements and waits for locks end with the transaction's time, and so does a session whose application has stalled.
  A server that neither answers nor hangs up is waited for a little longer (`watchdog`).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from coordlib.errors import ConfigError, FlavourError, UsageError, invariant
from coordlib.node.polling import Polled, poll
from coordlib.txn.branches import BranchFailed, BranchHeuristic, BranchUnknown, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import FORMAT_ID, BranchName, parse_postgresql_gid, postgresql_gid, text_of
from coordlib.txn.resources.common import (
    Flow,
    IdleConnections,
    ResourceBase,
    ResourceBusy,
    arun,
    missing_driver,
    polled,
    warn_of_late_use,
)

try:
    import psycopg
except ImportError as exc:  # pragma: no cover - the test environment has it
    raise missing_driver(__name__, "psycopg 3", "postgresql") from exc
import psycopg.conninfo
from psycopg import errors as pg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from coordlib.txn.resources import cursors, statements
from coordlib.txn.resources.watchdog import GRACE_SECONDS, watchdog

__all__ = ["AsyncPostgreSQLBranch", "PostgreSQL", "PostgreSQLBranch"]

_Anyhow = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]
_C = TypeVar("_C", bound=_Anyhow)
_T = TypeVar("_T")

_VERSION_MIN: Final = 130000
_HAS_TRANSACTION_TIMEOUT: Final = 170000
_MARK: Final = "coordlib.branch"
_ASK_S: Final = 5.0  # how long a one-phase commit whose connection broke is asked about, at least
_ASK_PAUSE_S: Final = 0.05
_CONNECT_S: Final = 5  # where the application says nothing else
_RECOVERY_S: Final = 10.0  # one look into a database, or one branch's end
_EVIDENCE: Final = struct.Struct(">QII")  # transaction number, system, timeline

# What pg_walfile_name() begins with is the timeline that is written to now; that of pg_control_checkpoint() lags behind
# a promotion.
_TIMELINE: Final = "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)"
_SYSTEM: Final = "(SELECT system_identifier::text FROM pg_control_system())"
_STATE_OF_BRANCH: Final = (
    f"SELECT current_setting('{_MARK}', true), pg_current_xact_id_if_assigned()::text, {_TIMELINE}, "
    "set_config('statement_timeout', '%d', true)"
)
_STATE_OF_SERVER: Final = "SELECT current_setting('max_prepared_transactions')::int, current_setting('fsync')"
_STATE_OF_CONNECTION: Final = (
    f"SELECT (SELECT setting::int FROM pg_settings WHERE name = 'statement_timeout'), {_SYSTEM}"
)


class _About(NamedTuple):
    """What stays the same of a connection."""

    statement_timeout_ms: int  # 0: none
    system: int  # as in evidence
    has_transaction_timeout: bool


def _system_tag(identifier: str) -> int:
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:4], "big")


class _Evidence(NamedTuple):
    xid: int
    system: int
    timeline: int

    @classmethod
    def read(cls, bqual: bytes) -> _Evidence | None:
        name = BranchName.unpack(bqual)
        if name is None or len(name.evidence) != _EVIDENCE.size:
            return None
        return cls(*_EVIDENCE.unpack(name.evidence))

    def pack(self) -> bytes:
        return _EVIDENCE.pack(*self)


class PostgreSQL(ResourceBase):
    """
    A PostgreSQL database as a resource. It keeps idle connections of its own; recovery uses one of them.

    Args:
        name: The same on every node that reaches this database.
        conninfo: As `psycopg.connect` takes it; never in an error or a log of ours. The same user on every node: only
            the owner of a prepared transaction, or a superuser, can end it.
            `connect_timeout` is 5 s unless it is given.
        connect: Makes a connection, not in autocommit mode; instead of `conninfo` and `parameters`.
        configure: Called with each new connection, in a transaction of its own; not for asynchronous ones.
        idle_max: How many connections are kept.
        is_durable: False accepts a server with `fsync` off, which breaks promises when it loses power.
        parameters: For `psycopg.connect`.
    """

    def __init__(
        self,
        name: str,
        conninfo: str = "",
        *,
        connect: Callable[[], psycopg.Connection[Any]] | None = None,
        configure: Callable[[psycopg.Connection[Any]], object] | None = None,
        idle_max: int = 8,
        is_durable: bool = True,
        **parameters: Any,
    ) -> None:
        super().__init__(name)
        for refused in ("autocommit", "conninfo"):
            if refused in parameters:
                raise UsageError(
                    f"{refused!r} is not for parameters of {name!r}: transactions are ours to begin"
                )
        try:
            psycopg.conninfo.conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:
            # From None, and without the driver's words: they quote the text, in which there may be a password.
            raise ConfigError(f"the conninfo of {name!r} is none that libpq can read") from None
        self._has_own_connect = connect is not None
        if connect is None and "connect_timeout" not in conninfo and not os.environ.get("PGCONNECT_TIMEOUT"):
            parameters.setdefault("connect_timeout", _CONNECT_S)
        self._conninfo = conninfo
        self._parameters = parameters
        self._new = connect or (lambda: psycopg.connect(conninfo, **parameters))
        self._configure = configure
        self._is_durable = is_durable
        self._idle: IdleConnections[psycopg.Connection[Any]] = IdleConnections(
            idle_max, psycopg.Connection[Any].close
        )
        self._async_idle: IdleConnections[psycopg.AsyncConnection[Any]] = IdleConnections(idle_max, _drop)
        self._about: WeakKeyDictionary[_Anyhow, _About] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<PostgreSQL {self.name!r}>"

    def open(self, cluster: bytes) -> None:
        """
        See whether the database can keep what its branches promise. From now on, prepared branches of `cluster`
        (`gtid.cluster_tag`) are ours.

        Raises:
            ConfigError: It cannot; the message names the setting.
            psycopg.OperationalError: It cannot be reached.
        """
        connection = self._connect()
        try:
            if connection.info.server_version < _VERSION_MIN:
                raise ConfigError(
                    f"{self.name!r} is PostgreSQL {connection.info.server_version // 10000}: 13 or later is needed"
                )
            if run(statements.query_gen(connection, "SELECT pg_is_in_recovery()"))[0]:
                raise ConfigError(
                    f"{self.name!r} is a standby: connect to the primary (target_session_attrs=read-write)"
                )
            prepared_max, fsync = run(statements.query_gen(connection, _STATE_OF_SERVER))
            if prepared_max == 0:
                raise ConfigError(
                    f"{self.name!r} has max_prepared_transactions = 0, its default, and prepares nothing: set it to "
                    "at least the number of connections in postgresql.conf and restart the server"
                )
            if fsync != "on" and self._is_durable:
                raise ConfigError(
                    f"{self.name!r} runs with fsync = {fsync}: a promise would not outlive a loss of power. Set it to "
                    "on, or say is_durable=False for a server whose data nobody will miss"
                )
            connection.rollback()
        except BaseException:
            connection.close()
            raise
        self._cluster = cluster
        self._give(connection)

    def close(self) -> None:
        """Close the idle connections. Branches that are under way keep theirs."""
        self._idle.clear()
        self._async_idle.clear()

    def is_conflict(self, error: BaseException) -> bool:
        """Whether the same transaction may succeed when it is tried again: serialization failures and deadlocks."""
        while not isinstance(error, psycopg.Error):
            if error.__cause__ is None:
                return False
            error = error.__cause__
        return (error.sqlstate or "").startswith("40")

    # -- branches -------------------------------------------------------------

    def begin(self, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]) -> PostgreSQLBranch:
        """
        A branch on a connection of the resource's own, its transaction begun.

        Args:
            remaining_s: Seconds that are left of the transaction's time, whenever it is asked.

        Raises:
            psycopg.OperationalError: No connection.
        """
        self.check_bqual(bqual)
        while (idle := self._idle.take()) is not None:
            if self._was_used_late(idle):
                idle.close()
                continue
            branch = PostgreSQLBranch(self, idle, gtid, bqual, remaining_s, is_ours=True)
            try:
                run(branch._begin_gen())
                return branch
            except psycopg.Error:
                idle.close()  # it had been closed by the server while it was idle; nothing has happened on it
            except BaseException:
                idle.close()
                raise
        branch = PostgreSQLBranch(self, self._connect(), gtid, bqual, remaining_s, is_ours=True)
        try:
            run(branch._begin_gen())
        except BaseException:
            branch.connection.close()
            raise
        return branch

    async def abegin(
        self, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]
    ) -> AsyncPostgreSQLBranch:
        """As `begin`, on an asynchronous connection of the running event loop."""
        self.check_bqual(bqual)
        if self._has_own_connect:
            raise UsageError(
                f"{self.name!r} makes its connections by connect=..., which blocks: for tasks give a conninfo, or enlist a "
                "connection of yours with using=..."
            )
        while (idle := self._async_idle.take(asyncio.get_running_loop())) is not None:
            if self._was_used_late(idle):
                await idle.close()
                continue
            branch = AsyncPostgreSQLBranch(self, idle, gtid, bqual, remaining_s, is_ours=True)
            try:
                await arun(branch._begin_gen())
                return branch
            except psycopg.OperationalError:
                await idle.close()
            except BaseException:
                _drop(idle)  # a task that was cancelled is not kept waiting
                raise
        fresh = await psycopg.AsyncConnection.connect(self._conninfo, **self._parameters)
        cursors.watch(fresh)
        branch = AsyncPostgreSQLBranch(self, fresh, gtid, bqual, remaining_s, is_ours=True)
        try:
            await arun(branch._begin_gen())
        except BaseException:
            await fresh.close()
            raise
        return branch

    def enlist(
        self,
        connection: psycopg.Connection[Any],
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
    ) -> PostgreSQLBranch:
        """
        A branch on a connection of the application's, which gets it back idle when the branch has ended.

        Raises:
            UsageError: It is in autocommit mode, or in a transaction already, or of another flavour.
        """
        if not isinstance(connection, psycopg.Connection):
            raise FlavourError(f"enlist() takes a psycopg.Connection, got {type(connection).__name__}")
        self.check_bqual(bqual)
        branch = PostgreSQLBranch(self, connection, gtid, bqual, remaining_s, is_ours=False)
        run(branch._begin_gen())
        return branch

    async def aenlist(
        self,
        connection: psycopg.AsyncConnection[Any],
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
    ) -> AsyncPostgreSQLBranch:
        """As `enlist`."""
        if not isinstance(connection, psycopg.AsyncConnection):
            raise FlavourError(f"aenlist() takes a psycopg.AsyncConnection, got {type(connection).__name__}")
        self.check_bqual(bqual)
        branch = AsyncPostgreSQLBranch(self, connection, gtid, bqual, remaining_s, is_ours=False)
        await arun(branch._begin_gen())
        return branch

    def drive(
        self,
        connection: psycopg.Connection[Any],
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
    ) -> PostgreSQLBranch:
        """
        As `enlist`, for a library that begins and ends transactions in its own way: the driver's methods stay open to
        it. It must not let the application end this one.
        """
        self.check_bqual(bqual)
        branch = PostgreSQLBranch(self, connection, gtid, bqual, remaining_s, is_ours=False, is_driven=True)
        run(branch._begin_gen())
        return branch

    # -- recovery -------------------------------------------------------------

    def prepared(self) -> list[PreparedBranch]:
        """The branches of this resource and cluster that this database holds prepared."""
        cluster = self.cluster

        def listing(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
            with connection.cursor(row_factory=tuple_row) as cursor:
                cursor.execute(
                    "SELECT gid, transaction::text, owner, prepared::text FROM pg_prepared_xacts "
                    "WHERE database = current_database() AND starts_with(gid, %s) ORDER BY gid",
                    (f"{FORMAT_ID}_",),
                )
                return cursor.fetchall()

        found = []
        for gid, xid, owner, since in self._with_connection(listing):
            names = parse_postgresql_gid(cluster, gid)
            if names is not None and self.is_mine(names[1]):
                found.append(PreparedBranch(*names, f"{gid} (transaction {xid} of {owner}, since {since})"))
        return found

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        """
        End a prepared branch.

        Raises:
            ResourceBusy: Somebody else is ending it, or the server is still preparing it.
            psycopg.Error: The database cannot be reached, or we may not end it.
        """
        gid = postgresql_gid(self.cluster, branch.gtid, branch.bqual)
        finish: Finish = self._with_connection(
            lambda connection: run(_finish_gen(connection, gid, branch.bqual, commit))
        )
        return finish

    # -- connections ----------------------------------------------------------

    def _connect(self) -> psycopg.Connection[Any]:
        connection = self._new()
        cursors.watch(connection)
        if self._configure is not None:
            try:
                self._configure(connection)
                connection.commit()
            except BaseException:
                connection.close()
                raise
        return connection

    def _was_used_late(self, idle: _Anyhow) -> bool:
        """Past its cursors, which refuse that. If not, it is lent."""
        if idle.closed or idle.pgconn.transaction_status == TransactionStatus.IDLE:
            cursors.lend(idle)
            return False
        warn_of_late_use(self.name)
        return True

    def _with_connection(self, work: Callable[[psycopg.Connection[Any]], Any]) -> Any:
        """Work on an idle connection, or on a fresh one; what an idle one cannot do any more, a fresh one does."""
        idle = self._idle.take()
        if idle is not None and self._was_used_late(idle):
            idle.close()
        elif idle is not None:
            try:
                result = _watched(idle, work)
            except psycopg.OperationalError:
                idle.close()
            except BaseException:
                idle.close()
                raise
            else:
                self._give(idle)
                return result
        connection = self._connect()
        try:
            result = _watched(connection, work)
        except BaseException:
            connection.close()
            raise
        self._give(connection)
        return result

    def _give(self, connection: psycopg.Connection[Any]) -> None:
        if _settle(connection):
            if connection.pgconn.transaction_status == TransactionStatus.INTRANS:
                connection.rollback()
            cursors.take_back(connection)
            self._idle.give(connection)
        else:
            connection.close()

    def _agive(self, connection: psycopg.AsyncConnection[Any], loop: object) -> None:
        if _settle(connection) and connection.info.transaction_status is TransactionStatus.IDLE:
            cursors.take_back(connection)
            self._async_idle.give(connection, loop)
        else:
            _drop(connection)


_PROBLEMS: Final[dict[int, str]] = {
    TransactionStatus.INERROR: "a statement failed in it, though its error went no further; to go on after an "
    "error, have the statement in a savepoint (`with connection.transaction():`)",
    TransactionStatus.IDLE: "the application ended the transaction itself, and what it has committed so stays; "
    "leave COMMIT and ROLLBACK to the block that enlisted it",
    TransactionStatus.ACTIVE: "a statement is still running on its connection",
    TransactionStatus.UNKNOWN: "its connection is lost",
}
"""Why a branch in this state cannot promise."""


class _Branch:
    """Both flavours: everything as flows over `connection`, whose methods have the same names in both."""

    is_last_resource = False

    def __init__(
        self,
        resource: PostgreSQL,
        connection: Any,
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
        *,
        is_ours: bool,
        is_driven: bool = False,
    ) -> None:
        self._resource = resource
        self._connection = connection
        self._gtid = gtid
        self._bqual = bqual
        self._made_gid: str | None = None  # of the bqual as it is
        self._remaining_s = remaining_s
        self._is_ours = is_ours
        # By somebody else's library, which will want to begin and end transactions in its own way.
        self._is_driven = is_driven
        self._mark = f"{text_of(gtid)}/{bqual.hex()}"
        self._state = "active"  # preparing, prepared, ended
        self._watched = 0
        self._evidence: _Evidence | None = None
        self._system = 0

    def __repr__(self) -> str:
        return f"<branch of {text_of(self._gtid)} in {self._resource.name!r}, {self._state}>"

    @property
    def resource(self) -> PostgreSQL:
        return self._resource

    @property
    def bqual(self) -> bytes:
        """With evidence from the vote on."""
        return self._bqual

    @property
    def seems_read_only(self) -> bool:
        """Every statement so far had the tag of one that reads, as far as cursors of ours have seen them."""
        return not cursors.has_written(self._connection)

    # What differs: how to pause, to connect, and to give a connection back.

    def _pause(self, seconds: float) -> Any:
        raise NotImplementedError

    def _reconnect(self) -> Any:
        raise NotImplementedError

    def _release(self) -> None:
        raise NotImplementedError

    @property
    def _gid(self) -> str:
        if self._made_gid is None:
            self._made_gid = postgresql_gid(self._resource.cluster, self._gtid, self._bqual)
        return self._made_gid

    def _budget_ms(self) -> int:
        # 0 would mean no limit at all.
        return max(1, min(int(self._remaining_s() * 1000), 2**31 - 1))

    def _begin_gen(self) -> Flow[None]:
        connection = self._connection
        if connection.autocommit:
            raise UsageError(
                f"a connection to {self._resource.name!r} is in autocommit mode: set autocommit = False before enlisting"
            )
        status = connection.pgconn.transaction_status
        if status != TransactionStatus.IDLE and not connection.closed:
            raise UsageError(
                f"a connection to {self._resource.name!r} is {TransactionStatus(status).name}, in a transaction of its own "
                "already: commit or roll back before enlisting"
            )
        self._watched = watchdog.watch(connection.fileno(), self._remaining_s() + GRACE_SECONDS)
        about = self._resource._about.get(connection)
        if about is None:
            statement_timeout_ms, system = yield from statements.query_gen(connection, _STATE_OF_CONNECTION)
            yield connection.rollback()
            has_transaction_timeout = connection.info.server_version >= _HAS_TRANSACTION_TIMEOUT
            about = _About(statement_timeout_ms, _system_tag(system), has_transaction_timeout)
            self._resource._about[connection] = about
        self._system = about.system
        budget = self._budget_ms()
        # Not SELECT set_config(): after a query the application could no longer choose the isolation level. Waiting for
        # locks is part of a statement's time.
        settings = (
            f"SET LOCAL {_MARK} = '{self._mark}'; "
            f"SET LOCAL statement_timeout = {min(about.statement_timeout_ms or budget, budget)}; "
            f"SET LOCAL idle_in_transaction_session_timeout = {budget}"
        )
        if about.has_transaction_timeout:
            settings += f"; SET LOCAL transaction_timeout = {budget}"
        if self._is_driven:
            yield from statements.execute_gen(connection, settings)
        else:
            yield from statements.begin_gen(
                connection, connection.xid(FORMAT_ID, text_of(self._gtid), ""), settings
            )
        cursors.expect_reads(connection)

    def _check_gen(self) -> Flow[_Evidence | None]:
        """
        See whether what was begun is still there and whole. Returns its evidence; None: it wrote nothing.

        Raises:
            BranchFailed: No; it has been rolled back.
        """
        connection, name = self._connection, self._resource.name
        invariant(self._state == "active", "a branch that is %s was asked for a vote", self._state)
        problem = _PROBLEMS.get(connection.pgconn.transaction_status)
        if problem is None:
            try:
                row = (
                    yield from statements.execute_gen(connection, _STATE_OF_BRANCH % self._budget_ms())
                ).row
            except psycopg.Error as exc:
                yield from self._undo_gen()
                raise BranchFailed(f"the branch in {name!r} failed: {_text(exc)}") from exc
            mark, xid, timeline, _ = row
            if mark == self._mark:
                assert timeline is not None
                return None if xid is None else _Evidence(int(xid), self._system, int(timeline, 16))
            problem = (
                "the application ended the transaction itself and began another one on its connection; what it has committed "
                "so stays. Leave COMMIT and ROLLBACK to the block that enlisted it"
            )
        yield from self._undo_gen()
        raise BranchFailed(f"the branch in {name!r} is rolled back: {problem}")

    def _prepare_gen(self) -> Flow[Vote]:
        connection = self._connection
        evidence = yield from self._check_gen()
        if evidence is None:
            # Committed, not rolled back: what a serializable transaction has read is validated here.
            yield from self._end_locally_gen()
            return Vote.READ_ONLY
        self._take_down(evidence)
        self._state = "preparing"
        try:
            answer = yield from statements.execute_gen(connection, f"PREPARE TRANSACTION '{self._gid}'")
        except psycopg.Error as exc:
            if connection.closed:
                raise  # it may be prepared
            yield from self._undo_gen()
            raise BranchFailed(f"{self._resource.name!r} refused to prepare: {_text(exc)}") from exc
        if answer.tag != "PREPARE TRANSACTION":
            yield from self._undo_gen()
            raise BranchFailed(f"{self._resource.name!r} answered {answer.tag!r} instead of preparing")
        self._state = "prepared"
        if not self._is_driven:
            yield from statements.prepared_gen(connection)
        return Vote.YES

    def _commit_one_phase_gen(self) -> Flow[None]:
        evidence = yield from self._check_gen()
        if evidence is not None:
            self._take_down(evidence)
        yield from self._end_locally_gen()

    def _take_down(self, evidence: _Evidence) -> None:
        self._evidence = evidence
        name = BranchName.unpack(self._bqual)
        invariant(name is not None, "a bqual of ours is not ours: %s", self._bqual.hex())
        assert name is not None
        self._bqual = name._replace(evidence=evidence.pack()).pack()
        self._made_gid = None

    def _end_locally_gen(self) -> Flow[None]:
        """COMMIT what was not prepared."""
        connection = self._connection
        try:
            yield connection.commit() if self._is_driven else connection.tpc_commit()
        except psycopg.Error as exc:
            if not connection.closed:
                yield from self._undo_gen()
                raise BranchFailed(f"{self._resource.name!r} did not commit: {_text(exc)}") from exc
            self._end()
            yield from self._ask_gen(exc)
        else:
            self._end()

    def _ask_gen(self, lost: psycopg.Error) -> Flow[None]:
        """The connection broke during COMMIT: find out whether that happened."""
        name = self._resource.name
        if self._evidence is None:
            raise BranchFailed(f"the connection to {name!r} was lost; nothing had been written") from lost
        budget_s = max(_ASK_S, self._remaining_s())
        pauses, until = budget_s / _ASK_PAUSE_S, time.monotonic() + budget_s  # connecting takes time, too
        while pauses > 0 and time.monotonic() < until:
            pauses -= 1
            try:
                connection = yield self._reconnect()
            except psycopg.OperationalError:
                yield self._pause(_ASK_PAUSE_S)
                continue
            watched = watchdog.watch(connection.fileno(), GRACE_SECONDS)
            try:
                finish = yield from _how_it_ended_gen(connection, self._evidence, True)
            except (ResourceBusy, psycopg.OperationalError):
                yield self._pause(_ASK_PAUSE_S)  # the server has not noticed, or has gone again
                continue
            finally:
                watchdog.unwatch(watched)
                yield connection.close()
            if finish is Finish.ALREADY:
                return
            if finish is Finish.HEURISTIC_ROLLBACK:
                raise BranchFailed(
                    f"the connection to {name!r} was lost, and nothing was committed"
                ) from lost
            break
        raise BranchUnknown(
            f"the connection to {name!r} was lost during COMMIT, and whether it happened cannot be found out; "
            f"its transaction number was {self._evidence.xid} (SELECT pg_xact_status('{self._evidence.xid}'))"
        ) from lost

    def _finish_gen(self, commit: bool) -> Flow[None]:
        """End what is prepared, or may be."""
        connection = self._connection
        reconnected = None
        if self._state == "preparing":
            yield connection.close()  # what is not prepared yet ends with it
        if connection.closed:
            reconnected = connection = yield self._reconnect()
            self._unwatch()
            self._watched = watchdog.watch(connection.fileno(), GRACE_SECONDS)
        try:
            finish = yield from _finish_gen(connection, self._gid, self._bqual, commit)
        finally:
            if reconnected is not None:
                self._unwatch()
                yield reconnected.close()
        self._end()
        if finish not in (Finish.DONE, Finish.ALREADY):
            outcome = "committed" if commit else "rolled back"
            raise BranchHeuristic(
                finish, f"{self._gid} in {self._resource.name!r} was to be {outcome}: {finish.value}"
            )

    def _commit_gen(self) -> Flow[None]:
        if self._state == "ended":
            return
        invariant(self._state == "prepared", "commit of a branch that is %s", self._state)
        yield from self._finish_gen(True)

    def _rollback_gen(self) -> Flow[None]:
        if self._state == "active":
            yield from self._undo_gen()
        elif self._state != "ended":
            yield from self._finish_gen(False)

    def _undo_gen(self) -> Flow[None]:
        """Roll back what was not prepared; a connection on which that fails is closed, which does it, too."""
        connection = self._connection
        try:
            if connection.info.transaction_status is TransactionStatus.ACTIVE:
                yield connection.close()
            elif self._is_driven:
                yield connection.rollback()
            elif not connection.closed:
                yield connection.tpc_rollback()
        except psycopg.Error:
            yield connection.close()
        self._end()

    def _unwatch(self) -> None:
        watched, self._watched = self._watched, 0
        watchdog.unwatch(watched)

    def _end(self) -> None:
        self._state = "ended"
        self._unwatch()
        if self._is_ours:
            self._is_ours = False
            self._release()


class PostgreSQLBranch(_Branch):
    """A branch on a blocking connection: `connection` is for the application's statements."""

    @property
    def connection(self) -> psycopg.Connection[Any]:
        connection: psycopg.Connection[Any] = self._connection
        return connection

    def prepare(self) -> Vote:
        return run(self._prepare_gen())

    def commit_one_phase(self) -> None:
        run(self._commit_one_phase_gen())

    def commit(self) -> None:
        run(self._commit_gen())

    def rollback(self) -> None:
        run(self._rollback_gen())

    def polled_prepare(self) -> Polled[Vote] | None:
        return None if self._has_to_connect else polled(self._prepare_gen())

    def polled_commit(self) -> Polled[None] | None:
        return None if self._has_to_connect else polled(self._commit_gen())

    def polled_rollback(self) -> Polled[None] | None:
        return None if self._has_to_connect else polled(self._rollback_gen())

    @property
    def _has_to_connect(self) -> bool:
        """Connecting blocks: to a server that is away, for long."""
        return self._state == "preparing" or self.connection.closed

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _reconnect(self) -> psycopg.Connection[Any]:
        return self._resource._connect()

    def _release(self) -> None:
        self._resource._give(self._connection)


class AsyncPostgreSQLBranch(_Branch):
    """A branch on an asynchronous connection; recovery goes on without it where it cannot be awaited."""

    @property
    def connection(self) -> psycopg.AsyncConnection[Any]:
        connection: psycopg.AsyncConnection[Any] = self._connection
        return connection

    def prepare(self) -> Vote:
        raise self._flavour("aprepare")

    def commit_one_phase(self) -> None:
        raise self._flavour("acommit_one_phase")

    def commit(self) -> None:
        raise self._flavour("acommit")

    def rollback(self) -> None:
        raise self._flavour("arollback")

    async def aprepare(self) -> Vote:
        return await arun(self._prepare_gen())

    async def acommit_one_phase(self) -> None:
        await arun(self._commit_one_phase_gen())

    async def acommit(self) -> None:
        await arun(self._commit_gen())

    async def arollback(self) -> None:
        await arun(self._rollback_gen())

    def _flavour(self, instead: str) -> FlavourError:
        return FlavourError(f"the connection to {self._resource.name!r} is asynchronous: await {instead}()")

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _reconnect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self._resource._conninfo, **self._resource._parameters)

    def _release(self) -> None:
        self._resource._agive(self._connection, asyncio.get_running_loop())


def run(flow: Flow[_T]) -> _T:
    return poll(polled(flow))


def _watched(connection: psycopg.Connection[Any], work: Callable[[psycopg.Connection[Any]], _T]) -> _T:
    """
    Raises:
        psycopg.OperationalError: No answer in time.
    """
    watched = watchdog.watch(connection.fileno(), _RECOVERY_S)
    try:
        return work(connection)
    finally:
        watchdog.unwatch(watched)


def _finish_gen(connection: Any, gid: str, bqual: bytes, commit: bool) -> Flow[Finish]:
    try:
        if isinstance(connection, psycopg.AsyncConnection):
            yield connection.tpc_commit(gid) if commit else connection.tpc_rollback(gid)
        elif connection.pgconn.transaction_status == TransactionStatus.INTRANS:
            raise psycopg.ProgrammingError(f"{gid} cannot be ended within another transaction")
        else:
            yield from statements.exchange_gen(
                connection, f"{'COMMIT' if commit else 'ROLLBACK'} PREPARED '{gid}'"
            )
    except pg.UndefinedObject:
        evidence = _Evidence.read(bqual)
        if evidence is None:
            return Finish.HAZARD
        return (yield from _how_it_ended_gen(connection, evidence, commit))
    except pg.ObjectNotInPrerequisiteState as exc:
        raise ResourceBusy(f"{gid}: {_text(exc)}") from exc
    return Finish.DONE


def _how_it_ended_gen(connection: Any, evidence: _Evidence, commit: bool) -> Flow[Finish]:
    """
    What became of a transaction that is no longer there.

    Raises:
        ResourceBusy: The server is still at it.
    """
    try:
        status, system, timeline = yield from statements.query_gen(
            connection, f"SELECT pg_xact_status(%s::xid8), {_SYSTEM}, {_TIMELINE}", [str(evidence.xid)]
        )
    except pg.InvalidParameterValue:
        # "Transaction ID is in the future": this database was put back to before it was written.
        yield connection.rollback()
        status, system, timeline = yield from statements.query_gen(
            connection, f"SELECT 'lost', {_SYSTEM}, {_TIMELINE}"
        )
    yield connection.rollback()
    now = _Evidence(0, _system_tag(system), int(timeline, 16))
    if now.system != evidence.system:
        return Finish.HAZARD
    if status == "in progress":
        if now.timeline != evidence.timeline:
            return Finish.HAZARD  # another transaction that was given this number
        raise ResourceBusy(f"transaction {evidence.xid} is still in progress")
    if status == "committed":
        if now.timeline != evidence.timeline:
            return Finish.HAZARD  # by us before the timelines parted, or by another of this number after that
        return Finish.ALREADY if commit else Finish.HEURISTIC_COMMIT
    if status in ("aborted", "lost"):
        return Finish.HEURISTIC_ROLLBACK if commit else Finish.ALREADY
    return Finish.HAZARD  # too long ago: the server has forgotten


def _settle(connection: Any) -> bool:
    """Whether a connection may be used again; what an application may have set is as it was."""
    if connection.closed or connection.pgconn.transaction_status not in _USABLE:
        return False
    connection.row_factory = tuple_row
    return True


_USABLE: Final = (TransactionStatus.IDLE, TransactionStatus.INTRANS)


def _drop(connection: psycopg.AsyncConnection[Any]) -> None:
    """Close without waiting: what is left to send is a good-bye."""
    connection.pgconn.finish()


def _text(error: BaseException) -> str:
    return " ".join(str(error).split())
