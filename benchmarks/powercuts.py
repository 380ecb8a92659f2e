"""`make powercuts`: cut the power of a real file system under the real log, again and again; nothing promised is lost.

A child process writes to a log on a file system of its own (ext4 in an image, mounted by loop): entries, terms and
votes, superseded suffixes, snapshots of its own and received ones, compaction. It reports each call before it
makes it and after it has returned. At a random moment the file system is shut down (FS_IOC_SHUTDOWN without
flushing its journal: what had not reached the image is gone, as at a power failure), the child is killed, and the
image is mounted again. What the log then holds must be exactly what was acknowledged, or that and the one
call in progress as a whole: every entry byte by byte, term and vote, the snapshot. Then the child goes on with the
same log. Some cuts strike while the log is being opened, and before some syncs a part of what is not synced is written
back, as a kernel may at any time, so that batches are torn.

First comes a control: the same with fdatasync and fsync turned into nothing must lose acknowledged writes, or
the power is not really being cut, and nothing is proven.

Needs root and a loop device. Works in a mount namespace of its own, so that no mount outlives this process,
however it ends.

    python -m benchmarks.powercuts [--cuts N] [--seed N] [--sabotage no-fsync] [--dir PATH]

Exit codes: 0 nothing lost; 1 something was, or the control lost nothing; 2 wrong arguments; 3 it cannot be done here.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic, monotonic_ns, sleep
from typing import Any, Final, NamedTuple

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import machine
from coordlib.errors import CoordError
from coordlib.raft.messages import Configuration, Entry, EntryKind, HardState, SnapshotMeta
from coordlib.storage import LogStorage, Persist, Recovered, RecoveredGroup, SegmentStorage
from coordlib.storage.files import Buffer, File, PosixFileSystem
from coordlib.storage.memory import MemoryStorage

__all__ = ["main"]

EXIT_IMPOSSIBLE: Final = 3
IMAGE_SIZE_BYTES: Final = 192 << 20
CONTROL_CUTS_MIN: Final = 10
GROUPS: Final = 2
PAGE_SIZE: Final = 4096
LIFE_SECONDS_MAX: Final = 0.12
START_SECONDS_MAX: Final = 20.0
_SHUTDOWN: Final = 0x8004587D  # FS_IOC_SHUTDOWN, _IOR('X', 125, __u32)
_WITHOUT_FLUSH: Final = 2  # FS_SHUTDOWN_FLAGS_NOLOGFLUSH
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A  # since Linux 5.8
_LO_FLAGS_AUTOCLEAR: Final = 4
LOOP_ATTEMPTS_MAX: Final = 100
_MS_PRIVATE_RECURSIVE: Final = (1 << 18) | (1 << 14)
_MNT_DETACH: Final = 2
_NEW_MOUNTS: Final = 0x00020000  # CLONE_NEWNS
_WRITE_BACK: Final = 2 | 4  # SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER
_LIBC = ctypes.CDLL(None, use_errno=True)


class Impossible(Exception):
    """It cannot be done on this machine, or by this user. The text says why."""


# -- what is done to the log -------------------------------------------------------------------------------------


class Write(NamedTuple):
    """For each group: hard state, (term, first index, sizes of the entries), snapshot to restart after."""

    serial: int
    groups: tuple[tuple[int, HardState | None, int, int, tuple[int, ...], SnapshotMeta | None], ...]

    def batch(self) -> list[Persist]:
        """The same entries, byte by byte, wherever it is called; no two writes have equal ones."""
        content = random.Random(self.serial)
        return [
            Persist(
                group,
                hard_state,
                [
                    Entry(term, first + n, EntryKind.COMMAND, content.randbytes(size))
                    for n, size in enumerate(sizes)
                ],
                restored,
            )
            for group, hard_state, term, first, sizes, restored in self.groups
        ]

    def do(self, storage: LogStorage) -> None:
        storage.write(self.batch())


class Snapshot(NamedTuple):
    """A snapshot that becomes durable, and then is the newest."""

    serial: int
    group: int
    meta: SnapshotMeta
    size: int

    def do(self, storage: LogStorage) -> None:
        writer = storage.create_snapshot(self.group, self.meta)
        writer.write(random.Random(self.serial).randbytes(self.size))
        writer.finish()


class Compact(NamedTuple):
    """Entries that may be forgotten."""

    group: int
    up_to: int

    def do(self, storage: LogStorage) -> None:
        storage.compact(self.group, self.up_to)


Call = Write | Snapshot | Compact
Said = Call | int | str
"""What a child says: a call it is about to make; at which nanosecond it had returned; "opened"."""


class _Life:
    """Draws what a node might ask of its log, and knows as much of the state as that takes."""

    def __init__(self, recovered: Recovered, chance: random.Random) -> None:
        self._chance = chance
        self._terms: list[dict[int, int]] = []  # of each index
        self._base = [0] * GROUPS
        self._last = [0] * GROUPS
        self._term = [0] * GROUPS
        for group in range(GROUPS):
            found = recovered.groups.get(group, RecoveredGroup(HardState(0, ""), None, []))
            self._terms.append({entry.index: entry.term for entry in found.entries})
            self._base[group] = self._last[group] = found.snapshot.index if found.snapshot else 0
            if found.entries:
                self._last[group] = found.entries[-1].index
            terms = [found.hard_state.term, *self._terms[group].values()]
            self._term[group] = max(terms, default=0)

    def calls(self) -> Iterator[Call]:
        chance = self._chance
        while True:
            group = chance.randrange(GROUPS)
            draw = chance.random()
            if draw < 0.9:
                groups = [group, 1 - group] if chance.random() < 0.3 else [group]
                yield Write(chance.getrandbits(60), tuple(self._part(one) for one in groups))
            elif draw < 0.97 and self._last[group] > self._base[group]:
                index = chance.randint(self._base[group] + 1, self._last[group])
                yield from self._snapshot(group, SnapshotMeta(index, self._terms[group][index], _VOTERS))
                yield Compact(group, index)
            elif draw > 0.985:
                # Received from a leader: the log restarts after it.
                self._term[group] += 1
                index = self._last[group] + chance.randint(1, 20)
                meta = SnapshotMeta(index, self._term[group], _VOTERS)
                yield from self._snapshot(group, meta)
                self._last[group] = index
                self._terms[group].clear()
                yield Write(chance.getrandbits(60), (self._part(group, meta),))
                yield Compact(group, index)

    def _snapshot(self, group: int, meta: SnapshotMeta) -> Iterator[Call]:
        chance = self._chance
        yield Snapshot(chance.getrandbits(60), group, meta, chance.choice((10, 5000, 300_000)))
        self._base[group] = meta.index

    def _part(
        self, group: int, restored: SnapshotMeta | None = None
    ) -> tuple[int, HardState | None, int, int, tuple[int, ...], SnapshotMeta | None]:
        chance = self._chance
        hard_state = None
        first = self._last[group] + 1
        if chance.random() < 0.15:
            self._term[group] += 1
            hard_state = HardState(self._term[group], chance.choice(("", "a", "b")))
            if restored is None and chance.random() < 0.5 and self._last[group] > self._base[group]:
                first = chance.randint(max(self._base[group] + 1, self._last[group] - 5), self._last[group])
        size = chance.choice((0, 30, 30, 200, 200, 5000, 60_000))
        sizes = tuple(chance.randint(0, size) for _ in range(chance.randint(hard_state is None, 4)))
        term = max(1, self._term[group])
        self._term[group] = term
        if sizes:
            self._last[group] = first + len(sizes) - 1
            self._terms[group].update((first + n, term) for n in range(len(sizes)))
        return group, hard_state, term, first, sizes, restored


_VOTERS = Configuration(("a", "b", "c"))


class _Unsteady(PosixFileSystem):
    """
    The real calls, by a process that is sometimes kept from running just before it syncs.

    Meanwhile the kernel may have written back some of the pages, and does so here.

    Args:
        is_forgetful: The sabotage: nothing is ever synced.
    """

    def __init__(self, chance: random.Random, is_forgetful: bool) -> None:
        self.chance = chance
        self.is_forgetful = is_forgetful

    def open(self, path: str, *, create: bool = False) -> File:
        return _UnsteadyFile(self, super().open(path, create=create), path)

    def sync_directory(self, path: str) -> None:
        if self.chance.random() < 0.2:
            self.dawdle()
        if not self.is_forgetful:
            super().sync_directory(path)

    def dawdle(self) -> None:
        sleep(self.chance.uniform(0, 0.015))


class _UnsteadyFile:
    def __init__(self, fs: _Unsteady, file: File, path: str) -> None:
        self._fs = fs
        self._file = file
        self._path = path
        self._pages = range(0)  # of the last write
        self.pread = file.pread
        self.truncate = file.truncate
        self.size = file.size
        self.close = file.close

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._file.pwrite(data, offset)
        self._pages = range(offset // PAGE_SIZE, (offset + len(data) - 1) // PAGE_SIZE + 1)

    def datasync(self) -> None:
        if self._fs.chance.random() < 0.3:
            self._write_back_something()
            self._fs.dawdle()
        if not self._fs.is_forgetful:
            self._file.datasync()

    def _write_back_something(self) -> None:
        pages = [page for page in self._pages if self._fs.chance.random() < 0.5]
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return  # it was renamed while it is written
        try:
            for page in pages:
                start, size = ctypes.c_int64(page * PAGE_SIZE), ctypes.c_int64(PAGE_SIZE)
                _LIBC.sync_file_range(descriptor, start, size, _WRITE_BACK)
        finally:
            os.close(descriptor)


def _storage(fs: PosixFileSystem, directory: str, *, segment_size_bytes: int = 1 << 18) -> SegmentStorage:
    return SegmentStorage(
        fs,
        directory,
        node_id="a",
        cluster_name="powercuts",
        new_disk_id=b"0123456789abcdef",
        segment_size_bytes=segment_size_bytes,
        fill_size_bytes=min(segment_size_bytes // 4, 256 << 10),
    )


def _write_on(directory: str, out: Connection, seed: int, sabotage: str) -> None:
    """The child: call after call, each told before and after, until the power goes."""
    chance = random.Random(seed)
    fs = _Unsteady(random.Random(seed), bool(sabotage))
    storage = _storage(fs, directory, segment_size_bytes=chance.choice((1 << 16, 1 << 18, 16 << 20)))
    try:
        life = _Life(storage.open(), chance)
        out.send("opened")
        for call in life.calls():
            out.send(call)
            call.do(storage)
            out.send(monotonic_ns())
    except (CoordError, OSError):
        # The file system is gone. Nothing more is said; the parent looks what is there.
        os._exit(0)


# -- the power -----------------------------------------------------------------------------------------------


class _Machine:
    """A file system that can be cut off, and a child that writes to it."""

    def __init__(self, scratch: str, chance: random.Random, sabotage: str) -> None:
        self.root = os.path.join(scratch, "disk")
        self.directory = os.path.join(self.root, "data")
        self._image = os.path.join(scratch, "image")
        self._chance = chance
        self._sabotage = sabotage
        self._is_mounted = False
        self._device = -1  # keeps the loop device, which frees itself
        self._child: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        os.mkdir(self.root)

    def format(self) -> None:
        """An empty file system."""
        self.unmount()
        with open(self._image, "wb") as image:
            image.truncate(IMAGE_SIZE_BYTES)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", self._image], check=True, capture_output=True)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            raise Impossible(f"mkfs.ext4: {error}") from error
        self.mount()

    def mount(self) -> None:
        self._device, path = _attach(self._image)
        _system("mount", path.encode(), self.root.encode(), b"ext4", 0, None)
        self._is_mounted = True

    def unmount(self) -> None:
        if self._is_mounted:
            _system("umount2", self.root.encode(), 0)
            self._is_mounted = False
        if self._device >= 0:
            os.close(self._device)
            self._device = -1

    def start(self) -> None:
        """Start the child; the log is opened by it."""
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe(duplex=False)
        arguments = (self.directory, theirs, self._chance.getrandbits(60), self._sabotage)
        self._child = context.Process(target=_write_on, args=arguments, daemon=True)
        self._child.start()
        theirs.close()

    def listen(self, seconds: float) -> Iterator[Said]:
        """What the child says within that time, or until it ends."""
        assert self._pipe is not None
        end = monotonic() + seconds
        try:
            while self._pipe.poll(max(0.0, end - monotonic())):
                yield self._pipe.recv()
                if monotonic() >= end:
                    return
        except (EOFError, OSError):
            return  # it ended, in the middle of a message perhaps

    def cut(self) -> tuple[list[Said], int]:
        """Cut the power, end the child, restore the power. Returns the last it had said, and when the power went."""
        if self._chance.random() < 0.5:
            self._kill()
            cut_ns = self._shut_down()
        else:
            cut_ns = self._shut_down()
            self._kill()
        last = list(self.listen(START_SECONDS_MAX))
        assert self._pipe is not None and self._child is not None
        self._pipe.close()
        self._child.close()
        self._child = None
        self.unmount()
        self.mount()
        return last, cut_ns

    def close(self) -> None:
        if self._child is not None:
            self._kill()
        self.unmount()

    def _kill(self) -> None:
        assert self._child is not None
        self._child.kill()
        self._child.join()

    def _shut_down(self) -> int:
        """Returns the instant before."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            cut_ns = monotonic_ns()
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSH))
            return cut_ns
        finally:
            os.close(descriptor)


