"""Who leads: campaigns, votes, leadership transfer, and everything that happens because time has passed.

::

              patience over             quorum of pre-votes            quorum of votes
    FOLLOWER ---------------> PRE_CANDIDATE --------------> CANDIDATE --------------> LEADER
        ^  ^                       |    ^      (own vote durable) |  |                    |
        |  +-- leader heard -------+    +------ patience over ----+  |                    |
        +-------- higher term, or a leader of this term -------------+--------------------+
                                                  no quorum heard, disk stuck, removed ---+

Silence. A node that heard a leader votes for no other until `election_ticks_min` have passed (Thesis
§4.2.3, §6.4.1): this keeps a restless node from disturbing, and is what a lease rests on. Three exceptions:
a campaign by transfer (the leader itself asked for it, and gave up its lease), the leader that was heard
asking itself (it has stepped down, hashicorp #605), and the candidate that already has our vote. A node
that starts is silent as well, for it may have promised something before it crashed.
"""

from __future__ import annotations

from coordlib.raft.messages import Entry, EntryKind, RequestVote, TimeoutNow, VoteReply
from coordlib.raft.quorum import VoteResult, is_voter, members, value_reached, vote_result
from coordlib.raft.replication import Replication
from coordlib.raft.state import Role

__all__ = ["Elections"]

DEFERRED_VOTES_MAX = 64  # candidates waiting for the next tick; more than any configuration has voters


