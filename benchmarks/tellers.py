"""What the processes of `make bank` do: transfers between accounts that lie in different kinds of stores.

Every transfer leaves a row under its own number in each store that it touches, in the same transaction as the money. So it
can be seen afterwards of each single transfer whether all of it happened or nothing: the sums alone could hide two
errors. The tellers note outside of coordlib what they began, and what they were told::

    begin NUMBER STORE STORE AMOUNT      before anything is asked for
    done NUMBER                          the transaction's block ended without an error
    not NUMBER                           TransactionAborted, or an error in the block: nothing of it may have happened
    unsure NUMBER                        anything else

A vault is a service without a database: its handler writes what is committed to a file of its own, once for each number,
however often it is told.
"""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import coordlib
from benchmarks.load import Notes
from coordlib.errors import CoordError, DefiniteError, TransactionAborted, UsageError
from coordlib.txn.resources import PostgreSQL

__all__ = ["ACCOUNTS", "STORES", "Bank", "create_accounts"]

ACCOUNTS: Final = 20
STORES: Final = ("first", "second", "map", "vault")
THREADS: Final = 3
TIMEOUT_SECONDS: Final = 4.0
PAUSE_SECONDS: Final = 0.02
OPEN_EVERY_SECONDS: Final = 0.5


def create_accounts(dsn: str) -> None:
    """The tables of one database; every account has nothing."""
    import psycopg

    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL)")
        connection.execute("CREATE TABLE transfers (number text PRIMARY KEY, amount bigint NOT NULL)")
        connection.execute("INSERT INTO accounts SELECT i, 0 FROM generate_series(0, %s) i", (ACCOUNTS - 1,))


class Vault:
    """Accounts of a service in a file: NUMBER CHANGE a line, synced before a commit returns."""

    def __init__(self, cluster: coordlib.Cluster, path: str) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if text and not text.endswith("\n"):
            # The end of a line that was being written when the process died; what it said comes again.
            os.ftruncate(self._fd, text.rfind("\n") + 1)
        self._known = {line.split()[0] for line in text.splitlines(keepends=True) if line.endswith("\n")}

    def book(self, number: str, change: int) -> None:
        with self._cluster.transaction() as tx:
            tx.notes["line"] = f"{number} {change}"

    def prepare(self, tx: Any) -> bytes | None:
        line: str | None = tx.notes.get("line")
        return None if line is None else line.encode()

    def restore(self, redo: bytes) -> None:
        """Nothing is reserved: accounts may be overdrawn."""

    def commit(self, redo: bytes) -> None:
        number = redo.decode().split()[0]
        with self._lock:
            if number not in self._known:
                os.write(self._fd, redo + b"\n")
                os.fdatasync(self._fd)
                self._known.add(number)

    def abort(self, redo: bytes) -> None:
        pass


class Bank:
    """
    The tellers of one process, and its vault.

    Args:
        directory: For the vault and its journal.
    """

    def __init__(
        self,
        cluster: coordlib.Cluster,
        *,
        dsns: dict[str, str],
        notes: str,
        name: str,
        seed: int,
        directory: str,
    ) -> None:
        self._cluster = cluster
        self._dsns = dsns
        self._databases: dict[str, PostgreSQL] = {}
        self._balances = cluster.map("balances")
        self._transfers = cluster.map("transfers")
        self._vaults = cluster.service("vault")
        os.makedirs(directory, exist_ok=True)
        cluster.participant("vault", directory=directory)(Vault(cluster, os.path.join(directory, "vault")))
        self._stop = threading.Event()
        self._name = f"{name}.{os.getpid()}"
        self._notes = notes
        self._lock = threading.Lock()
        self.outcomes: dict[str, int] = {}
        self.waits: list[float] = []
        work: list[Callable[[], None]] = [self._open]
        for number in range(THREADS):
            work.append(functools.partial(self._work, number, random.Random(f"{seed}-{number}")))
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def _open(self) -> None:
        """Register the databases, however long they are away."""
        while len(self._databases) < len(self._dsns):
            for name, dsn in self._dsns.items():
                if name not in self._databases:
                    try:
                        database = self._cluster.resource(
                            PostgreSQL(name, dsn, is_durable=False, connect_timeout=3)
                        )
                    except UsageError:
                        raise
                    except Exception as error:
                        self._count(f"open: {type(error).__name__}")
                        continue
                    self._databases[name] = database
            if self._stop.wait(OPEN_EVERY_SECONDS):
                return

    def _work(self, place: int, chance: random.Random) -> None:
        notes = Notes(os.path.join(self._notes, f"{self._name}-{place}"))
        count = 0
        while not self._stop.wait(chance.random() * PAUSE_SECONDS):
            stores = [store for store in STORES if store in ("map", "vault") or store in self._databases]
            if len(stores) < 2:
                continue
            source, target = chance.sample(stores, 2)
            count += 1
            number = f"{self._name}-{place}-{count}"
            amount = chance.randrange(1, 100)
            accounts = chance.randrange(ACCOUNTS), chance.randrange(ACCOUNTS)
            notes.add(f"begin {number} {source} {target} {amount}")
            began = monotonic()
            outcome = self._transfer(number, (source, target), accounts, amount, chance)
            self.waits.append(monotonic() - began)
            notes.add(f"{outcome} {number}")

    def _transfer(
        self,
        number: str,
        stores: tuple[str, str],
        accounts: tuple[int, int],
        amount: int,
        chance: random.Random,
    ) -> str:
        ack = chance.choice(("applied", "decided"))
        try:
            with self._cluster.transaction(timeout=TIMEOUT_SECONDS, ack=ack) as tx:
                for store, account, change in zip(stores, accounts, (-amount, amount), strict=True):
                    self._book(tx, store, account, change, number)
        except TransactionAborted as error:
            self._count(f"aborted: {error.details.get('reason', '')}")
            return "not"
        except DefiniteError as error:
            self._count(f"in the block: {type(error).__name__}")
            return "not"
        except CoordError as error:
            self._count(type(error).__name__)
            return "unsure"
        except Exception as error:
            # A database that is away, for example: it was raised in the block, so that nothing was committed.
            self._count(f"in the block: {type(error).__name__}")
            return "not"
        self._count("committed")
        return "done"

    def _book(self, tx: Any, store: str, account: int, change: int, number: str) -> None:
        if store == "map":
            key = str(account)
            self._balances[key] = self._balances.get(key, 0) + change
            self._transfers[number] = change
            return
        if store == "vault":
            self._vaults.book(number, change)
            return
        connection = tx.enlist(self._databases[store])
        connection.execute("UPDATE accounts SET balance = balance + %s WHERE id = %s", (change, account))
        connection.execute("INSERT INTO transfers VALUES (%s, %s)", (number, change))

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(3 * TIMEOUT_SECONDS)
