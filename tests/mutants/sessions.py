"""Defects of sessions: exactly once, who is alive, and what a client may conclude."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_SESSIONS = "coordlib.machine.sessions:Sessions."
_SERVICE = "coordlib.node.service:RequestService."
_CLIENT = "coordlib.node.session:SessionClient."

MUTANTS = (
    Mutant(
        "repeated-command-is-executed-again",
        "Thesis §6.3; Jepsen: a retry through the next leader is applied twice",
        (
            replace(_SESSIONS + "begin", "kept = replies.get(sequence)", "kept = None"),
            replace(
                _SERVICE + "_command",
                "            if reply is not None:\n",
                "            if reply is not None and not _mutant_hit():\n",
            ),
        ),
    ),
    Mutant(
        "reply-is-kept-under-a-wrong-sequence",
        "ClickHouse Keeper: an answer found under another request's key",
        (
            replace(
                _SESSIONS + "finish",
                "session.replies[sequence] = reply",
                "session.replies[_mutant_hit(session.mark + len(session.replies))] = reply",
            ),
        ),
    ),
    Mutant(
        "expired-session-is-revived-by-a-late-command",
        "Thesis §6.3: a command of a session that has ended must not be executed",
        (
            replace(
                _SESSIONS + "begin",
                "        if session is None:\n            raise expired(id)\n",
                "        if session is None:\n            _mutant_hit()\n"
                '            session = Session(id, _ID.pack(id), 3000, "", 0)\n            self._insert(session)\n',
            ),
        ),
        tests=("tests/machine",),
    ),
    Mutant(
        "leader-expires-a-session-without-a-log-entry",
        "Thesis §6.3: sessions must end on all members at one place in the log",
        (
            replace(
                _SERVICE + "tick",
                "                self._expiring[session] = []\n",
                "                self._expiring[session] = []\n"
                "                self._machine.sessions.remove(_mutant_hit(session))\n",
            ),
        ),
    ),
    Mutant(
        "keep-alive-is-acknowledged-without-a-quorum",
        "a deposed leader prolongs what its successor lets expire (ZooKeeper and Chubby ask their quorum)",
        (
            replace(
                _SERVICE + "_keep_alive",
                "        self._raft.request_read(_Read(source, request), by_quorum=True)\n        self._reads_asked += 1\n",
                '        self._reply(source, request.request_id, ReplyStatus.OK, _mutant_hit(b""))\n',
            ),
        ),
    ),
    Mutant(
        "new-leader-gives-half-of-the-time",
        "etcd lessor: after a failover every lease is to be extended by its full TTL",
        (
            replace(
                _SERVICE + "_become_ready",
                "self._deadlines[session.session] = now + remaining",
                "self._deadlines[session.session] = now + _mutant_hit(remaining) // 2",
            ),
        ),
    ),
    Mutant(
        "keep-alive-leaves-the-checkpoint-in-the-log",
        "etcd #13508, lease checkpoints: the next leader goes by a remaining time that is long prolonged",
        (
            replace(
                _SERVICE + "_keep_alive",
                "        if session in self._checkpointed:\n",
                "        if session in self._checkpointed and not _mutant_hit():\n",
            ),
        ),
        tests=("tests/node/test_service.py",),
    ),
    Mutant(
        "retry-gets-a-new-sequence",
        "jetcd 0.8.2, FoundationDB commit_unknown_result: what is repeated looks new",
        (
            replace(
                _CLIENT + "flush",
                "                if call.sequence == 0:\n",
                "                if call.sequence == 0 or (call.attempts and _mutant_hit()):\n",
            ),
        ),
    ),
    Mutant(
        "timeout-is-reported-as-failure",
        "Jepsen, time and again: no answer in time is not 'did not happen'",
        (
            replace(
                _CLIENT + "_timeout_error",
                "        if call.attempts:\n",
                "        if call.attempts and not _mutant_hit():\n",
            ),
        ),
    ),
    Mutant(
        "refusal-of-a-retry-is-reported-as-failure",
        "maelstrom: after a retry, the first attempt may have been applied",
        (
            replace(
                _CLIENT + "_refused",
                "if call.kind == RequestKind.COMMAND and call.attempts > 1:",
                "if call.kind == RequestKind.COMMAND and call.attempts > 1 and not _mutant_hit():",
            ),
        ),
        tests=("tests/node/test_session.py",),
    ),
    Mutant(
        "loss-of-a-session-is-reported-as-failure",
        "ZooKeeper: a session that expired says nothing about its last request",
        (
            replace(
                _CLIENT + "_end_session_calls",
                "call.view is view and not call.attempts:",
                "call.view is view and (not call.attempts or _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "unanswered-requests-count-as-acknowledged",
        "RIFL §3: a client's mark passes what it has no answer to, and a retry is told of nothing",
        (
            replace(
                _CLIENT + "_queue_again",
                "        if not call.is_queued:\n",
                "        if call.sequence:\n            self._lowest = max(self._lowest, _mutant_hit(call.sequence))\n"
                "        if not call.is_queued:\n",
            ),
        ),
    ),
    Mutant(
        "withdrawn-request-is-executed-when-it-arrives",
        "Jepsen etcd client: an acquisition that was given up is granted later, to nobody",
        (
            replace(
                "coordlib.machine:Machine.apply",
                "                self.sessions.forbid(session, args[2])\n",
                "                _mutant_hit()\n",
            ),
        ),
        tests=("tests/machine",),
        unseen="the mark that comes with the withdrawal refuses the request as well, unless older ones are unanswered",
    ),
)
