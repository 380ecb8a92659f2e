"""Single keys of a map: each is a register, whose history is judged at the end and whose values are watched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from coordlib.api.maps import ABSENT, VersionedValue
from coordlib.errors import KeyExists
from coordlib.node.operations import OpGen
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.workload.keys import Key, Keys
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker

__all__ = ["Registers"]

MAP: Final = "registers"
OLD_SHARE: Final = 0.03  # of reads, of a key that nobody writes to any more


class Registers(Service):
    """
    put, get, get_versioned, read_stale, delete, insert, pop, setdefault and compare_and_set on a few keys.

    In the history, an insert is a cas from nothing; a pop is a cas to nothing, or a get that found nothing; a
    setdefault is a cas from nothing, or a get. A stale read is not in it: it may show any earlier state, but
    no value whose writer was told that it did not happen.
    """

    name = "registers"
    weight = 8.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._keys = Keys(site, "r", site.load.keys)
        self._revision = 0  # the greatest of an acknowledged put

    def begin(self, worker: Worker) -> None:
        stream = worker.stream(self.site, self.name)
        chance = stream.random()
        for share, begin in self._KINDS:
            if chance < share:
                begin(self, worker, stream)
                return
            chance -= share

    # -- writing

    def _put(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)
        value = self.site.new_value(key.name, f"a put by {worker.name}")
        floor = self._revision

        def ended(task: Task) -> None:
            self._ended(task, key, value)
            if task.outcome is Outcome.DONE:
                task.answered(None)
                self._acknowledged_at(task, value, floor)
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        operation = self.site.map(MAP, stream)._put_gen(key.name, value, None)
        self.site.begin(
            worker, self.name, f"put of {value}", operation, ended, record=("put", key.name, value)
        )

    def _acknowledged_at(self, task: Task, value: int, floor: int) -> None:
        write, revision = self.site.writes[value], task.result
        if revision <= floor:
            self.site.broken(
                "registers", f"{task}: revision {revision}, but {floor} had been given out before it began"
            )
        if write.revision not in (0, revision):
            self.site.broken(
                "registers", f"{task}: revision {revision}, but the value was read at {write.revision}"
            )
        write.revision = revision
        self._revision = max(self._revision, revision)

    def _insert(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)
        value = self.site.new_value(key.name, f"an insert by {worker.name}")
        floor = self._revision

        def ended(task: Task) -> None:
            self._ended(task, key, value)
            if task.outcome is Outcome.DONE:
                task.answered(True)
                self._acknowledged_at(task, value, floor)
            elif isinstance(task.error, KeyExists):
                task.answered(False)
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        operation = self.site.map(MAP, stream)._insert_gen(key.name, value, None)
        record = ("cas", key.name, [None, value])
        self.site.begin(worker, self.name, f"insert of {value}", operation, ended, record=record)

    def _setdefault(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)
        value = self.site.new_value(key.name, f"a setdefault by {worker.name}")

        def ended(task: Task) -> None:
            is_there_before = task.outcome is Outcome.DONE and task.result != value
            self._ended(task, key, value, is_refused=is_there_before)
            if is_there_before:
                self.site.saw(task.result, key.name, task)
                key.values.append(task.result)
                task.record_as("get", key.name, None, task.result)
            elif task.outcome is Outcome.DONE:
                task.record_as("cas", key.name, [None, value], True)
            elif task.outcome is Outcome.UNKNOWN:
                task.record("cas", key.name, [None, value])

        operation = self.site.map(MAP, stream)._setdefault_gen(key.name, value)
        self.site.begin(worker, self.name, f"setdefault to {value}", operation, ended)

    def _compare_and_set(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)
        values = key.values
        expected = values[-1] if values and stream.random() < 0.7 else None
        if expected is not None and stream.random() < 0.2:
            expected = values[stream.randrange(len(values))]
        is_removal = expected is not None and stream.random() < 0.15
        value = None if is_removal else self.site.new_value(key.name, f"a cas by {worker.name}")

        def ended(task: Task) -> None:
            is_refused = task.outcome is Outcome.DONE and not task.result
            self._ended(task, key, value, is_refused=is_refused)
            if task.outcome is Outcome.DONE:
                task.answered(task.result)
                if is_refused:
                    self.site.marks.hit("cas_failed")
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        operation = self.site.map(MAP, stream)._compare_and_set_gen(
            key.name,
            ABSENT if expected is None else expected,
            ABSENT if value is None else value,
            None,
        )
        what = f"cas from {expected} to {value}"
        self.site.begin(
            worker, self.name, what, operation, ended, record=("cas", key.name, [expected, value])
        )

    def _delete(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)

        def ended(task: Task) -> None:
            self._ended(task, key, None)
            if task.outcome is Outcome.DONE:
                task.answered(task.result)
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        operation = self.site.map(MAP, stream)._delete_gen(key.name, None)
        self.site.begin(worker, self.name, "delete", operation, ended, record=("delete", key.name, None))

    def _pop(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)

        def ended(task: Task) -> None:
            self._ended(task, key, None)
            if task.outcome is Outcome.UNKNOWN:
                task.record("delete", key.name, None)
            elif task.outcome is Outcome.DONE and task.result is None:
                task.record_as("get", key.name, None, None)
            elif task.outcome is Outcome.DONE:
                self.site.saw(task.result, key.name, task)
                task.record_as("cas", key.name, [task.result, None], True)

        operation = self.site.map(MAP, stream)._pop_gen(key.name, None, None)
        self.site.begin(worker, self.name, "pop", operation, ended)

    def _ended(self, task: Task, key: Key, value: int | None, *, is_refused: bool = False) -> None:
        """What is the same for all that write."""
        key.ended_one(task, is_read=False)
        if value is None:
            return
        outcome = Outcome.REFUSED if is_refused else task.outcome
        self.site.wrote(value, outcome, task)
        if outcome is not Outcome.REFUSED:
            key.values.append(value)

    # -- reading

    def _get(self, worker: Worker, stream: Stream) -> None:
        is_old = stream.random() < OLD_SHARE
        key = self._keys.old(stream) if is_old else self._keys.pick(stream)

        def ended(task: Task) -> None:
            self._read(task, key, task.result)

        operation = self.site.map(MAP, stream)._get_gen(key.name, None)
        self._begin_read(worker, key, "get", operation, ended)

    def _get_versioned(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)

        def ended(task: Task) -> None:
            found: VersionedValue | None = task.result
            self._read(task, key, None if found is None else found.value)
            if found is not None:
                write = self.site.writes[found.value]
                if write.revision not in (0, found.mod_revision):
                    self.site.broken(
                        "registers", f"{task}: the value was written at revision {write.revision}"
                    )
                write.revision = found.mod_revision
                if not 0 < found.create_revision <= found.mod_revision or found.version < 1:
                    self.site.broken("registers", f"{task}: no such revisions can be")

        operation = self.site.map(MAP, stream)._get_versioned_gen(key.name)
        self._begin_read(worker, key, "get_versioned", operation, ended)

    def _begin_read(
        self, worker: Worker, key: Key, what: str, operation: Any, ended: Callable[[Task], None]
    ) -> None:
        record = ("get", key.name, None) if self.site.are_reads_current else None
        self.site.begin(worker, self.name, f"{what} of {key.name}", operation, ended, record=record)

    def _read(self, task: Task, key: Key, value: Any) -> None:
        key.ended_one(task, is_read=True)
        if task.outcome is Outcome.DONE:
            if value is not None:
                self.site.saw(value, key.name, task)
                key.values.append(value)
            if task.token >= 0:
                task.answered(value)
        elif task.token >= 0:
            task.refused()  # nobody can tell a read that nobody saw from none

    def _read_stale(self, worker: Worker, stream: Stream) -> None:
        key = self._keys.pick(stream)

        def ended(task: Task) -> None:
            key.ended_one(task, is_read=True)
            if task.outcome is Outcome.DONE and task.result is not None:
                self.site.saw(task.result, key.name, task)
                self.site.marks.hit("stale_read_answered")

        operation = self.site.map(MAP, stream)._get_gen(key.name, None, is_stale=True)
        self.site.begin(worker, self.name, f"read_stale of {key.name}", operation, ended)

    _KINDS = (
        (0.24, _put),
        (0.25, _get),
        (0.17, _compare_and_set),
        (0.07, _delete),
        (0.07, _insert),
        (0.06, _pop),
        (0.06, _setdefault),
        (0.04, _get_versioned),
        (1.0, _read_stale),
    )

    # -- the end

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        site = self.site
        began_ns = site.time_ns()
        values = dict((yield from site.map(MAP)._scan_gen()))
        for name, value in values.items():
            if name not in self._keys.all:
                site.broken("registers", f"{name!r} is there at the end, and nobody ever wrote to it")
            site.saw(value, name, "who reads back at the end")
        for name in self._keys.all:
            token = site.history.invoke(client, "get", name, None, began_ns)
            site.history.ok(token, values.get(name), site.time_ns())
