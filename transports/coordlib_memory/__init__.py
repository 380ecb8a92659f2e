"""Frames between transports of one process, without sockets: for one-process clusters and for tests.

Endpoints are `memory://name`. `MemoryTransport` keeps the whole contract of
`coordlib.transport.base`: bounded queues, reports of connections, routes that die, keys that must match.
"""

from coordlib_memory.transport import MemoryTransport

__all__ = ["MemoryTransport"]
