"""Each fault: how it is applied and taken back, and what was seen of it, which is the proof that it happened.

Faults of processes and disks come one after another, those of the network beside them likewise: so a member is
killed while others are cut off, but no process is two faults' at once.
"""

from __future__ import annotations

import asyncio
import errno
import math
import random
import signal
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Final

from coordlib.testing.nemesis.application import EXIT_FATAL
from coordlib.testing.nemesis.capabilities import DISKS, SHIM
from coordlib.testing.nemesis.disks import LoopDisk
from coordlib.testing.nemesis.fleet import Fleet
from coordlib.testing.nemesis.network import Link, links_between

__all__ = ["FAULTS", "NETWORK", "NODES", "Effect", "Fault", "Nemesis", "ring"]

NODES: Final = "nodes"
NETWORK: Final = "network"

PAUSE_SECONDS: Final = (0.1, 8.0)
CUT_SECONDS: Final = (0.6, 3.0)
RESET_SECONDS: Final = (0.3, 0.6)
HOLD_SECONDS: Final = (0.3, 2.0)
SLOW_SECONDS: Final = (1.0, 2.5)
SLOW_BITS_PER_SECOND: Final = (150_000, 300_000, 600_000)
SLOW_SYNC_SECONDS: Final = (0.05, 0.4)
JUMP_SECONDS: Final = 3600
JUMP_ERROR_SECONDS: Final = 5.0
END_SECONDS_MAX: Final = 30.0


@dataclass(frozen=True, slots=True)
class Effect:
    """What was seen of one application of a fault. `counts` are summed up over all of them."""

    is_observed: bool
    counts: dict[str, int] = field(default_factory=dict)
    note: str = ""


class Nemesis:
    """What the faults need: the fleet, and chance. With `is_idle` network faults do nothing, to see that told."""

    def __init__(self, fleet: Fleet, chance: random.Random, *, is_idle: bool = False) -> None:
        self.fleet = fleet
        self.chance = chance
        self.is_idle = is_idle

    async def member(self) -> str:
        """A member, the leader every other time."""
        if self.chance.random() < 0.5:
            return await self.fleet.leader()
        return self.chance.choice(self.fleet.members)

    def some(self, names: Iterable[str], most: int) -> list[str]:
        names = list(names)
        return self.chance.sample(names, self.chance.randint(1, min(most, len(names))))

    async def cut(self, links: set[Link]) -> Effect:
        """Cut these for a while."""
        return await self.network(
            lambda: self.fleet.network.cut(set() if self.is_idle else links), CUT_SECONDS
        )

    async def network(self, begin: Callable[[], Awaitable[None]], seconds: tuple[float, float]) -> Effect:
        """Begin a fault of the network, heal it after a while."""
        leaders = self.fleet.leaders_seen
        await begin()
        try:
            await asyncio.sleep(self.chance.uniform(*seconds))
        finally:
            seen = await self.fleet.network.heal()
        return Effect(
            seen.number > 0,
            {seen.unit: seen.number, "leader changes": self.fleet.leaders_seen - leaders},
        )


# -- processes ---------------------------------------------------------------------------------------------


async def _kill(nemesis: Nemesis, victims: list[str]) -> Effect:
    fleet = nemesis.fleet
    codes = await asyncio.gather(*(fleet.processes[name].kill() for name in victims))
    await asyncio.sleep(nemesis.chance.choice((0.0, 0.1, 0.5, 1.0)))
    began = monotonic()
    await fleet.restart(*victims)
    killed = sum(code == -signal.SIGKILL for code in codes)
    note = f"{', '.join(victims)} back in {monotonic() - began:.1f} s"
    return Effect(killed == len(victims), {"processes killed": killed}, note)


async def _kill_leader(nemesis: Nemesis) -> Effect:
    fleet = nemesis.fleet
    leader = await fleet.leader()
    term = max(fleet.leader_by_term)
    effect = await _kill(nemesis, [leader])
    await fleet.leader()
    terms = sum(later > term for later in fleet.leader_by_term)
    return Effect(effect.is_observed and terms > 0, {**effect.counts, "leader changes": terms}, effect.note)


