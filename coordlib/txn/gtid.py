"""Names of transactions and of their branches, as bytes and as databases want them.

A gtid has 16 bytes, big-endian, so that they sort in the order in which they were minted:

======  ====  ==========================================================
offset  size  field
======  ====  ==========================================================
0       6     when it was minted: milliseconds of log time, as estimated
6       8     session of the process that began the transaction
14      2     counter
======  ====  ==========================================================

A branch has a *bqual*: what of the transaction is where. 9 bytes, 5 more if `LAST_RESOURCE` is set, and then as
many more (up to 16) as the resource needs if `EVIDENCE` is set:

======  ====  ==========================================================
offset  size  field
======  ====  ==========================================================
0       5     resource tag
5       2     node tag
7       1     number of the branch within the transaction and node
8       1     flags
9       5     resource tag of the last resource, which decides
9 or 14 1-16  evidence: by what the resource finds out how the branch ended
======  ====  ==========================================================

Disk: databases keep these names in their own logs; changing them loses what is prepared there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from typing import Final, NamedTuple

from coordlib.errors import invariant

__all__ = [
    "EVIDENCE",
    "EVIDENCE_SIZE_MAX",
    "FORMAT_ID",
    "GTID_SIZE",
    "LAST_RESOURCE",
    "BranchName",
    "GtidMinter",
    "bqual_text",
    "cluster_tag",
    "gtrid_of",
    "join_gtid",
    "mint_ms_of",
    "node_tag",
    "parse_bqual",
    "parse_gtrid",
    "parse_postgresql_gid",
    "postgresql_gid",
    "resource_tag",
    "session_of",
    "text_of",
]

FORMAT_ID: Final = 0x434F5244
"""Of the XA names: "CORD"."""

GTID_SIZE: Final = 16
TAG_SIZE: Final = 5
NODE_TAG_SIZE: Final = 2
LAST_RESOURCE: Final = 1
"""Flag of a bqual: not the log decides but the last resource, whose tag follows. Never to be resolved in the log."""

EVIDENCE: Final = 2
"""Flag of a bqual: the resource's own evidence follows, by which it can tell how a branch that is gone ended."""
EVIDENCE_SIZE_MAX: Final = 16

_COUNTER_MAX = 0xFFFF
_MINT_MAX = (1 << 48) - 1
_TAIL = struct.Struct(">QH")


def join_gtid(mint_ms: int, session: int, counter: int) -> bytes:
    return mint_ms.to_bytes(6, "big") + _TAIL.pack(session, counter)


def mint_ms_of(gtid: bytes) -> int:
    """When it was minted, by the estimate of log time of whoever began it."""
    return int.from_bytes(gtid[:6], "big")


def session_of(gtid: bytes) -> int:
    """The session of the process that began the transaction."""
    return int.from_bytes(gtid[6:14], "big")


def text_of(gtid: bytes) -> str:
    """As people, logs and the command line write it: 32 hexadecimal digits."""
    return gtid.hex()


class GtidMinter:
    """Mints gtids, each later than the one before. Not thread-safe."""

    __slots__ = ("_counter", "_mint_ms")

    def __init__(self) -> None:
        self._mint_ms = 0
        self._counter = 0

    def mint(self, log_time_ms: int, session: int) -> bytes:
        """A gtid that this minter has never given for this session, whatever the estimate of log time does."""
        if log_time_ms > self._mint_ms:
            self._mint_ms, self._counter = log_time_ms, 0
        elif self._counter < _COUNTER_MAX:
            self._counter += 1
        else:
            self._mint_ms, self._counter = self._mint_ms + 1, 0
        invariant(self._mint_ms <= _MINT_MAX, "log time %d has more than 48 bits", self._mint_ms)
        return join_gtid(self._mint_ms, session, self._counter)


def _tag(kind: str, name: str, size: int) -> bytes:
    return hashlib.sha256(f"coordlib {kind}\0{name}".encode()).digest()[:size]


