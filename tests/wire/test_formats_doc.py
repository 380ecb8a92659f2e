"""docs/formats.md says what the code does."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from coordlib.wire import channel
from coordlib.wire.channel import ChannelIdentity, Initiator, Responder
from coordlib.wire.keys import ClusterKeys
from coordlib.wire.schema import KINDS

DOC = (Path(__file__).parents[2] / "docs/formats.md").read_text()


def test_the_table_of_messages_is_the_schemas() -> None:
    """Every kind with its number and its fields in order."""
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.*?) \| .* \|$", DOC, re.MULTILINE)
    table = {name: (int(number), fields.split(": [[")[0]) for number, name, fields in rows}
    for cls, number in KINDS.items():
        assert table[cls.__name__] == (number, ", ".join(cls._fields))


def test_the_first_bytes_of_every_frame_are_as_described() -> None:
    """Magic, version, and what follows."""
    calls = itertools.count(1)

    def repeating(size: int) -> bytes:
        return bytes((next(calls),)) * size

    keys = ClusterKeys.from_secrets(["a passphrase of some length"], "shop")
    other = ClusterKeys.from_secrets(["another passphrase of some length"], "shop")
    left = Initiator(
        keys, ChannelIdentity("shop", "a", 1, True, b""), expected_peer="b", random_bytes=repeating
    )
    right = Responder(keys, ChannelIdentity("shop", "b", 2, True, b""), random_bytes=repeating)
    stranger = Responder(other, ChannelIdentity("shop", "b", 2, True, b""), random_bytes=repeating)
    hello = left.hello()
    reject = stranger.receive(b"r", hello)
    welcome = right.receive(b"r", hello)
    assert isinstance(reject, channel.RejectFrame)
    assert isinstance(welcome, channel.HelloAccepted)
    left.receive(welcome.reply_frame)
    sealed = left.seal(b"x" * 100)
    rehello = stranger.receive(b"s", sealed)
    assert isinstance(rehello, channel.RejectFrame)
    assert hello[:3].hex() == welcome.reply_frame[:3].hex() == "c10184"
    assert reject.reply_frame[:3].hex() == "c10088"
    assert rehello.reply_frame[:3].hex() == "c10082"
    kid = sealed[9:13]
    assert (
        sealed[:22].hex()
        == "c101" + "834f" + "a3010304" + "44" + kid.hex() + "0644" + "00000000" + "a0" + "5874"
    )
