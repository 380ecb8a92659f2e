"""What libzmq reports about the connections of one socket, in the order in which it happened."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import Final

import zmq

__all__ = [
    "ACCEPTED",
    "ACCEPT_FAILED",
    "CONNECTED",
    "CONNECTION_EVENTS",
    "DISCONNECTED",
    "HANDSHAKE_FAILED",
    "HANDSHAKE_SUCCEEDED",
    "LISTENING",
    "ROUTER_EVENTS",
    "Monitor",
    "failure_reason",
]

ACCEPTED: Final = int(zmq.EVENT_ACCEPTED)
ACCEPT_FAILED: Final = int(zmq.EVENT_ACCEPT_FAILED)
CONNECTED: Final = int(zmq.EVENT_CONNECTED)
DISCONNECTED: Final = int(zmq.EVENT_DISCONNECTED)
LISTENING: Final = int(zmq.EVENT_LISTENING)
HANDSHAKE_SUCCEEDED: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
_FAILED_AUTH: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_FAILED_PROTOCOL: Final = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
_FAILED_NO_DETAIL: Final = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
HANDSHAKE_FAILED: Final = _FAILED_AUTH | _FAILED_PROTOCOL | _FAILED_NO_DETAIL

# Each event costs a message, so only those are asked for that somebody acts upon.
ROUTER_EVENTS: Final = (
    LISTENING | ACCEPTED | ACCEPT_FAILED | DISCONNECTED | HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED
)
CONNECTION_EVENTS: Final = CONNECTED | DISCONNECTED | HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED

_PROTOCOL_ERROR_CRYPTOGRAPHIC: Final = int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC)
_NOBLOCK: Final = int(zmq.NOBLOCK)
_HEADER: Final = struct.Struct("=HI")  # event, value; the second frame is the endpoint


class Monitor:
    """The event stream of one socket. Reading never blocks."""

    __slots__ = ("_pair", "fileno")

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], watched: zmq.Socket[bytes], mask: int, number: int
    ) -> None:
        # A number that was never used in this context: libzmq forgets an address some time after close().
        address = f"inproc://monitor-{number}"
        watched.monitor(address, mask)
        pair = context.socket(zmq.PAIR)
        pair.setsockopt(zmq.LINGER, 0)
        # Unlimited: at a limit libzmq's I/O thread would block inside the monitored socket, and a
        # close() of that socket would then wait for it forever.
        pair.setsockopt(zmq.RCVHWM, 0)
        pair.connect(address)
        # The descriptor is signalled only for a reader that was told "nothing yet" once.
        pair.getsockopt(zmq.EVENTS)
        self._pair = pair
        self.fileno: int = pair.getsockopt(zmq.FD)  # type: ignore[assignment]

    def events(self) -> Iterator[tuple[int, int]]:
        """Yield (event, value) until there is none; the descriptor is armed again afterwards."""
        recv = self._pair.recv
        while True:
            try:
                header = recv(_NOBLOCK)
                recv(_NOBLOCK)
            except zmq.Again:
                return
            event, value = _HEADER.unpack(header)
            yield event, value

    def close(self) -> None:
        self._pair.close(0)


def failure_reason(event: int, value: int, *, we_dialled: bool) -> str:
    """Say in the transport's words why a handshake failed, as far as libzmq lets us know."""
    if event == _FAILED_AUTH:
        return "refused-key"
    if event == _FAILED_PROTOCOL:
        return "wrong-key" if value == _PROTOCOL_ERROR_CRYPTOGRAPHIC else "protocol"
    # No detail: the connection ended. A peer that cannot open our first CURVE command closes at once,
    # which is what a wrong server key looks like from this side; a silent one runs into the timeout.
    if we_dialled and value in (errno.EPIPE, errno.ECONNRESET):
        return "wrong-key"
    return "no-handshake"
