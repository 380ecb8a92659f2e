"""How a cluster forms, who may join, and whose disk is refused: real kernels in the simulated world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from coordlib.api.maps import _MapBase
from coordlib.cbor import decode
from coordlib.config import Timing
from coordlib.errors import StartError
from coordlib.machine import commands
from coordlib.machine.effects import Applied
from coordlib.node.kernel import MemberKernel
from coordlib.node.peers import Peers
from coordlib.raft.messages import Entry, EntryKind
from coordlib.storage.base import DiskIdentity
from coordlib.testing.disk import SimulatedFileSystem
from coordlib.testing.simulation.processes import WALL_MS, MemberProcess
from coordlib.testing.simulation.surroundings import NetworkProfile
from coordlib.testing.simulation.world import World
from coordlib.wire.messages import Announce, Form, Refusal

PATIENCE_MS = 15_000


@pytest.fixture
def world() -> Iterator[World]:
    with World(1) as world:
        yield world


def all_work(world: World) -> bool:
    return all(process.kernel.has_usable_leader for process in world.up_members)


def formed(world: World) -> set[bytes]:
    """The ids of the clusters that there are."""
    return {p.kernel.peers.identity.cluster_uuid for p in world.up_members if p.kernel.is_formed}


def event_names(process: MemberProcess) -> list[str]:
    return [event.name for event in process.events]


def only_fatal(world: World, name: str, word: str) -> None:
    """This member, and no other, stopped with a message that has the word."""
    assert [found for found, _ in world.fatal] == [name], world.fatal
    error = world.fatal[0][1]
    assert isinstance(error, StartError)
    assert word in str(error)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_empty_members_form_one_cluster(count: int) -> None:
    """All of them, with everybody's disk written down."""
    with World(3, members=count) as world:
        world.start_all()
        assert world.run(PATIENCE_MS, lambda: all_work(world))
        assert len(formed(world)) == 1
        disks = {dict(p.kernel.peers.disks)[name] for p in world.up_members for name in world.members}
        assert len(disks) == count


@pytest.mark.parametrize("sender", ["n1", "n2", "n3"])
def test_a_member_whose_word_was_lost_is_asked_again(world: World, sender: str) -> None:
    """One frame may be lost or damaged without its connection; found by seed 91, in which one was."""
    lost = []

    def lossy(process: MemberProcess) -> None:
        send = process._links.send

        def send_most(name: str, messages: Sequence[tuple[int, Any]], **more: Any) -> bool:
            if any(isinstance(m, Announce) and m.cluster_uuid for _, m in messages) and name not in lost:
                lost.append(name)
                return True
            return bool(send(name, messages, **more))

        process._links.send = send_most

    world.start_all()
    lossy(world.member(sender))
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    assert sorted(lost) == [name for name in world.members if name != sender]
    world.run(3000)
    for process in world.up_members:
        assert all(peer.is_trusted for peer in process.kernel.peers.known.values())


def test_nothing_forms_while_one_member_is_missing(world: World) -> None:
    """It might be the one that belongs to a cluster already. When it comes, all goes on."""
    for name in ("n1", "n2"):
        world.start_member(name)
    world.run(PATIENCE_MS)
    assert formed(world) == set()
    assert world.member("n1").kernel.peers.missing() == ["member 'n3' has not answered"]
    world.start_member("n3")
    assert world.run(PATIENCE_MS, lambda: all_work(world))


def test_bootstrap_forms_with_a_quorum(world: World) -> None:
    """And the one that comes later joins, its disk being recorded through the log."""
    world.start_member("n1", bootstrap=True)
    world.start_member("n2")
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    late = world.start_member("n3")
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    assert len(formed(world)) == 1
    disk = late.kernel.peers.identity.disk_id
    assert world.run(5000, lambda: all(p.kernel.peers.disks.get("n3") == disk for p in world.up_members))


def test_bootstrap_alone_forms_nothing(world: World) -> None:
    """One of three is no quorum."""
    world.start_member("n2", bootstrap=True)
    world.run(PATIENCE_MS)
    assert formed(world) == set()


