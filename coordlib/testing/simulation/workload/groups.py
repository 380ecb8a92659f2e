"""Maps whose keys are all written together: a scan sees all of them equal, or none of them."""

from __future__ import annotations

from typing import Any, Final

from coordlib.node.operations import OpGen
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.workload.keys import Keys
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker

__all__ = ["Groups"]

FIRST: Final = "k0"


class Groups(Service):
    """
    update, clear, scan and len of whole maps, each command and each scan at one revision.

    In the history a map is one register: an update is a put, a clear a delete, a scan a get.
    """

    name = "groups"
    weight = 2.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._maps = Keys(site, "group-", site.load.groups)
        self._padding = "x" * site.load.padding_size_bytes

    def begin(self, worker: Worker) -> None:
        stream = worker.stream(self.site, self.name)
        chance = stream.random()
        if chance < 0.4:
            self._update(worker, stream)
        elif chance < 0.5:
            self._clear(worker, stream)
        elif chance < 0.6:
            self._count(worker, stream)
        else:
            self._scan(worker, stream)

    def _update(self, worker: Worker, stream: Stream) -> None:
        site = self.site
        group = self._maps.pick(stream)
        value = site.new_value(group.name, f"an update by {worker.name}")

        def ended(task: Task) -> None:
            group.ended_one(task, is_read=False)
            site.wrote(value, task.outcome, task)
            if task.outcome is Outcome.DONE:
                task.answered(None)
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        item = [value, self._padding] if self._padding else value
        pairs = {f"k{place}": item for place in range(site.load.group_keys)}
        operation = site.map(group.name, stream)._update_gen(pairs, {}, None)
        record = ("put", group.name, value)
        site.begin(worker, self.name, f"update of {group.name} to {value}", operation, ended, record=record)

    def _clear(self, worker: Worker, stream: Stream) -> None:
        group = self._maps.pick(stream)

        def ended(task: Task) -> None:
            group.ended_one(task, is_read=False)
            if task.outcome is Outcome.DONE:
                if task.result not in (0, self.site.load.group_keys):
                    self.site.broken("groups", f"{task}: {task.result} keys, and they were written together")
                task.answered(task.result > 0)
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        operation = self.site.map(group.name, stream)._clear_gen()
        record = ("delete", group.name, None)
        self.site.begin(worker, self.name, f"clear of {group.name}", operation, ended, record=record)

    def _count(self, worker: Worker, stream: Stream) -> None:
        group = self._maps.pick(stream)

        def ended(task: Task) -> None:
            group.ended_one(task, is_read=True)
            if task.outcome is Outcome.DONE and task.result not in (0, self.site.load.group_keys):
                self.site.broken("groups", f"{task}: {task.result} keys, and they are written together")

        operation = self.site.map(group.name, stream)._len_gen()
        self.site.begin(worker, self.name, f"len of {group.name}", operation, ended)

    def _scan(self, worker: Worker, stream: Stream) -> None:
        site = self.site
        group = self._maps.pick(stream)

        def ended(task: Task) -> None:
            group.ended_one(task, is_read=True)
            if task.outcome is Outcome.DONE:
                if task.steps > 1:
                    site.marks.hit("scan_of_several_pages")
                value = self._common(f"{task.what} by {task.client}", group.name, dict(task.result))
                if task.token >= 0:
                    task.answered(value)
            elif task.token >= 0:
                task.refused()

        handle = site.map(group.name, stream)
        record = ("get", group.name, None) if site.are_reads_current else None
        site.begin(
            worker,
            self.name,
            f"scan of {group.name}",
            lambda _: handle._scan_gen(),
            ended,
            record=record,
        )

    def _common(self, who: object, name: str, found: dict[Any, Any]) -> int | None:
        """The value that all keys have; None if there are none."""
        site = self.site
        if not found:
            return None
        values = {item[0] if type(item) is list else item for item in found.values()}
        if len(values) != 1 or len(found) != site.load.group_keys:
            seen = {key: item[0] if type(item) is list else item for key, item in found.items()}
            site.broken("groups", f"{who} sees {seen}: no revision of it was ever like this")
        (value,) = values
        site.saw(value, name, who)
        return int(value)

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        site = self.site
        for name in self._maps.all:
            began_ns = site.time_ns()
            found = yield from site.map(name)._scan_gen()
            value = self._common("the scan at the end", name, dict(found))
            token = site.history.invoke(client, "get", name, None, began_ns)
            site.history.ok(token, value, site.time_ns())
