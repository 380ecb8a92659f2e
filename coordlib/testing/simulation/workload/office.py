"""What one process has of the bank: transactions that it began, a service that it hosts, and an agent that cleans up.

Everything here ends with its process; what outlives it is in the stores. What must not live here: what was promised of
all this together (`bank`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from coordlib.api.locks import Grant, _LockBase
from coordlib.api.overlay import Overlay
from coordlib.cbor import decode, encode
from coordlib.errors import (
    CallLost,
    CallTimeout,
    CoordError,
    NoQuorum,
    RemoteProtocolError,
    ServiceUnreachable,
    StorageFailed,
    TransactionAborted,
)
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.effects import InboundCall
from coordlib.node.operations import FOREVER_MS, Do, OpGen, Step
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.workload.site import Task, Worker
from coordlib.testing.simulation.workload.stores import (
    BALANCE,
    Connection,
    LastBook,
    LastConnection,
    LastPart,
    Ledger,
    LedgerHandler,
    Part,
)
from coordlib.txn.branches import Branch, DecidingResource, Resource
from coordlib.txn.commit import Context, Unfinished, abort_gen, commit_gen, finish_gen
from coordlib.txn.gtid import GtidMinter, node_tag
from coordlib.txn.journal import JournalBranch, JournalResource
from coordlib.txn.participant import Participants, Work, WorkState
from coordlib.txn.recovery import Recovered, complete_gen, recover_gen, sweep_gen
from coordlib.txn.service import Answer, RemoteMember, Status, Verb, Wish, decode_answer, decode_wish
from coordlib.txn.transaction import State, StateChange, Transaction
from coordlib.wire.messages import CallStatus, RequestKind

if TYPE_CHECKING:
    from coordlib.testing.simulation.workload.bank import Bank

__all__ = ["VAULTS", "VAULT_NAMES", "Deal", "Leg", "Office", "Settings"]

MAP: Final = b"bank"
MAP_KEYS: Final = tuple(b"m%d" % place for place in range(3))
VAULTS: Final = b"vaults"
VAULT_NAMES: Final = (b"vault-0", b"vault-1")
VAULT_SECONDS: Final = 0.5
SERVICE: Final = "desk"
UNREGISTER_SHARE: Final = 0.03
TIME_EVERY_MS: Final = 5000
FORGET_AFTER_MS: Final = 300
PAUSED_MS: Final = 50
CALLS_MAX: Final = 8


@dataclass(frozen=True)
class Settings:
    """How the bank behaves in one run."""

    flaky: float  # of requests to stores that are lost, or their answers
    io_ms_max: int  # what a store takes
    slow_share: float  # of requests to stores that take seconds
    timeouts_ms: tuple[int, ...]
    by_hand_share: float  # of promised branches that somebody ends by hand
    agent_ms: int  # how often an agent looks
    refusals: float  # of handlers' operations that raise

    @classmethod
    def draw(cls, chance: Stream) -> Settings:
        return cls(
            flaky=chance.choice((0.0, 0.0, 0.03, 0.15)),
            io_ms_max=chance.choice((0, 10, 100, 400)),
            slow_share=chance.choice((0.0, 0.02, 0.1)),
            timeouts_ms=chance.choice(((2000,), (1000, 4000), (300, 3000, 10_000))),
            by_hand_share=chance.choice((0.0, 0.0, 0.0, 0.02)),
            agent_ms=chance.choice((500, 1500)),
            refusals=chance.choice((0.0, 0.03)),
        )


class Leg(NamedTuple):
    """One place where a transfer changes something, or only looks (amount 0)."""

    kind: str  # "map", "book", "service", "last"
    place: str
    account: str
    amount: int


class Deal:
    """One transaction, as all know it who judge it."""

    __slots__ = (
        "decider",
        "grant",
        "gtid",
        "is_releasing",
        "keys",
        "parts",
        "plan",
        "rolled_back",
        "told",
        "waits",
        "who",
    )

    def __init__(self, plan: tuple[Leg, ...], who: str, waits: bool) -> None:
        self.plan = plan
        self.who = who
        self.waits = waits
        self.gtid = b""
        self.parts: list[Part] = []
        self.keys: tuple[bytes, ...] = ()  # of the map, that its decision changes
        self.decider: LastBook | None = None
        self.grant: Grant | None = None  # of the lock of a vault that it changes
        self.is_releasing = False  # by its decision
        self.told: bool | None = None  # that it is committed, or aborted
        self.rolled_back: Part | None = None

    def is_alone(self, part: Part) -> bool:
        """Nothing else is changed by it."""
        return (
            not self.keys
            and self.grant is None
            and not any(other is not part and any(other.changes.values()) for other in self.parts)
        )


class Office:
    """See the module's docstring. It is the `Recovery` of its process."""

    def __init__(self, bank: Bank, worker: Worker, ledger: Ledger, local: LastBook) -> None:
        self.bank = bank
        self.worker = worker
        self.process = worker.process
        self.who = worker.name
        self.request_timeout_ms = bank.site.world.timing.request_timeout_ms
        self.stream = stream = worker.stream(bank.site, "bank office")
        self._vault_stream = worker.stream(bank.site, "bank vaults")
        settings = self.settings = bank.settings
        self.is_ended = False
        self.deals: dict[bytes, Deal] = {}  # begun here, and not over
        self.counters: dict[str, int] = {}
        self._minter = GtidMinter()
        self.node = ledger.name.partition("/")[
            2
        ]  # the machine's: a journal outlives the processes that use it
        self._node_tag = node_tag(self.node)
        self._time: tuple[int, int, int] | None = None  # log_time, the clock when it was that, the horizon
        self._left: list[Unfinished] = []
        self._forgets: list[tuple[bytes, bytes]] = []
        self._is_forgetting = False
        self._searching: dict[str, None] = {}
        self._swept: frozenset[tuple[bytes, bytes]] = frozenset()
        self._is_sweeping = False
        self._calls = 0
        self._registered = 0  # the session in which the service is registered
        self._is_registering = False
        self.context = Context(self.clock, self.finish_later, self.forget, self.counters)
        self.connections = {book.name: Connection(book, stream, settings.flaky) for book in bank.databases}
        self.local = LastConnection(local, stream, settings.flaky)
        self.ledger = ledger
        self.journal = JournalResource(ledger.name, ledger.journal, LedgerHandler(ledger))
        share, ledger.journal.share = ledger.journal.share, 0.0
        self.journal.start()  # where that fails, the service is not started
        ledger.journal.share = share
        self.participants = Participants(self.node, self._node_tag, self, nullcontext())
        self.process.set_call_handler(self._called)
        self._later(stream.randint(1, settings.agent_ms), self._look)

    def end(self) -> None:
        """The process is gone."""
        self.is_ended = True
        for name, count in self.counters.items():
            if count:
                self.bank.hit(f"tx_{name}")
        self.counters.clear()

    @property
    def is_quiet(self) -> bool:
        return not (self._forgets or self._is_forgetting or self.participants.works or self.deals)

    def describe(self) -> str:
        left = [unfinished.gtid.hex() for unfinished in self._left]
        works = [f"{work.state.value} {work.gtid.hex()}" for work in self.participants.works.values()]
        return f"unfinished {left}, to forget {len(self._forgets)}, works {works}, deals {len(self.deals)}"

    # -- running

    def clock(self) -> int:
        return self.process.clock()

    def _later(self, delay_ms: int, action: Callable[[], None]) -> None:
        def act() -> None:
            if self.is_ended or not self.process.is_up:
                return
            if self.process.is_paused:
                self.bank.site.world.after(PAUSED_MS, act)
            else:
                action()

        self.bank.site.world.after(delay_ms, act)

    def slow(self, operation: OpGen[Any]) -> OpGen[Any]:
        """The same operation; what its stores do takes time, before and after it is done."""
        try:
            step = next(operation)
            while True:
                takes_ms = self._takes_ms() if not isinstance(step, Step) else 0
                before_ms = self.stream.randint(0, takes_ms) if takes_ms else 0
                try:
                    if before_ms:
                        yield Step.pause(before_ms / 1000)
                    result = yield step
                    if takes_ms > before_ms:
                        yield Step.pause((takes_ms - before_ms) / 1000)
                except GeneratorExit:
                    operation.close()
                    raise
                except BaseException as error:
                    step = operation.throw(error)
                else:
                    step = operation.send(result)
        except StopIteration as stop:
            return stop.value

    def _takes_ms(self) -> int:
        settings = self.settings
        is_slow = settings.slow_share and self.stream.random() < settings.slow_share
        if is_slow and not self.bank.site.is_stopped:  # at the end all that is left is to be over soon
            return self.stream.choice((500, 1500, 4000, 12_000))  # the last is longer than most have
        return self.stream.randint(0, settings.io_ms_max) if settings.io_ms_max else 0

    def _start(self, operation: OpGen[Any], done: Callable[[Any], None] = lambda _: None) -> None:
        """Run it in the background; `done` is given what it returned, None if it failed as it may."""
        if self.is_ended or not self.process.is_up:
            return

        def run() -> OpGen[None]:
            result = None
            try:
                result = yield from self.slow(operation)
            except (CoordError, ConnectionError):
                pass  # nobody could be asked now
            done(result)

        self.process.start_operation(run())

    # -- Recovery, and what is left of the transactions of this process

    def is_live(self, gtid: bytes) -> bool:
        return gtid in self.deals or self.participants.is_live(gtid)

    def decider(self, tag: bytes) -> DecidingResource | None:
        return self.local if tag == self.local.tag else None

    def ask_decider_gen(self, tag: bytes, gtid: bytes) -> OpGen[bool | None]:
        office = next((o for o in self.bank.offices.values() if o.local.tag == tag), None)
        if office is None or not office.session:
            return None
        wish = Wish(Verb.ASK, "last", gtid, payload=tag)
        deadline_ms = self.clock() + self.request_timeout_ms
        try:
            reply = yield Step(RequestKind.CALL, wish.encode(), deadline_ms, target=office.session)
        except CoordError:
            return None
        answer = decode_answer(reply)
        self.bank.hit("tx_last_resource_asked")
        return bool(answer.payload) if answer.status == Status.ENDED else None

    def count(self, name: str, number: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + number

    def forget(self, branches: Sequence[tuple[bytes, bytes]]) -> None:
        self._forgets += branches
        if not self._is_forgetting:
            self._is_forgetting = True
            self._later(FORGET_AFTER_MS, self._forget_now)

    def _forget_now(self) -> None:
        batch, self._forgets = self._forgets, []

        def done(reply: bytes | None) -> None:
            self._is_forgetting = False
            if reply is None:
                self._forgets += batch
            if self._forgets:
                self._is_forgetting = True
                self._later(FORGET_AFTER_MS, self._forget_now)

        self._start(self._ask_gen(RequestKind.COMMAND, commands.tx_forget(batch)), done)

    def _ask_gen(self, kind: RequestKind, body: bytes) -> OpGen[bytes]:
        reply: bytes = yield Step(kind, body, self.clock() + self.request_timeout_ms)
        return reply

    def finish_later(self, unfinished: Unfinished) -> None:
        if self.is_ended or not self.process.is_up:
            return
        self._left.append(unfinished)

        def done(_: Any) -> None:
            self._left.remove(unfinished)

        self._later(1, lambda: self._start(complete_gen(unfinished, self), done))

    def _look(self) -> None:
        """The agent's turn."""
        self._later(self.settings.agent_ms + self.stream.randint(0, 200), self._look)
        for connection in self.connections.values():
            if connection.book.prepared:
                self._search(connection)
                self._meddle(connection)
        if self.ledger.journal.records(self.ledger.name):
            self._search(self.journal)
        self._sweep()
        self._skip()
        self._register()
        if self.bank.site.is_stopped:
            self.ledger.journal.share = 0.0
            for work in self.participants.works.values():
                # Where a last resource decides, the log has nothing to tell.
                if work.state is WorkState.PREPARED and not work.is_busy and not work.decider_tag:
                    self._start(self._ask_people_gen(work))
        for work in self.participants.due():
            self._start(self.participants.inquire_gen(work))

    def _register(self) -> None:
        """Host the service, also in a new session; now and then leave off for a while."""
        session = self.session
        if self._is_registering or not session:
            return
        if session != self._registered:
            body, registered = commands.service_register(SERVICE, self.who), session
        elif self._vault_stream.random() < UNREGISTER_SHARE and not self.bank.site.is_stopped:
            body, registered = commands.service_unregister(SERVICE), 0
        else:
            return
        self._is_registering = True

        def done(reply: bytes | None) -> None:
            self._is_registering = False
            if reply is not None:
                self._registered = registered

        self._start(self._ask_gen(RequestKind.COMMAND, body), done)

    def _skip(self) -> None:
        """Somebody declares the log to be restored from a back-up: what it does not know is presumed by nobody."""
        bank = self.bank
        if self._time is None or bank.site.is_stopped or bank.people.random() >= bank.skip_share:
            return
        log_time_ms, at, _ = self._time
        body = commands.tx_skip(log_time_ms + self.clock() - at)
        self._start(self._ask_gen(RequestKind.COMMAND, body))

    def _sweep(self) -> None:
        """Now and then: what has obeyed and is still pending."""
        if self._is_sweeping or not self.bank.has_pending:
            return
        self._is_sweeping = True

        def done(found: frozenset[tuple[bytes, bytes]] | None) -> None:
            self._is_sweeping = False
            self._swept = found if found is not None else self._swept

        resources: dict[str, Resource] = {**self.connections, self.journal.name: self.journal}
        self._start(sweep_gen(resources, self.node, self._swept, self), done)

    def _search(self, resource: Connection | JournalResource) -> None:
        if resource.name in self._searching:
            return
        self._searching[resource.name] = None

        def done(recovered: Recovered | None) -> None:
            del self._searching[resource.name]
            for branch, why in recovered.in_doubt if recovered is not None else ():
                if why.startswith("too old"):
                    self._operate(resource, branch)

        def search() -> OpGen[Recovered]:
            if isinstance(resource, JournalResource):
                yield Do(resource.obey_again)
            return (yield from recover_gen(resource, self))

        self._start(search(), done)

    def _operate(self, resource: Connection | JournalResource, branch: Any) -> None:
        """Nobody may presume anything; people look it up in their books."""
        self.bank.hit("tx_resolved_by_people")
        decision = self.bank.decision(branch.gtid)
        try:
            resource.finish(branch, decision is not None and decision.is_committed)
        except (ConnectionError, StorageFailed):
            pass

    def _ask_people_gen(self, work: Work) -> OpGen[None]:
        """The same for a branch that a service has under way."""
        reply = yield from self._ask_gen(RequestKind.QUERY, commands.query_tx_state(work.gtid))
        if commands.decode_reply(reply)[0] == TxStatus.UNKNOWN:
            self.bank.hit("tx_resolved_by_people")
            decision = self.bank.decision(work.gtid)
            verb = Verb.COMMIT if decision is not None and decision.is_committed else Verb.ABORT
            wish = Wish(verb, work.service, work.gtid, work.key[1])
            yield from self.participants.handle_gen(wish, self.request_timeout_ms, self._execute)

    def _meddle(self, connection: Connection) -> None:
        share = self.settings.by_hand_share
        if share and not self.bank.site.is_stopped and self.bank.decisions is not None:
            for part in list(connection.book.prepared.values()):
                if self.stream.random() < share:
                    connection.book.end_by_hand(part)

    # -- the service

    @property
    def session(self) -> int:
        session: int = self.process._kernel.session.view.session_id
        return session

    def _called(self, inbound: InboundCall) -> None:
        def answer_gen() -> OpGen[None]:
            try:
                wish = decode_wish(inbound.body)
            except RemoteProtocolError as error:
                self.process.answer(inbound, CallStatus.ERROR, commands.encode_error(error))
                return
            if wish.verb == Verb.ASK:
                answer = yield from self._asked_gen(wish.gtid)
            else:
                answer = yield from self.slow(
                    self.participants.handle_gen(wish, inbound.budget_ms, self._execute)
                )
            self.process.answer(inbound, CallStatus.OK, answer.encode())

        self.process.start_operation(answer_gen())

    def _asked_gen(self, gtid: bytes) -> OpGen[Answer]:
        if self.is_live(gtid):
            return Answer(Status.BUSY)
        try:
            is_committed = yield Do(lambda: self.local.outcome(gtid))
        except ConnectionError:
            return Answer(Status.BUSY)
        return Answer(Status.ENDED, is_committed)

    def _execute(self, work: Work, operation: str, payload: bytes) -> Do:
        def run() -> bytes:
            number, account, amount = decode(payload)
            bank = self.bank
            run_before = bank.runs.setdefault((work.gtid, number), self.who)
            if run_before != self.who or number in work.notes:
                bank.broken("run once", f"call {number} of {work.gtid.hex()} is run again by {self.who}")
            work.notes[number] = True
            if self.settings.refusals and self.stream.random() < self.settings.refusals:
                raise ValueError("the handler refuses")
            part: Part | None = work.notes.get(operation)
            if part is None:
                part = self._join(work, operation)
                work.notes[operation] = part
                bank.deals[work.gtid].parts.append(part)
            part.add(account, amount)
            return b""

        return Do(run)

    def _join(self, work: Work, operation: str) -> Part:
        """The work's branch in the service's own journal, or in a database that it uses."""
        branch: Branch
        if operation == "ledger":
            bqual = work.name_branch(self.journal.tag)
            part = self.ledger.begin(work.gtid, bqual)
            branch = JournalBranch(self.journal, work.gtid, bqual, work.deadline_ms, part)
        else:
            connection = self.connections[operation]
            branch = connection.branch(work.gtid, work.name_branch(connection.tag))
            part = branch.part
        work.enlist(branch)
        return part

    # -- transfers

    def draw(self, stream: Stream) -> Deal:
        """What is to be transferred between which places."""
        chance = stream.random()
        places: list[tuple[str, str, str]] = []
        if chance < 0.1:
            places = [("map", "", key.decode()) for key in stream.sample(MAP_KEYS, 2)]
        elif chance < 0.2:
            book = stream.choice(self.bank.databases)
            places = [("book", book.name, account) for account in book.accounts]
        elif chance < 0.35:
            places = [("last", self.local.name, stream.choice(list(self.local.book.accounts)))]
            places += stream.sample(self._places(stream)[1:], stream.choice((1, 1, 2)))
        else:
            places = stream.sample(self._places(stream), stream.choice((1, 2, 2, 2, 3)))
            if len(places) == 1 and places[0][0] == "service":
                kind, place, account = places[0]
                other = f"{account[:-1]}{1 - int(account[-1])}"
                places.append((kind, place, other))
            elif len(places) == 1:
                places += [place for place in self._places(stream)[1:3] if place[1] != places[0][1]][:1]
        amounts = [stream.randint(1, 9) for _ in places[1:]]
        if len(places) == 3 and stream.random() < 0.4:
            amounts[1] = 0  # only looked at
        if len(places) == 2 and stream.random() < 0.1:
            amounts[0] = 0
        signed = [-sum(amounts), *amounts]
        if stream.random() < 0.5:
            signed = [-amount for amount in signed]
        plan = tuple(Leg(*place, amount) for place, amount in zip(places, signed, strict=True))
        return Deal(plan, self.who, stream.random() < 0.7)

    def _places(self, stream: Stream) -> list[tuple[str, str, str]]:
        bank = self.bank
        places = [("map", "", stream.choice(MAP_KEYS).decode())]
        places += [("book", book.name, stream.choice(list(book.accounts))) for book in bank.databases]
        offices = list(bank.offices.values())
        for office in stream.sample(offices, min(2, len(offices))):
            places.append(("service", office.who, stream.choice(list(office.ledger.accounts))))
        return places

    def _estimate_gen(self) -> OpGen[tuple[int, int]]:
        """Of log_time, and the horizon."""
        if self._time is None or self.clock() - self._time[1] > TIME_EVERY_MS:
            at = self.clock()
            reply = yield from self._ask_gen(RequestKind.QUERY, commands.query_tx_clock())
            log_time_ms, _, horizon_ms = commands.decode_reply(reply)
            self._time = (log_time_ms, at, horizon_ms)
        log_time_ms, at, horizon_ms = self._time
        return log_time_ms + self.clock() - at, horizon_ms

    def _begin_gen(self, timeout_ms: int) -> OpGen[Transaction]:
        log_time_ms, horizon_ms = yield from self._estimate_gen()
        if not self.session:
            raise NoQuorum("this process has no session now")
        gtid = self._minter.mint(max(log_time_ms, horizon_ms), self.session)
        return Transaction(
            gtid, self.node, self._node_tag, log_time_ms + timeout_ms, self.clock() + timeout_ms
        )

    @property
    def deadline_ms(self) -> int:
        """Of a request that is made now."""
        return self.clock() + self.request_timeout_ms

    def state_only_gen(self, change: StateChange) -> OpGen[None]:
        tx = yield from self._begin_gen(3000)
        tx.change = change
        yield from commit_gen(tx, self.context)

    def transfer_gen(self, deal: Deal, task: Task) -> OpGen[None]:
        """
        Raises:
            CoordError: As `commit_gen`; or it was given up before.
        """
        try:
            yield from self._transfer_gen(deal)
        except GeneratorExit:
            raise
        except BaseException:
            yield from self._give_back_gen(deal)
            raise
        if not deal.is_releasing:
            yield from self._give_back_gen(deal)
        elif deal.grant is not None:
            self.bank.hit("tx_lock_released")
            deal.grant._is_released = True
            self.process._grants.discard(deal.grant)

    def _take_vault_gen(self, deal: Deal, overlay: Overlay) -> OpGen[None]:
        """A vault is changed by who holds its lock, and by nobody who has held it: without looking what is in it."""
        stream = self._vault_stream
        name = stream.choice(VAULT_NAMES)
        # A process has of a cluster what a lock's handle needs of it.
        lock = _LockBase(self.process, name.decode(), None, None, None)  # type: ignore[arg-type]
        grant = deal.grant = yield from lock._acquire_gen(VAULT_SECONDS)
        guard = (grant._lock_name, grant._token)
        overlay.put(VAULTS, name, encode(grant._token), guard)
        deal.is_releasing = stream.random() < 0.6
        if deal.is_releasing:
            overlay.release(grant._lock_name, grant._sequence)
        if stream.random() < 0.15:
            # It goes on without noticing that the lock is somebody else's.
            yield from self._give_back_gen(deal)
            yield Step.pause(stream.randint(1, 400) / 1000)

    def _give_back_gen(self, deal: Deal) -> OpGen[None]:
        grant = deal.grant
        if grant is not None and not grant._is_released:
            grant._is_released = True
            self.process._grants.discard(grant)
            body = commands.release(grant._lock_name, grant._sequence)
            yield Step(RequestKind.COMMAND, body, FOREVER_MS, view=grant._view, is_detached=True)

    def _transfer_gen(self, deal: Deal) -> OpGen[None]:
        tx = yield from self._begin_gen(self.stream.choice(self.settings.timeouts_ms))
        deal.gtid = tx.gtid
        self.bank.deals[tx.gtid] = self.deals[tx.gtid] = deal
        is_kept = False
        try:
            try:
                yield from self._work_gen(tx, deal)
            except CoordError as error:
                yield from self.slow(abort_gen(tx, self.context))
                if isinstance(error, TransactionAborted):
                    raise
                raise TransactionAborted(f"given up: {error}", reason="given-up", gtid=tx.gtid) from error
            except BaseException:
                self.finish_later(Unfinished(tx.gtid, False, tuple(tx.members)))
                raise
            yield from self.slow(commit_gen(tx, self.context, until_applied=deal.waits))
            if tx.state is State.COMMITTED and not deal.waits:
                is_kept = True
                self._start(self._finish_gen(tx))
        finally:
            if not is_kept and self.process.is_up:  # else whoever looks at the end of the process finds it
                self.deals.pop(tx.gtid, None)

    def _finish_gen(self, tx: Transaction) -> OpGen[None]:
        try:
            yield from finish_gen(tx, self.context)
        finally:
            self.deals.pop(tx.gtid, None)

    def _work_gen(self, tx: Transaction, deal: Deal) -> OpGen[None]:
        if any(leg.kind == "last" for leg in deal.plan):
            tx.set_decider(self.local.tag)
            deal.decider = self.local.book
        overlay = Overlay(is_read_only=False, is_serializable=True)
        if deal.decider is None and self._vault_stream.random() < self.bank.vault_share:
            yield from self._take_vault_gen(deal, overlay)
        for number, leg in enumerate(deal.plan):
            if leg.kind == "map":
                yield from self._change_map_gen(deal, leg, overlay)
            elif leg.kind == "service":
                yield from self._call_gen(tx, leg, number)
            else:
                self._change_book(tx, deal, leg)
        tx.change = overlay.change(has_branches=bool(tx.members))
        think_ms = self.stream.choice((0, 0, 5, 100))
        if think_ms:
            yield Step.pause(think_ms / 1000)
        if self.stream.random() < 0.05:
            raise TransactionAborted("its owner has changed his mind", reason="rollback", gtid=tx.gtid)

    def _change_map_gen(self, deal: Deal, leg: Leg, overlay: Overlay) -> OpGen[None]:
        key = leg.account.encode()
        value = yield from overlay.get_gen(MAP, key, self.deadline_ms)
        balance, touched = (BALANCE, 0) if value is None else decode(value)
        if balance + leg.amount < 0:
            raise TransactionAborted("there is not enough", reason="rollback", gtid=deal.gtid)
        if leg.amount:
            overlay.put(MAP, key, encode([balance + leg.amount, touched + 1]))
            deal.keys += (key,)

    def _change_book(self, tx: Transaction, deal: Deal, leg: Leg) -> None:
        if leg.kind == "last":
            last = LastPart(self.local.book, self.local, tx.gtid, tx.name_branch(self.local.tag))
            part = last.part
            tx.enlist(last)
        else:
            connection = self.connections[leg.place]
            part = next((p for p in deal.parts if p.book is connection.book), None)  # type: ignore[assignment]
            if part is None:
                branch = connection.branch(tx.gtid, tx.name_branch(connection.tag))
                part = branch.part
                tx.enlist(branch).expects_read_only = not leg.amount or self.stream.random() < 0.1
        part.add(leg.account, leg.amount)
        if part not in deal.parts:
            deal.parts.append(part)

    def _call_gen(self, tx: Transaction, leg: Leg, number: int) -> OpGen[None]:
        member = next((m for m in tx.members if isinstance(m, _Member) and m.node == leg.place), None)
        if member is None:
            target = yield from self._session_of_gen(leg.place)
            member = _Member(leg.place, "ledger", target, tx.gtid, number, tx.deadline_ms, tx.decider_tag)
            tx.members.append(member)
        operation = "ledger"
        payload = encode((number, leg.account, leg.amount))
        step = member.call(operation, payload, tx.expires_ms)
        for _ in range(CALLS_MAX):
            try:
                answer = decode_answer((yield step))
            except (CallLost, CallTimeout):
                self.bank.hit("tx_call_repeated")
            else:
                if answer.status == Status.RETURNED:
                    return
                if answer.status == Status.RAISED and self.stream.random() < 0.5:
                    self.bank.hit("tx_error_swallowed")
                    return
                if answer.status != Status.BUSY:
                    break
            yield Step.pause(0.02)
            step = member.call_again(operation, payload, tx.expires_ms)
        raise TransactionAborted("a service could not be called", reason="call", gtid=tx.gtid)

    def _session_of_gen(self, place: str) -> OpGen[int]:
        """Of the process that hosts a service: the replica that has its desk there."""
        reply = yield from self._ask_gen(RequestKind.QUERY, commands.query_services(SERVICE))
        rows, _ = commands.decode_reply(reply)
        sessions = [session for _, session, _, instance, _ in rows if instance == place]
        if not sessions:
            raise ServiceUnreachable("nobody hosts it now", target=0)
        if len(sessions) > 1:
            self.bank.hit("tx_replica_in_two_sessions")
        target: int = sessions[-1]
        return target


class _Member(RemoteMember):
    def __init__(self, node: str, service: str, *args: Any) -> None:
        super().__init__(service, *args)
        self.node = node
