"""Applications in the simulated cluster: what runs there as ever, what is refused, and that a seed repeats it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import queue
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coordlib
from coordlib.testing import FAULT_KINDS, NotSimulated, Simulation, SimulationFailed, simulate

ROOT = Path(__file__).resolve().parent.parent.parent
Log = list[Any]


def finished(simulation: Simulation) -> bool:
    return all(application.is_done for application in simulation.applications.values())


def run_one(main: Callable[..., Any], *arguments: Any, seconds: float = 60, **options: Any) -> Any:
    """What the application returned, alone on the only member."""
    options.setdefault("members", 1)
    with Simulation(1, **options) as sim:
        application = sim.start("n1", main, *arguments)
        sim.run_until(lambda: application.is_done, seconds=seconds)
    return application.result


# -- a seed repeats a run --------------------------------------------------------------------------------------


def count_in_threads(cluster: coordlib.Cluster, name: str, log: Log) -> None:
    numbers = cluster.map("numbers")
    for _ in range(5):
        with cluster.lock("door", timeout=30) as grant:
            number = numbers.get("n", 0)
            time.sleep(random.random() / 50)
            numbers.put("n", number + 1, guard=grant)
            log.append((name, number, time.monotonic(), time.time(), uuid.uuid4().hex))


async def count_in_tasks(cluster: coordlib.AsyncCluster, name: str, log: Log) -> None:
    numbers = cluster.map("numbers")

    async def once(task: int) -> None:
        async with cluster.lock("door", timeout=30) as grant:
            number = await numbers.get("n", 0)
            await asyncio.sleep(random.random() / 50)
            await numbers.put("n", number + 1, guard=grant)
            log.append((name, task, number, time.monotonic()))

    async with asyncio.TaskGroup() as group:
        for task in range(5):
            group.create_task(once(task))


def mixed_run(seed: int) -> tuple[Log, str]:
    log: Log = []
    with Simulation(seed) as sim:
        sim.start("n1", count_in_threads, "n1", log)
        sim.start("n2", count_in_tasks, "n2", log)
        sim.start("worker", count_in_threads, "worker", log)
        sim.run_until(lambda: finished(sim), seconds=60)
        digest = sim.digest()
    return log, digest


def test_threads_and_tasks_on_members_and_clients_share_locks_and_maps() -> None:
    """Fifteen increments under one lock make fifteen."""
    log, _ = mixed_run(3)
    assert sorted(entry[2] if entry[0] == "n2" else entry[1] for entry in log) == list(range(15))


def test_a_seed_repeats_a_run_to_the_last_turn_and_another_one_differs() -> None:
    """Order, times and the application's own chance are the seed's."""
    first, second, other = mixed_run(5), mixed_run(5), mixed_run(6)
    assert first == second
    assert first[1] != other[1]


def test_a_run_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    """Sets of tasks and futures are in the order of their making."""
    program = (
        "import importlib.util as u, sys\n"
        f"s = u.spec_from_file_location('application', {str(Path(__file__))!r})\n"
        "m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "print(m.mixed_run(9)[1])"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'transports'}",
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert digests == {mixed_run(9)[1] + "\n"}


def slowly(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


# -- what runs as ever -----------------------------------------------------------------------------------------


def test_blocking_code_waits_in_simulated_time() -> None:
    """Events, conditions, queues, timers and pools are the standard library's, an hour costs nothing."""

    def main(cluster: coordlib.Cluster) -> Log:
        log: Log = []
        began, wall = time.monotonic(), time.time()
        time.sleep(3600)
        log.append(3600 <= time.monotonic() - began < 3600.1)
        log.append(abs(time.time() - wall - 3600) < 60)
        event = threading.Event()
        threading.Timer(5, event.set).start()
        log.append((event.wait(2), event.wait(60)))
        jobs: queue.Queue[int] = queue.Queue(maxsize=1)

        def produce() -> None:
            for number in range(3):
                jobs.put(number)

        producer = threading.Thread(target=produce)
        producer.start()
        log.append([jobs.get(timeout=10) for _ in range(3)])
        producer.join()
        log.append(producer.is_alive())
        with pytest.raises(queue.Empty):
            jobs.get(timeout=1)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            log.append(list(pool.map(slowly, [3, 1, 2])))
        barrier = threading.Barrier(2)
        other = threading.Thread(target=barrier.wait)
        other.start()
        barrier.wait()
        other.join()
        condition = threading.Condition()
        with condition:
            log.append(condition.wait(0.5))
        return log

    began = time.monotonic()
    assert run_one(main, seconds=4000) == [True, True, (False, True), [0, 1, 2], False, [3, 1, 2], False]
    assert time.monotonic() - began < 30


