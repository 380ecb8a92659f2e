"""`make bank`: transfers between two databases, a service and replicated maps, while everything is killed and cut at random.

Three members and two clients have tellers (`benchmarks.tellers`), and each hosts a vault. Killed with -9, and started
again: applications (so initiators, participants and members, the leader often, now and then two at once) and database
servers. Cut for some seconds: a member from the others, an application from a database. At the end all is brought back,
and when nothing is in doubt any more, every single transfer is looked at in every store, and held against the tellers'
notes.

    python -m benchmarks.bank [--minutes M] [--seed N] [--dir PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Final

# So that it also runs as a file, from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.figures import machine, quantile
from benchmarks.links import Links
from benchmarks.processes import Application, Fleet
from benchmarks.tellers import create_accounts

__all__ = ["main", "prove"]

SESSION_TTL_SECONDS: Final = 3.0
MEMBERS: Final = ("n1", "n2", "n3")
TELLERS: Final = ("teller-0", "teller-1")
SETTLE_SECONDS: Final = 60.0
CUT_SECONDS_MAX: Final = 6.0
HELD_SECONDS_MAX: Final = 30.0
"""How long a branch may stay prepared in a database that is up. docs/transactions.md has the parts: session TTL, searches."""

_HELD: Final = (
    "SELECT gid, extract(epoch FROM clock_timestamp() - greatest(prepared, pg_postmaster_start_time())) "
    "FROM pg_prepared_xacts"
)


def prove(
    notes: Iterable[Iterable[str]], stores: Mapping[str, Mapping[str, int]]
) -> tuple[list[str], dict[str, int]]:
    """
    Violations, and how much was looked at.

    Args:
        notes: Of each teller, as `benchmarks.tellers` says.
        stores: For each store, what every transfer that is in it changed, by number.
    """
    violations: list[str] = []
    looked_at = Counter({"begun": 0, "done": 0, "not": 0, "unsure": 0, "unsure_and_done": 0, "died": 0})
    begun: dict[str, tuple[str, str, int]] = {}
    told: dict[str, str] = {}
    for lines in notes:
        for line in lines:
            words = line.split()
            if words[0] == "begin":
                begun[words[1]] = (words[2], words[3], int(words[4]))
            else:
                told[words[1]] = words[0]
    for number, (source, target, amount) in begun.items():
        found = {store: rows[number] for store, rows in stores.items() if number in rows}
        outcome = told.get(number, "died")
        looked_at["begun"] += 1
        looked_at[outcome] += 1
        is_done = found == {source: -amount, target: amount}
        if found and not is_done:
            violations.append(f"{number} from {source} to {target} is half done: {found} ({outcome})")
        elif outcome == "done" and not is_done:
            violations.append(f"{number} was acknowledged and is nowhere")
        elif outcome == "not" and found:
            violations.append(f"{number} was said to be aborted and is there: {found}")
        looked_at["unsure_and_done"] += outcome != "done" and is_done
    for store, rows in stores.items():
        violations += [f"{store} has {number}, which nobody began" for number in rows if number not in begun]
    total = sum(sum(rows.values()) for rows in stores.values())
    if total:
        violations.append(f"the total is {total}, not 0")
    return violations, dict(looked_at)


class _Held:
    """Looks every half second how long branches have been prepared, from a thread of its own."""

    def __init__(self, dsns: Mapping[str, str]) -> None:
        self._dsns = dsns
        self._stop = threading.Event()
        self.longest_s = 0.0
        self.longest = ""
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        import psycopg

        while not self._stop.wait(0.5):
            for name, dsn in self._dsns.items():
                try:
                    with psycopg.connect(dsn, connect_timeout=2) as connection:
                        rows = connection.execute(_HELD).fetchall()
                except psycopg.Error:
                    continue  # it was just killed
                for gid, seconds in rows:
                    if float(seconds) > self.longest_s:
                        self.longest_s, self.longest = float(seconds), f"{gid} in {name}"

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class _Killing:
    def __init__(
        self, fleet: Fleet, links: Links, servers: Mapping[str, Any], scratch: str, seed: int
    ) -> None:
        self._fleet = fleet
        self._links = links
        self._servers = servers
        self._scratch = scratch
        self._chance = random.Random(seed)
        self._seed = seed
        self._clients: dict[str, Application] = {}
        self.kills: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.counters: Counter[str] = Counter()
        self.waits: list[float] = []
        for name, member in fleet.members.items():
            self._open(name, member)
        for name in TELLERS:
            self._start_client(name)

    def _start_client(self, name: str) -> None:
        client = self._clients[name] = self._fleet.client()
        self._open(name, client)

    def _open(self, name: str, application: Application) -> None:
        self._seed += 1
        arguments = {
            "dsns": {
                store: server.dsn().replace(
                    str(server.directory), os.path.dirname(self._links.socket(name, store))
                )
                for store, server in self._servers.items()
            },
            "notes": os.path.join(self._scratch, "notes"),
            "name": name,
            "seed": self._seed,
            "directory": os.path.join(self._scratch, f"vault-{name}"),
        }
        application.do("bank", arguments=arguments)

    def strike(self) -> None:
        chance = self._chance
        sleep(chance.uniform(0.3, 3.0))
        kind = chance.choice(
            ("member", "member", "leader", "client", "client", "database", "members", "cut", "cut", "cut")
        )
        if kind == "cut":
            self._cut()
        elif kind == "database":
            server = self._servers[chance.choice(sorted(self._servers))]
            server.kill()
            self.kills[kind] += 1
            sleep(chance.choice((0.0, 0.3, 2.0)))
            server.start()
        elif kind == "client":
            name = chance.choice(sorted(self._clients))
            self._clients[name].kill()
            self.kills[kind] += 1
            sleep(chance.choice((0.0, 0.5, 4.0)))
            self._start_client(name)
        else:
            names = sorted(self._fleet.members)
            victims = chance.sample(names, 2 if kind == "members" else 1)
            if kind == "leader":
                victims = [self._fleet.leader().name]
            for victim in victims:
                self._fleet.members[victim].kill()
                self.kills[kind] += 1
            sleep(chance.choice((0.0, 0.3, 2.0)))
            for victim in victims:
                self._fleet.restart(victim, is_waited_for=False)
            for victim in victims:
                self._fleet.members[victim].answer()
                self._open(victim, self._fleet.members[victim])

    def _cut(self) -> None:
        chance = self._chance
        if chance.random() < 0.5:
            one = chance.choice(MEMBERS)
            others = [name for name in MEMBERS if name != one]
        else:
            one, others = chance.choice((*MEMBERS, *TELLERS)), [chance.choice(sorted(self._servers))]
        kind = "member" if one in MEMBERS and others[0] in MEMBERS else "database"
        both = [(one, other) for other in others], [(other, one) for other in others]
        # One direction alone: what was asked for is done, and the answer is lost.
        self._links.cut(chance.choice((both[0], both[1], both[0] + both[1])))
        sleep(chance.uniform(0.1, CUT_SECONDS_MAX))
        self.cuts[kind] += bool(self._links.heal().number)

    def finish(self) -> None:
        """Stop all tellers."""
        applications = [*self._fleet.members.values(), *self._clients.values()]
        for application in applications:
            application.begin("unbank")
        for application in applications:
            answer = application.answer()
            self.outcomes.update(answer["outcomes"])
            self.counters.update(answer["counters"])
            self.waits += answer["waits"]

    def settle(self) -> list[str]:
        """Wait until nothing is in doubt; returns what still is after the time for that."""
        deadline = monotonic() + SETTLE_SECONDS
        while True:
            left = self._in_doubt()
            if not left or monotonic() > deadline:
                return left
            sleep(0.5)

    def _in_doubt(self) -> list[str]:
        import psycopg

        left: list[str] = []
        for name, server in self._servers.items():
            with psycopg.connect(server.dsn()) as connection:
                left += [f"{name}: {gid} is prepared" for gid, _ in connection.execute(_HELD)]
        for name, member in self._fleet.members.items():
            pending = member.do("stats")["transactions"]["pending"]
            if pending:
                left.append(f"{name} has {pending} transactions pending: {member.do('pending')}")
        return left

    def stores(self) -> dict[str, dict[str, int]]:
        """Every transfer that is in each store."""
        import psycopg

        found: dict[str, dict[str, int]] = {"vault": {}}
        for name, server in self._servers.items():
            with psycopg.connect(server.dsn()) as connection:
                found[name] = dict(connection.execute("SELECT number, amount FROM transfers").fetchall())
        member = next(iter(self._fleet.members.values()))
        found["map"] = member.do("books")["transfers"]
        for path in Path(self._scratch).glob("vault-*/vault"):
            for line in path.read_text().splitlines():
                number, change = line.split()
                if number in found["vault"]:
                    found["vault"][number] += int(change)  # twice: prove() will say so
                found["vault"].setdefault(number, int(change))
        return found

    def balances(self) -> list[str]:
        """Whether accounts and transfers agree in each store that has both."""
        import psycopg

        wrong: list[str] = []
        for name, server in self._servers.items():
            with psycopg.connect(server.dsn()) as connection:
                row = connection.execute(
                    "SELECT (SELECT sum(balance) FROM accounts), (SELECT coalesce(sum(amount), 0) FROM transfers)"
                ).fetchone()
            assert row is not None
            if row[0] != row[1]:
                wrong.append(f"{name}: accounts sum to {row[0]}, transfers to {row[1]}")
        for name, member in self._fleet.members.items():
            books = member.do("books")
            accounts, moved = sum(books["balances"].values()), sum(books["transfers"].values())
            if accounts != moved:
                wrong.append(f"maps as {name} has them: accounts sum to {accounts}, transfers to {moved}")
        return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, prove, print, and return the exit code: 1 when anything was half done, lost, or left in doubt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bank", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of victims and moments; 0: a new one"
    )
    parser.add_argument("--dir", default="/var/tmp")
    options = parser.parse_args(arguments)
    # Justification: only who has the servers installed runs this.
    from coordlib.testing.databases import PostgreSQLServer, ServerMissing

    try:
        servers = {
            name: PostgreSQLServer(max_prepared_transactions=200, max_connections=200)
            for name in ("first", "second")
        }
    except ServerMissing as error:
        print(f"python -m benchmarks.bank: {error}", file=sys.stderr)
        return 2
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 31)
    print(f"seed {seed}", flush=True)
    began = monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="coordlib-bank-", dir=options.dir) as scratch,
        servers["first"],
        servers["second"],
    ):
        os.mkdir(os.path.join(scratch, "notes"))
        for server in servers.values():
            create_accounts(server.dsn())
        sockets = {name: str(server.socket) for name, server in servers.items()}
        with (
            Links(MEMBERS, TELLERS, sockets) as links,
            Fleet(scratch, members=len(MEMBERS), session_ttl=SESSION_TTL_SECONDS, links=links) as fleet,
        ):
            killing = _Killing(fleet, links, servers, scratch, seed)
            held = _Held({name: server.dsn() for name, server in servers.items()})
            shown = 0
            while monotonic() - began < options.minutes * 60:
                killing.strike()
                if killing.kills.total() // 10 > shown:
                    shown = killing.kills.total() // 10
                    struck = {**killing.kills, **{f"cut {kind}": n for kind, n in killing.cuts.items()}}
                    print(f"{monotonic() - began:6.0f} s  {dict(sorted(struck.items()))}", flush=True)
            killing.finish()
            violations = [f"in doubt at the end: {one}" for one in killing.settle()]
            held.stop()
            notes = [path.read_text().splitlines() for path in Path(scratch, "notes").iterdir()]
            found, looked_at = prove(notes, killing.stores())
            violations += found + killing.balances()
            logs = fleet.logs() if violations else {}
    if held.longest_s > HELD_SECONDS_MAX:
        violations.append(f"{held.longest} was prepared for {held.longest_s:.1f} s")
    for name, log in logs.items():
        print(f"--- {name}\n{log[-3000:]}")
    for violation in violations[:50]:
        print(f"VIOLATION: {violation}")
    result: dict[str, Any] = {
        "minutes": round((monotonic() - began) / 60, 1),
        "seed": seed,
        "kills": dict(sorted(killing.kills.items())),
        "cuts": dict(sorted(killing.cuts.items())),
        **looked_at,
        "wait_p50_s": round(quantile(killing.waits, 0.5), 4),
        "wait_p99_s": round(quantile(killing.waits, 0.99), 3),
        "prepared_longest_s": round(held.longest_s, 1),
        "outcomes": dict(sorted(killing.outcomes.items())),
        "counters": dict(sorted(killing.counters.items())),
        "violations": len(violations),
    }
    print(
        f"{killing.kills.total()} kills, {killing.cuts.total()} cuts, {looked_at['begun']} transfers, "
        f"{looked_at['done']} acknowledged: "
        f"{len(violations)} violations; the longest that a branch was prepared: {held.longest_s:.1f} s"
    )
    print(json.dumps({"machine": machine(), "bank": result}), flush=True)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
