"""Who the peers are, whether their disks are the ones this cluster knows, and how a cluster forms. Sans-I/O.

Formation: a node with an empty disk asks every configured member. If one belongs to a cluster already and knows
this node's disk (or has never seen one of it), the node joins that cluster. If *every* member answered and all are
empty, the one with the lowest name of those that back nobody yet is a candidate; with `bootstrap=True` any member is
to which a quorum of empty members has answered, once the others have had a second to. A member backs one candidate
(a candidate itself), writes down whom, and then says so; one that a quorum backs, itself included, makes a cluster id
and writes it down together with every disk id it has heard of. The others join it by the rule above, on its word
(FORM). The disks not seen by then are recorded through the log before they count. Nothing else forms a cluster, so a
wiped directory never does: a member that was formed names another disk for it.

A candidate that hears of one with a lower name backs that one, and is none itself any more, for ever. Those who
had backed it may then back another; nobody else ever may. The lowest that ever was a candidate stays one, and does
for its backers what they were asked: with `bootstrap=True` of one of them it does not wait for all either.

Invariant: one cluster forms at most, as long as no disk is lost before all are part of it, and the list of members
stays the same. (Where a disk is lost, the rule that *all* must be there, and empty, still protects; `bootstrap=True`
gives it up.) Of two that formed one, some member backed both, or was one and backed the other. It went from the first to the
second after the first had written down that it backs another: so the first was no candidate any more, and never
became one again.

Invariant: a disk whose log has reached less than it acknowledged here has lost something. (Both are the term and index
of a last entry, compared in this order.) Where a log had ended before a leader cut it back to less, which is no loss,
is written into the identity file before, with where the cut left it. It counts as reached as long as the disk has what
was left; so what was lost is noticed if it counted for a commit: either it was acknowledged before the cut, then the
cut left it there, as every later leader has it; or after, then in a later term than anything that was cut off.

Invariant: no Raft message of a peer reaches the core unless the peer announced, in this incarnation, this
cluster's id and the disk id that this cluster knows for its name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from coordlib import cbor
from coordlib.errors import StartError
from coordlib.node.effects import LogEvent
from coordlib.storage.base import DiskIdentity, LogCut
from coordlib.wire.messages import Announce, Form, MemberStatus, Refusal

__all__ = ["Peer", "Peers"]


class Peer:
    """What is known of one other member."""

    __slots__ = (
        "announce",
        "announced",
        "incarnation",
        "is_behind",
        "is_trusted",
        "is_up",
        "problem",
        "remembered",
        "remembered_by",
        "status",
        "status_ms",
    )

    def __init__(self) -> None:
        self.is_up = False  # our connection to it is established
        self.incarnation = 0
        self.announce: Announce | None = None
        self.announced = (0, 0)  # (last term, last index) that we announced to it
        self.is_trusted = False
        self.remembered = (0, 0)  # (term, index) that its disk acknowledged to us
        self.remembered_by = 0  # the incarnation that did
        self.is_behind = (
            False  # it came back with less than that: its vote is worth nothing until it has caught up
        )
        self.status: MemberStatus | None = None
        self.status_ms = 0
        self.problem = ""


def members_digest(members: Mapping[str, str]) -> bytes:
    """All members must have been given the same names; endpoints may be written differently (NAT)."""
    return hashlib.sha256(cbor.encode(sorted(members))).digest()[:16]


class Peers:
    def __init__(
        self,
        node_id: str,
        members: Mapping[str, str],
        identity: DiskIdentity,
        *,
        wants_bootstrap: bool,
        random_bytes: Callable[[int], bytes],
        events: list[LogEvent],
    ) -> None:
        self.node_id = node_id
        if identity.backs not in members:
            identity = identity._replace(backs="")  # of another list of members, which counts no more
        self.identity = identity
        self.known = {name: Peer() for name in sorted(members) if name != node_id}
        self._members = sorted(members)
        self._digest = members_digest(members)
        self._wants_bootstrap = wants_bootstrap and not identity.cluster_uuid
        self._random_bytes = random_bytes
        self._events = events
        self.reached = (0, 0)
        """The furthest (term, index) at which this disk's log has ended."""
        self.is_unwritten = False  # `identity` has changed: it is to be written down
        self.disks = dict((*identity.disks, *identity.recorded))
        self.to_record: list[tuple[str, bytes]] = []  # disks seen for the first time; the leader logs them
        self.vouched: list[str] = []  # whose announcements, heard before, are to be believed from now on

    @property
    def is_formed(self) -> bool:
        return bool(self.identity.cluster_uuid)

    def log_found(self, end: tuple[int, int]) -> None:
        """At the start the log, whatever its snapshot makes of it, ended here."""
        cut = self.identity.cut
        self.reached = max(end, cut.reached) if cut is not None and end >= cut.end else end

    def log_ends(self, end: tuple[int, int]) -> None:
        """From the next write on the log ends here. If it had reached further, that is to be written down before."""
        cut = self.identity.cut
        if end >= self.reached:
            self.reached = end
        elif cut is None or cut.reached != self.reached or end < cut.end:
            self._write(cut=LogCut(self.reached, end))

    def announce_to(self, name: str, hard_term: int) -> Announce:
        peer = self.known[name]
        peer.announced = last_term, last_index = self.reached
        remembered = peer.remembered
        disks = tuple((node, self.disks.get(node, b"")) for node in self._members)
        return Announce(
            cluster_uuid=self.identity.cluster_uuid,
            disk_id=self.identity.disk_id,
            members_digest=self._digest,
            wants_bootstrap=self._wants_bootstrap,
            term=hard_term,
            last_index=last_index,
            last_term=last_term,
            known_disks=disks,
            remembered_term=remembered[0],
            remembered_index=remembered[1],
            wants_answer=self.is_unheard(name),
            backs=self.identity.backs,
        )

    def is_unheard(self, name: str) -> bool:
        """This node belongs to a cluster, and the peer has not announced yet that it does too."""
        announce = self.known[name].announce
        return self.is_formed and (announce is None or not announce.cluster_uuid)

    def heard(self, name: str, announce: Announce, *, is_repeated: bool = False) -> Refusal | Form | None:
        """
        Take a peer's announcement, or take it again (`is_repeated`): its disk has gone on since.

        Returns what to send to it, or None. A node that belongs to no cluster then looks whether one can form (`try_to_form`).

        Raises:
            StartError: This node must stop: the peer shows that its disk or its settings are wrong.
        """
        peer = self.known[name]
        peer.announce = announce
        peer.is_trusted = False
        peer.problem = ""
        if not is_repeated:
            # What this very run of it has acknowledged since is not lost: the announcement is late.
            is_late = peer.remembered_by == peer.incarnation
            peer.is_behind = (announce.last_term, announce.last_index) < peer.remembered and not is_late
        if peer.is_behind and not is_repeated:
            self._say(
                logging.ERROR,
                "disk.behind",
                f"member {name!r} came back with less than its disk had acknowledged (entry {announce.last_index} "
                f"of term {announce.last_term} instead of {peer.remembered[1]} of {peer.remembered[0]}): "
                "it does not vote until it has caught up",
                peer=name,
            )
        if announce.members_digest != self._digest:
            peer.problem = (
                f"member {name!r} was given another list of members than this node "
                f"({', '.join(self._members)}): give every member the same list, then restart"
            )
            self._say(logging.ERROR, "members.differ", peer.problem, peer=name)
            return None
        if not announce.cluster_uuid:
            if not self.is_formed:
                return None
            return self._judge_disk(name, announce) or Form(self.identity.cluster_uuid, self.identity.disks)
        if self.is_formed and announce.cluster_uuid != self.identity.cluster_uuid:
            # What another cluster knows of disks says nothing about ours: a stranger must not stop a healthy member.
            self._note_stranger(name, announce)
            return None
        self._check_own_disk(announce.known_disks)
        if not self.is_formed:
            return None  # it sends FORM as soon as it has heard from us
        refusal = self._judge_disk(name, announce)
        if peer.is_trusted:
            # What it has applied is committed. This node may not be able to hear so from the log: the leader may be
            # the very member whose disk was recorded while this node was away, or that it does not know yet to be.
            for node, disk_id in announce.known_disks:
                if disk_id and node in self.known and not self.disks.get(node):
                    self.recorded(node, disk_id)
        return refusal

    def heard_form(self, name: str, form: Form) -> None:
        """
        Join the cluster that a peer belongs to, unless there is nothing to do or the peer is not to be believed.

        Raises:
            StartError: That cluster knows this node by another disk.
        """
        peer = self.known[name]
        if self.is_formed or peer.announce is None or peer.problem or not form.cluster_uuid:
            return
        if sorted(node for node, _ in form.disks) != self._members:
            return
        self._check_own_disk(form.disks)
        self._adopt(form.cluster_uuid, form.disks, f"joined the cluster that {name!r} belongs to")

    def _check_own_disk(self, disks: Iterable[tuple[str, bytes]]) -> None:
        ours = dict(disks).get(self.node_id, b"")
        if ours and ours != self.identity.disk_id:
            raise StartError(_wiped(self.node_id, ours, self.identity.disk_id))

    def _note_stranger(self, name: str, announce: Announce) -> None:
        problem = (
            f"member {name!r} belongs to another cluster ({announce.cluster_uuid.hex()[:12]}) than this node "
            f"({self.identity.cluster_uuid.hex()[:12]}): one of them runs with the wrong data_dir"
        )
        self.known[name].problem = problem
        self._say(logging.ERROR, "cluster.differs", problem, peer=name)

    def is_known_to(self, name: str) -> bool:
        """The peer belongs to our cluster and has announced that it knows this node by the disk that it is on."""
        announce = self.known[name].announce
        return (
            announce is not None
            and self.is_formed
            and announce.cluster_uuid == self.identity.cluster_uuid
            and (self.node_id, self.identity.disk_id) in announce.known_disks
        )

    def _judge_disk(self, name: str, announce: Announce) -> Refusal | None:
        peer = self.known[name]
        known = self.disks.get(name, b"")
        if not known:
            if (name, announce.disk_id) not in self.to_record:
                self.to_record.append((name, announce.disk_id))
            peer.problem = f"the disk of member {name!r} is new and not recorded yet"
            return None
        if known != announce.disk_id:
            peer.problem = _wiped(name, known, announce.disk_id)
            self._say(logging.ERROR, "disk.differs", peer.problem, peer=name)
            return Refusal("disk-differs", peer.problem)
        peer.problem = ""
        peer.is_trusted = announce.cluster_uuid == self.identity.cluster_uuid
        return None

    def recorded(self, name: str, disk_id: bytes) -> None:
        """The log says that this is the member's disk, here or where a member has told of it."""
        self.disks[name] = disk_id
        recorded = dict(self.identity.recorded)
        if (dict(self.identity.disks) | recorded).get(name) != disk_id:
            # Or a restart before the first snapshot would forget it, and with it a vote that a majority may need.
            self._write(recorded=tuple(sorted((recorded | {name: disk_id}).items())))
        peer = self.known.get(name)
        if peer is None or peer.announce is None or not self.is_formed:
            return
        if peer.announce.members_digest == self._digest and peer.announce.cluster_uuid:
            was_trusted = peer.is_trusted
            self._judge_disk(name, peer.announce)
            if peer.is_trusted and not was_trusted:
                self.vouched.append(name)

    def acknowledged(self, name: str, term: int, index: int) -> None:
        """The peer's disk has acknowledged this much to us; what it comes back with is measured by it."""
        peer = self.known[name]
        if (term, index) >= peer.remembered:
            peer.remembered = (term, index)
            peer.remembered_by = peer.incarnation
            peer.is_behind = False

    # -- formation -----------------------------------------------------------------------------------------

    def try_to_form(self, *, has_waited: bool = False) -> None:
        """
        Back a candidate, become one, or form the cluster, if what the others have announced allows it.

        What has changed is to be written down before anything more is announced (`is_unwritten`).

        Args:
            has_waited: Whoever is there has had the time to answer: a quorum may do, if that was asked for.
        """
        if self.is_formed or any(
            p.announce is not None and p.announce.cluster_uuid for p in self.known.values()
        ):
            return  # there is a cluster: its members decide whether we belong to it
        # What one that is away has said is no longer enough: it may be part of a cluster by now.
        heard = {
            name: peer.announce
            for name, peer in self.known.items()
            if peer.announce is not None and peer.is_up and not peer.problem
        }
        candidate = min((name for name, announce in heard.items() if announce.backs == name), default="")
        if candidate and self._may_back(candidate):
            self._write(backs=candidate)
            return
        backed = self.identity.backs
        if backed not in ("", self.node_id):
            return
        quorum = len(self._members) // 2 + 1
        is_complete = len(heard) == len(self.known)
        if not backed:
            # Of those that have not left it to another.
            is_lowest = all(self.node_id < name for name, announce in heard.items() if not announce.backs)
            can_bootstrap = self._wants_bootstrap and has_waited and len(heard) + 1 >= quorum
            if not (is_complete and is_lowest) and not can_bootstrap:
                return
            self._write(backs=self.node_id)
        backers = [announce for announce in heard.values() if announce.backs == self.node_id]
        # Who backs this node forms nothing itself any more: what it was asked for, this node does.
        wants_bootstrap = self._wants_bootstrap or any(announce.wants_bootstrap for announce in backers)
        if len(backers) + 1 < quorum or not (is_complete or wants_bootstrap):
            return
        disks = tuple(
            (name, self.identity.disk_id if name == self.node_id else self._announced_disk(name))
            for name in self._members
        )
        self._adopt(self._random_bytes(16), disks, "formed a new cluster")

    def _may_back(self, candidate: str) -> bool:
        """Whom this node backs may count on it, until it has said that it backs another itself."""
        backed = self.identity.backs
        if backed == self.node_id:
            return candidate < backed  # never upwards: so one candidate always remains
        announce = self.known[backed].announce if backed else None
        return not backed or (announce is not None and announce.backs not in ("", backed))

    def _announced_disk(self, name: str) -> bytes:
        announce = self.known[name].announce
        return announce.disk_id if announce is not None else b""

    def _write(self, **changes: Any) -> None:
        self.identity = self.identity._replace(**changes)
        self.is_unwritten = True

    def _adopt(self, cluster_uuid: bytes, disks: tuple[tuple[str, bytes], ...], how: str) -> None:
        self._write(cluster_uuid=cluster_uuid, disks=disks, backs="")
        self.disks = dict(disks)
        self._wants_bootstrap = False
        self._say(
            logging.INFO,
            "cluster.formed",
            f"{how}: id {cluster_uuid.hex()[:12]}",
            cluster_uuid=cluster_uuid.hex(),
        )

    def formed(self) -> list[tuple[str, Refusal | Form]]:
        """The new identity is durable: what to send to those whose announcements came before it."""
        messages: list[tuple[str, Refusal | Form]] = []
        for name, peer in self.known.items():
            announce = peer.announce
            if announce is None or announce.members_digest != self._digest:
                continue
            if announce.cluster_uuid not in (b"", self.identity.cluster_uuid):
                self._note_stranger(name, announce)
            else:
                refusal = self._judge_disk(name, announce)
                if refusal is not None:
                    messages.append((name, refusal))
                elif not announce.cluster_uuid:
                    messages.append((name, Form(self.identity.cluster_uuid, self.identity.disks)))
        return messages

    def missing(self) -> list[str]:
        """Why there is no cluster yet, a line for each member."""
        lines = []
        for name, peer in self.known.items():
            if peer.problem:
                lines.append(peer.problem)
            elif peer.announce is None:
                lines.append(f"member {name!r} has not answered")
            elif not peer.is_up:
                lines.append(f"member {name!r} is away, or cannot be reached from here")
        return [*lines, *self.awaited()]

    def awaited(self) -> list[str]:
        """Of each member that is away: who has left it to that one to form the cluster. Until it is back, they form none."""
        announced = {
            name: peer.announce
            for name, peer in self.known.items()
            if peer.announce is not None and peer.announce.members_digest == self._digest
        }
        if any(announce.cluster_uuid for announce in announced.values()):
            return []
        backs = {self.node_id: self.identity.backs} | {name: a.backs for name, a in announced.items()}
        waiting: dict[str, list[str]] = {}
        for name in sorted(backs):
            if name != self.node_id and not self.known[name].is_up:
                continue
            last = name
            for _ in backs:  # whom it backs may have left it to another
                last = backs.get(last) or last
            if last in self.known and not self.known[last].is_up:
                waiting.setdefault(last, []).append(repr(name))
        return [
            f"member {last!r} may have formed the cluster, as {' and '.join(names)} left it to do so, and is away or cannot be "
            "reached from here: start it. Only if its disk is lost and no member belongs to a cluster, start it on an "
            "empty directory, with all members running and none with bootstrap=True"
            for last, names in waiting.items()
        ]

    def _say(self, level: int, name: str, message: str, **fields: object) -> None:
        self._events.append(LogEvent(level, name, message, fields))


def _wiped(name: str, known: bytes, found: bytes) -> str:
    return (
        f"member {name!r} came with disk {found.hex()[:12]}, but this cluster knows it by disk {known.hex()[:12]}: its "
        "data_dir was wiped, copied or swapped, and with it may have gone votes and entries that the others count "
        "on. Give it its own directory back; a lost disk cannot rejoin under the same name"
    )