def test_async_code_waits_in_simulated_time() -> None:
    """Timeouts, task groups, threads beside the loop: asyncio's own."""

    async def main(cluster: coordlib.AsyncCluster) -> Log:
        loop = asyncio.get_running_loop()
        log: Log = []
        began = loop.time()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 100)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await asyncio.sleep(1000)
        log.append(200 <= loop.time() - began < 201)
        log.append(await asyncio.gather(*(asyncio.sleep(3 - n, n) for n in range(3))))
        log.append(await asyncio.to_thread(slowly, 10))
        jobs: asyncio.Queue[str] = asyncio.Queue()
        loop.call_later(1, jobs.put_nowait, "later")
        log.append(await jobs.get())
        flags: Log = []
        loop.call_later(1, flags.append, True)
        while not flags:
            await asyncio.sleep(0)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            log.append(await loop.run_in_executor(pool, lambda: "pool"))
        return log

    assert run_one(main, seconds=400) == [True, [0, 1, 2], 10, "later", "pool"]


def test_a_blocking_application_may_have_event_loops_of_its_own() -> None:
    """`asyncio.run` makes a simulated loop."""

    def main(cluster: coordlib.Cluster) -> str:
        return asyncio.run(asyncio.sleep(50, "slept"))

    assert run_one(main) == "slept"


def test_decorated_functions_and_stats_work_in_both_flavours() -> None:
    def main(cluster: coordlib.Cluster) -> Any:
        @cluster.locked("job")
        def job() -> str:
            return str(cluster.stats()["role"])

        return job(), cluster.lock("job").locked()

    async def amain(cluster: coordlib.AsyncCluster) -> Any:
        @cluster.locked("job")
        async def job() -> str:
            return str((await cluster.stats())["role"])

        return await job(), await cluster.lock("job").locked()

    assert run_one(main) == run_one(amain) == ("leader", False)


def test_an_application_can_close_its_cluster_and_go_on() -> None:
    """Its locks are free for others at once; calls after it are refused as in production."""
    log: Log = []

    def main(cluster: coordlib.Cluster) -> None:
        cluster.lock("door").acquire()
        cluster.close()
        with pytest.raises(coordlib.ClusterClosed):
            cluster.map("m").get("k")
        time.sleep(20)
        log.append("went on")

    async def amain(cluster: coordlib.AsyncCluster) -> None:
        async with cluster:
            await cluster.lock("door").acquire(timeout=5)

    with Simulation(2) as sim:
        first, second = sim.start("worker", main), sim.start("n2", amain)
        sim.run_until(lambda: second.is_done, seconds=15)
        assert not sim.is_up("n2")
        sim.run_until(lambda: first.is_done, seconds=60)
    assert log == ["went on"]


# -- faults ----------------------------------------------------------------------------------------------------


def test_a_crash_ends_an_application_where_it_stands_and_a_restart_begins_it_anew() -> None:
    """No `finally` runs at a crash; what is unwound at the end of the simulation is."""
    log: Log = []

    def main(cluster: coordlib.Cluster) -> None:
        log.append("began")
        try:
            time.sleep(20)
            log.append("slept")
        finally:
            log.append("finally")

    with Simulation(4) as sim:
        application = sim.start("n1", main)
        sim.run(10)
        sim.crash("n1")
        sim.run(40)
        assert log == ["began"]
        sim.restart("n1")
        sim.run_until(lambda: application.is_done, seconds=40)
        assert log == ["began", "began", "slept", "finally"]
        assert application.starts == 2
    assert log == ["began", "began", "slept", "finally", "finally"]


