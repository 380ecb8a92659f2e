"""The planted defects fit the code, and catching them works."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from coordlib.testing.simulation import decisions, invariants, model
from tests.mutants import patching, runner
from tests.mutants.patching import HIT, Mutant, PatchError, prepare, replace
from tests.mutants.table import AREAS, INVARIANTS, MUTANTS

ALL = [mutant for mutants in AREAS.values() for mutant in mutants]
QUICK = ("acknowledges-before-it-is-durable", "token-is-handed-over-with-the-lock")


def test_every_defect_fits_the_code_as_it_is() -> None:
    """Each text to be replaced is found exactly once, and what results compiles to the same function otherwise."""
    for mutant in ALL:
        assert all(code is not function.__code__ for function, code in prepare(mutant)), mutant.name


def test_defects_are_many_and_each_has_a_name_of_its_own() -> None:
    """The table that `make mutants` goes through is at least as long as was promised."""
    assert len(MUTANTS) == len(ALL) >= 90
    assert all(mutant.bug for mutant in ALL)
    assert all(mutant.tests for mutant in ALL if mutant.unseen)


def test_a_defect_whose_code_has_changed_is_refused() -> None:
    """A text that is not there, or there twice, must not pass for a defect that nobody catches."""
    target = "coordlib.raft.quorum:value_reached"
    for old in ("nothing like this", "count"):
        mutant = Mutant("none", "none", (replace(target, old, f"{HIT}()"),))
        with pytest.raises(PatchError, match="not once"):
            prepare(mutant)


def test_a_defect_that_does_not_count_itself_is_refused() -> None:
    """Otherwise nobody would know whether the changed code ever ran."""
    mutant = Mutant("none", "none", (replace("coordlib.raft.quorum:value_reached", ">> 1", ">> 2"),))
    with pytest.raises(PatchError, match=HIT):
        prepare(mutant)


def test_a_method_with_a_cell_of_its_class_can_be_changed() -> None:
    """`super()` goes on working: the code is compiled where it stands, not by itself."""
    target = "coordlib.machine.table:BytesTable.delete"
    mutant = Mutant("none", "none", (replace(target, "super().delete(key)", f"super().delete({HIT}(key))"),))
    ((function, code),) = prepare(mutant)
    assert ("__class__",) == code.co_freevars == function.__code__.co_freevars


def test_every_global_invariant_is_known_as_one() -> None:
    """A new invariant is either counted among those that judge from outside, or named here as a mere symptom."""
    named = {
        node.args[0].value
        for module in (decisions, invariants, model)
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Violation"
        and isinstance(node.args[0], ast.Constant)
    }
    assert named - {"busy loop", "false alarm", "left behind", "impostor"} == INVARIANTS


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_defect_is_caught_from_outside(name: str) -> None:
    """In a process of its own, with `invariant()` switched off, within a few seeds."""
    workers = runner.Workers()
    finding = workers.run(mutant=name, first=0, count=10, is_checking=False)
    assert finding.check in INVARIANTS, finding
    assert finding.hits > 0


def test_every_defect_as_it_is_was_caught_by_somebody() -> None:
    """What is kept of the last run is of the table as it is: a defect that was changed must be run again."""
    known = runner._load()
    assert [name for name in MUTANTS if name not in known] == []
    assert [name for name, result in known.items() if not result.finding.check or not result.hits] == []
    assert sum(result.kind in runner.FROM_OUTSIDE for result in known.values()) >= runner.FROM_OUTSIDE_MIN


def test_the_document_says_what_the_last_run_found() -> None:
    """`python -m tests.mutants --document` writes it."""
    text = (runner.ROOT / "docs" / "planted-bugs.md").read_text()
    assert text == runner.document(runner._load())
    assert patching.HIT not in text
