"""A campaign says what failed, how to see it again, and what was never tried; and a run is what its seed makes it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordlib.testing.checkers import check
from coordlib.testing.history import load
from coordlib.testing.simulation import campaign
from coordlib.testing.simulation.campaign import MARKS_FROM_SEEDS, Outcome, main
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS
from coordlib.testing.simulation.invariants import Violation
from coordlib.testing.simulation.plan import Plan, draw_plan
from coordlib.testing.simulation.run import MARKS, Report, simulate
from coordlib.testing.simulation.workload import PromiseBroken, Workload

SEED = next(seed for seed in range(100) if draw_plan(seed).members == 3)


def shortened(seed: int) -> Plan:
    """A plan of six seconds, with those of its faults that come within the first three."""
    plan = draw_plan(seed)
    faults = tuple(fault._replace(at_ms=fault.at_ms // 15) for fault in plan.faults)
    return replace(plan, faults=faults, safety_ms=4000, liveness_ms=500, total_ms=6000)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of its own would not have what a test plants."""

    def run_seeds(seeds: Sequence[int], *, is_loaded: bool = False, **_: Any) -> Iterator[Outcome]:
        for seed in seeds:
            yield campaign._run_one(seed, is_loaded)

    monkeypatch.setattr(campaign, "run_seeds", run_seeds)


def good(seed: int, **more: Any) -> Outcome:
    """A seed that did all that one must do."""
    report = Report(
        seed,
        operations=200,
        faults=Counter(FAULT_KINDS.keys()),
        leader_changes=5,
        simulated_ms=60_000,
        marks=Counter(MARKS),
        checked_keys=20,
        trace=f"trace of {seed}",
    )
    return Outcome(seed, replace(report, **more), "", "", 0, 1.0)


def stage(monkeypatch: pytest.MonkeyPatch, outcome: Callable[[int, str | None], Outcome]) -> None:
    """Let every seed come out as told; `outcome` is given the seed and the PYTHONHASHSEED."""

    def run_seeds(
        seeds: Sequence[int], *, jobs: int, is_loaded: bool = False, hash_seed: str | None = None
    ) -> Iterator[Outcome]:
        return (outcome(seed, hash_seed) for seed in seeds)

    monkeypatch.setattr(campaign, "run_seeds", run_seeds)


def command_of(shown: str) -> list[str]:
    """The arguments of the command that was printed last."""
    line = [line for line in shown.splitlines() if "python -m coordlib.testing.simulation" in line][-1]
    return shlex.split(line)[3:]


