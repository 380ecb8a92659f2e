"""Services: operations of other applications of the cluster, called by name, within a transaction or without.

::

    @cluster.participant("inventory")               # in the application that hosts it
    class Inventory:
        def reserve(self, sku, count): ...

    inventory = cluster.service("inventory")        # in any other
    with cluster.transaction() as tx:
        inventory.reserve("sku-1", 1)               # takes part; the same replica for all of the transaction

A service keeps its state in databases (`cluster.transaction()` in a handler joins the caller's, and enlists them),
or in its own way, with the four methods of `coordlib.txn.journal.Handler`.

What must not live here: the protocol (`coordlib.txn.service`, `participant`), and how calls travel (`node.calls`).
"""

from __future__ import annotations

import inspect
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from coordlib.api.codec import CANONICAL
from coordlib.api.coordinator import decider_service
from coordlib.api.overlay import Enclosing, Overlay, current_overlay
from coordlib.api.transactions import Options, Transaction, _current, _TransactionBase, enclosing
from coordlib.errors import (
    CallLost,
    CallTimeout,
    CoordError,
    FatalError,
    FlavourError,
    ForkedError,
    Overloaded,
    RemoteProtocolError,
    ServiceError,
    ServiceUnreachable,
    UsageError,
)
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.effects import InboundCall
from coordlib.node.operations import Do, OpGen, Step
from coordlib.node.session import SessionState, SessionView
from coordlib.txn.branches import DecidingResource
from coordlib.txn.gtid import node_tag
from coordlib.txn.journal import Handler, Journal, JournalBranch, JournalResource
from coordlib.txn.participant import Participants, Work
from coordlib.txn.service import (
    Answer,
    RemoteMember,
    Status,
    Verb,
    Wish,
    decode_answer,
    decode_wish,
    text_of_error,
)
from coordlib.txn.transaction import BRANCHES_MAX
from coordlib.txn.transaction import Transaction as Record
from coordlib.wire.messages import CallStatus, RequestKind

if TYPE_CHECKING:
    from coordlib.api.cluster import AsyncCluster, Cluster, _Handle

__all__ = ["AsyncService", "Host", "Service"]

log = logging.getLogger("coordlib")

THREADS: Final = 16
WAITING_MAX: Final = 1024
"""Calls that wait for a thread; more are refused with Overloaded."""

RETRY_SECONDS: Final = 0.02
REGISTER_AGAIN_SECONDS: Final = 0.5
CLOSE_SECONDS: Final = 1.0
_NO_CHANGES: Final = (
    "a service that takes part in a transaction cannot change maps in it: let its caller do it, and keep what is the "
    "service's own in its database or its journal"
)
_OWN: Final = frozenset(("prepare", "restore", "commit", "abort"))


# --- calling ----------------------------------------------------------------------------------------------


