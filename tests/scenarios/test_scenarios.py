"""Every scenario of this directory, one test a file; and that their runner notices what it is there to notice."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from coordlib.testing.scenarios import ScenarioError, parse, parse_file, run_scenario
from tests.scenarios import table

FILES = sorted(Path(__file__).resolve().parent.glob("*.txt"))
HEAD = "bug: nobody #1 - nothing\nwhy: For the test.\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_scenario_goes_as_it_says(path: Path) -> None:
    """The invariants hold after every step, its claims do, and the cluster works in the end."""
    run_scenario(parse_file(path))


def test_there_are_at_least_a_hundred_and_no_two_are_the_same() -> None:
    """Each tells another story about another defect."""
    found = table.scenarios()
    assert len(found) >= 100
    assert len({tuple(c.text for c in scenario.commands) for scenario in found}) == len(found)
    assert len({scenario.title for scenario in found}) == len(found)


def test_the_page_lists_them_all() -> None:
    """`python -m tests.scenarios.table` writes it."""
    assert table.PAGE.read_text(encoding="utf-8") == table.page()


def test_the_page_names_every_command_and_claim() -> None:
    """A language that has words which no page explains is no language."""
    from coordlib.testing.scenarios.claims import Claims
    from coordlib.testing.scenarios.play import Play

    text = table.PAGE.read_text(encoding="utf-8").partition("## What they stand for")[0]
    words = [name[3:].replace("_", "-") for name in vars(Play) if name.startswith("do_")]
    claims = [name[6:].replace("_", "-") for name in vars(Claims) if name.startswith("claim_")]
    assert [word for word in words if f"`{word}" not in text] == []
    assert [claim for claim in claims if f"`{claim} " not in text and f"{claim} " not in text] == []


def _play(body: str) -> str:
    """What the runner says of a scenario that does not go as it says."""
    with pytest.raises(ScenarioError) as caught:
        run_scenario(parse("trial", HEAD + body))
    return str(caught.value)


def test_a_wrong_claim_names_file_line_and_state() -> None:
    """With what was expected, what was seen, and what is under way."""
    said = _play("nodes n1 n2 n3 leader=n1\nappend n1\nassert committed n1 2\nsettle")
    assert said.startswith("trial.txt:5: assert committed n1 2\n  commit index of n1: expected = 2, seen 1\n")
    assert "n1    leader    1     n1    n1       1       1        1@1 2@1" in said
    assert "under way: n1 -> n3  append term=1 prev=1@1 commit=1 [2@1]" in said


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("nodes n1 n2 n3\nsettle", "asserts nothing"),
        ("nodes n1 n2 n3\nassert no leader", "ends with `settle`"),
        ("elect n1\nsettle", "begins with `nodes`"),
    ],
)
def test_what_is_no_scenario_is_refused(body: str, words: str) -> None:
    """One that cannot fail, or does not end in the liveness check, says less than it seems to."""
    with pytest.raises(ScenarioError, match=words):
        parse("trial", HEAD + body)


def test_a_scenario_without_its_bug_is_refused() -> None:
    """The first lines say what it stands for."""
    with pytest.raises(ScenarioError, match="bug: SOURCE"):
        parse("trial", "nodes n1\nassert no leader\nsettle")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("deliver n1 n2 vote", "no vote from n1 to n2 is under way"),
        ("drop n1 n2 heartbeat 3", "no heartbeat from n1"),
        ("wobble n1", "there is no command 'wobble'"),
        ("assert wobble n1", "there is no claim 'wobble'"),
        ("restart n1", "n1 is up"),
        ("tick n1 soon", "no duration"),
        ("replay x", "x"),
    ],
)
def test_what_cannot_be_done_is_an_error(line: str, words: str) -> None:
    """A command that does nothing would leave a scenario that shows nothing."""
    assert words in _play(f"nodes n1 n2 n3 leader=n1\n{line}\nassert leader n1\nsettle")


def test_a_member_that_stops_unexpectedly_is_an_error() -> None:
    """Whatever stops it must be asserted by the next command."""
    body = "nodes n1 n2 n3 leader=n1\nfail n2 fsync\nappend n1\ndeliver n1 n2 append\nrun 10ms\nassert leader n1\nsettle"
    assert "n2 stopped, and nobody expected it (storage-failed)" in _play(body)


def test_a_cluster_that_does_not_go_on_is_an_error() -> None:
    """`settle` is the liveness check: one of three elects nobody."""
    body = "nodes n1 n2 n3 leader=n1\nassert leader n1\nsettle without n1 n2"
    assert "not within" in _play(body)


def test_a_defect_that_no_claim_names_is_seen_by_the_invariants() -> None:
    """Counting one copy too many for a quorum, and a storage that does not sync."""
    body = "nodes n1 n2 n3 leader=n1\nappend n1\nassert leader n1\nsettle"
    with patch("coordlib.raft.replication.value_reached", max):
        assert "commit quorum" in _play(body)
    with patch("coordlib.testing.disk.SimulatedFile.datasync", lambda self: None):
        assert "synced write" in _play(body)
