"""A bank: money goes from map to database to service, in transactions, and there is always as much of it as before.

Every process begins transactions, hosts a service whose promises are in a journal on its own machine, has connections to
two databases that all share, a local one that cannot prepare, and an agent that finishes what others have left. All of
it runs the production code: `coordlib.txn`, and calls between applications over the simulated wires.

Some transactions hold the lock of a vault, are guarded by its token, and may give it back by their decision; now and
then people say that decisions may have been lost, so that nobody presumes any (`coordlib tx skip`).

Promised, and looked at when it happens or at the end: every part of a transaction ends alike; nobody obeys what is
not decided; no vault is changed by who does not hold its lock any more, and its lock is free exactly if the decision
that gives it back has committed; who was told "committed" or "aborted" was told the truth; a call is run once; money
that is promised is not promised twice; the total stays; and when all is quiet nobody is in doubt, and nothing is
pending.

What must not live here: the stores (`stores`), what is asked of them by a process (`office`), and what the log says of
it all (see `coordlib.testing.simulation.decisions`).
"""

from __future__ import annotations

from itertools import count
from typing import Final, NoReturn

from coordlib.api.overlay import Overlay
from coordlib.cbor import decode, encode
from coordlib.errors import HeuristicOutcome, TransactionAborted, TransactionConflict
from coordlib.machine import commands
from coordlib.node.operations import OpGen, Step
from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.decisions import Decision, Decisions
from coordlib.testing.simulation.processes import Process
from coordlib.testing.simulation.workload.office import VAULT_NAMES, VAULTS, Deal, Office, Settings
from coordlib.testing.simulation.workload.site import Outcome, Service, Site, Task, Worker
from coordlib.testing.simulation.workload.stores import (
    BALANCE,
    Book,
    FailingJournal,
    LastBook,
    Ledger,
    Part,
    State,
)
from coordlib.wire.messages import RequestKind

__all__ = ["Bank"]

MAP: Final = b"bank"
ACCOUNTS: Final = tuple(b"m%d" % place for place in range(3))
SKEW: Final = b"skew"
PAIR: Final = (b"x", b"y")


