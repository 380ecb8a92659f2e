"""Who misbehaves how often, and how to say so without flooding the log. Pure: `now_ms` is handed in.

`now_ms` is a monotonic clock's milliseconds; the origin does not matter. What is *not* here: the log itself.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

__all__ = ["Misbehaviour", "SayOnce"]

_CODES_MAX: Final = 256


class Misbehaviour:
    """
    Counts bad input by code and by peer, and holds a peer off that keeps failing to authenticate.

    A *peer* is any string that tells one source from another: an address, or a node's id. Bounded: the
    peer that was heard of least recently is forgotten when there are more than `peers_max`.
    """

    QUARANTINE_CODES: Final = frozenset({"auth-failed"})

    __slots__ = (
        "_failures",
        "_failures_max",
        "_peers_max",
        "_quarantine_ms",
        "_until_ms",
        "_window_ms",
        "by_peer",
        "totals",
    )

    def __init__(
        self,
        *,
        failures_max: int = 10,
        window_ms: int = 10_000,
        quarantine_ms: int = 30_000,
        peers_max: int = 1024,
    ) -> None:
        self._failures_max = failures_max
        self._window_ms = window_ms
        self._quarantine_ms = quarantine_ms
        self._peers_max = peers_max
        self.totals: Counter[str] = Counter()
        self.by_peer: dict[str, Counter[str]] = {}  # least recently heard of first
        self._failures: dict[str, deque[int]] = {}  # times; Invariant: its peers are in by_peer
        self._until_ms: dict[str, int] = {}  # end of a peer's quarantine; Invariant: its peers are in by_peer

    def record(self, peer: str, code: str, now_ms: int) -> bool:
        """Count one bad input. True if with this one the peer's quarantine begins."""
        self._count(peer, code)
        if code not in self.QUARANTINE_CODES or self.is_quarantined(peer, now_ms):
            return False
        failures = self._failures.setdefault(peer, deque(maxlen=self._failures_max))
        failures.append(now_ms)
        if len(failures) < self._failures_max or now_ms - failures[0] > self._window_ms:
            return False
        failures.clear()
        self._until_ms[peer] = now_ms + self._quarantine_ms
        return True

    def is_quarantined(self, peer: str, now_ms: int) -> bool:
        """Whether to drop everything from this peer unread, for now."""
        until_ms = self._until_ms.get(peer)
        if until_ms is None:
            return False
        if now_ms < until_ms:
            return True
        del self._until_ms[peer]
        return False

    def forgive(self, peer: str) -> None:
        """The peer has proved itself (a session was established): its failures no longer count."""
        self._failures.pop(peer, None)
        self._until_ms.pop(peer, None)

    def _count(self, peer: str, code: str) -> None:
        if code not in self.totals and len(self.totals) >= _CODES_MAX:
            code = "other"
        self.totals[code] += 1
        counts = self.by_peer.pop(peer, None)
        if counts is None:
            counts = Counter()
            while len(self.by_peer) >= self._peers_max:
                forgotten = next(iter(self.by_peer))
                del self.by_peer[forgotten]
                self.forgive(forgotten)
        self.by_peer[peer] = counts
        counts[code] += 1


class SayOnce:
    """
    What to log, when the same thing may happen a thousand times a second.

    The first occurrence of a key is said at once, later ones at most once an interval, with their number.
    Bounded: the key that was said least recently is forgotten when there are more than `keys_max`.
    """

    __slots__ = ("_interval_ms", "_keys_max", "_said")

    def __init__(self, *, interval_ms: int = 60_000, keys_max: int = 1024) -> None:
        self._interval_ms = interval_ms
        self._keys_max = keys_max
        self._said: dict[str, list[int]] = {}  # key -> [when said, how often unsaid since]

    def say(self, key: str, text: str, now_ms: int) -> str | None:
        """The text to log now, or None."""
        record = self._said.get(key)
        if record is None:
            while len(self._said) >= self._keys_max:
                del self._said[next(iter(self._said))]
            self._said[key] = [now_ms, 0]
            return text
        said_ms, unsaid = record
        elapsed_ms = now_ms - said_ms
        if elapsed_ms < self._interval_ms:
            record[1] = unsaid + 1
            return None
        del self._said[key]  # to the end of the order
        self._said[key] = [now_ms, 0]
        return f"{text} ({unsaid + 1} times in {elapsed_ms / 1000:.0f} s)" if unsaid else text
