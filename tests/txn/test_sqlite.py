"""SQLite as the last resource: what it decides, and what could undo a decision behind its back."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordlib.errors import ConfigError, InvariantViolation, UsageError
from coordlib.txn.branches import (
    AsyncBranch,
    BranchFailed,
    BranchUnknown,
    DecidingBranch,
    DecidingResource,
    Finish,
    PreparedBranch,
)
from coordlib.txn.resources.common import Failures
from coordlib.txn.resources.sqlite import MARKER_TABLE, SQLite, SQLiteBranch
from tests.txn.conftest import Names


@pytest.fixture(params=["wal", "delete", "truncate"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "ledger.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute(f"PRAGMA journal_mode = {request.param}")
        connection.execute("CREATE TABLE entry (name TEXT PRIMARY KEY)")
    return file


@pytest.fixture
def ledger(path: Path, names: Names) -> Iterator[SQLite]:
    with contextlib.closing(SQLite("ledger", path, timeout=0.01)) as resource:
        resource.open(names.cluster)
        yield resource


def _begin(resource: SQLite, names: Names) -> SQLiteBranch:
    return resource.begin(names.gtid(), names.branch_of(resource.tag), names.remaining_s)


def _written(resource: SQLite, names: Names, name: str = "a") -> SQLiteBranch:
    branch = _begin(resource, names)
    branch.connection.execute("INSERT INTO entry VALUES (?)", (name,))
    return branch


def _rows(path: Path, table: str = "entry") -> list[object]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")]


def test_it_decides(ledger: SQLite, path: Path, names: Names) -> None:
    """Writes and decision are one commit; asked later it says so; forgotten, the marker goes with the next decision."""
    branch = _written(ledger, names)
    assert isinstance(branch, DecidingBranch)
    assert not isinstance(branch, AsyncBranch)
    assert isinstance(ledger, DecidingResource)
    assert branch.is_last_resource
    assert branch.resource is ledger
    branch.decide(branch._gtid)
    assert _rows(path) == ["a"]
    assert ledger.outcome(branch._gtid)
    assert ledger.outcome(branch._gtid)
    assert ledger.prepared() == []
    ledger.forget(branch._gtid)
    second = _written(ledger, names, "b")
    assert second.connection is branch.connection
    second.decide(second._gtid)
    assert _rows(path, MARKER_TABLE) == [second._gtid]


def test_who_asks_first_decides(ledger: SQLite, path: Path, names: Names) -> None:
    """The answer "no" is a fence: the decision that comes later fails, whatever delayed it."""
    gtid, bqual = names.gtid(), names.branch_of(ledger.tag)
    assert not ledger.outcome(gtid)
    branch = ledger.begin(gtid, bqual, names.remaining_s)
    branch.connection.execute("INSERT INTO entry VALUES ('a')")
    with pytest.raises(BranchFailed, match="in doubt"):
        branch.decide(gtid)
    assert _rows(path) == []
    assert not ledger.outcome(gtid)
    branch.rollback()


def test_nobody_concludes_while_it_is_under_way(ledger: SQLite, path: Path, names: Names) -> None:
    """Asking waits for the transaction, and gives no answer rather than a wrong one."""
    branch = _written(ledger, names)
    with pytest.raises(sqlite3.OperationalError, match="locked") as locked:
        ledger.outcome(branch._gtid)
    assert ledger.is_conflict(locked.value)
    branch.decide(branch._gtid)
    assert ledger.outcome(branch._gtid)


def test_what_a_recovering_node_is_told(ledger: SQLite, names: Names) -> None:
    """The decision is the outcome: finishing only compares."""
    branch = _written(ledger, names)
    branch.decide(branch._gtid)
    done, never = (PreparedBranch(gtid, branch.bqual, "") for gtid in (branch._gtid, names.gtid()))
    assert ledger.finish(done, True) is Finish.ALREADY
    assert ledger.finish(done, False) is Finish.HEURISTIC_COMMIT
    assert ledger.finish(never, False) is Finish.ALREADY
    assert ledger.finish(never, True) is Finish.HEURISTIC_ROLLBACK


def test_alone_it_leaves_no_marker(ledger: SQLite, path: Path, names: Names) -> None:
    """Nobody is in doubt about it."""
    _written(ledger, names).commit_one_phase()
    assert _rows(path) == ["a"]
    assert _rows(path, MARKER_TABLE) == []


def test_rolling_back(ledger: SQLite, path: Path, names: Names) -> None:
    """Nothing stays; it may be repeated; what comes after fails."""
    branch = _written(ledger, names)
    branch.rollback()
    branch.rollback()
    assert _rows(path) == []
    with pytest.raises(BranchFailed):
        branch.decide(branch._gtid)


def test_it_never_prepares(ledger: SQLite, names: Names) -> None:
    """It has no second phase; asking for one is somebody's mistake."""
    branch = _begin(ledger, names)
    for wrong in (branch.prepare, branch.commit):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(InvariantViolation):
        branch.decide(names.gtid())
    branch.rollback()


