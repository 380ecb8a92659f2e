"""Zope's `transaction` package, both ways.

A coordlib transaction in a Zope transaction (`CoordlibDataManager`): Zope asks everybody to vote and then to finish, and
keeps no decision. Ours votes last and commits then: if it does not, everybody else aborts. What Zope cannot promise
stays so: if the process dies between our commit and the others' finishing, theirs is lost.

Zope data managers in a coordlib transaction (`Zope`): they vote as branches do, but nobody can finish them after their
process has died, so a vote of theirs is no durable promise. That has to be accepted by name; what is lost so is
recorded as a hazard.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from coordlib.errors import FlavourError, UsageError, invariant
from coordlib.txn.branches import BranchFailed, BranchHeuristic, Finish, PreparedBranch, Vote
from coordlib.txn.gtid import text_of
from coordlib.txn.resources.common import ResourceBase, missing_driver

try:
    import transaction
except ImportError as exc:  # pragma: no cover - the test environment has it
    raise missing_driver(__name__, "Zope's package `transaction`", "zope") from exc
from transaction.interfaces import IDataManager
from zope.interface import implementer

__all__ = ["CoordlibDataManager", "Zope", "ZopeBranch"]

_LAST: Final = "\U0010ffff coordlib"


@implementer(IDataManager)  # type: ignore[untyped-decorator, unused-ignore]
class CoordlibDataManager:
    """
    Ends a coordlib transaction as the Zope transaction ends that it has joined.

    Args:
        commit: Of the coordlib transaction. It is called when everybody else has voted yes.
        rollback: Of the coordlib transaction.
        manager: Whose current transaction is joined; None: the thread's.

    Raises:
        FlavourError: They are a task's, and nobody would await them.
    """

    def __init__(
        self, commit: Callable[[], object], rollback: Callable[[], object], *, manager: Any = None
    ) -> None:
        if inspect.iscoroutinefunction(commit) or inspect.iscoroutinefunction(rollback):
            raise FlavourError("Zope's transactions are for threads: give the methods of a plain transaction")
        self.transaction_manager = transaction.manager if manager is None else manager
        self._commit = commit
        self._rollback = rollback
        self._state = "active"  # committed, ended
        self.transaction_manager.get().join(self)

    def sortKey(self) -> str:
        """After everybody."""
        return _LAST

    def abort(self, transaction: Any) -> None:
        self._give_up()

    def tpc_begin(self, transaction: Any) -> None:
        pass

    def commit(self, transaction: Any) -> None:
        pass

    def tpc_vote(self, transaction: Any) -> None:
        """Commit. Its errors are the vote's; after an unknown outcome the others abort, and the error says what to ask."""
        self._state = "ended"  # whatever it raises: there is nothing left to roll back
        self._commit()
        self._state = "committed"

    def tpc_finish(self, transaction: Any) -> None:
        self._state = "ended"

    def tpc_abort(self, transaction: Any) -> None:
        """
        Raises:
            BranchHeuristic: Somebody voted no after us, who have committed.
        """
        if self._state == "committed":
            self._state = "ended"
            raise BranchHeuristic(
                Finish.HEURISTIC_COMMIT,
                "the coordlib transaction is committed, and another data manager aborted after it had voted yes",
            )
        self._give_up()

    def should_retry(self, error: BaseException) -> bool:
        """What Zope's `attempts()` asks."""
        return bool(getattr(error, "retryable", False))

    def _give_up(self) -> None:
        if self._state == "active":
            self._state = "ended"
            self._rollback()


