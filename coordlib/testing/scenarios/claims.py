"""What a scenario can assert. Every claim says what was expected and what was seen; none can hold by accident."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from coordlib.api.codec import encode_key, encode_name
from coordlib.api.locks import Grant
from coordlib.errors import DefiniteError, IndeterminateError
from coordlib.machine import commands
from coordlib.node.session import SessionState
from coordlib.storage import SegmentStorage
from coordlib.storage.base import RecoveredGroup
from coordlib.testing.scenarios.script import ScenarioError
from coordlib.testing.simulation.plain import CLUSTER

if TYPE_CHECKING:
    from coordlib.testing.scenarios.play import Play
    from coordlib.testing.scenarios.stage import StageMember

__all__ = ["Claims", "durable"]

_COMPARISONS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


def durable(member: StageMember) -> RecoveredGroup | None:
    """What the member's disk would hold after a power cut at this moment, as production would read it."""
    disk = member.fs.clone()
    disk.crash_with(lambda change: [], lambda: False)
    storage = SegmentStorage(
        disk,
        "/data",
        node_id=member.name,
        cluster_name=CLUSTER,
        new_disk_id=b"\1" * 16,
        segment_size_bytes=member.stage.segment_size_bytes,
        fill_size_bytes=1024,
    )
    try:
        return storage.open().groups.get(0)
    finally:
        storage.close()


def entries_text(entries: Any) -> str:
    """As `1@1 2@1`; a run of one term as `1..9@1`."""
    runs: list[list[int]] = []
    for entry in entries:
        if runs and runs[-1][2] == entry.term and runs[-1][1] == entry.index - 1:
            runs[-1][1] = entry.index
        else:
            runs.append([entry.index, entry.index, entry.term])
    return (
        " ".join(
            f"{a}@{t}" if a == b else f"{a}@{t} {b}@{t}" if b == a + 1 else f"{a}..{b}@{t}"
            for a, b, t in runs
        )
        or "empty"
    )


def _expand(words: list[str]) -> list[str]:
    """`1..3@2` as its three entries."""
    out: list[str] = []
    for word in words:
        span, at, term = word.partition("@")
        first, dots, last = span.partition("..")
        if at and dots:
            out += [f"{index}@{term}" for index in range(int(first), int(last) + 1)]
        else:
            out.append(word)
    return out


