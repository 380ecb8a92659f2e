"""The last scene: an order over two services in one transaction, while those who take part are killed at the worst moments.

The services tell what they promised, and what became of that, themselves (`examples/placing_orders.py`); this module says when
somebody dies, and looks at the files and the map afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from coordlib.cli.demo.processes import Application
from coordlib.cli.demo.view import View
from coordlib.errors import StartError

__all__ = ["Placing"]

PROGRAM: Final = "placing_orders.py"
SERVICES: Final = ("inventory", "billing")
START_SECONDS: Final = 20.0
SAY_SECONDS: Final = 30.0
ALONE_SECONDS: Final = 2.0
"""How long the last resource's process is away."""


class Placing:
    """
    Two services and a desk, each a process that attaches as a client; leaves none of them behind.

    Args:
        environment: How they find the cluster.
        directory: For their files.
    """

    def __init__(self, view: View, environment: Mapping[str, str], directory: Path) -> None:
        self._view = view
        self._environment = dict(environment)
        self._directory = directory
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

    def play(self, read_orders: Callable[[list[str]], dict[str, str]]) -> list[str]:
        """
        Play all three acts; returns what was not as promised.

        Args:
            read_orders: Gives what the map "orders" holds under some keys.

        Raises:
            StartError: A process did not do what it was told: with the end of its log.
        """
        for name in (*SERVICES, "desk"):
            self._start(name)
        for name in (*SERVICES, "desk"):
            self._running[name].expect("open", START_SECONDS)
        self._view.event("an order over two services, each with its journal, and a map: one transaction")
        self._die_before_the_decision()
        self._die_after_the_decision()
        self._die_with_the_decision()
        return self._look(read_orders(["o-1", "o-2", "o-3"]))

    # -- acts

    def _die_before_the_decision(self) -> None:
        self._promise("order", "o-1")
        self._kill("desk", "all have promised, nothing is decided")
        died = time.monotonic()
        for name in SERVICES:
            self._running[name].expect("released o-1", SAY_SECONDS)
        self._view.event(
            f"both services have let go of it {time.monotonic() - died:.1f} s later: nobody is left half done, nobody waits "
            "for the desk",
            is_good=True,
        )

    def _die_after_the_decision(self) -> None:
        self._start("desk").expect("open", START_SECONDS)
        self._promise("order", "o-2")
        for name in SERVICES:
            self._running[name].tell("hold")
            self._running[name].expect("holding", SAY_SECONDS)
        self._running["desk"].tell("go")
        self._running["desk"].expect("decided", SAY_SECONDS)
        for name in SERVICES:
            self._running[name].expect("told o-2", SAY_SECONDS)
        for name in ("desk", *SERVICES):
            self._kill(name, "it is decided, and nobody has done it yet")
        begun = time.monotonic()
        for name in SERVICES:
            self._start(name)
        for name in SERVICES:
            self._running[name].expect("took o-2", SAY_SECONDS)
        self._view.event(
            f"the services are back and have done what was decided, {time.monotonic() - begun:.1f} s after their start; the "
            "desk is still dead",
            is_good=True,
        )
        for name in SERVICES:
            self._running[name].expect("open", START_SECONDS)

    def _die_with_the_decision(self) -> None:
        self._start("desk").expect("open", START_SECONDS)
        self._promise("notes", "o-3")
        self._kill("desk", "an SQLite database takes part, and it alone can say how this ends")
        time.sleep(ALONE_SECONDS)
        self._start("desk")
        begun = time.monotonic()
        for name in SERVICES:
            self._running[name].expect("released o-3", SAY_SECONDS)
        self._view.event(
            f"they waited for it, as SQLite's price is; {time.monotonic() - begun:.1f} s after its process was started "
            "again it had said no",
            is_good=True,
        )
        self._running["desk"].expect("open", START_SECONDS)

    def _promise(self, command: str, order: str) -> None:
        self._running["desk"].tell(f"{command} {order}")
        for name in SERVICES:
            self._running[name].expect(f"promised {order}", SAY_SECONDS)
        self._running["desk"].expect("asked", SAY_SECONDS)

    # -- processes

    def _start(self, name: str) -> Application:
        arguments = ["desk"] if name == "desk" else ["service", name]
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

    def _look(self, orders: Mapping[str, str]) -> list[str]:
        wanted = {"o-1": False, "o-2": True, "o-3": False}
        violations = []
        for name in SERVICES:
            path = self._directory / name / "taken.json"
            taken = json.loads(path.read_text("utf-8")) if path.exists() else {}
            violations += [
                f"{name} has {'' if order in taken else 'not '}taken order {order}"
                for order, is_placed in wanted.items()
                if (order in taken) != is_placed
            ]
        violations += [
            f'the map "orders" has {order}: {orders.get(order)}'
            for order, is_placed in wanted.items()
            if (orders.get(order) == "placed") != is_placed
        ]
        return violations
