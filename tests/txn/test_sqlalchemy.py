"""SQLAlchemy's sessions and connections as branches, over real PostgreSQL and MariaDB servers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool
from sqlalchemy.types import String

from coordlib.errors import ConfigError, FlavourError, UsageError
from coordlib.txn.branches import BranchFailed, Finish, Vote
from coordlib.txn.resources.sqlalchemy import SQLAlchemy, SQLAlchemyBranch
from tests.txn.conftest import Names


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "customer_order"
    name: Mapped[str] = mapped_column(String(99), primary_key=True)


@pytest.fixture(params=["postgresql", "mariadb"], scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "postgresql":
        server = request.getfixturevalue("postgresql_server")
        made = create_engine(f"postgresql+psycopg://coordlib@/postgres?host={server.directory}")
    else:
        server = request.getfixturevalue("mariadb_server")
        setup = create_engine(f"mariadb+pymysql://root@/?unix_socket={server.socket}", poolclass=NullPool)
        with setup.begin() as connection:
            connection.execute(text("CREATE DATABASE IF NOT EXISTS orm"))
        setup.dispose()
        made = create_engine(f"mariadb+pymysql://root@/orm?unix_socket={server.socket}")
    Base.metadata.create_all(made)
    yield made
    Base.metadata.drop_all(made)
    made.dispose()


@pytest.fixture
def orders(engine: Engine, names: Names) -> Iterator[SQLAlchemy]:
    with Session(engine) as session:
        session.execute(text("DELETE FROM customer_order"))
        session.commit()
    with contextlib.closing(SQLAlchemy("orders", engine, is_durable=False)) as resource:
        resource.open(names.cluster)
        yield resource
        assert resource.prepared() == []


def _begin(resource: SQLAlchemy, names: Names) -> SQLAlchemyBranch:
    return resource.begin(names.gtid(), names.bqual("orders"), names.remaining_s)


def _enlisted(resource: SQLAlchemy, target: Any, names: Names) -> SQLAlchemyBranch:
    return resource.enlist(target, names.gtid(), names.bqual("orders"), names.remaining_s)


def _rows(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return list(session.scalars(select(Order.name).order_by(Order.name)))


def test_a_session_with_changes_to_flush_does_not_seem_to_read_only(
    orders: SQLAlchemy, engine: Engine, names: Names
) -> None:
    """The database has not seen them yet. Where nobody looks at the statements, it is taken to write anyway."""
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        list(session.scalars(select(Order.name)))
        assert branch.seems_read_only == (engine.dialect.name != "postgresql")
        session.add(Order(name="a"))
        assert not branch.seems_read_only
        branch.rollback()


def test_a_session_is_prepared_and_committed_under_our_name(
    orders: SQLAlchemy, engine: Engine, names: Names
) -> None:
    """What was added is flushed by the vote; objects expire and listeners hear, as of any commit."""
    heard: list[str] = []
    with Session(engine, twophase=True) as session:
        for name in ("before_commit", "after_commit"):
            event.listen(session, name, lambda _, name=name: heard.append(name))
        branch = _enlisted(orders, session, names)
        session.add(order := Order(name="a"))
        assert branch.prepare() is Vote.YES
        assert heard == ["before_commit"]
        (found,) = orders.prepared()
        assert (found.gtid, found.bqual) == (branch._gtid, branch.bqual)
        assert _rows(engine) == []
        branch.commit()
        branch.commit()
        assert heard == ["before_commit", "after_commit"]
        assert not session.in_transaction()
        assert order.name == "a"  # read again: in a transaction of SQLAlchemy's own
        session.commit()
    assert _rows(engine) == ["a"]
    with Session(engine, twophase=True) as session:  # the pool's connection is as it was
        session.add(Order(name="b"))
        session.commit()
    assert _rows(engine) == ["a", "b"]


def test_a_prepared_session_is_rolled_back(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """And can be used again."""
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.add(Order(name="a"))
        branch.prepare()
        branch.rollback()
        branch.rollback()
        assert _rows(engine) == []
        again = _enlisted(orders, session, names)
        session.add(Order(name="b"))
        again.commit_one_phase()
    assert _rows(engine) == ["b"]


def test_a_session_of_the_resources_own(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """One phase, two phases, rolled back; it is closed with the branch."""
    first = _begin(orders, names)
    assert first.session is not None
    first.session.add(Order(name="a"))
    first.commit_one_phase()
    second = _begin(orders, names)
    second.connection.execute(text("INSERT INTO customer_order VALUES ('b')"))
    second.prepare()
    second.commit()
    third = _begin(orders, names)
    third.connection.execute(text("INSERT INTO customer_order VALUES ('c')"))
    third.rollback()
    assert _rows(engine) == ["a", "b"]


def test_a_connection(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """Without a session; it stays the application's."""
    with engine.connect() as connection:
        branch = _enlisted(orders, connection, names)
        connection.execute(text("INSERT INTO customer_order VALUES ('a')"))
        assert branch.prepare() is Vote.YES
        branch.commit()
        again = _enlisted(orders, connection, names)
        connection.execute(text("INSERT INTO customer_order VALUES ('b')"))
        again.rollback()
        third = _enlisted(orders, connection, names)
        connection.execute(text("INSERT INTO customer_order VALUES ('c')"))
        third.commit_one_phase()
    assert _rows(engine) == ["a", "c"]


