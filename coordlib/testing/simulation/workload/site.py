"""What all services of a workload share: how operations are run and recorded, and what is known of values.

A *worker* is the application in one process. A *task* is one operation of it, from its beginning until its
caller knows how it ended, or is gone. What must not live here: what any one service promises.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable, Generator
from typing import Any, Final, NoReturn, Protocol

from coordlib.api.maps import _MapBase
from coordlib.errors import ClusterClosed, DefiniteError, FatalError, IndeterminateError, LeadershipLost
from coordlib.node.operations import OpGen, Step
from coordlib.testing.history import HistoryWriter
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.processes import Operation, Process
from coordlib.testing.simulation.workload.load import Load
from coordlib.testing.simulation.world import World

__all__ = ["Marks", "Outcome", "PromiseBroken", "Service", "Site", "Task", "Worker", "Write"]


class PromiseBroken(AssertionError):
    """Something that an application was promised is not so. The message has all the facts; `check` names the promise."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.check, str(self))


class Marks(Protocol):
    """Counts situations that must occur sometimes, or nothing is proven about them."""

    def hit(self, name: str) -> None: ...


class Outcome:
    """What the caller may conclude from how its operation ended."""

    OPEN: Final = "open"
    DONE: Final = "done"
    REFUSED: Final = "refused"  # a definite error: it did not happen and will not
    UNKNOWN: Final = "unknown"


class Write:
    """A value that somebody once tried to write, under a number that no other value has."""

    __slots__ = ("is_seen", "key", "outcome", "revision", "who")

    def __init__(self, key: str, who: str) -> None:
        self.key = key
        self.who = who
        self.outcome = Outcome.OPEN
        self.is_seen = False
        self.revision = 0  # once it is known


class Worker:
    """The application in one process."""

    __slots__ = (
        "_idle",
        "_life",
        "_names",
        "_streams",
        "arrivals",
        "credit",
        "is_ended",
        "name",
        "next_ms",
        "outstanding",
        "process",
        "tasks",
    )

    def __init__(self, site: Site, process: Process, life: int) -> None:
        self.process = process
        self.name = process.name
        self.arrivals = site.world.choices.stream(f"workload:{process.name}:arrivals")
        self.credit = 0.0
        self.next_ms = float(site.world.now)
        self.outstanding = 0
        self.is_ended = False
        self.tasks: dict[Task, None] = {}
        self._life = life
        self._names = 0
        self._idle: list[str] = []
        self._streams: dict[str, Stream] = {}

    def stream(self, site: Site, service: str) -> Stream:
        stream = self._streams.get(service)
        if stream is None:
            stream = self._streams[service] = site.world.choices.stream(f"workload:{self.name}:{service}")
        return stream

    def take_client(self) -> str:
        """The name of a thread of this application that has nothing to do."""
        if self._idle:
            return self._idle.pop()
        self._names += 1
        return f"{self.name}.{self._life}/{self._names}"

    def give_client(self, client: str) -> None:
        self._idle.append(client)


