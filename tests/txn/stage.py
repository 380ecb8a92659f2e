"""What the tests of failures are played on: members, two or three databases, a service, processes that can be killed.

The bank: every transfer leaves, under its number, what it changes in each place, and these changes sum up to 0. It is in
all of its places or in none; `await_end` waits for that no longer than docs/transactions.md says, and then holds the
books of all transfers so far against each other.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pymysql

import coordlib
from benchmarks.links import Links
from benchmarks.processes import Fleet
from coordlib.api import coordinator
from coordlib.config import Timing
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.testing.databases import MariaDBServer, PostgreSQLServer
from coordlib.txn import commit, participant, recovery
from coordlib.txn.resources import PostgreSQL, mariadb
from coordlib.txn.resources.mariadb import MariaDB
from coordlib.wire.messages import RequestKind

__all__ = ["EVERYWHERE", "NOWHERE", "Bounds", "Process", "Stage"]

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SESSION_TTL_SECONDS: Final = 2.0
SEARCH_EVERY_MS: Final = 500
"""Oftener than by default, in all processes here: waiting for it is most of what these tests take."""

EVERYWHERE: Final = ["first", "second", "vault", "map"]
NOWHERE: Final[list[str]] = []
PLACES: Final = ("first", "second", "third", "vault", "map")


class Bounds:
    """
    How long others stay locked, at most, as docs/transactions.md has it; in seconds, of the constants in force here.

    R, one round of the log, is milliseconds where a machine keeps up; nobody waits for an answer longer than
    `request_timeout`.
    """

    answer = Timing().request_timeout_ms / 1000
    look = coordinator.LOOK_EVERY_SECONDS
    search = SEARCH_EVERY_MS / 1000 + look
    ask = participant.ASK_EVERY_MS_MAX / 1000 + look
    detached = mariadb._DETACHED_S + search  # MariaDB: found busy once more
    decided = max(ask, search + detached) + answer
    undecided = SESSION_TTL_SECONDS + decided
    told = (
        recovery.TELL_MS / 1000 + recovery.PAUSE_SECONDS_MAX + answer
    )  # by who lives, and could not reach it before
    grace = 2 * commit.GRACE_MS / 1000  # an initiator without an answer, after its time


class Process:
    """One of `tests.txn.failing`."""

    def __init__(self, role: str, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.txn.failing", role],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._is_open = False
        self.tell(settings)

    def tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def go_on(self) -> None:
        """Where it waits."""
        self.tell({})

    def said(self) -> str:
        """Its next line; empty when it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ready(self) -> Process:
        if not self._is_open:
            assert self.said() == "open"
            self._is_open = True
        return self

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def died(self) -> None:
        """It has killed itself, or was killed."""
        assert self.said() == ""
        assert self._process.wait() == -signal.SIGKILL

    def kill(self) -> None:
        self._process.kill()
        self.died()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


_numbers = itertools.count(1)


class _PostgreSQLPlace:
    def __init__(self, server: PostgreSQLServer, name: str) -> None:
        self.server = server
        self._name = name
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        self.execute("CREATE TABLE transfers (number text PRIMARY KEY, amount bigint NOT NULL)")

    def execute(self, sql: str) -> list[Any]:
        with psycopg.connect(self.where(), autocommit=True) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def where(self, through: str = "") -> str:
        """What the resource is opened with; through this socket."""
        dsn = self.server.dsn(self._name)
        return dsn.replace(str(self.server.directory), os.path.dirname(through)) if through else dsn

    def rows(self) -> dict[str, int]:
        return dict(self.execute("SELECT number, amount FROM transfers"))

    def prepared(self) -> list[str]:
        sql = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        return [gid for (gid,) in self.execute(sql)]

    def end_by_hand(self, verb: str) -> None:
        """As an administrator: COMMIT or ROLLBACK all that is prepared."""
        for gid in self.prepared():
            self.execute(f"{verb} PREPARED '{gid}'")

    def resource(self, name: str) -> Any:
        return PostgreSQL(name, self.where(), is_durable=False)


