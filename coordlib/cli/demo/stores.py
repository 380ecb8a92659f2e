"""Where the services of the demo's orders keep what they have, and how an onlooker finds out what became of an order there.

By default that is a file of the service's own and coordlib's journal: then the service tells. With a database it is the
database that is asked, from here, past coordlib: what it holds prepared, and which rows it has.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from coordlib.cli.demo.processes import Application
from coordlib.errors import StartError
from coordlib.testing.databases import DatabaseServer, MariaDBServer, PostgreSQLServer

__all__ = ["KINDS", "Store", "open_store"]

SAY_SECONDS: Final = 30.0
LOOK_EVERY_SECONDS: Final = 0.02
_TABLE: Final = "CREATE TABLE taken (number VARCHAR(40) PRIMARY KEY, pieces INT NOT NULL)"


class Store(Protocol):
    """One service's."""

    @property
    def words(self) -> str:
        """What it is."""

    @property
    def arguments(self) -> list[str]:
        """For the program of the service, after its name."""

    @property
    def server(self) -> DatabaseServer | None:
        """That may be killed, too."""

    def await_promised(self, service: Application, order: str) -> None: ...

    def await_released(self, service: Application, order: str) -> None: ...

    def await_taken(self, service: Application, order: str) -> None: ...

    def taken(self) -> set[str]:
        """Every order that it has for good."""

    def close(self) -> None:
        """Leave nothing behind; safe to call twice."""


class _Journal:
    """A file, and what the service says."""

    words = "journal"
    arguments: Final[list[str]] = []
    server = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def await_promised(self, service: Application, order: str) -> None:
        service.expect(f"promised {order}", SAY_SECONDS)

    def await_released(self, service: Application, order: str) -> None:
        service.expect(f"released {order}", SAY_SECONDS)

    def await_taken(self, service: Application, order: str) -> None:
        service.expect(f"took {order}", SAY_SECONDS)

    def taken(self) -> set[str]:
        return set(json.loads(self._path.read_text("utf-8"))) if self._path.exists() else set()

    def close(self) -> None: ...


class _Database(ABC):
    """A server of the service's own, which is started here; both kinds."""

    words: str
    server: DatabaseServer

    def __init__(self, server: DatabaseServer) -> None:
        self.server = server
        try:
            server.start()
            self._create()
        except BaseException:
            server.close()
            raise

    @property
    @abstractmethod
    def arguments(self) -> list[str]:
        """See `Store`."""

    @abstractmethod
    def _create(self) -> None:
        """The table."""

    @abstractmethod
    def _connect(self) -> Any:
        """A connection as the driver makes it: what both drivers have is used of it."""

    @abstractmethod
    def _prepared(self) -> str:
        """The statement that lists what has promised."""

    def await_promised(self, service: Application, order: str) -> None:
        self._await(service, order, "promises", lambda: len(self._rows(self._prepared())) == 1)

    def await_released(self, service: Application, order: str) -> None:
        # Whether it was rolled back is for the proof at the end.
        self._await(service, order, "lets go of", lambda: not self._rows(self._prepared()))

    def await_taken(self, service: Application, order: str) -> None:
        self._await(
            service,
            order,
            "has",
            lambda: order in self.taken() and not self._rows(self._prepared()),
        )

    def taken(self) -> set[str]:
        return {row[0] for row in self._rows("SELECT number FROM taken")}

    def close(self) -> None:
        self.server.close()

    def _rows(self, statement: str) -> list[tuple[Any, ...]]:
        connection = self._connect()
        try:
            cursor = connection.cursor()
            cursor.execute(statement)
            return list(cursor.fetchall())
        finally:
            connection.close()

    def _await(self, service: Application, order: str, verb: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SAY_SECONDS
        while not is_so():
            if service.has_ended or time.monotonic() > deadline:
                state = "has ended" if service.has_ended else f"{SAY_SECONDS:g} s have passed"
                raise StartError(
                    f"waited until the {self.words} database of {service.name} {verb} order {order}, but {state}:"
                    f"{service.log_end()}"
                )
            time.sleep(LOOK_EVERY_SECONDS)


class _PostgreSQL(_Database):
    words = "PostgreSQL"
    server: PostgreSQLServer

    def __init__(self) -> None:
        super().__init__(PostgreSQLServer(fsync="on"))

    @property
    def arguments(self) -> list[str]:
        return ["postgres", self.server.dsn()]

    def _create(self) -> None:
        with self._connect() as connection:
            connection.execute(_TABLE)

    def _connect(self) -> Any:
        import psycopg

        return psycopg.connect(self.server.dsn(), autocommit=True)

    def _prepared(self) -> str:
        return "SELECT gid FROM pg_prepared_xacts"


class _MariaDB(_Database):
    words = "MariaDB"
    server: MariaDBServer

    def __init__(self) -> None:
        super().__init__(MariaDBServer("--innodb-flush-log-at-trx-commit=1"))

    @property
    def arguments(self) -> list[str]:
        return ["mariadb", json.dumps(self.server.options("orders"))]

    def _create(self) -> None:
        import pymysql

        connection = pymysql.connect(**self.server.options(), autocommit=True)
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE orders")
            cursor.execute("USE orders")
            cursor.execute(_TABLE)

    def _connect(self) -> Any:
        import pymysql

        return pymysql.connect(**self.server.options("orders"), autocommit=True)

    def _prepared(self) -> str:
        return "XA RECOVER"


_DATABASES: Final[dict[str, Callable[[], _Database]]] = {"postgres": _PostgreSQL, "mariadb": _MariaDB}
KINDS: Final = tuple(_DATABASES)


def open_store(kind: str, directory: Path) -> Store:
    """
    Args:
        kind: One of `KINDS`, or "" for the journal.
        directory: The service's own, where it keeps its file if it has no database.

    Raises:
        ServerMissing: The database is not installed here; one line says what to install.
        StartError: It does not start.
    """
    return _DATABASES[kind]() if kind else _Journal(directory / "taken.json")
