"""Calls between applications on real sockets: members, clients, and an application beside its member's process."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import coordlib
from coordlib.errors import (
    CallTimeout,
    ClusterClosed,
    IndeterminateError,
    Overloaded,
    ServiceUnreachable,
    UsageError,
)
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.driver import Driver
from coordlib.node.effects import InboundCall
from coordlib.node.operations import Step, arun, run
from coordlib.node.session import BODY_SIZE_BYTES_MAX
from coordlib.wire.messages import CallStatus, RequestKind
from tests.api.conftest import SECRET, Trio, free_ports


def driver_of(cluster: coordlib.Cluster | coordlib.AsyncCluster) -> Driver:
    driver = cluster._driver
    assert driver is not None
    return driver


def call_gen(target: int, body: bytes, patience_ms: int) -> Generator[Step, bytes, bytes]:
    return (yield Step(RequestKind.CALL, body, monotonic_ms() + patience_ms, target=target))


def ask(cluster: coordlib.Cluster, target: int, body: bytes, patience_ms: int = 10_000) -> bytes:
    """Call until it is delivered: the way may not be known yet, and that is a definite answer."""
    end = time.monotonic() + 10
    while True:
        try:
            return run(cluster._engine, call_gen(target, body, patience_ms))
        except ServiceUnreachable:
            if time.monotonic() > end:
                raise


def serve(cluster: coordlib.Cluster | coordlib.AsyncCluster, name: bytes) -> int:
    """Take calls and answer them at once; returns the session to call."""
    driver = driver_of(cluster)
    driver.set_call_handler(lambda inbound: driver.answer(inbound, CallStatus.OK, name + inbound.body))
    return driver.view.session_id


def test_members_and_clients_call_each_other(trio: Trio) -> None:
    """Everybody everybody, with bodies up to the limit."""
    with trio.connect(name="c1") as one, trio.connect(name="c2") as other:
        everybody = {name.encode(): node for name, node in [*trio.nodes.items(), ("c1", one), ("c2", other)]}
        sessions = {name: serve(cluster, name) for name, cluster in everybody.items()}
        for cluster in everybody.values():
            for name, session in sessions.items():
                assert ask(cluster, session, b" hears") == name + b" hears"
        large = bytes(BODY_SIZE_BYTES_MAX - 2)
        assert ask(one, sessions[b"c2"], large) == b"c2" + large
        with pytest.raises(ServiceUnreachable):
            run(one._engine, call_gen(1 << 60, b"", 1000))


def test_answers_come_from_any_thread_and_errors_are_raised(trio: Trio) -> None:
    """The handler hands over and returns; what cannot be sent is refused where it can be put right."""
    one, other = trio.nodes["n1"], trio.nodes["n2"]
    driver = driver_of(other)
    refused: list[UsageError] = []

    def work(inbound: InboundCall) -> None:
        if inbound.body == b"too much":
            try:
                driver.answer(inbound, CallStatus.OK, bytes(BODY_SIZE_BYTES_MAX + 1))
            except UsageError as error:
                refused.append(error)
        answer = commands.encode_error(Overloaded(f"no room for {inbound.body.decode()}"))
        driver.answer(inbound, CallStatus.ERROR, answer)

    with ThreadPoolExecutor(2) as pool:

        def hand_over(inbound: InboundCall) -> None:
            pool.submit(work, inbound)

        driver.set_call_handler(hand_over)
        with pytest.raises(Overloaded, match="no room for too much"):
            ask(one, driver.view.session_id, b"too much")
    assert len(refused) == 1


def test_tasks_call_too_and_a_silent_application_costs_the_time(trio: Trio) -> None:
    """An awaited call ends at its deadline; the event loop is free meanwhile."""
    serve(trio.nodes["n2"], b"n2")
    talker = driver_of(trio.nodes["n2"]).view.session_id
    silent = driver_of(trio.nodes["n3"])
    silent.set_call_handler(lambda inbound: None)
    ask(trio.nodes["n1"], talker, b"")

    async def main() -> None:
        engine = trio.nodes["n1"]._engine
        end = time.monotonic() + 10
        slow = asyncio.ensure_future(arun(engine, call_gen(silent.view.session_id, b"", 300)))
        answers = await asyncio.gather(*(arun(engine, call_gen(talker, b"%d" % n, 5000)) for n in range(50)))
        assert answers == [b"n2%d" % n for n in range(50)]
        while True:
            try:
                await slow
            except ServiceUnreachable:
                assert time.monotonic() < end
                slow = asyncio.ensure_future(arun(engine, call_gen(silent.view.session_id, b"", 300)))
            except CallTimeout:
                return

    asyncio.run(main())


def test_when_a_node_closes_its_calls_end_and_it_is_called_in_vain(trio: Trio) -> None:
    """What was under way may have been delivered; an answer that comes after the end is dropped."""
    one, other = trio.nodes["n1"], trio.nodes["n2"]
    session = serve(other, b"")
    ask(one, session, b"")
    kept: queue.SimpleQueue[InboundCall] = queue.SimpleQueue()
    driver = driver_of(other)
    driver.set_call_handler(kept.put)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, other, session, b"to itself")
        inbound = kept.get(timeout=10)
        other.close(timeout=1)
        with pytest.raises(IndeterminateError):
            waiting.result(timeout=10)
    driver.answer(inbound, CallStatus.OK, b"")
    with pytest.raises(ServiceUnreachable):
        run(one._engine, call_gen(session, b"", 5000))
    with pytest.raises(ClusterClosed):
        run(other._engine, call_gen(session, b"", 5000))


def test_an_application_beside_its_member_is_called_through_it(tmp_path: Path) -> None:
    """isolation="process": the application is a client of its member, and is called as any other."""
    (port,) = free_ports(1)
    members = {"n1": f"tcp://127.0.0.1:{port}"}
    with (
        coordlib.Cluster(
            "shop",
            node="n1",
            members=members,
            secret=SECRET,
            data_dir=tmp_path,
            isolation="process",
            start_timeout=15.0,
        ) as beside,
        coordlib.connect(members["n1"], cluster="shop", secret=SECRET, start_timeout=15.0) as client,
    ):
        beside_session, client_session = serve(beside, b"beside"), serve(client, b"client")
        assert ask(client, beside_session, b"!") == b"beside!"
        assert ask(beside, client_session, b"!") == b"client!"
        assert ask(beside, beside_session, b"!") == b"beside!"
