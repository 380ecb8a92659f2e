"""Defects of locks, fencing tokens, guards, and of whatever else every member must compute alike."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_LOCKS = "coordlib.machine.locks:Locks."
_API = "coordlib.api.locks:_LockBase."
_HELD = "if lock.sequence == sequence and lock.session == session:\n                self._forget(session, sequence)\n"

MUTANTS = (
    Mutant(
        "waiter-is-granted-after-its-session-expired",
        "etcd #11456, #9921",
        (
            replace(
                _LOCKS + "end_sessions",
                "                    del waiters[(session, sequence)]\n",
                "                    _mutant_hit()\n",
            ),
            replace(
                _LOCKS + "_pass_on",
                "if not self._is_alive(session):",
                "if False:",
            ),
        ),
    ),
    Mutant(
        "release-compares-only-the-name",
        "etcd #22082, Redlock without a value: a late release frees the next holder's lock",
        (
            replace(
                _LOCKS + "release",
                _HELD,
                "if (session, sequence) not in (lock.waiters or ()):\n"
                "                _mutant_hit()\n                self._forget(lock.session, lock.sequence)\n",
            ),
        ),
    ),
    Mutant(
        "release-compares-only-the-session",
        "two threads of one process: the one that gives up frees what the other holds",
        (
            replace(
                _LOCKS + "release",
                _HELD,
                "if lock.session == session:\n                _mutant_hit()\n"
                "                self._forget(lock.session, lock.sequence)\n",
            ),
        ),
    ),
    Mutant(
        "tokens-are-counted-by-lock",
        "a lock that is deleted and made again gives the same tokens again",
        (
            replace(_LOCKS + "acquire", "token = self._next_token()", "token = _mutant_hit(1)"),
            replace(_LOCKS + "_pass_on", "lock.token = self._next_token()", "lock.token += 1"),
        ),
    ),
    Mutant(
        "token-is-handed-over-with-the-lock",
        "the next holder's token fences nobody (DDIA ch. 8)",
        (replace(_LOCKS + "_pass_on", "lock.token = self._next_token()", "_mutant_hit()"),),
    ),
    Mutant(
        "guard-is-content-with-any-holder",
        "a stale holder writes under the lock of another (DDIA ch. 8)",
        (
            replace(
                _LOCKS + "check_guard",
                "if lock is None or lock.token != token:",
                "if lock is None or (lock.token != token and not _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "guard-of-a-put-is-not-checked",
        "a stale holder's write is checked before it is sent, not where it is applied",
        (
            replace(
                "coordlib.machine.kv:Maps.put",
                "            self._check_guard(guard)\n",
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "queue-is-served-from-its-end",
        "first come, first served: who came first starves",
        (
            replace(
                _LOCKS + "_pass_on",
                "waiters.popitem(last=False)",
                "waiters.popitem(last=_mutant_hit())",
            ),
        ),
        tests=("tests/machine",),
    ),
    Mutant(
        "acquisition-that-timed-out-is-not-withdrawn",
        "Jepsen etcd client: given up by its caller, and granted to it later",
        (
            replace(
                _API + "_wait_gen",
                "            yield from self._withdraw_gen(ask, view, sequence)\n",
                "            _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "acquisition-of-unknown-outcome-is-not-withdrawn",
        "Jepsen etcd client: an acquire whose answer is lost holds the lock for ever",
        (
            replace(
                _API + "_acquire_gen",
                "            if ask.call is not None:\n"
                "                yield Step.withdraw(ask, self._release_body)\n"
                "            raise\n",
                "            _mutant_hit()\n            raise\n",
            ),
        ),
    ),
    Mutant(
        "unconfirmed-release-is-forgotten",
        "Curator: a release that fails leaves a lock that nobody holds",
        (
            replace(
                _API + "_release_gen",
                "                return False\n            # It goes on",
                "                return False\n            if _mutant_hit():\n"
                "                return True\n            # It goes on",
            ),
        ),
    ),
    Mutant(
        "grants-go-out-in-the-order-of-memory",
        "etcd, CockroachDB: replicas that iterate a hash table do not agree",
        (
            replace(
                _LOCKS + "end_sessions",
                "sorted(self._by_session.pop(session, {}).items())",
                "sorted(self._by_session.pop(session, {}).items(), key=lambda item: -id(item[1]))",
            ),
            replace(_LOCKS + "end_sessions", "for name in sorted(held):", "for name in _mutant_hit(held):"),
        ),
        tests=("tests/machine",),
    ),
    Mutant(
        "state-depends-on-the-wall-clock",
        "Thesis §3.8: a state machine that reads its own clock differs from member to member",
        (
            replace(
                "coordlib.machine:Machine.apply",
                "self.log_time_ms = now_ms = entry_ms",
                'self.log_time_ms = now_ms = _mutant_hit(__import__("time").time_ns() // 1000)',
            ),
        ),
    ),
    Mutant(
        "compare-and-set-ignores-a-missing-key",
        "a key that is not there is swapped as if it had been what was expected",
        (
            replace(
                "coordlib.machine.kv:Maps.compare_and_set",
                "        if current != expected:\n",
                "        if current != expected and (current is not None or not _mutant_hit()):\n",
            ),
        ),
    ),
    Mutant(
        "insert-replaces-what-is-there",
        "put-if-absent that only looks before it is sent: two may win",
        (
            replace(
                "coordlib.machine.kv:Maps.insert",
                "        if present is not None:\n",
                "        if present is not None and not _mutant_hit():\n",
            ),
        ),
    ),
)