class Bank(Service):
    """Transfers between places of every kind, and pairs of accounts that may not both be emptied."""

    name = "bank"
    weight = 1.0

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.chance = chance = site.world.choices.stream("bank")
        self.settings = Settings.draw(chance)
        # How often people say that decisions may have been lost; apart, so that nothing else is drawn otherwise for it.
        self.people = site.world.choices.stream("bank people")
        self.journals = site.world.choices.stream("bank journals")
        self.journal_share = self.journals.choice((0.0, 0.02, 0.15))  # of writes that fail
        self.vault_share = site.world.choices.stream("bank vaults").choice((0.0, 0.2, 0.5))
        self._vaults: dict[bytes, int] = {}  # the last token that was accepted
        self.skip_share = self.people.choice((0.0,) * 7 + (0.01,))
        self.databases = [Book(self, "db/a"), Book(self, "db/b")]
        self.ledgers: dict[str, Ledger] = {}  # by the name of the machine
        self.locals: dict[str, LastBook] = {}
        self.offices: dict[Worker, Office] = {}
        self.deals: dict[bytes, Deal] = {}
        self.runs: dict[tuple[bytes, int], str] = {}  # a call that was run, and where
        self._is_used = site.load.weights.get(self.name, 0) > 0
        self._total_of_maps = BALANCE * len(ACCOUNTS)
        self._broken: tuple[str, str] | None = None
        self._touched = {
            key: [0, 0] for key in ACCOUNTS
        }  # by commits that were acknowledged; that are unknown

    # -- what is known

    @property
    def decisions(self) -> Decisions | None:
        observer = self.site.world.observer
        return None if observer is None else observer.decisions

    def decision(self, gtid: bytes) -> Decision | None:
        decisions = self.decisions
        return None if decisions is None else decisions.all.get(gtid)

    def broken(self, check: str, message: str) -> NoReturn:
        """Whoever called the store may take this for an error of the store's: it is raised again by `check`."""
        self._broken = self._broken or (check, f"{message} [seen at {self.now()} ms]")
        self.site.broken(check, message)

    def hit(self, mark: str) -> None:
        self.site.marks.hit(mark)

    def now(self) -> int:
        return self.site.world.now

    @property
    def has_pending(self) -> bool:
        """Whether the log has anything to be swept: nobody need ask otherwise."""
        return bool(self._pending())

    @property
    def books(self) -> list[Book]:
        return [*self.databases, *self.ledgers.values(), *self.locals.values()]

    def parts_of(self, gtid: bytes) -> list[Part]:
        """Those that wrote, or promised to."""
        return [part for book in self.books for key, part in book.parts.items() if key[0] == gtid]

    # -- processes

    def worker_started(self, worker: Worker) -> None:
        if not self._is_used:
            return
        machine = self._machine(worker.process)
        if machine not in self.ledgers:
            journal = FailingJournal(self, self.journals, self.journal_share)
            self.ledgers[machine] = Ledger(self, f"ledger/{machine}", journal)
            self.locals[machine] = LastBook(self, f"local/{machine}")
        self.offices[worker] = Office(self, worker, self.ledgers[machine], self.locals[machine])

    def _machine(self, process: Process) -> str:
        """A member's has its name. A client that comes back is another one, in the directory of one that died."""
        if process.name in self.site.world.members:
            return process.name
        used = {office.ledger.name for office in self.offices.values()}
        return next(name for place in count(1) if f"ledger/{(name := f'desk{place}')}" not in used)

    def worker_ended(self, worker: Worker) -> None:
        office = self.offices.pop(worker, None)
        if office is None:
            return
        office.end()
        for deal in office.deals.values():
            if self.decision(deal.gtid) is None and any(p.state == State.PREPARED for p in deal.parts):
                self.hit("tx_initiator_died_undecided")
        for part in office.ledger.parts.values():
            if part.state == State.PREPARED:
                self.hit("tx_participant_died_promised")
                break

    # -- what applications do

    def begin(self, worker: Worker) -> None:
        stream = worker.stream(self.site, self.name)
        office = self.offices[worker]
        chance = stream.random()
        if chance < 0.15:
            self._withdraw(office, stream)
        elif chance < 0.25:
            self._look(office, stream)
        else:
            self._transfer(office, stream)

    def _transfer(self, office: Office, stream: Stream) -> None:
        worker = office.worker
        deal = office.draw(stream)
        what = f"transfer {deal.plan}"

        def ended(task: Task) -> None:
            self._told(deal, task)

        self.site.begin(worker, self.name, what, lambda task: office.transfer_gen(deal, task), ended)

    def _told(self, deal: Deal, task: Task) -> None:
        """What whoever began it may conclude."""
        error = task.error
        if task.outcome is Outcome.DONE:
            deal.told = True
        elif isinstance(error, HeuristicOutcome):
            self.hit("tx_heuristic")
        elif task.outcome is Outcome.REFUSED:
            deal.told = False
            if isinstance(error, TransactionConflict):
                self.hit("tx_conflict")
            elif isinstance(error, TransactionAborted):
                self.hit(f"tx_told_{error.reason}")
        for key in deal.keys:
            self._touched[key][deal.told is None] += deal.told is not False
        self._agree(deal.gtid)

    # -- what must hold of one transaction

    def ending(self, part: Part, commit: bool) -> None:
        """What had promised is about to obey: what it obeys must be decided, or never be decided otherwise."""
        deal = self.deals[part.gtid]
        if self.decisions is None:
            return  # nobody reads the log in this world
        if commit:
            self.hit("tx_branch_committed")
            if not deal.is_alone(part) and not self._is_committed(deal):
                self.broken("early commit", f"told to commit, and nobody has decided so: {part}")
            decision = self.decision(part.gtid)
            if decision is not None and decision.is_committed and part.bqual not in decision.pending:
                self.broken("forgotten", f"it has yet to obey, and nobody would look for it any more: {part}")
        else:
            deal.rolled_back = part
            if self._is_committed(deal):
                self.broken("atomic", f"rolled back, and it is committed: {part}, {self.decision(part.gtid)}")

    def _is_committed(self, deal: Deal) -> bool:
        if deal.decider is not None:
            return deal.gtid in deal.decider.decided
        decision = self.decision(deal.gtid)
        return decision is not None and decision.is_committed

    def ending_of_marker(self, book: LastBook, gtid: bytes) -> None:
        left = [part for part in self.parts_of(gtid) if part.state == State.PREPARED]
        if left and gtid in book.markers:
            self.broken("last resource", f"the marker of {gtid.hex()} is removed, and in doubt are {left[0]}")

    def _agree(self, gtid: bytes, *, is_over: bool = False) -> None:
        """All that has ended of a transaction has ended alike, and as it was told."""
        deal = self.deals.get(gtid)
        if deal is None:
            return
        ends: dict[bool, str] = {}
        for part in deal.parts:
            if part.is_by_hand or not any(part.changes.values()):
                continue
            if part.state == State.COMMITTED:
                ends[True] = str(part)
            elif part.was_prepared and part.state == State.ROLLED_BACK:
                ends[False] = str(part)
        decision = self.decision(gtid)
        if decision is not None and deal.decider is None and (decision.is_committed or deal.keys):
            ends[decision.is_committed] = str(decision)
        if deal.told is not None and (is_over or not deal.told):
            ends[deal.told] = f"{deal.plan} of {deal.who} was told so"
        if len(ends) > 1:
            self.broken("atomic", f"committed: {ends[True]}; aborted: {ends[False]}")

    # -- replicated state alone

    def _withdraw(self, office: Office, stream: Stream) -> None:
        """Either of two accounts may be overdrawn as long as they are not together: whoever takes must have read both."""
        amount = stream.randint(1, 9)
        mine = stream.choice(PAIR)

        def withdraw(task: Task) -> OpGen[None]:
            overlay = Overlay(is_read_only=False, is_serializable=True)
            values = {}
            for key in PAIR:
                value = yield from overlay.get_gen(SKEW, key, office.deadline_ms)
                values[key] = 0 if value is None else decode(value)
            taken = -amount if sum(values.values()) >= amount else 20
            overlay.put(SKEW, mine, encode(values[mine] + taken))
            yield from office.state_only_gen(overlay.change(has_branches=False))

        def ended(task: Task) -> None:
            if isinstance(task.error, TransactionConflict):
                self.hit("tx_conflict")

        self.site.begin(office.worker, self.name, f"withdraw {amount} from {mine!r}", withdraw, ended, cost=2)

    def _look(self, office: Office, stream: Stream) -> None:
        """Read some of all that there is: there was a moment when it was like this."""
        places = stream.sample([(SKEW, key) for key in PAIR] + [(MAP, key) for key in ACCOUNTS], 3)

        def look(task: Task) -> OpGen[dict[tuple[bytes, bytes], bytes | None]]:
            overlay = Overlay(is_read_only=True, is_serializable=True)
            found = {}
            for name, key in places:
                found[name, key] = yield from overlay.get_gen(name, key, office.deadline_ms)
            return found

        def ended(task: Task) -> None:
            if isinstance(task.error, TransactionConflict):
                self.hit("tx_conflict_at_a_read")
            decisions = self.decisions
            if task.outcome is Outcome.DONE and decisions is not None:
                self.hit("tx_read_at_one_revision")
                if not decisions.were_together(task.result):
                    self.broken("one revision", f"{task}: it never was like this")

        self.site.begin(office.worker, self.name, f"look at {places}", look, ended)

    def check(self) -> None:
        if self._broken is not None:
            self.site.broken(*self._broken)
        decisions = self.decisions
        if decisions is None:
            return
        pair = [decode(value) for key in PAIR if (value := decisions.value(SKEW, key)) is not None]
        for vault in VAULT_NAMES:
            value = decisions.value(VAULTS, vault)
            token = 0 if value is None else decode(value)
            if token < self._vaults.get(vault, 0):
                self.broken(
                    "guards", f"{vault!r} was changed with token {token}, after {self._vaults[vault]}"
                )
            self._vaults[vault] = token
        if sum(pair) < 0:
            self.broken("serialisable", f"the two accounts hold {pair}: two took what only one could have")

    # -- the end

    @property
    def is_quiet(self) -> bool:
        decisions = self.decisions
        return (
            all(book.is_quiet for book in self.books)
            and all(office.is_quiet for office in self.offices.values())
            and (decisions is None or not any(d.pending for d in decisions.all.values()))
        )

    def describe(self) -> str:
        """What is not at rest."""
        lines = [
            str(part) for book in self.books for part in book.parts.values() if part.state == State.PREPARED
        ]
        lines += [f"{d} pending {[b.hex() for b in d.pending]}" for d in self._pending()]
        lines += [f"{o.worker.name}: {o.describe()}" for o in self.offices.values() if not o.is_quiet]
        return "; ".join(lines)

    def _pending(self) -> list[Decision]:
        decisions = self.decisions
        return [] if decisions is None else [d for d in decisions.all.values() if d.pending]

    def read_back(self, worker: Worker, client: str) -> OpGen[None]:
        if not self._is_used:
            return
        deadline_ms = worker.process.clock() + 5000
        total = 0
        for key in ACCOUNTS:
            reply = yield Step(RequestKind.QUERY, commands.query_get(MAP, key), deadline_ms)
            (value,) = commands.decode_reply(reply)
            balance, touched = (BALANCE, 0) if value is None else decode(value)
            total += balance
            known, unknown = self._touched[key]
            if not known <= touched <= known + unknown:
                self.broken(
                    "bank",
                    f"{key!r} was changed by {touched} transactions; {known} were told so, {unknown} do not know",
                )
        self._total_of_maps = total

    def judge(self) -> None:
        for gtid in self.deals:
            self._agree(gtid, is_over=True)
        by_hand = sum(
            sum(part.changes.values())
            for book in self.books
            for part in book.parts.values()
            if part.is_by_hand and self._is_committed(self.deals[part.gtid])
        )
        total = self._total_of_maps + by_hand + sum(book.total for book in self.books)
        expected = BALANCE * (len(ACCOUNTS) + sum(len(book.accounts) for book in self.books))
        if total != expected:
            self.broken("bank", f"there is {total}, and {expected} was put in")
