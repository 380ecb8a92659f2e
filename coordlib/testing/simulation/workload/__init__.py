"""Applications at work in a simulated cluster, and what they were promised.

One `Workload` is one mixed run of every service that there is: each process that it is started in begins
operations at its own pace, whatever became of those before (an open loop). All of it goes through the
production operations of `coordlib.api`; what was asked and answered is written into a history. Promises that
can be looked at at once are looked at at once, the others at the end.

A new service is a file with a `Service`, and a line in `SERVICES`. What must not live here: faults, and what
must hold of a cluster whatever its applications do (see `coordlib.testing.simulation.invariants`).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Final

from coordlib.errors import DefiniteError, IndeterminateError
from coordlib.node.operations import OpGen
from coordlib.testing.checkers import Verdict, check
from coordlib.testing.history import HistoryWriter
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.processes import Process
from coordlib.testing.simulation.workload.bank import Bank
from coordlib.testing.simulation.workload.counters import Counters
from coordlib.testing.simulation.workload.groups import Groups
from coordlib.testing.simulation.workload.ids import Ids
from coordlib.testing.simulation.workload.inserts import Inserts
from coordlib.testing.simulation.workload.load import Load
from coordlib.testing.simulation.workload.load import draw_load as _draw_load
from coordlib.testing.simulation.workload.locks import Locks
from coordlib.testing.simulation.workload.registers import Registers
from coordlib.testing.simulation.workload.site import Marks, PromiseBroken, Service, Site, Worker
from coordlib.testing.simulation.workload.tickets import Tickets
from coordlib.testing.simulation.world import World

__all__ = ["SERVICES", "SOMETIMES", "Load", "Marks", "PromiseBroken", "Service", "Workload", "draw_load"]

SERVICES: Final[tuple[type[Service], ...]] = (Registers, Locks, Counters, Inserts, Groups, Tickets, Ids, Bank)

SOMETIMES: Final[dict[str, str]] = {
    "acquire_granted_after_waiting": "a waiter got its lock",
    "acquire_refused_at_once": "a lock that was held was refused to who would not wait",
    "acquire_timed_out": "a waiter gave up, and its request was withdrawn",
    "cancelled_operation": "a task was cancelled while its operation was under way",
    "cas_failed": "a compare-and-set found another value",
    "error_commit-timeout": "no answer came in time to what had been sent",
    "error_no-quorum": "no leader could be asked",
    "grant_lost": "a holder found that its session had run out",
    "guard_refused": "a write with the token of a released grant was refused",
    "holder_crashed": "a process ended while it held a lock",
    "id_clock_stepped_back": "ids were to be minted after their clock had stepped back",
    "id_lease_expired": "a window had ended, no other was granted in time, and no id was minted",
    "id_lease_lapsed": "a renewal came after the lease had lapsed, and was refused",
    "id_renewal_late": "more than half of a window had passed before it was extended",
    "id_time_borrowed": "more ids were minted than their time has",
    "id_time_skipped": "an operator had ids begin at a later time",
    "id_window_ended_while_paused": "a process stood still while its window ended",
    "id_window_given_back": "the rest of a window was given back",
    "id_worker_passed_on": "a worker number went from one process to another",
    "id_workers_exhausted": "all workers of a layout were leased, and somebody got none",
    "ids_minted_without_quorum": "ids were minted while most members were down",
    "increment_refused": "two counted from the same number, and one was refused",
    "popitem_of_nothing": "somebody tried to take from an empty map",
    "scan_of_several_pages": "a scan needed more than one page",
    "session_expired_with_retry": "a session ended under a command that had been sent",
    "session_lost": "a session ended, and its process noticed",
    "session_suspended": "a process heard nothing of the cluster for half of its session's TTL",
    "stale_read_answered": "a stale read was answered with a value",
    "stale_write_refused": "a write with the token of a lost grant was refused",
    "tx_aborted_conflict": "a decision found that what had been read was changed, and aborted",
    "tx_aborted_deadline": "a decision came when its time was over, and aborted",
    "tx_call_repeated": "the answer of a service was lost, and it was called again",
    "tx_conflict_at_a_read": "a transaction read what was changed after its first read",
    "tx_dynamic_one_phase": "all had read only but one, which committed in one phase",
    "tx_error_swallowed": "an operation of a service failed, and its caller went on to commit",
    "tx_expired": "a service rolled back what had not promised in time",
    "tx_heuristic_recorded": "a promised branch had been ended by hand",
    "tx_initiator_died_undecided": "an initiator ended when some had promised, and nothing was decided",
    "tx_last_resource": "a store that cannot prepare decided for all",
    "tx_last_resource_asked": "who was in doubt asked the process whose last resource decides",
    "tx_one_phase": "an only branch committed in one phase",
    "tx_participant_died_promised": "a service ended after it had promised",
    "tx_promise_restored": "a service began with promises from before",
    "tx_recovered_by_another": "a branch was ended by a process that had nothing to do with it",
    "tx_resolve_found_a_decision": "RESOLVE came after DECIDE, and said so",
    "tx_resolve_won": "DECIDE came after RESOLVE, and lost",
    "tx_swept": "a branch had obeyed and nobody had said so",
    "tx_told_resolved": "an initiator heard that others had given its transaction up",
    "unknown_outcome_later_seen": "a write of unknown outcome had happened, as somebody read later",
    "withdrawn_acquire_granted_later_released": "a lock was granted to who had given up, and was taken back",
}
"""Marks that a workload hits in many seeds, by name, in words; see `coordlib.testing.simulation.marks`."""

ATTEMPTS_MAX: Final = 3

STEPS_MAX: Final = 2_000_000
"""Of the history checker: a bound in steps, since a simulation must not depend on how fast it runs."""


def draw_load(stream: Stream, *, operations_per_second: int | None = None) -> Load:
    """Draw how applications behave in one run; see `Load`."""
    services = [(service.name, service.weight) for service in SERVICES]
    return _draw_load(stream, services, operations_per_second=operations_per_second)


class Workload:
    """
    Applications in the processes of one world.

    Use: `start` for each process that begins, `process_ended` for each that is gone, `check` after events;
    then `stop`, and when it `is_quiet`, `finish` and `judge`.

    If the clocks of the world are not bounded, only what is guarded by tokens is promised: holders may believe
    wrongly then, and reads by lease may be stale.

    Args:
        load: Services that it does not name are not used.
        history: Gets every operation that its format knows.
        marks: Is told of situations that must occur sometimes.
    """

    def __init__(
        self,
        world: World,
        load: Load,
        *,
        history: HistoryWriter,
        marks: Marks,
    ) -> None:
        self._site = Site(world, load, history=history, marks=marks)
        self._world = world
        self._load = load
        self._services = [service(self._site) for service in SERVICES]
        self._checked = [s for s in self._services if type(s).check is not Service.check]
        self._chosen = [s for s in self._services if load.weights.get(s.name, 0) > 0]
        self._shares = list(accumulate(load.weights[s.name] for s in self._chosen))
        self._lives = 0
        self._is_finished = False

    # -- what happens

    def start(self, process: Process) -> None:
        """An application begins to work in this process."""
        self._lives += 1
        worker = Worker(self._site, process, self._lives)
        self._site.workers[process] = worker
        for service in self._services:
            service.worker_started(worker)
        self._schedule(worker)

    def process_ended(self, process: Process) -> None:
        """
        The process is gone. What was under way in it has an unknown outcome; its grants are nobody's belief.

        Nothing happens if no application works in it.
        """
        worker = self._site.workers.pop(process, None)
        if worker is not None:
            self._site.worker_ended(worker)
            for service in self._services:
                service.worker_ended(worker)

    def stop(self) -> None:
        """Begin nothing new. Locks that are held are soon released."""
        self._site.is_stopped = True

    def _schedule(self, worker: Worker) -> None:
        gap_ms = 1000 * len(self._site.workers) / self._load.operations_per_second
        worker.next_ms = max(worker.next_ms, self._world.now - gap_ms) + gap_ms
        self._world.at(int(worker.next_ms), lambda: self._arrive(worker))

    def _arrive(self, worker: Worker) -> None:
        if worker.is_ended or self._site.is_stopped:
            return
        process = worker.process
        if not process.is_up:
            return  # and `process_ended` is about to say so
        if process.is_paused:
            self._schedule(worker)
            return
        # Operations that follow from others were paid for in advance by those that are not begun then.
        worker.credit = min(worker.credit + 1, 1.0)
        if worker.credit >= 1:
            if worker.outstanding < self._load.outstanding_max:
                self._service(worker).begin(worker)
            else:
                self._site.marks.hit("arrival_while_all_wait")
        self._schedule(worker)

    def _service(self, worker: Worker) -> Service:
        chance = worker.arrivals.random() * self._shares[-1]
        return self._chosen[min(bisect_right(self._shares, chance), len(self._chosen) - 1)]

    # -- what is known

    @property
    def started(self) -> int:
        """Operations of the API begun so far."""
        return self._site.started

    @property
    def operations(self) -> int:
        """Those of them that ended, and their caller knows how."""
        return self._site.known

    def describe(self) -> str:
        """What is not over yet, in words."""
        tasks = [str(task) for worker in self._site.workers.values() for task in worker.tasks]
        restless = [service.describe() for service in self._services if not service.is_quiet]
        return "; ".join(tasks + restless) or "nothing is under way"

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way, and nobody who lives holds a grant."""
        return not self._site.open_tasks and all(service.is_quiet for service in self._services)

    def check(self) -> None:
        """
        Look at what may have changed with the last event. Costs nothing when nothing is in dispute.

        Raises:
            PromiseBroken: Something is not as it was promised.
        """
        for service in self._checked:
            service.check()

    # -- the end

    def finish(self, process: Process) -> OpGen[None]:
        """
        An operation that reads back all that is there, to be run in this process; then `judge`.

        Everything has stopped and is quiet.

        Raises:
            CoordError: It could not be read, although it was tried again.
            PromiseBroken: Something is there that cannot be, or a lock does not become free.
        """
        assert self._site.is_stopped, "finished before it was stopped"
        self._lives += 1
        worker = Worker(self._site, process, self._lives)
        for service in self._services:
            for attempt in range(ATTEMPTS_MAX):
                try:
                    yield from service.read_back(worker, worker.take_client())
                    break
                except (DefiniteError, IndeterminateError):
                    if attempt == ATTEMPTS_MAX - 1:
                        raise
        self._is_finished = True

    def judge(self) -> Verdict:
        """
        Compare what was read back, and the whole history, with what was promised. Returns what its checker says.

        Raises:
            PromiseBroken: They differ, or the checker cannot tell within its bound.
        """
        assert self._is_finished, "judged before it was read back"
        for service in self._services:
            service.judge()
        verdict = check(self._site.history.operations, steps_max=STEPS_MAX)
        if verdict.result != "legal":
            raise PromiseBroken("history", f"the history is {verdict.result}: {verdict.explanation}")
        return verdict
