"""How callers are woken, and what is kept of the event loops that they wait in."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from coordlib.config import ClientSettings
from coordlib.node import waiting as module
from coordlib.node.driver import ClientDriver
from coordlib.node.waiting import AsyncCall
from coordlib.wire.messages import RequestKind


@pytest.fixture
def driver() -> ClientDriver:
    """Not started: only its book of event loops is of interest."""
    return ClientDriver(
        ClientSettings(
            endpoints=("tcp://127.0.0.1:7400",),
            cluster="shop",
            secrets=("a secret that is long enough for these tests",),
        )
    )


def test_a_loop_that_was_closed_is_not_kept_alive(
    driver: ClientDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application may run many, one after the other."""
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.0)

    async def use() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.get_running_loop()
        watch = driver.watch(loop)
        assert driver.watch(loop) is watch
        call = AsyncCall(RequestKind.QUERY, b"", 0)
        watch.add(call)
        await call.future  # ended by the watch, as nobody else does
        watch.discard(call)
        while watch._is_running:
            await asyncio.sleep(0)
        return weakref.ref(loop)

    loop = asyncio.run(use())
    gc.collect()
    assert loop() is None
    assert len(driver._watches) == 0


def test_a_loop_that_was_closed_before_the_watch_looked_again_is_not_kept_alive(
    driver: ClientDriver,
) -> None:
    """As when it ends right after its last call."""

    async def use() -> weakref.ref[asyncio.AbstractEventLoop]:
        loop = asyncio.get_running_loop()
        watch = driver.watch(loop)
        call = AsyncCall(RequestKind.QUERY, b"", 0)
        watch.add(call)
        watch.discard(call)
        return weakref.ref(loop)

    loop = asyncio.run(use())
    gc.collect()
    assert loop() is None
