"""Disks that fail and lie under the real log: members stop rather than go on, and what an operator does brings them back."""

from __future__ import annotations

import errno

import pytest

from coordlib.api.maps import _MapBase
from coordlib.errors import CoordError, StartError, StorageCorrupt, StorageFailed, StorageFull
from coordlib.testing.disk import CrashNow, SimulatedFileSystem
from coordlib.testing.simulation.processes import MemberProcess
from coordlib.testing.simulation.world import World

PATIENCE_MS = 15_000


def formed(world: World) -> MemberProcess:
    """Start everybody; returns a follower."""
    world.start_all()
    assert world.run(
        PATIENCE_MS,
        lambda: all(p.kernel.has_usable_leader for p in world.up_members) and world.leader is not None,
    )
    return next(process for process in world.up_members if process is not world.leader)


def put(world: World, key: str, value: int) -> None:
    leader = world.leader
    assert leader is not None
    operation = leader.start_operation(_MapBase("m", None, 3000)._put_gen(key, value, None))
    assert world.run(PATIENCE_MS, lambda: operation.is_done)
    assert operation.error is None


def read(world: World, key: str) -> object:
    leader = world.leader
    assert leader is not None
    operation = leader.start_operation(_MapBase("m", None, 3000)._get_gen(key, None))
    assert world.run(PATIENCE_MS, lambda: operation.is_done)
    assert operation.error is None
    return operation.result


def all_equal(world: World) -> bool:
    return len(world.up_members) == len(world.members) and (
        len({process.kernel.machine.applied_index for process in world.up_members}) == 1
    )


@pytest.mark.parametrize(
    ("operation", "code", "error"),
    [
        ("datasync", errno.EIO, StorageFailed),
        ("pwrite", errno.EIO, StorageFailed),
        ("pwrite", errno.ENOSPC, StorageFull),
    ],
)
def test_a_failing_disk_stops_its_member_and_a_new_process_goes_on(
    operation: str, code: int, error: type[CoordError]
) -> None:
    """Whatever it had acknowledged is still there; the others did without it."""
    with World(1) as world:
        member = formed(world)
        put(world, "before", 1)
        world.expect(member.name, StorageFailed)
        member.fs.fail(operation, error=code)
        put(world, "meanwhile", 2)
        assert world.run(PATIENCE_MS, lambda: not member.is_up)
        assert isinstance(member.fatal, error)
        world.expect(member.name)
        world.start_member(member.name)
        assert world.run(PATIENCE_MS, lambda: all_equal(world))
        assert read(world, "before") == 1
        assert read(world, "meanwhile") == 2
        assert world.fatal == []


def test_a_full_disk_stops_its_member_until_there_is_space() -> None:
    """It may be started as often as one likes meanwhile."""
    with World(2) as world:
        member = formed(world)
        disk = member.fs
        disk.capacity = disk.used()
        world.expect(member.name, StorageFailed, StartError)
        count = 0
        while member.is_up and count < 500:
            count += 1
            put(world, f"k{count}", count)
        assert isinstance(member.fatal, StorageFull)
        world.try_start_member(member.name)
        world.run(500)
        disk.capacity = None
        if not world.member(member.name).is_up:
            world.start_member(member.name)
        assert world.run(PATIENCE_MS, lambda: all_equal(world))
        assert read(world, "k1") == 1


def test_damage_of_what_was_acknowledged_is_refused_and_repaired() -> None:
    """Wherever in the log it is, short of its very last batch: never served, never cut off in silence."""
    with World(3) as world:
        member = formed(world)
        for number in range(20):
            put(world, f"k{number}", number)
        assert world.run(PATIENCE_MS, lambda: all_equal(world))
        member.kill()
        disk = world.disks[member.name]
        (path,) = [path for path in disk.paths() if path.endswith(".log")]
        content = disk.content(path)
        end = len(content.rstrip(b"\0"))
        refused = 0
        for place in range(0, end - 300, 97):
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            disk.damage(path, bytes(damaged))
            with pytest.raises(StorageCorrupt):
                world.start_member(member.name)
            disk.repair()
            refused += 1
        assert refused > 10
        assert disk.content(path) == content
        world.start_member(member.name)
        assert world.run(PATIENCE_MS, lambda: all_equal(world))


def test_accepted_damage_is_not_repaired() -> None:
    """What is there then counts, as for a tail that recovery has cut."""
    disk = SimulatedFileSystem.load({"/data/x": b"abc"})
    disk.damage("/data/x", b"a")
    disk.accept_damage()
    disk.repair()
    assert disk.content("/data/x") == b"a"


def test_a_crash_during_recovery_is_recovered_from() -> None:
    """Before every effect that opening a directory has."""
    with World(4) as world:
        member = formed(world)
        put(world, "k", 1)
        crashes = 0
        for effects in range(12):
            if world.member(member.name).is_up:
                world.member(member.name).crash()
            disk = world.disks[member.name]
            disk.crash_at = disk.effects + effects
            try:
                world.start_member(member.name)
            except CrashNow:
                crashes += 1
        assert crashes >= 4
        disk.crash_at = None
        if not world.member(member.name).is_up:
            world.start_member(member.name)
        assert world.run(PATIENCE_MS, lambda: all_equal(world))
        assert read(world, "k") == 1


def test_swapped_directories_are_refused_and_work_again_in_their_places() -> None:
    """By name; nothing on them was changed."""
    with World(5) as world:
        formed(world)
        put(world, "k", 1)
        names = ("n1", "n2")
        for name in names:
            world.member(name).kill()
        for swap in (True, False):
            world.disks["n1"], world.disks["n2"] = world.disks["n2"], world.disks["n1"]
            for name in names:
                world.expect(name, StartError)
                process = world.try_start_member(name)
                assert (process is None) == swap
        assert world.run(PATIENCE_MS, lambda: world.leader is not None and all_equal(world))
        assert read(world, "k") == 1
        assert len(world.stopped) == 2
