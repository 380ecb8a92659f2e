"""The replicated limits: what the state machine may hold. Every one is refused by name when it would be
exceeded.

Limits belong to the state: they are fixed when the cluster forms, travel in snapshots, and are the same on
every member, because each of them decides the outcome of commands.
"""

from __future__ import annotations

from typing import NamedTuple

from coordlib.errors import QuotaExceeded

__all__ = ["ENTRY_OVERHEAD_BYTES", "Limits", "exceeded"]

ENTRY_OVERHEAD_BYTES = 128
"""
What one key costs beside its key and value: two object headers, its revisions, its slot in a dict
(measured).
"""


class Limits(NamedTuple):
    """
    Sizes in bytes, times in milliseconds, the rest are counts. All are inclusive.

    There is none on the replies of all sessions together, on purpose: an idle session acknowledges its last reply
    only with its next request, so that a few that rest could keep all others from working.

    Disk: the order of fields is part of the snapshot format. New ones go to the end, and their defaults are never
    changed: a snapshot that was written before they existed gets them.
    """

    name_size_bytes_max: int = 256  # of maps, locks, owners
    key_size_bytes_max: int = 4 * 1024
    value_size_bytes_max: int = 1024 * 1024
    entry_size_bytes_max: int = 4 * 1024 * 1024  # one operation as encoded
    state_size_bytes_max: int = (
        1024 * 1024 * 1024
    )  # all maps: keys, values and ENTRY_OVERHEAD_BYTES for each key
    maps_max: int = 4096
    update_pairs_max: int = 4096  # in one update: bounds the time it takes
    sessions_max: int = 10_000
    session_ttl_ms_min: int = 100
    session_ttl_ms_max: int = 24 * 60 * 60 * 1000
    replies_max: int = 1024  # kept for one session
    replies_size_bytes_max: int = 1024 * 1024  # kept for one session; the last one may exceed it
    acquisitions_max: int = 200_000  # held and queued, of all sessions: bounds the number of locks as well
    session_acquisitions_max: int = 4096
    lock_waiters_max: int = 10_000
    ids_window_ms_max: int = 600_000  # what a restore from back-up has to skip
    id_generators_max: int = 1024
    id_workers_max: int = 100_000  # ever used, of all generators: beyond it only those used before are leased
    tx_lifetime_ms: int = 600_000  # since the gtid was minted: no transaction is committed later
    tx_retention_ms: int = 86_400_000  # after that, for which it is remembered that it was
    tx_outcomes_max: int = 200_000  # of each: committed with a participant pending, aborted
    tx_participants_max: int = 64
    tx_conditions_max: int = 4096  # and as many guards
    tx_writes_max: int = 4096  # and as many releases, and branches in one FORGET
    services_max: int = 10_000  # registered, of all sessions
    session_services_max: int = 256
    tx_finished_max: int = 4_000_000  # committed and obeyed: 24 bytes each. At 100/s they last for 11 hours


def exceeded(limit: str, maximum: int, wanted: int) -> QuotaExceeded:
    """The error that names the limit, its value and what was asked for."""
    return QuotaExceeded(
        f"{limit} is {maximum}, this needs {wanted}; deletes and releases still work",
        limit=limit,
        maximum=maximum,
        wanted=wanted,
    )
