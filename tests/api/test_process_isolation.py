"""`isolation="process"`: the same API, with the member in a process of its own that lives as long as this one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import coordlib
from tests.api.conftest import SECRET, free_ports

HERE = Path(__file__).resolve().parents[2]


def arguments(directory: Path, port: int) -> dict[str, Any]:
    return {
        "name": "shop",
        "node": "n1",
        "members": {"n1": f"tcp://127.0.0.1:{port}"},
        "secret": SECRET,
        "data_dir": directory,
        "isolation": "process",
        "start_timeout": 15.0,
    }


def children() -> set[int]:
    """Processes whose parent is this one."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.add(int(entry.name))
    return found


def is_gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def isolated(tmp_path: Path) -> Iterator[coordlib.Cluster]:
    with coordlib.Cluster(**arguments(tmp_path / "d", free_ports(1)[0])) as cluster:
        yield cluster


def test_the_api_is_the_same(isolated: coordlib.Cluster) -> None:
    """Maps, locks, guards and stats."""
    numbers = isolated.map("m")
    with isolated.lock("a", timeout=5) as grant:
        numbers.put("k", 1, guard=grant)
        grant.ensure_held()
    assert numbers.snapshot() == {"k": 1}
    assert isolated.stats()["node"] == "n1"


def test_the_member_ends_with_its_handle(tmp_path: Path) -> None:
    """And its disk is there for the next."""
    before = children()
    settings = arguments(tmp_path / "d", free_ports(1)[0])
    with coordlib.Cluster(**settings) as cluster:
        cluster.map("m")["k"] = 1
        (pid,) = children() - before
    assert is_gone(pid)

    async def again() -> None:
        async with coordlib.AsyncCluster(**settings) as cluster:
            assert await cluster.map("m").get("k") == 1

    asyncio.run(again())


def test_failures_to_start_come_through(tmp_path: Path) -> None:
    """With the same error as on a thread."""
    (tmp_path / "d").write_text("")
    cluster = coordlib.Cluster(**arguments(tmp_path / "d", free_ports(1)[0]))
    with pytest.raises(coordlib.StartError, match="data_dir"):
        cluster.start()


APPLICATION = """
import sys, time
import coordlib
cluster = coordlib.Cluster("shop", node="n1", members={"n1": "tcp://127.0.0.1:" + sys.argv[2]},
                           secret=sys.argv[3], data_dir=sys.argv[1], isolation="process")
if __name__ == "__main__":
    cluster.start()
    cluster.map("m")["k"] = "kept"
    with open(f"/proc/{__import__('os').getpid()}/task/{__import__('os').getpid()}/children") as file:
        print(*file.read().split(), flush=True)
    time.sleep(60)
"""


def test_the_member_dies_with_a_killed_application(tmp_path: Path) -> None:
    """kill -9 of the application leaves no process and no socket, and what was acknowledged is kept."""
    port = free_ports(1)[0]
    scratch = tmp_path / "t"
    scratch.mkdir()
    script = tmp_path / "application.py"
    script.write_text(APPLICATION)
    application = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "d"), str(port), SECRET],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'transports'}"},
    )
    assert application.stdout is not None
    pids = [int(pid) for pid in application.stdout.readline().split()]
    application.send_signal(signal.SIGKILL)
    application.wait(10)
    application.stdout.close()
    assert pids
    assert all(is_gone(pid) for pid in pids)
    assert list(scratch.iterdir()) == []
    with coordlib.Cluster(**{**arguments(tmp_path / "d", port), "isolation": "thread"}) as cluster:
        assert cluster.map("m")["k"] == "kept"


def test_a_member_that_dies_is_told(tmp_path: Path) -> None:
    """Calls end with an error instead of waiting for ever."""
    before = children()
    with coordlib.Cluster(**arguments(tmp_path / "d", free_ports(1)[0])) as cluster:
        cluster.map("m")["k"] = 1
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(coordlib.CoordError):
            cluster.lock("a").acquire(timeout=1)
