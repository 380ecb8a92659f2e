"""PostgreSQL as a resource, against a real server: what the driver and the server do not say, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from coordlib.errors import ConfigError, FlavourError, InvariantViolation, UsageError
from coordlib.node import polling
from coordlib.testing.databases import PostgreSQLServer
from coordlib.txn.branches import (
    AsyncBranch,
    Branch,
    BranchFailed,
    BranchHeuristic,
    BranchUnknown,
    Finish,
    PolledBranch,
    PreparedBranch,
    Resource,
    Vote,
)
from coordlib.txn.gtid import BranchName, cluster_tag
from coordlib.txn.resources import statements
from coordlib.txn.resources.common import ResourceBusy, polled
from coordlib.txn.resources.postgresql import AsyncPostgreSQLBranch, PostgreSQL, PostgreSQLBranch
from tests.txn.conftest import Names


@pytest.fixture
def look(postgresql_server: PostgreSQLServer) -> Iterator[psycopg.Connection[Any]]:
    """An onlooker's connection; the table is empty and nothing is prepared, before and after."""
    with psycopg.connect(postgresql_server.dsn(), autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS account (name text PRIMARY KEY, amount int NOT NULL)")
        connection.execute("DELETE FROM account")
        yield connection
    with psycopg.connect(
        postgresql_server.dsn(), autocommit=True
    ) as connection:  # a test may have killed the server
        left = connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall()
        for (gid,) in left:
            connection.execute(f"ROLLBACK PREPARED '{gid}'")
        assert left == []


@pytest.fixture
def orders(
    postgresql_server: PostgreSQLServer, names: Names, look: psycopg.Connection[Any]
) -> Iterator[PostgreSQL]:
    with contextlib.closing(PostgreSQL("orders", postgresql_server.dsn(), is_durable=False)) as resource:
        resource.open(names.cluster)
        yield resource


def _begin(resource: PostgreSQL, names: Names) -> PostgreSQLBranch:
    return resource.begin(names.gtid(), names.bqual(resource.name), names.remaining_s)


def _written(resource: PostgreSQL, names: Names, name: str = "a") -> PostgreSQLBranch:
    branch = _begin(resource, names)
    branch.connection.execute("INSERT INTO account VALUES (%s, 1)", (name,))
    return branch


def _rows(look: psycopg.Connection[Any]) -> list[str]:
    return [name for (name,) in look.execute("SELECT name FROM account ORDER BY name").fetchall()]


def _prepared_named(resource: PostgreSQL, branch: PostgreSQLBranch) -> list[PreparedBranch]:
    return [found for found in resource.prepared() if found.gtid == branch._gtid]


def _one(look: psycopg.Connection[Any], sql: str, *parameters: object) -> Any:
    row = look.execute(sql, parameters).fetchone()
    assert row is not None
    return row[0]


def _backend(branch: PostgreSQLBranch) -> int:
    return branch.connection.info.backend_pid


def test_it_is_a_resource_with_branches(orders: PostgreSQL, names: Names) -> None:
    """The contracts' types agree, and a blocking branch is not taken for an asynchronous one."""
    resource: Resource = orders
    blocking = _begin(orders, names)
    branch: Branch = blocking
    assert resource is branch.resource
    assert not isinstance(branch, AsyncBranch)
    assert not branch.is_last_resource
    branch.rollback()


def test_what_is_prepared_is_committed(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Invisible until it is committed, listed while it is prepared, and commit may be repeated."""
    branch = _written(orders, names)
    assert branch.prepare() is Vote.YES
    assert _rows(look) == []
    (found,) = orders.prepared()
    assert found.bqual == branch.bqual
    branch.commit()
    branch.commit()
    assert _rows(look) == ["a"]
    assert orders.prepared() == []


def test_what_is_prepared_is_rolled_back(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Nothing of it stays, and rolling back may be repeated."""
    branch = _written(orders, names)
    branch.prepare()
    branch.rollback()
    branch.rollback()
    assert _rows(look) == []
    assert orders.prepared() == []


def test_a_branch_seems_to_read_until_a_statement_may_have_written(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """A guess from the tags of answers, anew for each branch on a connection; the vote does not rest on it."""
    branch = _begin(orders, names)
    connection = branch.connection
    assert branch.seems_read_only
    assert connection.execute("SELECT count(*) FROM account").fetchone() == (0,)
    assert branch.seems_read_only
    assert branch.prepare() is Vote.READ_ONLY

    def copy_a_row(connection: psycopg.Connection[Any]) -> None:
        with connection.cursor().copy("COPY account FROM STDIN") as copy:
            copy.write(b"b\t1\n")

    writes: list[Callable[[], Any]] = [
        lambda: branch.connection.execute("INSERT INTO account VALUES ('b', 1)"),
        lambda: branch.connection.cursor().executemany(
            "INSERT INTO account VALUES (%s, 1)", [("b",), ("c",)]
        ),
        lambda: copy_a_row(branch.connection),
        lambda: branch.connection.execute("LOCK TABLE account"),
    ]
    for write in writes:
        branch = _begin(orders, names)
        assert branch.seems_read_only
        write()
        assert not branch.seems_read_only
        branch.rollback()
    with psycopg.connect(look.info.dsn) as foreign:
        enlisted = orders.enlist(foreign, names.gtid(), names.bqual("orders"), names.remaining_s)
        assert not enlisted.seems_read_only  # nobody looks there
        enlisted.rollback()
    assert _rows(look) == []


def test_an_asynchronous_branch_seems_to_read_until_a_statement_may_have_written(
    orders: PostgreSQL, names: Names
) -> None:
    """The same guess."""

    async def work() -> None:
        branch = await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        await branch.connection.execute("SELECT 1")
        assert branch.seems_read_only
        await branch.connection.execute("INSERT INTO account VALUES ('b', 1)")
        assert not branch.seems_read_only
        await branch.arollback()
        branch = await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        assert branch.seems_read_only
        await branch.connection.cursor().executemany("INSERT INTO account VALUES (%s, 1)", [("b",)])
        assert not branch.seems_read_only
        await branch.arollback()
        branch = await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        async with branch.connection.cursor().copy("COPY account FROM STDIN") as copy:
            await copy.write(b"b\t1\n")
        assert not branch.seems_read_only
        await branch.arollback()

    asyncio.run(work())


def test_one_phase(orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]) -> None:
    """A plain COMMIT; nothing is prepared."""
    branch = _written(orders, names)
    branch.commit_one_phase()
    assert _rows(look) == ["a"]


def test_a_branch_is_rolled_back_before_it_votes(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """And its connection serves the next."""
    branch = _written(orders, names)
    connection = branch.connection
    branch.rollback()
    assert _rows(look) == []
    again = _begin(orders, names)
    assert again.connection is connection
    again.rollback()


def test_reading_only_is_noticed(orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]) -> None:
    """No number was given to the transaction: it ends with its vote, and nothing was prepared."""
    branch = _begin(orders, names)
    branch.connection.execute("SELECT * FROM account")
    assert branch.prepare() is Vote.READ_ONLY
    branch.rollback()
    assert len(branch.bqual) == 9


@pytest.mark.parametrize("phases", [1, 2])
def test_a_swallowed_error_is_a_no(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], phases: int
) -> None:
    """The server would answer PREPARE, and COMMIT, with ROLLBACK, and the driver would not look."""
    branch = _written(orders, names)
    with pytest.raises(psycopg.errors.UniqueViolation):
        branch.connection.execute("INSERT INTO account VALUES ('a', 2)")
    with pytest.raises(BranchFailed, match="a statement failed in it"):
        branch.prepare() if phases == 2 else branch.commit_one_phase()
    assert _rows(look) == []
    branch.rollback()


def test_an_error_in_a_savepoint_is_no_harm(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """What the message recommends works."""
    branch = _written(orders, names)
    with pytest.raises(psycopg.errors.UniqueViolation), branch.connection.transaction():
        branch.connection.execute("INSERT INTO account VALUES ('a', 2)")
    assert branch.prepare() is Vote.YES
    branch.commit()
    assert _rows(look) == ["a"]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_transaction_that_the_application_ends_is_a_no(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], statement: str, goes_on: bool
) -> None:
    """In SQL nobody can keep it from that; what follows is another transaction, and is not taken for the branch."""
    branch = _written(orders, names)
    branch.connection.execute(statement)
    if goes_on:
        branch.connection.execute("INSERT INTO account VALUES ('b', 1)")
    with pytest.raises(
        BranchFailed, match=r"ended the transaction itself.* committed so stays.* [Ll]eave COMMIT"
    ):
        branch.prepare()
    assert _rows(look) == (["a"] if statement == "COMMIT" else [])


def test_the_drivers_own_commit_is_refused(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """At the call, not at the vote; the branch goes on."""
    branch = _written(orders, names)
    for end in (branch.connection.commit, branch.connection.rollback):
        with pytest.raises(psycopg.ProgrammingError):
            end()
    branch.commit_one_phase()
    assert _rows(look) == ["a"]


@pytest.mark.parametrize("is_known", [True, False])
def test_a_branch_begins_with_its_limits_in_one_message(
    orders: PostgreSQL,
    names: Names,
    look: psycopg.Connection[Any],
    is_known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a driver of unknown parts in two; what it refuses, and what the application may choose, are the same."""
    _begin(orders, names).rollback()  # what stays the same of a connection has been asked for
    messages: list[str] = []
    exchange = statements.exchange_gen

    def noted(connection: psycopg.Connection[Any], sql: str) -> Any:
        messages.append(sql)
        return exchange(connection, sql)

    monkeypatch.setattr(statements, "_HAS_PARTS", is_known)
    monkeypatch.setattr(statements, "exchange_gen", noted)
    branch = _begin(orders, names)
    connection = branch.connection
    (first,) = messages
    assert first.startswith("BEGIN; SET LOCAL" if is_known else "SET LOCAL")
    with pytest.raises(psycopg.ProgrammingError, match="two-phase"):
        connection.commit()
    connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
    assert connection.execute("SHOW transaction_isolation").fetchone() == ("serializable",)
    assert connection.execute("SHOW statement_timeout").fetchone() != ("0",)
    connection.execute("INSERT INTO account VALUES ('a', 1)")
    assert branch.prepare() is Vote.YES
    branch.commit()
    assert _rows(look) == ["a"]
    again = _begin(orders, names)
    assert again.connection is connection  # free again
    again.rollback()


def test_temporary_tables_are_a_no(orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]) -> None:
    """The server cannot prepare them, and says so; the reason arrives."""
    branch = _written(orders, names)
    branch.connection.execute("CREATE TEMPORARY TABLE scratch (i int)")
    with pytest.raises(BranchFailed, match="temporary objects"):
        branch.prepare()
    assert _rows(look) == []


def test_a_lost_connection_before_the_vote_is_a_no(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """The server has rolled it back."""
    branch = _written(orders, names)
    look.execute("SELECT pg_terminate_backend(%s, 10000)", (_backend(branch),))
    with pytest.raises(BranchFailed):
        branch.prepare()
    branch.rollback()
    assert _rows(look) == []


def test_a_serialization_failure_is_told_from_others(orders: PostgreSQL) -> None:
    """Trying again helps after a conflict, and after nothing else."""
    assert not orders.is_conflict(psycopg.errors.UniqueViolation("x"))
    assert not orders.is_conflict(ValueError("x"))
    assert not orders.is_conflict(BranchFailed("x"))
    failed = BranchFailed("x")
    failed.__cause__ = psycopg.errors.SerializationFailure("could not serialize")
    assert orders.is_conflict(failed)


def test_serializable_reads_are_validated_by_the_vote(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Write skew between two branches: one of them votes NO, with a conflict as its cause."""
    look.execute("INSERT INTO account VALUES ('a', 1), ('b', 1)")
    branches = [_begin(orders, names), _begin(orders, names)]
    for branch in branches:
        branch.connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert branch.connection.execute("SELECT sum(amount) FROM account").fetchone() == (2,)
    for branch, name in zip(branches, "ab", strict=True):
        branch.connection.execute("UPDATE account SET amount = 0 WHERE name = %s", (name,))
    assert branches[0].prepare() is Vote.YES
    with pytest.raises(BranchFailed) as failed:
        branches[1].prepare()
    assert orders.is_conflict(failed.value)
    branches[0].commit()


def test_waiting_for_a_lock_ends_with_the_transactions_time(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Distributed deadlocks end by the deadline: the server gives up, and the branch is a no."""
    look.execute("INSERT INTO account VALUES ('a', 1)")
    holder = _begin(orders, names)
    holder.connection.execute("UPDATE account SET amount = 2")
    names.remaining = 0.05
    waiter = _begin(orders, names)
    with pytest.raises(psycopg.errors.QueryCanceled):
        waiter.connection.execute("UPDATE account SET amount = 3")
    with pytest.raises(BranchFailed):
        waiter.prepare()
    names.remaining = 30
    holder.rollback()


def test_a_shorter_limit_of_the_applications_stays(orders: PostgreSQL, names: Names) -> None:
    """The transaction's time only ever shortens; and it is gone with the transaction."""
    branch = _begin(orders, names)
    connection = branch.connection
    assert connection.execute("SHOW statement_timeout").fetchone() == ("30s",)
    branch.rollback()
    past_us = psycopg.Cursor(connection)
    assert past_us.execute("SHOW statement_timeout").fetchone() == ("0",)
    connection.rollback()
    with psycopg.connect(orders._conninfo, options="-c statement_timeout=250") as own:
        enlisted = orders.enlist(own, names.gtid(), names.bqual("orders"), names.remaining_s)
        assert own.execute("SHOW statement_timeout").fetchone() == ("250ms",)
        enlisted.rollback()


def test_a_stalled_application_keeps_its_locks_no_longer_than_its_time(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """The server ends the session; the branch votes NO."""
    look.execute("INSERT INTO account VALUES ('a', 1)")
    names.remaining = 0.05
    branch = _begin(orders, names)
    branch.connection.execute("SELECT * FROM account FOR UPDATE")
    look.execute("UPDATE account SET amount = 2")  # waits until the lock is free
    with pytest.raises(BranchFailed):
        branch.prepare()


def test_a_connection_of_the_applications_is_given_back(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Idle, open, and with its settings: rows as dicts do not disturb us."""
    with psycopg.connect(orders._conninfo, row_factory=dict_row) as own:
        for phases in (1, 2):
            branch = orders.enlist(own, names.gtid(), names.bqual("orders"), names.remaining_s)
            own.execute("INSERT INTO account VALUES (%s, 1)", (str(phases),))
            if phases == 1:
                branch.commit_one_phase()
            else:
                branch.prepare()
                branch.commit()
            assert own.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
        assert own.row_factory is dict_row
    assert _rows(look) == ["1", "2"]


def test_connections_that_cannot_be_enlisted(orders: PostgreSQL, names: Names) -> None:
    """In autocommit mode, in a transaction, or not a blocking connection of psycopg's."""
    arguments = (names.gtid(), names.bqual("orders"), names.remaining_s)
    with (
        psycopg.connect(orders._conninfo, autocommit=True) as own,
        pytest.raises(UsageError, match="autocommit"),
    ):
        orders.enlist(own, *arguments)
    with psycopg.connect(orders._conninfo) as own:
        own.execute("SELECT 1")
        with pytest.raises(UsageError, match="in a transaction of its own"):
            orders.enlist(own, *arguments)
    with pytest.raises(FlavourError):
        orders.enlist(object(), *arguments)  # type: ignore[arg-type]
    with pytest.raises(InvariantViolation):
        orders.begin(names.gtid(), names.bqual("another"), names.remaining_s)
    with pytest.raises(UsageError, match="autocommit"):
        PostgreSQL("x", "", autocommit=True)


# -- what recovery finds


def test_another_process_finishes_what_a_dead_one_prepared(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Any node with the resource can; doing it twice says that it was done."""
    branch = _written(orders, names)
    branch.prepare()
    branch.connection.close()
    with contextlib.closing(PostgreSQL("orders", orders._conninfo, is_durable=False)) as elsewhere:
        elsewhere.open(names.cluster)
        (found,) = elsewhere.prepared()
        assert elsewhere.finish(found, True) is Finish.DONE
        assert elsewhere.finish(found, True) is Finish.ALREADY
        assert elsewhere.finish(found, False) is Finish.HEURISTIC_COMMIT
    assert _rows(look) == ["a"]
    branch.commit()  # the first process was only slow: it finds it done


def test_only_ours_are_found(orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]) -> None:
    """Not another cluster's, another resource's in the same database, another database's, or a person's own."""
    ours = _written(orders, names, "ours")
    ours.prepare()
    foreign = []
    for resource, cluster in (("orders", cluster_tag(b"other")), ("stock", names.cluster)):
        other = PostgreSQL(resource, orders._conninfo, is_durable=False)
        other.open(cluster)
        branch = other.begin(names.gtid(), names.bqual(resource), names.remaining_s)
        branch.connection.execute("INSERT INTO account VALUES (%s, 1)", (resource,))
        branch.prepare()
        foreign.append((other, branch))
    for gid in ("a person's own", "1129271876_x_y", "1129271876__", "7_AAAA_BBBB"):
        with psycopg.connect(orders._conninfo) as own:
            own.execute("INSERT INTO account VALUES (%s, 1)", (gid,))
            own.execute(f"PREPARE TRANSACTION '{gid.replace(chr(39), chr(39) * 2)}'")
    look.execute("DROP DATABASE IF EXISTS elsewhere")
    look.execute("CREATE DATABASE elsewhere")
    elsewhere = PostgreSQL(
        "orders", orders._conninfo.replace("dbname=postgres", "dbname=elsewhere"), is_durable=False
    )
    elsewhere.open(names.cluster)
    far = _begin(elsewhere, names)
    far.connection.execute("CREATE TABLE t (i int)")
    far.prepare()
    assert [found.bqual for found in orders.prepared()] == [ours.bqual]
    for gid in ("a person''s own", "1129271876_x_y", "1129271876__", "7_AAAA_BBBB"):
        look.execute(f"ROLLBACK PREPARED '{gid}'")
    for other, branch in foreign:
        branch.rollback()
        other.close()
    far.rollback()
    elsewhere.close()
    look.execute("DROP DATABASE elsewhere WITH (FORCE)")
    ours.rollback()


@pytest.mark.parametrize("decided", ["COMMIT", "ROLLBACK"])
def test_what_a_person_ended_by_hand(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], decided: str
) -> None:
    """The same way as decided: nothing happened. Otherwise: a heuristic, by which somebody has to repair."""
    branch = _written(orders, names)
    branch.prepare()
    (found,) = orders.prepared()
    gid = _one(look, "SELECT gid FROM pg_prepared_xacts")
    look.execute(f"{decided} PREPARED '{gid}'")
    agreed, otherwise = (
        (branch.commit, branch.rollback) if decided == "COMMIT" else (branch.rollback, branch.commit)
    )
    with pytest.raises(BranchHeuristic) as heuristic:
        otherwise()
    assert heuristic.value.finish is (
        Finish.HEURISTIC_COMMIT if decided == "COMMIT" else Finish.HEURISTIC_ROLLBACK
    )
    agreed()
    assert orders.finish(found, decided == "COMMIT") is Finish.ALREADY


def test_without_evidence_nobody_presumes(orders: PostgreSQL, names: Names) -> None:
    """A name that is not there, and nothing by which to tell how it ended."""
    gone = PreparedBranch(names.gtid(), names.bqual("orders"), "")
    assert orders.finish(gone, True) is Finish.HAZARD
    assert orders.finish(gone, False) is Finish.HAZARD


@pytest.mark.parametrize(
    ("xid", "timeline", "system", "if_commit", "if_rollback"),
    [
        # a database that was put back to before the transaction, and has not come so far again
        (1 << 40, 0, 0, Finish.HEURISTIC_ROLLBACK, Finish.ALREADY),
        # history has parted: another transaction may have been given the number
        (0, 1, 0, Finish.HAZARD, Finish.HAZARD),
        # another server altogether
        (0, 0, 1, Finish.HAZARD, Finish.HAZARD),
    ],
)
def test_a_database_with_another_history(
    orders: PostgreSQL,
    names: Names,
    look: psycopg.Connection[Any],
    xid: int,
    timeline: int,
    system: int,
    if_commit: Finish,
    if_rollback: Finish,
) -> None:
    """After a restore a number may have been given a second time: what it became is no evidence then."""
    branch = _written(orders, names)
    branch.prepare()
    branch.commit()
    name = BranchName.unpack(branch.bqual)
    assert name is not None
    number, its_system, its_timeline = (
        int.from_bytes(name.evidence[a:b], "big") for a, b in ((0, 8), (8, 12), (12, 16))
    )
    evidence = b"".join(
        (
            (number + xid).to_bytes(8, "big"),
            (its_system ^ system).to_bytes(4, "big"),
            (its_timeline + timeline).to_bytes(4, "big"),
        )
    )
    told = PreparedBranch(branch._gtid, name._replace(evidence=evidence).pack(), "")
    assert orders.finish(told, True) is if_commit
    assert orders.finish(told, False) is if_rollback


def test_a_branch_that_is_still_being_written_is_nobodys_to_end(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Its name is not there yet, but its transaction is: ask again."""
    branch = _written(orders, names)
    xid = _one(look, "SELECT backend_xid::text FROM pg_stat_activity WHERE pid = %s", _backend(branch))
    done = _written(orders, names, "b")
    done.prepare()
    done.commit()
    name = BranchName.unpack(done.bqual)
    assert name is not None
    running = name._replace(evidence=int(xid).to_bytes(8, "big") + name.evidence[8:]).pack()
    with pytest.raises(ResourceBusy):
        orders.finish(PreparedBranch(branch._gtid, running, ""), True)
    branch.rollback()


# -- what breaks


def test_a_server_that_dies_with_a_prepared_branch(
    postgresql_server: PostgreSQLServer, orders: PostgreSQL, names: Names
) -> None:
    """The promise is kept: after its restart the branch is there, and commits over a connection of its own."""
    branch = _written(orders, names)
    assert branch.prepare() is Vote.YES
    postgresql_server.restart()
    assert len(orders.prepared()) == 1  # over a fresh connection; the idle one had died
    with pytest.raises(psycopg.OperationalError):
        branch.commit()  # the first to notice
    branch.commit()
    with psycopg.connect(postgresql_server.dsn()) as look:
        assert _rows(look) == ["a"]
        look.execute("TRUNCATE account")


class _Cut:
    """Ends a connection's session at a statement: before the server hears it, or after it has obeyed."""

    def __init__(
        self,
        branch: PostgreSQLBranch,
        look: psycopg.Connection[Any],
        monkeypatch: pytest.MonkeyPatch,
        at: str,
        *,
        obeyed: bool,
    ) -> None:
        connection, pid = branch.connection, _backend(branch)
        exchange, tpc_commit = statements.exchange_gen, connection.tpc_commit

        def cut() -> None:
            look.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))

        def exchanged(where: psycopg.Connection[Any], sql: str) -> Any:
            if where is not connection or not sql.startswith(at):
                return (yield from exchange(where, sql))
            if obeyed:
                yield from exchange(where, sql)
            cut()
            return (yield from exchange(where, "SELECT 1" if obeyed else sql))

        def committed() -> None:
            if obeyed:
                tpc_commit()
            cut()
            if obeyed:
                connection.execute("SELECT 1")
            else:
                tpc_commit()

        if at == "COMMIT":
            monkeypatch.setattr(connection, "tpc_commit", committed)
        else:
            monkeypatch.setattr(statements, "exchange_gen", exchanged)


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_vote_that_is_lost(
    orders: PostgreSQL,
    names: Names,
    look: psycopg.Connection[Any],
    obeyed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be prepared: rolling back finds out over another connection, and leaves nothing."""
    branch = _written(orders, names)
    _Cut(branch, look, monkeypatch, "PREPARE TRANSACTION", obeyed=obeyed)
    with pytest.raises(psycopg.OperationalError):
        branch.prepare()
    assert len(_prepared_named(orders, branch)) == int(obeyed)
    branch.rollback()
    assert orders.prepared() == []
    assert _rows(look) == []


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_connection_that_is_lost_during_a_one_phase_commit(
    orders: PostgreSQL,
    names: Names,
    look: psycopg.Connection[Any],
    obeyed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server is asked about the transaction's number: committed, or certainly not."""
    branch = _written(orders, names)
    _Cut(branch, look, monkeypatch, "COMMIT", obeyed=obeyed)
    if obeyed:
        branch.commit_one_phase()
    else:
        with pytest.raises(BranchFailed, match="nothing was committed"):
            branch.commit_one_phase()
    assert _rows(look) == (["a"] if obeyed else [])


def test_a_one_phase_commit_that_nobody_can_tell(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither committed nor failed is claimed; the message says what to ask the server later."""
    branch = _written(orders, names)
    _Cut(branch, look, monkeypatch, "COMMIT", obeyed=True)

    def refuse() -> psycopg.Connection[Any]:
        raise psycopg.OperationalError("nobody listens")

    monkeypatch.setattr(branch, "_reconnect", refuse)
    monkeypatch.setattr(branch, "_pause", lambda seconds: None)
    with pytest.raises(BranchUnknown, match="pg_xact_status"):
        branch.commit_one_phase()


@pytest.mark.parametrize("obeyed", [True, False])
def test_a_connection_that_is_lost_during_commit(
    orders: PostgreSQL,
    names: Names,
    look: psycopg.Connection[Any],
    obeyed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked again, it commits, or finds that it has."""
    branch = _written(orders, names)
    branch.prepare()
    _Cut(branch, look, monkeypatch, "COMMIT PREPARED", obeyed=obeyed)
    with pytest.raises(psycopg.OperationalError):
        branch.commit()
    branch.commit()
    assert _rows(look) == ["a"]


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_a_connection_in_a_known_state(
    orders: PostgreSQL, names: Names, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The server cancels what it is at, and that is waited for; whoever does not wait for it has the connection closed."""
    ready, left = polling._ready, [times]

    def interrupted(waits: Any, until: float | None) -> list[int]:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        return ready(waits, until)

    branch = _begin(orders, names)
    monkeypatch.setattr(polling, "_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        polling.poll(polled(statements.exchange_gen(branch.connection, "SELECT pg_sleep(600)")))
    status = branch.connection.info.transaction_status
    assert status is (TransactionStatus.INERROR if times == 1 else TransactionStatus.UNKNOWN)
    assert branch.connection.closed == (times == 2)
    with pytest.raises(BranchFailed):
        branch.prepare()


def test_an_interrupt_while_a_branch_begins_closes_its_connection(
    orders: PostgreSQL, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept connection, too: nobody else has it to close."""

    def interrupted(*_: object) -> Any:
        raise interrupt
        yield

    branch = _begin(orders, names)
    kept = branch.connection
    branch.rollback()
    monkeypatch.setattr(statements, "begin_gen", interrupted)
    interrupt: BaseException = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        _begin(orders, names)
    assert kept.closed
    monkeypatch.undo()

    async def work() -> None:
        branch = await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        await branch.arollback()
        monkeypatch.setattr(statements, "begin_gen", interrupted)
        with pytest.raises(asyncio.CancelledError):
            await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        assert branch.connection.closed

    interrupt = asyncio.CancelledError()
    asyncio.run(work())


def test_two_branches_are_polled_by_one_thread(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Both prepare, then both commit; one that has to connect first is not to be waited for by the others."""
    branches: list[PolledBranch] = [_written(orders, names, name) for name in "ab"]
    votes = polling.poll_all([vote for branch in branches if (vote := branch.polled_prepare())])
    assert votes == [(Vote.YES, None)] * 2
    assert len(orders.prepared()) == 2
    first, second = branches
    assert isinstance(first, PostgreSQLBranch)
    first.connection.close()
    assert first.polled_commit() is None
    assert first.polled_rollback() is None
    told = second.polled_commit()
    assert told is not None
    assert polling.poll_all([told]) == [(None, None)]
    first.commit()
    assert _rows(look) == ["a", "b"]


def test_a_connection_that_the_server_closed_while_idle(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Nobody notices: another one is opened."""
    branch = _begin(orders, names)
    pid = _backend(branch)
    branch.rollback()
    look.execute("SELECT pg_terminate_backend(%s, 10000)", (pid,))
    again = _written(orders, names)
    again.commit_one_phase()
    assert _rows(look) == ["a"]


def test_no_room_for_prepared_transactions_is_a_no(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """max_prepared_transactions is reached: the vote is NO and says which setting."""
    branches = []
    most = _one(look, "SHOW max_prepared_transactions")
    with pytest.raises(BranchFailed, match="maximum number of prepared transactions"):
        for number in range(int(most) + 1):
            branch = _written(orders, names, str(number))
            branches.append(branch)
            branch.prepare()
    for branch in branches:
        branch.rollback()


def test_two_that_finish_the_same_branch_at_once(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Each hears that it is done, that it was, or to ask again; it is committed once."""
    for number in range(5):
        branch = _written(orders, names, str(number))
        branch.prepare()
        (found,) = orders.prepared()
        heard: list[object] = []

        def finish(found: PreparedBranch = found, heard: list[object] = heard) -> None:
            try:
                heard.append(orders.finish(found, True))
            except ResourceBusy as busy:
                heard.append(busy)

        threads = [threading.Thread(target=finish) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert heard.count(Finish.DONE) == 1
        branch.commit()
        assert all(h in (Finish.DONE, Finish.ALREADY) or isinstance(h, ResourceBusy) for h in heard)
    assert len(_rows(look)) == 5


# -- what registration refuses


def test_a_server_that_prepares_nothing_is_refused_at_once(
    names: Names, postgresql_server: PostgreSQLServer
) -> None:
    """Its default: the message names the setting, not the first transaction's failure a day later."""
    with PostgreSQLServer(max_prepared_transactions=0) as server:
        resource = PostgreSQL("orders", server.dsn())
        with pytest.raises(ConfigError, match="max_prepared_transactions = 0"):
            resource.open(names.cluster)
        server.kill()
        server._settings["max_prepared_transactions"] = 5
        server.start()
        with pytest.raises(ConfigError, match="fsync = off"):
            resource.open(names.cluster)
        throw_away = PostgreSQL("orders", server.dsn(), is_durable=False)
        throw_away.open(names.cluster)
        throw_away.close()


def test_a_resource_that_was_not_opened_prepares_nothing(
    names: Names, postgresql_server: PostgreSQLServer
) -> None:
    """Whose branches it has would not be known."""
    resource = PostgreSQL("orders", postgresql_server.dsn())
    with pytest.raises(UsageError, match="not open"):
        resource.prepared()
    with pytest.raises(UsageError, match="needs a name"):
        PostgreSQL("", postgresql_server.dsn())


def test_somebody_elses_branch_cannot_be_ended(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """Only the owner or a superuser may; the error says so, and nothing is presumed."""
    branch = _written(orders, names)
    branch.prepare()
    (found,) = orders.prepared()
    look.execute("DROP ROLE IF EXISTS clerk")
    look.execute("CREATE ROLE clerk LOGIN")
    weak = PostgreSQL("orders", orders._conninfo.replace("user=coordlib", "user=clerk"), is_durable=False)
    with contextlib.closing(weak):
        weak.open(names.cluster)
        assert weak.prepared() == [found]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            weak.finish(found, True)
    branch.rollback()
    look.execute("DROP ROLE clerk")


# -- the asynchronous face


def test_an_asynchronous_branch(orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]) -> None:
    """The same promises: two phases, one phase, rolled back, only read, swallowed errors; connections are kept."""

    async def begin() -> AsyncPostgreSQLBranch:
        return await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)

    async def scenario() -> None:
        first = await begin()
        assert isinstance(first, AsyncBranch)
        await first.connection.execute("INSERT INTO account VALUES ('a', 1)")
        assert await first.aprepare() is Vote.YES
        assert [found.bqual for found in orders.prepared()] == [first.bqual]
        await first.acommit()
        await first.acommit()
        second = await begin()
        assert second.connection is first.connection
        await second.connection.execute("INSERT INTO account VALUES ('b', 1)")
        await second.acommit_one_phase()
        third = await begin()
        await third.connection.execute("INSERT INTO account VALUES ('c', 1)")
        assert await third.aprepare() is Vote.YES
        await third.arollback()
        fourth = await begin()
        assert await fourth.aprepare() is Vote.READ_ONLY
        fifth = await begin()
        with pytest.raises(psycopg.errors.UniqueViolation):
            await fifth.connection.execute("INSERT INTO account VALUES ('a', 1)")
        with pytest.raises(BranchFailed):
            await fifth.aprepare()
        for blocking in (fifth.prepare, fifth.commit, fifth.rollback, fifth.commit_one_phase):
            with pytest.raises(FlavourError, match="await"):
                blocking()
        async with await psycopg.AsyncConnection.connect(orders._conninfo) as own:
            enlisted = await orders.aenlist(own, names.gtid(), names.bqual("orders"), names.remaining_s)
            await own.execute("INSERT INTO account VALUES ('d', 1)")
            await enlisted.aprepare()
            await enlisted.acommit()
            assert not own.closed
        with pytest.raises(FlavourError):
            await orders.aenlist(object(), names.gtid(), names.bqual("orders"), names.remaining_s)  # type: ignore[arg-type]

    asyncio.run(scenario())
    assert _rows(look) == ["a", "b", "d"]


def test_a_task_that_is_cancelled_while_it_prepares(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any]
) -> None:
    """It may be prepared: rolling back leaves nothing, whatever had come of it."""

    async def scenario() -> None:
        branch = await orders.abegin(names.gtid(), names.bqual("orders"), names.remaining_s)
        await branch.connection.execute("INSERT INTO account VALUES ('a', 1)")
        task = asyncio.create_task(branch.aprepare())
        while branch._state == "active":
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await branch.arollback()

    asyncio.run(scenario())
    assert orders.prepared() == []
    assert _rows(look) == []


def test_a_connection_that_was_kept_does_nothing(
    orders: PostgreSQL, names: Names, look: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Statements are refused; what gets past our cursors is rolled back, with a warning, and hits nobody else."""
    branch = _begin(orders, names)
    kept = branch.connection
    branch.rollback()
    with pytest.raises(psycopg.ProgrammingError, match="given to a transaction, which has ended"):
        kept.execute("INSERT INTO account VALUES ('late', 1)")
    psycopg.Cursor(kept).execute("INSERT INTO account VALUES ('late', 1)")
    second = _written(orders, names, "in time")
    assert second.connection is not kept
    assert kept.closed
    second.commit_one_phase()
    assert _rows(look) == ["in time"]
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["transaction.late-use"]
    # Nor recovery.
    psycopg.Cursor(second.connection).execute("INSERT INTO account VALUES ('later', 1)")
    assert orders.prepared() == []
    assert second.connection.closed
    assert _rows(look) == ["in time"]
