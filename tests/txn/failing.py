"""Processes that take part in one transaction and are killed at a named point of it. See test_failure_table.

    python -m tests.txn.failing initiator|host        with its settings as one JSON object on the first line of its input

Where it is to die is one of the names in `CRASHES`: something of the library is wrapped so that the process kills itself
there, as kill -9 does. It says "open" when it is ready, an initiator then how its transaction ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import coordlib
from benchmarks.tellers import Vault
from coordlib.api import coordinator
from coordlib.txn import commit, journal, members
from coordlib.txn.resources import PostgreSQL, SQLite

__all__ = ["CRASHES"]


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


def _dies_around_the_last_resource(*, is_after: bool) -> None:
    original = members.LocalMember.decide

    def decide(self: members.LocalMember, gtid: bytes) -> Any:
        do = original(self, gtid)
        call = do.call
        do.call = lambda: (call() if is_after else None, die())
        return do

    members.LocalMember.decide = decide  # type: ignore[method-assign]


CRASHES: Final[dict[str, Callable[[], None]]] = {
    "": lambda: None,
    "before-prepare": lambda: None,  # in the block itself
    "after-prepare": lambda: _dies_before(commit, "_commit_prepared_gen"),
    "after-decide": lambda: _dies_before(commit, "finish_gen"),
    "before-last-resource": lambda: _dies_around_the_last_resource(is_after=False),
    "after-last-resource": lambda: _dies_around_the_last_resource(is_after=True),
    "host-called": lambda: _dies_before(Vault, "book"),
    "host-promised": lambda: _dies_after(journal.JournalBranch, "prepare"),
    "host-told": lambda: _dies_before(Vault, "commit"),
    "host-obeyed": lambda: _dies_after(journal.JournalResource, "obey"),
}


def _transfer(cluster: coordlib.Cluster, given: dict[str, Any]) -> None:
    number = given["number"]
    databases = [
        cluster.resource(PostgreSQL(name, dsn, is_durable=False)) for name, dsn in given["dsns"].items()
    ]
    notes = cluster.resource(SQLite("notes", given["notes"])) if given["notes"] else None
    vault = cluster.service("vault")
    say("open")
    if not number:
        sys.stdin.read()  # it has come back to finish what it left
        return
    try:
        with cluster.transaction(timeout=given["timeout"]) as tx:
            if notes is not None:
                connection = tx.enlist(notes)
                connection.execute("CREATE TABLE IF NOT EXISTS transfers (number TEXT PRIMARY KEY)")
                connection.execute("INSERT INTO transfers VALUES (?)", (number,))
            else:
                cluster.map("transfers")[number] = 1
            for database, amount in zip(databases, (-5, 3), strict=True):
                tx.enlist(database).execute("INSERT INTO transfers VALUES (%s, %s)", (number, amount))
            vault.book(number, 1)
            if given["crash"] == "before-prepare":
                die()
    except coordlib.TransactionAborted as error:
        say(f"aborted {error.reason}")
    except coordlib.CoordError as error:
        say(f"{type(error).__name__}")
    else:
        say("committed")
    sys.stdin.read()


def main() -> None:
    given = json.loads(sys.stdin.readline())
    CRASHES[given["crash"]]()
    coordinator.SEARCH_EVERY_MS = coordinator.SEARCH_AGAIN_MS = given["search_every_ms"]  # type: ignore[misc]
    with coordlib.connect(
        given["endpoints"], cluster="bench", secret=given["secret"], session_ttl=given["session_ttl"]
    ) as cluster:
        if sys.argv[1] == "initiator":
            _transfer(cluster, given)
            return
        directory = Path(given["directory"])
        directory.mkdir(exist_ok=True)
        cluster.participant("vault", directory=directory)(Vault(cluster, str(directory / "vault")))
        say("open")
        sys.stdin.read()


if __name__ == "__main__":
    main()
