"""
An order over two services, in one transaction: what `coordlib demo` starts for its last scenes, each in its own process.

    placing_orders.py service NAME                       hosts a service that keeps what it has in a file
    placing_orders.py service NAME postgres CONNINFO     the same in a PostgreSQL database, in its table "taken"
    placing_orders.py service NAME mariadb OPTIONS       the same in MariaDB; what pymysql.connect takes, as JSON
    placing_orders.py desk                               places orders over the services "inventory" and "billing"

All attach as clients by COORDLIB_ENDPOINTS, COORDLIB_CLUSTER and COORDLIB_SECRET, keep their files in $ORDERS_RECORDS, and end
with their standard input. A service without a database tells what becomes of its promises. With "hold" on its input a service
stops when it is told to commit ("told"), so that it can be killed there. The desk takes these:

    order ID     begins an order, and stops when everybody has been asked for a promise: "asked"
    go           lets it go on to the decision: "decided", or "aborted" and why
    notes ID     the same as "order", with a row in an SQLite database, which cannot promise and so decides

To be read first: `Desk.place`, which is the transaction, and `Depot` and `Shelf`, the two ways to take part in it. The rest is
there to stop them in the middle.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import coordlib
from coordlib.txn.branches import PreparedBranch, Vote
from coordlib.txn.resources import SQLite

PIECES = 100
SABOTAGE = os.environ.get("ORDERS_SABOTAGE") == "order"  # what was to be undone is done: the proof must fail
TIMEOUT_SECONDS = 60  # long: whoever is in doubt must not wait for that


def tell(*words: object) -> None:
    print(*words, flush=True)


class Hold:
    """Where a service stops when it is told to commit, so that it can be killed there."""

    is_set = False

    def stop_here(self) -> None:
        if self.is_set:
            tell("told")
            threading.Event().wait()  # until it is killed


class Depot:
    """A service with a database: in its caller's transaction it enlists that, and everything else is not its business."""

    def __init__(self, cluster: coordlib.Cluster, database: Any) -> None:
        self.cluster = cluster
        self.database = database

    def take(self, order: str, count: int) -> None:
        # Joins the caller's transaction.
        with self.cluster.transaction() as tx, tx.enlist(self.database).cursor() as cursor:
            cursor.execute("INSERT INTO taken VALUES (%s, %s)", (order, count))


class Shelf:
    """A service without a database: what it has is in a file of its own, what it promised in coordlib's journal."""

    def __init__(self, cluster: coordlib.Cluster, path: Path, hold: Hold) -> None:
        self.cluster = cluster
        self.path = path
        self.hold = hold
        self.lock = threading.Lock()
        self.taken: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        self.reserved: dict[str, int] = {}

    # What callers call. It joins their transaction, and leaves a note of what was asked for.

    def take(self, order: str, count: int) -> None:
        with self.cluster.transaction() as tx:
            tx.notes["wanted"] = {"order": order, "count": count}

    # How that transaction ends: promise it, then do it or let go of it. Nothing is done twice.

    def prepare(self, tx: Any) -> bytes | None:
        wanted = tx.notes.get("wanted")
        if wanted is None:
            return None
        with self.lock:
            if sum(self.taken.values()) + sum(self.reserved.values()) + wanted["count"] > PIECES:
                raise ValueError("not enough left")
            self.reserved[wanted["order"]] = wanted["count"]
        tell("promised", wanted["order"])
        return json.dumps(wanted).encode()

    def restore(self, redo: bytes) -> None:
        """After a restart: what was promised before still is."""
        wanted = json.loads(redo)
        self.reserved[wanted["order"]] = wanted["count"]

    def commit(self, redo: bytes) -> None:
        self.hold.stop_here()
        self.keep(redo)
        tell("took", json.loads(redo)["order"])

    def keep(self, redo: bytes) -> None:
        wanted = json.loads(redo)
        with self.lock:
            self.reserved.pop(wanted["order"], None)
            self.taken[wanted["order"]] = wanted["count"]
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.taken))
            os.replace(new, self.path)

    def abort(self, redo: bytes) -> None:
        order = json.loads(redo)["order"]
        if SABOTAGE:
            self.keep(redo)
        with self.lock:
            self.reserved.pop(order, None)
        tell("released", order)


