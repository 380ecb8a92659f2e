"""Keys that are inserted once, each by one operation only: what is acknowledged is there for good."""

from __future__ import annotations

from typing import Any, Final

from coordlib.errors import KeyExists
from coordlib.node.operations import OpGen
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker

__all__ = ["Inserts"]

MAP: Final = "inserts"


class Inserts(Service):
    """Inserts of fresh keys; sometimes one is inserted again, which must be refused, or looked for."""

    name = "inserts"
    weight = 2.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._acknowledged: list[int] = []
        self._tried: list[int] = []
        self._final: dict[Any, Any] = {}

    def begin(self, worker: Worker) -> None:
        stream = worker.stream(self.site, self.name)
        chance = stream.random()
        if self._acknowledged and chance < 0.1:
            self._insert_again(worker, stream)
        elif self._acknowledged and chance < 0.2:
            self._look(worker, stream)
        else:
            self._insert(worker, stream)

    def _insert(self, worker: Worker, stream: Stream) -> None:
        site = self.site
        value = site.new_value("", f"an insert by {worker.name}")
        site.writes[value].key = key = f"u{value}"
        self._tried.append(value)

        def ended(task: Task) -> None:
            if isinstance(task.error, KeyExists):
                site.broken("inserts", f"{task}: nobody else inserts this key; it was executed twice")
            site.wrote(value, task.outcome, task)
            if task.outcome is Outcome.DONE:
                self._acknowledged.append(value)

        operation = site.map(MAP, stream)._insert_gen(key, value, None)
        site.begin(worker, self.name, f"insert of {key}", operation, ended)

    def _insert_again(self, worker: Worker, stream: Stream) -> None:
        value = stream.choice(self._acknowledged)

        def ended(task: Task) -> None:
            if task.outcome is Outcome.DONE:
                self.site.broken(
                    "inserts", f"{task}, but it had been inserted before: the acknowledged insert was lost"
                )

        operation = self.site.map(MAP, stream)._insert_gen(f"u{value}", -value, None)
        self.site.begin(worker, self.name, f"second insert of u{value}", operation, ended)

    def _look(self, worker: Worker, stream: Stream) -> None:
        value = stream.choice(self._acknowledged)

        def ended(task: Task) -> None:
            if task.outcome is Outcome.DONE and not task.result and self.site.are_reads_current:
                self.site.broken("inserts", f"{task}, but its insert had been acknowledged")

        operation = self.site.map(MAP, stream)._contains_gen(f"u{value}")
        self.site.begin(worker, self.name, f"contains u{value}", operation, ended)

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        self._final = dict((yield from self.site.map(MAP)._scan_gen()))

    def judge(self) -> None:
        site = self.site
        for key, value in self._final.items():
            site.saw(value, key, "who reads back at the end")
        for value in self._acknowledged:
            if f"u{value}" not in self._final:
                site.broken(
                    "inserts", f"the acknowledged insert of u{value} by {site.writes[value].who} is lost"
                )
