"""The part of COSE that we use (RFC 9052): Encrypt0 with AES-GCM and Mac0 with HMAC-SHA256, untagged.

A key belongs to exactly one algorithm, so that a message can name another one but never choose it.
Functions that verify return what was authenticated or raise; none returns a bool. What is *not* here:
where keys come from (keys.py), what is authenticated beside the message, and replay (channel.py).

Two layers: `Encrypt0Seal` and `Encrypt0Opener` are one direction of a session, with everything that does
not change from message to message joined beforehand; `seal_encrypt0`, `open_encrypt0`, `make_mac0` and
`open_mac0` take any headers and are for handshakes, files and tests.

Wire: a session's message, all lengths fixed but the ciphertext's::

    83                                  array(3)
       4f a3 01 03  04 44 kid:4  06 44 partial-iv:4      protected: alg A256GCM, kid, Partial IV
       a0                               unprotected: empty
       bstr(ciphertext | tag:16)

    nonce = iv XOR (8 zero bytes | partial-iv)           RFC 9052 §3.1, Partial IV
    AAD   = 83 68 "Encrypt0" bstr(protected) bstr(external_aad)      RFC 9052 §5.3
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coordlib import cbor
from coordlib.errors import LocalProtocolError, RemoteProtocolError
from coordlib.wire.faults import MalformedFrame, ReplayedFrame, SealBroken

__all__ = [
    "COUNTER_MAX",
    "IV_SIZE",
    "KEY_SIZE",
    "SEALED_OVERHEAD_MAX",
    "AEADKey",
    "Encrypt0Opener",
    "Encrypt0Seal",
    "MACKey",
    "make_mac0",
    "open_encrypt0",
    "open_mac0",
    "peek_mac0",
    "seal_encrypt0",
    "session_kid",
]

LABEL_ALG: Final = 1
LABEL_KID: Final = 4
LABEL_IV: Final = 5

ALG_A128GCM: Final = 1
ALG_A256GCM: Final = 3
ALG_HMAC_256_256: Final = 5

KEY_SIZE: Final = 32
IV_SIZE: Final = 12
TAG_SIZE: Final = 16
KID_SIZE: Final = 4
COUNTER_MAX: Final = 2**32 - 1  # the Partial IV has four bytes
SEALED_OVERHEAD_MAX: Final = 18 + 5 + TAG_SIZE


class AEADKey:
    """A key for Encrypt0. 32 bytes make it A256GCM, the only algorithm on our wire; 16 bytes A128GCM."""

    __slots__ = ("aesgcm", "algorithm")

    def __init__(self, key: bytes) -> None:
        self.algorithm = {16: ALG_A128GCM, KEY_SIZE: ALG_A256GCM}[len(key)]
        self.aesgcm = AESGCM(key)


class MACKey:
    """A key for Mac0, HMAC 256/256, with the key schedule done once."""

    __slots__ = ("_keyed",)

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod="sha256")

    def mac(self, data: bytes) -> bytes:
        # The pre-keyed form, because the one-shot hmac.digest() lets the GIL go at every size.
        keyed = self._keyed.copy()
        keyed.update(data)
        return keyed.digest()


def _bstr(data: bytes) -> bytes:
    return _bstr_head(len(data)) + data


def _bstr_head(size: int) -> bytes:
    """Head of a CBOR byte string, in its shortest form."""
    if size < 24:
        return bytes((0x40 | size,))
    if size < 0x100:
        return bytes((0x58, size))
    if size < 0x10000:
        return b"\x59" + size.to_bytes(2, "big")
    return b"\x5a" + size.to_bytes(4, "big")


def _encode_protected(headers: Mapping[int, object]) -> bytes:
    return cbor.encode_canonical(dict(headers)) if headers else b""


def _read_headers(protected: object, unprotected: object) -> tuple[bytes, dict[Any, Any]]:
    """
    Both header maps as one, and the protected bytes as they enter what is authenticated.

    Source: RFC 9052 §3 (a label is in one of the two only; an empty map counts as a zero-length string).
    """
    if type(protected) is not bytes or type(unprotected) is not dict:
        raise MalformedFrame("COSE: headers of the wrong type")
    headers: object = cbor.decode(protected) if protected else {}
    if type(headers) is not dict:
        raise MalformedFrame("COSE: protected headers are not a map")
    if not headers:
        protected = b""
    if headers.keys() & unprotected.keys():
        raise MalformedFrame("COSE: a label is in both header maps")
    return protected, headers | unprotected


def _decode_array(data: bytes, size: int) -> list[Any]:
    try:
        parts = cbor.decode(data)
    except RemoteProtocolError as exc:
        raise MalformedFrame(f"COSE: {exc.message}") from exc
    if type(parts) is not list or len(parts) != size:
        raise MalformedFrame(f"COSE: not an array of {size}")
    return parts


def seal_encrypt0(
    key: AEADKey, iv: bytes, plaintext: bytes, external_aad: bytes = b"", *, kid: bytes | None = None
) -> bytes:
    """Seal into an untagged COSE_Encrypt0. `iv` (12 bytes) must never be used twice with one key."""
    headers: dict[int, object] = {LABEL_ALG: key.algorithm}
    if kid is not None:
        headers[LABEL_KID] = kid
    protected = _encode_protected(headers)
    aad = b"\x83\x68Encrypt0" + _bstr(protected) + _bstr(external_aad)
    return cbor.encode((protected, {LABEL_IV: iv}, key.aesgcm.encrypt(iv, plaintext, aad)))


def open_encrypt0(key: AEADKey, data: bytes, external_aad: bytes = b"") -> bytes:
    """
    The plaintext of an untagged COSE_Encrypt0 that carries its IV.

    Raises:
        MalformedFrame: Not an Encrypt0, or for another algorithm than the key's.
        SealBroken: Not sealed with this key over these headers and this external AAD.
    """
    raw_protected, unprotected, ciphertext = _decode_array(data, 3)
    protected, headers = _headers_checked(raw_protected, unprotected, key.algorithm)
    iv = headers.get(LABEL_IV)
    if type(iv) is not bytes or len(iv) != IV_SIZE or type(ciphertext) is not bytes:
        raise MalformedFrame("COSE: no IV, or no ciphertext")
    aad = b"\x83\x68Encrypt0" + _bstr(protected) + _bstr(external_aad)
    try:
        return key.aesgcm.decrypt(iv, ciphertext, aad)
    except InvalidTag as exc:
        raise SealBroken("COSE: the seal does not open") from exc


def _headers_checked(protected: object, unprotected: object, algorithm: int) -> tuple[bytes, dict[Any, Any]]:
    try:
        raw, headers = _read_headers(protected, unprotected)
    except cbor.CBORError as exc:
        raise MalformedFrame(f"COSE: protected headers: {exc.message}") from exc
    found = headers.get(LABEL_ALG)
    if type(found) is not int or found != algorithm:
        raise MalformedFrame(f"COSE: algorithm {found!r} where this key is for {algorithm}")
    return raw, headers


def make_mac0(key: MACKey, payload: bytes, external_aad: bytes = b"", *, kid: bytes | None = None) -> bytes:
    """Authenticate `payload` as an untagged COSE_Mac0."""
    headers: dict[int, object] = {LABEL_ALG: ALG_HMAC_256_256}
    if kid is not None:
        headers[LABEL_KID] = kid
    protected = _encode_protected(headers)
    return cbor.encode((protected, {}, payload, key.mac(_mac_structure(protected, external_aad, payload))))


def open_mac0(key: MACKey, data: bytes, external_aad: bytes = b"") -> bytes:
    """
    The payload of an untagged COSE_Mac0.

    Raises:
        MalformedFrame: Not a Mac0, or for another algorithm.
        SealBroken: Not made with this key over these headers and this external AAD.
    """
    raw_protected, unprotected, payload, tag = _decode_array(data, 4)
    protected, _ = _headers_checked(raw_protected, unprotected, ALG_HMAC_256_256)
    if type(payload) is not bytes or type(tag) is not bytes:
        raise MalformedFrame("COSE: no payload, or no tag")
    if not hmac.compare_digest(tag, key.mac(_mac_structure(protected, external_aad, payload))):
        raise SealBroken("COSE: the authentication tag does not match")
    return payload


def peek_mac0(data: bytes) -> tuple[bytes | None, bytes]:
    """
    (kid, payload) of a Mac0 that is *not* authenticated: to choose a key and to explain refusals.

    Raises:
        MalformedFrame: Not a Mac0.
    """
    raw_protected, unprotected, payload, _ = _decode_array(data, 4)
    _, headers = _headers_checked(raw_protected, unprotected, ALG_HMAC_256_256)
    kid = headers.get(LABEL_KID)
    if type(payload) is not bytes or not (kid is None or type(kid) is bytes):
        raise MalformedFrame("COSE: no payload, or a key id of the wrong type")
    return kid, payload


def _mac_structure(protected: bytes, external_aad: bytes, payload: bytes) -> bytes:
    return b"\x84\x64MAC0" + _bstr(protected) + _bstr(external_aad) + _bstr(payload)


# Wire: see the module's docstring. Everything before the kid, between kid and Partial IV, and after.
_BEFORE_KID = b"\x83\x4f\xa3\x01\x03\x04\x44"
_AFTER_KID = b"\x06\x44"
_KID_AT = len(_BEFORE_KID)
_COUNTER_AT = _KID_AT + KID_SIZE + len(_AFTER_KID)
_BODY_AT = _COUNTER_AT + 5  # after the counter and the empty unprotected map
_STRUCTURE_HEAD = b"\x83\x68Encrypt0"


def session_kid(frame: bytes, offset: int) -> bytes:
    """
    The key id of a session's message that begins at `offset` of `frame`.

    Raises:
        MalformedFrame: Not laid out as a session's message.
    """
    kid_at = offset + _KID_AT
    counter_at = offset + _COUNTER_AT
    if (
        frame[offset:kid_at] != _BEFORE_KID
        or frame[kid_at + KID_SIZE : counter_at] != _AFTER_KID
        or frame[counter_at + 4 : counter_at + 5] != b"\xa0"
    ):
        raise MalformedFrame("not laid out as a sealed message")
    return frame[kid_at : kid_at + KID_SIZE]


class Encrypt0Seal:
    """
    The sealing end of one direction of a session.

    Invariant: `counter` only grows, lives in memory only and belongs to one key: no nonce is used twice.
    """

    __slots__ = ("_aad_head", "_aad_tail", "_encrypt", "_iv", "_prefix", "counter", "kid")

    def __init__(
        self, key: bytes, iv: bytes, kid: bytes, external_aad: bytes, *, prefix: bytes = b""
    ) -> None:
        self.counter = 0  # of the next message
        self.kid = kid
        self._encrypt = AEADKey(key).aesgcm.encrypt
        self._iv = int.from_bytes(iv, "big")
        layout = _BEFORE_KID + kid + _AFTER_KID
        self._prefix = prefix + layout
        self._aad_head = _STRUCTURE_HEAD + layout[1:]
        self._aad_tail = _bstr(external_aad)

    def seal(self, plaintext: bytes) -> bytes:
        """
        `prefix` and the sealed message.

        Raises:
            LocalProtocolError: COUNTER_MAX is reached; sessions are re-keyed long before.
        """
        counter = self.counter
        try:
            partial_iv = counter.to_bytes(4, "big")
        except OverflowError:
            raise LocalProtocolError(f"{counter} messages sealed with one key: re-key first") from None
        self.counter = counter + 1
        body = self._encrypt(
            (self._iv ^ counter).to_bytes(12, "big"), plaintext, self._aad_head + partial_iv + self._aad_tail
        )
        return b"".join((self._prefix, partial_iv, b"\xa0", _bstr_head(len(body)), body))


class Encrypt0Opener:
    """
    The opening end of one direction of a session, with a replay window of 64 messages.

    Source: the window is that of RFC 4303 §3.4.3 (appendix A2), as in RFC 8613 §7.4.
    """

    __slots__ = ("_aad_head", "_aad_tail", "_decrypt", "_iv", "highest", "window")

    WINDOW: Final = 64

    def __init__(self, key: bytes, iv: bytes, kid: bytes, external_aad: bytes) -> None:
        self.highest = -1  # counter of the newest message opened
        self.window = 0  # bit n: counter highest - n has been opened
        self._decrypt = AEADKey(key).aesgcm.decrypt
        self._iv = int.from_bytes(iv, "big")
        self._aad_head = _STRUCTURE_HEAD + (_BEFORE_KID + kid + _AFTER_KID)[1:]
        self._aad_tail = _bstr(external_aad)

    def open(self, frame: bytes, offset: int) -> bytes:
        """
        The plaintext of the message that begins at `offset` and ends with the frame.

        `session_kid` must have been called on the frame, and have named this session.

        Raises:
            MalformedFrame: Wrong lengths; nothing has changed.
            ReplayedFrame: Opened before, or too old to tell; nothing has changed.
            SealBroken: Tampered or sealed for somebody else; nothing has changed.
        """
        counter_at = offset + _COUNTER_AT
        body_at = offset + _BODY_AT
        size = len(frame)
        # The shortest head of a byte string that reaches exactly to the end of the frame.
        head = frame[body_at] if body_at < size else 0
        if head == 0x58:
            body_at += 2
            is_exact = body_at <= size and frame[body_at - 1] == size - body_at >= 24
        elif head == 0x59:
            body_at += 3
            is_exact = int.from_bytes(frame[body_at - 2 : body_at], "big") == size - body_at >= 0x100
        elif head == 0x5A:
            body_at += 5
            is_exact = int.from_bytes(frame[body_at - 4 : body_at], "big") == size - body_at >= 0x10000
        else:
            body_at += 1
            is_exact = 0x40 + TAG_SIZE <= head < 0x58 and head - 0x40 == size - body_at
        if not is_exact:
            raise MalformedFrame("sealed message of the wrong length")
        partial_iv = frame[counter_at : counter_at + 4]
        counter = int.from_bytes(partial_iv, "big")
        ahead = counter - self.highest
        if ahead <= 0 and (ahead <= -self.WINDOW or self.window >> -ahead & 1):
            raise ReplayedFrame(f"message {counter} was received before (newest is {self.highest})")
        try:
            plaintext = self._decrypt(
                (self._iv ^ counter).to_bytes(12, "big"),
                frame[body_at:] if size < 4096 else memoryview(frame)[body_at:],
                self._aad_head + partial_iv + self._aad_tail,
            )
        except InvalidTag as exc:
            raise SealBroken("the seal does not open") from exc
        if ahead > 0:
            self.highest = counter
            self.window = (self.window << ahead | 1) & 0xFFFF_FFFF_FFFF_FFFF if ahead < self.WINDOW else 1
        else:
            self.window |= 1 << -ahead
        return plaintext
