"""The demo itself: start three applications, kill the leader's, bring it back, and prove what was promised.

The figures come from the applications' own records, not from coordlib's counters; the members' roles and
indexes, which are only shown, come from the members.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

from coordlib.cli.demo import records
from coordlib.cli.demo.placing import SERVICES, Placing
from coordlib.cli.demo.processes import Application, free_endpoints, program_path
from coordlib.cli.demo.stores import Store, open_store
from coordlib.cli.demo.view import View
from coordlib.config import ClientSettings
from coordlib.errors import StartError
from coordlib.node.driver import ClientDriver
from coordlib.wire.keys import generate_secret

__all__ = ["run"]

NAMES: Final = ["orders-1", "orders-2", "orders-3"]
CLUSTER: Final = "demo"
SESSION_TTL_SECONDS: Final = 3.0
START_SECONDS: Final = 20.0
RECOVER_SECONDS: Final = 15.0
LEAVE_SECONDS: Final = 6.0
READ_SECONDS: Final = 20.0
REFRESH_SECONDS: Final = 0.2
STARTS_MAX: Final = 3
FINDINGS_SHOWN_MAX: Final = 5


class _Terminated(KeyboardInterrupt):
    """A signal other than Ctrl-C asked for the end; the same clean-up."""


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated


def run(*, seconds: float, is_plain: bool, sabotage: str, database: str = "") -> int:
    """
    Play the demo; 0 if every proof holds, 1 if one fails.

    Args:
        seconds: For the work in all; starting, recovering and proving come on top.
        database: What the services of the orders keep theirs in: one of `stores.KINDS`, or "" for a journal.

    Raises:
        ServerMissing: That database is not installed here.
        CoordError: It could not be played at all.
    """
    program_path()
    view = View(NAMES, is_plain=is_plain)
    previous = {number: signal.signal(number, _terminate) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with _Stage(view, sabotage, database) as stage:
            stage.open()
            return stage.play(seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Stage:
    """The directory, the applications and the observer; leaves nothing of them behind."""

    def __init__(self, view: View, sabotage: str, database: str) -> None:
        self._view = view
        self._sabotage = sabotage
        self._database = database
        self._stores: dict[str, Store] = {}
        self._secret = generate_secret(os.urandom)
        self._endpoints: dict[str, str] = {}
        self._applications: dict[str, Application] = {}
        self._observer: ClientDriver | None = None
        self._directory = Path()
        self._tails: dict[Path, tuple[int, int]] = {}
        self._rate_at = (time.monotonic(), 0, 0)
        self._rates = (0.0, 0.0)
        self._last_index = 0  # of the leader's log, when it was last asked for

    def __enter__(self) -> _Stage:
        self._directory = Path(tempfile.mkdtemp(prefix="coordlib-demo-"))
        self._journal = os.open(self._directory / "locks.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C must not leave processes behind; this takes a few seconds at most.
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        try:
            self._end_applications()
            for store in self._stores.values():
                store.close()
        finally:
            os.close(self._journal)
            shutil.rmtree(self._directory, ignore_errors=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _end_applications(self, timeout_seconds: float = 3.0) -> list[str]:
        """All at once; returns the names of those that did not leave by themselves."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop(0)
        applications, self._applications = self._applications, {}
        for application in applications.values():
            application.end_input()
        deadline = time.monotonic() + timeout_seconds
        return [
            name
            for name, application in applications.items()
            if not application.close(max(0.0, deadline - time.monotonic()))
        ]

    # -- opening -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start all three; once more with other ports, if somebody took one in between."""
        view = self._view
        if self._sabotage:
            view.event(f"SABOTAGE ({self._sabotage}): the proofs at the end must fail", is_bad=True)
        # First: what is not installed is found out at once.
        for name in SERVICES:
            store = self._stores[name] = open_store(self._database, self._directory / "placing" / name)
            if store.server is not None:
                view.event(
                    f"the {store.words} of {name}: process {store.server.pid} in {store.server.directory}"
                )
        for attempt in range(1, STARTS_MAX + 1):
            self._endpoints = free_endpoints(NAMES)
            begun = time.monotonic()
            try:
                for name in NAMES:
                    self._launch(name)
                for name in NAMES:
                    self._applications[name].expect("open", START_SECONDS)
            except StartError as error:
                if attempt == STARTS_MAX or "is taken" not in str(error):
                    raise
                self._end_applications()
                for name in NAMES:
                    shutil.rmtree(self._directory / name, ignore_errors=True)
                continue
            view.event(
                f"three applications with a member each are open after {time.monotonic() - begun:.2f} s "
                "(encrypted, authenticated, durable)",
                is_good=True,
            )
            break
        settings = ClientSettings(
            cluster=CLUSTER,
            endpoints=tuple(self._endpoints.values()),
            secrets=(self._secret,),
            name="demo-observer",
        )
        observer = ClientDriver(settings, wants_session=False)
        observer.start()
        self._observer = observer

    def _launch(self, name: str) -> Application:
        environment = {
            "COORDLIB_CLUSTER": CLUSTER,
            "COORDLIB_NODE": name,
            "COORDLIB_MEMBERS": ",".join(f"{node}={endpoint}" for node, endpoint in self._endpoints.items()),
            "COORDLIB_SECRET": self._secret,
            "COORDLIB_DATA_DIR": str(self._directory / name),
            "COORDLIB_SESSION_TTL": str(SESSION_TTL_SECONDS),
            "COORDLIB_START_TIMEOUT": str(START_SECONDS),
            "ORDERS_RECORDS": str(self._directory),
        }
        if self._sabotage and name == NAMES[-1]:
            environment["ORDERS_SABOTAGE"] = self._sabotage
        application = Application(name, environment, self._directory / f"{name}.log")
        self._applications[name] = application
        self._view.event(f"{name}: process {application.pid} at {self._endpoints[name]}")
        return application

    # -- watching ------------------------------------------------------------------------------------------

    def _statuses(self) -> dict[str, dict[str, Any]]:
        assert self._observer is not None
        return self._observer.ask_status(0.5)

    def _count_lines(self, path: Path, word: bytes = b"") -> int:
        """How many lines (that begin with `word`) the file has by now; reads only what is new."""
        offset, count = self._tails.get(path, (0, 0))
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return 0
        data = data[: data.rfind(b"\n") + 1]
        count += (b"\n" + data).count(b"\n" + word) - (0 if word else 1)
        self._tails[path] = (offset + len(data), count)
        return count

    def _counts(self) -> str:
        locks = self._count_lines(self._directory / "locks.log", b"enter")
        acks = sum(self._count_lines(path) for path in self._directory.glob("acks-*.log"))
        then, locks_then, acks_then = self._rate_at
        now = time.monotonic()
        if now - then >= 0.9:
            self._rates = ((locks - locks_then) / (now - then), (acks - acks_then) / (now - then))
            self._rate_at = (now, locks, acks)
        return (
            f"locks handed out {locks:,} ({self._rates[0]:.0f}/s), "
            f"acknowledged writes {acks:,} ({self._rates[1]:.0f}/s)"
        )

    def _show(self) -> dict[str, dict[str, Any]]:
        statuses = self._statuses()
        self._view.status(statuses, self._counts())
        for name, application in self._applications.items():
            if application.has_ended:
                raise StartError(f"{name} has ended by itself:{application.log_end()}")
        return statuses

    def _watch(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._show()
            time.sleep(min(REFRESH_SECONDS, max(0.0, left)))

    def _leader(self) -> str:
        deadline = time.monotonic() + RECOVER_SECONDS
        while time.monotonic() < deadline:
            statuses = self._statuses()
            leaders = [(s["term"], name) for name, s in statuses.items() if s.get("role") == "leader"]
            if leaders:
                leader = max(leaders)[1]
                self._last_index = statuses[leader]["last_index"]
                return leader
            time.sleep(0.05)
        raise StartError(f"no leader within {RECOVER_SECONDS:g} s")

    def _acknowledged(self) -> records.Acknowledged:
        files = {}
        for path in sorted(self._directory.glob("acks-*.log")):
            with open(path, encoding="utf-8") as file:
                files[path.name] = file.readlines()
        return records.parse_acknowledged(files)

    # -- the play ------------------------------------------------------------------------------------------

    def play(self, seconds: float) -> int:
        view = self._view
        self._watch(seconds / 3)
        victim = self._leader()
        died_at = self._last_index
        application = self._applications.pop(victim)
        killed_ns = time.monotonic_ns()
        application.kill()
        # Only now, that it is dead for certain, may nobody of it be inside any more.
        os.write(self._journal, f"killed {time.monotonic_ns()} {application.pid}\n".encode())
        view.event(f"kill -9 {application.pid}: {victim}, the leader, is dead", is_bad=True)
        gap_ms = self._await_writes(killed_ns)
        leader = self._leader()
        view.event(
            f"{leader} leads: {gap_ms:.0f} ms passed without an acknowledged write, then they went on",
            is_good=True,
        )
        self._watch(max(seconds / 3, SESSION_TTL_SECONDS / 2))
        self._restart(victim, died_at)
        self._watch(seconds / 3)
        return self._prove(gap_ms)

    def _await_writes(self, killed_ns: int) -> float:
        """The longest stretch around the kill without any acknowledged write, in ms."""
        before = sum(self._count_lines(path) for path in self._directory.glob("acks-*.log"))
        deadline = time.monotonic() + RECOVER_SECONDS
        while time.monotonic() < deadline:
            self._show()
            # Answers that were on their way when the leader died come first; a stream means that writes go on.
            after_ns = [t for t in self._acknowledged().times_ns if t > killed_ns]
            now_ns = time.monotonic_ns()
            if (
                len(after_ns) > 20
                and now_ns - killed_ns > 500_000_000
                and now_ns - after_ns[-1] < 200_000_000
            ):
                times_ns = self._acknowledged().times_ns
                start_ns = max((t for t in times_ns if t <= killed_ns), default=killed_ns)
                return records.longest_gap_ns(times_ns, start_ns, times_ns[-1]) / 1e6
            time.sleep(0.05)
        raise StartError(
            f"no acknowledged write within {RECOVER_SECONDS:g} s after the leader's death ({before} before)"
        )

    def _restart(self, victim: str, died_at: int) -> None:
        view = self._view
        newest = max((s.get("commit_index", 0) for s in self._statuses().values()), default=0)
        begun = time.monotonic()
        application = self._launch(victim)
        deadline = begun + RECOVER_SECONDS
        while time.monotonic() < deadline:
            if self._show().get(victim, {}).get("applied_index", -1) >= newest:
                break
            time.sleep(0.02)
        else:
            raise StartError(
                f"{victim} did not catch up within {RECOVER_SECONDS:g} s:{application.log_end()}"
            )
        application.expect("open", START_SECONDS)
        view.event(
            f"{victim} is back from its own disk, which ends near index {died_at:,}, and had caught up with index "
            f"{newest:,} {time.monotonic() - begun:.2f} s after its process was started",
            is_good=True,
        )

    def _prove(self, gap_ms: float) -> int:
        view = self._view
        for application in self._applications.values():
            application.tell("stop")
        for application in self._applications.values():
            application.expect("stopped", READ_SECONDS)
        acknowledged = self._acknowledged()
        with open(self._directory / "locks.log", encoding="utf-8") as file:
            exclusion = records.prove_exclusion(file)
        self._await_convergence()
        writes, counters = self._read_members(acknowledged, exclusion)
        self._show()
        view.event("work has stopped; the proofs follow, from records made outside of coordlib")
        # Unless something else is broken on purpose.
        orders = self._place_orders() if self._sabotage in ("", "order") else []
        left_over = self._end_applications(LEAVE_SECONDS)

        findings = [
            (
                "no lock had two holders at once",
                f"{exclusion.entered:,} stays, one after the other, with rising tokens",
                exclusion.violations,
            ),
            (
                "no update under a lock was lost",
                f"{sum(exclusion.done.values()):,} acknowledged, all counted",
                records.prove_counters(exclusion, counters),
            ),
            (
                "every acknowledged write is on all three members",
                f"{len(acknowledged.values):,} writes",
                acknowledged.violations + records.prove_writes(acknowledged.values, writes),
            ),
            (
                "all applications left in good order",
                f"{len(NAMES)} processes",
                [f"{name} had to be killed" for name in left_over],
            ),
        ]
        findings[-1:-1] = orders
        view.line()
        view.line(f"longest gap without an acknowledged write after kill -9 of the leader: {gap_ms:.0f} ms")
        if exclusion.handed_on_ns:
            waits = [wait / 1e9 for _, wait in exclusion.handed_on_ns]
            view.line(
                f"locks that died with their holder: {len(waits)}, handed on after {statistics.median(waits):.1f} s "
                f"(session TTL {SESSION_TTL_SECONDS:g} s)"
            )
        for claim, figures, violations in findings:
            if not violations:
                view.line(f"proved: {claim} ({figures})")
                continue
            view.line(f"FAILED: {claim}: {len(violations):,} findings")
            for violation in violations[:FINDINGS_SHOWN_MAX]:
                view.line(f"    {violation}")
            if len(violations) > FINDINGS_SHOWN_MAX:
                view.line(f"    ... and {len(violations) - FINDINGS_SHOWN_MAX:,} more")
        return 1 if any(violations for _, _, violations in findings) else 0

    def _place_orders(self) -> list[tuple[str, str, list[str]]]:
        """The scenes of transactions, in the same cluster; returns what they prove: claims, figures, what was not so."""
        environment = {
            "COORDLIB_CLUSTER": CLUSTER,
            "COORDLIB_ENDPOINTS": ",".join(self._endpoints.values()),
            "COORDLIB_SECRET": self._secret,
            "COORDLIB_SESSION_TTL": str(SESSION_TTL_SECONDS),
        }
        if self._sabotage:
            environment["ORDERS_SABOTAGE"] = self._sabotage
        directory = self._directory / "placing"
        directory.mkdir()
        with Placing(self._view, environment, directory, self._stores, self._read_orders) as placing:
            placing.open()
            databases = ", and their databases" if self._database else ""
            return [
                (
                    "no order over two services is half done",
                    f"the desk killed before the decision, all killed after it{databases}",
                    placing.play_before_the_decision() + placing.play_after_the_decision(),
                ),
                (
                    "no order that SQLite decides is half done",
                    "its process killed with the decision, and none",
                    placing.play_last_resource(),
                ),
            ]

    def _read_orders(self, orders: list[str]) -> dict[str, str]:
        """What the map "orders" has under these keys, as the leader has applied it."""
        names, found = self._directory / "orders.txt", self._directory / "orders.found"
        names.write_text("".join(f"orders {order}\n" for order in orders), "utf-8")
        application = self._applications[self._leader()]
        application.tell(f"read {names} {found}")
        application.expect("read", READ_SECONDS)
        lines = found.read_text("utf-8").splitlines()
        return {key: value for _, key, value in (line.split() for line in lines)}

    def _await_convergence(self) -> None:
        """Until all three have applied the same; what is missing after that time is missing."""
        deadline = time.monotonic() + RECOVER_SECONDS
        while time.monotonic() < deadline:
            statuses = self._show()
            indexes = {s.get("applied_index") for s in statuses.values()}
            indexes |= {s.get("commit_index") for s in statuses.values()}
            if len(statuses) == len(NAMES) and len(indexes) == 1:
                return
            time.sleep(0.05)

    def _read_members(
        self, acknowledged: records.Acknowledged, exclusion: records.Exclusion
    ) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
        """What each member itself has applied: (orders, counters), by member."""
        names_path = self._directory / "keys.txt"
        locks = sorted({*exclusion.done, *exclusion.unknown})
        with open(names_path, "w", encoding="utf-8") as names:
            names.writelines(f"orders {key}\n" for key in acknowledged.values)
            names.writelines(f"sold {lock}\n" for lock in locks)
        for name, application in self._applications.items():
            application.tell(f"read {names_path} {self._directory / name}.found")
        found: dict[str, dict[str, dict[str, str]]] = {"orders": {}, "sold": {}}
        for name, application in self._applications.items():
            application.expect("read", READ_SECONDS)
            for of_map in found.values():
                of_map[name] = {}
            with open(self._directory / f"{name}.found", encoding="utf-8") as file:
                for line in file:
                    map_name, key, value = line.split()
                    found[map_name][name][key] = value
        return found["orders"], found["sold"]
