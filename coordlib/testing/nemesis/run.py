"""One run: start, trouble, heal, and the proof that nothing promised was broken."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, monotonic_ns
from typing import Any, Final

from coordlib.testing.history import load
from coordlib.testing.nemesis.capabilities import DISKS, SHIM
from coordlib.testing.nemesis.disks import LoopDisk, PlainDisk
from coordlib.testing.nemesis.faults import FAULTS, NETWORK, NODES, Effect, Fault, Nemesis
from coordlib.testing.nemesis.fleet import Fleet, NotThere
from coordlib.testing.nemesis.netns import NamespaceNetwork
from coordlib.testing.nemesis.network import Network
from coordlib.testing.nemesis.processes import ApplicationError
from coordlib.testing.nemesis.proxy import ProxyNetwork
from coordlib.testing.nemesis.shim import Shim, build
from coordlib.testing.nemesis.verdict import Contents, judge, read_back
from coordlib.testing.nemesis.workspace import Workspace

__all__ = ["OWN_SABOTAGES", "Outcome", "Settings", "run"]

CLIENTS: Final = ("c1", "c2")
QUIET_SECONDS: Final = (0.2, 0.8)
OVERTIME_SECONDS: Final = 240.0
PROGRESS_SECONDS_MAX: Final = 30.0
PROGRESS_LEAST: Final = 5
NO_EFFECT: Final = "no-effect"
NO_FSYNC: Final = "no-fsync"
OWN_SABOTAGES: Final = (NO_EFFECT, NO_FSYNC)
"""What a run itself can be told to do wrong: network faults that do nothing, fsync that does nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run is to be. `faults` are those that this machine can do; `sabotage` is for tests of the run itself."""

    members: int
    seconds: float
    seed: int
    faults: Sequence[str]
    network: str
    capabilities: frozenset[str]
    sabotage: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What was done, what was seen of it, and what is wrong."""

    effects: dict[str, list[Effect]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    leaders: int = 0
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """fault, times applied, observed effect: one line each."""
        lines = []
        for name, effects in self.effects.items():
            observed = sum(effect.is_observed for effect in effects)
            counts: dict[str, int] = {}
            for effect in effects:
                for what, count in effect.counts.items():
                    counts[what] = counts.get(what, 0) + count
            said = ", ".join(f"{count} {what}" for what, count in counts.items())
            notes = [effect.note for effect in effects if effect.note]
            note = f"; {notes[-1]}" if notes else ""
            lines.append(f"{name:<15} x {len(effects):<3} seen {observed:<3} {said}{note}"[:200])
        return lines


async def run(settings: Settings, workspace: Workspace) -> Outcome:
    """
    Do one run in the workspace; its evidence stays there until the caller is done with it.

    Raises:
        CommandError: The machine refused something of its own: no finding about coordlib.
    """
    began = monotonic()
    outcome = Outcome(effects={name: [] for name in settings.faults})
    chance = random.Random(settings.seed)
    directory = workspace.directory / f"run-{settings.seed}"
    directory.mkdir()
    async with _fleet(settings, workspace, directory, chance) as fleet:
        try:
            await fleet.start()
            await fleet.load()
            await _trouble(settings, fleet, chance, outcome)
            await _calm(fleet)
            contents, versions = await _read_all(fleet)
            outcome.leaders = fleet.leaders_seen
            verdict = judge(fleet.histories, contents, versions)
            outcome.violations += verdict.violations
            outcome.counts = verdict.counts
        except (NotThere, ApplicationError) as error:
            outcome.violations.append(str(error))
        outcome.violations += fleet.violations
        outcome.violations += _found_in_logs(fleet.logs)
        outcome.errors = fleet.errors
        if outcome.violations:
            _keep_data(fleet, directory)
    for name, effects in outcome.effects.items():
        if not any(effect.is_observed for effect in effects):
            outcome.violations.append(f"fault {name} was applied {len(effects)} times without an effect")
    outcome.seconds = monotonic() - began
    return outcome


@contextlib.asynccontextmanager
async def _fleet(
    settings: Settings, workspace: Workspace, directory: Path, chance: random.Random
) -> AsyncIterator[Fleet]:
    members = [f"n{number + 1}" for number in range(settings.members)]
    network: Network
    if settings.network == "netns":
        network = NamespaceNetwork(f"{workspace.tag}-{settings.seed}", members, CLIENTS)
    else:
        network = ProxyNetwork(members, CLIENTS)
    shims: dict[str, Shim] = {}
    if SHIM in settings.capabilities:
        library = build(directory)
        shims = {name: Shim(library, directory / f"{name}.shim") for name in (*members, *CLIENTS)}
    disks: dict[str, LoopDisk] | dict[str, PlainDisk]
    if DISKS in settings.capabilities:
        disks = {name: LoopDisk(directory / name) for name in members}
    else:
        disks = {name: PlainDisk(directory / name) for name in members}
    fleet = Fleet(
        directory,
        network,
        disks,
        CLIENTS,
        shims,
        chance=random.Random(chance.randrange(1 << 62)),
        sabotage=[how for how in settings.sabotage if how not in OWN_SABOTAGES],
    )
    if NO_FSYNC in settings.sabotage:
        for shim in shims.values():
            shim.set("sync_errno", -1)
    try:
        await network.open()
        for disk in disks.values():
            await disk.open()
        yield fleet
    finally:
        await fleet.close()
        await network.close()
        for disk in disks.values():
            await disk.close()
        for shim in shims.values():
            shim.close()


async def _trouble(settings: Settings, fleet: Fleet, chance: random.Random, outcome: Outcome) -> None:
    is_idle = NO_EFFECT in settings.sabotage
    # Each has its own chance: what one draws does not depend on how long the other's faults take.
    nemeses = {
        group: Nemesis(fleet, random.Random(chance.randrange(1 << 62)), is_idle=is_idle)
        for group in (NODES, NETWORK)
    }
    deadline = monotonic() + settings.seconds
    lanes = [
        asyncio.create_task(_lane(faults, nemesis, deadline, outcome))
        for group, nemesis in nemeses.items()
        if (faults := [FAULTS[name] for name in settings.faults if FAULTS[name].group == group])
    ]
    try:
        await asyncio.gather(*lanes)
    finally:
        # One that failed must not leave the other at work on what is being taken down.
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    if (left := deadline - monotonic()) > 0:
        await asyncio.sleep(left)


async def _lane(faults: Sequence[Fault], nemesis: Nemesis, deadline: float, outcome: Outcome) -> None:
    """One fault after another in a new order each time round: each once at least, and on until the time is over."""
    is_first_round = True
    while is_first_round or monotonic() < deadline:
        for fault in nemesis.chance.sample(faults, len(faults)):
            now = monotonic()
            if now > deadline + OVERTIME_SECONDS or (now > deadline and not is_first_round):
                return
            outcome.effects[fault.name].append(await fault.apply(nemesis))
            await asyncio.sleep(nemesis.chance.uniform(*QUIET_SECONDS))
        is_first_round = False


async def _calm(fleet: Fleet) -> None:
    """
    Take back what faults left on, and see that everybody gets on with its work.

    Raises:
        NotThere: Somebody does not.
    """
    for shim in fleet.shims.values():
        shim.set("wall_shift_ns", 0)
    before = await fleet.progress()
    deadline = monotonic() + PROGRESS_SECONDS_MAX
    while True:
        after = await fleet.progress()
        stuck = [name for name, done in after.items() if done < before[name] + PROGRESS_LEAST]
        if not stuck:
            return
        if monotonic() > deadline:
            raise NotThere(f"all is healed, and {', '.join(stuck)} get nothing done: {before}, {after}")
        await asyncio.sleep(0.1)


async def _read_all(fleet: Fleet) -> tuple[dict[str, Contents], dict[str, int]]:
    """What every member has; the same again after all were killed and started anew, or that is a violation."""
    await fleet.unload()
    await fleet.agreed()
    before = await _contents(fleet, "before")
    for name in fleet.processes:
        await fleet.processes[name].kill()
    await fleet.restart(*fleet.members)
    await fleet.agreed()
    keys = {
        one.key for one in load(*sorted(fleet.histories.glob("*.jsonl"))) if not one.key.startswith("lock/")
    }
    contents = {}
    for name in fleet.members:
        called = monotonic_ns()
        contents[name] = (await _contents(fleet, "after", [name]))[name]
        read_back(
            fleet.histories / f"read-back-{name}.jsonl", name, contents[name], keys, called, monotonic_ns()
        )
        if contents[name] != before[name]:
            fleet.violations.append(f"{name} has other contents after all were killed than before")
    asked = await fleet.processes[fleet.members[0]].do("versions", timeout_seconds=60)
    return contents, asked["versions"]


async def _contents(fleet: Fleet, when: str, names: Sequence[str] = ()) -> dict[str, Contents]:
    found: dict[str, Contents] = {}
    for name in names or fleet.members:
        path = fleet.directory / f"contents-{name}-{when}.json"
        await fleet.processes[name].do("contents", path=str(path), timeout_seconds=120)
        found[name] = _parse(path)
    return found


def _parse(path: Path) -> Contents:
    parsed: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return parsed


def _found_in_logs(logs: Path) -> list[str]:
    """What no fault explains, wherever it was said."""
    found = []
    for path in sorted(logs.glob("*.log")):
        for line in path.read_text("utf-8", "replace").splitlines():
            if any(
                word in line
                for word in ("Traceback", "InvariantViolation", "StorageCorrupt", "a bug in coordlib")
            ):
                found.append(f"the log of {path.stem} says: {line}")
    return found[:20]


def _keep_data(fleet: Fleet, directory: Path) -> None:
    """Copy what the members have on their disks, before those are taken away."""
    for name, disk in fleet.disks.items():
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(disk.data_dir, directory / "data" / name)