def test_tasks_of_a_crashed_process_stand_still_too() -> None:
    log: Log = []

    async def main(cluster: coordlib.AsyncCluster, name: str) -> None:
        async with cluster.lock("door") as grant:
            log.append(f"{name} holds it")
            while not grant.lost:
                await asyncio.sleep(1)
            log.append(f"{name} lost it")

    with Simulation(4, session_ttl=3) as sim:
        sim.start("n1", main, "n1")
        sim.run_until(lambda: bool(log), seconds=10)
        sim.start("n2", main, "n2")
        sim.crash("n1")
        sim.run(30)
        assert log == ["n1 holds it", "n2 holds it"]


def test_a_paused_process_runs_no_code_and_finds_its_lock_lost() -> None:
    """Its clock goes on meanwhile, so that it knows at the first look."""
    log: Log = []

    def main(cluster: coordlib.Cluster, name: str) -> None:
        with pytest.raises(coordlib.LockLost), cluster.lock("door") as grant:
            while not grant.lost:
                log.append(name)
                time.sleep(0.1)

    with Simulation(5, session_ttl=3) as sim:
        sim.start("n1", main, "n1")
        sim.run_until(lambda: bool(log), seconds=10)
        sim.start("n2", main, "n2")
        sim.pause("n1")
        count = log.count("n1")
        sim.run(20)
        assert log.count("n1") == count
        assert log[-1] == "n2"
        sim.resume("n1")
        sim.run_until(lambda: sim.applications["n1"].is_done, seconds=5)
        assert log.count("n1") == count


def test_callbacks_for_lost_locks_come_on_a_simulated_thread() -> None:
    """They may wait, and read the clock of their process."""
    log: Log = []

    def main(cluster: coordlib.Cluster) -> None:
        def tell(grant: coordlib.Grant) -> None:
            began = time.monotonic()
            time.sleep(1)
            log.append((grant.name, grant.state, round(time.monotonic() - began, 1)))

        for name in ("door", "gate", "lift"):
            cluster.lock(name, on_lost=tell).acquire()
        time.sleep(1000)

    with Simulation(6, session_ttl=2) as sim:
        sim.start("n1", main)
        sim.run(5)
        sim.isolate("n1")
        sim.run(10)
        assert log == [(name, coordlib.GrantState.LOST, 1.0) for name in ("door", "gate", "lift")]


def test_healing_ends_cuts_and_pauses_and_restarts_what_is_down() -> None:
    def main(cluster: coordlib.Cluster) -> None:
        while True:
            try:
                cluster.map("m")["k"] = 1
            except coordlib.CoordError:
                continue
            return

    with Simulation(7, request_timeout=2) as sim:
        sim.run(3)
        application = sim.start("n3", main)
        sim.cut("n1", "n2")
        sim.cut("n1", "n3", one_way=True)
        sim.pause("n2")
        sim.kill("n3")
        sim.run(10)
        assert not application.is_done
        sim.heal()
        sim.run_until(lambda: application.is_done, seconds=30)
        assert sim.is_up("n3")


def test_an_application_is_restarted_as_by_a_supervisor_when_asked_to() -> None:
    failures = iter([coordlib.NoQuorum("first"), coordlib.NoQuorum("second")])

    def main(cluster: coordlib.Cluster) -> str:
        for failure in failures:
            raise failure
        return "third"

    with Simulation(8) as sim:
        for name in ("n1", "worker"):
            application = sim.start(name, main, restart_on=(coordlib.NoQuorum,))
            sim.run_until(lambda: application.is_done, seconds=30)  # noqa: B023  # used at once
            assert application.result == "third"
        assert sim.applications["n1"].starts == 3


FAULTS = [kind for kind in FAULT_KINDS if kind not in ("wipe", "swap")]


def test_drawn_faults_repeat_too_and_nothing_is_lost_or_done_twice() -> None:
    """Crashes, cuts, pauses, disks: the increments under the lock are as many as the log says."""

    def run(seed: int) -> tuple[Log, str, int]:
        log: Log = []

        def count(cluster: coordlib.Cluster) -> None:
            numbers = cluster.map("numbers")
            while True:
                try:
                    with cluster.lock("door", timeout=5) as grant:
                        number = numbers.get("n", 0)
                        numbers.put("n", number + 1, guard=grant)
                        log.append(number)
                except coordlib.CoordError as error:
                    log.append(type(error).__name__)
                time.sleep(0.5)

        with Simulation(seed, faults=FAULTS, fault_seconds=15, session_ttl=2, request_timeout=2) as sim:
            for name in ("n1", "n2", "worker"):
                sim.start(name, count)
            sim.run(15)
            sim.heal()
            before = len(log)
            sim.run(8)
            assert len(log) > before
            assert sim.faults.total() > 0
            return log, sim.digest(), sum(application.starts for application in sim.applications.values())

    first, second = run(11), run(11)
    assert first == second
    log, _, starts = first
    numbers = [entry for entry in log if isinstance(entry, int)]
    assert numbers == sorted(set(numbers))
    assert starts > 3, "no process was restarted"


