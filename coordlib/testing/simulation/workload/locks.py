"""Locks: taken, held, used to guard writes, given back, lost; and what every holder believes meanwhile.

Three things are watched, each from outside: that no two holders believe in one lock at the same moment, each by
its own clock; that tokens rise; that what is guarded by tokens never goes back. The first holds only while
clocks keep to their bound; the others always.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from coordlib.api.grants import Grants
from coordlib.api.locks import Grant, GrantState, LockInfo, _LockBase
from coordlib.api.maps import ABSENT
from coordlib.errors import LockLost, LockTimeout, SessionExpired
from coordlib.machine import commands
from coordlib.machine.commands import AcquisitionState
from coordlib.node.operations import OpGen
from coordlib.node.session import Call, SessionState, SessionView
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.workload.keys import Key, Keys
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker

__all__ = ["Hold", "Locks"]

MAP: Final = "guarded"
LATE_SHARE: Final = 0.15  # of released grants with which a late write is tried
STALE_SHARE: Final = 0.7  # of lost ones
WITHDRAWALS_MAX: Final = 200
LOOK_MS: Final = 500  # how often a holder asks whether it is time to stop
PAUSED_MS: Final = 50


class _ToldGrants(Grants):
    """Of one process; tells the workload too how sessions end."""

    def __init__(self, locks: Locks, worker: Worker) -> None:
        super().__init__()
        self._told = locks
        self._worker = worker

    def session_changed(self, view: SessionView, state: SessionState) -> None:
        super().session_changed(view, state)
        self._told.session_changed(self._worker, view, state)


class Hold:
    """A grant in an application's hands."""

    __slots__ = (
        "client",
        "grant",
        "is_released",
        "lock",
        "until_ms",
        "uses",
        "was_lost",
        "was_paused",
        "was_suspended",
        "worker",
    )

    def __init__(self, worker: Worker, client: str, lock: _LockBase, grant: Grant, uses: int) -> None:
        self.worker = worker
        self.client = client
        self.lock = lock
        self.grant = grant
        self.uses = uses  # left
        self.until_ms = 0  # when it goes on
        self.is_released = False  # for certain
        self.was_lost = False
        self.was_paused = False
        self.was_suspended = False

    def __str__(self) -> str:
        return f"{self.client} with token {self.grant._token}"

    @property
    def is_believed(self) -> bool:
        """Whether the holder, if it looked now, would believe that the lock is held."""
        process = self.worker.process
        if not process.is_up or self.grant._is_released:
            return False
        with process.reading_clock():
            return self.grant.state in (GrantState.HELD, GrantState.SUSPENDED)