def _system(name: str, *arguments: Any) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        raise Impossible(f"{name}{arguments}: {os.strerror(ctypes.get_errno())}")


def _attach(image: str) -> tuple[int, str]:
    """
    A loop device for a file, that is free again as soon as nobody has it open or mounted.

    Not by mount(8): of two runs at once one was seen to mount what the other had shut down. Here the device is
    held open from before it is given the file until after it is unmounted, so that nobody else can be given it.
    """
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Impossible(f"/dev/loop-control: {error.strerror}") from error
    file = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(LOOP_ATTEMPTS_MAX):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # struct loop_config: fd, block size, struct loop_info64 (its flags at 52), 8 reserved numbers.
                info = struct.pack("52xI176x", _LO_FLAGS_AUTOCLEAR)
                fcntl.ioctl(device, _LOOP_CONFIGURE, struct.pack("II232s64x", file, 0, info))
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
                # Somebody else took it between the two calls.
    except OSError as error:
        raise Impossible(f"no loop device: {error.strerror}") from error
    finally:
        os.close(file)
        os.close(control)
    raise Impossible("no loop device stays free long enough to take it")


# -- what must be there --------------------------------------------------------------------------------------------


class _Cutting:
    """Cuts, and compares what is left with the memory storage that was told the same."""

    def __init__(self, power: _Machine, chance: random.Random) -> None:
        self._power = power
        self._chance = chance
        self.cuts = self.acknowledged = self.in_progress = self.torn = self.while_recovering = self.late = 0
        self.violations: list[str] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._power.format()
        self._model = MemoryStorage(node_id="a", cluster_name="powercuts", new_disk_id=b"0123456789abcdef")
        self._model.open()

    def strike(self) -> None:
        """One life of the child, its end, and what is there afterwards."""
        power, chance = self._power, self._chance
        power.start()
        said: list[Said] = []
        if chance.random() < 0.2:
            said += power.listen(chance.uniform(0, 0.004))
        else:
            said += _until_opened(power)
            said += power.listen(chance.uniform(0, LIFE_SECONDS_MAX))
        last, cut_ns = power.cut()
        said += last
        self.cuts += 1
        self.while_recovering += "opened" not in said
        uncertain: list[Call] = []
        for message in said:
            if isinstance(message, int):
                # A shutdown takes milliseconds, and an fdatasync that returns in the midst of one may say "done"
                # of what is lost. Measured on ext4 with a bare loop of pwrite and fdatasync, 500 cuts: of 45
                # that returned after the shutdown had begun 31 had lost their data, of those before it none.
                # In a real power failure there is nobody left to hear such an answer.
                if message < cut_ns:
                    (call,) = uncertain
                    call.do(self._model)
                    uncertain = []
                    self.acknowledged += 1
                else:
                    self.late += 1
            elif not isinstance(message, str):
                uncertain.append(message)
        self.in_progress += bool(uncertain)
        found = self._look(uncertain)
        if found:
            self.violations.append(f"cut {self.cuts}: {found}")
            self._begin_anew()

    def _look(self, uncertain: list[Call]) -> str:
        """Open what is left; what is wrong with it, or nothing. What was uncertain is there up to some call."""
        storage = _storage(PosixFileSystem(), self._power.directory)
        try:
            recovered = storage.open()
            self.torn += any("torn" in note for note in recovered.notes)
            found = _state(storage, recovered)
        except CoordError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            storage.close()
        certain = state = self._certain()
        for call in uncertain:
            if found == state:
                break
            call.do(self._model)
            state = self._certain()
        return "" if found == state else _difference(found, certain)

    def _certain(self) -> dict[int, tuple[RecoveredGroup, bytes]]:
        self._model.close()
        return _state(self._model, self._model.open())