def test_the_kinds_of_faults_can_be_chosen() -> None:
    with Simulation(12, faults=["kill_leader"], fault_seconds=20) as sim:
        application = sim.start("worker", lambda cluster: time.sleep(25))
        sim.run_until(lambda: application.is_done, seconds=60)
        assert set(sim.faults) == {"kill_leader"}
    for wrong in ("some", ["kill_leader", "lightning"]):
        with pytest.raises(coordlib.ConfigError):
            Simulation(faults=wrong)


def test_a_process_that_was_crashed_by_hand_stays_down_until_it_is_brought_back() -> None:
    """Also while drawn faults end and restart others."""
    with Simulation(13, faults=["kill_leader"], fault_seconds=30) as sim:
        sim.start("worker", lambda cluster: time.sleep(1000))
        for name in ("n3", "worker"):
            sim.crash(name)
        sim.run(20)
        assert not sim.is_up("n3") and not sim.is_up("worker")
        sim.heal()
        assert sim.is_up("n3") and sim.is_up("worker")


# -- failures --------------------------------------------------------------------------------------------------


def fail_at_once(cluster: coordlib.Cluster) -> None:
    time.sleep(5)
    raise ValueError("wrong")


def fail_in_a_thread(cluster: coordlib.Cluster) -> None:
    threading.Thread(target=fail_at_once, args=(cluster,)).start()
    time.sleep(100)


async def fail_in_a_task(cluster: coordlib.AsyncCluster) -> None:
    async def fail() -> None:
        raise ValueError("wrong")

    task = asyncio.create_task(fail())
    await asyncio.sleep(100)
    del task


@pytest.mark.parametrize("main", [fail_at_once, fail_in_a_thread, fail_in_a_task])
def test_what_an_application_raises_is_reported_with_seed_and_time(main: Callable[..., Any]) -> None:
    """In its main function, in a thread of its own, in a task that nobody awaits."""
    with (
        pytest.raises(SimulationFailed, match=r"ValueError in .*n1.*: wrong") as caught,
        Simulation(77) as sim,
    ):
        sim.start("n1", main)
        sim.run(30)
    assert "seed 77, at " in str(caught.value)
    assert "Simulation(seed=77" in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_the_test_asserts_gets_a_note_with_the_seed() -> None:
    def scenario(sim: Simulation) -> None:
        sim.run(1)
        assert sim.seed < 3

    with pytest.raises(AssertionError) as caught:
        simulate(scenario, seeds=range(10), members=1)
    assert any("seed 3, at 1.000 s" in note for note in caught.value.__notes__)
    assert simulate(scenario, seeds=range(3), members=1).seeds == 3


def test_a_condition_that_does_not_come_true_fails() -> None:
    with (
        pytest.raises(SimulationFailed, match="did not come true within 2 simulated seconds"),
        Simulation() as sim,
    ):
        sim.run_until(lambda: False, seconds=2)


def test_code_that_does_not_give_way_is_an_error_and_no_hang() -> None:
    """The message shows where it stands."""
    foreign = threading.Lock()
    foreign.acquire()

    def main(cluster: coordlib.Cluster) -> None:
        foreign.acquire()  # made outside

    try:
        with pytest.raises(SimulationFailed, match=r"did not give way within 0\.2 real seconds") as caught:
            run_one(main, stall_seconds=0.2)
        assert "foreign.acquire()" in str(caught.value)
    finally:
        foreign.release()


def test_code_that_catches_everything_cannot_outlive_the_simulation() -> None:
    """It is left standing, and that is said."""

    def main(cluster: coordlib.Cluster) -> None:
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass

    with pytest.raises(SimulationFailed, match="could not be ended: n1/1"), Simulation(1, members=1) as sim:
        sim._scheduler.unwind_seconds = 0.2
        sim.start("n1", main)
        sim.run(5)


