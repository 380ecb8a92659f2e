"""Defects of reads, of leases and of the clocks that they are counted by."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_RAWNODE = "coordlib.raft.rawnode:RawNode."
_REPLICATION = "coordlib.raft.replication:Replication."
_SERVICE = "coordlib.node.service:RequestService."
_CLIENT = "coordlib.node.session:SessionClient."

MUTANTS = (
    Mutant(
        "read-is-not-confirmed-by-a-quorum",
        "etcd 0.4.1, dqlite #207: a leader that is none any more answers",
        (
            replace(
                _RAWNODE + "_begin_read_round",
                "        if self._is_alone:\n",
                "        if self._is_alone or _mutant_hit():\n",
            ),
        ),
    ),
    Mutant(
        "read-before-the-first-entry-of-the-term",
        "etcd #7331, RedisRaft #22: a new leader does not know yet what is committed",
        (
            replace(
                _RAWNODE + "ready",
                "if reads.is_asked and self.commit_index >= self._term_start:",
                "if reads.is_asked:",
            ),
            replace(
                _RAWNODE + "has_ready",
                "(reads.is_asked and self.commit_index >= self._term_start)",
                "reads.is_asked",
            ),
            replace(
                _SERVICE + "handle",
                "        if not self.is_ready:\n",
                "        if not self.is_ready:\n            for request in requests:\n"
                "                if request.kind == RequestKind.QUERY:\n"
                "                    self._raft.request_read(_mutant_hit(_Read(source, request)))\n"
                "                    self._reads_asked += 1\n"
                "            requests = [request for request in requests if request.kind != RequestKind.QUERY]\n",
            ),
        ),
    ),
    Mutant(
        "read-joins-a-round-that-has-begun",
        "etcd #20418: an old confirmation answers a newer read",
        (
            replace(
                _RAWNODE + "_begin_read_round",
                "        self._start_round()\n",
                "        if not reads.rounds or not _mutant_hit():\n            self._start_round()\n",
            ),
        ),
    ),
    Mutant(
        "echo-of-an-older-term-confirms-a-read",
        "Thesis §6.4: what was said in an earlier term says nothing about this one",
        (
            replace(
                _REPLICATION + "_handle_heartbeat_reply",
                "        progress = self._note_contact(sender, message.term, message.round)\n",
                "        term = message.term if message.term >= self.term else _mutant_hit(self.term)\n"
                "        progress = self._note_contact(sender, term, min(message.round, self._round))\n",
            ),
        ),
    ),
    Mutant(
        "lease-outlives-the-followers-silence",
        "sofa-jraft #34, Consul: counted too long, a lease is read when others have elected already",
        (
            replace(
                "coordlib.raft.config:RaftConfig.lease_ticks",
                "return max(0, self.election_ticks_min * (100 - self.drift_percent) // 200 - 2)",
                "return _mutant_hit(2 * self.election_ticks_max)",
            ),
        ),
    ),
    Mutant(
        "lease-is-counted-from-the-answer",
        "Thesis §6.4.1: from when it was asked; the answer may have been long on its way",
        (
            replace(
                _REPLICATION + "_note_contact",
                "            progress.round_acked = round_number\n",
                "            progress.round_acked = round_number\n"
                "            self._lease.begin(_mutant_hit(round_number), self.now)\n",
            ),
            replace(
                "coordlib.raft.config:RaftConfig.lease_ticks",
                "// 200 - 2)",
                "// 100 - 2)",
            ),
        ),
        tests=("tests/raft",),
    ),
    Mutant(
        "follower-answers-queries",
        "jgroups-raft #208: dirty reads as the default",
        (
            replace(
                _SERVICE + "handle",
                "if request.kind == RequestKind.STALE_QUERY:",
                "if request.kind == RequestKind.STALE_QUERY or (request.kind == RequestKind.QUERY and _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "session-is-counted-from-the-answer",
        "Chubby §2.8: the holder counts from before it asked, or believes longer than the cluster promised",
        (
            replace(
                _CLIENT + "_keep_alive_answered",
                "self._promise(sent_ms)",
                "self._promise(_mutant_hit(now))",
            ),
        ),
        tests=("tests/node/test_session.py",),
    ),
    Mutant(
        "session-has-no-margin-for-drift",
        "two clocks, each within its bound, and the slower one's owner believes too long",
        (
            replace(
                _CLIENT + "_promise",
                "return sent_ms + ttl - (ttl * self._timing.drift_percent + 99) // 100",
                "return _mutant_hit(sent_ms + ttl)",
            ),
        ),
    ),
    Mutant(
        "leader-counts-a-shorter-session",
        "TTL is a lower bound: the leader lets a session expire that its owner may rely on",
        (
            replace(
                _SERVICE + "_keep_alive",
                "self._deadlines[session] = now + session_ttl",
                "self._deadlines[session] = now + _mutant_hit(session_ttl) * 9 // 10",
            ),
        ),
    ),
    Mutant(
        "grant-does-not-look-at-the-clock",
        "DDIA ch. 8: a process that was paused goes on as if it held the lock",
        (
            replace(
                "coordlib.node.session:SessionView.is_valid",
                "return self.state in (SessionState.CONNECTED, SessionState.SUSPENDED) and now_ms < self.valid_until_ms",
                "return _mutant_hit(self.state in (SessionState.CONNECTED, SessionState.SUSPENDED))",
            ),
        ),
    ),
    Mutant(
        "grant-that-came-too-late-is-used",
        "etcd #11456: whoever was kept from running until its session had expired enters all the same",
        (
            replace(
                _CLIENT + "tick",
                "            if now >= view.valid_until_ms:\n",
                "            if now >= view.valid_until_ms and not _mutant_hit():\n",
            ),
            replace(
                "coordlib.node.session:SessionView.is_valid",
                "return self.state in (SessionState.CONNECTED, SessionState.SUSPENDED) and now_ms < self.valid_until_ms",
                "return self.state in (SessionState.CONNECTED, SessionState.SUSPENDED)",
            ),
        ),
    ),
)
