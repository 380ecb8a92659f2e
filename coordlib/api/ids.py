"""Ids from the cluster: minted here, in windows of time that the log grants to one process at a time.

A generator's handle has one `Minter`, which all threads or tasks of this process share, and one *lease*: a
worker number, and a window of id time that is extended while ids are minted. Minting asks nobody; only when
the window has ended does it wait.

::

    NONE ──first mint: LEASE──▶ HELD ──a quarter of the window passed, and an id is minted: RENEW──▶ HELD
      ▲                           │
      └──the window lapsed, or the lease is somebody else's: another worker──┘        close(): RETURN

At most one request is under way for each generator, in the background, and it is repeated until it is answered:
those who need a window wait for it together, each until its own deadline.

What must not live here: how ids are put together (`coordlib.ids`), and who gets which window (`machine.ids`).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from coordlib.api.codec import encode_name
from coordlib.config import milliseconds
from coordlib.errors import (
    CoordError,
    IdLeaseExpired,
    LeadershipLost,
    NoQuorum,
    NotHolder,
    Overloaded,
    SessionExpired,
)
from coordlib.ids.inspecting import IdInfo, inspect
from coordlib.ids.layout import Layout
from coordlib.ids.minter import Minter, NeedsWait, NeedsWindow
from coordlib.machine import commands
from coordlib.node.clock import monotonic_clock_ns, monotonic_ms, pace_clock_ns
from coordlib.node.operations import FOREVER_MS, OpGen, Step
from coordlib.node.session import Call
from coordlib.node.waiting import wake_all
from coordlib.wire.messages import RequestKind

if TYPE_CHECKING:
    from coordlib.api.cluster import AsyncCluster, Cluster

__all__ = ["AsyncIds", "Ids", "window_milliseconds"]

log = logging.getLogger("coordlib")

FIRST_WINDOW_MS: Final = 10_000
"""Short: a process that ends soon, or is killed, keeps its worker from others no longer than this."""

WINDOW_MS_MAX: Final = 600_000
"""As replicated in `ids_window_ms_max`: what a restore from back-up has to skip."""

AHEAD_MS: Final = 1000
"""How far ids may run ahead of their time, where more are minted than there is time for, before minting waits."""

WINDOW_UNITS_MIN: Final = 8
"""Of a layout with long units, a window has at least so many, or it would be renewed for every id."""

RETRY_MS: Final = 1000
"""How soon after a renewal was refused the next is asked for, if ids are still minted."""

LAG_MS: Final = 60_000
"""By about this much log_time may be behind the clocks after changes of the leader: a lease may live for longer."""

_ASKING: Final = "asking"


class _Lease(NamedTuple):
    """What the cluster granted last."""

    worker: int
    number: int
    from_unit: int
    until_unit: int


def window_milliseconds(window: float) -> int:
    """The length of a window. Raises ConfigError outside of 0.1 to 600 seconds."""
    return milliseconds(window, "window", low=100, high=WINDOW_MS_MAX)


class _IdsBase:
    """
    Everything but the waiting.

    Args:
        clock_ns, pace_ns: Of the process that mints; see `Minter`.
        begin: Runs an operation in the background; raises if there is nothing that could run it.
        on_exhausted: As the minter's, for those of its users who do not come by an operation.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        window_ms: int,
        *,
        request_timeout_ms: int,
        clock_ns: Callable[[], int],
        pace_ns: Callable[[], int] | None = None,
        begin: Callable[[OpGen[None]], None],
        on_exhausted: Callable[[NeedsWindow | NeedsWait], None] | None = None,
    ) -> None:
        self.name = name
        self.layout = layout
        self._generator_name = encode_name(name, "generator of ids")
        shortest_ms = WINDOW_UNITS_MIN * layout.unit_ms
        self._first_window_ms = max(shortest_ms, min(FIRST_WINDOW_MS, window_ms))
        self._window_ms_max = max(shortest_ms, window_ms)
        self._window_ms = self._first_window_ms
        self._request_timeout_ms = request_timeout_ms
        self._begin = begin
        self._minter = Minter(
            layout,
            clock_ns=clock_ns,
            pace_ns=pace_ns,
            max_ahead_ms=max(AHEAD_MS, layout.unit_ms),
            on_exhausted=on_exhausted,
            on_renewal_due=self._renewal_due,
        )
        self._lease: _Lease | None = None
        # No id of this process is of this unit or later, whatever windows it had.
        self._reached_unit = 0
        self._is_revoked = False
        # One step each for the interpreter, so that no lock is needed, which a signal handler could find taken.
        self._asking: dict[str, object] = {}
        self._waiting: dict[Call, bool] = {}
        self._leases = self._renewals = 0

    def __repr__(self) -> str:
        return f"<coordlib.{type(self).__name__} {self.name!r}, worker {self.worker}>"

    @property
    def worker(self) -> int | None:
        """The worker number of this process's ids at the moment; None before the first id."""
        return self._minter.info().worker

    @property
    def window_ends(self) -> datetime | None:
        """Up to when ids can be minted without asking the cluster (UTC, by the ids' own time); None before the first."""
        info = self._minter.info()
        return None if info.worker is None else self.layout.start_of(info.until_unit)

    @property
    def counters(self) -> dict[str, int]:
        """
        What happened in this process so far. Keys are stable, more may come.

        `leases` taken and `renewals`; units `borrowed` because more ids were asked for than their time has;
        `regressions` of the clock; how often a mint had to wait for its time (`waits`).
        """
        info = self._minter.info()
        return {
            "leases": self._leases,
            "renewals": self._renewals,
            "borrowed": info.borrowed,
            "regressions": info.regressions,
            "waits": info.waits,
        }

    # -- minting

    def _mint_gen(self) -> OpGen[int]:
        return (yield from self._mint_many_gen(1))[0]

    def _mint_many_gen(self, count: int) -> OpGen[Sequence[int]]:
        deadline = monotonic_ms() + self._request_timeout_ms
        while True:
            try:
                return self._minter.mint_many(count)
            except (NeedsWindow, NeedsWait) as need:
                wanted = need
            yield from self._await_gen(wanted, deadline)

    def _await_gen(self, need: NeedsWindow | NeedsWait, deadline: int) -> OpGen[None]:
        """What the minter needs before it can mint again."""
        if isinstance(need, NeedsWindow):
            yield from self._await_window_gen(deadline)
        else:
            left_seconds = (deadline - monotonic_ms()) / 1000
            if left_seconds > 0:
                yield Step.pause(min(need.seconds, left_seconds))
            if need.seconds <= left_seconds:
                return
            # Or its clock has gone back by more than anybody waits for.
            raise Overloaded(
                f"ids {self.name!r}: more are minted than the layout {self.layout.name!r} has time for; no id was "
                "minted. Mint less, or under several names"
            )

    def _await_window_gen(self, deadline: int) -> OpGen[None]:
        """Until what is asked for was answered, whatever that brought."""
        wait = Step.join(self._join, deadline)
        try:
            yield wait
        except NoQuorum as silence:
            what = "has no window yet" if self._lease is None else "has used up its window"
            raise IdLeaseExpired(
                f"this process {what} for ids {self.name!r}, and the cluster granted none within "
                f"{self._request_timeout_ms / 1000:g} s; no id was minted. Look at `coordlib status`",
                name=self.name,
            ) from silence
        finally:
            if wait.call is not None:
                self._waiting.pop(wait.call, None)

    def _join(self, call: Call) -> None:
        # In this order: either the request that is under way finds the call when it ends, or it has ended by now.
        self._waiting[call] = True
        self._ask()

    # -- the lease

    def _renewal_due(self) -> None:
        try:
            self._ask()
        except CoordError:
            pass  # the cluster was closed at this moment: the id in hand is good, the next one will say so

    def _ask(self) -> None:
        """See to it that a window is being asked for. Blocks nobody."""
        mine = object()
        if self._asking.setdefault(_ASKING, mine) is not mine:
            return
        try:
            self._begin(self._window_gen())
        except BaseException:
            # Ctrl-C, or nobody to ask. Should it have been sent all the same: a second request does no harm.
            self._asking.pop(_ASKING, None)
            raise

    def _window_gen(self) -> OpGen[None]:
        """One request for a window, until it is granted or refused, and those who wait for it woken."""
        error: CoordError | None = None
        try:
            yield from self._extend_or_lease_gen()
        except CoordError as refusal:
            error = refusal
            # If there is time left, ids go on, and with the next ones this does.
            self._minter.rearm_renewal(RETRY_MS)
            if not self._is_revoked:
                # Those who wait are told by the error: a line for each of theirs, too, could be thousands in a second.
                log.log(
                    logging.DEBUG if self._waiting else logging.WARNING,
                    "ids %r: no new window: %s",
                    self.name,
                    refusal,
                    extra={"event": "ids.refused", "generator": self.name, "code": refusal.code},
                )
        except BaseException:
            self._asking.pop(_ASKING, None)
            raise
        self._asking.pop(_ASKING, None)
        self._wake(error)

    def _wake(self, error: CoordError | None) -> None:
        """Let all who wait try again, or fail."""
        ended = [call for call in list(self._waiting) if self._waiting.pop(call, False)]
        for call in ended:
            call.reply, call.error = (b"", None) if error is None else (None, error)
        wake_all(ended)

    def _extend_or_lease_gen(self) -> OpGen[None]:
        while True:
            lease = self._lease
            try:
                if lease is None or self._has_lapsed():
                    yield from self._lease_gen()
                else:
                    yield from self._renew_gen(lease, min(2 * self._window_ms, self._window_ms_max))
                return
            except NotHolder:
                self._lease = None
            except (SessionExpired, LeadershipLost):
                # Leases outlive sessions. If a lease was granted, and the answer is lost, its first window is lost too.
                pass

    def _has_lapsed(self) -> bool:
        """Whether it is not worth asking for more of the same: whoever has not minted for so long begins anew."""
        info = self._minter.info()
        return info.now_unit >= info.until_unit + LAG_MS // self.layout.unit_ms

    def _lease_gen(self) -> OpGen[None]:
        layout = self.layout
        fields = (
            layout.time_bits,
            layout.sequence_bits,
            layout.worker_bits,
            layout.unit_ms,
            layout.epoch,
            int(layout.worker_is_lowest),
        )
        window_ms = self._first_window_ms
        body = commands.ids_lease(self._generator_name, fields, window_ms)
        reply = yield Step(RequestKind.COMMAND, body, FOREVER_MS)
        worker, number, from_unit, until_unit, now_unit, _ = commands.decode_reply(reply)
        from_unit = max(1, from_unit)  # no id is 0
        if from_unit >= until_unit:
            raise IdLeaseExpired(
                f"the time of ids {self.name!r} begins now, at their epoch; no id was minted. Ask again",
                name=self.name,
            )
        lease = _Lease(worker, number, from_unit, until_unit)
        if self._is_revoked:
            yield from self._give_back_gen(lease, from_unit, FOREVER_MS)
            return
        if now_unit == 0:
            # Ids go on for the longest window, all at their first moments, and then no more: tell it while there is time.
            log.warning(
                "ids %r: the time of the cluster is before their epoch, %s, which its clocks must reach within %d s: set "
                "the clocks, or use another name with an earlier epoch",
                self.name,
                layout.start_of(0),
                WINDOW_MS_MAX // 1000,
                extra={"event": "ids.before_epoch", "generator": self.name},
            )
        self._leases += 1
        self._window_ms = window_ms
        info = self._minter.info()
        # The time of ids goes on where it was, even if log_time has fallen behind it over changes of the leader.
        now_unit = max(now_unit, min(info.now_unit, info.until_unit))
        reached, self._reached_unit = self._reached_unit, max(self._reached_unit, until_unit)
        self._lease = lease
        self._minter.install(worker, from_unit, until_unit, now_unit)
        log.debug(
            "ids %r: worker %d",
            self.name,
            worker,
            extra={"event": "ids.leased", "generator": self.name, "worker": worker},
        )
        if until_unit <= reached:
            # All of it is below ids that were minted already: only what comes after them is of use.
            yield from self._renew_gen(lease, window_ms, reached)

    def _renew_gen(self, lease: _Lease, window_ms: int, reached_unit: int | None = None) -> OpGen[None]:
        reached = lease.until_unit if reached_unit is None else reached_unit
        wanted_ms = window_ms
        for _ in range(2):
            body = commands.ids_renew(self._generator_name, lease.worker, lease.number, wanted_ms)
            reply = yield Step(RequestKind.COMMAND, body, FOREVER_MS)
            until_unit, now_unit = commands.decode_reply(reply)
            self._renewals += 1
            self._window_ms = window_ms
            self._reached_unit = max(self._reached_unit, until_unit)
            self._lease = lease = lease._replace(until_unit=until_unit)
            self._minter.extend(until_unit, now_unit)
            if until_unit > reached or until_unit >= self.layout.units_max:
                return
            # log_time has fallen behind the time of ids by a whole window, as it may when leaders change often. Not more
            # than is needed: for so long nobody else has the worker, should this process be killed.
            wanted_ms = min(window_ms + (reached - now_unit) * self.layout.unit_ms, WINDOW_MS_MAX)
        if now_unit == 0:
            raise IdLeaseExpired(
                f"the time of ids {self.name!r} begins at their epoch, {self.layout.start_of(0)}, which the cluster's time has "
                "not reached; no id was minted. Set the clocks, or use another name with an earlier epoch",
                name=self.name,
            )
        raise IdLeaseExpired(
            f"ids {self.name!r} of this process are ahead of the cluster's time by more than {WINDOW_MS_MAX} ms, the longest "
            "window; no id was minted. Wait, or mint elsewhere",
            name=self.name,
        )

    # -- the end

    def _revoke(self) -> None:
        """Mint nothing any more; whoever waits for a window is told so."""
        self._is_revoked = True
        self._minter.revoke()
        self._wake(None)

    def _return_gen(self, deadline_ms: int) -> OpGen[None]:
        """After `_revoke`: give the rest of the window back, so that the worker is free for another process."""
        lease, self._lease = self._lease, None
        if lease is not None:
            yield from self._give_back_gen(lease, self._minter.revoke(), deadline_ms)

    def _give_back_gen(self, lease: _Lease, used_until_unit: int, deadline_ms: int) -> OpGen[None]:
        body = commands.ids_return(self._generator_name, lease.worker, lease.number, used_until_unit)
        try:
            yield Step(RequestKind.COMMAND, body, deadline_ms)
        except CoordError as error:
            # It lapses by itself, and its worker is free then.
            log.debug("ids %r: the rest of the window was not given back: %s", self.name, error)

    # -- reading

    def _inspect_gen(self, number: int) -> OpGen[IdInfo]:
        info = inspect(number, self.layout)
        unit, _, worker = self.layout.decompose(number)
        body = commands.query_ids_owner(self._generator_name, worker, unit)
        reply = yield Step(RequestKind.QUERY, body, monotonic_ms() + self._request_timeout_ms)
        (owner,) = commands.decode_reply(reply)
        return dataclasses.replace(info, node=owner)


