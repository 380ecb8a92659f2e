"""The node thread: the only place that touches sockets, files and clocks.

One loop, one poll. Everything that is there is drained and given to the kernel; what may leave before the
disk is sent; what must be durable is written with one write and one fdatasync; the rest is sent; callers
are woken in one batch. While a round is on the disk the next batch gathers in the queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary

from coordlib.config import ClientSettings, MemberSettings
from coordlib.errors import (
    ClusterClosed,
    ConfigError,
    CoordError,
    FatalError,
    InvariantViolation,
    StartError,
)
from coordlib.node import fork
from coordlib.node.calls import CallHandler, check_answer
from coordlib.node.client import ClientKernel
from coordlib.node.clock import monotonic_ms, wall_ms
from coordlib.node.disk import DiskAgent
from coordlib.node.effects import Effects, InboundCall, LogEvent
from coordlib.node.kernel import MemberKernel
from coordlib.node.links import Links
from coordlib.node.session import Call, SessionState, SessionView
from coordlib.node.waiting import LoopWatch, wake_all
from coordlib.storage.base import LogStorage
from coordlib.transport.base import Lane, Transport, TransportEvent, TransportKeys, TransportSettings
from coordlib.transport.registry import find_transport
from coordlib.wire.channel import ChannelIdentity
from coordlib.wire.keys import ClusterKeys
from coordlib.wire.messages import CallStatus

__all__ = ["ClientDriver", "Driver", "MemberDriver"]

log = logging.getLogger("coordlib")

SUBMITTED_MAX: Final = 100_000
POLL_MS_MAX: Final = 1000
STALL_MS: Final = 100
DRAIN_MS_MAX: Final = 20
LINGER_MS: Final = 50
START_GRACE_SECONDS: Final = 2.0
SIGNAL_LATENCY_SECONDS: Final = 0.25

SessionListener = Callable[[SessionView, SessionState], None]


class Driver:
    """What a member and a client have in common. Public methods may be called from any thread."""

    _read_clock: Callable[[], int] = staticmethod(monotonic_ms)
    _read_wall_clock: Callable[[], int] = staticmethod(wall_ms)
    _call_handler: CallHandler | None = None

    def __init__(self, name: str, *, start_timeout_ms: int) -> None:
        self.pid = os.getpid()
        self._name = name
        self._start_timeout_ms = start_timeout_ms
        self._submitted: deque[Call] = deque()
        self._questions: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._is_stopping = False
        self._stop_deadline_ms: int | None = None
        self._stopped = threading.Event()
        self.fatal: CoordError | None = None
        self._transport: Transport | None = None
        self._links: Links | None = None
        self._kernel: MemberKernel | ClientKernel | None = None
        self._listeners: list[SessionListener] = []
        self._watches: WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWatch] = WeakKeyDictionary()
        self._keys: ClusterKeys
        self._late_warned_ms = 0
        self.late_ms_max = 0

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start the node thread and wait until the node is of use: a leader is known and a session open.

        Raises:
            StartError, ConfigError, FatalError: It is not, in time or at all; everything is let go of again.
        """
        thread = threading.Thread(target=self._main, name=f"coordlib-{self._name}", daemon=True)
        self._thread = thread
        fork.register(self)
        thread.start()
        deadline = monotonic_ms() + self._start_timeout_ms + round(START_GRACE_SECONDS * 1000)
        # In short waits: a signal that arrives just before one begins is not heard until it ends.
        while not self._started.wait(SIGNAL_LATENCY_SECONDS) and monotonic_ms() < deadline:
            pass
        if not self._started.is_set():
            self._start_error = StartError(
                f"the node did not start within {self._start_timeout_ms / 1000:g} s, and its thread does not answer: "
                "is the disk of data_dir hanging?"
            )
            self._is_stopping = True
        if self._start_error is not None:
            thread.join(5.0)
            raise self._start_error

    def stop(self, timeout_seconds: float) -> None:
        """Leave in good order, within the timeout; then let go of everything. Idempotent."""
        thread = self._thread
        if thread is None or self.pid != os.getpid():
            return
        if self._stop_deadline_ms is None:
            self._stop_deadline_ms = monotonic_ms() + max(0, round(timeout_seconds * 1000))
        self._is_stopping = True
        self._wake()
        if thread is not threading.current_thread():
            thread.join(timeout_seconds + 5.0)

    @property
    def is_running(self) -> bool:
        return self._thread is not None and not self._stopped.is_set()

    @property
    def view(self) -> SessionView:
        assert self._kernel is not None
        return self._kernel.session.view

    def add_listener(self, listener: SessionListener) -> None:
        """Called in the node thread on every change of the session's state: must not block or raise."""
        self._listeners.append(listener)

    # -- calls of other applications -----------------------------------------------------------------------

    def set_call_handler(self, handler: CallHandler | None) -> None:
        """
        Take the calls that other applications send to this one's session; None: no more, callers are told so.

        Before or after the start. The handler is called in the node thread and must not block or raise. Every call
        given to it is to be answered, by `answer`, from any thread; one that is not is lost to its caller, who
        waits until the call's deadline. Each comes once, and only while the session lives that it was sent to.
        """
        self._call_handler = handler
        self._ask_later(lambda kernel, now: kernel.calls.serve(handler is not None, now))

    def answer(self, inbound: InboundCall, status: int, body: bytes) -> None:
        """
        Answer a call, once.

        Args:
            status: A CallStatus. OK: `body` is what the caller gets. ERROR: `body` is a CoordError as
                `commands.encode_error` makes it, and is raised there; only where the call has had no effect and will
                have none, if the error says so. UNREACHABLE: the call was not acted on, and will not be. UNKNOWN:
                perhaps it was.
            body: At most 4 MiB.

        Nobody is told whether the answer arrives. It is dropped where nobody waits any more: the deadline has passed,
        the way back is lost, or this node has stopped.

        Raises:
            UsageError: This cannot be an answer. The call can be answered yet.
        """
        check_answer(status, body)
        self._ask_later(lambda kernel, now: kernel.calls.answer(inbound.number, status, body, now))

    def _ask_later(self, question: Callable[[MemberKernel | ClientKernel, int], None]) -> None:
        def run() -> None:
            kernel = self._kernel
            assert kernel is not None
            question(kernel, self._read_clock())

        self._questions.append(run)
        self._wake()

    def _hand_over(self, calls: list[InboundCall]) -> None:
        handler = self._call_handler
        for inbound in calls:
            if handler is None:
                self.answer(inbound, CallStatus.UNREACHABLE, b"")  # taken back a moment ago
            else:
                handler(inbound)

    # -- calls ---------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Hand a call to the node. It ends in every case; a stopped node ends it at once."""
        self._submitted.append(call)
        if self._stopped.is_set():
            self._end_submitted()
        else:
            self._wake()

    def watch(self, loop: asyncio.AbstractEventLoop) -> LoopWatch:
        """What ends the calls of an event loop if this node does not. Only from within that loop."""
        watch = self._watches.get(loop)
        if watch is None:
            watch = self._watches[loop] = LoopWatch()
        return watch

    def ask(self, question: Callable[[], Any], timeout_seconds: float) -> Any:
        """Run a quick question in the node thread, where the kernel can be looked at, and return its answer."""
        done = threading.Event()
        answer: list[Any] = []

        def run() -> None:
            try:
                answer.append(question())
            finally:
                done.set()

        self._questions.append(run)
        self._wake()
        deadline = monotonic_ms() + round(timeout_seconds * 1000)
        while not done.wait(0.25):
            if self._stopped.is_set():
                raise self.fatal or ClusterClosed("the node has stopped")
            if monotonic_ms() >= deadline:
                break
        if not answer:
            raise StartError("the node does not answer: its disk or its process is stalled")
        return answer[0]

    def _wake(self) -> None:
        transport = self._transport
        if transport is not None:
            transport.wake()

    def _end_submitted(self) -> None:
        error = self.fatal or ClusterClosed("the node has stopped; nothing was sent")
        ended = []
        while self._submitted:
            try:
                call = self._submitted.popleft()
            except IndexError:
                break
            call.error = error
            ended.append(call)
        wake_all(ended)

    # -- the node thread -----------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._open()
            self._loop()
        except CoordError as error:
            self._failed(error)
        except Exception as error:
            log.exception("coordlib: the node thread failed", extra={"event": "node.bug"})
            self._failed(InvariantViolation(f"a bug in coordlib stopped this node: {error!r}"))
        finally:
            try:
                self._close()
            except Exception:
                # Whatever could not be let go of: nobody may wait for this node any more.
                log.exception("coordlib: the node could not close cleanly", extra={"event": "node.bug"})
            self._stopped.set()
            self._end_submitted()
            self._questions.clear()
            if not self._started.is_set():
                if self._start_error is None:
                    self._start_error = ClusterClosed("closed while starting")
                self._started.set()

    def _failed(self, error: CoordError) -> None:
        if not self._started.is_set():
            self._start_error = error
        else:
            self.fatal = error if isinstance(error, FatalError) else FatalError(str(error))
            log.critical("the node has stopped: %s", error, extra={"event": "node.fatal", "code": error.code})
        kernel = self._kernel
        if kernel is not None:
            effects = kernel.fail(error)
            if effects is not None:
                self._deliver(effects)

    def _open(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        """Let go of everything, each even if the one before could not be."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._keys.wipe)
            for resource in self._resources():
                if resource is not None:
                    stack.callback(resource.close)
            stack.callback(fork.unregister, self)

    def _resources(self) -> list[Any]:
        """What is to be closed, the last one first."""
        return [self._transport]

    def _carry_out(self, kernel: Any, now: int) -> None:
        raise NotImplementedError

    def _why_not_started(self) -> str:
        raise NotImplementedError

    def _loop(self) -> None:
        transport, links, kernel = self._transport, self._links, self._kernel
        assert transport is not None and links is not None and kernel is not None
        submitted, questions = self._submitted, self._questions
        now = monotonic_ms()
        start_deadline = now + self._start_timeout_ms
        stopping_since: int | None = None
        while True:
            deadline = min(kernel.deadline, links.deadline)
            timeout_ms = 0 if submitted or questions else max(0, min(deadline - now, POLL_MS_MAX))
            events = transport.poll(timeout_ms / 1000)
            before, now = now, monotonic_ms()
            late_ms = now - before - timeout_ms
            if late_ms > STALL_MS:
                # We were kept from running, and so was whatever fills our queues. Hear what happened meanwhile
                # before concluding from anyone's silence.
                events += transport.poll(DRAIN_MS_MAX / 1000)
                self._was_late(late_ms, now)
            now = self._turn(kernel, links, events, now, late_ms)
            if not self._started.is_set():
                if kernel.has_usable_leader:
                    self._started.set()
                elif now >= start_deadline:
                    raise StartError(self._why_not_started())
            if self._is_stopping:
                if stopping_since is None:
                    stopping_since = now
                    kernel.begin_close(
                        now, self._stop_deadline_ms if self._stop_deadline_ms is not None else now
                    )
                    self._carry_out(kernel, now)
                if kernel.has_left(now):
                    self._carry_out(kernel, now)
                    # What was queued last (a hand-over, answers) is still on its way through the transport.
                    transport.poll(LINGER_MS / 1000)
                    effects = kernel.fail(ClusterClosed("the node has closed"))
                    if effects is not None:
                        self._deliver(effects)
                    return

    def _turn(
        self,
        kernel: MemberKernel | ClientKernel,
        links: Links,
        events: Sequence[TransportEvent],
        now: int,
        late_ms: int,
    ) -> int:
        """
        One turn of the loop, from what came in to what follows of it; the simulator's processes run it too.

        Returns the time as it was last read.
        """
        links.receive(events, kernel, now)
        submitted, questions = self._submitted, self._questions
        for _ in range(len(submitted)):
            kernel.submit(submitted.popleft(), now)
        if len(events) < 500:
            now = self._read_clock()  # anew: a lease is judged by a time after the reads came in
            kernel.tick(now, self._read_wall_clock(), late_ms)
            links.tick(now)
        while questions:  # before the effects: a question may have to be sent on
            questions.popleft()()
        self._carry_out(kernel, now)
        if links.events:
            self._log(links.events)
            links.events.clear()
        return now

    def _was_late(self, late_ms: int, now: int) -> None:
        self.late_ms_max = max(self.late_ms_max, late_ms)
        if now - self._late_warned_ms > 60_000 and self._started.is_set():
            self._late_warned_ms = now
            log.warning(
                "the node was kept from running for %d ms: CPU-bound threads hold the interpreter, or the disk is slow. "
                'isolation="process" gives the node a process of its own',
                late_ms,
                extra={"event": "node.late", "late_ms": late_ms},
            )

    def _deliver(self, effects: Effects) -> None:
        if effects.changes:
            for view, state in effects.changes:
                for listener in self._listeners:
                    listener(view, state)
        if effects.completed:
            wake_all(effects.completed)
        if effects.calls:
            self._hand_over(effects.calls)
        if effects.events:
            self._log(effects.events)

    def _log(self, events: list[LogEvent]) -> None:
        for event in events:
            log.log(
                event.level,
                "%s: %s",
                self._name,
                event.message,
                extra={
                    "event": event.name,
                    "node": self._name,
                    **{f"coordlib_{k}": v for k, v in event.fields.items()},
                },
            )

    # -- fork ----------------------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """In the child: nothing of this handle may be used, and nothing of the parent's may be kept open."""
        if self._transport is not None:
            self._transport.after_fork_in_child()
        if self._links is not None:
            self._links.wipe()
        kernel = self._kernel
        if kernel is not None:
            kernel.session.view.state = SessionState.LOST

    @property
    def cluster_uuid(self) -> bytes:
        """Of the cluster that the node belongs to; empty while that is not known."""
        kernel = self._kernel
        return b"" if kernel is None else kernel.cluster_uuid

    def stats(self, timeout_seconds: float = 5.0) -> dict[str, Any]:
        """The kernel's status with the wire's counters."""

        def question() -> dict[str, Any]:
            kernel, links, transport = self._kernel, self._links, self._transport
            assert kernel is not None and links is not None and transport is not None
            return {**kernel.status(monotonic_ms()), **_wire_status(links, transport, self)}

        answer: dict[str, Any] = self.ask(question, timeout_seconds)
        return answer


def _wire_status(links: Links, transport: Transport, driver: Driver) -> dict[str, Any]:
    return {
        "wire": {**links.counters, **transport.counters()},
        "wire_problems": dict(links.problems),
        "late_ms_max": driver.late_ms_max,
    }


def _transport_settings(keys: ClusterKeys) -> TransportSettings:
    return TransportSettings(keys=tuple(TransportKeys(*pair) for pair in keys.curve))


class MemberDriver(Driver):
    """Runs one member."""

    def __init__(
        self,
        settings: MemberSettings,
        storage_factory: Callable[[], LogStorage],
        *,
        also_bind: str | None = None,
    ) -> None:
        super().__init__(settings.node, start_timeout_ms=settings.timing.start_timeout_ms)
        self._settings = settings
        self._make_storage = storage_factory
        self._also_bind = also_bind
        self._storage: LogStorage | None = None
        self._disk: DiskAgent | None = None
        # Found before anything is opened: a bad secret or an unknown transport costs no port and no file.
        self._keys = ClusterKeys.from_secrets(settings.secrets, settings.cluster)
        self._make_transport = find_transport(settings.transport)

    def _open(self) -> None:
        settings = self._settings
        storage = self._make_storage()
        self._storage = storage
        recovered = storage.open()
        for note in recovered.notes:
            log.warning(
                "%s: %s", settings.node, note, extra={"event": "storage.recovered", "node": settings.node}
            )
        disk = DiskAgent(storage)
        self._disk = disk
        now = monotonic_ms()
        kernel = MemberKernel(
            node_id=settings.node,
            members=settings.members,
            timing=settings.timing,
            identity=recovered.identity,
            recovered=recovered.groups.get(0),
            snapshot=disk.read_snapshot(),
            random_bytes=os.urandom,
            random_ticks=random.SystemRandom().randint,
            now=now,
            reads_by_lease=settings.reads == "lease",
            wants_bootstrap=settings.bootstrap,
        )
        identity = ChannelIdentity(
            settings.cluster,
            settings.node,
            int.from_bytes(os.urandom(8), "big") >> 1,
            True,
            recovered.identity.disk_id,
        )
        transport = self._make_transport(_transport_settings(self._keys))
        self._transport = transport
        transport.bind(settings.bind or settings.endpoint)
        if self._also_bind is not None:
            transport.bind(self._also_bind)
        links = Links(transport, self._keys, identity, members=settings.members, random_bytes=os.urandom)
        for name, endpoint in sorted(settings.members.items()):
            if name != settings.node:
                links.connect(endpoint, name, (Lane.CONTROL, Lane.BULK))
        kernel.wire_status = lambda: _wire_status(links, transport, self)
        kernel.open_session(now)
        self._links = links
        self._kernel = kernel
        log.info("%s: node started", settings.node, extra={"event": "node.started", "node": settings.node})

    def _carry_out(self, kernel: MemberKernel, now: int) -> None:
        links, storage, disk = self._links, self._storage, self._disk
        assert links is not None and storage is not None and disk is not None
        for _ in range(1000):
            effects = kernel.collect(now)
            if effects is None:
                return
            for name, messages in effects.sends.items():
                links.send(name, messages)
            if effects.completed or effects.changes or effects.events or effects.calls:
                # Before the disk: none of it depends on this write, and a failing one must not swallow it.
                self._deliver(effects)
            if effects.identity is not None:
                storage.set_identity(effects.identity)
                kernel.identity_stored(effects.identity, now)
            if effects.persist is not None:
                storage.write(effects.persist)
                kernel.persisted(now)
            for route, messages in effects.client_sends.items():
                links.reply(route, messages, kernel)
            if effects.disk:
                disk.carry_out(effects.disk, kernel, links)

    def _why_not_started(self) -> str:
        kernel, links, settings = self._kernel, self._links, self._settings
        assert isinstance(kernel, MemberKernel) and links is not None
        seconds = settings.timing.start_timeout_ms / 1000
        others = [name for name in sorted(settings.members) if name != settings.node]
        reasons = []
        for name in others:
            if name in links.problems:
                reasons.append(links.problems[name])
            elif not links.is_connected(name):
                reasons.append(
                    f"member {name!r} at {settings.members[name]} does not answer: is it running, and can it be reached?"
                )
        if kernel.is_formed:
            reasons.extend(peer.problem for peer in kernel.peers.known.values() if peer.problem)
            count = len(settings.members)
            head = f"no quorum within {seconds:g} s: a leader needs {count // 2 + 1} of {count} members"
        else:
            reasons.extend(peer.problem for peer in kernel.peers.known.values() if peer.problem)
            reasons.extend(kernel.peers.awaited())
            head = (
                f"no cluster within {seconds:g} s: a new one forms when all {len(settings.members)} members run at "
                "once for the first time (or a quorum of them, one with bootstrap=True)"
            )
        return head + "".join(f"\n  - {reason}" for reason in reasons)

    def _resources(self) -> list[Any]:
        return [self._storage, self._disk, *super()._resources()]

    def after_fork_in_child(self) -> None:
        super().after_fork_in_child()
        if self._storage is not None:
            self._storage.after_fork_in_child()
        self._keys.wipe()


class ClientDriver(Driver):
    """
    Runs a client: no vote, no disk.

    Without a session it is an observer: it has started as soon as one member answers, leader or not,
    and can only ask for their status.
    """

    def __init__(self, settings: ClientSettings, *, wants_session: bool = True) -> None:
        self._client_name = settings.name or f"client-{os.getpid()}-{os.urandom(3).hex()}"
        super().__init__(self._client_name, start_timeout_ms=settings.timing.start_timeout_ms)
        self._settings = settings
        self._wants_session = wants_session
        self._keys = ClusterKeys.from_secrets(settings.secrets, settings.cluster)
        self._make_transport = find_transport(settings.transport)

    def _open(self) -> None:
        settings = self._settings
        now = monotonic_ms()
        kernel = ClientKernel(
            name=self._client_name,
            timing=settings.timing,
            random_bytes=os.urandom,
            now=now,
            wants_session=self._wants_session,
        )
        transport = self._make_transport(_transport_settings(self._keys))
        self._transport = transport
        identity = ChannelIdentity(
            settings.cluster, self._client_name, int.from_bytes(os.urandom(8), "big") >> 1, False, b""
        )
        links = Links(transport, self._keys, identity, members=(), random_bytes=os.urandom)
        for endpoint in settings.endpoints:
            links.connect(endpoint)
        kernel.open_session(now)
        self._links = links
        self._kernel = kernel

    def _carry_out(self, kernel: ClientKernel, now: int) -> None:
        links = self._links
        assert links is not None
        if kernel.wanted_endpoints:
            endpoints, kernel.wanted_endpoints = kernel.wanted_endpoints, {}
            try:
                links.connect_missing(endpoints)
            except ConfigError as error:
                # Members may know each other by addresses that mean nothing here: go on with those that do.
                log.warning("%s: %s", self._name, error, extra={"event": "client.unknown-endpoint"})
        for _ in range(1000):
            effects = kernel.collect(now)
            if effects is None:
                return
            for name, messages in effects.sends.items():
                links.send(name, messages)
            if effects.completed or effects.changes or effects.events or effects.calls:
                self._deliver(effects)

    def ask_status(self, timeout_seconds: float) -> dict[str, dict[str, Any]]:
        """The status of every member that is connected, by name; those that do not answer in time are missing."""
        answers: dict[str, dict[str, Any]] = {}
        done = threading.Event()

        def question() -> int:
            kernel = self._kernel
            assert isinstance(kernel, ClientKernel)
            names = kernel.connected

            def answer(name: str, status: dict[str, Any]) -> None:
                answers[name] = status
                if len(answers) >= len(names):
                    done.set()

            for name in names:
                kernel.ask_status(name, answer)
            if not names:
                done.set()
            return len(names)

        self.ask(question, timeout_seconds)
        done.wait(timeout_seconds)
        return dict(answers)

    def _why_not_started(self) -> str:
        links, kernel = self._links, self._kernel
        assert links is not None and isinstance(kernel, ClientKernel)
        seconds = self._settings.timing.start_timeout_ms / 1000
        if links.problems:
            reasons = "".join(f"\n  - {reason}" for reason in links.problems.values())
        elif kernel.connected:
            reasons = f"\n  - connected to {', '.join(kernel.connected)}, but they have no leader: see `coordlib status`"
        else:
            reasons = "".join(f"\n  - nobody answers at {endpoint}" for endpoint in self._settings.endpoints)
        return f"could not attach within {seconds:g} s:{reasons}"

    def after_fork_in_child(self) -> None:
        super().after_fork_in_child()
        self._keys.wipe()
