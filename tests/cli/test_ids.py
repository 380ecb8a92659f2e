"""`coordlib ids`: what it reads, what it mints, and what it asks before it skips."""

from __future__ import annotations

import time

import pytest

from coordlib.api.ids import WINDOW_MS_MAX
from coordlib.cli import main
from coordlib.ids import DEFAULT, JS53, LAYOUTS, Layout, from_base32, from_hex
from tests.cli.conftest import Members


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def attached(solo: Members, monkeypatch: pytest.MonkeyPatch) -> Members:
    """The cluster that commands find in their environment."""
    for name, value in solo.environment.items():
        monkeypatch.setenv(name, value)
    return solo


def test_ids_of_others_are_read_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ids", "inspect", "175928847299117063", "--layout", "discord"]) == 0
    (line,) = lines(capsys)
    assert "2016-04-30T11:18:25.796Z" in line
    assert main(["ids", "inspect", "1541815603606036480", "--layout", "twitter"]) == 0
    assert "2022-06-28T16:07:40.105Z" in lines(capsys)[0]


def test_every_layout_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in LAYOUTS:
        assert main(["ids", "inspect", "1", "--layout", name]) == 0
        assert f"layout {name}" in lines(capsys)[0]
    with pytest.raises(SystemExit):
        main(["ids", "inspect", "1", "--layout", "nobody's"])


def test_minting_with_a_worker_asks_nobody_and_is_read_in_every_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """More than a block of them, too; each form sorts as the numbers do, and is read back."""
    for form in ("decimal", "base32", "base62", "hex"):
        assert main(["ids", "mint", "-n", "2500", "--worker", "7", "--form", form]) == 0
        minted = lines(capsys)
        assert len(set(minted)) == 2500
        assert sorted(minted) == minted
        assert main(["ids", "inspect", minted[-1], "--form", form]) == 0
        assert "worker 7," in lines(capsys)[0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["inspect", "12x"], "--form"),
        (["inspect", "-1"], ""),
        (["inspect", str(1 << 63)], "no id"),
        (["inspect", "il", "--form", "base32"], "13"),
        (["mint", "--worker", "2000"], "1023"),
        (["mint", "-n", "-1", "--worker", "1"], "-n"),
        (["mint"], "--endpoint"),
        (["mint", "--worker", "1", "--name", "orders"], "--name"),
        (["inspect", "1", "--layout", "js53", "--name", "orders"], "--layout"),
        (["skip"], "--original-is-stopped"),
        (["skip", "--original-is-stopped", "--not-before", "yesterday"], "2026-01-31T"),
        (["skip", "--original-is-stopped", "--not-before", "2026-01-31T00:00:00"], "2026-01-31T"),
        (["skip", "--original-is-stopped", "--not-before", "1969-12-31T00:00:00Z"], "since 1970"),
    ],
)
def test_mistakes_are_told_in_words(
    arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is printed that could be taken for an id."""
    try:
        code = main(["ids", *arguments])
    except SystemExit as exit:  # argparse takes -1 for an option
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert word in captured.err


def test_minting_from_the_cluster_takes_a_worker_and_gives_it_back(
    attached: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the layout that the name has there; and the cluster knows afterwards who minted it."""
    application = attached.clusters["solo"].ids("orders", layout=JS53)
    first = application.mint()
    assert main(["ids", "mint", "-n", "1000", "--name", "orders"]) == 0
    minted = [int(line) for line in lines(capsys)]
    assert len({first, *minted}) == 1001
    assert {JS53.decompose(number)[2] for number in minted} == {1}
    assert main(["ids", "inspect", str(first), "--name", "orders"]) == 0
    assert "layout js53, minted by solo" in lines(capsys)[0]
    assert main(["ids", "inspect", str(minted[0]), "--name", "orders"]) == 0
    assert "minted by ids-" in lines(capsys)[0]
    assert main(["ids", "mint", "--name", "orders", "--layout", "twitter"]) == 2
    assert "another name" in capsys.readouterr().err
    assert main(["ids", "inspect", "1", "--name", "nothing"]) == 2
    assert "no ids of the name 'nothing'" in capsys.readouterr().err


def test_a_layout_of_ones_own_is_found_by_its_name(
    attached: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in hexadecimal digits."""
    own = Layout(time_bits=40, sequence_bits=3, worker_bits=3)
    attached.clusters["solo"].ids("own", layout=own).mint()
    assert main(["ids", "mint", "--name", "own", "--form", "hex"]) == 0
    number = from_hex(lines(capsys)[0])
    assert own.decompose(number)[2] == 1
    assert main(["ids", "mint"]) == 0  # and of the name "default", in the default layout
    assert DEFAULT.decompose(int(lines(capsys)[0]))[2] == 0


def test_after_a_skip_no_window_begins_within_what_was_granted(
    attached: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    """What runs goes on beyond the floor with its next lease; a second skip of a time that is covered does nothing."""
    solo = attached.clusters["solo"]
    ids = solo.ids()
    before = ids.mint()
    assert main(["ids", "skip", "--original-is-stopped"]) == 0
    (line,) = lines(capsys)
    assert "no window of any generator begins before" in line
    assert main(["ids", "mint", "--form", "base32"]) == 0
    after = from_base32(lines(capsys)[0])
    assert (DEFAULT.time_of(after) - DEFAULT.time_of(before)).total_seconds() >= 590
    # A lease that was ended is not extended: the application's next window is beyond the floor, too.
    ids._ask()
    while ids.counters["leases"] < 2:
        solo.map("m").get("k")  # the answer is on its way by the same road
    assert (DEFAULT.time_of(ids.mint()) - DEFAULT.time_of(before)).total_seconds() >= 590
    assert main(["ids", "skip", "--original-is-stopped", "--not-before", "1000"]) == 0
    assert capsys.readouterr().err == ""
    # Should that skip have been in the original, its ids ran ahead since: another one goes beyond them.
    assert main(["ids", "skip", "--original-is-stopped"]) == 0
    capsys.readouterr()
    assert main(["ids", "mint", "--form", "base32"]) == 0
    again = from_base32(lines(capsys)[0])
    assert (DEFAULT.time_of(again) - DEFAULT.time_of(after)).total_seconds() >= 590


def test_the_time_of_the_newest_id_is_skipped_as_it_is_shown(
    attached: Members, capsys: pytest.CaptureFixture[str]
) -> None:
    """An original whose ids ran ahead of the time has granted windows beyond it: none begins where they can be."""
    ahead_ms = 3_600_000 + time.time_ns() // 1_000_000 - DEFAULT.epoch
    assert main(["ids", "inspect", str(DEFAULT.compose(ahead_ms, 0, 0))]) == 0
    shown = lines(capsys)[0].split()[1].rstrip(",")
    assert main(["ids", "skip", "--original-is-stopped", "--not-before", shown]) == 0
    capsys.readouterr()
    assert main(["ids", "mint"]) == 0
    unit, _, _ = DEFAULT.decompose(int(lines(capsys)[0]))
    assert unit > ahead_ms + WINDOW_MS_MAX
