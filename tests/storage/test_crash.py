"""Whatever a crash loses, tears or reorders: what was acknowledged comes back, and nothing else."""

from __future__ import annotations

import errno
from copy import deepcopy
from itertools import pairwise, product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib.errors import StorageFailed
from coordlib.raft.messages import HardState
from coordlib.storage import Persist
from coordlib.testing.disk import CrashNow, PendingChange, SimulatedFileSystem
from coordlib.testing.suites.storage import make_entries, make_meta
from tests.storage.model import DIRECTORY, Driver, make_storage

FATES = ("keep", "lose", "random", "random", "reverse")


def crash(fs: SimulatedFileSystem, fate: str, rng: Random) -> None:
    if fate == "keep":
        fs.crash_with(lambda change: [change], lambda: True)
    elif fate == "lose":
        fs.crash_with(lambda change: [], lambda: False)
    elif fate == "reverse":
        fs.crash_with(lambda change: [change], lambda: rng.random() < 0.5, lambda changes: changes.reverse())
    else:
        fs.crash(rng)


def script(driver: Driver) -> None:
    """A short life with everything in it: segments, supersession, compaction, install, restart."""
    driver.open()
    driver.write(
        [Persist(0, HardState(1, "a"), make_entries(1, 3, 1, 200)), Persist(1, HardState(1, "b"), [])]
    )
    driver.write([Persist(0, None, make_entries(4, 5, 1, 200)), Persist(1, None, make_entries(1, 2))])
    driver.write([Persist(0, HardState(2, ""), make_entries(4, 4, 2, 400))])
    driver.snapshot(0, make_meta(3))
    driver.storage.compact(0, 3)
    driver.write([Persist(0, None, make_entries(5, 6, 2, 100))])
    driver.snapshot(1, make_meta(9, 3))
    driver.write([Persist(1, HardState(3, "c"), make_entries(10, 11, 3), make_meta(9, 3))])
    driver.storage.close()
    driver.open()
    for index in range(7, 13):
        driver.write([Persist(0, None, make_entries(index, index, 2, 500))])
    driver.snapshot(0, make_meta(10, 2))
    driver.storage.compact(0, 10)
    driver.storage.compact(1, 9)
    driver.write([Persist(0, None, make_entries(13, 13, 2)), Persist(1, None, make_entries(12, 12, 3))])
    driver.storage.close()


def test_the_script_uses_several_segments_and_removes_some() -> None:
    fs = SimulatedFileSystem()
    driver = Driver(fs, Random(0))
    script(driver)
    logs = [path for path in fs.paths() if path.endswith(".log")]
    assert len(logs) >= 2
    assert logs[0] != f"{DIRECTORY}/0000000000000001.log"


def test_a_crash_before_any_effect_of_a_scripted_life_loses_nothing_acknowledged() -> None:
    """The machine stops before every write, sync, create, rename and unlink, with several fates each."""
    total = SimulatedFileSystem()
    script(Driver(total, Random(0)))
    assert total.effects > 80
    for crash_at in range(total.effects):
        fs = SimulatedFileSystem()
        driver = Driver(fs, Random(0))
        fs.crash_at = crash_at
        with pytest.raises(CrashNow):
            script(driver)
        for number, fate in enumerate(FATES):
            rng = Random(crash_at * 100 + number)
            survivor = Driver(fs.clone(), rng)
            survivor.model = deepcopy(driver.model)
            crash(survivor.fs, fate, rng)
            survivor.open_after_crash()
            survivor.check_snapshots()
            # What open() said is durable: another crash at once changes nothing.
            survivor.fs.crash_with(lambda change: [], lambda: False)
            survivor.open()
            survivor.check_snapshots()
            survivor.write([Persist(0, None, [])])
            survivor.write([survivor.persist(0), survivor.persist(1)])