class Pause:
    """Takes part in a transaction only to stop it before its decision: it waits when it is asked to promise."""

    name = "pause"
    tag = b"pause"
    bqual = b"pause"
    is_last_resource = False

    def __init__(self, going_on: queue.SimpleQueue[str]) -> None:
        self.resource = self
        self.going_on = going_on

    def prepare(self) -> Vote:
        tell("asked")
        self.going_on.get()
        return Vote.READ_ONLY

    def commit(self) -> None: ...

    def commit_one_phase(self) -> None: ...

    def rollback(self) -> None: ...

    def prepared(self) -> list[PreparedBranch]:
        return []

    def finish(self, branch: PreparedBranch, commit: bool) -> Any: ...


class Stoppable:
    """A database, but its branches stop when they are told to commit and the service is held."""

    def __init__(self, database: Any, hold: Hold) -> None:
        self.database = database
        self.hold = hold

    def __getattr__(self, name: str) -> Any:
        return getattr(self.database, name)

    def begin(self, *arguments: Any) -> Any:
        return StoppableBranch(self.database.begin(*arguments), self.hold)


class StoppableBranch:
    def __init__(self, branch: Any, hold: Hold) -> None:
        self.branch = branch
        self.hold = hold

    def __getattr__(self, name: str) -> Any:
        return None if name.startswith("polled_") else getattr(self.branch, name)

    def commit(self) -> None:
        self.hold.stop_here()
        self.branch.commit()

    def rollback(self) -> None:
        if SABOTAGE:
            self.branch.commit()
        self.branch.rollback()


def open_database(name: str, kind: str, where: str) -> Any:
    if kind == "postgres":
        from coordlib.txn.resources import PostgreSQL

        return PostgreSQL(name, where)
    from coordlib.txn.resources import MariaDB

    return MariaDB(name, **json.loads(where))


class Desk:
    def __init__(self, cluster: coordlib.Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.going_on: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.notes = cluster.resource(SQLite("notes", str(directory / "notes.db")))

    def place(self, order: str, *, with_notes: bool) -> None:
        """All of it, or nothing: whoever dies in the middle."""
        try:
            with self.cluster.transaction(timeout=TIMEOUT_SECONDS, ack="decided") as tx:
                if with_notes:
                    notes = tx.enlist(self.notes)  # first: it will decide for all
                    notes.execute("CREATE TABLE IF NOT EXISTS notes (number TEXT PRIMARY KEY)")
                    notes.execute("INSERT INTO notes VALUES (?)", (order,))
                else:
                    self.cluster.map("orders")[order] = "placed"
                self.cluster.service("inventory").take(order, 1)
                self.cluster.service("billing").take(order, 10)
                tx.enlist(Pause(self.going_on))
        except coordlib.TransactionAborted as error:
            tell("aborted", error.reason)
        except coordlib.CoordError as error:
            tell("failed", error)
        else:
            tell("decided")


def main() -> int:
    role, *rest = sys.argv[1:]
    who = rest[0] if rest else role
    directory = Path(os.environ.get("ORDERS_RECORDS", "records"), who)
    directory.mkdir(parents=True, exist_ok=True)
    hold = Hold()
    cluster = coordlib.connect(
        os.environ["COORDLIB_ENDPOINTS"],
        cluster=os.environ["COORDLIB_CLUSTER"],
        secret=os.environ["COORDLIB_SECRET"],
        session_ttl=float(os.environ.get("COORDLIB_SESSION_TTL", "10")),
        name=who,
    )
    with cluster:
        if len(rest) == 3:
            database = cluster.resource(Stoppable(open_database(*rest), hold))
            cluster.participant(who)(Depot(cluster, database))
        elif role == "service":
            cluster.participant(who, directory=directory)(Shelf(cluster, directory / "taken.json", hold))
        else:
            desk = Desk(cluster, directory)
        tell("open")
        for line in sys.stdin:
            command, *words = line.split()
            if command == "hold":
                hold.is_set = True
                tell("holding")
            elif command == "go":
                desk.going_on.put("go")
            else:
                is_noted = command == "notes"
                threading.Thread(
                    target=desk.place, args=words, kwargs={"with_notes": is_noted}, daemon=True
                ).start()
    return 0


if __name__ == "__main__":
    sys.exit(main())
