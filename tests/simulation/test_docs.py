"""docs/simulation.md and its neighbours say what the code does, and name only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordlib.testing.simulation.campaign import MARKS_FROM_SEEDS, main
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS
from coordlib.testing.simulation.run import (
    FAULTS_MIN,
    LEADER_CHANGES_MIN,
    OPERATIONS_MIN,
    QUIET_MS_MAX,
    RECOVERY_MS_MAX,
)
from coordlib.testing.simulation.workload import SERVICES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/simulation.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
}


def _row(kind: str) -> tuple[str, str, str, str]:
    of = FAULT_KINDS[kind]
    lasts = (
        f"{of.duration_ms_min / 1000:g} to {of.duration_ms_max / 1000:g} s"
        if of.duration_ms_max
        else "at once"
    )
    needs = "a client" if of.clients_min else f"{of.members_min} members" if of.members_min > 1 else ""
    return kind, of.does, lasts, needs


def test_the_table_of_faults_is_the_codes() -> None:
    """Every kind in its order, with its words, its durations and what it needs; and no other."""
    _, _, table = PAGE.partition("| fault | what it does | lasts | needs |\n|---|---|---|---|\n")
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", table.partition("\n\n")[0], re.MULTILINE
    )
    assert rows == [_row(kind) for kind in FAULT_KINDS]


def test_the_options_of_the_command_are_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is told of, and nothing is told that it does not take."""
    with pytest.raises(SystemExit):
        main(["--help"])
    known = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help"}
    assert set(re.findall(r"(?<!-)--[a-z]+", PAGE)) - {"--help"} == known


def test_the_figures_are_the_codes() -> None:
    """How long things may take, what is too quiet, how many make a campaign."""
    text = " ".join(PAGE.split())
    for words in (
        f"get a write done within {RECOVERY_MS_MAX // 1000} seconds",
        f"end what they began, within {QUIET_MS_MAX // 1000} seconds",
        f"fewer than {OPERATIONS_MIN} operations",
        f"A campaign of {MARKS_FROM_SEEDS} seeds or more",
    ):
        assert words in text
    assert (FAULTS_MIN, LEADER_CHANGES_MIN, len(SERVICES)) == (10, 2, 8), (
        "said in words: ten, two, Eight services"
    )
    seeds = (ROOT / "tests/simulation/test_seeds.py").read_text(encoding="utf-8")
    assert re.findall(r"^(?:SEEDS|TWICE) = (\d+)$", seeds, re.MULTILINE) == ["40", "10"]
    assert "`make test` runs the first 40 seeds and ten of them twice" in text
    assert "make simulate SEEDS=300 TWICE=40" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "`.ci/run` the first 300 and 40 of them twice" in text


def test_every_target_that_a_page_names_is_made() -> None:
    """`make X` is a target, wherever it is written."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9]+):", makefile, re.MULTILINE))
    for name, text in PAGES.items():
        named = set(re.findall(r"`make ([a-z0-9]+)", text)) | set(
            re.findall(r"^make ([a-z0-9]+)", text, re.MULTILINE)
        )
        assert named <= targets, name


def test_every_file_that_a_page_links_to_is_there() -> None:
    """Relative links lead somewhere, from where they are."""
    for name, text in PAGES.items():
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
        assert [link for link in links if not ((ROOT / name).parent / link).exists()] == [], name


def test_every_file_that_a_page_names_is_there() -> None:
    """As tests/node/test_links.py, docs/recovery.md, coordlib/testing; what comes behind a file's `::` is a test in it."""
    for name, text in PAGES.items():
        for path in re.findall(r"(?<![\w/.])(?:tests|docs|coordlib|benchmarks|examples)/[\w./-]*\w", text):
            found = ROOT / path
            assert found.exists() or found.with_suffix(".py").exists(), f"{name} names {path}"


def test_every_test_that_stays_of_a_bug_is_there() -> None:
    """Each bug's last column names at least one, and those that it names exist; `::x` alone is of the file before it."""
    page = PAGES["docs/bugs-found.md"]
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        columns = [column.strip() for column in row.strip("|").split(" | ")]
        assert len(columns) == 4, row
        kept = columns[3]
        source = ""
        for path, test in re.findall(r"`([\w/.-]+)?(?:::(\w+))?`", kept):
            if path.startswith("tests/"):
                source = (ROOT / path).read_text(encoding="utf-8")
            if test:
                assert f"def {test}(" in source, f"{test} is not there"
        assert re.search(r"`tests/[\w/.-]+|docs/[\w.-]+", kept), f"nothing stays of: {row[:80]}"


def test_no_bug_is_listed_twice() -> None:
    """By what was wrong."""
    rows = re.findall(r"^\| (.*?) \|", PAGES["docs/bugs-found.md"], re.MULTILINE)
    assert len(rows) == len(set(rows))
