"""Processes that take part in transactions, and die or wait at a named point of one. Driven by `tests.txn.stage`.

    python -m tests.txn.failing initiator|host        with its settings as one JSON object on the first line of its input

Both say "open" when they are ready; then each line is one JSON object. Of an initiator it is a transfer, and what it says
is how that ended; of a host, where it is to die. Where is one of the names in `CRASHES`: something of the library is
wrapped so that the process kills itself there, as kill -9 does. Where a transfer is to wait, one of `PAUSES`, it says so
and goes on at the next line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psycopg

import coordlib
from benchmarks.tellers import Vault
from coordlib.api import coordinator
from coordlib.node.links import Links
from coordlib.txn import commit, journal, members
from coordlib.txn.resources import PostgreSQL, SQLite
from coordlib.txn.resources.postgresql import PostgreSQLBranch

__all__ = ["CRASHES", "PAUSES", "shares"]


def shares(places: list[str]) -> dict[str, int]:
    """What a transfer changes in each place: the first one pays all others. The sum is 0."""
    return {place: 1 if number else 1 - len(places) for number, place in enumerate(places)}


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_after(owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        die()

    setattr(owner, name, wrapped)


def _dies_before(owner: Any, name: str) -> None:
    setattr(owner, name, die)


def _dies_after_one_promise() -> None:
    original = PostgreSQLBranch._prepare_gen  # blocking and polled alike

    def prepare(self: PostgreSQLBranch) -> Any:
        yield from original(self)
        die()

    PostgreSQLBranch._prepare_gen = prepare  # type: ignore[method-assign, assignment]


def _dies_around_the_last_resource(*, is_after: bool) -> None:
    original = members.LocalMember.decide

    def decide(self: members.LocalMember, gtid: bytes) -> Any:
        do = original(self, gtid)
        call = do.call
        do.call = lambda: (call() if is_after else None, die())
        return do

    members.LocalMember.decide = decide  # type: ignore[method-assign]


def _waits_before(owner: Any, name: str, is_meant: Callable[..., bool] = lambda *_: True) -> None:
    """Once: the next transfer is not stopped."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_meant(*args):
            setattr(owner, name, original)
            say("waiting")
            sys.stdin.readline()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


class _Vault(Vault):
    def begins(self) -> None:
        pass

    def book(self, number: str, change: int) -> None:
        self.begins()
        super().book(number, change)


CRASHES: Final[dict[str, Callable[[], None]]] = {
    "": lambda: None,
    "before-prepare": lambda: None,  # in the block itself
    "after-one-promise": _dies_after_one_promise,
    "after-prepare": lambda: _dies_before(commit, "_commit_prepared_gen"),
    "after-decide": lambda: _dies_before(commit, "finish_gen"),
    "before-last-resource": lambda: _dies_around_the_last_resource(is_after=False),
    "after-last-resource": lambda: _dies_around_the_last_resource(is_after=True),
    "host-called": lambda: _dies_before(_Vault, "begins"),
    "host-promised": lambda: _dies_after(journal.JournalBranch, "prepare"),
    "host-told": lambda: _dies_before(Vault, "commit"),
    "host-obeyed": lambda: _dies_after(journal.JournalResource, "obey"),
}


def _is_second(branch: PostgreSQLBranch, *_: Any) -> bool:
    return branch.resource.name == "second"


PAUSES: Final[dict[str, Callable[[], None]]] = {
    "": lambda: None,
    "before-prepare": lambda: _waits_before(PostgreSQLBranch, "_take_down", _is_second),
    "before-decide": lambda: _waits_before(commit, "_decide_body"),  # everybody has promised
    "after-decide": lambda: _waits_before(commit, "finish_gen"),
    "before-one-phase": lambda: _waits_before(PostgreSQLBranch, "_end_locally_gen"),
}


def _open(cluster: coordlib.Cluster, name: str, where: Any) -> Any:
    if isinstance(where, str):
        return cluster.resource(PostgreSQL(name, where, is_durable=False))
    from coordlib.txn.resources.mariadb import MariaDB

    return cluster.resource(MariaDB(name, is_durable=False, **where))


