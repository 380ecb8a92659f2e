"""Counters that are read and then compared-and-set: what is acknowledged is counted once, the rest at most once."""

from __future__ import annotations

from typing import Any, Final

from coordlib.api.maps import ABSENT
from coordlib.node.operations import OpGen
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker

__all__ = ["Counters"]

MAP: Final = "counters"


class _Counter:
    __slots__ = ("acknowledged", "by", "floor", "name", "unknown")

    def __init__(self, name: str) -> None:
        self.name = name
        self.acknowledged = 0
        self.unknown = 0
        self.floor = 0  # it was at least this once, and never falls
        self.by: dict[int, int] = {}  # number -> the attempt that made it so


class _Attempt:
    __slots__ = ("base", "floor", "is_sent")

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self.base = 0
        self.is_sent = False


class Counters(Service):
    """A counter's value is its number and the attempt that made it so: [number, unique value]."""

    name = "counters"
    weight = 2.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._counters = [_Counter(f"c{place}") for place in range(site.load.counters)]
        self._final: dict[Any, Any] = {}

    def begin(self, worker: Worker) -> None:
        site = self.site
        stream = worker.stream(site, self.name)
        counter = self._counters[stream.randrange(len(self._counters))]
        handle = site.map(MAP, stream)
        value = site.new_value(counter.name, f"an increment by {worker.name}")
        attempt = _Attempt(counter.floor)

        def increment(task: Task) -> OpGen[bool]:
            found = yield from handle._get_gen(counter.name, None)
            if found is not None:
                attempt.base = self._saw(counter, found, attempt.floor, task)
            elif attempt.floor and site.are_reads_current:
                site.broken(
                    "counters", f"{task} finds no {counter.name}, which was {attempt.floor} before it began"
                )
            attempt.is_sent = True
            expected = ABSENT if found is None else found
            return (
                yield from handle._compare_and_set_gen(
                    counter.name, expected, [attempt.base + 1, value], None
                )
            )

        def ended(task: Task) -> None:
            outcome = task.outcome
            if not attempt.is_sent or (outcome is Outcome.DONE and not task.result):
                outcome = Outcome.REFUSED
            site.wrote(value, outcome, task)
            if outcome is Outcome.DONE:
                counter.acknowledged += 1
                self._made(counter, attempt.base + 1, value, task)
            elif outcome is Outcome.UNKNOWN:
                counter.unknown += 1
            elif attempt.is_sent:
                site.marks.hit("increment_refused")

        site.begin(worker, self.name, f"increment {value} of {counter.name}", increment, ended, cost=2)

    def _saw(self, counter: _Counter, found: Any, floor: int, who: object) -> int:
        number, value = found
        self.site.saw(value, counter.name, who)
        if number < floor and self.site.are_reads_current:
            self.site.broken(
                "counters",
                f"{who} read {number} from {counter.name}, which was at least {floor} before it began",
            )
        self._made(counter, number, value, who)
        return int(number)

    def _made(self, counter: _Counter, number: int, value: int, who: object) -> None:
        other = counter.by.setdefault(number, value)
        if other != value:
            writes = self.site.writes
            self.site.broken(
                "counters",
                f"{counter.name} became {number} twice: by {writes[other].who} ({other}) and by "
                f"{writes[value].who} ({value}), says {who}",
            )
        counter.floor = max(counter.floor, number)

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        self._final = dict((yield from self.site.map(MAP)._scan_gen()))

    def judge(self) -> None:
        for counter in self._counters:
            number, value = self._final.get(counter.name, (0, 0))
            if value:
                self.site.saw(value, counter.name, "who reads back at the end")
            least = counter.acknowledged
            if not least <= number <= least + counter.unknown:
                self.site.broken(
                    "counters",
                    f"{counter.name} is {number} at the end, but {least} increments were acknowledged and "
                    f"{counter.unknown} have an unknown outcome",
                )
