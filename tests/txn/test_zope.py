"""Zope's transactions, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import transaction
from transaction.interfaces import IDataManager, TransientError
from zope.interface.verify import verifyObject

from coordlib.errors import FlavourError, InvariantViolation, LockTimeout, UsageError
from coordlib.txn.branches import (
    Branch,
    BranchFailed,
    BranchHeuristic,
    Finish,
    PreparedBranch,
    Resource,
    Vote,
)
from coordlib.txn.resources.zope import CoordlibDataManager, Zope, ZopeBranch
from tests.txn.conftest import Names


class Manager:
    """A data manager that writes down what it is asked, and fails where it is told to."""

    def __init__(self, heard: list[str], name: str = "m", fails: str = "") -> None:
        self.transaction_manager = None
        self._heard = heard
        self._name = name
        self._fails = fails

    def sortKey(self) -> str:
        return self._name

    def __getattr__(self, phase: str) -> Any:
        if phase not in ("abort", "tpc_begin", "commit", "tpc_vote", "tpc_finish", "tpc_abort"):
            raise AttributeError(phase)

        def asked(_: object) -> None:
            self._heard.append(f"{self._name} {phase}")
            if phase == self._fails:
                raise TransientError(f"{self._name} fails")

        return asked


# -- ours in theirs


@pytest.fixture
def heard() -> list[str]:
    return []


def _joined(heard: list[str], fails: type[Exception] | None = None) -> Any:
    """A Zope transaction with a coordlib transaction and a data manager in it."""
    manager = transaction.TransactionManager()

    def commit() -> None:
        heard.append("ours commits")
        if fails is not None:
            raise fails("no")

    joined = CoordlibDataManager(commit, lambda: heard.append("ours rolls back"), manager=manager)
    verifyObject(IDataManager, joined)
    return manager


def test_ours_commits_when_everybody_has_voted(heard: list[str]) -> None:
    """Last, whatever the names; then the others finish."""
    manager = _joined(heard)
    manager.get().join(Manager(heard, "~~~"))
    manager.commit()
    assert heard == ["~~~ tpc_begin", "~~~ commit", "~~~ tpc_vote", "ours commits", "~~~ tpc_finish"]


def test_zope_tries_again_what_may_succeed_then(heard: list[str]) -> None:
    """Errors that say of themselves that they may be retried are, by Zope's own loop; others are not."""
    manager = transaction.TransactionManager()
    errors: list[Exception] = [LockTimeout("later"), LockTimeout("later"), ValueError("never")]

    def commit() -> None:
        raise errors.pop(0)

    def work() -> None:
        CoordlibDataManager(commit, lambda: None, manager=manager)

    with pytest.raises(ValueError, match="never"):
        manager.run(work, tries=5)
    assert errors == []


def test_a_no_of_ours_aborts_the_others(heard: list[str]) -> None:
    """The error goes through."""
    manager = _joined(heard, LockTimeout)
    manager.get().join(Manager(heard))
    with pytest.raises(LockTimeout):
        manager.commit()
    assert heard[2:] == ["m tpc_vote", "ours commits", "m tpc_abort"]


@pytest.mark.parametrize("phase", ["tpc_begin", "commit", "tpc_vote"])
def test_a_no_of_theirs_rolls_ours_back(heard: list[str], phase: str) -> None:
    """It has not been asked to commit."""
    manager = _joined(heard)
    manager.get().join(Manager(heard, fails=phase))
    with pytest.raises(TransientError):
        manager.commit()
    assert "ours commits" not in heard
    assert heard.count("ours rolls back") == 1


def test_an_aborted_zope_transaction_rolls_ours_back(heard: list[str]) -> None:
    """And nothing is committed."""
    _joined(heard).abort()
    assert heard == ["ours rolls back"]


def test_a_no_after_ours_is_told(heard: list[str]) -> None:
    """A manager that contrives to vote after us: the abort says that we have committed, not that all is well."""
    manager = transaction.TransactionManager()
    ours = CoordlibDataManager(lambda: None, lambda: heard.append("rolled back"), manager=manager)
    ours.tpc_vote(None)
    with pytest.raises(BranchHeuristic) as heuristic:
        ours.tpc_abort(None)
    assert heuristic.value.finish is Finish.HEURISTIC_COMMIT
    assert heard == []