def _until_opened(power: _Machine) -> list[Said]:
    said: list[Said] = []
    for message in power.listen(START_SECONDS_MAX):
        said.append(message)
        if message == "opened":
            return said
    raise RuntimeError("the child did not open its log")


def _state(storage: LogStorage, recovered: Recovered) -> dict[int, tuple[RecoveredGroup, bytes]]:
    """All that a storage holds, and the payload of the newest snapshots."""
    state = {}
    for number, group in recovered.groups.items():
        payload = b""
        reader = storage.open_snapshot(number)
        if reader is not None:
            payload = reader.read(0, reader.size)
            reader.close()
        if (group, payload) != (RecoveredGroup(HardState(0, ""), None, []), b""):
            state[number] = (group, payload)
    return state


def _difference(
    found: dict[int, tuple[RecoveredGroup, bytes]], certain: dict[int, tuple[RecoveredGroup, bytes]]
) -> str:
    nothing = (RecoveredGroup(HardState(0, ""), None, []), b"")
    told = []
    for number in range(GROUPS):
        (there, payload), (due, payload_due) = found.get(number, nothing), certain.get(number, nothing)
        if there.hard_state != due.hard_state:
            told.append(f"group {number}: {there.hard_state}, acknowledged {due.hard_state}")
        if there.snapshot != due.snapshot or payload != payload_due:
            told.append(f"group {number}: snapshot {there.snapshot}, acknowledged {due.snapshot}")
        if there.entries != due.entries:
            same = 0
            for one, other in zip(there.entries, due.entries, strict=False):
                if one != other:
                    break
                same += 1
            told.append(
                f"group {number}: {len(there.entries)} entries, acknowledged {len(due.entries)}, equal up to the {same}th"
            )
    return "; ".join(told)


