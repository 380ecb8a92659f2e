"""Transactions as users hold them: over replicated maps and locks, databases, and services, in one atomic outcome.

::

    with cluster.transaction(timeout=5) as tx:
        connection = tx.enlist(orders)             # a database that was registered with cluster.resource(...)
        connection.execute("insert ...")
        stock["sku-1"] -= 1                        # replicated state rides in the decision itself

What must not live here: how commit goes (`coordlib.txn`), and what goes on behind (`coordinator`).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, Self, TypeVar, cast

from coordlib.api.guards import Guard, guard_of
from coordlib.api.overlay import Enclosing, Overlay, current_overlay
from coordlib.config import milliseconds
from coordlib.errors import (
    CoordError,
    FlavourError,
    ForkedError,
    IndeterminateError,
    TransactionAborted,
    TransactionConflict,
    TransactionOutcomeUnknown,
    UsageError,
)
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import Engine, OpGen, Step, arun, run
from coordlib.txn.branches import Branch
from coordlib.txn.commit import abort_gen, commit_gen, finish_gen, leave
from coordlib.txn.gtid import node_tag
from coordlib.txn.members import LocalMember
from coordlib.txn.service import RemoteMember
from coordlib.txn.transaction import Decided, State
from coordlib.txn.transaction import Transaction as Record
from coordlib.types import Revision
from coordlib.wire.messages import RequestKind

if TYPE_CHECKING:
    from coordlib.api.cluster import AsyncCluster, Cluster
    from coordlib.api.coordinator import Coordinator
    from coordlib.api.locks import Grant

__all__ = ["AsyncTransaction", "Options", "Outcome", "Transaction"]

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("coordlib")
ISOLATIONS: Final = ("serializable", "snapshot")
ACKS: Final = ("applied", "decided")
PROPAGATIONS: Final = ("join", "requires_new", "mandatory", "never")
BACK_OFF_SECONDS: Final = 0.005
BACK_OFF_SECONDS_MAX: Final = 0.5
TIMEOUT_MS_MAX: Final = 600_000

_current: ContextVar[_TransactionBase | None] = ContextVar("coordlib_transaction", default=None)


def enclosing(cluster: object) -> _TransactionBase | None:
    """The innermost transaction of this handle that the caller is in; those of other handles may be within it."""
    found = _current.get()
    while found is not None and (found._cluster is not cluster or found._pid != os.getpid()):
        found = found._outer
    return found


class Options(NamedTuple):
    """How a transaction is run. See `Cluster.transaction`."""

    timeout_ms: int
    is_serializable: bool
    until_applied: bool
    is_read_only: bool
    propagation: str

    @classmethod
    def of(cls, timeout: float, isolation: str, ack: str, read_only: bool, propagation: str) -> Options:
        """
        Raises:
            UsageError: One of them is wrong.
        """
        for name, value, known in (
            ("isolation", isolation, ISOLATIONS),
            ("ack", ack, ACKS),
            ("propagation", propagation, PROPAGATIONS),
        ):
            if value not in known:
                raise UsageError(f"{name} is one of {', '.join(map(repr, known))}; got {value!r}")
        timeout_ms = milliseconds(timeout, "timeout", low=1, high=TIMEOUT_MS_MAX)
        return cls(timeout_ms, isolation == "serializable", ack == "applied", bool(read_only), propagation)


class Outcome:
    """What a transaction came to, as `Cluster.outcome` tells."""

    NONE = "none"  # not decided: it may still be either
    COMMITTED = "committed"
    ABORTED = "aborted"
    UNKNOWN = "unknown"  # too long ago


_OUTCOMES: Final = {
    TxStatus.NONE: Outcome.NONE,
    TxStatus.COMMITTED: Outcome.COMMITTED,
    TxStatus.ABORTED: Outcome.ABORTED,
    TxStatus.UNKNOWN: Outcome.UNKNOWN,
}


def outcome_gen(gtid: bytes, request_timeout_ms: int) -> OpGen[str]:
    """What is recorded of a transaction. Decides nothing."""
    if type(gtid) is not bytes or len(gtid) != 16:
        raise UsageError(
            f"a gtid is 16 bytes, got {gtid!r}: of the 32 digits in messages bytes.fromhex(...) makes one. Transactions of "
            "replicated state alone have none"
        )
    reply = yield Step(RequestKind.QUERY, commands.query_tx_state(gtid), monotonic_ms() + request_timeout_ms)
    return _OUTCOMES[TxStatus(commands.decode_reply(reply)[0])]


class _TransactionBase:
    """The operations, once, for both faces. For one thread or task at a time."""

    def __init__(self, cluster: Cluster | AsyncCluster, options: Options) -> None:
        self._cluster = cluster
        self._options = options
        self._record: Record | None = None
        self._overlay: Overlay | None = None
        self._joined: _TransactionBase | None = None
        self._outer: _TransactionBase | None = None  # of whatever handle
        self._enclosing: Enclosing | None = None
        self._is_block = False
        self._naming = threading.Lock()
        self._is_calling = False
        self._pid = os.getpid()
        self._hooks: dict[str, list[Callable[[], Any]]] = {
            "before_commit": [],
            "on_commit": [],
            "on_abort": [],
        }
        self._result: Decided | None = None
        self._grants: list[Grant] = []
        self._services: dict[str, RemoteMember] = {}
        self._notes: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<coordlib.{type(self).__name__} {self.state}>"

    @property
    def _coordinator(self) -> Coordinator:
        return self._cluster._coordinator

    @property
    def _outermost(self) -> _TransactionBase:
        return self if self._joined is None else self._joined._outermost

    @property
    def gtid(self) -> bytes:
        """Its name, once a database or a service takes part; empty before, and if it is of replicated state alone."""
        if self._joined is not None:
            return self._joined.gtid
        return b"" if self._record is None else self._record.gtid

    @property
    def state(self) -> str:
        """One word of `coordlib.txn.transaction.State`; "new" before it is begun."""
        if self._joined is not None:
            return self._joined.state
        return "new" if self._record is None else self._record.state.value

    @property
    def revision(self) -> Revision:
        """Of its replicated changes, once it is committed; 0 if it made none."""
        result = self._outermost._result
        return Revision(0 if result is None else result.revision)

    @property
    def notes(self) -> dict[Any, Any]:
        """What the application keeps for this transaction; a service that takes part has notes of its own."""
        outermost = self._outermost
        return self._notes if outermost is self else outermost.notes

    def remaining(self) -> float:
        """Seconds until its time is over: nothing is decided after that."""
        return max(0, self._active.expires_ms - monotonic_ms()) / 1000

    @property
    def _active(self) -> Record:
        if self._joined is not None:
            return self._joined._active
        record = self._record
        if self._pid != os.getpid():
            raise ForkedError("this transaction belongs to the parent process")
        if record is None:
            raise UsageError("the transaction is not begun: use it in a `with` block")
        if record.state is not State.ACTIVE:
            state = record.state.value
            if record.state is State.ENDED:
                state = "rolled back" if self._outermost._result is None else "committed"
            raise UsageError(f"the transaction has ended ({state}): begin another one")
        return record

    def doom(self, reason: str = "doom() was called") -> None:
        """Whatever happens, it will not commit: the end of the block raises TransactionAborted."""
        self._active.doomed = str(reason) or "doom() was called"

    def _doom_by_inner(self, error: BaseException) -> None:
        """An error leaves a block that had joined: what it has done may be half of something, whoever swallows that."""
        try:
            record = self._active
        except UsageError:
            return  # it has ended
        record.doomed = record.doomed or f"an inner block raised {type(error).__name__}"

    def guard(self, grant: Guard) -> None:
        """Commit only if the grant is still its lock's then. (`guard=` of a write does this, too.)"""
        guard = guard_of(grant)
        assert guard is not None
        self._open_overlay.guard(guard)

    def release(self, grant: Grant) -> None:
        """
        Give the lock back in the very moment of the commit, and commit only if it is still held then.

        After an abort the lock is held as before.
        """
        self.guard(grant)
        self._open_overlay.release(grant._lock_name, grant._sequence)
        self._outermost._grants.append(grant)

    @property
    def _open_overlay(self) -> Overlay:
        if self._joined is not None:
            return self._joined._open_overlay
        overlay = self._overlay
        if overlay is None:
            raise UsageError("the transaction is not begun: use it in a `with` block")
        overlay.check_open()
        return overlay

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """
        A block that can fail alone: an exception that leaves it undoes its changes of replicated state, and goes on.

        Databases have savepoints of their own in their own language, and are not touched.
        """
        overlay = self._open_overlay
        saved = overlay.save()
        grants = self._outermost._grants
        grant_count = len(grants)
        try:
            yield
        except BaseException:
            overlay.restore(saved)
            del grants[grant_count:]
            raise

    def before_commit(self, hook: Callable[[], Any]) -> None:
        """Called at the end of the outermost block; what it raises aborts. It may still read and write."""
        self._add_hook("before_commit", hook)

    def on_commit(self, hook: Callable[[], Any]) -> None:
        """
        Called when it is committed, also where a HeuristicOutcome is raised. What it raises is logged: nothing can be
        undone by it. After a TransactionOutcomeUnknown neither these nor those of `on_abort` are called.
        """
        self._add_hook("on_commit", hook)

    def on_abort(self, hook: Callable[[], Any]) -> None:
        """Called when it is certainly aborted, whatever the reason. What it raises is logged."""
        self._add_hook("on_abort", hook)

    def _add_hook(self, when: str, hook: Callable[[], Any]) -> None:
        self._active  # noqa: B018  # raises if it has ended
        self._outermost._keep_hook(when, hook)

    def _keep_hook(self, when: str, hook: Callable[[], Any]) -> None:
        self._hooks[when].append(hook)

    def _when_ended(self) -> str:
        """Which hooks are to be called; none if the outcome is not known."""
        assert self._record is not None
        outcome = self._record.outcome
        if outcome is None:
            return ""
        return "on_commit" if outcome is State.COMMITTED else "on_abort"

    # -- life

    def _begin(self) -> None:
        """
        Raises:
            UsageError: It was begun before, or what `propagation` asks for is not so.
        """
        if self._record is not None or self._joined is not None:
            raise UsageError("a transaction is begun once: make a new one")
        outer = enclosing(self._cluster)
        propagation = self._options.propagation
        if outer is None and propagation == "mandatory":
            raise UsageError(
                "propagation='mandatory': this must be called within a transaction of the same handle, and there is none"
            )
        if outer is not None and propagation == "never":
            raise UsageError(
                "propagation='never': this must not be called within a transaction, and there is one"
            )
        if outer is not None and propagation != "requires_new":
            if outer.has_ended:
                raise UsageError(
                    "the transaction that this would join has ended, and this task was begun in it: begin tasks that "
                    "outlive it before it, or with context=contextvars.Context(); or ask for requires_new"
                )
            self._joined = outer
            return
        self._cluster._engine  # noqa: B018  # raises if the handle cannot be used
        options = self._options
        self._record = Record(b"", "", b"\0\0", commands.NO_DEADLINE, monotonic_ms() + options.timeout_ms)
        self._overlay = Overlay(is_read_only=options.is_read_only, is_serializable=options.is_serializable)
        self._outer = _current.get()
        self._enclosing = Enclosing(self._cluster, self._overlay, current_overlay.get())
        _current.set(self)
        current_overlay.set(self._enclosing)

    @property
    def has_ended(self) -> bool:
        return self._record is not None and self._record.state is not State.ACTIVE

    def _is_over(self, error: BaseException | None) -> bool:
        """
        Whether the end of the block has nothing to end.

        Raises:
            ForkedError: This is a forked child's copy, and the block thinks that all is well.
        """
        if self._pid == os.getpid():
            return self.has_ended
        self._leave()
        if error is None:
            raise ForkedError("this transaction belongs to the parent process, where it goes on")
        return True

    def _check_mine_to_end(self, method: str) -> None:
        """
        Raises:
            UsageError: It is a `with` block that ends it, or another thread or task.
        """
        if self._is_block:
            raise UsageError(
                f"{method}() is for transactions that begin() began: the `with` block commits at its end; raise, or call "
                "doom(), if it must not"
            )
        found = _current.get()
        while found is not None and found is not self._outermost:
            found = found._outer
        if found is None:
            raise UsageError(f"{method}() is for the thread or task that began the transaction")

    def _leave(self) -> None:
        # Not by tokens: the end may come in another order, or (a generator's) in another context than the beginning.
        if self._overlay is not None:
            self._overlay.has_ended = True
        if _current.get() is self:
            outer = self._outer
            while outer is not None and outer.has_ended:
                outer = outer._outer
            _current.set(outer)
        found = current_overlay.get()
        if found is not None and found is self._enclosing:
            while found is not None and found.overlay.has_ended:
                found = found.outer
            current_overlay.set(found)

    def _name_gen(self) -> OpGen[Record]:
        """From here on it needs a name, by which those who take part ask for its outcome."""
        record = self._active
        if not record.gtid:
            gtid, log_time_ms = yield from self._coordinator.name_gen()
            with self._naming:
                # One name only, whoever else has asked for it meanwhile: what is prepared by another is not in it.
                if record.gtid:
                    self._coordinator.ended(gtid)
                else:
                    record.node = self._coordinator.who
                    record.node_tag = node_tag(record.node)
                    record.deadline_ms = log_time_ms + max(0, record.expires_ms - monotonic_ms())
                    record.gtid = gtid
        return record

    def _commit_gen(self) -> OpGen[None]:
        record, overlay = self._record, self._overlay
        assert record is not None
        assert overlay is not None
        try:
            record.change = overlay.change(has_branches=bool(record.members))
            self._result = yield from commit_gen(
                record, self._coordinator.context, until_applied=self._options.until_applied
            )
        except TransactionOutcomeUnknown:
            self._coordinator.doubt_time()
            raise
        except TransactionAborted as error:
            if error.reason == "deadline" and monotonic_ms() < record.expires_ms:
                self._coordinator.doubt_time()
            raise
        finally:
            self._ended(record)

    def _rollback_gen(self) -> OpGen[None]:
        record = self._record
        assert record is not None
        try:
            if record.state is State.ACTIVE:
                self._coordinator.count("rolled_back")
                yield from abort_gen(record, self._coordinator.context)
        finally:
            self._ended(record)

    def _ended(self, record: Record) -> None:
        if record.outcome is State.COMMITTED:
            for grant in self._grants:
                grant._is_released = True
                self._cluster._grants.discard(grant)
        if record.gtid and not self._has_to_be_told:
            self._coordinator.ended(record.gtid)

    def _finish_gen(self) -> OpGen[None]:
        record = self._record
        assert record is not None
        try:
            yield from finish_gen(record, self._coordinator.context)
        finally:
            self._coordinator.ended(record.gtid)

    def _hand_over(self) -> None:
        """Interrupted: those who have promised, and whom nobody is telling, are told in the background."""
        record = self._record
        assert record is not None
        if record.state is State.COMMITTED:
            leave(record, self._coordinator.context)
        if record.gtid and record.outcome is not None:
            self._coordinator.ended(record.gtid)

    @property
    def _has_to_be_told(self) -> bool:
        """Whether those who promised are told behind the caller's back."""
        record = self._record
        return (
            record is not None
            and record.state is State.COMMITTED
            and self._result is not None
            and not self._options.until_applied
        )

    def _branch(self, record: Record, resource: Any) -> bytes:
        """The name of a new branch in the resource."""
        self._coordinator.check_registered(resource)
        if hasattr(resource, "outcome"):  # a DecidingResource; isinstance() of a protocol is slow
            record.set_decider(resource.tag)
        return record.name_branch(resource.tag)

    def _seconds_left(self, record: Record) -> Callable[[], float]:
        return lambda: max(0, record.expires_ms - monotonic_ms()) / 1000

    def _enlisted(self, record: Record, resource: Any, using: Any, read_only: bool) -> LocalMember | None:
        """The branch that there is in the resource: for those who enlist it again."""
        if not (hasattr(resource, "begin") or hasattr(resource, "is_last_resource")):
            raise UsageError(
                f"enlist() takes what was given to cluster.resource(...), or a branch; got {type(resource).__name__}. A "
                "connection of yours goes into `using`"
            )
        for member in record.members:
            if not isinstance(member, LocalMember):
                continue
            if member.branch is resource or member.branch.resource is resource:
                if using is not None and using is not given_by(member.branch):
                    raise UsageError(
                        f"{resource!r} takes part already, on a connection of its own or another one"
                    )
                if not read_only:
                    member.expects_read_only = False
                return member
        return None

    def _enlist_branch(self, record: Record, branch: Branch, read_only: bool) -> None:
        """
        Raises:
            UsageError: The transaction has ended meanwhile, or has too many branches.
        """
        self._active  # noqa: B018  # raises if it has ended
        record.enlist(branch, expects_read_only=read_only)

    @property
    def _last_engine(self) -> Engine:
        """For what must be ended though the handle may have been closed: a node that has stopped ends requests at once."""
        return cast(Engine, self._cluster._driver)


