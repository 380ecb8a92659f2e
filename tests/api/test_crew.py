"""Threads for what nobody waits for: as many as needed, and gone at the end."""

from __future__ import annotations

import logging
import threading

import pytest

from coordlib.api.crew import Crew
from coordlib.errors import ClusterClosed, NoQuorum


def test_work_that_hangs_holds_up_nothing_else_until_all_threads_hang() -> None:
    """Threads are started as they are needed, and not more than so many."""
    crew = Crew("crew", 2)
    let_go, first, second, third = (threading.Event() for _ in range(4))

    def hang(begun: threading.Event) -> None:
        begun.set()
        let_go.wait(30)

    crew.submit(lambda: hang(first))
    crew.submit(second.set)
    assert first.wait(30)
    assert second.wait(30)
    crew.submit(lambda: hang(threading.Event()))
    crew.submit(third.set)
    assert crew.backlog >= 3
    assert sum(thread.name == "crew" for thread in threading.enumerate()) == 2
    let_go.set()
    assert third.wait(30)
    crew.close(30)
    assert not any(thread.name == "crew" for thread in threading.enumerate())


def test_what_fails_is_logged_and_a_closed_cluster_is_none_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """The thread goes on."""

    def fail(error: Exception) -> None:
        raise error

    crew = Crew("crew", 1)
    done = threading.Event()
    with caplog.at_level(logging.WARNING, logger="coordlib"):
        crew.submit(lambda: fail(ClusterClosed("closed")))
        crew.submit(lambda: fail(NoQuorum("nobody answers")))
        crew.submit(lambda: fail(ValueError("a bug")))
        crew.submit(done.set)
        assert done.wait(30)
    crew.close(30)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]


def test_after_closing_nothing_is_begun() -> None:
    """What was not begun is dropped; closing twice is fine."""
    crew = Crew("crew", 1)
    let_go, begun, never = (threading.Event() for _ in range(3))

    def hang() -> None:
        begun.set()
        let_go.wait(30)

    crew.submit(hang)
    assert begun.wait(30)
    crew.submit(never.set)
    closing = threading.Thread(target=crew.close, args=(30,))
    closing.start()
    while not crew._is_closed:
        pass
    crew.submit(never.set)
    let_go.set()
    closing.join()
    crew.close(0)
    assert not never.is_set()