async def _kill_random(nemesis: Nemesis) -> Effect:
    return await _kill(nemesis, [nemesis.chance.choice(list(nemesis.fleet.processes))])


async def _kill_several(nemesis: Nemesis) -> Effect:
    members = nemesis.fleet.members
    return await _kill(nemesis, nemesis.chance.sample(members, nemesis.chance.randint(2, len(members) - 1)))


async def _kill_all(nemesis: Nemesis) -> Effect:
    return await _kill(nemesis, list(nemesis.fleet.members))


async def _pause(nemesis: Nemesis) -> Effect:
    fleet, chance = nemesis.fleet, nemesis.chance
    name = await nemesis.member() if chance.random() < 0.8 else chance.choice(fleet.clients)
    process = fleet.processes[name]
    seconds = math.exp(chance.uniform(*map(math.log, PAUSE_SECONDS)))
    await process.do("feel")
    process.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
        is_stopped = process.is_stopped
    finally:
        process.signal(signal.SIGCONT)
    gap = (await process.do("feel"))["gap_seconds"]
    is_felt = is_stopped and gap >= 0.8 * seconds
    return Effect(is_felt, {"ms of standstill felt": round(gap * 1000)}, f"{name} stood still {gap:.1f} s")


async def _restart_all(nemesis: Nemesis) -> Effect:
    fleet, chance = nemesis.fleet, nemesis.chance
    names = chance.sample(fleet.members, len(fleet.members))
    codes: list[int | None]
    if chance.random() < 0.5:
        manner = "at once"
        codes = list(await asyncio.gather(*(fleet.processes[name].leave(END_SECONDS_MAX) for name in names)))
        await fleet.restart(*names)
    else:
        manner, codes = "one by one", []
        for name in names:
            codes.append(await fleet.processes[name].leave(END_SECONDS_MAX))
            await fleet.restart(name)
    for name, code in zip(names, codes, strict=True):
        if code != 0:
            how = "had to be killed" if code is None else f"ended with {code}"
            fleet.violations.append(f"{name} {how} when it was to close in good order")
    left = codes.count(0)
    return Effect(left == len(names), {"left in good order": left}, f"all restarted {manner}")


# -- disks -------------------------------------------------------------------------------------------------


async def _stops(nemesis: Nemesis, name: str, error: str) -> tuple[bool, str]:
    """Wait until a member ends as it must when its disk fails; whether it did, and its last words."""
    process = nemesis.fleet.processes[name]
    try:
        code = await process.gone(END_SECONDS_MAX)
    except TimeoutError:
        await process.kill()
        return False, f"{name} did not stop"
    words = [line for line in process.log_since_start().splitlines() if f"FATAL {error}" in line]
    return code == EXIT_FATAL and bool(words), words[-1].partition("FATAL ")[
        2
    ] if words else f"{name}: {code}"


async def _fsync(nemesis: Nemesis) -> Effect:
    fleet, name = nemesis.fleet, await nemesis.member()
    shim = fleet.shims[name]
    before = shim.get("syncs_failed")
    fleet.processes[name].is_expected_to_end = True
    shim.set("sync_errno", errno.EIO)
    try:
        has_stopped, words = await _stops(nemesis, name, "StorageFailed")
    finally:
        shim.set("sync_errno", 0)
    failed = shim.get("syncs_failed") - before
    await fleet.restart(name)
    counts = {"fsyncs failed": failed, "exits with StorageFailed": int(has_stopped)}
    return Effect(has_stopped and failed > 0, counts, words)


async def _slow_fsync(nemesis: Nemesis) -> Effect:
    fleet = nemesis.fleet
    names = nemesis.some(fleet.members, 2)
    before = sum(fleet.shims[name].get("syncs_slowed") for name in names)
    delay = nemesis.chance.uniform(*SLOW_SYNC_SECONDS)
    for name in names:
        fleet.shims[name].set("sync_delay_ns", round(delay * 1e9))
    try:
        await asyncio.sleep(nemesis.chance.uniform(*SLOW_SECONDS))
    finally:
        for name in names:
            fleet.shims[name].set("sync_delay_ns", 0)
    slowed = sum(fleet.shims[name].get("syncs_slowed") for name in names) - before
    return Effect(slowed > 0, {"fsyncs slowed": slowed}, f"by {delay * 1000:.0f} ms on {', '.join(names)}")


