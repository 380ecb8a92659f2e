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

    def go_on(self, name: str, *, has_waited: bool = False) -> None:
        """Let it decide, write that down, and tell everybody; or lose its power before it is written, or told."""
        identity = self.running[name].try_to_form(has_waited=has_waited)
        if identity is not None:
            self.write(name, identity)

    def write(self, name: str, identity: DiskIdentity) -> None:
        dies_at = self.chance.randrange(40)
        if dies_at == 0:
            return self.stop(name)
        assert not self.disks[name].cluster_uuid
        self.disks[name] = identity
        if identity.cluster_uuid:
            self.clusters.add(identity.cluster_uuid)
        if dies_at == 1:
            return self.stop(name)
        if identity.cluster_uuid:
            for receiver, message in self.running[name].formed():
                self.send(name, receiver, message)
        return self.announce(name, self.names)

    def announce(self, name: str, receivers: Iterable[str]) -> None:
        for receiver in receivers:
            if receiver != name:
                self.send(name, receiver, self.running[name].announce_to(receiver, 0, 0, 0))

    def send(self, name: str, receiver: str, message: Any) -> None:
        self.under_way.append((name, self.runs[name], receiver, self.runs[receiver], message))

    def deliver(self, place: int) -> None:
        sender, sender_run, receiver, receiver_run, message = self.under_way.pop(place)
        if receiver not in self.running or receiver_run != self.runs[receiver]:
            return
        peers = self.running[receiver]
        peer = peers.known[sender]
        if sender_run < peer.incarnation:
            return  # the links drop what a run before the newest one sent
        if sender_run > peer.incarnation:
            peer.incarnation, peer.announce = sender_run, None
        if isinstance(message, Form):
            identity = peers.heard_form(sender, message)
            if identity is not None:
                self.write(receiver, identity)
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
        chance.randrange = lambda *args: 2  # type: ignore[method-assign]  # nobody dies any more
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


def test_whom_a_member_left_it_to_is_waited_for_and_named() -> None:
    """A member that has backed one does not go back on it while that one is away; it says what to do."""
    founders = Founders(random.Random(1), 3)
    for name in ("n1", "n2"):
        founders.start(name, bootstrap=name == "n1")
    founders.announce("n2", ["n1"])
    founders.deliver_all()
    founders.go_on("n1", has_waited=True)
    assert [message.backs for *_, message in founders.under_way if isinstance(message, Announce)] == [
        "n1",
        "n1",
    ]
    founders.deliver(0)
    founders.stop("n1")
    founders.under_way.clear()
    founders.stop("n2")
    for name in ("n2", "n3"):
        founders.start(name, bootstrap=True)
        founders.announce(name, founders.names)
    founders.deliver_all()
    for name in ("n2", "n3", "n2", "n3"):
        founders.go_on(name, has_waited=True)
        founders.deliver_all()
    assert not founders.clusters
    assert founders.running["n2"].missing() == [
        "member 'n1' has not answered",
        "this node has left it to member 'n1' to form the cluster, and waits for it: start that member, on an empty "
        "directory if it has lost its own",
    ]
    founders.disks["n1"] = founders.disks["n1"]._replace(disk_id=b"1" * 16, backs="")
    founders.start("n1", bootstrap=False)
    for _ in range(3):
        for name in founders.names:
            founders.announce(name, founders.names)
        founders.deliver_all()
    assert len({identity.cluster_uuid for identity in founders.disks.values()} - {b""}) == 1


def test_what_a_candidate_said_before_it_was_one_frees_nobody() -> None:
    """Its earlier announcement arrives late, and says that it backs nobody: it is a candidate all the same."""
    founders = Founders(random.Random(1), 3)
    for name in founders.names:
        founders.start(name, bootstrap=name != "n2")
    early = {name: founders.running[name].announce_to("n2", 0, 0, 0) for name in ("n1", "n3")}
    n2 = founders.running["n2"]
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
    assert peers.try_to_form() is not None
