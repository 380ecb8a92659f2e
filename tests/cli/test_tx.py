"""`coordlib tx`: what it shows of transactions, and what it lets people decide."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from coordlib import Cluster
from coordlib.cli import main, tx
from coordlib.machine import commands
from coordlib.machine.commands import TxStatus
from coordlib.node.clock import monotonic_ms
from coordlib.node.operations import OpGen, Step
from coordlib.txn.gtid import (
    BranchName,
    bqual_text,
    cluster_tag,
    join_gtid,
    node_tag,
    postgresql_gid,
    resource_tag,
)
from coordlib.wire.messages import RequestKind
from tests.cli.conftest import Members

GONE = 1 << 40  # no session has this number


def ask(cluster: Cluster, kind: int, body: bytes) -> Any:
    def operation() -> OpGen[Any]:
        return commands.decode_reply((yield Step(kind, body, monotonic_ms() + 5000)))

    return cluster._run(operation())


class Shop:
    """A cluster with transactions that were decided without anybody's taking part, so that they stay as they are."""

    def __init__(self, members: Members) -> None:
        self.cluster = members.clusters["solo"]
        (self.now_ms,) = ask(self.cluster, RequestKind.QUERY, commands.query_time())
        self._number = 0

    def gtid(self, age_ms: int = 0) -> bytes:
        self._number += 1
        return join_gtid(self.now_ms - age_ms, GONE, self._number)

    def bqual(self, number: int, decider: bytes = b"") -> bytes:
        return BranchName(resource_tag("orders"), node_tag("n1"), number, decider).pack()

    def command(self, body: bytes) -> Any:
        return ask(self.cluster, RequestKind.COMMAND, body)

    def commit(self, gtid: bytes, *bquals: bytes) -> None:
        participants = [("orders", f"n{number}", bqual) for number, bqual in enumerate(bquals)]
        assert self.command(commands.tx_decide(gtid, participants=participants))[0] == TxStatus.COMMITTED

    def state(self, gtid: bytes) -> list[Any]:
        state: list[Any] = ask(self.cluster, RequestKind.QUERY, commands.query_tx_state(gtid))
        return state


