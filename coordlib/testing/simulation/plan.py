"""What one seed stands for: how large the cluster is, how bad its surroundings are, what is asked of it, what befalls it.

Every seed draws its own subset of everything (swarm testing: Groce et al., ISSTA 2012): a run in which all goes wrong at
once never gets as far as the corners that a run with one kind of fault reaches. Drawn once, before anything runs, so
that a plan can be shown, cut down and run again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordlib.config import Timing
from coordlib.testing.simulation.choices import Choices, Stream
from coordlib.testing.simulation.fault_kinds import (
    FAULT_KINDS,
    FORMING_KINDS,
    Fault,
    draw_fault,
    draw_faults,
)
from coordlib.testing.simulation.surroundings import ClockProfile, DiskProfile, NetworkProfile
from coordlib.testing.simulation.workload import Load, draw_load

__all__ = ["Plan", "Reduction", "draw_plan", "loaded_plan"]

FAULTS_FROM_MS = 2_000
SAFETY_MS = 42_000
LIVENESS_MS = 8_000
TOTAL_MS = 60_000
FORMING_MS = 4_000
PARTED_FOUNDERS_SHARE = 0.1
MUTE_LEADERS_SHARE = 0.2
BANK_SEEDS_SHARE = 0.2
BANK_WEIGHT = 4.0  # of all others together


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the run. Times are milliseconds."""

    seed: int
    members: int
    clients: int
    timing: Timing
    network: NetworkProfile
    disk: DiskProfile
    clock: ClockProfile
    load: Load
    faults: tuple[Fault, ...]
    forming_faults: tuple[Fault, ...] = ()  # before there is a cluster
    bootstrap: tuple[str, ...] = ()  # the members that are told to form one with a quorum
    is_sealed: bool = False
    reads_by_lease: bool = False
    segment_size_bytes: int = 64 * 1024
    snapshot_entries: int = 20_000  # a snapshot is taken after so many entries
    entries_retained: int = 2_000
    chunk_size_bytes: int = 256 * 1024
    append_entries_max: int = 1024  # in one message, and so on: see `RaftConfig`
    probe_size_bytes_max: int = 1 << 16
    inflight_messages_max: int = 64
    tx_lifetime_ms: int = 600_000  # and so on: see `Limits`
    tx_retention_ms: int = 86_400_000
    tx_outcomes_max: int = 200_000
    tx_finished_max: int = 200_000
    safety_ms: int = SAFETY_MS
    liveness_ms: int = LIVENESS_MS
    total_ms: int = TOTAL_MS


@dataclass(frozen=True)
class Reduction:
    """What is left out of a plan; what remains draws exactly what it drew before."""

    faults: tuple[int, ...] | None = None  # those that stay, by their places in the plan; None: all
    calm: tuple[str, ...] = ()  # of "network", "disk", "clock", "forming"
    without: tuple[str, ...] = ()  # services
    clients: int | None = None

    def apply(self, plan: Plan) -> Plan:
        if self.faults is not None:
            plan = replace(plan, faults=tuple(plan.faults[place] for place in self.faults))
        if "network" in self.calm:
            plan = replace(plan, network=NetworkProfile())
        if "disk" in self.calm:
            plan = replace(plan, disk=DiskProfile())
        if "clock" in self.calm:
            plan = replace(plan, clock=ClockProfile())
        if "forming" in self.calm:
            plan = replace(plan, forming_faults=())
        if self.without:
            weights = {name: share for name, share in plan.load.weights.items() if name not in self.without}
            plan = replace(plan, load=replace(plan.load, weights=weights))
        if self.clients is not None:
            plan = replace(plan, clients=self.clients)
        return plan

    def arguments(self) -> str:
        """The command line that asks for it."""
        parts = []
        if self.faults is not None:
            parts.append(f"--faults {','.join(map(str, self.faults)) or 'none'}")
        if self.calm:
            parts.append(f"--calm {','.join(self.calm)}")
        if self.without:
            parts.append(f"--without {','.join(self.without)}")
        if self.clients is not None:
            parts.append(f"--clients {self.clients}")
        return " ".join(parts)


