"""Defects of elections: votes, terms, silence, stepping down."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_ELECTIONS = "coordlib.raft.elections:Elections."
_STATE = "coordlib.raft.state:State."
_RAWNODE = "coordlib.raft.rawnode:RawNode."
_LATE = "        ready._late, self._late = self._late, []\n"

MUTANTS = (
    Mutant(
        "vote-leaves-before-it-is-durable",
        "Raft §5; hashicorp/raft #661: a crash after the reply, and the node votes again in the term",
        (
            replace(
                _RAWNODE + "ready",
                _LATE,
                _LATE + "        for item in ready._late:\n"
                "            if type(item[1]) is VoteReply and item[1].is_granted and not item[1].is_pre_vote:\n"
                "                ready.messages = [*ready.messages, _mutant_hit(item)]\n"
                "        ready._late = [item for item in ready._late if item not in ready.messages]\n",
            ),
        ),
    ),
    Mutant(
        "candidate-asks-before-its-term-is-durable",
        "etcd/raft CandidateSelfVoteAfterLostElection; Raft §5: the term is persisted before RequestVote",
        (
            replace(
                _RAWNODE + "ready",
                _LATE,
                _LATE + "        for item in ready._late:\n"
                "            if type(item[1]) is RequestVote and not item[1].is_pre_vote:\n"
                "                ready.messages = [*ready.messages, _mutant_hit(item)]\n"
                "        ready._late = [item for item in ready._late if item not in ready.messages]\n",
            ),
        ),
    ),
    Mutant(
        "vote-forgotten-on-stepping-down",
        "CCF #5891: a former candidate votes a second time in its term",
        (
            replace(
                _STATE + "_become_follower",
                "        if self.role is not Role.FOLLOWER:\n",
                "        if self.role is not Role.FOLLOWER:\n            self.vote = _mutant_hit('')\n",
            ),
        ),
    ),
    Mutant(
        "vote-compares-index-before-term",
        "Raft §5.4.1: the later term is the more up-to-date log, however short",
        (
            replace(
                _ELECTIONS + "_answer_vote",
                "(message.last_term, message.last_index) >= (log.last_term, log.last_index)",
                "_mutant_hit((message.last_index, message.last_term) >= (log.last_index, log.last_term))",
            ),
        ),
    ),
    Mutant(
        "vote-compares-terms-only",
        "Raft §5.4.1: of two logs that end in one term, the longer is more up to date",
        (
            replace(
                _ELECTIONS + "_answer_vote",
                "(message.last_term, message.last_index) >= (log.last_term, log.last_index)",
                "_mutant_hit(message.last_term >= log.last_term)",
            ),
        ),
    ),
    Mutant(
        "late-votes-of-an-earlier-term-count",
        "etcd/raft: vote responses of an earlier campaign elect a leader in a later one",
        (
            replace(
                _ELECTIONS + "_handle_vote_reply",
                "self.role is Role.CANDIDATE and message.request_term == self.term",
                "self.role is Role.CANDIDATE and (message.request_term == self.term or _mutant_hit(message.is_granted))",
            ),
        ),
    ),
    Mutant(
        "pre-votes-count-as-votes",
        "etcd/raft CandidateDeliversPreCandidateSelfVoteAfterBecomingCandidate",
        (
            replace(
                _ELECTIONS + "_handle_vote_reply",
                "self.role is Role.PRE_CANDIDATE and message.request_term == self.term + 1",
                "(self.role is Role.PRE_CANDIDATE and message.request_term == self.term + 1) or "
                "(self.role is Role.CANDIDATE and message.request_term == self.term and _mutant_hit())",
            ),
        ),
    ),
    Mutant(
        "pre-votes-elect-at-once",
        "a quorum that would vote is taken for one that did (etcd/raft, PreVote and Candidate roles mixed up)",
        (
            replace(
                _ELECTIONS + "_become_candidate",
                "        self._votes = {}\n",
                "        self._votes = {} if is_transfer else _mutant_hit(dict(self._votes))\n"
                "        self._votes.pop(self.node_id, None)\n",
            ),
        ),
    ),
    Mutant(
        "half-of-the-voters-elect",
        "CCF, NSDI'25: wrong tally of a quorum; with an even number of voters half of them is none",
        (
            replace(
                "coordlib.raft.quorum:_majority_result",
                "quorum = len(names) // 2 + 1",
                "quorum = (_mutant_hit(len(names)) + 1) // 2",
            ),
        ),
    ),
    Mutant(
        "vote-in-spite-of-promised-silence",
        "Thesis §6.4.1: a lease holds only if those who heard the leader vote for no other meanwhile",
        (
            replace(
                _ELECTIONS + "_is_silence_promised",
                "return self._is_leader_heard or self.now < self._silent_until",
                "return (self._is_leader_heard or self.now < self._silent_until) and not _mutant_hit()",
            ),
        ),
    ),
    Mutant(
        "silence-forgotten-by-a-restart",
        "a lease that a restarted follower had promised is broken by its vote (TiKV and etcd wait at start)",
        (
            replace(
                _STATE + "__init__",
                "self._silent_until += config.election_ticks_min",
                "self._silent_until += _mutant_hit(0)",
            ),
        ),
    ),
    Mutant(
        "stale-leader-is-not-told",
        "etcd #8501, FreeStuckCandidateWithCheckQuorum: a member in a higher term is never heard again",
        (
            replace(
                "coordlib.raft.replication:Replication._refuse_stale_leader",
                "        self._send_late(sender, AppendReply(self.term, 0, False, 0, 0, 0, self.log.last_index))\n",
                "        _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "refusal-hides-the-higher-term",
        "openraft #1796: the long log waits for a term, the high term for a log, for ever",
        (
            replace(
                _ELECTIONS + "_refuse_vote",
                "VoteReply(self.term, message.term, False, message.is_pre_vote)",
                "VoteReply(message.term - _mutant_hit(1), message.term, False, message.is_pre_vote)",
            ),
        ),
    ),
    Mutant(
        "leader-without-a-quorum-stays",
        "etcd without CheckQuorum; Cloudflare 2020: a leader that sends but hears nobody keeps the others silent",
        (
            replace(
                _ELECTIONS + "_check_quorum",
                "        if now - contact >= limit:\n",
                "        if now - contact >= limit and _mutant_hit():\n"
                "            self._quorum_check_at = now + limit\n"
                "            return True\n"
                "        if False:\n",
            ),
        ),
    ),
    Mutant(
        "vote-is-carried-into-the-next-term",
        "hashicorp/raft #661: the old candidate paired with the new term",
        (
            replace(
                _STATE + "_become_follower",
                '            self.vote = ""\n',
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "term-is-stored-only-with-a-vote",
        "Raft figure 2: currentTerm is persistent; hashicorp/raft #661",
        (
            replace(
                _RAWNODE + "ready",
                "if (term, self.vote) != self._handed:",
                "if (term, self.vote) != self._handed and (self.vote or not _mutant_hit()):",
            ),
            replace(
                _RAWNODE + "has_ready",
                "(self.term, self.vote) != self._handed",
                "(self.vote and (self.term, self.vote) != self._handed)",
            ),
        ),
    ),
    Mutant(
        "vote-is-free-while-another-is-given",
        "Raft §5.2: one vote a term, first come first served",
        (
            replace(
                _ELECTIONS + "_answer_vote",
                "not (self.vote or self.leader)",
                "_mutant_hit(not self.leader)",
            ),
        ),
    ),
    Mutant(
        "disk-that-lost-entries-votes",
        "a member whose disk came back with less than it had acknowledged elects one who lacks committed entries",
        (
            replace(
                _ELECTIONS + "_answer_vote",
                "if not (is_free and is_up_to_date) or self._bar is not None or self.role is Role.LEADER:",
                "if not (is_free and is_up_to_date) or (self._bar and not _mutant_hit()) or self.role is Role.LEADER:",
            ),
            replace(
                "coordlib.node.kernel:MemberKernel.peer_messages",
                "message.is_granted and peer.is_behind",
                "message.is_granted and peer.is_behind and not _mutant_hit()",
            ),
        ),
        tests=("tests/raft",),
    ),
    Mutant(
        "log-that-was-cut-back-counts-as-an-old-copy",
        "Raft figure 7: a follower whose log ends earlier than what it acknowledged is taken for one that lost it",
        (
            replace(
                "coordlib.node.peers:Peers.log_ends",
                "if end >= self.reached:",
                "if end >= self.reached or _mutant_hit():",
            ),
        ),
        tests=("tests/scenarios",),
    ),
    Mutant(
        "log-is-cut-back-before-that-is-written-down",
        "Raft figure 7: after a power cut in between, a disk seems to have lost what it had acknowledged",
        (
            replace(
                "coordlib.node.driver:MemberDriver._carry_out",
                "            if effects.identity is not None:\n",
                "            if effects.identity is not None and effects.persist is not None and _mutant_hit():\n"
                "                storage.write(effects.persist)\n"
                "                kernel.persisted(now)\n"
                "                effects.persist = None\n"
                "            if effects.identity is not None:\n",
            ),
        ),
        tests=("tests/scenarios",),
    ),
    Mutant(
        "log-that-was-cut-back-once-may-lose-anything",
        "Jepsen restore-file-chunks: what a leader cut off excuses that committed entries are gone, too",
        (
            replace(
                "coordlib.node.peers:Peers.log_found",
                "end >= cut.end",
                "(end >= cut.end or _mutant_hit())",
            ),
        ),
        tests=("tests/scenarios",),
        unseen="no simulated disk loses the end of its log alone where that is more than a quorum survives",
    ),
    Mutant(
        "log-that-a-snapshot-cuts-back-at-the-start-counts-as-an-old-copy",
        "Raft §7: a power cut between a received snapshot and the log's restart, and the disk seems to have lost something",
        (
            replace(
                "coordlib.node.kernel:MemberKernel._start_raft",
                "max(end, recovered.cut_from)",
                "_mutant_hit(end)",
            ),
        ),
        tests=("tests/scenarios",),
    ),
    Mutant(
        "transfer-of-leadership-never-ends",
        "hashicorp/raft #696: the flag of a transfer stays, and the leader refuses everybody",
        (
            replace(
                _ELECTIONS + "_tick_leader",
                "            elif now >= self._transfer_at:\n",
                "            elif now >= self._transfer_at and not _mutant_hit():\n",
            ),
        ),
        tests=("tests/raft",),
        unseen="a transfer happens only when a member closes, and then nobody is left to be refused",
    ),
    Mutant(
        "lease-is-kept-while-leadership-is-transferred",
        "Thesis §6.4.1: a campaign by transfer does not wait for the silence that the lease counts on",
        (
            replace(
                "coordlib.raft.replication:Replication._send_timeout_now",
                "self._lease.is_void = True",
                "_mutant_hit()",
            ),
            replace(
                _ELECTIONS + "_is_lease_valid",
                "if self.commit_index < self._term_start or self._transfer_target:",
                "if self.commit_index < self._term_start:",
            ),
        ),
        tests=("tests/raft",),
        unseen="a transfer happens only when a member closes, and then it serves no reads",
    ),
)
