"""What nodes and clients say to each other besides Raft's own messages. Data only.

Every message is a NamedTuple; `wire/schema.py` derives its strict decoder from the annotations.
The sender, its role and its incarnation are known from the authenticated channel.

Wire: the order and meaning of fields is part of the wire format; see docs/formats.md.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, TypeAlias

from coordlib.raft.messages import SnapshotMeta

__all__ = [
    "Announce",
    "CallStatus",
    "ClientMessage",
    "Form",
    "LeaderInfo",
    "MemberStatus",
    "NodeMessage",
    "Refusal",
    "Replies",
    "Reply",
    "ReplyStatus",
    "Request",
    "RequestKind",
    "Requests",
    "ServiceCall",
    "ServiceReply",
    "Serving",
    "SnapshotAck",
    "SnapshotChunk",
    "StatusQuery",
    "StatusReply",
]


class RequestKind(IntEnum):
    COMMAND = 1  # body: an operation; goes through the log, once
    QUERY = 2  # body: a query; linearizable, no log entry
    STALE_QUERY = 3  # body: a query; answered by the asked node from what it has applied
    KEEP_ALIVE = 4  # body empty; answered after a quorum round begun after its arrival
    WAIT = 5  # body: a query that is answered when its condition holds (lock granted or gone)
    CALL = 6  # body: an application's, for another one. Never in a Request: it travels as ServiceCall


class ReplyStatus(IntEnum):
    OK = 0  # body: the machine's reply
    NOT_LEADER = 1  # body: leader's node id in UTF-8, may be empty; the request was not appended
    ERROR = 2  # body: CBOR [code, message, details]; definite
    UNKNOWN = 3  # the leader lost its office with the request in its log; ask again with the same sequence


class CallStatus(IntEnum):
    OK = 0  # body: the called application's answer
    ERROR = 1  # body: CBOR [code, message, details]; definite: the application has not acted on the call
    UNREACHABLE = 2  # the call was not delivered and will not be
    UNKNOWN = 3  # the way broke before the answer came: the call may have been delivered


class Request(NamedTuple):
    """One request of a session. COMMANDs are identified by (session, sequence)."""

    request_id: int  # of this sender, to match the reply; never reused within an incarnation
    kind: int
    session: int  # 0: none yet (opening one)
    sequence: int  # 0 for all but COMMAND
    acknowledged: int  # every sequence below this one has been answered to the session
    body: bytes


class Requests(NamedTuple):
    requests: tuple[Request, ...]


class Reply(NamedTuple):
    request_id: int
    status: int
    body: bytes


class Replies(NamedTuple):
    replies: tuple[Reply, ...]


class LeaderInfo(NamedTuple):
    """To clients: who leads, as far as the sender knows; sent on attach and on every change."""

    term: int
    leader: str  # "" = none known
    endpoints: tuple[tuple[str, str], ...]  # (node id, endpoint) of every member
    cluster_uuid: bytes  # empty: the sender belongs to no cluster yet


class Announce(NamedTuple):
    """First message on every member-to-member connection, and again when what it says changes."""

    cluster_uuid: bytes  # empty: this node's disk belongs to no cluster yet
    disk_id: bytes
    members_digest: bytes  # over the configured member list: all must be given the same
    wants_bootstrap: bool
    term: int
    last_index: int  # of the furthest end that the sender's log has had; it may have been cut back since
    last_term: int
    known_disks: tuple[tuple[str, bytes], ...]  # node id -> disk id as known here; empty = not yet seen
    remembered_term: int  # what this node remembers the *receiver's* disk to have acknowledged; 0, 0 = none
    remembered_index: int
    wants_answer: bool  # the sender has not heard from the receiver's disk yet: what was announced was lost
    backs: str  # who may form the cluster as far as the sender goes; itself: a candidate; "": not decided, or formed


class Form(NamedTuple):
    """From the forming member: be part of this cluster, if your disk is empty and named here."""

    cluster_uuid: bytes
    disks: tuple[tuple[str, bytes], ...]


class Refusal(NamedTuple):
    """Why the sender will not work with the receiver; the receiver stops and shows `message`."""

    code: str
    message: str


class MemberStatus(NamedTuple):
    """Each member to the leader, about once a second: for status, lag and log_time."""

    applied_index: int
    wall_ms: int
    late_ms: int  # the longest the node thread was kept from running since the last report


class SnapshotChunk(NamedTuple):
    """One piece of a snapshot file, on the bulk lane; consecutive offsets; at most 256 KiB of data."""

    group: int
    term: int
    meta: SnapshotMeta
    size: int  # of the whole file
    offset: int
    data: bytes


class SnapshotAck(NamedTuple):
    """Receiver's word on a transfer: the next offset it wants; `size` when complete and durable."""

    group: int
    term: int
    index: int  # type: ignore[assignment]  # of the snapshot; hides tuple.index()
    offset: int
    is_refused: bool  # not wanted (older than what it has) or failed: stop sending


class StatusQuery(NamedTuple):
    request_id: int


class StatusReply(NamedTuple):
    request_id: int
    body: bytes  # CBOR map, for people and tools: grows over time, unknown keys are to be ignored


class Serving(NamedTuple):
    """Whoever takes calls, to every member it is connected to, anew every few seconds: they reach it here."""

    session: int  # its own; 0: none any more


class ServiceCall(NamedTuple):
    """A call of one application to another; passed on by one member at most."""

    call_id: int  # of this sender; every one is larger than those before it on the same connection
    target: int  # session of the application that is called
    caller: int  # session of the one that calls; 0: it has none at present
    budget_ms: int  # after so long nobody waits for the answer any more
    body: bytes


class ServiceReply(NamedTuple):
    call_id: int
    status: int
    body: bytes


NodeMessage: TypeAlias = (
    Announce
    | Form
    | Refusal
    | MemberStatus
    | SnapshotChunk
    | SnapshotAck
    | Requests
    | Replies
    | LeaderInfo
    | StatusQuery
    | StatusReply
    | Serving
    | ServiceCall
    | ServiceReply
)
ClientMessage: TypeAlias = (
    Requests
    | Replies
    | LeaderInfo
    | StatusQuery
    | StatusReply
    | Refusal
    | Serving
    | ServiceCall
    | ServiceReply
)
