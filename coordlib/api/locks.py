"""Locks: FIFO, fenced, bound to the process's session, and honest about loss.

A grant is believed only as long as the holder's own pessimistic clock allows (`Grant.ensure_held`), and
even then a paused process can act late: what must not be written twice is written with `guard=grant`, or
under the grant's token to a store that refuses smaller ones.

Source: fencing tokens as in Kleppmann, "Designing Data-Intensive Applications", chapter 8; the words SUSPENDED
and LOST are ZooKeeper clients'.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from coordlib.api.codec import encode_name
from coordlib.config import milliseconds
from coordlib.errors import (
    CommitTimeout,
    CoordError,
    DefiniteError,
    IndeterminateError,
    LockLost,
    LockTimeout,
    NoQuorum,
    NotHolder,
    SessionExpired,
)
from coordlib.machine import commands
from coordlib.machine.commands import AcquisitionState
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import FOREVER_MS, OpGen, Step
from coordlib.node.session import SessionState, SessionView
from coordlib.types import Token
from coordlib.wire.messages import RequestKind

if TYPE_CHECKING:
    from coordlib.api.cluster import AsyncCluster, Cluster

__all__ = ["AsyncLock", "Grant", "GrantState", "Lock", "LockInfo"]

log = logging.getLogger("coordlib")
WITHDRAW_MS: Final = 1000
GrantCallback = Callable[["Grant"], Any]


class GrantState:
    """What a grant can be, as its holder may know it."""

    HELD = "held"
    SUSPENDED = "suspended"  # nothing heard from the cluster for half the TTL: it may be lost soon
    LOST = "lost"
    RELEASED = "released"


class LockInfo(NamedTuple):
    """Who holds a lock and who waits, by the names their processes go by."""

    owner: str  # empty: nobody
    token: int
    waiters: int


class Grant:
    """
    A lock, held. Reading it asks nobody: it looks at the clock in the caller's thread.

    .. versionadded:: 0.1
    """

    __slots__ = (
        "__weakref__",
        "_is_known_lost",
        "_is_released",
        "_lock_name",
        "_on_lost",
        "_on_suspended",
        "_sequence",
        "_token",
        "_view",
        "name",
    )

    def __init__(
        self,
        name: str,
        lock_name: bytes,
        token: int,
        view: SessionView,
        sequence: int,
        on_lost: GrantCallback | None,
        on_suspended: GrantCallback | None,
    ) -> None:
        self.name = name
        self._lock_name = lock_name
        self._token = token
        self._view = view
        self._sequence = sequence
        self._on_lost = on_lost
        self._on_suspended = on_suspended
        self._is_released = False
        self._is_known_lost = False

    def __repr__(self) -> str:
        return f"<coordlib.Grant of {self.name!r}, token {self._token}, {self.state}>"

    @property
    def token(self) -> Token:
        """The fencing token: greater than that of every earlier grant of any lock of this cluster."""
        return Token(self._token)

    @property
    def state(self) -> str:
        """One of GrantState."""
        if self._is_released:
            return GrantState.RELEASED
        if self._is_known_lost or not self._view.is_valid(monotonic_ms()):
            return GrantState.LOST
        if self._view.state is SessionState.SUSPENDED:
            return GrantState.SUSPENDED
        return GrantState.HELD

    @property
    def lost(self) -> bool:
        """Whether the lock was lost: from then on somebody else may hold it."""
        return self.state == GrantState.LOST

    def remaining(self) -> float:
        """Seconds for which the lock is held at least, if nothing is heard from the cluster any more."""
        if self._is_released or self._is_known_lost or self._view.state >= SessionState.LOST:
            return 0.0
        return max(0, self._view.valid_until_ms - monotonic_ms()) / 1000

    def ensure_held(self) -> None:
        """
        Return if the lock is held at this moment by the holder's own pessimistic clock.

        Raises:
            LockLost: It is not, or not for certain: stop what it protected.
        """
        state = self.state
        if state == GrantState.RELEASED:
            raise LockLost(f"lock {self.name!r} was released", token=self._token)
        if state == GrantState.LOST:
            raise LockLost(
                f"lock {self.name!r} (token {self._token}) was lost: this process could not reach the cluster in time, "
                "and somebody else may hold it now",
                token=self._token,
            )


def _wait_ms(timeout: float | None) -> int | None:
    return None if timeout is None else milliseconds(timeout, "timeout", low=0, high=10 * 365 * 86_400_000)


class _LockBase:
    def __init__(
        self,
        cluster: Cluster | AsyncCluster,
        name: str,
        timeout: float | None,
        on_lost: GrantCallback | None,
        on_suspended: GrantCallback | None,
    ) -> None:
        self.name = name
        self._lock_name = encode_name(name, "lock")
        self._timeout = timeout
        _wait_ms(timeout)
        self._on_lost = on_lost
        self._on_suspended = on_suspended
        self._request_timeout_ms = cluster._request_timeout_ms
        self._grants = cluster._grants
        self._grant: Grant | None = None
        self._blocks: dict[object, list[Grant]] = {}  # thread or task -> its `with` blocks' grants

    @property
    def grant(self) -> Grant | None:
        """The grant that this handle holds now, if any."""
        return self._grant

    def _release_body(self, sequence: int) -> bytes:
        return commands.release(self._lock_name, sequence)

    def _acquire_gen(self, timeout: float | None) -> OpGen[Grant]:
        wait_ms = _wait_ms(timeout)
        start = monotonic_ms()
        deadline = FOREVER_MS if wait_ms is None else start + wait_ms
        # A lock that is wanted at once still takes a round trip to ask for.
        command_deadline = max(
            min(deadline, start + self._request_timeout_ms),
            start + min(WITHDRAW_MS, self._request_timeout_ms),
        )
        ask = Step(RequestKind.COMMAND, commands.acquire(self._lock_name, wait_ms != 0), command_deadline)
        try:
            reply = yield ask
        except DefiniteError:
            raise
        except BaseException:
            # It may be granted yet, to nobody: take it back, whenever it arrives.
            if ask.call is not None:
                yield Step.withdraw(ask, self._release_body)
            raise
        is_granted, token, _ = commands.decode_reply(reply)
        call = ask.call
        assert call is not None and call.view is not None
        view, sequence = call.view, call.sequence
        if not is_granted:
            if wait_ms == 0:
                raise LockTimeout(f"lock {self.name!r} is held by somebody else", lock=self.name)
            token = yield from self._wait_gen(ask, view, sequence, deadline, timeout)
        grant = Grant(self.name, self._lock_name, token, view, sequence, self._on_lost, self._on_suspended)
        self._grants.add(grant)
        if grant.lost:
            # This process was kept from running until its session had run out: nobody enters without the lock.
            self._grants.discard(grant)
            yield Step.withdraw(ask, self._release_body)
            raise SessionExpired(f"lock {self.name!r} was granted, but lost before this process could use it")
        self._grant = grant
        return grant

    def _wait_gen(
        self, ask: Step, view: SessionView, sequence: int, deadline: int, timeout: float | None
    ) -> OpGen[int]:
        query = commands.query_acquisition(self._lock_name, view.session_id, sequence)
        wait = Step(RequestKind.WAIT, query, deadline, sequence=sequence, view=view)
        try:
            reply = yield wait
        except NoQuorum:
            yield from self._withdraw_gen(ask, view, sequence)
            raise LockTimeout(
                f"lock {self.name!r} was not granted within {timeout:g} s; the request was withdrawn",
                lock=self.name,
            ) from None
        except SessionExpired:
            raise
        except BaseException:
            yield Step.withdraw(ask, self._release_body)
            raise
        state, token, _ = commands.decode_reply(reply)
        if state != AcquisitionState.HELD:
            raise LockLost(f"the place in the queue of lock {self.name!r} was taken away", lock=self.name)
        return int(token)

    def _withdraw_gen(self, ask: Step, view: SessionView, sequence: int) -> OpGen[None]:
        step = Step(
            RequestKind.COMMAND, self._release_body(sequence), monotonic_ms() + WITHDRAW_MS, view=view
        )
        try:
            yield step
        except SessionExpired:
            pass
        except BaseException as error:
            yield Step.withdraw(ask, self._release_body)
            if isinstance(error, CoordError):
                raise CommitTimeout(
                    f"lock {self.name!r} was not granted in time, and the withdrawal could not be confirmed: it goes on in "
                    "the background",
                    lock=self.name,
                ) from error
            raise

    def _release_gen(self, grant: Grant) -> OpGen[bool]:
        """Whether the lock was held up to now."""
        grant._is_released = True
        self._grants.discard(grant)
        step = Step(
            RequestKind.COMMAND,
            self._release_body(grant._sequence),
            monotonic_ms() + self._request_timeout_ms,
            view=grant._view,
        )
        try:
            reply = yield step
        except SessionExpired:
            return False
        except (NoQuorum, IndeterminateError):
            if grant._view.state >= SessionState.LOST:
                return False
            # It goes on in the background, until it is done or the session ends: both free the lock.
            yield Step(
                RequestKind.COMMAND,
                self._release_body(grant._sequence),
                FOREVER_MS,
                view=grant._view,
                is_detached=True,
            )
            log.warning(
                "lock %r: the release could not be confirmed yet, it goes on in the background",
                self.name,
                extra={"event": "lock.release-late", "lock": self.name},
            )
            return True
        except BaseException:
            yield Step(
                RequestKind.COMMAND,
                self._release_body(grant._sequence),
                FOREVER_MS,
                view=grant._view,
                is_detached=True,
            )
            raise
        (was,) = commands.decode_reply(reply)
        return bool(was == AcquisitionState.HELD)

    def _entered(self, who: object, grant: Grant) -> Grant:
        """A `with` block releases the grant that it got, whatever else was done with this handle meanwhile."""
        self._blocks.setdefault(who, []).append(grant)
        return grant

    def _left(self, who: object) -> Grant:
        if who not in self._blocks:
            # Entered elsewhere: an ExitStack that was handed on, a fixture. One block is then the one that is meant.
            if len(self._blocks) != 1:
                raise NotHolder(
                    f"lock {self.name!r}: this thread or task has no block of this handle, and several others have; "
                    "use a handle of its own for each"
                )
            who = next(iter(self._blocks))
        grants = self._blocks[who]
        grant = grants.pop()
        if not grants:
            del self._blocks[who]
        if self._grant is grant:
            self._grant = None
        return grant

    def _take_grant(self) -> Grant:
        grant, self._grant = self._grant, None
        if grant is None:
            raise NotHolder(f"this handle does not hold lock {self.name!r}")
        return grant

    def _lost(self, grant: Grant) -> LockLost:
        return LockLost(
            f"lock {self.name!r} (token {grant._token}) was lost before it was released: what it protected may have "
            "been done by somebody else meanwhile",
            token=grant._token,
        )

    def _info_gen(self) -> OpGen[LockInfo]:
        body = commands.query_lock(self._lock_name)
        reply = yield Step(RequestKind.QUERY, body, monotonic_ms() + self._request_timeout_ms)
        holder, _, waiters = commands.decode_reply(reply)
        if holder is None:
            return LockInfo("", 0, waiters)
        return LockInfo(holder[1], holder[2], waiters)


class Lock(_LockBase):
    """
    Mutual exclusion over the cluster, as a context manager.

    First come, first served. Not reentrant: a second acquisition by the same handle or process waits like
    any other. Owned by the handle, not by the thread: any thread may release it, as with threading.Lock. The lock is
    bound to the process's session and is lost with it, at the latest a session TTL after contact was lost.

    .. versionadded:: 0.1
    """

    def __init__(self, cluster: Cluster, *args: Any) -> None:
        super().__init__(cluster, *args)
        self._cluster = cluster

    def __repr__(self) -> str:
        return f"<coordlib.Lock {self.name!r}>"

    def acquire(self, *, timeout: float | None = None) -> Grant:
        """
        Wait for the lock. It is never granted later: a timeout or an interrupt withdraws the request.

        Args:
            timeout: Seconds; 0 does not wait for another holder; None waits for as long as there is a session.

        Raises:
            LockTimeout: Not granted in time, certainly not later.
            NoQuorum: The cluster could not be asked; nothing happened.
            CommitTimeout, LeadershipLost: It was asked and did not answer; a grant that still comes is given back.
            SessionExpired: Contact was lost for longer than the session's TTL.
        """
        return self._cluster._run(self._acquire_gen(timeout))

    def release(self) -> None:
        """
        Give the lock back. Without contact to the cluster the release goes on in the background.

        Raises:
            NotHolder: This handle does not hold it.
            LockLost: It had been lost before; somebody else may have held it meanwhile.
        """
        self._release(self._take_grant())

    def _release(self, grant: Grant) -> None:
        if not self._cluster._run(self._release_gen(grant)):
            raise self._lost(grant)

    def __enter__(self) -> Grant:
        return self._entered(threading.get_ident(), self.acquire(timeout=self._timeout))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._release(self._left(threading.get_ident()))
        except CoordError as failure:
            if error is None:
                raise
            # What the body raised is on its way and must not be hidden.
            log.warning(
                "lock %r: %s", self.name, failure, extra={"event": "lock.release-failed", "lock": self.name}
            )

    def info(self) -> LockInfo:
        """Who holds it and how many wait."""
        return self._cluster._run(self._info_gen())

    def locked(self) -> bool:
        """Whether anybody holds it."""
        return self.info().token != 0


class AsyncLock(_LockBase):
    """
    `Lock` for tasks. Cancelling a waiting acquire raises CancelledError; the withdrawal goes on behind it.

    .. versionadded:: 0.1
    """

    def __init__(self, cluster: AsyncCluster, *args: Any) -> None:
        super().__init__(cluster, *args)
        self._cluster = cluster

    def __repr__(self) -> str:
        return f"<coordlib.AsyncLock {self.name!r}>"

    async def acquire(self, *, timeout: float | None = None) -> Grant:
        """See `Lock.acquire`."""
        return await self._cluster._arun(self._acquire_gen(timeout))

    async def release(self) -> None:
        """See `Lock.release`. Cancelled, the release goes on in the background."""
        await self._release(self._take_grant())

    async def _release(self, grant: Grant) -> None:
        if not await self._cluster._arun(self._release_gen(grant)):
            raise self._lost(grant)

    async def __aenter__(self) -> Grant:
        return self._entered(asyncio.current_task(), await self.acquire(timeout=self._timeout))

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            await self._release(self._left(asyncio.current_task()))
        except CoordError as failure:
            if error is None:
                raise
            log.warning(
                "lock %r: %s", self.name, failure, extra={"event": "lock.release-failed", "lock": self.name}
            )

    async def info(self) -> LockInfo:
        """Who holds it and how many wait."""
        return await self._cluster._arun(self._info_gen())

    async def locked(self) -> bool:
        """Whether anybody holds it."""
        return (await self.info()).token != 0
