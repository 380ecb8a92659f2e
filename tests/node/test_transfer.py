"""Snapshots between members, end to end in the simulated world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from coordlib.api.maps import _MapBase
from coordlib.node.effects import OWN, DiskEffect, WriteSnapshot
from coordlib.testing.simulation.processes import MemberProcess, Process
from coordlib.testing.simulation.surroundings import NetworkProfile
from coordlib.testing.simulation.world import World
from coordlib.wire.messages import SnapshotAck, SnapshotChunk

PATIENCE_MS = 15_000


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Three members that forget their log soon and send snapshots in many pieces."""
    monkeypatch.setattr("coordlib.node.transfer.LOG_ENTRIES_MAX", 30)
    monkeypatch.setattr("coordlib.node.transfer.CHUNK_SIZE_BYTES", 2000)
    monkeypatch.setattr("coordlib.node.kernel.ENTRIES_RETAINED", 5)
    with World(5) as world:
        world.start_all()
        assert world.run(PATIENCE_MS, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        yield world


def leader_of(world: World) -> MemberProcess:
    leader = world.leader
    assert leader is not None
    return leader


def follower_of(world: World) -> MemberProcess:
    return next(process for process in world.up_members if not process.kernel.is_leader)


def write(world: World, process: Process, count: int, start: int = 0) -> None:
    """Put that many keys, one after the other."""

    def puts() -> Any:
        numbers = _MapBase("m", None, 10_000)
        for i in range(start, start + count):
            yield from numbers._put_gen(i, "x" * 300, None)

    operation = process.start_operation(puts())
    assert world.run(60_000, lambda: operation.is_done)
    assert operation.error is None


def is_level(world: World) -> bool:
    return len({process.kernel.machine.applied_index for process in world.up_members}) == 1


def installed(process: MemberProcess) -> int:
    return sum(event.name == "snapshot.installed" for event in process.events)


def sent(world: World) -> int:
    return sum(event.name == "snapshot.send" for p in world.up_members for event in p.events)


def test_a_snapshot_of_its_own_is_written_one_piece_a_turn(world: World) -> None:
    """In between, a member looks at its input: a large state must not keep a heartbeat waiting."""
    leader = leader_of(world)
    disk = leader._disk
    assert disk is not None
    carry_out, take_turn = disk.carry_out, leader.take_turn
    pieces = [0]

    def counted(effects: Sequence[DiskEffect], *more: Any) -> None:
        pieces[-1] += sum(isinstance(effect, WriteSnapshot) and effect.origin == OWN for effect in effects)
        carry_out(effects, *more)

    def counted_turn() -> None:
        pieces.append(0)
        take_turn()

    disk.carry_out = counted  # type: ignore[assignment,method-assign]  # looked at, not changed
    leader.take_turn = counted_turn  # type: ignore[method-assign]  # looked at, not changed
    write(world, leader, 100)
    assert sum(pieces) > 10
    assert max(pieces) == 1


def test_a_follower_that_was_away_catches_up_by_a_snapshot(world: World) -> None:
    """And goes on with the log behind it, with the same state."""
    away = follower_of(world)
    away.kill()
    write(world, leader_of(world), 100)
    back = world.start_member(away.name)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    assert installed(back) == 1
    write(world, back, 10, 100)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    assert len({len(p.kernel.machine.sessions) for p in world.up_members}) == 1
    assert world.fatal == []


@pytest.mark.parametrize("seed", range(4))
def test_a_full_queue_holds_a_transfer_up_for_moments_and_nobody_else(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that did not fit are read and sent again a little later, the last ones too, and not a thousand times."""
    monkeypatch.setattr("coordlib.node.transfer.LOG_ENTRIES_MAX", 30)
    monkeypatch.setattr("coordlib.node.transfer.CHUNK_SIZE_BYTES", 500)
    monkeypatch.setattr("coordlib.node.kernel.ENTRIES_RETAINED", 5)
    with World(seed, network=NetworkProfile(bulk_queue_frames_max=2)) as world:
        world.start_all()
        assert world.run(PATIENCE_MS, lambda: all(p.kernel.has_usable_leader for p in world.up_members))
        away = follower_of(world)
        away.kill()
        write(world, leader_of(world), 100)
        refused = world.counts["frames_refused"]
        back = world.start_member(away.name)
        assert world.run(5000, lambda: is_level(world) and installed(back) > 0)
        assert 0 < world.counts["frames_refused"] - refused < 1000
        # Nothing is kept open for it.
        assert all(not process._disk._readers for process in world.up_members if process._disk)


@pytest.mark.parametrize("what", [SnapshotChunk, SnapshotAck])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_one_lost_piece_or_answer_costs_moments_and_not_the_transfer(
    world: World, what: type, number: int
) -> None:
    """It is sent again; nothing waits for the silence that ends a transfer. Found by seed 1008."""
    away = follower_of(world)
    away.kill()
    write(world, leader_of(world), 100)
    seen = 0

    def lose_one(process: MemberProcess) -> None:
        send = process._links.send

        def send_others(name: str, messages: Sequence[tuple[int, Any]], **more: Any) -> bool:
            nonlocal seen
            if any(isinstance(message, what) for _, message in messages):
                seen += 1
                if seen == number + 1:
                    return True
            return bool(send(name, messages, **more))

        process._links.send = send_others

    back = world.start_member(away.name)
    for process in world.up_members:
        lose_one(process)
    began = sent(world)
    assert world.run(5000, lambda: installed(back) > 0 and is_level(world))
    assert sent(world) <= began + 1
    assert seen > number


def test_what_was_installed_survives_a_crash(world: World) -> None:
    """The snapshot and the log behind it are on its own disk now."""
    away = follower_of(world)
    away.kill()
    write(world, leader_of(world), 100)
    back = world.start_member(away.name)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    back.crash()
    before = sent(world)
    again = world.start_member(away.name)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    assert installed(again) == 0
    assert sent(world) == before


@pytest.mark.parametrize("pause_ms", [5, 20, 60, 120])
def test_a_receiver_that_crashes_begins_anew(world: World, pause_ms: int) -> None:
    """Half a snapshot is no snapshot."""
    away = follower_of(world)
    away.kill()
    write(world, leader_of(world), 150)
    world.start_member(away.name)
    world.run(pause_ms)
    world.member(away.name).crash()
    back = world.start_member(away.name)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    assert back.kernel.machine.applied_index >= 150


@pytest.mark.parametrize("pause_ms", [5, 20, 60, 120])
def test_a_sender_that_crashes_is_replaced(world: World, pause_ms: int) -> None:
    """The next leader's snapshot is another one."""
    away = follower_of(world)
    away.kill()
    leader = leader_of(world)
    write(world, leader, 150)
    world.start_member(away.name)
    world.run(pause_ms)
    leader.crash()
    assert world.run(PATIENCE_MS, lambda: is_level(world) and world.leader is not None)
    world.start_member(leader.name)
    assert world.run(PATIENCE_MS, lambda: is_level(world) and len(world.up_members) == 3)
    assert world.fatal == []


def test_writes_go_on_while_a_snapshot_is_sent(world: World) -> None:
    """And the follower gets them as well."""
    away = follower_of(world)
    away.kill()
    leader = leader_of(world)
    write(world, leader, 100)
    back = world.start_member(away.name)
    write(world, leader, 100, 100)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    assert installed(back) >= 1
    assert back.kernel.machine.applied_index > 200


def test_a_new_leader_sends_no_snapshot_to_those_who_have_everything(world: World) -> None:
    """Also when connections are made anew just then."""
    write(world, leader_of(world), 100)
    assert world.run(PATIENCE_MS, lambda: is_level(world))
    for _ in range(6):
        leader = leader_of(world)
        leader.kill()
        world.start_member(leader.name)
        for _ in range(6):
            world.run(100)
            world.reset_some_link()
        assert world.run(PATIENCE_MS, lambda: is_level(world) and world.leader is not None)
        write(world, leader_of(world), 3)
    assert sent(world) == 0
    assert [installed(process) for process in world.up_members] == [0, 0, 0]


def test_a_snapshot_that_is_covered_already_is_acknowledged() -> None:
    """To refuse it would have the leader send it for ever."""
    from coordlib.machine import Machine
    from coordlib.machine.limits import Limits
    from coordlib.node.transfer import SnapshotReceiver
    from coordlib.raft import RaftConfig, RawNode
    from coordlib.raft.messages import Configuration, HardState, SnapshotMeta
    from coordlib.wire.messages import SnapshotChunk

    configuration = Configuration(("a", "b", "c"))
    raft = RawNode(
        RaftConfig(node_id="a"),
        hard_state=HardState(2, ""),
        snapshot=SnapshotMeta(9, 2, configuration),
        entries=(),
        random_ticks=lambda low, high: high,
        now=0,
    )
    receiver = SnapshotReceiver(raft, Machine(Limits()), 0, [])
    disk: list[Any] = []
    ack = receiver.receive("b", SnapshotChunk(0, 2, SnapshotMeta(9, 2, configuration), 5000, 0, b"x"), disk)
    assert ack is not None
    assert (ack.offset, ack.is_refused, ack.index) == (5000, False, 9)
    assert disk == []
    ack = receiver.receive("b", SnapshotChunk(0, 1, SnapshotMeta(20, 1, configuration), 5000, 0, b"x"), disk)
    assert ack is not None
    assert ack.is_refused