class Zope(ResourceBase):
    """
    Data managers as a resource.

    Args:
        accepts_loss: Must be True: a branch whose process dies after it voted YES is lost though the transaction is
            committed, and recorded as a hazard.
    """

    def __init__(self, name: str, *, accepts_loss: bool) -> None:
        super().__init__(name)
        if not accepts_loss:
            raise UsageError(
                f"nobody can finish the data managers of {name!r} when their process has died: say accepts_loss=True if "
                "a lost part of a committed transaction can be repaired, or join ours to the Zope transaction"
            )

    def __repr__(self) -> str:
        return f"<Zope {self.name!r}>"

    def open(self, cluster: bytes) -> None:
        self._cluster = cluster

    def close(self) -> None:
        """Nothing is kept."""

    def is_conflict(self, error: BaseException) -> bool:
        """Zope's transient errors, of which a database's conflicts are."""
        while isinstance(error, BranchFailed) and error.__cause__ is not None:
            error = error.__cause__
        return isinstance(error, transaction.interfaces.TransientError)

    def begin(self, gtid: bytes, bqual: bytes, remaining_s: Callable[[], float]) -> ZopeBranch:
        """A branch whose `transaction` data managers join."""
        return ZopeBranch(self, gtid, self.check_bqual(bqual))

    def prepared(self) -> list[PreparedBranch]:
        """None that anybody could find."""
        return []

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        """Of a process that has died: what had not finished is gone; whether it had, nobody can say."""
        return Finish.HAZARD if commit else Finish.ALREADY


class _Transaction(transaction.Transaction):  # type: ignore[misc, unused-ignore]
    """A Zope transaction whose phases somebody else runs: committing it by itself is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.managers: list[Any] = []

    def join(self, resource: Any) -> None:
        self.managers.append(resource)

    def commit(self) -> None:
        raise UsageError("this Zope transaction is a branch of a coordlib transaction, which commits it")

    def abort(self) -> None:
        raise UsageError("this Zope transaction is a branch of a coordlib transaction, which aborts it")


class ZopeBranch:
    """Data managers in one transaction: `transaction.join(manager)`."""

    is_last_resource = False

    def __init__(self, resource: Zope, gtid: bytes, bqual: bytes) -> None:
        self._resource = resource
        self._gtid = gtid
        self._bqual = bqual
        self._state = "active"  # prepared, ended
        self.transaction: Any = _Transaction()

    def __repr__(self) -> str:
        return f"<branch of {text_of(self._gtid)} in {self._resource.name!r}, {self._state}>"

    @property
    def resource(self) -> Zope:
        return self._resource

    @property
    def bqual(self) -> bytes:
        return self._bqual

    @property
    def connection(self) -> Any:
        """What the application works with: the transaction that data managers join."""
        return self.transaction

    def prepare(self) -> Vote:
        if self._state == "ended":
            raise BranchFailed(f"the branch in {self._resource.name!r} has been rolled back")
        managers = sorted(self.transaction.managers, key=lambda manager: str(manager.sortKey()))
        if not managers:
            self._state = "ended"
            return Vote.READ_ONLY
        begun: list[Any] = []
        try:
            for manager in managers:
                begun.append(manager)
                manager.tpc_begin(self.transaction)
            for phase in ("commit", "tpc_vote"):
                for manager in managers:
                    getattr(manager, phase)(self.transaction)
        except Exception as exc:
            self._state = "ended"
            # Each is told, whatever another says; what fails here has its part to lose, and says so itself.
            for manager in begun:
                _quietly(manager.tpc_abort, self.transaction)
            for manager in managers[len(begun) :]:
                _quietly(manager.abort, self.transaction)
            raise BranchFailed(f"a data manager of {self._resource.name!r} voted no: {exc}") from exc
        self.transaction.managers = managers
        self._state = "prepared"
        return Vote.YES

    def commit_one_phase(self) -> None:
        if self.prepare() is Vote.YES:
            self.commit()

    def commit(self) -> None:
        if self._state == "ended":
            return
        invariant(self._state == "prepared", "commit of a branch that is %s", self._state)
        self._state = "ended"
        failed = [
            error
            for manager in self.transaction.managers
            if (error := _quietly(manager.tpc_finish, self.transaction))
        ]
        if failed:
            raise BranchHeuristic(
                Finish.HAZARD,
                f"{len(failed)} data managers of {self._resource.name!r} did not finish: {failed[0]!r}",
            ) from failed[0]

    def rollback(self) -> None:
        state, self._state = self._state, "ended"
        for manager in self.transaction.managers if state != "ended" else ():
            _quietly(manager.tpc_abort if state == "prepared" else manager.abort, self.transaction)


def _quietly(work: Callable[[Any], object], argument: Any) -> Exception | None:
    try:
        work(argument)
    except Exception as exc:
        return exc
    return None
