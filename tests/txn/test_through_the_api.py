"""Each kind of resource through a cluster's own transactions, over real servers: what is enlisted, committed, and asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
import transaction as zope_transaction
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

import coordlib
from coordlib.errors import ConfigError, FlavourError, ResourceNotTwoPhase, TransactionAborted, UsageError
from coordlib.testing.databases import MariaDBServer, PostgreSQLServer
from coordlib.txn.resources.mariadb import MariaDB
from coordlib.txn.resources.postgresql import PostgreSQL
from coordlib.txn.resources.sqlalchemy import SQLAlchemy
from coordlib.txn.resources.sqlite import SQLite
from coordlib.txn.resources.zope import CoordlibDataManager, Zope

TABLE = "CREATE TABLE IF NOT EXISTS api_row (name VARCHAR(99) PRIMARY KEY)"


@pytest.fixture
def cluster() -> Iterator[coordlib.Cluster]:
    with coordlib.local() as cluster:
        yield cluster


@pytest.fixture
def conninfo(postgresql_server: PostgreSQLServer) -> Iterator[str]:
    with psycopg.connect(postgresql_server.dsn(), autocommit=True) as connection:
        connection.execute(TABLE)
        connection.execute("DELETE FROM api_row")
        yield postgresql_server.dsn()
        assert connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall() == []


@pytest.fixture
def options(mariadb_server: MariaDBServer) -> Iterator[dict[str, Any]]:
    with pymysql.connect(**mariadb_server.options(), autocommit=True) as connection:
        cursor = connection.cursor()
        cursor.execute("CREATE DATABASE IF NOT EXISTS api")
        cursor.execute("USE api")
        cursor.execute(TABLE)
        cursor.execute("DELETE FROM api_row")
        yield mariadb_server.options("api")
        cursor.execute("XA RECOVER")
        assert cursor.fetchall() == ()


def pg_names(conninfo: str) -> list[str]:
    with psycopg.connect(conninfo) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM api_row ORDER BY name")]


def maria_names(options: dict[str, Any]) -> list[str]:
    with pymysql.connect(**options) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT name FROM api_row ORDER BY name")
        return [name for (name,) in cursor.fetchall()]


@pytest.fixture
def orders(cluster: coordlib.Cluster, conninfo: str) -> Iterator[PostgreSQL]:
    with contextlib.closing(PostgreSQL("orders", conninfo, is_durable=False)) as resource:
        yield cluster.resource(resource)


@pytest.fixture
def bills(cluster: coordlib.Cluster, options: dict[str, Any]) -> Iterator[MariaDB]:
    with contextlib.closing(MariaDB("bills", is_durable=False, **options)) as resource:
        yield cluster.resource(resource)


def insert(connection: Any, name: str) -> None:
    connection.cursor().execute("INSERT INTO api_row VALUES (%s)", (name,))


def test_the_way_of_each_transaction_and_its_entries(
    cluster: coordlib.Cluster, orders: PostgreSQL, bills: MariaDB, conninfo: str, options: dict[str, Any]
) -> None:
    """No entry for nothing, for one database, and for one that wrote beside one that read; else one."""
    counters = cluster._coordinator.counters
    stock = cluster.map("stock")
    with cluster.transaction() as tx:
        tx.enlist(orders).execute("SELECT 1").fetchall()
        tx.enlist(bills).cursor().execute("SELECT 1")
    with cluster.transaction() as tx:
        insert(tx.enlist(orders), "a")
    with cluster.transaction() as tx:
        insert(tx.enlist(bills), "b")
    with cluster.transaction() as tx:
        insert(tx.enlist(orders), "c")
        tx.enlist(bills).cursor().execute("SELECT 1")
    assert counters.get("log_entries", 0) == 0
    for way in ("read_only", "dynamic_one_phase"):
        assert counters[way] == 1
    assert counters["one_phase"] == 2
    with cluster.transaction() as tx:
        insert(tx.enlist(orders), "d")
        insert(tx.enlist(bills), "d")
        stock["d"] = 1
    assert (counters["log_entries"], counters["two_phase"]) == (1, 1)
    assert (pg_names(conninfo), maria_names(options), stock["d"]) == (["a", "c", "d"], ["b", "d"], 1)


def test_a_swallowed_error_is_no_surprise(
    cluster: coordlib.Cluster, orders: PostgreSQL, bills: MariaDB, conninfo: str, options: dict[str, Any]
) -> None:
    """It aborts all of it, in whichever database it was, and says so."""
    for broken, whole in ((orders, bills), (bills, orders)):
        with (
            pytest.raises(TransactionAborted, match="a statement failed in it") as caught,
            cluster.transaction() as tx,
        ):
            insert(tx.enlist(whole), "x")
            connection = tx.enlist(broken)
            insert(connection, "x")
            with contextlib.suppress(psycopg.Error, pymysql.MySQLError):
                insert(connection, "x")
            cluster.map("stock")["x"] = 1
        assert caught.value.reason == "vote-no"
    assert (pg_names(conninfo), maria_names(options)) == ([], [])
    assert "x" not in cluster.map("stock")


def test_sqlite_decides_for_the_others_and_not_beside_maps(
    cluster: coordlib.Cluster, orders: PostgreSQL, conninfo: str, tmp_path: Path
) -> None:
    """Without an entry; with a map it is refused, and nothing of it is left."""
    with contextlib.closing(SQLite("notes", tmp_path / "notes.db")) as resource:
        notes = cluster.resource(resource)
        with cluster.transaction() as tx:
            tx.enlist(notes).execute(TABLE)
        with cluster.transaction() as tx:
            tx.enlist(notes).execute("INSERT INTO api_row VALUES ('a')")
            insert(tx.enlist(orders), "a")
        with pytest.raises(ResourceNotTwoPhase), cluster.transaction() as tx:
            tx.enlist(notes).execute("INSERT INTO api_row VALUES ('b')")
            insert(tx.enlist(orders), "b")
            cluster.map("stock")["b"] = 1
        with cluster.transaction() as tx:
            assert tx.enlist(notes).execute("SELECT name FROM api_row").fetchall() == [("a",)]
    assert pg_names(conninfo) == ["a"]
    counters = cluster._coordinator.counters
    assert (counters["last_resource"], counters.get("log_entries", 0)) == (1, 0)


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_sessions_of_sqlalchemy(cluster: coordlib.Cluster, kind: str, request: pytest.FixtureRequest) -> None:
    """The resource's own, one of the application's, or a connection; a pool that runs out is an error, and leaves nothing."""
    if kind == "postgresql":
        request.getfixturevalue("conninfo")
        url = f"postgresql+psycopg://coordlib@/postgres?host={request.getfixturevalue('postgresql_server').directory}"
    else:
        request.getfixturevalue("options")
        url = f"mariadb+pymysql://root@/api?unix_socket={request.getfixturevalue('mariadb_server').socket}"
    engine = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    add = text("INSERT INTO api_row VALUES (:name)")
    with contextlib.closing(SQLAlchemy("orm", engine, is_durable=False)) as resource:
        orm = cluster.resource(resource)
        with cluster.transaction() as tx:
            session = tx.enlist(orm)
            assert isinstance(session, Session)
            session.execute(add, {"name": "own"})
            assert tx.enlist(orm) is session
            cluster.map("stock")["own"] = 1
        with Session(engine, twophase=True) as session, cluster.transaction() as tx:
            assert tx.enlist(orm, using=session) is session
            session.execute(add, {"name": "theirs"})
            cluster.map("stock")["theirs"] = 1
        with (
            pytest.raises(UsageError, match="twophase"),
            cluster.transaction() as tx,
            Session(engine) as session,
        ):
            tx.enlist(orm, using=session)
        with pytest.raises(FlavourError), cluster.transaction() as tx:
            tx.enlist(orm, using="a session")
        with pytest.raises(PoolTimeout), engine.connect(), cluster.transaction() as tx:
            cluster.map("stock")["none"] = 1
            tx.enlist(orm)
        with engine.connect() as connection:
            names = list(connection.execute(text("SELECT name FROM api_row ORDER BY name")).scalars())
    engine.dispose()
    assert names == ["own", "theirs"]
    assert "none" not in cluster.map("stock")


def test_connections_of_the_application_s(
    cluster: coordlib.Cluster, orders: PostgreSQL, bills: MariaDB, conninfo: str, options: dict[str, Any]
) -> None:
    """They take part with `using`, and are its own again, and usable, afterwards."""
    with psycopg.connect(conninfo) as ours, pymysql.connect(**options) as theirs:
        with cluster.transaction() as tx:
            assert tx.enlist(orders, using=ours) is ours
            assert tx.enlist(bills, using=theirs) is theirs
            insert(ours, "a")
            insert(theirs, "a")
        ours.execute("SELECT 1")
        theirs.cursor().execute("SELECT 1")
    assert pg_names(conninfo) == maria_names(options) == ["a"]


def test_tasks_with_an_asynchronous_driver_and_a_blocking_one(conninfo: str, options: dict[str, Any]) -> None:
    """psycopg's asynchronous connections, the resource's or the application's, beside PyMySQL on a thread."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            orders = await cluster.resource(PostgreSQL("orders", conninfo, is_durable=False))
            bills = await cluster.resource(MariaDB("bills", is_durable=False, **options))
            blocking = await cluster.resource(
                PostgreSQL("blocking", connect=lambda: psycopg.connect(conninfo), is_durable=False)
            )
            async with cluster.transaction() as tx:
                await (await tx.enlist(orders)).execute("INSERT INTO api_row VALUES ('a')")
                connection = await tx.enlist(bills)
                await asyncio.to_thread(insert, connection, "a")
                await cluster.map("stock").put("a", 1)
            async with await psycopg.AsyncConnection.connect(conninfo) as ours:
                async with cluster.transaction() as tx:
                    assert await tx.enlist(orders, using=ours) is ours
                    await ours.execute("INSERT INTO api_row VALUES ('b')")
                await ours.execute("SELECT 1")
            with pytest.raises(UsageError, match="for tasks"):
                async with cluster.transaction() as tx:
                    await tx.enlist(blocking)
            with pytest.raises(ZeroDivisionError):
                async with cluster.transaction() as tx:
                    await (await tx.enlist(orders)).execute("INSERT INTO api_row VALUES ('c')")
                    raise ZeroDivisionError
            for resource in (orders, bills, blocking):
                resource.close()

    asyncio.run(check())
    assert (pg_names(conninfo), maria_names(options)) == (["a", "b"], ["a"])


