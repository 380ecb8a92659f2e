"""What recovery finds when others were at work at the same time, or ended before they could say what they had done."""

from __future__ import annotations

import pytest

from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.machine.limits import Limits
from coordlib.node.operations import Success
from coordlib.txn.branches import Finish, PreparedBranch
from coordlib.txn.commit import Unfinished, commit_gen
from coordlib.txn.gtid import mint_ms_of, resource_tag
from coordlib.txn.journal import JournalBranch, JournalResource, MemoryJournal
from coordlib.txn.members import Ending, obeyed
from coordlib.txn.recovery import complete_gen, recover_gen, sweep_gen
from coordlib.txn.service import Answer, RemoteMember, Status
from coordlib.txn.transaction import State
from tests.txn.model import Choices, ModelResource, World


def pending(world: World) -> list[bytes]:
    """Branches that the log still remembers."""
    rows = world.driver.ask(commands.query_tx_state(world.gtid))[5]
    return [bqual for _, _, bqual in rows]


def committed(world: World) -> World:
    """A transaction of two stores that all have obeyed; nobody has said so."""
    for store in world.stores:
        world.enlist(store)
    world.run(commit_gen(world.tx, world.context), with_faults=False)
    world.forgotten.clear()
    return world


def test_what_has_obeyed_is_forgotten_although_nobody_said_so() -> None:
    """Whoever was to say it has crashed. Looked at is what was pending the last time, too; nothing is done twice."""
    world = committed(World(Choices((), 0)))
    stores = {store.name: store for store in world.stores}
    assert len(pending(world)) == 2
    seen = world.run(sweep_gen(stores, "n1", (), world.agent), with_faults=False)
    assert (len(seen), world.forgotten) == (2, [])
    assert world.run(sweep_gen(stores, "n1", seen, world.agent), with_faults=False) == seen
    world.apply(world.other, commands.tx_forget(world.forgotten))
    assert pending(world) == []
    assert world.run(sweep_gen(stores, "n1", seen, world.agent), with_faults=False) == frozenset()


def test_a_committed_branch_that_nobody_was_told_of_is_committed_by_the_sweep() -> None:
    """It is pending and prepared: the same as if recovery had found it in its store."""
    world = World(Choices((), 0))
    branches = [world.enlist(store) for store in world.stores]
    world.run(commit_gen(world.tx, world.context, until_applied=False), with_faults=False)
    stores = {store.name: store for store in world.stores}
    seen = world.run(sweep_gen(stores, "n1", (), world.agent), with_faults=False)
    world.run(sweep_gen(stores, "n1", seen, world.agent), with_faults=False)
    assert [branch.state for branch in branches] == ["committed", "committed"]
    assert sorted(world.forgotten) == sorted(seen)


def test_only_the_node_that_has_a_journal_says_what_is_in_it() -> None:
    """The journal of another node's service of the same name knows nothing of the branch: no proof that it has obeyed."""
    world = World(Choices((), 0))
    journal = JournalResource("stock", MemoryJournal(), None)  # type: ignore[arg-type]  # nothing of it is prepared
    participant = (journal.name, "n2", b"branch-xx")
    body = commands.tx_decide(world.gtid, world.tx.deadline_ms, participants=[participant])
    world.apply(world.session, body)
    resources = {journal.name: journal}
    assert world.run(sweep_gen(resources, "n1", (), world.agent), with_faults=False) == frozenset()
    seen = world.run(sweep_gen(resources, "n2", (), world.agent), with_faults=False)
    assert seen == {(world.gtid, b"branch-xx")}
    world.run(sweep_gen(resources, "n2", seen, world.agent), with_faults=False)
    assert world.forgotten == [(world.gtid, b"branch-xx")]


