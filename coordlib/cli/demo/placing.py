"""The last scenes: an order over two services in one transaction, while those who take part are killed at the worst moments.

What becomes of it is told by the services themselves (`examples/placing_orders.py`), or found in their databases (`stores`);
this module says when somebody dies, and looks at the files, the databases and the map afterwards.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Final

from coordlib.cli.demo.processes import Application
from coordlib.cli.demo.stores import SAY_SECONDS, Store
from coordlib.cli.demo.view import View
from coordlib.errors import StartError

__all__ = ["SERVICES", "Placing"]

PROGRAM: Final = "placing_orders.py"
SERVICES: Final = ("inventory", "billing")
START_SECONDS: Final = 20.0
ALONE_SECONDS: Final = 2.0
"""How long the last resource's process is away."""


class Placing:
    """
    Two services and a desk, each a process that attaches as a client; leaves none of them behind.

    Args:
        environment: How they find the cluster.
        directory: For their files.
        stores: Of the services, by name; whoever made them closes them.
        read_orders: Gives what the map "orders" holds under some keys.
    """

    def __init__(
        self,
        view: View,
        environment: Mapping[str, str],
        directory: Path,
        stores: Mapping[str, Store],
        read_orders: Callable[[list[str]], dict[str, str]],
    ) -> None:
        self._view = view
        self._environment = dict(environment)
        self._directory = directory
        self._stores = dict(stores)
        self._read_orders = read_orders
        self._running: dict[str, Application] = {}

    def __enter__(self) -> Placing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for application in self._running.values():
            application.end_input()
        while self._running:
            _, application = self._running.popitem()
            application.close(3.0)

    def open(self) -> None:
        """
        Start all three. The scenes follow, in the order in which they stand here; each returns what was not as promised.

        Raises:
            StartError: One does not start: with the end of its log. From the scenes as well, if a process does not do what
                it is told.
        """
        for name in (*SERVICES, "desk"):
            self._start(name)
        for name in (*SERVICES, "desk"):
            self._running[name].expect("open", START_SECONDS)

    # -- scenes

    def play_before_the_decision(self) -> list[str]:
        """An order over two services and a map. The desk dies when both have promised."""
        keeping = " and ".join(f"{name} with its {self._stores[name].words}" for name in SERVICES)
        self._view.event(f"an order over two services, {keeping}, and a map: one transaction")
        self._promise("order", "o-1")
        self._kill("desk", "all have promised, nothing is decided")
        died = time.monotonic()
        for name in SERVICES:
            self._stores[name].await_released(self._running[name], "o-1")
        self._view.event(
            f"both services have let go of it {time.monotonic() - died:.1f} s later: nobody is left half done, nobody waits "
            "for the desk",
            is_good=True,
        )
        return self._compare("o-1", False) + self._compare_map("o-1", False)

    def play_after_the_decision(self) -> list[str]:
        """Another. Everybody dies, databases included, when it is decided and nobody has done it."""
        self._start("desk").expect("open", START_SECONDS)
        self._promise("order", "o-2")
        for name in SERVICES:
            self._running[name].tell("hold")
            self._running[name].expect("holding", SAY_SECONDS)
        self._running["desk"].tell("go")
        self._running["desk"].expect("decided", SAY_SECONDS)
        for name in SERVICES:
            self._running[name].expect("told", SAY_SECONDS)
        for name in ("desk", *SERVICES):
            self._kill(name, "it is decided, and nobody has done it yet")
        self._crash_databases()
        begun = time.monotonic()
        for name in SERVICES:
            self._start(name)
        for name in SERVICES:
            self._stores[name].await_taken(self._running[name], "o-2")
        self._view.event(
            f"the services are back and have done what was decided, {time.monotonic() - begun:.1f} s after their start; the "
            "desk is still dead",
            is_good=True,
        )
        for name in SERVICES:
            self._running[name].expect("open", START_SECONDS)
        return self._compare("o-2", True) + self._compare_map("o-2", True)

    def _crash_databases(self) -> None:
        for name in SERVICES:
            store, server = self._stores[name], self._stores[name].server
            if server is not None:
                self._view.event(
                    f"kill -9 {server.pid}: the {store.words} of {name} is dead, too", is_bad=True
                )
                server.restart()
                self._view.event(f"the {store.words} of {name} is back: process {server.pid}")

    def play_last_resource(self) -> list[str]:
        """The same services, and an SQLite database, which decides. Its process dies before it has; then all goes well."""
        self._view.event(
            "now with an SQLite database, which cannot promise: it decides for the others, by its own commit"
        )
        self._start("desk").expect("open", START_SECONDS)
        self._promise("notes", "o-3")
        self._kill("desk", "it alone can say how this ends")
        time.sleep(ALONE_SECONDS)
        self._start("desk")
        begun = time.monotonic()
        for name in SERVICES:
            self._stores[name].await_released(self._running[name], "o-3")
        self._view.event(
            f"they waited for it, as SQLite's price is; {time.monotonic() - begun:.1f} s after its process was started "
            "again it had said no",
            is_good=True,
        )
        self._running["desk"].expect("open", START_SECONDS)
        self._promise("notes", "o-4")
        self._running["desk"].tell("go")
        self._running["desk"].expect("decided", SAY_SECONDS)
        for name in SERVICES:
            self._stores[name].await_taken(self._running[name], "o-4")
        self._view.event("and the next order, with nobody killed, is everywhere", is_good=True)
        with closing(sqlite3.connect(self._directory / "desk" / "notes.db")) as notes:
            noted = {number for (number,) in notes.execute("SELECT number FROM notes")}
        violations = self._compare("o-3", False) + self._compare("o-4", True)
        if noted != {"o-4"}:
            violations.append(f"the SQLite database has {sorted(noted)}, and not o-4 alone")
        return violations

    # -- telling

    def _promise(self, command: str, order: str) -> None:
        self._running["desk"].tell(f"{command} {order}")
        for name in SERVICES:
            self._stores[name].await_promised(self._running[name], order)
        self._running["desk"].expect("asked", SAY_SECONDS)

    # -- processes

    def _start(self, name: str) -> Application:
        arguments = ["desk"] if name == "desk" else ["service", name, *self._stores[name].arguments]
        application = Application(
            name,
            {**self._environment, "ORDERS_RECORDS": str(self._directory)},
            self._directory / f"{name}.log",
            program=PROGRAM,
            arguments=arguments,
        )
        self._running[name] = application
        self._view.event(f"{name}: process {application.pid}, a client")
        return application

    def _kill(self, name: str, why: str) -> None:
        application = self._running.pop(name)
        if application.has_ended:
            raise StartError(f"{name} has ended by itself:{application.log_end()}")
        application.kill()
        self._view.event(f"kill -9 {application.pid}: {name} is dead; {why}", is_bad=True)

    # -- afterwards

    def _compare(self, order: str, is_placed: bool) -> list[str]:
        return [
            f"{name} has {'not ' if is_placed else ''}taken order {order}"
            for name in SERVICES
            if (order in self._stores[name].taken()) != is_placed
        ]

    def _compare_map(self, order: str, is_placed: bool) -> list[str]:
        found = self._read_orders([order]).get(order)
        return [] if (found == "placed") == is_placed else [f'the map "orders" has {order}: {found}']
