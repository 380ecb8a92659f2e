"""
An order service with an embedded coordlib member: what `coordlib demo` starts three times.

Its sellers count sold goods, one lock for each kind of goods; its order takers write orders under keys of
their own. Both keep records outside of coordlib, in $ORDERS_RECORDS, from which anyone can check afterwards
what coordlib promised:

    locks.log        all processes append: enter TIME LOCK TOKEN PID WORKER, leave ... OUTCOME
    acks-*.log       one for each order taker: TIME KEY VALUE, written after the put had returned

It is a member as COORDLIB_* say, and reads commands from its standard input until that ends:

    stop             end all work; answers "stopped"
    read FROM TO     read the keys in file FROM ("map key" a line) as *this* member has applied them, write
                     "map key value" to file TO; answers "read"
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time

import coordlib

GOODS = ("apples", "pears", "plums")
SELLERS = 3
ORDER_TAKERS = 2
PAUSE_SECONDS = 0.004
JOIN_SECONDS = 12.0

SABOTAGE = os.environ.get("ORDERS_SABOTAGE", "")  # "lock" or "ack": break it, so that the checks must fail


class Journal:
    """Lines appended with one write each: the kernel keeps their order, across processes too."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


class Service:
    def __init__(self, cluster: coordlib.Cluster, records: str) -> None:
        self.cluster = cluster
        self.records = records
        self.stopping = threading.Event()
        self.locks_journal = Journal(os.path.join(records, "locks.log"))
        self.stock = cluster.map("sold")
        self.orders = cluster.map("orders")
        work = [(self.sell, number) for number in range(SELLERS)]
        work += [(self.take_orders, number) for number in range(ORDER_TAKERS)]
        self.threads = [threading.Thread(target=run, args=(number,), daemon=True) for run, number in work]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(JOIN_SECONDS)

    def sell(self, number: int) -> None:
        """Count one more sold, under the lock of its kind."""
        old_grant: coordlib.Grant | None = None
        for item in itertools.islice(itertools.cycle(GOODS), number, None):
            if self.stopping.wait(PAUSE_SECONDS):
                return
            try:
                if old_grant is not None:
                    self.sell_without_lock(old_grant, number)
                    continue
                with self.cluster.lock(item, timeout=5) as grant:
                    self.sell_one(item, grant, number)
                if SABOTAGE == "lock" and number == 0:
                    old_grant = grant
            except coordlib.ClusterClosed:
                return
            except coordlib.CoordError as error:
                # Whatever it was, it is on record as "unknown" or "refused"; the next customer is waiting.
                logging.info("seller %d: %s", number, error)

    def sell_one(self, item: str, grant: coordlib.Grant, number: int) -> None:
        who = (item, grant.token, os.getpid(), number)
        self.locks_journal.note("enter", time.monotonic_ns(), *who)
        outcome = "unknown"
        try:
            sold = self.stock.get(item, 0)
            self.stock.put(item, sold + 1, guard=grant)
            outcome = "done"
        except coordlib.DefiniteError:
            outcome = "refused"
            raise
        finally:
            self.locks_journal.note("leave", time.monotonic_ns(), *who, outcome)

    def sell_without_lock(self, grant: coordlib.Grant, number: int) -> None:
        """What a careless program does: go on with a grant that it has given back, and guard nothing."""
        who = (grant.name, grant.token, os.getpid(), number)
        self.locks_journal.note("enter", time.monotonic_ns(), *who)
        sold = self.stock.get(grant.name, 0)
        time.sleep(0.05)
        self.stock.put(grant.name, sold + 1)
        self.locks_journal.note("leave", time.monotonic_ns(), *who, "done")

    def take_orders(self, number: int) -> None:
        """Write orders under keys of this thread's own, and note each one after its put has returned."""
        prefix = f"{os.getpid()}-{number}"
        acknowledged = Journal(os.path.join(self.records, f"acks-{prefix}.log"))
        for count in itertools.count():
            if self.stopping.wait(PAUSE_SECONDS):
                return
            key = f"{prefix}-{count}"
            try:
                if not (SABOTAGE == "ack" and count % 50 == 7):
                    self.orders.put(key, count)
            except coordlib.ClusterClosed:
                return
            except coordlib.CoordError as error:
                logging.info("order taker %d: %s", number, error)
                continue
            acknowledged.note(time.monotonic_ns(), key, count)

    def read(self, source: str, target: str) -> None:
        """Write down what this member has applied, without asking the others."""
        with open(source, encoding="utf-8") as names, open(target, "w", encoding="utf-8") as found:
            for line in names:
                map_name, key = line.split()
                value = self.cluster.map(map_name).read_stale(key)
                found.write(f"{map_name} {key} {value}\n")


def answer(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    records = os.environ.get("ORDERS_RECORDS", "records")
    os.makedirs(records, exist_ok=True)
    try:
        with coordlib.Cluster.from_env() as cluster:
            service = Service(cluster, records)
            service.start()
            answer("open")
            try:
                for line in sys.stdin:
                    command, *words = line.split()
                    if command == "stop":
                        service.stop()
                        answer("stopped")
                    elif command == "read":
                        service.read(*words)
                        answer("read")
            except KeyboardInterrupt:
                pass
            service.stop()
    except coordlib.CoordError as error:
        print(f"orders service: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