@pytest.fixture
def shop(solo: Members, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Found by commands in their environment."""
    for name, value in solo.environment.items():
        monkeypatch.setenv(name, value)
    return Shop(solo)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_decisions_are_listed_newest_first(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    """Committed and aborted ones; with --pending only those that somebody has not obeyed."""
    assert main(["tx", "list"]) == 0
    assert "no decision" in told(capsys)
    old, aborted, pending = shop.gtid(5000), shop.gtid(3000), shop.gtid()
    shop.commit(old)
    shop.command(commands.tx_resolve(aborted))
    shop.commit(pending, shop.bqual(1), shop.bqual(2))
    assert main(["tx", "list"]) == 0
    rows = [line.split() for line in told(capsys).splitlines()[1:]]
    assert [row[0] for row in rows] == [pending.hex(), aborted.hex(), old.hex()]
    assert [row[2:] for row in rows] == [["committed", "2"], ["aborted", "resolved", "0"], ["committed", "0"]]
    assert main(["tx", "list", "--pending", "--json"]) == 0
    (row,) = json.loads(told(capsys))
    assert row["transaction"] == pending.hex()
    assert main(["tx", "list", "-n", "1"]) == 0
    assert "... and older ones (-n)" in told(capsys)


class Remembered:
    """A cluster that remembers transactions of these times, in ms before now; counts what is read of it."""

    def __init__(self, *ages_ms: int) -> None:
        self.now_ms = 1_800_000_000_000
        self.gtids = sorted(
            join_gtid(self.now_ms - age_ms, number, 0) for number, age_ms in enumerate(ages_ms, start=1)
        )
        self.read = 0

    def log_time_ms(self) -> int:
        return self.now_ms

    def rows(self, *, is_only_pending: bool, after: bytes) -> Iterator[Any]:
        for gtid in self.gtids[bisect_right(self.gtids, after) :]:
            self.read += 1
            yield (gtid,)


DAY_MS = 86_400_000


@pytest.mark.parametrize(
    ("ages_ms", "read_max"),
    [
        ((), 0),
        ((DAY_MS, 10, 9), 40),
        (range(0, DAY_MS, 1000), 3_000),  # one a second
        (range(DAY_MS, DAY_MS + 60_000), 30_000),  # very many, long ago, and none since
        ((DAY_MS,) * 8_000, 200_000),  # at one moment
        ((*(DAY_MS,) * 8_000, 5), 200_000),
        ((-5000, *range(0, DAY_MS, 1000)), 3_000),  # minted ahead of log time
    ],
)
def test_a_list_is_read_from_its_new_end(ages_ms: Sequence[int], read_max: int) -> None:
    """As many as are wanted, newest first, and whether there are more; far fewer than there are have been read."""
    remembered = Remembered(*ages_ms)
    tool: Any = remembered
    for count in (1, 50):
        remembered.read = 0
        rows = tx._newest(tool, count, is_only_pending=False)
        assert [gtid for (gtid,) in rows] == remembered.gtids[::-1][: count + 1]
        assert remembered.read <= read_max


def test_a_branch_is_shown_with_what_ends_it_in_its_database(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by the transaction's name, and by the name that it has in PostgreSQL; the statements are exact."""
    gtid, bqual = shop.gtid(), shop.bqual(1)
    shop.commit(gtid, bqual)
    gid = postgresql_gid(cluster_tag(shop.cluster._cluster_uuid()), gtid, bqual)
    for name in (gtid.hex(), gid):
        assert main(["tx", "show", name]) == 0
        out = told(capsys)
        assert "outcome: committed at log index" in out
        assert f"COMMIT PREPARED '{gid}';" in out
        assert f"'{bqual_text(bqual)}',1129271876;" in out
    assert "within half a minute" in out
    assert main(["tx", "show", shop.gtid().hex()]) == 0
    assert "its initiator is gone" in told(capsys)
    assert main(["tx", "show", gtid.hex(), "--json"]) == 0
    assert json.loads(told(capsys))["pending"][0]["branch"] == bqual.hex()


def test_doubt_that_lasts_is_an_exit_code(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    """Young doubt is nothing that people need look at; old doubt is."""
    assert main(["tx", "in-doubt"]) == 0
    assert "nothing is in doubt" in told(capsys)
    shop.commit(shop.gtid(2000), shop.bqual(1))
    assert main(["tx", "in-doubt"]) == 0
    assert "not obeyed for" in told(capsys)
    old = shop.gtid(300_000)
    shop.commit(old, shop.bqual(2))
    assert main(["tx", "in-doubt", "--json"]) == 1
    found = json.loads(told(capsys))
    assert found["pending"][0]["transaction"] == old.hex()
    assert found["oldest_s"] >= 300
    counts = shop.cluster.stats()["transactions"]
    assert counts["pending"] == 2
    assert counts["pending_oldest_ms"] >= 300_000


def test_what_is_not_decided_can_be_aborted_but_not_committed(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only with --force; without, nothing changes and the risk is told. Whoever was faster stays right."""
    gtid = shop.gtid()
    assert main(["tx", "resolve", gtid.hex(), "--abort"]) == 2
    assert "can contradict" in capsys.readouterr().err
    assert main(["tx", "resolve", gtid.hex(), "--commit", "--force"]) == 2
    assert "cannot be committed by hand" in capsys.readouterr().err
    assert shop.state(gtid)[0] == TxStatus.NONE
    assert main(["tx", "resolve", gtid.hex(), "--abort", "--force"]) == 0
    assert "is aborted (resolved)" in told(capsys)
    assert shop.state(gtid)[0] == TxStatus.ABORTED
    assert shop.command(commands.tx_decide(gtid, participants=[("orders", "n1", shop.bqual(1))]))[0] == (
        TxStatus.ABORTED
    )
    assert main(["tx", "resolve", gtid.hex(), "--abort", "--force"]) == 0
    assert "nothing to do" in told(capsys)


def test_what_people_did_with_a_branch_is_on_record_until_it_is_forgotten(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no longer pending; the outcome of the transaction stays what it was."""
    gtid, gone, other = shop.gtid(), shop.bqual(1), shop.bqual(2)
    shop.commit(gtid, gone, other)
    assert main(["tx", "resolve", gtid.hex(), "--abort", "--branch", gone.hex()]) == 2
    assert "CONTRADICTS" in capsys.readouterr().err
    assert len(shop.state(gtid)[5]) == 2
    assert main(["tx", "resolve", gtid.hex(), "--abort", "--branch", gone.hex(), "--force"]) == 0
    assert "ROLLBACK PREPARED" in told(capsys)
    status, _, _, _, _, pending, notes = shop.state(gtid)
    assert status == TxStatus.COMMITTED
    assert [bqual for _, _, bqual in pending] == [other]
    assert [(bqual, outcome) for bqual, outcome, _, _ in notes] == [(gone, "heuristic-rollback")]
    assert main(["tx", "in-doubt"]) == 1
    assert "by coordlib tx" in told(capsys)
    assert main(["tx", "forget", gtid.hex()]) == 0
    assert "forgotten" in told(capsys)
    assert shop.state(gtid)[6] == []
    assert [bqual for _, _, bqual in shop.state(gtid)[5]] == [other]
    assert main(["tx", "forget", gtid.hex()]) == 2
    assert "What is pending is not forgotten" in capsys.readouterr().err


def test_a_branch_of_a_last_resource_is_never_decided_in_the_log(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its last resource may have committed: what people do is recorded, the log's own outcome stays open."""
    gtid, bqual = shop.gtid(), shop.bqual(1, resource_tag("notes"))
    gid = postgresql_gid(cluster_tag(shop.cluster._cluster_uuid()), gtid, bqual)
    assert main(["tx", "show", gid]) == 0
    assert "last resource" in told(capsys)
    assert main(["tx", "resolve", gid, "--commit", "--force"]) == 0
    assert f"COMMIT PREPARED '{gid}';" in told(capsys)
    assert shop.state(gtid)[0] == TxStatus.NONE
    assert [outcome for _, outcome, _, _ in shop.state(gtid)[6]] == ["heuristic-commit"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["show", "12x"], "32 hexadecimal digits"),
        (["show", "1129271876_abc_def"], "no branch of a transaction of this cluster"),
        (["resolve", "00" * 16, "--abort", "--branch", "zz"], "hexadecimal digits"),
        (["resolve", "00" * 16, "--abort", "--branch", "ff"], "not the name of a branch"),
        (["list", "-n", "0"], "-n"),
    ],
)
def test_mistakes_are_told_in_words(
    shop: Shop, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tx", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert word in captured.err


def test_after_a_restore_nothing_is_presumed_of_what_the_log_does_not_know(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only when the original is said to be stopped. What is begun then is decided as ever; repeated, it is safe."""
    kept, lost = shop.gtid(), shop.gtid()
    shop.commit(kept, shop.bqual(1))
    assert main(["tx", "skip"]) == 2
    assert "--original-is-stopped" in capsys.readouterr().err
    assert shop.state(lost)[0] == TxStatus.NONE
    assert main(["tx", "skip", "--original-is-stopped"]) == 0
    assert "nobody presumes" in told(capsys)
    assert shop.state(kept)[0] == TxStatus.COMMITTED
    assert shop.command(commands.tx_resolve(lost))[0] == TxStatus.UNKNOWN
    assert main(["tx", "show", lost.hex()]) == 0
    assert "restore from back-up" in told(capsys)
    new, _ = shop.cluster._run(shop.cluster._coordinator.name_gen())
    shop.commit(new, shop.bqual(2))
    assert main(["tx", "skip", "--original-is-stopped", "--not-before", "yesterday"]) == 2
    assert "since 1970" in capsys.readouterr().err
    far = str(shop.now_ms + 86_400_000)
    assert main(["tx", "skip", "--original-is-stopped", "--not-before", far]) == 2
    assert "clocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["show", "xyz"],
            "'xyz' is not the name of a transaction: 32 hexadecimal digits, as errors and `coordlib tx list` show it",
        ),
        (["show", "1129271876_abc_def"], "1129271876_abc_def is no branch of a transaction of this cluster"),
        (
            ["resolve", "--abort", "--branch", "zz", "00" * 16],
            "hexadecimal digits, as `coordlib tx show` and `tx in-doubt` show it",
        ),
        (
            ["resolve", "--abort", "--branch", "00", "00" * 16],
            "00 is not the name of a branch: `coordlib tx show` and",
        ),
        (["list", "-n", "0"], "-n is 1 or more"),
    ],
)
def test_a_wrong_name_is_told_what_a_right_one_is(
    shop: Shop, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["tx", *arguments]) == 2
    assert words in capsys.readouterr().err