# -- what is refused -------------------------------------------------------------------------------------------


def test_what_would_leave_the_simulation_is_refused() -> None:
    def main(cluster: coordlib.Cluster) -> list[str]:
        refused = []
        for attempt in (
            lambda: socket.create_connection(("127.0.0.1", 9)),
            lambda: subprocess.run(["true"], check=True),
            os.fork,
            lambda: coordlib.local().start(),
        ):
            with pytest.raises(NotSimulated) as caught:
                attempt()
            refused.append(str(caught.value).split(":")[0])
        return refused

    async def amain(cluster: coordlib.AsyncCluster) -> None:
        with pytest.raises(NotSimulated, match=r"create_connection\(\) in a simulated application"):
            await asyncio.open_connection("127.0.0.1", 9)
        with pytest.raises(NotSimulated):
            await asyncio.create_subprocess_exec("true")

    refused = run_one(main)
    assert [text.split(" in a simulated")[0] for text in refused] == [
        "a socket",
        "a child process",
        "fork()",
        "a real node",
    ]
    run_one(amain)


def test_misuse_is_told() -> None:
    def run_from_within(cluster: coordlib.Cluster, sim: Simulation) -> None:
        with pytest.raises(coordlib.UsageError, match="time passes already"):
            sim.run(1)

    with pytest.raises(coordlib.UsageError, match="not entered"):
        Simulation().run(1)
    with pytest.raises(coordlib.ConfigError):
        Simulation(members=8)
    with pytest.raises(coordlib.ConfigError):
        Simulation(reads="stale")
    with pytest.raises(coordlib.UsageError, match="no seeds"):
        simulate(lambda sim: None, seeds=())
    with Simulation() as sim:
        with pytest.raises(coordlib.UsageError, match="cannot be nested"), Simulation():
            pass
        with pytest.raises(coordlib.UsageError, match="no process 'n9'"):
            sim.crash("n9")
        application = sim.start("n1", run_from_within, sim)
        sim.run_until(lambda: application.is_done, seconds=10)
        with pytest.raises(coordlib.UsageError, match="already"):
            sim.start("n1", run_from_within, sim)
        with pytest.raises(coordlib.UsageError, match="is up"):
            sim.restart("n1")
        lock = threading.Lock()
        lock.acquire()
        with pytest.raises(RuntimeError, match=r"sim\.run_until"):
            lock.acquire()


def test_locks_made_in_the_test_work_between_simulated_processes() -> None:
    """What stands for the world outside (a database) may block in simulated time."""
    log: Log = []

    def main(cluster: coordlib.Cluster, lock: threading.Lock) -> None:
        with lock:
            log.append("in")
            time.sleep(1)
            log.append("out")

    with Simulation() as sim:
        lock = threading.Lock()
        for name in ("n1", "n2"):
            sim.start(name, main, lock)
        sim.run_until(lambda: finished(sim), seconds=20)
    assert log == ["in", "out", "in", "out"]


def test_everything_is_as_before_when_a_simulation_is_left() -> None:
    """Also after a failure: functions, chance, threads."""
    functions = (
        *(
            time.sleep,
            time.time,
            time.monotonic,
            threading.Lock,
            threading.RLock,
            queue.SimpleQueue,
            os.urandom,
        ),
        *(threading.Thread.start, threading.Thread.join, socket.socket.__init__, asyncio.new_event_loop),
    )
    state, threads = random.getstate(), threading.active_count()
    with pytest.raises(SimulationFailed), Simulation() as sim:
        assert time.sleep is not functions[0]
        began = time.monotonic()  # the test's own clock is the real one
        sim.start("n1", fail_in_a_thread)
        sim.run(100)
    assert time.monotonic() - began < 30
    assert functions == (
        *(
            time.sleep,
            time.time,
            time.monotonic,
            threading.Lock,
            threading.RLock,
            queue.SimpleQueue,
            os.urandom,
        ),
        *(threading.Thread.start, threading.Thread.join, socket.socket.__init__, asyncio.new_event_loop),
    )
    assert random.getstate() == state
    assert threading.active_count() == threads