def test_a_process_killed_before_any_effect_loses_nothing_acknowledged() -> None:
    """The process dies, what it wrote is still in the page cache, and then the machine dies."""
    total = SimulatedFileSystem()
    script(Driver(total, Random(0)))
    for crash_at in range(total.effects):
        fs = SimulatedFileSystem()
        driver = Driver(fs, Random(crash_at))
        fs.crash_at = crash_at
        with pytest.raises(CrashNow):
            script(driver)
        fs.kill()
        driver.open()
        fs.crash_with(lambda change: [], lambda: False)
        driver.open()


def test_a_crash_within_recovery_after_a_kill_loses_nothing_acknowledged() -> None:
    """What recovery finds may not be durable yet: it must be, before anything that it replaces goes."""
    total = SimulatedFileSystem()
    script(Driver(total, Random(0)))
    for crash_at in range(total.effects):
        fs = SimulatedFileSystem()
        driver = Driver(fs, Random(crash_at))
        fs.crash_at = crash_at
        with pytest.raises(CrashNow):
            script(driver)
        fs.kill()
        for opening in range(100):
            survivor = Driver(fs.clone(), Random(crash_at * 100 + opening))
            survivor.model = deepcopy(driver.model)
            survivor.fs.crash_at = opening
            try:
                survivor.open()
                break
            except CrashNow:
                pass
            for _ in range(3):
                last = Driver(survivor.fs.clone(), survivor.rng)
                last.model = deepcopy(survivor.model)
                last.fs.crash(last.rng)
                last.open()
                last.check_snapshots()


def test_an_unfinished_segment_does_not_come_back_to_contradict_a_later_torn_write() -> None:
    """Its creation was interrupted, it was removed, the segment before went on, and the machine stopped again."""
    fs = SimulatedFileSystem()
    driver = Driver(fs, Random(0))
    driver.open()
    driver.write([Persist(0, HardState(1, "a"), make_entries(1, 3, 1, 250))])
    fs.crash_at = fs.effects + 1
    with pytest.raises(CrashNow):
        driver.write([Persist(0, None, make_entries(4, 4, 1, 900))])
    fs.crash_with(lambda change: [], lambda: True)
    assert len([path for path in fs.paths() if path.endswith(".log")]) == 2
    assert "interrupted" in driver.open().notes[0]
    fs.crash_at = fs.effects + 1
    with pytest.raises(CrashNow):
        driver.write([Persist(0, None, make_entries(4, 4, 1, 10))])
    fs.crash_with(
        lambda change: [] if change.data is None else [PendingChange(change.offset, change.data[:40])],
        lambda: False,
    )
    driver.open()


@pytest.mark.parametrize("operation", ["pwrite", "datasync", "create", "sync_directory", "rename", "unlink"])
def test_a_failure_of_any_effect_is_final_and_loses_nothing_acknowledged(operation: str) -> None:
    """At the nth call of each kind: refused from then on; the next process finds what was acknowledged."""
    total = SimulatedFileSystem()
    script(Driver(total, Random(0)))
    for skip in range(total.counts[operation]):
        fs = SimulatedFileSystem()
        driver = Driver(fs, Random(skip))
        fs.fail(operation, skip=skip)
        try:
            script(driver)
        except StorageFailed:
            with pytest.raises(StorageFailed):
                driver.storage.write([Persist(0, None, [])])
        driver.storage.close()
        is_killed = skip % 2
        fs.kill()
        if not is_killed:
            fs.crash(driver.rng)
        driver.open()
        fs.crash_with(lambda change: [], lambda: False)
        driver.open()


@pytest.mark.parametrize("seed", range(40))
def test_random_lives_with_random_crashes_lose_nothing_acknowledged(seed: int) -> None:
    """Crashes, kills, failed writes and fsyncs and full disks at random effects, also during recovery."""
    live(seed, rounds=12)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(min_value=1000, max_value=10**9), st.sampled_from([64, 300, 4096]))
def test_drawn_lives_lose_nothing_acknowledged(seed: int, fill: int) -> None:
    live(seed, rounds=6, fill_size_bytes=fill, segment_size_bytes=5200 + seed % 3000)


