"""The table of members."""

from __future__ import annotations

import pytest

from coordlib.errors import ConditionFailed
from coordlib.machine import MembersChanged, commands
from tests.machine.driver import Driver

DISK = bytes(range(16))


def test_members_are_those_of_the_beginning() -> None:
    """Sorted, with the disks that are known."""
    expected = [("a", "tcp://a:1", b""), ("b", "tcp://b:1", b"")]
    driver = Driver()
    assert expected == driver.machine.members()
    assert [[list(item) for item in expected]] == driver.ask(commands.query_members())


def test_a_disk_is_recorded_once() -> None:
    """The same one again changes nothing; another one is refused."""
    driver = Driver()
    assert [MembersChanged()] == driver.effects(0, commands.record_disk("a", DISK))
    applied = driver.apply(0, commands.record_disk("a", DISK))
    assert (commands.decode_reply(applied.reply), applied.effects) == ([False], ())
    with pytest.raises(ConditionFailed) as caught:
        driver.run(0, commands.record_disk("a", bytes(16)))
    assert caught.value.known == DISK
    assert driver.machine.members()[0] == ("a", "tcp://a:1", DISK)


def test_a_stranger_has_no_disk() -> None:
    """Only members are recorded."""
    with pytest.raises(ConditionFailed):
        Driver().run(0, commands.record_disk("z", DISK))
