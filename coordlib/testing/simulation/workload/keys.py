"""Names that change over time, so that the history of each stays short enough to be judged."""

from __future__ import annotations

from collections import deque
from typing import Final

from coordlib.testing.simulation.choices import Stream
from coordlib.testing.simulation.workload.site import Outcome, Site, Task

__all__ = ["Key", "Keys"]

OPERATIONS_MIN: Final = 12
OPERATIONS_MAX: Final = 48
CONCURRENT_MAX: Final = 9  # those of unknown outcome are concurrent with everything after them


class Key:
    """A name in use, with what is needed to ask interesting things of it."""

    __slots__ = ("began", "name", "open", "since_ms", "unknown", "values")

    def __init__(self, name: str, since_ms: int) -> None:
        self.name = name
        self.since_ms = since_ms
        self.began = 0
        self.open = 0
        self.unknown = 0
        self.values: deque[int] = deque(maxlen=4)  # that were there lately

    def ended_one(self, task: Task, *, is_read: bool) -> None:
        """An operation that it was picked for has ended."""
        self.open -= 1
        self.unknown += task.outcome is Outcome.UNKNOWN and not is_read


class Keys:
    """A fixed number of names in use at once."""

    def __init__(self, site: Site, prefix: str, count: int) -> None:
        self._site = site
        self._prefix = prefix
        self._current = [Key(f"{prefix}{place}.0", 0) for place in range(count)]
        self._generations = [0] * count
        self.all = {key.name: key for key in self._current}

    def pick(self, stream: Stream) -> Key:
        """A name that can take one more operation."""
        load = self._site.load
        now = self._site.world.now
        place = 0 if stream.random() < load.hot_share else stream.randrange(len(self._current))
        key = self._current[place]
        if (
            key.began >= OPERATIONS_MAX
            or key.open + key.unknown >= CONCURRENT_MAX
            or (key.began >= OPERATIONS_MIN and now - key.since_ms >= load.key_life_ms)
        ):
            self._generations[place] += 1
            name = f"{self._prefix}{place}.{self._generations[place]}"
            key = self._current[place] = self.all[name] = Key(name, now)
        elif not key.began:
            key.since_ms = now
        key.began += 1
        key.open += 1
        return key

    def old(self, stream: Stream) -> Key:
        """Any name that was ever used."""
        names = list(self.all)
        key = self.all[names[stream.randrange(len(names))]]
        key.open += 1
        return key