def _loop_disk(nemesis: Nemesis, name: str) -> LoopDisk:
    disk = nemesis.fleet.disks[name]
    assert isinstance(disk, LoopDisk)
    return disk


async def _disk_full(nemesis: Nemesis) -> Effect:
    fleet, name = nemesis.fleet, await nemesis.member()
    disk = _loop_disk(nemesis, name)
    fleet.processes[name].is_expected_to_end = True
    disk.fill()
    try:
        has_stopped, words = await _stops(nemesis, name, "StorageFull")
    finally:
        disk.free()
    await fleet.restart(name)
    return Effect(has_stopped, {"exits with StorageFull": int(has_stopped)}, words)


async def _cut_power(nemesis: Nemesis, names: list[str]) -> Effect:
    fleet = nemesis.fleet
    disks = {name: _loop_disk(nemesis, name) for name in names}
    for name in names:
        fleet.processes[name].is_expected_to_end = True
    # The processes live on for a moment, or the disks do: neither may make a difference.
    if is_disk_first := nemesis.chance.random() < 0.5:
        for disk in disks.values():
            disk.cut_power()
    await asyncio.gather(*(fleet.processes[name].kill() for name in names))
    if not is_disk_first:
        for disk in disks.values():
            disk.cut_power()
    lost = sum([await disk.restore_power() for disk in disks.values()])
    await fleet.restart(*names)
    counts = {"filesystems shut down": len(names), "un-fsynced files lost": lost}
    return Effect(lost == len(names), counts, "disk first" if is_disk_first else "process first")


async def _power_cut(nemesis: Nemesis) -> Effect:
    return await _cut_power(nemesis, [await nemesis.member()])


async def _power_cut_all(nemesis: Nemesis) -> Effect:
    return await _cut_power(nemesis, list(nemesis.fleet.members))


# -- clocks ------------------------------------------------------------------------------------------------


async def _clock(nemesis: Nemesis) -> Effect:
    fleet, chance = nemesis.fleet, nemesis.chance
    names = nemesis.some(fleet.processes, len(fleet.processes))
    seen = 0
    for _ in range(2):
        for name in names:
            shift = chance.choice((-JUMP_SECONDS, JUMP_SECONDS))
            before = fleet.shims[name].get("wall_shift_ns")
            if before == shift * 10**9:
                shift = -shift
            fleet.shims[name].set("wall_shift_ns", shift * 10**9)
            wall = (await fleet.processes[name].do("feel"))["wall_seconds"]
            seen += abs(wall - time() - shift) < JUMP_ERROR_SECONDS
        await asyncio.sleep(chance.uniform(0.3, 1.0))
    if chance.random() < 0.5:
        # Else they stay where they are for the faults that follow.
        for name in names:
            fleet.shims[name].set("wall_shift_ns", 0)
    return Effect(seen == 2 * len(names), {"jumps of an hour or two seen": seen})


# -- network -----------------------------------------------------------------------------------------------


async def _cut_one_way(nemesis: Nemesis) -> Effect:
    one = await nemesis.member()
    other = nemesis.chance.choice([name for name in nemesis.fleet.members if name != one])
    return await nemesis.cut({nemesis.chance.choice(((one, other), (other, one)))})


