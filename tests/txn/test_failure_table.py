"""
The table of docs/transactions.md, "Who fails, and what happens": each row made to happen to real processes.

Three members, an initiator and a service in processes of their own, two PostgreSQL databases (and one of MariaDB, in the
tests that name it), a replicated map; this process has the databases registered, so that it finishes what others leave.
Every test ends with the same question: is the transfer in all of its places, or in none, with nothing in doubt, after no
longer than the table says? And is every transfer before it where it was, the sum of all being 0?

=========================================================  =============================================================
row                                                        made to happen by
=========================================================  =============================================================
initiator, before any prepare                              test_initiator_dies_before_any_prepare
initiator, after some or all promises, before DECIDE       test_initiator_dies_before_the_decision; stopped:
                                                           test_an_initiator_that_stands_still_loses; cut off:
                                                           test_partitions
initiator slow; somebody in doubt resolves first           test_an_initiator_that_stands_still_loses
initiator, DECIDE proposed, the answer is lost             test_partitions
initiator, after DECIDE                                    test_initiator_dies_after_the_decision
participant, before its promise                            test_service_dies_before_it_has_promised
participant, promised, the vote is lost                    test_service_dies_with_its_vote,
                                                           test_database_server_dies_with_its_vote
participant, after YES, before it is told                  test_service_dies_after_its_vote_and_is_away,
                                                           test_database_server_dies_after_its_vote; cut off:
                                                           test_partitions
participant, obeyed, the answer is lost                    test_service_dies_after_it_has_obeyed; a database:
                                                           test_partitions
an administrator ends a prepared branch                    test_an_administrator_rolls_back_what_is_committed,
                                                           test_an_administrator_commits_what_is_aborted
a database is put back from a back-up                      test_postgresql (test_a_database_with_another_history)
participant away for days                                  test_service_dies_after_its_vote_and_is_away
leader, before DECIDE is committed                         test_leader_dies_with_a_decision[proposed]; cut off:
                                                           test_partitions
leader, after the commit, before the reply                 test_leader_dies_with_a_decision[committed]
leader, at any moment                                      test_leader_dies_at_any_moment
no quorum, then back                                       test_the_quorum_is_lost_before_the_decision
one phase, the connection breaks in COMMIT                 test_partitions, test_server_dies_in_a_commit_in_one_phase
last resource's process, before or after its commit        test_last_resource_dies_with_its_process
a clock jumps                                              test_clocks_jump
messages late, doubled, out of order                       test_messages_come_again_in_another_order
a swallowed SQL error                                      test_a_swallowed_error_is_a_no
fork in a transaction                                      test_a_fork_in_a_transaction_is_not_in_it
=========================================================  =============================================================

Random kills and cuts of everything at once: `make bank`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from coordlib.api import coordinator
from coordlib.errors import CoordError, HeuristicOutcome, TransactionAborted
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.testing.databases import MariaDBServer, PostgreSQLServer
from coordlib.txn import commit
from coordlib.txn.branches import Finish
from coordlib.txn.resources.common import ResourceBusy
from coordlib.txn.resources.mariadb import MariaDB, MariaDBBranch
from coordlib.txn.resources.postgresql import PostgreSQLBranch
from coordlib.txn.service import RemoteMember, Status, decode_answer
from coordlib.txn.transaction import Transaction
from coordlib.wire.messages import RequestKind
from tests.txn.failing import shares
from tests.txn.stage import EVERYWHERE, NOWHERE, SEARCH_EVERY_MS, Bounds, Stage

pytestmark = pytest.mark.timeout(170)

WITH_MARIADB = ["first", "third", "vault", "map"]
BOTH = [pytest.param(EVERYWHERE, id="postgresql"), pytest.param(WITH_MARIADB, id="mariadb")]


@pytest.fixture(scope="module")
def stage(
    postgresql_server: PostgreSQLServer,
    mariadb_server: MariaDBServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SEARCH_EVERY_MS", "SEARCH_AGAIN_MS"):
            patch.setattr(coordinator, name, SEARCH_EVERY_MS)
        directory = tmp_path_factory.mktemp("failures")
        with Stage(
            postgresql_server,
            directory,
            "failures",
            mariadb=mariadb_server,
            program="tests.txn.failing_member",
        ) as stage:
            yield stage


def book(stage: Stage, number: str, places: list[str], timeout: float = 30.0) -> None:
    """A transfer of this very process."""
    stage.all_ready()
    with stage.cluster.transaction(timeout=timeout) as tx:
        for place, change in shares(places).items():
            if place == "map":
                stage.cluster.map("transfers")[number] = change
            elif place == "vault":
                stage.cluster.service("vault").book(number, change)
            else:
                cursor = tx.enlist(stage.resources[place]).cursor()
                cursor.execute("INSERT INTO transfers VALUES (%s, %s)", (number, change))


# -- nobody


@pytest.mark.parametrize("places", BOTH)
def test_without_failures_it_is_everywhere(stage: Stage, places: list[str]) -> None:
    """And nothing is pending: what the other rows are compared with."""
    initiator = stage.transfer(f"calm-{places[1]}", places)
    assert initiator.said() == "committed"
    stage.await_end(f"calm-{places[1]}", places, Bounds.told)
    stage.rest(initiator)


# -- the initiator


def test_initiator_dies_before_any_prepare(stage: Stage) -> None:
    """Nobody has promised: databases let go with its connections, the service when the time is over."""
    stage.transfer("r1", crash="before-prepare", timeout=2.0).died()
    stage.await_end("r1", NOWHERE, 2.0 + Bounds.look + Bounds.answer)


@pytest.mark.parametrize(
    ("crash", "places"),
    [
        pytest.param("after-one-promise", EVERYWHERE, id="some"),
        pytest.param("after-prepare", EVERYWHERE, id="all"),
        pytest.param("after-prepare", WITH_MARIADB, id="all-mariadb"),
    ],
)
def test_initiator_dies_before_the_decision(stage: Stage, crash: str, places: list[str]) -> None:
    """Everybody rolls back when its session has ended, long before the transaction's own time."""
    number = f"r2-{crash}-{places[1]}"
    stage.transfer(number, places, crash=crash).died()
    if crash == "after-prepare":
        assert len(stage.prepared()) == 2
    stage.await_end(number, NOWHERE, Bounds.undecided)