def test_a_service_that_had_obeyed_before_need_not_be_remembered() -> None:
    """The answer to the first COMMIT was lost; to the second one it no longer says which branches it had."""
    member = RemoteMember("stock", 7, b"g" * 16, 0, 9000)
    vote = Answer(Status.VOTED, [["service:stock", "n2", b"one"], ["orders", "n2", b"two"]])
    member.read_vote(Success(vote.encode()))
    ending = member.read_ending(True, Success(Answer(Status.ENDED, [[], []]).encode()))
    assert ending.is_done
    assert obeyed(member, ending) == (b"one", b"two")
    odd = Answer(Status.ENDED, [[], [[b"two", "heuristic-rollback"]]])
    assert obeyed(member, member.read_ending(True, Success(odd.encode()))) == (b"one",)
    assert obeyed(member, Ending(False, ended=(b"two",))) == (b"two",)


class Hurried(ModelResource):
    """Somebody else commits everything as soon as it has been listed once."""

    def prepared(self) -> list[PreparedBranch]:
        found = super().prepared()
        for branch in self.branches.values():
            branch.state = "committed"
        return found


def test_what_was_ended_since_it_was_found_is_no_heuristic() -> None:
    """
    A last resource removes its marker when nobody is in doubt any more. Who found a branch before that, and asks after
    it, is told "not committed", and must not take a branch that is gone for one that somebody ended by hand.
    """
    world = World(Choices((), 0))
    store = Hurried(world, "orders")
    world.tx.set_decider(resource_tag("local"))
    branch = world.enlist(store)
    branch.state = "prepared"
    world.is_at_work = False
    recovered = world.run(recover_gen(store, world.agent), with_faults=False)
    assert (recovered.heuristics, recovered.rolled_back, recovered.in_doubt) == (0, 0, ())
    assert branch.state == "committed"


class Busy(ModelResource):
    """The first branch that is to be finished cannot be, for now."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.held: bytes | None = None

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        if self.held is None or self.held == branch.bqual:
            self.held = branch.bqual
            raise OSError("its connection still has it")
        return super().finish(branch, commit)


def test_a_branch_that_cannot_be_finished_keeps_no_other_waiting() -> None:
    """It is in doubt until the next search, and those behind it are finished in this one."""
    world = World(Choices((), 0))
    store = Busy(world, "orders")
    for _ in range(2):
        world.enlist(store).state = "prepared"
    participants = [(store.name, "n1", bqual) for bqual in store.branches]
    world.apply(
        world.session, commands.tx_decide(world.gtid, world.tx.deadline_ms, participants=participants)
    )
    world.is_at_work = False
    recovered = world.run(recover_gen(store, world.agent), with_faults=False)
    assert (recovered.committed, len(recovered.in_doubt)) == (1, 1)
    assert recovered.in_doubt[0].branch.bqual == store.held
    assert "its connection still has it" in recovered.in_doubt[0].why
    pending = frozenset((world.gtid, bqual) for bqual in store.branches)
    store.held = None
    world.run(sweep_gen({store.name: store}, "n1", pending, world.agent), with_faults=False)
    assert sorted(branch.state for branch in store.branches.values()) == ["committed", "prepared"]
    store.held = b""
    again = world.run(recover_gen(store, world.agent), with_faults=False)
    assert (again.committed, again.in_doubt) == (1, ())


def test_an_outcome_that_is_no_longer_kept_is_presumed_by_nobody() -> None:
    """T6: of what was minted before the horizon nothing is known, and only people can say how it ended."""
    world = World(Choices((), 0))
    branch = world.enlist(world.stores[0])
    branch.state = "prepared"
    world.driver.machine._transactions.horizon_ms = mint_ms_of(world.gtid) + 1
    recovered = world.run(recover_gen(world.stores[0], world.agent), with_faults=False)
    assert [found.branch.bqual for found in recovered.in_doubt] == [branch.bqual]
    assert (recovered.rolled_back, recovered.committed, branch.state) == (0, 0, "prepared")


@pytest.mark.parametrize(
    ("ending", "state"), [(Finish.HEURISTIC_COMMIT, "committed"), (Finish.HEURISTIC_ROLLBACK, "rolled back")]
)
def test_where_nobody_knows_the_outcome_what_people_have_said_is_obeyed(ending: Finish, state: str) -> None:
    """For the branch that they have named, and no other: one in a service's journal has nobody else who could end it."""
    world = World(Choices((), 0))
    branches = [world.enlist(world.stores[0]) for _ in range(2)]
    for branch in branches:
        branch.state = "prepared"
    world.driver.run(world.other, commands.tx_skip(mint_ms_of(world.gtid) + 1))
    if ending is Finish.HEURISTIC_COMMIT:
        world.last.markers.add(world.gtid)  # it is what had been decided in the log that is lost
        world.tx.decider_tag = world.last.tag
    world.driver.run(
        world.other, commands.tx_heuristic(world.gtid, branches[0].bqual, ending.value, "people")
    )
    recovered = world.run(recover_gen(world.stores[0], world.agent), with_faults=False)
    assert (recovered.committed + recovered.rolled_back, len(recovered.in_doubt)) == (1, 1)
    assert [branch.state for branch in branches] == [state, "prepared"]