# -- what fails ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_a_planted_bug_fails_the_campaign_with_a_command_that_shows_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A leader takes its own disk for a quorum: named by its check, cut down to no fault at all, and seen again."""
    monkeypatch.setattr(campaign, "draw_plan", shortened)
    monkeypatch.setattr(
        campaign, "simulate", lambda seed, plan=None, **more: simulate(seed, plan or shortened(seed), **more)
    )
    monkeypatch.setattr("coordlib.raft.replication.value_reached", max)
    assert main(["--seeds", f"{SEED}-{SEED}"]) == 1
    shown = capsys.readouterr().out
    assert re.search(
        rf"^seed {SEED} at \d+ ms: commit quorum: n\d commits entry \d+ of term", shown, re.MULTILINE
    )
    assert f"1 seeds failed: [{SEED}]" in shown
    arguments = command_of(shown)
    assert arguments[:4] == ["--seed", str(SEED), "--faults", "none"]
    assert main(arguments) == 1
    assert re.search(r"^at \d+ ms: commit quorum: ", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.undo()
    monkeypatch.setattr(campaign, "draw_plan", shortened)
    assert main(arguments) == 0, "without the bug the same command finds nothing"


@pytest.mark.usefixtures("in_this_process")
def test_only_the_faults_that_are_needed_are_in_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of a whole plan, by their places in it; the plan that the command shows has no others."""
    wanted = {draw_plan(SEED).faults[place] for place in (1, 6)}

    def needs_two(seed: int, plan: Plan | None = None, **_: Any) -> Report:
        if wanted <= set((plan or draw_plan(seed)).faults):
            raise Violation("one vote", "as planted")
        return Report(seed)

    monkeypatch.setattr(campaign, "simulate", needs_two)
    assert main(["--seeds", f"{SEED}-{SEED}"]) == 1
    arguments = command_of(capsys.readouterr().out)
    assert arguments[:4] == ["--seed", str(SEED), "--faults", "1,6"]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "one vote: as planted" in shown
    assert shown.count("Fault(") == 2


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (PromiseBroken("tickets", "taken twice"), "tickets"),
        (KeyError("not an error of ours"), "crash"),
    ],
)
def test_whatever_goes_wrong_in_a_run_is_a_violation_with_its_time(
    monkeypatch: pytest.MonkeyPatch, error: Exception, name: str
) -> None:
    """What the workload finds, and what leaves the code."""

    def broken(_: Workload) -> None:
        raise error

    monkeypatch.setattr(Workload, "check", broken)
    with pytest.raises(Violation) as caught:
        simulate(SEED, shortened(SEED))
    assert caught.value.check == name
    assert caught.value.at_ms > 0


def test_only_the_first_failures_are_cut_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defect that fails every seed does not keep a campaign for days; each is named all the same."""
    stage(monkeypatch, lambda seed, _: Outcome(seed, None, "liveness", "nobody answers", 5000, 1.0))
    monkeypatch.setattr(campaign, "_attempt", lambda plan: "liveness")
    assert main(["--seeds", "10"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("cut down in ") == campaign.SHRUNK_MAX == 3
    assert shown.count("python -m coordlib.testing.simulation --seed ") == 10
    assert "10 seeds failed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in shown


@pytest.mark.parametrize(
    ("less", "words"),
    [
        ({"operations": 99}, "too quiet: seed 1: 99 operations, 100 wanted"),
        ({"faults": Counter(kill=9)}, "too quiet: seed 1: 9 faults, 10 wanted"),
        ({"leader_changes": 1}, "too quiet: seed 1: 1 changes of leader, 2 wanted"),
        ({"simulated_ms": 59_999}, "too quiet: seed 1: 59999 simulated ms, 60000 wanted"),
        ({"unknown_keys": 1}, "1 of 60 histories got no verdict"),
        ({"unknown_keys": 0}, ""),
    ],
)
def test_a_campaign_that_proves_too_little_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], less: dict[str, Any], words: str
) -> None:
    """One quiet seed is enough, or one history in a hundred without a verdict."""
    stage(monkeypatch, lambda seed, _: good(seed, **(less if seed == 1 else {})))
    assert main(["--seeds", "3"]) == (1 if words else 0)
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("count", [MARKS_FROM_SEEDS - 1, MARKS_FROM_SEEDS])
def test_a_situation_that_never_occurred_fails_a_large_campaign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    """It is named, in words; few seeds need not meet everything."""
    met = Counter({name: 1 for name in MARKS if name != "truncated_two_terms"})
    stage(monkeypatch, lambda seed, _: good(seed, marks=met))
    is_large = count == MARKS_FROM_SEEDS
    assert main(["--seeds", str(count)]) == is_large
    assert ("never occurred: truncated_two_terms (... and they were" in capsys.readouterr().out) == is_large


def test_a_fault_that_never_had_an_effect_fails_a_large_campaign(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What befell nobody was not survived."""
    applied = Counter(FAULT_KINDS.keys() - {"old_copy"})
    stage(monkeypatch, lambda seed, _: good(seed, faults=applied))
    assert main(["--seeds", str(MARKS_FROM_SEEDS)]) == 1
    assert "never had an effect: old_copy\n" in capsys.readouterr().out


@pytest.mark.parametrize("differing", [None, 1])
def test_another_trace_of_the_same_seed_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], differing: int | None
) -> None:
    """The first so many run again in processes with another PYTHONHASHSEED."""
    again: list[int] = []

    def outcome(seed: int, hash_seed: str | None) -> Outcome:
        if hash_seed is None:
            return good(seed)
        again.append(seed)
        return good(seed, trace="another") if seed == differing else good(seed)

    stage(monkeypatch, outcome)
    assert main(["--seeds", "5", "--twice", "2"]) == (0 if differing is None else 1)
    assert again == [0, 1]
    shown = capsys.readouterr().out
    assert ("the same seed is not the same run: [1]" in shown) == (differing is not None)


@pytest.mark.parametrize("before", [None, "7"])
def test_a_hash_seed_is_only_for_the_processes_that_it_was_meant_for(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Whoever asked for it has the environment of before."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    if before is not None:
        monkeypatch.setenv("PYTHONHASHSEED", before)
    assert list(campaign.run_seeds([], jobs=1, hash_seed="4711")) == []
    assert os.environ.get("PYTHONHASHSEED") == before


# -- what does not end --------------------------------------------------------------------------------------


def goes_round_for_ever() -> None:
    while True:
        pass


def hangs_at_two(seed: int) -> Outcome:
    """What a process is told to do with a seed."""
    if seed == 2:
        goes_round_for_ever()
    return good(seed)


def test_a_seed_that_hangs_fails_with_its_stack_and_the_others_go_on() -> None:
    """Its process is ended, and with it those beside it; what they had begun is done by others."""
    outcomes = sorted(campaign.run_seeds(range(6), jobs=2, run=hangs_at_two, limit_seconds=1.0))
    assert [outcome.seed for outcome in outcomes] == [0, 1, 2, 3, 4, 5]
    assert [outcome.check for outcome in outcomes] == ["", "", "hangs", "", "", ""]
    assert "in goes_round_for_ever" in outcomes[2].message
    assert outcomes[2].report is None


def dies_at_once(seed: int) -> Outcome:
    os._exit(3)


def test_a_process_that_dies_of_something_else_ends_the_campaign() -> None:
    """Nobody knows which seed it was, nor that another try would go better."""
    with pytest.raises(BrokenProcessPool):
        list(campaign.run_seeds([1], jobs=1, run=dies_at_once))


def test_a_seed_that_hangs_is_shown_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cutting it down would hang, too; the command says which seed it is."""

    def tried_again(plan: Plan) -> str:
        raise AssertionError("tried again")

    monkeypatch.setattr(campaign, "_attempt", tried_again)
    stage(monkeypatch, lambda seed, _: Outcome(seed, None, campaign.HANGS, "it was here", 0, 0.0))
    assert main(["--seeds", "7-7"]) == 1
    shown = capsys.readouterr().out
    assert "seed 7 at 0 ms: hangs: it was here" in shown
    assert command_of(shown) == ["--seed", "7"]


# -- what a run is ------------------------------------------------------------------------------------------

TRACE = """
from dataclasses import replace
from tests.simulation.test_campaign import SEED, shortened
from coordlib.testing.simulation.run import simulate
for seed in (SEED, SEED + 1):
    print(simulate(seed, shortened(seed)))
"""


def test_the_same_seed_is_the_same_run_under_another_hash_seed() -> None:
    """Everything that a report counts, and the trace of all that was drawn, sent, applied and answered."""
    shown = [
        subprocess.run(
            [sys.executable, "-c", TRACE],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert shown[0] == shown[1]
    traces = re.findall(r"trace='(\w+)'", shown[0])
    assert len(set(traces)) == 2, "two seeds are two runs"


def test_what_was_asked_and_answered_can_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of `--history` is one that the checker reads and finds legal."""
    monkeypatch.setattr(campaign, "draw_plan", shortened)
    path = tmp_path / "history.jsonl"
    assert main(["--seed", str(SEED), "--history", str(path)]) == 0
    operations = load(path)
    assert len(operations) > 10
    assert check(operations).result == "legal"


def test_a_run_with_the_ciphers_of_production_keeps_its_promises() -> None:
    """Handshakes and seals as they are; among the first forty seeds there may be none that draws them."""
    plan = replace(shortened(SEED), is_sealed=True)
    report = simulate(SEED, plan)
    assert report.operations > 10
    assert report.faults.total() > 5
