"""Forking: the child holds nothing of the parent's, and can do nothing in its name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coordlib
from tests.api.conftest import SECRET, free_ports

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # The parent has a node thread on purpose; what becomes of it in the child is what is tested.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

HERE = Path(__file__).resolve().parents[2]


def in_child(check: Callable[[], object]) -> None:
    """Run a check in a forked child; fail as it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            check()
            os._exit(0)
        except BaseException as error:
            os.write(writer, repr(error).encode()[:4000])
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, text


def member(directory: Path, port: int) -> coordlib.Cluster:
    return coordlib.Cluster(
        "shop",
        node="n1",
        members={"n1": f"tcp://127.0.0.1:{port}"},
        secret=SECRET,
        data_dir=directory,
        start_timeout=10.0,
    )


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(coordlib.ForkedError):
        call()


@pytest.mark.parametrize("kind", ["local", "member"])
def test_every_handle_is_refused_in_the_child(kind: str, tmp_path: Path) -> None:
    """Operations raise ForkedError, grants report lost, close does nothing; the parent goes on."""
    cluster = coordlib.local() if kind == "local" else member(tmp_path / "d", free_ports(1)[0])
    with cluster:
        numbers, lock = cluster.map("m"), cluster.lock("a")
        grant = lock.acquire()

        def check() -> None:
            refused(lambda: numbers.put("k", 1))
            refused(lambda: numbers.get("k"))
            refused(lambda: cluster.lock("b").acquire(timeout=0))
            refused(lock.release)
            refused(cluster.start)
            refused(cluster.stats)
            assert grant.lost
            assert grant.remaining() == 0
            with pytest.raises(coordlib.LockLost):
                grant.ensure_held()
            cluster.close()

        in_child(check)
        numbers["k"] = 2
        grant.ensure_held()
        lock.release()


def test_a_child_attaches_as_a_client(tmp_path: Path) -> None:
    """By the very address of its parent's member."""
    port = free_ports(1)[0]
    with member(tmp_path / "d", port) as cluster:
        cluster.map("m")["k"] = "from the parent"

        def check() -> None:
            with coordlib.connect(f"tcp://127.0.0.1:{port}", cluster="shop", secret=SECRET) as client:
                assert client.map("m")["k"] == "from the parent"
                client.map("m")["k"] = "from the child"

        in_child(check)
        assert cluster.map("m")["k"] == "from the child"


PARENT = """
import os, sys, time
import coordlib
cluster = coordlib.Cluster("shop", node="n1", members={"n1": "tcp://127.0.0.1:" + sys.argv[2]},
                           secret=sys.argv[3], data_dir=sys.argv[1])
cluster.start()
cluster.map("m")["k"] = "kept"
child = os.fork()
if not child:
    print("child", os.getpid(), flush=True)
    os.close(1)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def test_a_killed_parent_restarts_while_its_child_lives(tmp_path: Path) -> None:
    """Port and directory are free: the child kept neither."""
    import subprocess

    port = free_ports(1)[0]
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, str(tmp_path / "d"), str(port), SECRET],
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE / 'transports'}"},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline().split()[1])
    try:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        begin = time.monotonic()
        with member(tmp_path / "d", port) as cluster:
            assert cluster.map("m")["k"] == "kept"
        assert time.monotonic() - begin < 8
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()
