"""Defects of ids: of who may mint when, of how the window is kept, and of how the next id is found."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_GRANTS = "coordlib.machine.ids:Ids."
_API = "coordlib.api.ids:_IdsBase."
_MINTER = "coordlib.ids.minter:Minter."
_BEGIN = "begin = max(now, ended, layout.unit_at(self.floor_ms))"

MUTANTS = (
    Mutant(
        "window-is-granted-again-before-it-has-ended",
        "reliability of leases: paused beyond its lease, and its worker given to another: both mint the same ids",
        (
            replace(
                _GRANTS + "lease", _BEGIN, "begin = _mutant_hit(max(now, layout.unit_at(self.floor_ms)))"
            ),
            replace(_GRANTS + "_choose", "first[0] <= now:", "(first[0] <= now or _mutant_hit()):"),
        ),
    ),
    Mutant(
        "worker-is-chosen-although-it-is-leased",
        "Leaf, uid-generator: a worker number is handed out again while its holder is merely slow",
        (replace(_GRANTS + "_choose", "first[0] <= now:", "(first[0] <= now or _mutant_hit()):"),),
    ),
    Mutant(
        "next-window-begins-at-the-time-of-the-log",
        "hazelcast #17975: the clock was set back meanwhile, and what was used is used again",
        (replace(_GRANTS + "lease", _BEGIN, "begin = _mutant_hit(max(now, layout.unit_at(self.floor_ms)))"),),
    ),
    Mutant(
        "lapsed-lease-is-renewed",
        "etcd #9888 and many others: a lease that has run out comes to life again",
        (
            replace(
                _GRANTS + "renew",
                "held.is_returned or now >= until:",
                "held.is_returned or (now >= until and not _mutant_hit()):",
            ),
        ),
    ),
    Mutant(
        "lease-that-was-given-back-is-renewed",
        "a renewal that was on its way when its process closed takes back what was given back",
        (
            replace(
                _GRANTS + "renew",
                "held.is_returned or now >= until:",
                "(held.is_returned and not _mutant_hit()) or now >= until:",
            ),
        ),
        tests=("tests/machine/test_ids.py",),
        unseen="a renewal and the return after it stay in order, but for a change of leaders at that moment",
    ),
    Mutant(
        "anothers-lease-is-renewed",
        "Redlock without a value: whoever held it last extends the lease of who holds it now",
        (
            replace(
                _GRANTS + "_held",
                "held.lease != lease or",
                "(held.lease != lease and not _mutant_hit()) or",
            ),
        ),
    ),
    Mutant(
        "renewal-cuts-the-window-short",
        "an answer that is late names an end before the one that was promised",
        (
            replace(
                _GRANTS + "renew",
                "until = max(until, min(now + layout.window(window_ms), layout.units))",
                "until = _mutant_hit(min(now + layout.window(window_ms), layout.units))",
            ),
        ),
    ),
    Mutant(
        "renewal-forgets-what-its-lease-is-ahead",
        "a lease that begins later than the log's time would hold its worker for ever",
        (replace(_GRANTS + "renew", " + held.offset", " + _mutant_hit(0)"),),
        tests=("tests/machine/test_ids.py",),
    ),
    Mutant(
        "all-of-the-window-is-given-back",
        "what was minted before a graceful end is minted again by the next holder",
        (
            replace(
                _GRANTS + "return_",
                "until = max(begin, min(until, used_until))",
                "until = _mutant_hit(begin)",
            ),
        ),
    ),
    Mutant(
        "worker-that-was-given-back-stays-taken",
        "pre-fork servers: each restart of a worker process costs a worker number until none is left",
        (
            replace(
                _GRANTS + "return_",
                "self._put(generator, key, worker, held._replace(is_returned=True))",
                "self.workers.put(key, encode(tuple(held._replace(is_returned=_mutant_hit()))))",
            ),
        ),
    ),
    Mutant(
        "snapshot-forgets-when-windows-end",
        "Thesis §5: what decides the next answer is not in the snapshot",
        (
            replace(
                _GRANTS + "load_worker",
                "        self.workers.put(key, record)\n",
                "        _mutant_hit()\n"
                "        windows = [(begin, begin, owner) for begin, _, owner in held.windows]\n"
                "        self.workers.put(key, encode(tuple(held._replace(windows=windows))))\n",
            ),
        ),
    ),
    Mutant(
        "restored-index-has-all-workers-free",
        "what is derived from the state is not derived again: only who was restored decides otherwise",
        (
            replace(
                _GRANTS + "load_worker",
                "0 if held.lease <= self.fence else held.free_at",
                "_mutant_hit(0)",
            ),
        ),
    ),
    Mutant(
        "snapshot-forgets-the-floor",
        "a restore from back-up is skipped once, and the next restart forgets it",
        (
            replace(
                "coordlib.machine:_Restore.load",
                "parts.ids.floor_ms, parts.ids.last_lease, parts.ids.fence, parts.ids.ahead_ms = fields",
                "_, parts.ids.last_lease, parts.ids.fence, parts.ids.ahead_ms = _mutant_hit(fields)",
            ),
        ),
        tests=("tests/machine",),
    ),
    Mutant(
        "skip-after-a-restore-is-ignored",
        "what the lost part of the log has granted is granted again",
        (
            replace(
                _GRANTS + "skip",
                "is_raised = floor_ms > self.floor_ms\n",
                "is_raised = floor_ms > self.floor_ms and not _mutant_hit()\n",
            ),
        ),
        tests=("tests/machine/test_ids.py",),
    ),
    Mutant(
        "skip-ends-no-lease",
        "a lease of the lost history has the number of another, and is renewed",
        (
            replace(
                _GRANTS + "skip",
                "self.last_lease = self.fence = max(",
                "self.last_lease = _mutant_hit(max)(",
            ),
        ),
        tests=("tests/machine/test_ids.py",),
    ),
    Mutant(
        "limit-is-not-checked-at-the-end-of-a-window",
        "off by one: the first unit of whoever has the worker next",
        (
            replace(
                _MINTER + "_obstacle",
                "if unit >= until:",
                "if unit > until + _mutant_hit(0):",
            ),
        ),
    ),
    Mutant(
        "renewal-is-counted-on-before-it-is-granted",
        "leases that are extended when they are asked for, not when they are answered",
        (
            replace(
                _API + "_renew_gen",
                "            reply = yield Step(RequestKind.COMMAND, body, FOREVER_MS)\n",
                "            hoped = lease.until_unit + wanted_ms // self.layout.unit_ms\n"
                "            self._minter.extend(_mutant_hit(hoped), self._minter.info().now_unit)\n"
                "            reply = yield Step(RequestKind.COMMAND, body, FOREVER_MS)\n",
            ),
        ),
    ),
    Mutant(
        "rest-is-given-back-while-minting-goes-on",
        "a thread that is still at work mints what was given back",
        (replace(_API + "_revoke", "        self._minter.revoke()\n", "        _mutant_hit()\n"),),
    ),
    Mutant(
        "closing-leaves-the-ids-that-are-at-hand",
        "a cache of ids outlives the right to them",
        (
            replace(
                _MINTER + "_stop",
                "        self._reclaim()\n",
                "        _mutant_hit()\n",
            ),
        ),
    ),
    Mutant(
        "clock-that-steps-back-resets-the-sequence",
        "twitter snowflake #6, bwmarrin #20",
        (
            replace(
                _MINTER + "_now",
                "            self._regressions += 1\n",
                "            self._regressions += 1\n            self._high = _mutant_hit(0)\n            self._drop()\n",
            ),
        ),
    ),
    Mutant(
        "new-unit-begins-its-sequence-without-looking-back",
        "yitter #79: what was borrowed from the next millisecond is minted again in it",
        (
            replace(
                _MINTER + "_next_chunk",
                "first = max(self._high, now << bits)",
                "first = _mutant_hit(now << bits)",
            ),
        ),
    ),
    Mutant(
        "overflow-carries-into-the-worker",
        "snowflake-id-toolkit 0.6: 4096 is or-ed into the number of the node",
        (
            replace(
                _MINTER + "_next_chunk",
                "end = min(first + _CHUNK, (unit + 1) << bits)",
                "end = _mutant_hit(first + _CHUNK)",
            ),
        ),
    ),
    Mutant(
        "what-is-left-of-a-block-is-counted-one-too-many",
        "off by one: the last id that was taken is given out again",
        (
            replace(
                _MINTER + "_reclaim",
                "self._high -= len(list(self._chunk))",
                "self._high -= len(list(self._chunk)) + _mutant_hit(1)",
            ),
        ),
    ),
    Mutant(
        "fork-keeps-the-lease",
        "vd2org/snowflake #6, rakheyl #1, gunicorn's workers: parent and child mint the same ids",
        (
            replace(
                _MINTER + "__init__",
                "        _minters.add(self)\n",
                "        _mutant_hit()\n",
            ),
        ),
        tests=("tests/ids/test_threads.py", "tests/api/test_ids.py"),
        unseen="a simulated process does not fork; `make duplicates` has processes that do",
    ),
)
