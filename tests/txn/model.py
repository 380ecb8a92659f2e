"""A small world for transactions in which everything that can go wrong does, once in every order.

The production generators run against the production machine; resources, processes and the way between them are models. Every
decision of the world (what happens next, whether an answer is lost, how a branch votes) is a choice with a default of
"all is well", and `explore` runs a scenario once for every combination of at most so many other choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from coordlib.errors import (
    CommitTimeout,
    CoordError,
    NoQuorum,
    TransactionAborted,
    TransactionOutcomeUnknown,
)
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.machine.limits import Limits
from coordlib.node.operations import Do, Failure, OpGen, Outcome, Step, Success, Together
from coordlib.txn.branches import BranchFailed, DecidingResource, Finish, PreparedBranch, Vote
from coordlib.txn.commit import Context, Unfinished, finish_gen
from coordlib.txn.gtid import join_gtid, node_tag, resource_tag
from coordlib.txn.members import LocalMember
from coordlib.txn.recovery import complete_gen, recover_gen
from coordlib.txn.transaction import Decided, State, StateChange, Transaction
from coordlib.wire.messages import RequestKind
from tests.machine.driver import Driver

MAP: Final = b"stock"


class Choices:
    """A run's choices: those of a prefix, then the default."""

    def __init__(self, prefix: Sequence[int], deviations_max: int) -> None:
        self.taken: list[int] = []
        self.widths: list[int] = []
        self._prefix = prefix
        self._left = deviations_max

    def choose(self, width: int) -> int:
        if not self._left or width < 2:
            return 0
        place = len(self.taken)
        pick = self._prefix[place] if place < len(self._prefix) else 0
        self.taken.append(pick)
        self.widths.append(width)
        self._left -= pick != 0
        return pick


def explore(scenario: Callable[[Choices], None], deviations_max: int) -> int:
    """Run the scenario in every way that departs from the default so often at most; returns how many there are."""
    prefix: list[int] = []
    runs = 0
    while True:
        choices = Choices(prefix, deviations_max)
        try:
            scenario(choices)
        except Exception as error:
            error.add_note(f"choices: {choices.taken}")
            raise
        runs += 1
        taken, widths = choices.taken, choices.widths
        while taken and taken[-1] + 1 >= widths[-1]:
            taken.pop()
            widths.pop()
        if not taken:
            return runs
        taken[-1] += 1
        prefix = taken


class ModelBranch:
    """A branch as its store has it. What it is asked against the rules is an error of the test."""

    is_last_resource = False

    def __init__(self, world: World, resource: ModelResource, bqual: bytes) -> None:
        self.world = world
        self.resource = resource
        self.bqual = bqual
        self.state = "active"
        self.was_asked_to_commit = False
        resource.branches[bqual] = self

    def prepare(self) -> Vote:
        assert self.state == "active"
        pick = self.world.choices.choose(5)
        if pick == 1:
            self.state = "read-only"
            return Vote.READ_ONLY
        if pick == 2:
            self.state = "rolled back"
            raise BranchFailed("a constraint does not hold")
        if pick == 3:
            self.state = "rolled back"
            raise ConnectionError("lost before it was prepared")
        self.state = "prepared"
        if pick == 4:
            raise ConnectionError("lost after it was prepared")
        return Vote.YES

    def commit_one_phase(self) -> None:
        assert self.state == "active"
        pick = self.world.choices.choose(4)
        if pick in (1, 2):
            self.state = "rolled back"
            raise BranchFailed("a constraint does not hold") if pick == 1 else ConnectionError("lost")
        self.state = "committed"
        if pick == 3:
            raise ConnectionError("lost after it was committed")

    def decide(self, gtid: bytes) -> None:
        assert self.state == "active"
        pick = self.world.choices.choose(4)
        if pick in (1, 2) or gtid in self.resource.fences:
            self.state = "rolled back"
            raise ConnectionError("lost") if pick == 2 else BranchFailed("a constraint does not hold")
        self.state = "committed"
        self.resource.markers.add(gtid)
        if pick == 3:
            raise ConnectionError("lost after it was committed")

    def commit(self) -> None:
        self.end(True)

    def rollback(self) -> None:
        self.end(False)

    def end(self, commit: bool) -> None:
        pick = self.world.choices.choose(3)
        if pick != 1:
            self.obey(commit)
        elif self.state == "active":
            self.state = "rolled back"  # with its connection
        if pick:
            raise ConnectionError("lost while it was told the outcome")

    def obey(self, commit: bool) -> None:
        was = self.state
        if commit:
            self.was_asked_to_commit = True
            assert was in ("prepared", "committed"), f"told to commit what is {was}"
            assert self.world.is_decided(), "T4: told to commit what is not decided"
        else:
            assert was != "committed", "told to roll back what is committed"
            if was == "prepared":
                assert not self.world.is_decided(), "rolled back what is decided"
        if was in ("active", "prepared"):
            self.state = "committed" if commit else "rolled back"