class Ids(_IdsBase):
    """
    A generator of ids: 64 bits, positive, unique in the cluster under this name, for threads. Thread-safe.

    Ids of one process rise strictly: if one call ends before another begins, its ids are smaller. Those of different
    processes are roughly in the order of time. An iterator without an end, too: `next(ids)`.

    Minting asks nobody and takes a fraction of a microsecond. The first id waits for a window of time from the cluster;
    after that windows are extended in the background while ids are minted, and minting goes on without a quorum until
    the window ends: 10 seconds at first, `window` after some minutes of minting. Who mints nothing for so long
    pays nothing, and the next id waits for a new window, mostly of another worker.

    .. versionadded:: 0.1
    """

    def __init__(self, cluster: Cluster, name: str, layout: Layout, window_ms: int) -> None:
        super().__init__(
            name,
            layout,
            window_ms,
            request_timeout_ms=cluster._request_timeout_ms,
            clock_ns=monotonic_clock_ns(),
            pace_ns=pace_clock_ns(),
            begin=cluster._begin,
            on_exhausted=self._wait_for,
        )
        self._cluster = cluster
        self._in_blocks: dict[int, bool] = {}  # threads that are in mint_many()
        # The minter's own: a method of ours in between would take a fifth longer.
        self.mint = self.next = self._minter.mint  # type: ignore[method-assign]

    def _wait_for(self, need: NeedsWindow | NeedsWait) -> None:
        if threading.get_ident() in self._in_blocks:
            raise need  # which has a deadline of its own, however often others are faster
        self._cluster._run(self._await_gen(need, monotonic_ms() + self._request_timeout_ms))

    def mint(self) -> int:
        """
        A new id.

        Raises:
            IdLeaseExpired: The window has ended, and no other was granted within the cluster's `request_timeout`.
            QuotaExceeded: All workers of the layout are in use; the message says when the first becomes free.
            ConditionFailed: The cluster knows this name with another layout.
            IdOverflow: The layout's time is used up.
            Overloaded: More ids were asked for, by all threads, than the layout has time for.
            ClusterClosed, ForkedError: The cluster was closed; this is a forked child.
            UsageError: Called by a signal handler or a finaliser that interrupted a mint of the same generator. After
                none of these errors was an id minted.
        """
        return self._minter.mint()

    def next(self) -> int:
        """The same as `mint`."""
        return self.mint()

    def mint_many(self, count: int) -> Sequence[int]:
        """
        So many new ids at once, in order: all or none. Costs little more than one id.

        A `range` where the layout's worker is lowest, as in the default one; else a sequence that is as cheap to
        hold. At most what the layout has in a second.

        Raises:
            UsageError: `count` is negative, or more than that.
            CoordError: As for `mint`.
        """
        self._in_blocks[threading.get_ident()] = True
        try:
            return self._minter.mint_many(count)
        except (NeedsWindow, NeedsWait):
            return self._cluster._run(self._mint_many_gen(count))
        finally:
            self._in_blocks.pop(threading.get_ident(), None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        return self.mint()

    def inspect(self, number: int) -> IdInfo:
        """
        What an id of this generator says: its time, worker and sequence; and from the cluster, who minted it.

        `node` is the name of the member or client that had the worker then, None if the cluster does not know any more:
        it remembers the last 8 windows of each worker.

        Raises:
            UsageError: It is no id of this layout.
            NoQuorum: The cluster could not be asked.
        """
        return self._cluster._run(self._inspect_gen(number))


class AsyncIds(_IdsBase):
    """
    `Ids` for tasks: nothing blocks the event loop, and an id that needs no new window is there without suspending.

    An iterator without an end, too: `async for number in ids`.

    .. versionadded:: 0.1
    """

    def __init__(self, cluster: AsyncCluster, name: str, layout: Layout, window_ms: int) -> None:
        super().__init__(
            name,
            layout,
            window_ms,
            request_timeout_ms=cluster._request_timeout_ms,
            clock_ns=monotonic_clock_ns(),
            pace_ns=pace_clock_ns(),
            begin=cluster._begin,
        )
        self._cluster = cluster

    async def mint(self) -> int:
        """See `Ids.mint`. A task that is cancelled while it waits takes no window from others who wait."""
        try:
            return self._minter.mint()
        except (NeedsWindow, NeedsWait):
            return await self._cluster._arun(self._mint_gen())

    async def next(self) -> int:
        """The same as `mint`."""
        return await self.mint()

    async def mint_many(self, count: int) -> Sequence[int]:
        """See `Ids.mint_many`."""
        try:
            return self._minter.mint_many(count)
        except (NeedsWindow, NeedsWait):
            return await self._cluster._arun(self._mint_many_gen(count))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        return await self.mint()

    async def inspect(self, number: int) -> IdInfo:
        """See `Ids.inspect`."""
        return await self._cluster._arun(self._inspect_gen(number))