class Task:
    """
    One operation of the API, or a few in a row that have one outcome.

    When it has ended, `outcome` says what may be concluded, `result` or `error` with what it ended.
    """

    __slots__ = (
        "began_ns",
        "client",
        "cost",
        "detached",
        "ended",
        "error",
        "operation",
        "outcome",
        "result",
        "service",
        "site",
        "steps",
        "token",
        "what",
        "worker",
    )

    def __init__(
        self, site: Site, worker: Worker, service: str, what: str, client: str, cost: int = 1
    ) -> None:
        self.site = site
        self.worker = worker
        self.service = service
        self.what = what
        self.client = client
        self.cost = cost
        self.began_ns = site.time_ns()
        self.operation: Operation | None = None
        self.outcome = Outcome.OPEN
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended: Callable[[Task], None] | None = None
        self.token = -1  # in the history
        self.steps = 0
        self.detached: list[Step] = []  # what goes on behind the caller

    def __str__(self) -> str:
        began = f"begun at {self.began_ns // 1_000_000} ms"
        return f"{self.service} {self.what} by {self.client} ({began}, {self.outcome} {self.error or self.result!r})"

    def watched(self, generator: OpGen[Any]) -> OpGen[Any]:
        """The same operation, with its steps noted."""
        try:
            step = next(generator)
            while True:
                self.steps += 1
                if isinstance(step, Step) and step.is_detached:
                    self.detached.append(step)
                try:
                    reply = yield step
                except GeneratorExit:
                    generator.close()
                    raise
                except BaseException as error:
                    step = generator.throw(error)
                else:
                    step = generator.send(reply)
        except StopIteration as stop:
            return stop.value

    # -- the history

    def record(self, op: str, key: str, input: Any) -> None:
        """Note in the history that this is begun."""
        self.token = self.site.history.invoke(self.client, op, key, input, self.began_ns)

    def record_as(self, op: str, key: str, input: Any, output: Any) -> None:
        """Note in the history what this has turned out to be."""
        self.record(op, key, input)
        self.answered(output)

    def answered(self, output: Any) -> None:
        self.site.history.ok(self.token, output, self.site.time_ns())

    def refused(self) -> None:
        self.site.history.fail(self.token, self.site.time_ns())

    # -- its end

    def _done(self) -> None:
        if self.operation is not None:  # else it ended before it was returned
            self.finish()

    def start(self, generator: Generator[Any, bytes, Any]) -> None:
        operation = self.worker.process.start_operation(generator, self._done)
        self.operation = operation
        if operation.is_done:
            self.finish()

    def finish(self) -> None:
        operation = self.operation
        assert operation is not None
        if self.outcome is Outcome.OPEN:
            self.result, self.error = operation.result, operation.error
            self.site.task_ended(self)

    def cancel(self) -> None:
        """Cancel it, as its task may be at any time while its process runs."""
        process, operation = self.worker.process, self.operation
        if self.outcome is Outcome.OPEN and operation is not None and process.is_up and not process.is_paused:
            self.site.marks.hit("cancelled_operation")
            operation.cancel()


