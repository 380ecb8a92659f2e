"""What a disk must never do: where it is noticed, and the one place where it cannot be."""

from __future__ import annotations

from random import Random
from struct import pack_into
from zlib import crc32

import pytest

from coordlib.errors import StartError, StorageCorrupt, StorageFailed
from coordlib.raft.messages import HardState
from coordlib.storage import Persist
from coordlib.storage.records import SEGMENT_HEADER_SIZE, scan_segment, segment_header
from coordlib.testing.disk import SimulatedFileSystem
from coordlib.testing.suites.storage import make_entries, make_meta, write_snapshot
from tests.storage.model import DIRECTORY, Driver, make_storage

SEGMENT_1 = f"{DIRECTORY}/0000000000000001.log"
SEGMENT_2 = f"{DIRECTORY}/0000000000000002.log"
IDENTITY = f"{DIRECTORY}/identity"


def make_log(
    batches: int = 4, *, size: int = 40, vote: str = "a", is_closed: bool = False, **options: int
) -> Driver:
    """A log of synced batches; not closed in order, unless asked for."""
    driver = Driver(SimulatedFileSystem(), Random(0), **options)
    driver.open()
    for index in range(1, batches + 1):
        driver.write([Persist(0, HardState(index, vote), make_entries(index, index, index, size))])
    if is_closed:
        driver.storage.close()
    driver.fs.crash_with(lambda change: [change], lambda: True)
    return driver


def batch_bounds(fs: SimulatedFileSystem, path: str = SEGMENT_1, number: int = 1) -> list[tuple[int, int]]:
    scan = scan_segment(fs.content(path), crc32(segment_header(b"0123456789abcdef", number)), None)
    return [(batch.offset, batch.end) for batch in scan.batches]


def reopen(fs: SimulatedFileSystem) -> None:
    make_storage(fs).open()


def assert_corrupt_and_untouched(fs: SimulatedFileSystem) -> None:
    before = {path: fs.content(path) for path in fs.paths()}
    with pytest.raises(StorageCorrupt, match="Do not empty the directory"):
        reopen(fs)
    assert before == {path: fs.content(path) for path in fs.paths()}


def test_a_flipped_bit_anywhere_before_the_last_write_is_corruption() -> None:
    """Every byte of the header and of all batches but the last; nothing is changed on the disk by looking."""
    driver = make_log()
    (start, _), *_, (last, _) = batch_bounds(driver.fs)
    for offset in [*range(0, SEGMENT_HEADER_SIZE, 7), *range(44), *range(start, last)]:
        fs = driver.fs.clone()
        fs.flip_bit(SEGMENT_1, offset, offset % 8)
        assert_corrupt_and_untouched(fs)


def test_a_flipped_bit_in_the_very_last_write_looks_like_a_torn_tail_and_is_noted() -> None:
    """Nothing on this disk can tell; the members remember what each of them acknowledged."""
    driver = make_log()
    before = driver.model.recovered()[1]
    (start, end) = batch_bounds(driver.fs)[-1]
    for offset in range(start, end):
        fs = driver.fs.clone()
        fs.flip_bit(SEGMENT_1, offset, offset % 8)
        recovered = make_storage(fs).open()
        assert before[0].entries[:-1] == recovered.groups[0].entries
        assert len(recovered.notes) == 1
        assert "never acknowledged, unless" in recovered.notes[0]


def test_after_an_orderly_shutdown_a_flipped_bit_in_any_write_is_corruption() -> None:
    """Closing writes one more batch, which proves that the last real one had been durable."""
    driver = make_log(is_closed=True)
    (start, _), *_, (mark, end) = batch_bounds(driver.fs)
    for offset in range(start, mark):
        fs = driver.fs.clone()
        fs.flip_bit(SEGMENT_1, offset, offset % 8)
        assert_corrupt_and_untouched(fs)
    for offset in range(mark, end):
        fs = driver.fs.clone()
        fs.flip_bit(SEGMENT_1, offset)
        driver.model.check(make_storage(fs).open())


def test_a_flipped_bit_anywhere_in_a_segment_that_is_not_the_last_is_corruption() -> None:
    driver = make_log(8, size=400)
    size = len(driver.fs.content(SEGMENT_1))
    assert SEGMENT_2 in driver.fs.paths()
    for offset in range(0, size, 3):
        fs = driver.fs.clone()
        fs.flip_bit(SEGMENT_1, offset, offset % 8)
        assert_corrupt_and_untouched(fs)


