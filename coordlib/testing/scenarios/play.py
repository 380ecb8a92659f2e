"""Plays a scenario: its commands, one after the other, with the invariants checked after every turn of a process."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Final
from unittest.mock import patch

from coordlib.api.codec import CANONICAL
from coordlib.api.locks import Grant, _LockBase
from coordlib.api.maps import ABSENT, _MapBase
from coordlib.config import Timing
from coordlib.errors import CoordError
from coordlib.machine import commands
from coordlib.testing.scenarios.claims import Claims, entries_text
from coordlib.testing.scenarios.script import Command, Scenario, ScenarioError
from coordlib.testing.scenarios.stage import Actor, Stage, StageClient, StageDisk, StageMember
from coordlib.testing.scenarios.wires import KINDS, Letter
from coordlib.testing.simulation.processes import Operation

__all__ = ["Play", "run_scenario"]

SETTLE_MS: Final = 20_000
_DURATION = re.compile(r"(\d+)(ms|s|m)?\Z")
_UNITS: Final = {None: 1, "ms": 1, "s": 1000, "m": 60_000}


def run_scenario(scenario: Scenario) -> Play:
    """
    Play a scenario to its end.

    Raises:
        ScenarioError: Something was not as the scenario says, or an invariant was broken; with the file, the line, and
            the state of all nodes.
    """
    play = Play()
    try:
        for command in scenario.commands:
            try:
                play.do(command)
            except (AssertionError, CoordError, LookupError, TypeError, ValueError, OSError) as error:
                kind = "" if isinstance(error, ScenarioError) else f"{type(error).__name__}: "
                raise ScenarioError(
                    f"{scenario.name}.txt:{command.line}: {command.text}\n  {kind}{error}\n{play.table()}"
                ) from error
    finally:
        play.close()
    return play


def _milliseconds(text: str) -> int:
    match = _DURATION.match(text)
    if match is None:
        raise ScenarioError(f"{text!r} is no duration: 50ms, 3s")
    return int(match[1]) * _UNITS[match[2]]


class Play:
    """The stage of one scenario and what was begun on it."""

    def __init__(self) -> None:
        self._stage: Stage | None = None
        self.begun: dict[str, Any] = {}  # name -> Operation, or (term, index) of a proposed entry
        self.explained: dict[str, CoordError] = {}  # why those stopped of whom it was asserted
        self.codec = CANONICAL
        self._claims = Claims(self)
        self._kept: dict[str, list[Letter]] = {}
        self._backups: dict[str, StageDisk] = {}
        self._serial = 0

    @property
    def stage(self) -> Stage:
        if self._stage is None:
            raise ScenarioError("there is no stage before `nodes`")
        return self._stage

    def close(self) -> None:
        if self._stage is not None:
            self._stage.__exit__()

    def do(self, command: Command) -> None:
        method = getattr(self, f"do_{command.name.replace('-', '_')}", None)
        if method is None:
            raise ScenarioError(f"there is no command {command.name!r}")
        stage = self._stage
        if stage is not None and stage.unexplained and command.words[:1] != ("stopped",):
            name, error = next(iter(stage.unexplained.items()))
            raise ScenarioError(f"{name} stopped, and nobody expected it ({error.code}): {error}")
        words, name = list(command.words), ""
        if len(words) > 2 and words[-2] == "as":
            name = words[-1]
            if name in self.begun or name in self._kept:
                raise ScenarioError(f"{name} is the name of something else already")
            del words[-2:]
        if command.name in _NAMED:
            method(words, command.options, name)
        else:
            if name:
                raise ScenarioError(f"nothing comes of `{command.name}` that could have a name")
            method(words, command.options)
        self.stage.plumb()

    # -- looking

    def member(self, name: str) -> StageMember:
        process = self.stage.processes.get(name)
        if not isinstance(process, StageMember):
            raise ScenarioError(f"there is no member {name!r} running")
        return process

    def actor(self, name: str) -> Actor:
        process = self.stage.processes.get(name)
        if not isinstance(process, StageMember | StageClient):
            raise ScenarioError(f"there is no process {name!r}")
        return process

    def _up(self, name: str) -> Actor:
        process = self.actor(name)
        if not process.is_up:
            raise ScenarioError(f"{name} is down")
        return process

    def table(self) -> str:
        """The state of all nodes and what is under way, for people."""
        stage = self._stage
        if stage is None:
            return "  nothing was started"
        rows = [("node", "role", "term", "vote", "follows", "commit", "applied", "log")]
        for name in stage.members:
            process = stage.processes.get(name)
            if not isinstance(process, StageMember):
                rows.append((name, "not started", "", "", "", "", "", ""))
                continue
            raft = process.kernel.raft
            if raft is None:
                rows.append((name, "not formed" if process.is_up else "down", "", "", "", "", "", ""))
                continue
            log = raft.log
            role = raft.role.name.lower() if process.is_up else "down"
            text = entries_text(log.slice(log.start_index, log.last_index))
            if log.start_index:
                text = f"({log.start_index}@{log.start_term}) {text}"
            numbers = (str(raft.commit_index), str(process.kernel.machine.applied_index))
            rows.append((name, role, str(raft.term), raft.vote or "-", raft.leader or "-", *numbers, text))
        widths = [max(len(row[column]) for row in rows) for column in range(8)]
        lines = [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        lines += [
            f"  {name} stopped: {error}" for name, error in {**self.explained, **stage.unexplained}.items()
        ]
        lines += [f"  cut: {one} -> {other}" for one, other in sorted(stage.severed)]
        lines += [f"  under way: {letter}" for letter in stage.under_way[:20]]
        return "\n".join(line.rstrip() for line in lines)

    def select(
        self, words: Sequence[str], options: dict[str, str], *, may_be_none: bool = False
    ) -> list[Letter]:
        """What is under way FROM TO [KIND] [N|last] [term=N], the oldest first."""
        words = list(words)
        if words == ["all"]:
            words = ["*", "*"]
        if len(words) < 2:
            raise ScenarioError("say from whom and to whom; * is anybody")
        sender, receiver, *rest = words
        kind = rest.pop(0) if rest and rest[0] in KINDS else ""
        found = [
            letter
            for letter in self.stage.under_way
            if sender in ("*", letter.sender)
            and receiver in ("*", letter.receiver)
            and (letter.kind == kind if kind else True)
        ]
        if "term" in options:
            found = [x for x in found if getattr(x.message, "term", None) == int(options["term"])]
        if not found and not may_be_none:
            raise ScenarioError(f"no {kind or 'message'} from {sender} to {receiver} is under way")
        if rest:
            found = found[-1:] if rest[0] == "last" else found[: int(rest[0])]
            wanted = 1 if rest[0] == "last" else int(rest[0])
            if len(found) < wanted and not may_be_none:
                raise ScenarioError(f"there are only {len(found)} such messages under way")
        return found

    # -- setting the stage

    def do_nodes(self, words: list[str], options: dict[str, str]) -> None:
        flags = {"sessions", "lease", "sealed", "unstarted"}
        names = [word for word in words if word not in flags]
        timing = Timing(
            session_ttl_ms=_milliseconds(options.get("ttl", "10s")),
            request_timeout_ms=_milliseconds(options.get("timeout", "10s")),
        )
        stage = Stage(
            names,
            timing=timing,
            is_sealed="sealed" in words,
            reads_by_lease="lease" in words,
            segment_size_bytes=int(options.get("segment", 64 * 1024)),
            chunk_size_bytes=int(options.get("chunk", 256 * 1024)),
            has_sessions="sessions" in words,
        )
        stage.__enter__()
        self._stage = stage
        if "unstarted" in words:
            return
        for name in names:
            stage.start_member(name)
        stage.plumb()
        if not all(process.kernel.is_formed for process in stage.staged_members):
            raise ScenarioError("the cluster did not form")
        leader = options.get("leader")
        if leader is None:
            return
        self.do_elect([leader], {})
        if stage.has_sessions:
            self._until(
                "everybody has a session", 3000, lambda: all(p.kernel.has_usable_leader for p in stage.actors)
            )
        self._quiet()

    def _quiet(self) -> None:
        """Let everybody hear of everything, and leave nothing under way."""
        self.stage.run_until(30)

    def _until(self, what: str, duration_ms: int, until: Callable[[], bool]) -> None:
        if not self.stage.run_until(duration_ms, until):
            raise ScenarioError(f"not within {duration_ms} ms: {what}")

    def do_client(self, words: list[str], options: dict[str, str]) -> None:
        name, *members = words
        self.stage.start_client(name, [self.stage.members[member] for member in members])

    def do_allow(self, words: list[str], options: dict[str, str]) -> None:
        self.stage.allowed.update(words)

    def do_patience(self, words: list[str], options: dict[str, str]) -> None:
        self.stage.patience[words[0]] = [_milliseconds(word) for word in words[1:]]

    def do_secret(self, words: list[str], options: dict[str, str]) -> None:
        """`secret n1 other`: at its next start n1 has another secret than the rest; `same` is that of all."""
        self.stage.secrets.pop(words[0], None)
        if words[1] != "same":
            self.stage.secrets[words[0]] = f"the secret of {words[1]}, long enough"

    # -- processes

    def do_start(self, words: list[str], options: dict[str, str]) -> None:
        name, *flags = words
        process = self.stage.processes.get(name)
        if process is not None and process.is_up:
            raise ScenarioError(f"{name} is up")
        self.explained.pop(name, None)
        try:
            self.stage.start_member(name, bootstrap="bootstrap" in flags)
        except CoordError as error:
            self.stage.unexplained[name] = error

    do_restart = do_start

    def do_crash(self, words: list[str], options: dict[str, str]) -> None:
        """`crash n1 n2 [lose|keep|tear]`, or `crash n1 before|after OPERATION [lose|keep|tear]`."""
        stage = self.stage
        if words[-1] in ("lose", "keep", "tear"):
            stage.fate = words.pop()
        else:
            stage.fate = "lose"
        if len(words) == 3 and words[1] in ("before", "after"):
            disk = stage.disks[self._up(words[0]).name]
            assert isinstance(disk, StageDisk)
            disk.stop_at(words[1], words[2])
            return
        for name in words:
            self._up(name).crash()

    def do_kill(self, words: list[str], options: dict[str, str]) -> None:
        for name in words:
            process = self._up(name)
            if isinstance(process, StageMember):
                process.kill()
            else:
                process.crash()

    def do_pause(self, words: list[str], options: dict[str, str]) -> None:
        for name in words:
            self._up(name).is_paused = True

    def do_resume(self, words: list[str], options: dict[str, str]) -> None:
        """It goes on with all that has come meanwhile, late."""
        for name in words:
            process = self._up(name)
            process.is_paused = False
            process.turn()

    # -- disks

    def do_wipe(self, words: list[str], options: dict[str, str]) -> None:
        self._replace_disk(words[0], StageDisk())

    def do_backup(self, words: list[str], options: dict[str, str]) -> None:
        self._backups[words[1]] = self._copy_of(words[0])

    def do_put_back(self, words: list[str], options: dict[str, str]) -> None:
        self._replace_disk(words[0], self._backups[words[1]])

    def do_swap(self, words: list[str], options: dict[str, str]) -> None:
        one, other = self._copy_of(words[0]), self._copy_of(words[1])
        self._replace_disk(words[0], other)
        self._replace_disk(words[1], one)

    def _copy_of(self, name: str) -> StageDisk:
        copy = self.stage.disks[name].clone()
        copy.__class__ = StageDisk  # what it adds has its class's defaults
        assert isinstance(copy, StageDisk)
        return copy

    def _replace_disk(self, name: str, disk: StageDisk) -> None:
        process = self.stage.processes.get(name)
        if process is not None and process.is_up:
            raise ScenarioError(f"{name} is up: stop it first")
        self.stage.disks[name] = disk
        self.stage.damaged.add(name)

    def do_damage(self, words: list[str], options: dict[str, str]) -> None:
        """`damage n1 log|snapshot|identity first|middle|last`: a bit of that file's content is flipped."""
        name, what, place = words
        disk = self.stage.disks[name]
        endings = {"log": ".log", "snapshot": ".snap", "identity": "identity"}
        paths = [path for path in disk.paths() if path.endswith(endings[what])]
        if not paths:
            raise ScenarioError(f"{name} has no {what}: {disk.paths()}")
        content = disk.content(paths[-1]).rstrip(b"\0")
        offset = {"first": len(content) // 4, "middle": len(content) // 2, "last": len(content) - 1}[place]
        disk.flip_bit(paths[-1], offset, 2)
        self.stage.damaged.add(name)

    def do_lose(self, words: list[str], options: dict[str, str]) -> None:
        """`lose n1`: the last file of its log, and nothing else."""
        disk = self._copy_of(words[0])
        disk.unlink([path for path in disk.paths() if path.endswith(".log")][-1])
        disk.sync_directory("/data")
        self._replace_disk(words[0], disk)

    def do_fail(self, words: list[str], options: dict[str, str]) -> None:
        """`fail n1 OPERATION [always]`: the next one fails with an input/output error."""
        name, operation, *rest = words
        self.stage.fail_disk(name, operation, is_sticky=rest == ["always"])

    def do_fill(self, words: list[str], options: dict[str, str]) -> None:
        """`fill n1`: no byte more fits on its disk."""
        self.stage.fail_disk(words[0], "full", is_sticky=True)

    def do_mend(self, words: list[str], options: dict[str, str]) -> None:
        self.stage.disks[words[0]].heal()
        self.stage.disks[words[0]].capacity = None

    # -- the network

    def do_deliver(self, words: list[str], options: dict[str, str]) -> None:
        if words == ["all"]:
            self.stage.deliver_all()
            return
        found = self.select(words, options)
        passing = [letter for letter in found if self.stage.can_pass(letter)]
        if not passing:
            raise ScenarioError(f"cannot pass: {found[0]}")
        self.stage.deliver(passing)

    def do_burst(self, words: list[str], options: dict[str, str]) -> None:
        """Everything that is under way to a process arrives in one turn of it."""
        passing = [letter for letter in self.select(["*", words[0]], {}) if self.stage.can_pass(letter)]
        self.stage.deliver(passing, is_together=True)

    def do_drop(self, words: list[str], options: dict[str, str]) -> None:
        for letter in self.select(words, options, may_be_none=words == ["all"]):
            self.stage.under_way.remove(letter)

    def do_duplicate(self, words: list[str], options: dict[str, str]) -> None:
        for letter in self.select(words, options):
            self.stage.under_way.append(
                Letter(letter.sender, letter.to, letter.kind, letter.message, letter.event)
            )

    def do_keep(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`keep FROM TO KIND as x`: take a message off the wire, for `replay x`, as often as wanted."""
        found = self.select(words, options)
        self._kept[name] = found
        for letter in found:
            self.stage.under_way.remove(letter)

    def do_copy(self, words: list[str], options: dict[str, str], name: str) -> None:
        """As `keep`, but what is copied is still under way."""
        self._kept[name] = self.select(words, options)

    def do_replay(self, words: list[str], options: dict[str, str]) -> None:
        for letter in self._kept[words[0]]:
            if not letter.to.process.is_up:
                raise ScenarioError(f"the process that it was sent to is gone: {letter}")
            self.stage.deliver([Letter(letter.sender, letter.to, letter.kind, letter.message, letter.event)])

    def do_garble(self, words: list[str], options: dict[str, str]) -> None:
        """A bit of each is flipped on its way."""
        for letter in self.select(words, options):
            frame = bytearray(letter.event.frame)
            frame[-1] ^= 1
            letter.event = letter.event._replace(frame=bytes(frame))

    def do_reverse(self, words: list[str], options: dict[str, str]) -> None:
        """What is under way arrives in the opposite order."""
        self.stage.under_way.reverse()

    def do_shuffle(self, words: list[str], options: dict[str, str]) -> None:
        random.Random(int(words[0])).shuffle(self.stage.under_way)

    def do_manual(self, words: list[str], options: dict[str, str]) -> None:
        if not set(words) <= KINDS:
            raise ScenarioError(f"kinds of messages are {', '.join(sorted(KINDS))}")
        self.stage.automatic.difference_update(words)

    def do_automatic(self, words: list[str], options: dict[str, str]) -> None:
        self.stage.automatic.update(words)

    def do_cut(self, words: list[str], options: dict[str, str]) -> None:
        """`cut a b`, `cut a -> b`, `cut a b | c d`: between the groups, both ways."""
        if "->" in words:
            middle = words.index("->")
            pairs = [(a, b) for a in words[:middle] for b in words[middle + 1 :]]
        else:
            middle = words.index("|") if "|" in words else 1
            rest = words[middle + 1 :] if "|" in words else words[1:]
            pairs = [pair for a in words[:middle] for b in rest for pair in ((a, b), (b, a))]
        for one, other in pairs:
            self._known(one, other)
            self.stage.severed.add((one, other))

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.stage.clocks:
                raise ScenarioError(f"there is no {name}")

    def do_isolate(self, words: list[str], options: dict[str, str]) -> None:
        for name in words:
            self._known(name)
            self.do_cut([name, "|", *[other for other in self.stage.clocks if other != name]], {})

    def do_heal(self, words: list[str], options: dict[str, str]) -> None:
        """All cuts, or those between two."""
        if words:
            one, other = words
            self.stage.severed -= {(one, other), (other, one)}
        else:
            self.stage.severed.clear()

    def do_reset(self, words: list[str], options: dict[str, str]) -> None:
        """The connections between two processes are lost and made anew; what was under way may still come."""
        one, other = (self._up(name) for name in words[:2])
        for here, there in ((one, other), (other, one)):
            for wire in list(here.transport.wires.values()):  # type: ignore[attr-defined]  # a StageTransport
                if wire.listener is there.transport:
                    here.transport.lose(wire)  # type: ignore[attr-defined]  # the same

    # -- time

    def do_tick(self, words: list[str], options: dict[str, str]) -> None:
        names = list(self.stage.clocks) if words[0] == "all" else [words[0]]
        for name in names:
            self._known(name)
            self.stage.advance(name, _milliseconds(words[1]))

    def do_sleep(self, words: list[str], options: dict[str, str]) -> None:
        """Its clock goes on, it does not run: a suspended machine, or a process that waits for its turn."""
        self._known(words[0])
        self.stage.advance(words[0], _milliseconds(words[1]), is_asleep=True)

    def do_wake(self, words: list[str], options: dict[str, str]) -> None:
        """It goes round, with whatever has come."""
        for name in words:
            self._up(name).turn()

    def do_run(self, words: list[str], options: dict[str, str]) -> None:
        self.stage.run_until(_milliseconds(words[0]))

    # -- elections

    def do_elect(self, words: list[str], options: dict[str, str]) -> None:
        """`elect n1 [by n2 n3]`: it campaigns, and gets what it needs from those (or all) that it reaches."""
        process = self.member(words[0])
        for _ in range(3):  # refused the first time, it may only have had to learn the term
            self.do_attempt(words, options)
            if not process.is_up or process.kernel.is_leader:
                break
        if not process.is_up or not process.kernel.is_leader:
            raise ScenarioError(f"{words[0]} was not elected")

    def do_attempt(self, words: list[str], options: dict[str, str]) -> None:
        """As `elect`, but it may fail."""
        stage = self.stage
        name = words[0]
        voters = words[2:] if words[1:2] == ["by"] else [n for n in stage.members if n != name]
        self._known(*voters)
        self.do_free([other for other in stage.members if other != name], {})
        self.do_campaign([name], {})
        while True:
            letters = [
                x
                for x in stage.under_way
                if stage.can_pass(x)
                and (
                    (x.sender == name and x.receiver in voters and x.kind in ("prevote", "vote"))
                    or (
                        x.receiver == name
                        and x.sender in voters
                        and x.kind in ("prevote-reply", "vote-reply")
                    )
                )
            ]
            if not letters:
                return
            stage.deliver(letters[:1])

    def do_free(self, words: list[str], options: dict[str, str]) -> None:
        """`free n2 n3`: their clocks go on until they have promised silence to nobody, not until they campaign."""
        stage = self.stage
        for process in stage.staged_members:
            raft = process.kernel.raft
            if process.name in words and raft is not None and not raft.is_leader:
                process.turn()
                left = raft.deadline - process.clock() - 1
                stage.advance(process.name, max(0, min(stage.timing.election_ms_min, left)))

    def do_campaign(self, words: list[str], options: dict[str, str]) -> None:
        """Its patience ends: its clock goes on until it asks for votes; nothing is delivered."""
        process = self.member(words[0])
        raft = process.kernel.raft
        if raft is None or raft.is_leader:
            raise ScenarioError(f"{words[0]} cannot campaign")
        before = raft.counters.get("pre_campaigns", 0)
        for _ in range(100):
            process.turn()
            if raft.counters.get("pre_campaigns", 0) > before or not process.is_up:
                return
            self.stage.advance(process.name, max(1, raft.deadline - process.clock()))
        raise ScenarioError(f"{words[0]} does not campaign")

    def do_transfer(self, words: list[str], options: dict[str, str]) -> None:
        leader = self.member(words[0])
        if leader.kernel.raft is None or not leader.kernel.raft.transfer_leadership(words[1]):
            raise ScenarioError(f"{words[0]} does not transfer its leadership")
        leader.turn()

    # -- writing and reading

    def do_append(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`append n1 [count=N] [size=N] [as p1]`: the leader's core takes an entry that changes nothing."""
        leader = self.member(words[0])
        raft = leader.kernel.raft
        if raft is None:
            raise ScenarioError(f"{words[0]} belongs to no cluster")
        for _ in range(int(options.get("count", 1))):
            self._serial += 1
            # A disk of a member that there is not: refused by the machine, and told apart by its name.
            body = commands.record_disk(f"none-{self._serial}", bytes(int(options.get("size", 16))))
            entry = raft.propose(commands.pack_entry(leader.kernel.machine.log_time_ms, 0, 0, 0, body))
        if name:
            self.begun[name] = (entry.term, entry.index)
        if not options.get("later"):
            leader.turn()

    def _begin(self, process: Actor, generator: Any, name: str) -> None:
        operation = process.start_operation(generator)
        self._serial += 1
        self.begun[name or f"({self._serial})"] = operation
        process.turn()

    def _map(self, options: dict[str, str]) -> _MapBase:
        timeout = (
            _milliseconds(options["timeout"])
            if "timeout" in options
            else self.stage.timing.request_timeout_ms
        )
        return _MapBase("m", None, timeout)

    def _guard(self, options: dict[str, str]) -> Any:
        if "guard" not in options:
            return None
        grant = self.begun[options["guard"]].result
        if not isinstance(grant, Grant):
            raise ScenarioError(f"{options['guard']} has no grant")
        return grant

    def do_put(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`put n1 key value [guard=a1] [timeout=3s] [as p1]`."""
        node, key, value = words
        generator = self._map(options)._put_gen(key, value, self._guard(options))
        self._begin(self._up(node), generator, name)

    def do_insert(self, words: list[str], options: dict[str, str], name: str) -> None:
        """Fails when the key is there: shows whether something was executed twice."""
        node, key, value = words
        self._begin(self._up(node), self._map(options)._insert_gen(key, value, None), name)

    def do_swap_value(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`swap-value n1 key old new`: compare and set; `none` is no value."""
        node, key, old, new = words
        values = [ABSENT if value == "none" else value for value in (old, new)]
        self._begin(
            self._up(node), self._map(options)._compare_and_set_gen(key, values[0], values[1], None), name
        )

    def do_delete(self, words: list[str], options: dict[str, str], name: str) -> None:
        self._begin(self._up(words[0]), self._map(options)._delete_gen(words[1], None), name)

    def do_read(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`read n1 key [stale] [as r1]`."""
        node, key, *rest = words
        self._begin(self._up(node), self._map(options)._get_gen(key, None, is_stale=rest == ["stale"]), name)

    def do_cancel(self, words: list[str], options: dict[str, str]) -> None:
        operation = self.begun[words[0]]
        if not isinstance(operation, Operation):
            raise ScenarioError(f"{words[0]} cannot be cancelled")
        operation.cancel()
        self.actor(operation.process.name).turn()

    # -- sessions and locks

    def do_open(self, words: list[str], options: dict[str, str]) -> None:
        for name in words:
            process = self._up(name)
            process._kernel.open_session(process.clock())
            process.turn()

    def do_close(self, words: list[str], options: dict[str, str]) -> None:
        """It begins to leave: closes its session, then hands its leadership over."""
        process = self._up(words[0])
        process._kernel.begin_close(process.clock(), process.clock() + 5000)
        process.turn()

    def do_leave(self, words: list[str], options: dict[str, str]) -> None:
        """Go on with what `close` began, as the driver does before each stop."""
        process = self._up(words[0])
        has_left = process._kernel.has_left(process.clock())
        process.turn()
        if has_left:
            self.do_kill(words, {})

    def do_acquire(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`acquire n1 lock [timeout=5s] [as a1]`; `timeout=0` does not wait."""
        node, lock_name = words
        process = self._up(node)
        lock = _LockBase(process, lock_name, None, None, None)  # type: ignore[arg-type]  # stands for its cluster
        timeout = _milliseconds(options["timeout"]) / 1000 if "timeout" in options else None
        self._begin(process, lock._acquire_gen(timeout), name)

    def do_release(self, words: list[str], options: dict[str, str], name: str) -> None:
        """`release a1 [as p1]`: by the process that acquired it."""
        operation = self.begun[words[0]]
        grant = operation.result
        if not isinstance(grant, Grant):
            raise ScenarioError(f"{words[0]} has no grant")
        process = self._up(operation.process.name)
        lock = _LockBase(process, grant.name, None, None, None)  # type: ignore[arg-type]  # stands for its cluster
        self._begin(process, lock._release_gen(grant), name)

    # -- snapshots

    def do_snapshot(self, words: list[str], options: dict[str, str]) -> None:
        """`snapshot n1 [retain=N]`: it writes its state down and forgets its log but for N entries."""
        process = self.member(words[0])
        kernel = process.kernel
        taker = kernel._taker
        if taker is None:
            raise ScenarioError(f"{words[0]} belongs to no cluster")
        taken = taker.taken_count
        with (
            patch("coordlib.node.transfer.LOG_ENTRIES_MAX", 0),
            patch("coordlib.node.transfer.LOG_SIZE_BYTES_MAX", 0),
            patch("coordlib.node.kernel.ENTRIES_RETAINED", int(options.get("retain", 0))),
        ):
            while process.is_up and taker.taken_count == taken:
                before = taker.is_active, taker.taken_count
                process._turn_once(0)
                if not process.is_up or (taker.is_active, taker.taken_count) == before == (False, taken):
                    break
        process.turn()
        if process.is_up and taker.taken_count == taken:
            raise ScenarioError(f"{words[0]} took no snapshot")

    # -- claims and the end

    def do_assert(self, words: list[str], options: dict[str, str]) -> None:
        self._claims.check(words, options)

    def do_settle(self, words: list[str], options: dict[str, str]) -> None:
        """`settle [without n3]`: all is healed but those, and everybody agrees and goes on."""
        stage = self.stage
        gone = words[1:] if words[:1] == ["without"] else []
        stage.heal()
        for name in stage.members:
            process = stage.processes.get(name)
            if name in gone:
                if process is not None and process.is_up:
                    self.do_kill([name], {})
            elif process is None or not process.is_up:
                stage.start_member(name)
        for actor in stage.actors:
            actor.is_paused = False
            actor.turn()
        self._until("all follow one leader and have the same", SETTLE_MS, self._do_all_agree)
        leader = stage.leader
        assert isinstance(leader, StageMember)
        self.do_append([leader.name], {}, "(last)")
        self._until(
            "a new entry is applied everywhere",
            SETTLE_MS,
            lambda: self._claims.outcome("(last)")[0] == "ok" and self._do_all_agree(),
        )
        if stage.unexplained:
            name, error = next(iter(stage.unexplained.items()))
            raise ScenarioError(f"{name} stopped while everything was well: {error}")
        self._claims.claim_equal("all")
        stage.watch.finish(stage.staged_members)

    def _do_all_agree(self) -> bool:
        members = self.stage.staged_members
        rafts = [process.kernel.raft for process in members]
        leaders = [raft for raft in rafts if raft is not None and raft.is_leader]
        if len(leaders) != 1:
            return False
        leader = leaders[0]
        last = leader.last_index
        return all(
            raft is not None
            and raft.leader == leader.node_id
            and raft.term == leader.term
            and raft.last_index == raft.commit_index == process.kernel.machine.applied_index == last
            and not raft.is_barred
            for raft, process in zip(rafts, members, strict=True)
        )


_NAMED: Final = {
    *("append", "put", "insert", "swap-value", "delete", "read", "acquire", "release", "keep", "copy"),
}
