"""
The table of docs/transactions.md, "Who fails, and what happens": each row made to happen to real processes.

Three members, an initiator and a service in processes of their own, two PostgreSQL databases, a replicated map; this process
has the databases registered, so that it finishes what others leave. Every test ends with the same question: is the
transfer in all of them, or in none, with nothing in doubt any more?

Rows that need no process to fail are tested where they belong: one phase and a lost connection, a swallowed error
(test_postgresql, test_mariadb), late, doubled and reordered messages (test_participant), clocks (the simulator), forks
(tests/api). Random kills of everything at once: `make bank`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import coordlib
from benchmarks.processes import Fleet
from coordlib.api import coordinator
from coordlib.errors import HeuristicOutcome, TransactionAborted
from coordlib.machine import commands
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.testing.databases import PostgreSQLServer
from coordlib.txn.branches import Vote
from coordlib.txn.resources import PostgreSQL
from coordlib.txn.resources.postgresql import PostgreSQLBranch
from coordlib.wire.messages import RequestKind

pytestmark = pytest.mark.timeout(170)

ROOT = Path(__file__).resolve().parent.parent.parent
SESSION_TTL_SECONDS = 2.0
SEARCH_EVERY_MS = 500
BOUND_SECONDS = 60.0  # far above what the table says: a test that waits for so long has found something


class Process:
    """One of `tests.txn.failing`."""

    def __init__(self, stage: Stage, role: str, crash: str, **given: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.txn.failing", role],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        settings = {
            "crash": crash,
            "endpoints": list(stage.fleet.endpoints.values()),
            "secret": stage.fleet.secret,
            "session_ttl": SESSION_TTL_SECONDS,
            "dsns": stage.dsns,
            "search_every_ms": SEARCH_EVERY_MS,
            "directory": str(stage.directory / "vault"),
            **given,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()

    def said(self) -> str:
        """Its next line; empty when it has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def died(self) -> None:
        """It has killed itself."""
        assert self.said() == ""
        assert self._process.wait() == -9

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Stage:
    """The members, the databases, and this process as one that has them registered."""

    def __init__(self, server: PostgreSQLServer, directory: Path, name: str) -> None:
        self.directory = directory
        self.server = server
        self.dsns: dict[str, str] = {}
        self._processes: list[Process] = []
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for place in ("first", "second"):
                connection.execute(f'CREATE DATABASE "{name}-{place}"')
                self.dsns[place] = server.dsn(f"{name}-{place}")
        for dsn in self.dsns.values():
            with psycopg.connect(dsn) as connection:
                connection.execute("CREATE TABLE transfers (number text PRIMARY KEY, amount bigint NOT NULL)")
        self.fleet = Fleet(str(directory), members=3, session_ttl=SESSION_TTL_SECONDS)

    def __enter__(self) -> Stage:
        self.fleet.__enter__()
        try:
            self.cluster = coordlib.connect(
                list(self.fleet.endpoints.values()), cluster="bench", secret=self.fleet.secret
            )
            self.cluster.start()
            self.databases = [
                self.cluster.resource(PostgreSQL(name, dsn, is_durable=False))
                for name, dsn in self.dsns.items()
            ]
        except BaseException:
            self.fleet.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.close(timeout=1)
        for database in self.databases:
            database.close()
        for process in self._processes:
            process.end()
        self.fleet.close()

    def host(self, crash: str = "") -> Process:
        process = Process(self, "host", crash)
        self._processes.append(process)
        assert process.said() == "open"
        return process

    def initiator(
        self, number: str = "", crash: str = "", *, timeout: float = 30.0, with_notes: bool = False
    ) -> Process:
        notes = str(self.directory / "notes.db") if with_notes else ""
        process = Process(self, "initiator", crash, number=number, timeout=timeout, notes=notes)
        self._processes.append(process)
        assert process.said() == "open"
        return process

    def found(self, number: str) -> set[str]:
        """Where the transfer is."""
        places: set[str] = set()
        for name, dsn in self.dsns.items():
            with psycopg.connect(dsn) as connection:
                if connection.execute("SELECT 1 FROM transfers WHERE number = %s", (number,)).fetchone():
                    places.add(name)
        path = self.directory / "vault" / "vault"
        if path.exists() and any(line.split()[0] == number for line in path.read_text().splitlines()):
            places.add("vault")
        if number in self.cluster.map("transfers"):
            places.add("map")
        return places

    def prepared(self) -> list[str]:
        """What the databases hold prepared."""
        with psycopg.connect(self.server.dsn()) as connection:
            rows = connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall()
        return [gid for (gid,) in rows]

    def pending(self) -> list[Any]:
        """Transactions that somebody has not obeyed."""

        def ask() -> OpGen[Any]:
            body = commands.query_tx_list(None, 100, True)
            reply = yield Step(RequestKind.QUERY, body, monotonic_ms() + 10_000)
            return commands.decode_reply(reply)[0]

        return list(self.cluster._run(ask()))

    def await_end(self, number: str, places: set[str]) -> None:
        """Until nothing is in doubt and the transfer is exactly there. It must never be seen where it is not to be."""
        deadline = time.monotonic() + BOUND_SECONDS
        while True:
            found, left = self.found(number), [*self.prepared(), *self.pending()]
            assert found <= places, f"{number} is half done, or done against what was decided: {found}"
            if found == places and not left:
                return
            assert time.monotonic() < deadline, f"{found} of {places}, in doubt: {left}"
            time.sleep(0.05)  # between two looks; what is waited for is others' recovery

    def await_prepared(self, count: int) -> None:
        deadline = time.monotonic() + BOUND_SECONDS
        while len(self.prepared()) != count:
            assert time.monotonic() < deadline
            time.sleep(0.05)


