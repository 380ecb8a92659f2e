"""Admission of peers by their CURVE key (RFC 27, ZAP), answered from the transport's own loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import zmq

__all__ = ["DOMAIN", "KeyAdmission"]

# Together with ZAP_ENFORCE_DOMAIN: without a domain libzmq skips ZAP, without the enforcing it admits
# everybody when nobody answers.
DOMAIN: Final = b"coordlib"

_ENDPOINT: Final = "inproc://zeromq.zap.01"
_NOBLOCK: Final = int(zmq.NOBLOCK)
_REQUEST_FRAMES_MIN: Final = 8


class KeyAdmission:
    """Answers libzmq's questions about client keys. One for each context; bound before any listener."""

    __slots__ = ("_admitted", "_socket", "fileno")

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], admitted: Collection[bytes]) -> None:
        self._admitted = frozenset(admitted)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ENDPOINT)
        self.fileno: int = self._socket.getsockopt(zmq.FD)  # type: ignore[assignment]

    def refused_addresses(self) -> Iterator[str]:
        """Answer every question that is waiting, and yield the address of each peer that was refused."""
        while True:
            try:
                request = self._socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            if len(request) < _REQUEST_FRAMES_MIN:
                continue
            route, _, version, request_id, domain, address, _, mechanism, *credentials = request
            is_admitted = (
                version == b"1.0"
                and mechanism == b"CURVE"
                and domain == DOMAIN
                and len(credentials) == 1
                and credentials[0] in self._admitted
            )
            status = b"200" if is_admitted else b"400"
            self._socket.send_multipart(
                [route, b"", b"1.0", request_id, status, b"", b"member" if is_admitted else b"", b""],
                _NOBLOCK,
            )
            if not is_admitted:
                yield address.decode("ascii", "replace")

    def close(self) -> None:
        self._socket.close(0)
