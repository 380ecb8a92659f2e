"""Services that take part: whatever is lost, late, doubled or out of order, each does its part once or not at all."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from coordlib.errors import CallTimeout, CoordError, ServiceUnreachable, TransactionAborted
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.operations import Do, Failure, OpGen, Step, Success, Together
from coordlib.txn.commit import commit_gen
from coordlib.txn.gtid import join_gtid, node_tag
from coordlib.txn.journal import JournalBranch, JournalResource, MemoryJournal
from coordlib.txn.participant import Participants, Work
from coordlib.txn.recovery import recover_gen
from coordlib.txn.service import Answer, RemoteMember, Status, Verb, Wish, decode_answer, decode_wish
from coordlib.txn.transaction import Decided
from coordlib.wire.messages import RequestKind
from tests.txn.model import Choices, Crashed, ModelBranch, World, explore


class Shelf:
    """A service's handlers: pieces are reserved at prepare and leave at commit. What has left is on a disk."""

    def __init__(self, gone: list[bytes]) -> None:
        self.reserved: set[bytes] = set()
        self.gone = gone

    def prepare(self, work: object) -> bytes | None:
        assert isinstance(work, Work)
        pieces: list[bytes] = work.notes.get("pieces", [])
        if not pieces:
            return None
        self.reserved.add(b"".join(pieces))
        return b"".join(pieces)

    def restore(self, redo: bytes) -> None:
        self.reserved.add(redo)

    def commit(self, redo: bytes) -> None:
        if redo not in self.gone:
            self.gone.append(redo)
        self.reserved.discard(redo)

    def abort(self, redo: bytes) -> None:
        assert redo not in self.gone
        self.reserved.discard(redo)


class Site:
    """A process that hosts a service, over its restarts."""

    def __init__(self, world: Services, name: str) -> None:
        self.world = world
        self.name = name
        self.journal = MemoryJournal()
        self.gone: list[bytes] = []
        self.session = 0
        self.start()

    def start(self) -> None:
        self.session += 1
        self.shelf = Shelf(self.gone)
        self.resource = JournalResource(self.name, self.journal, self.shelf)
        self.resource.start()
        self.participants = Participants(self.name, node_tag(self.name), self.world.agent, nullcontext())

    def execute(self, work: Work, operation: str, payload: bytes) -> Do:
        def run() -> bytes:
            if operation == "fail":
                raise ValueError("no such piece")
            pieces = work.notes.setdefault("pieces", [])
            if not work.members:
                bqual = work.name_branch(self.resource.tag)
                work.enlist(JournalBranch(self.resource, work.gtid, bqual, work.deadline_ms, work))
            pieces.append(payload)
            return b"ok"

        return Do(run)

    def answer(self, body: bytes) -> bytes:
        wish = decode_wish(body)
        answer = run_here(self.world, self.participants.handle_gen(wish, 5000, self.execute))
        assert isinstance(answer, Answer)
        return answer.encode()


def run_here(world: Services, operation: OpGen[Any]) -> Any:
    """Run an operation of a service, in which nothing else happens meanwhile."""
    try:
        step = next(operation)
        while True:
            if isinstance(step, Together):
                result: Any = [world.outcome_of(each, False) for each in step.operations]
            else:
                try:
                    result = world.effect(step, False)
                except Exception as error:
                    step = operation.throw(error)
                    continue
            step = operation.send(result)
    except StopIteration as stop:
        return stop.value


