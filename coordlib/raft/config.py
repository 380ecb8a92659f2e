"""The core's settings: ticks, sizes and counts. What a tick is, the caller decides (1 ms in production)."""

from __future__ import annotations

from dataclasses import dataclass

from coordlib.errors import ConfigError

__all__ = ["RaftConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RaftConfig:
    """
    Settings of one node in one group. All members of a group should have the same election ticks.

    Raises:
        ConfigError: A value is out of range or contradicts another; the message names both.
    """

    node_id: str
    heartbeat_ticks: int = 50
    election_ticks_min: int = 300
    election_ticks_max: int = 600
    append_size_bytes_max: int = 1 << 20  # of one AppendEntries; a larger entry travels alone
    append_entries_max: int = 1024
    probe_size_bytes_max: int = 1 << 16  # while the follower's log is unknown: it may well be refused
    inflight_messages_max: int = 64
    inflight_size_bytes_max: int = 8 << 20
    uncommitted_size_bytes_max: int = 32 << 20  # beyond: Overloaded
    committed_entries_max: int = (
        4096  # handed over by one Ready, so that a long log does not stall the caller
    )
    reads_pending_max: int = 100_000  # beyond: Overloaded
    commit_notice_ticks: int = 5  # how long a commit index waits for an AppendEntries to ride on
    reads_by_lease: bool = False
    drift_percent: int = 1  # by how much the rates of two members' clocks may differ; for leases only

    def __post_init__(self) -> None:
        if not self.node_id:
            raise ConfigError("node_id must not be empty")
        for name in (
            "heartbeat_ticks",
            "append_size_bytes_max",
            "append_entries_max",
            "probe_size_bytes_max",
            "inflight_messages_max",
            "inflight_size_bytes_max",
            "uncommitted_size_bytes_max",
            "committed_entries_max",
            "reads_pending_max",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.commit_notice_ticks < 0:
            raise ConfigError(f"commit_notice_ticks must not be negative, but is {self.commit_notice_ticks}")
        if not 0 <= self.drift_percent <= 50:
            raise ConfigError(f"drift_percent must be in 0..50, not {self.drift_percent}")
        # A follower may hear nothing for two intervals when one heartbeat is lost; three leave room.
        if self.election_ticks_min < 3 * self.heartbeat_ticks:
            raise ConfigError(
                f"election_ticks_min ({self.election_ticks_min}) must be at least three times "
                f"heartbeat_ticks ({self.heartbeat_ticks})"
            )
        if self.election_ticks_max <= self.election_ticks_min:
            raise ConfigError(
                f"election_ticks_max ({self.election_ticks_max}) must be above election_ticks_min "
                f"({self.election_ticks_min}), or elections are split for ever"
            )

    @property
    def lease_ticks(self) -> int:
        """
        How long a leader relies on a quorum's promise not to vote, on its own clock.

        Half of what drift alone would allow: the other half is for what no clock shows, such as a virtual
        machine that its host stops for a moment. Heartbeats renew it often enough. Two ticks less, because
        either side may have read its clock up to a tick late.
        """
        return max(0, self.election_ticks_min * (100 - self.drift_percent) // 200 - 2)
