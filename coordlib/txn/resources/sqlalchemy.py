"""SQLAlchemy 2: sessions with `twophase=True`, and connections, over PostgreSQL (psycopg) and MariaDB (PyMySQL).

SQLAlchemy prepares and commits, but keeps no decision and gives each connection a name of its own: what a crash leaves
between the two cannot be put together again. So an engine's dialect is given two-phase methods that know our branches:
of those, the transaction begins, votes and ends by the adapters of this package, under its names; of others, nothing
changes. SQLAlchemy's own bookkeeping, flushes and events go on as they do.

The application does not commit such a session itself: that is refused, and the branch votes NO.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final
from weakref import WeakKeyDictionary

from coordlib.errors import ConfigError, FlavourError, UsageError
from coordlib.txn.branches import BranchFailed, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import text_of
from coordlib.txn.resources.common import ResourceBase, missing_driver

try:
    from sqlalchemy import exc as sa_errors
except ImportError as exc:  # pragma: no cover - the test environment has it
    raise missing_driver(__name__, "SQLAlchemy 2", "sqlalchemy") from exc
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine, TwoPhaseTransaction
from sqlalchemy.orm import Session

__all__ = ["SQLAlchemy", "SQLAlchemyBranch"]

_DRIVERS: Final = {"postgresql": ("psycopg",), "mysql": ("pymysql",), "mariadb": ("pymysql",)}

_beginning: ContextVar[SQLAlchemyBranch | None] = ContextVar("coordlib_beginning", default=None)
"""The branch for which SQLAlchemy is just now beginning a transaction."""


class SQLAlchemy(ResourceBase):
    """
    An engine's database as a resource. Recovery takes connections of its own, made as the engine makes them.

    Args:
        name: The same on every node that reaches this database.
        engine: Over `postgresql+psycopg`, or `mariadb+pymysql` or `mysql+pymysql` where the server is MariaDB.
        options: For `PostgreSQL` or `MariaDB`: `is_durable`, `has_markers`, `idle_max`.

    Raises:
        ConfigError: The engine is over something else.
    """

    def __init__(self, name: str, engine: Engine, **options: Any) -> None:
        super().__init__(name)
        if not isinstance(engine, Engine):
            raise FlavourError(
                f"resource {name!r} takes an Engine, got {type(engine).__name__}; of an AsyncEngine, none"
            )
        dialect, driver = engine.dialect.name, engine.dialect.driver
        if driver not in _DRIVERS.get(dialect, ()):
            raise ConfigError(
                f"the engine of {name!r} is over {dialect}+{driver}: two-phase commit is for postgresql+psycopg and "
                "mariadb+pymysql; a SQLite database is a resource of its own kind (coordlib.txn.resources.SQLite)"
            )
        self.engine = engine
        self._inner = self._adapter(dialect, options)
        _Methods.install(engine.dialect)

    def _adapter(self, dialect: str, options: dict[str, Any]) -> Any:
        def connect() -> Any:
            fairy = self.engine.raw_connection()
            connection = fairy.driver_connection
            fairy.detach()  # ours from now on, not the pool's
            return connection

        if dialect == "postgresql":
            from coordlib.txn.resources.postgresql import PostgreSQL

            return PostgreSQL(self.name, connect=connect, **options)
        from coordlib.txn.resources.mariadb import MariaDB

        return MariaDB(self.name, connect=connect, **options)

    def __repr__(self) -> str:
        return f"<SQLAlchemy {self.name!r} over {self._inner!r}>"

    def open(self, cluster: bytes) -> None:
        """As of the database's own adapter."""
        self._inner.open(cluster)
        self._cluster = cluster

    def close(self) -> None:
        self._inner.close()

    def is_conflict(self, error: BaseException) -> bool:
        """As of the database's own adapter, of whose errors SQLAlchemy makes its own."""
        while isinstance(error, sa_errors.DBAPIError | BranchFailed):
            cause = error.orig if isinstance(error, sa_errors.DBAPIError) else error.__cause__
            if cause is None:
                return False
            error = cause
        return bool(self._inner.is_conflict(error))

    def begin(self, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]) -> SQLAlchemyBranch:
        """A branch with a session of its own (`session`), which is closed when the branch has ended."""
        session = Session(self.engine, twophase=True)
        try:
            return SQLAlchemyBranch(self, session, gtid, bqual, remaining_s, is_ours=True)
        except BaseException:
            session.close()
            raise

    def enlist(
        self, target: Session | Connection, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]
    ) -> SQLAlchemyBranch:
        """
        A branch of the application's session or connection, which must not be in a transaction yet.

        Raises:
            UsageError: It is in a transaction, has not two phases, or another engine.
        """
        if not isinstance(target, Session | Connection):
            raise FlavourError(f"enlist() takes a Session or a Connection, got {type(target).__name__}")
        return SQLAlchemyBranch(self, target, gtid, bqual, remaining_s, is_ours=False)

    def prepared(self) -> list[PreparedBranch]:
        return list(self._inner.prepared())

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        finish: Finish = self._inner.finish(branch, commit)
        return finish