# -- theirs in ours


def _begin(names: Names) -> ZopeBranch:
    zope = Zope("site", accepts_loss=True)
    zope.open(names.cluster)
    return zope.begin(names.gtid(), names.bqual("site"), names.remaining_s)


def test_a_task_s_transaction_is_refused() -> None:
    """Nobody would await its commit, and Zope would take it for done."""

    async def commit() -> None: ...

    with pytest.raises(FlavourError, match="threads"):
        CoordlibDataManager(commit, commit)


def test_loss_has_to_be_accepted_by_name(names: Names) -> None:
    """A vote that dies with its process is no promise."""
    with pytest.raises(UsageError, match="accepts_loss=True"):
        Zope("site", accepts_loss=False)
    resource: Resource = Zope("site", accepts_loss=True)
    branch: Branch = _begin(names)
    gone = PreparedBranch(names.gtid(), branch.bqual, "")
    assert resource.prepared() == []
    assert resource.finish(gone, True) is Finish.HAZARD
    assert resource.finish(gone, False) is Finish.ALREADY


def test_data_managers_vote_and_finish(heard: list[str], names: Names) -> None:
    """In their own order, each phase for all."""
    branch = _begin(names)
    for name in "ba":
        branch.transaction.join(Manager(heard, name))
    assert branch.prepare() is Vote.YES
    assert heard == [f"{name} {phase}" for phase in ("tpc_begin", "commit", "tpc_vote") for name in "ab"]
    branch.commit()
    branch.commit()
    assert heard[6:] == ["a tpc_finish", "b tpc_finish"]


def test_data_managers_that_roll_back(heard: list[str], names: Names) -> None:
    """Before the vote and after it, once."""
    for phase, votes in (("abort", False), ("tpc_abort", True)):
        branch = _begin(names)
        branch.transaction.join(Manager(heard))
        if votes:
            branch.prepare()
        heard.clear()
        branch.rollback()
        branch.rollback()
        assert heard == [f"m {phase}"]
    with pytest.raises(BranchFailed):
        branch.prepare()


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        ("tpc_begin", ["a tpc_begin", "a tpc_abort", "b abort"]),
        ("tpc_vote", ["a tpc_vote", "a tpc_abort", "b tpc_abort"]),
    ],
)
def test_a_data_manager_that_votes_no(heard: list[str], names: Names, phase: str, told: list[str]) -> None:
    """Everybody hears of it, by what it has been asked before; what the error was is kept."""
    branch = _begin(names)
    branch.transaction.join(Manager(heard, "a", fails=phase))
    branch.transaction.join(Manager(heard, "b"))
    with pytest.raises(BranchFailed) as failed:
        branch.prepare()
    assert heard[-3:] == told
    assert branch.resource.is_conflict(failed.value)
    assert not branch.resource.is_conflict(ValueError())
    branch.rollback()
    assert heard[-3:] == told


def test_one_phase_and_nobody(heard: list[str], names: Names) -> None:
    """Without data managers there is nothing to be done."""
    branch = _begin(names)
    branch.transaction.join(Manager(heard))
    branch.commit_one_phase()
    assert heard[-1] == "m tpc_finish"
    assert _begin(names).prepare() is Vote.READ_ONLY


def test_a_data_manager_that_does_not_finish_is_a_hazard(heard: list[str], names: Names) -> None:
    """The others finish all the same."""
    branch = _begin(names)
    branch.transaction.join(Manager(heard, "a", fails="tpc_finish"))
    branch.transaction.join(Manager(heard, "b"))
    branch.prepare()
    with pytest.raises(BranchHeuristic) as heuristic:
        branch.commit()
    assert heuristic.value.finish is Finish.HAZARD
    assert heard[-1] == "b tpc_finish"


def test_its_transaction_is_not_theirs_to_end(names: Names) -> None:
    """Committing it is ours."""
    branch = _begin(names)
    for end in (branch.transaction.commit, branch.transaction.abort):
        with pytest.raises(UsageError, match="a branch of a coordlib transaction"):
            end()
    with pytest.raises(InvariantViolation):
        branch.commit()
