"""What the duplicate hunt compares ids with: each double id is found, however it came to be."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import duplicate_hunt
from benchmarks.duplicate_hunt import compare
from coordlib.ids.layout import Layout
from coordlib.ids.minter import Minter

BITS = 3
STEP = 1 << BITS


def written(directory: Path, *files: Sequence[int], cut: int = 0) -> list[Path]:
    """Files of ids; the last lacks so many bytes."""
    paths = []
    for number, ids in enumerate(files):
        path = directory / f"{number}.ids"
        path.write_bytes(array("q", ids).tobytes())
        paths.append(path)
    if cut:
        paths[-1].write_bytes(paths[-1].read_bytes()[:-cut])
    return paths


def stretch(worker: int, tick: int, count: int) -> range:
    return range(tick * STEP + worker, (tick + count) * STEP + worker, STEP)


def test_ids_that_are_there_once_are_counted(tmp_path: Path) -> None:
    """Stretches of several workers in several files, one after another in turn; a torn end is left out."""
    first = [*stretch(1, 0, 5), *stretch(1, 10, 5), *stretch(2, 20, 5)]
    second = [*stretch(2, 0, 20), *stretch(1, 20, 5)]
    assert compare(written(tmp_path, first, second, cut=3), BITS) == (39, 2, [])


def test_an_empty_file_and_none_at_all_are_nothing_wrong(tmp_path: Path) -> None:
    """A process may be killed before its first id."""
    assert compare(written(tmp_path, []), BITS) == (0, 0, [])
    assert compare([], BITS) == (0, 0, [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (stretch(1, 0, 5), stretch(1, 4, 5)),
        (stretch(1, 0, 50), stretch(1, 7, 1)),
        (stretch(1, 3, 1), stretch(1, 3, 1)),
        ([*stretch(1, 0, 9), *stretch(1, 20, 1)], [*stretch(1, 10, 5), *stretch(1, 20, 1)]),
    ],
)
def test_one_id_in_two_files_is_found(tmp_path: Path, one: Sequence[int], other: Sequence[int]) -> None:
    """At an edge, in the middle, alone; whichever file comes first."""
    for files in ((one, other), (other, one)):
        _, _, violations = compare(written(tmp_path, *files), BITS)
        assert len(violations) == 1


@pytest.mark.parametrize("ids", [[9, 9], [17, 9], [*stretch(1, 0, 5), *stretch(1, 4, 2)]])
def test_a_file_that_does_not_rise_is_found(tmp_path: Path, ids: Sequence[int]) -> None:
    """Of one process, each id is larger than all before."""
    _, _, violations = compare(written(tmp_path, ids), BITS)
    assert any("comes after" in violation for violation in violations)


def test_a_double_at_the_border_of_two_readings_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read in pieces; nothing is lost between them, and nothing is counted twice."""
    monkeypatch.setattr(duplicate_hunt, "CHUNK", 4)
    good = [*stretch(1, 0, 8), *stretch(1, 10, 3)]
    assert compare(written(tmp_path, good, stretch(2, 0, 9)), BITS) == (20, 0, [])
    _, _, violations = compare(written(tmp_path, [*stretch(1, 0, 4), *stretch(1, 3, 4)]), BITS)
    assert any("comes after" in violation for violation in violations)


def test_it_says_the_same_as_a_set_of_all_ids(tmp_path: Path) -> None:
    """Over many random files, with a double id in about half of them."""
    chance = random.Random(4)
    outcomes = set()
    for _ in range(200):
        files = [
            sorted({tick * STEP + chance.randrange(2) for tick in chance.sample(range(300), 12)})
            for _ in range(3)
        ]
        is_double = len({number for ids in files for number in ids}) < sum(map(len, files))
        count, _, violations = compare(written(tmp_path, *files), BITS)
        assert count == sum(map(len, files))
        assert bool(violations) == is_double
        outcomes.add(is_double)
    assert outcomes == {True, False}


def test_what_real_minters_mint_passes(tmp_path: Path) -> None:
    """One by one and in blocks, in two threads with a worker each."""
    layout = Layout(time_bits=41, sequence_bits=12, worker_bits=BITS, name="small")
    minted: list[list[int]] = [[], []]

    def mint(worker: int) -> None:
        minter = Minter(layout)
        minter.install(worker, 1000, 1_000_000, 1000)
        for count in range(40):
            minted[worker] += [minter.mint() for _ in range(count)]
            minted[worker] += minter.mint_many(count)

    threads = [threading.Thread(target=mint, args=(worker,)) for worker in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    count, _, violations = compare(written(tmp_path, *minted), BITS)
    assert violations == []
    assert count == 2 * 40 * 39