class Services(World):
    """Two services, and a way between them and the initiator on which everything happens to messages."""

    def __init__(self, choices: Choices) -> None:
        super().__init__(choices)
        self.sites = {name: Site(self, name) for name in ("shelf", "till")}
        self.late_calls: list[tuple[Site, int, bytes]] = []

    def site_of(self, target: int) -> Site:
        return list(self.sites.values())[target]

    def join(self, name: str) -> RemoteMember:
        target = list(self.sites).index(name)
        member = RemoteMember(name, target, self.gtid, target, self.tx.deadline_ms)
        self.tx.members.append(member)
        return member

    def effect(self, operation: Step | Do | Together, with_faults: bool) -> Any:
        if not isinstance(operation, Step) or operation.kind != RequestKind.CALL:
            return super().effect(operation, with_faults)
        site = self.site_of(operation.target)
        if not with_faults:
            return site.answer(operation.body)
        pick = self.choices.choose(6)
        if pick == 1:
            site.answer(operation.body)
            raise CallTimeout("the answer was lost")
        if pick == 2:
            self.late_calls.append((site, site.session, operation.body))
            raise CallTimeout("it is still on its way")
        if pick == 3:
            raise ServiceUnreachable("no way")
        if pick == 4:
            self.late_calls.append((site, site.session, operation.body))  # and a copy comes later
        if pick == 5:
            site.start()
            raise ServiceUnreachable("that session has ended")
        return site.answer(operation.body)

    def meanwhile(self) -> None:
        """What else happens before the initiator goes on."""
        pick = self.choices.choose(6)
        if pick == 1:
            self.crash()
            raise Crashed
        if pick == 2 and self.late_calls:
            self.deliver_late()
        elif pick == 3:
            self.driver.now_ms += 1500
            self.inquire()
        elif pick == 4 and not self.is_overdue:
            self.is_overdue = True
            self.driver.now_ms += 6000
            self.inquire()
        elif pick == 5 and self.late:
            self.apply(self.session, self.late.pop(0))

    def deliver_late(self) -> None:
        site, session, body = self.late_calls.pop(0)
        if site.session == session:
            site.answer(body)

    def inquire(self) -> None:
        """Whatever is due by itself in the services."""
        for site in self.sites.values():
            for work in site.participants.due():
                run_here(self, site.participants.inquire_gen(work))

    def settle(self) -> None:
        is_first = self.choices.choose(2) == 0
        if is_first:
            self._deliver_all()
        super().settle()
        self._deliver_all()
        for _ in range(3):
            self.driver.now_ms += 10_000
            self.inquire()
        for site in self.sites.values():
            recovered = run_here(self, recover_gen(site.resource, self.agent))
            assert not recovered.in_doubt
            site.resource.obey_again()
        self.apply(self.other, commands.tx_forget(self.forgotten))

    def _deliver_all(self) -> None:
        while self.late_calls:
            self.deliver_late()


def ordering(world: Services, names: list[str], until_applied: bool = True) -> OpGen[Decided]:
    """What an application does: calls of each service, then commit. A call that fails ends it."""
    for name in names:
        member = world.join(name)
        for piece in (b"ab",) if len(names) > 1 else (b"a", b"b"):
            answer = decode_answer((yield member.call("take", piece, world.tx.expires_ms)))
            if answer.status not in (Status.RETURNED, Status.READ):
                world.tx.doomed = "a call failed"
    return (yield from commit_gen(world.tx, world.context, until_applied=until_applied))


def run_scenario(world: Services, names: list[str]) -> Decided | CoordError | None:
    try:
        result: Decided = world.run(ordering(world, names))
    except Crashed:
        return None
    except CoordError as error:
        return error
    return result


@pytest.mark.parametrize("names", [["shelf", "till"], ["shelf"]])
def test_services_do_their_part_once_or_not_at_all(names: list[str]) -> None:
    """T2, T3, T7: calls, votes and outcomes lost, late and doubled; services that restart; an initiator that crashes."""
    seen: dict[str, int] = {}

    def scenario(choices: Choices) -> None:
        world = Services(choices)
        if len(names) == 1:
            world.write()
        result = run_scenario(world, names)
        world.settle()
        seen[type(result).__name__] = seen.get(type(result).__name__, 0) + 1
        gone = [world.sites[name].gone for name in names]
        assert all(found in ([], [b"ab"]) for found in gone)
        assert all(found == gone[0] for found in gone)
        is_committed = gone[0] == [b"ab"]
        assert is_committed == world.is_decided()
        for site in world.sites.values():
            assert site.shelf.reserved == set()
            assert site.participants.works == {}
            assert site.journal.records(site.name) == []
        if isinstance(result, Decided):
            assert is_committed
        elif isinstance(result, TransactionAborted):
            assert not is_committed

    assert explore(scenario, 2) > 500
    assert {"Decided", "TransactionAborted", "NoneType"} <= set(seen)