def test_a_flipped_bit_beyond_the_last_write_loses_nothing() -> None:
    driver = make_log()
    end = batch_bounds(driver.fs)[-1][1]
    for offset in range(end, len(driver.fs.content(SEGMENT_1)), 5):
        fs = driver.fs.clone()
        fs.flip_bit(SEGMENT_1, offset)
        driver.model.check(make_storage(fs).open())


@pytest.mark.parametrize("position", range(3))
def test_a_batch_replaced_by_zeros_or_by_another_batch_is_corruption(position: int) -> None:
    """A lost write, a stale sector, a misdirected write: all before the last batch."""
    driver = make_log()
    bounds = batch_bounds(driver.fs)
    start, end = bounds[position]
    other_start, other_end = bounds[(position + 1) % 3 + (position == 2)]
    content = driver.fs.content(SEGMENT_1)
    for data in (bytes(end - start), content[other_start:other_end]):
        fs = driver.fs.clone()
        fs.overwrite(SEGMENT_1, start, data)
        assert_corrupt_and_untouched(fs)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_a_batch_of_another_history_is_corruption_however_well_it_fits(position: int) -> None:
    """Stale bytes of the same file, whole and with the right number: only the checksum before them is another."""
    driver, other = make_log(), make_log(vote="b")
    bounds = batch_bounds(driver.fs)
    assert batch_bounds(other.fs) == bounds
    start, end = bounds[position]
    driver.fs.overwrite(SEGMENT_1, start, other.fs.content(SEGMENT_1)[start:end])
    assert_corrupt_and_untouched(driver.fs)


def test_damage_of_a_synced_write_is_seen_although_the_next_one_is_torn() -> None:
    """The next write need not be whole to prove that the one before it had been synced."""
    driver = make_log(3)
    content = driver.fs.content(SEGMENT_1)
    start, end = batch_bounds(driver.fs)[-1]
    damaged = batch_bounds(driver.fs)[-2][0] + 40
    for size in range(1, end - start - 8):
        fs = driver.fs.clone()
        fs.overwrite(SEGMENT_1, start + size, bytes(len(content) - start - size))
        fs.flip_bit(SEGMENT_1, damaged)
        assert_corrupt_and_untouched(fs)


def test_a_payload_that_quotes_the_log_itself_proves_nothing() -> None:
    """A user may store a copy of the log in the log: a torn tail that quotes earlier batches is still torn."""
    driver = make_log(3)
    quoted = driver.fs.content(SEGMENT_1)[SEGMENT_HEADER_SIZE:].rstrip(b"\0")
    quoted += bytes(-len(quoted) % 8)
    driver.open()
    start = batch_bounds(driver.fs)[-1][1]
    for shift in range(8):
        fs = driver.fs.clone()
        storage = make_storage(fs)
        storage.open()
        entry = make_entries(4, 4, 4)[0]._replace(data=bytes(shift) + quoted)
        storage.write([Persist(0, None, [entry])])
        fs.crash_with(lambda change: [change], lambda: True)
        fs.overwrite(SEGMENT_1, start, b"torn")
        driver.model.check(make_storage(fs).open())


def test_a_missing_segment_in_the_middle_is_corruption() -> None:
    driver = make_log(20, size=400)
    logs = [path for path in driver.fs.paths() if path.endswith(".log")]
    assert len(logs) >= 4
    for path in logs[:-1]:
        fs = driver.fs.clone()
        fs.unlink(path)
        assert_corrupt_and_untouched(fs)


def test_removed_segments_that_a_crash_brings_back_are_removed_again() -> None:
    """Unlinks are not synced, so any subset of them may be undone."""
    driver = make_log(20, size=400)
    driver.open()
    driver.snapshot(0, make_meta(18, 18))
    before = [path for path in driver.fs.paths() if path.endswith(".log")]
    for _ in range(10):
        driver.storage.compact(0, 18)
    after = [path for path in driver.fs.paths() if path.endswith(".log")]
    assert len(before) - len(after) >= 4
    for seed in range(20):
        rng = Random(seed)
        fs = driver.fs.clone()
        fs.crash_with(lambda change: [change], lambda rng=rng: rng.random() < 0.5)  # type: ignore[misc]
        driver.model.check(make_storage(fs).open())
        numbers = [int(path[-20:-4], 16) for path in fs.paths() if path.endswith(".log")]
        assert list(range(numbers[0], numbers[-1] + 1)) == numbers


