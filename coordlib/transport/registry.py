"""Which transports are installed, by name.

A transport announces itself under the entry-point group `coordlib.transports`. This module finds and
loads it; it knows nothing about frames, and imports no transport before one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias, cast

from coordlib.errors import TransportNotFound
from coordlib.transport.base import Transport, TransportSettings

__all__ = ["TransportFactory", "find_transport", "installed"]

TransportFactory: TypeAlias = Callable[[TransportSettings], Transport]

_GROUP = "coordlib.transports"

# A checkout that was never installed has no metadata; these two are always beside it.
_BUILT_IN = {
    "memory": "coordlib_memory:MemoryTransport",
    "zmq": "coordlib_zmq:ZmqTransport",
}


def installed() -> tuple[str, ...]:
    """The names `find_transport` knows, sorted. Nothing is imported to find out."""
    return tuple(sorted({*_BUILT_IN, *_announced()}))


def find_transport(name: str) -> TransportFactory:
    """
    Return the factory of the transport called `name`, importing its package.

    Raises:
        TransportNotFound: Nobody announces that name, or the package that does cannot be imported;
            the message says which, and names what is installed.
    """
    announced = _announced().get(name)
    target = announced.value if announced is not None else _BUILT_IN.get(name)
    if target is None:
        raise TransportNotFound(
            f"no transport is called {name!r}; installed are: {', '.join(installed())}",
            name=name,
            installed=installed(),
        )
    try:
        factory = announced.load() if announced is not None else _load(target)
    except (ImportError, AttributeError) as exc:
        raise TransportNotFound(
            f"transport {name!r} is announced as {target!r} but cannot be imported ({exc}); "
            f"installed are: {', '.join(installed())}",
            name=name,
            installed=installed(),
        ) from exc
    return cast(TransportFactory, factory)


def _announced() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def _load(target: str) -> object:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)
