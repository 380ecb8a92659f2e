"""MariaDB as a resource, against a real server: what the driver and the server do not say, and what is made of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import pymysql
import pytest
from pymysql.cursors import DictCursor

from coordlib.errors import ConfigError, FlavourError, InvariantViolation, UsageError
from coordlib.testing.databases import MariaDBServer
from coordlib.txn.branches import (
    AsyncBranch,
    Branch,
    BranchFailed,
    BranchHeuristic,
    BranchUnknown,
    Finish,
    PreparedBranch,
    Resource,
    Vote,
)
from coordlib.txn.gtid import BranchName, cluster_tag, join_gtid, node_tag
from coordlib.txn.resources.common import ResourceBusy
from coordlib.txn.resources.mariadb import MARKER_TABLE, MariaDB, MariaDBBranch
from tests.txn.conftest import Clock, Names, stopped

T = TypeVar("T")
if TYPE_CHECKING:
    Connection = pymysql.connections.Connection[Any]  # generic in its stubs alone


def _sql(connection: Connection, text: str, *parameters: object) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(text, parameters)
        return cursor.fetchall()


@pytest.fixture
def look(mariadb_server: MariaDBServer) -> Iterator[Connection]:
    """An onlooker's connection; the table is empty and nothing is prepared, before and after."""

    def connect() -> Connection:
        connection: Connection = pymysql.connect(**mariadb_server.options(), autocommit=True)
        return connection

    with connect() as connection:
        _sql(connection, "CREATE DATABASE IF NOT EXISTS shop")
        _sql(connection, "USE shop")
        _sql(
            connection,
            "CREATE TABLE IF NOT EXISTS account (name VARCHAR(99) PRIMARY KEY, amount INT NOT NULL)",
        )
        _sql(connection, "DELETE FROM account")
        yield connection
    with connect() as connection:
        left = _sql(connection, "XA RECOVER FORMAT='SQL'")
        for *_, xid in left:
            _sql(connection, f"XA ROLLBACK {xid}")
        assert left == ()


@pytest.fixture
def options(mariadb_server: MariaDBServer) -> dict[str, Any]:
    return {**mariadb_server.options("shop"), "is_durable": False}


@pytest.fixture
def stock(options: dict[str, Any], names: Names, look: Connection) -> Iterator[MariaDB]:
    with contextlib.closing(MariaDB("stock", **options)) as resource:
        resource.open(names.cluster)
        yield resource


def _begin(resource: MariaDB, names: Names) -> MariaDBBranch:
    return resource.begin(names.gtid(), names.bqual(resource.name), names.remaining_s)


def _written(resource: MariaDB, names: Names, name: str = "a") -> MariaDBBranch:
    branch = _begin(resource, names)
    _sql(branch.connection, "INSERT INTO account VALUES (%s, 1)", name)
    return branch


def _connect(options: dict[str, Any], **more: Any) -> Connection:
    parameters = {name: value for name, value in options.items() if name != "is_durable"}
    connection: Connection = pymysql.connect(**parameters, **more)
    return connection


def _thread(connection: Connection) -> int:
    return connection.thread_id()  # type: ignore[no-any-return, no-untyped-call]


def _rows(look: Connection) -> list[str]:
    return [name for (name,) in _sql(look, "SELECT name FROM account ORDER BY name")]


def _markers(look: Connection, branch: MariaDBBranch) -> int:
    return int(_sql(look, f"SELECT COUNT(*) FROM {MARKER_TABLE} WHERE gtid = %s", branch._gtid)[0][0])


def _until_detached(work: Callable[[], T]) -> T:
    """As recovery does: a branch is nobody else's until its connection has gone for good."""
    while True:
        try:
            return work()
        except ResourceBusy:
            continue


def test_it_is_a_resource_with_branches(stock: MariaDB, names: Names) -> None:
    """The contracts' types agree, and a blocking branch is not taken for an asynchronous one."""
    resource: Resource = stock
    blocking = _begin(stock, names)
    branch: Branch = blocking
    assert resource is branch.resource
    assert not isinstance(branch, AsyncBranch)
    assert not branch.is_last_resource
    branch.rollback()