def _leave(connection: sqlite3.Connection) -> None:
    with connection:
        pass


@pytest.mark.parametrize(
    "end",
    [
        lambda connection: connection.commit(),
        lambda connection: connection.rollback(),
        lambda connection: connection.execute("COMMIT"),
        lambda connection: connection.execute("ROLLBACK"),
        lambda connection: connection.executescript("INSERT INTO entry VALUES ('b')"),
        _leave,
        lambda connection: connection.execute("ATTACH 'x' AS other"),
        lambda connection: connection.execute("PRAGMA synchronous = OFF"),
        lambda connection: connection.execute("PRAGMA journal_mode = MEMORY"),
    ],
)
def test_nobody_else_ends_or_weakens_the_transaction(
    ledger: SQLite, path: Path, names: Names, end: Callable[[sqlite3.Connection], object]
) -> None:
    """What would, is refused at the call; the second time, too, when the statement is in the driver's cache."""
    for name in "ab":
        branch = _written(ledger, names, name)
        with pytest.raises(sqlite3.DatabaseError):
            end(branch.connection)
        assert branch.connection.in_transaction
        assert name not in _rows(path)
        branch.rollback()
    assert _rows(path) == []


def test_a_swallowed_error_is_a_no(ledger: SQLite, path: Path, names: Names) -> None:
    """The database would commit the rest."""
    statements: tuple[Callable[[sqlite3.Connection], object], ...] = (
        lambda connection: connection.execute("INSERT INTO entry VALUES ('a')"),
        lambda connection: connection.executemany("INSERT INTO entry VALUES (?)", [("a",)]),
        lambda connection: connection.cursor().execute("INSERT INTO entry VALUES ('a')"),
    )
    for again in statements:
        branch = _written(ledger, names)
        with pytest.raises(sqlite3.IntegrityError):
            again(branch.connection)
        with pytest.raises(BranchFailed, match="a statement failed in it") as failed:
            branch.decide(branch._gtid)
        assert isinstance(failed.value.__cause__, sqlite3.IntegrityError)
        assert not ledger.is_conflict(failed.value)
    assert _rows(path) == []


def test_going_back_to_a_savepoint_heals(ledger: SQLite, path: Path, names: Names) -> None:
    """What the message recommends works."""
    branch = _written(ledger, names)
    branch.connection.execute("SAVEPOINT early")
    with pytest.raises(sqlite3.IntegrityError):
        branch.connection.execute("INSERT INTO entry VALUES ('a')")
    branch.connection.execute("ROLLBACK TO early")
    branch.decide(branch._gtid)
    assert _rows(path) == ["a"]