class _ServiceBase:
    def __init__(self, cluster: Cluster | AsyncCluster, name: str) -> None:
        if type(name) is not str or not name or len(name) > 255:
            raise UsageError(f"the name of a service is a str of 1 to 255 characters; got {name!r}")
        self._cluster = cluster
        self._name = name
        self._calls = 0

    def __repr__(self) -> str:
        return f"<coordlib.{type(self).__name__} {self._name!r}>"

    def _call_gen(self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpGen[Any]:
        payload = CANONICAL.encode([list(args), kwargs])
        found = enclosing(self._cluster)
        outer = None if found is None else found._outermost
        if outer is None:
            by = monotonic_ms() + self._cluster._request_timeout_ms
            self._calls += 1
            targets = yield from self._targets_gen(self._calls, by)
            body = Wish(Verb.CALL, self._name, operation=operation, payload=payload).encode()
            answer = decode_answer((yield from self._first_gen(targets, body, by)))
        else:
            answer = yield from self._take_part_gen(outer, operation, payload)
        if answer.status in (Status.RETURNED, Status.READ) and type(answer.payload) is bytes:
            return CANONICAL.decode(answer.payload)
        if answer.status == Status.RAISED:
            kind, message = answer.payload
            raise ServiceError(f"{self._name}.{operation} raised {kind}: {message}", type_name=str(kind))
        raise ServiceUnreachable(f"service {self._name!r} refused the call: {answer.payload}")

    def _targets_gen(self, choice: int, by: int) -> OpGen[list[int]]:
        """The sessions of all replicas, in the order in which they are to be tried."""
        reply = yield Step(RequestKind.QUERY, commands.query_services(self._name), by)
        rows, _ = commands.decode_reply(reply)
        if not rows:
            raise ServiceUnreachable(
                f"nobody hosts service {self._name!r} at present, and nothing was done: start an application that does, or "
                "try again"
            )
        first = choice % len(rows)
        return [row[1] for row in (*rows[first:], *rows[:first])]

    def _first_gen(self, targets: list[int], body: bytes, by: int) -> OpGen[bytes]:
        """Call the first replica that can be reached: one that died is registered until its session ends."""
        for target in targets[:-1]:
            try:
                reply: bytes = yield Step(RequestKind.CALL, body, by, target=target)
                return reply
            except ServiceUnreachable:
                pass  # certainly not delivered
        reply = yield Step(RequestKind.CALL, body, by, target=targets[-1])
        return reply

    def _take_part_gen(self, outer: _TransactionBase, operation: str, payload: bytes) -> OpGen[Answer]:
        if isinstance(outer, JoinedTransaction):
            raise UsageError(
                "a service that takes part in a transaction cannot call others in it: let its caller do it"
            )
        if outer._is_calling:
            raise UsageError(
                "services are called one after the other in a transaction, which is for one thread or task at a time: wait "
                "for the first call before the next"
            )
        outer._is_calling = True
        try:
            return (yield from self._take_part_alone_gen(outer, operation, payload))
        finally:
            outer._is_calling = False

    def _take_part_alone_gen(self, outer: _TransactionBase, operation: str, payload: bytes) -> OpGen[Answer]:
        record = yield from outer._name_gen()
        member = outer._services.get(self._name)
        if member is not None:
            return (yield from self._ask_gen(record, member, operation, payload))
        number = len(outer._services)
        if number >= BRANCHES_MAX // 4:
            raise UsageError("a transaction calls 16 services at most")
        choice = int.from_bytes(record.gtid[-2:], "big")
        targets = yield from self._targets_gen(choice, record.expires_ms)
        while True:
            target = targets.pop(0)
            member = RemoteMember(
                self._name, target, record.gtid, number, record.deadline_ms, record.decider_tag
            )
            outer._services[self._name] = member
            record.members.append(member)
            try:
                return (yield from self._ask_gen(record, member, operation, payload))
            except ServiceUnreachable:
                if not targets or record.doomed:
                    raise
                # Certainly not delivered: it takes no part, and another replica can.
                record.members.remove(member)
                del outer._services[self._name]

    def _ask_gen(self, record: Record, member: RemoteMember, operation: str, payload: bytes) -> OpGen[Answer]:
        step = member.call(operation, payload, record.expires_ms)
        is_lost = False
        while True:
            try:
                answer = decode_answer((yield step))
                if answer.status != Status.BUSY:
                    member.expects_read_only = answer.status == Status.READ
                    return answer
                is_lost = True  # it runs there; its answer has yet to come
            except ServiceUnreachable:
                if is_lost:
                    record.doomed = f"the answer to {self._name}.{operation} was lost"
                raise
            except (CallLost, CallTimeout, Overloaded):
                # Asked again, it is not done again: the sequence says that it is the same.
                is_lost = True
                if monotonic_ms() + RETRY_SECONDS * 1000 >= record.expires_ms:
                    record.doomed = f"the answer to {self._name}.{operation} was lost"
                    raise
            except BaseException:
                # Its caller does not wait for it any more (a cancelled task), and may go on: whether it runs is not known.
                record.doomed = record.doomed or f"the call of {self._name}.{operation} was given up"
                raise
            try:
                yield Step.pause(RETRY_SECONDS)
            except BaseException:
                record.doomed = record.doomed or f"the call of {self._name}.{operation} was given up"
                raise
            step = member.call_again(operation, payload, record.expires_ms)


class Service(_ServiceBase):
    """
    A service of the cluster: its operations are this object's methods. Arguments and results are canonical values.

    Within a transaction of the same handle it takes part in it. Every call raises ServiceError if the operation
    itself raised, ServiceUnreachable if nobody hosts it (nothing happened), CallTimeout or CallLost if no answer
    came: outside of a transaction it may have happened then.

    .. versionadded:: 0.1
    """

    _cluster: Cluster

    def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run an operation there, and return its result."""
        return self._cluster._run(self._call_gen(operation, args, kwargs))

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        if operation.startswith("_"):
            raise AttributeError(operation)
        return lambda *args, **kwargs: self.call(operation, *args, **kwargs)


class AsyncService(_ServiceBase):
    """
    `Service` for tasks.

    .. versionadded:: 0.1
    """

    _cluster: AsyncCluster

    async def call(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        """See `Service.call`."""
        return await self._cluster._arun(self._call_gen(operation, args, kwargs))

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        if operation.startswith("_"):
            raise AttributeError(operation)
        return lambda *args, **kwargs: self.call(operation, *args, **kwargs)


# --- hosting ----------------------------------------------------------------------------------------------


class JoinedTransaction(Transaction):
    """Another application's transaction, as the handlers of a service that takes part in it have it."""

    def __init__(self, cluster: Cluster, work: Work) -> None:
        super().__init__(cluster, Options.of(1.0, "serializable", "applied", True, "join"))
        self._work = work
        self._has_returned = False

    @property
    def notes(self) -> dict[Any, Any]:
        """Empty at the first call of the service, gone at the end."""
        return self._work.notes

    @property
    def gtid(self) -> bytes:
        return self._work.gtid

    @property
    def state(self) -> str:
        return self._work.state.value

    @property
    def _active(self) -> Record:
        if self._pid != os.getpid():
            raise ForkedError("this transaction belongs to the parent process")
        if self._has_returned:
            raise UsageError(
                "the call has returned: what it does in its caller's transaction, it does before that"
            )
        return cast(Record, self._work)  # the same for what is asked of it: names, branches, time

    @property
    def has_ended(self) -> bool:
        return self._has_returned

    def _keep_hook(self, when: str, hook: Callable[[], Any]) -> None:
        raise UsageError(
            f"{when}() is for the application that began the transaction: a service hears of its end in the methods of "
            "coordlib.txn.journal.Handler, or not at all"
        )

    @property
    def _open_overlay(self) -> Overlay:
        raise UsageError(
            "a service changes no replicated state in its caller's transaction: guards, releases of locks and savepoints are "
            "for the application that began it"
        )

    def _name_gen(self) -> OpGen[Record]:
        return self._active
        yield

    def _branch(self, record: Record, resource: Any) -> bytes:
        self._coordinator.check_registered(resource)
        if hasattr(resource, "outcome"):
            raise UsageError(
                "a resource that cannot prepare (SQLite) cannot take part in another application's transaction"
            )
        return record.name_branch(resource.tag)


class _Hosted:
    """One service of this process."""

    def __init__(self, name: str, handler: Any, resource: JournalResource | None) -> None:
        self.name = name
        self.handler = handler
        self.resource = resource
        self.is_registered = False
        self.operations = operations_of(handler, has_journal=resource is not None)


def operations_of(handler: Any, *, has_journal: bool) -> dict[str, Callable[..., Any]]:
    """
    Raises:
        FlavourError: One of them is an `async def`.
    """
    found = {
        key: value
        for key, value in inspect.getmembers(handler, callable)
        if not key.startswith("_") and not (has_journal and key in _OWN)
    }
    for key, value in found.items():
        if inspect.iscoroutinefunction(value):
            raise FlavourError(
                f"{key} is an `async def`, and services run on threads: make it a plain function, or start its name with _"
            )
    return found


class Host:
    """All services of one handle: takes calls from the node thread, and runs them on threads of its own."""

    def __init__(self, handle: _Handle) -> None:
        self._handle = handle
        coordinator = handle._coordinator
        self._coordinator = coordinator
        self._name = coordinator.who
        self.participants = Participants(self._name, node_tag(self._name), coordinator, threading.Lock())
        self._hosted: dict[str, _Hosted] = {}
        self._deciders: dict[str, None] = {}
        self._waiting: queue.SimpleQueue[InboundCall | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._journal: Journal | None = None
        self._lock = threading.Lock()
        self._session = 0
        self._is_closed = False
        coordinator.participants = self.participants
        handle._driver_for_calls.add_listener(self._session_changed)
        handle._driver_for_calls.set_call_handler(self._take)

    def add(self, name: str, handler: Any, open_journal: Callable[[], Journal]) -> None:
        """
        Raises:
            UsageError: A service of that name is hosted here already.
            NoQuorum, CommitTimeout: It is hosted, and nobody can find it: host it again.
            Exception: Of the handler, when what it had promised before was given back to it.
        """
        with self._lock:
            hosted = self._hosted.get(name)
            if hosted is None:
                hosted = self._hosted[name] = self._host(name, handler, open_journal)
                self._start_threads()
            elif hosted.handler is not handler or hosted.is_registered:
                raise UsageError(f"service {name!r} is hosted here already")
        if hosted.resource is not None:
            self._coordinator.register(hosted.resource)
        self._coordinator.start_agent()
        self._handle._run_here(self._register_gen(name))
        hosted.is_registered = True

    def _host(self, name: str, handler: Any, open_journal: Callable[[], Journal]) -> _Hosted:
        has_journal = hasattr(handler, "prepare")
        operations_of(handler, has_journal=has_journal)  # before anything is restored
        if not has_journal:
            return _Hosted(name, handler, None)
        missing = [method for method in sorted(_OWN) if not hasattr(handler, method)]
        if missing:
            raise UsageError(f"service {name!r} has prepare() and so needs {', '.join(missing)}(), too")
        if self._journal is None:
            self._journal = open_journal()
        resource = JournalResource(name, self._journal, cast(Handler, handler))
        resource.start()
        return _Hosted(name, handler, resource)

    def _start_threads(self) -> None:
        while len(self._threads) < THREADS:
            thread = threading.Thread(target=self._work, name="coordlib-services", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _register_gen(self, name: str) -> OpGen[None]:
        body = commands.service_register(name, self._name)
        yield Step(RequestKind.COMMAND, body, monotonic_ms() + self._handle._request_timeout_ms)

    def _register_again_gen(self, name: str, session: int) -> OpGen[None]:
        # Until it is done: nobody else would ever find the service again.
        while self._session == session and not self._is_closed:
            try:
                yield from self._register_gen(name)
                return
            except (UsageError, FatalError):
                raise  # the node has stopped
            except CoordError:
                yield Step.pause(REGISTER_AGAIN_SECONDS)

    def _session_changed(self, view: SessionView, state: SessionState) -> None:
        # In the node thread. What was registered has gone with the session before.
        if state is SessionState.CONNECTED and view.session_id != self._session:
            self._session = view.session_id
            for name in (*self._hosted, *self._deciders):
                self._coordinator.help(self._register_again_gen(name, view.session_id))

    def _take(self, inbound: InboundCall) -> None:
        """In the node thread: must not block."""
        if self._waiting.qsize() >= WAITING_MAX:
            error = Overloaded(
                f"{WAITING_MAX} calls wait for the services of this process; back off and retry"
            )
            self._handle._driver_for_calls.answer(inbound, CallStatus.ERROR, commands.encode_error(error))
            return
        self._waiting.put(inbound)

    def _work(self) -> None:
        while True:
            inbound = self._waiting.get()
            if inbound is None:
                return
            try:
                body = self._answer(inbound)
            except CoordError as error:
                self._reply(inbound, CallStatus.ERROR, commands.encode_error(error))
            except Exception:
                log.exception("a call could not be answered", extra={"event": "service.bug"})
                self._reply(inbound, CallStatus.UNKNOWN, b"")
            else:
                self._reply(inbound, CallStatus.OK, body)

    def _reply(self, inbound: InboundCall, status: int, body: bytes) -> None:
        try:
            self._handle._driver_for_calls.answer(inbound, status, body)
        except CoordError as error:
            log.warning("an answer could not be sent: %s", error, extra={"event": "service.answer"})
            self._handle._driver_for_calls.answer(inbound, CallStatus.UNKNOWN, b"")

    def _answer(self, inbound: InboundCall) -> bytes:
        left_ms = inbound.deadline_ms - monotonic_ms()
        if left_ms <= 0:
            return Answer(Status.REFUSED, "too late").encode()
        wish = decode_wish(inbound.body)
        if wish.verb == Verb.ASK:
            return self._answer_as_decider(wish).encode()
        hosted = self._hosted.get(wish.service)
        if hosted is None:
            return Answer(Status.REFUSED, f"service {wish.service!r} is not hosted here").encode()
        if wish.gtid:
            operation = self.participants.handle_gen(wish, left_ms, self._execute)
            answer: Answer = self._handle._run_here(operation)
            return answer.encode()
        try:
            result = self._run(hosted, wish.operation, wish.payload)
        except Exception as error:
            return Answer(Status.RAISED, [type(error).__name__, text_of_error(error)]).encode()
        return Answer(Status.RETURNED, result).encode()

    def _answer_as_decider(self, wish: Wish) -> Answer:
        decider = self._coordinator.decider(wish.decider_tag)
        if decider is None or self._coordinator.is_live(wish.gtid):
            return Answer(Status.BUSY)  # it may be decided yet: to ask now would be to forbid it
        try:
            return Answer(Status.ENDED, bool(decider.outcome(wish.gtid)))
        except Exception as error:
            return Answer(Status.REFUSED, text_of_error(error))

    def answer_for(self, resource: DecidingResource) -> None:
        """Let others, who are in doubt, ask what this last resource has decided."""
        name = decider_service(resource.tag)
        with self._lock:
            self._deciders[name] = None
            self._start_threads()
        self._handle._run_here(self._register_gen(name))

    def _execute(self, work: Work, operation: str, payload: bytes) -> Do:
        return Do(lambda: self._run_joined(work, operation, payload))

    def _run_joined(self, work: Work, operation: str, payload: bytes) -> bytes:
        hosted = self._hosted[work.service]
        joined = JoinedTransaction(cast("Cluster", self._handle), work)
        if hosted.resource is not None and not work.members:
            bqual = work.name_branch(hosted.resource.tag)
            work.enlist(JournalBranch(hosted.resource, work.gtid, bqual, work.deadline_ms, joined))
        # Changes of maps would have to travel to the initiator: they are refused, not made at once.
        overlay = Overlay(is_read_only=True, is_serializable=True, why_read_only=_NO_CHANGES)
        tokens = _current.set(joined), current_overlay.set(Enclosing(self._handle, overlay, None))
        try:
            return self._run(hosted, operation, payload)
        finally:
            joined._has_returned = overlay.has_ended = True
            _current.reset(tokens[0])
            current_overlay.reset(tokens[1])

    def _run(self, hosted: _Hosted, operation: str, payload: bytes) -> bytes:
        function = hosted.operations.get(operation)
        if function is None:
            known = ", ".join(map(repr, sorted(hosted.operations))) or "none"
            raise UsageError(f"service {hosted.name!r} has no operation {operation!r}; it has {known}")
        decoded = CANONICAL.decode(payload)
        if type(decoded) is not list or len(decoded) != 2:
            raise RemoteProtocolError("malformed arguments")
        args, kwargs = decoded
        try:
            result = function(*args, **kwargs)
        except Exception:
            raise
        except BaseException as error:
            # sys.exit() and the like would end this thread, and with it a part of the service.
            raise RuntimeError(f"it ended by {type(error).__name__}: {text_of_error(error)}") from error
        return CANONICAL.encode(result)

    def close(self) -> None:
        """Take no more calls. Never raises."""
        with self._lock:
            self._is_closed = True
            threads, self._threads = self._threads, []
        for _ in threads:
            self._waiting.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(
                max(0.0, deadline - time.monotonic())
            )  # an operation that hangs dies with the process
        if self._journal is not None:
            self._journal.close()