def test_a_branch_seems_to_read_until_a_statement_may_have_written(stock: MariaDB, names: Names) -> None:
    """A guess from how statements begin; the vote does not rest on it."""
    branch = _begin(stock, names)
    assert branch.seems_read_only
    _sql(branch.connection, "select count(*) from account")
    assert branch.seems_read_only
    assert branch.prepare() is Vote.READ_ONLY
    branch = _written(stock, names)
    assert not branch.seems_read_only
    branch.rollback()


def test_what_is_prepared_is_committed(stock: MariaDB, names: Names, look: Connection) -> None:
    """Invisible until it is committed, listed while it is prepared, and commit may be repeated."""
    branch = _written(stock, names)
    assert branch.prepare() is Vote.YES
    assert _rows(look) == []
    (found,) = stock.prepared()
    assert (found.gtid, found.bqual) == (branch._gtid, branch.bqual)
    branch.commit()
    branch.commit()
    assert _rows(look) == ["a"]
    assert _markers(look, branch) == 1
    assert stock.prepared() == []


def test_what_is_prepared_is_rolled_back(stock: MariaDB, names: Names, look: Connection) -> None:
    """Nothing of it stays, and rolling back may be repeated."""
    branch = _written(stock, names)
    branch.prepare()
    branch.rollback()
    branch.rollback()
    assert _rows(look) == []
    assert _markers(look, branch) == 0


def test_one_phase(stock: MariaDB, names: Names, look: Connection) -> None:
    """Nothing is prepared."""
    branch = _written(stock, names)
    branch.commit_one_phase()
    assert _rows(look) == ["a"]


def test_a_branch_is_rolled_back_before_it_votes(stock: MariaDB, names: Names, look: Connection) -> None:
    """And its connection serves the next."""
    branch = _written(stock, names)
    branch.rollback()
    assert _rows(look) == []
    again = _begin(stock, names)
    assert again.connection is branch.connection
    again.rollback()


@pytest.mark.parametrize(
    ("statement", "vote"),
    [
        ("SELECT * FROM account FOR UPDATE", Vote.READ_ONLY),
        ("UPDATE account SET amount = 5 WHERE name = 'nobody'", Vote.READ_ONLY),
        ("SELECT name, COUNT(*) FROM account GROUP BY name ORDER BY 2", Vote.READ_ONLY),
        ("DELETE FROM account", Vote.YES),
        ("UPDATE account SET amount = 5", Vote.YES),
        ("REPLACE INTO account VALUES ('z', 3)", Vote.YES),
        ("INSERT INTO account SELECT 'b', amount FROM account", Vote.YES),
    ],
)
def test_reading_only_is_noticed(
    stock: MariaDB, names: Names, look: Connection, statement: str, vote: Vote
) -> None:
    """By what the storage engines counted, not by the statement's words."""
    _sql(look, "INSERT INTO account VALUES ('z', 1)")
    branch = _begin(stock, names)
    _sql(branch.connection, statement)
    assert branch.prepare() is vote
    assert len(stock.prepared()) == (vote is Vote.YES)
    branch.rollback()


@pytest.mark.parametrize("phases", [1, 2])
def test_a_swallowed_error_is_a_no(stock: MariaDB, names: Names, look: Connection, phases: int) -> None:
    """The server would commit the rest."""
    branch = _written(stock, names)
    with pytest.raises(pymysql.IntegrityError):
        _sql(branch.connection, "INSERT INTO account VALUES ('a', 2)")
    _sql(branch.connection, "INSERT INTO account VALUES ('b', 2)")
    with pytest.raises(BranchFailed, match="a statement failed in it"):
        branch.prepare() if phases == 2 else branch.commit_one_phase()
    assert _rows(look) == []
    branch.rollback()