class Initiator:
    def __init__(self, cluster: coordlib.Cluster, given: dict[str, Any]) -> None:
        self._cluster = cluster
        self._databases = {name: _open(cluster, name, where) for name, where in given["databases"].items()}
        self._notes = given["notes"]
        self._last_resource: Any = None

    def transfer(self, given: dict[str, Any]) -> str:
        CRASHES[given["crash"]]()
        PAUSES[given["pause"]]()
        if given["with_notes"] and self._last_resource is None:
            self._last_resource = self._cluster.resource(SQLite("notes", self._notes))
        if not given["places"]:
            return "here"  # it has come back for what it had left
        gtid = b""
        try:
            with self._cluster.transaction(timeout=given["timeout"]) as tx:
                self._book(tx, given)
                gtid = tx.gtid
                if given["crash"] == "before-prepare":
                    die()
        except coordlib.TransactionAborted as error:
            return f"aborted {error.reason}"
        except coordlib.CoordError as error:
            return f"{type(error).__name__} {gtid.hex()}".strip()
        return "committed"

    def _book(self, tx: coordlib.Transaction, given: dict[str, Any]) -> None:
        number = given["number"]
        if given["with_notes"]:
            connection = tx.enlist(self._last_resource)
            connection.execute("CREATE TABLE IF NOT EXISTS transfers (number TEXT PRIMARY KEY)")
            connection.execute("INSERT INTO transfers VALUES (?)", (number,))
        for place, change in shares(given["places"]).items():
            if place == "map":
                self._cluster.map("transfers")[number] = change
            elif place == "vault":
                self._cluster.service("vault").book(number, change)
            else:
                connection = tx.enlist(self._databases[place])
                cursor = connection.cursor()
                cursor.execute("INSERT INTO transfers VALUES (%s, %s)", (number, change))
                if given["does"] == "swallow":
                    try:
                        cursor.execute("SELECT no_such_column")
                    except psycopg.Error:
                        pass
        if given["does"] == "fork":
            self._fork(tx, given["places"])

    def _fork(self, tx: coordlib.Transaction, places: list[str]) -> None:
        """A child tries to go on with the transaction: everything is refused to it, and the parent goes on."""
        child = os.fork()
        if not child:
            code = 1
            try:
                cluster, database = self._cluster, self._databases[places[0]]
                tries: list[Callable[[], Any]] = [
                    tx.remaining,
                    tx.commit,
                    lambda: tx.enlist(database),
                    lambda: cluster.map("transfers").get("x"),
                    lambda: cluster.service("vault").book("x", 1),
                    cluster.transaction().begin,
                ]
                refused = 0
                for one in tries:
                    try:
                        one()
                    except coordlib.ForkedError:
                        refused += 1
                code = 0 if refused == len(tries) else 1
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError("the child was let in")


def main() -> None:
    given = json.loads(sys.stdin.readline())
    coordinator.SEARCH_EVERY_MS = coordinator.SEARCH_AGAIN_MS = given["search_every_ms"]  # type: ignore[misc]
    # It is told of all members; by ways that members have to each other a cut would be gone round.
    Links.connect_missing = lambda self, endpoints: None  # type: ignore[method-assign]
    with coordlib.connect(
        given["endpoints"], cluster="bench", secret=given["secret"], session_ttl=given["session_ttl"]
    ) as cluster:
        if sys.argv[1] == "initiator":
            initiator = Initiator(cluster, given)
            say("open")
            for line in sys.stdin:
                say(initiator.transfer(json.loads(line)))
            return
        directory = Path(given["directory"])
        directory.mkdir(exist_ok=True)
        cluster.participant("vault", directory=directory)(_Vault(cluster, str(directory / "vault")))
        say("open")
        for line in sys.stdin:
            CRASHES[json.loads(line)["crash"]]()
            say("armed")


if __name__ == "__main__":
    main()
