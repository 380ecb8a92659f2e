"""The table of scenarios in docs/scenarios.md: `python -m tests.scenarios.table` writes it, a test holds it to be true."""

from __future__ import annotations

from pathlib import Path

from coordlib.testing.scenarios import Scenario, parse_file

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "scenarios.md"
BEGIN = "<!-- begin: written by `python -m tests.scenarios.table` -->\n"
END = "<!-- end -->\n"
AREAS = {
    "elections": "Elections and votes",
    "replication": "Replication and commit",
    "persistence": "Disks",
    "snapshots": "Snapshots and compaction",
    "reads": "Reads and leases",
    "sessions": "Sessions and exactly once",
    "locks": "Locks",
    "formation": "Forming a cluster, identity, transport",
}


def scenarios() -> list[Scenario]:
    """All of this directory, by area and name."""
    found = [parse_file(path) for path in sorted(HERE.glob("*.txt"))]
    return sorted(found, key=lambda scenario: (list(AREAS).index(scenario.area), scenario.name))


def table() -> str:
    """The part of the page that lists them."""
    found = scenarios()
    lines = [f"{len(found)} scenarios.\n"]
    for area, title in AREAS.items():
        rows = [scenario for scenario in found if scenario.area == area]
        lines += [
            f"\n### {title} ({len(rows)})\n",
            "\n| scenario | stands for | what goes wrong |\n|---|---|---|\n",
        ]
        lines += [f"| `{row.name}` | {row.bug} | {row.title} |\n" for row in rows]
    return "".join(lines)


def page() -> str:
    """The page with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n" + table() + "\n" + END + tail


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
