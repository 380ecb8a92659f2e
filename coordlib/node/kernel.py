"""One whole member, sans-I/O: Raft, the machine, sessions, requests, formation, snapshots, timers.

Inputs come through the methods named after them; after each round the driver calls `collect(now)` until it
returns nothing, carries out the effects in their order, and calls `persisted(now)` once what had to be
durable is. All input that is there is given before `tick`: a node that was kept from running must hear
what happened meanwhile before it concludes that nobody spoke.

What is *not* here: clocks, randomness, sockets, files, threads. They are handed in or asked for by effects.

Invariant: nothing that depends on a write leaves before `persisted`: the core holds such messages back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from coordlib import cbor
from coordlib.config import Timing
from coordlib.errors import ClusterClosed, CoordError, StartError, StorageCorrupt, invariant
from coordlib.machine import Machine, commands
from coordlib.machine.effects import MembersChanged
from coordlib.machine.limits import Limits
from coordlib.node.calls import Calls
from coordlib.node.effects import OWN, CompactLog, Effects, LogEvent
from coordlib.node.peers import Peers
from coordlib.node.service import RequestService, Source
from coordlib.node.session import Call, SessionClient
from coordlib.node.transfer import ENTRIES_RETAINED, SnapshotReceiver, SnapshotSenders, SnapshotTaker
from coordlib.raft import RaftConfig, RawNode, Ready
from coordlib.raft.messages import (
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    SnapshotMeta,
    VoteReply,
)
from coordlib.storage.base import CORRUPT_REMEDY, DiskIdentity, Persist, RecoveredGroup
from coordlib.wire.messages import (
    Announce,
    Form,
    LeaderInfo,
    MemberStatus,
    Refusal,
    Replies,
    Reply,
    RequestKind,
    Requests,
    ServiceCall,
    ServiceReply,
    Serving,
    SnapshotAck,
    SnapshotChunk,
    StatusQuery,
    StatusReply,
)

__all__ = ["MemberKernel"]

GROUP: Final = 0
STATUS_EVERY_MS: Final = 1000
HOUSEKEEPING_EVERY_MS: Final = 100
APPLY_MAX: Final = 1000
APPLY_BATCH: Final = 64
APPLY_DELAY_MS: Final = 5
"""A follower, for whose applying nobody waits, does it in batches: this many entries, or this long after the first."""

CLIENTS_MAX: Final = 20_000
REPLIES_MAX: Final = 1000
REPLIES_SIZE_BYTES_MAX: Final = 2 * 1024 * 1024
_NEVER: Final = 1 << 62


class MemberKernel:
    """See the module's docstring. Times are whole milliseconds of one clock that never goes back."""

    def __init__(
        self,
        *,
        node_id: str,
        members: Mapping[str, str],
        timing: Timing,
        identity: DiskIdentity,
        recovered: RecoveredGroup | None,
        snapshot: Iterable[bytes],
        random_bytes: Callable[[int], bytes],
        random_ticks: Callable[[int, int], int],
        now: int,
        reads_by_lease: bool = False,
        wants_bootstrap: bool = False,
    ) -> None:
        self.node_id = node_id
        self.machine = Machine(Limits())
        self._members = dict(members)
        self._timing = timing
        self._random_ticks = random_ticks
        self._reads_by_lease = reads_by_lease
        self._events: list[LogEvent] = []
        self.peers = Peers(
            node_id,
            members,
            identity,
            wants_bootstrap=wants_bootstrap,
            random_bytes=random_bytes,
            events=self._events,
        )
        self.session = SessionClient(timing, node_id, random_bytes)
        self.calls = Calls(self, lambda: self._out, random_bytes, is_member=True)
        self.wire_status: Callable[[], dict[str, Any]] = dict  # counters and problems of what is below
        self.raft: RawNode | None = None
        self.service: RequestService | None = None
        self._taker: SnapshotTaker | None = None
        self._receiver: SnapshotReceiver | None = None
        self._senders: SnapshotSenders | None = None
        self._out = Effects()
        self._ready: Ready | None = None
        self._to_apply: deque[Entry] = deque()
        self._apply_at = 0
        self._clients: dict[bytes, str] = {}  # route -> name
        self._role_seen: tuple[int, str, bool] = (0, "", False)
        self._next_status = now
        self._wall_ms = 0
        self._late_ms = 0
        self._now = now
        self._has_garbage = False
        self._is_slice_due = False  # of our own snapshot: one a turn, so that input is looked at in between
        self._next_housekeeping = now
        self._was_barred = False
        self._is_closing = False
        self._close_call: Call | None = None
        self._close_deadline = _NEVER
        self.counters: dict[str, int] = {
            "applied_rounds": 0,
            "leader_changes": 0,
            "stale_refusals": 0,
            "untrusted_messages": 0,
        }
        if identity.cluster_uuid:
            self._start_raft(recovered, snapshot, now)
        else:
            self.peers.try_to_form()

    # -- start ---------------------------------------------------------------------------------------------

    def _start_raft(self, recovered: RecoveredGroup | None, chunks: Iterable[bytes], now: int) -> None:
        initial = Configuration(tuple(sorted(self._members)))
        hard_state = recovered.hard_state if recovered is not None else HardState(0, "")
        snapshot = SnapshotMeta(0, 0, initial)
        entries: Sequence[Entry] = ()
        if recovered is not None:
            snapshot = recovered.snapshot or snapshot
            entries = recovered.entries
            _check_recovered(hard_state, snapshot)
        timing = self._timing
        raft = RawNode(
            RaftConfig(
                node_id=self.node_id,
                heartbeat_ticks=timing.heartbeat_ms,
                election_ticks_min=timing.election_ms_min,
                election_ticks_max=timing.election_ms_max,
                reads_by_lease=self._reads_by_lease,
                drift_percent=timing.drift_percent,
            ),
            hard_state=hard_state,
            snapshot=snapshot,
            entries=entries,
            random_ticks=self._random_ticks,
            now=now,
        )
        self.raft = raft
        end = (raft.log.last_term, raft.last_index)
        self.peers.log_found(max(end, recovered.cut_from) if recovered is not None else end)
        self.peers.log_ends(end)
        self.machine = Machine(
            Limits(),
            initial_members=tuple(
                # No endpoints: members may reach each other under different ones, and the state must be the same.
                (name, "", disk_id)
                for name, disk_id in self.peers.identity.disks
            ),
        )
        if snapshot.index:
            sink = self.machine.begin_restore()
            for chunk in chunks:
                sink.feed(chunk)
            sink.finish()
            invariant(
                self.machine.applied_index == snapshot.index,
                "the snapshot for index %d holds the state of index %d",
                snapshot.index,
                self.machine.applied_index,
            )
        for name, _, disk_id in self.machine.members():
            if disk_id:
                self.peers.disks[name] = disk_id
        self.service = RequestService(self.node_id, self._timing, raft, self.machine)
        self._taker = SnapshotTaker(raft, self.machine)
        self._senders = SnapshotSenders(raft, self._events)
        self._receiver = SnapshotReceiver(raft, self.machine, GROUP, self._events)

    @property
    def is_formed(self) -> bool:
        return self.raft is not None

    @property
    def is_leader(self) -> bool:
        return self.raft is not None and self.raft.is_leader

    @property
    def leader(self) -> str:
        return self.raft.leader if self.raft is not None else ""

    @property
    def has_usable_leader(self) -> bool:
        """A leader is known, and this node's application has a session with the cluster."""
        return self.session.view.session_id != 0 and bool(self.leader)

    def identity_stored(self, identity: DiskIdentity, now: int) -> None:
        """The identity asked for by an effect is on the disk: whom this node backs, or what it is to know of its cluster."""
        self.peers.is_unwritten = self.peers.identity != identity
        if self.peers.is_formed and self.raft is None:
            self._start_raft(None, (), now)
            for name, message in self.peers.formed():
                self._send(name, message)
        for name, peer in self.peers.known.items():
            if peer.is_up:
                self._announce(name)

    # -- input from peers ----------------------------------------------------------------------------------

    def peer_up(self, name: str, incarnation: int, now: int) -> None:
        """Our control connection to a member, of that incarnation, is established (again)."""
        peer = self.peers.known[name]
        peer.is_up = True
        self._announce(name)
        if peer.announce is not None and peer.incarnation == incarnation:
            # What we had to answer could not be sent while there was no connection. What an earlier run announced is
            # not for this one to answer for: its directory may have been given back since.
            self._on_announce(name, peer.announce, now, is_repeated=True)
        if self.raft is not None:
            self.raft.report_reachable(name)
            if name == self.session.leader:
                self.session.leader_changed(name, now)
        if peer.is_trusted:
            self.calls.link_up(name)

    def peer_down(self, name: str) -> None:
        self.peers.known[name].is_up = False
        self.calls.link_down(name)
        if self.raft is not None:
            self.raft.report_unreachable(name)
            assert self._senders is not None
            self._senders.stop(name)

    def peer_incarnation(self, name: str, incarnation: int) -> None:
        """A member came with a new incarnation: what its last one announced no longer counts."""
        peer = self.peers.known[name]
        if peer.incarnation != incarnation:
            peer.incarnation = incarnation
            peer.announce = None
            peer.is_trusted = False
            peer.status = None
            self.calls.source_gone(name)
            if self.service is not None:
                self.service.source_gone(name)

    def peer_messages(self, name: str, messages: Sequence[tuple[int, Any]], now: int) -> None:
        """
        Take messages of a member, in the order in which they came.

        Raises:
            StartError: This node must stop; the message says why.
        """
        self._now = now
        peer = self.peers.known[name]
        for _, message in messages:
            kind = type(message)
            if kind in _NODE_HANDLERS:
                _NODE_HANDLERS[kind](self, name, message, now)
                continue
            raft = self.raft
            if raft is None or not peer.is_trusted:
                self.counters["untrusted_messages"] += 1
                continue
            if kind is AppendReply:
                if message.is_success:
                    self.peers.acknowledged(name, message.match_term, message.match_index)
            elif kind is VoteReply and message.is_granted and peer.is_behind:
                self.counters["untrusted_messages"] += 1
                continue
            raft.step(name, message)

    def _on_announce(self, name: str, message: Announce, now: int, *, is_repeated: bool = False) -> None:
        result = self.peers.heard(name, message, is_repeated=is_repeated)
        if result is not None and not self._is_forming:
            self._send(name, result)
        self.peers.try_to_form()
        peer = self.peers.known[name]
        if peer.is_trusted and peer.is_up and not is_repeated:
            self.calls.link_up(name)
        # One that seems to be behind may only have announced itself before its last acknowledgement, which came first.
        # It is told what is remembered of it, and says so (below).
        if self.is_formed and not is_repeated and (message.wants_answer or peer.is_behind):
            self._announce(name)
        self._believe_vouched(now)
        if self.raft is not None and peer.is_trusted:
            remembered = (message.remembered_term, message.remembered_index)
            if remembered > self.peers.reached:
                self.raft.bar_until(*remembered)
                if self.raft.is_barred and not self._was_barred:
                    self._was_barred = True
                    self._say(
                        logging.ERROR,
                        "disk.behind",
                        f"this disk holds less than it had acknowledged (entry {self.raft.last_index} of term "
                        f"{self.raft.log.last_term} instead of {message.remembered_index} of {message.remembered_term}): "
                        "no vote until it has caught up. Was an old copy of data_dir put back?",
                        remembered_index=message.remembered_index,
                    )
            elif peer.announced < remembered and not self.raft.is_barred:
                self._announce(name)
            self.raft.report_reachable(name)
            if peer.is_behind and not is_repeated:
                self.raft.report_lost(name, message.last_index)

    @property
    def _is_forming(self) -> bool:
        """What there is to say must be on the disk first; then all are told (`identity_stored`)."""
        return self.raft is None and self.peers.is_unwritten

    def _believe_vouched(self, now: int) -> None:
        """Take what members announced whose disks were not known then, and now are."""
        vouched = self.peers.vouched
        while vouched:
            name = vouched.pop()
            announce = self.peers.known[name].announce
            assert announce is not None
            self._on_announce(name, announce, now, is_repeated=True)

    def _on_form(self, name: str, message: Form, now: int) -> None:
        self.peers.heard_form(name, message)

    def _on_refusal(self, name: str, message: Refusal, now: int) -> None:
        if self.peers.is_known_to(name):
            # The answer to a late message of another run, on a disk that this one no longer has (the operator gave
            # it its own back). A peer's announcement comes before anything else on a connection, and says otherwise.
            self.counters["stale_refusals"] += 1
            return
        raise StartError(f"member {name!r} refused this node: {message.message}")

    def _on_requests(self, name: str, message: Requests, now: int) -> None:
        if self.service is not None:
            self.service.handle(name, message.requests, now)
        else:
            self._send(name, Replies(tuple(Reply(r.request_id, 1, b"") for r in message.requests)))

    def _on_replies(self, name: str, message: Replies, now: int) -> None:
        # The hint is of no use here: a member follows its own core's idea of who leads.
        self.session.receive(message.replies, now)

    def _on_member_status(self, name: str, message: MemberStatus, now: int) -> None:
        peer = self.peers.known[name]
        peer.status = message
        peer.status_ms = now
        if self.service is not None:
            self.service.observe_clock(name, message.wall_ms, now)

    def _on_snapshot_chunk(self, name: str, message: SnapshotChunk, now: int) -> None:
        if self._receiver is None or not self.peers.known[name].is_trusted or message.group != GROUP:
            self.counters["untrusted_messages"] += 1
            return
        ack = self._receiver.receive(name, message, self._out.disk)
        if ack is not None:
            self._send(name, ack)

    def _on_snapshot_ack(self, name: str, message: SnapshotAck, now: int) -> None:
        if self._senders is not None:
            self._senders.acknowledged(name, message, now)

    def _on_call_message(self, name: str, message: Serving | ServiceCall | ServiceReply, now: int) -> None:
        if self.raft is None or not self.peers.known[name].is_trusted:
            self.counters["untrusted_messages"] += 1
            return
        self.calls.receive(name, message, now)

    # -- input from clients --------------------------------------------------------------------------------

    def client_attached(self, route: bytes, name: str) -> None:
        if len(self._clients) >= CLIENTS_MAX:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            self.calls.source_gone(oldest)
        self._clients[route] = name
        self._send_client(route, self._leader_info())

    def client_gone(self, route: bytes, unsent: Sequence[tuple[int, Any]] = ()) -> None:
        """A client does not take what it is sent; of `unsent`, nothing has left."""
        self._clients.pop(route, None)
        for _, message in unsent:
            if type(message) is ServiceCall:
                self.calls.not_sent(route, message.call_id, self._now)
        self.calls.source_gone(route)
        if self.service is not None:
            self.service.source_gone(route)

    def client_messages(self, route: bytes, messages: Sequence[tuple[int, Any]], now: int) -> None:
        self._now = now
        for _, message in messages:
            if isinstance(message, Requests):
                if self.service is not None:
                    self.service.handle(route, message.requests, now)
                else:
                    self._send_client(
                        route, Replies(tuple(Reply(r.request_id, 1, b"") for r in message.requests))
                    )
            elif isinstance(message, StatusQuery):
                self._send_client(route, StatusReply(message.request_id, cbor.encode(self.status(now))))
            elif isinstance(message, Serving | ServiceCall | ServiceReply):
                self.calls.receive(route, message, now)
            else:
                self.counters["untrusted_messages"] += 1

    def _leader_info(self) -> LeaderInfo:
        term = self.raft.term if self.raft is not None else 0
        return LeaderInfo(term, self.leader, tuple(sorted(self._members.items())), self.cluster_uuid)

    @property
    def cluster_uuid(self) -> bytes:
        """Of this cluster and no other, whatever its name, for as long as it lives; empty before it is formed."""
        return self.peers.identity.cluster_uuid

    # -- input from the application ------------------------------------------------------------------------

    def open_session(self, now: int) -> None:
        self.session.open(now)

    def submit(self, call: Call, now: int) -> None:
        if self._is_closing and not call.is_detached:
            call.error = ClusterClosed("the node is closing; nothing was sent")
            self._out.completed.append(call)
            return
        if call.kind == RequestKind.STALE_QUERY and self.raft is not None:
            # Of what was applied here, and only here: a leader is neither needed nor asked.
            reply = self.machine.query(call.body)
            if commands.is_success(reply):
                call.reply = reply
            else:
                call.error = commands.error_reply(reply)
            self._out.completed.append(call)
            return
        if call.kind == RequestKind.CALL:
            self.calls.submit(call, now)
            return
        self.session.submit(call, now)

    # -- for calls between applications --------------------------------------------------------------------

    def can_reach(self, source: Source) -> bool:
        if isinstance(source, bytes):
            return source in self._clients
        peer = self.peers.known.get(source)
        return peer is not None and peer.is_up and peer.is_trusted

    def reachable_members(self) -> list[str]:
        return [name for name in self.peers.known if self.can_reach(name)]

    # -- leaving -------------------------------------------------------------------------------------------

    def begin_close(self, now: int, deadline_ms: int) -> None:
        """Leave in good order: close the session, so that its locks are free, and hand over the leadership."""
        if self._is_closing:
            return
        self._is_closing = True
        self._close_deadline = deadline_ms
        self._close_call = self.session.close(now, deadline_ms)

    def has_left(self, now: int) -> bool:
        """Nothing more to wait for before stopping."""
        if not self._is_closing:
            return False
        if now >= self._close_deadline:
            return True
        call = self._close_call
        if call is not None:
            if call.reply is None and call.error is None and self._can_reach_quorum():
                return False
            self._close_call = None
            self.session.closed()
        raft = self.raft
        if raft is None or not raft.is_leader or len(raft.configuration.voters) == 1:
            return True
        # Either a successor is being appointed, or there is none to be had.
        return not raft.is_transferring and not raft.transfer_leadership(None)

    def _can_reach_quorum(self) -> bool:
        reachable = 1 + sum(peer.is_up for peer in self.peers.known.values())
        return reachable >= len(self._members) // 2 + 1

    def fail(self, error: CoordError) -> Effects | None:
        """The node stops for good: everything that waits ends. Only these last effects are to be carried out."""
        self.session.fail_all(error)
        self.calls.fail_all(error)
        last = Effects()
        last.completed, last.changes = self._out.completed, self._out.changes
        self._out = last
        return self._take()

    # -- time ----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> int:
        """When `tick` must be called at the latest."""
        deadline = min(self._next_status, self.session.deadline, self._close_deadline, self.calls.next_ms)
        raft = self.raft
        if raft is not None:
            assert self.service is not None and self._taker is not None and self._senders is not None
            if self._has_garbage or self._taker.is_active:
                return self._now
            deadline = min(deadline, raft.deadline, self.service.deadline, self._senders.deadline)
            if self._to_apply:
                deadline = min(deadline, self._now if raft.is_leader else self._apply_at)
        return deadline

    def tick(self, now: int, wall_ms: int, late_ms: int = 0) -> None:
        """Let timers fire. Only after all input that is there was given; `now` was read after that."""
        self._now = now
        self._is_slice_due = True
        self._wall_ms = wall_ms
        self._late_ms = max(self._late_ms, late_ms)
        raft = self.raft
        if raft is not None:
            assert self.service is not None
            if self.session.has_outgoing and raft.is_leader:
                # Our own reads are asked before the core looks at the time: a lease that holds now answers them now.
                self._flush_session(raft, self.service, now)
            if now >= raft.deadline:
                raft.tick(now)
            self.service.tick(now)
        self.session.tick(now)
        if now >= self.calls.next_ms:
            self.calls.tick(now)
        if now >= self._next_status:
            self._next_status = now + STATUS_EVERY_MS
            self._status_round(now)
        if self._has_garbage or now >= self._next_housekeeping:
            self._next_housekeeping = now + HOUSEKEEPING_EVERY_MS
            self._has_garbage = self.machine.free_slice()

    def _status_round(self, now: int) -> None:
        service = self.service
        if service is not None and service.log_clock is not None:
            service.observe_clock(self.node_id, self._wall_ms, now)
            for name, disk_id in self.peers.to_record:
                service.propose_internal(commands.record_disk(name, disk_id), now)
            self.peers.to_record.clear()
        elif self.leader and self.leader != self.node_id:
            self._send(self.leader, MemberStatus(self.machine.applied_index, self._wall_ms, self._late_ms))
            self._late_ms = 0
            # Followers saw those disks too; should the leader change before it has logged them, the next one does.
            del self.peers.to_record[:-64]
        for name, peer in self.peers.known.items():
            # Until it is heard: a single frame may be lost, and without it nothing of a peer is believed.
            if peer.is_up and (not self.is_formed or self.peers.is_unheard(name)):
                self._announce(name)
        if not self.is_formed:
            # At the second round at the earliest: at the first, with which a node begins, nobody has answered.
            self.peers.try_to_form(has_waited=True)

    # -- output --------------------------------------------------------------------------------------------

    def collect(self, now: int) -> Effects | None:
        """The next effects to carry out; None when there is nothing left to do in this round."""
        self._now = now
        raft, service = self.raft, self.service
        if raft is None or service is None:
            return self._take()
        if self._was_barred and not raft.is_barred:
            # Caught up with what this disk had acknowledged: its votes count again.
            self._was_barred = False
            for name, peer in self.peers.known.items():
                if peer.is_up:
                    self._announce(name)
        if self._to_apply and self._out.sends:
            # Others wait for these (acknowledgements of what just became durable); applying can follow.
            return self._take()
        while True:
            if self.session.has_outgoing:
                self._flush_session(raft, service, now)
            progressed = False
            if self._ready is None and raft.has_ready():
                progressed = True
                ready = raft.ready()
                if ready.reads:
                    # Before a change of leadership is taken note of: then they are handed back with all the others.
                    service.reads_confirmed(ready.reads)
                if ready.is_leadership_changed:
                    self._leadership_changed(raft, service, now)
                sends = self._out.sends
                for receiver, message in ready.messages:
                    if receiver in sends:
                        sends[receiver].append((GROUP, message))
                    else:
                        sends[receiver] = [(GROUP, message)]
                if ready.failed_reads:
                    service.reads_failed(ready.failed_reads)
                for follower in ready.snapshots_wanted:
                    assert self._senders is not None
                    self._senders.start(follower, now)
                self._ready = ready
                if ready.entries:
                    self.peers.log_ends((ready.entries[-1].term, ready.entries[-1].index))
                elif ready.snapshot is not None:
                    self.peers.log_ends((ready.snapshot.term, ready.snapshot.index))
                if ready.hard_state is not None or ready.entries or ready.snapshot is not None:
                    self._out.persist = [Persist(GROUP, ready.hard_state, ready.entries, ready.snapshot)]
                    return self._take()
                self._persisted(now)
            if self._to_apply and self._is_apply_due(raft, now):
                progressed = True
                self._apply(raft, service, now)
            if raft.is_leader:
                service.settled(now)
                service.serve_reads(now)
            if service.replies:
                self._route_replies(now)
            if not progressed:
                break
            if len(self._to_apply) > APPLY_BATCH:
                break  # a long backlog: let the driver look at its input between slices
        assert self._taker is not None and self._senders is not None
        if self._is_slice_due:
            self._is_slice_due = False
            self._taker.step(self._out.disk)
        self._senders.step(now, self._out.disk)
        return self._take()

    def persisted(self, now: int) -> None:
        """What the last effects asked to persist is durable."""
        self._persisted(now)

    def _persisted(self, now: int) -> None:
        ready, raft = self._ready, self.raft
        assert ready is not None and raft is not None
        self._ready = None
        for receiver, message in raft.persisted(ready):
            self._send(receiver, message)
        if ready.snapshot is not None:
            self._install(ready.snapshot)
        if ready.committed:
            if not self._to_apply:
                self._apply_at = self._now + APPLY_DELAY_MS
            self._to_apply.extend(ready.committed)

    def _install(self, meta: SnapshotMeta) -> None:
        assert self._receiver is not None and self._taker is not None and self.raft is not None
        self._to_apply.clear()
        self._taker.restart(self._out.disk)
        self._receiver.install(meta)
        invariant(
            self.machine.applied_index == meta.index,
            "the snapshot for index %d holds the state of index %d",
            meta.index,
            self.machine.applied_index,
        )
        self.raft.applied_to(meta.index)
        self._members_changed()
        self._out.disk.append(CompactLog(meta.index))

    def _take(self) -> Effects | None:
        out = self._out
        session = self.session
        if session.completed:
            out.completed.extend(session.completed)
            session.completed.clear()
        if session.changes:
            self.calls.session_changed(session.id, self._now)
            out.changes.extend(session.changes)
            session.changes.clear()
        if self._events:
            out.events.extend(self._events)
            self._events.clear()
        if self.peers.is_unwritten:
            out.identity = self.peers.identity
        if not (
            out.sends
            or out.client_sends
            or out.persist
            or out.completed
            or out.disk
            or out.events
            or out.changes
            or out.identity
            or out.calls
        ):
            return None
        self._out = Effects()
        return out

    def _flush_session(self, raft: RawNode, service: RequestService, now: int) -> None:
        session = self.session
        if raft.is_leader:
            requests = session.flush(now)
            if requests:
                service.handle("", requests, now)
                self._route_replies(now)
        else:
            # Just after stepping down it is still this node's own name, until the core's Ready has been seen.
            peer = self.peers.known.get(session.leader)
            if peer is not None and peer.is_up:
                requests = session.flush(now)
                if requests:
                    self._send(session.leader, Requests(tuple(requests)))

    def _is_apply_due(self, raft: RawNode, now: int) -> bool:
        return raft.is_leader or now >= self._apply_at or len(self._to_apply) >= APPLY_BATCH

    def _apply(self, raft: RawNode, service: RequestService, now: int) -> None:
        machine, taker, queue = self.machine, self._taker, self._to_apply
        assert taker is not None
        for _ in range(min(len(queue), APPLY_MAX)):
            entry = queue.popleft()
            if entry.kind == EntryKind.COMMAND:
                applied = machine.apply(entry.index, entry.term, entry.data)
                service.applied(entry, applied, now)
                for effect in applied.effects:
                    if isinstance(effect, MembersChanged):
                        self._members_changed()
                taker.entry_applied(len(entry.data))
            else:
                machine.skip(entry.index)
        self.counters["applied_rounds"] += 1
        raft.applied_to(machine.applied_index)

    def _members_changed(self) -> None:
        for name, _, disk_id in self.machine.members():
            if disk_id and self.peers.disks.get(name) != disk_id:
                self.peers.recorded(name, disk_id)
        self._believe_vouched(self._now)

    def _leadership_changed(self, raft: RawNode, service: RequestService, now: int) -> None:
        seen = (raft.term, raft.leader, raft.is_leader)
        was_leader = self._role_seen[2]
        term_before, leader_before, _ = self._role_seen
        if seen == self._role_seen:
            return
        self._role_seen = seen
        if was_leader and (not raft.is_leader or raft.term != term_before):
            service.lose_leadership(raft.leader)
            assert self._senders is not None
            self._senders.stop_all()
            self._say(logging.INFO, "leader.lost", f"no longer leader of term {term_before}", term=raft.term)
        if raft.is_leader and not (was_leader and raft.term == term_before):
            quorum = len(raft.configuration.voters) // 2 + 1
            service.become_leader(now, raft.last_index, quorum)
            service.observe_clock(self.node_id, self._wall_ms, now)
            self._say(logging.INFO, "leader.elected", f"leader of term {raft.term}", term=raft.term)
        if raft.leader != leader_before or raft.term != term_before:
            if raft.leader:
                self.counters["leader_changes"] += 1
                if not raft.is_leader:
                    # At once: before it has heard the clocks of a quorum, a leader cannot set log_time right.
                    self._next_status = now + STATUS_EVERY_MS
                    self._status_round(now)
                    self._say(
                        logging.INFO,
                        "leader.changed",
                        f"{raft.leader!r} leads term {raft.term}",
                        term=raft.term,
                        leader=raft.leader,
                    )
            self.session.leader_changed(raft.leader, now)
            info = self._leader_info()
            for route in self._clients:
                self._send_client(route, info)

    def _route_replies(self, now: int) -> None:
        service = self.service
        assert service is not None
        replies = service.replies
        if not replies:
            return
        service.replies = []
        grouped: dict[Source, list[Reply]] = {}
        for source, reply in replies:
            if source in grouped:
                grouped[source].append(reply)
            else:
                grouped[source] = [reply]
        for source, batch in grouped.items():
            if source == "":
                self.session.receive(batch, now)
                continue
            for part in _split(batch):
                if isinstance(source, bytes):
                    self._send_client(source, Replies(part))
                else:
                    self._send(source, Replies(part))

    def _announce(self, name: str) -> None:
        if self._is_forming:
            return
        self._send(name, self.peers.announce_to(name, self.raft.term if self.raft is not None else 0))

    def _send(self, name: str, message: Any) -> None:
        self._out.sends.setdefault(name, []).append((GROUP, message))

    def _send_client(self, route: bytes, message: Any) -> None:
        self._out.client_sends.setdefault(route, []).append((GROUP, message))

    def _say(self, level: int, name: str, message: str, **fields: Any) -> None:
        self._events.append(LogEvent(level, name, message, fields))

    # -- results of disk effects ---------------------------------------------------------------------------

    def snapshot_stored(self, origin: str, meta: SnapshotMeta) -> None:
        """A snapshot file asked for by FinishSnapshot is durable."""
        assert self.raft is not None
        if origin == OWN:
            assert self._taker is not None
            self._taker.stored(meta)
            self.raft.compact(meta.index, ENTRIES_RETAINED)
            self._out.disk.append(CompactLog(self.raft.log.start_index))
            self._say(logging.DEBUG, "snapshot.taken", f"snapshot at index {meta.index}", index=meta.index)
            return
        assert self._receiver is not None
        sender, ack = self._receiver.stored(meta)
        if sender:
            self._send(sender, ack)

    def chunk_sent(self, follower: str, chunk: SnapshotChunk) -> None:
        assert self._senders is not None
        self._senders.chunk_sent(follower, chunk)

    def chunk_failed(self, follower: str) -> None:
        assert self._senders is not None
        self._senders.chunk_failed(follower, self._now)

    # -- status --------------------------------------------------------------------------------------------

    def status(self, now: int) -> dict[str, Any]:
        """What `coordlib status` and `stats()` show; keys are stable, more may come."""
        raft, service = self.raft, self.service
        status: dict[str, Any] = {
            **self.wire_status(),
            "node": self.node_id,
            "is_formed": raft is not None,
            "cluster_uuid": self.peers.identity.cluster_uuid.hex(),
            "disk_id": self.peers.identity.disk_id.hex(),
            "problems": self.peers.missing()
            if raft is None
            else [p.problem for p in self.peers.known.values() if p.problem],
            "clients": len(self._clients),
            "calls_pending": self.session.pending_count,
            "session": self.session.view.session_id,
            "application_calls": {**self.calls.sizes, **self.calls.counters},
        }
        if raft is None or service is None:
            return status
        members: dict[str, Any] = {}
        for name, endpoint in sorted(self._members.items()):
            entry: dict[str, Any] = {"endpoint": endpoint, "role": "follower"}
            if name == raft.leader:
                entry["role"] = "leader"
            if name == self.node_id:
                entry.update(
                    is_up=True, applied_index=self.machine.applied_index, role=raft.role.name.lower(), lag=0
                )
            else:
                peer = self.peers.known[name]
                entry.update(is_up=peer.is_up, is_trusted=peer.is_trusted)
                if peer.status is not None:
                    entry["applied_index"] = peer.status.applied_index
                    entry["lag"] = max(0, raft.commit_index - peer.status.applied_index)
                    entry["late_ms"] = peer.status.late_ms
                    entry["heard_ms_ago"] = now - peer.status_ms
            members[name] = entry
        status.update(
            term=raft.term,
            role=raft.role.name.lower(),
            leader=raft.leader,
            commit_index=raft.commit_index,
            applied_index=self.machine.applied_index,
            first_index=raft.log.start_index + 1,
            last_index=raft.last_index,
            snapshot_index=raft.log.snapshot.index,
            sessions=len(self.machine.sessions),
            members=members,
            transactions=self._transactions_status(),
            counters={
                **self.counters,
                **service.counters,
                **{f"raft_{k}": v for k, v in raft.counters.items()},
            },
            session_counters=dict(self.session.counters),
        )
        return status

    def _transactions_status(self) -> dict[str, int]:
        """What is remembered of transactions, as this member has applied it; ages in log time."""
        found = {
            name.removeprefix("tx_"): value
            for name, value in self.machine.counters.items()
            if name.startswith("tx_")
        }
        since_ms = found.pop("pending_since_ms")
        found["pending_oldest_ms"] = max(0, self.machine.log_time_ms - since_ms) if since_ms else 0
        return found


