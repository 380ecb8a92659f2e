"""The participant's journal: what is promised outlives every crash, and is obeyed once it is decided."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordlib.errors import StorageCorrupt, StorageFailed
from coordlib.txn.branches import BranchFailed, Finish, PreparedBranch, Vote
from coordlib.txn.journal import (
    BranchBusy,
    Journal,
    JournalBranch,
    JournalResource,
    JournalState,
    MemoryJournal,
    Record,
    SqliteJournal,
)

GTID, BQUAL = b"g" * 16, b"bbbbbbbb\0"
RECORD = Record("inventory", GTID, BQUAL, 5000, JournalState.PREPARED, b"redo")


class Stock:
    """Reserves one piece for each transaction; what was sold is on a disk of its own."""

    def __init__(self, sold: set[bytes]) -> None:
        self.reserved: set[bytes] = set()
        self.sold = sold
        self.refuses = False

    def prepare(self, work: object) -> bytes | None:
        if self.refuses:
            raise ValueError("none left")
        if work is None:
            return None
        assert isinstance(work, bytes)
        self.reserved.add(work)
        return work

    def restore(self, redo: bytes) -> None:
        self.reserved.add(redo)

    def commit(self, redo: bytes) -> None:
        self.sold.add(redo)
        self.reserved.discard(redo)

    def abort(self, redo: bytes) -> None:
        assert redo not in self.sold
        self.reserved.discard(redo)


class PowerCut(BaseException):
    """The process is no more."""


@pytest.fixture(params=["memory", "sqlite"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    made: Journal = (
        MemoryJournal() if request.param == "memory" else SqliteJournal(tmp_path / "participants.db")
    )
    yield made
    made.close()


def test_a_record_goes_through_its_states(journal: Journal) -> None:
    """Kept until it is removed; what is not there can be decided and removed without harm."""
    assert journal.get(GTID, BQUAL) is None
    journal.add(RECORD)
    journal.add(RECORD._replace(service="other", bqual=b"a" * 9))
    assert journal.get(GTID, BQUAL) == RECORD
    assert journal.records("inventory") == [RECORD]
    journal.decide(GTID, BQUAL, JournalState.COMMITTED)
    journal.decide(b"x" * 16, BQUAL, JournalState.COMMITTED)
    assert journal.records("inventory") == [RECORD._replace(state=JournalState.COMMITTED)]
    journal.remove(GTID, BQUAL)
    journal.remove(GTID, BQUAL)
    assert journal.records("inventory") == []
    assert len(journal.records("other")) == 1


def test_what_was_added_is_there_after_the_process_has_ended_without_a_word(tmp_path: Path) -> None:
    """T3: nothing is written at closing that was not written before."""
    path = tmp_path / "participants.db"
    first = SqliteJournal(path)
    first.add(RECORD)
    copies = tmp_path / "copy"
    copies.mkdir()
    for file in tmp_path.glob("participants.db*"):
        (copies / file.name).write_bytes(file.read_bytes())  # as a kill -9 leaves them
    first.close()
    second = SqliteJournal(copies / "participants.db")
    assert second.records("inventory") == [RECORD]
    second.close()


def test_a_journal_knows_its_own_branches_for_ever(tmp_path: Path) -> None:
    """Also after a restart, and when they have long ended; never those of another replica's journal."""
    first, other = SqliteJournal(tmp_path / "a.db"), SqliteJournal(tmp_path / "b.db")
    branch = branch_of(JournalResource("inventory", first, Stock(set())))
    branch.prepare()
    branch.commit()
    first.close()
    again = SqliteJournal(tmp_path / "a.db")
    assert JournalResource("inventory", again, Stock(set())).holds(branch.bqual)
    for stranger in (other, MemoryJournal(), MemoryJournal(id=b"m")):
        assert not JournalResource("inventory", stranger, Stock(set())).holds(branch.bqual)
        assert not JournalResource("inventory", stranger, Stock(set())).holds(BQUAL)
    again.close()
    other.close()


