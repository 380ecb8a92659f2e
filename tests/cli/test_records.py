"""The proofs themselves: good records pass, and every kind of bad one is named."""

from __future__ import annotations

from collections.abc import Iterable

from coordlib.cli.demo.records import (
    Exclusion,
    longest_gap_ns,
    parse_acknowledged,
    prove_counters,
    prove_exclusion,
    prove_writes,
)


def journal(*lines: str) -> Iterable[str]:
    return [f"{line}\n" for line in lines]


def test_stays_one_after_the_other_with_rising_tokens_pass() -> None:
    """Two processes, two locks, interleaved: nothing to object to, and all updates are counted."""
    proof = prove_exclusion(
        journal(
            "enter 10 apples 1 100 0",
            "enter 11 pears 2 200 0",
            "leave 12 apples 1 100 0 done",
            "enter 13 apples 5 200 1",
            "leave 14 pears 2 200 0 refused",
            "leave 15 apples 5 200 1 unknown",
        )
    )
    assert (proof.violations, proof.entered) == ([], 3)
    assert (proof.done, proof.unknown) == ({"apples": 1}, {"apples": 1})


def test_two_holders_at_once_are_named_with_their_lines() -> None:
    proof = prove_exclusion(
        journal("enter 10 apples 1 100 0", "enter 11 apples 2 200 0", "leave 12 apples 1 100 0 done")
    )
    (violation,) = proof.violations
    for evidence in ("'apples' had two holders", "process 200", "(line 2)", "process 100", "since line 1"):
        assert evidence in violation


def test_a_token_that_does_not_rise_is_named() -> None:
    """Equal and smaller tokens alike, even when the stays do not overlap."""
    for token in (7, 6):
        proof = prove_exclusion(
            journal(
                "enter 10 apples 7 100 0", "leave 11 apples 7 100 0 done", f"enter 12 apples {token} 200 0"
            )
        )
        (violation,) = proof.violations
        assert f"entered with token {token} (line 3)" in violation
        assert "had already had token 7 (line 1)" in violation


def test_tokens_of_different_locks_are_not_compared() -> None:
    proof = prove_exclusion(journal("enter 10 apples 7 100 0", "enter 11 pears 3 200 0"))
    assert proof.violations == []


def test_the_dead_do_not_hold_a_lock_and_what_they_did_is_unknown() -> None:
    """Whoever comes after a killed holder is no second one; the time to the next holder is told."""
    proof = prove_exclusion(
        journal("enter 10 apples 1 100 0", "killed 20 100", "enter 3020 apples 2 200 0", "killed 4000 300")
    )
    assert proof.violations == []
    assert proof.handed_on_ns == [("apples", 3000)]
    assert proof.unknown == {"apples": 2}


def test_another_process_death_excuses_nobody() -> None:
    proof = prove_exclusion(journal("enter 10 apples 1 100 0", "killed 20 300", "enter 30 apples 2 200 0"))
    assert len(proof.violations) == 1


def test_leaving_without_having_entered_is_named() -> None:
    for line in ("leave 10 apples 1 100 0 done", "leave 10 pears 1 100 0 done"):
        proof = prove_exclusion(journal(line))
        assert "without having entered" in proof.violations[0]


def test_damaged_lines_are_evidence_too() -> None:
    """An unknown word, a missing field, a last line without its end."""
    proof = prove_exclusion(["stay 1 2 3\n", "enter 10 apples 1\n", "\n", "killed 20 100"])
    assert len(proof.violations) == 4
    assert all("is damaged" in violation for violation in proof.violations)


def exclusion(done: int, unknown: int = 0) -> Exclusion:
    return Exclusion(done + unknown, [], {"apples": done}, {"apples": unknown} if unknown else {}, [])


def test_counters_between_the_certain_and_the_possible_pass() -> None:
    members = {"a": {"apples": "5"}, "b": {"apples": "6"}, "c": {"apples": "7"}}
    assert prove_counters(exclusion(5, 2), members) == []


def test_a_lost_and_an_invented_update_are_named() -> None:
    for found in ("4", "8", "None"):
        (violation,) = prove_counters(exclusion(5, 2), {"a": {"apples": found}})
        assert "member a counts" in violation
        assert "5 were acknowledged" in violation


def test_a_counter_nobody_reported_is_missing_not_forgotten() -> None:
    assert len(prove_counters(exclusion(5), {"a": {}})) == 1


def test_acknowledgements_are_merged_in_the_order_of_time() -> None:
    merged = parse_acknowledged({"x": journal("30 k3 3", "50 k5 5"), "y": journal("40 k4 4")})
    assert (merged.times_ns, merged.violations) == ([30, 40, 50], [])
    assert merged.values == {"k3": "3", "k5": "5", "k4": "4"}


def test_damaged_and_repeated_acknowledgements_are_named() -> None:
    merged = parse_acknowledged({"x": ["30 k3 3\n", "40 k3 3\n", "50 k5\n", "60 k6 6"]})
    assert [word for text in merged.violations for word in ("twice", "damaged") if word in text] == [
        "twice",
        "damaged",
        "damaged",
    ]


def test_a_write_on_all_members_passes_and_others_are_named() -> None:
    full = {"k1": "1", "k2": "2"}
    assert prove_writes(full, {"a": full, "b": full, "c": full}) == []
    (missing,) = prove_writes(full, {"a": full, "b": {"k1": "1"}, "c": full})
    assert missing == "write k2 = 2 was acknowledged, but is None on b"
    (wrong,) = prove_writes(full, {"a": full, "b": full, "c": {"k1": "1", "k2": "9"}})
    assert wrong.endswith("9 on c")


def test_the_longest_gap_counts_both_ends_of_the_stretch() -> None:
    assert longest_gap_ns([10, 20, 70, 80], 10, 80) == 50
    assert longest_gap_ns([10, 70, 75], 10, 80) == 60
    assert longest_gap_ns([], 10, 80) == 70
    assert longest_gap_ns([0, 5, 50, 500], 10, 80) == 40
