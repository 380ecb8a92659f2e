"""At most one cluster forms, whatever is lost, late or restarted; and when all hear each other again, one does.

`Peers` alone, with every announcement on its way for as long as chance likes, and disks that keep what was written.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from coordlib.node.peers import Peers
from coordlib.storage.base import FORMAT_VERSION, DiskIdentity
from coordlib.wire.messages import Announce, Form

SCHEDULES = 200
STEPS = 150


class Founders:
    """Members that try to form a cluster, and what is under way between them."""

    def __init__(self, chance: random.Random, count: int) -> None:
        self.chance = chance
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self.disks = {
            name: DiskIdentity(FORMAT_VERSION, name, name.encode() * 8, "shop", b"", ())
            for name in self.names
        }
        self.runs = dict.fromkeys(self.names, 0)
        self.running: dict[str, Peers] = {}
        self.under_way: list[tuple[str, int, str, int, Announce | Form]] = []
        self.clusters: set[bytes] = set()
        self.are_mortal = True  # their power may fail around every write

    def start(self, name: str, *, bootstrap: bool) -> None:
        self.runs[name] += 1
        self.running[name] = Peers(
            name,
            dict.fromkeys(self.names, ""),
            self.disks[name],
            wants_bootstrap=bootstrap,
            random_bytes=self.chance.randbytes,
            events=[],
        )
        self.go_on(name)

    def stop(self, name: str) -> None:
        self.running.pop(name, None)
        for peers in self.running.values():
            peers.known[name].is_up = False

    def go_on(self, name: str, *, has_waited: bool = False) -> None:
        """Let it decide, write that down, and tell everybody; or lose its power before it is written, or told."""
        self.running[name].try_to_form(has_waited=has_waited)
        self.write(name)

    def write(self, name: str) -> None:
        peers = self.running[name]
        if not peers.is_unwritten:
            return None
        identity = peers.identity
        dies_at = self.chance.randrange(40) if self.are_mortal else -1
        if dies_at == 0:
            return self.stop(name)
        assert not self.disks[name].cluster_uuid
        self.disks[name] = identity
        if identity.cluster_uuid:
            self.clusters.add(identity.cluster_uuid)
        if dies_at == 1:
            return self.stop(name)
        peers.is_unwritten = False
        if identity.cluster_uuid:
            for receiver, message in self.running[name].formed():
                self.send(name, receiver, message)
        return self.announce(name, self.names)

    def announce(self, name: str, receivers: Iterable[str]) -> None:
        for receiver in receivers:
            if receiver != name:
                self.send(name, receiver, self.running[name].announce_to(receiver, 0))

    def send(self, name: str, receiver: str, message: Any) -> None:
        self.under_way.append((name, self.runs[name], receiver, self.runs[receiver], message))

    def deliver(self, place: int) -> None:
        sender, sender_run, receiver, receiver_run, message = self.under_way.pop(place)
        if receiver not in self.running or receiver_run != self.runs[receiver]:
            return
        peers = self.running[receiver]
        peer = peers.known[sender]
        peer.is_up = sender in self.running
        if sender_run < peer.incarnation:
            return  # the links drop what a run before the newest one sent
        if sender_run > peer.incarnation:
            peer.incarnation, peer.announce = sender_run, None
        if isinstance(message, Form):
            peers.heard_form(sender, message)
            self.write(receiver)
            return
        answer = peers.heard(sender, message)
        if isinstance(answer, Form):
            self.send(receiver, sender, answer)
        self.go_on(receiver)

    def deliver_all(self) -> None:
        while self.under_way:
            self.deliver(0)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("bootstrap_share", [0.0, 0.5, 1.0])
def test_one_cluster_forms_whatever_is_lost_or_late(count: int, bootstrap_share: float) -> None:
    """Announcements come in any order, late, or never; members restart, with and without bootstrap=True."""
    formed_early = 0
    for seed in range(SCHEDULES):
        chance = random.Random(f"{count} {bootstrap_share} {seed}")
        founders = Founders(chance, count)
        for _ in range(STEPS):
            name = chance.choice(founders.names)
            if name not in founders.running:
                founders.start(name, bootstrap=chance.random() < bootstrap_share)
            elif chance.random() < 0.03:
                founders.stop(name)
            elif chance.random() < 0.2:
                founders.go_on(name, has_waited=True)
            elif chance.random() < 0.2:
                founders.announce(name, [chance.choice(founders.names)])
            elif founders.under_way:
                place = chance.randrange(len(founders.under_way))
                if chance.random() < 0.8:
                    founders.deliver(place)
                else:
                    del founders.under_way[place]
            assert len(founders.clusters) <= 1, f"schedule {seed}: two clusters"
        formed_early += len(founders.clusters)
        founders.are_mortal = False
        for name in founders.names:
            if name not in founders.running:
                founders.start(name, bootstrap=False)
        for _ in range(12):
            for name in founders.names:
                founders.announce(name, founders.names)
            founders.deliver_all()
        assert len({identity.cluster_uuid for identity in founders.disks.values()}) == 1, f"schedule {seed}"
        assert founders.clusters == {founders.disks["n1"].cluster_uuid}, f"schedule {seed}"
    assert formed_early or bootstrap_share == 0.0


def settle(founders: Founders) -> None:
    """Everybody runs, hears everybody, and has the time to."""
    for _ in range(4):
        for name in founders.names:
            if name not in founders.running:
                founders.start(name, bootstrap=False)
            founders.announce(name, founders.names)
        founders.deliver_all()


def left_to(candidate: str) -> Founders:
    """n1, n2, n3: another member has left it to the candidate to form the cluster, which is gone before it hears of it."""
    founders = Founders(random.Random(1), 3)
    founders.are_mortal = False
    other = "n2" if candidate == "n1" else "n1"
    for name in (other, candidate):
        founders.start(name, bootstrap=name == candidate)
    founders.announce(other, [candidate])
    founders.deliver_all()
    founders.go_on(candidate, has_waited=True)
    assert founders.disks[candidate].backs == candidate
    while founders.disks[other].backs != candidate:
        founders.deliver(0)
    founders.stop(candidate)
    founders.under_way.clear()
    return founders


@pytest.mark.parametrize("candidate", ["n1", "n2"])
def test_whom_a_member_left_it_to_is_waited_for_and_named(candidate: str) -> None:
    """By that member, at once and after a restart, and by all that hear of it; nothing forms meanwhile."""
    founders = left_to(candidate)
    other = "n2" if candidate == "n1" else "n1"
    (line,) = founders.running[other].awaited()
    words = f"member {candidate!r} may have formed the cluster, as {other!r} left it to do so, and is away"
    assert line.startswith(words)
    founders.stop(other)
    for name in (other, "n3"):
        founders.start(name, bootstrap=True)
    for name in (other, "n3"):
        founders.announce(name, founders.names)
    founders.deliver_all()
    for name in (other, "n3", other, "n3"):
        founders.go_on(name, has_waited=True)
        founders.deliver_all()
    assert not founders.clusters
    assert [founders.running[name].awaited() for name in (other, "n3")] == [[line], [line]]
    assert line in founders.running["n3"].missing()


@pytest.mark.parametrize("candidate", ["n1", "n2"])
def test_whom_a_member_left_it_to_may_come_back_on_an_empty_disk(candidate: str) -> None:
    """As the message says: with all members running and none with bootstrap=True."""
    founders = left_to(candidate)
    founders.disks[candidate] = founders.disks[candidate]._replace(disk_id=b"new", backs="")
    settle(founders)
    assert len(founders.clusters) == 1
    assert {identity.cluster_uuid for identity in founders.disks.values()} == founders.clusters


def test_what_a_member_said_before_it_went_away_is_not_enough() -> None:
    """It was empty then, and is part of a cluster now; of which the other one that is has lost its disk."""
    founders = Founders(random.Random(1), 3)
    founders.are_mortal = False
    for name in founders.names:
        founders.start(name, bootstrap=name == "n2")
    founders.announce("n3", ["n1"])
    founders.deliver_all()
    founders.announce("n3", ["n2"])
    founders.deliver_all()
    founders.go_on("n2", has_waited=True)
    while founders.under_way:
        if "n1" in (founders.under_way[0][0], founders.under_way[0][2]):
            del founders.under_way[0]  # n1 is cut off
        else:
            founders.deliver(0)
    assert founders.disks["n1"].cluster_uuid == b""
    assert founders.disks["n2"].cluster_uuid == founders.disks["n3"].cluster_uuid != b""
    founders.stop("n2")
    founders.stop("n3")
    founders.disks["n2"] = DiskIdentity(FORMAT_VERSION, "n2", b"new", "shop", b"", ())
    founders.start("n2", bootstrap=False)
    for _ in range(3):
        founders.announce("n1", ["n2"])
        founders.announce("n2", ["n1"])
        founders.deliver_all()
    assert len(founders.clusters) == 1
    assert founders.running["n1"].missing() == ["member 'n3' is away, or cannot be reached from here"]


def test_only_who_may_have_formed_the_cluster_is_named() -> None:
    """Not one that has left it to another, nor any while a cluster is known."""
    founders = Founders(random.Random(1), 4)
    for name in founders.names:
        founders.start(name, bootstrap=False)
    n3 = founders.running["n3"]
    empty = founders.running["n2"].announce_to("n3", 0)
    n3.heard("n2", empty._replace(backs="n1"))
    n3.heard("n4", empty._replace(backs="n2"))
    n3.known["n4"].is_up = True
    (line,) = n3.awaited()
    assert line.startswith("member 'n1' may have formed the cluster, as 'n4' left it to do so")
    n3.heard("n1", empty._replace(cluster_uuid=b"u" * 16))
    assert n3.awaited() == []


def test_an_emptied_member_does_not_bootstrap_for_those_who_left_it_to_it() -> None:
    """Its lost disk may have formed a cluster, with a member that is away: all must be heard."""
    founders = left_to("n2")
    founders.stop("n1")
    founders.disks["n2"] = founders.disks["n2"]._replace(disk_id=b"new", backs="")
    founders.start("n2", bootstrap=False)
    founders.start("n1", bootstrap=True)
    for _ in range(3):
        for name in ("n1", "n2"):
            founders.announce(name, founders.names)
        founders.deliver_all()
        for name in ("n1", "n2"):
            founders.go_on(name, has_waited=True)
    assert not founders.clusters


@pytest.mark.parametrize("seed", range(150))
def test_a_lost_disk_or_a_shorter_list_does_not_keep_all_from_forming(seed: int) -> None:
    """Before anything has formed, one directory is emptied, or one member taken off every list: the others go on."""
    chance = random.Random(f"lost {seed}")
    founders = Founders(chance, chance.choice((3, 4, 5)))
    for _ in range(40):
        name = chance.choice(founders.names)
        if name not in founders.running:
            founders.start(name, bootstrap=chance.random() < 0.5)
        elif chance.random() < 0.05:
            founders.stop(name)
        elif chance.random() < 0.3:
            founders.go_on(name, has_waited=True)
        elif founders.under_way and chance.random() < 0.7:
            founders.deliver(chance.randrange(len(founders.under_way)))
        else:
            founders.announce(name, founders.names)
        if founders.clusters:
            return
    gone = chance.choice(founders.names)
    for name in list(founders.running):
        founders.stop(name)
    founders.under_way.clear()
    if seed % 2:
        founders.names.remove(gone)
        del founders.disks[gone]
    else:
        founders.disks[gone] = founders.disks[gone]._replace(disk_id=b"new", backs="")
    founders.are_mortal = False
    settle(founders)
    assert len(founders.clusters) == 1
    assert {identity.cluster_uuid for identity in founders.disks.values()} == founders.clusters


def test_what_a_candidate_said_before_it_was_one_frees_nobody() -> None:
    """Its earlier announcement arrives late, and says that it backs nobody: it is a candidate all the same."""
    founders = Founders(random.Random(1), 3)
    for name in founders.names:
        founders.start(name, bootstrap=name != "n2")
    early = {name: founders.running[name].announce_to("n2", 0) for name in ("n1", "n3")}
    n2 = founders.running["n2"]
    for peer in n2.known.values():
        peer.is_up = True
    n2.heard("n3", early["n3"]._replace(backs="n3"))
    founders.go_on("n2")
    n2.heard("n3", early["n3"])
    n2.heard("n1", early["n1"]._replace(backs="n1"))
    founders.go_on("n2")
    assert founders.disks["n2"].backs == "n3"
    n2.heard("n3", early["n3"]._replace(backs="n1"))
    founders.go_on("n2")
    assert founders.disks["n2"].backs == "n1"


def test_who_was_backed_under_another_list_of_members_is_not_waited_for() -> None:
    """A member that is not in the list any more forms nothing that this node could be part of."""
    identity = DiskIdentity(FORMAT_VERSION, "n1", b"1" * 16, "shop", b"", (), "n9")
    peers = Peers(
        "n1", {"n1": ""}, identity, wants_bootstrap=False, random_bytes=random.Random(1).randbytes, events=[]
    )
    peers.try_to_form()
    assert peers.is_unwritten and peers.is_formed
