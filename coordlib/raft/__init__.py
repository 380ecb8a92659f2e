"""Raft without I/O: one member of one group as a value. This is its manual.

The caller owns the clock, the randomness, the disk, the network and the replicated machine; `RawNode` owns
the decisions. The loop of a caller::

    node = RawNode(config, hard_state=..., snapshot=..., entries=..., random_ticks=..., now=clock())
    while True:
        wait(until=node.deadline)
        for sender, message in everything_that_has_arrived():
            node.step(sender, message)
        ...                                     # propose, request_read, report_reachable, ...
        node.tick(clock())                      # the clock is read after the input was stepped
        while node.has_ready():
            ready = node.ready()
            send(ready.messages)                # may leave before the disk
            write_and_sync(ready.hard_state, ready.entries, ready.snapshot)
            send(node.persisted(ready))         # must not leave before the disk
            if ready.snapshot: restore_machine(ready.snapshot)
            apply(ready.committed)              # in order; then answer ready.reads
            node.applied_to(...)

The caller MUST

1. make a Ready durable, `hard_state`, `entries` and the restart after `snapshot` as one atomic step or in
   this order, before it calls `persisted`; and call `persisted` for every Ready, in order. Several may be
   outstanding, so that the disk may work on its own thread.
2. send nothing of `persisted` earlier. Messages may be lost, repeated and reordered on the way; a message
   must not be altered, nor come from another sender than `step` is told.
3. stop for good when a write fails: nothing that waited for it was promised to anybody.
4. restore the machine to `snapshot` before it applies `committed` of the same or a later Ready.
5. step all input that has arrived before it calls `tick`, and read the clock after that.
6. answer a read of `reads` only when the machine has applied its read index, and take the read of
   `failed_reads` for not done.
7. report the end of every transfer that `snapshots_wanted` asked for, with `report_snapshot`; step an
   InstallSnapshot only when its file is complete and durable here.
8. give `random_ticks` from a source that differs between members.
9. call `report_reachable` for every new run of a follower, once nothing of its earlier run will be stepped any more:
   what that one acknowledged is not known to be there, and nothing is committed on its word (`Heartbeat`).

Where we differ from the paper, and why that is safe: docs/divergence.md. In short: pre-vote and a quorum
check; silence towards candidates, at start too; entries leave before the leader's disk has them; rejections
carry hints; followers are probed, streamed to, or sent a snapshot; commit news waits a little for company.

Source: Ongaro, Ousterhout, "In Search of an Understandable Consensus Algorithm" (Raft), and Ongaro,
"Consensus: Bridging Theory and Practice" (Thesis). The shape of the loop is etcd-io/raft's.
"""

from __future__ import annotations

from coordlib.raft.config import RaftConfig
from coordlib.raft.log import RaftLog
from coordlib.raft.progress import ProgressState, ProgressView
from coordlib.raft.quorum import VoteResult
from coordlib.raft.rawnode import RawNode, Ready
from coordlib.raft.state import Role

__all__ = ["ProgressState", "ProgressView", "RaftConfig", "RaftLog", "RawNode", "Ready", "Role", "VoteResult"]
