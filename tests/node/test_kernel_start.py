"""What a member makes of what its disk holds, before it says a word to anybody."""

from __future__ import annotations

import pytest

from coordlib.config import Timing
from coordlib.errors import StorageCorrupt
from coordlib.node.kernel import MemberKernel
from coordlib.raft.messages import Configuration, HardState, SnapshotMeta
from coordlib.storage.base import FORMAT_VERSION, DiskIdentity, RecoveredGroup

MEMBERS = {"n1": "memory://n1", "n2": "memory://n2", "n3": "memory://n3"}
IDENTITY = DiskIdentity(
    FORMAT_VERSION,
    "n1",
    b"1" * 16,
    "shop",
    b"c" * 16,
    (("n1", b"1" * 16), ("n2", b"2" * 16), ("n3", b"3" * 16)),
)


def test_a_log_that_ends_before_its_snapshot_is_damage_and_not_a_bug() -> None:
    """Bytes that went bad at the end of a log look like a torn write; a later snapshot says what was there.

    Found by seed 149 with `bit_rot`: the member stopped, rightly, but called it a bug in itself.
    """
    snapshot = SnapshotMeta(40, 6, Configuration(tuple(MEMBERS)))
    with pytest.raises(StorageCorrupt, match="log ends in term 4, before the snapshot at 40 of term 6"):
        MemberKernel(
            node_id="n1",
            members=MEMBERS,
            timing=Timing(),
            identity=IDENTITY,
            recovered=RecoveredGroup(HardState(4, "n2"), snapshot, []),
            snapshot=(),
            random_bytes=bytes,
            random_ticks=lambda low, high: low,
            now=0,
        )
