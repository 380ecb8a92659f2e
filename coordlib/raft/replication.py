"""The log's way from the leader to its followers: appending, acknowledging, committing, snapshots.

Rule 1: a follower's answer leaves after what it says is durable. Rule 2: the leader's own entries leave
before its disk has them, and count only after (Thesis §10.2.1). Rule 3: nothing at or below the commit
index is ever truncated. What must not live here: who may lead, timers.
"""

from __future__ import annotations

from coordlib.errors import invariant
from coordlib.raft.messages import (
    AppendEntries,
    AppendReply,
    Configuration,
    Entry,
    EntryKind,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    RaftMessage,
    TimeoutNow,
)
from coordlib.raft.progress import Inflight, Progress, ProgressState
from coordlib.raft.quorum import is_voter, value_reached
from coordlib.raft.state import Role, State

__all__ = ["Replication"]

_LEADER = Role.LEADER
_FOLLOWER = Role.FOLLOWER
_PROBE = ProgressState.PROBE
_REPLICATE = ProgressState.REPLICATE
_SNAPSHOT = ProgressState.SNAPSHOT
_CONFIGURATION = int(EntryKind.CONFIGURATION)


class Replication(State):
    """Adds to `State` what happens to the log on both of its ends."""

    __slots__ = ()

    # -- follower

    def _accept_leader(self, sender: str, term: int) -> bool:
        """Follow the sender of a leader's message of this or a later term; False: there is another leader."""
        if term > self.term or self.role is not _FOLLOWER or self.leader != sender:
            if term == self.term and (self.role is _LEADER or self.leader not in ("", sender)):
                self._count("two_leaders")  # some node voted twice; never follow both
                return False
            self._become_follower(term, sender)
        self._is_leader_heard = self._is_rearm_due = True
        self._heard_from = sender
        return True

    def _refuse_stale_leader(self, sender: str) -> None:
        """Tell a leader of an earlier term that it is one, or it would go on for ever (etcd #8501)."""
        self._send_late(sender, AppendReply(self.term, 0, False, 0, 0, 0, self.log.last_index))

    def _handle_append(self, sender: str, message: AppendEntries) -> None:
        term, prev_index, prev_term, commit, round_number, entries = message
        if term < self.term:
            self._refuse_stale_leader(sender)
            return
        if term < 1 or prev_index < 0 or not 0 <= prev_term <= term or commit < 0 or round_number < 0:
            self._count("malformed")
            return
        configurations: list[tuple[int, Configuration]] = []
        index, entry_term = prev_index, prev_term
        for entry in entries:
            index += 1
            if entry.index != index or not entry_term <= entry.term <= term:
                self._count("malformed")
                return
            entry_term = entry.term
            if entry.kind == _CONFIGURATION and not self._decode_into(configurations, entry):
                return
        if not self._accept_leader(sender, term):
            return
        log = self.log
        if prev_index == log.last_index and prev_term == log.last_term:
            if entries:
                log.append(entries, configurations)
        elif not self._merge(message, configurations):
            return
        self._acknowledge(sender, round_number, prev_index, index, entry_term)
        if commit > self.commit_index:
            # Only what this message has shown to match may be committed by it (Raft Fig. 2, step 5).
            self._commit_to(min(commit, index))

    def _decode_into(self, configurations: list[tuple[int, Configuration]], entry: Entry) -> bool:
        if not self.log.can_decode_configuration:
            self._count("malformed")
            return False
        try:
            configurations.append((entry.index, self.log.decode_configuration(entry.data)))
        except Exception:  # Justification: whatever the decoder objects to, a peer sent it
            self._count("malformed")
            return False
        return True

    def _merge(self, message: AppendEntries, configurations: list[tuple[int, Configuration]]) -> bool:
        """
        Take what is new of a message that does not begin right after the last entry.

        Truncates only at a real conflict, never because a message is shorter than the log (CCF #5674).
        False when the message was answered with a rejection or must not be answered.
        """
        log = self.log
        commit_index = self.commit_index
        prev_index, entries = message.prev_index, message.entries
        # What is committed here is in this leader's log too (Leader Completeness), so below the commit
        # index there is nothing to compare. If it differs all the same, safety was lost elsewhere.
        if prev_index >= commit_index and log.term_at(prev_index) != message.prev_term:
            self._reject(self.leader, message)
            return False
        for position, entry in enumerate(entries):
            index = entry.index
            if index <= commit_index:
                known = log.term_at(index)
                if known not in (-1, entry.term):
                    self._count("conflicts_with_committed")
                    return False
            elif index > log.last_index or log.term_at(index) != entry.term:
                if index <= log.last_index:
                    self._count("truncated")
                    log.truncate(index)
                    self._shown = min(self._shown, (self.term, index - 1))
                log.append(entries[position:], [item for item in configurations if item[0] >= index])
                break
        return True

    def _reject(self, sender: str, message: AppendEntries) -> None:
        """Say where the logs may still agree: the hint skips all entries of later terms at once."""
        log = self.log
        hint = log.last_with_term_at_most(message.prev_index, message.prev_term)
        # The committed prefix is shared with every leader, so the search never needs to go below it.
        hint = max(hint, self.commit_index)
        reply = AppendReply(
            self.term, message.round, False, message.prev_index, hint, log.term_at(hint), log.last_index
        )
        self._send_late(sender, reply)

    def _acknowledge(self, sender: str, round_number: int, prev_index: int, index: int, term: int) -> None:
        """
        Acknowledge up to `index`: what the message has shown to match, never the whole log (CCF #6016).

        What is committed is known to match without being shown.
        """
        if index < self.commit_index:
            index = self.commit_index
            term = self.log.term_at(index)
        if self._shown < (self.term, index):
            self._shown = (self.term, index)
        late = self._late
        if late:
            receiver, last = late[-1]
            if (
                receiver == sender
                and type(last) is AppendReply
                and last.is_success
                and last.term == self.term
                and last.match_index <= index
            ):
                late.pop()  # several messages in one round are answered by one
                round_number = max(round_number, last.round)
        late.append(
            (sender, AppendReply(self.term, round_number, True, prev_index, index, term, self.log.last_index))
        )

    def _handle_heartbeat(self, sender: str, message: Heartbeat) -> None:
        term, commit, round_number = message
        if term < self.term:
            self._refuse_stale_leader(sender)
            return
        if term < 1 or commit < 0 or round_number < 0:
            self._count("malformed")
            return
        if not self._accept_leader(sender, term):
            return
        if commit > self.commit_index:
            # The leader sent min(its commit, what we match), so this is ours already, unless our disk lost it: then there
            # may be something else, what was there before. So its word counts only for what it has shown to us.
            shown_term, shown = self._shown
            if shown_term == term and shown > self.commit_index:
                self._commit_to(min(commit, shown))
            if commit > self.log.last_index:
                self._count("acknowledged_entries_lost")
        self._late.append((sender, HeartbeatReply(term, round_number)))

    def _handle_install_snapshot(self, sender: str, message: InstallSnapshot) -> None:
        """The snapshot's file is complete and durable here; make the log go on after it."""
        term, meta = message
        if term < self.term:
            self._refuse_stale_leader(sender)
            return
        if meta.index < 1 or not 1 <= meta.term <= term:
            self._count("malformed")
            return
        if not self._accept_leader(sender, term):
            return
        log = self.log
        if meta.index <= self.commit_index:
            self._count("snapshots_ignored")
        elif log.term_at(meta.index) == meta.term:
            # We hold what it stands for: keep the log, its suffix included (Raft §7), and go forward.
            self._commit_to(meta.index)
        else:
            self._count("snapshots_installed")
            log.restore(meta)
            self._shown = (self.term, meta.index)
            self.commit_index = self._handed_commit = meta.index
            self._restored = meta
        self._acknowledge(sender, 0, meta.index, meta.index, meta.term)

    # -- leader: answers

    def _note_contact(self, sender: str, term: int, round_number: int) -> Progress | None:
        """Note a member's answer in this term; None when the answer is to be ignored."""
        if term != self.term:
            if term > self.term:
                if self._is_member(sender):
                    self._become_follower(term, "")
                else:
                    self._count("not_a_member")
            return None
        if self.role is not _LEADER:
            return None
        progress = self._progress.get(sender)
        if progress is None:
            self._count("not_a_member")
            return None
        if round_number > self._round or round_number < 0:
            self._count("malformed")
            return None
        if not progress.is_heard:
            progress.is_heard = True
            self._heard.append(progress)
        if round_number > progress.round_acked:
            progress.round_acked = round_number
            if self._reads.rounds:
                self._reads.confirm(self._quorum_round())
        return progress

    def _handle_append_reply(self, sender: str, message: AppendReply) -> None:
        progress = self._note_contact(sender, message.term, message.round)
        if progress is None:
            return
        if not message.is_success:
            self._handle_rejection(progress, message)
            return
        log = self.log
        index = message.match_index
        state = progress.state
        if index > progress.match:
            if log.term_at(index) != message.match_term and index >= log.start_index:
                self._count("malformed")  # acknowledges an entry that this leader does not have
                return
            progress.match = index
            if progress.next <= index:
                progress.next = index + 1
            if state is _REPLICATE:
                progress.free_to(index)
            elif state is _PROBE or index >= log.start_index:
                progress.become_replicate()
            if index > self.commit_index and progress.is_voter:
                self._maybe_commit()
                if self.role is not _LEADER:
                    return  # that was the end of its own removal
            if progress.next <= log.last_index:
                self._is_send_due = True
            elif progress.commit_sent < self.commit_index and not self._notice_at:
                self._arm_notice()
            if self._transfer_target == sender and progress.match == log.last_index:
                self._send_timeout_now(progress)
        elif state is _PROBE and index == progress.match:
            progress.become_replicate()
            self._is_send_due = True

    def _handle_rejection(self, progress: Progress, message: AppendReply) -> None:
        rejected = message.prev_index
        if progress.state is _REPLICATE:
            if progress.match < rejected < progress.next:
                self._count("rejected")
                progress.become_probe()
                self._is_send_due = True
            else:
                self._count("stale_rejections")
            return
        if progress.state is _SNAPSHOT or rejected != progress.next - 1:
            self._count("stale_rejections")
            return
        if message.match_index < 0 or message.match_term < 0 or rejected < 1:
            self._count("malformed")
            return
        self._count("rejected")
        if rejected <= progress.match:
            # A probe at what it had acknowledged: its disk lost it (or this is a very old answer, and the
            # next one will correct us). Believing less of a follower is always safe.
            self._count("matches_taken_back")
            progress.match = 0
        # Strictly below `rejected`, so that the search ends (Kudu #1469).
        hint = min(message.match_index, rejected - 1)
        hint = self.log.last_with_term_at_most(hint, message.match_term)
        progress.next = max(hint, progress.match) + 1
        progress.is_paused = False
        self._is_send_due = True

    def _handle_heartbeat_reply(self, sender: str, message: HeartbeatReply) -> None:
        progress = self._note_contact(sender, message.term, message.round)
        if progress is None:
            return
        if progress.state is _PROBE:
            if progress.is_paused:
                progress.is_paused = False  # the probe or its answer was lost
                self._is_send_due = True
        elif progress.state is _REPLICATE and progress.inflight:
            oldest = progress.inflight[0]
            # On one connection the answer to an older message comes first, so that message is lost. Lanes
            # and reconnects may reorder, hence the patience.
            if oldest.round < message.round and self.now - oldest.sent_at >= 2 * self.config.heartbeat_ticks:
                self._count("windows_lost")
                progress.become_probe()
                self._is_send_due = True

    # -- leader: commit

    def _maybe_commit(self) -> None:
        """
        Commit what a quorum holds durably.

        Only entries of the leader's own term are committed by counting; older ones follow with them.
        Fig. 8 shows what goes wrong otherwise. Raft §5.4.2
        """
        index = value_reached([progress.match for progress in self._voter_progress])
        if self._outgoing_progress:
            index = min(index, value_reached([progress.match for progress in self._outgoing_progress]))
        if index > self.commit_index and index >= self._term_start:
            self._commit_to(index)

    def _commit_to(self, index: int) -> None:
        if index <= self.commit_index:
            return
        invariant(index <= self.log.last_index, "commit %d past the log's %d", index, self.log.last_index)
        if self.role is _LEADER:
            self._uncommitted_bytes -= self.log.size_bytes(self.commit_index, index)
            self.commit_index = index
            if not self._notice_at and self._peers:
                self._arm_notice()
            log = self.log
            if log.configuration_index <= index and not is_voter(log.configuration, self.node_id):
                # It has led its own removal to the end (Thesis §4.2.2).
                self._become_follower(self.term, "")
        else:
            self.commit_index = index

    def _arm_notice(self) -> None:
        """Make sure that everybody hears of the present commit index before long."""
        self._notice_index = self.commit_index
        self._notice_at = self.now + self.config.commit_notice_ticks
        if not self.config.commit_notice_ticks:
            self._send_notices()

    def _send_notices(self) -> None:
        """Tell the commit index to those whom no AppendEntries has told it in the meantime."""
        notice_index = self._notice_index
        for progress in self._peers:
            if progress.commit_sent < min(notice_index, progress.match):
                progress.is_heartbeat_due = True
                self._is_send_due = True
        self._notice_at = 0
        if notice_index < self.commit_index:
            self._arm_notice()

    def _send_timeout_now(self, target: Progress) -> None:
        self._lease.is_void = True
        self._send_late(target.node_id, TimeoutNow(self.term))

    # -- leader: sending

    def _build_messages(self) -> list[tuple[str, RaftMessage]]:
        """Everything that a leader has to say now: entries, as far as windows allow, and due heartbeats."""
        messages: list[tuple[str, RaftMessage]] = []
        # Followers that are equally far get the very same message, which the caller need encode only once.
        built: dict[int, tuple[AppendEntries, int]] = {}
        last_index = self.log.last_index
        for progress in self._peers:
            count = len(messages)
            if progress.state is not _SNAPSHOT and (progress.next <= last_index or progress.state is _PROBE):
                self._build_appends(progress, messages, built)
            if progress.is_heartbeat_due:
                progress.is_heartbeat_due = False
                if len(messages) == count:
                    commit = min(self.commit_index, progress.match)
                    messages.append((progress.node_id, Heartbeat(self.term, commit, self._round)))
                    progress.commit_sent = max(progress.commit_sent, commit)
            if len(messages) != count:
                progress.sent_at = self.now
        return messages

    def _build_appends(
        self,
        progress: Progress,
        messages: list[tuple[str, RaftMessage]],
        built: dict[int, tuple[AppendEntries, int]],
    ) -> None:
        config = self.config
        log = self.log
        while True:
            next_index = progress.next
            is_probe = progress.state is _PROBE
            if is_probe:
                if progress.is_paused:
                    return
            elif (
                next_index > log.last_index
                or len(progress.inflight) >= config.inflight_messages_max
                or progress.inflight_bytes >= config.inflight_size_bytes_max
            ):
                return
            if next_index <= log.start_index:
                self._want_snapshot(progress)
                return
            found = None if is_probe else built.get(next_index)
            if found is None:
                prev_index = next_index - 1
                size_max = config.append_size_bytes_max
                if is_probe and config.probe_size_bytes_max < size_max:
                    size_max = config.probe_size_bytes_max
                entries, size = log.slice_bounded(prev_index, config.append_entries_max, size_max)
                message = AppendEntries(
                    self.term, prev_index, log.term_at(prev_index), self.commit_index, self._round, entries
                )
                if not is_probe:
                    built[next_index] = (message, size)
            else:
                message, size = found
            messages.append((progress.node_id, message))
            last = message.prev_index + len(message.entries)
            commit = min(message.commit, last)
            if commit > progress.commit_sent:
                progress.commit_sent = commit
            if is_probe:
                progress.is_paused = True
                return
            progress.inflight.append(Inflight(last, size, self._round, self.now))
            progress.inflight_bytes += size
            progress.next = last + 1

    def _want_snapshot(self, progress: Progress) -> None:
        if not progress.is_heard and self.now - progress.heard_at >= self.config.election_ticks_max:
            progress.become_probe()
            progress.is_paused = True  # nobody there: wait until it answers a heartbeat
            return
        self._count("snapshots_wanted")
        progress.become_snapshot(self.log.snapshot.index)
        self._snapshots_wanted.append(progress.node_id)
