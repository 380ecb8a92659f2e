"""A handle's transactions behind the scenes: names, estimates of log time, and an agent for what nobody waits for.

The agent is a thread that is started when it is first needed (a resource is registered, or something has obeyed) and ends
with the handle; it looks every second for what is due, and has helpers for what may take long: no database that hangs,
and no process that is away, holds up what is done for others. What they do is `coordlib.txn.recovery`; here is only
when.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from coordlib.api.crew import Crew
from coordlib.errors import (
    ClusterClosed,
    CoordError,
    FatalError,
    ForkedError,
    NoQuorum,
    StorageFailed,
    UsageError,
)
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import FOREVER_MS, OpGen, Step
from coordlib.txn.branches import Branch, DecidingResource, Resource
from coordlib.txn.commit import Context, Counters, Unfinished
from coordlib.txn.gtid import GtidMinter, mint_ms_of, text_of
from coordlib.txn.journal import JournalResource
from coordlib.txn.participant import Participants, Work
from coordlib.txn.recovery import InDoubt, complete_gen, recover_gen, sweep_gen
from coordlib.txn.service import Status, Verb, Wish, decode_answer
from coordlib.wire.messages import RequestKind

__all__ = ["Coordinator"]

log = logging.getLogger("coordlib")

SEARCH_EVERY_MS: Final = 10_000
SEARCH_AGAIN_MS: Final = 2_000
"""The next search of a resource in which something was in doubt, or that could not be reached."""

LOOK_EVERY_SECONDS: Final = 1.0
FORGET_BATCH_MAX: Final = 512
FORGET_EVERY_MS: Final = 500
"""Every entry costs each member as much as a decision does. What is not forgotten when this process dies is swept by others."""
LEFT_MAX: Final = 10_000
"""Transactions left to be finished at once; more are left to searches of the resources, which find them, too."""

LATER_MAX: Final = 32
SESSION_PAUSE_SECONDS: Final = 0.02
TELLERS: Final = 8
HELPERS: Final = 8
FINISHERS: Final = 8


def decider_service(tag: bytes) -> str:
    """The service by which the process is found that has a last resource."""
    return f"coordlib.decider.{tag.hex()}"


class Coordinator:
    """
    One for each handle. Thread-safe.

    Args:
        run: Runs an operation on the calling thread.
        begin: Runs an operation in the background.
        session: The id of the handle's present session.
    """

    def __init__(
        self,
        run: Callable[[OpGen[Any]], Any],
        begin: Callable[[OpGen[None]], None],
        session: Callable[[], int],
        request_timeout_ms: int,
    ) -> None:
        self._run = run
        self._begin = begin
        self._session = session
        self.request_timeout_ms = request_timeout_ms
        self.pid = os.getpid()
        self.counters: Counters = {}
        self.context = Context(monotonic_ms, self.finish_later, self.forget, self.counters)
        self._lock = threading.Lock()
        self._minter = GtidMinter()
        self._log_time_ms = 0  # as it was at
        self._log_time_at = 0
        self._horizon_ms = 0  # then, too: what is minted before it is not decided any more
        self._live: dict[bytes, int] = {}  # how many are at work on it: its own code, the agent
        self.resources: dict[str, Resource] = {}
        self.participants: Participants | None = None  # of the services that this handle hosts
        # Apart: telling what is decided must not wait for what cannot be reached.
        self._tellers = Crew("coordlib-transactions-tell", TELLERS)
        self._helpers = Crew("coordlib-transactions-help", HELPERS)
        # Who tells one that is away tries for a minute and a half: nobody in doubt must wait for that.
        self._finishers = Crew("coordlib-transactions-finish", FINISHERS)
        self._forgotten: list[tuple[bytes, bytes]] = []
        self._forget_at = 0
        self._is_forgetting = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._search_at: dict[str, int] = {}  # by resource
        self._sweep_at = 0
        self._pending: frozenset[tuple[bytes, bytes]] = (
            frozenset()
        )  # in our resources, when they were last swept
        self._in_doubt: dict[str, tuple[InDoubt, ...]] = {}  # by resource, as the last search has found it

    # -- names

    def name_gen(self) -> OpGen[tuple[bytes, int]]:
        """
        A new gtid, and an estimate of log time. Asks the cluster the first time only.

        Raises:
            NoQuorum: It does not answer in time, or the session has ended and no other could be opened.
        """
        session = yield from self._session_gen()
        while not (estimate := self._estimate_ms()):
            yield from self._learn_time_gen()
        with self._lock:
            gtid = self._minter.mint(max(estimate, self._horizon_ms), session)
            self._live[gtid] = 1
        return gtid, estimate

    def _session_gen(self) -> OpGen[int]:
        """
        The present session, which makes names unique: without one, two processes could mint the same.

        Raises:
            NoQuorum: The last one has ended, and none could be opened in time.
        """
        by = monotonic_ms() + self.request_timeout_ms
        while not (session := self._session()):
            if monotonic_ms() >= by:
                raise NoQuorum("this process has no session of the cluster now; nothing was begun")
            yield Step.pause(SESSION_PAUSE_SECONDS)
        return session

    def _learn_time_gen(self) -> OpGen[None]:
        deadline_ms = monotonic_ms() + self.request_timeout_ms
        reply = yield Step(RequestKind.QUERY, commands.query_tx_clock(), deadline_ms)
        now = monotonic_ms()
        log_time_ms, _, self._horizon_ms = commands.decode_reply(reply)
        # Before the answer was under way: the estimate is late by that, never early.
        self._log_time_ms, self._log_time_at = log_time_ms, now

    def doubt_time(self) -> None:
        """A transaction was told that its time was over, or before the horizon, and it was not: ask again before the next."""
        self._log_time_at = 0

    def _estimate_ms(self) -> int:
        """Of log time; 0 if it was never asked for."""
        learnt_at = self._log_time_at
        return self._log_time_ms + monotonic_ms() - learnt_at if learnt_at else 0

    def ended(self, gtid: bytes) -> None:
        """One of those who were at work on the transaction is done with it."""
        with self._lock:
            left = self._live.pop(gtid, 0) - 1
            if left > 0:
                self._live[gtid] = left

    # -- what recovery needs, see `Recovery`

    clock = staticmethod(monotonic_ms)

    @property
    def who(self) -> str:
        return f"session {self._session()}"

    def is_live(self, gtid: bytes) -> bool:
        with self._lock:
            if gtid in self._live:
                return True
        return self.participants is not None and self.participants.is_live(gtid)

    def decider(self, tag: bytes) -> DecidingResource | None:
        for resource in self.resources.values():
            if resource.tag == tag and isinstance(resource, DecidingResource):
                return resource
        return None

    def ask_decider_gen(self, tag: bytes, gtid: bytes) -> OpGen[bool | None]:
        by = monotonic_ms() + self.request_timeout_ms
        name = decider_service(tag)
        try:
            reply = yield Step(RequestKind.QUERY, commands.query_services(name), by)
            for _, session, _, _, _ in commands.decode_reply(reply)[0]:
                body = Wish(Verb.ASK, name, gtid, decider_tag=tag).encode()
                answer = decode_answer((yield Step(RequestKind.CALL, body, by, target=session)))
                if answer.status == Status.ENDED and type(answer.payload) is bool:
                    return answer.payload
        except CoordError:
            self.count("retries")
        return None  # nobody may conclude anything

    def count(self, name: str, number: int = 1) -> None:
        self.context.count(name, number)

    def stats(self) -> dict[str, Any]:
        """How this process's own transactions go, and what it knows to be in doubt."""
        waiting = {doubt.branch.gtid for found in list(self._in_doubt.values()) for doubt in found}
        with self._lock:
            live, participants = len(self._live), self.participants
        if participants is not None:
            waiting.update(participants.promised())
        oldest_ms = min(map(mint_ms_of, waiting), default=0)
        return {
            "live": live,
            "backlog": self._tellers.backlog + self._helpers.backlog + self._finishers.backlog,
            "in_doubt": len(waiting),
            "in_doubt_oldest_ms": max(0, self._estimate_ms() - oldest_ms) if waiting else 0,
            "counters": dict(sorted(self.counters.copy().items())),
        }

    def forget(self, branches: Sequence[tuple[bytes, bytes]]) -> None:
        """Have it recorded that these have obeyed: soon, many at once, and nobody waits for it."""
        with self._lock:
            self._forgotten += branches
            is_due = len(self._forgotten) >= FORGET_BATCH_MAX or monotonic_ms() >= self._forget_at
        if is_due:
            self.flush()
        elif self._thread is None:
            self.start_agent()

    def flush(self) -> None:
        """Send what is to be forgotten without waiting for more of it."""
        with self._lock:
            if self._is_forgetting or self._is_closed or not self._forgotten:
                return
            self._is_forgetting = True
            self._forget_at = monotonic_ms() + FORGET_EVERY_MS
        self._begin(self._forget_gen(FOREVER_MS))

    def _forget_gen(self, deadline_ms: int) -> OpGen[None]:
        is_more = True
        while is_more:
            with self._lock:
                batch = self._forgotten[:FORGET_BATCH_MAX]
                del self._forgotten[:FORGET_BATCH_MAX]
            try:
                if batch:
                    yield Step(RequestKind.COMMAND, commands.tx_forget(batch), deadline_ms)
                    self.count("log_entries_lazy")
                is_more = len(self._forgotten) >= FORGET_BATCH_MAX
            except CoordError:
                # The session has ended, or the node: they stay pending until a search of their resource asks for them.
                is_more = False
        with self._lock:
            self._is_forgetting = False

    def finish_later(self, unfinished: Unfinished) -> None:
        """Have it finished in the background. Until that is done, searches of the resources leave it alone."""
        with self._lock:
            if self._is_closed or self._finishers.backlog >= LEFT_MAX:
                return
            self._live[unfinished.gtid] = self._live.get(unfinished.gtid, 0) + 1
        self._finishers.submit(lambda: self._finish(unfinished))

    # -- the agent

    def register(self, resource: Resource) -> None:
        """
        Raises:
            UsageError: Another resource has that name.
        """
        with self._lock:
            known = self.resources.setdefault(resource.name, resource)
            if known is not resource:
                raise UsageError(f"another resource of the name {resource.name!r} is registered here already")
            self._search_at[resource.name] = 0
        self.start_agent()

    def check_registered(self, resource: Any) -> None:
        """
        Raises:
            UsageError: It is not: nobody would finish its branches.
        """
        if self.resources.get(getattr(resource, "name", "")) is not resource:
            raise UsageError(
                f"{resource!r} is not registered: give it to cluster.resource(...) first, so that recovery finds what it has "
                "prepared"
            )

    def later(self, operation: OpGen[None]) -> bool:
        """
        Run it in the background; nobody waits for it. False: there is too much of that already, the caller is to run it.
        """
        if self._is_closed or self._tellers.backlog >= LATER_MAX:
            return False
        self._tellers.submit(lambda: self._run(operation))
        return True

    def help(self, operation: OpGen[None]) -> None:
        """Run it in the background, whatever else is to be done. Neither blocks nor raises."""
        self._helpers.submit(lambda: self._run(operation))

    def roll_back(self, branch: Branch) -> None:
        """End one that nobody wants any more. Neither blocks nor raises."""
        self._helpers.submit(branch.rollback)

    def start_agent(self) -> None:
        with self._lock:
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._work, name="coordlib-transactions", daemon=True)
                self._thread.start()
        self._wake.set()

    def close(self, timeout_seconds: float, run: Callable[[OpGen[None]], None]) -> None:
        """
        End all of it. What is left then is found by whoever has the resources. Never raises.

        Args:
            run: Runs a last operation on this thread; the handle itself takes none any more.
        """
        deadline = monotonic_ms() + round(timeout_seconds * 1000)
        with self._lock:
            self._is_closed = True
            thread, self._thread = self._thread, None
        self._wake.set()
        for crew in (self._tellers, self._helpers, self._finishers):
            crew.close(max(0, deadline - monotonic_ms()) / 1000)
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0, deadline - monotonic_ms()) / 1000)
        if self._forgotten and monotonic_ms() < deadline:
            try:
                run(self._forget_gen(deadline))
            except CoordError as error:
                log.info("%s", error, extra={"event": "transaction.agent"})

    def _work(self) -> None:
        while not self._is_closed:
            self._wake.clear()
            self.flush()
            participants = self.participants
            if participants is not None:
                for work in participants.due():
                    self._helpers.submit(functools.partial(self._inquire, participants, work))
            with self._lock:
                now = monotonic_ms()
                due = [
                    resource
                    for name, resource in self.resources.items()
                    if self._search_at.get(name, 0) <= now
                ]
                for resource in due:
                    self._search_at[resource.name] = FOREVER_MS  # until this search has ended
            for resource in due:
                self._helpers.submit(functools.partial(self._search, resource))
            if self.resources and monotonic_ms() >= self._sweep_at:
                self._sweep_at = FOREVER_MS
                self._helpers.submit(self._sweep)
            self._wake.wait(LOOK_EVERY_SECONDS)

    def _inquire(self, participants: Participants, work: Work) -> None:
        self._run(participants.inquire_gen(work))

    def _finish(self, unfinished: Unfinished) -> None:
        try:
            is_done = self._run(complete_gen(unfinished, self))
            if not is_done:
                log.warning(
                    "transaction %s could not be finished everywhere; what is left of it is found when resources are "
                    "searched",
                    text_of(unfinished.gtid),
                    extra={"event": "transaction.left"},
                )
        finally:
            self.ended(unfinished.gtid)

    def _search(self, resource: Resource) -> None:
        is_calm = False
        try:
            is_calm = self.search(resource)
        finally:
            wait_ms = SEARCH_EVERY_MS if is_calm else SEARCH_AGAIN_MS
            with self._lock:
                self._search_at[resource.name] = monotonic_ms() + wait_ms

    def _sweep(self) -> None:
        try:
            self.sweep()
        finally:
            self._sweep_at = monotonic_ms() + SEARCH_EVERY_MS

    def sweep(self) -> None:
        """
        Have forgotten what was pending the last time, too, and has obeyed.

        Raises:
            CoordError: The cluster cannot be asked now.
        """
        self._pending = self._run(sweep_gen(dict(self.resources), self.who, self._pending, self))

    def recover(self) -> None:
        """
        Search all resources now, and finish what can be finished.

        Raises:
            ClusterClosed, FatalError: The node has stopped.
        """
        for resource in list(self.resources.values()):
            if self._is_closed:
                return
            self.search(resource)

    def _log_failed_search(self, resource: Resource, error: Exception) -> None:
        log.warning(
            "resource %r could not be searched: %s",
            resource.name,
            error,
            extra={"event": "transaction.search"},
        )

    def search(self, resource: Resource) -> bool:
        """
        Search one resource. Whether nothing is left there that must be looked at again soon.

        Raises:
            ClusterClosed, FatalError: The node has stopped.
        """
        try:
            if isinstance(resource, JournalResource):
                resource.obey_again()
            recovered = self._run(recover_gen(resource, self))
        except (ClusterClosed, ForkedError, FatalError) as error:
            if not (isinstance(resource, JournalResource) and isinstance(error, StorageFailed)):
                raise
            # The node may be well: it is the journal that cannot be written, and somebody must be told.
            self._log_failed_search(resource, error)
            return False
        except Exception as error:
            # A database that is away now is asked again later: one of many must not stop the others.
            self._log_failed_search(resource, error)
            return False
        if recovered.in_doubt and not self._log_time_at:
            self._run(self._learn_time_gen())  # to say how old they are
        self._in_doubt[resource.name] = recovered.in_doubt
        for in_doubt in recovered.in_doubt:
            log.warning(
                "transaction %s is in doubt in %r: %s",
                text_of(in_doubt.branch.gtid),
                resource.name,
                in_doubt.why,
                extra={"event": "transaction.in-doubt"},
            )
        return not recovered.in_doubt