class SQLAlchemyBranch:
    """A branch of a session, or of a connection."""

    is_last_resource = False

    def __init__(
        self,
        resource: SQLAlchemy,
        target: Session | Connection,
        gtid: bytes,
        bqual: bytes,
        remaining_s: Callable[[], float],
        *,
        is_ours: bool,
    ) -> None:
        self._resource = resource
        self._gtid = gtid
        self._bqual = resource.check_bqual(bqual)
        self._remaining_s = remaining_s
        self._is_ours = is_ours
        self._inner: Any = None
        self._vote: Callable[[], Vote | None] | None = None  # while SQLAlchemy prepares on our behalf
        self._voted: Vote | None = None
        self._is_told = False  # SQLAlchemy, that the transaction has ended
        self.session: Session | None = None
        self._begin(target)

    def __repr__(self) -> str:
        return f"<branch of {text_of(self._gtid)} in {self._resource.name!r}>"

    @property
    def resource(self) -> SQLAlchemy:
        return self._resource

    @property
    def bqual(self) -> bytes:
        return self._bqual if self._inner is None else self._inner.bqual

    @property
    def connection(self) -> Connection:
        """For the application's statements, where it does not go through the session."""
        return self._connection

    def _begin(self, target: Session | Connection) -> None:
        engine, name = self._resource.engine, self._resource.name
        if isinstance(target, Session):
            if not target.twophase:
                raise UsageError(f"a session enlisted with {name!r} needs Session(..., twophase=True)")
            self.session = target
        elif target.engine.dialect is not engine.dialect:
            raise UsageError(f"a connection enlisted with {name!r} must be of its engine")
        if target.in_transaction():
            raise UsageError(
                f"what is enlisted with {name!r} is in a transaction already: commit or roll back before"
            )
        token = _beginning.set(self)
        try:
            if isinstance(target, Session):
                self._connection = target.connection(bind_arguments={"bind": engine})
                event.listen(target, "after_begin", self._refuse_another)
            else:
                self._connection = target
                target.begin_twophase()
        finally:
            _beginning.reset(token)
        transaction = self._connection.get_transaction()
        if self._inner is None or not isinstance(transaction, TwoPhaseTransaction):
            raise UsageError(f"{name!r} could not begin a two-phase transaction on what was enlisted")
        self._transaction = transaction
        self._target: Any = self.session if self.session is not None else transaction

    def _refuse_another(self, session: Session, transaction: object, connection: Connection) -> None:
        """SQLAlchemy would prepare it beside ours under a name that nobody finds again."""
        if connection is not self._connection and not self._is_told:
            raise UsageError(
                f"a session enlisted with {self._resource.name!r} used another engine: have one session for each"
            )

    def begin_on(self, connection: Any) -> None:
        """SQLAlchemy begins: our adapter's branch on the driver's connection."""
        from coordlib.txn.resources.mariadb import MariaDB, MariaDBBranch
        from coordlib.txn.resources.postgresql import PostgreSQL

        inner = self._resource._inner
        if isinstance(inner, MariaDB):
            self._inner = MariaDBBranch(
                inner, connection, self._gtid, self._bqual, self._remaining_s, is_ours=False
            )
        elif isinstance(inner, PostgreSQL):
            self._inner = inner.drive(connection, self._gtid, self._bqual, self._remaining_s)

    # -- asked by the transaction

    @property
    def seems_read_only(self) -> bool:
        # What the session has not flushed yet, the database has not seen.
        session = self.session
        has_changes = session is not None and bool(session.new or session.dirty or session.deleted)
        return not has_changes and bool(self._inner.seems_read_only)

    def prepare(self) -> Vote:
        vote = self._prepare_with(self._inner.prepare)
        if vote is Vote.READ_ONLY:
            self._tell(commit=True)
        return vote

    def commit_one_phase(self) -> None:
        def vote() -> Vote:
            self._inner.commit_one_phase()
            return Vote.YES

        self._prepare_with(vote)
        self._tell(commit=True)

    def commit(self) -> None:
        self._inner.commit()
        self._tell(commit=True)

    def rollback(self) -> None:
        self._inner.rollback()
        self._tell(commit=False)

    def _prepare_with(self, vote: Callable[[], Vote]) -> Vote:
        """Have SQLAlchemy flush, call its listeners, and prepare; where it would send that, it finds `vote`."""
        name = self._resource.name
        if self._inner._state == "ended":
            raise BranchFailed(
                f"the branch in {name!r} is rolled back: the application ended the transaction itself"
            )
        self._vote, self._voted = vote, None
        try:
            self._target.prepare()
        except BranchFailed:
            self._tell(commit=False)
            raise
        except sa_errors.SQLAlchemyError as exc:
            self._give_up()
            raise BranchFailed(f"the branch in {name!r} is rolled back: {exc}") from exc
        except BaseException:
            if self._inner._state == "active":
                self._give_up()  # a listener's error, or the application's; nothing was prepared
            raise
        finally:
            self._vote = None
        if self._voted is None:
            self._give_up()
            raise BranchFailed(
                f"the branch in {name!r} is rolled back: its transaction is not the session's any more"
            )
        return self._voted

    def _give_up(self) -> None:
        if self._inner._state == "active":
            self._inner.rollback()
        self._tell(commit=False)

    def _tell(self, *, commit: bool) -> None:
        """The database has ended the transaction: SQLAlchemy does as well, and sends nothing."""
        if self._is_told:
            return
        self._is_told = True
        if self.session is not None:
            event.remove(self.session, "after_begin", self._refuse_another)
        try:
            if commit:
                self._target.commit()
            else:
                self._target.rollback()
        finally:
            if self._is_ours and self.session is not None:
                self.session.close()

    # -- asked by SQLAlchemy

    def handle_prepare(self) -> None:
        if self._inner._state == "ended":
            return
        if self._vote is None:
            raise UsageError(
                f"a session enlisted with {self._resource.name!r} was committed by the application: leave that to the "
                "transaction"
            )
        if self._voted is None:
            self._voted = self._vote()

    def handle_commit(self) -> None:
        if not self._is_told:
            raise UsageError(
                f"a session enlisted with {self._resource.name!r} was committed by the application: leave that to the "
                "transaction"
            )

    def handle_rollback(self) -> None:
        # What is prepared is not SQLAlchemy's to roll back any more; what is not is the application's to give up.
        if self._inner._state == "active":
            self._inner.rollback()