class Manager:
    """A data manager of Zope's that keeps a note of what it was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        if name not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(name)
        return lambda transaction: self.heard.append(name)

    def sortKey(self) -> str:
        return "manager"


def test_zope_both_ways(cluster: coordlib.Cluster, orders: PostgreSQL, conninfo: str) -> None:
    """Its data managers in ours, and ours in a transaction of its own."""
    mail = cluster.resource(Zope("mail", accepts_loss=True))
    inner = Manager()
    with cluster.transaction() as tx:
        tx.enlist(mail).join(inner)
        insert(tx.enlist(orders), "a")
    assert inner.heard == ["tpc_begin", "commit", "tpc_vote", "tpc_finish"]
    for name, is_failing in (("b", False), ("c", True)):
        manager, outer = zope_transaction.TransactionManager(), Manager()
        tx = cluster.transaction().begin()
        CoordlibDataManager(tx.commit, tx.rollback, manager=manager)
        manager.get().join(outer)
        insert(tx.enlist(orders), name)
        manager.abort() if is_failing else manager.commit()
        assert outer.heard[-1] == ("abort" if is_failing else "tpc_finish")
    assert pg_names(conninfo) == ["a", "b"]


def test_passwords_are_in_no_error_and_no_log(
    cluster: coordlib.Cluster, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with how to connect: the text of it, the error behind it, or what is logged about it."""
    caplog.set_level(logging.DEBUG)
    secret = "hunter2"
    wrong: list[Callable[[], Any]] = [
        lambda: PostgreSQL("a", f"host={tmp_path} {secret}"),
        lambda: PostgreSQL("b", f"postgresql://me:{secret}@[nowhere"),
        lambda: PostgreSQL("c", f"host={tmp_path} user=me password={secret}"),
        lambda: MariaDB("d", **{**options, "user": "me", "password": secret}),
        lambda: SQLAlchemy(
            "e", create_engine(f"postgresql+psycopg://me:{secret}@/x?host={tmp_path}"), is_durable=False
        ),
    ]
    for make in wrong:
        with pytest.raises(
            (ConfigError, psycopg.OperationalError, pymysql.OperationalError, Exception)
        ) as caught:
            resource = make()
            assert secret not in repr(resource)
            cluster.resource(resource)
        error: BaseException | None = caught.value
        while error is not None:
            assert secret not in str(error) + repr(error)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert secret not in caplog.text
