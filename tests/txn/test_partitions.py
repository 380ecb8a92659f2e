"""
The rows of the table in docs/transactions.md in which nobody dies: links are cut, of real processes.

As in test_failure_table, but all that the processes send each other and the databases goes through proxies: members to each
other, the initiator and the service to the members, both to the databases. This process has direct ways: it is the one with
the databases registered that is not cut off, and finishes what those leave that are.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.links import Links
from coordlib.api import coordinator
from coordlib.testing.databases import PostgreSQLServer
from tests.txn.stage import EVERYWHERE, NOWHERE, SEARCH_EVERY_MS, Bounds, Process, Stage

pytestmark = pytest.mark.timeout(170)

MEMBERS = ("n1", "n2", "n3")
DATABASES = ("first", "second")


@pytest.fixture(scope="module")
def links(postgresql_server: PostgreSQLServer) -> Iterator[Links]:
    servers = dict.fromkeys(DATABASES, str(postgresql_server.socket))
    with Links(MEMBERS, ("initiator", "host"), servers) as links:
        yield links


@pytest.fixture(scope="module")
def stage(
    postgresql_server: PostgreSQLServer, links: Links, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SEARCH_EVERY_MS", "SEARCH_AGAIN_MS"):
            patch.setattr(coordinator, name, SEARCH_EVERY_MS)
        directory = tmp_path_factory.mktemp("partitions")
        with Stage(postgresql_server, directory, "partitions", links=links) as stage:
            yield stage


def waiting(
    stage: Stage,
    number: str,
    places: list[str] = EVERYWHERE,
    *,
    pause: str = "before-decide",
    timeout: float = 20.0,
) -> Process:
    """An initiator that waits there."""
    initiator = stage.transfer(number, places, pause=pause, timeout=timeout)
    assert initiator.said() == "waiting"
    return initiator


def test_a_vote_never_comes(stage: Stage, links: Links) -> None:
    """A database has promised and nobody heard it. The others wait for the transaction's time, no longer."""
    timeout = 3.0
    initiator = waiting(stage, "p0", pause="before-prepare", timeout=timeout)
    links.cut([("second", "initiator")])
    initiator.go_on()
    stage.until(lambda: links.kept_bytes("second", "initiator"), Bounds.answer)
    stage.await_end("p0", NOWHERE, timeout + Bounds.decided)
    links.heal()
    assert initiator.said() == "aborted vote-no"
    stage.rest(initiator)


def test_initiator_is_cut_off_before_the_decision(stage: Stage, links: Links) -> None:
    """For the others it is dead when its session has ended: aborted. It hears so when it is back."""
    initiator = waiting(stage, "p1")
    links.isolate("initiator", MEMBERS)
    initiator.go_on()
    stage.await_end("p1", NOWHERE, Bounds.undecided)
    assert links.heal().number > 0
    assert initiator.said() == "aborted resolved"
    stage.await_end("p1", NOWHERE, Bounds.told)
    stage.rest(initiator)


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_answer_to_the_decision_is_lost(stage: Stage, links: Links, is_killed: bool) -> None:
    """It is decided, and the initiator cannot know; everybody else is told. Back again, or asked for by others, it is known."""
    number = f"p2-{is_killed}"
    initiator = waiting(stage, number)
    links.cut([(member, "initiator") for member in MEMBERS])
    initiator.go_on()
    stage.await_end(number, EVERYWHERE, Bounds.undecided)
    assert any(links.kept_bytes(member, "initiator") for member in MEMBERS)
    if is_killed:
        initiator.kill()
        links.heal()
        return
    links.heal()
    assert initiator.said() == "committed"
    stage.rest(initiator)


def test_no_answer_comes_in_time(stage: Stage, links: Links) -> None:
    """The initiator says that it does not know, and by what name to ask; that has the one outcome."""
    initiator = waiting(stage, "p3", timeout=2.0)
    links.cut([(member, "initiator") for member in MEMBERS])
    initiator.go_on()
    error, gtid = initiator.said().split()
    assert error == "TransactionOutcomeUnknown"
    outcome = stage.cluster.outcome(bytes.fromhex(gtid))
    assert outcome in ("committed", "aborted")
    links.heal()
    stage.await_end("p3", EVERYWHERE if outcome == "committed" else NOWHERE, Bounds.decided)
    stage.rest(initiator)


def test_service_is_cut_off_after_its_vote(stage: Stage, links: Links) -> None:
    """The others obey; it does when it is back."""
    initiator = waiting(stage, "p4")
    links.isolate("host", MEMBERS)
    initiator.go_on()
    assert initiator.said() == "committed"
    stage.until(lambda: not stage.prepared(), Bounds.decided)
    assert stage.found("p4") == ["first", "second", "map"]
    assert len(stage.pending()) == 1
    links.heal()
    stage.await_end("p4", EVERYWHERE, Bounds.decided)
    stage.rest(initiator)


def test_leader_is_cut_off_before_the_decision(stage: Stage, links: Links) -> None:
    """It cannot decide; the next one does, by the same request."""
    initiator = waiting(stage, "p5")
    leader = stage.fleet.leader()
    links.isolate(leader.name, [name for name in MEMBERS if name != leader.name])
    initiator.go_on()
    assert initiator.said() == "committed"
    stage.await_end("p5", EVERYWHERE, Bounds.told)
    assert links.heal().number > 0
    assert stage.fleet.leader().name != leader.name
    stage.rest(initiator)


def test_a_member_is_cut_off_from_everybody(stage: Stage, links: Links) -> None:
    """Whichever it is: what is decided without it is what it learns."""
    for number, name in enumerate(MEMBERS):
        initiator = waiting(stage, f"p6-{number}")
        links.isolate(name, [*(other for other in MEMBERS if other != name), "initiator", "host"])
        initiator.go_on()
        assert initiator.said() == "committed"
        stage.await_end(f"p6-{number}", EVERYWHERE, Bounds.told)
        links.heal()
        stage.rest(initiator)


@pytest.mark.parametrize("direction", ["request", "answer"])
def test_database_is_cut_off_from_who_has_to_tell_it(stage: Stage, links: Links, direction: str) -> None:
    """What it has promised, others have it do; or it has done it, and that is found when it is told again."""
    number = f"p7-{direction}"
    initiator = waiting(stage, number, pause="after-decide", timeout=2.0)
    link = ("initiator", "second") if direction == "request" else ("second", "initiator")
    links.cut([link])
    initiator.go_on()
    stage.await_end(number, EVERYWHERE, Bounds.decided)
    assert links.kept_bytes(*link) > 0
    assert initiator.said() == "committed"
    links.heal()
    stage.rest(initiator)


@pytest.mark.parametrize("direction", ["request", "answer"])
def test_database_is_cut_off_during_a_commit_in_one_phase(stage: Stage, links: Links, direction: str) -> None:
    """Asked for the number of the transaction, it says whether that has happened."""
    number = f"p8-{direction}"
    initiator = waiting(stage, number, ["second"], pause="before-one-phase")
    link = ("initiator", "second") if direction == "request" else ("second", "initiator")
    links.cut([link])
    initiator.go_on()
    stage.until(lambda: links.kept_bytes(*link), Bounds.answer)
    has_happened = direction == "answer"
    stage.until(lambda: (stage.found(number) == ["second"]) is has_happened, Bounds.answer)
    links.heal()
    assert initiator.said() == ("committed" if has_happened else "aborted vote-no")
    stage.await_end(number, ["second"] if has_happened else NOWHERE, Bounds.told)
    stage.rest(initiator)
