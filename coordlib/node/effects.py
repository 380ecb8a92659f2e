"""What a kernel wants done, as data. The driver (or the simulator) does it; the kernel only decides."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from coordlib.node.service import Source
from coordlib.node.session import Call, SessionState, SessionView
from coordlib.raft.messages import SnapshotMeta
from coordlib.storage.base import DiskIdentity, Persist

__all__ = [
    "AbortSnapshot",
    "BeginSnapshot",
    "CompactLog",
    "DiskEffect",
    "Effects",
    "EndTransfer",
    "FinishSnapshot",
    "InboundCall",
    "LogEvent",
    "SendChunk",
    "WriteSnapshot",
]

OWN = "own"
RECEIVED = "received"


class BeginSnapshot(NamedTuple):
    origin: str  # OWN or RECEIVED: two may be written at once
    meta: SnapshotMeta


class WriteSnapshot(NamedTuple):
    origin: str
    data: bytes


class FinishSnapshot(NamedTuple):
    """Make it durable, then tell the kernel by `snapshot_stored(origin, meta)`."""

    origin: str
    meta: SnapshotMeta


class AbortSnapshot(NamedTuple):
    origin: str


class SendChunk(NamedTuple):
    """Read a piece of the newest snapshot (or of the one this transfer began with) and send it on the bulk lane."""

    peer: str
    term: int
    offset: int
    size: int


class EndTransfer(NamedTuple):
    """The snapshot that was being sent to this peer is not needed for it any more."""

    peer: str


class CompactLog(NamedTuple):
    """A snapshot covers everything up to and including `up_to`."""

    up_to: int


DiskEffect: TypeAlias = (
    BeginSnapshot | WriteSnapshot | FinishSnapshot | AbortSnapshot | SendChunk | EndTransfer | CompactLog
)


class LogEvent(NamedTuple):
    """A structured log line: `name` is stable, `message` is for people, `fields` for machines."""

    level: int  # as in `logging`
    name: str
    message: str
    fields: dict[str, Any]


class InboundCall(NamedTuple):
    """
    A call for this process's application, to be answered once by its `number`.

    `deadline_ms` is on this node's clock: after it nobody waits for the answer, and it is dropped.
    """

    number: int  # of this process
    source: Source  # whence it came: a member, a client's route, or "" for this very process
    call_id: int  # of that source
    caller: int  # session of the calling application; 0: it had none when it called
    budget_ms: int
    deadline_ms: int
    body: bytes


class Effects:
    """
    One batch of effects.

    Order: `sends` and `client_sends` may leave at once (what had to wait for the disk has waited already);
    then `identity` is made durable, followed by `kernel.identity_stored()`, and after it `persist`, followed by
    `kernel.persisted()`; `disk` and the rest may be done at any time after.
    """

    __slots__ = (
        *("calls", "changes", "client_sends", "completed", "disk", "events", "identity", "persist", "sends"),
    )

    def __init__(self) -> None:
        self.sends: dict[str, list[tuple[int, Any]]] = {}
        self.client_sends: dict[bytes, list[tuple[int, Any]]] = {}
        self.identity: DiskIdentity | None = None
        self.persist: list[Persist] | None = None
        self.disk: list[DiskEffect] = []
        self.completed: list[Call] = []
        self.changes: list[tuple[SessionView, SessionState]] = []
        self.events: list[LogEvent] = []
        self.calls: list[InboundCall] | None = None  # for this process's application