class _MariaDBPlace:
    def __init__(self, server: MariaDBServer, name: str) -> None:
        self.server = server
        self._name = name.replace("-", "_")
        with pymysql.connect(**server.options()) as connection, connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {self._name}")
        self.execute("CREATE TABLE transfers (number VARCHAR(40) PRIMARY KEY, amount BIGINT NOT NULL)")

    def execute(self, sql: str) -> Any:
        with self.connect(autocommit=True) as connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()

    def connect(self, **parameters: Any) -> Any:
        """By a socket of our own: the driver forgets to close that of an attempt that is refused."""
        connection = pymysql.connect(**self.where(), **parameters, defer_connect=True)
        unix = socket.socket(socket.AF_UNIX)
        try:
            unix.connect(str(self.server.socket))
            connection.connect(unix)
        except OSError as error:
            unix.close()
            raise pymysql.OperationalError(2003, str(error)) from error
        except BaseException:
            unix.close()
            raise
        return connection

    def where(self, through: str = "") -> dict[str, Any]:
        return self.server.options(self._name)

    def rows(self) -> dict[str, int]:
        return dict(self.execute("SELECT number, amount FROM transfers"))

    def prepared(self) -> list[str]:
        found = []
        for format_id, gtrid_size, _, data in self.execute("XA RECOVER"):
            raw = data if isinstance(data, bytes) else data.encode("latin-1")
            found.append(f"X'{raw[:gtrid_size].hex()}',X'{raw[gtrid_size:].hex()}',{format_id}")
        return found

    def resource(self, name: str) -> Any:
        return MariaDB(name, is_durable=False, connect=self.connect)