def test_an_initiator_that_stands_still_loses(stage: Stage) -> None:
    """Those who promised do not wait for it: they ask, and that decides. It hears so when it goes on."""
    initiator = stage.transfer("r3", WITH_MARIADB, pause="before-decide", timeout=3.0)
    assert initiator.said() == "waiting"
    initiator.signal(signal.SIGSTOP)
    try:
        # A branch of MariaDB's is let go when its session has been idle for the transaction's time.
        stage.await_end("r3", NOWHERE, 3.0 + Bounds.undecided)
    finally:
        initiator.signal(signal.SIGCONT)
    initiator.go_on()
    assert initiator.said() == "aborted resolved"
    stage.await_end("r3", NOWHERE, Bounds.told)
    stage.rest(initiator)


@pytest.mark.parametrize("places", BOTH)
def test_initiator_dies_after_the_decision(stage: Stage, places: list[str]) -> None:
    """Others find what is prepared and commit it: the service by asking, the databases by this process's search."""
    stage.transfer(f"r5-{places[1]}", places, crash="after-decide").died()
    stage.await_end(f"r5-{places[1]}", places, Bounds.decided)


# -- the service


def test_service_dies_before_it_has_promised(stage: Stage) -> None:
    """Everything is aborted."""
    host = stage.host("host-called")
    initiator = stage.transfer("r6", timeout=3.0)
    host.died()
    assert initiator.said().split()[0] in ("ServiceUnreachable", "CallLost", "CallTimeout", "aborted")
    stage.await_end("r6", NOWHERE, Bounds.told)
    stage.rest(initiator)


def test_service_dies_with_its_vote(stage: Stage) -> None:
    """Its promise is durable and nobody knows: aborted; back again, it asks and lets go."""
    host = stage.host("host-promised")
    initiator = stage.transfer("r7", timeout=3.0)
    host.died()
    assert initiator.said() == "aborted vote-no"
    stage.host()
    stage.await_end("r7", NOWHERE, Bounds.decided)
    stage.rest(initiator)


def test_service_dies_after_its_vote_and_is_away(stage: Stage) -> None:
    """The decision stands, and the others have obeyed; it is pending until the service is back, and obeys."""
    host = stage.host("host-told")
    initiator = stage.transfer("r8")
    host.died()
    assert initiator.said() == "committed"
    stage.until(lambda: not stage.prepared(), Bounds.decided)
    assert stage.found("r8") == ["first", "second", "map"]
    assert len(stage.pending()) == 1
    stage.host()
    stage.await_end("r8", EVERYWHERE, Bounds.decided)
    stage.rest(initiator)


