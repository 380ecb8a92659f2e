"""Connections whose seals are checksums: all of production's channel code without the price of its cipher.

Handshakes, sessions, key ids, counters and replay windows are those of production. Only the cipher is not:
the plaintext stays as it is, and what would be its authentication tag is a checksum over the message and the
additional data, which name the session, the two ends, the direction and the message's number. It stops what a
seal must stop here (damage, replays, frames of other sessions and of other clusters), and nobody who would forge
it, of whom there are none in a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from zlib import crc32

from cryptography.exceptions import InvalidTag

from coordlib.node.links import Links
from coordlib.testing.simulation.network import SimulatedTransport
from coordlib.transport.base import Lane
from coordlib.wire.channel import ChannelIdentity, Established, Initiator, Responder
from coordlib.wire.cose import TAG_SIZE
from coordlib.wire.keys import ClusterKeys

__all__ = ["CLUSTER", "PlainLinks"]

CLUSTER: Final = "simulated"


def _encrypt(nonce: bytes, data: bytes, aad: bytes) -> bytes:
    return data + crc32(data, crc32(aad)).to_bytes(TAG_SIZE, "big")


def _decrypt(nonce: bytes, data: bytes, aad: bytes) -> bytes:
    plaintext = bytes(data[:-TAG_SIZE])
    if crc32(plaintext, crc32(aad)) != int.from_bytes(data[-TAG_SIZE:], "big"):
        raise InvalidTag
    return plaintext


def _make_plain(session: Any) -> None:
    session.seal._encrypt = _encrypt
    session.opener._decrypt = _decrypt


class _PlainInitiator(Initiator):
    __slots__ = ()

    def _receive_welcome(self, frame: bytes) -> Established:
        established = super()._receive_welcome(frame)
        _make_plain(self._session)
        return established


class _PlainResponder(Responder):
    __slots__ = ()

    def _add_half_open(self, session: Any) -> None:
        _make_plain(session)
        super()._add_half_open(session)


class PlainLinks(Links):
    """Production links over connections whose seals are checksums."""

    def __init__(
        self, transport: SimulatedTransport, keys: ClusterKeys, identity: ChannelIdentity, **more: Any
    ):
        super().__init__(transport, keys, identity, **more)
        self._responder = _PlainResponder(keys, identity, random_bytes=self._random_bytes)

    def connect(self, endpoint: str, name: str = "", lanes: Sequence[str] = (Lane.CONTROL,)) -> None:
        super().connect(endpoint, name, lanes)
        for connection in self._connections.values():
            if not isinstance(connection.initiator, _PlainInitiator):
                connection.initiator = _PlainInitiator(
                    self._keys, self._identity, expected_peer=name or None, random_bytes=self._random_bytes
                )
