"""Locks: who holds each, who waits, and the fencing token of every grant.

An *acquisition* is one ACQUIRE command, known by its session and sequence. It is held, queued or gone; a
session may have several on one lock (two threads), and each is an owner of its own. A lock is granted in the
order of the log. A lock that nobody holds or waits for does not exist.

Invariants: tokens rise strictly over all grants of all locks, over deletion and re-creation, snapshot and
restore, because one replicated counter gives them all. Only a session that is alive is granted anything
(etcd #11456). A release names its acquisition, so that a late one never frees another (etcd #22082).

What must not live here: sessions (who is alive is asked through a callable), and time limits of acquisitions,
which are the business of those who wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Any

from coordlib.cbor import decode, encode
from coordlib.errors import LockLost, invariant
from coordlib.machine.commands import AcquisitionState
from coordlib.machine.effects import Effect, LockGranted, LockWithdrawn, Meta
from coordlib.machine.limits import Limits, exceeded
from coordlib.machine.table import Reclaimer, Table

__all__ = ["Lock", "Locks"]

COUNTER_BITS = 48  # at a million grants a second: 8.9 years
_WAITERS_SHOWN = 100
_LOCKS_SHOWN = 1000


class Lock:
    """A lock that is held. Changed only by `Locks`."""

    __slots__ = ("sequence", "session", "since_ms", "token", "waiters")

    def __init__(self, session: int, sequence: int, token: int, since_ms: int) -> None:
        self.session = session
        self.sequence = sequence
        self.token = token
        self.since_ms = since_ms
        self.waiters: OrderedDict[tuple[int, int], None] | None = (
            None  # (session, sequence), first come first
        )


def _freeze(lock: Lock) -> bytes:
    waiters = [number for waiter in lock.waiters or () for number in waiter]
    return encode((lock.session, lock.sequence, lock.token, lock.since_ms, waiters))


class Locks:
    """All locks that are held."""

    __slots__ = (
        "_by_session",
        "_is_alive",
        "_limits",
        "_owner_of",
        "acquisitions",
        "counter",
        "epoch",
        "table",
    )

    def __init__(
        self,
        limits: Limits,
        reclaimer: Reclaimer,
        *,
        is_alive: Callable[[int], bool],
        owner_of: Callable[[int], str],
    ) -> None:
        self._limits = limits
        self._is_alive = is_alive
        self._owner_of = owner_of
        self.table: Table[Lock] = Table(reclaimer, _freeze)
        # Derived from the table: session -> sequence -> lock. Never iterated without sorting.
        self._by_session: dict[int, dict[int, bytes]] = {}
        self.acquisitions = 0
        self.counter = 0
        self.epoch = 0

    # --- commands -----------------------------------------------------------------------------------------

    def check_acquire(self, session: int, args: list[Any]) -> None:
        """
        Refuse an acquisition too many.

        Raises:
            QuotaExceeded: Names the limit: of this lock's waiters, of this session, or of all.
        """
        lock = self.table.get(args[1])
        if lock is not None:
            if not args[2]:
                return  # will be refused without leaving anything behind
            waiting = len(lock.waiters) if lock.waiters else 0
            if waiting >= self._limits.lock_waiters_max:
                raise exceeded("lock_waiters_max", self._limits.lock_waiters_max, waiting + 1)
        if self.acquisitions >= self._limits.acquisitions_max:
            raise exceeded("acquisitions_max", self._limits.acquisitions_max, self.acquisitions + 1)
        mine = self._by_session.get(session)
        if mine is not None and len(mine) >= self._limits.session_acquisitions_max:
            raise exceeded("session_acquisitions_max", self._limits.session_acquisitions_max, len(mine) + 1)

    def acquire(
        self, meta: Meta, session: int, sequence: int, args: list[Any], _effects: list[Effect]
    ) -> tuple[Any, ...]:
        self.check_acquire(session, args)
        name = args[1]
        lock = self.table.get(name)
        if lock is None:
            token = self._next_token()
            self.table.put(name, Lock(session, sequence, token, meta.now_ms))
            self._note(session, sequence, name)
            return (0, True, token, 0)
        if not args[2]:
            return (0, False, 0, 0)
        self.table.touch(name)
        waiters = lock.waiters
        if waiters is None:
            waiters = lock.waiters = OrderedDict()
        waiters[(session, sequence)] = None
        self._note(session, sequence, name)
        return (0, False, 0, len(waiters))

    def release(
        self, meta: Meta, session: int, _sequence: int, args: list[Any], effects: list[Effect]
    ) -> tuple[Any, ...]:
        _, name, sequence = args
        lock = self.table.get(name)
        if lock is not None:
            if lock.sequence == sequence and lock.session == session:
                self._forget(session, sequence)
                self._pass_on(name, lock, meta.now_ms, effects)
                return (0, AcquisitionState.HELD)
            if lock.waiters and (session, sequence) in lock.waiters:
                self.table.touch(name)
                del lock.waiters[(session, sequence)]
                self._forget(session, sequence)
                # Or whoever waits for it would do so for ever.
                effects.append(LockWithdrawn(session, sequence))
                return (0, AcquisitionState.QUEUED)
        return (0, AcquisitionState.NONE)

    def break_(
        self, meta: Meta, _session: int, _sequence: int, args: list[Any], effects: list[Effect]
    ) -> tuple[Any, ...]:
        name = args[1]
        lock = self.table.get(name)
        if lock is None:
            return (0, False, 0)
        token = lock.token
        self._forget(lock.session, lock.sequence)
        effects.append(LockWithdrawn(lock.session, lock.sequence))
        self._pass_on(name, lock, meta.now_ms, effects)
        return (0, True, token)

    def begin_epoch(
        self, _meta: Meta, _session: int, _sequence: int, args: list[Any], _effects: list[Effect]
    ) -> tuple[Any, ...]:
        # Proposed twice, or late: an epoch never goes back, and a repeated one changes nothing.
        self.epoch = max(self.epoch, args[1])
        return (0,)

    def end_sessions(self, sessions: Iterable[int], now_ms: int, effects: list[Effect]) -> None:
        """
        Remove all acquisitions of sessions that are no longer alive, and grant what they held to the next.

        All of them leave before anything is granted, so that nothing is granted to one of them.
        """
        held: list[bytes] = []
        for session in sorted(sessions):
            for sequence, name in sorted(self._by_session.pop(session, {}).items()):
                self.acquisitions -= 1
                lock = self.table.get(name)
                invariant(lock is not None, "lock %r is gone, its acquisition %d is not", name, sequence)
                assert lock is not None
                if lock.session == session and lock.sequence == sequence:
                    held.append(name)
                else:
                    waiters = lock.waiters
                    invariant(waiters is not None, "acquisition %d neither holds nor waits", sequence)
                    assert waiters is not None
                    self.table.touch(name)
                    del waiters[(session, sequence)]
                effects.append(LockWithdrawn(session, sequence))
        for name in sorted(held):
            lock = self.table.get(name)
            assert lock is not None
            self._pass_on(name, lock, now_ms, effects)

    def check_guard(self, guard: list[Any]) -> None:
        """
        Refuse a guarded command whose grant is no longer the lock's.

        Args:
            guard: The lock's name and the token of the grant.

        Raises:
            LockLost: Somebody else holds the lock, or nobody.
        """
        name, token = guard
        lock = self.table.get(name)
        if lock is None or lock.token != token:
            present = 0 if lock is None else lock.token
            raise LockLost(
                f"token {token} is not that of the lock's holder ({present or 'nobody'}): refused",
                lock=name,
                token=token,
                holder_token=present,
            )

    # --- queries ------------------------------------------------------------------------------------------

    def acquisition(self, args: list[Any]) -> tuple[Any, ...]:
        _, name, session, sequence = args
        lock = self.table.get(name)
        if lock is not None:
            if lock.session == session and lock.sequence == sequence:
                return (0, AcquisitionState.HELD, lock.token, 0)
            waiters = lock.waiters
            if waiters and (session, sequence) in waiters:
                position = next(place for place, key in enumerate(waiters, 1) if key == (session, sequence))
                return (0, AcquisitionState.QUEUED, 0, position)
        return (0, AcquisitionState.NONE, 0, 0)

    def is_waiting(self, args: list[Any]) -> bool:
        """Whether the acquisition that an ACQUISITION query names is still queued."""
        lock = self.table.get(args[1])
        return lock is not None and bool(lock.waiters) and (args[2], args[3]) in (lock.waiters or ())

    def info(self, args: list[Any]) -> tuple[Any, ...]:
        lock = self.table.get(args[1])
        if lock is None:
            return (0, None, [], 0)
        waiters: Collection[tuple[int, int]] = lock.waiters or ()
        shown = [
            (session, self._owner_of(session))
            for (session, _), _ in zip(waiters, range(_WAITERS_SHOWN), strict=False)
        ]
        return (
            0,
            (lock.session, self._owner_of(lock.session), lock.token, lock.since_ms),
            shown,
            len(waiters),
        )

    def listing(self, args: list[Any]) -> tuple[Any, ...]:
        _, after, limit = args
        limit = max(1, min(limit, _LOCKS_SHOWN))
        view = self.table.view()
        try:
            names = view.keys_after(after, limit + 1)
        finally:
            view.close()
        rows = []
        for name in names[:limit]:
            lock = self.table.get(name)
            assert lock is not None
            owner = self._owner_of(lock.session)
            rows.append((name, lock.session, owner, lock.token, lock.since_ms, len(lock.waiters or ())))
        return (0, rows, len(names) > limit)

    # --- state --------------------------------------------------------------------------------------------

    def load(self, name: bytes, record: bytes) -> None:
        """Take a record of a snapshot."""
        session, sequence, token, since_ms, waiting = decode(record)
        lock = Lock(session, sequence, token, since_ms)
        self._note(session, sequence, name)
        if waiting:
            lock.waiters = OrderedDict.fromkeys(zip(waiting[::2], waiting[1::2], strict=True))
            for waiter in lock.waiters:
                self._note(*waiter, name)
        self.table.put(name, lock)

    def check_invariants(self) -> None:
        """For tests: what is derived agrees with what it is derived from."""
        seen: dict[int, dict[int, bytes]] = {}
        view = self.table.view()
        for name, record in view.drain():
            session, sequence, token, _, waiting = decode(record)
            invariant(token & ((1 << COUNTER_BITS) - 1) <= self.counter, "token %d beyond the counter", token)
            for owner, number in [(session, sequence), *zip(waiting[::2], waiting[1::2], strict=True)]:
                invariant(self._is_alive(owner), "session %d is gone, its acquisition is not", owner)
                seen.setdefault(owner, {})[number] = name
        view.close()
        invariant(seen == self._by_session, "index by session differs from the table")
        invariant(self.acquisitions == sum(map(len, seen.values())), "count of acquisitions is wrong")

    def _next_token(self) -> int:
        self.counter += 1
        invariant(self.counter < 1 << COUNTER_BITS, "the grant counter is used up: restore with a new epoch")
        return self.epoch << COUNTER_BITS | self.counter

    def _note(self, session: int, sequence: int, name: bytes) -> None:
        mine = self._by_session.get(session)
        if mine is None:
            mine = self._by_session[session] = {}
        mine[sequence] = name
        self.acquisitions += 1

    def _forget(self, session: int, sequence: int) -> None:
        mine = self._by_session[session]
        del mine[sequence]
        if not mine:
            del self._by_session[session]
        self.acquisitions -= 1

    def _pass_on(self, name: bytes, lock: Lock, now_ms: int, effects: list[Effect]) -> None:
        """Give a lock whose holder has left to the first waiter that is alive, or let it cease to exist."""
        waiters = lock.waiters
        if waiters:
            self.table.touch(name)
            while waiters:
                (session, sequence), _ = waiters.popitem(last=False)
                # The dead leave the queue with their session; this is the second line of defence (etcd
                # #11456).
                if not self._is_alive(session):
                    self._forget(session, sequence)
                    effects.append(LockWithdrawn(session, sequence))
                    continue
                lock.session = session
                lock.sequence = sequence
                lock.token = self._next_token()
                lock.since_ms = now_ms
                effects.append(LockGranted(session, sequence, name, lock.token))
                return
        self.table.delete(name)