def test_service_dies_after_it_has_obeyed(stage: Stage) -> None:
    """Its answer is lost; back again it has nothing to do, and what was pending is forgotten."""
    host = stage.host("host-obeyed")
    initiator = stage.transfer("r9")
    host.died()
    assert initiator.said() == "committed"
    stage.host()
    stage.await_end("r9", EVERYWHERE, Bounds.told + 2 * coordinator.SEARCH_EVERY_MS / 1000)
    stage.rest(initiator)


# -- a database's server


def strike_once(
    monkeypatch: pytest.MonkeyPatch, branches: list[tuple[type, str]], strike: Any, *, is_after: bool
) -> list[str]:
    """Have something done once, before or after the first of these branches does this; returns which it was."""
    lock, struck = threading.Lock(), list[str]()

    def hit(branch: Any) -> None:
        with lock:
            if not struck:
                struck.append(branch.resource.name)
                strike(branch)

    def wrap(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def flow(branch: Any) -> Any:
            if not is_after:
                hit(branch)
            result = yield from original(branch)
            if is_after:
                hit(branch)
            return result

        def plain(branch: Any) -> Any:
            if not is_after:
                hit(branch)
            result = original(branch)
            if is_after:
                hit(branch)
            return result

        monkeypatch.setattr(kind, name, flow if name.endswith("_gen") else plain)

    for kind, name in branches:
        wrap(kind, name)
    return struck


def test_database_server_dies_with_its_vote(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had prepared is there when it comes back, and nobody heard of it: aborted, and rolled back."""
    server = stage.databases["first"].server
    promised: list[str] = []

    def strike(branch: Any) -> None:
        promised.extend(stage.databases[branch.resource.name].prepared())
        server.kill()
        raise psycopg.OperationalError("its answer was lost")

    strike_once(monkeypatch, [(PostgreSQLBranch, "_prepare_gen")], strike, is_after=True)
    with pytest.raises(TransactionAborted) as caught:
        book(stage, "r7-server", EVERYWHERE)
    assert caught.value.reason == "vote-no"
    assert len(promised) == 1
    server.start()
    stage.await_end("r7-server", NOWHERE, Bounds.told)


@pytest.mark.parametrize("other", ["second", "third"])
def test_database_server_dies_after_its_vote(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """The decision stands, and is what the caller hears; what was prepared is there when it comes back, and is committed."""
    number, places = f"r18-{other}", ["first", other, "map"]
    kind, name = (PostgreSQLBranch, "_commit_gen") if other == "second" else (MariaDBBranch, "commit")
    server = stage.databases[other].server
    struck = strike_once(monkeypatch, [(kind, name)], lambda branch: server.kill(), is_after=False)
    book(stage, number, places)
    assert struck
    server.start()
    stage.await_end(number, places, Bounds.told)


def test_server_dies_in_a_commit_in_one_phase(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no record of the transaction: back again, the server is asked for its number, and has not committed."""
    server = stage.databases["first"].server
    kind = (PostgreSQLBranch, "_end_locally_gen")
    strike_once(monkeypatch, [kind], lambda branch: server.restart(), is_after=False)
    with pytest.raises(TransactionAborted, match="nothing was committed"):
        book(stage, "r15-server", ["first"])
    stage.await_end("r15-server", NOWHERE, Bounds.told)


# -- people


def before_the_decision(monkeypatch: pytest.MonkeyPatch, act: Callable[[bytes], object]) -> None:
    """Of this process: everybody has promised, which is known, and nobody may conclude anything yet. `act` is told of what."""
    original = commit._decide_body

    def decide(tx: Transaction, gtid: bytes) -> bytes:
        act(tx.gtid)
        return original(tx, gtid)

    monkeypatch.setattr(commit, "_decide_body", decide)


def roll_back_by_hand(stage: Stage, branches: list[MariaDBBranch]) -> None:
    """
    In MariaDB. While the connection of a branch lives, the server lets nobody else end it; and in the moment in which it
    closes the server may claim to have done what it has not: for that a resource waits.
    """
    (branch,) = branches
    branch.connection._force_close()  # type: ignore[attr-defined]
    with contextlib.closing(stage.databases["third"].resource("third")) as administrator:
        administrator.open(branch.resource.cluster)
        (found,) = administrator.prepared()

        def has_ended() -> bool:
            try:
                return administrator.finish(found, False) is Finish.DONE
            except ResourceBusy:
                return False

        stage.until(has_ended, Bounds.answer)


@pytest.mark.parametrize("other", ["second", "third"])
def test_an_administrator_rolls_back_what_is_committed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """A half done transaction, and no other kind there is: it is noticed, raised, and on record for people."""
    number = f"broken-{other}"
    branches: list[MariaDBBranch] = []
    begin = MariaDB.begin

    def noted(*args: Any) -> MariaDBBranch:
        branches.append(begin(*args))
        return branches[-1]

    monkeypatch.setattr(MariaDB, "begin", noted)

    def interfere(_: bytes) -> None:
        if other == "second":
            stage.databases["second"].end_by_hand("ROLLBACK")
        else:
            roll_back_by_hand(stage, branches)

    before_the_decision(monkeypatch, interfere)
    with pytest.raises(HeuristicOutcome) as caught:
        book(stage, number, ["first", other])
    assert stage.found(number) == ["first"]
    assert len(caught.value.branches) == 1
    assert stage.cluster.outcome(caught.value.gtid) == "committed"
    stage.await_end(number, ["first"], Bounds.told)


def test_an_administrator_commits_what_is_aborted(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same the other way round: one database has it, nobody else does."""

    def interfere(gtid: bytes) -> None:
        stage.databases["first"].end_by_hand("COMMIT")
        with stage.client() as other:
            other._run(resolve(gtid))

    def resolve(gtid: bytes) -> OpGen[Any]:
        yield Step(RequestKind.COMMAND, commands.tx_resolve(gtid), monotonic_ms() + 10_000)

    before_the_decision(monkeypatch, interfere)
    with pytest.raises(HeuristicOutcome) as caught:
        book(stage, "broken-first", ["first", "second"])
    assert stage.cluster.outcome(caught.value.gtid) == "aborted"
    stage.await_end("broken-first", ["first"], Bounds.told)


# -- the cluster


@pytest.mark.parametrize("moment", ["proposed", "committed"])
def test_leader_dies_with_a_decision(stage: Stage, moment: str) -> None:
    """Nobody else has it yet, or all have it and nobody was told: the same request, at the next leader, the same outcome."""
    number = f"r12-{moment}"
    initiator = stage.transfer(number, pause="before-decide")
    assert initiator.said() == "waiting"
    stage.all_ready()
    leader = stage.fleet.leader()
    leader.do("arm", moment=moment)
    initiator.go_on()
    assert initiator.said() == "committed"
    assert leader.kill() == -signal.SIGKILL  # it had done so itself
    (last,) = [line for line in stage.fleet.logs()[leader.name].splitlines() if line.startswith("died:")]
    index, committed = (int(word.strip(",")) for word in (last.split()[4], last.split()[6]))
    assert f"decision {moment}" in last
    assert (committed >= index) == (moment == "committed")
    stage.await_end(number, EVERYWHERE, Bounds.told)
    stage.fleet.restart(leader.name)
    stage.rest(initiator)


def test_leader_dies_at_any_moment(stage: Stage) -> None:
    """One transfer after another while it does: each is whole, and has the outcome that was said."""
    leader = stage.fleet.leader()
    killer = threading.Timer(0.3, leader.kill)
    outcomes: dict[str, list[str]] = {}
    places = ["first", "second", "map"]
    killer.start()
    while killer.is_alive() or len(outcomes) < 20:
        number = f"r13-{len(outcomes)}"
        try:
            book(stage, number, places, timeout=20.0)
            outcomes[number] = places
        except TransactionAborted:
            outcomes[number] = NOWHERE
    killer.join()
    stage.await_ends(outcomes, Bounds.told)
    assert places in outcomes.values()
    stage.fleet.restart(leader.name)


def test_the_quorum_is_lost_before_the_decision(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has promised waits, however long; with the quorum back it has one outcome, everywhere."""
    victims = sorted(stage.fleet.members)[:2]

    def outage(_: bytes) -> None:
        assert len(stage.prepared()) == 2
        for name in victims:
            stage.fleet.members[name].kill()

    before_the_decision(monkeypatch, outage)
    outcome = "committed"
    try:
        book(stage, "r14", ["first", "second", "vault"], timeout=1.5)
    except CoordError as error:
        outcome = type(error).__name__
    # With the two gone nothing can be decided; and nobody who has promised has done anything by itself.
    assert outcome == "TransactionOutcomeUnknown"
    assert len(stage.prepared()) == 2
    for name in victims:
        stage.fleet.restart(name, is_waited_for=False)
    for name in victims:
        stage.fleet.members[name].answer()
    stage.until(lambda: not stage.prepared() and not stage.pending(), Bounds.told + Bounds.decided)
    found = stage.found("r14")
    assert found in (NOWHERE, ["first", "second", "vault"])
    stage.await_end("r14", found, Bounds.decided)


# -- the last resource


@pytest.mark.parametrize(
    ("crash", "places"),
    [("before-last-resource", NOWHERE), ("after-last-resource", ["first", "second", "vault"])],
)
def test_last_resource_dies_with_its_process(stage: Stage, crash: str, places: list[str]) -> None:
    """The others are in doubt until it is back; then they do what it did, or it never will do it."""
    number = f"r16-{crash}"
    stage.transfer(number, ["first", "second", "vault"], crash=crash, with_notes=True).died()
    assert len(stage.prepared()) == 2
    assert stage.found(number) == NOWHERE
    stage.cluster._coordinator.recover()
    assert len(stage.prepared()) == 2  # nobody here can tell
    back = stage.transfer("", [], with_notes=True)
    assert back.said() == "here"
    stage.await_end(number, places, Bounds.decided)
    stage.rest(back)


# -- the application


def test_messages_come_again_in_another_order(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a service was sent of a transaction, sent again backwards after its end: nothing happens any more."""
    sent: list[Step] = []
    original = RemoteMember._step

    def noted(self: RemoteMember, *args: Any, **kwargs: Any) -> Step:
        sent.append(original(self, *args, **kwargs))
        return sent[-1]

    monkeypatch.setattr(RemoteMember, "_step", noted)
    book(stage, "r17-committed", EVERYWHERE)
    with pytest.raises(ZeroDivisionError), stage.cluster.transaction(timeout=30):
        stage.cluster.service("vault").book("r17-aborted", 1)
        raise ZeroDivisionError
    monkeypatch.undo()
    stage.await_end("r17-committed", EVERYWHERE, Bounds.told)
    assert len(sent) == 5  # CALL, PREPARE, COMMIT; CALL, ABORT

    def again(step: Step) -> OpGen[int]:
        late = Step(step.kind, step.body, monotonic_ms() + 10_000, target=step.target)
        return decode_answer((yield late)).status

    told = [stage.cluster._run(again(step)) for step in [*reversed(sent), *sent]]
    answers = [
        Status.ENDED,
        Status.ENDED,
        Status.ENDED,
        Status.ENDED,
        Status.REFUSED,
    ]  # the first call of all
    assert told == [*answers, *reversed(answers)]
    stage.await_end("r17-committed", EVERYWHERE, Bounds.told)
    stage.await_end("r17-aborted", NOWHERE, Bounds.told)


def test_a_swallowed_error_is_a_no(stage: Stage) -> None:
    """The application has caught it, and goes on; its branch has not forgotten."""
    initiator = stage.transfer("r19", does="swallow")
    assert initiator.said() == "aborted vote-no"
    stage.await_end("r19", NOWHERE, Bounds.told)
    stage.rest(initiator)


def test_a_fork_in_a_transaction_is_not_in_it(stage: Stage) -> None:
    """The child is refused everything; its end ends nothing of the parent's, which commits."""
    initiator = stage.transfer("r20", does="fork")
    assert initiator.said() == "committed"
    stage.await_end("r20", EVERYWHERE, Bounds.told)
    stage.rest(initiator)


def test_clocks_jump(stage: Stage) -> None:
    """
    One that differs says nothing; a quorum that does moves log time, and aborts what had time left. Nothing differs
    anywhere.

    The last test: the time of this cluster is an hour ahead from here on.
    """
    initiator = stage.transfer("r21-one", pause="before-decide")
    assert initiator.said() == "waiting"
    stage.fleet.leader().do("jump", ms=3_600_000)
    initiator.go_on()
    assert initiator.said() == "committed"
    stage.await_end("r21-one", EVERYWHERE, Bounds.told)
    stage.rest(initiator)
    initiator = stage.transfer("r21-all", pause="before-decide")
    assert initiator.said() == "waiting"
    before = stage.log_time_ms()
    for member in stage.fleet.members.values():
        member.do("jump", ms=3_600_000)
    stage.until(lambda: stage.log_time_ms() > before + 3_000_000, Bounds.answer)
    initiator.go_on()
    assert initiator.said() == "aborted deadline"
    stage.await_end("r21-all", NOWHERE, Bounds.told)
    for member in stage.fleet.members.values():
        member.do("jump", ms=-3_600_000)
    stage.rest(initiator)
    initiator = stage.transfer("r21-back")
    assert initiator.said() == "committed"
    stage.await_end("r21-back", EVERYWHERE, Bounds.told)