def test_going_back_to_a_savepoint_heals(stock: MariaDB, names: Names, look: Connection) -> None:
    """One from before the error; one from after it heals nothing."""
    branch = _begin(stock, names)
    connection = branch.connection
    for text in ("SAVEPOINT early", "INSERT INTO account VALUES ('a', 1)"):
        _sql(connection, text)
    with pytest.raises(pymysql.IntegrityError):
        _sql(connection, "INSERT INTO account VALUES ('a', 2)")
    _sql(connection, "savepoint `late`")
    _sql(connection, "ROLLBACK TO SAVEPOINT late")
    assert branch._watch.problem() is not None
    _sql(connection, "rollback work to early")
    _sql(connection, "INSERT INTO account VALUES ('b', 1)")
    _sql(connection, "RELEASE SAVEPOINT early")
    assert branch.prepare() is Vote.YES
    branch.commit()
    assert _rows(look) == ["b"]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "CREATE TABLE t (i INT)", "BEGIN"])
def test_what_would_end_the_transaction_is_refused_by_the_server(
    stock: MariaDB, names: Names, look: Connection, statement: str
) -> None:
    """And is an error like any other: a NO."""
    branch = _written(stock, names)
    with pytest.raises(
        pymysql.OperationalError, match=r"XAER_RMFAIL.*: leave BEGIN, COMMIT and ROLLBACK to the block"
    ):
        _sql(branch.connection, statement)
    with pytest.raises(BranchFailed):
        branch.prepare()
    assert _rows(look) == []