# -- the command ---------------------------------------------------------------------------------------------------


@contextmanager
def _own_mounts() -> Iterator[None]:
    """From here on this process and its children have mounts that nobody else sees, and that end with them."""
    if os.geteuid() != 0:
        raise Impossible("it takes root to mount file systems")
    if not sys.platform.startswith("linux"):
        raise Impossible("it takes Linux")
    if not os.path.exists("/dev/loop-control"):
        raise Impossible("there are no loop devices")
    _system("unshare", _NEW_MOUNTS)
    _system("mount", b"none", b"/", None, _MS_PRIVATE_RECURSIVE, None)
    # What others have mounted by loop would stay mounted here when they unmount it, and their image in use.
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        others = [line.split()[1] for line in mounts if line.startswith("/dev/loop")]
    for path in others:
        _system("umount2", path.replace("\\040", " ").encode(), _MNT_DETACH)
    yield


def _cut_often(cuts: int, seed: int, sabotage: str, parent: str, progress: Callable[[str], None]) -> _Cutting:
    chance = random.Random(seed)
    began = monotonic()
    with tempfile.TemporaryDirectory(prefix="coordlib-powercuts-", dir=parent) as scratch:
        power = _Machine(scratch, chance, sabotage)
        try:
            cutting = _Cutting(power, chance)
            for number in range(1, cuts + 1):
                cutting.strike()
                if number % 100 == 0:
                    progress(
                        f"{monotonic() - began:6.0f} s  {number} cuts, {cutting.acknowledged} acknowledged calls, "
                        f"{len(cutting.violations)} violations"
                    )
        finally:
            power.close()
    return cutting


