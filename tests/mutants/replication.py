"""Defects of replication and commit: what is acknowledged, what counts, what is overwritten, what is answered."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_REPLICATION = "coordlib.raft.replication:Replication."
_RAWNODE = "coordlib.raft.rawnode:RawNode."
_SERVICE = "coordlib.node.service:RequestService."
_LATE = "        ready._late, self._late = self._late, []\n"

MUTANTS = (
    Mutant(
        "earlier-term-is-committed-by-counting",
        "Raft figure 8; logcabin #44",
        (
            replace(
                _REPLICATION + "_maybe_commit",
                "index > self.commit_index and index >= self._term_start",
                "index > self.commit_index and (index >= self._term_start or _mutant_hit())",
            ),
        ),
    ),
    Mutant(
        "half-of-the-voters-commit",
        "CCF, NSDI'25: wrong tally of a quorum; with an even number of voters half of them is none",
        (
            replace(
                "coordlib.raft.quorum:value_reached",
                "return sorted(values)[(count - 1) >> 1]",
                "return sorted(values)[_mutant_hit(count) >> 1]",
            ),
        ),
    ),
    Mutant(
        "heartbeat-commits-past-the-match",
        "etcd handleHeartbeat, 'tocommit out of range'; tikv #994: not limited to what is known to match",
        (
            replace(
                _REPLICATION + "_build_messages",
                "commit = min(self.commit_index, progress.match)",
                "commit = self.commit_index",
            ),
            replace(
                _REPLICATION + "_handle_heartbeat",
                "            shown_term, shown = self._shown\n",
                "            commit = min(_mutant_hit(commit), self.log.last_index)\n"
                "            shown_term, shown = term, commit\n",
            ),
        ),
    ),
    Mutant(
        "heartbeat-commits-what-an-earlier-run-acknowledged",
        "PAR (FAST'18), Raft figure 7: the disk lost it, and has something else there",
        (
            replace(
                _REPLICATION + "_handle_heartbeat",
                "            shown_term, shown = self._shown\n",
                "            shown_term, shown = self._shown\n"
                "            if self._shown == (0, 0) and commit <= self.log.last_index:\n"
                "                shown_term, shown = term, _mutant_hit(commit)\n",
            ),
        ),
        tests=("tests/scenarios",),
        unseen="what is lost unnoticed, all others have: so the disk has had nothing else in its place since the last term",
    ),
    Mutant(
        "new-run-of-a-follower-is-not-probed",
        "Raft §5.3: after a late acknowledgement of its earlier run, a follower is never told what is committed",
        (
            replace(
                "coordlib.node.kernel:MemberKernel._on_announce",
                "self.raft.report_reachable(name)",
                "_mutant_hit()",
            ),
        ),
        tests=("tests/scenarios",),
        unseen="the probe that comes with a connection must be lost, and an old answer be late, and then nothing be asked",
    ),
    Mutant(
        "append-commits-past-its-entries",
        "Raft figure 2, AppendEntries step 5: min(leaderCommit, index of last new entry), not of the last entry",
        (
            replace(
                _REPLICATION + "_handle_append",
                "self._commit_to(min(commit, index))",
                "self._commit_to(_mutant_hit(min(commit, log.last_index)))",
            ),
        ),
        tests=("tests/raft/test_paper.py",),
        unseen="a leader finds at once where two logs part, so that what its message leaves of the other is the same in both",
    ),
    Mutant(
        "log-is-cut-at-the-end-of-any-append",
        "CCF #5674, #5991, #6016: a late or short AppendEntries cuts off what was acknowledged",
        (
            replace(
                _REPLICATION + "_merge",
                "                break\n        return True",
                "                break\n        else:\n            end = max(prev_index + len(entries), commit_index)\n"
                "            if end < log.last_index:\n                log.truncate(_mutant_hit(end + 1))\n        return True",
            ),
        ),
    ),
    Mutant(
        "acknowledges-its-whole-log",
        "CCF #6016: the answer names the last entry, not the last that the message has shown to match",
        (
            replace(
                _REPLICATION + "_handle_append",
                "self._acknowledge(sender, round_number, prev_index, index, entry_term)",
                "if log.last_index > index:\n            _mutant_hit()\n"
                "        self._acknowledge(sender, round_number, prev_index, log.last_index, log.last_term)",
            ),
            replace(
                _REPLICATION + "_handle_append_reply",
                "            if log.term_at(index) != message.match_term and index >= log.start_index:\n"
                '                self._count("malformed")  # acknowledges an entry that this leader does not have\n'
                "                return\n",
                "            if log.term_at(index) != message.match_term and index >= log.start_index:\n"
                "                index = _mutant_hit(min(index, log.last_index))\n",
            ),
        ),
    ),
    Mutant(
        "rejection-raises-the-match",
        "CCF, NSDI'25: commit advanced on a negative answer",
        (
            replace(
                _REPLICATION + "_handle_rejection",
                "        progress.is_paused = False\n",
                "        if hint > progress.match:\n            progress.match = _mutant_hit(hint)\n"
                "            progress.next = hint + 1\n            self._maybe_commit()\n        progress.is_paused = False\n",
            ),
        ),
    ),
    Mutant(
        "acknowledgements-of-an-older-term-count",
        "Raft §5.3; etcd/raft: an answer of an earlier term is about another log",
        (
            replace(
                _REPLICATION + "_note_contact",
                "        if term != self.term:\n            if term > self.term:\n",
                "        if term != self.term and (term > self.term or _mutant_hit(False)):\n"
                "            if term > self.term:\n",
            ),
            replace(
                _REPLICATION + "_handle_append_reply",
                "            if log.term_at(index) != message.match_term and index >= log.start_index:\n",
                "            index = min(index, log.last_index)\n            if log.start_index > index:\n",
            ),
        ),
    ),
    Mutant(
        "acknowledges-before-it-is-durable",
        "NATS 2025; Raft §5: a follower answers, and loses power before its fsync",
        (
            replace(
                _RAWNODE + "ready",
                _LATE,
                _LATE + "        if ready.entries:\n            for item in ready._late:\n"
                "                if type(item[1]) is AppendReply and item[1].is_success:\n"
                "                    ready.messages = [*ready.messages, _mutant_hit(item)]\n"
                "            ready._late = [item for item in ready._late if item not in ready.messages]\n",
            ),
        ),
    ),
    Mutant(
        "single-member-answers-before-its-fsync",
        "etcd #14370: a cluster of one commits when it appends, and applies while the disk writes",
        (
            replace(
                _RAWNODE + "propose",
                "        self._uncommitted_bytes = size\n",
                "        self._uncommitted_bytes = size\n        if self._is_alone:\n"
                "            self._own.match = entry.index\n            self._maybe_commit()\n",
            ),
            replace(
                "coordlib.node.kernel:MemberKernel.collect",
                "                    self._out.persist = ",
                "                    if ready.committed and ready.entries and raft._is_alone:\n"
                "                        self._to_apply.extend(_mutant_hit(ready.committed))\n"
                "                        ready.committed = ()\n"
                "                        self._apply(raft, service, now)\n"
                "                        self._route_replies(now)\n"
                "                    self._out.persist = ",
            ),
        ),
    ),
    Mutant(
        "conflicting-entries-are-kept",
        "Raft figure 2, AppendEntries step 3: what is there is compared by its index only",
        (
            replace(
                _REPLICATION + "_merge",
                "elif index > log.last_index or log.term_at(index) != entry.term:",
                "elif index > log.last_index or (log.term_at(index) != entry.term and not _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "previous-term-is-not-checked",
        "Raft figure 2, AppendEntries step 2: only the index of the entry before is compared",
        (
            replace(
                _REPLICATION + "_handle_append",
                "if prev_index == log.last_index and prev_term == log.last_term:",
                "if prev_index == log.last_index and (prev_term == log.last_term or _mutant_hit()):",
            ),
            replace(
                _REPLICATION + "_merge",
                "if prev_index >= commit_index and log.term_at(prev_index) != message.prev_term:",
                "if prev_index > log.last_index or (prev_index >= commit_index "
                "and log.term_at(prev_index) != message.prev_term and not _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "replaced-entries-are-not-written",
        "cockroach #63302: what is kept beside the log is not truncated with it",
        (
            replace(
                "coordlib.raft.log:RaftLog.truncate",
                "            self.handed_index = index - 1\n",
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "definite-error-for-what-may-commit",
        "RedisRaft #23: NOLEADER for a command that the next leader commits",
        (
            replace(
                _SERVICE + "lose_leadership",
                "self._reply(source, request_id, ReplyStatus.UNKNOWN, hint)",
                "self._reply(source, request_id, ReplyStatus.ERROR, "
                'commands.encode_error(_mutant_hit(NotLeader("leadership was lost"))))',
            ),
        ),
    ),
    Mutant(
        "proposals-outlive-the-leadership",
        "RedisRaft #13, ClickHouse Keeper: whoever asked at an index is given what another leader put there",
        (
            replace(
                _SERVICE + "lose_leadership",
                "        self._proposed.clear()\n",
                "        _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "lost-probe-is-never-repeated",
        "etcd #10308: a follower's progress stays paused, and it never catches up",
        (
            replace(
                _REPLICATION + "_handle_heartbeat_reply",
                "                progress.is_paused = False  # the probe or its answer was lost\n",
                "                _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "answers-when-appended-not-when-committed",
        "Jepsen on several stores: acknowledged by one leader alone, lost with it",
        (
            replace(
                _SERVICE + "_command",
                "        self._pending_bytes += len(request.body)\n",
                "        self._pending_bytes += len(request.body)\n"
                "        if request.body[1:3] == b'\\x18\\x20' and key is not None:\n"
                "            self._reply(source, request.request_id, ReplyStatus.OK, _mutant_hit(b'\\x82\\x00\\x01'))\n",
            ),
        ),
    ),
    Mutant(
        "what-a-lost-disk-acknowledged-still-counts",
        "Jepsen restore-file-chunks: a directory is rolled back, and the leader goes on counting what it had",
        (
            replace(
                "coordlib.node.kernel:MemberKernel._on_announce",
                "self.raft.report_lost(name, message.last_index)",
                "_mutant_hit()",
            ),
        ),
        tests=("tests/raft/test_rawnode.py::test_what_a_follower_has_lost_is_not_counted_and_is_sent_again",),
        unseen="it comes back only while all others have what it lost: more than that is not survived, and not simulated",
    ),
)
