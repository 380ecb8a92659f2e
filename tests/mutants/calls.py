"""Defects of calls between applications: who gets what, how often, and what may be concluded from silence."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_CALLS = "coordlib.node.calls:Calls."
_TESTS = ("tests/node/test_calls.py",)

MUTANTS = (
    Mutant(
        "answer-is-given-to-another-call",
        "responses matched by order instead of by number (HTTP pipelining behind a lost answer; redis-py #2624)",
        (
            replace(
                _CALLS + "_replied",
                "        pending = self._pending.get(id)\n",
                "        others = [n for n, one in self._pending.items() if one.via == source and n != id]\n"
                "        if id in self._pending and others and _mutant_hit():\n"
                "            id = others[0]\n"
                "        pending = self._pending.get(id)\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "call-that-comes-twice-is-delivered-twice",
        "at-least-once taken for exactly-once: a message that the network doubles is executed twice",
        (
            replace(
                _CALLS + "_called",
                "        if call_id <= self._newest_from.get(source, 0):\n",
                "        if call_id < self._newest_from.get(source, 0) + _mutant_hit(0):\n",
            ),
        ),
        tests=_TESTS,
        unseen="whoever is called by a transaction knows calls by their sequence, and does none twice",
    ),
    Mutant(
        "call-is-sent-again-on-another-way",
        "a retry below the application: what was sent on a way that broke is sent on the next one, too",
        (
            replace(
                _CALLS + "_lose_way",
                "            self._lost(self._pending.pop(id).call)\n",
                "            self._try_ways(_mutant_hit(self._pending.pop(id)), 0)\n",
            ),
        ),
        tests=_TESTS,
        unseen="whoever is called by a transaction knows calls by their sequence, and does none twice",
    ),
    Mutant(
        "call-for-an-earlier-session-is-delivered",
        "a restarted process is taken for the one before it, whose memory the caller counts on",
        (
            replace(
                _CALLS + "_called",
                "        if target and target == self.session and self.is_serving:\n",
                "        if target and not self._way_to.get(target) and self.is_serving and _mutant_hit():\n",
            ),
        ),
        tests=_TESTS,
    ),
    Mutant(
        "service-of-a-dead-host-stays-in-the-registry",
        "what a host that is gone had registered is found for ever, and called in vain",
        (
            replace(
                "coordlib.machine.services:Services.end_sessions",
                "            for service in sorted(self._by_session.get(session, ())):\n",
                "            for service in sorted(_mutant_hit(self._by_session.get(session, ())))[:0]:\n",
            ),
        ),
        tests=("tests/machine/test_services.py",),
    ),
    Mutant(
        "answer-goes-to-whoever-asked-last",
        "a proxy that keeps one asker for each way: answers cross",
        (
            replace(
                _CALLS + "_replied",
                "            self._send(forward.asker, ServiceReply(forward.asked_id, status, body))\n",
                "            last = max(self._forwards.values(), key=lambda one: one.asked_id, default=forward)\n"
                "            self._send(_mutant_hit(last).asker, ServiceReply(last.asked_id, status, body))\n",
            ),
        ),
        tests=_TESTS,
    ),
)