def test_a_journal_is_one_process_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that obey for one journal would both run the handlers."""
    connect = sqlite3.connect

    def impatient(*args: object, **how: object) -> sqlite3.Connection:
        return connect(*args, **{**how, "timeout": 0})  # type: ignore[call-overload,no-any-return]  # passed on

    monkeypatch.setattr(sqlite3, "connect", impatient)
    first = SqliteJournal(tmp_path / "participants.db")
    with pytest.raises(StorageFailed, match="another process"):
        SqliteJournal(tmp_path / "participants.db")
    first.close()
    SqliteJournal(tmp_path / "participants.db").close()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    """Garbage, and a newer format."""
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database, but long enough to look at" * 40)
    with pytest.raises(StorageCorrupt):
        SqliteJournal(garbage)
    newer = tmp_path / "newer.db"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version=9")
    connection.close()
    with pytest.raises(StorageCorrupt, match="upgrade"):
        SqliteJournal(newer)


def branch_of(resource: JournalResource, work: object = b"piece") -> JournalBranch:
    return JournalBranch(resource, GTID, BQUAL, 5000, work)


def test_a_service_promises_and_obeys(journal: Journal) -> None:
    """Prepared, committed; told again, it does nothing more."""
    stock = Stock(set())
    branch = branch_of(JournalResource("inventory", journal, stock))
    assert branch.prepare() is Vote.YES
    assert stock.reserved == {b"piece"}
    branch.commit()
    branch.commit()
    assert (stock.reserved, stock.sold) == (set(), {b"piece"})
    assert journal.records("inventory") == []


def test_a_service_that_changed_nothing_keeps_nothing(journal: Journal) -> None:
    """Read only: nothing in the journal; one that refuses leaves nothing either."""
    stock = Stock(set())
    resource = JournalResource("inventory", journal, stock)
    assert branch_of(resource, None).prepare() is Vote.READ_ONLY
    stock.refuses = True
    with pytest.raises(BranchFailed, match="none left"):
        branch_of(resource).prepare()
    assert journal.records("inventory") == []


@pytest.mark.parametrize("crash_at", range(4))
@pytest.mark.parametrize("commit", [True, False])
def test_a_crash_at_any_write_loses_no_promise(crash_at: int, commit: bool) -> None:
    """
    The process ends before some write. Whatever is in the journal afterwards is reserved again before anything
    is served, is found by recovery if it is undecided, and ends as decided.
    """
    writes = 0

    def before_write(what: str) -> None:
        nonlocal writes
        if writes == crash_at:
            raise PowerCut
        writes += 1

    journal = MemoryJournal(before_write)
    sold: set[bytes] = set()
    branch = branch_of(JournalResource("inventory", journal, Stock(sold)))
    has_promised = False
    try:
        branch.prepare()
        has_promised = True
        (branch.commit if commit else branch.rollback)()
    except PowerCut:
        journal.before_write = lambda what: None
    restarted = Stock(sold)
    resource = JournalResource("inventory", journal, restarted)
    resource.start()
    prepared = resource.prepared()
    assert len(prepared) == len(restarted.reserved)
    if has_promised and crash_at == 1:
        assert prepared  # nobody had decided
    for found in prepared:
        assert resource.deadline_ms(found.gtid, found.bqual) == 5000
        assert resource.finish(found, commit) is Finish.DONE
        assert resource.finish(found, commit) is Finish.ALREADY
    assert journal.records("inventory") == []
    assert restarted.reserved == set()
    assert sold == ({b"piece"} if commit and has_promised else set())


@pytest.mark.parametrize("crash_at", range(4))
def test_a_crash_in_one_phase_commits_or_leaves_no_trace(crash_at: int) -> None:
    """Nobody has decided before the journal says committed: recovery rolls it back; after that it is committed."""
    writes = 0

    def before_write(what: str) -> None:
        nonlocal writes
        if writes == crash_at:
            raise PowerCut
        writes += 1

    journal = MemoryJournal(before_write)
    sold: set[bytes] = set()
    try:
        branch_of(JournalResource("inventory", journal, Stock(sold))).commit_one_phase()
    except PowerCut:
        journal.before_write = lambda what: None
    restarted = Stock(sold)
    resource = JournalResource("inventory", journal, restarted)
    resource.start()
    for found in resource.prepared():
        resource.finish(found, False)
    assert (restarted.reserved, journal.records("inventory")) == (set(), [])
    assert sold == ({b"piece"} if crash_at >= 2 else set())


def test_a_handler_that_fails_on_what_is_committed_is_asked_again(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """The outcome stands; it is an error in the log, not one of the transaction."""
    stock = Stock(set())
    resource = JournalResource("inventory", journal, stock)
    failures = [ValueError("disk on fire")]
    obey = stock.commit

    def commit(redo: bytes) -> None:
        if failures:
            raise failures.pop()
        obey(redo)

    stock.commit = commit  # type: ignore[method-assign]  # for once
    branch_of(resource).commit_one_phase()
    assert "asked again" in caplog.text
    assert resource.prepared() == []  # it is decided: nobody asks for its outcome
    resource.obey_again()
    assert stock.sold == {b"piece"}


def test_an_outcome_is_never_turned_round(journal: Journal) -> None:
    """What is committed in the journal is not aborted, whoever asks."""
    resource = JournalResource("inventory", journal, Stock(set()))
    journal.add(RECORD)
    journal.decide(GTID, BQUAL, JournalState.COMMITTED)
    assert resource.finish(PreparedBranch(GTID, BQUAL, ""), False) is Finish.HEURISTIC_COMMIT
    assert journal.get(GTID, BQUAL) is not None


def test_a_reservation_that_the_journal_could_not_keep_is_let_go_of(journal: Journal) -> None:
    """The vote is lost then, and the branch is rolled back."""
    stock = Stock(set())
    branch = branch_of(JournalResource("inventory", journal, stock))
    journal.close()
    if isinstance(journal, SqliteJournal):
        with pytest.raises(StorageFailed):
            branch.prepare()
        with pytest.raises(StorageFailed):
            branch.rollback()  # nobody can say whether it is there: recovery looks after the next start
    else:
        branch.prepare()
        branch.rollback()
        assert stock.reserved == set()


class Slow(Stock):
    """While it sells, another thread looks for what is decided, and a third one is told to commit the same."""

    resource: JournalResource

    def __init__(self) -> None:
        super().__init__(set())
        self.commits = 0

    def commit(self, redo: bytes) -> None:
        self.commits += 1
        self.resource.obey_again()
        with pytest.raises(BranchBusy):
            self.resource.finish(PreparedBranch(GTID, BQUAL, ""), True)
        super().commit(redo)


def test_a_handler_never_has_the_same_twice_at_once(journal: Journal) -> None:
    """Idempotent is enough: it need not be safe against itself. Whoever comes second asks again, and it is done."""
    stock = Slow()
    stock.resource = resource = JournalResource("inventory", journal, stock)
    journal.add(RECORD)
    branch = PreparedBranch(GTID, BQUAL, "")
    assert resource.finish(branch, True) is Finish.DONE
    assert resource.finish(branch, True) is Finish.ALREADY
    assert (stock.commits, stock.sold) == (1, {b"redo"})


def test_what_was_obeyed_since_it_was_looked_up_is_not_obeyed_again(journal: Journal) -> None:
    """Two looked it up; the second comes when the first is through."""
    stock = Slow()
    stock.resource = resource = JournalResource("inventory", journal, stock)
    decided = RECORD._replace(state=JournalState.COMMITTED)
    journal.add(decided)
    resource.obey(decided)
    resource.obey(decided)
    assert stock.commits == 1
