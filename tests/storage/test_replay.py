"""The recorded life of a log on real files, cut off at every point and left to a disk that is as bad as it may be.

tests/storage/test_crash.py stops a life on the simulated disk before every effect, with a few fates each, most
of them drawn. What that leaves open is closed here: the life is one on real files, through the real calls; the
disk is built from the tape of its writes, syncs and renames alone, without the code that made them; and at every
prefix the fates are gone through, not drawn. Each un-synced change is once lost alone, once kept alone, and torn
at every sector's boundary and near both ends, the first part kept or the last; all subsets if there are few; in
the order they were made and in reverse; each with the un-synced names kept and lost.

Afterwards everything acknowledged must be there, nothing else but the one call in progress, as a whole; another
power cut must change nothing; and the log must go on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest

from coordlib.errors import CoordError
from coordlib.raft.messages import HardState
from coordlib.storage import Persist, RecoveredGroup
from coordlib.storage.files import Buffer, DirectoryLock, File, PosixFileSystem
from coordlib.testing.disk import PendingChange, SimulatedFile, SimulatedFileSystem
from coordlib.testing.suites.storage import make_entries
from tests.storage.model import DIRECTORY, Driver, make_storage
from tests.storage.test_crash import script

SECTOR = 512
SUBSETS_MAX = 5  # changes and names of which all subsets are tried

State = tuple[bytes, dict[int, RecoveredGroup]]
Fate = tuple[
    list[list[PendingChange]], list[bool], bool
]  # what is left of each change; of each name; reversed


class Effect(NamedTuple):
    """One call that changes something, and what might be found if the power went just before it."""

    operation: str
    file: int  # number of the handle, for calls on files
    path: str
    argument: Any
    states: list[State]


class _RecordingFile:
    def __init__(self, recorder: _Recorder, file: File, number: int) -> None:
        self._recorder = recorder
        self._file = file
        self._number = number
        self.pread = file.pread
        self.size = file.size
        self.close = file.close

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._recorder.note("pwrite", self._number, "", (bytes(data), offset))
        self._file.pwrite(data, offset)

    def datasync(self) -> None:
        self._recorder.note("datasync", self._number)
        self._file.datasync()

    def truncate(self, size: int) -> None:
        self._recorder.note("truncate", self._number, "", size)
        self._file.truncate(size)


class _Recorder:
    """The real file system below a directory of the test's own, with a tape of what was done to it."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._real = PosixFileSystem()
        self._count = 0
        self.tape: list[Effect] = []
        self.driver: Driver | None = None
        self.condemn: Callable[[str, str], None] = self._real.condemn
        self.condemned: Callable[[str], str | None] = self._real.condemned

    def note(self, operation: str, file: int = -1, path: str = "", argument: Any = None) -> None:
        assert self.driver is not None
        model = self.driver.model
        states = [model.recovered()]
        if model.next is not None:
            states.append(model.next.recovered())
        self.tape.append(Effect(operation, file, path, argument, states))

    def make_directory(self, path: str) -> None:
        self.note("make_directory", -1, path)
        self._real.make_directory(self._root + path)

    def open(self, path: str, *, create: bool = False) -> File:
        self._count += 1
        self.note("create" if create else "open", self._count, path)
        return _RecordingFile(self, self._real.open(self._root + path, create=create), self._count)

    def names(self, directory: str) -> list[str]:
        return self._real.names(self._root + directory)

    def rename(self, old: str, new: str) -> None:
        self.note("rename", -1, old, new)
        self._real.rename(self._root + old, self._root + new)

    def unlink(self, path: str) -> None:
        self.note("unlink", -1, path)
        self._real.unlink(self._root + path)

    def sync_directory(self, path: str) -> None:
        self.note("sync_directory", -1, path)
        self._real.sync_directory(self._root + path)

    def lock(self, path: str) -> DirectoryLock:
        return self._real.lock(self._root + path)


def _record(root: Path, live: Callable[[Driver], None], seed: int = 0, **options: int) -> list[Effect]:
    recorder = _Recorder(root)
    driver = recorder.driver = Driver(recorder, Random(seed), **options)  # type: ignore[arg-type]  # no crashes here
    live(driver)
    recorder.note("end")
    return recorder.tape