class _Methods:
    """The two-phase methods of one engine's dialect; those that were there serve transactions that are not ours."""

    _installed: WeakKeyDictionary[Any, _Methods] = WeakKeyDictionary()

    @classmethod
    def install(cls, dialect: Any) -> None:
        if dialect not in cls._installed:
            cls._installed[dialect] = cls(dialect)

    def __init__(self, dialect: Any) -> None:
        self._begin = dialect.do_begin_twophase
        self._prepare = dialect.do_prepare_twophase
        self._commit = dialect.do_commit_twophase
        self._rollback = dialect.do_rollback_twophase
        self._create_xid = dialect.create_xid
        dialect.create_xid = self.create_xid
        dialect.do_begin_twophase = self.do_begin
        dialect.do_prepare_twophase = self.do_prepare
        dialect.do_commit_twophase = self.do_commit
        dialect.do_rollback_twophase = self.do_rollback

    def create_xid(self) -> Any:
        branch = _beginning.get()
        return self._create_xid() if branch is None else _Xid(branch)

    def do_begin(self, connection: Connection, xid: Any) -> None:
        if isinstance(xid, _Xid):
            xid.branch.begin_on(connection.connection.driver_connection)
        else:
            self._begin(connection, xid)

    def do_prepare(self, connection: Connection, xid: Any) -> None:
        if isinstance(xid, _Xid):
            xid.branch.handle_prepare()
        else:
            self._prepare(connection, xid)

    def do_commit(
        self, connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        if isinstance(xid, _Xid):
            xid.branch.handle_commit()
        else:
            self._commit(connection, xid, is_prepared, recover)

    def do_rollback(
        self, connection: Connection, xid: Any, is_prepared: bool = True, recover: bool = False
    ) -> None:
        if isinstance(xid, _Xid):
            xid.branch.handle_rollback()
        else:
            self._rollback(connection, xid, is_prepared, recover)


class _Xid(str):
    """What SQLAlchemy takes for a transaction's name; knows the branch."""

    branch: SQLAlchemyBranch

    def __new__(cls, branch: SQLAlchemyBranch) -> _Xid:
        self = super().__new__(cls, f"coordlib {text_of(branch._gtid)}")
        self.branch = branch
        return self