class Claims:
    """The second word of an `assert` names the method here; every other first word, something that was begun."""

    def __init__(self, play: Play) -> None:
        self.play = play

    @property
    def stage(self) -> Any:
        return self.play.stage

    def check(self, words: list[str], options: dict[str, str]) -> None:
        if not words:
            raise ScenarioError("assert what?")
        if words[0] in self.play.begun:
            self._outcome(words[0], words[1:])
            return
        claim = getattr(self, f"claim_{words[0].replace('-', '_')}", None)
        if claim is None:
            raise ScenarioError(f"there is no claim {words[0]!r}, and nothing was begun under that name")
        claim(*words[1:], **options)

    def _equal(self, what: str, expected: Any, seen: Any) -> None:
        if expected != seen:
            raise ScenarioError(f"{what}: expected {expected}, seen {seen}")

    def _compare(self, what: str, words: tuple[str, ...], seen: int) -> None:
        sign, number = ("=", words[0]) if len(words) == 1 else (words[0], words[1])
        if not _COMPARISONS[sign](seen, int(number)):
            raise ScenarioError(f"{what}: expected {sign} {number}, seen {seen}")

    def _raft(self, name: str) -> Any:
        raft = self.play.member(name).kernel.raft
        if raft is None:
            raise ScenarioError(f"{name} belongs to no cluster yet")
        return raft

    def _leader(self) -> StageMember:
        leader: StageMember | None = self.stage.leader
        if leader is None:
            raise ScenarioError("there is no leader to ask")
        return leader

    # -- consensus

    def claim_leader(self, name: str, **options: str) -> None:
        raft = self._raft(name)
        self._equal(f"role of {name}", "LEADER", raft.role.name)
        if "term" in options:
            self._equal(f"term of {name}", int(options["term"]), raft.term)

    def claim_no(self, what: str, *names: str) -> None:
        self._equal("what there is none of", "leader", what)
        leaders = [p.name for p in self.stage.staged_members if p.kernel.is_leader]
        self._equal("leaders", [], [name for name in leaders if not names or name in names])

    def claim_role(self, name: str, role: str) -> None:
        self._equal(f"role of {name}", role.upper().replace("-", "_"), self._raft(name).role.name)

    def claim_follows(self, name: str, leader: str) -> None:
        self._equal(f"whom {name} follows", "" if leader == "nobody" else leader, self._raft(name).leader)

    def claim_term(self, name: str, *number: str) -> None:
        self._compare(f"term of {name}", number, self._raft(name).term)

    def claim_vote(self, name: str, vote: str) -> None:
        self._equal(f"vote of {name}", "" if vote == "nobody" else vote, self._raft(name).vote)

    def claim_durable_vote(self, name: str, vote: str, **options: str) -> None:
        group = durable(self.play.member(name))
        known = tuple(group.hard_state) if group is not None and group.hard_state.term else "none"
        expected = "none" if vote == "none" else (int(options["term"]), "" if vote == "nobody" else vote)
        self._equal(f"what the disk of {name} says of its vote", expected, known)

    def claim_committed(self, name: str, *number: str) -> None:
        self._compare(f"commit index of {name}", number, self._raft(name).commit_index)

    def claim_applied(self, name: str, *number: str) -> None:
        seen = self.play.member(name).kernel.machine.applied_index
        self._compare(f"applied index of {name}", number, seen)

    def claim_log(self, name: str, *words: str, **options: str) -> None:
        log = self._raft(name).log
        seen = log.slice(log.start_index, log.last_index)
        if "start" in options:
            self._equal(f"where the log of {name} starts", int(options["start"]), log.start_index)
        expected = [] if words == ("empty",) else _expand(list(words))
        if expected != [f"{entry.index}@{entry.term}" for entry in seen]:
            raise ScenarioError(f"log of {name}: expected {' '.join(words)}, seen {entries_text(seen)}")

    def claim_last(self, name: str, last: str) -> None:
        log = self._raft(name).log
        self._equal(f"last entry of {name}", last, f"{log.last_index}@{log.last_term}")

    def claim_durable(self, name: str, *words: str) -> None:
        group = durable(self.play.member(name))
        seen = [] if group is None else group.entries
        expected = [] if words == ("empty",) else _expand(list(words))
        if expected != [f"{entry.index}@{entry.term}" for entry in seen]:
            raise ScenarioError(
                f"log on the disk of {name}: expected {' '.join(words)}, seen {entries_text(seen)}"
            )

    def claim_match(self, leader: str, follower: str, *number: str) -> None:
        view = self._raft(leader).progress[follower]
        self._compare(f"what {leader} knows {follower} to hold", number, view.match)

    def claim_next(self, leader: str, follower: str, *number: str) -> None:
        view = self._raft(leader).progress[follower]
        self._compare(f"what {leader} sends {follower} next", number, view.next)

    def claim_progress(self, leader: str, follower: str, state: str) -> None:
        view = self._raft(leader).progress[follower]
        self._equal(f"how {leader} sends to {follower}", state.upper(), view.state.name)

    def claim_start(self, name: str, *number: str) -> None:
        self._compare(f"where the log of {name} starts", number, self._raft(name).log.start_index)

    def claim_snapshot(self, name: str, *number: str) -> None:
        self._compare(f"snapshot of {name}", number, self._raft(name).log.snapshot.index)

    def claim_barred(self, name: str, is_barred: str = "yes") -> None:
        self._equal(f"whether {name} is barred", is_barred == "yes", self._raft(name).is_barred)

    def claim_equal(self, *names: str) -> None:
        members = (
            [self.play.member(name) for name in names] if names != ("all",) else self.stage.staged_members
        )
        seen = {
            (p.kernel.raft.log.last_index, p.kernel.raft.log.last_term, p.kernel.machine.applied_index)
            for p in members
            if p.kernel.raft is not None
        }
        self._equal("how many different logs", 1, len(seen))
        self._equal("how many different states", 1, len({p.kernel.machine.digest() for p in members}))

    # -- what is under way, and what was counted

    def claim_pending(self, *words: str, **options: str) -> None:
        *selection, sign, number = words
        if sign not in _COMPARISONS:
            selection, sign = [*selection, sign], "="
        found = self.play.select(selection, options, may_be_none=True)
        if not _COMPARISONS[sign](len(found), int(number)):
            raise ScenarioError(
                f"under way from {' to '.join(selection[:2])}: expected {sign} {number} {' '.join(selection[2:])}, seen "
                f"{[str(letter) for letter in found]}"
            )

    def claim_says(self, sender: str, receiver: str, kind: str, *words: str, **options: str) -> None:
        """Of the newest such message, as the table shows it."""
        letter = self.play.select([sender, receiver, kind, "last"], {})[0]
        for word in [*words, *(f"{key}={value}" for key, value in options.items())]:
            if word not in str(letter).split():
                raise ScenarioError(f"{word!r} is not in: {letter}")

    def claim_count(self, name: str, counter: str, *number: str) -> None:
        process = self.play.actor(name)
        part, _, key = counter.partition(".")
        kernel = process._kernel
        tables: dict[str, Any] = {
            "raft": lambda: kernel.raft.counters,
            "wire": lambda: process._links.counters,
            "node": lambda: kernel.counters,
            "service": lambda: kernel.service.counters,
            "session": lambda: kernel.session.counters,
            "machine": lambda: kernel.machine.counters,
            "disk": lambda: self.play.member(name).fs.counts,
        }
        self._compare(f"{counter} of {name}", number, tables[part]().get(key, 0))

    def claim_event(self, name: str, event: str, *number: str) -> None:
        seen = sum(item.name == event for item in self.play.actor(name).events)
        self._compare(f"{event} of {name}", number or (">=", "1"), seen)

    # -- processes and disks

    def claim_stopped(self, name: str, code: str) -> None:
        error = self.stage.unexplained.get(name)
        self._equal(f"why {name} stopped", code, None if error is None else error.code)
        if code in ("invariant-violation", "fatal"):
            raise ScenarioError(f"{name} stopped because of a bug: {error}")
        del self.stage.unexplained[name]
        self.play.explained[name] = error

    def claim_said(self, name: str, *words: str) -> None:
        error = self.play.explained.get(name)
        if error is None or " ".join(words) not in str(error):
            raise ScenarioError(f"why {name} stopped: expected {' '.join(words)!r} in it, seen {error}")

    def claim_up(self, name: str) -> None:
        process = self.stage.processes.get(name)
        self._equal(f"whether {name} is up", True, process is not None and process.is_up)

    def claim_down(self, name: str) -> None:
        process = self.stage.processes.get(name)
        self._equal(f"whether {name} is up", False, process is not None and process.is_up)

    def claim_formed(self, name: str, is_formed: str = "yes") -> None:
        self._equal(f"whether {name} is formed", is_formed == "yes", self.play.member(name).kernel.is_formed)

    def claim_problem(self, name: str, peer: str, *words: str) -> None:
        process = self.play.actor(name)
        problem = process._kernel.peers.known[peer].problem or process._links.problems.get(peer, "")
        if " ".join(words) not in problem:
            raise ScenarioError(
                f"what {name} says of {peer}: expected {' '.join(words)!r} in it, seen {problem!r}"
            )

    def claim_trusts(self, name: str, peer: str, is_trusted: str = "yes") -> None:
        seen = self.play.member(name).kernel.peers.known[peer].is_trusted
        self._equal(f"whether {name} trusts {peer}", is_trusted == "yes", seen)

    # -- sessions, maps, locks

    def claim_session(self, name: str, state: str) -> None:
        view = self.play.actor(name)._kernel.session.view
        self._equal(f"session of {name}", state.upper(), SessionState(view.state).name)

    def claim_sessions(self, name: str, *number: str) -> None:
        seen = len(self.play.member(name).kernel.machine.sessions)
        self._compare(f"sessions known to {name}", number, seen)

    def claim_value(self, name: str, key: str, value: str) -> None:
        body = commands.query_get(encode_name("m", "map"), encode_key(key))
        (found,) = commands.decode_reply(self.play.member(name).kernel.machine.query(body))
        seen = None if found is None else self.play.codec.decode(found)
        self._equal(f"value of {key} on {name}", None if value == "none" else value, seen)

    def _lock(self, name: str, options: dict[str, str]) -> Any:
        member = self.play.member(options["on"]) if "on" in options else self._leader()
        return member.kernel.machine, member.kernel.machine._locks.table.get(encode_name(name, "lock"))

    def claim_holder(self, lock_name: str, holder: str, **options: str) -> None:
        machine, lock = self._lock(lock_name, options)
        begun = self.play.begun.get(holder)
        if begun is not None:
            grant = self._grant(holder)
            expected: Any = (grant._view.session_id, grant._sequence, grant._token)
            seen: Any = None if lock is None else (lock.session, lock.sequence, lock.token)
        else:
            expected = None if holder == "nobody" else holder
            seen = None if lock is None else machine.sessions.owner_of(lock.session)
        self._equal(f"holder of {lock_name}", expected, seen)

    def claim_waiters(self, lock_name: str, *number: str, **options: str) -> None:
        _, lock = self._lock(lock_name, options)
        self._compare(f"waiters of {lock_name}", number, len(lock.waiters or ()) if lock is not None else 0)

    def _grant(self, name: str) -> Grant:
        grant = getattr(self.play.begun.get(name), "result", None)
        if not isinstance(grant, Grant):
            raise ScenarioError(f"{name} has no grant")
        return grant

    def claim_token(self, one: str, sign: str, other: str) -> None:
        first, second = self._grant(one)._token, self._grant(other)._token
        if not _COMPARISONS[sign](first, second):
            raise ScenarioError(f"token of {one}: expected {sign} that of {other}, seen {first} and {second}")

    def claim_grant(self, name: str, state: str) -> None:
        operation = self.play.begun[name]
        with operation.process.reading_clock():
            self._equal(f"grant {name}", state, self._grant(name).state)

    # -- what was begun

    def _outcome(self, name: str, words: list[str]) -> None:
        seen, code, result = self.outcome(name)
        if not words:
            raise ScenarioError(f"assert what of {name}?")
        if words[0] == "=":
            self._equal(f"answer to {name} ({seen} {code})", " ".join(words[1:]), str(result).lower())
            return
        self._equal(f"outcome of {name}", words[0], seen)
        if len(words) > 1:
            self._equal(f"error of {name}", words[1], code)

    def outcome(self, name: str) -> tuple[str, str, Any]:
        """(what became of it, the error's code, the result)."""
        item = self.play.begun[name]
        if isinstance(item, tuple):  # an entry proposed to the core itself
            term, index = item
            known = self.stage.watch.committed.get(index)
            if known is None:
                return "pending", "", None
            return ("ok" if known.term == term else "lost"), "", None
        if not item.is_done:
            return "pending", "", None
        error = item.error
        if error is None:
            return "ok", "", item.result
        code = getattr(error, "code", "cancelled")
        if isinstance(error, DefiniteError):
            return "failed", code, None
        return ("unknown" if isinstance(error, IndeterminateError) else "ended"), code, None
