"""What the nemesis concludes from what was noted, and the parts of it that need no process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coordlib.testing.history import HistoryWriter, Operation, load
from coordlib.testing.nemesis.faults import FAULTS, Effect, ring
from coordlib.testing.nemesis.network import Seen, links_between
from coordlib.testing.nemesis.proxy import ProxyNetwork
from coordlib.testing.nemesis.run import Outcome
from coordlib.testing.nemesis.shim import Shim, ShimError, build
from coordlib.testing.nemesis.verdict import (
    Contents,
    judge,
    judge_agreement,
    judge_executions,
    judge_sections,
    judge_unique,
    read_back,
)
from coordlib.testing.nemesis.workspace import Workspace, sweep

EMPTY: dict[str, dict[str, Any]] = {"registers": {}, "own": {}, "unique": {}, "guarded": {}}


def _put(key: str, value: Any, status: Any = "ok") -> Operation:
    return Operation("a", "put", key, value, None, 1, None if status is None else 2, status)


def _has(**maps: dict[str, Any]) -> Contents:
    return {**EMPTY, **maps}


def test_an_acknowledged_write_that_one_member_does_not_have_is_a_violation() -> None:
    """The message names the member and the key; what failed or is unknown may be missing."""
    operations = [_put("unique/k", 1), _put("unique/l", 2, None), _put("unique/m", 3, "fail")]
    has, has_not = _has(unique={"k": 1}), _has()
    assert judge_unique(operations, {"n1": has, "n2": has}) == []
    (violation,) = judge_unique(operations, {"n1": has, "n2": has_not})
    assert "n2" in violation
    assert "unique/k" in violation


def test_members_that_differ_are_a_violation() -> None:
    """Whether a key has another value, or is missing on one of them."""
    assert judge_agreement({"n1": _has(own={"k": 1}), "n2": _has(own={"k": 1})}) == []
    assert len(judge_agreement({"n1": _has(own={"k": 1}), "n2": _has(own={"k": 2})})) == 1
    assert len(judge_agreement({"n1": _has(own={"k": 1}), "n2": _has()})) == 1


def test_writes_are_executed_once_if_acknowledged_and_once_at_most_if_unknown() -> None:
    """The cluster's own count of writes is held against the only writer's."""
    operations = [_put("own/k", "1"), _put("own/k", "2", None), _put("own/k", "3", "fail")]
    assert judge_executions(operations, {"k": 1}) == []
    assert judge_executions(operations, {"k": 2}) == []
    assert len(judge_executions(operations, {"k": 3})) == 1
    assert len(judge_executions(operations, {})) == 1
    assert len(judge_executions([], {"nobody": 1})) == 1


def test_lock_sections_may_touch_but_not_overlap_and_tokens_only_rise() -> None:
    """Over time for what was held, over revisions for what was written."""
    first = {"lock": "x", "token": 1, "from_ns": 10, "to_ns": 20}
    assert judge_sections([{"lock": "x", "token": 2, "from_ns": 20, "to_ns": 30}, first]) == []
    assert judge_sections([{"lock": "y", "token": 2, "from_ns": 15, "to_ns": 30}, first]) == []
    assert len(judge_sections([{"lock": "x", "token": 2, "from_ns": 19, "to_ns": 30}, first])) == 1
    assert len(judge_sections([{"lock": "x", "token": 1, "from_ns": 25, "to_ns": 30}, first])) == 1
    written = [{"lock": "x", "token": 2, "revision": 7}, {"lock": "x", "token": 1, "revision": 6}]
    assert judge_sections(written) == []
    assert len(judge_sections([{"lock": "x", "token": 1, "revision": 8}, *written])) == 1


def test_what_is_read_back_makes_the_histories_show_a_lost_write_by_themselves(tmp_path: Path) -> None:
    """A key that a member does not have was read as missing, after a put of it was acknowledged."""
    writer = HistoryWriter(tmp_path / "a.jsonl")
    writer.ok(writer.invoke("a", "put", "registers/k", "v", 1), None, 2)
    writer.close()
    keys = ["registers/k"]
    read_back(tmp_path / "read-back-n1.jsonl", "n1", _has(registers={"k": "v"}), keys, 10, 11)
    assert len(load(*tmp_path.glob("*.jsonl"))) == 2
    assert judge(tmp_path, {"n1": _has()}, {}).violations == []
    read_back(tmp_path / "read-back-n2.jsonl", "n2", _has(), keys, 10, 11)
    (violation,) = judge(tmp_path, {"n1": _has()}, {}).violations
    assert "registers/k" in violation
    assert "illegal" in violation


@pytest.mark.parametrize("count", [3, 5, 7])
def test_in_a_ring_everybody_hears_another_majority(count: int) -> None:
    """Itself included; so no two can be sure of the same things."""
    names = [f"n{number}" for number in range(count)]
    cut = ring(names)
    heard = {name: {other for other in names if other == name or (other, name) not in cut} for name in names}
    assert {len(some) for some in heard.values()} == {count // 2 + 1}
    assert len({frozenset(some) for some in heard.values()}) == count


def test_a_line_tells_fault_times_applied_and_what_was_seen() -> None:
    """Counts are summed up; an application without an effect is told from the others."""
    outcome = Outcome(effects={"reset": [Effect(True, {"resets": 3}), Effect(False, {"resets": 0}, "idle")]})
    assert outcome.lines() == ["reset           x 2   seen 1   3 resets; idle"]


def test_every_fault_is_documented() -> None:
    """The table of the documentation names them all."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "nemesis.md").read_text("utf-8")
    assert [name for name in FAULTS if f"`{name}`" not in text] == []