def test_the_victim_of_a_deadlock_votes_no(stock: MariaDB, names: Names, look: Connection) -> None:
    """And it is a conflict: trying again may help."""
    _sql(look, "INSERT INTO account VALUES ('a', 1), ('b', 1)")
    branches = [_begin(stock, names), _begin(stock, names)]
    errors: dict[int, pymysql.MySQLError] = {}
    for branch, name in zip(branches, "ab", strict=True):
        _sql(branch.connection, "UPDATE account SET amount = 2 WHERE name = %s", name)

    def other(position: int, name: str) -> None:
        try:
            _sql(branches[position].connection, "UPDATE account SET amount = 3 WHERE name = %s", name)
        except pymysql.MySQLError as exc:
            errors[position] = exc

    threads = [threading.Thread(target=other, args=pair) for pair in ((0, "b"), (1, "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((victim, error),) = errors.items()
    assert stock.is_conflict(error)
    with pytest.raises(BranchFailed) as failed:
        branches[victim].prepare()
    assert stock.is_conflict(failed.value)
    assert branches[1 - victim].prepare() is Vote.YES
    branches[1 - victim].commit()
    assert not stock.is_conflict(ValueError("x"))


def test_waiting_for_a_lock_ends_with_the_transactions_time(
    stock: MariaDB, names: Names, look: Connection
) -> None:
    """Distributed deadlocks end by the deadline: the server gives up, and the branch is a no."""
    _sql(look, "INSERT INTO account VALUES ('a', 1)")
    holder = _begin(stock, names)
    _sql(holder.connection, "UPDATE account SET amount = 2")
    names.remaining = 0.05
    waiter = _begin(stock, names)
    with pytest.raises(pymysql.OperationalError):
        _sql(waiter.connection, "UPDATE account SET amount = 3")
    with pytest.raises(BranchFailed):
        waiter.prepare()
    holder.rollback()


def test_limits_only_ever_shorten_and_are_put_back(
    options: dict[str, Any], stock: MariaDB, names: Names, look: Connection
) -> None:
    """The application's own are shorter, or there again afterwards; so are its connection's other settings."""
    question = (
        "SELECT @@innodb_lock_wait_timeout AS a, @@lock_wait_timeout AS b, @@max_statement_time AS c, "
        "@@wait_timeout AS d"
    )
    with _connect(options, cursorclass=DictCursor) as own:
        _sql(own, "SET innodb_lock_wait_timeout = 3")
        before = _sql(own, question)
        own.commit()
        branch = stock.enlist(own, names.gtid(), names.bqual("stock"), names.remaining_s)
        assert _sql(own, question) == [{"a": 3, "b": 30, "c": 30.0, "d": 30}]
        _sql(own, "INSERT INTO account VALUES ('a', 1)")
        branch.prepare()
        branch.commit()
        assert _sql(own, question) == before
        assert own.cursorclass is DictCursor
    assert _rows(look) == ["a"]


def test_connections_that_cannot_be_enlisted(options: dict[str, Any], stock: MariaDB, names: Names) -> None:
    """In a transaction, or not of PyMySQL's."""
    arguments = (names.gtid(), names.bqual("stock"), names.remaining_s)
    with _connect(options) as own:
        _sql(own, "SELECT * FROM account")
        with pytest.raises(UsageError, match="in a transaction of its own"):
            stock.enlist(own, *arguments)
    with pytest.raises(FlavourError):
        stock.enlist(object(), *arguments)  # type: ignore[arg-type]
    with pytest.raises(InvariantViolation):
        stock.begin(names.gtid(), names.bqual("another"), names.remaining_s)
    with pytest.raises(UsageError, match="autocommit"):
        MariaDB("x", autocommit=False)


# -- what recovery finds


def test_a_branch_on_a_living_connection_is_not_presumed_gone(
    stock: MariaDB, names: Names, look: Connection
) -> None:
    """The server says "unknown XID" of it, as of one that has ended."""
    branch = _written(stock, names)
    branch.prepare()
    (found,) = stock.prepared()
    for commit in (True, False):
        with pytest.raises(ResourceBusy):
            stock.finish(found, commit)
    branch.commit()
    assert stock.finish(found, True) is Finish.ALREADY
    assert stock.finish(found, False) is Finish.HEURISTIC_COMMIT


def test_a_commit_that_the_server_only_claims_is_not_believed(
    stock: MariaDB, names: Names, look: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer was OK while the branch's connection closed: the row is still locked, so the branch is not done."""
    branch = _written(stock, names)
    branch.prepare()
    (found,) = stock.prepared()
    _sql(branch.connection, "DO RELEASE_ALL_LOCKS()")  # as if the connection had gone
    monkeypatch.setattr("coordlib.txn.resources.mariadb._DETACHED_S", 0.0)
    monkeypatch.setattr(stock, "_finish_on", lambda *_: Finish.DONE)
    for commit in (True, False):
        with pytest.raises(ResourceBusy):
            stock.finish(found, commit)
    monkeypatch.undo()
    branch.rollback()


def test_another_process_finishes_what_a_dead_one_prepared(
    options: dict[str, Any], stock: MariaDB, names: Names, look: Connection
) -> None:
    """Any node with the resource can."""
    branch = _written(stock, names)
    branch.prepare()
    branch.connection._force_close()  # type: ignore[attr-defined]
    with contextlib.closing(MariaDB("stock", **options)) as elsewhere:
        elsewhere.open(names.cluster)
        (found,) = elsewhere.prepared()
        assert _until_detached(lambda: elsewhere.finish(found, True)) is Finish.DONE
        assert elsewhere.finish(found, True) is Finish.ALREADY
    assert _rows(look) == ["a"]
    branch.commit()  # the first process was only slow: it finds it done


def test_a_process_that_stands_still_keeps_its_branch_no_longer_than_its_time(
    options: dict[str, Any], stock: MariaDB, names: Names, look: Connection
) -> None:
    """The server ends the session, and others can finish what is prepared; the process itself finds that done."""
    names.remaining = 2.0
    branch = _written(stock, names)
    branch.prepare()
    with contextlib.closing(MariaDB("stock", **options)) as elsewhere:
        elsewhere.open(names.cluster)
        (found,) = elsewhere.prepared()
        with pytest.raises(ResourceBusy):
            elsewhere.finish(found, True)
        assert _until_detached(lambda: elsewhere.finish(found, True)) is Finish.DONE
    assert _rows(look) == ["a"]
    with pytest.raises(pymysql.OperationalError):
        branch.commit()
    branch.commit()


def test_only_ours_are_found(options: dict[str, Any], stock: MariaDB, names: Names, look: Connection) -> None:
    """Not another cluster's, another resource's, or a person's own."""
    ours = _written(stock, names, "ours")
    ours.prepare()
    foreign: list[tuple[MariaDB, MariaDBBranch]] = []
    for resource, cluster in (("stock", cluster_tag(b"other")), ("orders", names.cluster)):
        other = MariaDB(resource, **options)
        other.open(cluster)
        branch = other.begin(names.gtid(), names.bqual(resource), names.remaining_s)
        _sql(branch.connection, "INSERT INTO account VALUES (%s, 1)", f"{resource}{len(foreign)}")
        branch.prepare()
        foreign.append((other, branch))
    people = []
    for xid in ("'mine','',7", "X'FF00',X'FF',1129271876", "'0123','4567',1129271876"):
        own = _connect(options, autocommit=True)
        people.append((own, xid))
        _sql(own, f"XA START {xid}")
        _sql(own, "INSERT INTO account VALUES (%s, 1)", xid)
        _sql(own, f"XA END {xid}")
        _sql(own, f"XA PREPARE {xid}")
    assert [found.bqual for found in stock.prepared()] == [ours.bqual]
    for own, xid in people:
        _sql(own, f"XA ROLLBACK {xid}")
        own.close()
    for other, branch in foreign:
        branch.rollback()
        other.close()
    ours.rollback()


@pytest.mark.parametrize("decided", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("has_markers", [True, False])
def test_what_a_person_ended_by_hand(
    options: dict[str, Any], names: Names, look: Connection, decided: str, has_markers: bool
) -> None:
    """The same way as decided: nothing happened. Otherwise a heuristic. Without markers: nobody can tell."""
    with contextlib.closing(MariaDB("stock", **options, has_markers=has_markers)) as stock:
        stock.open(names.cluster)
        branch = _written(stock, names)
        branch.prepare()
        (found,) = stock.prepared()
        _sql(branch.connection, f"XA {decided} {branch._xid}")
        if not has_markers:
            with pytest.raises(BranchHeuristic) as hazard:
                branch.commit()
            assert hazard.value.finish is Finish.HAZARD
            assert _until_detached(lambda: stock.finish(found, False)) is Finish.HAZARD
            return
        agreed, otherwise = (
            (branch.commit, branch.rollback) if decided == "COMMIT" else (branch.rollback, branch.commit)
        )
        with pytest.raises(BranchHeuristic) as heuristic:
            otherwise()
        assert heuristic.value.finish is (
            Finish.HEURISTIC_COMMIT if decided == "COMMIT" else Finish.HEURISTIC_ROLLBACK
        )
        assert branch._state == "ended"
        agreed()
        assert stock.finish(found, decided == "COMMIT") is Finish.ALREADY


def test_without_markers_a_held_branch_is_busy(
    options: dict[str, Any], names: Names, look: Connection
) -> None:
    """It is still in the server's list: not gone."""
    with contextlib.closing(MariaDB("stock", **options, has_markers=False)) as stock:
        stock.open(names.cluster)
        branch = _written(stock, names)
        branch.prepare()
        (found,) = stock.prepared()
        with pytest.raises(ResourceBusy):
            stock.finish(found, True)
        branch.commit()


def test_old_markers_go_and_their_absence_then_means_nothing(
    stock: MariaDB, names: Names, look: Connection
) -> None:
    """A week after: what is older is a hazard, not rolled back; what is newer is as before."""
    _sql(look, f"DELETE FROM {MARKER_TABLE}")
    bqual = BranchName(stock.tag, node_tag("n1"), 1).pack()
    week = 7 * 24 * 3600 * 1000
    old, kept, new = (join_gtid(ms, 1, 0) for ms in (1_000_000, 1_000_000 + week, 1_000_001 + 2 * week))
    for gtid in (old, kept, new):
        branch = stock.begin(gtid, bqual, names.remaining_s)
        _sql(branch.connection, "INSERT INTO account VALUES (%s, 1)", gtid.hex())
        branch.commit_one_phase()
    assert stock.finish(PreparedBranch(old, bqual, ""), True) is Finish.ALREADY
    for _ in range(2):
        assert stock.prepared() == []
        assert stock.finish(PreparedBranch(old, bqual, ""), True) is Finish.HAZARD
        assert stock.finish(PreparedBranch(kept, bqual, ""), True) is Finish.HAZARD
        assert stock.finish(PreparedBranch(new, bqual, ""), True) is Finish.ALREADY
        never = PreparedBranch(join_gtid(1_000_002 + 2 * week, 1, 0), bqual, "")
        assert stock.finish(never, True) is Finish.HEURISTIC_ROLLBACK
    _sql(look, f"DELETE FROM {MARKER_TABLE}")


# -- what breaks


def test_a_server_that_dies_with_a_prepared_branch(
    mariadb_server: MariaDBServer, stock: MariaDB, names: Names
) -> None:
    """The promise is kept: after its restart the branch is there, and commits over a connection of its own."""
    branch = _written(stock, names)
    assert branch.prepare() is Vote.YES
    mariadb_server.restart()
    assert len(stock.prepared()) == 1
    with pytest.raises(pymysql.OperationalError):
        branch.commit()  # the first to notice
    _until_detached(branch.commit)
    with pymysql.connect(**mariadb_server.options("shop")) as look:
        assert _rows(look) == ["a"]


def _cut(branch: MariaDBBranch, look: Connection, at: str, *, obeyed: bool) -> None:
    """Ends a connection's session at a statement: before the server hears it, or after it has obeyed."""

    connection = branch.connection
    original = pymysql.connections.Connection.query

    def query(sql: str | bytes, unbuffered: bool = False) -> int:
        text = sql.decode() if isinstance(sql, bytes) else sql
        if not text.startswith(at):
            return original(connection, sql, unbuffered)
        if obeyed:
            original(connection, sql, unbuffered)
        _sql(look, "KILL %s", _thread(connection))
        return original(connection, "SELECT 1" if obeyed else sql, unbuffered)

    branch._watch.end()
    connection.query = query  # type: ignore[method-assign]
    branch._watch.end = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_vote_that_is_lost(stock: MariaDB, names: Names, look: Connection, obeyed: bool) -> None:
    """It may be prepared: rolling back finds out over another connection, and leaves nothing."""
    branch = _written(stock, names)
    _cut(branch, look, "XA PREPARE", obeyed=obeyed)
    with pytest.raises(pymysql.OperationalError):
        branch.prepare()
    _until_detached(branch.rollback)
    assert stock.prepared() == []
    assert _rows(look) == []


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_connection_that_is_lost_during_a_one_phase_commit(
    stock: MariaDB, names: Names, look: Connection, obeyed: bool
) -> None:
    """The marker tells: committed, or certainly not."""
    branch = _written(stock, names)
    _cut(branch, look, "XA COMMIT", obeyed=obeyed)
    if obeyed:
        branch.commit_one_phase()
    else:
        with pytest.raises(BranchFailed, match="nothing was committed"):
            branch.commit_one_phase()
    assert _rows(look) == (["a"] if obeyed else [])


def test_a_one_phase_commit_that_nobody_can_tell(
    options: dict[str, Any], names: Names, look: Connection
) -> None:
    """Without markers neither committed nor failed is claimed."""
    with contextlib.closing(MariaDB("stock", **options, has_markers=False)) as stock:
        stock.open(names.cluster)
        branch = _written(stock, names)
        _cut(branch, look, "XA COMMIT", obeyed=True)
        with pytest.raises(BranchUnknown):
            branch.commit_one_phase()


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_connection_that_is_lost_during_commit(
    stock: MariaDB, names: Names, look: Connection, obeyed: bool
) -> None:
    """Asked again, it commits, or finds that it has."""
    branch = _written(stock, names)
    branch.prepare()
    _cut(branch, look, "XA COMMIT", obeyed=obeyed)
    with pytest.raises(pymysql.OperationalError):
        branch.commit()
    _until_detached(branch.commit)
    assert _rows(look) == ["a"]


def test_a_mariadb_that_hangs_lets_its_callers_go(
    stock: MariaDB, names: Names, look: Connection, clock: Clock, mariadb_server: MariaDBServer
) -> None:
    """A statement, a vote and the end of a promise; whatever was not promised is rolled back when it goes on."""
    server = mariadb_server._process
    assert server is not None
    asking, voting, promised = (_written(stock, names, name) for name in "abc")
    assert promised.prepare() is Vote.YES
    with stopped(server.pid, clock):
        with pytest.raises(pymysql.OperationalError):
            asking.connection.cursor().execute("SELECT 1")
        asking.rollback()
        with pytest.raises(BranchFailed):
            voting.prepare()
        with pytest.raises(pymysql.OperationalError):
            promised.commit()
    _until_detached(promised.commit)
    assert _rows(look) == ["c"]


def test_a_connection_that_the_server_closed_while_idle(
    stock: MariaDB, names: Names, look: Connection
) -> None:
    """Nobody notices: another one is opened."""
    branch = _begin(stock, names)
    branch.rollback()
    _sql(look, "KILL %s", _thread(branch.connection))
    again = _written(stock, names)
    again.commit_one_phase()
    assert _rows(look) == ["a"]


def test_a_lost_connection_before_the_vote_is_a_no(stock: MariaDB, names: Names, look: Connection) -> None:
    """The server rolls it back."""
    branch = _written(stock, names)
    _sql(look, "KILL %s", _thread(branch.connection))
    with pytest.raises(BranchFailed):
        branch.prepare()
    branch.rollback()


# -- what registration refuses


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("10.4.34-MariaDB", "10.5 or later"),
        ("8.0.36", "not MariaDB"),
        ("5.5.5-10.3.1-MariaDB-log", "10.5 or later"),
    ],
)
def test_servers_that_would_break_the_promise_are_refused(
    options: dict[str, Any],
    names: Names,
    look: Connection,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    message: str,
) -> None:
    """Before 10.5 a prepared branch was rolled back with its connection."""
    resource = MariaDB("stock", **options)
    original = resource._connect

    def connect() -> Connection:
        connection = original()
        query = connection.query

        def answer(sql: str | bytes, unbuffered: bool = False) -> int:
            text = sql.decode() if isinstance(sql, bytes) else sql
            return query(text.replace("VERSION()", f"'{version}'"), unbuffered)

        connection.query = answer  # type: ignore[method-assign]
        return connection

    monkeypatch.setattr(resource, "_connect", connect)
    with pytest.raises(ConfigError, match=message):
        resource.open(names.cluster)


def test_settings_and_privileges_that_are_missing(
    options: dict[str, Any], names: Names, look: Connection
) -> None:
    """Each message names what to set or to run, and what to say if one will not."""
    with pytest.raises(ConfigError, match="innodb_flush_log_at_trx_commit = 2"):
        MariaDB("stock", **{**options, "is_durable": True}).open(names.cluster)
    with pytest.raises(ConfigError, match="no database selected"):
        MariaDB("stock", **{**options, "database": None}).open(names.cluster)
    _sql(look, "CREATE OR REPLACE USER clerk IDENTIFIED BY ''")
    _sql(look, "GRANT SELECT ON shop.account TO clerk")
    _sql(look, f"DROP TABLE IF EXISTS {MARKER_TABLE}")
    with pytest.raises(ConfigError, match=f"CREATE TABLE IF NOT EXISTS shop.{MARKER_TABLE}"):
        MariaDB("stock", **{**options, "user": "clerk"}).open(names.cluster)
    without = MariaDB("stock", **{**options, "user": "clerk"}, has_markers=False)
    without.open(names.cluster)
    without.close()
    _sql(look, "DROP USER clerk")


def test_a_connection_that_was_kept_does_nothing(
    stock: MariaDB, names: Names, look: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Statements would commit by themselves, and are refused; what gets past that is rolled back, with a warning."""
    branch = _begin(stock, names)
    kept = branch.connection
    branch.rollback()
    with pytest.raises(pymysql.ProgrammingError, match="given to a transaction, which has ended"):
        _sql(kept, "INSERT INTO account VALUES ('late', 1)")
    kept.begin()
    second = _written(stock, names, "in time")
    assert second.connection is not kept
    assert not kept.open
    second.commit_one_phase()
    assert _rows(look) == ["in time"]
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["transaction.late-use"]
    third = _begin(stock, names)
    assert third.connection is second.connection
    third.rollback()
