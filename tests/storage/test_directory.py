"""The directory on a real file system: whose it is, who may open it, and what a failed write does to it."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coordlib.errors import ForkedError, StartError, StorageFailed, StorageFull
from coordlib.raft.messages import HardState
from coordlib.storage import DiskIdentity, Persist, PosixFileSystem, SegmentStorage, files
from coordlib.storage.files import File
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.suites.storage import make_entries, make_meta, write_snapshot
from tests.storage.model import make_storage


def make(
    directory: Path, *, node_id: str = "a", cluster_name: str = "shop", disk_id: bytes = b"d" * 16
) -> SegmentStorage:
    return SegmentStorage(
        PosixFileSystem(), str(directory), node_id=node_id, cluster_name=cluster_name, new_disk_id=disk_id
    )


def test_files_and_directories_belong_to_the_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "data"
    storage = make(directory)
    storage.open()
    storage.write([Persist(0, None, make_entries(1, 3))])
    write_snapshot(storage, 0, make_meta(2))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    storage.close()
    assert {"lock", "identity", "0000000000000001.log", "00000000-0000000000000002.snap"} == modes.keys()
    assert {0o600} == set(modes.values())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700


def test_another_nodes_directory_is_refused_and_unchanged(tmp_path: Path) -> None:
    make_closed(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(StartError, match=r"belongs to node 'a', not to 'b'.*data_dir"):
        make(tmp_path, node_id="b").open()
    with pytest.raises(StartError, match=r"belongs to cluster 'shop', not to 'bank'.*data_dir"):
        make(tmp_path, cluster_name="bank").open()
    assert before == contents(tmp_path)
    storage = make(tmp_path)
    assert not storage.open().is_new
    storage.close()


def make_closed(directory: Path) -> None:
    storage = make(directory)
    storage.open()
    storage.write([Persist(0, HardState(1, "a"), make_entries(1, 3))])
    storage.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


def test_a_wiped_directory_is_a_new_disk(tmp_path: Path) -> None:
    make_closed(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    storage = make(tmp_path / "data", disk_id=b"e" * 16)
    recovered = storage.open()
    storage.close()
    assert recovered.is_new
    assert recovered.identity == DiskIdentity(1, "a", b"e" * 16, "shop", b"", ())
    assert recovered.groups == {}


def test_a_directory_keeps_its_disk_id_whatever_new_one_is_offered(tmp_path: Path) -> None:
    make_closed(tmp_path)
    storage = make(tmp_path, disk_id=b"e" * 16)
    assert storage.open().identity.disk_id == b"d" * 16
    storage.close()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.log").write_text("mine")
    make_closed(tmp_path)
    storage = make(tmp_path)
    storage.open()
    storage.close()
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "other.log").read_text() == "mine"


@pytest.mark.parametrize("what", ["file", "below a file"])
def test_a_path_that_cannot_be_a_directory_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(StartError, match="must be a directory"):
        make(tmp_path / "x" if what == "file" else tmp_path / "x" / "y").open()


def test_a_directory_that_cannot_be_written_to_is_refused() -> None:
    fs = SimulatedFileSystem()
    fs.fail("lock", error=errno.EACCES)
    with pytest.raises(StartError, match=r"Permission denied.*write to"):
        make_storage(fs).open()
    make_storage(fs).open()


def test_a_second_storage_in_this_process_is_refused(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.open()
    with pytest.raises(StartError, match="this process has it open already"):
        make(tmp_path).open()
    first.write([Persist(0, None, make_entries(1, 1))])
    first.close()
    second = make(tmp_path)
    second.open()
    second.close()


HOLD = """
import sys, os
from coordlib.storage import *
storage = SegmentStorage(PosixFileSystem(), sys.argv[1], node_id="a", cluster_name="shop", new_disk_id=b"d" * 16)
storage.open()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def hold_in_another_process(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process


def test_a_directory_open_in_another_process_is_refused_naming_it_until_that_dies(tmp_path: Path) -> None:
    with hold_in_another_process(tmp_path) as process:
        with pytest.raises(StartError, match=f"locked by process {process.pid}"):
            make(tmp_path).open()
        process.kill()
    storage = make(tmp_path)
    storage.open()
    storage.close()


def in_child(action: Callable[[], None]) -> int:
    """Run in a forked child and return its exit code: 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_lets_go_without_unlocking_the_parent(tmp_path: Path) -> None:
    storage = make(tmp_path)
    storage.open()
    reader_fd_count = len(os.listdir("/proc/self/fd"))

    def child() -> None:
        storage.after_fork_in_child()
        assert len(os.listdir("/proc/self/fd")) == reader_fd_count - 2
        for action in (storage.open, lambda: storage.write([]), lambda: storage.open_snapshot(0)):
            with pytest.raises(ForkedError):
                action()
        storage.close()
        with pytest.raises(StartError, match="locked by process"):
            make(tmp_path).open()

    assert in_child(child) == 0
    with pytest.raises(StartError):
        make(tmp_path).open()
    storage.write([Persist(0, None, make_entries(1, 1))])
    storage.close()
    storage = make(tmp_path)
    assert make_entries(1, 1) == storage.open().groups[0].entries
    storage.close()


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_forked_child_keeps_the_lock_of_a_dead_parent_only_if_it_did_not_let_go(
    tmp_path: Path, lets_go: bool
) -> None:
    """flock is shared with children; the message names the case."""
    ready_read, ready_write = os.pipe()
    end_read, end_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        storage = make(tmp_path)
        storage.open()
        if os.fork() == 0:
            if lets_go:
                storage.after_fork_in_child()
            os.close(end_write)
            os.write(ready_write, b"x")
            os.read(end_read, 1)  # until the test closes its end
            os._exit(0)
        os.close(ready_write)
        signal.pause()
        os._exit(1)
    try:
        assert os.read(ready_read, 1) == b"x"
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if lets_go:
            storage = make(tmp_path)
            storage.open()
            storage.close()
        else:
            with pytest.raises(StartError, match=f"process {pid}, which took it, is gone"):
                make(tmp_path).open()
    finally:
        for fd in (end_write, end_read, ready_read, ready_write):
            os.close(fd)


class _FaultyFile:
    """A real file of which one kind of call fails, as often as it is told to."""

    def __init__(self, fs: FaultyFileSystem, file: File) -> None:
        self._fs = fs
        self._file = file
        self.pread = file.pread
        self.truncate = file.truncate
        self.size = file.size
        self.close = file.close

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        self._fs.check("pwrite")
        self._file.pwrite(data, offset)

    def datasync(self) -> None:
        self._fs.check("datasync")
        self._file.datasync()


class FaultyFileSystem(PosixFileSystem):
    failing = ""
    error = errno.EIO
    calls = 0

    def check(self, operation: str) -> None:
        self.calls += 1
        if operation == self.failing:
            self.failing = ""
            raise OSError(self.error, os.strerror(self.error))

    def open(self, path: str, *, create: bool = False) -> File:
        return _FaultyFile(self, super().open(path, create=create))


@pytest.mark.parametrize("operation", ["pwrite", "datasync"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_after_a_failed_write_this_process_never_opens_the_directory_again(
    tmp_path: Path, operation: str, error: int
) -> None:
    """The fault is over at once; that a later fsync would succeed means nothing. Closing and gc write nothing."""
    _fail_and_close(tmp_path, operation, error)
    gc.collect()
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(StartError, match="restart the process"):
            make(path).open()

    def next_process() -> None:
        files._condemned.clear()
        recovered = make(tmp_path).open()
        assert make_entries(1, 2) == recovered.groups[0].entries[:2]

    assert in_child(next_process) == 0


def _fail_and_close(tmp_path: Path, operation: str, error: int) -> None:
    fs = FaultyFileSystem()
    storage = SegmentStorage(fs, str(tmp_path), node_id="a", cluster_name="shop", new_disk_id=b"d" * 16)
    storage.open()
    storage.write([Persist(0, None, make_entries(1, 2))])
    snapshot = storage.create_snapshot(0, make_meta(1))
    snapshot.write(b"x")
    fs.failing, fs.error = operation, error
    with pytest.raises(StorageFailed if error == errno.EIO else StorageFull, match="restart") as first:
        storage.write([Persist(0, None, make_entries(3, 3))])
    calls = fs.calls
    again: list[Callable[[], object]] = [
        lambda: storage.write([Persist(0, None, make_entries(3, 3))]),
        lambda: storage.write([]),
        lambda: storage.set_identity(DiskIdentity(1, "a", b"d" * 16, "shop", b"u", ())),
        lambda: storage.create_snapshot(0, make_meta(1)),
        lambda: storage.open_snapshot(0),
        lambda: storage.compact(0, 0),
        lambda: snapshot.write(b"y"),
        snapshot.finish,
    ]
    for action in again:
        with pytest.raises(type(first.value)) as later:
            action()
        assert later.value.message == first.value.message
    snapshot.abort()
    storage.close()
    assert calls == fs.calls
    with pytest.raises(StorageFailed):
        storage.open()


def test_after_an_interrupted_write_the_storage_is_used_no_more_but_can_be_opened_anew() -> None:
    """An exception out of nowhere (a signal, say) may leave half a batch: nothing is written over it."""
    fs = SimulatedFileSystem()
    storage = make_storage(fs)
    storage.open()
    storage.write([Persist(0, None, make_entries(1, 1))])
    fs.crash_at = fs.effects + 1
    with pytest.raises(CrashNow):
        storage.write([Persist(0, None, make_entries(2, 2))])
    fs.crash_at = None
    with pytest.raises(StorageFailed, match="interrupted"):
        storage.write([Persist(0, None, make_entries(2, 2, 2))])
    storage.close()
    assert make_entries(1, 2) == make_storage(fs).open().groups[0].entries


def test_a_full_disk_is_found_out_before_anything_is_promised() -> None:
    fs = SimulatedFileSystem(capacity=9000)
    storage = make_storage(fs, segment_size_bytes=1 << 20)
    storage.open()
    acknowledged = 0
    with pytest.raises(StorageFull, match="free space"):
        for index in range(1, 100):
            storage.write([Persist(0, None, make_entries(index, index, 1, 200))])
            acknowledged = index
    assert acknowledged >= 10
    storage.close()
    fs.kill()
    fs.capacity = None
    assert acknowledged <= len(make_storage(fs).open().groups[0].entries) <= acknowledged + 1


def test_a_full_disk_while_a_snapshot_is_written_is_final_too() -> None:
    fs = SimulatedFileSystem(capacity=60_000)
    storage = make_storage(fs)
    storage.open()
    storage.write([Persist(0, None, make_entries(1, 3))])
    writer = storage.create_snapshot(0, make_meta(2))
    with pytest.raises(StorageFull):
        writer.write(bytes(100_000))
    with pytest.raises(StorageFull):
        storage.write([Persist(0, None, make_entries(4, 4))])
    storage.close()
    fs.kill()
    assert make_entries(1, 3) == make_storage(fs).open().groups[0].entries
    assert not [path for path in fs.paths() if path.endswith(".tmp")]


def test_a_batch_is_one_write_and_one_sync_whatever_it_holds() -> None:
    fs = SimulatedFileSystem()
    storage = make_storage(fs, segment_size_bytes=1 << 24, fill_size_bytes=1 << 20)
    storage.open()
    storage.write([Persist(0, None, make_entries(1, 1))])
    before = fs.counts.copy()
    storage.write(
        [Persist(group, HardState(3, "a"), make_entries(2 - min(group, 1), 50)) for group in range(5)]
    )
    assert fs.counts - before == {"pwrite": 1, "datasync": 1}


def test_a_batch_larger_than_a_segment_gets_one_of_its_own() -> None:
    fs = SimulatedFileSystem()
    storage = make_storage(fs, segment_size_bytes=8192)
    storage.open()
    for index in range(1, 5):
        storage.write([Persist(0, None, make_entries(index, index, 1, 20_000 if index % 2 else 100))])
    fs.crash_with(lambda change: [], lambda: False)
    assert [len(entry.data) for entry in make_storage(fs).open().groups[0].entries] == [
        20_000,
        100,
        20_000,
        100,
    ]


def test_descriptors_are_few_and_all_returned(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    storage = SegmentStorage(
        PosixFileSystem(),
        str(tmp_path),
        node_id="a",
        cluster_name="shop",
        new_disk_id=b"d" * 16,
        segment_size_bytes=1,
    )
    storage.open()
    for index in range(1, 20):
        storage.write([Persist(0, None, make_entries(index, index, 1, 2000))])
    assert len(os.listdir("/proc/self/fd")) == before + 2
    writer = storage.create_snapshot(0, make_meta(5))
    writer.write(b"x" * 70_000)
    storage.close()
    writer.abort()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(StartError):
        make(tmp_path, node_id="b").open()
    assert len(os.listdir("/proc/self/fd")) == before
