"""
Transactions in five minutes: an order that takes goods, money and a line in a replicated map, or nothing of it.

Runs by itself, in one process. In production the two services are other applications of the same cluster, each with
its own journal on its own disk, and nothing in `place` changes; with databases, see the end.
"""

from typing import Any

import coordlib


class Shelf:
    """
    A service that keeps what it has in memory. (One that keeps it in a database enlists that, and has none of the four
    methods below; see docs/databases.md.)
    """

    def __init__(self, cluster: coordlib.Cluster, pieces: int) -> None:
        self.cluster = cluster
        self.pieces = pieces
        self.reserved = 0

    def take(self, count: int) -> int:
        """An operation that others call. In a transaction it only notes what is wanted."""
        with self.cluster.transaction() as tx:  # joins the caller's
            tx.notes["wanted"] = tx.notes.get("wanted", 0) + count
        return self.pieces - self.reserved

    def prepare(self, tx: Any) -> bytes | None:
        """Promise it, whatever happens: what is returned is on the disk before the promise leaves. Or refuse: raise."""
        wanted: int = tx.notes.get("wanted", 0)
        if self.pieces - self.reserved < wanted:
            raise ValueError(f"only {self.pieces - self.reserved} left")
        self.reserved += wanted
        return str(wanted).encode()

    def restore(self, redo: bytes) -> None:
        """After a restart, of each promise whose outcome is not known yet."""
        self.reserved += int(redo)

    def commit(self, redo: bytes) -> None:
        self.reserved -= int(redo)
        self.pieces -= int(redo)

    def abort(self, redo: bytes) -> None:
        self.reserved -= int(redo)


def main() -> None:
    with coordlib.local() as cluster:
        goods, money = Shelf(cluster, 5), Shelf(cluster, 100)
        cluster.participant("inventory")(goods)
        cluster.participant("billing")(money)

        inventory, billing = cluster.service("inventory"), cluster.service("billing")
        orders = cluster.map("orders")

        # Runs again if others changed what it had read of maps, four times in all.
        @cluster.transactional(timeout=5, retries=3)
        def place(order: str, pieces: int, price: int) -> None:
            inventory.take(pieces)
            billing.take(pieces * price)
            orders[order] = {"pieces": pieces, "price": price}
            orders["count"] = orders.get("count", 0) + 1

        def show(what: str) -> None:
            print(
                f"{what}: {goods.pieces} pieces, {money.pieces} of money, {orders.get('count', 0)} orders,"
                f" {goods.reserved + money.reserved} reserved"
            )

        show("before")
        place("o-1", pieces=2, price=20)
        show("after o-1")

        # The money is not enough. The goods had been promised already: they are let go of.
        try:
            place("o-2", pieces=3, price=50)
        except coordlib.TransactionAborted as error:
            print(f"o-2 was refused ({error.reason})")
        show("after o-2")

        # An error in the block: nothing was promised, nothing happened.
        try:
            with cluster.transaction():
                place("o-3", pieces=1, price=1)  # joins
                raise RuntimeError("the customer has left")
        except RuntimeError as left:
            print(f"o-3: {left}")
        show("after o-3")

        # With databases the same; each is registered once in every process that uses it:
        #
        #     ledger = cluster.resource(PostgreSQL("ledger", "dbname=shop"))     # from coordlib.txn.resources
        #     with cluster.transaction() as tx:
        #         tx.enlist(ledger).execute("insert into ledger values (%s)", (order,))
        #         inventory.take(1)


if __name__ == "__main__":
    main()