def test_reading_only_is_noticed(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """The session is free again with the vote."""
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.scalars(select(Order)).all()
        assert branch.prepare() is Vote.READ_ONLY
        assert not session.in_transaction()


@pytest.mark.parametrize("end", [Session.commit, Session.rollback, Session.prepare, Session.close])
def test_a_session_that_the_application_ends_is_a_no(
    orders: SQLAlchemy, engine: Engine, names: Names, end: Callable[[Session], None]
) -> None:
    """Committing is refused at the call; nothing is committed in any case."""
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.add(Order(name="a"))
        session.flush()
        if end in (Session.commit, Session.prepare):
            with pytest.raises(UsageError, match="leave that to the transaction"):
                end(session)
        else:
            end(session)
        with pytest.raises(BranchFailed):
            branch.prepare()
        branch.rollback()
    assert _rows(engine) == []


def test_an_error_while_flushing_is_a_no(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """Constraints are often first seen by the vote."""
    with Session(engine) as session:
        session.add(Order(name="a"))
        session.commit()
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.add(Order(name="a"))
        with pytest.raises(BranchFailed) as failed:
            branch.prepare()
        assert isinstance(failed.value.__cause__, IntegrityError)
        assert not orders.is_conflict(failed.value)
        branch.rollback()
    assert _rows(engine) == ["a"]


def test_a_swallowed_error_is_a_no_and_a_savepoint_heals(
    orders: SQLAlchemy, engine: Engine, names: Names
) -> None:
    """As of the database's own adapter: a nested transaction of the session's is a savepoint."""
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.execute(text("INSERT INTO customer_order VALUES ('a')"))
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(text("INSERT INTO customer_order VALUES ('a')"))
        assert branch.prepare() is Vote.YES
        branch.commit()
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.execute(text("INSERT INTO customer_order VALUES ('b')"))
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT * FROM no_such_table"))
        with pytest.raises(BranchFailed):
            branch.prepare()
    assert _rows(engine) == ["a"]


def test_a_listeners_error_leaves_nothing(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """It goes through, and the branch has rolled back."""

    def refuse(_: Session) -> None:
        raise RuntimeError("not today")

    with Session(engine, twophase=True) as session:
        event.listen(session, "before_commit", refuse)
        branch = _enlisted(orders, session, names)
        session.add(Order(name="a"))
        with pytest.raises(RuntimeError, match="not today"):
            branch.prepare()
        branch.rollback()
    assert _rows(engine) == []


def test_another_process_finishes_it(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """Recovery knows nothing of sessions."""
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        session.add(Order(name="a"))
        branch.prepare()
        (found,) = orders.prepared()
        if engine.dialect.name == "postgresql":  # MariaDB keeps it with the connection
            assert orders.finish(found, True) is Finish.DONE
        branch.commit()
        if engine.dialect.name == "postgresql":
            assert orders.finish(found, True) is Finish.ALREADY
    assert _rows(engine) == ["a"]


def test_what_cannot_be_enlisted(orders: SQLAlchemy, engine: Engine, names: Names) -> None:
    """One phase, a transaction of its own, another engine, another flavour."""
    with Session(engine) as session, pytest.raises(UsageError, match="twophase=True"):
        _enlisted(orders, session, names)
    with Session(engine, twophase=True) as session:
        session.scalars(select(Order)).all()
        with pytest.raises(UsageError, match="in a transaction already"):
            _enlisted(orders, session, names)
    other = create_engine(engine.url, poolclass=NullPool)
    with other.connect() as connection, pytest.raises(UsageError, match="must be of its engine"):
        _enlisted(orders, connection, names)
    with pytest.raises(FlavourError):
        _enlisted(orders, object(), names)
    with Session(engine, twophase=True) as session:
        branch = _enlisted(orders, session, names)
        with pytest.raises(UsageError, match="one session for each"):
            session.connection(bind_arguments={"bind": other})
        branch.rollback()
    other.dispose()


def test_engines_that_are_refused() -> None:
    """At once, with what to use instead."""
    with pytest.raises(ConfigError, match="SQLite database is a resource of its own kind"):
        SQLAlchemy("x", create_engine("sqlite://"))
    with pytest.raises(FlavourError, match="AsyncEngine"):
        SQLAlchemy("x", object())  # type: ignore[arg-type]
