"""Locks as users hold them: order, time limits, loss, and what happens to exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest

import coordlib
from coordlib import GrantState
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.kernel import MemberKernel


class Background:
    """A function on a thread; `result()` returns what it returned or raises what it raised."""

    def __init__(self, function: object) -> None:
        self._function = function
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._function()  # type: ignore[operator]  # a callable
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        self._thread.join(10)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


def wait_for_waiters(lock: coordlib.Lock, count: int) -> None:
    """Until so many wait for the lock, as the cluster sees it."""
    for _ in range(10_000):
        if lock.info().waiters == count:
            return
    raise AssertionError(f"{lock.info()} instead of {count} waiters")


def test_a_grant_is_held_until_it_is_released(cluster: coordlib.Cluster) -> None:
    """Its token is positive, its state tells the truth."""
    lock = cluster.lock("a")
    with lock as grant:
        assert lock.grant is grant
        assert grant.token > 0
        assert grant.state == GrantState.HELD
        assert 0 < grant.remaining() <= 10
        assert not grant.lost
        grant.ensure_held()
        assert lock.locked()
        assert lock.info() == ("local", grant.token, 0)
    assert grant.state == GrantState.RELEASED
    assert grant.remaining() == 0
    with pytest.raises(coordlib.LockLost):
        grant.ensure_held()
    assert lock.grant is None
    assert not lock.locked()


def test_tokens_rise_over_all_locks(cluster: coordlib.Cluster) -> None:
    """Also over the end of a lock and its new beginning."""
    tokens = []
    for name in ("a", "b", "a", "c"):
        with cluster.lock(name) as grant:
            tokens.append(grant.token)
    assert tokens == sorted(set(tokens))


def test_waiters_are_served_in_the_order_in_which_they_asked(cluster: coordlib.Cluster) -> None:
    """First come, first served."""
    order: list[int] = []
    first = cluster.lock("a")
    first.acquire()

    def wait(number: int) -> None:
        with cluster.lock("a"):
            order.append(number)

    waiting = []
    for number in range(5):
        waiting.append(Background(lambda number=number: wait(number)))
        wait_for_waiters(first, number + 1)
    first.release()
    for thread in waiting:
        thread.result()
    assert order == [0, 1, 2, 3, 4]


def test_no_wait_for_a_lock_that_is_held_with_timeout_0(cluster: coordlib.Cluster) -> None:
    """It is refused at once, and nothing stays behind."""
    with cluster.lock("a"):
        with pytest.raises(coordlib.LockTimeout):
            cluster.lock("a").acquire(timeout=0)
        assert cluster.lock("a").info().waiters == 0
    cluster.lock("a").acquire(timeout=0)


def test_a_timeout_withdraws_the_request(cluster: coordlib.Cluster) -> None:
    """It is not granted later."""
    lock = cluster.lock("a")
    with lock:
        with pytest.raises(coordlib.LockTimeout) as caught:
            cluster.lock("a").acquire(timeout=0.05)
        assert isinstance(caught.value, TimeoutError)
        assert lock.info().waiters == 0
    assert not lock.locked()


def test_with_never_enters_its_body_without_the_lock(cluster: coordlib.Cluster) -> None:
    """A timeout of the handle is raised instead."""
    with cluster.lock("a"), pytest.raises(coordlib.LockTimeout), cluster.lock("a", timeout=0.02):
        raise AssertionError("entered")


def test_releasing_what_is_not_held_is_an_error(cluster: coordlib.Cluster) -> None:
    """Never acquired, or released twice."""
    lock = cluster.lock("a")
    with pytest.raises(coordlib.NotHolder):
        lock.release()
    lock.acquire()
    lock.release()
    with pytest.raises(coordlib.NotHolder):
        lock.release()


def test_a_late_release_frees_nobody_elses_lock(cluster: coordlib.Cluster) -> None:
    """A release names its acquisition."""
    old = cluster.lock("a")
    grant = old.acquire()
    old.release()
    with cluster.lock("a") as held:
        assert cluster._run(old._release_gen(grant)) is False
        assert cluster.lock("a").info().token == held.token


def test_the_bodys_exception_is_not_hidden(cluster: coordlib.Cluster) -> None:
    """And the lock is free after it."""
    lock = cluster.lock("a")
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError
    assert not lock.locked()
    with pytest.raises(ZeroDivisionError), lock:
        lock.release()  # so that the exit fails as well
        raise ZeroDivisionError


def test_a_guarded_write_needs_the_present_grant(cluster: coordlib.Cluster) -> None:
    """After the release it is refused, and nothing is written."""
    data = cluster.map("m")
    with cluster.lock("a") as grant:
        data.put("k", 1, guard=grant)
        assert data.compare_and_set("k", 1, 2, guard=grant)
    with pytest.raises(coordlib.LockLost):
        data.put("k", 3, guard=grant)
    with cluster.lock("a") as newer:
        with pytest.raises(coordlib.LockLost):
            data.put("k", 3, guard=grant)
        with pytest.raises(coordlib.LockLost):
            data.pop("k", guard=grant)
        data.put("k", 4, guard=newer)
    assert data["k"] == 4
    with pytest.raises(coordlib.UsageError):
        data.put("k", 5, guard="a")  # type: ignore[arg-type]  # that is the point


def test_a_decorated_function_runs_while_holding_the_lock(cluster: coordlib.Cluster) -> None:
    """Its name, arguments and result are its own; the lock's name may depend on the arguments."""

    @cluster.locked(lambda number, **_: f"invoice-{number}")
    def work(number: int, *, more: int = 0) -> tuple[bool, int]:
        """Says so."""
        return cluster.lock(f"invoice-{number}").locked(), number + more

    assert work(7, more=1) == (True, 8)
    assert (work.__name__, work.__doc__) == ("work", "Says so.")
    assert not cluster.lock("invoice-7").locked()