@pytest.mark.parametrize("lifetime_ms", [50, 600_000])
def test_what_a_living_initiator_has_left_ends_although_nothing_is_written(lifetime_ms: int) -> None:
    """
    In a cluster at rest the time of the last entry stands still. What counts is the time that would be logged now, and
    this cluster's own longest life of a transaction.
    """
    world = World(Choices((), 0), Limits(tx_lifetime_ms=lifetime_ms))
    branch = world.enlist(world.stores[0])
    branch.state = "prepared"
    world.driver.now_ms += lifetime_ms
    recovered = world.run(recover_gen(world.stores[0], world.agent), with_faults=False)
    assert [found.why for found in recovered.in_doubt] == ["not decided yet, and its initiator is alive"]
    world.driver.now_ms += 1
    recovered = world.run(recover_gen(world.stores[0], world.agent), with_faults=False)
    assert (recovered.rolled_back, recovered.in_doubt, branch.state) == (1, (), "rolled back")


class Kept:
    """A handler that keeps nothing."""

    def prepare(self, work: object) -> bytes | None:
        return b"redo"

    def restore(self, redo: bytes) -> None:
        pass

    def commit(self, redo: bytes) -> None:
        raise AssertionError("nobody has decided that")

    def abort(self, redo: bytes) -> None:
        pass


def test_a_promise_in_a_journal_waits_for_its_own_deadline_and_not_longer() -> None:
    """The journal knows it; so a service that was restarted does not hold what it promised for ten minutes."""
    world = World(Choices((), 0))
    resource = JournalResource("stock", MemoryJournal(id=b"j"), Kept())
    deadline_ms = world.tx.deadline_ms
    branch = JournalBranch(resource, world.gtid, world.tx.name_branch(resource.tag), deadline_ms, None)
    branch.prepare()
    world.driver.now_ms = deadline_ms
    assert len(world.run(recover_gen(resource, world.agent), with_faults=False).in_doubt) == 1
    world.driver.now_ms = deadline_ms + 1
    assert world.run(recover_gen(resource, world.agent), with_faults=False).rolled_back == 1
    assert resource.prepared() == []


def test_a_commit_in_one_phase_that_was_interrupted_is_not_called_aborted() -> None:
    """The log knows nothing of it and must not be asked: asked, it would say "aborted" of what may be committed."""
    world = World(Choices((), 0))
    world.enlist(world.stores[0])
    operation = commit_gen(world.tx, world.context)
    next(operation)  # its commit is under way
    operation.close()
    (left,) = world.left
    assert world.run(complete_gen(left, world.agent), with_faults=False)
    assert world.outcome == TxStatus.NONE
    assert world.tx.state is State.UNKNOWN


def test_who_has_read_only_is_not_told_to_commit() -> None:
    """Its branch has ended with its vote: only what was promised is told how it ended."""
    world = World(Choices((), 0))
    branches = [world.enlist(store) for store in world.stores]
    members = tuple(world.tx.members)
    members[0].read_vote(Success(branches[0].prepare()))
    branches[1].state = "read-only"
    participants = members[0].participants
    world.apply(
        world.session, commands.tx_decide(world.gtid, world.tx.deadline_ms, participants=participants)
    )
    unfinished = Unfinished(world.gtid, None, members)
    assert world.run(complete_gen(unfinished, world.agent), with_faults=False)
    assert [branch.state for branch in branches] == ["committed", "read-only"]
    assert not branches[1].was_asked_to_commit
