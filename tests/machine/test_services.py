"""The registry of services: who hosts what, for as long as its session lives."""

from __future__ import annotations

import pytest

from coordlib.errors import QuotaExceeded, UsageError
from coordlib.machine import Limits, commands
from tests.machine.driver import Driver, restore, snapshot


def ready(limits: Limits | None = None) -> tuple[Driver, int, int]:
    driver = Driver(limits)
    return driver, driver.open("one"), driver.open("two")


def test_a_service_is_found_with_all_that_host_it() -> None:
    """By its name, or all of them; sorted by service and session."""
    driver, one, two = ready()
    assert driver.run(two, commands.service_register("stock", "host-2")) == [True]
    assert driver.run(one, commands.service_register("stock", "host-1")) == [True]
    driver.run(one, commands.service_register("billing", "host-1"))
    billing = ["billing", one, "one", "host-1", 1000]
    stock = [["stock", one, "one", "host-1", 1000], ["stock", two, "two", "host-2", 1000]]
    assert driver.ask(commands.query_services("stock")) == [stock, False]
    assert driver.ask(commands.query_services()) == [[billing, *stock], False]
    assert driver.ask(commands.query_services("none")) == [[], False]


def test_registering_again_changes_nothing_but_a_new_instance() -> None:
    """A host that is restarted in place says so, and counts from then."""
    driver, one, _ = ready()
    driver.run(one, commands.service_register("stock", "host-1"))
    driver.now_ms += 5
    assert driver.run(one, commands.service_register("stock", "host-1")) == [False]
    assert driver.ask(commands.query_services())[0][0][3:] == ["host-1", 1000]
    assert driver.run(one, commands.service_register("stock", "other")) == [False]
    assert driver.ask(commands.query_services())[0][0][3:] == ["other", 1005]


def test_a_registration_ends_by_itself_with_its_session() -> None:
    """Or when it is taken back, of which there is no second time."""
    driver, one, two = ready()
    for session in (one, two):
        driver.run(session, commands.service_register("stock", "host"))
        driver.run(session, commands.service_register("billing", "host"))
    assert driver.run(one, commands.service_unregister("stock")) == [True]
    assert driver.run(one, commands.service_unregister("stock")) == [False]
    assert [row[1] for row in driver.ask(commands.query_services("stock"))[0]] == [two]
    driver.run(0, commands.expire_sessions([two]))
    assert [row[:2] for row in driver.ask(commands.query_services())[0]] == [["billing", one]]
    driver.run(one, commands.close_session())
    assert driver.ask(commands.query_services()) == [[], False]
    assert driver.machine.counters["services"] == 0
    driver.machine.check_invariants()


def test_services_are_listed_page_by_page() -> None:
    """Whatever comes and goes in between, what stays is seen once."""
    driver, one, two = ready()
    for number in range(5):
        for session in (one, two):
            driver.run(session, commands.service_register(f"service-{number}", ""))
    for service in (None, "service-3"):
        seen: list[tuple[str, int]] = []
        more = True
        while more:
            page, more = driver.ask(commands.query_services(service, seen[-1] if seen else None, 3))
            seen += [(row[0], row[1]) for row in page]
        wanted = range(5) if service is None else [3]
        assert seen == [(f"service-{number}", session) for number in wanted for session in (one, two)]


@pytest.mark.parametrize("limits", [Limits(services_max=3), Limits(session_services_max=3)])
def test_registrations_are_limited_before_append_and_when_applied(limits: Limits) -> None:
    """What is registered stays, may be registered again, and may go."""
    driver, one, _ = ready(limits)
    for number in range(3):
        driver.run(one, commands.service_register(f"service-{number}", ""))
    operation = commands.service_register("another", "")
    with pytest.raises(QuotaExceeded):
        driver.machine.check(one, 99, 0, operation)
    with pytest.raises(QuotaExceeded):
        driver.run(one, operation)
    assert driver.run(one, commands.service_register("service-1", "new")) == [False]
    driver.run(one, commands.service_unregister("service-1"))
    driver.machine.check(one, 99, 0, operation)
    assert driver.run(one, operation) == [True]


def test_a_session_has_its_own_limit() -> None:
    """One that has too many does not keep others out."""
    driver, one, two = ready(Limits(session_services_max=1))
    driver.run(one, commands.service_register("stock", ""))
    assert driver.run(two, commands.service_register("stock", "")) == [True]


def test_a_service_must_have_a_name() -> None:
    """An instance need not."""
    driver, one, _ = ready()
    with pytest.raises(UsageError):
        driver.run(one, commands.service_register("", "host"))


def test_services_survive_a_snapshot_with_their_sessions() -> None:
    """And end with them there as here."""
    driver, one, two = ready()
    for session in (one, two):
        driver.run(session, commands.service_register("stück", "host"))
    copy = Driver(machine=restore(snapshot(driver.machine)))
    for each in (driver, copy):
        each.run(0, commands.expire_sessions([one]))
        each.machine.check_invariants()
        assert [row[:2] for row in each.ask(commands.query_services("stück"))[0]] == [["stück", two]]
    assert driver.machine.digest() == copy.machine.digest()