async def _cut_two_way(nemesis: Nemesis) -> Effect:
    fleet, chance = nemesis.fleet, nemesis.chance
    minority = set(chance.sample(fleet.members, chance.randint(1, (len(fleet.members) - 1) // 2)))
    left = minority | {name for name in fleet.clients if chance.random() < 0.5}
    return await nemesis.cut(links_between(left, set(fleet.processes) - left))


async def _isolate_leader(nemesis: Nemesis) -> Effect:
    leader = await nemesis.fleet.leader()
    everybody = set(nemesis.fleet.processes)
    links = links_between({leader}, everybody)
    way = nemesis.chance.choice(
        (lambda _: True, lambda link: link[0] == leader, lambda link: link[1] == leader)
    )
    return await nemesis.cut(set(filter(way, links)))


def ring(names: list[str]) -> set[Link]:
    """The directions to cut so that everybody hears a majority, and no two the same one (3: one way round only)."""
    count = len(names)
    heard = count // 2
    steps = (
        [*range(1, heard // 2 + 1), *range(-(heard // 2), 0)] if heard % 2 == 0 else list(range(1, heard + 1))
    )
    kept = {(names[(at + step) % count], names[at]) for at in range(count) for step in steps}
    return links_between(names, names) - kept


async def _ring(nemesis: Nemesis) -> Effect:
    members = nemesis.fleet.members
    return await nemesis.cut(ring(nemesis.chance.sample(members, len(members))))


async def _bridge(nemesis: Nemesis) -> Effect:
    # One member hears all, the two halves of the others nothing of each other.
    _, *others = nemesis.chance.sample(nemesis.fleet.members, len(nemesis.fleet.members))
    half = len(others) // 2
    return await nemesis.cut(links_between(others[:half], others[half:]))


async def _reset(nemesis: Nemesis) -> Effect:
    fleet = nemesis.fleet
    some = nemesis.some(fleet.processes, len(fleet.processes))
    links = links_between(some, fleet.members)
    await fleet.stats()
    before = fleet.connections_lost
    effect = await nemesis.network(
        lambda: fleet.network.reset(set() if nemesis.is_idle else links), RESET_SECONDS
    )
    await fleet.stats()
    lost = fleet.connections_lost - before
    counts = {**effect.counts, "connections lost by members": lost}
    return Effect(effect.is_observed and lost > 0, counts)


async def _hold(nemesis: Nemesis) -> Effect:
    some = nemesis.some(nemesis.fleet.members, 2)
    return await nemesis.network(lambda: nemesis.fleet.network.hold(some), HOLD_SECONDS)


async def _slow(nemesis: Nemesis) -> Effect:
    some = nemesis.some(nemesis.fleet.members, 2)
    rate = nemesis.chance.choice(SLOW_BITS_PER_SECOND)
    return await nemesis.network(lambda: nemesis.fleet.network.slow(some, rate), SLOW_SECONDS)


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault. `needs`: a capability of the machine, or empty."""

    name: str
    group: str
    what: str
    apply: Callable[[Nemesis], Awaitable[Effect]]
    needs: str = ""


FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault("kill-leader", NODES, "kill -9 of the leader", _kill_leader),
        Fault("kill-random", NODES, "kill -9 of any process", _kill_random),
        Fault("kill-several", NODES, "kill -9 of two members or more, not all", _kill_several),
        Fault("kill-all", NODES, "kill -9 of all members", _kill_all),
        Fault("pause", NODES, "SIGSTOP for 0.1 to 8 s", _pause),
        Fault("restart-all", NODES, "all members leave in good order, at once or one by one", _restart_all),
        Fault("fsync", NODES, "every fsync fails with EIO", _fsync, SHIM),
        Fault("slow-fsync", NODES, "every fsync takes up to 0.4 s longer", _slow_fsync, SHIM),
        Fault("disk-full", NODES, "no block is free on a member's filesystem", _disk_full, DISKS),
        Fault("power-cut", NODES, "a member's filesystem loses what was not fsynced", _power_cut, DISKS),
        Fault("power-cut-all", NODES, "all members' at once", _power_cut_all, DISKS),
        Fault("clock", NODES, "wall clocks jump to an hour before or after", _clock, SHIM),
        Fault("cut-one-way", NETWORK, "one direction between two members", _cut_one_way),
        Fault("cut-two-way", NETWORK, "a minority, and clients, from the rest", _cut_two_way),
        Fault("isolate-leader", NETWORK, "the leader from all, or one direction of it", _isolate_leader),
        Fault("ring", NETWORK, "everybody hears another majority", _ring),
        Fault("bridge", NETWORK, "two halves that share one member", _bridge),
        Fault("reset", NETWORK, "TCP resets of connections", _reset),
        Fault("hold", NETWORK, "what members send is held, then delivered in a burst", _hold),
        Fault("slow", NETWORK, "what members send passes slowly", _slow),
    )
}
