"""Plays transcripts: blocks of commands, `----`, and what they print. See testdata/*.txt.

Commands (times in ticks; each node has a clock that only `tick` moves; patience is always 600 ticks):

    cluster a b c [learners=d] [setting=value ...]   start a group; settings are RaftConfig's
    load a term=3 [vote=b] terms=1,1,3               put this on a's disk and start it again
    tick a|all N           move the clock on by N and tick
    stabilize [a b ...]    let these (or all) write, send and receive until nothing is left
    ready a / write a      take a Ready (early messages leave) / its oldest Ready becomes durable
    deliver a [from=b]     step what was sent to a, then tick with an unmoved clock
    discard a [from=b]     lose what was sent to a
    resend a [from=b]      queue again what was last delivered or discarded there
    cut a b / heal         lose what they send to each other from now on / no more
    propose a TEXT, read a NAME, campaign a, transfer a [b], compact a INDEX RETAIN, bar a TERM INDEX
    change a VOTERS [outgoing=...]   propose a configuration; VOTERS is a,b,c
    snapshot a b [fail]    a's newest snapshot is transferred to b
    reachable a b, unreachable a b, crash a, start a
    log a, state [a ...], progress a, counts a NAME ...
"""

from __future__ import annotations

from typing import Any

from coordlib.errors import CoordError
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftMessage,
    RequestVote,
    SnapshotStatus,
    TimeoutNow,
    VoteReply,
)
from tests.raft.harness import Member, encode_configuration


def describe(message: RaftMessage) -> str:
    """One message in one short line."""
    if isinstance(message, RequestVote):
        name = "PreVote" if message.is_pre_vote else "RequestVote"
        extra = " transfer" if message.is_transfer else ""
        return f"{name} term={message.term} last={message.last_index}@{message.last_term}{extra}"
    if isinstance(message, VoteReply):
        name = "PreVoteReply" if message.is_pre_vote else "VoteReply"
        return f"{name} term={message.term} {'granted' if message.is_granted else 'refused'}"
    if isinstance(message, AppendEntries):
        entries = " ".join(f"{entry.index}@{entry.term}" for entry in message.entries)
        head = f"Append term={message.term} prev={message.prev_index}@{message.prev_term}"
        return f"{head} commit={message.commit} round={message.round} [{entries}]"
    if isinstance(message, AppendReply):
        if message.is_success:
            return f"AppendReply term={message.term} match={message.match_index}@{message.match_term}"
        hint = f"{message.match_index}@{message.match_term}"
        return f"AppendReply term={message.term} rejected prev={message.prev_index} hint={hint}"
    if isinstance(message, Heartbeat):
        return f"Heartbeat term={message.term} commit={message.commit} round={message.round}"
    if isinstance(message, HeartbeatReply):
        return f"HeartbeatReply term={message.term} round={message.round}"
    if isinstance(message, InstallSnapshot):
        return f"InstallSnapshot term={message.term} {message.meta.index}@{message.meta.term}"
    assert isinstance(message, TimeoutNow)
    return f"TimeoutNow term={message.term}"


