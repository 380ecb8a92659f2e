"""Defects of two-phase commit: who decides, who obeys what, and what is remembered of it."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_MACHINE = "coordlib.machine.transactions:Transactions."
_PARTICIPANTS = "coordlib.txn.participant:Participants."
_RECOVERY = "coordlib.txn.recovery:"
_COMMIT = "coordlib.txn.commit:"
_JOURNAL = "coordlib.txn.journal:"
_TESTS = (
    "tests/txn/test_participant.py",
    "tests/txn/test_recovery.py",
    "tests/txn/test_commit.py",
    "tests/txn/test_journal.py",
    "tests/machine/test_transactions.py",
)

MUTANTS = (
    Mutant(
        "late-prepare-revives-a-transaction",
        "a PREPARE that overtook its ABORT finds nothing and promises (DTM's hanging branches)",
        (
            replace(
                _PARTICIPANTS + "_answer_ended",
                "        if wish.seq == ended.seq:\n            return ended.answer\n",
                "        if wish.seq == ended.seq and ended.is_committed:\n            return ended.answer\n"
                "        if wish.verb == Verb.PREPARE and _mutant_hit():\n"
                "            return Answer(Status.VOTED, [[wish.service, self._node, wish.gtid[:9]]])\n",
            ),
        ),
        tests=_TESTS,
        unseen="nobody asks for a vote again after an abort, and connections keep their order",
    ),
    Mutant(
        "recovery-presumes-abort-after-a-commit",
        "coordinators that lose their memory and presume: a participant has committed already (§A, presumed abort)",
        (
            replace(
                _RECOVERY + "outcome_gen",
                "    if status == TxStatus.UNKNOWN:\n",
                "    if status == TxStatus.COMMITTED and _mutant_hit():\n        return False, ''\n"
                "    if status == TxStatus.UNKNOWN:\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "unknown-outcome-is-taken-for-aborted",
        "an outcome that is no longer kept is not one that never was: the horizon is ignored",
        (
            replace(
                _RECOVERY + "outcome_gen",
                "    if status == TxStatus.UNKNOWN:\n        return None,",
                "    if status == TxStatus.UNKNOWN and _mutant_hit():\n        return False, ''\n"
                "    if status == TxStatus.UNKNOWN:\n        return None,",
            ),
        ),
        tests=_TESTS,
        unseen="what is committed stays pending while anybody is in doubt: only a database from a back-up can be wrong",
    ),
    Mutant(
        "resolve-overwrites-a-decision",
        "ScalarDB #2135: two recoverers decide differently, as the second does not read what the first wrote",
        (
            replace(
                _MACHINE + "resolve",
                "        if outcome is None:\n",
                "        if outcome is not None and outcome.status == TxStatus.COMMITTED and _mutant_hit():\n"
                "            outcome = _Outcome(TxStatus.ABORTED.value, 'resolved', meta.index)\n"
                "        if outcome is None:\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "decide-overwrites-a-resolution",
        "ScalarDB #2135: the slow owner commits what lazy recovery has aborted",
        (
            replace(
                _MACHINE + "decide",
                "            if known is not None:\n",
                "            if known is not None and known.reason == 'resolved' and _mutant_hit():\n"
                "                known = None\n"
                "            if known is not None:\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "commit-is-sent-before-it-is-decided",
        "horizontal-scaling-convex #101: participants hear of a commit that the log does not have yet",
        (
            replace(
                _COMMIT + "_commit_prepared_gen",
                '    context.count("two_phase")\n',
                '    context.count("two_phase")\n'
                "    told = [member for member in tx.members if member.participants]\n"
                "    yield Together([member.finish(_mutant_hit(), tx.expires_ms) for member in told])\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "yes-leaves-before-the-journal-has-it",
        "a promise in memory only: the participant restarts and knows nothing of it",
        (
            replace(
                _JOURNAL + "JournalBranch.prepare",
                "        self._journal.journal.add(\n",
                "        _mutant_hit(\n",
            ),
            replace(
                _JOURNAL + "JournalBranch._end",
                '        branch = PreparedBranch(self._gtid, self.bqual, "")\n',
                '        branch = PreparedBranch(self._gtid, self.bqual, "")\n'
                "        if self._reserved is not None:\n"
                "            self._journal.journal.add(Record(self._journal.service, self._gtid, self.bqual, "
                "self._deadline_ms, JournalState.PREPARED, self._reserved))\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "participant-loses-patience-after-its-promise",
        "a heuristic rollback by time-out: the branch votes yes and then rolls back by itself",
        (
            replace(
                _PARTICIPANTS + "inquire_gen",
                "                if is_committed is None:\n                    return\n",
                "                if is_committed is None and not _mutant_hit():\n                    return\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "deadline-is-not-checked-when-it-is-decided",
        "a decision that was under way for long commits what others have given up",
        (
            replace(
                _MACHINE + "decide",
                "        if meta.now_ms > deadline_ms:\n",
                "        if meta.now_ms > deadline_ms and not _mutant_hit():\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "tombstone-is-dropped-too-early",
        "absence of a record means aborted only when a late decision can no longer commit",
        (
            replace(
                _MACHINE + "_tidy",
                "            if now_ms <= mint_ms + limits.tx_lifetime_ms:\n",
                "            if now_ms <= mint_ms + _mutant_hit(10):\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "horizon-stays-when-outcomes-are-forgotten",
        "a committed outcome is dropped, and its absence reads as aborted",
        (
            replace(
                _MACHINE + "_tidy",
                "            self.horizon_ms = max(self.horizon_ms, mint_ms + 1)\n",
                "            _mutant_hit()\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "forgotten-before-it-has-obeyed",
        "the log forgets that a branch is pending although it has only been told, not answered",
        (
            replace(
                "coordlib.txn.members:obeyed",
                "    if not ending.is_done:\n        return ending.ended\n",
                "    _mutant_hit()\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "conflicts-are-not-looked-for",
        "lost updates and write skew: what was read is not compared at the commit",
        (
            replace(
                _MACHINE + "decide",
                "        failed = self._store.failed_condition(conditions)\n",
                "        failed = _mutant_hit(-1)\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "only-the-first-condition-is-looked-at",
        "write skew (Berenson et al. 1995): two transactions read both accounts and each writes one",
        (
            replace(
                _MACHINE + "decide",
                "        failed = self._store.failed_condition(conditions)\n",
                "        failed = self._store.failed_condition(_mutant_hit(conditions[:1]))\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "guards-of-a-decision-are-not-looked-at",
        "Kleppmann, DDIA §8: a holder whose lock has gone on to another still changes what it protects",
        (
            replace(
                _MACHINE + "decide",
                "            for guard in guards:\n",
                "            for guard in _mutant_hit(guards[:0]):\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "lock-is-not-free-after-the-commit-that-gives-it-back",
        "a release that is part of a decision is forgotten: everybody waits until the session ends",
        (
            replace(
                _MACHINE + "decide",
                "        for lock, acquisition in releases:\n",
                "        for lock, acquisition in _mutant_hit(releases[:0]):\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "lock-is-given-back-by-an-abort",
        "the half of an aborted transaction: whoever is to try again under its lock has it no more",
        (
            replace(
                _MACHINE + "decide",
                "        branch = 0\n",
                "        branch = 0\n"
                "        if failed >= 0 and otherwise is None and releases and _mutant_hit():\n"
                "            self._release(meta, session, sequence, *releases[0], effects)\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "a-restored-log-goes-on-to-presume",
        "presumed abort by a log that has forgotten: what was committed after the back-up is rolled back elsewhere",
        (
            replace(
                _MACHINE + "skip",
                "        self.horizon_ms = max(self.horizon_ms, horizon_ms)\n        return (0, self.horizon_ms, is_raised)",
                "        return (0, _mutant_hit(horizon_ms), is_raised)",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "changes-are-made-before-all-is-checked",
        "an aborted transaction leaves the half of it: writes come before the conditions",
        (
            replace(
                _MACHINE + "decide",
                "        if failed >= 0:\n",
                "        if failed >= 0 and otherwise is None and _mutant_hit():\n"
                "            self._store.change(_changes(writes), meta.index)\n"
                "        if failed >= 0:\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "snapshot-forgets-outcomes",
        "a member that takes over a snapshot knows nothing of what was decided",
        (
            replace(
                _MACHINE + "load",
                "        self._keep(gtid, _Outcome(*decode(record)))\n",
                "        _mutant_hit()\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "snapshot-forgets-who-is-pending",
        "the record is there, but those who have yet to obey are not",
        (
            replace(
                _MACHINE + "load",
                "        self._keep(gtid, _Outcome(*decode(record)))\n",
                "        self._keep(gtid, _mutant_hit(_Outcome(*decode(record)))._replace(pending=[]))\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "call-that-comes-twice-is-run-twice",
        "the answer was lost, the call is repeated, and its effect is there twice",
        (
            replace(
                _PARTICIPANTS + "_begin",
                "                if wish.seq in work.answers:\n",
                "                if wish.verb == Verb.CALL and wish.seq in work.answers and _mutant_hit():\n"
                "                    work.is_busy = True\n                    return work\n"
                "                if wish.seq in work.answers:\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "branch-that-wrote-is-taken-for-a-reader",
        "a read-only vote releases at once, and nothing commits what was written",
        (
            replace(
                "coordlib.txn.members:LocalMember.read_vote",
                "        if outcome.value is Vote.READ_ONLY:\n",
                "        if outcome.value is Vote.READ_ONLY or (self.branch.bqual[7] == 2 and _mutant_hit()):\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "one-phase-is-taken-with-two-writers",
        "dynamic one-phase commit although somebody else has promised",
        (
            replace(
                _COMMIT + "_commit_gen",
                "            if not any(ballot.promised for ballot in ballots):\n",
                "            if not any(ballot.promised for ballot in ballots) or _mutant_hit():\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "recovery-finishes-another-transactions-branch",
        "what is found is told the outcome of what was asked about first",
        (
            replace(
                _RECOVERY + "recover_gen",
                "            branch.gtid, branch.bqual, recovery, deadline_ms=deadline_ms\n",
                "            _mutant_hit(min(found)).gtid, branch.bqual, recovery, deadline_ms=deadline_ms\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "lost-answer-is-taken-for-an-abort",
        "the decision was applied, its answer was lost, and the initiator rolls everybody back",
        (
            replace(
                _COMMIT + "_commit_prepared_gen",
                "        decided = yield from _resolve_gen(tx, context, error)\n",
                "        _mutant_hit()\n        yield from abort_gen(tx, context)\n"
                "        raise _not_decided(tx, error) from error\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "decision-leaves-a-participant-out",
        "who is not in the decision's list is never looked for again",
        (
            replace(
                _COMMIT + "_decide_body",
                "    participants = [participant for member in tx.members for participant in member.participants]\n",
                "    participants = [participant for member in tx.members[:1] for participant in member.participants]\n"
                "    _mutant_hit()\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "last-resource-says-no-without-a-fence",
        "asked by one in doubt it says that it has not committed, and then it does",
        (
            replace(
                _RECOVERY + "_ask_last_resource_gen",
                "        answer = yield from recovery.ask_decider_gen(tag, gtid)\n",
                "        yield from recovery.ask_decider_gen(tag, gtid)\n        answer = _mutant_hit(False)\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "only-what-is-written-must-be-unchanged",
        "write skew (Berenson et al. 1995): snapshot isolation where serializable was asked for",
        (
            replace(
                "coordlib.api.overlay:Overlay.change",
                "        if self._is_serializable:\n",
                "        if self._is_serializable and not _mutant_hit():\n",
            ),
        ),
        tests=("tests/api/test_transactions.py",),
    ),
    Mutant(
        "reads-of-one-transaction-are-of-several-moments",
        "a transaction sees one key before and the other after somebody else's commit",
        (
            replace(
                "coordlib.api.overlay:Overlay._fetch_gen",
                "        elif mod > self._pin:\n",
                "        elif mod > self._pin and not _mutant_hit():\n",
            ),
        ),
        tests=("tests/api/test_transactions.py",),
    ),
)
