"""What a transaction over two PostgreSQL databases costs, beside the same two-phase commit by hand.

By hand: psycopg, two connections that are kept, both branches prepared and then both committed at the same time (a
thread that waits for work does the second), and no log of any coordinator's: nobody finishes what such a program
leaves behind when it dies. Runs inside an application of `benchmarks.application`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter_ns
from typing import Any, Final

import psycopg

import coordlib
from coordlib.txn.resources import PostgreSQL

__all__ = ["ACCOUNTS", "Tellers", "create_accounts"]

ACCOUNTS: Final = 64
_UPDATE: Final = "UPDATE accounts SET balance = balance + %s WHERE id = %s"


def create_accounts(dsn: str) -> None:
    """The table that both ways work on."""
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL)")
        connection.execute("INSERT INTO accounts SELECT i, 0 FROM generate_series(0, %s) i", (ACCOUNTS - 1,))


class _ByHand:
    """One thread's two connections, and the thread that does the second half."""

    def __init__(self, dsns: list[str], name: str) -> None:
        self._connections = [psycopg.connect(dsn) for dsn in dsns]
        self._other = ThreadPoolExecutor(1)
        self._name = name
        self._number = 0

    def transfer(self, account: int) -> None:
        first, second = self._connections
        self._number += 1
        for place, (connection, amount) in enumerate(((first, -1), (second, 1))):
            connection.tpc_begin(connection.xid(7, f"{self._name}-{self._number}", str(place)))
            connection.execute(_UPDATE, (amount, account))
        for phase in ("tpc_prepare", "tpc_commit"):
            other = self._other.submit(getattr(second, phase))
            getattr(first, phase)()
            other.result()

    def close(self) -> None:
        self._other.shutdown()
        for connection in self._connections:
            connection.close()


class Tellers:
    """Transfers between two databases, one after another or by several threads."""

    def __init__(self, cluster: coordlib.Cluster, dsns: list[str]) -> None:
        self._cluster = cluster
        self._dsns = dsns
        self._databases = [
            cluster.resource(PostgreSQL(f"bank-{number}", dsn, idle_max=32))
            for number, dsn in enumerate(dsns)
        ]
        self._runs = 0

    def _transfer(self, account: int, ack: str) -> None:
        first, second = self._databases
        with self._cluster.transaction(timeout=30, ack=ack) as tx:
            tx.enlist(first).execute(_UPDATE, (-1, account))
            tx.enlist(second).execute(_UPDATE, (1, account))

    def run(self, way: str, *, threads: int, count: int) -> dict[str, Any]:
        """
        `count` transfers in all, each thread on accounts of its own.

        Args:
            way: "hand", or what `Cluster.transaction` knows as `ack`.
        """
        self._runs += 1
        by_hand = [
            _ByHand(self._dsns, f"hand-{id(self):x}-{self._runs}-{number}")
            for number in range(threads if way == "hand" else 0)
        ]
        samples: list[list[int]] = [[] for _ in range(threads)]
        errors: list[BaseException] = []
        ready = threading.Barrier(threads + 1)

        def work(number: int) -> None:
            once: Callable[[int], None] = (
                by_hand[number].transfer if by_hand else lambda account: self._transfer(account, way)
            )
            own = samples[number]
            each = ACCOUNTS // threads
            ready.wait()
            try:
                for turn in range(count // threads):
                    began = perf_counter_ns()
                    once(number * each + turn % each)
                    own.append((perf_counter_ns() - began) // 1000)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        ready.wait()
        began = perf_counter_ns()
        for worker in workers:
            worker.join()
        seconds = (perf_counter_ns() - began) / 1e9
        for one in by_hand:
            one.close()
        if errors:
            raise errors[0]
        return {"samples_us": [sample for own in samples for sample in own], "seconds": seconds}
