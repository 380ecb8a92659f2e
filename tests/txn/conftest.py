"""Database servers, one of each for all tests here; skipped where they are not installed, unless they must be."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TypeVar

import pytest

from coordlib.testing.databases import DatabaseServer, MariaDBServer, PostgreSQLServer, ServerMissing
from coordlib.txn.gtid import BranchName, GtidMinter, cluster_tag, node_tag, resource_tag
from coordlib.txn.resources import watchdog

S = TypeVar("S", bound=DatabaseServer)

IS_REQUIRED = os.environ.get("COORDLIB_REQUIRE_DATABASES") == "1"


@contextlib.contextmanager
def _running(kind: type[S]) -> Iterator[S]:
    try:
        server = kind()
    except ServerMissing as exc:
        if IS_REQUIRED:
            pytest.fail(f"COORDLIB_REQUIRE_DATABASES=1, but {exc}")
        pytest.skip(str(exc))
    with server:
        yield server


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQLServer]:
    with _running(PostgreSQLServer) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDBServer]:
    with _running(MariaDBServer) as server:
        yield server


class Names:
    """Gtids and bquals as an initiator would give them, and a budget that a test can spend."""

    _minter = GtidMinter()  # the servers see all tests' names, and no name comes twice

    def __init__(self) -> None:
        self.cluster = cluster_tag(b"shop")
        self.remaining = 30.0

    def gtid(self) -> bytes:
        return self._minter.mint(1_800_000_000_000, 77)

    def bqual(self, resource: str) -> bytes:
        return self.branch_of(resource_tag(resource))

    def branch_of(self, tag: bytes) -> bytes:
        """The bqual of a branch in the resource of this tag."""
        return BranchName(tag, node_tag("n1"), 1).pack()

    def remaining_s(self) -> float:
        return self.remaining


@pytest.fixture
def names() -> Names:
    return Names()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "monotonic", clock)
    return clock


@contextlib.contextmanager
def stopped(process: int, clock: Clock) -> Iterator[None]:
    """In it the process does not answer, and transactions' time is over."""
    os.kill(process, signal.SIGSTOP)
    clock.now += 100
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)
