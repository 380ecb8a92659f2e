"""The kinds of faults, and how a plan of them is drawn. What each does to a world is in faults.py."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final, NamedTuple

from coordlib.testing.simulation.choices import Stream

__all__ = [
    "FAULT_KINDS",
    "FORMING_KINDS",
    "LEADER_KINDS",
    "SPOILING_KINDS",
    "Fault",
    "draw_fault",
    "draw_faults",
]

FAULT_INTERVAL_MS_MAX: Final = 4000
LEADER_FAULT_INTERVAL_MS: Final = 12_000


class Fault(NamedTuple):
    """One fault to come. `pick` resolves who is hit and how, at the moment; `strength` is at least 0, less than 1."""

    at_ms: int
    kind: str
    pick: int
    duration_ms: int
    strength: float


class _Kind(NamedTuple):
    does: str  # in words
    duration_ms_min: int
    duration_ms_max: int  # durations are as often short as long: their logarithm is uniform
    members_min: int = 1
    clients_min: int = 0


FAULT_KINDS: Final[dict[str, _Kind]] = {
    # the network
    "isolate_leader": _Kind("the leader is cut off from everybody", 700, 8000, 2),
    "isolate_member": _Kind("a member is cut off from everybody", 200, 15_000, 2),
    "mute_leader": _Kind("the leader hears the other members, and is not heard", 700, 8000, 2),
    "deafen_leader": _Kind("the leader is heard by the other members, and hears nothing", 700, 8000, 2),
    "mute_leaders": _Kind(
        "whoever comes to lead is not heard by the other members until the next one leads", 3000, 12_000, 3
    ),
    "cut_pair": _Kind("two members are cut off from each other", 200, 15_000, 2),
    "cut_one_way": _Kind("one member does not hear another", 200, 15_000, 2),
    "halves": _Kind("everybody is on one of two sides", 500, 8000, 2),
    "ring": _Kind("every member reaches a majority, each another one", 500, 8000, 3),
    "bridge": _Kind("one member sees both sides, which do not see each other", 500, 8000, 3),
    "random_graph": _Kind("many directed ways between members are cut", 500, 8000, 2),
    "cut_client": _Kind("a client is cut off from some members", 200, 15_000, 1, 1),
    "flapping": _Kind("a way between two members breaks and mends all the time", 1000, 10_000, 2),
    "hold": _Kind("one way stands still, then everything arrives at once", 100, 60_000, 2),
    "hold_leader": _Kind("nothing leaves the leader, then everything at once", 400, 10_000, 2),
    "reset": _Kind("one connection is lost", 0, 0),
    "reset_all": _Kind("a process loses all its connections", 0, 0),
    # processes; the duration is how long they are away
    "crash_leader": _Kind("the leader's machine loses power", 50, 6000),
    "kill_leader": _Kind("the leader is killed", 50, 6000),
    "crash": _Kind("a member's machine loses power", 50, 8000),
    "kill": _Kind("a member is killed", 50, 8000),
    "crash_within": _Kind("a member's machine loses power between two effects", 50, 4000),
    "crash_at_start": _Kind("it loses power again while recovering", 50, 2000),
    "crash_all": _Kind("all machines lose power", 50, 4000),
    "kill_all": _Kind("all members are killed", 50, 4000),
    "leave": _Kind("a member leaves in good order, a leader after handing over", 50, 4000),
    "hand_over_leader": _Kind("the leader hands its office to another", 0, 0, 2),
    "restart_storm": _Kind("a member is killed as often as it has started", 500, 6000),
    "pause_leader": _Kind("the leader stands still", 300, 10_000),
    "pause": _Kind("a process stands still", 20, 120_000),
    "suspend": _Kind("a machine sleeps", 500, 60_000),
    "slow": _Kind("a process takes long for everything", 500, 10_000),
    # clocks
    "step_wall": _Kind("a wall clock jumps", 0, 0),
    "drift_wall": _Kind("a wall clock goes wrong by up to a tenth", 1000, 20_000),
    "drift": _Kind("a monotonic clock goes at another rate, within the bound of this run", 0, 0),
    # disks
    "fsync_fails": _Kind("a sync fails, and what was to be synced is gone", 100, 4000),
    "write_fails": _Kind("a write fails halfway", 100, 4000),
    "read_fails": _Kind("a read fails at a restart", 100, 2000),
    "disk_full": _Kind("a disk is full", 2000, 20_000),
    "slow_disk": _Kind("every write takes long", 500, 10_000),
    "bit_rot": _Kind("a file of a member that is down changes", 100, 4000, 3),
    "latent_rot": _Kind("a file changes that is not being written, unnoticed", 100, 4000, 3),
    "wipe": _Kind("a member comes back with an empty directory", 1000, 6000, 3),
    "swap": _Kind("two members come back with each other's directory", 500, 3000, 2),
    "old_copy": _Kind("a member comes back with an older copy of its directory", 200, 3000, 3),
    # clients; the duration is how long until another one takes its place
    "crash_client": _Kind("a client dies", 50, 4000, 1, 1),
    "pause_client": _Kind("a client stands still", 50, 20_000, 1, 1),
}
"""Every kind of fault, with what it does in words."""

SPOILING_KINDS: Final = frozenset({"bit_rot", "latent_rot", "wipe", "swap", "old_copy"})
"""After these, a member's disk may rightly be called damaged, lost or behind."""

