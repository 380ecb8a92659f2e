"""COSE: the published examples, both ways, and the session's fixed layout against the general reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from coordlib import cbor
from coordlib.errors import AuthenticationError, LocalProtocolError, ProtocolError, RemoteProtocolError
from coordlib.wire import cose
from coordlib.wire.faults import MalformedFrame, ReplayedFrame, SealBroken

HERE = Path(__file__).parent / "vectors"
ENCRYPT0: dict[str, Any] = json.loads((HERE / "cose_encrypt0.json").read_text())
MAC0: dict[str, Any] = json.loads((HERE / "cose_mac0.json").read_text())

fuzz = settings(derandomize=True, deadline=None, max_examples=200)

KEY = bytes(range(32))
IV = bytes(range(100, 112))


def untagged(vector: dict[str, Any]) -> bytes:
    """Without the tag that names the structure: ours are always untagged. Other tags stay, to be refused."""
    data = bytes.fromhex(vector["cbor"])
    return data[1:] if data[0] in (0xD0, 0xD1) else data


def ids(vector: dict[str, Any]) -> str:
    return f"{vector['path']}: {vector['about']}"


@pytest.mark.parametrize("vector", ENCRYPT0["vectors"], ids=ids)
def test_encrypt0_examples_open_or_fail_as_published(vector: dict[str, Any]) -> None:
    """cose-wg/Examples, AES-GCM with a direct key."""
    key = cose.AEADKey(bytes.fromhex(vector["key"]))
    external = bytes.fromhex(vector["external"])
    if vector["fail"]:
        with pytest.raises((AuthenticationError, RemoteProtocolError)):
            cose.open_encrypt0(key, untagged(vector), external)
        return
    assert bytes.fromhex(ENCRYPT0["plaintext"]) == cose.open_encrypt0(key, untagged(vector), external)
    with pytest.raises(SealBroken):
        cose.open_encrypt0(key, untagged(vector), external + b"x")


@pytest.mark.parametrize("vector", MAC0["vectors"], ids=ids)
def test_mac0_examples_verify_or_fail_as_published(vector: dict[str, Any]) -> None:
    """cose-wg/Examples, HMAC 256/256 with a direct key; the 64-bit tag is refused although COSE allows it."""
    key = cose.MACKey(bytes.fromhex(vector["key"]))
    external = bytes.fromhex(vector["external"])
    if vector["fail"]:
        with pytest.raises((AuthenticationError, RemoteProtocolError)):
            cose.open_mac0(key, untagged(vector), external)
        return
    assert bytes.fromhex(MAC0["plaintext"]) == cose.open_mac0(key, untagged(vector), external)
    with pytest.raises(SealBroken):
        cose.open_mac0(key, untagged(vector), external + b"x")


@pytest.mark.parametrize(
    "path", ["aes-gcm-examples/aes-gcm-enc-01.json", "aes-gcm-examples/aes-gcm-enc-03.json"]
)
def test_what_we_seal_is_byte_for_byte_the_published_example(path: str) -> None:
    """The writer, not only the reader, is held to the examples."""
    (vector,) = [vector for vector in ENCRYPT0["vectors"] if vector["path"] == path]
    key = cose.AEADKey(bytes.fromhex(vector["key"]))
    iv = bytes.fromhex("02D1F7E6F26C43D4868D87CE")
    assert untagged(vector) == cose.seal_encrypt0(key, iv, bytes.fromhex(ENCRYPT0["plaintext"]))


def test_what_we_authenticate_is_byte_for_byte_the_published_example() -> None:
    """Mac0 likewise."""
    vector = MAC0["vectors"][0]
    key = cose.MACKey(bytes.fromhex(vector["key"]))
    assert untagged(vector) == cose.make_mac0(key, bytes.fromhex(MAC0["plaintext"]))


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((b"", {1: 3}), "two parts"),
        (("", {1: 3}, b"x" * 16), "protected headers are text"),
        ((b"", [], b"x" * 16), "unprotected headers are an array"),
        ((b"\x80", {1: 3}, b"x" * 16), "protected headers hold an array"),
        ((b"\xa1\x01", {}, b"x" * 16), "protected headers are truncated"),
        ((b"\xa1\x01\x03", {1: 3, 5: IV}, b"x" * 16), "a label in both maps"),
        ((b"\xa1\x01\x03", {}, b"x" * 16), "no IV"),
        ((b"\xa1\x01\x03", {5: b"short"}, b"x" * 16), "an IV of five bytes"),
        ((b"\xa1\x01\x03", {5: IV}, "x" * 16), "ciphertext is text"),
        ((b"\xa1\x01\x18\x18", {5: IV}, b"x" * 16), "another algorithm: ChaCha20/Poly1305"),
        ((b"\xa1\x01\xf5", {5: IV}, b"x" * 16), "algorithm is a bool"),
        ((b"\xa0", {5: IV}, b"x" * 16), "no algorithm"),
    ],
)
def test_encrypt0_of_the_wrong_form_is_malformed(parts: tuple[object, ...], why: str) -> None:
    """Refused before any cryptography."""
    with pytest.raises(MalformedFrame):
        cose.open_encrypt0(cose.AEADKey(KEY), cbor.encode(parts))
    assert why


def test_mac0_of_the_wrong_form_is_malformed() -> None:
    """Payload or tag of the wrong type; a key id that is text."""
    key = cose.MACKey(KEY)
    parts: tuple[object, ...]
    for parts in ((b"\xa1\x01\x05", {}, "text", b"t" * 32), (b"\xa1\x01\x05", {}, b"payload", None)):
        with pytest.raises(MalformedFrame):
            cose.open_mac0(key, cbor.encode(parts))
    with pytest.raises(MalformedFrame):
        cose.peek_mac0(cbor.encode((b"\xa1\x01\x05", {4: "text"}, b"payload", b"t" * 32)))
    with pytest.raises(MalformedFrame):
        cose.peek_mac0(b"\x00")


def test_mac0_names_its_key() -> None:
    """What is peeked is what is authenticated."""
    data = cose.make_mac0(cose.MACKey(KEY), b"payload", b"aad", kid=b"abcd")
    assert cose.peek_mac0(data) == (b"abcd", b"payload")
    assert cose.open_mac0(cose.MACKey(KEY), data, b"aad") == b"payload"


def pair(external: bytes = b"external") -> tuple[cose.Encrypt0Seal, cose.Encrypt0Opener]:
    return (
        cose.Encrypt0Seal(KEY, IV, b"kidk", external, prefix=b"\xc1\x01"),
        cose.Encrypt0Opener(KEY, IV, b"kidk", external),
    )


def open_frame(opener: cose.Encrypt0Opener, frame: bytes) -> bytes:
    assert cose.session_kid(frame, 2) == b"kidk"
    return opener.open(frame, 2)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 200, 239, 240, 241, 4096, 65_519, 65_520, 65_521, 300_000])
def test_sealed_messages_of_every_length_class_open(size: int) -> None:
    """Each form of the ciphertext's length, and both sides of each boundary."""
    seal, opener = pair()
    plaintext = bytes(size)
    frame = seal.seal(plaintext)
    assert len(frame) <= 2 + size + cose.SEALED_OVERHEAD_MAX
    assert plaintext == open_frame(opener, frame)


