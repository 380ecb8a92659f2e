"""Defects of connections, of who is believed, and of what a member may conclude from a disk."""

from __future__ import annotations

from tests.mutants.patching import Mutant, replace

__all__ = ["MUTANTS"]

_LINKS = "coordlib.node.links:Links."
_SEALED = "nothing a replayed or misdirected frame says changes what consensus and sessions decide; only seals refuse it"

MUTANTS = (
    Mutant(
        "encoded-messages-are-mixed-up",
        "ClickHouse Keeper: a cache of what was encoded last is looked up by too little",
        (
            replace(
                _LINKS + "send",
                "if messages == self._last_messages:",
                "if messages == self._last_messages or (self._last_messages is not None "
                'and {type(m[1]).__name__ for m in messages} <= {"VoteReply", "AppendReply"} and _mutant_hit()):',
            ),
        ),
    ),
    Mutant(
        "wiped-disk-is-accepted-under-its-old-name",
        "RethinkDB #5289, RedisRaft #2: a member that forgot its votes and entries votes again",
        (
            replace(
                "coordlib.node.peers:Peers._judge_disk",
                "        if known != announce.disk_id:\n",
                "        if known != announce.disk_id and not _mutant_hit():\n",
            ),
            replace(
                "coordlib.node.peers:Peers._check_own_disk",
                "        if ours and ours != self.identity.disk_id:\n",
                "        if ours and ours != self.identity.disk_id and not _mutant_hit():\n",
            ),
        ),
        tests=("tests/node/test_formation.py",),
    ),
    Mutant(
        "two-are-let-form-a-cluster",
        "Consul and RabbitMQ (split cluster formation): two nodes each form a cluster, with a third that said yes to both",
        (
            replace(
                "coordlib.node.peers:Peers._may_back",
                "        return not backed or (",
                "        return not backed or (backed != candidate and _mutant_hit()) or (",
            ),
        ),
        tests=("tests/node/test_forming.py",),
    ),
    Mutant(
        "hearing-a-quorum-is-enough-to-form",
        "Consul (bootstrap-expect), RabbitMQ: who hears a quorum forms a cluster, and so does another that hears one",
        (
            replace(
                "coordlib.node.peers:Peers.try_to_form",
                "        if len(backers) + 1 < quorum or ",
                "        if len(backers) + 1 < quorum and not _mutant_hit() or ",
            ),
        ),
        tests=("tests/node/test_forming.py",),
    ),
    Mutant(
        "messages-of-an-earlier-run-are-taken",
        "etcd, ZeroMQ: what a dead process left in a queue speaks for the one that runs now",
        (
            replace(
                _LINKS + "_receive_on_route",
                "elif newest != peer.incarnation:",
                "elif newest != peer.incarnation and not _mutant_hit():",
            ),
        ),
        tests=("tests/node/test_links.py",),
        unseen="all that a member says is on its disk when it says it, so that a later run stands by it",
    ),
    Mutant(
        "untrusted-members-are-heard",
        "a member of another cluster, or with another's disk, takes part in elections",
        (
            replace(
                "coordlib.node.kernel:MemberKernel.peer_messages",
                "if raft is None or not peer.is_trusted:",
                "if raft is None or (not peer.is_trusted and not _mutant_hit()):",
            ),
        ),
        tests=("tests/node/test_formation.py",),
        unseen="a refused member stops by itself; only one that does not is kept out by this",
    ),
    Mutant(
        "replayed-frame-is-accepted",
        "RFC 8613 §7.4: a recorded frame is opened a second time",
        (
            replace(
                "coordlib.wire.cose:Encrypt0Opener.open",
                "if ahead <= 0 and (ahead <= -self.WINDOW or self.window >> -ahead & 1):",
                "if ahead <= 0 and (ahead <= -self.WINDOW or self.window >> -ahead & 1) and not _mutant_hit():",
            ),
        ),
        tests=("tests/wire/test_cose.py", "tests/wire/test_channel.py"),
        unseen=_SEALED,
    ),
    Mutant(
        "hello-to-another-member-is-accepted",
        "SIGMA: a handshake meant for one peer is answered by another that shares the secret",
        (
            replace(
                "coordlib.wire.channel:Responder._receive_hello",
                'if to not in ("", ours.node):',
                'if to not in ("", ours.node) and not _mutant_hit():',
            ),
        ),
        tests=("tests/wire/test_channel.py",),
        unseen=_SEALED,
    ),
    Mutant(
        "hello-of-another-cluster-is-accepted",
        "etcd: members of two clusters that share a secret and an address mix",
        (
            replace(
                "coordlib.wire.channel:Responder._receive_hello",
                "if cluster != ours.cluster:",
                "if cluster != ours.cluster and not _mutant_hit():",
            ),
        ),
        tests=("tests/wire/test_channel.py",),
        unseen=_SEALED,
    ),
    Mutant(
        "welcome-to-an-older-hello-is-accepted",
        "TLS: an answer that is not bound to the question",
        (
            replace(
                "coordlib.wire.channel:Initiator._receive_welcome",
                "if pending is None or answers != _answers(pending.frame):",
                "if pending is None or (answers != _answers(pending.frame) and not _mutant_hit()):",
            ),
            replace(
                "coordlib.wire.channel:Initiator._receive_welcome",
                "        open_mac0(pending.epoch.handshake_mac, frame[_HEAD_SIZE:], _welcome_aad(pending.frame))\n",
                "",
            ),
        ),
        tests=("tests/wire/test_channel.py",),
        unseen=_SEALED,
    ),
)