class Stage:
    """
    The members, the databases, and this process as one that has them registered.

    Args:
        mariadb: Where the third database is; it is left out of what takes part unless a test asks for it.
        links: What the processes reach each other and the databases through, instead of directly: they are "initiator",
            "host", and this one, "test".
        program: What the members run.
    """

    def __init__(
        self,
        server: PostgreSQLServer,
        directory: Path,
        name: str,
        *,
        mariadb: MariaDBServer | None = None,
        links: Links | None = None,
        program: str = "benchmarks.application",
    ) -> None:
        self.directory = directory
        self.links = links
        # A worker that takes over tests of another may build the stage of a module twice, on the same servers.
        name = f"{name}-{next(_numbers)}"
        self.databases: dict[str, Any] = {
            place: _PostgreSQLPlace(server, f"{name}-{place}") for place in ("first", "second")
        }
        if mariadb is not None:
            self.databases["third"] = _MariaDBPlace(mariadb, f"{name}-third")
        self._idle: list[Process] = []
        self._processes: list[Process] = []
        self._host: Process | None = None
        self._ended: dict[str, list[str]] = {}
        self.fleet = Fleet(
            str(directory), members=3, session_ttl=SESSION_TTL_SECONDS, program=program, links=links
        )
        self.cluster = self.client()
        self.resources: dict[str, Any] = {}

    def __enter__(self) -> Stage:
        self.fleet.__enter__()
        try:
            self._idle.append(self._start("initiator"))
            self._host = self._start("host")
            self.cluster.start()
            for name, place in self.databases.items():
                self.resources[name] = self.cluster.resource(place.resource(name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.links is not None:
            self.links.heal()  # whoever waits for something that was cut off would not end
        self.cluster.close(timeout=1)
        for resource in self.resources.values():
            resource.close()
        for process in self._processes:
            process.end()
        self.fleet.close()

    # -- processes

    def _start(self, role: str) -> Process:
        links = self.links
        endpoints = self.fleet.endpoints if links is None else links.endpoints(role)
        settings = {
            "endpoints": list(endpoints.values()),
            "secret": self.fleet.secret,
            "session_ttl": SESSION_TTL_SECONDS,
            "search_every_ms": SEARCH_EVERY_MS,
            "databases": {
                name: place.where("" if links is None else links.socket(role, name))
                for name, place in self.databases.items()
            },
            "directory": str(self.directory / "vault"),
            "notes": str(self.directory / "notes.db"),
        }
        process = Process(role, settings)
        self._processes.append(process)
        return process

    def host(self, crash: str = "") -> Process:
        """The service's process, started again if it had died; it is to die there."""
        if self._host is None or self._host.has_ended:
            self._host = self._start("host")
        self._host.ready()
        if crash:
            self._host.tell({"crash": crash})
            assert self._host.said() == "armed"
        return self._host

    def transfer(
        self,
        number: str,
        places: list[str] = EVERYWHERE,
        *,
        crash: str = "",
        pause: str = "",
        does: str = "",
        timeout: float = 30.0,
        with_notes: bool = False,
    ) -> Process:
        """An initiator that was told to make this transfer: what it says next is how that ended, or "waiting"."""
        if "vault" in places:
            self.host()
        process = self._idle.pop() if self._idle else self._start("initiator")
        process.ready()
        process.tell(
            {
                "number": number,
                "places": places,
                "crash": crash,
                "pause": pause,
                "does": does,
                "timeout": timeout,
                "with_notes": with_notes,
            }
        )
        if crash:
            self._idle.append(self._start("initiator"))  # while that one dies
        return process

    def all_ready(self) -> None:
        """Nobody is just starting, and would miss what is about to be killed."""
        self.host()
        for process in self._idle:
            process.ready()

    def rest(self, process: Process) -> None:
        """An initiator that is done, and can make the next transfer."""
        self._idle.append(process)

    # -- what there is

    def books(self) -> dict[str, dict[str, int]]:
        """What every transfer has changed, by place."""
        found = {name: place.rows() for name, place in self.databases.items()}
        path = self.directory / "vault" / "vault"
        lines = path.read_text().splitlines() if path.exists() else []
        found["vault"] = {line.split()[0]: int(line.split()[1]) for line in lines}
        assert len(found["vault"]) == len(lines), "something is in the vault twice"
        found["map"] = dict(self.cluster.map("transfers").items())
        return found

    def found(self, number: str) -> list[str]:
        """Where the transfer is."""
        return self._found(self.books(), number)

    def _found(self, books: dict[str, dict[str, int]], number: str) -> list[str]:
        return [place for place in PLACES if number in books.get(place, {})]

    def prepared(self) -> list[str]:
        """What the databases hold prepared."""
        return [gid for place in self.databases.values() for gid in place.prepared()]

    def pending(self) -> list[Any]:
        """Transactions that somebody has not obeyed."""

        def ask() -> OpGen[Any]:
            body = commands.query_tx_list(None, 100, True)
            reply = yield Step(RequestKind.QUERY, body, monotonic_ms() + 10_000)
            return commands.decode_reply(reply)[0]

        return list(self.cluster._run(ask()))

    def log_time_ms(self) -> int:
        def ask() -> OpGen[int]:
            reply = yield Step(RequestKind.QUERY, commands.query_time(), monotonic_ms() + 10_000)
            time_ms: int = commands.decode_reply(reply)[0]
            return time_ms

        return self.cluster._run(ask())

    def client(self) -> coordlib.Cluster:
        """A handle more."""
        endpoints = list(self.fleet.endpoints.values())
        return coordlib.connect(endpoints, cluster="bench", secret=self.fleet.secret)

    # -- waiting

    def until(self, is_so: Callable[[], object], within: float) -> None:
        for _ in self._looks(within, is_so):
            if is_so():
                return

    def _looks(self, within: float, what: Callable[[], object]) -> Iterator[None]:
        deadline = time.monotonic() + within
        while True:
            yield
            assert time.monotonic() < deadline, f"after {within:.1f} s: {what()}"
            time.sleep(0.05)  # between two looks; what is waited for is others' recovery

    def await_end(self, number: str, places: list[str], within: float) -> None:
        """
        Until nothing is in doubt and the transfer is exactly there. It must never be seen where it is not to be.

        Then all books must agree.
        """
        self.await_ends({number: places}, within)

    def await_ends(self, wanted: dict[str, list[str]], within: float) -> None:
        """Of several."""
        last: list[Any] = [wanted]
        for _ in self._looks(within, lambda: last):
            books = self.books()
            found = {number: self._found(books, number) for number in wanted}
            for number, places in wanted.items():
                assert set(found[number]) <= set(places), f"{number} is half done, or not as decided: {found}"
            left = [*self.prepared(), *self.pending()]
            if found == wanted and not left:
                break
            last[1:] = found, left
        self._ended |= wanted
        self.check_books()

    def check_books(self) -> None:
        """Every transfer that has ended is where it ended, and nowhere else; what is whole sums up to 0."""
        books = self.books()
        for number, places in self._ended.items():
            changes = {place: rows[number] for place, rows in books.items() if number in rows}
            assert sorted(changes) == sorted(places), f"{number} was in {places}, and is in {changes}"
        total = sum(
            change
            for rows in books.values()
            for number, change in rows.items()
            if number in self._ended and not number.startswith("broken")
        )
        assert total == 0
