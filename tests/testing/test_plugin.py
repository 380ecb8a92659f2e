"""The pytest plugin: its fixtures, its marker, and that a failure says how to repeat it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import coordlib.testing  # noqa: F401  # here, because what is imported within a run of pytester is thrown away after it

pytest_plugins = ["pytester"]

FAILING = """
    import time, pytest

    @pytest.mark.coordlib(seeds=5, members=1)
    def test_fails_for_one_seed(sim):
        def main(cluster):
            time.sleep(2)
            assert sim.seed % 5, "the seed is a multiple of five"
        application = sim.start("n1", main)
        sim.run_until(lambda: application.is_done, seconds=30)
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # Without the plugins that would be imported anew for every run, at a second each.
    return pytester.runpytest_inprocess("-p", "no:hypothesispytest", "-p", "no:cacheprovider", *arguments)


def seeds_of(result: pytest.RunResult, word: str) -> list[int]:
    return sorted(
        int(line.split("seed=")[1].split("]")[0].split("-")[0])
        for line in result.outlines
        if word in line and "seed=" in line and line.startswith("test_")
    )


def test_the_plugin_starts_and_replaces_nothing_before_a_test_asks() -> None:
    """pytest loads it at every start, in every project that has coordlib installed."""
    program = (
        "import asyncio, threading, time; "
        "seen = lambda: (time.sleep, time.monotonic, time.time, threading.Lock, threading.Thread.start, "
        "asyncio.new_event_loop, threading.active_count()); "
        "before = seen(); import coordlib.testing.plugin; print(seen() == before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_cluster_is_a_started_local_cluster(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_it(cluster):
            cluster.map("m")["k"] = 1
            assert dict(cluster.map("m")) == {"k": 1}

        def test_it_is_new_each_time(cluster):
            assert not cluster.map("m")
        """
    )
    run(pytester).assert_outcomes(passed=2)


def test_a_marker_says_how_many_seeds_and_how_the_simulation_is_made(pytester: pytest.Pytester) -> None:
    """The nearest marker has the last word; every test has first seeds of its own, the same in every run."""
    pytester.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.coordlib(members=5)

        @pytest.mark.coordlib(seeds=3)
        def test_five(sim):
            assert len(sim.members) == 5

        @pytest.mark.coordlib(members=1)
        def test_one(sim):
            assert sim.members == ("n1",)

        class TestMore:
            @pytest.mark.parametrize("word", ["a", "b"])
            @pytest.mark.coordlib(seeds=2)
            def test_pairs(self, sim, word):
                assert len(sim.members) == 5
        """
    )
    first, second = run(pytester, "-v"), run(pytester, "-v")
    first.assert_outcomes(passed=3 + 1 + 4)
    seeds = seeds_of(first, "test_five")
    assert seeds == list(range(seeds[0], seeds[0] + 3))
    assert seeds == seeds_of(second, "test_five")
    assert not set(seeds) & set(seeds_of(first, "test_pairs"))


def test_a_failure_names_the_seed_and_the_command_repeats_it(pytester: pytest.Pytester) -> None:
    """And only that one runs then."""
    pytester.makepyfile(test_orders=FAILING)
    result = run(pytester, "-v")
    result.assert_outcomes(passed=4, failed=1)
    (seed,) = seeds_of(result, "FAILED")
    result.stdout.fnmatch_lines(
        [
            "*SimulationFailed: AssertionError in n1: the seed is a multiple of five*",
            "*- coordlib -*",
            f"simulated with seed {seed}, at 2* s. Repeat it: pytest 'test_orders.py::*seed={seed}]' "
            f"--coordlib-seed={seed}",
        ]
    )
    (command,) = {
        line.split("Repeat it: pytest ")[1]
        for line in result.outlines
        if line.startswith("simulated with seed")
    }
    node, option = command.split(" ")
    again = run(pytester, node.strip("'"), option)
    again.assert_outcomes(failed=1)
    run(pytester, "--coordlib-seed=1").assert_outcomes(passed=1)


def test_what_a_test_asserts_gets_the_seed_too_and_nothing_is_left_behind(pytester: pytest.Pytester) -> None:
    """The next simulation can be entered, and the real clock is back."""
    pytester.makepyfile(
        """
        import time

        def test_fails(sim):
            sim.start("n1", lambda cluster: time.sleep(1000))
            sim.run(20)
            assert sim.seed == -1

        def test_goes_on(sim):
            sim.run(1)

        def test_has_the_real_clock():
            assert time.time.__module__ == "time"
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["simulated with seed *, at 20.000 s. Repeat it: pytest '*::test_fails' --coordlib-seed=*"]
    )


def test_a_failure_that_nobody_saw_during_the_test_is_an_error_of_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import asyncio

        def test_it(sim):
            async def main(cluster):
                async def fail():
                    raise ValueError("unseen")
                task = asyncio.create_task(fail())
                await asyncio.sleep(1000)
            sim.start("n1", main)
            sim.run(20)
        """
    )
    result = run(pytester)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*ValueError in a task of n1, which nobody awaited: unseen*"])


def test_wrong_markers_are_told(pytester: pytest.Pytester) -> None:
    for marker, told in (
        ("seeds=0", "seeds=...) is a number of at least 1"),
        ("20", "takes names only"),
    ):
        pytester.makepyfile(
            f"""
            import pytest

            @pytest.mark.coordlib({marker})
            def test_it(sim):
                pass
            """
        )
        assert told in "\n".join(run(pytester).outlines)


def test_a_project_s_own_fixtures_of_these_names_go_first(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture
        def sim():
            return "their own"
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.coordlib(seeds=3)
        def test_it(sim):
            assert sim == "their own"
        """
    )
    run(pytester).assert_outcomes(passed=1)
