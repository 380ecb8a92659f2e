"""Ids as text: fixed width, so that texts sort as the numbers do, and one text for each id.

=========  ======  =====================================  ==============================================
form       length  alphabet, in the order of ASCII        for
=========  ======  =====================================  ==============================================
base32     13      0-9 A-Z without I, L, O, U (Crockford)  people: reads aloud, any case of file system
base62     11      0-9 A-Z a-z                            addresses; needs an order that knows case
hex        16      0-9 a-f                                machines
=========  ======  =====================================  ==============================================

Parsers take what the other direction makes and nothing else: lower case where it makes upper case, Crockford's
i, l and o, a missing zero or a blank would be a second text for one id, and two texts that are one id are two
keys in a table, a cache or a signature. Normalise what people type (`text.strip().upper()`) before parsing it.
"""

from __future__ import annotations

from typing import Final

from coordlib.errors import UsageError

__all__ = ["from_base32", "from_base62", "from_hex", "to_base32", "to_base62", "to_hex"]

_ID_MAX: Final = (1 << 63) - 1


class _Form:
    """One way of writing numbers, with digits in ascending order."""

    def __init__(self, name: str, digits: str, width: int) -> None:
        self.name = name
        self.digits = digits
        self.width = width
        self.values = {digit: value for value, digit in enumerate(digits)}

    def write(self, number: int) -> str:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _ID_MAX:
            raise UsageError(f"an id is an int from 0 to 2**63 - 1; got {number!r}")
        base, text = len(self.digits), []
        for _ in range(self.width):
            number, digit = divmod(number, base)
            text.append(self.digits[digit])
        return "".join(reversed(text))

    def read(self, text: str) -> int:
        if not isinstance(text, str):
            raise UsageError(f"{self.name} of an id is a str; got {text!r}")
        if len(text) != self.width:
            raise UsageError(
                f"{self.name} of an id has {self.width} characters; got {len(text)}: {text[:80]!r}"
            )
        base, number = len(self.digits), 0
        for place, digit in enumerate(text):
            value = self.values.get(digit)
            if value is None:
                raise UsageError(
                    f"{text!r} is no {self.name} of an id: {digit!r} at place {place + 1} is not one of {self.digits}"
                )
            number = number * base + value
        if number > _ID_MAX:
            raise UsageError(
                f"{text!r} is no {self.name} of an id: it is {number}, and the largest id is 2**63 - 1, "
                f"{self.write(_ID_MAX)!r}"
            )
        return number


_BASE32: Final = _Form("base32", "0123456789ABCDEFGHJKMNPQRSTVWXYZ", 13)
_BASE62: Final = _Form("base62", "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", 11)
_HEX: Final = _Form("hex", "0123456789abcdef", 16)


def to_base32(number: int) -> str:
    """
    An id in 13 characters of Crockford's base32, upper case.

    Raises:
        UsageError: `number` is not an int from 0 to 2**63 - 1.

    Source: https://www.crockford.com/base32.html, without its check symbol.
    """
    return _BASE32.write(number)


def from_base32(text: str) -> int:
    """
    The id that `to_base32` wrote so. Crockford's lower case, aliases and hyphens are refused: see the module.

    Raises:
        UsageError: Any other text; the message says what is wrong with it.
    """
    return _BASE32.read(text)


def to_base62(number: int) -> str:
    """
    An id in 11 characters of base62: digits, upper case, lower case. Sorts by bytes, not by a locale.

    Raises:
        UsageError: `number` is not an int from 0 to 2**63 - 1.
    """
    return _BASE62.write(number)


def from_base62(text: str) -> int:
    """
    The id that `to_base62` wrote so.

    Raises:
        UsageError: Any other text; the message says what is wrong with it.
    """
    return _BASE62.read(text)


def to_hex(number: int) -> str:
    """
    An id in 16 hexadecimal digits, lower case.

    Raises:
        UsageError: `number` is not an int from 0 to 2**63 - 1.
    """
    return _HEX.write(number)


def from_hex(text: str) -> int:
    """
    The id that `to_hex` wrote so.

    Raises:
        UsageError: Any other text; the message says what is wrong with it.
    """
    return _HEX.read(text)