FORMING_KINDS: Final = frozenset(
    {
        "isolate_member",
        "cut_pair",
        "cut_one_way",
        "halves",
        "ring",
        "bridge",
        "random_graph",
        "flapping",
        "hold",
        "reset",
    }
    | {
        "reset_all",
        "crash",
        "kill",
        "crash_within",
        "crash_at_start",
        "crash_all",
        "kill_all",
        "restart_storm",
        "pause",
    }
    | {"suspend", "slow", "slow_disk"}
)
"""What may befall members that do not belong to a cluster yet."""

LEADER_KINDS: Final = tuple(kind for kind in FAULT_KINDS if kind.endswith("_leader"))


def draw_faults(
    stream: Stream,
    *,
    members: int,
    clients: int,
    from_ms: int,
    to_ms: int,
    kinds: Collection[str] | None = None,
) -> tuple[Fault, ...]:
    """
    Draw a plan: some kinds, some more often than others, and the leader often enough for it to change.

    At least 12 faults come in a minute, whatever is drawn.

    Args:
        kinds: Those that may be drawn at all; None: all.
    """
    possible = [
        kind
        for kind, is_for in FAULT_KINDS.items()
        if members >= is_for.members_min
        and clients >= is_for.clients_min
        and (kinds is None or kind in kinds)
    ]
    if not possible or to_ms <= from_ms:
        return ()
    share = stream.uniform(0.15, 0.6)
    chosen = [kind for kind in possible if stream.random() < share] or [stream.choice(possible)]
    weights = [stream.choice((1, 1, 2, 4)) for _ in chosen]
    lottery = [kind for kind, weight in zip(chosen, weights, strict=True) for _ in range(weight)]
    span = to_ms - from_ms
    count_min = math.ceil(span / FAULT_INTERVAL_MS_MAX)
    count = round(count_min * stream.uniform(1, 3))
    drawn = [draw_fault(stream, stream.choice(lottery), stream.randint(from_ms, to_ms)) for _ in range(count)]
    leader_kinds = [kind for kind in LEADER_KINDS if kind in possible]
    if leader_kinds:
        # In even parts of the time: a leader that is hit twice at once changes once.
        parts = max(3, span // LEADER_FAULT_INTERVAL_MS)
        for part in range(parts):
            low, high = from_ms + span * part // parts, from_ms + span * (part + 1) // parts
            drawn.append(draw_fault(stream, stream.choice(leader_kinds), stream.randint(low, high)))
    return tuple(sorted(drawn))


def draw_fault(stream: Stream, kind: str, at_ms: int) -> Fault:
    """Draw whom a fault hits, how long and how badly."""
    low, high = FAULT_KINDS[kind].duration_ms_min, FAULT_KINDS[kind].duration_ms_max
    pick, draw, strength = stream.randrange(1 << 30), stream.random(), stream.random()
    duration = round(low * (high / low) ** draw) if low else 0
    return Fault(at_ms, kind, pick, duration, round(strength, 4))
