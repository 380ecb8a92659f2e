"""The handles that users hold: `Cluster` for threads, `AsyncCluster` for tasks, `connect` and `local`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import secrets as random_secrets
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, ParamSpec, Self, TypeVar, cast

from coordlib.api import transactions
from coordlib.api.batches import AsyncBatch, Batch, Equals, Unchanged
from coordlib.api.codec import Codec
from coordlib.api.coordinator import Coordinator
from coordlib.api.grants import Grants
from coordlib.api.ids import AsyncIds, Ids, window_milliseconds
from coordlib.api.locks import AsyncLock, GrantCallback, Lock
from coordlib.api.maps import AsyncMap, Map
from coordlib.api.services import AsyncService, Host, Service
from coordlib.api.transactions import AsyncTransaction, Options, Transaction
from coordlib.config import (
    ClientSettings,
    MemberSettings,
    Timing,
    check_secrets,
    drift_percent,
    load_environment,
    load_file,
    milliseconds,
)
from coordlib.errors import ConfigError, FlavourError, ForkedError, NoQuorum, UsageError
from coordlib.ids.layout import DEFAULT, Layout
from coordlib.node.clock import monotonic_ms
from coordlib.node.driver import ClientDriver, Driver, MemberDriver
from coordlib.node.operations import Engine, OpGen, arun, check_usable, run, start
from coordlib.node.process import ProcessDriver
from coordlib.storage.files import PosixFileSystem
from coordlib.storage.memory import MemoryStorage
from coordlib.storage.segments import SegmentStorage
from coordlib.transport.registry import find_transport
from coordlib.txn.branches import DecidingResource, Resource
from coordlib.txn.gtid import cluster_tag
from coordlib.txn.journal import Journal, MemoryJournal, SqliteJournal
from coordlib.wire.keys import ClusterKeys, generate_secret

__all__ = ["AsyncCluster", "Cluster", "connect", "connect_async", "local"]

P = ParamSpec("P")
R = TypeVar("R", bound=Resource)
R2 = TypeVar("R2")
T = TypeVar("T")
AnyIds = TypeVar("AnyIds", Ids, AsyncIds)
log = logging.getLogger("coordlib")
CLOSE_TIMEOUT_SECONDS: Final = 5.0
RETURN_MS: Final = 1000
"""A closing handle waits this long for its windows of ids to be taken back: they lapse by themselves anyway."""

Members = Mapping[str, str]
LockName = str | Callable[..., str]


class _Handle:
    """What both faces share: settings in, a driver inside, and who may use it."""

    _make_driver: Callable[[], Driver]
    _data_dir: str | None = None
    _request_timeout_ms: int

    def __init__(
        self,
        name: str,
        *,
        node: str,
        members: Members,
        secret: str | bytes | Sequence[str | bytes] | None = None,
        data_dir: str | os.PathLike[str] | None = None,
        bind: str | None = None,
        transport: str = "zmq",
        isolation: str = "thread",
        bootstrap: bool = False,
        reads: str = "lease",
        heartbeat: float = 0.05,
        election_timeout: tuple[float, float] = (0.3, 0.6),
        session_ttl: float = 10.0,
        drift_bound: float = 0.01,
        request_timeout: float = 10.0,
        start_timeout: float = 30.0,
    ) -> None:
        """
        Describe a member of a cluster. Nothing is started: no thread, no socket, no file.

        Args:
            name: The cluster's name; the same for all members and clients.
            node: This member's name in `members`. A name belongs to a disk: never give it to another machine.
            members: Every member's name and endpoint, this one's included. The same names on every member.
            secret: From `coordlib keys new`, the same everywhere; or a list, newest first, while it is being changed.
            data_dir: A directory on a local disk that no other node uses.
            bind: Where to listen, if that differs from this member's endpoint (behind NAT): "tcp://0.0.0.0:7400".
            isolation: "thread" runs the node on a thread of this process, "process" in a process of its own that
                lives as long as this one: for applications with CPU-bound threads.
            bootstrap: Form a new cluster as soon as a quorum of empty members is there, not only when all are. Several members
                may be given it, and form one cluster. It says that those who are missing hold no cluster's data: never
                give it to replace lost directories of a cluster that has run.
            reads: "lease" lets the leader answer linearizable reads while a majority's promise not to elect another
                holds, which relies on clocks whose rates differ by less than `drift_bound`; "quorum" asks a majority
                for every (batch of) reads and relies on no clock.
            heartbeat, election_timeout, session_ttl, request_timeout, start_timeout: In seconds.

        Raises:
            ConfigError: A setting is wrong or contradicts another.
        """
        if isolation not in ("thread", "process"):
            raise ConfigError(f"isolation is 'thread' or 'process'; got {isolation!r}")
        timing = Timing.from_seconds(
            heartbeat=heartbeat,
            election_timeout=election_timeout,
            session_ttl=session_ttl,
            drift_bound=drift_bound,
            request_timeout=request_timeout,
            start_timeout=start_timeout,
        )
        settings = MemberSettings(
            cluster=name,
            node=node,
            members=dict(members) if isinstance(members, Mapping) else members,
            secrets=check_secrets(secret),
            data_dir=None if data_dir is None else os.path.abspath(os.fspath(data_dir)),
            bind=bind,
            transport=transport,
            bootstrap=bool(bootstrap),
            reads=reads,
            timing=timing,
        )
        _check_secrets_and_transport(settings.secrets, name, transport)
        if isolation == "process":
            if settings.data_dir is None or transport != "zmq":
                raise ConfigError("isolation='process' needs a data_dir and transport='zmq'")
            self._setup(lambda: ProcessDriver(settings), timing)
        else:
            self._setup(lambda: MemberDriver(settings, lambda: _storage_of(settings)), timing)
        self._data_dir = settings.data_dir

    def _setup(self, make_driver: Callable[[], Driver], timing: Timing) -> None:
        self._make_driver = make_driver
        self._request_timeout_ms = timing.request_timeout_ms
        self._driver: Driver | None = None
        self._is_closed = False
        self._pid = os.getpid()
        self._lifecycle = threading.Lock()
        self._grants = Grants()
        self._made_coordinator: Coordinator | None = None
        self._host: Host | None = None
        self._is_local = False
        self._tasks: dict[asyncio.Future[None], None] = {}
        self._generators: dict[str, Any] = {}  # of ids, by name; all of them of this handle's flavour

    @classmethod
    def _of(cls, make_driver: Callable[[], Driver], timing: Timing, *, is_local: bool = False) -> Self:
        self = cls.__new__(cls)
        self._setup(make_driver, timing)
        self._is_local = is_local
        return self

    @classmethod
    def from_env(cls, environment: Mapping[str, str] | None = None) -> Self:
        """
        A member as described by COORDLIB_CLUSTER, _NODE, _MEMBERS, _SECRET, _DATA_DIR and so on.

        Raises:
            ConfigError: A variable is missing, unknown or wrong.
        """
        return cls(**load_environment(environment))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Self:
        """
        A member as described by a TOML file whose keys are this class's arguments.

        Raises:
            ConfigError: It cannot be read, or a key is missing, unknown or wrong.
        """
        return cls(**load_file(path))

    def _begin_start(self) -> Driver | None:
        self._check_process()
        with self._lifecycle:
            if self._driver is not None and not self._is_closed:
                return None
            check_usable(self._driver, self._is_closed) if self._is_closed else None
            driver = self._make_driver()
            driver.add_listener(self._grants.session_changed)
            self._driver = driver
            return driver

    def _start_failed(self) -> None:
        with self._lifecycle:
            self._driver = None

    def _begin_close(self) -> Driver | None:
        if self._pid != os.getpid():
            return None  # the parent's to close
        with self._lifecycle:
            driver, was_closed, self._is_closed = self._driver, self._is_closed, True
        return None if was_closed else driver

    def _leave(self, driver: Driver, timeout_seconds: float) -> None:
        """Give back what was taken from others, within the timeout; then stop the node. Never raises."""
        began = monotonic_ms()
        if self._made_coordinator is not None:
            self._made_coordinator.close(
                min(1.0, timeout_seconds), lambda operation: run(cast(Engine, driver), operation)
            )
        if self._host is not None:
            self._host.close()
        deadline = began + min(RETURN_MS, max(0, round(timeout_seconds * 1000)))
        generators = list(self._generators.values())
        for ids in generators:
            ids._revoke()
        try:
            for ids in generators:
                run(cast(Engine, driver), ids._return_gen(deadline))
        finally:
            driver.stop(max(0.0, timeout_seconds - (monotonic_ms() - began) / 1000))

    @property
    def _coordinator(self) -> Coordinator:
        """Of this handle's transactions; made by the first who needs it."""
        found = self._made_coordinator
        if found is None:
            self._check_process()
            with self._lifecycle:
                found = self._made_coordinator
                if found is None:
                    found = self._made_coordinator = Coordinator(
                        lambda operation: run(self._engine, operation),
                        self._begin,
                        lambda: self._engine.view.session_id,
                        self._request_timeout_ms,
                    )
        return found

    def _with_transactions(self, stats: dict[str, Any]) -> dict[str, Any]:
        return {**stats, "transactions_here": self._coordinator.stats()}

    @property
    def _driver_for_calls(self) -> Driver:
        driver = self._driver
        assert driver is not None
        return driver

    def _run_here(self, operation: OpGen[T]) -> T:
        return run(self._engine, operation)

    def _serve(self, name: str, handler: Any, directory: str | os.PathLike[str] | None) -> None:
        self._engine  # noqa: B018  # raises if the handle cannot be used
        if self._is_local:
            open_journal: Callable[[], Journal] = MemoryJournal
        else:
            where = directory if directory is not None else self._data_dir

            def open_journal() -> Journal:
                if where is None:
                    raise ConfigError(
                        "a service that keeps what it promises in coordlib's journal needs a directory for it: give "
                        "directory=... (a client has none of its own)"
                    )
                os.makedirs(where, exist_ok=True)
                return SqliteJournal(os.path.join(where, "participants.db"))

        self._hosting().add(name, handler, open_journal)

    def _register(self, resource: R) -> R:
        self._engine  # noqa: B018  # raises if the handle cannot be used
        if not all(hasattr(resource, name) for name in ("name", "tag", "prepared", "finish")):
            raise UsageError(
                f"a {type(resource).__name__} is no resource: give one of coordlib.txn.resources, for example "
                "PostgreSQL(name, conninfo)"
            )
        if hasattr(resource, "open"):
            resource.open(cluster_tag(self._cluster_uuid()))
        self._coordinator.register(resource)
        if isinstance(resource, DecidingResource):
            self._hosting().answer_for(resource)
        return resource

    def _cluster_uuid(self) -> bytes:
        """
        Raises:
            NoQuorum: No member has said yet which cluster it is.
        """
        found = self._driver_for_calls.cluster_uuid
        if not found:
            raise NoQuorum("no member has said yet to which cluster it belongs; try again")
        return found

    def _hosting(self) -> Host:
        self._coordinator  # noqa: B018  # made before the lock is taken
        with self._lifecycle:
            if self._host is None:
                self._host = Host(self)
            return self._host

    def _begin(self, operation: OpGen[None]) -> None:
        """Run an operation in the background."""
        start(self._engine, operation)

    def _ids(
        self, make: Callable[[str, Layout, int], AnyIds], name: str, layout: Layout | None, window: float
    ) -> AnyIds:
        """The generator of this name; made by the first who asks, the same for all after."""
        self._check_process()
        window_ms = window_milliseconds(window)
        if layout is not None and not isinstance(layout, Layout):
            raise UsageError(f"layout is a coordlib.ids.Layout; got {layout!r}")
        found = self._generators.get(name) if isinstance(name, str) else None
        if found is None:
            made = make(name, layout or DEFAULT, window_ms)
            found = self._generators.setdefault(name, made)
            if self._is_closed:
                found._revoke()
        if layout is not None and found.layout != layout:
            raise UsageError(
                f"ids {name!r} of this cluster are in use here with the layout {found.layout}, not {layout}: take another "
                "name"
            )
        return cast(AnyIds, found)

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ForkedError(
                "this handle belongs to the parent process. In a worker, attach by coordlib.connect(...) after the fork"
            )

    @property
    def _engine(self) -> Engine:
        driver = self._driver
        if driver is None or self._is_closed or driver.pid != os.getpid():
            return check_usable(cast("Engine | None", driver), self._is_closed)
        return cast(Engine, driver)