def _check_recovered(hard_state: HardState, snapshot: SnapshotMeta) -> None:
    if snapshot.term > hard_state.term:
        # No snapshot is written before the term that it ends in is durable: what the storage took for the torn end of
        # its log must have been more.
        raise StorageCorrupt(
            f"the log ends in term {hard_state.term}, before the snapshot at {snapshot.index} of term {snapshot.term}: "
            f"the disk has lost acknowledged writes; {CORRUPT_REMEDY}"
        )


def _split(replies: list[Reply]) -> list[tuple[Reply, ...]]:
    """In parts that fit into a frame."""
    parts: list[tuple[Reply, ...]] = []
    part: list[Reply] = []
    size = 0
    for reply in replies:
        size += len(reply.body) + 16
        if part and (size > REPLIES_SIZE_BYTES_MAX or len(part) >= REPLIES_MAX):
            parts.append(tuple(part))
            part, size = [], len(reply.body) + 16
        part.append(reply)
    parts.append(tuple(part))
    return parts


_NODE_HANDLERS: dict[type, Callable[[MemberKernel, str, Any, int], None]] = {
    Announce: MemberKernel._on_announce,
    Form: MemberKernel._on_form,
    Refusal: MemberKernel._on_refusal,
    Requests: MemberKernel._on_requests,
    Replies: MemberKernel._on_replies,
    MemberStatus: MemberKernel._on_member_status,
    SnapshotChunk: MemberKernel._on_snapshot_chunk,
    SnapshotAck: MemberKernel._on_snapshot_ack,
    Serving: MemberKernel._on_call_message,
    ServiceCall: MemberKernel._on_call_message,
    ServiceReply: MemberKernel._on_call_message,
}