@pytest.mark.parametrize(
    ("statements", "is_whole"),
    [
        (["!"], False),
        (["SAVEPOINT a", "!", "ROLLBACK TO a"], True),
        (["SAVEPOINT a", "!", "rollback transaction to savepoint A"], True),
        (["SAVEPOINT a", "!", "ROLLBACK WORK TO `a`"], True),
        (["!", "SAVEPOINT a", "ROLLBACK TO a"], False),
        (["SAVEPOINT a", "!", "SAVEPOINT b", "ROLLBACK TO b"], False),
        (["SAVEPOINT a", "!", "SAVEPOINT b", 'ROLLBACK TO "a"'], True),
        (["SAVEPOINT a", "SAVEPOINT a", "!", "ROLLBACK TO a", "ROLLBACK TO a"], True),
        (["SAVEPOINT a", "!", "RELEASE a"], False),
        (["SAVEPOINT a", "SAVEPOINT b", "RELEASE SAVEPOINT a", "!", "ROLLBACK TO [b]"], False),
        (["SAVEPOINT a", "!", "!", "ROLLBACK TO a", "!"], False),
        (["SELECT 'SAVEPOINT a'", "!"], False),
    ],
)
def test_which_savepoints_heal(statements: list[str], is_whole: bool) -> None:
    """Those from before the first failure, and nothing else."""
    failures = Failures()
    for statement in statements:
        if statement == "!":
            failures.note(ValueError("x"))
        else:
            failures.statement(statement)
    assert (failures.problem() is None) == is_whole


def test_waiting_for_others_ends_with_the_transactions_time(ledger: SQLite, names: Names) -> None:
    """Who cannot write in time has begun nothing; trying again may help."""
    holder = _written(ledger, names)
    names.remaining = 0.01
    with pytest.raises(sqlite3.OperationalError, match="locked") as locked:
        _begin(ledger, names)
    assert ledger.is_conflict(locked.value)
    holder.rollback()


def test_readers_that_keep_a_commit_from_happening(tmp_path: Path, names: Names) -> None:
    """With a rollback journal they can: the branch has certainly not committed, and says so."""
    path = tmp_path / "ledger.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE entry (name TEXT PRIMARY KEY)")
    with (
        contextlib.closing(SQLite("ledger", path)) as ledger,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader,
    ):
        ledger.open(names.cluster)
        branch = _written(ledger, names)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM entry").fetchall()
        names.remaining = 0.01
        with pytest.raises(BranchFailed, match="locked") as failed:
            branch.decide(branch._gtid)
        assert ledger.is_conflict(failed.value)
        reader.execute("COMMIT")
        assert not ledger.outcome(branch._gtid)


def test_a_commit_that_breaks_is_unknown_until_asked(
    ledger: SQLite, path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither committed nor failed is claimed; the resource then says which, for good."""
    for happened in (True, False):
        branch = _written(ledger, names, str(happened))
        connection = branch._connection

        def commit(happened: bool = happened, connection: sqlite3.Connection = connection) -> None:
            sqlite3.Connection.commit(connection) if happened else sqlite3.Connection.rollback(connection)
            raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(connection, "commit", commit, raising=False)
        with pytest.raises(BranchUnknown):
            branch.decide(branch._gtid)
        branch.rollback()
        assert ledger.outcome(branch._gtid) is happened
    assert _rows(path) == ["True"]


def test_a_database_that_rolled_back_by_itself(ledger: SQLite, path: Path, names: Names) -> None:
    """A conflict clause, a full disk: the branch is a no, not an empty commit."""
    branch = _written(ledger, names)
    with pytest.raises(sqlite3.IntegrityError):
        branch.connection.execute("INSERT OR ROLLBACK INTO entry VALUES ('a')")
    with pytest.raises(BranchFailed):
        branch.decide(branch._gtid)
    assert _rows(path) == []


def test_many_forgotten_markers_are_swept(
    ledger: SQLite, path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another decision, too; and at the end."""
    monkeypatch.setattr("coordlib.txn.resources.sqlite._FORGET_AT", 10)
    gtids = [names.gtid() for _ in range(15)]
    for gtid in gtids:
        assert not ledger.outcome(gtid)
    for gtid in gtids:
        ledger.forget(gtid)
    assert len(_rows(path, MARKER_TABLE)) == 5
    ledger.close()
    assert _rows(path, MARKER_TABLE) == []


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda c: c.execute("PRAGMA synchronous = NORMAL"), "synchronous"),
        (lambda c: c.execute("PRAGMA synchronous = OFF"), "synchronous"),
        (lambda c: c.execute("PRAGMA journal_mode = MEMORY"), "journal_mode = memory"),
        (lambda c: c.execute("PRAGMA journal_mode = OFF"), "journal_mode = off"),
        (lambda c: c.execute("ATTACH ':memory:' AS other"), "other attached"),
        (lambda c: setattr(c, "isolation_level", "DEFERRED"), "isolation_level"),
        (lambda c: c.execute("BEGIN"), "no transaction open"),
    ],
)
def test_settings_that_would_undo_a_decision_are_refused(
    tmp_path: Path, names: Names, configure: Callable[[sqlite3.Connection], object], message: str
) -> None:
    """At registration, with what to set."""
    with pytest.raises(ConfigError, match=message):
        SQLite("ledger", tmp_path / "ledger.db", configure=configure).open(names.cluster)