class Locks(Service):
    """
    Acquisitions with and without waiting; grants that are held for a while, used, and released or forgotten.

    The guarded map has the last token that was accepted, under the lock's name.
    """

    name = "locks"
    weight = 3.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._names = Keys(site, "lock-", site.load.locks)
        self._holds: defaultdict[str, list[Hold]] = defaultdict(list)
        self._of_worker: dict[Worker, dict[Hold, None]] = {}
        self._contested: dict[str, None] = {}
        self._token = 0  # the greatest of any grant that was seen
        self._tokens: dict[int, str] = {}
        self._accepted: defaultdict[str, int] = defaultdict(
            int
        )  # the greatest token known to be in the guarded map
        self._withdrawals: list[Call] = []

    # -- taking

    def begin(self, worker: Worker) -> None:
        site = self.site
        stream = worker.stream(site, self.name)
        key = self._names.pick(stream)
        chance = stream.random()
        if chance < 0.06:
            self._look(worker, key)
        elif chance < 0.12:
            self._read_guarded(worker, stream, key)
        else:
            self._acquire(worker, stream, key)

    def _handle(self, worker: Worker, name: str) -> _LockBase:
        # A process has of a cluster what a lock's handle needs of it.
        return _LockBase(worker.process, name, None, None, None)  # type: ignore[arg-type]

    def _acquire(self, worker: Worker, stream: Stream, key: Key) -> None:
        site, name = self.site, key.name
        lock = self._handle(worker, name)
        timeout = stream.choice((0, 0, 0.05, 0.3, 2.0, 2.0, 8.0, None))
        client = worker.take_client()
        worker.outstanding += 1
        floor = self._token
        view = worker.process._kernel.session.view

        def ended(task: Task) -> None:
            key.ended_one(task, is_read=False)
            if task.outcome is Outcome.DONE:
                self._granted(task, lock, floor, stream)
                return
            worker.outstanding -= 1
            if isinstance(task.error, LockTimeout):
                site.marks.hit("acquire_timed_out" if timeout else "acquire_refused_at_once")
            if isinstance(task.error, LockTimeout) and not timeout:
                task.answered({"ok": False, "token": None})
            elif (
                task.outcome is Outcome.REFUSED
                and not isinstance(task.error, SessionExpired)
                and view.state not in (SessionState.LOST, SessionState.CLOSED)
            ):
                task.refused()  # else it may have been granted, until the cluster knows that the session is over
            if task.outcome is Outcome.REFUSED:
                worker.give_client(client)
            if task.outcome is Outcome.UNKNOWN or isinstance(task.error, LockTimeout):
                self._note_withdrawal(task)

        site.begin(
            worker,
            self.name,
            f"acquire of {name} within {timeout} s",
            lambda _: lock._acquire_gen(timeout),
            ended,
            record=("acquire", name, {"owner": client, "ttl_ns": None}),
            client=client,
        )

    def _note_withdrawal(self, task: Task) -> None:
        for step in task.detached:
            if step.call is not None and len(self._withdrawals) < WITHDRAWALS_MAX:
                self._withdrawals.append(step.call)

    def _look_at_withdrawals(self) -> None:
        left = []
        for call in self._withdrawals:
            if call.reply is None:
                if call.error is None:
                    left.append(call)
                continue
            (was,) = commands.decode_reply(call.reply)
            if was == AcquisitionState.HELD:
                self.site.marks.hit("withdrawn_acquire_granted_later_released")
        self._withdrawals = left

    def _granted(self, task: Task, lock: _LockBase, floor: int, stream: Stream) -> None:
        site, grant = self.site, task.result
        token = grant._token
        task.answered({"ok": True, "token": token})
        hold = Hold(task.worker, task.client, lock, grant, stream.randrange(4))
        self._is_new(token, floor, str(hold), task)
        if self._withdrawals:
            self._look_at_withdrawals()
        holds = self._holds[lock.name]
        holds.append(hold)
        self._of_worker.setdefault(task.worker, {})[hold] = None
        if len(holds) > 1:
            self._contested[lock.name] = None
            self.check()
        if task.steps > 1:
            site.marks.hit("acquire_granted_after_waiting")
        self._go_on(hold, stream)

    def _is_new(self, token: int, floor: int, holder: str, who: object) -> None:
        if token <= floor:
            given = f"{floor} was given to {self._tokens[floor]} before it began"
            self.site.broken("lock tokens", f"{who}: token {token}, but {given}")
        other = self._tokens.setdefault(token, holder)
        if other != holder:
            self.site.broken("lock tokens", f"{who}: token {token} was given to {other} before")
        self._token = max(self._token, token)

    # -- what is believed

    def check(self) -> None:
        """Only locks of which several grants are not known to be over: mostly none."""
        if not self._contested:
            return
        for name in list(self._contested):
            holds = self._holds[name] = [hold for hold in self._holds[name] if not self._is_over(hold)]
            if len(holds) < 2:
                del self._contested[name]
            elif self.site.are_clocks_bounded:
                believed = [hold for hold in holds if hold.is_believed]
                if len(believed) > 1:
                    self.site.broken(
                        "lock holders", f"{' and '.join(map(str, believed))} both believe to hold {name}"
                    )

    @staticmethod
    def _is_over(hold: Hold) -> bool:
        grant = hold.grant
        return (
            grant._is_released
            or hold.worker.is_ended
            or not hold.worker.process.is_up
            or grant._view.state >= SessionState.LOST
        )

    def session_changed(self, worker: Worker, view: SessionView, state: SessionState) -> None:
        """A session's state has changed, in the words of the process that it belongs to."""
        site = self.site
        if state is SessionState.SUSPENDED:
            site.marks.hit("session_suspended")
        if state is not SessionState.LOST:
            return
        site.marks.hit("session_lost")
        process = worker.process
        early_ms = view.valid_until_ms - process.clock()
        if early_ms > 0 and self.site.are_clocks_bounded and process.fatal is None:
            self.site.broken(
                "session promises",
                f"session {view.session_id} of {process.name} was ended by the cluster {early_ms} ms before the "
                "time that it had promised",
            )

    def _expect_lost(self, hold: Hold, task: Task, what: str) -> None:
        if self.site.are_clocks_bounded and hold.is_believed:
            self.site.broken("locks", f"{what}, but {hold} believes to hold {hold.lock.name}: {task}")

    # -- holding

    def _go_on(self, hold: Hold, stream: Stream) -> None:
        """Wait a little, then use the grant once more or give it back."""
        load, timing = self.site.load, self.site.world.timing
        delay_ms = stream.randint(0, load.hold_ms_max)
        if load.share_long_holds and stream.random() < load.share_long_holds:
            delay_ms = stream.randint(timing.session_ttl_ms, 3 * timing.session_ttl_ms)
        hold.until_ms = self.site.world.now + delay_ms
        self._wait(hold, stream)

    def _wait(self, hold: Hold, stream: Stream) -> None:
        process, world = hold.worker.process, self.site.world
        if hold.worker.is_ended or not process.is_up:
            return
        left_ms = min(hold.until_ms - world.now, LOOK_MS)
        if process.is_paused:
            hold.was_paused = True
            left_ms = PAUSED_MS
        if left_ms <= 0 or (self.site.is_stopped and not process.is_paused):
            self._look_at_hold(hold, stream)
        else:
            world.after(left_ms, lambda: self._wait(hold, stream))

    def _look_at_hold(self, hold: Hold, stream: Stream) -> None:
        marks = self.site.marks
        grant = hold.grant
        with hold.worker.process.reading_clock():
            state = grant.state
        if state == GrantState.LOST:
            marks.hit("grant_lost_while_paused" if hold.was_paused else "grant_lost")
            # A holder that does not look: whatever it writes must bear its token.
            if stream.random() < STALE_SHARE and not hold.was_lost:
                hold.was_lost = True
                hold.uses = 0
                self._use(hold, stream)
            else:
                self._release(hold, stream)
            return
        if state == GrantState.SUSPENDED and not hold.was_suspended:
            hold.was_suspended = True
            marks.hit("grant_suspended")
        if hold.uses and not self.site.is_stopped:
            hold.uses -= 1
            if stream.random() < 0.3:
                self._ask_about(hold, stream)
            else:
                self._use(hold, stream)
        else:
            self._release(hold, stream)

    def _use(self, hold: Hold, stream: Stream) -> None:
        """Write under the guard of the grant, as the only safe way to write is."""
        self._write_guarded(hold, stream, lambda: self._go_on(hold, stream))

    def _write_guarded(self, hold: Hold, stream: Stream, then: Callable[[], None]) -> None:
        site, name, token = self.site, hold.lock.name, hold.grant._token
        floor = self._accepted[name]
        is_late = hold.is_released

        def ended(task: Task) -> None:
            if task.outcome is Outcome.DONE:
                if is_late:
                    site.broken("guards", f"{task} was accepted, and the grant had been released before")
                if task.result is not False:  # else a cas found another value, and nothing was written
                    if token < floor:
                        before = f"{floor} had been accepted before it began"
                        site.broken("guards", f"{task} was accepted, and {before}")
                    self._accepted[name] = max(self._accepted[name], token)
            elif isinstance(task.error, LockLost):
                site.marks.hit("stale_write_refused" if hold.was_lost else "guard_refused")
                if not is_late:
                    self._expect_lost(hold, task, "a guarded write is refused")
            if not hold.worker.is_ended:
                then()

        handle = site.map(MAP, stream)
        chance = stream.random()
        if chance < 0.25:
            operation: Any = handle._update_gen({name: token}, {}, hold.grant)
        elif chance < 0.35:
            operation = handle._compare_and_set_gen(name, floor or ABSENT, token, hold.grant)
        else:
            operation = handle._put_gen(name, token, hold.grant)
        what = f"write of {token} to {name}"
        site.begin(hold.worker, self.name, what, operation, ended, client=hold.client)

    def _ask_about(self, hold: Hold, stream: Stream) -> None:
        """While its holder believes in it, a lock is the holder's to the cluster as well."""
        site, name = self.site, hold.lock.name

        def ended(task: Task) -> None:
            if task.outcome is Outcome.DONE and site.are_reads_current:
                info: LockInfo = task.result
                if info.token != hold.grant._token:
                    self._expect_lost(hold, task, f"the cluster says {info}")
            if not hold.worker.is_ended:
                self._go_on(hold, stream)

        site.begin(
            hold.worker, self.name, f"info of {name}", hold.lock._info_gen(), ended, client=hold.client
        )

    def _release(self, hold: Hold, stream: Stream) -> None:
        site, worker = self.site, hold.worker
        name, token = hold.lock.name, hold.grant._token

        def ended(task: Task) -> None:
            hold.is_released = task.outcome is Outcome.DONE and task.result and not task.detached
            self._of_worker.get(worker, {}).pop(hold, None)
            holds = self._holds[name]
            if hold in holds:
                holds.remove(hold)
            worker.outstanding -= 1
            if task.outcome is Outcome.DONE and not task.detached:
                if task.result or hold.grant._view.state < SessionState.LOST:
                    task.answered({"ok": task.result})
                else:
                    # By the holder's own clock, which is ahead of the cluster's: there it may be held yet.
                    site.marks.hit("release_of_a_lost_grant")
                if not site.is_stopped and stream.random() < LATE_SHARE:
                    worker.outstanding += 1
                    self._write_guarded(hold, stream, lambda: self._let_go(hold))
                    return
                worker.give_client(hold.client)
            elif task.outcome is Outcome.DONE:
                site.marks.hit("release_in_the_background")
            elif task.outcome is Outcome.REFUSED:
                task.refused()

        was_believed = hold.is_believed

        def told(task: Task) -> None:
            if task.outcome is Outcome.DONE and not task.result and not task.detached and was_believed:
                view = hold.grant._view
                process = worker.process
                is_valid = view.is_valid(process.clock()) and process.is_up
                if is_valid and site.are_clocks_bounded:
                    site.broken("locks", f"{task}: the lock was lost, says the cluster; its session is alive")
            ended(task)

        site.begin(
            worker,
            self.name,
            f"release of {name}, token {token}",
            lambda _: hold.lock._release_gen(hold.grant),
            told,
            record=("release", name, {"token": token}),
            client=hold.client,
        )

    def _let_go(self, hold: Hold) -> None:
        hold.worker.outstanding -= 1

    # -- looking from outside

    def _look(self, worker: Worker, key: Key) -> None:
        site, name = self.site, key.name
        floor = self._token

        def ended(task: Task) -> None:
            key.ended_one(task, is_read=True)
            if task.outcome is not Outcome.DONE:
                return
            info: LockInfo = task.result
            if not info.token:
                return
            if info.token not in self._tokens and info.token <= floor:
                site.marks.hit("lock_held_by_an_unknown_acquire")

        site.begin(worker, self.name, f"info of {name}", self._handle(worker, name)._info_gen(), ended)

    def _read_guarded(self, worker: Worker, stream: Stream, key: Key) -> None:
        name = key.name
        floor = self._accepted[name]

        def ended(task: Task) -> None:
            key.ended_one(task, is_read=True)
            if task.outcome is Outcome.DONE and self.site.are_reads_current:
                self._saw_guarded(task, name, task.result or 0, floor)

        handle = self.site.map(MAP, stream)
        self.site.begin(worker, self.name, f"get of guarded {name}", handle._get_gen(name, None), ended)

    def _saw_guarded(self, who: object, name: str, token: int, floor: int) -> None:
        if token < floor:
            self.site.broken(
                "guards", f"{who}: the guarded value went back to {token}; it was {floor} before"
            )
        if token and token not in self._tokens:
            self.site.broken("guards", f"{who}: nobody was ever granted token {token}")
        self._accepted[name] = max(self._accepted[name], token)

    # -- ends

    def worker_started(self, worker: Worker) -> None:
        worker.process._grants = _ToldGrants(self, worker)

    def worker_ended(self, worker: Worker) -> None:
        if self._of_worker.pop(worker, None):
            self.site.marks.hit("holder_crashed")

    @property
    def is_quiet(self) -> bool:
        return not any(self._of_worker.values())

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        site = self.site
        self._look_at_withdrawals()
        accepted = yield from site.map(MAP)._scan_gen()
        for name, token in accepted:
            self._saw_guarded("who reads back at the end", name, token, self._accepted[name])
        for name in self._names.all:
            yield from self._take_once(worker, client, name)

    def _take_once(self, worker: Worker, client: str, name: str) -> OpGen[None]:
        """Nobody holds it, and the sessions of the dead run out: it can be had."""
        site, history = self.site, self.site.history
        limit_ms = 2 * site.world.timing.session_ttl_ms + 5000
        lock = self._handle(worker, name)
        floor = self._token
        acquire = history.invoke(client, "acquire", name, {"owner": client, "ttl_ns": None}, site.time_ns())
        try:
            grant = yield from lock._acquire_gen(limit_ms / 1000)
        except LockTimeout:
            info = yield from lock._info_gen()
            owner = self._tokens.get(info.token, "an acquire that did not succeed")
            site.broken(
                "lock release",
                f"{name} is not free {limit_ms} ms after everybody gave it up: {info}, given to {owner}",
            )
        token = grant._token
        history.ok(acquire, {"ok": True, "token": token}, site.time_ns())
        self._is_new(token, floor, client, f"acquire of {name} at the end")
        release = history.invoke(client, "release", name, {"token": token}, site.time_ns())
        was_held = yield from lock._release_gen(grant)
        history.ok(release, {"ok": was_held}, site.time_ns())