def test_one_call_of_compact_removes_one_file_and_the_rest_go_with_changes_of_segment() -> None:
    driver = make_log(40, size=400)
    driver.open()
    driver.snapshot(0, make_meta(40, 40))
    unlinks = driver.fs.counts["unlink"]
    driver.storage.compact(0, 40)
    assert driver.fs.counts["unlink"] == unlinks + 1
    before = driver.storage.stats["segments"]
    for index in range(41, 61):
        driver.write([Persist(0, None, make_entries(index, index, 40, 400))])
    assert driver.fs.counts["unlink"] > unlinks + 5
    assert driver.storage.stats["segments"] <= before + 1


def test_compaction_spares_segments_that_another_group_needs() -> None:
    driver = Driver(SimulatedFileSystem(), Random(0))
    driver.open()
    driver.write([Persist(1, HardState(1, "a"), make_entries(1, 2))])
    for index in range(1, 20):
        driver.write([Persist(0, None, make_entries(index, index, 1, 500))])
    driver.snapshot(0, make_meta(19))
    for _ in range(5):
        driver.storage.compact(0, 19)
    assert SEGMENT_1 in driver.fs.paths()
    driver.snapshot(1, make_meta(2))
    for _ in range(5):
        driver.storage.compact(1, 2)
    assert SEGMENT_1 not in driver.fs.paths()
    driver.fs.crash_with(lambda change: [change], lambda: True)
    driver.open()
    assert HardState(1, "a") == driver.model.groups[1].hard_state


def test_a_segment_of_another_disk_or_with_another_number_is_refused() -> None:
    fs = make_log(8, size=400).fs
    header = segment_header(b"another disk id!", 1)
    fs.overwrite(SEGMENT_1, 0, header)
    assert_corrupt_and_untouched(fs)
    fs.overwrite(SEGMENT_1, 0, segment_header(b"0123456789abcdef", 2))
    assert_corrupt_and_untouched(fs)


def test_an_identity_without_a_log_is_corruption() -> None:
    fs = make_log(1).fs
    fs.unlink(SEGMENT_1)
    assert_corrupt_and_untouched(fs)


def test_a_log_without_an_identity_is_corruption() -> None:
    fs = make_log(1).fs
    fs.unlink(IDENTITY)
    assert_corrupt_and_untouched(fs)


def test_a_flipped_bit_anywhere_in_the_identity_is_corruption() -> None:
    driver = make_log(1)
    for offset in range(len(driver.fs.content(IDENTITY))):
        fs = driver.fs.clone()
        fs.flip_bit(IDENTITY, offset, offset % 8)
        assert_corrupt_and_untouched(fs)


def test_a_flipped_bit_anywhere_in_a_snapshot_is_corruption_at_the_latest_when_read() -> None:
    driver = make_log(8)
    driver.open()
    payload = bytes(range(100))
    write_snapshot(driver.storage, 0, make_meta(7, 7), payload)
    driver.fs.crash_with(lambda change: [change], lambda: True)
    (path,) = [path for path in driver.fs.paths() if path.endswith(".snap")]
    for offset in range(len(driver.fs.content(path))):
        fs = driver.fs.clone()
        fs.flip_bit(path, offset, offset % 8)
        storage = make_storage(fs)
        with pytest.raises(StorageCorrupt):
            storage.open()
            reader = storage.open_snapshot(0)
            assert reader is not None
            reader.read(0, 1000)


def test_a_snapshot_cut_off_anywhere_is_corruption() -> None:
    driver = make_log(8)
    driver.open()
    write_snapshot(driver.storage, 0, make_meta(7, 7), bytes(300))
    driver.fs.crash_with(lambda change: [change], lambda: True)
    (path,) = [path for path in driver.fs.paths() if path.endswith(".snap")]
    for size in range(0, len(driver.fs.content(path)), 5):
        fs = driver.fs.clone()
        fs.open(path).truncate(size)
        assert_corrupt_and_untouched(fs)


