"""Commit, abort and recovery in every order of failures: the production generators over the production machine."""

from __future__ import annotations

import pytest

from coordlib.errors import CoordError, TransactionAborted, TransactionOutcomeUnknown
from coordlib.machine.commands import TxStatus
from coordlib.txn.commit import commit_gen
from coordlib.txn.members import LocalMember
from coordlib.txn.transaction import Decided
from tests.txn.model import Choices, Crashed, World, explore


def commit(world: World, *, until_applied: bool) -> Decided | CoordError | None:
    """Commit, with anything that may happen meanwhile; None: the initiator crashed."""
    try:
        result: Decided = world.run(commit_gen(world.tx, world.context, until_applied=until_applied))
    except Crashed:
        return None
    except CoordError as error:
        world.check_nothing_is_left()
        return error
    if until_applied:
        world.check_nothing_is_left()
    return result


@pytest.mark.parametrize("until_applied", [True, False])
@pytest.mark.parametrize("has_writes", [True, False])
def test_two_branches_end_alike_whatever_fails(until_applied: bool, has_writes: bool) -> None:
    """T1, T2, T4, T5, T6: votes, lost answers, crashes, recoverers, deadlines and late commands, in every order."""
    seen: dict[str, int] = {}

    def scenario(choices: Choices) -> None:
        world = World(choices)
        for store in world.stores:
            world.enlist(store)
        if has_writes:
            world.write()
        result = commit(world, until_applied=until_applied)
        world.settle()
        world.check(result)
        name = type(result).__name__
        seen[name] = seen.get(name, 0) + 1

    runs = explore(scenario, 2)
    assert runs > 300
    # All of it was met: committed, aborted, unknown, crashed.
    assert {"Decided", "TransactionAborted", "TransactionOutcomeUnknown", "NoneType"} <= set(seen)


@pytest.mark.parametrize("until_applied", [True, False])
def test_one_branch_with_replicated_changes_ends_as_they_do(until_applied: bool) -> None:
    """One database and a map: prepared, decided and told; or neither."""

    def scenario(choices: Choices) -> None:
        world = World(choices)
        world.enlist(world.stores[0])
        world.write()
        result = commit(world, until_applied=until_applied)
        world.settle()
        world.check(result)

    assert explore(scenario, 3 if until_applied else 2) > 100


def test_one_branch_alone_is_committed_in_one_phase() -> None:
    """No entry in the log, nothing prepared; an answer that was lost is said to be unknown."""

    def scenario(choices: Choices) -> None:
        world = World(choices)
        branch = world.enlist(world.stores[0])
        before = world.driver.index
        result = commit(world, until_applied=True)
        if not choices.taken or not any(choices.taken):
            assert isinstance(result, Decided)
        if not world.is_crashed and world.outcome == TxStatus.NONE:
            assert world.driver.index == before
            assert world.counters.get("log_entries", 0) == 0
        world.settle()
        assert branch.state in ("committed", "rolled back")
        if isinstance(result, Decided):
            assert branch.state == "committed"
        elif isinstance(result, TransactionAborted):
            assert branch.state == "rolled back"
        else:
            assert result is None or isinstance(result, TransactionOutcomeUnknown)

    assert explore(scenario, 4) > 20


def test_a_reader_and_a_writer_need_no_entry_in_the_log() -> None:
    """The one that is expected to read only is asked first; if it has written after all, the log decides."""
    shortcuts: dict[str, int] = {}

    def scenario(choices: Choices) -> None:
        world = World(choices)
        reader, writer = (world.enlist(store) for store in world.stores)
        member = world.tx.members[0]
        assert isinstance(member, LocalMember)
        member.expects_read_only = True
        result = commit(world, until_applied=True)
        world.settle()
        for name, number in world.counters.items():
            shortcuts[name] = shortcuts.get(name, 0) + number
        if world.counters.get("dynamic_one_phase"):
            assert reader.state == "read-only"
            assert writer.state in ("committed", "rolled back")
            if isinstance(result, Decided):
                assert writer.state == "committed"
            elif isinstance(result, TransactionAborted):
                assert writer.state == "rolled back"
        else:
            world.check(result)

    assert explore(scenario, 2) > 300
    assert shortcuts["dynamic_one_phase"] > 10
    assert shortcuts["two_phase"] > 10


def test_the_last_resource_decides_for_all() -> None:
    """T4: it commits with its marker after all others have promised; whoever is in doubt asks it, never the log."""
    seen: dict[str, int] = {}

    def scenario(choices: Choices) -> None:
        world = World(choices)
        last = world.enlist(world.last, is_last=True)
        world.enlist(world.stores[0])
        world.enlist(world.stores[1])
        result = commit(world, until_applied=True)
        was_decided = bool(world.last.markers)
        world.settle()
        seen[type(result).__name__] = seen.get(type(result).__name__, 0) + 1
        assert world.outcome == TxStatus.NONE or world.is_crashed  # nobody resolved it in the log
        states = {branch.state for branch in world.branches}
        assert states <= {"committed", "rolled back", "read-only"}
        assert not {"committed", "rolled back"} <= states
        if isinstance(result, Decided):
            assert last.state == "committed"
        elif isinstance(result, TransactionAborted):
            assert last.state == "rolled back"
        if was_decided:
            assert last.state == "committed"

    assert explore(scenario, 2) > 300
    assert {"Decided", "TransactionAborted", "NoneType"} <= set(seen)
