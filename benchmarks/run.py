"""`make bench`: what coordlib costs, as ratios to what this machine's disk and sockets cost in the same run.

Three durable, secured member processes on loopback; the measuring loops run inside the application processes
(see `benchmarks.application`). Prints a table; its last line is one JSON object.

    python -m benchmarks.run [--quick] [--rounds N] [--only NAME ...] [--dir PATH] [--strict]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import minting
from benchmarks.figures import Line, Report, median, quantile, quantiles
from benchmarks.floor import Floor, measure_floor
from benchmarks.processes import Application, Fleet

__all__ = ["main"]

MIB: Final = 1024 * 1024


class Bench:
    """One run: how much to measure, the floor as far as it is known, and the report."""

    def __init__(self, directory: str, *, is_quick: bool, rounds: int) -> None:
        self.directory = directory
        self.is_quick = is_quick
        self.rounds = rounds
        self.report = Report()
        self._floors: list[Floor] = []
        self._late: list[Callable[[], None]] = []
        self._put_leader_p50 = 0.0

    def count(self, full: int, quick: int) -> int:
        return quick if self.is_quick else full

    # -- the floor -----------------------------------------------------------------------------------------

    def take_floor(self) -> None:
        self._floors.append(measure_floor(self.directory, count=self.count(1000, 300)))

    @property
    def floor_us(self) -> float:
        """The median of all that was taken in this run."""
        return median([floor.us for floor in self._floors])

    def floor(self) -> None:
        """Show the floor; measured before and after everything else."""
        disk = median([floor.disk_p50 for floor in self._floors])
        trip = median([floor.round_trip_p50 for floor in self._floors])
        ready = median([floor.preallocated_p50 for floor in self._floors])
        self.report.add(
            Line(
                "floor",
                {
                    "p50_us": round(self.floor_us, 1),
                    "disk_p50_us": round(disk, 1),
                    "disk_p99_us": round(median([floor.disk_p99 for floor in self._floors]), 1),
                    "disk_preallocated_p50_us": round(ready, 1),
                    "round_trip_p50_us": round(trip, 1),
                    "round_trip_p99_us": round(median([floor.round_trip_p99 for floor in self._floors]), 1),
                    "measured": [[round(figure, 1) for figure in floor] for floor in self._floors],
                },
                shown=f"p50 {self.floor_us:.0f} us: append {disk:.0f} (preallocated {ready:.0f}), round trip {trip:.0f}",
            )
        )

    # -- latency -------------------------------------------------------------------------------------------

    def _latency(
        self,
        name: str,
        samples: Sequence[int],
        *,
        to: float | None = None,
        at_most: float | None = None,
        **more: Any,
    ) -> None:
        figures = {**quantiles(samples), **more}
        figures["per_s"] = round(1e6 * len(samples) / sum(samples), 1) if samples else 0
        ratio = None if to is None else figures["p50_us"] / to
        if ratio is not None:
            figures["ratio"] = round(ratio, 3)
        shown = f"p50 {figures['p50_us']:.0f}  p99 {figures['p99_us']:.0f} us  {figures['per_s']:.0f}/s"
        self.report.add(Line(name, figures, shown=shown, value=ratio, at_most=at_most, unit="x"))

    def sequential(self) -> None:
        """put_leader, put_follower, put_client, lock_unlock, read_leader_idle, read_leader_loaded"""
        count = self.count(2000, 400)
        puts: dict[str, list[int]] = {"leader": [], "follower": [], "client": []}
        by_round: dict[str, list[float]] = {who: [] for who in puts}
        locks: list[int] = []
        reads: list[int] = []
        loaded: list[int] = []
        with Fleet(self.directory) as fleet:
            leader = fleet.leader()
            follower = fleet.followers(leader)[0]
            callers = {"leader": leader, "follower": follower, "client": fleet.client()}
            for caller in callers.values():
                caller.do("put", count=200)
            for turn in range(self.rounds):
                # In turns: what the machine does meanwhile is shared by all that are compared.
                for who, caller in callers.items():
                    samples = caller.do("put", count=count)["samples_us"]
                    puts[who] += samples
                    by_round[who].append(quantile(samples, 0.5))
                locks += leader.do("lock_unlock", count=count // 2, prefix=f"fresh-{turn}")["samples_us"]
                reads += leader.do("read", count=count)["samples_us"]
                follower.do("write", on=True)
                loaded += leader.do("read", count=count)["samples_us"]
                follower.do("write", on=False)
                self.take_floor()
        floor, put = self.floor_us, quantile(puts["leader"], 0.5)
        limits = {"leader": 2.6, "follower": 4.0, "client": 4.0}
        for who, samples in puts.items():
            more = {"rounds_p50_us": [round(one, 1) for one in by_round[who]]}
            self._latency(f"put_{who}", samples, to=floor, at_most=limits[who], **more)
        self._latency("lock_unlock", locks, to=put, at_most=2.0)
        self._latency("read_leader_idle", reads, to=put, at_most=0.35)
        self._latency("read_leader_loaded", loaded, to=put, at_most=0.5)

    # -- throughput ----------------------------------------------------------------------------------------

    def _throughput(self, name: str, rounds: Sequence[dict[str, Any]], at_least: float) -> None:
        per_round = [1.0 * len(one["samples_us"]) / one["seconds"] for one in rounds]
        per_s = median(per_round)
        samples = [sample for one in rounds for sample in one["samples_us"]]
        ratio = per_s * self.floor_us / 1e6
        figures: dict[str, Any] = {**quantiles(samples), "per_s": round(per_s, 1), "ratio": round(ratio, 3)}
        figures["rounds_per_s"] = [round(one) for one in per_round]
        shown = f"{per_s:.0f}/s  p50 {figures['p50_us']:.0f}  p99 {figures['p99_us']:.0f} us"
        self.report.add(Line(name, figures, shown=shown, value=ratio, at_least=at_least, unit="x"))

    def put_64_asyncio(self) -> None:
        """64 puts in flight from the leader's application, tasks of one event loop."""
        with Fleet(self.directory, face="asyncio") as fleet:
            leader = fleet.leader()
            leader.do("put_in_flight", tasks=64, count=2000)
            count = self.count(20_000, 4000)
            rounds = [leader.do("put_in_flight", tasks=64, count=count) for _ in range(self.rounds)]
            self.take_floor()
        self._throughput("put_64_asyncio", rounds, 5.0)

    def put_64_threads(self) -> None:
        """64 puts in flight from the leader's application, 64 threads that each wait."""
        with Fleet(self.directory) as fleet:
            leader = fleet.leader()
            leader.do("put_in_flight", threads=64, count=2000)
            count = self.count(20_000, 4000)
            rounds = [leader.do("put_in_flight", threads=64, count=count) for _ in range(self.rounds)]
            self.take_floor()
        self._throughput("put_64_threads", rounds, 2.5)

    # -- gaps ----------------------------------------------------------------------------------------------

    def _gap(
        self, fleet: Fleet, client: Application, leave: Callable[[Application], None]
    ) -> dict[str, float]:
        """The longest time without an acknowledged write around the leaving of the leader."""
        leader = fleet.leader()
        writers = [*fleet.followers(leader), client]
        for writer in writers:
            writer.do("write", on=True)
        # At a random moment of the heartbeat, so that the median is not that of one phase.
        sleep(0.8 + random.random() * 0.1)
        left_at = monotonic()
        leave(leader)
        sleep(2.5)
        answers = [writer.do("write", on=False) for writer in writers]
        times = sorted(time for answer in answers for time in answer["acknowledged_at"])
        fleet.restart(leader.name)
        around = [(b - a, a) for a, b in pairwise(times) if b > left_at - 0.1]
        worst = 0.0
        for answer in answers:
            own = [time for time in answer["acknowledged_at"] if time > left_at - 0.1]
            worst = max(worst, *(b - a for a, b in pairwise(own)), 0.0)
        return {
            "gap_s": max(around)[0] if around else float("inf"),
            "worst_writer_s": worst,
            "errors": sum(len(answer["errors"]) for answer in answers),
        }

    def _gaps(self, name: str, leave: Callable[[Application], None], at_most: float) -> None:
        times = self.count(5, 3)
        with Fleet(self.directory) as fleet:
            client = fleet.client()
            gaps = []
            for _ in range(times):
                gaps.append(self._gap(fleet, client, leave))
                sleep(0.5)
        seconds = [gap["gap_s"] for gap in gaps]
        figures = {
            "p50_us": round(median(seconds) * 1e6),
            "max_us": round(max(seconds) * 1e6),
            "gaps_s": [round(one, 3) for one in seconds],
            "worst_writer_s": [round(gap["worst_writer_s"], 3) for gap in gaps],
            "errors": sum(gap["errors"] for gap in gaps),
        }
        shown = f"median of {times}: {median(seconds):.3f} s, longest {max(seconds):.3f} s"
        self.report.add(Line(name, figures, shown=shown, value=median(seconds), at_most=at_most, unit="s"))

    def failover_kill9(self) -> None:
        """kill -9 of the leader's process under writes from the two others and a client."""

        def kill(leader: Application) -> None:
            leader.kill()

        self._gaps("failover_kill9", kill, 0.8)

    def stop_graceful(self) -> None:
        """close() of the leader's handle under the same writes."""

        def leave(leader: Application) -> None:
            leader.do("close")
            leader.end()

        self._gaps("stop_graceful", leave, 0.15)

    # -- footprint -----------------------------------------------------------------------------------------

    def idle_cpu(self) -> None:
        """Of a member in an application that does nothing, the busiest of three."""
        with Fleet(self.directory) as fleet:
            leader = fleet.leader()
            sleep(1)
            before = {name: member.do("process") for name, member in fleet.members.items()}
            sleep(self.count(20, 5))
            percents = {}
            for name, member in fleet.members.items():
                now = member.do("process")
                busy = now["cpu_seconds"] - before[name]["cpu_seconds"]
                percents[name] = 100 * busy / (now["now"] - before[name]["now"])
        figures = {"leader_percent": round(percents[leader.name], 2), "percents": sorted(percents.values())}
        worst = max(percents.values())
        shown = f"leader {percents[leader.name]:.2f} %, busiest {worst:.2f} % of a core"
        self.report.add(Line("idle_cpu", figures, shown=shown, value=worst, at_most=2.0, unit="%"))

    def rss(self) -> None:
        """What a member adds to a process that has imported it, after many puts on 10^4 keys; the largest of three."""
        count = self.count(1_000_000, 50_000)
        with_fleet = Fleet(self.directory)
        try:
            with_fleet.launch()
            bare = {name: member.do("process")["rss_bytes"] for name, member in with_fleet.members.items()}
            with_fleet.start()
            leader = with_fleet.leader()
            started = {name: member.do("process")["rss_bytes"] for name, member in with_fleet.members.items()}
            client = with_fleet.client("asyncio")
            began = monotonic()
            # In parts, so that the answers stay small.
            for _ in range(10):
                client.do("put_in_flight", tasks=256, count=count // 10, keys=10_000)
            seconds = monotonic() - began
            sleep(1)
            after = {name: member.do("process")["rss_bytes"] for name, member in with_fleet.members.items()}
        finally:
            with_fleet.close()
        added = {name: (after[name] - bare[name]) / MIB for name in bare}
        worst = max(added.values())
        figures = {
            "puts": count,
            "per_s": round(count / seconds, 1),
            "bare_mib": round(max(bare.values()) / MIB, 1),
            "started_mib": round(max(started.values()) / MIB, 1),
            "after_mib": round(max(after.values()) / MIB, 1),
            "leader_added_mib": round(added[leader.name], 1),
            "added_mib": [round(one, 1) for one in sorted(added.values())],
        }
        shown = f"{figures['bare_mib']} -> {figures['after_mib']} MiB after {count} puts at {count / seconds:.0f}/s"
        self.report.add(Line("rss", figures, shown=shown, value=worst, at_most=30.0, unit="MiB"))

    # -- beside CPU-bound threads --------------------------------------------------------------------------

    def _beside_burners(self, isolation: str) -> dict[str, Sequence[int]]:
        count = self.count(1000, 200)
        out: dict[str, Sequence[int]] = {}
        with Fleet(self.directory, isolation=isolation) as fleet:
            leader, client = fleet.leader(), fleet.client()
            for caller in (leader, client):
                caller.do("put", count=200)
            out["quiet"] = leader.do("put", count=count)["samples_us"]
            out["quiet_client"] = client.do("put", count=count)["samples_us"]
            for member in fleet.members.values():
                member.do("disturb", burn=True)
            out["burning"] = leader.do("put", count=count, seconds=20)["samples_us"]
            out["burning_client"] = client.do("put", count=count, seconds=20)["samples_us"]
            out["wake_up"] = leader.do("wake_up", count=200)["samples_us"]
            for member in fleet.members.values():
                member.do("disturb")
        return out

    def isolation_process(self) -> None:
        """A put beside a CPU-bound thread in every application, members in processes of their own; against quiet ones."""
        samples = self._beside_burners("process")
        quiet = quantile(samples["quiet"], 0.5)
        more = {
            "quiet_p50_us": round(quiet, 1),
            "bare_wake_up_p50_us": round(quantile(samples["wake_up"], 0.5) - 1000, 1),
        }
        self._latency("isolation_process", samples["burning"], to=quiet, at_most=1.5, **more)
        quiet = quantile(samples["quiet_client"], 0.5)
        more = {"quiet_p50_us": round(quiet, 1)}
        self._latency("isolation_process_client", samples["burning_client"], to=quiet, at_most=1.5, **more)

    def gil(self) -> None:
        """The same with the members on threads of the applications: what it costs, without a limit."""
        samples = self._beside_burners("thread")
        for suffix in ("", "_client"):
            quiet = quantile(samples[f"quiet{suffix}"], 0.5)
            more = {"quiet_p50_us": round(quiet, 1)}
            self._latency(f"gil{suffix}", samples[f"burning{suffix}"], to=quiet, **more)

    # -- transactions --------------------------------------------------------------------------------------

    def tx_map(self) -> None:
        """A transaction that only writes to a map, beside a put, from the leader's application."""
        count = self.count(2000, 400)
        samples: dict[str, list[int]] = {"put": [], "put_in_transaction": []}
        with Fleet(self.directory) as fleet:
            leader = fleet.leader()
            for way in samples:
                leader.do(way, count=200)
            for _ in range(self.rounds):
                for _ in range(4):  # in turns: what the machine does meanwhile is shared
                    for way, own in samples.items():
                        own += leader.do(way, count=count // 4)["samples_us"]
        put = quantile(samples["put"], 0.5)
        self._latency("tx_map", samples["put_in_transaction"], to=put, at_most=1.15, put_p50_us=round(put, 1))

    def tx_databases(self) -> None:
        """tx_decided, tx_applied, tx_8_threads: two PostgreSQL databases, beside the same by hand without a coordinator"""
        # Justification: only who has the drivers and the servers measures this.
        from benchmarks.transacting import create_accounts
        from coordlib.testing.databases import PostgreSQLServer, ServerMissing

        try:
            servers = [PostgreSQLServer(fsync="on", max_prepared_transactions=100) for _ in range(2)]
        except ServerMissing as error:
            print(f"tx_databases is left out: {error}", flush=True)
            return
        single: dict[str, list[int]] = {"hand": [], "decided": [], "applied": []}
        rates: dict[str, list[float]] = {way: [] for way in single}
        entries = transfers = 0
        with servers[0], servers[1], Fleet(self.directory) as fleet:
            for server in servers:
                create_accounts(server.dsn())
            teller = fleet.leader()
            teller.do("tellers", dsns=[server.dsn() for server in servers])
            for way in single:
                teller.do("transfer", way=way, threads=1, count=100)
            for _ in range(self.rounds):
                for way in (*single, *reversed(single)):
                    answer = teller.do("transfer", way=way, threads=1, count=self.count(250, 50))
                    single[way] += answer["samples_us"]
                    if way != "hand":
                        entries, transfers = (
                            entries + answer["log_entries"],
                            transfers + len(answer["samples_us"]),
                        )
                for way in single:
                    answer = teller.do("transfer", way=way, threads=8, count=self.count(1200, 160))
                    rates[way].append(len(answer["samples_us"]) / answer["seconds"])
        hand = quantile(single["hand"], 0.5)
        more = {"hand_p50_us": round(hand, 1), "log_entries_each": round(entries / transfers, 3)}
        self._latency("tx_decided", single["decided"], to=hand, at_most=1.4, **more)
        self._latency("tx_applied", single["applied"], to=hand, at_most=2.0, **more)
        for way in ("applied", "decided"):
            rate, by_hand = median(rates[way]), median(rates["hand"])
            figures = {"per_s": round(rate, 1), "hand_per_s": round(by_hand, 1)}
            shown = f"{rate:.0f}/s, by hand {by_hand:.0f}/s"
            line = Line(
                f"tx_8_threads_{way}", figures, shown=shown, value=rate / by_hand, at_least=0.55, unit="x"
            )
            self.report.add(line)

    # -- ids -----------------------------------------------------------------------------------------------

    def ids_mint(self) -> None:
        """ids_mint, ids_mint_many, ids_cap: what a cluster's id costs this process, beside what others make in one"""
        minting.measure(self.report, scale=self.count(10, 1))


PARTS: Final[dict[str, tuple[str, ...]]] = {
    "sequential": (
        "put_leader",
        "put_follower",
        "put_client",
        "lock_unlock",
        "read_leader_idle",
        "read_leader_loaded",
    ),
    "put_64_asyncio": (),
    "put_64_threads": (),
    "failover_kill9": (),
    "stop_graceful": (),
    "idle_cpu": (),
    "isolation_process": ("isolation_process_client",),
    "gil": ("gil_client",),
    "rss": (),
    "ids_mint": ("ids_mint_many", "ids_cap"),
    "tx_map": (),
    "tx_databases": ("tx_decided", "tx_applied", "tx_8_threads_applied", "tx_8_threads_decided"),
}
"""What is measured together, and the lines it gives beside the one of its own name."""


def _chosen(only: Sequence[str]) -> list[str]:
    """The parts that give the lines asked for; all when nothing was."""
    if not only:
        return list(PARTS)
    known = {line: part for part, lines in PARTS.items() for line in (part, *lines)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return [part for part in PARTS if part in {known[name] for name in only}]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code: 1 when --strict and a limit was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller counts: a look, not a measurement")
    parser.add_argument(
        "--rounds", type=int, default=0, help="how often latency and throughput are taken (3; quick: 1)"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these lines")
    parser.add_argument(
        "--dir", default=None, help="where the logs are written; decides which disk is measured"
    )
    parser.add_argument("--strict", action="store_true", help="exit 1 when a limit was missed")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (1 if options.quick else 3)
    parts = _chosen(options.only)
    # Not the temporary directory, which is often in memory.
    directory = options.dir or "/var/tmp"
    began = monotonic()
    with tempfile.TemporaryDirectory(prefix="coordlib-bench-", dir=directory) as scratch:
        bench = Bench(scratch, is_quick=options.quick, rounds=rounds)
        bench.take_floor()
        for part in parts:
            getattr(bench, part)()
        bench.take_floor()
        bench.floor()
    report = bench.report
    print(
        f"\n{len(report.missed)} limits missed: {', '.join(report.missed)}"
        if report.missed
        else "\nall limits held"
    )
    configuration = {
        "quick": options.quick,
        "rounds": rounds,
        "members": 3,
        "directory": directory,
        "seconds": round(monotonic() - began, 1),
    }
    print(json.dumps(report.as_json(configuration)), flush=True)
    return 1 if options.strict and report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
