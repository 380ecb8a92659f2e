"""CBOR as coordlib uses it (RFC 8949): what we write, and the strict reading of what others wrote.

At the bottom of the import order, because both the replicated machine and the wire need it. What is
*not* here: the schema of any message, and the codec of user values.

Refused when reading: tags (all of them), indefinite lengths, duplicate map keys, trailing bytes, text
that is not UTF-8, nesting deeper than 16. Each is something that no node of ours writes.

Left to the schema that looks at the result, because a check here would walk every value a second time:
`undefined` and other simple values (they come out as objects of cbor2's own types, which no schema
names), the kind of map keys, ranges of integers, and whether the bytes were the shortest possible.
"""

from __future__ import annotations

import functools
import io
from typing import Any, NoReturn

import cbor2

from coordlib.errors import RemoteProtocolError

__all__ = ["CBORError", "decode", "encode", "encode_canonical"]

DEPTH_MAX = 16

# Tags that cbor2 decodes itself, without asking `tag_hook`; found by scanning 0..70000, which a test repeats
# for the installed version.
_BUILTIN_TAGS = (
    *(0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100),
    *(256, 258, 260, 261, 1004, 43000, 55799),
)


class CBORError(RemoteProtocolError):
    """Bytes that no correct node writes. The input is to be dropped."""

    code = "cbor"


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("tags are not allowed")


_NO_TAGS: dict[int, Any] = dict.fromkeys(_BUILTIN_TAGS, _refuse_tag)

_make_decoder = functools.partial(
    cbor2.CBORDecoder,
    tag_hook=_refuse_tag,
    semantic_decoders=_NO_TAGS,
    max_depth=DEPTH_MAX,
    allow_indefinite=False,
    allow_duplicate_keys=False,
)

encode = cbor2.dumps
"""Encode arrays, ints, bytes, str, bool, None, float and dict. For arrays of these, deterministic."""


def encode_canonical(value: object) -> bytes:
    """Encode deterministically: map keys sorted, shortest floats (RFC 8949 §4.2.3, length first)."""
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes) -> Any:
    """
    Decode one item that fills `data` exactly.

    Raises:
        CBORError: Not a single well-formed item of the kinds we allow. Nothing else is ever raised.
    """
    stream = io.BytesIO(data)
    try:
        value = _make_decoder(stream).decode()
    except (cbor2.CBORDecodeError, ValueError, TypeError, OverflowError, UnicodeError, RecursionError) as exc:
        raise CBORError(f"malformed CBOR: {exc}") from exc
    if stream.tell() != len(data):
        raise CBORError(f"{len(data) - stream.tell()} bytes after the end of the item")
    return value