def cluster_tag(uuid: bytes) -> bytes:
    """5 bytes of a cluster's identity, that tell its branches from others' in a database that both use."""
    return hashlib.sha256(b"coordlib cluster\0" + uuid).digest()[:TAG_SIZE]


def resource_tag(name: str) -> bytes:
    """5 bytes for a resource's name."""
    return _tag("resource", name, TAG_SIZE)


def node_tag(name: str) -> bytes:
    """2 bytes for a node's name: only to tell branches of one transaction apart."""
    return _tag("node", name, NODE_TAG_SIZE)


class BranchName(NamedTuple):
    """A bqual's fields."""

    resource_tag: bytes
    node_tag: bytes
    number: int
    decider_tag: bytes = b""  # of the last resource, where that decides; else empty
    evidence: bytes = b""  # the resource's own; only once it has prepared

    @property
    def flags(self) -> int:
        return (LAST_RESOURCE if self.decider_tag else 0) | (EVIDENCE if self.evidence else 0)

    def pack(self) -> bytes:
        head = self.resource_tag + self.node_tag + bytes((self.number, self.flags))
        return head + self.decider_tag + self.evidence

    @classmethod
    def unpack(cls, bqual: bytes) -> BranchName | None:
        """The fields; None if it is no bqual of ours."""
        if len(bqual) < 9 or bqual[8] & ~(LAST_RESOURCE | EVIDENCE):
            return None
        end = 9 + TAG_SIZE * (bqual[8] & LAST_RESOURCE)
        name = cls(bqual[:5], bqual[5:7], bqual[7], bqual[9:end], bqual[end:])
        if len(name.evidence) > EVIDENCE_SIZE_MAX or len(bqual) < end or name.flags != bqual[8]:
            return None
        return name


def _text(data: bytes) -> str:
    return base64.b32hexencode(data).decode().rstrip("=")


def _data(text: str) -> bytes | None:
    try:
        data = base64.b32hexdecode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        return None
    return data if _text(data) == text else None  # not canonical: not ours


def gtrid_of(cluster: bytes, gtid: bytes) -> str:
    """XA's global transaction id: 34 characters of [0-9A-V]; `cluster` is a `cluster_tag`."""
    return _text(cluster + gtid)


def bqual_text(bqual: bytes) -> str:
    """XA's branch qualifier: 15 to 48 characters of [0-9A-V]."""
    return _text(bqual)


def parse_gtrid(cluster: bytes, text: str) -> bytes | None:
    """The gtid of a global transaction id of this cluster; None: not of ours."""
    data = _data(text)
    if data is None or len(data) != TAG_SIZE + GTID_SIZE or data[:TAG_SIZE] != cluster:
        return None
    return data[TAG_SIZE:]


def parse_bqual(text: str) -> bytes | None:
    """The bqual of a branch qualifier; None: not of ours."""
    data = _data(text)
    return data if data is not None and BranchName.unpack(data) is not None else None


def postgresql_gid(cluster: bytes, gtid: bytes, bqual: bytes) -> str:
    """The name of a prepared transaction, as psycopg's Xid and pgjdbc make it; below 200 bytes."""
    gtrid = base64.b64encode(gtrid_of(cluster, gtid).encode()).decode()
    return f"{FORMAT_ID}_{gtrid}_{base64.b64encode(bqual_text(bqual).encode()).decode()}"


def parse_postgresql_gid(cluster: bytes, gid: str) -> tuple[bytes, bytes] | None:
    """(gtid, bqual) of a prepared transaction's name; None: not of ours."""
    parts = gid.split("_")
    if len(parts) != 3 or parts[0] != str(FORMAT_ID):
        return None
    try:
        gtrid, text = (base64.b64decode(part, validate=True).decode("ascii") for part in parts[1:])
    except (binascii.Error, ValueError):
        return None
    gtid, bqual = parse_gtrid(cluster, gtrid), parse_bqual(text)
    if gtid is None or bqual is None or postgresql_gid(cluster, gtid, bqual) != gid:
        return None
    return gtid, bqual