def test_a_sealed_message_is_cose_as_anybody_else_would_read_it() -> None:
    """The fixed layout is RFC 9052's Encrypt0 with a Partial IV, taken apart with the general tools."""
    seal, _ = pair()
    seal.counter = 0x01020304
    protected, unprotected, ciphertext = cbor.decode(seal.seal(b"hello")[2:])
    assert cbor.decode(protected) == {1: 3, 4: b"kidk", 6: bytes.fromhex("01020304")}
    assert unprotected == {}
    nonce = IV[:8] + bytes(a ^ b for a, b in zip(IV[8:], b"\x01\x02\x03\x04", strict=True))
    aad = cbor.encode(("Encrypt0", protected, b"external"))
    assert AESGCM(KEY).decrypt(nonce, ciphertext, aad) == b"hello"


def test_no_nonce_is_used_twice_even_at_the_end_of_the_counter() -> None:
    """The last counter seals; the next refuses."""
    seal, opener = pair()
    seal.counter = cose.COUNTER_MAX
    assert open_frame(opener, seal.seal(b"last")) == b"last"
    for _ in range(2):
        with pytest.raises(LocalProtocolError):
            seal.seal(b"one too many")


def test_a_message_opens_once() -> None:
    """Replay, at once and after others."""
    seal, opener = pair()
    frames = [seal.seal(bytes((n,))) for n in range(5)]
    for frame in frames:
        open_frame(opener, frame)
    for frame in frames:
        with pytest.raises(ReplayedFrame):
            open_frame(opener, frame)