def given_by(branch: Any) -> Any:
    """What the application works with."""
    session = getattr(branch, "session", None)
    return branch.connection if session is None else session


def _by_driver(resource: Any, method: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = getattr(resource, method, None)
    if found is None:
        raise UsageError(f"{resource!r} makes its connections itself: enlist it without using=...")
    return found


class Transaction(_TransactionBase):
    """
    A transaction for threads, as a context manager: commits at the end of the block, or rolls back if it raises.

    .. versionadded:: 0.1
    """

    _cluster: Cluster

    def __enter__(self) -> Self:
        self._begin()
        self._is_block = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._joined is not None:
            if error is not None:
                self._outermost._doom_by_inner(error)
            return
        if self._is_over(error):
            return
        try:
            if error is None:
                try:
                    self._cluster._engine  # noqa: B018  # raises if the handle was closed meanwhile
                    for hook in self._hooks["before_commit"]:
                        hook()
                    self._commit()
                except BaseException:
                    if not self.has_ended:  # an interrupt may come before the commit has begun
                        self._roll_back()
                    raise
            else:
                self._roll_back()
        finally:
            self._leave()

    def _keep_hook(self, when: str, hook: Callable[[], Any]) -> None:
        if inspect.iscoroutinefunction(hook):
            raise FlavourError(
                f"a {when} hook of a plain transaction is a plain function; got an `async def`"
            )
        super()._keep_hook(when, hook)

    def _call_hooks(self, when: str) -> None:
        for hook in self._hooks.get(when, ()):
            try:
                hook()
            except Exception:
                log.exception(
                    "a %s hook of a transaction failed", when, extra={"event": "transaction.hook-failed"}
                )

    def begin(self) -> Self:
        """Begin it without a `with` block; end it by `commit` or `rollback`, in the same thread."""
        self._begin()
        return self

    def commit(self) -> None:
        """
        As at the end of a block. Raises what that does; if it had joined another one, that one commits.

        Raises:
            UsageError: It was not begun by `begin`, has ended, or was begun in another thread.
        """
        self._outermost._active  # noqa: B018  # raises if it is not begun, or has ended
        self._check_mine_to_end("commit")
        self.__exit__(None, None, None)

    def rollback(self) -> None:
        """As at the end of a block that raises; nothing if it has ended. Raises as `commit` does."""
        if self.state == State.ACTIVE.value:
            self._check_mine_to_end("rollback")
            error = UsageError("rollback() was called")
            self.__exit__(UsageError, error, None)

    def _commit(self) -> None:
        try:
            run(self._last_engine, self._commit_gen())
            if self._has_to_be_told:
                finish = self._finish_gen()
                if not self._coordinator.later(finish):
                    # Decisions are made faster than they are carried out: whoever makes them carries out, too.
                    run(self._last_engine, finish)
        except BaseException:
            self._hand_over()
            raise
        finally:
            self._call_hooks(self._when_ended())

    def _roll_back(self) -> None:
        try:
            run(self._last_engine, self._rollback_gen())
        except CoordError as failure:
            # What the block raised is on its way and must not be hidden.
            log.warning(
                "a transaction's rollback: %s", failure, extra={"event": "transaction.rollback-failed"}
            )
        self._call_hooks("on_abort")

    def enlist(self, resource: Any, *, using: Any = None, read_only: bool = False) -> Any:
        """
        Have a registered resource take part: returns the connection to work with until the transaction ends; of
        `SQLAlchemy` the session, of `Zope` the transaction that data managers join. Enlisted again, it is the same one.

        Args:
            resource: As it was given to `Cluster.resource`; or a `coordlib.txn.branches.Branch` of your own.
            using: A connection (or a session) of yours, which is in no transaction; by default the resource's own.
            read_only: Nothing will be written to it, which adapters may not find out by themselves. Said wrongly it
                costs one round more, and nothing else.

        Raises:
            UsageError: It is not registered, or it must have been enlisted before others.
            NoQuorum: The cluster could not be asked for the time; nothing was begun.
            Exception: The driver's: no connection.
        """
        record = self._cluster._run(self._outermost._name_gen())
        known = self._enlisted(record, resource, using, read_only)
        if not hasattr(resource, "begin"):
            if known is None:
                record.enlist(cast(Branch, resource), expects_read_only=read_only)
            return resource
        if known is not None:
            return given_by(known.branch)
        bqual = self._outermost._branch(record, resource)
        left = self._seconds_left(record)
        if using is None:
            branch = resource.begin(record.gtid, bqual, left)
        else:
            branch = _by_driver(resource, "enlist")(using, record.gtid, bqual, left)
        try:
            self._enlist_branch(record, branch, read_only)
        except BaseException:
            branch.rollback()
            raise
        return given_by(branch)


class AsyncTransaction(_TransactionBase):
    """
    `Transaction` for tasks. Cancelled before it is decided, it is rolled back; afterwards it has its outcome.

    .. versionadded:: 0.1
    """

    _cluster: AsyncCluster

    async def __aenter__(self) -> Self:
        self._begin()
        self._is_block = True
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._joined is not None:
            if error is not None:
                self._outermost._doom_by_inner(error)
            return
        if self._is_over(error):
            return
        try:
            if error is None:
                try:
                    self._cluster._engine  # noqa: B018  # raises if the handle was closed meanwhile
                    for hook in self._hooks["before_commit"]:
                        found = hook()
                        if inspect.isawaitable(found):
                            await found
                    await self._commit()
                except BaseException:
                    if not self.has_ended:  # cancelled before the commit has begun
                        await self._roll_back()
                    raise
            else:
                await self._roll_back()
        finally:
            self._leave()

    async def begin(self) -> Self:
        """See `Transaction.begin`."""
        self._begin()
        return self

    async def commit(self) -> None:
        """See `Transaction.commit`."""
        self._outermost._active  # noqa: B018  # raises if it is not begun, or has ended
        self._check_mine_to_end("commit")
        await self.__aexit__(None, None, None)

    async def rollback(self) -> None:
        """See `Transaction.rollback`."""
        if self.state == State.ACTIVE.value:
            self._check_mine_to_end("rollback")
            error = UsageError("rollback() was called")
            await self.__aexit__(UsageError, error, None)

    async def _call_hooks(self, when: str) -> None:
        for hook in self._hooks.get(when, ()):
            try:
                found = hook()
                if inspect.isawaitable(found):
                    await found
            except Exception:
                log.exception(
                    "a %s hook of a transaction failed", when, extra={"event": "transaction.hook-failed"}
                )

    async def _commit(self) -> None:
        try:
            await arun(self._last_engine, self._commit_gen())
            if self._has_to_be_told:
                self._cluster._background(self._finish_gen())
        except BaseException:
            self._hand_over()
            raise
        finally:
            await self._call_hooks(self._when_ended())

    async def _roll_back(self) -> None:
        try:
            await arun(self._last_engine, self._rollback_gen())
        except CoordError as failure:
            log.warning(
                "a transaction's rollback: %s", failure, extra={"event": "transaction.rollback-failed"}
            )
        await self._call_hooks("on_abort")

    async def enlist(self, resource: Any, *, using: Any = None, read_only: bool = False) -> Any:
        """See `Transaction.enlist`. Of a resource with an asynchronous driver, the asynchronous connection."""
        record = await self._cluster._arun(self._outermost._name_gen())
        known = self._enlisted(record, resource, using, read_only)
        if not hasattr(resource, "begin"):
            if known is None:
                record.enlist(cast(Branch, resource), expects_read_only=read_only)
            return resource
        if known is not None:
            return given_by(known.branch)
        bqual = self._outermost._branch(record, resource)
        left = self._seconds_left(record)
        if hasattr(resource, "abegin"):
            if using is None:
                branch = await resource.abegin(record.gtid, bqual, left)
            else:
                branch = await _by_driver(resource, "aenlist")(using, record.gtid, bqual, left)
        elif using is None:
            branch = await self._begin_on_a_thread(lambda: resource.begin(record.gtid, bqual, left))
        else:
            enlist = _by_driver(resource, "enlist")
            branch = await self._begin_on_a_thread(lambda: enlist(using, record.gtid, bqual, left))
        try:
            self._enlist_branch(record, branch, read_only)
        except BaseException:
            await (branch.arollback() if hasattr(branch, "arollback") else asyncio.to_thread(branch.rollback))
            raise
        return given_by(branch)

    async def _begin_on_a_thread(self, begin: Callable[[], Any]) -> Any:
        """Cancelled, it leaves no branch behind that nobody would end."""
        future = asyncio.get_running_loop().run_in_executor(None, begin)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._unwanted)
            raise

    def _unwanted(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._coordinator.roll_back(future.result())


def is_retryable(coordinator: Coordinator, error: BaseException) -> bool:
    """Whether running a transaction anew may help: something that it needed had been changed or locked by others."""
    if isinstance(error, IndeterminateError):
        return False  # it may have happened: run again, it might happen twice
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return False
        if isinstance(seen, TransactionConflict):
            return True
        if any(
            getattr(resource, "is_conflict", lambda error: False)(seen)
            for resource in coordinator.resources.values()
        ):
            return True
        seen = seen.__cause__
    return False


def _pause_seconds(attempt: int) -> float:
    # Random, so that those who got into each other's way do not meet again.
    return random.uniform(0.5, 1.0) * min(BACK_OFF_SECONDS_MAX, BACK_OFF_SECONDS * float(1 << attempt))


def decorate(
    make: Callable[[], Transaction], coordinator: Callable[[], Coordinator], retries: int
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """What `Cluster.transactional` returns."""

    def decorator(function: Callable[P, T]) -> Callable[P, T]:
        if inspect.iscoroutinefunction(function):
            raise FlavourError(
                f"{function.__name__} is an `async def`: use an AsyncCluster to decorate coroutines"
            )
        check_decorable(function)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            for attempt in range(retries + 1):
                transaction = make()
                try:
                    with transaction:
                        return _not_yet_to_run(function(*args, **kwargs))
                except Exception as error:
                    # An inner function's conflict is the outer one's to retry: it is one transaction.
                    is_inner = transaction._joined is not None
                    if is_inner or attempt == retries or not is_retryable(coordinator(), error):
                        raise
                time.sleep(_pause_seconds(attempt))
            raise AssertionError("unreachable")

        return wrapper

    return decorator


def adecorate(
    make: Callable[[], AsyncTransaction], coordinator: Callable[[], Coordinator], retries: int
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """What `AsyncCluster.transactional` returns."""

    def decorator(function: Callable[P, T]) -> Callable[P, T]:
        check_decorable(function)
        if not inspect.iscoroutinefunction(function):
            raise FlavourError(
                f"{function.__name__} is no `async def`: use a Cluster to decorate plain functions"
            )

        @functools.wraps(function)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
            for attempt in range(retries + 1):
                transaction = make()
                try:
                    async with transaction:
                        return await cast(Awaitable[Any], function(*args, **kwargs))
                except Exception as error:
                    is_inner = transaction._joined is not None
                    if is_inner or attempt == retries or not is_retryable(coordinator(), error):
                        raise
                await asyncio.sleep(_pause_seconds(attempt))
            raise AssertionError("unreachable")

        return cast(Callable[P, T], wrapper)

    return decorator


def _not_yet_to_run(result: T) -> T:
    """
    Raises:
        FlavourError: What was returned has yet to be run, as of an object that is called like an `async def`.
    """
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
        raise FlavourError("a transactional function returned what would run after the transaction has ended")
    return result


def check_decorable(function: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise FlavourError(
            f"{function.__name__} is a generator: it would run after the transaction has ended. Use a `with` block in it"
        )


def check_retries(retries: int) -> int:
    if type(retries) is not int or not 0 <= retries <= 100:
        raise UsageError(f"retries is a number from 0 to 100; got {retries!r}")
    return retries