class ModelResource:
    """A store of branches, and of what is prepared in it. It outlives the processes."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.tag = resource_tag(name)
        self.branches: dict[bytes, ModelBranch] = {}
        self.markers: set[bytes] = set()
        self.fences: set[bytes] = set()

    def prepared(self) -> list[PreparedBranch]:
        return [
            PreparedBranch(self.world.gtid, bqual, "")
            for bqual, branch in self.branches.items()
            if branch.state == "prepared"
        ]

    def finish(self, branch: PreparedBranch, commit: bool) -> Finish:
        found = self.branches[branch.bqual]
        if found.state != "prepared":
            return Finish.ALREADY if (found.state == "committed") is commit else Finish.HAZARD
        found.obey(commit)
        return Finish.DONE

    def outcome(self, gtid: bytes) -> bool:
        if gtid not in self.markers:
            self.fences.add(gtid)
        return gtid in self.markers

    def forget(self, gtid: bytes) -> None:
        assert not self.prepared()
        self.markers.discard(gtid)


class Crashed(BaseException):
    """The initiator is no more."""


class Agent:
    """Recovery on another node; the initiator's last resource can be asked while that runs."""

    who = "agent"
    request_timeout_ms = 1000

    def __init__(self, world: World) -> None:
        self.world = world
        self.counters: dict[str, int] = {}

    def clock(self) -> int:
        return self.world.driver.now_ms

    def is_live(self, gtid: bytes) -> bool:
        return False

    def decider(self, tag: bytes) -> DecidingResource | None:
        return None

    def ask_decider_gen(self, tag: bytes, gtid: bytes) -> OpGen[bool | None]:
        # Whoever has it answers for it only when it is not at work on the transaction itself.
        if self.world.is_at_work:
            return None
        answer: bool = yield Do(lambda: self.world.last.outcome(gtid))
        return answer

    def forget(self, branches: Sequence[tuple[bytes, bytes]]) -> None:
        self.world.forgotten += branches

    def count(self, name: str, number: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + number


class World:
    """One transaction, its initiator, two stores, the machine, and an agent on another node."""

    def __init__(self, choices: Choices, limits: Limits | None = None) -> None:
        self.choices = choices
        self.driver = Driver(limits)
        self.session = self.driver.open("initiator")
        self.other = self.driver.open("agent")
        self.gtid = join_gtid(self.driver.now_ms, self.session, 1)
        self.tx = Transaction(
            self.gtid, "n1", node_tag("n1"), self.driver.now_ms + 5000, self.driver.now_ms + 5000
        )
        self.stores = [ModelResource(self, "orders"), ModelResource(self, "billing")]
        self.last = ModelResource(self, "local")
        self.late: list[bytes] = []  # commands that may be applied yet
        self.left: list[Unfinished] = []
        self.forgotten: list[tuple[bytes, bytes]] = []
        self.outcome = TxStatus.NONE
        self.is_at_work = True
        self.is_crashed = False
        self.is_overdue = False
        self.counters: dict[str, int] = {}
        self.context = Context(
            lambda: self.driver.now_ms, self.left.append, self.forgotten.extend, self.counters
        )
        self.agent = Agent(self)
        self._agent_op: OpGen[Any] | None = None
        self._agent_at: Step | Do | Together | None = None
        self._agent_rounds = 0

    def enlist(self, store: ModelResource, *, is_last: bool = False) -> ModelBranch:
        if is_last:
            self.tx.set_decider(store.tag)
        branch = ModelBranch(self, store, self.tx.name_branch(store.tag))
        branch.is_last_resource = is_last
        self.tx.enlist(branch)
        return branch

    def write(self) -> None:
        """Have the decision change a map."""
        self.tx.change = StateChange(writes=(commands.put_key(MAP, b"sku", b"1"),))

    @property
    def branches(self) -> list[ModelBranch]:
        return [branch for store in (*self.stores, self.last) for branch in store.branches.values()]

    def is_decided(self) -> bool:
        """Whether it is committed, by whoever decides."""
        return bool(self.last.markers) if self.tx.decider_tag else self.outcome == TxStatus.COMMITTED

    # -- the machine

    def apply(self, session: int, body: bytes) -> bytes:
        reply = self.driver.apply(session, body).reply
        status = self.driver.ask(commands.query_tx_state(self.gtid))[0]
        assert self.outcome in (TxStatus.NONE, status), "T1: the outcome has changed"
        self.outcome = TxStatus(status)
        return reply

    def resolve(self) -> None:
        """Somebody else is in doubt, and asks."""
        self.apply(self.other, commands.tx_resolve(self.gtid))

    # -- running

    def run(self, operation: OpGen[Any], *, with_faults: bool = True) -> Any:
        """Run an operation of the initiator; anything may happen before each of its effects."""
        try:
            step = next(operation)
            while True:
                try:
                    if isinstance(step, Together):
                        result: Any = []
                        for each in step.operations:
                            if with_faults:
                                self.meanwhile()
                            result.append(self.outcome_of(each, with_faults))
                    else:
                        if with_faults:
                            self.meanwhile()
                        result = self.effect(step, with_faults)
                except Crashed:
                    operation.close()
                    raise
                except Exception as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(result)
        except StopIteration as stop:
            return stop.value

    def outcome_of(self, operation: Step | Do, with_faults: bool) -> Outcome:
        try:
            return Success(self.effect(operation, with_faults))
        except Exception as error:
            return Failure(error)

    def effect(self, operation: Step | Do | Together, with_faults: bool) -> Any:
        if isinstance(operation, Do):
            return operation.call()
        assert isinstance(operation, Step)
        if operation.pause_seconds:
            self.driver.now_ms += round(operation.pause_seconds * 1000)
            return b""
        if operation.kind == RequestKind.QUERY:
            return self.driver.machine.query(operation.body, lambda: self.driver.now_ms)
        assert operation.kind == RequestKind.COMMAND
        pick = self.choices.choose(4) if with_faults else 0
        if pick == 3:
            raise NoQuorum("nobody there")
        if pick == 2:
            self.late.append(operation.body)
            raise CommitTimeout("no answer; it is still on its way")
        reply = self.apply(self.session if with_faults else self.other, operation.body)
        if pick == 1:
            raise CommitTimeout("the answer was lost")
        commands.decode_reply(reply)
        return reply

    def meanwhile(self) -> None:
        """What else happens before the initiator goes on."""
        while True:
            pick = self.choices.choose(6)
            if pick == 0:
                return
            if pick == 1:
                self.crash()
                raise Crashed
            if pick == 2:
                self.advance_agent()
            elif pick == 3 and self.late:
                self.apply(self.session, self.late.pop(0))
            elif pick == 4 and not self.is_overdue:
                self.is_overdue = True
                self.driver.now_ms += 6000
            elif pick == 5 and not self.tx.decider_tag:
                self.resolve()
            else:
                return

    def crash(self) -> None:
        """The initiator ends without a word: its session does, and what it has not prepared is rolled back."""
        self.is_crashed = True
        self.is_at_work = False
        self.left.clear()
        self.driver.run(0, commands.expire_sessions([self.session]))
        for branch in self.branches:
            if branch.state == "active":
                branch.state = "rolled back"

    def advance_agent(self) -> None:
        """One effect of a search by the agent; begins one where none is under way."""
        try:
            if self._agent_op is None:
                store = self.stores[self._agent_rounds % 2]
                self._agent_rounds += 1
                self._agent_op = recover_gen(store, self.agent)
                self._agent_at = next(self._agent_op)
            assert self._agent_at is not None
            try:
                result = self.effect(self._agent_at, False)
            except Exception as error:
                self._agent_at = self._agent_op.throw(error)
            else:
                self._agent_at = self._agent_op.send(result)
        except StopIteration:
            self._agent_op = None

    # -- the end

    def settle(self) -> None:
        """No more faults: late commands arrive, everybody does what is left, then the dead are buried."""
        self.is_at_work = False
        while self._agent_op is not None:
            self.advance_agent()
        is_late_first = self.choices.choose(2) == 0
        if is_late_first:
            self._arrive()
        if self.tx.state is State.COMMITTED and not self.is_crashed and not self.left:
            self.run(finish_gen(self.tx, self.context), with_faults=False)
        while self.left:
            self.run(complete_gen(self.left.pop(0), self.agent), with_faults=False)
        if not self.is_crashed:
            self.crash()
        self.driver.now_ms += 10_000
        for store in self.stores:
            recovered = self.run(recover_gen(store, self.agent), with_faults=False)
            assert not recovered.in_doubt
            assert not recovered.heuristics
        self._arrive()
        self.apply(self.other, commands.tx_forget(self.forgotten))

    def _arrive(self) -> None:
        for body in self.late:
            self.driver.apply(self.session, body)  # of a session that may be gone: refused then
            status = self.driver.ask(commands.query_tx_state(self.gtid))[0]
            assert self.outcome in (TxStatus.NONE, status), "T1: the outcome has changed"
            self.outcome = TxStatus(status)
        self.late.clear()

    def check_nothing_is_left(self) -> None:
        """What the initiator has not ended itself it has given to recovery."""
        left = [member for unfinished in self.left for member in unfinished.members]
        for member in self.tx.members:
            assert isinstance(member, LocalMember)
            if member not in left:
                assert isinstance(member.branch, ModelBranch)
                assert member.branch.state not in ("active", "prepared")

    def check(self, result: Decided | CoordError | None) -> None:
        """All or nothing, everywhere; and the caller was told the truth."""
        is_committed = self.is_decided()
        states = {branch.state for branch in self.branches}
        assert "prepared" not in states
        assert "active" not in states
        (value,) = self.driver.ask(commands.query_get(MAP, b"sku"))
        if states == {"read-only"}:
            # Nobody was in doubt of anything, and no outcome is kept: there are the replicated changes or nothing.
            assert self.outcome != TxStatus.COMMITTED
            is_committed = value is not None or not self.tx.change.writes
        elif is_committed:
            assert "rolled back" not in states
        else:
            assert "committed" not in states
        assert (value is not None) == (is_committed and bool(self.tx.change.writes))
        assert self.driver.ask(commands.query_tx_state(self.gtid))[5] == []  # nobody is pending
        if isinstance(result, Decided):
            assert is_committed
        elif isinstance(result, TransactionAborted):
            assert not is_committed
        else:
            assert result is None or isinstance(result, TransactionOutcomeUnknown)
