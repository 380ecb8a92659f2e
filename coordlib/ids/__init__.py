"""Ids of 64 bits: layouts, minting, texts, and what can be read from an id; UUIDs of version 7 beside them.

A library of its own: it knows no cluster. What a cluster adds is that ids cannot repeat: `cluster.ids()` mints with
the same `Minter`, from windows of id time that only one process is ever granted. `standalone()` mints without.
"""

from __future__ import annotations

from coordlib.ids.inspecting import IdInfo, inspect
from coordlib.ids.layout import (
    COORDLIB_EPOCH_MS,
    DEFAULT,
    DISCORD,
    INSTAGRAM,
    JS53,
    LAYOUTS,
    SONYFLAKE,
    TWITTER,
    Layout,
)
from coordlib.ids.minter import IdBlock, Minter, MinterInfo, NeedsWait, NeedsWindow, local_clock_ns
from coordlib.ids.standalone import StandaloneIds, standalone
from coordlib.ids.text import from_base32, from_base62, from_hex, to_base32, to_base62, to_hex
from coordlib.ids.uuid7 import uuid7, uuid7_time

__all__ = [
    "COORDLIB_EPOCH_MS",
    "DEFAULT",
    "DISCORD",
    "INSTAGRAM",
    "JS53",
    "LAYOUTS",
    "SONYFLAKE",
    "TWITTER",
    "IdBlock",
    "IdInfo",
    "Layout",
    "Minter",
    "MinterInfo",
    "NeedsWait",
    "NeedsWindow",
    "StandaloneIds",
    "from_base32",
    "from_base62",
    "from_hex",
    "inspect",
    "local_clock_ns",
    "standalone",
    "to_base32",
    "to_base62",
    "to_hex",
    "uuid7",
    "uuid7_time",
]