class _Disk:
    """The tape, played on the simulated disk."""

    def __init__(self) -> None:
        self.fs = SimulatedFileSystem()
        self._files: dict[int, SimulatedFile] = {}

    def play(self, effect: Effect) -> None:
        operation, number, path, argument, _ = effect
        if operation in ("create", "open"):
            self._files[number] = self.fs.open(path, create=operation == "create")
        elif operation == "pwrite":
            self._files[number].pwrite(*argument)
        elif operation == "truncate":
            self._files[number].truncate(argument)
        elif operation == "datasync":
            self._files[number].datasync()
        elif operation == "rename":
            self.fs.rename(path, argument)
        elif operation != "end":
            getattr(self.fs, operation)(path)


def _parts(change: PendingChange) -> Iterator[list[PendingChange]]:
    """What may be left of one torn write."""
    offset, data = change
    if data is None:
        return
    size = len(data)
    bounds = range(SECTOR - offset % SECTOR, size, SECTOR)
    # Of a slice of zeros every part is like another.
    cuts = {1, size // 2, size - 1} | (set(bounds) if any(data) else set())
    for cut in sorted(cut for cut in cuts if 0 < cut < size):
        yield [PendingChange(offset, data[:cut])]
        yield [PendingChange(offset + cut, data[cut:])]


def _fates(changes: list[PendingChange], names: int) -> Iterator[Fate]:
    all_kept: list[list[PendingChange]] = [[change] for change in changes]
    all_lost: list[list[PendingChange]] = [[] for _ in changes]
    no_name, every_name = [False] * names, [True] * names
    if len(changes) + names <= SUBSETS_MAX:
        for kept in product((False, True), repeat=len(changes) + names):
            contents = [[c] if is_kept else [] for c, is_kept in zip(changes, kept, strict=False)]
            yield contents, list(kept[len(changes) :]), False
    else:
        for each_name in (no_name, every_name):
            yield all_kept, each_name, False
            yield all_lost, each_name, False
            for place in range(len(changes)):
                yield [*all_lost[:place], all_kept[place], *all_lost[place + 1 :]], each_name, False
                yield [*all_kept[:place], all_lost[place], *all_kept[place + 1 :]], each_name, False
        for place in range(names):
            for is_kept in (False, True):
                single = [not is_kept] * names
                single[place] = is_kept
                yield all_kept, single, False
    if len(changes) > 1:
        yield all_kept, every_name, True
    for place, change in enumerate(changes):
        for part in _parts(change):
            yield [*all_kept[:place], part, *all_kept[place + 1 :]], every_name, False
            if len(changes) > 1:
                yield [*all_lost[:place], part, *all_lost[place + 1 :]], no_name, False


def _cut_power(fs: SimulatedFileSystem, fate: Fate) -> None:
    contents, names, is_reversed = fate
    next_content, next_name = iter(contents), iter(names)
    fs.crash_with(
        lambda change: next(next_content), lambda: next(next_name), list.reverse if is_reversed else None
    )


def _changes(fs: SimulatedFileSystem) -> tuple[list[PendingChange], int]:
    """The un-synced changes in the order in which a crash asks for their fate, and the number of names."""
    changes: list[PendingChange] = []
    names = 0

    def see_change(change: PendingChange) -> list[PendingChange]:
        changes.append(change)
        return []

    def see_name() -> bool:
        nonlocal names
        names += 1
        return False

    fs.clone().crash_with(see_change, see_name)
    return changes, names


def _open(fs: SimulatedFileSystem, options: dict[str, int], states: list[State]) -> Any:
    storage = make_storage(fs, **options)
    recovered = storage.open()
    nothing = RecoveredGroup(HardState(0, ""), None, [])
    groups = {number: group for number, group in recovered.groups.items() if group != nothing}
    found = (recovered.identity.cluster_uuid, groups)
    assert found in states, f"{found}\nis none of\n{states}"
    for number, group in groups.items():
        reader = storage.open_snapshot(number)
        assert (None if reader is None else reader.meta) == group.snapshot
        if reader is not None:
            assert reader.read(0, reader.size) == Driver.payload(reader.meta)
            reader.close()
    return storage, found


def _replay(tape: list[Effect], options: dict[str, int], *, without: str = "") -> tuple[int, int]:
    """
    Cut the power at every prefix, with every fate.

    Args:
        without: A sync that is taken from the tape, to see that it would be missed.

    Returns:
        How many different disks power cuts left behind, and how many of them had a torn write.
    """
    disk = _Disk()
    cuts = torn = 0
    for effect in tape:
        changes, names = _changes(disk.fs)
        seen: set[tuple[tuple[str, bytes], ...]] = set()
        for number, fate in enumerate(_fates(changes, names)):
            fs = disk.fs.clone()
            _cut_power(fs, fate)
            left = tuple((path, fs.content(path)) for path in fs.paths())
            if left in seen:
                continue  # zeros over zeros, and the like
            seen.add(left)
            _, found = _open(fs, options, effect.states)
            # What was said to be there is durable now: another cut changes nothing.
            fs.crash_with(lambda change: [], lambda: False)
            storage, _ = _open(fs, options, [found])
            if number % 8 == 0:
                group = found[1].get(0, RecoveredGroup(HardState(0, ""), None, []))
                last = (
                    group.entries[-1].index
                    if group.entries
                    else group.snapshot.index
                    if group.snapshot
                    else 0
                )
                entries = make_entries(last + 1, last + 1, 99, 40)
                storage.write([Persist(0, HardState(99, "a"), entries)])
                fs.crash_with(lambda change: [], lambda: False)
                after = RecoveredGroup(HardState(99, "a"), group.snapshot, [*group.entries, *entries])
                _open(fs, options, [(found[0], {**found[1], 0: after})])
            cuts += 1
            torn += any(kept not in ([], [change]) for kept, change in zip(fate[0], changes, strict=True))
        if effect.operation != without:
            disk.play(effect)
    return cuts, torn


def _drawn(driver: Driver) -> None:
    driver.open()
    for _ in range(12):
        driver.step()
    driver.storage.close()


def _large(driver: Driver) -> None:
    """With the sizes of a real node: one segment, filled in slices."""
    driver.open()
    driver.write([Persist(0, HardState(1, "a"), make_entries(1, 3, 1, 3000))])
    driver.write([Persist(0, None, make_entries(4, 9, 1, 100))])
    driver.write([Persist(0, HardState(2, ""), make_entries(6, 7, 2, 9000))])
    driver.storage.close()


LIVES: dict[str, tuple[Callable[[Driver], None], int, dict[str, int]]] = {
    "scripted": (script, 0, {}),
    **{f"drawn {seed}": (_drawn, seed, {}) for seed in range(1, 5)},
    "large": (_large, 0, {"segment_size_bytes": 16 << 20, "fill_size_bytes": 32 << 10}),
}


@pytest.mark.parametrize("name", LIVES)
def test_a_recorded_life_cut_off_anywhere_has_lost_nothing_and_invented_nothing(
    name: str, tmp_path: Path
) -> None:
    """At every prefix of its writes, syncs, creates, renames and unlinks, and with every fate of what was not synced."""
    live, seed, options = LIVES[name]
    tape = _record(tmp_path, live, seed, **options)
    cuts, torn = _replay(tape, options)
    assert cuts > len(tape) and torn > 20


@pytest.mark.parametrize("sync", ["datasync", "sync_directory"])
def test_a_sync_that_is_left_out_of_the_tape_is_missed(sync: str, tmp_path: Path) -> None:
    """The control: without either kind of sync, something acknowledged is lost at some prefix."""
    tape = _record(tmp_path, script)
    with pytest.raises((AssertionError, CoordError)):
        _replay(tape, {}, without=sync)


def test_the_tape_says_what_the_files_say(tmp_path: Path) -> None:
    """Played to its end, it leaves the files that are really there, byte by byte."""
    tape = _record(tmp_path, script)
    disk = _Disk()
    for effect in tape:
        disk.play(effect)
    real = {f"{DIRECTORY}/{name}" for name in os.listdir(f"{tmp_path}{DIRECTORY}")} - {f"{DIRECTORY}/lock"}
    assert real == set(disk.fs.paths())
    for path in sorted(real):
        assert Path(f"{tmp_path}{path}").read_bytes() == disk.fs.content(path)