def main(arguments: Sequence[str] | None = None) -> int:
    """Cut, look, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.powercuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is written and when it is cut; 0: a new one"
    )
    parser.add_argument(
        "--sabotage", choices=["no-fsync"], default="", help="sync nothing: acknowledged writes must be lost"
    )
    parser.add_argument("--dir", default="/var/tmp", help="where the image is put")
    options = parser.parse_args(arguments)
    if options.cuts < 1:
        parser.error("--cuts must be at least 1")
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"seed {seed}", flush=True)
    began = monotonic()
    lost_by_control = control_cuts = 0
    try:
        with _own_mounts():
            if not options.sabotage:
                control_cuts = max(CONTROL_CUTS_MIN, options.cuts // 50)
                control = _cut_often(control_cuts, seed, "no-fsync", options.dir, _say)
                lost_by_control = len(control.violations)
                _say(
                    f"control: without fsync {lost_by_control} of {control_cuts} cuts lost acknowledged writes"
                )
            cutting = _cut_often(options.cuts, seed, options.sabotage, options.dir, _say)
    except Impossible as error:
        print(f"powercuts: cannot be done here: {error}", file=sys.stderr)
        return EXIT_IMPOSSIBLE
    for violation in cutting.violations[:20]:
        print(f"VIOLATION: {violation}")
    is_blunt = not options.sabotage and not lost_by_control
    if is_blunt:
        print("VIOLATION: the control lost nothing, so the power was not really cut")
    print(
        f"{cutting.cuts} power cuts ({cutting.while_recovering} of them before the log was open, "
        f"{cutting.in_progress} within a call): {cutting.acknowledged} acknowledged calls, "
        f"{cutting.torn} torn tails, {len(cutting.violations)} violations"
    )
    result = {
        "cuts": cutting.cuts,
        "acknowledged": cutting.acknowledged,
        "within_a_call": cutting.in_progress,
        "before_open": cutting.while_recovering,
        "torn_tails": cutting.torn,
        "said_too_late": cutting.late,
        "violations": len(cutting.violations),
        "sabotage": options.sabotage,
        "control_cuts": control_cuts,
        "control_violations": lost_by_control,
        "seed": seed,
        "seconds": round(monotonic() - began, 1),
    }
    print(json.dumps({"machine": machine(), "powercuts": result}), flush=True)
    return 1 if cutting.violations or is_blunt else 0


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