def test_swapped_blocks_of_a_snapshot_are_noticed() -> None:
    driver = make_log(8)
    driver.open()
    write_snapshot(driver.storage, 0, make_meta(7, 7), b"a" * 65536 + b"b" * 65536)
    (path,) = [path for path in driver.fs.paths() if path.endswith(".snap")]
    content = driver.fs.content(path)
    start = content.index(b"a" * 100) - 4
    first, second = content[start : start + 65540], content[start + 65540 : start + 131080]
    driver.fs.overwrite(path, start, second + first)
    reader = driver.storage.open_snapshot(0)
    assert reader is not None
    with pytest.raises(StorageCorrupt):
        reader.read(70_000, 10)


def test_a_snapshot_missing_under_a_compacted_log_is_corruption() -> None:
    driver = make_log(20, size=400)
    driver.open()
    driver.snapshot(0, make_meta(18, 18))
    driver.storage.compact(0, 18)
    driver.fs.crash_with(lambda change: [change], lambda: True)
    (path,) = [path for path in driver.fs.paths() if path.endswith(".snap")]
    driver.fs.unlink(path)
    assert_corrupt_and_untouched(driver.fs)


def test_an_older_copy_of_the_last_segment_beside_newer_ones_is_corruption() -> None:
    """A file rolled back to an earlier state contradicts what the next segment says of it."""
    driver = make_log(1, size=300)
    old = driver.fs.content(SEGMENT_1)
    driver.open()
    for index in range(2, 6):
        driver.write([Persist(0, None, make_entries(index, index, 5, 300))])
    assert SEGMENT_2 in driver.fs.paths()
    assert len(batch_bounds(driver.fs)) >= 2
    driver.fs.crash_with(lambda change: [change], lambda: True)
    size = len(driver.fs.content(SEGMENT_1))
    driver.fs.overwrite(SEGMENT_1, 0, old.ljust(size, b"\0"))
    assert_corrupt_and_untouched(driver.fs)


def test_a_disk_that_cannot_be_read_is_a_failure_and_not_an_empty_log() -> None:
    fs = make_log().fs
    fs.fail("pread", path="0001.log")
    with pytest.raises(StorageFailed):
        reopen(fs)
    make_log().model.check(make_storage(fs).open())


@pytest.mark.parametrize("name", ["identity", "segment", "snapshot"])
def test_a_newer_format_is_refused_with_the_upgrade_as_the_remedy(name: str) -> None:
    driver = make_log(8)
    driver.open()
    write_snapshot(driver.storage, 0, make_meta(7, 7))
    driver.storage.close()
    fs = driver.fs
    snapshot = next(path for path in fs.paths() if path.endswith(".snap"))
    path, end = {"identity": (IDENTITY, 16), "segment": (SEGMENT_1, 40), "snapshot": (snapshot, 36)}[name]
    data = bytearray(fs.content(path))
    pack_into("<I", data, 8, 2)
    covered = crc32(data[:end])
    if name == "identity":
        covered = crc32(data[20:], covered)
    elif name == "snapshot":
        covered = crc32(data[40 : 40 + int.from_bytes(data[12:16], "little")], covered)
    pack_into("<I", data, end, covered)
    fs.overwrite(path, 0, bytes(data))
    before = {path: fs.content(path) for path in fs.paths()}
    with pytest.raises(StartError, match=r"format 2.*upgrade coordlib"):
        reopen(fs)
    assert before == {path: fs.content(path) for path in fs.paths()}


@pytest.mark.parametrize("reads", range(3))
def test_a_snapshot_that_cannot_be_read_is_a_failure_of_the_disk(reads: int) -> None:
    """Whichever of its parts it is: the error is one that stops the node in words. Found by seed 2020."""
    driver = make_log()
    storage = make_storage(driver.fs)
    storage.open()
    write_snapshot(storage, 0, make_meta(2, 2), b"state")
    driver.fs.fail("pread", path=".snap", skip=reads)
    with pytest.raises(StorageFailed, match="check the disk"):
        storage.open_snapshot(0)
    driver.fs.heal()
    assert storage.open_snapshot(0) is not None
    storage.close()