@pytest.mark.parametrize("seed", range(10))
def test_all_that_bootstrap_form_one_cluster(seed: int) -> None:
    """Whoever wants to, the lowest name does, in whatever order they hear of each other."""
    with World(seed) as world:
        for name in world.members:
            world.start_member(name, bootstrap=True)
        assert world.run(PATIENCE_MS, lambda: all_work(world))
        assert len(formed(world)) == 1


@pytest.mark.parametrize("seed", range(10))
def test_two_of_three_that_bootstrap_form_one_cluster(seed: int) -> None:
    """The third is missing, and both are asked to go on without it."""
    with World(seed) as world:
        for name in ("n2", "n3"):
            world.start_member(name, bootstrap=True)
        assert world.run(PATIENCE_MS, lambda: all_work(world))
        assert len(formed(world)) == 1


@pytest.mark.parametrize("seed", range(12))
def test_crashes_in_the_middle_of_forming_leave_one_cluster(seed: int) -> None:
    """Whatever was on the disks of whom."""
    with World(seed) as world:
        chance = world.choices.stream("test")
        world.start_all()
        for _ in range(4):
            victim = chance.choice(world.up_members)
            victim.crash_within(12)
            world.run(chance.randint(1, 60))
            if victim.is_up:
                victim.crash()
            world.run(chance.randint(1, 100))
            world.start_member(victim.name)
        assert world.run(PATIENCE_MS, lambda: all_work(world)), [
            p.kernel.peers.missing() for p in world.up_members
        ]
        assert len(formed(world)) == 1
        assert world.fatal == []


