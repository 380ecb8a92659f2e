"""Chance, drawn from one seed and written down.

Every purpose has a stream of its own, so that leaving out one thing (a fault, a client) changes nothing else
that is drawn: this is what lets a failing run be shrunk. A stream depends on the seed and its name alone:
not on `PYTHONHASHSEED`, nor on the order in which streams are asked for.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

__all__ = ["Choices", "Stream"]

T = TypeVar("T")


class Stream:
    """What is drawn for one purpose. `drawn` is all of it, each as the fraction of its range."""

    __slots__ = ("_append", "_next", "drawn")

    def __init__(self, seed: int, name: str) -> None:
        digest = blake2b(b"%d:%s" % (seed, name.encode()), digest_size=16).digest()
        self._next = random.Random(int.from_bytes(digest, "big")).random
        self.drawn = array("d")
        self._append = self.drawn.append

    def random(self) -> float:
        """At least 0 and less than 1."""
        value = self._next()
        self._append(value)
        return value

    def randrange(self, stop: int) -> int:
        return int(self.random() * stop)

    def randint(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + int(self.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + self.random() * (high - low)

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        rest = list(options)
        return [rest.pop(self.randrange(len(rest))) for _ in range(count)]

    def getrandbits(self, count: int) -> int:
        return int.from_bytes(self.randbytes(-(-count // 8)), "big") >> (-count % 8)

    def randbytes(self, count: int) -> bytes:
        return b"".join(self.randrange(1 << 48).to_bytes(6, "big") for _ in range(-(-count // 6)))[:count]


class Choices:
    """All streams of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._streams: dict[str, Stream] = {}

    def stream(self, name: str) -> Stream:
        """The stream of that name: the same one at every call."""
        stream = self._streams.get(name)
        if stream is None:
            self._streams[name] = stream = Stream(self.seed, name)
        return stream

    def digest(self) -> bytes:
        """Of all that was drawn from all streams."""
        hash = blake2b(digest_size=16)
        for name, stream in sorted(self._streams.items()):
            hash.update(b"%s:%d:" % (name.encode(), len(stream.drawn)))
            hash.update(stream.drawn)
        return hash.digest()
