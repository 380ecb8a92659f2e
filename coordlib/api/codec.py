"""User values as canonical bytes: the same value has the same bytes on every machine and in every version.

Compare-and-set compares bytes, so the form must be canonical: CBOR with sorted keys and shortest
numbers. Only what has one meaning everywhere is taken: None, bool, int64, finite float, str, bytes, and lists
and dicts (str keys) of these. Anything else is refused before it is sent. A user who needs more gives a
codec: two functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import cbor2

from coordlib import cbor
from coordlib.errors import QuotaExceeded, UsageError

__all__ = ["CANONICAL", "Codec", "decode_key", "encode_key", "encode_name"]

DEPTH_MAX: Final = 12
KEY_SIZE_BYTES_MAX: Final = 4096
VALUE_SIZE_BYTES_MAX: Final = 1024 * 1024
NAME_SIZE_BYTES_MAX: Final = 255


class Codec(NamedTuple):
    """How values of a map become bytes and back. Equal values must become equal bytes."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def _too_large(what: str, limit: str, size: int, maximum: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"{what} has {size} bytes, {limit} is {maximum}; nothing was sent",
        limit=limit,
        maximum=maximum,
        wanted=size,
    )


def _check(value: Any, depth: int) -> None:
    kind = type(value)
    if kind is str or kind is bytes or value is None or kind is bool:
        return
    if kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise UsageError(f"{value} does not fit into 64 bits; store it as str")
    elif kind is float:
        if not math.isfinite(value):
            raise UsageError(f"{value} is no finite number; store None or a str instead")
    elif kind is list or kind is dict:
        if depth >= DEPTH_MAX:
            raise UsageError(f"values may be nested {DEPTH_MAX} deep; this one is deeper, or contains itself")
        if kind is dict:
            for key in value:
                if type(key) is not str:
                    raise UsageError(f"keys of a dict value must be str; got {key!r}")
            for item in value.values():
                _check(item, depth + 1)
        else:
            for item in value:
                _check(item, depth + 1)
    else:
        raise UsageError(
            f"a value of type {kind.__name__} cannot be stored: use None, bool, int, float, str, bytes, list or dict, "
            "or give the map a codec"
        )


def _encode(value: Any) -> bytes:
    kind = type(value)
    if kind is dict or kind is list or kind is float:
        _check(value, 0)
        data = cbor.encode_canonical(value)
    else:
        _check(value, 0)
        # Scalars have one shortest form, which the encoder writes anyway.
        try:
            data = cbor2.dumps(value)
        except (UnicodeError, ValueError) as exc:
            raise UsageError(f"the value cannot be encoded: {exc}") from exc
    if len(data) > VALUE_SIZE_BYTES_MAX:
        raise _too_large("the value", "value_size_bytes_max", len(data), VALUE_SIZE_BYTES_MAX)
    return data


CANONICAL: Final = Codec(_encode, cbor.decode)


def encode_key(key: Any) -> bytes:
    """
    A map's key as bytes: str, bytes or int. True and 1 are one key to a dict, so bool is refused.

    Raises:
        UsageError: Of another type.
        QuotaExceeded: Longer than 4 KiB.
    """
    kind = type(key)
    if kind is not str and kind is not bytes and kind is not int:
        raise UsageError(f"a key must be str, bytes or int; got {kind.__name__}")
    if kind is int:
        _check(key, 0)
    try:
        data = cbor2.dumps(key)
    except UnicodeError as exc:
        raise UsageError(f"the key cannot be encoded: {exc}") from exc
    if len(data) > KEY_SIZE_BYTES_MAX:
        raise _too_large("the key", "key_size_bytes_max", len(data), KEY_SIZE_BYTES_MAX)
    return data


decode_key = cbor.decode


def encode_name(name: Any, what: str) -> bytes:
    """The name of a map or a lock as bytes."""
    if type(name) is not str or not name:
        raise UsageError(f"the name of a {what} must be a non-empty str; got {name!r}")
    try:
        data = name.encode()
    except UnicodeError as exc:
        raise UsageError(f"the name of a {what} cannot be encoded: {exc}") from exc
    if len(data) > NAME_SIZE_BYTES_MAX:
        raise _too_large(f"the name of a {what}", "name_size_bytes_max", len(data), NAME_SIZE_BYTES_MAX)
    return data
