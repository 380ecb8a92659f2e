"""The example of docs/databases.md, run as it stands there, against servers of the tests' own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
import sqlalchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import coordlib
from coordlib.testing.databases import MariaDBServer, PostgreSQLServer
from coordlib.txn import resources
from coordlib.txn.resources.mariadb import MariaDB
from coordlib.txn.resources.postgresql import PostgreSQL
from coordlib.txn.resources.sqlalchemy import SQLAlchemy
from coordlib.txn.resources.sqlite import SQLite

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs" / "databases.md").read_text(encoding="utf-8")
DATABASE = "documented"


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[str] = mapped_column(primary_key=True)


def test_its_example_runs_as_it_stands(
    postgresql_server: PostgreSQLServer,
    mariadb_server: MariaDBServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four databases and a map, in two transactions; only where the databases are is the test's."""
    with psycopg.connect(postgresql_server.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {DATABASE}")
    dsn, options = postgresql_server.dsn(DATABASE), mariadb_server.options(DATABASE)
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE ledger (number text PRIMARY KEY, amount int)")
    with pymysql.connect(**mariadb_server.options()) as maria, maria.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {DATABASE}")
        cursor.execute(
            f"CREATE TABLE {DATABASE}.stock (sku VARCHAR(9) PRIMARY KEY, pieces INT) AS SELECT 'sku-1' sku, 3 pieces"
        )
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    Base.metadata.create_all(engine)
    opened: list[Any] = []

    def keep(resource: Any) -> Any:
        opened.append(resource)
        return resource

    def make_notes(connection: Any) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS notes (number TEXT PRIMARY KEY)")

    factories: dict[str, Any] = {
        "PostgreSQL": lambda name, conninfo: keep(PostgreSQL(name, dsn, is_durable=False)),
        "MariaDB": lambda name, **_: keep(MariaDB(name, **options, is_durable=False)),
        "SQLAlchemy": lambda name, engine: keep(SQLAlchemy(name, engine, is_durable=False)),
        "SQLite": lambda name, path: keep(SQLite(name, tmp_path / Path(path).name, configure=make_notes)),
    }
    for name, factory in factories.items():
        monkeypatch.setattr(resources, name, factory, raising=False)
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    try:
        with coordlib.local() as cluster:
            exec(
                compile(example, "docs/databases.md", "exec"),
                {"cluster": cluster, "engine": engine, "Order": Order},
            )
            assert dict(cluster.map("orders")) == {"o-1": "placed"}
            with psycopg.connect(dsn) as connection:
                assert connection.execute("SELECT * FROM ledger").fetchall() == [("o-1", 0)]
                assert connection.execute("SELECT * FROM orders").fetchall() == [("o-1",)]
            with pymysql.connect(**options) as maria, maria.cursor() as cursor:
                cursor.execute("SELECT pieces FROM stock")
                assert cursor.fetchall() == ((2,),)
    finally:
        for resource in opened:
            resource.close()
        engine.dispose()
