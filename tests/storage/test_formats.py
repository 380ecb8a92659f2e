"""Directories that earlier versions wrote stay readable. `python -m tests.storage.test_formats` makes a new one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordlib.raft.messages import Configuration, Entry, EntryKind, HardState, SnapshotMeta
from coordlib.storage import DiskIdentity, Persist, PosixFileSystem, Recovered, RecoveredGroup, SegmentStorage
from coordlib.storage.base import FORMAT_VERSION
from coordlib.storage.records import seal_batch, segment_header
from coordlib.testing.disk import SimulatedFileSystem

FIXTURES = Path(__file__).parent / "fixtures"

META = SnapshotMeta(4, 2, Configuration(("a", "b", "c"), ("d",), ("a", "b")))
IDENTITY = DiskIdentity(1, "a", bytes(range(16)), "shop", b"u" * 16, (("a", bytes(range(16))), ("b", b"")))
ENTRIES = [
    Entry(1, 1, EntryKind.NOOP, b""),
    Entry(1, 2, EntryKind.COMMAND, b"\x00\xff" * 10),
    Entry(2, 3, EntryKind.NOOP, b""),
    Entry(2, 4, EntryKind.CONFIGURATION, b"conf"),
    Entry(2, 5, EntryKind.COMMAND, b"five" * 200),
]
EXPECTED = {
    0: RecoveredGroup(HardState(3, "b"), META, [*ENTRIES[4:], Entry(3, 6, EntryKind.NOOP, b"")]),
    7: RecoveredGroup(HardState(9, ""), None, [Entry(9, 1, EntryKind.COMMAND, b"seven")]),
    8: RecoveredGroup(HardState(0, ""), META, []),
}
PAYLOAD = b"the state of group 0"


def write_directory(directory: str) -> None:
    storage = make(directory)
    identity = storage.open().identity
    storage.set_identity(identity._replace(cluster_uuid=IDENTITY.cluster_uuid, disks=IDENTITY.disks))
    storage.write([Persist(0, HardState(1, "a"), ENTRIES[:2]), Persist(7, HardState(9, ""), [])])
    storage.write([Persist(0, None, [Entry(1, 3, EntryKind.COMMAND, b"superseded")])])
    storage.write([Persist(0, HardState(2, ""), ENTRIES[2:])])
    for group in (0, 8):
        writer = storage.create_snapshot(group, META)
        writer.write(PAYLOAD)
        writer.finish()
    storage.write([Persist(8, None, [], META), Persist(7, None, [Entry(9, 1, EntryKind.COMMAND, b"seven")])])
    storage.write([Persist(0, HardState(3, "b"), [Entry(3, 6, EntryKind.NOOP, b"")])])
    storage.close()


def make(directory: str) -> SegmentStorage:
    return SegmentStorage(
        PosixFileSystem(),
        directory,
        node_id="a",
        cluster_name="shop",
        new_disk_id=bytes(range(16)),
        segment_size_bytes=5120,
        fill_size_bytes=256,
    )


def read(directory: Path) -> Recovered:
    storage = make(str(directory))
    recovered = storage.open()
    reader = storage.open_snapshot(0)
    assert reader is not None
    assert (reader.meta, reader.read(0, reader.size)) == (META, PAYLOAD)
    storage.close()
    return recovered


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_directory_of_every_format_is_read(version: int, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / f"format-{version}", tmp_path / "data")
    assert Recovered(IDENTITY, EXPECTED, False, []) == read(tmp_path / "data")


def test_this_version_writes_the_very_bytes_of_its_format(tmp_path: Path) -> None:
    """A change of any byte is a change of the format: it takes a new version and a new fixture."""
    write_directory(str(tmp_path / "data"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.name != "lock"}
    fixture = {path.name: path.read_bytes() for path in (FIXTURES / f"format-{FORMAT_VERSION}").iterdir()}
    assert fixture == written
    assert len([name for name in fixture if name.endswith(".log")]) >= 2


def test_the_layout_of_headers_is_what_the_document_says() -> None:
    header = segment_header(bytes(range(16)), 7)
    assert (
        b"coordlog" + b"\1\0\0\0" + b"\0\x10\0\0" + bytes(range(16)) + b"\7" + bytes(7) == header[:40]
        and len(header) == 4096
    )
    data, checksum = seal_batch([bytes(32), b"0123456789"], 5, 0xAABBCCDD, 0x01020304)
    assert b"\xc5BAT" + b"\x10\0\0\0" + b"\5" + bytes(7) + b"\xdd\xcc\xbb\xaa" == data[:20]
    assert checksum.to_bytes(4, "little") + bytes(4) + b"0123456789" + bytes(6) == data[24:]


def test_an_old_directory_is_read_from_the_simulated_disk_too() -> None:
    files = {f"/data/{path.name}": path.read_bytes() for path in (FIXTURES / "format-1").iterdir()}
    storage = SegmentStorage(
        SimulatedFileSystem.load(files), "/data", node_id="a", cluster_name="shop", new_disk_id=bytes(16)
    )
    assert Recovered(IDENTITY, EXPECTED, False, []) == storage.open()


if __name__ == "__main__":
    target = FIXTURES / f"format-{FORMAT_VERSION}"
    write_directory(str(target))
    (target / "lock").unlink()