def test_one_service_alone_commits_in_one_phase() -> None:
    """One call more and no entry in the log; a lost answer is asked for again, not done again."""

    def scenario(choices: Choices) -> None:
        world = Services(choices)
        result = run_scenario(world, ["shelf"])
        if isinstance(result, Decided):
            assert world.counters.get("log_entries", 0) == 0
        world.settle()
        site = world.sites["shelf"]
        assert site.gone in ([], [b"ab"])
        assert (site.shelf.reserved, site.participants.works) == (set(), {})
        if isinstance(result, Decided):
            assert site.gone == [b"ab"]
        elif isinstance(result, TransactionAborted):
            assert site.gone == []

    assert explore(scenario, 2) > 100


@pytest.fixture
def world() -> Services:
    return Services(Choices((), 0))


def ask(world: Services, wish: Wish) -> Answer:
    answer = run_here(
        world, world.sites["shelf"].participants.handle_gen(wish, 5000, world.sites["shelf"].execute)
    )
    assert isinstance(answer, Answer)
    return answer


def wish(verb: Verb, seq: int, gtid: bytes = b"g" * 16, operation: str = "take") -> Wish:
    return Wish(verb, "shelf", gtid, 0, seq, 9000, b"", operation, b"a")


def test_a_late_prepare_after_an_abort_is_refused(world: Services) -> None:
    """Nothing comes to life again: not by a call, not by a vote, not when the abort came first."""
    assert ask(world, wish(Verb.ABORT, 0)).status == Status.ENDED
    assert ask(world, wish(Verb.CALL, 1)).status == Status.REFUSED
    assert ask(world, wish(Verb.PREPARE, 2)).status == Status.NO
    assert ask(world, wish(Verb.COMMIT, 2)).status == Status.REFUSED
    assert world.sites["shelf"].participants.works == {}


def test_the_same_again_is_answered_the_same(world: Services) -> None:
    """By seq: a call is run once, a vote is given once, and what is out of order is refused."""
    assert ask(world, wish(Verb.CALL, 2)).status == Status.REFUSED
    first = ask(world, wish(Verb.CALL, 1))
    assert ask(world, wish(Verb.CALL, 1)) == first
    assert ask(world, wish(Verb.PREPARE, 3)).status == Status.REFUSED
    vote = ask(world, wish(Verb.PREPARE, 2))
    assert vote.status == Status.VOTED
    assert ask(world, wish(Verb.PREPARE, 2)) == vote
    assert ask(world, wish(Verb.CALL, 3)).status == Status.REFUSED
    assert ask(world, wish(Verb.COMMIT, 2)).status == Status.ENDED
    assert ask(world, wish(Verb.COMMIT, 2)).status == Status.ENDED
    assert ask(world, wish(Verb.ABORT, 2)).status == Status.REFUSED
    assert world.sites["shelf"].gone == [b"a"]


def test_what_was_never_promised_is_not_committed(world: Services) -> None:
    """A commit without a vote is refused, not obeyed."""
    ask(world, wish(Verb.CALL, 1))
    assert ask(world, wish(Verb.COMMIT, 1)).status == Status.REFUSED
    assert world.sites["shelf"].gone == []


def test_a_handler_that_raised_votes_no(world: Services) -> None:
    """Whoever swallows its error cannot commit the half of it."""
    ask(world, wish(Verb.CALL, 1))
    answer = ask(world, wish(Verb.CALL, 2, operation="fail"))
    assert answer == Answer(Status.RAISED, ["ValueError", "no such piece"])
    assert ask(world, wish(Verb.PREPARE, 3)).status == Status.NO
    assert world.sites["shelf"].shelf.reserved == set()


def test_what_has_not_promised_ends_when_its_time_is_over(world: Services) -> None:
    """Then it has rolled back, and whatever still comes of it is refused."""
    ask(world, wish(Verb.CALL, 1))
    world.inquire()
    assert len(world.sites["shelf"].participants.works) == 1
    world.driver.now_ms += 5001
    world.inquire()
    assert world.sites["shelf"].participants.works == {}
    assert ask(world, wish(Verb.PREPARE, 2)).status == Status.NO


def test_what_has_promised_does_not_wait_for_an_initiator_that_says_nothing_beyond_its_time(
    world: Services,
) -> None:
    """It lives and does nothing, and neither does anybody else: nothing is written, and the time passes all the same."""
    site = world.sites["shelf"]
    gtid = world.gtid
    ask(world, wish(Verb.CALL, 1, gtid))
    assert ask(world, wish(Verb.PREPARE, 2, gtid)).status == Status.VOTED
    world.driver.now_ms = 9000  # the deadline
    world.inquire()
    assert len(site.participants.works) == 1
    world.driver.now_ms += 5000
    world.inquire()
    assert (site.participants.works, site.shelf.reserved) == ({}, set())
    assert world.driver.ask(commands.query_tx_state(gtid))[0] == TxStatus.ABORTED