class Elections(Replication):
    """Adds to `Replication` the roles above follower, and timers."""

    __slots__ = ()

    # -- campaigns

    def _can_campaign(self) -> bool:
        if self._bar is not None:
            return False
        log = self.log
        if is_voter(log.configuration, self.node_id):
            return True
        # Its log says that it is removed, but until that is committed, it may be the only one whose log is
        # long enough to lead (Thesis §4.2.2). It counts no vote of its own then.
        return log.configuration_index > self.commit_index and is_voter(
            log.previous_configuration, self.node_id
        )

    def _begin_campaign(self) -> None:
        """Ask whether an election could be won, without disturbing anybody (Thesis §9.6)."""
        self._count("pre_campaigns")
        self.role = Role.PRE_CANDIDATE
        self.leader = ""
        self._draw_election_timeout()
        self._is_rearm_due = True
        self._votes = {self.node_id: True}
        # The bigger term stays in the message: our own changes only when a quorum would vote for us.
        self._ask_for_votes(RequestVote(self.term + 1, self.log.last_index, self.log.last_term, True, False))
        self._tally()

    def _become_candidate(self, is_transfer: bool) -> None:
        """Ask for votes in the next term. Our own counts when it is durable, see `_count_own_vote`."""
        self._count("campaigns")
        self.role = Role.CANDIDATE
        self.term += 1
        self.vote = self.node_id
        self.leader = ""
        self._draw_election_timeout()
        self._is_rearm_due = True
        self._votes = {}
        log = self.log
        self._ask_for_votes(RequestVote(self.term, log.last_index, log.last_term, False, is_transfer))

    def _ask_for_votes(self, request: RequestVote) -> None:
        configuration = self.log.configuration
        for name in members(configuration):
            if name != self.node_id and is_voter(configuration, name):
                self._send_late(name, request)

    def _count_own_vote(self) -> None:
        """Our term and vote are durable now: a crash cannot make us vote for another any more."""
        if (
            self.role is Role.CANDIDATE
            and self.node_id not in self._votes
            and self._durable == (self.term, self.node_id)
        ):
            self._votes[self.node_id] = True
            self._tally()

    def _tally(self) -> None:
        result = vote_result(self.log.configuration, self._votes)
        if result is VoteResult.LOST:
            self._become_follower(self.term, "")
        elif result is VoteResult.WON:
            if self.role is Role.PRE_CANDIDATE:
                self._become_candidate(False)
            else:
                self._become_leader()

    def _become_leader(self) -> None:
        self._count("elected")
        log = self.log
        self.role = Role.LEADER
        self.leader = self.node_id
        self._votes = {}
        self._heard_from = ""
        self._deferred_votes.clear()
        self._is_rearm_due = True  # the quorum check counts from the next tick
        self._round = 0
        self._lease.reset()
        self._notice_at = 0
        self._transfer_at = None
        # An entry of our own term, so that older ones can be committed and reads begin (Raft §5.4.2, §8).
        self._term_start = log.last_index + 1
        log.append_own(Entry(self.term, self._term_start, int(EntryKind.NOOP), b""))
        self._uncommitted_bytes = log.size_bytes(self.commit_index, log.last_index)
        self._rebuild_progress()
        self._heartbeat_at = self.now + self.config.heartbeat_ticks
        self._quorum_check_at = self.now + self.config.election_ticks_max

    # -- votes

    def _is_silence_promised(self, sender: str) -> bool:
        """Whether voting for `sender` now would break a promise, as far as is known before the next tick."""
        if self.role is Role.LEADER:
            return True  # the quorum check deposes a leader that should not be one
        if self._heard_from == sender and sender:
            return False
        return self._is_leader_heard or self.now < self._silent_until

    def _handle_request_vote(self, sender: str, message: RequestVote) -> None:
        if message.last_index < 0 or message.last_term < 0 or message.last_term >= message.term:
            self._count("malformed")
            return
        if message.term >= self.term and not message.is_transfer and self._is_silence_promised(sender):
            is_repeated = self.vote == sender and message.term == self.term and not message.is_pre_vote
            if not is_repeated:
                if self.role is not Role.LEADER and len(self._deferred_votes) < DEFERRED_VOTES_MAX:
                    # The silence may be over by now; the next tick knows.
                    self._deferred_votes[sender] = message
                else:
                    self._refuse_vote(sender, message)
                return
        self._answer_vote(sender, message)

    def _answer_deferred_votes(self) -> None:
        deferred = self._deferred_votes
        self._deferred_votes = {}
        for sender, message in deferred.items():
            if message.term >= self.term and self._is_silence_promised(sender):
                self._refuse_vote(sender, message)
            else:
                self._answer_vote(sender, message)

    def _refuse_vote(self, sender: str, message: RequestVote) -> None:
        # Refusals carry our term, so that a candidate with the longer log but a lower term learns it: or
        # the long log waits for a term and the high term for a log for ever (openraft #1796).
        self._send_late(sender, VoteReply(self.term, message.term, False, message.is_pre_vote))

    def _answer_vote(self, sender: str, message: RequestVote) -> None:
        """
        Vote by term, log and earlier vote alone; silence has been seen to.

        Whether `sender` is in our configuration is not asked: ours may be older than the one that it
        campaigns under, or we a learner of which it knows better (etcd #10998). It counts only voters.
        """
        log = self.log
        is_pre_vote = message.is_pre_vote
        if message.term < self.term:
            self._refuse_vote(sender, message)
            return
        if message.term > self.term and not is_pre_vote:
            self._become_follower(message.term, "")
        is_free = message.term > self.term or self.vote == sender or not (self.vote or self.leader)
        is_up_to_date = (message.last_term, message.last_index) >= (log.last_term, log.last_index)
        if not (is_free and is_up_to_date) or self._bar is not None or self.role is Role.LEADER:
            self._refuse_vote(sender, message)
            return
        if not is_pre_vote:
            self.vote = sender
            self._is_rearm_due = True
        self._send_late(sender, VoteReply(message.term, message.term, True, is_pre_vote))

    def _handle_vote_reply(self, sender: str, message: VoteReply) -> None:
        # A granted pre-vote carries the term asked for, which nobody is in yet.
        if message.term > self.term and not (message.is_pre_vote and message.is_granted):
            if self._is_member(sender):
                self._become_follower(message.term, "")
            else:
                self._count("not_a_member")
            return
        if message.is_pre_vote:
            is_awaited = self.role is Role.PRE_CANDIDATE and message.request_term == self.term + 1
        else:
            is_awaited = self.role is Role.CANDIDATE and message.request_term == self.term
        if not is_awaited:
            self._count("stale_votes")
        elif not is_voter(self.log.configuration, sender):
            self._count("not_a_member")
        elif sender not in self._votes:  # the first answer counts, however often it arrives
            self._votes[sender] = message.is_granted
            self._tally()

    # -- transfer

    def _handle_timeout_now(self, sender: str, message: TimeoutNow) -> None:
        if message.term != self.term or sender != self.leader or self.role is not Role.FOLLOWER:
            self._count("stale_transfers")
        elif self._can_campaign():
            # No pre-vote: the leader vouches that the election can be won, and is still being heard.
            self._become_candidate(True)

    def _choose_transfer_target(self) -> str:
        """The most caught-up voter that was heard of late; "" if there is none."""
        best = ""
        best_match = -1
        for progress in self._peers:
            is_recent = progress.is_heard or self.now - progress.heard_at < self.config.election_ticks_max
            if progress.is_voter and is_recent and progress.match > best_match:
                best, best_match = progress.node_id, progress.match
        return best

    # -- time

    def tick(self, now: int) -> None:
        """
        Do what is due at `now`, which must have been read after the last `step`, and never falls.

        Input first, then time: after a stall, what has arrived is heard before any patience ends.
        """
        if now > self.now:
            self.now = now
        else:
            now = self.now
        if self._is_leader_heard:
            self._is_leader_heard = False
            self._silent_until = now + self.config.election_ticks_min
        if self._deferred_votes:
            self._answer_deferred_votes()
        if self._is_rearm_due:
            self._is_rearm_due = False
            if self.role is Role.LEADER:
                self._quorum_check_at = now + self.config.election_ticks_max
            else:
                self._election_at = now + self._election_timeout
        if self.role is Role.LEADER:
            self._tick_leader(now)
        elif now >= self._election_at:
            if self._can_campaign():
                self._begin_campaign()
            self._is_rearm_due = False
            self._election_at = now + self._election_timeout

    def _tick_leader(self, now: int) -> None:
        config = self.config
        if self._heard:
            for progress in self._heard:
                progress.is_heard = False
                progress.heard_at = now
            self._heard.clear()
        if now >= self._quorum_check_at and not self._check_quorum(now):
            return
        if self._is_disk_stuck(now):
            # A leader that cannot write commits nothing, yet its heartbeats keep others from trying.
            self._count("disk_stuck")
            self._become_follower(self.term, "")
            return
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + config.heartbeat_ticks
            self._start_round()
            for progress in self._peers:
                # An AppendEntries of this interval that was answered has told all that a heartbeat would.
                if (
                    progress.inflight
                    or progress.is_paused
                    or now - progress.sent_at >= config.heartbeat_ticks
                ):
                    progress.is_heartbeat_due = True
                    self._is_send_due = True
        if self._notice_at and now >= self._notice_at:
            self._send_notices()
        if self._transfer_target:
            if self._transfer_at is None:
                self._transfer_at = now + config.election_ticks_min
            elif now >= self._transfer_at:
                self._count("transfers_failed")
                self._transfer_target = ""
                self._transfer_at = None
        if config.reads_by_lease and self._reads.waiting and self._is_lease_valid(now):
            self._reads.confirm_waiting(self.commit_index)

    def _is_lease_valid(self, now: int) -> bool:
        if self.commit_index < self._term_start or self._transfer_target:
            return False
        if self._is_alone:
            return True
        return self._lease.is_valid(self._quorum_round(), now)

    def _check_quorum(self, now: int) -> bool:
        """
        Step down when no quorum was heard for `election_ticks_max`, as followers would by then have.

        Not sooner: a leader that gives up before its followers could replace it only costs availability.
        Not later: nothing that it accepts from then on can be expected to commit (Thesis §6.2).
        """
        self._own.heard_at = now
        contact = value_reached([progress.heard_at for progress in self._voter_progress])
        if self._outgoing_progress:
            contact = min(contact, value_reached([item.heard_at for item in self._outgoing_progress]))
        limit = self.config.election_ticks_max
        if now - contact >= limit:
            self._count("quorum_lost")
            self._become_follower(self.term, "")
            self._is_rearm_due = False
            self._election_at = now + self._election_timeout
            return False
        self._quorum_check_at = contact + limit
        return True

    def _is_disk_stuck(self, now: int) -> bool:
        raise NotImplementedError