def test_what_a_dead_run_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """A living run's directory stays, and so does evidence."""
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    left = tmp_path / f"coordlib-nemesis-{dead.pid}-1"
    for path in (left, tmp_path / "coordlib-nemesis-evidence-1", tmp_path / "other"):
        path.mkdir()
    with Workspace(tmp_path) as workspace:
        (workspace.directory / "file").write_text("in use")
        assert sweep(tmp_path) == []
        assert sorted(os.listdir(tmp_path)) == sorted(["coordlib-nemesis-evidence-1", "other", workspace.tag])
    assert sorted(os.listdir(tmp_path)) == ["coordlib-nemesis-evidence-1", "other"]


def test_the_shim_shifts_the_wall_clock_and_fails_syncs_of_a_running_process(tmp_path: Path) -> None:
    """From one call to the next, by the file that both have mapped; and counts what it did."""
    try:
        library = build(tmp_path)
    except ShimError as error:
        if os.environ.get("COORDLIB_REQUIRE_FAULTS") == "1":
            raise
        pytest.skip(str(error))
    shim = Shim(library, tmp_path / "control")
    program = (
        "import os, sys, time\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "for _ in sys.stdin:\n"
        "    try:\n"
        "        os.fdatasync(file); os.fsync(file); said = 'synced'\n"
        "    except OSError as error:\n"
        "        said = error.strerror\n"
        "    print(said, round((time.time() - time.clock_gettime(time.CLOCK_TAI)) / 3600), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **shim.environment},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        assert ask() == "synced 0"
        shim.set("wall_shift_ns", -3600 * 10**9)
        shim.set("sync_errno", 5)
        assert ask() == "Input/output error -1"
        shim.set("wall_shift_ns", 0)
        shim.set("sync_errno", 0)
        assert ask() == "synced 0"
        process.stdin.close()
    assert (shim.get("syncs_failed"), shim.get("wall_reads")) == (1, 1)
    shim.close()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def _through_proxy(test: Callable[[ProxyNetwork, Ends, Ends], Awaitable[None]]) -> None:
    """Run a test with both ends of a connection that `a` opened to `b`."""

    async def main() -> None:
        network = ProxyNetwork(["a", "b"], [])
        await network.open()
        arrived: asyncio.Queue[Ends] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await arrived.put((reader, writer))

        def port(seen_from: str, name: str) -> int:
            return int(network.endpoints(seen_from)[name].rpartition(":")[2])

        server = await asyncio.start_server(accept, "127.0.0.1", port("b", "b"))
        there = await asyncio.open_connection("127.0.0.1", port("a", "b"))
        back = await arrived.get()
        try:
            await test(network, there, back)
        finally:
            for _, writer in (there, back):
                writer.close()
            server.close()
            await network.close()

    asyncio.run(main())


def test_a_proxy_stands_between_a_process_and_a_server_on_a_unix_socket(tmp_path: Path) -> None:
    """A server that is cut off hears nothing; afterwards the connection that lost bytes is ended."""

    async def main() -> None:
        own = str(tmp_path / "server")
        network = ProxyNetwork(["a"], ["b"], {"store": own})
        await network.open()
        arrived: asyncio.Queue[Ends] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await arrived.put((reader, writer))

        server = await asyncio.start_unix_server(accept, own)
        reader, writer = await asyncio.open_unix_connection(network.socket("b", "store"))
        back_reader, back_writer = await arrived.get()
        try:
            writer.write(b"one")
            assert await back_reader.readexactly(3) == b"one"
            await network.cut({("b", "store")})
            writer.write(b"two")
            back_writer.write(b"three")
            assert await reader.readexactly(5) == b"three"
            while not network.kept_bytes("b", "store"):
                await asyncio.sleep(0)
            assert await network.heal() == Seen(3, "bytes cut off")
            with contextlib.suppress(ConnectionError):
                assert await back_reader.read() == b""
        finally:
            for each in (writer, back_writer):
                each.close()
            server.close()
            await network.close()
        assert not os.path.exists(network.socket("b", "store"))

    asyncio.run(main())


def test_a_proxy_cuts_one_direction_and_ends_the_connection_that_lost_bytes() -> None:
    """The other direction goes on; what was cut off is counted, and never arrives."""

    async def test(network: ProxyNetwork, there: Ends, back: Ends) -> None:
        await network.cut({("a", "b")})
        there[1].write(b"lost")
        back[1].write(b"back")
        assert await there[0].readexactly(4) == b"back"
        while not (network.kept_bytes("a", "b")):
            await asyncio.sleep(0)
        assert (await network.heal()).number == 4
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await back[0].readexactly(1)

    _through_proxy(test)


def test_a_proxy_holds_and_delivers_in_order() -> None:
    """Nothing is lost, and the connection lives on."""

    async def test(network: ProxyNetwork, there: Ends, back: Ends) -> None:
        await network.hold(["a"])
        there[1].write(b"held")
        while not (network.kept_bytes("a", "b")):
            await asyncio.sleep(0)
        assert (await network.heal()).number == 4
        there[1].write(b" on")
        assert await back[0].readexactly(7) == b"held on"

    _through_proxy(test)


def test_a_proxy_resets_connections_on_both_sides() -> None:
    """The system says so to both ends, at once."""

    async def test(network: ProxyNetwork, there: Ends, back: Ends) -> None:
        await network.reset(links_between({"a"}, {"b"}))
        assert str(await network.heal()) == "1 connections reset"
        for reader, _ in (there, back):
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)

    _through_proxy(test)