def test_the_journal_mode_delete_needs_more(tmp_path: Path, names: Names) -> None:
    """With FULL its last commit can come undone when the power is lost: the journal's removal is not synced."""

    def full(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous = FULL")

    with pytest.raises(ConfigError, match="EXTRA"):
        SQLite("ledger", tmp_path / "ledger.db", configure=full).open(names.cluster)


@pytest.mark.parametrize("path", [":memory:", "", "file:x?mode=memory&cache=shared"])
def test_databases_in_memory_are_refused(path: str, names: Names) -> None:
    """A decision would end with the process."""
    with pytest.raises(ConfigError, match="in memory"):
        SQLite("ledger", path).open(names.cluster)


def test_a_resource_that_was_not_opened_answers_nothing(tmp_path: Path, names: Names) -> None:
    """Not even a fence."""
    with pytest.raises(UsageError, match="not open"):
        SQLite("ledger", tmp_path / "ledger.db").outcome(names.gtid())


def test_each_file_answers_for_itself_whatever_its_name(ledger: SQLite, tmp_path: Path, names: Names) -> None:
    """
    Every node has a file of its own under one name: the tag in the branches' names is of the file, so that nobody
    in doubt asks one that knows nothing of it, and would forbid what another has decided.
    """
    with contextlib.closing(SQLite("ledger", tmp_path / "other.db")) as other:
        other.open(names.cluster)
        assert other.tag != ledger.tag
    with contextlib.closing(SQLite("ledger", ledger._path)) as again:
        again.open(names.cluster)
        assert again.tag == ledger.tag


def test_a_connection_that_was_kept_does_nothing(ledger: SQLite, path: Path, names: Names) -> None:
    """It would commit every statement by itself; the next transaction that has it is not in its way."""
    branch = _begin(ledger, names)
    kept = branch.connection
    branch.rollback()
    with pytest.raises(sqlite3.ProgrammingError, match="given to a transaction, which has ended"):
        kept.execute("INSERT INTO entry VALUES ('late')")
    second = _written(ledger, names)
    assert second.connection is kept
    second.commit_one_phase()
    assert _rows(path) == ["a"]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "PRAGMA synchronous = OFF", "ATTACH 'x' AS y"])
def test_what_is_refused_says_why(ledger: SQLite, names: Names, statement: str) -> None:
    branch = _begin(ledger, names)
    with pytest.raises(
        sqlite3.DatabaseError, match=r"^not authorized in a transaction of coordlib's: it .* commits"
    ) as caught:
        branch.connection.execute(statement)
    assert caught.value.sqlite_errorcode == sqlite3.SQLITE_AUTH
    branch.rollback()


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, names: Names) -> None:
    path = tmp_path / "no such folder" / "ledger.db"
    with pytest.raises(sqlite3.OperationalError, match=f"^'ledger' at {path}: unable to open database file$"):
        SQLite("ledger", path).open(names.cluster)