class Site:
    """The workload as its services see it."""

    def __init__(self, world: World, load: Load, *, history: HistoryWriter, marks: Marks) -> None:
        self.world = world
        self.load = load
        self.history = history
        self.marks = marks
        # While clocks keep to the bound of the cluster's timing, holders may believe and leases may be read by.
        self.are_clocks_bounded = world.clock.is_bounded(world.timing.drift_percent)
        self.are_reads_current = self.are_clocks_bounded or not world.reads_by_lease
        self.workers: dict[Process, Worker] = {}
        self.writes: dict[int, Write] = {}
        self.is_stopped = False
        self.started = 0
        self.known = 0
        self.open_tasks = 0
        self._last_value = 0
        self._maps: dict[tuple[str, int], _MapBase] = {}
        self._time_ns = -1

    # -- facts

    def time_ns(self) -> int:
        """Now: of two moments in the same millisecond, the later one has the greater number."""
        self._time_ns = max(self._time_ns + 1, self.world.now * 1_000_000)
        return self._time_ns

    def broken(self, check: str, message: str) -> NoReturn:
        raise PromiseBroken(check, f"{message} [at {self.world.now} ms]")

    def map(self, name: str, stream: Stream | None = None) -> _MapBase:
        """A handle of a map; with a stream, sometimes one that gives up soon."""
        timeout_ms = self.world.timing.request_timeout_ms
        share = self.load.share_short_timeouts
        if stream is not None and share and stream.random() < share:
            timeout_ms = stream.choice((20, 100, 400))
        found = self._maps.get((name, timeout_ms))
        if found is None:
            found = self._maps[name, timeout_ms] = _MapBase(name, None, timeout_ms)
        return found

    # -- values

    def new_value(self, key: str, who: str) -> int:
        """A value that was never used. Its `Write` tells what is known of it."""
        self._last_value += 1
        self.writes[self._last_value] = Write(key, who)
        return self._last_value

    def saw(self, value: Any, key: str, who: object) -> Write:
        """
        Somebody read a value.

        Raises:
            PromiseBroken: Nobody wrote it, or not there, or whoever did was told that it did not happen.
        """
        write = self.writes.get(value) if type(value) is int else None
        if write is None:
            self.broken("values", f"{who} read {value!r} from {key}, which nobody ever wrote")
        if write.key != key:
            self.broken("values", f"{who} read {value} from {key}, but {write.who} wrote it to {write.key}")
        if write.outcome is Outcome.REFUSED:
            self.broken(
                "definite errors",
                f"{who} read {value} from {key}, but {write.who} was told that its write did not happen",
            )
        if not write.is_seen:
            write.is_seen = True
            if write.outcome is Outcome.UNKNOWN:
                self.marks.hit("unknown_outcome_later_seen")
        return write

    def wrote(self, value: int, outcome: str, who: object) -> Write:
        """
        It is known how the attempt to write a value ended.

        Raises:
            PromiseBroken: It did not happen, and yet somebody has read the value.
        """
        write = self.writes[value]
        write.outcome = outcome
        if outcome is Outcome.REFUSED and write.is_seen:
            self.broken(
                "definite errors",
                f"{value} was read from {write.key}, and then {write.who} was told that it was not written: {who}",
            )
        return write

    # -- tasks

    def begin(
        self,
        worker: Worker,
        service: str,
        what: str,
        generator: OpGen[Any] | Callable[[Task], OpGen[Any]],
        ended: Callable[[Task], None],
        *,
        record: tuple[str, str, Any] | None = None,
        client: str = "",
        cost: int = 1,
    ) -> Task:
        """
        Begin an operation.

        Args:
            generator: The operation, or what makes it from its task, which then notes its steps.
            ended: Called once, when the outcome is known or its process is gone.
            record: Operation, key and input to begin with in the history.
            client: The thread that does it, if it is taken by the caller already, who then keeps it.
            cost: Operations of the API that this is.
        """
        is_lent = not client
        task = Task(self, worker, service, what, client or worker.take_client(), cost)

        def finished(task: Task) -> None:
            worker.outstanding -= is_lent
            if is_lent and task.outcome is not Outcome.UNKNOWN:
                worker.give_client(task.client)
            ended(task)

        task.ended = finished
        if record is not None:
            task.record(*record)
        worker.outstanding += is_lent
        worker.credit -= cost
        worker.tasks[task] = None
        self.started += cost
        self.open_tasks += 1
        task.start(task.watched(generator(task)) if callable(generator) else generator)
        self._perhaps_cancel(task)
        return task

    def _perhaps_cancel(self, task: Task) -> None:
        share = self.load.share_cancelled
        if share and not self.is_stopped:
            stream = task.worker.stream(self, "cancel")
            if stream.random() < share:
                self.world.after(stream.choice((0, 1, 5, 30, 300, 2000)), task.cancel)

    def task_ended(self, task: Task) -> None:
        """From a task: its operation is over."""
        error = task.error
        if error is None:
            outcome = Outcome.DONE
        elif isinstance(error, DefiniteError | ClusterClosed):
            outcome = Outcome.REFUSED
        elif isinstance(error, IndeterminateError | FatalError | CancelledError):
            # A node that stops says why, but not of which call it was the end.
            outcome = Outcome.UNKNOWN
            if isinstance(error, LeadershipLost) and "session ended" in error.message:
                self.marks.hit("session_expired_with_retry")
        else:
            self.broken("outcomes", f"{task} ended with an error that says nothing about its outcome")
        if error is not None:
            self.marks.hit(f"error_{getattr(error, 'code', 'cancelled')}")
        self._end(task, outcome)

    def worker_ended(self, worker: Worker) -> None:
        """Its process is gone: of what was under way, nothing more will be known."""
        worker.is_ended = True
        for task in list(worker.tasks):
            self._end(task, Outcome.UNKNOWN)

    def _end(self, task: Task, outcome: str) -> None:
        task.outcome = outcome
        del task.worker.tasks[task]
        self.open_tasks -= 1
        if outcome is not Outcome.UNKNOWN:
            self.known += task.cost
        assert task.ended is not None
        task.ended(task)


class Service:
    """
    What applications do with one kind of thing, and what they were promised of it.

    `name` is also the key of its weight; `weight` how often it is chosen usually.
    """

    name: str
    weight: float

    def __init__(self, site: Site) -> None:
        self.site = site

    def begin(self, worker: Worker) -> None:
        """Begin something of this service in a process."""
        raise NotImplementedError

    def check(self) -> None:
        """After every event: look at what may have changed. Must be cheap."""

    def worker_started(self, worker: Worker) -> None:
        """An application begins to work in a process."""

    def worker_ended(self, worker: Worker) -> None:
        """A process is gone; its tasks have ended with outcome unknown before."""

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is left to happen but by `begin`; tasks under way are not asked about here."""
        return True

    def describe(self) -> str:
        """What is left to happen."""
        return f"{self.name} are not at rest"

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        """An operation that reads what is there at the end, in this process, as the thread `client`."""
        yield from ()

    def judge(self) -> None:
        """
        Compare what was read back with what was promised.

        Raises:
            PromiseBroken: They differ.
        """