def _check_secrets_and_transport(secrets: tuple[str, ...], name: str, transport: str) -> None:
    # Derived here once for the error, and again at the start: keys are not kept in a handle that may never start.
    ClusterKeys.from_secrets(secrets, name).wipe()
    find_transport(transport)


def _storage_of(settings: MemberSettings) -> Any:
    if settings.data_dir is None:
        return MemoryStorage(node_id=settings.node, cluster_name=settings.cluster, new_disk_id=os.urandom(16))
    return SegmentStorage(
        PosixFileSystem(),
        settings.data_dir,
        node_id=settings.node,
        cluster_name=settings.cluster,
        new_disk_id=os.urandom(16),
        segment_size_bytes=settings.segment_size_bytes,
    )


class Cluster(_Handle):
    """
    A member of a cluster (or a client of one, see `connect`), for threads. Thread-safe.

    .. versionadded:: 0.1
    """

    def start(self) -> None:
        """
        Start the node, and return when it has found a leader and opened a session. Does nothing if it runs.

        Raises:
            StartError: Within `start_timeout`, saying what stands in the way; nothing is left behind.
            StorageCorrupt, StorageFailed: The disk cannot be trusted.
        """
        driver = self._begin_start()
        if driver is not None:
            try:
                driver.start()
            except BaseException:
                driver.stop(0)
                self._start_failed()
                raise

    def close(self, *, timeout: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """
        Leave in good order: give back all locks, hand over the leadership, stop. Idempotent; never raises.

        Args:
            timeout: Seconds for the good order; after them the node stops anyway.
        """
        driver = self._begin_close()
        if driver is not None:
            self._leave(driver, timeout)
        self._grants.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, operation: OpGen[T]) -> T:
        return run(self._engine, operation)

    async def _arun(self, operation: OpGen[T]) -> T:
        return await arun(self._engine, operation)

    def lock(
        self,
        name: str,
        *,
        timeout: float | None = None,
        on_lost: GrantCallback | None = None,
        on_suspended: GrantCallback | None = None,
    ) -> Lock:
        """
        A handle on the lock `name`; asks nothing yet. Use it in a `with` block, which yields the grant.

        Args:
            timeout: For the `with` block: seconds to wait, None for as long as it takes.
            on_lost, on_suspended: Called with the grant, on a thread of coordlib's, when the lock was lost, or may be
                soon because contact to the cluster is lost.
        """
        return Lock(self, name, timeout, on_lost, on_suspended)

    def locked(
        self, name: LockName, *, timeout: float | None = None
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """
        Decorate a function, `def` or `async def`, to run only while holding a lock.

        Args:
            name: The lock's name, or a function of the call's arguments that returns it.
        """

        def decorate(function: Callable[P, T]) -> Callable[P, T]:
            _check_decorable(function)
            if inspect.iscoroutinefunction(function):
                return cast(Callable[P, T], _locked_coroutine(_AsyncFace(self), function, name, timeout))

            @functools.wraps(function)
            def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
                with self.lock(_lock_name(name, args, kwargs), timeout=timeout):
                    return function(*args, **kwargs)

            return wrapper

        return decorate

    def map(self, name: str, *, codec: Codec | None = None) -> Map:
        """The replicated map `name`; it exists as soon as it holds something."""
        return Map(self, name, codec)

    def ids(self, name: str = "default", *, layout: Layout | None = None, window: float = 60.0) -> Ids:
        """
        The generator of ids of this name; asks nothing yet. Unique under one name, not over several.

        All who ask this handle for a name get the same object: threads share one worker.

        Args:
            layout: Of `coordlib.ids`; by default 41 bits of milliseconds, 12 of sequence, 10 of worker. The first use of
                a name in the cluster fixes it for ever.
            window: For how many seconds ids can be minted without the cluster, once this process has minted for a
                while; 0.1 to 600. That of the first call counts.

        Raises:
            UsageError: This handle has the name with another layout.
        """
        return self._ids(functools.partial(Ids, self), name, layout, window)

    def compare(self, *conditions: Equals | Unchanged) -> Batch:
        """
        The beginning of a conditional batch: compare, `then` write, `otherwise` write, `commit`. Asks nothing yet.

        Args:
            conditions: On keys of this handle's maps; all must hold. None at all: the writes of `then` are made.

        Raises:
            UsageError: A map of another handle, or a key or value that cannot be stored.
        """
        return Batch(self, conditions)

    def transaction(
        self,
        *,
        timeout: float = 5.0,
        isolation: str = "serializable",
        ack: str = "applied",
        read_only: bool = False,
        propagation: str = "join",
    ) -> Transaction:
        """
        A transaction over this handle's maps, registered databases and locks: all of it is committed, or nothing.

        Maps are read at one revision in it and written when it commits. Databases keep their own isolation: the
        whole is atomic, not isolated.

        Args:
            timeout: Seconds after which nothing is decided any more: it is aborted then.
            isolation: "serializable": commits only if nothing that was read in maps has changed; "snapshot": only
                if nothing that it writes has changed since it was read.
            ack: "applied": the block ends when every database has obeyed; "decided": as soon as it is decided that
                they will.
            read_only: Writing to a map is refused.
            propagation: Within another transaction "join" it, or be another one ("requires_new"); "mandatory" and
                "never" refuse to be outside and inside of one.

        The end of the block raises what `coordlib.txn.commit.commit_gen` does: TransactionAborted, its subclass
        TransactionConflict, TransactionOutcomeUnknown, HeuristicOutcome.
        """
        return Transaction(self, Options.of(timeout, isolation, ack, read_only, propagation))

    def transactional(
        self,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        isolation: str = "serializable",
        ack: str = "applied",
        read_only: bool = False,
        propagation: str = "join",
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """
        Decorate a function to run in a transaction, and again, so many times at most, if it met a conflict.

        See `transaction`. A function that is called within another transaction joins it, and its conflicts are that
        one's.

        Raises:
            FlavourError: When decorating an `async def` or a generator.
        """
        options = Options.of(timeout, isolation, ack, read_only, propagation)
        checked = transactions.check_retries(retries)
        return transactions.decorate(lambda: Transaction(self, options), lambda: self._coordinator, checked)

    def resource(self, resource: R) -> R:
        """
        Register a database (see `coordlib.txn.resources`), and have what is prepared in it finished from here.

        Do so in every process that uses it, at its start. Returns the resource.

        Raises:
            UsageError: Another one of that name is registered.
        """
        return self._register(resource)

    def service(self, name: str) -> Service:
        """The service `name`, wherever it is hosted; asks nothing yet. See `Service`."""
        return Service(self, name)

    def participant(
        self, name: str, *, directory: str | os.PathLike[str] | None = None
    ) -> Callable[[R2], R2]:
        """
        Host a service: decorate its class (an instance is made without arguments), or call this with an object.

        Its public methods are the operations that other applications call; they run on threads of coordlib's. In a
        caller's transaction, `cluster.transaction()` within them joins that, and enlists databases. A service without a
        database has the methods of `coordlib.txn.journal.Handler`; what it promises is kept in a journal.

        Args:
            directory: For the journal: a local disk, and no other process's; by default the member's `data_dir`.

        Raises:
            UsageError: It is hosted already, or lacks a method.
            ConfigError: It needs a journal, and there is no directory.
        """

        def host(target: R2) -> R2:
            self._serve(name, target() if inspect.isclass(target) else target, directory)
            return target

        return host

    def outcome(self, gtid: bytes) -> str:
        """What became of a transaction: "committed", "aborted", "none" (not decided yet) or "unknown" (too old)."""
        return self._run(transactions.outcome_gen(gtid, self._request_timeout_ms))

    def stats(self) -> dict[str, Any]:
        """
        How this node is: role, term, indexes, members, sessions, counters. Keys are stable, more may come.

        "transactions" is what the cluster remembers (of members only), "transactions_here" what this handle's own have
        come to and waited for: see docs/transactions.md.
        """
        return self._with_transactions(_driver_of(self).stats())


class AsyncCluster(_Handle):
    """
    A member of a cluster (or a client of one), for asyncio. Takes the same arguments as `Cluster`.

    .. versionadded:: 0.1
    """

    async def start(self) -> None:
        """See `Cluster.start`. Cancelled, the node is stopped again."""
        driver = self._begin_start()
        if driver is not None:
            try:
                await asyncio.to_thread(driver.start)
            except BaseException:
                await asyncio.shield(asyncio.to_thread(driver.stop, 0))
                self._start_failed()
                raise

    async def close(self, *, timeout: float = CLOSE_TIMEOUT_SECONDS) -> None:
        """See `Cluster.close`."""
        driver = self._begin_close()
        if driver is not None:
            await asyncio.shield(asyncio.to_thread(self._leave, driver, timeout))
        self._grants.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @classmethod
    def local(cls) -> Self:
        """One process, nothing to configure: see `coordlib.local`."""
        make_driver, timing = _local_driver()
        return cls._of(make_driver, timing, is_local=True)

    async def _arun(self, operation: OpGen[T]) -> T:
        return await arun(self._engine, operation)

    def lock(
        self,
        name: str,
        *,
        timeout: float | None = None,
        on_lost: GrantCallback | None = None,
        on_suspended: GrantCallback | None = None,
    ) -> AsyncLock:
        """A handle on the lock `name`, for `async with`. See `Cluster.lock`; callbacks come on another thread."""
        return AsyncLock(self, name, timeout, on_lost, on_suspended)

    def locked(
        self, name: LockName, *, timeout: float | None = None
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """
        Decorate an `async def` to run only while holding a lock.

        Raises:
            FlavourError: When decorating a plain function: it would block the event loop.
        """

        def decorate(function: Callable[P, T]) -> Callable[P, T]:
            _check_decorable(function)
            if not inspect.iscoroutinefunction(function):
                raise FlavourError(
                    f"{function.__name__} is no `async def`: use a Cluster to decorate plain functions"
                )
            return cast(Callable[P, T], _locked_coroutine(self, function, name, timeout))

        return decorate

    def map(self, name: str, *, codec: Codec | None = None) -> AsyncMap:
        """The replicated map `name`; it exists as soon as it holds something."""
        return AsyncMap(self, name, codec)

    def ids(self, name: str = "default", *, layout: Layout | None = None, window: float = 60.0) -> AsyncIds:
        """The generator of ids of this name, for tasks. See `Cluster.ids`."""
        return self._ids(functools.partial(AsyncIds, self), name, layout, window)

    def compare(self, *conditions: Equals | Unchanged) -> AsyncBatch:
        """The beginning of a conditional batch. See `Cluster.compare`."""
        return AsyncBatch(self, conditions)

    def transaction(
        self,
        *,
        timeout: float = 5.0,
        isolation: str = "serializable",
        ack: str = "applied",
        read_only: bool = False,
        propagation: str = "join",
    ) -> AsyncTransaction:
        """A transaction for `async with`. See `Cluster.transaction`."""
        return AsyncTransaction(self, Options.of(timeout, isolation, ack, read_only, propagation))

    def transactional(
        self,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        isolation: str = "serializable",
        ack: str = "applied",
        read_only: bool = False,
        propagation: str = "join",
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """
        Decorate an `async def` to run in a transaction. See `Cluster.transactional`.

        Raises:
            FlavourError: When decorating a plain function or a generator.
        """
        options = Options.of(timeout, isolation, ack, read_only, propagation)
        checked = transactions.check_retries(retries)
        return transactions.adecorate(
            lambda: AsyncTransaction(self, options), lambda: self._coordinator, checked
        )

    async def resource(self, resource: R) -> R:
        """See `Cluster.resource`."""
        return await asyncio.to_thread(self._register, resource)

    def service(self, name: str) -> AsyncService:
        """See `Cluster.service`."""
        return AsyncService(self, name)

    def participant(
        self, name: str, *, directory: str | os.PathLike[str] | None = None
    ) -> Callable[[R2], R2]:
        """
        Not for tasks yet.

        Raises:
            FlavourError: Services run on threads: host them with a Cluster.
        """
        raise FlavourError("services run on threads: host them with a Cluster, beside this one if need be")

    async def outcome(self, gtid: bytes) -> str:
        """See `Cluster.outcome`."""
        return await self._arun(transactions.outcome_gen(gtid, self._request_timeout_ms))

    def _background(self, operation: OpGen[None]) -> None:
        """Run it in a task of this loop, for which nobody waits."""
        task = asyncio.ensure_future(self._arun(operation))
        self._tasks[task] = None
        task.add_done_callback(self._background_ended)

    def _background_ended(self, task: asyncio.Future[None]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            log.warning("a transaction's end: %s", task.exception(), extra={"event": "transaction.left"})

    async def stats(self) -> dict[str, Any]:
        """See `Cluster.stats`."""
        return self._with_transactions(await asyncio.to_thread(_driver_of(self).stats))


class _AsyncFace(AsyncCluster):
    """A Cluster's engine with the face for tasks: for decorated coroutines."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._request_timeout_ms = cluster._request_timeout_ms
        self._grants = cluster._grants

    @property
    def _engine(self) -> Engine:
        return self._cluster._engine


def _driver_of(handle: _Handle) -> Driver:
    return cast(Driver, handle._engine)


def _lock_name(name: LockName, args: Any, kwargs: Any) -> str:
    return name if isinstance(name, str) else name(*args, **kwargs)


def _check_decorable(function: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise FlavourError(
            f"{function.__name__} is a generator: it would run after the lock was released. Use a `with` block inside it"
        )


def _locked_coroutine(
    cluster: AsyncCluster, function: Callable[P, Any], name: LockName, timeout: float | None
) -> Callable[P, Awaitable[Any]]:
    @functools.wraps(function)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        async with cluster.lock(_lock_name(name, args, kwargs), timeout=timeout):
            return await function(*args, **kwargs)

    return wrapper


def _client_driver(
    endpoints: str | Sequence[str],
    cluster: str,
    secret: Any,
    transport: str,
    session_ttl: float,
    request_timeout: float,
    start_timeout: float,
    drift_bound: float,
    name: str,
) -> tuple[Callable[[], Driver], Timing]:
    addresses = endpoints.split(",") if isinstance(endpoints, str) else list(endpoints)
    timing = Timing(
        drift_percent=drift_percent(drift_bound),
        session_ttl_ms=milliseconds(session_ttl, "session_ttl"),
        request_timeout_ms=milliseconds(request_timeout, "request_timeout"),
        start_timeout_ms=milliseconds(start_timeout, "start_timeout"),
    )
    settings = ClientSettings(
        cluster=cluster,
        endpoints=tuple(address.strip() for address in addresses if address.strip()),
        secrets=check_secrets(secret),
        transport=transport,
        name=name,
        timing=timing,
    )
    _check_secrets_and_transport(settings.secrets, cluster, transport)
    return lambda: ClientDriver(settings), timing


def connect(
    endpoints: str | Sequence[str],
    *,
    cluster: str,
    secret: str | bytes | Sequence[str | bytes],
    transport: str = "zmq",
    session_ttl: float = 10.0,
    request_timeout: float = 10.0,
    start_timeout: float = 10.0,
    drift_bound: float = 0.01,
    name: str = "",
) -> Cluster:
    """
    A client without a vote and without a disk: for workers, scripts and forked children. Starts nothing yet.

    Args:
        endpoints: Of some members ("tcp://10.0.0.1:7400,tcp://10.0.0.2:7400"); the others are learnt.
        drift_bound: As the members are given: by how much the rates of two clocks may differ.
        name: What `coordlib status` and lock owners show; by default made from the process id.
    """
    made = _client_driver(
        endpoints, cluster, secret, transport, session_ttl, request_timeout, start_timeout, drift_bound, name
    )
    return Cluster._of(*made)


def connect_async(
    endpoints: str | Sequence[str],
    *,
    cluster: str,
    secret: str | bytes | Sequence[str | bytes],
    transport: str = "zmq",
    session_ttl: float = 10.0,
    request_timeout: float = 10.0,
    start_timeout: float = 10.0,
    drift_bound: float = 0.01,
    name: str = "",
) -> AsyncCluster:
    """`connect`, for asyncio."""
    made = _client_driver(
        endpoints, cluster, secret, transport, session_ttl, request_timeout, start_timeout, drift_bound, name
    )
    return AsyncCluster._of(*made)


def _local_driver() -> tuple[Callable[[], Driver], Timing]:
    timing = Timing(start_timeout_ms=10_000)
    settings = MemberSettings(
        cluster="local",
        node="local",
        members={"local": f"memory://local-{random_secrets.token_hex(8)}"},
        secrets=(generate_secret(os.urandom),),
        data_dir=None,
        transport="memory",
        timing=timing,
    )
    return lambda: MemberDriver(settings, lambda: _storage_of(settings)), timing


def local() -> Cluster:
    """
    A cluster of this one process, nothing to configure and nothing on the disk: for a laptop and for unit tests.

    The same code as a real member, on a memory store and a memory transport.
    """
    return Cluster._of(*_local_driver(), is_local=True)