class Player:
    """The cluster of one transcript."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.clock: dict[str, int] = {}
        self.queues: dict[str, list[tuple[str, RaftMessage]]] = {}
        self.taken: dict[str, list[tuple[str, RaftMessage]]] = {}
        self.cuts: set[tuple[str, str]] = set()
        self.configuration = Configuration(())
        self.out: list[str] = []

    def play(self, line: str) -> None:
        words = line.split()
        options = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        arguments = [word for word in words[1:] if "=" not in word]
        command = getattr(self, f"do_{words[0]}")
        try:
            command(*arguments, **options)
        except CoordError as exc:
            self.out.append(f"{type(exc).__name__}: {exc}")
        for member in self.members.values():
            if member.node is not None:
                member.node.check_invariants()

    def _start(self, name: str) -> None:
        self.members[name].start(self.clock[name], lambda low, high: high)

    def _send(self, sender: str, messages: list[tuple[str, RaftMessage]]) -> None:
        for receiver, message in messages:
            if receiver in self.queues and (sender, receiver) not in self.cuts:
                self.queues[receiver].append((sender, message))

    # -- commands

    def do_cluster(self, *names: str, learners: str = "", **settings: str) -> None:
        outsiders = tuple(name for name in learners.split(",") if name)
        self.configuration = Configuration(names, outsiders)
        numbers: dict[str, Any] = {name: int(value) for name, value in settings.items()}
        numbers.setdefault("commit_notice_ticks", 0)
        for name in (*names, *outsiders):
            self.members[name] = Member(name, self.configuration, **numbers)
            self.clock[name] = 0
            self.queues[name] = []
            self.taken[name] = []
            self._start(name)

    def do_load(self, name: str, term: str, vote: str = "", terms: str = "") -> None:
        disk = self.members[name].disk
        disk.hard_state = HardState(int(term), vote)
        disk.entries = [Entry(int(t), i, 1, b"") for i, t in enumerate(terms.split(","), 1) if t]
        self._start(name)

    def do_tick(self, name: str, ticks: str) -> None:
        for each in list(self.members) if name == "all" else [name]:
            self.clock[each] += int(ticks)
            node = self.members[each].node
            if node is not None:
                node.tick(self.clock[each])

    def do_ready(self, name: str) -> None:
        member = self.members[name]
        ready = member.take_ready()
        out = self.out
        if ready.is_leadership_changed:
            out.append(f"{name} is {ready.role.name} term={ready.term} leader={ready.leader or '-'}")
        if ready.snapshot is not None:
            out.append(f"{name} restores {ready.snapshot.index}@{ready.snapshot.term}")
        if ready.committed:
            entries = " ".join(f"{entry.index}@{entry.term}" for entry in ready.committed)
            out.append(f"{name} applies {entries}")
        out.extend(f"{name} may read {context} at {index}" for context, index in ready.reads)
        out.extend(f"{name} failed read {context}" for context in ready.failed_reads)
        out.extend(f"{name} wants to send a snapshot to {follower}" for follower in ready.snapshots_wanted)
        self._send(name, ready.messages)

    def do_write(self, name: str) -> None:
        self._send(name, self.members[name].write_next())

    def _take(self, name: str, sender: str) -> list[tuple[str, RaftMessage]]:
        queue = self.queues[name]
        taken = [item for item in queue if sender in ("", item[0])]
        self.queues[name] = [item for item in queue if sender not in ("", item[0])]
        self.taken[name] = taken
        return taken

    def do_deliver(self, name: str, **options: str) -> None:
        for sender, message in self._take(name, options.get("from", "")):
            self.out.append(f"{sender}->{name} {describe(message)}")
            core = self.members[name].core
            core.step(sender, message)
            core.check_invariants()
        self.members[name].core.tick(self.clock[name])

    def do_discard(self, name: str, **options: str) -> None:
        for sender, message in self._take(name, options.get("from", "")):
            self.out.append(f"lost {sender}->{name} {describe(message)}")

    def do_resend(self, name: str, **options: str) -> None:
        self.queues[name] += [item for item in self.taken[name] if options.get("from", item[0]) == item[0]]

    def do_stabilize(self, *names: str) -> None:
        active = names or tuple(self.members)
        is_busy = True
        while is_busy:
            is_busy = False
            for name in active:
                member = self.members[name]
                if member.node is None:
                    self.queues[name].clear()
                    continue
                while member.outstanding:
                    self.do_write(name)
                if self.queues[name]:
                    is_busy = True
                    self.do_deliver(name)
                while member.core.has_ready():
                    is_busy = True
                    self.do_ready(name)
                    self.do_write(name)

    def do_cut(self, one: str, other: str) -> None:
        self.cuts |= {(one, other), (other, one)}

    def do_heal(self) -> None:
        self.cuts.clear()

    def do_propose(self, name: str, text: str) -> None:
        self.members[name].core.propose(text.encode())

    def do_change(self, name: str, voters: str, outgoing: str = "") -> None:
        old = tuple(item for item in outgoing.split(",") if item)
        data = encode_configuration(Configuration(tuple(voters.split(",")), (), old))
        self.members[name].core.propose(data, int(EntryKind.CONFIGURATION))

    def do_read(self, name: str, context: str) -> None:
        self.members[name].core.request_read(context)

    def do_campaign(self, name: str) -> None:
        self.members[name].core.campaign()

    def do_transfer(self, name: str, target: str | None = None) -> None:
        self.out.append("begun" if self.members[name].core.transfer_leadership(target) else "refused")

    def do_compact(self, name: str, index: str, retain: str) -> None:
        self.members[name].snapshot_at(int(index), int(retain))

    def do_bar(self, name: str, term: str, index: str) -> None:
        self.members[name].core.bar_until(int(term), int(index))

    def do_snapshot(self, sender: str, receiver: str, outcome: str = "") -> None:
        core = self.members[sender].core
        meta = core.log.snapshot
        if not outcome:
            disk = self.members[receiver].disk
            if meta.index > disk.snapshot.index:
                disk.snapshot = meta
            self._send(sender, [(receiver, InstallSnapshot(core.term, meta))])
        core.report_snapshot(receiver, SnapshotStatus(meta.index, not outcome))

    def do_reachable(self, name: str, follower: str) -> None:
        self.members[name].core.report_reachable(follower)

    def do_unreachable(self, name: str, follower: str) -> None:
        self.members[name].core.report_unreachable(follower)

    def do_crash(self, name: str) -> None:
        self.members[name].crash()
        self.queues[name].clear()

    def do_start(self, name: str) -> None:
        self._start(name)

    def do_log(self, name: str) -> None:
        log = self.members[name].core.log
        entries = " ".join(f"{e.index}@{e.term}" for e in log.slice(log.start_index, log.last_index))
        self.out.append(f"{name} start={log.start_index} stable={log.stable_index} [{entries}]")

    def do_state(self, *names: str) -> None:
        for name in names or tuple(self.members):
            core = self.members[name].node
            if core is None:
                self.out.append(f"{name} down")
                continue
            self.out.append(
                f"{name} {core.role.name} term={core.term} vote={core.vote or '-'} "
                f"leader={core.leader or '-'} last={core.log.last_index}@{core.log.last_term} "
                f"commit={core.commit_index}"
            )

    def do_progress(self, name: str) -> None:
        for follower, view in self.members[name].core.progress.items():
            recent = "" if view.is_recent else " silent"
            self.out.append(f"{follower} {view.state.name} match={view.match} next={view.next}{recent}")

    def do_counts(self, name: str, *counters: str) -> None:
        counts = self.members[name].core.counters
        self.out.extend(f"{counter}={counts.get(counter, 0)}" for counter in counters)


def run_transcript(text: str) -> str:
    """Play a transcript; return it with what its commands really printed."""
    player = Player()
    written: list[str] = []
    is_expected = False
    for line in text.splitlines():
        if line == "----":
            written.append(line)
            written.extend(player.out)
            player.out.clear()
            is_expected = True
        elif not line.strip():
            is_expected = False
            written.append("")
        elif is_expected:
            continue
        else:
            written.append(line)
            if not line.startswith("#"):
                player.play(line)
    return "\n".join(written).rstrip("\n") + "\n"