def test_messages_open_in_any_order_within_the_window_and_not_outside_of_it() -> None:
    """63 behind the newest still opens, 64 behind does not."""
    seal, opener = pair()
    frames = [seal.seal(b"%d" % n) for n in range(200)]
    assert open_frame(opener, frames[100]) == b"100"
    assert open_frame(opener, frames[37]) == b"37"
    with pytest.raises(ReplayedFrame):
        open_frame(opener, frames[36])
    assert open_frame(opener, frames[99]) == b"99"
    assert open_frame(opener, frames[199]) == b"199"  # a leap of more than the window
    with pytest.raises(ReplayedFrame):
        open_frame(opener, frames[100])
    assert open_frame(opener, frames[136]) == b"136"


@fuzz
@given(st.lists(st.integers(0, 200), max_size=60))
def test_the_window_agrees_with_a_set_of_all_numbers_seen(order: list[int]) -> None:
    """Against a dumb alternative: a number opens if it is new and less than 64 behind the newest."""
    seal, opener = pair()
    frames = [seal.seal(b"") for _ in range(201)]
    seen: set[int] = set()
    for number in order:
        is_fresh = number not in seen and (not seen or number > max(seen) - 64)
        if is_fresh:
            open_frame(opener, frames[number])
            seen.add(number)
        else:
            with pytest.raises(ReplayedFrame):
                open_frame(opener, frames[number])


def test_a_forged_message_does_not_move_the_window() -> None:
    """Only what is authentic may push older messages out."""
    seal, opener = pair()
    first = seal.seal(b"first")
    seal.counter = 1_000_000
    forged = seal.seal(b"later")[:-1] + b"\x00"
    with pytest.raises(SealBroken):
        open_frame(opener, forged)
    assert open_frame(opener, first) == b"first"


@pytest.mark.parametrize("size", [0, 7, 8, 300, 70_000])
def test_a_message_changed_at_any_byte_does_not_open(size: int) -> None:
    """Every byte of the layout counts."""
    seal, opener = pair()
    frame = seal.seal(bytes(size))
    positions = range(2, len(frame)) if size < 1000 else [*range(2, 60), len(frame) - 1]
    for position in positions:
        changed = bytearray(frame)
        changed[position] ^= 0x01
        with pytest.raises(ProtocolError):
            if cose.session_kid(bytes(changed), 2) != b"kidk":
                raise MalformedFrame("another session")
            opener.open(bytes(changed), 2)
    assert open_frame(opener, frame) == bytes(size)


@pytest.mark.parametrize("size", [0, 8, 300])
def test_a_message_cut_or_lengthened_anywhere_does_not_open(size: int) -> None:
    """Neither a prefix nor an extension of a message is a message."""
    seal, opener = pair()
    frame = seal.seal(bytes(size))
    for end in range(len(frame)):
        with pytest.raises(ProtocolError):
            cose.session_kid(frame[:end], 2)
            opener.open(frame[:end], 2)
    with pytest.raises(MalformedFrame):
        opener.open(frame + b"\x00", 2)
    assert open_frame(opener, frame) == bytes(size)


def test_the_length_of_the_ciphertext_has_one_spelling() -> None:
    """Longer forms of the same length are refused: one message, one sequence of bytes."""
    seal, opener = pair()
    frame = seal.seal(bytes(100))
    assert frame[20:22] == b"\xa0\x58" or frame[19:21] == b"\xa0\x58"
    at = frame.index(b"\xa0\x58") + 1
    for head in (b"\x59\x00", b"\x5a\x00\x00\x00", b"\x5b" + bytes(7)):
        with pytest.raises(MalformedFrame):
            opener.open(frame[:at] + head + frame[at + 1 :], 2)