EVERYWHERE = {"first", "second", "vault", "map"}
NOWHERE: set[str] = set()


@pytest.fixture(scope="module")
def stage(postgresql_server: PostgreSQLServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        # These processes search oftener than others would: what is tested is that it finds, not how long that takes.
        for name in ("SEARCH_EVERY_MS", "SEARCH_AGAIN_MS"):
            patch.setattr(coordinator, name, SEARCH_EVERY_MS)
        with Stage(postgresql_server, tmp_path_factory.mktemp("failures"), "failures") as stage:
            yield stage


def test_without_failures_it_is_everywhere(stage: Stage) -> None:
    """And nothing is pending: what the other rows are compared with."""
    host = stage.host()
    assert stage.initiator("calm").said() == "committed"
    stage.await_end("calm", EVERYWHERE)
    host.end()


def test_initiator_dies_before_any_prepare(stage: Stage) -> None:
    """Nobody has promised: databases let go with its connections, the service when the time is over."""
    host = stage.host()
    stage.initiator("r1", "before-prepare", timeout=2.0).died()
    stage.await_end("r1", NOWHERE)
    host.end()


def test_initiator_dies_after_the_promises_and_before_the_decision(stage: Stage) -> None:
    """Everybody rolls back when its session has ended, long before the transaction's own time."""
    host = stage.host()
    stage.initiator("r2", "after-prepare").died()
    assert len(stage.prepared()) == 2
    stage.await_end("r2", NOWHERE)
    host.end()


def test_somebody_in_doubt_is_faster_than_a_slow_initiator(stage: Stage) -> None:
    """The first entry decides: it is aborted for everybody, the initiator included."""

    class Slow:
        """Has the outcome asked for by somebody else while the others promise."""

        name, tag, bqual, is_last_resource = "slow", b"slow!", b"slow", False

        def __init__(self, tx: coordlib.Transaction) -> None:
            self.resource, self._tx = self, tx

        def prepare(self) -> Vote:
            def resolve() -> OpGen[None]:
                yield Step(RequestKind.COMMAND, commands.tx_resolve(self._tx.gtid), monotonic_ms() + 10_000)

            with stage_client(stage) as other:
                other._run(resolve())
            return Vote.READ_ONLY

        def rollback(self) -> None: ...

    with pytest.raises(TransactionAborted) as caught, stage.cluster.transaction(timeout=30) as tx:
        for database in stage.databases:
            tx.enlist(database).execute("INSERT INTO transfers VALUES ('r3', 1)")
        tx.enlist(Slow(tx))
    assert caught.value.reason == "resolved"
    stage.await_end("r3", NOWHERE)


@contextlib.contextmanager
def stage_client(stage: Stage) -> Iterator[coordlib.Cluster]:
    endpoints = list(stage.fleet.endpoints.values())
    with coordlib.connect(endpoints, cluster="bench", secret=stage.fleet.secret) as client:
        yield client


def test_initiator_dies_after_the_decision(stage: Stage) -> None:
    """Others find what is prepared and commit it: the service by asking, the databases by this process's search."""
    host = stage.host()
    stage.initiator("r5", "after-decide").died()
    stage.await_end("r5", EVERYWHERE)
    host.end()


def test_participant_dies_before_it_has_promised(stage: Stage) -> None:
    """Everything is aborted."""
    host = stage.host("host-called")
    initiator = stage.initiator("r6", timeout=5.0)
    host.died()
    assert initiator.said() in ("ServiceUnreachable", "CallLost", "CallTimeout", "aborted vote-no")
    stage.await_end("r6", NOWHERE)


def test_participant_dies_with_its_vote(stage: Stage) -> None:
    """Its promise is durable and nobody knows: aborted; back again, it asks and lets go."""
    host = stage.host("host-promised")
    initiator = stage.initiator("r7", timeout=5.0)
    host.died()
    assert initiator.said() == "aborted vote-no"
    host = stage.host()
    stage.await_end("r7", NOWHERE)
    host.end()


def test_participant_dies_after_its_vote_and_is_away(stage: Stage) -> None:
    """The decision stands, and the others have obeyed; it is pending until the participant is back, and obeys."""
    host = stage.host("host-told")
    initiator = stage.initiator("r8")
    host.died()
    assert initiator.said() == "committed"
    stage.await_prepared(0)
    assert stage.found("r8") == EVERYWHERE - {"vault"}
    assert len(stage.pending()) == 1
    host = stage.host()
    stage.await_end("r8", EVERYWHERE)
    host.end()


def test_participant_dies_after_it_has_obeyed(stage: Stage) -> None:
    """Its answer is lost; back again it has nothing to do, and what was pending is forgotten."""
    host = stage.host("host-obeyed")
    initiator = stage.initiator("r9")
    host.died()
    assert initiator.said() == "committed"
    host = stage.host()
    stage.await_end("r9", EVERYWHERE)
    host.end()


def test_an_administrator_rolls_back_a_prepared_branch(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only half done transaction there is: it is noticed, raised, and on record for people."""
    commit = PostgreSQLBranch._commit_gen  # blocking and polled alike

    def interfere(branch: PostgreSQLBranch) -> Any:
        if branch.resource.name == "second":
            with psycopg.connect(stage.dsns["second"], autocommit=True) as administrator:
                (gid,) = [gid for gid in stage.prepared() if gid == branch._gid]
                administrator.execute(f"ROLLBACK PREPARED '{gid}'")
        return commit(branch)

    monkeypatch.setattr(PostgreSQLBranch, "_commit_gen", interfere)
    with pytest.raises(HeuristicOutcome) as caught, stage.cluster.transaction(timeout=30) as tx:
        for database in stage.databases:
            tx.enlist(database).execute("INSERT INTO transfers VALUES ('r10', 1)")
    assert stage.found("r10") == {"first"}
    assert len(caught.value.branches) == 1
    assert stage.cluster.outcome(caught.value.gtid) == "committed"
    stage.await_end("r10", {"first"})


def test_leader_dies_while_the_decision_is_asked_for(stage: Stage) -> None:
    """The request goes on to the next leader: the same outcome, once."""
    leader = stage.fleet.leader()
    killer = threading.Timer(0.3, leader.kill)
    number = 0
    outcomes: set[str] = set()
    killer.start()
    while killer.is_alive() or number < 50:
        number += 1
        name = f"r12-{number}"
        try:
            with stage.cluster.transaction(timeout=20) as tx:
                stage.cluster.map("transfers")[name] = 1
                for database in stage.databases:
                    tx.enlist(database).execute("INSERT INTO transfers VALUES (%s, 1)", (name,))
        except TransactionAborted:
            outcomes.add("aborted")
            stage.await_end(name, NOWHERE)
        else:
            outcomes.add("committed")
            assert stage.found(name) == {"first", "second", "map"}
    assert "committed" in outcomes
    stage.fleet.restart(leader.name)


def test_the_quorum_is_lost_before_the_decision(stage: Stage) -> None:
    """What has promised waits, however long; with the quorum back it has one outcome, everywhere."""
    host = stage.host()
    names = sorted(stage.fleet.members)[:2]

    class Outage:
        name, tag, bqual, is_last_resource = "outage", b"outag", b"outage", False

        def __init__(self) -> None:
            self.resource = self

        def prepare(self) -> Vote:
            stage.await_prepared(2)
            for name in names:
                stage.fleet.members[name].kill()
            return Vote.READ_ONLY

        def rollback(self) -> None: ...

    outcome = "committed"
    try:
        with stage.cluster.transaction(timeout=4) as tx:
            for database in stage.databases:
                tx.enlist(database).execute("INSERT INTO transfers VALUES ('r14', 1)")
            stage.cluster.service("vault").book("r14", 1)
            tx.enlist(Outage())
    except coordlib.CoordError as error:
        outcome = type(error).__name__
    # With the two gone nothing can be decided; and nobody who has promised has done anything by itself.
    assert outcome in ("TransactionOutcomeUnknown", "TransactionAborted")
    assert len(stage.prepared()) == 2
    for name in names:
        stage.fleet.restart(name, is_waited_for=False)
    for name in names:
        stage.fleet.members[name].answer()
    deadline = time.monotonic() + BOUND_SECONDS
    while stage.prepared() or stage.pending():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = stage.found("r14")
    assert found in (NOWHERE, {"first", "second", "vault"})
    assert outcome == "TransactionOutcomeUnknown" or found == NOWHERE
    host.end()


@pytest.mark.parametrize(
    ("crash", "places"),
    [("before-last-resource", NOWHERE), ("after-last-resource", EVERYWHERE - {"map"})],
)
def test_last_resource_dies_with_its_process(stage: Stage, crash: str, places: set[str]) -> None:
    """The others are in doubt until it is back; then they do what it did, or it never will do it."""
    host = stage.host()
    number = f"r16-{crash}"
    stage.initiator(number, crash, with_notes=True).died()
    assert len(stage.prepared()) == 2
    assert stage.found(number) == NOWHERE
    stage.cluster._coordinator.recover()
    assert len(stage.prepared()) == 2  # nobody here can tell
    back = stage.initiator(with_notes=True)
    stage.await_end(number, places)
    back.end()
    host.end()


def test_database_server_dies_after_its_promise(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision stands: what it had prepared is there when it comes back, and is committed."""
    commit = PostgreSQLBranch._commit_gen  # blocking and polled alike
    lock = threading.Lock()
    struck: list[str] = []

    def strike(branch: PostgreSQLBranch) -> Any:
        with lock:
            if not struck:
                struck.append(branch.resource.name)
                stage.server.restart()
        return commit(branch)

    monkeypatch.setattr(PostgreSQLBranch, "_commit_gen", strike)
    with stage.cluster.transaction(timeout=30) as tx:
        stage.cluster.map("transfers")["r18"] = 1
        for database in stage.databases:
            tx.enlist(database).execute("INSERT INTO transfers VALUES ('r18', 1)")
    assert struck
    stage.await_end("r18", {"first", "second", "map"})