def test_a_coroutine_may_be_decorated_by_either_face(cluster: coordlib.Cluster) -> None:
    """It holds the lock while it runs."""

    @cluster.locked("a")
    async def work() -> bool:
        return await asyncio.to_thread(cluster.lock("a").locked)

    assert asyncio.run(work())


def test_decorating_the_wrong_flavour_is_refused_when_decorating(cluster: coordlib.Cluster) -> None:
    """A generator would run after the release; a plain function would block the event loop."""

    def generator() -> Iterator[int]:
        yield 1

    with pytest.raises(coordlib.FlavourError):
        cluster.locked("a")(generator)
    unstarted = coordlib.AsyncCluster.local()
    with pytest.raises(coordlib.FlavourError):
        unstarted.locked("a")(lambda: None)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True])
def test_time_limits_are_checked_before_anything_is_sent(cluster: coordlib.Cluster, timeout: object) -> None:
    """By the handle already, and by each acquire."""
    with pytest.raises(coordlib.UsageError):
        cluster.lock("a", timeout=timeout)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(coordlib.UsageError):
        cluster.lock("a").acquire(timeout=timeout)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("name", ["", None, 5, "x" * 5000])
def test_names_are_checked_before_anything_is_sent(cluster: coordlib.Cluster, name: object) -> None:
    """A name is text, not empty and not huge."""
    with pytest.raises((coordlib.UsageError, coordlib.QuotaExceeded)):
        cluster.lock(name).acquire(timeout=0)  # type: ignore[arg-type]  # that is the point


def test_a_loss_is_told_to_the_holder(cluster: coordlib.Cluster) -> None:
    """The callback comes with the grant, on another thread; release says that the lock was lost."""
    told: list[object] = []
    is_told = threading.Event()

    def lost(grant: coordlib.Grant) -> None:
        told.extend((grant, threading.current_thread()))
        is_told.set()

    lock = cluster.lock("a", on_lost=lost)
    grant = lock.acquire()
    driver = cluster._driver
    assert driver is not None and driver._kernel is not None
    kernel = driver._kernel
    driver.ask(lambda: kernel.session._lose(0), 5)
    assert is_told.wait(10)
    assert told[0] is grant
    assert told[1] is not threading.current_thread()
    assert grant.lost
    with pytest.raises(coordlib.LockLost):
        grant.ensure_held()
    with pytest.raises(coordlib.LockLost):
        lock.release()
    with pytest.raises(coordlib.LockLost):
        cluster.map("m").put("k", 1, guard=coordlib.Grant("a", b"a", 0, grant._view, 1, None, None))