def draw_plan(seed: int) -> Plan:
    """The plan of a seed: the same for ever, as long as this module is."""
    chance = Choices(seed).stream("plan")
    load = _draw_bank_share(Choices(seed).stream("bank share"), draw_load(chance))
    members = chance.choice((1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 5, 5, 5, 6, 7))
    # Cut small, what a new leader adds does not travel with all that precedes it. But then little gets through.
    append_entries_max, inflight_messages_max = chance.choice(
        ((1024, 64), (1024, 64), (1024, 1), (1, 8), (2, 4), (5, 2), (1, 64))
    )
    probe_size_bytes_max = chance.choice((1 << 16, 1 << 16, 300, 1))
    if append_entries_max < 1024:
        load = replace(load, operations_per_second=min(load.operations_per_second, 12))
    clients = chance.randint(0, 3) if members > 1 else chance.randint(1, 2)
    plan = Plan(
        seed=seed,
        members=members,
        clients=clients,
        timing=_draw_timing(chance),
        network=NetworkProfile.draw(chance),
        disk=DiskProfile.draw(chance),
        clock=ClockProfile.unbounded() if chance.random() < 0.05 else ClockProfile.draw(chance),
        load=load,
        faults=draw_faults(
            chance,
            members=members,
            clients=clients,
            from_ms=FAULTS_FROM_MS,
            to_ms=SAFETY_MS,
            kinds=FAULT_KINDS.keys() - {"mute_leaders"},
        ),
        forming_faults=_draw_forming_faults(chance, members),
        bootstrap=tuple(
            f"n{number}"
            for number in range(1, members + 1)
            if chance.random() < chance.choice((0.0, 0.0, 0.4))
        ),
        is_sealed=chance.random() < 0.04,
        reads_by_lease=chance.random() < 0.5,
        segment_size_bytes=chance.choice((8, 16, 64)) * 1024,
        snapshot_entries=chance.choice((20, 50, 100, 400, 20_000)),
        entries_retained=chance.choice((0, 5, 50, 2_000)),
        append_entries_max=append_entries_max,
        probe_size_bytes_max=probe_size_bytes_max,
        inflight_messages_max=inflight_messages_max,
        **_draw_tx_limits(Choices(seed).stream("tx limits")),
        # Large states in tiny pieces would only take longer than anybody waits.
        chunk_size_bytes=chance.choice((16 * 1024 if load.padding_size_bytes else 200, 20_000, 256 * 1024)),
    )
    plan = _mute_leaders(Choices(seed).stream("mute leaders"), plan)
    return _part_founders(Choices(seed).stream("founders"), plan)


def _mute_leaders(chance: Stream, plan: Plan) -> Plan:
    """
    Drawn by itself, in one seed of five where it can be: it leaves little room for other faults.

    By chance alone a follower's log has to be cut back over two terms in one seed of a hundred.
    """
    if plan.members < FAULT_KINDS["mute_leaders"].members_min or chance.random() >= MUTE_LEADERS_SHARE:
        return plan
    fault = draw_fault(chance, "mute_leaders", chance.randint(FAULTS_FROM_MS, SAFETY_MS))
    return replace(plan, faults=tuple(sorted((*plan.faults, fault))))


def _part_founders(chance: Stream, plan: Plan) -> Plan:
    """Now and then those who could each form a cluster do not hear each other."""
    if plan.members < 3 or chance.random() >= PARTED_FOUNDERS_SHARE:
        return plan
    cut = Fault(
        0,
        chance.choice(("bridge", "ring", "random_graph")),
        chance.randrange(1 << 30),
        chance.randint(1500, FORMING_MS),
        0.3 * chance.random(),
    )
    names = [f"n{number}" for number in range(1, plan.members + 1)]
    return replace(
        plan,
        forming_faults=(cut, *plan.forming_faults),
        bootstrap=tuple(name for name in names if chance.random() < 0.7),
    )


def _draw_bank_share(chance: Stream, load: Load) -> Load:
    """Mostly small; now and then hardly anything else is done, as what goes wrong takes several transactions at once."""
    if chance.random() < BANK_SEEDS_SHARE:
        return replace(load, weights={**load.weights, "bank": BANK_WEIGHT * sum(load.weights.values())})
    return load


def _draw_tx_limits(chance: Stream) -> dict[str, int]:
    """Small in some seeds, so that outcomes are forgotten while somebody may still ask for them."""
    return {
        "tx_lifetime_ms": chance.choice((15_000, 600_000)),
        "tx_retention_ms": chance.choice((10_000, 86_400_000, 86_400_000)),
        "tx_outcomes_max": chance.choice((20, 200_000, 200_000)),
        "tx_finished_max": chance.choice((20, 200_000, 200_000)),
    }


def _draw_forming_faults(chance: Stream, members: int) -> tuple[Fault, ...]:
    if chance.random() < 0.7:
        return ()
    return draw_faults(chance, members=members, clients=0, from_ms=0, to_ms=FORMING_MS, kinds=FORMING_KINDS)


def _draw_timing(chance: Stream) -> Timing:
    heartbeat = chance.choice((50, 50, 80, 100))
    return Timing(
        heartbeat_ms=heartbeat,
        election_ms_min=heartbeat * 6,
        election_ms_max=heartbeat * 12,
        session_ttl_ms=chance.choice((3000, 3000, 5000, 10_000)),
        request_timeout_ms=chance.choice((2000, 3000, 5000)),
    )


def loaded_plan(seed: int) -> Plan:
    """The plan that speed is measured by: five members, 50 operations a second, every fault, and default times."""
    plan = draw_plan(seed)
    chance = Choices(seed).stream("loaded")
    return replace(
        plan,
        members=5,
        clients=2,
        timing=Timing(session_ttl_ms=3000, request_timeout_ms=3000),
        load=replace(plan.load, operations_per_second=50),
        faults=draw_faults(chance, members=5, clients=2, from_ms=FAULTS_FROM_MS, to_ms=SAFETY_MS),
        is_sealed=False,
        snapshot_entries=400,
        entries_retained=50,
        chunk_size_bytes=20_000,
        append_entries_max=Plan.append_entries_max,
        probe_size_bytes_max=Plan.probe_size_bytes_max,
        inflight_messages_max=Plan.inflight_messages_max,
    )