def live(seed: int, rounds: int, **options: int) -> None:
    rng = Random(seed)
    fs = SimulatedFileSystem()
    driver = Driver(fs, rng, **options)
    driver.open()
    for _ in range(rounds):
        draw = rng.random()
        if draw < 0.7:
            fs.crash_at = fs.effects + rng.randrange(40)
        elif draw < 0.95:
            operation = rng.choice(["pwrite", "datasync", "sync_directory", "rename"])
            fs.fail(operation, error=rng.choice([errno.EIO, errno.ENOSPC]), skip=rng.randrange(8))
        driver.run_until_crash(30)
        if rng.random() < 0.75:
            fs.crash(rng)
        else:
            fs.kill()
        driver.open_after_crash()
        driver.check_snapshots()


def test_every_combination_of_lost_and_kept_changes_around_one_write_recovers() -> None:
    """All subsets of the un-synced changes of a write that starts a segment, in both orders."""
    for crash_at in range(1, 30):
        fs = SimulatedFileSystem()
        driver = Driver(fs, Random(0))
        driver.open()
        driver.write([Persist(0, HardState(1, "a"), make_entries(1, 3, 1, 250))])
        fs.crash_at = fs.effects + crash_at
        try:
            driver.write([Persist(0, None, make_entries(4, 4, 1, 900))])
            driver.write([Persist(0, None, make_entries(5, 5, 1, 10))])
            return
        except CrashNow:
            pass
        changes = len(fs.pending())
        names = len(fs._pending_names)
        assert changes + names <= 8
        for kept in product((False, True), repeat=changes + names + 1):
            fates = iter(kept)
            survivor = Driver(fs.clone(), Random(0))
            survivor.model = deepcopy(driver.model)
            is_reversed = next(fates)
            survivor.fs.crash_with(
                lambda change, fates=fates: [change] if next(fates) else [],  # type: ignore[misc]
                lambda fates=fates: next(fates),  # type: ignore[misc]
                list.reverse if is_reversed else None,
            )
            survivor.open()
    raise AssertionError("the writes never ended")


def _last_write(size: int, count: int = 1) -> tuple[SimulatedFileSystem, Driver, str, int, bytes]:
    """A log whose last batch is written but not synced: (fs, driver, path, offset, bytes) of that batch."""
    fs = SimulatedFileSystem()
    driver = Driver(fs, Random(0), segment_size_bytes=1 << 20)
    driver.open()
    driver.write([Persist(0, HardState(1, "a"), make_entries(1, 2, 1, 50))])
    driver.write([Persist(0, None, make_entries(3, 3, 1, 50))])
    fs.crash_at = fs.effects + 1
    with pytest.raises(CrashNow):
        driver.write([Persist(0, HardState(2, ""), make_entries(3, 2 + count, 2, size))])
    writes = [(path, change) for path, change in fs.pending() if change.data is not None and any(change.data)]
    ((path, (offset, data)),) = writes
    assert data is not None
    return fs, driver, path, offset, data


def _open_with(fs: SimulatedFileSystem, driver: Driver, keep: list[PendingChange]) -> tuple[bool, list[str]]:
    """Crash so that `keep` is left of the last write; say whether the write is there, and the notes."""
    survivor = Driver(fs.clone(), Random(0), segment_size_bytes=1 << 20)
    survivor.model = deepcopy(driver.model)
    survivor.fs.crash_with(lambda change: keep if change.data and any(change.data) else [], lambda: True)
    notes = survivor.open().notes
    is_there = survivor.model.groups[0].hard_state.term == 2
    # And what was cut stays cut when other bytes take its place.
    survivor.write([Persist(0, HardState(9, "b"), make_entries(4, 4, 9, 10))])
    survivor.fs.crash_with(lambda change: [], lambda: False)
    assert survivor.open().notes == []
    return is_there, notes