@pytest.mark.parametrize("is_away", [False, True])
def test_a_member_whose_disk_was_recorded_later_can_lead_those_that_restart(
    world: World, is_away: bool
) -> None:
    """They have not applied the record, or do not even have it, and hear of it from the third."""
    for name in ("n1", "n2"):
        world.start_member(name, bootstrap=True)
    assert world.run(PATIENCE_MS, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
    if is_away:
        # The only other one knows the record; this one was away, and the quorum that it was logged by is theirs.
        world.member("n1").kill()
    world.start_member("n3")
    if is_away:
        world.run(2000)
        world.start_member("n1")
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    assert world.run(PATIENCE_MS, lambda: all(b"" not in _disks(p) for p in world.up_members))
    third = world.member("n3")
    if third is not world.leader:
        leader = world.leader
        assert leader is not None and leader.kernel.raft is not None
        leader.kernel.raft.transfer_leadership("n3")
        leader.wake()
        assert world.run(PATIENCE_MS, lambda: third.kernel.is_leader)
    assert third.kernel.raft is not None
    term = third.kernel.raft.term
    world.member("n1").crash()
    world.run(100)
    back = world.start_member("n1")
    assert world.run(3000, lambda: back.kernel.has_usable_leader), back.kernel.status(back.clock())[
        "problems"
    ]
    assert third.kernel.is_leader and third.kernel.raft.term == term
    assert back.kernel.status(back.clock())["problems"] == []
    assert world.fatal == []


def test_a_disk_that_was_recorded_later_is_known_after_a_restart_of_all() -> None:
    """Before any snapshot, and with one of the founders gone for good. Found by seeds 80, 416, 578, 798 and 946."""
    with World(1, members=4) as world:
        for name in ("n1", "n2", "n3"):
            world.start_member(name, bootstrap=True)
        assert world.run(PATIENCE_MS, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        world.start_member("n4")
        assert world.run(PATIENCE_MS, lambda: all_work(world))
        assert world.run(PATIENCE_MS, lambda: all(b"" not in _disks(p) for p in world.up_members))
        assert [p.name for p in world.up_members if p.kernel.peers.identity.recorded] == [
            "n1",
            "n2",
            "n3",
            "n4",
        ]
        for process in world.up_members:
            process.crash()
        for name in ("n1", "n2", "n4"):
            world.start_member(name)
        assert world.run(PATIENCE_MS, lambda: all_work(world))
        assert world.fatal == []


def _disks(process: MemberProcess) -> list[bytes]:
    return [disk_id for _, _, disk_id in process.kernel.machine.members()]


def test_a_wiped_disk_is_refused(world: World) -> None:
    """What it had promised is lost; the error names the remedy, and the others go on."""
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    world.member("n2").kill()
    world.disks["n2"] = SimulatedFileSystem()
    world.start_member("n2")
    world.run(3000)
    only_fatal(world, "n2", "wiped")
    assert world.run(PATIENCE_MS, lambda: all_work(world))


def test_a_late_refusal_does_not_stop_a_member_on_its_own_disk(world: World) -> None:
    """It answers what a run on a wiped directory said, before the operator gave the member its own back."""
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    member = world.member("n2")
    member.kernel.peer_messages(
        "n1", [(0, Refusal("disk-differs", "its data_dir was wiped"))], member.clock()
    )
    assert member.kernel.counters["stale_refusals"] == 1


def test_a_wiped_majority_does_not_form_a_new_cluster(world: World) -> None:
    """One that remembers is enough to refuse."""
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    (cluster,) = formed(world)
    for name in ("n1", "n2"):
        world.member(name).kill()
        world.disks[name] = SimulatedFileSystem()
        world.start_member(name)
    world.run(PATIENCE_MS)
    assert {name for name, _ in world.fatal} == {"n1", "n2"}
    assert formed(world) == {cluster}


def test_a_member_of_another_cluster_is_told_apart(world: World) -> None:
    """Nobody joins it, nobody stops because of it, and both say why."""
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    with World(2) as other:
        other.start_all()
        assert other.run(PATIENCE_MS, lambda: all_work(other))
        other.member("n3").kill()
        stranger = other.disks["n3"]
    world.member("n3").kill()
    world.disks["n3"] = stranger
    lost = world.start_member("n3")
    world.run(3000)
    assert world.fatal == []
    assert [process.name for process in world.up_members if process.kernel.has_usable_leader] == ["n1", "n2"]
    for process, peer in ((world.member("n1"), "n3"), (lost, "n1")):
        assert "belongs to another cluster" in process.kernel.peers.known[peer].problem


def test_members_with_different_lists_do_not_form(world: World) -> None:
    """And name the difference."""
    for name in ("n1", "n2"):
        world.start_member(name)
    names = world.members
    world.members = {**names, "n4": "memory://n4"}
    world.start_member("n3")
    world.members = names
    world.run(PATIENCE_MS)
    assert formed(world) == set()
    assert "members.differ" in event_names(world.member("n1"))
    assert "another list of members" in world.member("n1").kernel.peers.missing()[-1]


def test_a_disk_that_is_behind_its_word_does_not_elect_a_leader(world: World) -> None:
    """
    Its old copy was put back: it has forgotten what it acknowledged, and its vote could lose it.

    It catches up from the others and counts again.
    """
    world.start_all()
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    world.run(500)
    # A follower: it is the leader that remembers what the others acknowledged.
    member = next(process for process in world.up_members if process is not world.leader)
    name = member.name
    old = world.disks[name].clone()
    client = world.start_client("c1")
    assert world.run(5000, lambda: client.kernel.has_usable_leader)
    world.run(500)
    member.kill()
    world.disks[name] = old
    world.start_member(name)
    assert world.run(PATIENCE_MS, lambda: all_work(world))
    others = [process for process in world.up_members if process.name != name]
    assert any("disk.behind" in event_names(process) for process in others)
    leader = world.leader
    assert leader is not None
    assert world.run(
        5000,
        lambda: (
            world.member(name).kernel.machine.applied_index == leader.kernel.machine.applied_index
            and not any(p.kernel.peers.known[name].is_behind for p in others)
        ),
    )
    assert world.fatal == []


@pytest.mark.parametrize("count", [2, 3])
def test_a_reconnect_does_not_make_a_member_look_as_if_its_disk_had_lost_something(count: int) -> None:
    """What it announced at its start is not what its disk holds now. Found by review, and by seed 2208."""
    with World(5, members=count, network=NetworkProfile(late_chance=0.0)) as world:
        world.start_all()
        assert world.run(PATIENCE_MS, lambda: all_work(world))
        leader = world.leader
        assert leader is not None
        other, *rest = [process for process in world.up_members if process is not leader]
        for process in rest:
            process.crash()
        world.run(1500)
        pairs = [(leader.name, other.name), (other.name, leader.name)]
        world.hold_all(pairs)
        for number in range(3):  # the leader's log becomes the longer one: it needs the other's vote
            leader.start_operation(_MapBase("m", None, 3000)._put_gen("k", number, None))
        world.run(50)
        for link in world.links():
            if link.dialer.process is leader and link.endpoint == world.members[other.name]:
                link.dialer.reset(link)
        world.run(3000)
        world.release_all(pairs)
        assert world.run(5000, lambda: all_work(world))
        assert not any(event_names(process).count("disk.behind") for process in world.up_members)


def test_the_first_commands_of_a_new_cluster_are_dated_right(world: World) -> None:
    """The leader hears the clocks of a quorum as soon as it leads, not when they are told next: sessions come later."""
    world.start_all()
    dates: list[int] = []

    def opened(name: str, entry: Entry, applied: Applied) -> None:
        if entry.kind == EntryKind.COMMAND:
            log_time_ms, _, _, _, operation = commands.unpack_entry(entry.data)
            if decode(operation)[0] == commands.OpCode.SESSION_OPEN:
                dates.append(log_time_ms)

    world.on_applied = opened
    # Three sessions, each applied by three members.
    assert world.run(PATIENCE_MS, lambda: len(dates) >= 9)
    assert all(abs(date - WALL_MS) < 60_000 for date in dates), dates


@pytest.mark.parametrize("is_same_run", [True, False])
def test_only_another_run_can_have_lost_what_was_acknowledged(is_same_run: bool) -> None:
    """An announcement that arrives after what the same run has acknowledged since is late, and no lost disk."""
    disks = (("n1", b"1" * 16), ("n2", b"2" * 16))
    identity = DiskIdentity(1, "n1", b"1" * 16, "shop", b"c" * 16, disks)
    peers = Peers(
        "n1",
        dict.fromkeys(("n1", "n2"), ""),
        identity,
        wants_bootstrap=False,
        random_bytes=lambda size: b"r" * size,
        events=[],
    )
    other = peers.known["n2"]
    other.incarnation = 7
    peers.acknowledged("n2", 2, 86)
    other.incarnation = 7 if is_same_run else 8
    ours = peers.announce_to("n2", 2)
    peers.heard("n2", ours._replace(disk_id=b"2" * 16, term=0, last_term=0, last_index=0, wants_answer=False))
    assert other.is_behind is not is_same_run


def test_nobody_is_invited_before_the_cluster_is_on_the_disk() -> None:
    """Announcements that come at once: the first decides that a cluster forms, the others are answered when it is written."""
    members = dict.fromkeys(("n1", "n2", "n3"), "")
    kernel = MemberKernel(
        node_id="n1",
        members=members,
        timing=Timing(),
        identity=DiskIdentity(1, "n1", b"1" * 16, "shop", b"", ()),
        recovered=None,
        snapshot=(),
        random_bytes=lambda size: b"r" * size,
        random_ticks=lambda low, high: low,
        now=0,
        wants_bootstrap=True,
    )
    other = Peers(
        "n2",
        members,
        DiskIdentity(1, "n2", b"2" * 16, "shop", b"", (), "n1"),
        wants_bootstrap=False,
        random_bytes=lambda size: b"r" * size,
        events=[],
    )
    kernel.peer_up("n2", 1, 0)
    kernel.peer_incarnation("n2", 1)
    kernel.tick(0, 0)
    announce = (0, other.announce_to("n1", 0))
    kernel.peer_messages("n2", [announce], 10)
    assert kernel.collect(10) is not None
    kernel.tick(2000, 0)
    kernel.peer_messages("n2", [announce, announce], 2000)
    effects = kernel.collect(2000)
    assert effects is not None and effects.identity is not None and effects.identity.cluster_uuid
    sent = [message for messages in effects.sends.values() for _, message in messages]
    assert not any(isinstance(message, Form) or message.cluster_uuid for message in sent), sent
    kernel.identity_stored(effects.identity, 2000)
    effects = kernel.collect(2000)
    assert effects is not None
    assert [type(message) for _, message in effects.sends["n2"]][:2] == [Form, Announce]