def lose_session(cluster: coordlib.Cluster | coordlib.AsyncCluster) -> None:
    """The cluster and this process both end the session: what it held is free at once."""
    driver = cluster._driver
    assert driver is not None
    kernel = driver._kernel
    assert isinstance(kernel, MemberKernel) and kernel.service is not None
    service = kernel.service

    def end() -> None:
        now = monotonic_ms()
        service.propose_internal(commands.expire_sessions([kernel.session.view.session_id]), now)
        kernel.session._lose(now)

    driver.ask(end, 5)


def test_a_block_releases_the_grant_that_it_got(cluster: coordlib.Cluster) -> None:
    """Two threads share a handle; the one whose grant was lost does not release the other's."""
    lock = cluster.lock("a")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> coordlib.Grant:
        with lock as grant:
            entered.set()
            assert leave.wait(10)
            grant.ensure_held()
        return grant

    with pytest.raises(coordlib.LockLost), lock as first:
        lose_session(cluster)
        second = Background(hold)
        assert entered.wait(10)
        assert first.lost
    try:
        assert lock.grant is not None
        assert lock.info().token == lock.grant.token > first.token
    finally:
        leave.set()
    grant = second.result()
    assert isinstance(grant, coordlib.Grant)
    assert grant.state == GrantState.RELEASED
    assert lock.grant is None
    assert not lock.locked()


def test_tasks_lock_as_threads_do() -> None:
    """Order, timeout, exceptions, decorator."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            order: list[int] = []
            first = cluster.lock("a")
            await first.acquire()

            async def wait(number: int) -> None:
                async with cluster.lock("a"):
                    order.append(number)

            tasks = []
            for number in range(3):
                tasks.append(asyncio.create_task(wait(number)))
                while (await first.info()).waiters != number + 1:
                    pass
            with pytest.raises(coordlib.LockTimeout):
                await cluster.lock("a").acquire(timeout=0.02)
            await first.release()
            await asyncio.gather(*tasks)
            assert order == [0, 1, 2]
            with pytest.raises(ZeroDivisionError):
                async with cluster.lock("a"):
                    raise ZeroDivisionError

            @cluster.locked("a")
            async def work() -> bool:
                return await cluster.lock("a").locked()

            assert await work()
            assert not await cluster.lock("a").locked()

    asyncio.run(check())


def test_a_block_of_a_task_releases_the_grant_that_it_got() -> None:
    """As with threads: two tasks share a handle."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            lock = cluster.lock("a")
            entered, leave = asyncio.Event(), asyncio.Event()

            async def hold() -> coordlib.Grant:
                async with lock as grant:
                    entered.set()
                    await leave.wait()
                    grant.ensure_held()
                return grant

            with pytest.raises(coordlib.LockLost):
                async with lock as first:
                    await asyncio.to_thread(lose_session, cluster)
                    second = asyncio.create_task(hold())
                    await entered.wait()
            assert lock.grant is not None
            assert (await lock.info()).token == lock.grant.token > first.token
            leave.set()
            assert (await second).state == GrantState.RELEASED
            assert not await lock.locked()

    asyncio.run(check())


def test_a_cancelled_acquire_is_withdrawn() -> None:
    """The task gets its CancelledError, and the place in the queue is given up behind it."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            lock = cluster.lock("a")
            await lock.acquire()
            task = asyncio.create_task(cluster.lock("a").acquire())
            while (await lock.info()).waiters != 1:
                pass
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while (await lock.info()).waiters != 0:
                pass
            await lock.release()
            assert not await lock.locked()

    asyncio.run(check())


def test_a_task_cancelled_before_its_request_left_holds_nothing() -> None:
    """Cancelled at any moment, the lock is free in the end."""

    async def check() -> None:
        async with coordlib.AsyncCluster.local() as cluster:
            for pauses in range(30):
                lock = cluster.lock("a")
                task = asyncio.create_task(lock.acquire())
                for _ in range(pauses):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    pass
                else:
                    await lock.release()
                while await cluster.lock("a").locked():
                    pass

    asyncio.run(check())


def test_a_block_that_was_entered_elsewhere_is_left_all_the_same(cluster: coordlib.Cluster) -> None:
    """An ExitStack may be handed to another thread: the lock is released there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.lock("handed-on"))
        moved = stack.pop_all()
    thread = threading.Thread(target=moved.close)
    thread.start()
    thread.join()
    assert not cluster.lock("handed-on").locked()
