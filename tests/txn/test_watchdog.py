"""Servers that neither answer nor hang up: whoever waits for one goes on when the transaction's time is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pymysql
import pytest

from coordlib.txn.branches import BranchFailed, Vote
from coordlib.txn.resources import watchdog as module
from coordlib.txn.resources.common import ResourceBusy
from coordlib.txn.resources.mariadb import MariaDB
from coordlib.txn.resources.postgresql import PostgreSQL
from coordlib.txn.resources.watchdog import Watchdog
from tests.txn.conftest import Clock, Names, stopped
from tests.txn.test_postgresql import _backend, _rows, _written, look, orders

__all__ = ["look", "orders"]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_socket_is_shut_down_when_its_time_is_over(pair: tuple[socket.socket, socket.socket]) -> None:
    """Whoever waits at it is told that it has ended, and so is the other side."""
    ours, theirs = pair
    watchdog = Watchdog()
    watchdog.watch(ours.fileno(), 0)
    assert ours.recv(1) == b""
    assert theirs.recv(1) == b""
    assert watchdog._watched == {}


def test_what_is_no_longer_watched_is_left_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nor is another file that was given the number of one that was closed; and a forked child has its own."""
    ours, theirs = pair
    watchdog = Watchdog()
    number = watchdog.watch(ours.fileno(), 3600)
    watchdog.unwatch(number)
    watchdog.unwatch(number)
    assert watchdog._watched == {}
    module._break(module._Watched(ours.fileno(), os.fstat(ours.fileno()).st_ino + 1, 0))
    with open(os.devnull) as file:
        module._break(module._Watched(file.fileno(), os.fstat(file.fileno()).st_ino, 0))
        assert file.read() == ""
    theirs.send(b"x")
    assert ours.recv(1) == b"x"
    watchdog.watch(ours.fileno(), 3600)
    watchdog._pid += 1
    watchdog.watch(ours.fileno(), 3600)
    assert len(watchdog._watched) == 1
    watchdog._forget_all()


@pytest.mark.parametrize("phase", ["prepare", "commit_one_phase", "rollback"])
def test_a_server_that_hangs_before_the_vote_is_a_no(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], clock: Clock, phase: str
) -> None:
    """In time, and nothing of the branch is left."""
    branch = _written(orders, names)
    with stopped(_backend(branch), clock):
        if phase == "rollback":
            branch.rollback()
        else:
            with pytest.raises(BranchFailed, match="failed"):
                getattr(branch, phase)()
    assert branch.connection.closed
    assert _rows(look) == []
    assert orders.prepared() == []


def test_a_server_that_hangs_in_a_statement_lets_its_caller_go(
    orders: PostgreSQL, names: Names, clock: Clock
) -> None:
    """An error of the driver, as when the connection breaks; and so in a task."""
    branch = _written(orders, names)
    with stopped(_backend(branch), clock), pytest.raises(psycopg.OperationalError):
        branch.connection.execute("SELECT 1")
    branch.rollback()

    async def check() -> None:
        branch = await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        await branch.connection.execute("INSERT INTO account VALUES ('b', 1)")
        with stopped(branch.connection.info.backend_pid, clock), pytest.raises(BranchFailed):
            await branch.aprepare()

    asyncio.run(check())


def test_a_server_that_hangs_after_the_vote_is_told_later(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], clock: Clock
) -> None:
    """The promise stands; whoever tells the outcome goes on, and tells it again."""
    branch = _written(orders, names)
    assert branch.prepare() is Vote.YES
    with stopped(_backend(branch), clock), pytest.raises(psycopg.OperationalError):
        branch.commit()
    _until_free(branch.commit)
    assert _rows(look) == ["a"]


def _until_free(work: Callable[[], None]) -> None:
    while True:
        with contextlib.suppress(ResourceBusy):  # the server is at it yet
            return work()


def test_a_server_that_only_listens_is_not_waited_for(tmp_path: Any, names: Names) -> None:
    """It accepts connections, and says nothing: the driver gives up, however the application left its settings."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / ".s.PGSQL.5432"))
        listening.listen()
        resource = PostgreSQL("orders", f"host={tmp_path} dbname=shop user=me", connect_timeout=1)
        with pytest.raises(psycopg.OperationalError):
            resource.open(names.cluster)
        stock = MariaDB(
            "stock",
            unix_socket=str(tmp_path / ".s.PGSQL.5432"),
            user="me",
            database="shop",
            connect_timeout=1,
        )
        with pytest.raises(pymysql.OperationalError):
            stock.open(names.cluster)
    assert PostgreSQL("orders", "dbname=shop")._parameters == {"connect_timeout": 5}
    assert PostgreSQL("orders", "dbname=shop connect_timeout=9")._parameters == {}


def test_a_forked_child_does_not_wait_for_a_lock_that_its_parent_held() -> None:
    """Whoever held it is not in the child."""
    watchdog = Watchdog()
    watchdog._pid = -1  # as in a child
    watchdog._lock.acquire()
    watchdog.unwatch(1)
    assert watchdog._pid == os.getpid()
