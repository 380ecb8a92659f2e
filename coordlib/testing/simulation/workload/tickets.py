"""A heap of tickets: each is put in once and taken out by at most one, by `popitem`."""

from __future__ import annotations

from typing import Any, Final

from coordlib.errors import KeyMissing
from coordlib.node.operations import OpGen
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker

__all__ = ["Tickets"]

MAP: Final = "tickets"


class Tickets(Service):
    """What is put in and not taken out is there at the end, but for one ticket for each unknown outcome."""

    name = "tickets"
    weight = 1.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._acknowledged: list[int] = []
        self._taken: dict[int, str] = {}
        self._unknown = 0  # takings of which nobody knows what they took
        self._final: dict[Any, Any] = {}

    def begin(self, worker: Worker) -> None:
        if worker.stream(self.site, self.name).random() < 0.55:
            self._put_in(worker)
        else:
            self._take(worker)

    def _put_in(self, worker: Worker) -> None:
        site = self.site
        value = site.new_value(MAP, f"a ticket by {worker.name}")

        def ended(task: Task) -> None:
            site.wrote(value, task.outcome, task)
            if task.outcome is Outcome.DONE:
                self._acknowledged.append(value)

        handle = site.map(MAP, worker.stream(site, self.name))
        site.begin(worker, self.name, f"put in {value}", handle._insert_gen(value, value, None), ended)

    def _take(self, worker: Worker) -> None:
        site = self.site

        def ended(task: Task) -> None:
            if task.outcome is Outcome.UNKNOWN:
                self._unknown += 1
            elif task.outcome is Outcome.DONE:
                key, value = task.result
                site.saw(value, MAP, task)
                other = self._taken.setdefault(value, str(task))
                if key != value or other != str(task):
                    site.broken("tickets", f"ticket {key} is taken by {task}, and was before by {other}")
            elif isinstance(task.error, KeyMissing):
                site.marks.hit("popitem_of_nothing")

        handle = site.map(MAP, worker.stream(site, self.name))
        site.begin(worker, self.name, "take", handle._popitem_gen(), ended)

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        self._final = dict((yield from self.site.map(MAP)._scan_gen()))

    def judge(self) -> None:
        site = self.site
        for value in self._final:
            site.saw(value, MAP, "who reads back at the end")
            if value in self._taken:
                site.broken(
                    "tickets", f"ticket {value} is there at the end, but was taken: {self._taken[value]}"
                )
        lost = [v for v in self._acknowledged if v not in self._final and v not in self._taken]
        if len(lost) > self._unknown:
            site.broken(
                "tickets",
                f"{len(lost)} tickets are neither taken nor there ({lost[:10]}), "
                f"but only {self._unknown} takings have an unknown outcome",
            )
