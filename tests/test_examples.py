"""Every example runs as it is, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Members, free_endpoint, start_members

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def solo(tmp_path: Path) -> Iterator[Members]:
    members = start_members(["solo"], tmp_path)
    yield members
    members.close()


def environment(**values: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("COORDLIB_", "ORDERS_"))}
    paths = [str(ROOT), str(ROOT / "transports"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), **values}


def run(program: str, **values: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / program)],
        env=environment(**values),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        "asyncio_service.py",
        "client_worker.py",
        "orders_service.py",
        "placing_orders.py",
        "quickstart.py",
        "test_orders_under_faults.py",
        "transfer.py",
        "worker_pool.py",
    ]


def test_quickstart_needs_nothing() -> None:
    assert "eur = 1.09" in run("quickstart.py")


def test_an_order_over_two_services_is_whole_or_nothing() -> None:
    """One that is placed, one that is refused by the second service, one whose block raises: nothing stays reserved."""
    assert run("transfer.py").splitlines() == [
        "before: 5 pieces, 100 of money, 0 orders, 0 reserved",
        "after o-1: 3 pieces, 60 of money, 1 orders, 0 reserved",
        "o-2 was refused (vote-no)",
        "after o-2: 3 pieces, 60 of money, 1 orders, 0 reserved",
        "o-3: the customer has left",
        "after o-3: 3 pieces, 60 of money, 1 orders, 0 reserved",
    ]


def test_asyncio_service_never_sells_what_is_not_there() -> None:
    """Twenty tasks take two apples each under one lock: forty are gone, none is lost."""
    out = run("asyncio_service.py")
    assert "60 of 100 left" in out
    assert "as expected" in out


def test_orders_under_faults_finds_the_careless_shop_and_lets_the_careful_one_pass() -> None:
    """As a project that has coordlib installed runs it: the plugin is found by its entry point."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"),
            *("--rootdir", str(EXAMPLES), "-c", os.devnull),
            str(EXAMPLES / "test_orders_under_faults.py"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "11 passed" in done.stdout
    assert "simulated with seed" in done.stdout  # that of the careless one


def test_pre_fork_workers_attach_each_for_itself(solo: Members) -> None:
    """Three forked workers count to fifteen together."""
    out = run(
        "client_worker.py",
        COORDLIB_ENDPOINTS=solo.endpoints["solo"],
        COORDLIB_CLUSTER="shop",
        COORDLIB_SECRET=solo.secret,
    )
    assert "3 of 3 workers" in out
    assert solo.clusters["solo"].map("served")["count"] == 15


def test_a_pool_of_workers_mints_no_id_twice(solo: Members) -> None:
    """Eight forked processes, of which two are killed."""
    out = run(
        "worker_pool.py",
        COORDLIB_ENDPOINTS=solo.endpoints["solo"],
        COORDLIB_CLUSTER="shop",
        COORDLIB_SECRET=solo.secret,
    )
    assert "8 processes" in out
    assert "160000 ids, 0 of them double" in out


def test_the_order_service_runs_alone_and_leaves_when_its_input_ends(tmp_path: Path) -> None:
    """It takes its member from the environment, answers its two commands, and keeps its records."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "orders_service.py")],
        env=environment(
            COORDLIB_CLUSTER="shop",
            COORDLIB_NODE="solo",
            COORDLIB_MEMBERS=f"solo={free_endpoint()}",
            COORDLIB_SECRET="a secret of the tests and long enough",
            COORDLIB_DATA_DIR=str(tmp_path / "data"),
            ORDERS_RECORDS=str(tmp_path / "records"),
        ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "open\n"
        journal = tmp_path / "records" / "locks.log"
        while not journal.exists() or journal.stat().st_size < 1000:
            assert process.poll() is None
        (tmp_path / "keys").write_text("sold apples\norders nobody\n")
        for command, answer in (("stop", "stopped"), (f"read {tmp_path}/keys {tmp_path}/found", "read")):
            process.stdin.write(f"{command}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{answer}\n"
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
    finally:
        process.kill()
        process.communicate()
    sold, unknown = (tmp_path / "found").read_text().splitlines()
    leaves = [line.split() for line in journal.read_text().splitlines() if line.startswith("leave")]
    assert sold == f"sold apples {sum(words[2] == 'apples' for words in leaves)}"
    assert unknown == "orders nobody None"


def test_the_order_service_tells_what_its_configuration_lacks() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "orders_service.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "COORDLIB_CLUSTER is not set" in done.stderr