def test_what_is_forgotten_is_not_begun_again() -> None:
    """Only the newest ended branches are remembered; of what began before the forgotten ones nothing is taken."""
    world = Services(Choices((), 0))
    site = world.sites["shelf"]
    site.participants = Participants("shelf", b"nt", world.agent, nullcontext(), ended_max=2)
    gtids = [join_gtid(1000 + i, 1, 0) for i in range(4)]
    for gtid in gtids:
        assert ask(world, wish(Verb.CALL, 1, gtid)).status in (Status.RETURNED, Status.READ)
        assert ask(world, wish(Verb.COMMIT_1P, 2, gtid)).status == Status.ENDED
    for gtid in gtids:
        assert ask(world, wish(Verb.CALL, 1, gtid)).status == Status.REFUSED
    assert ask(world, wish(Verb.CALL, 1, join_gtid(1004, 1, 0))).status in (Status.RETURNED, Status.READ)


def test_only_one_thing_of_a_branch_is_under_way(world: Services) -> None:
    """What comes meanwhile is to ask again; an abort that came is done afterwards."""
    site = world.sites["shelf"]
    answers: list[Answer] = []

    def execute(work: Work, operation: str, payload: bytes) -> Do:
        def run() -> bytes:
            answers.append(ask(world, wish(Verb.CALL, 1)))
            answers.append(ask(world, wish(Verb.ABORT, 1)))
            return b""

        return Do(run)

    answer = run_here(world, site.participants.handle_gen(wish(Verb.CALL, 1), 5000, execute))
    assert [item.status for item in answers] == [Status.BUSY, Status.BUSY]
    assert answer.status in (Status.RETURNED, Status.READ)
    assert site.participants.works == {}
    assert ask(world, wish(Verb.PREPARE, 2)).status == Status.NO


@pytest.mark.parametrize("is_committed", [True, False])
def test_one_that_could_only_prepare_is_not_called_committed_when_it_was_rolled_back(
    world: Services, is_committed: bool
) -> None:
    """
    Its answer to COMMIT_1P (a promise, as it has two branches) was lost, and it was told the outcome before it is asked
    again: that it has ended says nothing of how.
    """

    def execute(work: Work, operation: str, payload: bytes) -> Do:
        def run() -> bytes:
            for store in world.stores:
                work.enlist(ModelBranch(world, store, work.name_branch(store.tag)))
            return b""

        return Do(run)

    def told(verb: Verb, seq: int) -> Answer:
        operation = participants.handle_gen(wish(verb, seq, world.gtid), 5000, execute)
        answer: Answer = run_here(world, operation)
        return answer

    participants = world.sites["shelf"].participants
    assert told(Verb.CALL, 1).status == Status.RETURNED
    assert told(Verb.COMMIT_1P, 2).status == Status.VOTED
    if is_committed:
        world.apply(world.session, commands.tx_decide(world.gtid))
    assert told(Verb.COMMIT if is_committed else Verb.ABORT, 2).status == Status.ENDED
    assert told(Verb.COMMIT_1P, 2).status == (Status.ENDED if is_committed else Status.NO)


def test_what_was_rolled_back_says_so_when_it_is_to_commit(world: Services) -> None:
    """Its time was over: whoever wants it committed in one phase is told that it was not, and is left in no doubt."""
    ask(world, wish(Verb.CALL, 1))
    world.driver.now_ms += 5001
    world.inquire()
    assert ask(world, wish(Verb.COMMIT_1P, 2)).status == Status.NO


def test_what_was_uncertain_once_stays_so() -> None:
    """After a commit in one phase that may have happened, a call that was not delivered says nothing."""
    member = RemoteMember("stock", 7, b"g" * 16, 1, 0)
    member.commit_one_phase(0)
    refused = Success(Answer(Status.REFUSED, "the journal cannot be written").encode())
    assert member.read_one_phase(refused).is_lost
    member.commit_one_phase(0)
    assert member.read_one_phase(Failure(ServiceUnreachable("nobody is there"))).is_lost