def test_a_last_write_torn_at_any_byte_is_cut_as_a_whole() -> None:
    fs, driver, _, offset, data = _last_write(60, 3)
    for size in range(len(data) + 1):
        is_there, notes = _open_with(fs, driver, [PendingChange(offset, data[:size])] if size else [])
        assert is_there == (size == len(data))
        assert len(notes) == (0 < size < len(data))


def test_a_last_write_of_which_only_the_end_arrived_is_cut_as_a_whole() -> None:
    """Blocks reach a disk in any order."""
    fs, driver, _, offset, data = _last_write(60, 3)
    for size in range(1, len(data)):
        is_there, notes = _open_with(fs, driver, [PendingChange(offset + size, data[size:])])
        assert not is_there
        assert len(notes) == (1 if any(data[size:]) else 0)


def test_a_last_write_of_which_any_sectors_arrived_is_cut_as_a_whole() -> None:
    fs, driver, _, offset, data = _last_write(600, 5)
    bounds = [0, *range(512 - offset % 512, len(data), 512), len(data)]
    pieces = list(pairwise(bounds))
    assert 6 <= len(pieces) <= 8
    for kept in product((False, True), repeat=len(pieces)):
        parts = [
            PendingChange(offset + start, data[start:end])
            for (start, end), is_kept in zip(pieces, kept, strict=True)
            if is_kept
        ]
        is_there, _ = _open_with(fs, driver, parts)
        assert is_there == all(kept)


def test_an_interrupted_first_start_is_repeated_from_scratch() -> None:
    """Before the identity is durable nothing was promised, so the directory is formed anew."""
    for crash_at in range(20):
        for fate in FATES:
            fs = SimulatedFileSystem()
            fs.crash_at = crash_at
            driver = Driver(fs, Random(crash_at))
            try:
                driver.open()
                return
            except CrashNow:
                crash(fs, fate, driver.rng)
            driver.open()
            driver.write([Persist(0, HardState(1, "a"), make_entries(1, 1))])


def test_without_syncing_the_directory_a_rename_would_be_lost() -> None:
    """The simulated disk is strict: this is what the storage is tested against."""
    fs = SimulatedFileSystem()
    file = fs.open("/data/x.tmp", create=True)
    file.pwrite(b"abc", 0)
    file.datasync()
    fs.sync_directory("/data")
    fs.rename("/data/x.tmp", "/data/x")
    fs.crash_with(lambda change: [], lambda: False)
    assert fs.paths() == ["/data/x.tmp"]
    fs.rename("/data/x.tmp", "/data/x")
    fs.sync_directory("/data")
    fs.crash_with(lambda change: [], lambda: False)
    assert fs.paths() == ["/data/x"]


def test_a_failed_fsync_of_the_simulated_disk_shows_what_it_has_lost() -> None:
    """As Linux does: the second fsync succeeds, the data is read back, and is gone after the crash."""
    fs = SimulatedFileSystem()
    file = fs.open("/data/x", create=True)
    fs.sync_directory("/data")
    file.pwrite(b"abc", 0)
    fs.fail("datasync")
    with pytest.raises(OSError):
        file.datasync()
    file.datasync()
    assert file.pread(3, 0) == b"abc"
    fs.crash_with(lambda change: [change], lambda: True)
    assert fs.content("/data/x") == b""


def test_the_same_seed_gives_the_same_disk() -> None:
    def one() -> tuple[int, dict[str, bytes]]:
        rng = Random(5)
        fs = SimulatedFileSystem()
        driver = Driver(fs, rng)
        driver.open()
        fs.crash_at = 60
        driver.run_until_crash(100)
        fs.crash(rng)
        return fs.effects, {path: fs.content(path) for path in fs.paths()}

    assert one() == one()


def test_a_storage_opened_after_a_crash_uses_no_more_files_than_its_segment() -> None:
    fs = SimulatedFileSystem()
    driver = Driver(fs, Random(0))
    script(driver)
    assert fs.open_files == 0
    storage = make_storage(fs)
    storage.open()
    assert fs.open_files == 1
