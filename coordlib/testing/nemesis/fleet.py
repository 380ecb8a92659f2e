"""All applications of a run: started, restarted and watched; who leads, and who has ended unasked."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from coordlib.testing.nemesis.disks import LoopDisk, PlainDisk
from coordlib.testing.nemesis.network import Network
from coordlib.testing.nemesis.processes import ApplicationError, Process
from coordlib.testing.nemesis.shim import Shim
from coordlib.wire.keys import generate_secret

__all__ = ["CLUSTER", "Fleet", "NotThere"]

CLUSTER: Final = "nemesis"
SESSION_TTL_SECONDS: Final = 3.0
REQUEST_TIMEOUT_SECONDS: Final = 2.5
START_SECONDS_MAX: Final = 60.0
LEADER_SECONDS_MAX: Final = 30.0
CATCH_UP_SECONDS_MAX: Final = 60.0
WATCH_SECONDS: Final = 0.2
PAUSE_MS: Final = 40


class NotThere(Exception):
    """What was waited for did not come in time: a violation of liveness; the message has what is known."""


class Fleet:
    """
    Members and clients, by name.

    Args:
        directory: Of the run: histories, logs and what else the applications write, by process.
        shims: For each process, or empty.
    """

    def __init__(
        self,
        directory: Path,
        network: Network,
        disks: dict[str, LoopDisk] | dict[str, PlainDisk],
        clients: Iterable[str],
        shims: dict[str, Shim],
        *,
        chance: random.Random,
        sabotage: Iterable[str] = (),
    ) -> None:
        self.directory = directory
        self.network = network
        self.disks = disks
        self.shims = shims
        self.members = list(disks)
        self.clients = list(clients)
        self.processes: dict[str, Process] = {}
        self.violations: list[str] = []
        self.leader_by_term: dict[int, str] = {}
        self.errors: dict[str, int] = {}
        self._connections_lost: dict[int, int] = {}  # by process id: the counters begin anew with each
        self._chance = chance
        self._sabotage = list(sabotage)
        self._secret = generate_secret(os.urandom)
        self._incarnations = 0
        self._is_loaded = False
        self._watch: asyncio.Task[None] | None = None
        self.histories = directory / "histories"
        self.logs = directory / "logs"
        for made in (self.histories, self.logs):
            made.mkdir()

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything: members first, as a new cluster needs all of them."""
        await asyncio.gather(*(self.begin(name) for name in self.members))
        await asyncio.gather(*(self.settle(name) for name in self.members))
        await asyncio.gather(*(self.restart(name) for name in self.clients))
        self._watch = asyncio.create_task(self._watching())

    async def close(self) -> None:
        """Kill what still runs."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for process in self.processes.values():
            if not process.has_ended:
                await process.kill()

    def _given(self, name: str, incarnation: str) -> dict[str, Any]:
        common = {
            "incarnation": incarnation,
            "history": str(self.histories / f"{incarnation}.jsonl"),
            "sections": str(self.histories / f"{incarnation}.sections"),
        }
        arguments = {
            "secret": self._secret,
            "session_ttl": SESSION_TTL_SECONDS,
            "request_timeout": REQUEST_TIMEOUT_SECONDS,
            "start_timeout": START_SECONDS_MAX,
        }
        endpoints = self.network.endpoints(name)
        if name in self.clients:
            arguments |= {"cluster": CLUSTER, "name": incarnation}
            return {
                "kind": "client",
                "positional": [list(endpoints.values())],
                "arguments": arguments,
                **common,
            }
        arguments |= {"node": name, "members": endpoints, "data_dir": str(self.disks[name].data_dir)}
        return {"kind": "member", "positional": [CLUSTER], "arguments": arguments, **common}

    async def begin(self, name: str) -> None:
        """Start a process, and have its node start; `settle` waits for it."""
        self._incarnations += 1
        incarnation = f"{name}-{self._incarnations}"
        shim = self.shims.get(name)
        self.processes[name] = await Process.spawn(
            name,
            self._given(name, incarnation),
            log_path=self.logs / f"{name}.log",
            prefix=self.network.prefix(name),
            environment={} if shim is None else shim.environment,
        )

    async def settle(self, name: str) -> None:
        """
        Wait until its node is of use, and have it work if the others do.

        Raises:
            NotThere: It cannot start.
        """
        process = self.processes[name]
        try:
            await process.do("start", timeout_seconds=START_SECONDS_MAX + 10)
            if self._is_loaded:
                await self._load(process)
        except ApplicationError as error:
            raise NotThere(f"{name} does not start: {error}") from error

    async def restart(self, *names: str) -> None:
        """Start processes that have ended, each on its own disk."""
        for name in names:
            await self.begin(name)
        await asyncio.gather(*(self.settle(name) for name in names))

    # -- work ----------------------------------------------------------------------------------------------

    async def _load(self, process: Process) -> None:
        seed = self._chance.randrange(1 << 31)
        await process.do("load", seed=seed, pause_ms=PAUSE_MS, sabotage=self._sabotage)

    async def load(self) -> None:
        """Have all work, and those that start later too."""
        self._is_loaded = True
        await asyncio.gather(*(self._load(process) for process in self.processes.values()))

    async def unload(self) -> None:
        """End all work."""
        self._is_loaded = False
        for name, process in self.processes.items():
            answer = await process.do("unload", timeout_seconds=60)
            if answer["stuck"]:
                self.violations.append(f"{name}: calls that never ended in {', '.join(answer['stuck'])}")
            for kind, count in answer["errors"].items():
                self.errors[kind] = self.errors.get(kind, 0) + count

    async def progress(self) -> dict[str, int]:
        return {name: (await one.do("progress"))["done"] for name, one in self.processes.items()}

    # -- what is known -------------------------------------------------------------------------------------

    async def stats(self, timeout_seconds: float = 1.0) -> dict[str, dict[str, Any]]:
        """Of every member that answers."""
        running = {name: one for name in self.members if not (one := self.processes[name]).has_ended}
        answers = await asyncio.gather(
            *(one.do("stats", timeout_seconds=timeout_seconds) for one in running.values()),
            return_exceptions=True,
        )
        found = {}
        for name, answer in zip(running, answers, strict=True):
            if isinstance(answer, dict):
                found[name] = answer
            elif not isinstance(answer, ApplicationError):
                raise answer
        self._note_leaders(found)
        for name, known in found.items():
            wire = known.get("wire", {})
            lost = wire.get("connection_lost", 0) + wire.get("disconnected", 0)
            self._connections_lost[running[name].pid] = lost
        return found

    def _note_leaders(self, stats: dict[str, dict[str, Any]]) -> None:
        for name, one in stats.items():
            if one.get("role") == "leader":
                other = self.leader_by_term.setdefault(one["term"], name)
                violation = f"term {one['term']} has two leaders: {other} and {name}"
                if other != name and violation not in self.violations:
                    self.violations.append(violation)

    @property
    def leaders_seen(self) -> int:
        return len(self.leader_by_term)

    @property
    def connections_lost(self) -> int:
        """By the counters of all members that ever ran, as of the last `stats`."""
        return sum(self._connections_lost.values())

    async def leader(self, timeout_seconds: float = LEADER_SECONDS_MAX) -> str:
        """
        The leader of the highest term that runs.

        Raises:
            NotThere: Nobody led in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            stats = await self.stats()
            leading = {one["term"]: name for name, one in stats.items() if one.get("role") == "leader"}
            if leading:
                return leading[max(leading)]
            if loop.time() > deadline:
                known = {name: (one.get("role"), one.get("term")) for name, one in stats.items()}
                raise NotThere(f"no leader within {timeout_seconds:g} s: {known}")
            await asyncio.sleep(0.05)

    async def agreed(self) -> int:
        """
        Wait until all members have applied the same, without work; returns the index.

        Raises:
            NotThere: They do not come to agree.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CATCH_UP_SECONDS_MAX
        while True:
            stats = await self.stats(5.0)
            facts = {name: (one.get("applied_index"), one.get("leader")) for name, one in stats.items()}
            if len(facts) == len(self.members) and len(set(facts.values())) == 1:
                (fact,) = set(facts.values())
                if fact[0] and fact[1]:
                    return int(fact[0])
            if loop.time() > deadline:
                raise NotThere(f"the members do not agree within {CATCH_UP_SECONDS_MAX:g} s: {facts}")
            await asyncio.sleep(0.05)

    async def _watching(self) -> None:
        """See leaders come and go, and processes that end though nothing was done to them."""
        while True:
            await self.stats()
            for name, process in self.processes.items():
                if process.has_ended and not process.is_expected_to_end:
                    process.is_expected_to_end = True
                    log = "".join(f"\n    {line}" for line in process.log_since_start().splitlines()[-5:])
                    self.violations.append(f"{name} ended unasked, with {process.exit_code}:{log}")
            await asyncio.sleep(WATCH_SECONDS)
